"""Leave-one-out down a nesting: exact where it looked, and open about where it did not."""

import pytest
import tiny
import torch
from captum.attr import FeatureAblation

from captum_llm_ext import (
    GenerationAttribution,
    GenerationAttributionResult,
    HierarchicalAblation,
    TextSegmentInput,
)
from captum_llm_ext.coalitions import Scope, join_plans, plan_anchors
from captum_llm_ext.coalitions.hierarchical_search import search, solve_search, unrefined

TREE = ((0, 1, 2), (3, (4, 5), 6), (7, 8))
N = 10  # column 9 lies beside the tree
WEIGHTS = torch.tensor(
    [[0.0, 0, 0, 0, 4, 1, 0, 0, 0, 0], [0, 0.1, 0, 0, 0, 3, 0.5, 0, 0, 2]], dtype=torch.float64
)


def play(share, *, top_k=None, n_evaluations=None, n_draws=1, noise=0.0, n_visible=(9, 10)):
    """A linear game: what is lost with a part is the sum of its weights."""
    rows = []

    def score(plan):
        rows.append(plan.masks)
        offset = torch.sin(plan.draws.double() * 7)[:, None] * noise
        return plan.masks.double() @ WEIGHTS.T + offset * plan.masks[:, 4:5]

    scope = Scope(torch.tensor(n_visible), torch.tensor([-1, -1]))
    plan, values = search(
        score,
        TREE,
        N,
        share=share,
        top_k=top_k,
        n_evaluations=n_evaluations,
        n_draws=n_draws,
    )
    ends = plan_anchors(N)
    plan, values = join_plans([ends, plan]), torch.cat([ends.masks.double() @ WEIGHTS.T, values])
    return (
        solve_search(plan, values, scope, tree=TREE),
        unrefined(plan, values, scope, tree=TREE),
        torch.cat(rows),
    )


def test_zero_threshold_ablates_every_feature():
    found, left, rows = play(0.0)
    assert torch.allclose(found.attributions, WEIGHTS)
    assert left == []
    assert (found.standard_errors == 0).all()
    assert len(rows) == 1 + 4 + 8 + 2  # the whole; parts and the column beside; their parts; (4, 5)


def test_only_parts_above_the_threshold_are_split():
    found, left, rows = play(0.05)
    assert sorted(group.columns for group in left) == [(0, 1, 2), (7, 8)]
    for group in left:
        assert torch.allclose(group.totals, WEIGHTS[:, list(group.columns)].sum(1))
        shares = found.attributions[:, list(group.columns)]
        assert torch.allclose(
            shares, (group.totals / len(group.columns))[:, None].expand_as(shares)
        )
        assert found.standard_errors[:, list(group.columns)].isnan().all()
    looked_at = [3, 4, 5, 6]
    assert torch.allclose(found.attributions[:, looked_at], WEIGHTS[:, looked_at])
    assert (found.standard_errors[:, looked_at] == 0).all()
    assert len(rows) == 1 + 4 + 3 + 2


def test_budget_splits_the_largest_parts_first():
    found, left, rows = play(0.0, n_evaluations=8)
    assert len(rows) == 8
    assert (4, 5) in [group.columns for group in left]
    assert torch.allclose(found.attributions[0, [4, 5]], torch.tensor([2.5, 2.5]).double())


def test_budget_is_spent_on_the_largest_effect_at_any_level():
    """A word of the best sentence comes before the sentences of a poorer paragraph."""
    found, left, rows = play(0.0, n_evaluations=10)
    assert len(rows) == 1 + 4 + 3 + 2
    assert torch.allclose(found.attributions[0, [4, 5]], torch.tensor([4.0, 1.0]).double())
    assert sorted(group.columns for group in left) == [(0, 1, 2), (7, 8)]


def test_top_k_search_prunes_parts():
    found, left, rows = play(0.0, top_k=1)
    assert found.attributions.argmax(1).tolist() == [4, 5]
    # Both paragraphs that are left lose less than the strongest column known.
    assert sorted(group.columns for group in left) == [(0, 1, 2), (7, 8)]
    more, left, more_rows = play(0.0, top_k=3)
    assert len(more_rows) > len(rows)
    strongest = WEIGHTS[1, :9].topk(3).indices
    assert torch.allclose(more.attributions[1, strongest], WEIGHTS[1, strongest])


@pytest.mark.parametrize("seed", range(5))
def test_top_k_of_additive_games_equals_leave_one_out(seed):
    """Signs alike: a part then loses at least what each of its columns does."""
    generator = torch.Generator().manual_seed(seed)
    n, width = 240, 6
    weights = torch.rand(2, n, generator=generator, dtype=torch.float64).pow(40)
    tree = tuple(
        tuple(
            tuple(range(start, start + width)) for start in range(first, first + 4 * width, width)
        )
        for first in range(0, n, 4 * width)
    )
    scope = Scope(torch.tensor([n, n]), torch.tensor([-1, -1]))

    def score(plan):
        return plan.masks.double() @ weights.T

    plan, values = search(score, tree, n, share=0.0, top_k=3)
    ends = plan_anchors(n)
    both = join_plans([ends, plan])
    found = solve_search(both, torch.cat([score(ends), values]), scope, tree=tree)
    for own, truth in zip(found.attributions, weights, strict=True):
        assert own.topk(3).indices.tolist() == truth.topk(3).indices.tolist()
    assert len(plan.masks) < n / 2


def test_top_k_search_finds_prompt_causes_beside_output(setting):
    exact = run(setting, FeatureAblation(setting[0]))
    found = run(setting, HierarchicalAblation(setting[0], share=0.0, top_k=1))
    assert found.n_evaluations < exact.n_evaluations
    assert "its 1 strongest known" in found.provenance["rule"]
    with pytest.raises(ValueError, match="`top_k`"):
        HierarchicalAblation(setting[0], top_k=0)


def test_draws_give_standard_errors():
    found, _, _ = play(0.05, n_draws=8, noise=1.0)
    offsets = torch.sin(torch.arange(8).double() * 7)
    assert found.attributions[0, 4] == pytest.approx(4 + float(offsets.mean()))
    plain = float(offsets.std() / 8**0.5)
    assert plain < found.standard_errors[0, 4] < 1.5 * plain  # Student's t of 8 draws is wider


@pytest.fixture(scope="module")
def setting():
    text = (
        "Ann lives in Austin, TX. She is a nurse!\n\n"
        "Dave lives in Palm Coast, FL. He is a lawyer.\n\n"
        "The quick brown fox jumps over the lazy dog. Dr. No paid 3.5 million."
    )
    tokenizer = tiny.byte_level()
    model = tiny.llama().double()
    inp = TextSegmentInput(text, tokenizer, ("paragraph", "sentence", "word"), baselines="delete")
    return model, tokenizer, inp, " golf and chess"


def run(setting, method, **arguments):
    _model, tokenizer, inp, target = setting
    return GenerationAttribution(method, tokenizer).attribute(inp, target, **arguments)


def test_split_features_equal_feature_ablation(setting):
    exact = run(setting, FeatureAblation(setting[0]))
    everything = run(setting, HierarchicalAblation(setting[0], share=0.0))
    assert torch.allclose(everything.full_attr, exact.full_attr, atol=1e-10)
    assert everything.unresolved == []
    found = run(setting, HierarchicalAblation(setting[0], share=0.6))
    left = {column for group in found.unresolved for column in group.columns}
    assert left
    assert found.n_evaluations < exact.n_evaluations
    seen = [column for column in range(exact.full_attr.shape[1]) if column not in left]
    assert len(seen) > len(exact.output_features)
    assert torch.allclose(found.full_attr[:, seen], exact.full_attr[:, seen], atol=1e-10)


def test_rule_and_unsplit_parts_are_recorded(setting, tmp_path):
    found = run(setting, HierarchicalAblation(setting[0], share=0.6))
    assert "0.6 of the largest change" in found.provenance["rule"]
    assert found.provenance["method"] == "HierarchicalAblation"
    assert found.provenance["estimate"] is True
    assert "give a smaller `share`" in str(found)
    for group in found.unresolved:
        shares = found.token_attr[:, group.columns]
        assert torch.allclose(shares.sum(1), group.attributions)
    found.save(tmp_path / "result.safetensors")
    loaded = GenerationAttributionResult.load(tmp_path / "result.safetensors")
    assert [g.columns for g in loaded.unresolved] == [g.columns for g in found.unresolved]


@pytest.mark.parametrize("unit", [None, "word"])
def test_multi_token_output_words_equal_feature_ablation(setting, unit):
    exact = run(setting, FeatureAblation(setting[0]), output_unit=unit)
    found = run(setting, HierarchicalAblation(setting[0], share=0.0), output_unit=unit)
    assert torch.allclose(found.full_attr, exact.full_attr, atol=1e-10)


def test_random_baseline_is_drawn_repeatedly(setting):
    model, tokenizer, _, target = setting
    text, replacement_ids = "One two. Three four.\n\nFive six.", ["two", "nine", "eleven"]
    inp = TextSegmentInput(
        text, tokenizer, ("paragraph", "sentence", "word"), baselines=[replacement_ids] * 6
    )
    found = GenerationAttribution(HierarchicalAblation(model, share=0.0), tokenizer).attribute(
        inp, target, output_unit=None, n_draws=12
    )
    assert found.unresolved == []
    assert (found.token_attr_se > 0).all()
    exact = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(
        inp, target, output_unit=None, n_draws=200
    )
    error = (found.token_attr - exact.token_attr).abs()
    assert (error < 6 * (found.token_attr_se + exact.token_attr_se)).all()


def test_bad_arguments_are_refused(setting):
    model, tokenizer, _, target = setting
    for share in (-0.1, 2, "much", True):
        with pytest.raises(ValueError, match="`share` is"):
            HierarchicalAblation(model, share=share)
    flat = TextSegmentInput("One two three.", tokenizer, "word", baselines="delete")
    attribution = GenerationAttribution(HierarchicalAblation(model), tokenizer)
    with pytest.raises(ValueError, match="no coarser parts"):
        attribution.attribute(flat, target)
    with pytest.raises(ValueError, match="`stop` and `num_trials`"):
        run(setting, HierarchicalAblation(model), tol=0.1)
