"""What can be given as a target, and how a target is generated where none is."""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from captum.attr import FeatureAblation, LayerIntegratedGradients, RemoteLLMAttribution
from remote_server import Server
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    TextStreamer,
)

from captum_llm_ext import (
    CompletionsProvider,
    GenerationAttribution,
    GenerationAttributionResult,
    GenerationGradientAttribution,
    RemoteGenerationAttribution,
    TextSegmentInput,
    attribute_dataset,
)
from captum_llm_ext.attribution.target import as_ids

# Absent is deleted: what comes of it is known.
attribute_dataset = partial(attribute_dataset, baselines="delete")

PROMPT = "Dave lives in Palm Coast"
IDS = [5, 6, 7]


@pytest.fixture
def own(tokenizer):
    return tiny.llama(len(tokenizer))


def attribute(model, tokenizer, target=None, gen_args=None, prompt=PROMPT, **options):
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    return attribution.attribute(
        TextSegmentInput(prompt, tokenizer, baselines="delete"),
        target,
        gen_args=gen_args,
        **options,
    )


def accepted(tokenizer):
    encoded = tokenizer(" golf", add_special_tokens=False)
    golf = tokenizer.encode(" golf", add_special_tokens=False)
    padded = {"input_ids": torch.tensor([[0, 0, *IDS]]), "attention_mask": torch.ones(1, 5).long()}
    padded["attention_mask"][0, :2] = 0
    return {
        "one text in a list": ([" golf"], golf),
        "a text of numpy": (np.array([" golf"])[0], golf),
        "numpy": (np.array(IDS), IDS),
        "numpy in a row": (np.array([IDS], dtype=np.uint16), IDS),
        "numbers of numpy": (list(np.array(IDS)), IDS),
        "numbers of torch": (list(torch.tensor(IDS)), IDS),
        "a range": (range(5, 8), IDS),
        "a row in a list": ([IDS], IDS),
        "int32": (torch.tensor(IDS, dtype=torch.int32), IDS),
        "what a tokenizer returns": (encoded, golf),
        "as tensors": (tokenizer(" golf", add_special_tokens=False, return_tensors="pt"), golf),
        "of the package tokenizers": (encoded[0], golf),
        "padding": (padded, IDS),
        "with a gradient's history": (torch.tensor(IDS)[torch.arange(3)], IDS),
    }


@pytest.mark.parametrize("name", accepted(tiny.byte_level()))
def test_unambiguous_targets_are_accepted(tokenizer, name):
    given, wanted = accepted(tokenizer)[name]
    assert as_ids(given, tokenizer).tolist() == wanted


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ([" golf", " chess"], ValueError, "2 entries with texts among them"),
        ([" golf", 5], ValueError, "texts among them"),
        (torch.tensor([1.0]), TypeError, r"type torch.float32 holds 1.0, a float"),
        (np.array([1.5]), TypeError, "type float64 holds 1.5"),
        ([5, 6.0], TypeError, "holds 6.0, a float"),
        (torch.tensor([True, False]), TypeError, "type torch.bool holds True, a bool"),
        ([True], TypeError, "holds True, a bool"),
        ([5, None], TypeError, "holds None"),
        (b" golf", TypeError, "`target` is a bytes"),
        ({5, 6}, TypeError, "`target` is a set"),
        (iter(IDS), TypeError, "iterator"),
        (np.array(5), TypeError, "`target` is a ndarray"),
        (torch.tensor(5), TypeError, "`target` is a Tensor"),
        ([[5], [6]], TypeError, "`target` has 2 rows"),
        ([[5, 6], [7]], TypeError, "`target` has 2 rows"),
        ([[[5, 6]]], TypeError, "`target` has 1 rows"),
        (np.zeros((2, 3), int), TypeError, r"`target` has shape \(2, 3\)"),
        (torch.zeros(1, 2, 3).long(), TypeError, r"`target` has shape \(1, 2, 3\)"),
        ({"text": " golf"}, TypeError, "without `input_ids` or `sequences`"),
        (torch.zeros(2, device="meta").long(), TypeError, "a tensor without numbers"),
        ([2**70], ValueError, "outside of every vocabulary"),
        ([400], ValueError, "id 400 is outside the model's vocabulary"),
        ([-100, 5], ValueError, "id -100 is outside"),
        (np.array([], dtype=int), ValueError, "the target is empty"),
        ([""], ValueError, "the target is empty"),
        ({"input_ids": []}, ValueError, "the target is empty"),
    ],
)
@pytest.mark.parametrize("kind", ["coalitions", "gradients", "remote"])
def test_invalid_targets_fail_before_any_pass(tokenizer, kind, target, error, message):
    model = tiny.llama(len(tokenizer))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    silent = SimpleNamespace(get_logprobs=lambda **_: pytest.fail("the provider was asked"))
    attribution = {
        "coalitions": lambda: GenerationAttribution(FeatureAblation(model), tokenizer),
        "gradients": lambda: GenerationGradientAttribution(
            LayerIntegratedGradients(model, None), tokenizer
        ),
        "remote": lambda: RemoteGenerationAttribution(
            FeatureAblation(RemoteLLMAttribution.placeholder_model), tokenizer, silent
        ),
    }[kind]()
    with pytest.raises(error, match=message):
        attribution.attribute(TextSegmentInput(PROMPT, tokenizer, baselines="delete"), target)


def test_target_that_includes_the_prompt_is_detected(own, tokenizer):
    wanted = attribute(own, tokenizer, gen_args={"max_new_tokens": 3})
    encoded = tokenizer(PROMPT, return_tensors="pt")
    n = encoded["input_ids"].shape[1]
    options = {"max_new_tokens": 3, "do_sample": False}
    whole = own.generate(**encoded, **options)
    told = own.generate(**encoded, **options, return_dict_in_generate=True)
    for target in (whole, whole[0], whole[0].tolist(), whole.numpy(), told):
        with pytest.warns(UserWarning, match=rf"begins with the {n} token ids .* `target\[{n}:\]`"):
            found = attribute(own, tokenizer, target)
        assert torch.equal(found.target, wanted.target)
        assert torch.equal(found.token_attr, wanted.token_attr)
    # Of a batch that was padded on the left, and without what the tokenizer put in front.
    padded = torch.cat([torch.zeros(2).long(), whole[0]])
    with pytest.warns(UserWarning, match=rf"`target\[{n + 2}:\]`"):
        assert torch.equal(attribute(own, tokenizer, padded).target, wanted.target)
    with pytest.warns(UserWarning, match=rf"`target\[{n - 1}:\]`"):
        assert torch.equal(attribute(own, tokenizer, whole[0, 1:]).target, wanted.target)
    with pytest.raises(ValueError, match="there is nothing to explain"):
        attribute(own, tokenizer, encoded["input_ids"])
    # A text may repeat the prompt on purpose.
    with pytest.warns(UserWarning, match="begins with the text of the prompt"):
        found = attribute(own, tokenizer, PROMPT + ", FL")
    assert len(found.target) > n - 1


def test_answer_that_repeats_a_short_prompt_is_kept(own):
    tokenizer = tiny.byte_level(bos=False)
    ids = [*tokenizer.encode("Dave"), 5]
    assert len(ids) < 5
    with pytest.warns(UserWarning, match="where it is the whole output"):
        found = attribute(own, tokenizer, ids, prompt="Dave")
    assert found.target.tolist() == ids


def test_target_that_begins_with_bos_is_detected(own, tokenizer):
    with pytest.warns(UserWarning, match="add_special_tokens=False"):
        found = attribute(own, tokenizer, tokenizer(" golf"))
    assert found.target.tolist() == tokenizer.encode(" golf")


def test_dataset_records_accept_the_same_targets(own, tokenizer, tmp_path):
    attribution = GenerationAttribution(FeatureAblation(own), tokenizer)
    encoded = tokenizer(" golf", add_special_tokens=False, return_tensors="pt")
    forms = [encoded, encoded["input_ids"].numpy(), encoded["input_ids"][0].tolist()]
    for n_skipped, target in enumerate(forms):
        report = attribute_dataset([{"prompt": PROMPT, "target": target}], attribution, tmp_path)
        assert report.n_skipped == (n_skipped > 0)
    other = {"prompt": PROMPT, "target": tokenizer(" chess", add_special_tokens=False)}
    report = attribute_dataset([other], attribution, tmp_path)
    assert "`target` differs" in report.failures[0][1]
    report = attribute_dataset([{"prompt": PROMPT, "target": [1.5]}], attribution, tmp_path)
    assert "holds 1.5, a float" in report.failures[0][1]
    found = GenerationAttributionResult.load(tmp_path / "000000.safetensors")
    assert found.target.tolist() == encoded["input_ids"][0].tolist()


# Generation -------------------------------------------------------------------------------------


def generated(model, tokenizer, seed=0, **arguments):
    """What transformers gives, asked as its manual says."""
    encoded = tokenizer(PROMPT, return_tensors="pt")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        found = model.generate(**encoded, **arguments)
    return found[0, encoded["input_ids"].shape[1] :]


CONFIGURED = {
    "sampled": (
        {"generation_config": GenerationConfig(do_sample=True, max_new_tokens=3)},
        {"do_sample": True, "max_new_tokens": 3},
    ),
    "max_length": (
        {"generation_config": GenerationConfig(max_length=40)},
        {"do_sample": False, "max_length": 40},
    ),
    "neither": (
        {"generation_config": GenerationConfig(repetition_penalty=1.7)},
        {"do_sample": False, "max_new_tokens": 25, "repetition_penalty": 1.7},
    ),
    "both": (
        {"generation_config": GenerationConfig(max_new_tokens=9, top_k=7), "do_sample": True},
        {"do_sample": True, "max_new_tokens": 9, "top_k": 7},
    ),
    "keys come first": (
        {"generation_config": GenerationConfig(max_new_tokens=9), "max_new_tokens": 2},
        {"do_sample": False, "max_new_tokens": 2},
    ),
    "beams": (
        {"num_beams": 3, "max_new_tokens": 4},
        {"do_sample": False, "num_beams": 3, "max_new_tokens": 4},
    ),
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_generation_defaults_apply(own, tokenizer, name):
    gen_args, plain = CONFIGURED[name]
    # Which is not given, and says what happens where the others say nothing.
    own.generation_config.update(do_sample=True, temperature=0.7)
    kept, before = copy.deepcopy(gen_args), own.generation_config.to_dict()
    found = attribute(own, tokenizer, gen_args=gen_args, seed=3)
    assert torch.equal(found.target, generated(own, tokenizer, seed=3, **plain))
    told = found.provenance["generation"]
    assert told.items() >= {k: repr(v) for k, v in plain.items()}.items()
    if plain["do_sample"]:
        assert told["temperature"] == "0.7"
        again = attribute(own, tokenizer, gen_args=gen_args, seed=3)
        assert torch.equal(again.target, found.target)
    else:
        assert "temperature" not in told
    assert own.generation_config.to_dict() == before
    if "generation_config" in kept:
        assert gen_args["generation_config"].to_dict() == kept["generation_config"].to_dict()


def test_gradient_attribution_accepts_generation_config(own, tokenizer):
    attribution = GenerationGradientAttribution(LayerIntegratedGradients(own, None), tokenizer)
    config = GenerationConfig(do_sample=True, max_new_tokens=3)
    inp = TextSegmentInput(PROMPT, tokenizer, baselines="<unk>")
    found = attribution.attribute(inp, gen_args={"generation_config": config}, seed=5)
    wanted = generated(own, tokenizer, seed=5, do_sample=True, max_new_tokens=3)
    assert torch.equal(found.target, wanted)
    assert found.provenance["generation"]["max_new_tokens"] == "3"


def test_extra_generate_outputs_change_nothing(own, tokenizer, capsys):
    wanted = attribute(own, tokenizer, gen_args={"max_new_tokens": 4})
    beside = {"output_scores": True, "return_dict_in_generate": True, "output_logits": True}
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    found = attribute(
        own, tokenizer, gen_args={"max_new_tokens": 4, "streamer": streamer, **beside}
    )
    assert torch.equal(found.target, wanted.target)
    assert found.provenance["generation"] == wanted.provenance["generation"]
    assert tokenizer.decode(found.target[:1]) in capsys.readouterr().out


def test_stop_strings_and_assistant_models_need_no_extra_argument(own, tokenizer):
    wanted = generated(own, tokenizer, do_sample=False, max_new_tokens=9)
    stop = tokenizer.decode(wanted[2:4])
    for gen_args in (
        {"max_new_tokens": 9, "stop_strings": [stop]},
        {"generation_config": GenerationConfig(max_new_tokens=9, stop_strings=[stop])},
    ):
        assert torch.equal(attribute(own, tokenizer, gen_args=gen_args).target, wanted[:4])
    gen_args = {"max_new_tokens": 9, "assistant_model": tiny.llama(len(tokenizer), seed=1)}
    found = attribute(own, tokenizer, gen_args=gen_args)
    assert torch.equal(found.target, wanted)
    assert found.provenance["generation"]["assistant_model"].startswith("LlamaForCausalLM ")


def test_provenance_of_logits_processors_is_reproducible(own, tokenizer):
    def told():
        processor = MinNewTokensLengthLogitsProcessor(8, 3, 2)
        gen_args = {
            "max_new_tokens": 3,
            "prefix_allowed_tokens_fn": lambda batch, ids: [7, 9],
            "logits_processor": LogitsProcessorList([processor]),
        }
        found = attribute(own, tokenizer, gen_args=gen_args)
        assert set(found.target.tolist()) <= {7, 9}
        return found.provenance["generation"]

    assert told() == told()


def silent(tokenizer):
    model = tiny.llama(len(tokenizer))
    model.generation_config.num_return_sequences = None
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    return model


@pytest.mark.parametrize(
    ("gen_args", "error", "message"),
    [
        ({"num_return_sequences": 3, "do_sample": True}, ValueError, "is 3, and one answer"),
        (
            {"generation_config": GenerationConfig(num_return_sequences=2, num_beams=2)},
            ValueError,
            "is 2, and one answer",
        ),
        ({"input_ids": torch.ones(1, 3).long()}, ValueError, "`input_ids`, which would replace"),
        (
            {"inputs_embeds": torch.ones(1, 3, 32)},
            ValueError,
            "`inputs_embeds`, which would replace",
        ),
        ({"attention_mask": torch.ones(1, 3)}, ValueError, "`attention_mask`, which would replace"),
        ({"past_key_values": object()}, ValueError, "`past_key_values`, which would replace"),
        ({"temperature": 0.7}, ValueError, "`temperature` would be ignored"),
        ({"top_p": 0.9, "max_new_tokens": 3}, ValueError, "`top_p` would be ignored"),
        ({"min_new_tokens": 30}, ValueError, "give a larger `max_new_tokens`"),
        ({"max_length": 4}, ValueError, "the prompt alone has"),
        ({"token_healing": True}, ValueError, "`token_healing` regenerates the end of the prompt"),
        ({"generation_config": {"max_new_tokens": 3}}, TypeError, "has a dict as"),
    ],
)
def test_invalid_gen_args_fail_before_the_run(tokenizer, gen_args, error, message):
    with pytest.raises(error, match=message):
        attribute(silent(tokenizer), tokenizer, gen_args=gen_args)


def test_num_return_sequences_of_the_model_config(tokenizer):
    model = silent(tokenizer)
    model.generation_config.num_return_sequences = 2
    with pytest.raises(ValueError, match="is 2, and one answer"):
        attribute(model, tokenizer)


class Own(torch.nn.Module):
    """A model of the user's with a `generate` of its own, like nanoGPT's."""

    def __init__(self, inner, *, whole=True):
        super().__init__()
        self.inner, self._whole = inner, whole

    def forward(self, input_ids):
        return self.inner(input_ids)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0):
        start = idx.shape[1]
        for _ in range(max_new_tokens):
            logits = self.inner(idx).logits[:, -1] / temperature
            idx = torch.cat([idx, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        return idx if self._whole else idx[:, start:]


def test_custom_generate(own, tokenizer):
    model = Own(own)
    found = attribute(model, tokenizer, gen_args={"max_new_tokens": 4}, seed=2)
    again = attribute(model, tokenizer, gen_args={"max_new_tokens": 4}, seed=2)
    assert torch.equal(found.target, again.target)
    assert len(found.target) == 4
    assert not torch.equal(
        attribute(model, tokenizer, gen_args={"max_new_tokens": 4}, seed=3).target, found.target
    )
    with pytest.raises(ValueError, match="does not begin with the prompt's token ids"):
        attribute(Own(own, whole=False), tokenizer, gen_args={"max_new_tokens": 9})
    with pytest.raises(ValueError, match=r"DataParallel has no `generate`.*`model\.module`"):
        attribute(torch.nn.DataParallel(own), tokenizer)


def test_single_server_answer(own, tokenizer):
    with Server(own, tokenizer) as server:
        method = FeatureAblation(RemoteLLMAttribution.placeholder_model)
        attribution = RemoteGenerationAttribution(
            method, tokenizer, CompletionsProvider(server.url)
        )
        inp = TextSegmentInput(PROMPT, tokenizer, baselines="delete")
        for gen_args, message in (
            ({"n": 2}, "`n` is 2"),
            ({"num_return_sequences": 2}, "`num_return_sequences` is 2"),
            ({"generation_config": GenerationConfig()}, "cannot be sent to an API"),
        ):
            with pytest.raises(ValueError, match=message):
                attribution.attribute(inp, gen_args=gen_args)
        found = attribution.attribute(inp)
        assert found.provenance["generation"]["max_new_tokens"] == "25"
        assert found.provenance["generation"]["do_sample"] == "False"
