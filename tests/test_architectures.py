"""Invariant 1: values are those of a plain loop, on every kind of model."""

from functools import cache

import architectures
import pytest
import torch
from captum.attr import FeatureAblation, ShapleyValueSampling, TextTokenInput
from reference import loop_log_probs, tokens_read

from captum_llm_ext import GenerationAttribution, TextSegmentInput

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer."
TARGET = " golf and chess."
UNK = 3


@pytest.fixture(scope="module")
def build():
    """Models of this file are shared: what one is found to do is not looked for twice."""
    return cache(architectures.build)


def largest_difference(model, tokenizer, inp, replacement, **arguments):
    method = arguments.pop("method", FeatureAblation)(model)
    result = GenerationAttribution(method, tokenizer).attribute(inp, TARGET, **arguments)
    target = result.target.tolist()
    n_prompt = result.masks.shape[1] - len(target)
    worst = 0.0
    for mask, values in zip(result.masks, result.values, strict=True):
        prompt = inp.to_model_input(mask[None, :n_prompt].float())[0].tolist()
        read = tokens_read(target, mask[n_prompt:].tolist(), replacement)
        truth = loop_log_probs(model, prompt, read, target)
        worst = max(worst, float((truth - values.double()).abs().max()))
    return worst


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_values_equal_a_plain_loop(name, build, tokenizer):
    model = build(name)
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    # float32 with another order of summation
    assert largest_difference(model, tokenizer, inp, UNK) < 1e-4


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_rows_of_unequal_length_equal_a_plain_loop(name, build, tokenizer):
    model = build(name)
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    method = {"method": ShapleyValueSampling, "n_samples": 3}
    assert largest_difference(model, tokenizer, inp, None, **method) < 1e-4


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_values_are_independent_of_batch_size(model, tokenizer, rows):
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    assert largest_difference(model, tokenizer, inp, None, perturbations_per_eval=rows) < 1e-4


def test_half_precision_models_are_reduced_in_float32(tokenizer):
    model = architectures.build("llama").bfloat16()
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    result = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(inp, TARGET)
    # bfloat16 has 8 bits: its own log-probabilities near -6 are multiples of 1/32.
    fractions = result.values * 32
    assert (fractions - fractions.round()).abs().max() > 0.1
    row = torch.tensor([[*inp.ids, *result.target[:-1].tolist()]])
    with torch.no_grad():
        logits = model(input_ids=row, use_cache=False).logits[0, len(inp.ids) - 1 :].double()
    truth = logits.log_softmax(-1).gather(1, result.target[:, None])[:, 0]
    # Same weights, same bfloat16 forward: what is left is the batch's own rounding of logits.
    assert (truth - result.full_values.double()).abs().max() < 0.05
