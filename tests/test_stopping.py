"""Rules that end a run: against their definition, and against exact values of the same game."""

import pytest
import torch
from captum.attr import FeatureAblation, KernelShap, Lime, ShapleyValues, ShapleyValueSampling

from captum_llm_ext import (
    CorpusBaselines,
    GenerationAttribution,
    PartitionShap,
    Precision,
    TextSegmentInput,
    TopCauses,
    load_demo,
)
from captum_llm_ext.coalitions import Solution
from captum_llm_ext.coalitions.stopping import as_rule

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
SHORT = "Dave lives in Palm Coast and is a lawyer. His interests include"


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def _solution(attributions, errors):
    found, spread = torch.tensor(attributions).double(), torch.tensor(errors).double()
    return Solution(found, spread, found.sum(1), found.sum(1) * 0)


def test_top_causes_are_separated_by_single_comparisons():
    # Sizes 5, 4 | 1, 0; within = .05 of the range 9. The hardest comparison is 4 against 1.
    solution = _solution([[5.0, -4.0, 1.0, 0.0]], [[0.3, 0.6, 0.8, 0.0]])
    expected = 1.645 * (0.6**2 + 0.8**2) ** 0.5 / (4 - 1 + 0.05 * 9)
    assert TopCauses(2).excess(solution).tolist() == pytest.approx([expected])
    nearly_equal = 1.645 * (0.3**2 + 0.6**2) ** 0.5 / (5 - 4 + 0.05 * 9)
    assert TopCauses(1).excess(solution).tolist() == pytest.approx([nearly_equal])
    assert TopCauses(4).excess(solution).tolist() == [0]


def test_tokens_without_significant_causes_are_settled():
    solution = _solution([[9.0, 0.0, 0.0], [2e-3, 1e-3, 1e-3]], [[0.1] * 3, [1e-3] * 3])
    assert bool((TopCauses(1).excess(solution) < 1).all())


@pytest.mark.parametrize(
    ("of", "expected"), [("all", [0.2, 0.2]), ("token", [0.1, 2.0]), ("answer", [0.1, 2.0])]
)
def test_precision_rule_for_all_tokens_or_each(of, expected):
    solution = _solution([[10.0, 0.0], [1.0, 0.0]], [[0.1, 0.0], [0.2, 0.1]])
    assert Precision(0.1, of).excess(solution).tolist() == pytest.approx(expected)


def test_rule_names():
    assert as_rule("top3", None) == TopCauses(3)
    assert as_rule("answer top1", None) == TopCauses(1, "answer")
    assert as_rule(None, 0.1) == Precision(0.1)
    assert as_rule(None, None) is None


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"stop": "top"}, ValueError, "'top3'"),
        ({"stop": "top0"}, ValueError, "at least 1"),
        ({"stop": 3}, TypeError, "TopCauses"),
        ({"stop": "top3", "tol": 0.1}, ValueError, "one of them"),
        ({"max_evaluations": 9}, ValueError, "`tol` or `stop`"),
        ({"stop": "top3", "method": Lime}, ValueError, "standard errors"),
    ],
)
def test_invalid_rules_are_refused(demo, arguments, error, words):
    model, tokenizer, texts = demo
    method = arguments.pop("method", KernelShap)
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines=CorpusBaselines(texts[:50]))
    with pytest.raises(error, match=words):
        GenerationAttribution(method(model), tokenizer).attribute(inp, " surfing", **arguments)


@pytest.mark.parametrize("bad", [{"k": 0}, {"within": 0.0}, {"of": "all"}])
def test_rules_validate_their_arguments(bad):
    with pytest.raises(ValueError, match="give"):
        TopCauses(**bad)


@pytest.fixture(scope="module")
def exact(demo):
    """Attributions of all 2^12 coalitions."""
    return _deleting(demo, ShapleyValues).full_attr[0]


def _deleting(demo, method, **arguments):
    model, tokenizer, _ = demo
    inp = TextSegmentInput(SHORT, tokenizer, "word", baselines="delete")
    return GenerationAttribution(method(model), tokenizer).attribute(inp, " golf", **arguments)


@pytest.mark.parametrize("method", [KernelShap, ShapleyValueSampling, PartitionShap])
@pytest.mark.parametrize("stop", ["top1", "answer top2"])
def test_early_stopping_finds_exact_causes_with_fewer_evaluations(demo, exact, method, stop):
    found, usual = _deleting(demo, method, stop=stop), _deleting(demo, method)
    assert len(found.masks) <= len(usual.masks)
    if stop == "top1":  # the second is not always told from the third by 16 evaluations a feature
        assert found.settled == (True,)
        assert found.n_evaluations < usual.n_evaluations
    elif found.settled == (False,):
        return
    k = int(stop[-1])
    chosen = found.full_attr[0].abs().argsort(descending=True)[:k]
    lost = exact.abs().sort(descending=True).values[k - 1] - exact.abs()[chosen].min()
    assert float(lost) <= 0.05 * float(exact.max() - exact.min())


def test_each_token_is_judged_and_open_ones_reported(demo):
    model, tokenizer, texts = demo
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines=CorpusBaselines(texts))
    attribution = GenerationAttribution(ShapleyValueSampling(model), tokenizer)
    found = attribution.attribute(inp, " poker and history.", stop="top3", max_evaluations=140)
    assert found.settled is not None
    assert len(found.settled) == len(found.target)
    assert found.converged is all(found.settled) is False
    # Rows that were planned and came out alike cost nothing; a round may end a little later.
    assert found.n_evaluations <= 140
    assert f"was not met by {found.settled.count(False)} of {len(found.target)} tok" in str(found)


def test_stopped_run_is_a_prefix_of_a_longer_run(demo):
    short, long = (
        _deleting(demo, ShapleyValueSampling, n_samples=4, stop=Precision(tol, "token"))
        for tol in (0.3, 0.05)
    )
    assert short.n_evaluations < long.n_evaluations
    n = len(short.masks)
    assert torch.equal(long.masks[:n], short.masks)
    torch.testing.assert_close(long.values[:n], short.values, atol=1e-4, rtol=1e-4)


def test_draws_are_added_when_coalitions_are_exhausted(demo):
    model, tokenizer, texts = demo
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines=CorpusBaselines(texts[:100]))
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    found = attribution.attribute(inp, " poker", stop="top1")
    assert (
        found.draws.unique().numel() <= attribution.attribute(inp, " poker").draws.unique().numel()
    )
    assert found.settled == (True,)


def test_checkpoint_resumes(demo, tmp_path):
    model, tokenizer, texts = demo
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines=CorpusBaselines(texts[:100]))
    attribution = GenerationAttribution(KernelShap(model), tokenizer)
    path = tmp_path / "run.safetensors"
    whole = attribution.attribute(inp, " poker", stop="top1", checkpoint=path)
    again = attribution.attribute(inp, " poker", stop="top1", checkpoint=path)
    assert torch.equal(whole.full_attr, again.full_attr)
    with pytest.raises(ValueError, match="grows"):
        attribution.attribute(inp, " poker", checkpoint=path)
