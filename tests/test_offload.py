"""Models that lie partly in main memory or on disk, or wait there until a layer is run."""

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from captum.attr import ShapleyValueSampling
from transformers import AutoModelForCausalLM

from captum_llm_ext import GenerationAttribution, TextSegmentInput, _compat
from captum_llm_ext.model import model_identity

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His interests"
LAYERS = ("model.layers.0", "model.layers.1")


def attribute(model, tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    attribution = GenerationAttribution(ShapleyValueSampling(model), tokenizer)
    return attribution.attribute(inp, gen_args={"max_new_tokens": 5}, n_samples=6)


@pytest.fixture(scope="module")
def expected(tokenizer):
    return attribute(tiny.llama(len(tokenizer)), tokenizer)


def placed(how, vocabulary, folder):
    model = tiny.llama(vocabulary)
    if how == "all in main memory":
        return cpu_offload(model, torch.device("cpu"))
    if how == "all on disk":
        return disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    rest = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    maps = {
        "embedding and a layer on disk": {
            "model.embed_tokens": "disk",
            LAYERS[0]: "cpu",
            LAYERS[1]: "disk",
        },
        "layers on disk": {"model.embed_tokens": "cpu", **dict.fromkeys(LAYERS, "disk")},
    }
    return dispatch_model(model, {**maps[how], **rest}, main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize(
    "how",
    ["all in main memory", "all on disk", "embedding and a layer on disk", "layers on disk"],
)
def test_offloaded_models_give_equal_results(how, tokenizer, tmp_path, expected):
    model = placed(how, len(tokenizer), tmp_path)
    if how != "layers on disk":
        assert next(model.parameters()).device.type == "meta"  # the embedding
    assert _compat.input_device(model) == torch.device("cpu")
    hooks = {name: module._hf_hook for name, module in model.named_modules() if has_hook(module)}
    result = attribute(model, tokenizer)
    assert torch.equal(result.target, expected.target)
    # Logits are summed up in another order: float32, down to -25 nats.
    torch.testing.assert_close(result.values, expected.values, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.full_attr, expected.full_attr, atol=1e-5, rtol=0)
    assert result.values.device.type == "cpu"
    assert {n: m._hf_hook for n, m in model.named_modules() if has_hook(m)} == hooks
    # It is the same model as far as a checkpoint or a folder of results can tell.
    places = {name: p.device for name, p in model.named_parameters()}
    assert model_identity(model) == model_identity(tiny.llama(len(tokenizer)))
    assert model_identity(model) != model_identity(tiny.llama(len(tokenizer), seed=1))
    assert {name: p.device for name, p in model.named_parameters()} == places


def has_hook(module):
    return hasattr(module, "_hf_hook")


def test_device_map_with_disk(tokenizer, tmp_path, expected):
    tiny.llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    everywhere = {"model.embed_tokens": "disk", LAYERS[0]: "cpu", LAYERS[1]: "disk"}
    everywhere |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=everywhere, offload_folder=tmp_path / "offload"
    ).eval()
    assert model.device.type == "meta"
    result = attribute(model, tokenizer)
    torch.testing.assert_close(result.full_attr, expected.full_attr, atol=1e-6, rtol=0)
    assert result.full_attr.device.type == "cpu"


def test_device_map_auto(tokenizer, tmp_path, expected):
    tiny.llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto").eval()
    result = attribute(model, tokenizer)
    torch.testing.assert_close(result.full_attr.cpu(), expected.full_attr, atol=1e-4, rtol=0)
