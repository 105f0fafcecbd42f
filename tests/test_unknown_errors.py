"""Estimates of whose errors nothing is known: budgets that give such, and what is said of them."""

import json
import warnings

import pytest
import tiny
import torch
from captum.attr import FeatureAblation, Lime, ShapleyValues, ShapleyValueSampling

from captum_llm_ext import (
    FeatureInclusion,
    GenerationAttribution,
    GenerationAttributionResult,
    PartitionShap,
    TextSegmentInput,
)

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer."
TARGET = [5, 6, 7]
N = 12  # ten words of the prompt and two earlier tokens


def drawn(slot, generator):
    return [" x", " yy", " zzz"][int(torch.randint(3, (), generator=generator))]


def filled(slot, generator):
    return " x"


filled.deterministic = True


def attribute(model, tokenizer, method, *, baselines=filled, unit="word", **options):
    inp = TextSegmentInput(PROMPT, tokenizer, unit, baselines=baselines)
    return GenerationAttribution(method(model), tokenizer).attribute(inp, TARGET, **options)


@pytest.mark.parametrize(
    ("method", "options", "needs"),
    [
        (ShapleyValueSampling, {"n_samples": 2}, "`n_samples=4`"),
        (PartitionShap, {"n_samples": 2 * (N + 1)}, f"`n_samples={4 * (N - 1) + 2}`"),
        (PartitionShap, {"n_samples": 4 * (N - 1) + 1}, f"`n_samples={4 * (N - 1) + 2}`"),
        (FeatureAblation, {"n_draws": 1, "baselines": drawn}, "2 `n_draws`"),
        (FeatureInclusion, {"n_draws": 1, "baselines": drawn}, "2 `n_draws`"),
        (
            ShapleyValues,
            {"n_draws": 1, "baselines": drawn, "output_unit": None, "unit": [(0, 10), (10, 45)]},
            "2 `n_draws`",
        ),
    ],
)
def test_budget_without_errors_warns(model, tokenizer, method, options, needs):
    with pytest.warns(UserWarning, match=f"gives no standard errors .* at least {needs}") as told:
        result = attribute(model, tokenizer, method, **options)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert torch.equal(result.errors_unknown, result.full_attr != 0)
    # What it says would do does; where it asks for no more than what is there, nothing is said.
    name, value = ("n_draws", 2) if "draws" in needs else ("n_samples", needs)
    if isinstance(value, str):
        value = int(value.strip("`").partition("=")[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = attribute(model, tokenizer, method, **options | {name: value})
    assert not enough.errors_unknown.any()
    assert enough.full_attr_se[enough.full_attr != 0].isfinite().all()


@pytest.mark.parametrize("options", [{"n_samples": 3}, {"n_samples": 2, "num_trials": 2}])
def test_two_permutation_pairs_give_errors(model, tokenizer, options):
    assert not attribute(model, tokenizer, ShapleyValueSampling, **options).errors_unknown.any()


def test_few_coalitions_with_random_baselines_are_sampled(model, tokenizer):
    """All coalitions, each with a single draw, would tell no errors."""
    spans = [(0, 10), (10, 25), (25, 32), (32, 45)]
    options = {"output_unit": None, "unit": spans, "baselines": drawn, "n_samples": 5}
    found = attribute(model, tokenizer, ShapleyValueSampling, **options)
    assert 2**4 <= 5 * 4 < 2 * 2**4
    assert not found.errors_unknown.any()


@pytest.mark.filterwarnings("ignore:.* gives no standard errors")
def test_tol_without_errors_fails_before_the_run(tokenizer):
    model = tiny.llama(len(tokenizer))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match="`tol` and `stop` need standard errors"):
        attribute(model, tokenizer, ShapleyValueSampling, n_samples=2, tol=0.1)


@pytest.fixture
def unknown(model, tokenizer):
    with pytest.warns(UserWarning, match="no standard errors"):
        return attribute(model, tokenizer, ShapleyValueSampling, n_samples=2)


def test_text_marks_nothing_as_certain(unknown, tmp_path):
    kinds = []

    def paint(text, kind):
        kinds.append(kind)
        return text

    said = unknown.table(paint=paint)
    assert set(kinds) == {"token", "nothing"}
    assert "All of these are estimates of unknown error: nothing tells them from noise" in said
    assert said.count(" ± ?") > 10
    assert all(str(cause).endswith("± ?") for cause in unknown.why(1))
    assert "± ?" in str(unknown.attribute_span(0, 2))
    data = json.loads(unknown.to_json())
    assert data["estimate"] is True
    assert data["errors_unknown"] == int((unknown.full_attr != 0).sum())
    assert "estimates of unknown error" in unknown.to_html()
    unknown.save(tmp_path / "one.safetensors")
    again = GenerationAttributionResult.load(tmp_path / "one.safetensors")
    assert again.table() == unknown.table()


def test_plots_mark_nothing_as_certain(unknown):
    pale = []
    for draw in (
        unknown.plot_text,
        unknown.plot_seq_attr,
        unknown.plot_flow,
        unknown.plot_token_attr,
    ):
        _, ax = draw()
        assert ax.get_title(loc="left").startswith("Estimates of unknown error")
        pale.append({patch.get_alpha() for patch in ax.patches})
    assert max(pale[1]) < 0.5


def test_partially_known_errors_are_described(model, tokenizer):
    options = {"n_samples": 24, "unit": ("sentence", "word")}
    found = attribute(model, tokenizer, lambda m: PartitionShap(m, scheme="splits"), **options)
    n, n_all = int(found.errors_unknown.sum()), int((found.full_attr != 0).sum())
    assert 0 < n < n_all
    assert f"{n} of {n_all} attributions, with ± ?, are estimates" in found.table()
    _, ax = found.plot_token_attr()
    assert ax.get_title(loc="left").startswith("Estimates in part of unknown error")


def test_lasso_has_no_errors(model, tokenizer):
    found = attribute(model, tokenizer, Lime, n_samples=40)
    assert "nothing tells them from noise (a lasso has none; a ridge has)" in found.table()


def test_exact_results_have_no_unknown_errors(model, tokenizer):
    found = attribute(model, tokenizer, FeatureAblation)
    assert not found.errors_unknown.any()
    assert "unknown" not in found.table()
    assert found.plot_token_attr()[1].get_title(loc="left") == ""
