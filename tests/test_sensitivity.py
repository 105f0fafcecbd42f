"""What hangs on the baseline: against loops, closed forms and the demo's known causes."""

import json
from itertools import combinations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny
import torch
from captum.attr import (
    FeatureAblation,
    ImageMaskInput,
    KernelShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    ProductBaselines,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle
from PIL import Image
from scipy.stats import rankdata, spearmanr

from captum_llm_ext import (
    BaselineComparison,
    ChatInput,
    CorpusBaselines,
    Deletion,
    FixedTexts,
    GenerationAttribution,
    GenerationAttributionResult,
    GenerationGradientAttribution,
    TextSegmentInput,
    TokenBaseline,
    compare_baselines,
    load_demo,
)
from captum_llm_ext.demo import PROMPT
from captum_llm_ext.evaluation.sensitivity.views import View
from captum_llm_ext.result import plot
from captum_llm_ext.text.inputs import Piece, as_prompt

matplotlib.use("Agg")
TEMPLATE = ("{} lives in {}. {}", ["Dave", "Palm Coast", "His"])


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def demo():
    """The demo's model explained under three baselines; exact but for the corpus' draws."""
    model, tokenizer, texts = load_demo()
    inp = TextSegmentInput(PROMPT, tokenizer, baselines="<pad>")
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    baselines = [None, "<unk>", CorpusBaselines(texts)]
    found = compare_baselines(attribution, inp, baselines, gen_args={"max_new_tokens": 15})
    return attribution, inp, baselines, found


def made(token_attr, se=0.0, output_attr=None, owners=None, **changes):
    """A result with these numbers, shape ``(n_target, n_features)``, and little else."""
    attr = torch.tensor(token_attr, dtype=torch.float64)
    n_target, n_prompt = attr.shape
    output = None if output_attr is None else torch.tensor(output_attr, dtype=torch.float64)
    fields = {
        "input_tokens": [f" p{i}" for i in range(n_prompt)],
        "output_tokens": [f"t{i}" for i in range(n_target)],
        "seq_attr": attr.sum(0),
        "token_attr": attr,
        "output_features": None if output is None else [f" g{i}" for i in range(output.shape[1])],
        "output_attr": output,
        "token_attr_se": torch.as_tensor(se, dtype=torch.float64).expand(attr.shape),
        "output_attr_se": None if output is None else torch.zeros_like(output),
        "n_evaluations": 1,
        "target": torch.arange(n_target),
        "output_pieces": [Piece(f"t{i}", f) for i, f in enumerate(owners or [None] * n_target)],
    }
    for name in ("full_values", "empty_values", "efficiency_gap", "masks", "values", "draws"):
        fields[name] = torch.zeros(n_target)
    return GenerationAttributionResult(**fields | changes)


def compare(first, second, **options):
    return BaselineComparison({"A": first, "B": second}, **options)


def conclusion(comparison, token=0):
    return next(c for c in comparison.conclusions() if c.token == token)


# The demo, whose causes are known ----------------------------------------------------------------


def test_corpus_baselines_find_the_city_and_deletion_does_not(demo):
    *_, found = demo
    assert found.names == ["deleted", "<unk>", "corpus"]
    said = next(c for c in found.conclusions() if c.name == "surfing")
    assert said.verdict == "depends"
    assert said.causes["corpus"].name == " Palm"
    assert said.causes["corpus"].attribution > 5
    assert said.causes["deleted"].name != " Palm"
    line = next(line for line in str(found).splitlines() if line.startswith("    surfing"))
    assert "corpus: Palm" in line
    palm = [c for c in found.changes("surfing", "rank") if c.feature == " Palm"]
    under = {c.between: c for c in palm}["deleted", "corpus"]
    assert under.ranks[1] == 1 < under.ranks[0]
    under_deletion = found.results["deleted"].why("surfing", 1)  # of the prompt, and of the answer
    deleted = max(under_deletion, key=lambda cause: abs(cause.attribution))
    assert deleted.column in under.swapped_with


def test_every_result_equals_attribute_under_its_baseline(demo):
    attribution, inp, baselines, found = demo
    target = attribution.attribute(inp, gen_args={"max_new_tokens": 15}).target
    for name, baseline in zip(found.names, baselines, strict=True):
        alone = attribution.attribute(
            TextSegmentInput(PROMPT, inp.tokenizer, baselines=baseline), target
        )
        assert torch.equal(found.results[name].target, target)
        assert torch.equal(found.results[name].full_attr, alone.full_attr)
        assert torch.equal(found.results[name].full_attr_se, alone.full_attr_se)


def test_constant_slot_depends_on_the_baseline(demo):
    *_, found = demo
    comma = conclusion(found, 1)
    assert comma.causes["corpus"] is None
    assert comma.causes["deleted"] is not None
    assert comma.verdict == "depends"


def test_to_dict_is_complete_json(demo):
    *_, found = demo
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["names"] == found.names
    assert len(data["changes"]) == len(found.changes())
    assert [a["n_rank"] for a in data["agreement"]] == [a.n_rank for a in found.agreement()]
    surfing = next(c for c in data["conclusions"] if c["name"] == "surfing")
    assert surfing["causes"]["corpus"]["name"] == " Palm"
    assert data["results"]["corpus"] == json.loads(json.dumps(found.results["corpus"].to_dict()))


# Statistics, with hand-made results --------------------------------------------------------------


def test_rank_swap_of_two_features():
    found = compare(made([[3.0, 1.0, 0.0]]), made([[1.0, 2.0, 0.0]]))
    first, second = sorted(found.changes(0, "rank"), key=lambda change: change.column)
    assert (first.column, first.ranks, first.swapped_with) == (0, (1, 2), (1,))
    assert (second.column, second.ranks, second.swapped_with) == (1, (2, 1), (0,))
    assert first.importance == pytest.approx((3 - 1) / (2 * 3))
    assert second.importance == pytest.approx((2 - 1) / (2 * 3))
    assert first.attributions == (3.0, 1.0)
    assert conclusion(found).verdict == "depends"
    assert str(conclusion(found)) == "t0  ←  A: p0; B: p1"


def test_sign_change_counts_only_beyond_errors():
    clear = compare(made([[4.0, 0.5]], 0.2), made([[4.0, -2.0]], 0.1))
    (change,) = clear.changes(0, "sign")
    assert change.column == 1
    assert change.importance == pytest.approx((0.5 + 2) / (2 * 4))
    assert str(change) == "p1 +0.50 ± 0.20 (A) and -2.00 ± 0.10 (B), rank 2 and 2"
    assert not compare(made([[4.0, 0.5]], 0.3), made([[4.0, -2.0]], 0.1)).changes(0, "sign")
    assert not compare(made([[4.0, 0.5]], 0.2), made([[4.0, -2.0]], 0.1), z=3.0).changes(0, "sign")


def test_rounding_is_no_sign_change():
    first, second = made([[4.0, 1e-6, -1.0]]), made([[4.0, -1e-6, -1.0]])
    assert not compare(first, second).changes()
    assert [c.column for c in compare(first, second, least=0.0).changes(0)] == [1]


def test_differences_without_errors_count_fully():
    unknown, known = made([[3.0, 1.0]], torch.nan), made([[1.0, -3.0]], 0.1)
    found = compare(unknown, known)
    assert found.without_errors == ["A"]
    assert "No standard errors under A: differences count as they are." in str(found)
    assert {(c.kind, c.column) for c in found.changes(0)} == {
        ("sign", 1), ("rank", 0), ("rank", 1),
    }  # fmt: skip
    assert "No standard errors" not in str(compare(known, known))
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("second", "se", "verdict"),
    [
        ([3.0, 1.0], 0.1, "robust"),
        ([-3.0, 1.0], 0.1, "depends"),  # the same feature, the other way round
        ([1.0, 3.0], 0.1, "depends"),
        ([1.0, 1.1], 0.1, "open"),  # another one, but not for sure
        ([0.1, 0.1], 0.1, "depends"),  # nothing, and for sure
        ([0.1, 0.1], 5.0, "open"),  # nothing can be told
    ],
)
def test_conclusion_for_the_strongest_cause(second, se, verdict):
    assert conclusion(compare(made([[3.0, 1.0]], 0.1), made([second], se))).verdict == verdict


def test_conclusion_without_causes():
    found = compare(made([[0.01, 0.0], [9.0, 0.0]]), made([[0.0, 0.02], [9.0, 0.0]]))
    assert [c.verdict for c in found.conclusions()] == ["none", "robust", "robust"]
    assert conclusion(found).causes == {"A": None, "B": None}
    agreement = found.agreement()[0]
    assert np.isnan(agreement.rank_correlation)
    assert np.isnan(agreement.top_overlap)
    assert "nothing in particular under any: 1 of 2 tokens" in str(found)


def test_top_k_overlap():
    first = made([[5.0, -4.0, 3.0, 2.0, 0.0]])
    second = made([[5.0, 0.0, 0.0, 2.0, -4.0]])
    overlap = {k: compare(first, second, k=k).agreement()[0].top_overlap for k in (1, 2, 3, 5)}
    assert overlap == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3), 5: 0.5}


def test_only_earlier_features_are_causes():
    output = [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]  # a word of two tokens, then one of its own
    result = made([[1.0, 2.0]] * 3, output_attr=output, owners=[0, 0, 1])
    agreement = compare(result, result).agreement()
    assert [(a.token, a.n_features) for a in agreement] == [(0, 2), (1, 2), (2, 3), (None, 2)]
    assert all(a.rank_correlation == pytest.approx(1.0) for a in agreement)


def test_whole_answer_error_is_at_most_the_sum_of_errors():
    first, second = made([[1.0, 4.0], [0.5, 4.0]], 0.3), made([[-9.0, 4.0], [-9.0, 4.0]], 0.3)
    found = [c for c in compare(first, second, z=2.0).changes() if c.token is None]
    assert {c.kind for c in found} == {"sign", "rank"}
    assert found[0].standard_errors == (pytest.approx(0.6), pytest.approx(0.6))
    assert found[0].attributions[0] == pytest.approx(1.5)
    within = compare(first, second, z=2.6).changes(kind="sign")  # 1.5 < 2.6 · 0.6
    assert not [c for c in within if c.token is None]


def test_whole_answer_errors_account_for_shared_coalitions(model, tokenizer):
    attribution = GenerationAttribution(KernelShap(model), tokenizer)
    inp = TextSegmentInput(
        "Dave lives in Austin, TX and is a lawyer.", tokenizer, baselines="delete"
    )
    found = compare_baselines(attribution, inp, [None, "<unk>"], target=" golf.", n_samples=100)
    for name, cause in conclusion(found, None).causes.items():
        result = found.results[name]
        span = result.attribute_span(0, len(result.target))
        assert cause.standard_error == pytest.approx(float(span.standard_errors[cause.column]))
        assert cause.standard_error > 0


def test_estimated_joint_probability_has_no_error():
    joint = {"attr_target": "prob", "estimate": True}
    first, second = made([[1.0]], 0.1, provenance=joint), made([[-1.0]], 0.1, provenance=joint)
    (change,) = (c for c in compare(first, second).changes() if c.token is None)
    assert np.isnan(change.standard_errors).all()


def views(n_features, seed):
    """Two baselines' numbers with ties, zeros and errors of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    attr = torch.randn(2, n_features, generator=generator, dtype=torch.float64)
    attr = (attr * 4).round() / 2
    se = torch.rand(2, n_features, generator=generator, dtype=torch.float64) / 3
    return View(attr, se, attr.abs().amax(1), z=1.96, least=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_changes_equal_a_plain_loop(seed):
    view = views(9, seed)
    attr, se = view.attr.tolist(), view.se.tolist()
    scale = [max(map(abs, row)) for row in attr]

    def over(row, i, j):
        low, high = abs(attr[row][i]) - 1.96 * se[row][i], abs(attr[row][j]) + 1.96 * se[row][j]
        return low - high > 0.01 * scale[row]

    swapped = {i: set() for i in range(9)}
    for i, j in combinations(range(9), 2):
        if (over(0, i, j) and over(1, j, i)) or (over(0, j, i) and over(1, i, j)):
            swapped[i].add(j)
            swapped[j].add(i)
    found = view.rank_changes(0, 1)
    assert {i: set(others) for i, others in found.items()} == {
        i: others for i, others in swapped.items() if others
    }
    signs = {
        i
        for i in range(9)
        if attr[0][i] * attr[1][i] < 0
        and all(abs(attr[row][i]) > 1.96 * se[row][i] for row in (0, 1))
    }
    assert set(view.sign_changes(0, 1)) == signs
    is_clear = [
        [abs(a) > max(1.96 * e, 0.01 * scale[row]) for a, e in zip(attr[row], se[row], strict=True)]
        for row in (0, 1)
    ]
    assert set(view.presence_changes(0, 1)) == {
        i
        for some, none in ((0, 1), (1, 0))
        for i in range(9)
        if is_clear[some][i]
        and not is_clear[none][i]
        and abs(attr[some][i]) - 1.96 * se[some][i]
        > abs(attr[none][i]) + 1.96 * se[none][i] + 0.01 * max(scale)
    }


def test_reference_loop_covers_all_kinds_of_change():
    assert any(views(9, seed).presence_changes(0, 1) for seed in range(8))
    assert any(views(9, seed).rank_changes(0, 1) for seed in range(8))
    assert any(views(9, seed).sign_changes(0, 1) for seed in range(8))


@pytest.mark.parametrize("seed", range(4))
def test_rank_correlation_equals_scipy(seed):
    view = views(12, seed)
    expected = spearmanr(*view.clear.abs().numpy()).statistic
    assert view.rank_correlation(0, 1) == pytest.approx(expected)
    assert view.ranks.numpy() == pytest.approx(rankdata(-view.attr.abs(), "min", axis=1))


def test_largest_attribution_change_comes_first():
    """Not what it overtakes: of two that swap, the one that moved."""
    first = made([[9.0, 1.0, 0.6, 0.2, -0.3], [0.0, 0.0, 0.0, 0.0, 5.0]])
    second = made([[0.4, 2.0, 0.5, -0.15, -0.2], [0.0, 0.0, 0.0, 0.0, 5.0]])
    lines = str(compare(first, second)).splitlines()
    told = [line for line in lines if line.startswith("    ") and ": another" in line]
    assert [line.split()[2] for line in told] == ["p0", "p1", "p3"]
    assert told[0].endswith("rank 1 and 3: another rank")
    assert told[-1].endswith(": another sign"), "where a sign changes one is shown"
    assert "of 5 features 1 change sign" in str(compare(first, second))


def test_vanishing_cause_is_a_change():
    """It stays the strongest, of nothing."""
    found = compare(made([[9.0, 0.0], [9.0, 1.0]]), made([[0.05, 0.0], [9.0, 1.0]]))
    (change,) = found.changes(0)
    assert (change.kind, change.column) == ("presence", 0)
    assert conclusion(found).verdict == "depends"
    assert found.agreement()[0].n_presence == 1
    assert "p0 +9.00 (A) and +0.05 (B), rank 1 and 1: nothing under one" in str(found)
    unsure = compare(made([[9.0, 0.0]], 3.0), made([[0.05, 0.0]], 3.0))
    assert not unsure.changes()


def test_changes_are_sorted_by_importance():
    found = compare(made([[3.0, 2.0, -1.0]]), made([[1.0, -2.0, 3.0]]))
    importance = [change.importance for change in found.changes()]
    assert len(importance) > 3
    assert importance == sorted(importance, reverse=True)
    assert 0 < importance[-1] <= importance[0] <= 1


# Inputs ------------------------------------------------------------------------------------------


INPUTS = {
    "text": lambda t, b: TextSegmentInput("Dave lives here", t, baselines=b),
    "parts": lambda t, b: TextSegmentInput.from_parts(
        [("a", "Dave lives"), ("b", "in Austin"), ("c", "He is")], t, baselines=b
    ),
    "template": lambda t, b: TextSegmentInput.from_template(*TEMPLATE, t, baselines=b),
    "captum's template": lambda t, b: TextTemplateInput(*TEMPLATE, baselines=b),
    "captum's template, named": lambda t, b: TextTemplateInput(
        "{a} lives in {b}.", {"a": "Dave", "b": "Austin"}, baselines=b
    ),
    "captum's tokens": lambda t, b: TextTokenInput("Dave lives", t, baselines=b),
}
ABSENT = {
    "text": [None, ["Ann", "sits", "there"], TokenBaseline(3)],
    "parts": [None, "<unk>", [["Ann", "Bob"], "x y", "z"]],
    "template": [None, 7, ["Ann", "Austin", "Her"]],
    "captum's template": [
        None, ["Ann", "Austin", "Her"], ProductBaselines([["A", "B"], ["C"], ["D", "E"]]),
        Deletion(), FixedTexts(["Ann", "Austin", "Her"]),
    ],
    "captum's template, named": [None, {"a": "Ann", "b": "Rome"}],
    "captum's tokens": ["<unk>", 5, 0],
}  # fmt: skip


def rendered(inp, tokenizer):
    """What stands there with everything absent, and with the first feature present."""
    prompt = as_prompt(inp, tokenizer, None)
    masks = torch.zeros(2, prompt.n_features, dtype=torch.bool)
    masks[1, 0] = True
    return [row.ids for row in prompt.render(masks, torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("kind", INPUTS)
def test_with_baselines_equals_a_new_input(kind, model, tokenizer):
    make, absent = INPUTS[kind], ABSENT[kind]
    inp = make(tokenizer, absent[-1])
    before = rendered(inp, tokenizer)
    attribution = GenerationAttribution(ShapleyValueSampling(model), tokenizer)
    named = {f"b{i}": baseline for i, baseline in enumerate(absent)}
    found = compare_baselines(attribution, inp, named, target=" golf.", n_samples=20)
    for name, baseline in named.items():
        alone = attribution.attribute(make(tokenizer, baseline), " golf.", n_samples=20)
        assert torch.equal(found.results[name].full_attr, alone.full_attr)
    assert rendered(inp, tokenizer) == before


def test_chat_turns(model, tokenizer):
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    )
    messages = [{"role": "system", "content": "Be"}, {"role": "user", "content": "Dave lives"}]
    inp = ChatInput(messages, tokenizer, baselines="delete")
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    found = compare_baselines(attribution, inp, [None, ["Do", "Ann sits"]], target=" golf")
    assert found.names == ["deleted", "texts"]
    other = ChatInput(messages, tokenizer, baselines=["Do", "Ann sits"])
    alone = attribution.attribute(other, " golf")
    assert torch.equal(found.results["texts"].full_attr, alone.full_attr)


def test_with_baselines_changes_only_baselines(tokenizer):
    inp = TextSegmentInput(
        "Dave lives here", tokenizer, groups=[["Dave", "here"]], baselines="delete"
    )
    other = inp.with_baselines(["Ann", "sits", "there"])
    assert type(other) is TextSegmentInput
    assert (other.names, other.ids, other.pieces) == (inp.names, inp.ids, inp.pieces)
    made_so = TextSegmentInput(
        "Dave lives here", tokenizer, groups=[["Dave", "here"]], baselines=["Ann", "sits", "there"]
    )
    assert rendered(other, tokenizer) == rendered(made_so, tokenizer)
    assert rendered(inp, tokenizer) != rendered(other, tokenizer)
    with pytest.raises(ValueError, match="2 entries for 3"):
        inp.with_baselines(["Ann", "sits"])


def test_baseline_list_entries_are_named(model, tokenizer):
    def anything(slot, generator):
        return "x"

    entries = [
        None, "<unk>", 5, TokenBaseline(6), ["Ann", "sits"], FixedTexts(["a", "b"]), anything,
        CorpusBaselines(tiny.TEXTS, min_candidates=0), lambda slot, generator: "y",
    ]  # fmt: skip
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    inp = TextSegmentInput("Dave lives", tokenizer, baselines="delete")
    found = compare_baselines(attribution, inp, entries, target=" golf", n_draws=2)
    assert found.names == [
        "deleted", "<unk>", "token 5", "token 6", "texts 1", "texts 2", "anything", "corpus",
        "function",
    ]  # fmt: skip


def test_target_is_generated_once(model, tokenizer, monkeypatch):
    generate, runs = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **given: runs.append(given) or generate(**given))
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    inp = TextSegmentInput("Dave lives in Austin", tokenizer, baselines="delete")
    gen_args = {"do_sample": True, "max_new_tokens": 4}
    found = compare_baselines(attribution, inp, [None, "<unk>", 5], gen_args=gen_args, seed=3)
    assert len(runs) == 1
    assert len({tuple(result.target.tolist()) for result in found.results.values()}) == 1
    with pytest.raises(ValueError, match="`gen_args` would be ignored"):
        compare_baselines(attribution, inp, [None, 5], target=" golf", gen_args=gen_args)


def test_arguments_apply_to_every_baseline(model, tokenizer):
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    inp = TextSegmentInput("Dave lives in Austin", tokenizer, baselines="delete")
    arguments = {"output_unit": None, "feature_mask": torch.tensor([[0, 0, 1, 1]])}
    found = compare_baselines(attribution, inp, [None, "<unk>"], target=" golf.", **arguments)
    for result in found.results.values():
        assert result.output_attr is None
        assert len(result.input_tokens) == 2


def test_lasso_summary_reports_missing_errors(model, tokenizer):
    attribution = GenerationAttribution(Lime(model), tokenizer)
    inp = TextSegmentInput("Dave lives in Austin", tokenizer, baselines="delete")
    found = compare_baselines(attribution, inp, [None, "<unk>"], target=" golf.")
    assert found.without_errors == ["deleted", "<unk>"]
    assert "No standard errors under deleted, <unk>" in str(found)


# Mistakes ----------------------------------------------------------------------------------------


class Silent(torch.nn.Module):
    """A model that must not be run."""

    def __init__(self, model):
        super().__init__()
        self.config, self.generation_config = model.config, model.generation_config
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, *_, **__):
        raise AssertionError("the model was run")

    generate = forward


@pytest.mark.parametrize(
    ("baselines", "error", "message"),
    [
        ([None], ValueError, "1 entries: give at least two"),
        ({}, ValueError, "0 entries: give at least two"),
        ("<unk>", TypeError, "is a str: give a mapping"),
        (Deletion(), TypeError, "is a Deletion: give a mapping"),
        ({"": None, "a": 3}, TypeError, "'' names a baseline"),
        ({1: None, "a": 3}, TypeError, "1 names a baseline"),
        ([None, ["a"]], ValueError, "baseline 'texts': .* 1 entries for 2"),
        ([None, "no such token"], ValueError, "baseline 'no such token'"),
        ({"a": None, "b": 3.5}, TypeError, "baseline 'b': .* is a float"),
        ({"a": None, "b": lambda slot, generator: 3}, TypeError, "baseline 'b': .* returned 3"),
    ],
)
def test_bad_arguments_fail_before_the_model_runs(model, tokenizer, baselines, error, message):
    attribution = GenerationAttribution(FeatureAblation(Silent(model)), tokenizer)
    inp = TextSegmentInput("Dave lives", tokenizer, baselines="delete")
    with pytest.raises(error, match=message):
        compare_baselines(attribution, inp, baselines)


@pytest.mark.parametrize(
    ("make", "baselines", "message"),
    [
        (INPUTS["captum's tokens"], ["<unk>", None], "baseline 'deleted': None cannot be used in"),
        (INPUTS["captum's template"], [None, "<unk>"], "'<unk>' does not fit the template"),
        (INPUTS["captum's template"], [None, ["a"]], "does not fit the template: .*0, 1, 2"),
        (INPUTS["captum's template"], [None, TokenBaseline(3)], "value of a template is a text"),
        (INPUTS["captum's template, named"], [None, {"a": "x"}], r"values \(a, b\)"),
        (INPUTS["captum's template, named"], [None, {"a": "x", "b": ["y"]}], "ProductBaselines"),
        (lambda t, b: "a text", [None, 3], "is a str, whose baselines cannot be exchanged"),
    ],
)
def test_unsupported_baselines_are_refused(model, tokenizer, make, baselines, message):
    attribution = GenerationAttribution(FeatureAblation(Silent(model)), tokenizer)
    make_valid = make(tokenizer, 0 if make is INPUTS["captum's tokens"] else None)
    with pytest.raises((TypeError, ValueError), match=message):
        compare_baselines(attribution, make_valid, baselines)


def test_image_inputs_are_refused(model, tokenizer):
    inp = ImageMaskInput(Image.new("RGB", (2, 2)))
    attribution = GenerationAttribution(FeatureAblation(Silent(model)), tokenizer)
    with pytest.raises(TypeError, match="ImageMaskInput, whose baselines cannot be exchanged"):
        compare_baselines(attribution, inp, [None, 3])


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ({"z": -1}, "`z` is -1"),
        ({"z": float("nan")}, "`z` is nan"),
        ({"k": 0}, "`k` is 0"),
        ({"least": 1.0}, "`least` is 1.0"),
    ],
)
def test_out_of_range_arguments_are_refused(model, tokenizer, number, message):
    attribution = GenerationAttribution(FeatureAblation(Silent(model)), tokenizer)
    with pytest.raises(ValueError, match=message):
        compare_baselines(
            attribution,
            TextSegmentInput("Dave lives", tokenizer, baselines="delete"),
            [None, 3],
            **number,
        )
    with pytest.raises(ValueError, match=message):
        compare(made([[1.0]]), made([[1.0]]), **number)


def test_foreign_attribution_classes_are_refused(model, tokenizer):
    with pytest.raises(TypeError, match="is a KernelShap: give a `GenerationAttribution`"):
        compare_baselines(
            KernelShap(model), TextSegmentInput("Dave", tokenizer, baselines="delete"), [None, 3]
        )


@pytest.mark.filterwarnings("ignore:.*steps are too few:UserWarning")
def test_gradient_methods_under_several_baselines(model, tokenizer):
    attribution = GenerationGradientAttribution(LayerIntegratedGradients(model, None), tokenizer)
    inp = TextSegmentInput("Dave lives in Palm Coast, FL", tokenizer, baselines="delete")
    comparison = compare_baselines(attribution, inp, [None, 3], target=" golf", n_steps=5)
    assert list(comparison.results) == ["zero vector", "token 3"]
    for baselines, found in zip((None, 3), comparison.results.values(), strict=True):
        expected = attribution.attribute(inp.with_baselines(baselines), " golf", n_steps=5)
        assert torch.equal(found.full_attr, expected.full_attr)
    with pytest.raises(ValueError, match="`baselines` would be ignored: what is absent is the zer"):
        compare_baselines(attribution, inp, [None, 3], absent="zero")
    other = GenerationGradientAttribution(LayerGradientXActivation(model, None), tokenizer)
    with pytest.raises(ValueError, match=r"Give `LayerIntegratedGradients\(model, None\)`"):
        compare_baselines(other, inp, [None, 3])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"target": torch.tensor([7])}, "targets"),
        ({"input_tokens": ["x"]}, "prompt features"),
        ({"output_features": []}, "output features"),
        ({"provenance": {"method": "Lime"}}, "methods"),
        ({"provenance": {"attr_target": "logit"}}, "values"),
    ],
)
def test_results_of_different_inputs_are_refused(change, what):
    with pytest.raises(ValueError, match=f"'A' and 'B' have different {what}"):
        compare(made([[1.0]]), made([[1.0]], **change))
    with pytest.raises(ValueError, match="1 result came"):
        BaselineComparison({"A": made([[1.0]])})


def test_missing_tokens_are_refused():
    found = compare(made([[1.0], [2.0]]), made([[1.0], [2.0]]))
    for method in (found.changes, found.plot):
        with pytest.raises(ValueError, match="there is no target token 2"):
            method(2)
    assert found.changes("t1") == found.changes(1) == found.changes(-1)


# The plot ----------------------------------------------------------------------------------------


def marks(ax):
    """Texts of the row below the baselines, by column."""
    n_rows = ax.images[0].get_array().shape[0]
    return {t.get_position()[0]: t.get_text() for t in ax.texts if t.get_position()[1] == n_rows}


def frames(ax):
    return {(p.get_x() + 0.5, p.get_y() + 0.5) for p in ax.patches if isinstance(p, Rectangle)}


def labels(axis):
    return [label.get_text() for label in axis]


def test_plot_uses_one_scale_for_all_baselines():
    first = made([[3.0, 1.0, -0.5]], [[0.1, 0.1, 0.9]])
    fig, ax = compare(first, made([[1.0, -6.0, -0.5]], 0.1)).plot(0)
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array(), [[3.0, 1.0, -0.5], [1.0, -6.0, -0.5]])
    assert image.get_clim() == (-6.0, 6.0)
    alpha = image.get_alpha()
    assert alpha[0, 2] < 0.5
    assert np.delete(alpha.ravel(), 2).tolist() == [1.0] * 5
    assert frames(ax) == {(0.0, 0.0), (1.0, 1.0)}
    assert marks(ax) == {0.0: "⇅", 1.0: "±\n⇅"}
    assert labels(ax.get_yticklabels()) == ["A", "B", "changes"]
    assert labels(ax.get_xticklabels()) == ["p0", "p1", "p2"]
    assert "pale" in ax.get_xlabel()
    numbers = {t.get_position(): t for t in ax.texts}
    assert numbers[1, 1].get_text() == "−6.0"
    assert numbers[2, 0].get_color() != numbers[2, 1].get_color()
    assert fig.axes[1].get_ylim() == (-6.0, 6.0)


def test_plot_separates_earlier_and_omits_later_output():
    result = made([[1.0], [1.0]], output_attr=[[0.0, 0.0], [2.0, 0.0]], owners=[0, 1])
    _, ax = compare(result, result).plot("t1")
    assert [image.get_array().tolist() for image in ax.images] == [[[1.0]] * 2, [[2.0]] * 2]
    assert ax.images[1].get_extent()[0] > ax.images[0].get_extent()[1] + 0.5
    assert {"prompt", "generated before"} <= {t.get_text() for t in ax.texts}
    assert "none" in marks(ax).values()
    assert len(compare(result, result).plot()[1].images) == 1


@pytest.mark.parametrize("n", [5, 60, 300])
def test_plot_signs_are_readable_at_any_size(n):
    values = np.random.default_rng(0).normal(size=(3, n))
    strongest = [n - 2, n // 2, 1]
    fig, ax = plot.baseline_map(
        values,
        labels=[f"w{i}" for i in range(n)],
        row_labels=["A", "B", "C"],
        n_prompt=n,
        pale=np.zeros((3, n)),
        strongest=strongest,
    )
    fig.draw_without_rendering()
    assert fig.get_size_inches()[0] <= 16
    assert {f"w{i}" for i in strongest} <= set(labels(ax.get_xticklabels()))
    boxes = sorted(label.get_window_extent().x0 for label in ax.get_xticklabels())
    assert np.diff(boxes).min() > 8  # pixels: letters of 8 points do not touch
    below = values < -0.1 * np.abs(values).max()
    numbers = sum(t.get_text().startswith("−") for t in ax.texts)
    signs = sum(len(c.get_offsets()) for c in ax.collections)
    assert numbers + signs >= below.sum()
    assert ("− lowers" in ax.get_xlabel()) == (n > 5)


@pytest.mark.parametrize("n", [5, 300])
def test_plot_marks_changes_below_columns(n):
    fig, ax = plot.baseline_map(
        np.random.default_rng(0).normal(size=(2, n)),
        labels=[f"w{i}" for i in range(n)],
        row_labels=["A", "B"],
        n_prompt=n,
        pale=np.ones((2, n)),
        strongest=[0, 1],
        changes_sign={1, 2},
        changes_rank={2, 3},
        unit="nats",
    )
    fig.canvas.draw()
    rows = labels(ax.get_yticklabels())
    if n == 5:
        assert rows == ["A", "B", "changes"]
        assert marks(ax) == {1.0: "±", 2.0: "±\n⇅", 3.0: "⇅"}
    else:
        assert rows == ["A", "B", "changes sign", "changes rank"]
        assert marks(ax) == {}
        drawn = [c for c in ax.collections if isinstance(c, LineCollection)]
        found = [{tuple(np.mean(s, axis=0)) for s in c.get_segments()} for c in drawn]
        assert found == [{(1, 2), (2, 2)}, {(2, 3), (3, 3)}]
    assert fig.axes[1].get_ylabel() == "Attribution (nats)"
    key = ax.xaxis.label.get_window_extent()
    assert fig.bbox.x0 <= key.x0 < key.x1 <= fig.bbox.x1


@pytest.mark.parametrize("token", ["$x$ $", "東京", "\n", "$\\no"])
def test_plot_title_takes_any_token_text(token):
    result = made([[1.0]], output_tokens=[token])
    fig, ax = compare(result, result).plot(0)
    fig.canvas.draw()  # warnings of missing glyphs, or of mathtext, would fail here
    assert ax.get_title(loc="left").startswith("Causes of '")


def test_plot_accepts_ax_and_show(monkeypatch):
    found = compare(made([[1.0, 2.0]]), made([[2.0, 1.0]]))
    fig, ax = plt.subplots()
    assert found.plot(0, ax=ax, cmap="PuOr") == (fig, ax)
    assert ax.images[0].get_cmap().name == "PuOr"
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    assert found.plot(show=True) is None
    assert shown == [True]
