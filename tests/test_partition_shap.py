"""Owen values against every order that a nesting allows, captum's Shapley values and shap."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from captum.attr import FeatureAblation, ShapleyValues
from captum.attr._utils.attribution import PerturbationAttribution
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import loop_log_probs, shapley_values, tokens_read
from torch import Tensor

from captum_llm_ext import GenerationAttribution, PartitionShap, TextSegmentInput
from captum_llm_ext.coalitions import Plan, Scope, Solution, join_plans, plan_anchors
from captum_llm_ext.coalitions.owen_orders import (
    Tree,
    as_tree,
    balanced,
    binary,
    leaves,
    plan_nested_orders,
    pruned,
    solve_nested_orders,
    tree_of_levels,
)
from captum_llm_ext.coalitions.owen_splits import (
    n_splits,
    plan_splits,
    solve_splits,
    split_best_first,
    unresolved,
)

TREES = [
    [0, 1, 2, 3, 4, 5],
    [[0, 1, 2], [3, 4, 5]],
    [[0, 1], [2, [3, 4]], 5],
    [5, [[[4, 0], 1], [3, 2]]],
]
Worth = Callable[[Tensor], Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table_game(n: int, seed: int) -> Worth:
    """A worth for every coalition, with no structure at all."""
    worth = torch.randn(2**n, generator=seeded(seed)).double()
    return lambda masks: worth[(masks.long() << torch.arange(n)).sum(1)]


def orders(tree: Tree) -> list[list[int]]:
    """Every order that finishes a group before it begins the next."""
    if isinstance(tree, int):
        return [[tree]]
    return [
        [*itertools.chain(*parts)]
        for children in itertools.permutations(tree)
        for parts in itertools.product(*map(orders, children))
    ]


def owen_values(value: Callable[[frozenset[int]], float], tree: Tree) -> dict[int, float]:
    """The definition: what a feature adds when it joins, over all orders of the nesting."""
    every = orders(tree)
    total = dict.fromkeys(leaves(tree), 0.0)
    known: dict[frozenset[int], float] = {}

    def cached(members: frozenset[int]) -> float:
        if members not in known:
            known[members] = value(members)
        return known[members]

    for order in every:
        for place, feature in enumerate(order):
            before = frozenset(order[:place])
            total[feature] += cached(before | {feature}) - cached(before)
    return {feature: gain / len(every) for feature, gain in total.items()}


def value_of(worth: Worth, n: int) -> Callable[[frozenset[int]], float]:
    def value(members: frozenset[int]) -> float:
        mask = torch.zeros(1, n, dtype=torch.bool)
        mask[0, list(members)] = True
        return float(worth(mask))

    return value


def truth(worth: Worth, tree: Tree, n: int) -> Tensor:
    found = owen_values(value_of(worth, n), tree)
    return torch.tensor([found[i] for i in range(n)], dtype=torch.float64)


def whole(n: int, n_target: int = 1) -> Scope:
    return Scope(torch.full((n_target,), n), torch.full((n_target,), -1))


def solve_completely(worth: Worth, tree: Tree, n: int) -> Solution:
    plan = join_plans([plan_anchors(n), plan_splits(tree, n)])
    return solve_splits(plan, worth(plan.masks)[:, None], whole(n), tree=tree)


# Trees


def test_nested_lists_become_trees():
    assert as_tree([[0], [[1, 2], []], (3,)], 4) == (0, (1, 2), 3)
    assert as_tree([[[0]]], 1) == 0
    assert as_tree([], 0) == ()
    for wrong in ([0, 1], [0, 1, 1], [0, 1, 3], [0, [1, 2], 2]):
        with pytest.raises(ValueError, match="does not hold each of 3 features once"):
            as_tree(wrong, 3)
    for wrong in ([0, "1", 2], [0, 1.0, 2], [True, 0, 2], "012"):
        with pytest.raises(TypeError, match="nested lists of feature numbers"):
            as_tree(wrong, 3)


def test_levels_become_trees():
    paragraphs, sentences = [0, 0, 0, 1, 1], [0, 0, 1, 2, 2]
    assert tree_of_levels(5, [paragraphs, sentences]) == (((0, 1), 2), (3, 4))
    assert tree_of_levels(3, []) == (0, 1, 2)
    assert tree_of_levels(4, [[1, 0, 1, 0]]) == ((0, 2), (1, 3))


def test_binary_trees_keep_order_and_halve():
    assert balanced([0, 1, 2, 3, 4]) == (((0, 1), 2), (3, 4))
    assert binary((0, (1, 2, 3), 4)) == ((0, ((1, 2), 3)), 4)
    assert pruned((0, (1, 4), (2, 3)), 3) == (0, 1, 2)
    assert pruned((3, 4), 3) == ()


# Plans


@given(tree=st.sampled_from(TREES), n_orders=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_orders_keep_groups_contiguous_with_their_reverse(tree, n_orders, seed):
    allowed = orders(as_tree(tree, 6))
    plan = plan_nested_orders(as_tree(tree, 6), 6, n_orders, generator=seeded(seed))
    walks = plan.masks.view(n_orders, 7, 6)
    found = []
    for walk in walks:
        joined = (walk[1:] & ~walk[:-1]).nonzero()
        assert joined[:, 0].tolist() == list(range(6))
        found.append(joined[:, 1].tolist())
    assert all(order in allowed for order in found)
    for one, other in zip(found[::2], found[1::2], strict=False):
        assert one == other[::-1]
    assert plan.draws.view(n_orders, 7)[:, 0].tolist() == [i // 2 for i in range(n_orders)]


def test_all_orders_are_equally_likely():
    tree = as_tree([[0, 1], [2, [3, 4]]], 5)
    plan = plan_nested_orders(tree, 5, 4000, generator=seeded(0))
    walks = plan.masks.view(4000, 6, 5)[::2]  # of a pair the reverse says nothing new
    ranks = 5 - walks.sum(1)
    codes = (ranks * 6 ** torch.arange(5)).sum(1)
    counts = codes.unique(return_counts=True)[1]
    assert len(counts) == len(orders(tree)) == 16
    chi_squared = float(((counts - 125) ** 2 / 125).sum())
    assert chi_squared < 30.6  # 99 % point of 15 degrees of freedom


def test_orders_with_a_held_column_permute_earlier_columns():
    tree = as_tree([[0, 1, 2], [3, 4, 5]], 6)
    plan = plan_nested_orders(tree, 6, 4, generator=seeded(0), held=4)
    assert len(plan.masks) == 4 * 5
    assert plan.masks[:, 4].all()
    assert not plan.masks[:, 5].any()
    assert plan.masks[::5, :4].sum() == 0
    assert plan.masks[4::5, :4].all()


@pytest.mark.parametrize("tree", TREES)
def test_complete_plans_are_distinct_and_of_the_stated_size(tree):
    nested = as_tree(tree, 6)
    plan = plan_splits(nested, 6)
    assert len(plan.masks.unique(dim=0)) == len(plan.masks) == 2 + n_splits(nested)
    needed = {frozenset(order[:k]) for order in orders(nested) for k in range(7)}
    assert {frozenset(mask.nonzero()[:, 0].tolist()) for mask in plan.masks} == needed


# Owen values


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("seed", [0, 1])
def test_complete_splits_are_owen_values(tree, seed):
    worth, nested = table_game(6, seed), as_tree(tree, 6)
    solution = solve_completely(worth, nested, 6)
    expected = truth(worth, nested, 6)
    torch.testing.assert_close(solution.attributions[0], expected, atol=1e-12, rtol=0)
    assert solution.standard_errors.eq(0).all()


def test_flat_hierarchy_gives_shapley_values():
    worth = table_game(6, 3)
    expected = torch.tensor(shapley_values(value_of(worth, 6), 6), dtype=torch.float64)
    found = solve_completely(worth, tuple(range(6)), 6).attributions[0]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tree", TREES)
def test_group_sums_equal_shapley_values_of_groups(tree):
    """The quotient property of Owen values: groups share as players of their own would."""
    worth, nested = table_game(6, 5), as_tree(tree, 6)
    found = solve_completely(worth, nested, 6).attributions[0]
    groups = [leaves(child) for child in nested]

    def value(members: frozenset[int]) -> float:
        return value_of(worth, 6)(frozenset(f for g in members for f in groups[g]))

    expected = shapley_values(value, len(groups))
    assert [float(found[g].sum()) for g in groups] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tree", TREES)
def test_sampled_orders_converge_with_valid_errors(tree):
    worth, nested = table_game(6, 7), as_tree(tree, 6)
    expected = truth(worth, nested, 6)
    covered = []
    for seed in range(60):
        plan = plan_nested_orders(nested, 6, 16, generator=seeded(seed))
        plan = join_plans([plan_anchors(6), plan])
        solution = solve_nested_orders(plan, worth(plan.masks)[:, None], whole(6))
        total = solution.attributions.sum()
        torch.testing.assert_close(total, (solution.full_values - solution.empty_values)[0])
        error = (solution.attributions - expected).abs()
        # An order and its reverse are all that there is for two groups: exact, but for rounding.
        covered.append(error <= 1.96 * solution.standard_errors + 1e-12)
    assert float(torch.cat(covered).double().mean()) > 0.88  # 360 intervals, not independent


def test_all_orders_are_exact():
    tree = as_tree([[0, 1], [2, [3, 4]]], 5)
    worth = table_game(5, 2)
    walks = torch.zeros(16, 6, 5, dtype=torch.bool)
    for walk, order in zip(walks, orders(tree), strict=True):
        for place, feature in enumerate(order):
            walk[place + 1 :, feature] = True
    plan = join_plans(
        [plan_anchors(5), Plan(walks.flatten(0, 1), torch.arange(16).repeat_interleave(6))]
    )
    found = solve_nested_orders(plan, worth(plan.masks)[:, None], whole(5)).attributions[0]
    torch.testing.assert_close(found, truth(worth, tree, 5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("solver", ["splits", "orders"])
@pytest.mark.parametrize("tree", TREES)
def test_each_target_gets_its_own_owen_values(tree, solver):
    """Targets that see fewer columns, and one that requires a column it does not see."""
    n, nested = 6, as_tree(tree, 6)
    worths = [table_game(n, seed) for seed in range(3)]
    scope = Scope(torch.tensor([6, 4, 3]), torch.tensor([-1, -1, 3]))

    def score(plan: Plan) -> Tensor:
        masks = plan.masks
        seen = [masks & (torch.arange(n) < k) for k in (6, 4)]
        third = masks & (torch.arange(n) < 4)
        values = [worths[0](seen[0]), worths[1](seen[1]), worths[2](third)]
        values[2] = values[2].masked_fill(~masks[:, 3], torch.nan)
        return torch.stack(values, 1)

    if solver == "splits":
        both = [plan_splits(nested, n), plan_splits(nested, n, held=3)]
        masks = torch.cat([part.masks for part in both])
        plans = [Plan(masks, torch.zeros(len(masks)).long())]  # one draw for all
    else:
        plans = [
            plan_nested_orders(nested, n, 3000, generator=seeded(1)),
            plan_nested_orders(nested, n, 3000, generator=seeded(2), held=3),
        ]
    plan = join_plans([plan_anchors(n, required=[3]), *plans])
    if solver == "splits":
        solution = solve_splits(plan, score(plan), scope, tree=nested)
    else:
        solution = solve_nested_orders(plan, score(plan), scope)

    def seen_value(worth: Worth, held: frozenset[int]) -> Callable[[frozenset[int]], float]:
        return lambda members: value_of(worth, n)(members | held)

    expected = torch.zeros(3, n).double()
    games = [(worths[0], 6, frozenset()), (worths[1], 4, frozenset()), (worths[2], 3, {3})]
    for t, (worth, k, held) in enumerate(games):
        for feature, gain in owen_values(
            seen_value(worth, frozenset(held)), pruned(nested, k)
        ).items():
            expected[t, feature] = gain
    assert solution.attributions[scope.n_visible[:, None] <= torch.arange(n)].eq(0).all()
    error = (solution.attributions - expected).abs()
    assert (error <= 1e-12 + 4 * solution.standard_errors).all()
    assert solution.standard_errors.max() < 0.1


def test_non_permutation_plans_are_refused():
    generator = seeded(0)
    masks = torch.rand(20, 5, generator=generator) < 0.5
    plan = join_plans([plan_anchors(5), Plan(masks, torch.arange(20))])
    with pytest.raises(ValueError, match="not walks from the empty to the full"):
        solve_nested_orders(plan, torch.zeros(len(plan.masks), 1), whole(5))
    plan = join_plans(
        [
            plan_anchors(5, required=[4]),
            plan_nested_orders((0, 1, 2, 3, 4), 5, 2, generator=generator),
        ]
    )
    scope = Scope(torch.tensor([4]), torch.tensor([4]))
    with pytest.raises(ValueError, match=r"No walk holds column 4.*held=4"):
        solve_nested_orders(plan, torch.zeros(len(plan.masks), 1), scope)


# Best first


def grown(worth: Worth, tree: Tree, n: int, budget: int) -> tuple[Plan, Tensor]:
    plan, values = split_best_first(
        lambda p: worth(p.masks)[:, None], tree, n, whole(n), n_evaluations=budget
    )
    assert torch.equal(values[:, 0], worth(plan.masks))
    return join_plans([plan_anchors(n), plan]), worth(join_plans([plan_anchors(n), plan]).masks)


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 7, 12, 20, 33, 1000])
def test_every_budget_is_respected_and_efficient(budget):
    tree = binary(as_tree(TREES[2], 6))
    worth = table_game(6, 4)
    plan, values = grown(worth, tree, 6, budget)
    assert len(plan.masks) - plan.n_anchors <= max(2, budget)
    solution = solve_splits(plan, values[:, None], whole(6), tree=tree)
    gap = solution.full_values - solution.empty_values - solution.attributions.sum(1)
    assert gap.abs().max() < 1e-12
    groups = unresolved(plan, values[:, None], whole(6), tree=tree)
    uncertain = set(solution.standard_errors[0].isnan().nonzero()[:, 0].tolist())
    assert {column for group in groups for column in group.columns} <= uncertain
    if budget == 1000:
        assert not groups
        assert not uncertain
        torch.testing.assert_close(
            solution.attributions[0], truth(worth, tree, 6), atol=1e-12, rtol=0
        )


def test_unresolved_groups_are_reported_and_shared_evenly():
    worth = table_game(4, 0)
    tree = ((0, 1), (2, 3))
    plan, values = grown(worth, tree, 4, 4)  # the ends, and one split of the root
    groups = unresolved(plan, values[:, None], whole(4), tree=tree)
    value = value_of(worth, 4)
    left, right, both = (value(frozenset(s)) for s in ({0, 1}, {2, 3}, {0, 1, 2, 3}))
    empty = value(frozenset())
    expected = {
        (0, 1): (left - empty + both - right) / 2,
        (2, 3): (right - empty + both - left) / 2,
    }
    assert {g.columns: pytest.approx(float(g.totals)) for g in groups} == expected
    assert abs(float(groups[0].totals)) >= abs(float(groups[1].totals))
    found = solve_splits(plan, values[:, None], whole(4), tree=tree).attributions[0]
    assert found.tolist() == pytest.approx([expected[0, 1] / 2] * 2 + [expected[2, 3] / 2] * 2)


def test_sparse_causes_among_a_thousand_features_are_found():
    """Halving takes ten steps; what adds nothing is never looked into."""
    n, tree = 1000, balanced(range(1000))
    expected = torch.zeros(n).double()
    expected[617], expected[3] = 3.0, -1.0
    plan, values = grown(lambda masks: masks.double() @ expected, tree, n, 60)
    found = solve_splits(plan, values[:, None], whole(n), tree=tree)
    torch.testing.assert_close(found.attributions[0], expected, atol=1e-12, rtol=0)
    groups = unresolved(plan, values[:, None], whole(n), tree=tree)
    assert max(abs(float(group.totals)) for group in groups) < 1e-12
    assert found.standard_errors.isnan().all()  # other contexts were not looked at


def test_interacting_groups_are_split_first():
    """Two of a hundred features matter, and only together: halves that they are not in wait."""
    n, tree = 100, balanced(range(100))
    plan, values = grown(lambda m: (m[:, 10] & m[:, 90]).double(), tree, n, 40)
    found = solve_splits(plan, values[:, None], whole(n), tree=tree).attributions[0]
    assert found[[10, 90]].tolist() == pytest.approx([0.5, 0.5])
    assert float(found.abs().sum()) == pytest.approx(1.0)


def test_splits_are_chosen_jointly_over_targets():
    """Two targets that cancel in sum, but not in magnitude, are where the budget goes."""

    def score(plan: Plan) -> Tensor:
        masks = plan.masks.double()
        return torch.stack([masks[:, 0] + 0.1 * masks[:, 7], -masks[:, 0] + 0.1 * masks[:, 7]], 1)

    tree = balanced(range(8))
    plan, _ = split_best_first(score, tree, 8, whole(8, 2), n_evaluations=8)
    plan = join_plans([plan_anchors(8), plan])
    solution = solve_splits(plan, score(plan), whole(8, 2), tree=tree)
    expected = torch.tensor([1, 0, 0, 0, 0.025, 0.025, 0.025, 0.025], dtype=torch.float64)
    torch.testing.assert_close(solution.attributions[0], expected)
    groups = unresolved(plan, score(plan), whole(8, 2), tree=tree)
    assert groups[0].columns == (4, 5, 6, 7)
    assert groups[0].totals.tolist() == pytest.approx([0.1, 0.1])


def test_shared_draws_give_standard_errors():
    """Draws shift a feature's worth: the spread of that shift is the standard error."""
    shifts = torch.tensor([0.0, 1.0, 2.0, 5.0]).double()
    tree = ((0, 1), 2)

    def score(plan: Plan) -> Tensor:
        present = plan.masks.double()
        return (present[:, 0] * (1 + shifts[plan.draws]) + present[:, 2])[:, None]

    plan, values = split_best_first(score, tree, 3, whole(3), n_evaluations=10**6, n_draws=4)
    anchors = plan_anchors(3)
    values = torch.cat([torch.tensor([[1 + float(shifts.mean()) + 1], [0.0]]).double(), values])
    solution = solve_splits(join_plans([anchors, plan]), values, whole(3), tree=tree)
    assert solution.attributions[0].tolist() == pytest.approx([3.0, 0.0, 1.0])
    expected = float(shifts.std()) / 2 * 3.182 / 1.96  # Student's t with three degrees of freedom
    assert solution.standard_errors[0].tolist() == pytest.approx([expected, 0, 0], rel=0.01)


# Plain tensors


def network() -> torch.nn.Module:
    generator = seeded(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ).double()
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layers


FLAT = [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "n_features"),
    [
        ({"target": 1}, 5),
        ({"target": torch.tensor([2, 0])}, 5),
        ({"target": 0, "baselines": 0.5}, 5),
        ({"target": 0, "baselines": torch.arange(5.0).double()[None]}, 5),
        ({"target": 1, "feature_mask": torch.tensor([[0, 0, 1, 2, 2]])}, 3),
        ({"target": 1, "feature_mask": torch.tensor([[0, 0, 1, 2, 2], [2, 1, 1, 0, 0]])}, 3),
        ({}, 5),
    ],
)
@pytest.mark.parametrize("at_once", [1, 5])
def test_flat_hierarchy_equals_captum_shapley_values(arguments, n_features, at_once):
    model, inputs = network(), torch.randn(2, 5, generator=seeded(1)).double()
    expected = ShapleyValues(model).attribute(inputs, **arguments)
    found = PartitionShap(model).attribute(
        inputs, **arguments, hierarchy=FLAT[:n_features], perturbations_per_eval=at_once
    )
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected.float(), atol=1e-5, rtol=1e-4)


def test_batch_scalar_and_tuple_inputs_follow_captum():
    model, inputs = network(), torch.randn(2, 5, generator=seeded(1)).double()

    def together(x: Tensor) -> Tensor:
        return model(x).sum()

    def two(x: Tensor, y: Tensor, factor: float, weights: Tensor) -> Tensor:
        return (model(torch.cat([x, y], 1)) * weights).sum(1) * factor

    found = PartitionShap(together).attribute(inputs, hierarchy=FLAT)
    expected = ShapleyValues(together).attribute(inputs)
    assert found.shape == (1, 5)
    torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=1e-4)
    halves = inputs[:, :2], inputs[:, 2:]
    weights = torch.rand(2, 3, generator=seeded(2)).double()
    arguments = {"additional_forward_args": (2.0, weights)}
    expected = ShapleyValues(two).attribute(halves, **arguments)
    found = PartitionShap(two, hierarchy=FLAT).attribute(
        halves, **arguments, perturbations_per_eval=7
    )
    assert isinstance(found, tuple)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=1e-5, rtol=1e-4)


def test_default_hierarchy_halves_features_in_order():
    model, inputs = network(), torch.randn(1, 5, generator=seeded(1)).double()

    def worth(masks: Tensor) -> Tensor:
        return model(masks * inputs)[:, 1].detach()

    found = PartitionShap(model).attribute(inputs, target=1)
    expected = truth(worth, (((0, 1), 2), (3, 4)), 5)
    torch.testing.assert_close(found[0], expected, atol=1e-12, rtol=0)


def test_feature_numbers_follow_the_mask():
    model, inputs = network(), torch.randn(1, 5, generator=seeded(1)).double()
    mask = torch.tensor([[7, 7, 3, 3, 9]])
    found = PartitionShap(model).attribute(
        inputs, target=1, feature_mask=mask, hierarchy=[[9, 3], 7]
    )
    same = torch.tensor([[1, 1, 0, 0, 2]])
    expected = PartitionShap(model).attribute(
        inputs, target=1, feature_mask=same, hierarchy=[[2, 0], 1]
    )
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="does not hold each of 3 features once"):
        PartitionShap(model).attribute(inputs, target=1, feature_mask=mask, hierarchy=[[0, 1], 2])


@pytest.mark.parametrize("scheme", ["orders", "splits"])
def test_tensor_samples_are_efficient_and_seeded(scheme):
    inputs = torch.randn(2, 30, generator=seeded(1)).double()
    seen: list[int] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(len(x))
        return torch.tanh(x).cumsum(1).square().sum(1)

    method = PartitionShap(forward, scheme=scheme)
    found = method.attribute(inputs, n_samples=200, perturbations_per_eval=16)
    assert sum(seen) <= 2 * 202
    total = forward(inputs) - forward(torch.zeros_like(inputs))
    torch.testing.assert_close(found.sum(1), total)
    state = torch.get_rng_state()
    again = method.attribute(inputs, n_samples=200)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(found, again)
    if scheme == "orders":
        assert not torch.equal(found, method.attribute(inputs, n_samples=200, seed=1))


def test_shap_partition_explainer_agrees():
    """Its recursion over both contexts of every split, run to the end."""
    shap = pytest.importorskip("shap")
    numpy = pytest.importorskip("numpy")
    worth = table_game(8, 0)

    class Masker:
        """Rows of zeros and ones, clustered in halves."""

        shape = (1, 8)
        # Rows: left, right, distance, size; numbers from 8 on are rows.
        clustering = numpy.array(
            [
                [0, 1, 1, 2],
                [2, 3, 1, 2],
                [4, 5, 1, 2],
                [6, 7, 1, 2],
                [8, 9, 2, 4],
                [10, 11, 2, 4],
                [12, 13, 3, 8],
            ],
            dtype=float,
        )

        def __call__(self, mask, x):
            return (numpy.where(mask, x, 0)[None],)

    def model(x):
        return worth(torch.as_tensor(x) > 0.5).numpy()

    explainer = shap.explainers.PartitionExplainer(model, Masker())
    explained = explainer(numpy.ones((1, 8)), max_evals=10**6, fixed_context=None, silent=True)
    tree = balanced(range(8))
    found = solve_completely(worth, tree, 8).attributions[0]
    assert found.tolist() == pytest.approx(explained.values[0].tolist(), abs=1e-9)


# Language models

PROMPT = "Dave lives. He sang songs."
TARGET = " golf and"


def attribute(model, tokenizer, *, scheme="orders", hierarchy=None, inp=None, target=TARGET, **kw):
    inp = inp or TextSegmentInput(PROMPT, tokenizer, unit=("sentence", "word"), baselines="delete")
    method = PartitionShap(model, hierarchy, scheme)
    return GenerationAttribution(method, tokenizer).attribute(inp, target, **kw)


def game_value(model, tokenizer, inp, target, t, first_of_word=None):
    """The value of target token t by plain forwards: prompt features, then generated ones."""
    n_prompt = len(inp.names)

    def value(present):
        mask = torch.tensor([[float(i in present) for i in range(n_prompt)]])
        prompt = inp.to_model_input(mask)[0].tolist()
        if first_of_word is None:
            stands = [n_prompt + i in present for i in range(len(target))]
        else:  # the word under way stands for its own tokens
            own = max(w for w, first in enumerate(first_of_word) if first <= t)
            word = [
                max(w for w, f in enumerate(first_of_word) if f <= i) for i in range(len(target))
            ]
            stands = [w == own or n_prompt + w in present for w in word]
        read = tokens_read(target, stands, None)
        return float(loop_log_probs(model, prompt, [read[t]], [target[t]]))

    return value


def test_every_token_gets_owen_values_of_the_input_hierarchy(model, tokenizer):
    model = model.double()
    try:
        target = tokenizer.encode(TARGET, add_special_tokens=False)
        inp = TextSegmentInput(PROMPT, tokenizer, unit=("sentence", "word"), baselines="delete")
        result = attribute(model, tokenizer, inp=inp, target=target, n_samples=400)
        assert result.provenance["estimator"] == "exact Owen values"
        n_prompt = 5
        for t in range(len(target)):
            generated = tuple(range(n_prompt, n_prompt + t))
            tree = as_tree([[[0, 1], [2, 3, 4]], generated], n_prompt + t)
            expected = owen_values(game_value(model, tokenizer, inp, target, t), tree)
            found = dict(enumerate(result.full_attr[t].tolist()))
            assert found == pytest.approx(
                expected | dict.fromkeys(range(n_prompt + t, n_prompt + len(target)), 0.0),
                abs=1e-9,
            )
    finally:
        model.float()


@pytest.mark.parametrize("scheme", ["orders", "splits"])
def test_output_word_is_held_for_its_own_tokens(model, tokenizer, scheme):
    model = model.double()
    try:
        target = tokenizer.encode(" chess golf.", add_special_tokens=False)
        inp = TextSegmentInput(
            "Dave lives. He sang", tokenizer, unit=("sentence", "word"), baselines="delete"
        )
        budget = {"orders": 3000, "splits": 3000}[scheme]
        result = attribute(
            model,
            tokenizer,
            inp=inp,
            target=target,
            scheme=scheme,
            output_unit="word",
            n_samples=budget,
        )
        texts = [tokenizer.decode([t]) for t in target]
        first = next(i for i, text in enumerate(texts) if text.startswith(" g"))
        assert result.output_features == [" chess", " golf."]
        assert first > 1
        for t in range(len(target)):
            value = game_value(model, tokenizer, inp, target, t, [0, first])
            n_seen = 4 if t < first else 5
            tree = as_tree([[[0, 1], [2, 3]], list(range(4, n_seen))], n_seen)
            expected = owen_values(value, tree)
            assert result.full_attr[t, :n_seen].tolist() == pytest.approx(
                [expected[i] for i in range(n_seen)], abs=1e-9
            )
            assert result.full_attr[t, n_seen:].eq(0).all()
    finally:
        model.float()


def test_sampled_orders_with_held_words_converge(model, tokenizer):
    inp = TextSegmentInput(
        "Dave lives. He sang songs. He won.",
        tokenizer,
        unit=("sentence", "word"),
        baselines="delete",
    )
    arguments = {"inp": inp, "target": " chess golf.", "output_unit": "word"}
    exact = attribute(model, tokenizer, **arguments, n_samples=10**5)
    assert exact.provenance["estimator"] == "exact Owen values"
    needed = exact.provenance["n_coalitions"]
    sampled = attribute(model, tokenizer, **arguments, n_samples=needed - 10)
    assert sampled.provenance["estimator"] == "nested orders"
    assert sampled.provenance["estimate"]
    error = (sampled.full_attr - exact.full_attr).abs()
    assert (error <= 4 * sampled.full_attr_se + 1e-5).all()
    assert sampled.efficiency_gap.abs().max() < 1e-9


def test_custom_hierarchy(model, tokenizer):
    inp = TextSegmentInput("Dave lives in Austin", tokenizer, baselines="delete")
    flat = attribute(model, tokenizer, inp=inp, hierarchy=[0, 1, 2, 3, 4, 5], n_samples=10**4)
    shapley = GenerationAttribution(ShapleyValues(model), tokenizer).attribute(inp, TARGET)
    assert len(flat.target) == 3  # the last has no token after it and may be left out
    torch.testing.assert_close(flat.full_attr, shapley.full_attr, atol=1e-5, rtol=1e-4)
    with_last, without = (
        attribute(model, tokenizer, inp=inp, hierarchy=[0, 1, 2, 3, group], n_samples=10**4)
        for group in ([4, [5, 6]], [4, 5])
    )
    torch.testing.assert_close(with_last.full_attr, without.full_attr)
    prompt_only = attribute(
        model, tokenizer, inp=inp, hierarchy=[[0, 2], [1, 3]], output_unit=None, n_samples=10**4
    )
    fixed = GenerationAttribution(ShapleyValues(model), tokenizer).attribute(
        inp, TARGET, output_unit=None
    )
    assert (prompt_only.token_attr - fixed.token_attr).abs().max() > 1e-3
    torch.testing.assert_close(
        prompt_only.token_attr.sum(1), fixed.token_attr.sum(1), atol=1e-4, rtol=1e-4
    )
    for wrong in ([[0, 2], 1], [0, 1, 2, 3, 4, 5, 6, 7]):
        with pytest.raises(ValueError, match="does not hold each of"):
            attribute(model, tokenizer, inp=inp, hierarchy=wrong)


def test_unresolved_groups_are_in_the_result(model, tokenizer, tmp_path):
    inp = TextSegmentInput(
        PROMPT + " She won. They lost it.", tokenizer, unit=("sentence", "word"), baselines="delete"
    )
    result = attribute(model, tokenizer, inp=inp, scheme="splits", n_samples=14)
    assert result.n_evaluations <= 14
    assert result.efficiency_gap.abs().max() < 1e-9
    assert result.unresolved
    columns = {column for group in result.unresolved for column in group.columns}
    uncertain = result.full_attr_se.isnan().any(0)
    assert columns <= set(uncertain.nonzero()[:, 0].tolist())
    for group in result.unresolved:
        names = [*result.input_tokens, *result.output_features]
        assert group.names == [names[c] for c in group.columns]
        assert group.attributions.shape == (len(result.target),)
    result.save(tmp_path / "r.safetensors")
    loaded = type(result).load(tmp_path / "r.safetensors")
    assert [group.columns for group in loaded.unresolved] == [g.columns for g in result.unresolved]
    whole_result = attribute(model, tokenizer, inp=inp, scheme="splits", n_samples=10**4)
    assert whole_result.unresolved == []
    assert "told apart" in str(result)
    assert "told apart" not in str(whole_result)


@pytest.mark.parametrize("scheme", ["orders", "splits"])
def test_random_baselines_are_averaged(model, tokenizer, scheme):
    names = [["Ann", "Bob", "Eve"], ["has", "won"]]
    inp = TextSegmentInput("Dave lives", tokenizer, baselines=names)
    target = tokenizer.encode(" golf", add_special_tokens=False)[:1]
    result = attribute(
        model, tokenizer, inp=inp, target=target, scheme=scheme, n_draws=80, n_samples=10**4
    )

    def value(present):
        texts = [
            f"{a} {b}"
            for a in ([*names[0]] if 0 not in present else ["Dave"])
            for b in ([*names[1]] if 1 not in present else ["lives"])
        ]
        found = [loop_log_probs(model, tokenizer.encode(text), [[]], target) for text in texts]
        return float(torch.stack(found).mean())

    expected = torch.tensor([owen_values(value, (0, 1))[i] for i in (0, 1)])
    error = (result.token_attr[0] - expected).abs()
    assert (error <= 4 * result.token_attr_se[0]).all()
    assert (result.token_attr_se[0] > 0).all()
    assert result.token_attr_se.max() < result.token_attr.abs().max()
    assert result.provenance["estimate"]


def test_merged_features_have_their_own_hierarchy(model, tokenizer):
    inp = TextSegmentInput("Dave lives in Austin", tokenizer, baselines="delete")
    mask = torch.tensor([[0, 1, 0, 2]])
    result = attribute(model, tokenizer, inp=inp, feature_mask=mask, output_unit=None)
    shapley = GenerationAttribution(ShapleyValues(model), tokenizer).attribute(
        inp, TARGET, feature_mask=mask, output_unit=None
    )
    torch.testing.assert_close(result.token_attr, shapley.token_attr, atol=1e-5, rtol=1e-4)


def test_joint_probability_respects_the_hierarchy(model, tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, unit=("sentence", "word"), baselines="delete")
    target = tokenizer.encode(TARGET, add_special_tokens=False)
    method = PartitionShap(model)
    result = GenerationAttribution(method, tokenizer, attr_target="prob").attribute(
        inp, target, n_samples=1000
    )

    def value(present):
        mask = torch.tensor([[float(i in present) for i in range(5)]])
        prompt = inp.to_model_input(mask)[0].tolist()
        read = tokens_read(target, [True] * len(target), None)
        return float(loop_log_probs(model, prompt, read, target).sum().exp())

    expected = owen_values(value, ((0, 1), (2, 3, 4)))
    scale = max(map(abs, expected.values()))
    assert result.seq_attr.tolist() == pytest.approx(
        [expected[i] for i in range(5)], abs=1e-4 * scale
    )


# What cannot be


def test_bad_arguments_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match='give "orders" or "splits"'):
        PartitionShap(model, scheme="halves")
    inp = TextSegmentInput(
        "one two three four five six seven eight nine ten", tokenizer, baselines="delete"
    )
    many = {"inp": inp, "n_samples": 20}
    with pytest.raises(ValueError, match="`stop` and `num_trials`"):
        attribute(model, tokenizer, scheme="splits", tol=0.1, **many)
    with pytest.raises(ValueError, match="`stop` and `num_trials`"):
        attribute(model, tokenizer, scheme="splits", num_trials=2, **many)
    with pytest.raises(ValueError, match="`n_draws` has no meaning for nested orders"):
        attribute(model, tokenizer, inp=inp, n_draws=2, n_samples=60)
    with pytest.warns(UserWarning, match=r'20 evaluations are less.*26.*scheme="splits"'):
        attribute(model, tokenizer, **many)
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="`n_samples` is"):
            PartitionShap(network()).attribute(torch.ones(1, 5).double(), target=0, n_samples=wrong)
        with pytest.raises(ValueError, match="`perturbations_per_eval` is"):
            PartitionShap(network()).attribute(
                torch.ones(1, 5).double(), target=0, perturbations_per_eval=wrong
            )

    def together(x: Tensor) -> Tensor:
        return x.sum()

    with pytest.raises(ValueError, match="`perturbations_per_eval=1`"):
        PartitionShap(together).attribute(torch.ones(2, 3), perturbations_per_eval=2)
    with pytest.raises(ValueError, match="`feature_mask` of batch size 1"):
        PartitionShap(together).attribute(
            torch.ones(2, 3), feature_mask=torch.tensor([[0, 1, 2], [2, 1, 0]])
        )


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("scheme", ["orders", "splits"])
def test_few_features(n, scheme):
    inputs = torch.arange(1.0, n + 1)[None]
    found = PartitionShap(lambda x: x.prod(1), scheme=scheme).attribute(inputs, n_samples=100)
    assert found.tolist() == [[math.prod(range(1, n + 1)) / n] * n]


class OwnPartition(PartitionShap):
    """A subclass may mean something else: it runs its own code."""


def test_subclasses_run_their_own_attribute(model, tokenizer):
    inp = TextSegmentInput("Dave lives in Austin", tokenizer, baselines="delete")
    flat: Sequence[int] = [0, 1, 2, 3]
    own = GenerationAttribution(OwnPartition(model, flat), tokenizer)
    known = GenerationAttribution(PartitionShap(model, flat), tokenizer)
    assert isinstance(own.attr_method, PerturbationAttribution)
    results = [one.attribute(inp, TARGET, output_unit=None, n_samples=500) for one in (own, known)]
    torch.testing.assert_close(results[0].token_attr, results[1].token_attr, atol=1e-5, rtol=1e-4)
    assert results[0].provenance["estimator"] == "OwnPartition"


def test_hierarchy_reduces_errors_of_sentence_sums(model, tokenizer):
    """What the nesting is for: the same budget, less noise in the sums over sentences."""
    text = "Dave lives in Austin. Ann has a dog. He won. They sang songs. It rained."
    inp = TextSegmentInput(text, tokenizer, unit=("sentence", "word"), baselines="delete")
    result = attribute(model, tokenizer, inp=inp, output_unit=None, n_samples=200)
    names, sums = result.at_level("sentence")
    assert len(names) == 5
    sentences = TextSegmentInput(text, tokenizer, unit="sentence", baselines="delete")
    exact = GenerationAttribution(ShapleyValues(model), tokenizer).attribute(
        sentences, TARGET, output_unit=None
    )
    blunt = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(
        sentences, TARGET, output_unit=None
    )
    error = (sums - exact.token_attr).square().mean()
    assert error < (blunt.token_attr - exact.token_attr).square().mean()
