"""Results of formats without a digest: contradictions are told, whole files are read."""

import copy
import json
import shutil
from pathlib import Path

import damaged_bytes
import pytest
import safetensors.torch
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerIntegratedGradients,
    Lime,
    ShapleyValueSampling,
    TextTokenInput,
)

from captum_llm_ext import (
    CorpusBaselines,
    GenerationAttribution,
    GenerationAttributionResult,
    GenerationGradientAttribution,
    TextSegmentInput,
)

DATA = Path(__file__).parent / "data"
NO_DIGEST = "has no digest"
TARGET = " golf & chess\n."


def as_format_2(path):
    """The file as it would have been written then: no roles, no digest."""

    def change(rest):
        pieces = {n: [p[:2] for p in rest[n]] for n in ("prompt_pieces", "output_pieces")}
        return rest | pieces | {"format": 2}

    header, data = damaged_bytes.split(path.read_bytes())
    text = json.dumps(change(json.loads(header["__metadata__"]["captum_llm_ext"])))
    header["__metadata__"] = {"captum_llm_ext": text}
    path.write_bytes(damaged_bytes.joined(header, data))


def kinds(model, tokenizer):
    words = TextSegmentInput("Dave lives in Austin", tokenizer, baselines="delete")
    tokens = TextTokenInput("Dave lives in", tokenizer, skip_tokens=[1])
    corpus = CorpusBaselines(["Ann lives in Rome.", "Bob works in Bari."], min_candidates=0)
    drawn = TextSegmentInput("Dave lives in Austin", tokenizer, baselines=corpus)
    groups = torch.tensor([[0, 1, 0, *[1] * 9]])[:, : len(tokens.values)]

    def of(method, **settings):
        return GenerationAttribution(method(model), tokenizer, **settings).attribute

    layer = LayerIntegratedGradients(model, model.get_input_embeddings())
    gradient = GenerationGradientAttribution(layer, tokenizer)
    return {
        "words": lambda: of(KernelShap)(words, TARGET, output_unit="word"),
        "fixed output": lambda: of(FeatureAblation)(words, TARGET, output_unit=None),
        "groups": lambda: of(FeatureAblation)(tokens, TARGET, feature_mask=groups),
        "draws": lambda: of(ShapleyValueSampling)(drawn, TARGET, n_samples=4, num_trials=2),
        "probabilities": lambda: of(FeatureAblation, attr_target="prob")(words, TARGET),
        "logits": lambda: of(Lime, attr_target="logit")(words, TARGET, n_samples=60),
        "a callable": lambda: of(FeatureAblation, attr_target=log_prob)(words, TARGET),
        "another question": lambda: of(KernelShap)(words, TARGET).refit(
            FeatureAblation, attr_target="log_odds"
        ),
        "gradients": lambda: gradient.attribute(words, TARGET, n_steps=4),
    }


def log_prob(logits, target):
    """A value of the user's own that is called like another one."""
    return logits.gather(2, target.expand(len(logits), -1)[..., None])[..., 0] - logits.mean(2)


KINDS = (
    "words",
    "fixed output",
    "groups",
    "draws",
    "probabilities",
    "logits",
    "a callable",
    "another question",
    "gradients",
)


@pytest.mark.filterwarnings("ignore:(?!.*has no digest)")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_consistent_files_are_never_refused(model, tokenizer, tmp_path, kind, dtype):
    path = tmp_path / "result"
    result = kinds(copy.deepcopy(model).to(dtype), tokenizer)[kind]()
    result.save(path)
    as_format_2(path)
    with pytest.warns(UserWarning, match=NO_DIGEST):
        loaded = GenerationAttributionResult.load(path, unverified=True)
    assert torch.equal(loaded.values.nan_to_num(), result.values.nan_to_num())


def changed(version, name, at, change, folder):
    """A file with another number at one place."""
    path = folder / "result"
    with safetensors.safe_open(DATA / f"result_format_{version}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors[name][at] = change(tensors[name][at])
    safetensors.torch.save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("name", "at", "match"),
    [
        ("seq_attr", 1, "sum of `token_attr`"),
        ("token_attr", (2, 1), "sum of `token_attr`"),
        ("output_attr", (6, 0), "`efficiency_gap`"),
        ("output_attr", (1, 0), "after a token"),
        ("output_attr_se", (2, 1), "after a token"),
        ("full_values", 3, "`efficiency_gap`"),
        ("empty_values", 0, "`efficiency_gap`"),
        ("efficiency_gap", 0, "`efficiency_gap`"),
        ("values", (0, 4), "full coalition"),
        ("output_probs", 5, "`output_probs`"),
    ],
)
def test_redundant_fields_are_compared(tmp_path, version, name, at, match):
    path = changed(version, name, at, lambda number: number + 1e-3, tmp_path)
    with pytest.raises(ValueError, match=rf"is damaged \(.*{match}.*give a file written"):
        GenerationAttributionResult.load(path, unverified=True)


@pytest.mark.parametrize(("name", "value"), [("values", torch.inf), ("token_attr_se", -1.0)])
def test_impossible_numbers_are_refused(tmp_path, name, value):
    path = changed(1, name, (3, 0), lambda _: value, tmp_path)
    with pytest.raises(ValueError, match=f"`{name}` holds"):
        GenerationAttributionResult.load(path, unverified=True)


def test_resaved_old_file_no_longer_warns(tmp_path):
    path = tmp_path / "result"
    shutil.copy(DATA / "result_format_2.safetensors", path)
    with pytest.raises(ValueError, match=r"no digest.*give `unverified=True`"):
        GenerationAttributionResult.load(path)
    with pytest.warns(UserWarning, match=NO_DIGEST):
        result = GenerationAttributionResult.load(path, unverified=True)
    result.save(path)
    assert GenerationAttributionResult.load(path).to_dict() == result.to_dict()
