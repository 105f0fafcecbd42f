"""Attribution by an inference engine of this process: the numbers of the model itself."""

import pytest
import tiny
import torch
from captum.attr import FeatureAblation, KernelShap, RemoteLLMAttribution
from engine_stubs import GARBAGE, LLM, Engine

from captum_llm_ext import (
    Contrast,
    EngineProvider,
    GenerationAttribution,
    RemoteGenerationAttribution,
    TextSegmentInput,
)

METHOD = RemoteLLMAttribution.placeholder_model
PROMPT = "Dave is a lawyer in Palm Coast, FL. He likes"
TARGET = " golf."
ENGINES = [LLM, Engine]


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.llama(len(tokenizer)).double()


@pytest.fixture
def inp(tokenizer):
    return TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("method", "output_unit", "top"),
    [(FeatureAblation, None, 0), (FeatureAblation, "token", 3), (KernelShap, "token", 0)],
)
def test_engine_equals_its_model(engine, method, output_unit, top, model, tokenizer, inp):
    own = GenerationAttribution(method(model), tokenizer)
    n_samples = 40 if method is KernelShap else None
    expected = own.attribute(inp, TARGET, output_unit=output_unit, n_samples=n_samples)
    provider = EngineProvider(engine(model), top_logprobs=top)
    found = RemoteGenerationAttribution(method(METHOD), tokenizer, provider).attribute(
        inp, TARGET, output_unit=output_unit, n_samples=n_samples
    )
    # float64 on both sides; the result is in float32.
    torch.testing.assert_close(
        found.full_attr.float(), expected.full_attr.float(), atol=1e-5, rtol=0
    )
    assert found.provenance["handshake"] is not None


@pytest.mark.parametrize("engine", ENGINES)
def test_prefixes_are_reused_and_uncomputed_log_probabilities_not_read(
    engine, model, tokenizer, inp
):
    run = engine(model)
    attribution = RemoteGenerationAttribution(
        FeatureAblation(METHOD), tokenizer, EngineProvider(run)
    )
    first = attribution.attribute(inp, TARGET)
    sent = run.recorded.n_prompts * len(inp.ids)
    assert run.recorded.n_computed < 0.8 * sent
    # Now every block of every row is known, so vLLM would have the target's values from memory.
    again = RemoteGenerationAttribution(
        FeatureAblation(METHOD), tokenizer, EngineProvider(run)
    ).attribute(inp, TARGET)
    torch.testing.assert_close(again.token_attr, first.token_attr)
    assert float(again.values.min()) > GARBAGE


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_generates_the_target(engine, model, tokenizer, inp):
    provider = EngineProvider(engine(model))
    found = RemoteGenerationAttribution(FeatureAblation(METHOD), tokenizer, provider).attribute(
        inp, gen_args={"max_new_tokens": 4}
    )
    expected = model.generate(
        torch.tensor([inp.ids]), max_new_tokens=4, do_sample=False, pad_token_id=0
    )[0, len(inp.ids) :]
    assert found.target.tolist() == expected.tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_missing_foil_log_probabilities_are_requested(engine, model, tokenizer, inp):
    contrast = Contrast(foils=[5, 9])
    provider = EngineProvider(engine(model), top_logprobs=2)
    found = RemoteGenerationAttribution(
        FeatureAblation(METHOD), tokenizer, provider, contrast
    ).attribute(inp, TARGET, output_unit=None)
    own = GenerationAttribution(FeatureAblation(model), tokenizer, contrast)
    expected = own.attribute(inp, TARGET, output_unit=None)
    torch.testing.assert_close(
        found.token_attr.float(), expected.token_attr.float(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_last_vocabulary_token_and_one_token_prompts(engine, model):
    provider = EngineProvider(engine(model))
    last = model.config.vocab_size - 1
    ids = [[5, last, 7], [last, last], [3]]
    for own, entries in zip(ids, provider.get_token_logprobs(ids), strict=True):
        with torch.no_grad():
            told = model(torch.tensor([own])).logits[0].double().log_softmax(-1)
        assert entries[0] is None
        assert len(entries) == len(own)
        for i in range(1, len(own)):
            assert entries[i][own[i]] == pytest.approx(float(told[i - 1, own[i]]))


def test_engine_that_changes_prompts_is_refused(model, tokenizer, inp):
    class AddsAToken(LLM):
        def _answer(self, ids, how):
            return super()._answer([1, *ids], how)

    provider = EngineProvider(AddsAToken(model))
    with pytest.raises(RuntimeError, match=r"vLLM told of .* tokens"):
        provider.get_token_logprobs([[5, 6, 7]])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_longest_prompt_is_the_engines(engine, model):
    run = engine(model)
    assert EngineProvider(run).max_model_len == 512
    if engine is Engine:  # a user's own limit comes before the model's
        run.server_args.context_length = 64
        assert EngineProvider(run).max_model_len == 64


def test_non_engine_is_refused(model):
    with pytest.raises(TypeError, match="give a vLLM `LLM` or an SGLang `Engine`"):
        EngineProvider(model)
    with pytest.raises(ValueError, match="`top_logprobs` is -1"):
        EngineProvider(LLM(model), top_logprobs=-1)
