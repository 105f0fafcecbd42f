"""What the map of the package says can be added from outside: a method, a baseline, a unit, an API.

Each is a toy that imports nothing of the package's inside, and is held against plain forward loops.
"""

from itertools import product

import pytest
import tiny
import torch
from captum.attr import FeatureAblation, RemoteLLMAttribution, ShapleyValues
from captum.attr._utils.attribution import PerturbationAttribution
from reference import loop_log_probs

from captum_llm_ext import (
    GenerationAttribution,
    RemoteGenerationAttribution,
    TextSegmentInput,
    TokenProvider,
)

PROMPT = "Ann lives in Austin, TX and is a nurse."
TARGET = " Her interests include tennis"


@pytest.fixture(scope="module")
def target(tokenizer):
    return tokenizer.encode(TARGET, add_special_tokens=False)


def log_probs(model, ids, target):
    """Of each target token after a prompt."""
    return loop_log_probs(model, ids, [target[:i] for i in range(len(target))], target)


def lost(model, tokenizer, target, texts):
    """What every target token loses when the prompt is one of these texts instead."""
    full = log_probs(model, tokenizer.encode(PROMPT), target)
    return [full - log_probs(model, tokenizer.encode(text), target) for text in texts]


class Banzhaf(PerturbationAttribution):
    """The mean of what a feature adds to all coalitions of the others (Banzhaf 1965)."""

    def attribute(self, inputs, perturbations_per_eval=1):
        n = inputs.shape[1]
        masks = torch.tensor(list(product((0.0, 1.0), repeat=n)), dtype=inputs.dtype)
        values = torch.cat([self.forward_func(m) for m in masks.split(perturbations_per_eval)])
        signs = 2 * masks - 1
        # Outputs first, as of captum's methods.
        return values.reshape(len(masks), -1).T @ signs.to(values.dtype) / 2 ** (n - 1)


@pytest.mark.filterwarnings("ignore:.*standard errors")
def test_custom_method(model, tokenizer, target):
    spans = [(4, 9), (13, 19), (33, 38)]
    inp = TextSegmentInput(PROMPT, tokenizer, spans, baselines="delete")
    attribution = GenerationAttribution(Banzhaf(model), tokenizer)
    result = attribution.attribute(inp, target, output_unit=None)
    worth = {}
    for present in product((False, True), repeat=3):
        text = PROMPT
        for (start, stop), stays in reversed(list(zip(spans, present, strict=True))):
            text = text if stays else text[: start - 1] + text[stop:]
        worth[present] = log_probs(model, tokenizer.encode(text), target)
    assert result.token_attr.shape == (len(target), 3)
    for i in range(3):
        gains = [
            worth[with_i] - worth[(*with_i[:i], False, *with_i[i + 1 :])]
            for with_i in worth
            if with_i[i]
        ]
        expected = torch.stack(gains).mean(0)
        assert result.token_attr[:, i].double() == pytest.approx(expected, abs=1e-4)


class Transposed(Banzhaf):
    """Features first."""

    def attribute(self, inputs, perturbations_per_eval=1):
        return super().attribute(inputs, perturbations_per_eval).T


def test_custom_method_with_transposed_output_is_refused(model, tokenizer, target):
    inp = TextSegmentInput(PROMPT, tokenizer, clauses, baselines="delete")
    attribution = GenerationAttribution(Transposed(model), tokenizer)
    with pytest.raises(ValueError, match=r"shape \(3, 5\).*\(n_outputs, n_features\)"):
        attribution.attribute(inp, target, output_unit=None)


class Shouted:
    """What stands there, in capitals."""

    deterministic = True

    def __call__(self, slot, generator):
        return slot.text.upper()


class OneOf:
    """One of several words."""

    def __init__(self, *words):
        self.words = words

    def __call__(self, slot, generator):
        return self.words[int(torch.randint(len(self.words), (), generator=generator))]


def test_custom_baseline(model, tokenizer, target):
    inp = TextSegmentInput(PROMPT, tokenizer, [(4, 9), (33, 38)], baselines=Shouted())
    result = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(inp, target)
    texts = [PROMPT.replace(word, word.upper()) for word in ("lives", "nurse")]
    for found, expected in zip(
        result.token_attr.T, lost(model, tokenizer, target, texts), strict=True
    ):
        assert found.double() == pytest.approx(expected, abs=1e-4)
    assert result.token_attr.abs().min() > 1e-3


def test_custom_random_baseline(model, tokenizer, target):
    inp = TextSegmentInput(PROMPT, tokenizer, [(33, 38)], baselines=OneOf("golfer", "fox"))
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    result, again = (
        attribution.attribute(inp, target, output_unit=None, seed=4, n_draws=8) for _ in range(2)
    )
    texts = [PROMPT.replace("nurse", word) for word in ("golfer", "fox")]
    golfer, fox = lost(model, tokenizer, target, texts)
    found = result.token_attr[:, 0].double()
    # A mean over draws of the two: the same share of each for every target token.
    share = (found - fox) / (golfer - fox)
    assert share == pytest.approx(share.mean().expand(len(target)), abs=1e-2)
    assert 0 < share.mean() < 1
    assert torch.equal(again.token_attr, result.token_attr)


def clauses(text):
    """From one comma, or ``and``, to the next."""
    cuts = [i for i in range(1, len(text)) if text.startswith((", ", " and"), i)]
    ends = [cut + (text[cut] == ",") for cut in cuts]
    return list(zip([0, *ends], [*ends, len(text)], strict=True))


def test_custom_unit(model, tokenizer, target):
    inp = TextSegmentInput(PROMPT, tokenizer, clauses, baselines="delete")
    assert [name.strip() for name in inp.names] == ["Ann lives in Austin,", "TX", "and is a nurse."]
    result = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(inp, target)
    texts = [
        " TX and is a nurse.",
        "Ann lives in Austin, and is a nurse.",
        "Ann lives in Austin, TX",
    ]
    for found, expected in zip(
        result.token_attr.T, lost(model, tokenizer, target, texts), strict=True
    ):
        assert found.double() == pytest.approx(expected, abs=1e-4)


def test_custom_unit_as_level_and_output_unit(model, tokenizer, target):
    text = "Her interests include tennis, music and cooking."
    inp = TextSegmentInput(PROMPT, tokenizer, (clauses, "word"), baselines="delete")
    result = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(
        inp, text, output_unit=clauses
    )
    assert [name.strip() for name in result.output_features] == [
        "Her interests include tennis,",
        "music",
        "and cooking.",
    ]
    names, attributions = result.at_level("clauses")
    assert len(names) == 3
    total = result.token_attr.sum(1)
    assert attributions.sum(1) == pytest.approx(total, abs=1e-4)
    # The answer, too, is read by its parts.
    assert result.provenance["output_unit"] == "clauses"
    rows = [row.split("  ←  ")[0].strip() for row in result.table(unit="clauses").splitlines()]
    assert [row[:12] for row in rows[-3:]] == ["clauses 1 “H", "clauses 2 “m", "clauses 3 “a"]


class InMemory:
    """A service that tells the log-probability of every token of a prompt, and of the likeliest."""

    def __init__(self, model):
        self.model, self.n_asked = model, 0

    @torch.no_grad()
    def get_token_logprobs(self, prompts):
        self.n_asked += len(prompts)
        return [self._told(list(ids)) for ids in prompts]

    def generate_tokens(self, prompt, max_new_tokens, **gen_args):
        written = list(prompt)
        for _ in range(max_new_tokens):
            logits = self.model(input_ids=torch.tensor([written])).logits[0, -1]
            written.append(int(logits.argmax()))
        return written[len(prompt) :]

    def _told(self, ids):
        logits = self.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        told = [None]
        for place, token in zip(logits, ids[1:], strict=False):
            told.append({token: float(place[token]), int(place.argmax()): float(place.max())})
        return told


def test_custom_provider(tokenizer):
    model = tiny.llama(len(tokenizer), seed=3)
    service = InMemory(model)
    assert isinstance(service, TokenProvider)
    inp = TextSegmentInput(PROMPT, tokenizer, clauses, baselines="delete")
    remote = RemoteGenerationAttribution(
        ShapleyValues(RemoteLLMAttribution.placeholder_model), tokenizer, service
    )
    remote.handshake()
    n_before = service.n_asked
    found = remote.attribute(inp, gen_args={"max_new_tokens": 3}, output_unit=None)
    prompt = tokenizer.encode(PROMPT)
    written = service.generate_tokens(prompt, 3)
    assert len(found.output_tokens) == 3
    full = log_probs(model, prompt, written)
    assert found.full_values == pytest.approx(full, abs=1e-4)
    assert found.token_attr.sum(1).double() == pytest.approx(full - found.empty_values, abs=1e-4)
    local = GenerationAttribution(ShapleyValues(model), tokenizer)
    expected = local.attribute(inp, torch.tensor(written), output_unit=None)
    assert found.token_attr == pytest.approx(expected.token_attr, abs=1e-4)
    assert service.n_asked - n_before == found.n_evaluations == 2**3
