"""Summed ways back and forward mode give the numbers of a way back for each token, for less."""

import architectures
import pytest
import torch
from captum.attr import (
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    TextTokenInput,
)

from captum_llm_ext import (
    EquivalentLinearSystem,
    GenerationGradientAttribution,
    LayerSaliency,
    TextSegmentInput,
)
from captum_llm_ext.model.gradients import backward, forward_mode

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer."
TARGET = " golf and chess. He is a lawyer in Palm Coast, and he is Dave."
UNK = 3
THIRDS = [(0, 13), (13, 28), (28, 45)]  # Dave lives in | Palm Coast, FL | and is a lawyer.
METHODS = [
    (LayerIntegratedGradients, {"n_steps": 3}),
    (LayerGradientXActivation, {}),
    (LayerGradientShap, {"n_samples": 4, "stdevs": 0.01}),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*steps are too few:UserWarning")


def attribution(model, tokenizer, kind=LayerIntegratedGradients, layer=None, **given):
    return GenerationGradientAttribution(kind(model, layer), tokenizer, **given)


def thirds(tokenizer):
    return TextSegmentInput(PROMPT, tokenizer, THIRDS, baselines="<unk>")


@pytest.fixture
def ways_back(monkeypatch):
    """How many values each call of `torch.autograd.grad` goes back for."""
    counted = []
    gradients = backward._gradients

    def counting(outputs, points, unit, given, are_batched, grad_kwargs):
        counted.append(len(given) if are_batched else 1)
        return gradients(outputs, points, unit, given, are_batched, grad_kwargs)

    monkeypatch.setattr(backward, "_gradients", counting)
    return counted


def only_back(monkeypatch):
    monkeypatch.setattr(backward, "n_extra_passes", lambda n_features, n_values: n_values)


@pytest.mark.parametrize(("kind", "given"), METHODS)
@pytest.mark.parametrize("output_unit", ["token", None, "word"])
def test_span_attribution_equals_the_sum_of_its_tokens(smooth, tokenizer, kind, given, output_unit):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK, skip_tokens=["<s>"])
    own = attribution(smooth, tokenizer, kind)
    result = own.attribute(inp, TARGET, output_unit=output_unit, **given)
    n = len(result.output_tokens)
    asked = [(0, 4), (3, n), (-2, -1)]
    spans = own.attribute_spans(inp, TARGET, asked, output_unit=output_unit, **given)
    for span, (start, stop) in zip(spans, asked, strict=True):
        wanted = result.attribute_span(start % n, stop if stop > 0 else stop % n)
        assert (span.start, span.stop) == (wanted.start, wanted.stop)
        assert span.tokens == wanted.tokens
        assert span.names == wanted.names
        # Llama's norms are in float32 whatever the weights are
        assert torch.allclose(span.values, wanted.values, atol=1e-6)
        assert (span.standard_errors <= wanted.standard_errors + 1e-6).all()
        assert [cause.name for cause in span.top(3)] == [cause.name for cause in wanted.top(3)]


def test_whole_answer_takes_one_backward_pass_per_point(smooth, tokenizer, ways_back):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    own = attribution(smooth, tokenizer)
    (span,) = own.attribute_spans(inp, TARGET, n_steps=5, internal_batch_size=1)
    n_summed = sum(ways_back)
    ways_back.clear()
    result = own.attribute(inp, TARGET, n_steps=5, internal_batch_size=1)
    assert n_summed <= 5 + 3  # and what is tried on the first point
    assert sum(ways_back) >= 5 * len(result.output_tokens)
    assert (span.start, span.stop) == (0, len(result.output_tokens))
    assert torch.allclose(span.values, result.full_attr.sum(0), atol=1e-6)


def test_span_errors_equal_errors_over_draws(smooth, tokenizer):
    """Two tokens' attributions hang on the same draws: neither their sum nor independent."""
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    own = attribution(smooth, tokenizer, LayerGradientShap)
    given = {"n_samples": 12, "stdevs": 0.05}
    (span,) = own.attribute_spans(inp, TARGET, **given)
    bound = own.attribute(inp, TARGET, **given).token_attr_se.sum(0)
    assert (span.standard_errors[: span.n_prompt] < bound)[1:].all()
    assert (span.standard_errors[: span.n_prompt] > 0)[1:].all()


@pytest.mark.parametrize(
    ("kind", "given", "match"),
    [
        (LayerIntegratedGradients, {"attr_target": "prob"}, "do not add up"),
        (LayerSaliency, {}, "LayerSaliency explains each token"),
        (EquivalentLinearSystem, {}, "EquivalentLinearSystem explains each token"),
    ],
)
def test_span_of_non_additive_values_is_refused(model, tokenizer, kind, given, match):
    own = attribution(model, tokenizer, kind, **given)
    with pytest.raises(ValueError, match=match):
        own.attribute_spans(TextTokenInput(PROMPT, tokenizer), TARGET)


@pytest.mark.parametrize("spans", [[], [(3, 3)], [(0, 2), (90, 91)]])
def test_empty_spans_are_refused(model, tokenizer, spans):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    with pytest.raises(ValueError, match="`spans` is"):
        attribution(model, tokenizer).attribute_spans(inp, TARGET, spans)
    with pytest.raises(TypeError, match="n_step"):
        attribution(model, tokenizer).attribute_spans(inp, TARGET, n_step=3)


@pytest.mark.parametrize(("kind", "given"), METHODS)
@pytest.mark.parametrize("what", ["log_prob", "logit", "contrast"])
def test_forward_mode_equals_reverse_mode(
    smooth, tokenizer, monkeypatch, ways_back, kind, given, what
):
    inp = thirds(tokenizer)

    def found():
        own = attribution(smooth, tokenizer, kind, attr_target=what)
        return own.attribute(inp, TARGET, output_unit=None, **given)

    forth = found()
    assert sum(ways_back) <= 6  # what is tried on the first point
    only_back(monkeypatch)
    back = found()
    assert sum(ways_back) > len(forth.output_tokens)
    assert forth.token_attr.abs().max() > 1e-3
    assert torch.allclose(forth.token_attr, back.token_attr, atol=1e-6)
    assert torch.allclose(forth.token_attr_se, back.token_attr_se, atol=1e-6)
    assert torch.allclose(forth.efficiency_gap, back.efficiency_gap, atol=1e-6)


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_forward_mode_equals_reverse_mode_on_every_architecture(name, tokenizer, monkeypatch):
    """Where forward mode is unknown to an operation, ways back are taken."""
    model = architectures.build(name)
    given = {"output_unit": None, "n_steps": 2}
    forth = attribution(model, tokenizer).attribute(thirds(tokenizer), TARGET, **given)
    only_back(monkeypatch)
    back = attribution(model, tokenizer).attribute(thirds(tokenizer), TARGET, **given)
    # float32 with another order of summation, on values that cancel
    scale = max(1.0, float(back.token_attr.abs().max()))
    assert (forth.token_attr - back.token_attr).abs().max() < 2e-5 * scale


def test_wrong_forward_derivatives_are_detected(model, tokenizer, monkeypatch):
    """As of an operation whose forward mode is wrong: seen on the first point."""
    expected = attribution(model, tokenizer).attribute(
        thirds(tokenizer), TARGET, output_unit=None, n_steps=2
    )
    right = forward_mode.FeatureDerivatives.products
    calls = []

    def wrong(self, points, factors):
        calls.append(len(points[0]))
        return right(self, points, factors) * 1.01

    monkeypatch.setattr(forward_mode.FeatureDerivatives, "products", wrong)
    found = attribution(model, tokenizer).attribute(
        thirds(tokenizer), TARGET, output_unit=None, n_steps=2
    )
    assert calls == [1]
    scale = float(expected.token_attr.abs().max())
    assert (found.token_attr - expected.token_attr).abs().max() < 2e-5 * scale


def test_cheaper_mode_is_chosen():
    assert forward_mode.n_extra_passes(None, 30) == 30
    assert forward_mode.n_extra_passes(200, 30) == 30
    assert forward_mode.n_extra_passes(5, 30) < 15
