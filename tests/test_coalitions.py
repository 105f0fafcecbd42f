"""Plans and solvers against the definition of the Shapley value, closed forms and scikit-learn."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_llm_ext.coalitions import (
    Plan,
    Scope,
    Solution,
    cosine_kernel,
    join_plans,
    logit_scaled,
    plan_anchors,
    plan_exact,
    plan_leave_one_out,
    plan_lime,
    plan_only_one_in,
    plan_pairs,
    plan_permutations,
    solve_contextcite,
    solve_exact,
    solve_kernel,
    solve_leave_one_out,
    solve_lime,
    solve_only_one_in,
    solve_permutations,
)
from captum_llm_ext.coalitions.causal_scope import views
from captum_llm_ext.coalitions.few_pairs import solve_few_pairs

Game = Callable[[Tensor], Tensor]  # bool (n_coalitions, n_features) -> (n_coalitions,)
Solver = Callable[[Plan, Tensor, Scope], Solution]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table_game(n: int, seed: int) -> Game:
    """A worth for every coalition, with no structure at all."""
    worth = torch.randn(2**n, generator=seeded(seed)).double()
    return lambda masks: worth[(masks.long() << torch.arange(n)).sum(1)]


def term_game(n: int, seed: int, n_terms: int) -> tuple[Game, Tensor]:
    """AND and OR terms over 2-5 features; each shares its weight equally among its members."""
    generator = seeded(seed)
    terms: list[tuple[list[int], float, bool]] = []
    truth = torch.zeros(n).double()
    for _ in range(n_terms):
        size = int(torch.randint(2, 6, (), generator=generator))
        members = torch.randperm(n, generator=generator)[:size].tolist()
        weight = float(torch.randn((), generator=generator).exp())
        terms.append((members, weight, bool(torch.rand((), generator=generator) < 0.5)))
        truth[members] += weight / size

    def worth(masks: Tensor) -> Tensor:
        present = [(masks[:, members], weight, conj) for members, weight, conj in terms]
        return sum(w * (m.all(1) if conj else m.any(1)).double() for m, w, conj in present)

    return worth, truth


def linear_game(weights: Sequence[float]) -> Game:
    return lambda masks: 1.5 + masks.double() @ torch.tensor(weights).double()


def shapley(worth: Game, n: int) -> list[float]:
    """The definition, coalition by coalition."""

    def value(members: tuple[int, ...]) -> float:
        mask = torch.zeros(1, n, dtype=torch.bool)
        mask[0, list(members)] = True
        return float(worth(mask))

    values = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        total = 0.0
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for members in itertools.combinations(others, size):
                total += weight * (value((*members, i)) - value(members))
        values.append(total)
    return values


def whole(n: int, n_target: int = 1) -> Scope:
    return Scope(torch.full((n_target,), n), torch.full((n_target,), -1))


def plan_for(name: str, n: int, seed: int = 0) -> Plan:
    """A plan with which the named solver is exact, or for which it samples generously."""
    generator = seeded(seed)
    if name == "exact":
        return plan_exact(n, common_draw=True)
    if name == "kernel":
        return plan_pairs(n, 2**n, generator=generator)
    if name == "sampled kernel":
        return plan_pairs(n, 2**n - 2, generator=generator)
    return plan_permutations(n, 200, generator=generator)


SOLVERS: dict[str, Solver] = {
    "exact": solve_exact,
    "kernel": solve_kernel,
    "sampled kernel": solve_kernel,
    "permutations": solve_permutations,
}
ENUMERATED = ["exact", "kernel"]


def solve(name: str, n: int, *games: Game, seed: int = 0) -> Solution:
    plan = join_plans([plan_anchors(n), plan_for(name, n, seed)])
    values = torch.stack([game(plan.masks) for game in games], 1)
    return SOLVERS[name](plan, values, whole(n, len(games)))


# Plans


def test_anchors_hold_full_empty_and_each_required_column():
    plan = plan_anchors(4, required=[2, -1, 3, 2], n_empty=2)
    expected = ["1111", "0000", "0000", "0010", "0010", "0001", "0001"]
    assert ["".join(str(int(bit)) for bit in row) for row in plan.masks] == expected
    assert plan.draws.tolist() == list(range(7))


def test_exact_plan_holds_every_coalition_once_per_draw():
    plan = plan_exact(4, n_draws=3)
    rows = sorted(tuple(row) for row in plan.masks.tolist())
    assert rows == sorted(list(itertools.product([False, True], repeat=4)) * 3)
    assert plan.draws.unique().numel() == len(plan.masks)
    assert plan_exact(4, n_draws=3, common_draw=True).draws.bincount().tolist() == [16] * 3


@given(n=st.integers(0, 6), orders=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_permutations_add_one_feature_at_a_time_with_their_reverse(n, orders, seed):
    plan = plan_permutations(n, orders, generator=seeded(seed))
    walks = plan.masks.view(orders, n + 1, n).int()
    assert (walks.sum(2) == torch.arange(n + 1)).all()
    assert (walks.diff(dim=1) >= 0).all()
    draws = plan.draws.view(orders, n + 1)
    for first in range(0, orders - 1, 2):
        # The reverse order passes through the complements, from the other end.
        assert (walks[first + 1].flip(0) == 1 - walks[first]).all()
    assert draws[:, 0].tolist() == [order // 2 for order in range(orders)]
    assert (draws == draws[:, :1]).all()


def test_pairs_are_complements_of_one_draw():
    plan = plan_pairs(12, 101, generator=seeded(0))
    assert len(plan.masks) == 101
    assert (plan.masks[0:100:2] == ~plan.masks[1:100:2]).all()
    assert plan.draws.bincount().tolist() == [2] * 50 + [1]


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_pairs_enumerate_when_the_budget_allows(n):
    plan = plan_pairs(n, 2**n, generator=seeded(0))
    assert len({tuple(row) for row in plan.masks.tolist()}) == len(plan.masks) == 2**n


@pytest.mark.parametrize("visible", [3, 7, 39])
def test_sizes_of_pairs_are_uniform_on_every_prefix(visible):
    """But for the empty and the full coalition, which say nothing new."""
    masks = torch.cat([plan_pairs(40, 500, generator=seeded(seed)).masks for seed in range(40)])
    counts = masks[:, :visible].sum(1).bincount(minlength=visible + 1)[1:visible]
    # Sizes 1 and 39 of 40 come less often: 40 coalitions in 500 rows. Else, by definition of the
    # law, P(size on the prefix) is the same for all; binomial standard deviations, five of them.
    share = counts / counts.sum()
    bound = 5 * (1 / len(counts) / counts.sum()).sqrt()
    assert share.tolist() == pytest.approx([1 / len(counts)] * len(counts), abs=float(bound))


@given(n=st.integers(2, 9), size=st.integers(1, 600), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_pairs_are_distinct_and_enumerate_small_sizes_first(n, size, seed):
    plan = plan_pairs(n, size, generator=seeded(seed))
    assert len(plan.masks) == min(size, 2**n if size >= 2**n else 2**n - 2)
    assert len({tuple(row) for row in plan.masks.tolist()}) == len(plan.masks)
    even = len(plan.masks) // 2 * 2
    assert torch.equal(plan.masks[0:even:2], ~plan.masks[1:even:2])
    if size >= 2**n:
        return
    # A size is either enumerated or, give or take the rounding, as frequent as the others.
    counts = (plan.masks.sum(1) + (n - 2 * plan.masks.sum(1)).clamp_max(0)).bincount(
        minlength=n // 2 + 1
    )[1:]
    shares = counts / torch.tensor([1.0 if 2 * s == n else 2.0 for s in range(1, n // 2 + 1)])
    every = [math.comb(n, s) * (1 if 2 * s == n else 2) for s in range(1, n // 2 + 1)]
    missing = [share for share, c, e in zip(shares, counts, every, strict=True) if c < e - 1]
    assert all(share <= min(missing, default=math.inf) + 4 for share in shares.tolist())


@pytest.mark.parametrize("visible", [4, 12])
def test_weights_correct_for_enumerated_sizes(visible):
    """Weighted by how rare a size is, sizes on every prefix are as frequent as one another."""
    shares = torch.zeros(visible + 1).double()
    for seed in range(60):
        plan = join_plans([plan_anchors(12), plan_pairs(12, 800, generator=seeded(seed))])
        scope = Scope(torch.tensor([visible]), torch.tensor([-1]))
        (view,) = views(plan, torch.zeros(len(plan.masks), 1), scope)
        assert int(view.complete.sum()) >= 2 * 12  # sizes 1 and 11, at least
        rows = view.informative
        shares.index_add_(0, view.sizes[rows], view.weights[rows])
    shares = shares[1:visible] / shares.sum()
    # 60 plans of 800 rows, weights up to ten: 2 % of each share is three standard deviations.
    assert shares.tolist() == pytest.approx([1 / (visible - 1)] * (visible - 1), rel=0.03)


def test_lime_masks_are_bernoulli_half():
    plan = plan_lime(10, 20000, generator=seeded(2))
    assert plan.masks.double().mean(0).tolist() == pytest.approx([0.5] * 10, abs=0.02)
    sizes = plan.masks.sum(1).bincount(minlength=11) / 20000
    expected = [math.comb(10, size) / 2**10 for size in range(11)]
    assert sizes.tolist() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("planner", [plan_permutations, plan_pairs, plan_lime])
def test_plans_depend_on_their_generator_alone(planner):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = planner(9, 20, generator=seeded(5))
    torch.manual_seed(1)
    second = planner(9, 20, generator=seeded(5))
    torch.manual_seed(0)
    assert torch.equal(first.masks, second.masks)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.masks, planner(9, 20, generator=seeded(6)).masks)


def test_join_plans_keeps_rows_and_separates_draws():
    parts = [plan_anchors(3), plan_leave_one_out(3, common_draw=True), plan_exact(3)]
    plan = join_plans(parts)
    assert torch.equal(plan.masks, torch.cat([part.masks for part in parts]))
    assert plan.draws.tolist() == [0, 1, 2, 2, 2, *range(3, 11)]
    assert plan.n_anchors == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_exact(17), "17 features have 2\\*\\*17 coalitions.*plan_pairs"),
        (lambda: plan_pairs(5, 0, generator=seeded(0)), "`n_evaluations` is 0"),
        (lambda: plan_permutations(5, 0, generator=seeded(0)), "`n_orders` is 0"),
        (lambda: plan_anchors(3, n_empty=0), "`n_empty` is 0"),
        (lambda: plan_anchors(3, required=[3]), "`required` names columns \\[3\\]"),
        (lambda: join_plans([]), "`plans` is empty"),
        (lambda: join_plans([plan_exact(2), plan_exact(3)]), "\\[2, 3\\] features"),
        (lambda: join_plans([plan_exact(2), plan_anchors(2)]), "Anchors must come first"),
    ],
)
def test_planners_refuse_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Exact answers


@pytest.mark.parametrize("name", ENUMERATED)
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_enumeration_equals_the_shapley_definition(name, n):
    games = [table_game(n, seed) for seed in range(3)]
    solution = solve(name, n, *games)
    for game, attributions in zip(games, solution.attributions, strict=True):
        assert attributions.tolist() == pytest.approx(shapley(game, n), abs=1e-9)
    assert not solution.standard_errors.any()


def test_all_permutations_equal_the_shapley_definition():
    n, game = 4, table_game(4, 3)
    walks = [
        torch.tensor(order).argsort() < step
        for order in itertools.permutations(range(n))
        for step in range(n + 1)
    ]
    masks = torch.stack(walks)
    plan = join_plans([plan_anchors(n), Plan(masks, torch.arange(len(masks)) // (n + 1))])
    solution = solve_permutations(plan, game(plan.masks)[:, None], whole(n))
    assert solution.attributions[0].tolist() == pytest.approx(shapley(game, n), abs=1e-9)


N_PROMPT, N_OUTPUT = 5, 4


def generation(required: Sequence[int] = (-1, -1, -1, -1)) -> tuple[Scope, list[Game]]:
    """A game per generated token, over the prompt and the tokens before it."""
    visible = [
        N_PROMPT + step if column < 0 else min(column, N_PROMPT + step)
        for step, column in enumerate(required)
    ]
    games = [table_game(n, 10 + n) for n in visible]
    return Scope(torch.tensor(visible), torch.tensor(required)), games


def play(plan: Plan, scope: Scope, games: Sequence[Game]) -> Tensor:
    values = torch.empty(len(plan.masks), len(games)).double()
    for target, (n, column) in enumerate(
        zip(scope.n_visible.tolist(), scope.required.tolist(), strict=True)
    ):
        values[:, target] = games[target](plan.masks[:, :n])
        if column >= 0:
            values[~plan.masks[:, column], target] = torch.nan
    return values


@pytest.mark.parametrize("name", ENUMERATED)
@pytest.mark.parametrize("required", [(-1, -1, -1, -1), (-1, 5, -1, 7)])
def test_solving_all_scopes_equals_solving_each(name, required):
    n = N_PROMPT + N_OUTPUT
    scope, games = generation(required)
    plan = join_plans([plan_anchors(n, required=required), plan_for(name, n)])
    solution = SOLVERS[name](plan, play(plan, scope, games), scope)
    for target, visible in enumerate(scope.n_visible.tolist()):
        expected = shapley(games[target], visible) + [0.0] * (n - visible)
        assert solution.attributions[target].tolist() == pytest.approx(expected, abs=1e-9)
        assert not solution.attributions[target, visible:].any()


def test_permutations_restrict_to_permutations_of_each_scope():
    n = N_PROMPT + N_OUTPUT
    scope, games = generation()
    plan = join_plans([plan_anchors(n), plan_permutations(n, 7, generator=seeded(4))])
    solution = solve_permutations(plan, play(plan, scope, games), scope)
    orders = plan.masks[plan.n_anchors :].view(7, n + 1, n).sum(1).argsort(1, descending=True)
    for target, visible in enumerate(scope.n_visible.tolist()):
        expected = torch.zeros(visible).double()
        for order in orders.tolist():
            mask = torch.zeros(1, visible, dtype=torch.bool)
            for feature in (column for column in order if column < visible):
                before = games[target](mask).item()
                mask[0, feature] = True
                expected[feature] += (games[target](mask).item() - before) / 7
        found = solution.attributions[target, :visible]
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-9)


@pytest.mark.parametrize("column", [-1, 6])
def test_leave_one_out_equals_its_definition(column):
    n = N_PROMPT + N_OUTPUT
    scope, games = generation((-1, -1, -1, column))
    plan = join_plans([plan_anchors(n, required=[column]), plan_leave_one_out(n, common_draw=True)])
    solution = solve_leave_one_out(plan, play(plan, scope, games), scope)
    for target, visible in enumerate(scope.n_visible.tolist()):
        full = torch.ones(1, visible, dtype=torch.bool)
        for feature in range(visible):
            without = full.clone()
            without[0, feature] = False
            expected = float(games[target](full) - games[target](without))
            assert float(solution.attributions[target, feature]) == pytest.approx(expected)
    assert not solution.standard_errors.any()


@pytest.mark.parametrize("column", [-1, 6])
def test_inclusion_equals_its_definition(column):
    n = N_PROMPT + N_OUTPUT
    scope, games = generation((-1, -1, -1, column))
    alone = plan_only_one_in(n, required=[column], common_draw=True)
    plan = join_plans([plan_anchors(n, required=[column]), alone])
    solution = solve_only_one_in(plan, play(plan, scope, games), scope)
    for target, visible in enumerate(scope.n_visible.tolist()):
        empty = torch.zeros(1, visible, dtype=torch.bool)
        for feature in range(visible):
            only = empty.clone()
            only[0, feature] = True
            expected = float(games[target](only) - games[target](empty))
            assert float(solution.attributions[target, feature]) == pytest.approx(expected)
        assert not solution.attributions[target, visible:].any()
    assert not solution.standard_errors.any()


# Axioms


@pytest.mark.parametrize("name", SOLVERS)
@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=10)
def test_attributions_sum_to_full_minus_empty(name, seed):
    solution = solve(name, 6, table_game(6, seed), seed=seed)
    gap = solution.attributions.sum(1) - (solution.full_values - solution.empty_values)
    assert float(gap.abs().max()) < 1e-9


@pytest.mark.parametrize("name", SOLVERS)
def test_additive_games_are_recovered_with_zero_dummies(name):
    weights = [2.0, -1.0, 0.0, 0.5, 0.0, 0.5]
    solution = solve(name, 6, linear_game(weights))
    assert solution.attributions[0].tolist() == pytest.approx(weights, abs=1e-9)
    assert float(solution.empty_values) == pytest.approx(1.5)
    # Standard errors of the regression are computed in float32.
    assert float(solution.standard_errors.max()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ENUMERATED)
def test_exact_solvers_satisfy_dummy_and_symmetry(name):
    inner = table_game(3, 8)

    def game(masks: Tensor) -> Tensor:
        either = torch.stack([masks[:, 0] | masks[:, 1], masks[:, 2], masks[:, 3]], 1)
        return inner(either)

    attributions = solve(name, 5, game).attributions[0].tolist()
    assert attributions[0] == pytest.approx(attributions[1], abs=1e-9)
    assert attributions[4] == pytest.approx(0, abs=1e-9)
    assert abs(attributions[2]) > 0.01


def test_dummy_is_zero_in_every_permutation():
    solution = solve("permutations", 6, lambda masks: table_game(5, 1)(masks[:, :5]))
    assert float(solution.attributions[0, 5]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["sampled kernel", "permutations"])
def test_estimates_are_nearly_symmetric(name):
    """Swapping two equal features leaves the game as it is; estimates differ by chance alone."""
    n, generator = 14, seeded(2)
    inner = table_game(4, 8)

    def game(masks: Tensor) -> Tensor:
        either = torch.stack([masks[:, 0] | masks[:, 1], *masks[:, 2:5].T], 1)
        return inner(either) + masks[:, 5:].double().sum(1)

    if name == "permutations":
        plan, solver = plan_permutations(n, 60, generator=generator), solve_permutations
    else:
        plan, solver = plan_pairs(n, 60 * n, generator=generator), solve_kernel
    plan = join_plans([plan_anchors(n), plan])
    solution = solver(plan, game(plan.masks)[:, None], whole(n))
    # Rounding took the errors of some, where the fit to a smooth game is nearly perfect.
    assert bool((solution.standard_errors > 0).all()) or name == "permutations"
    difference = float(solution.attributions[0, 0] - solution.attributions[0, 1])
    assert abs(difference) < 4 * float(solution.standard_errors[0, :2].norm()) + 1e-9
    # The others are dummies but for what they add.
    assert solution.attributions[0, 5:].tolist() == pytest.approx([1.0] * 9, abs=0.05)


@pytest.mark.parametrize("name", [*ENUMERATED, "permutations"])
def test_attributions_are_linear_in_the_game(name):
    first, second = table_game(5, 1), table_game(5, 2)
    solution = solve(name, 5, first, second, lambda masks: 2 * first(masks) - second(masks))
    a, b, both = solution.attributions
    assert both.tolist() == pytest.approx((2 * a - b).tolist(), abs=1e-9)


# Estimates


@pytest.mark.parametrize("required", [-1, 15])
@pytest.mark.parametrize("visible", [4, 6])
def test_weights_reweight_sampling_to_the_shapley_kernel(visible, required):
    """Many rows and an additive fit: only the right weights lead to the exact values."""
    game = table_game(visible, 15)
    scope = Scope(torch.tensor([visible]), torch.tensor([required]))
    sampled = plan_pairs(16, 60000, generator=seeded(0))
    plan = join_plans([plan_anchors(16, required=[required], n_empty=2), sampled])
    values = game(plan.masks[:, :visible])[:, None]
    # Texts that vary a little: every coalition is there, but not its mean.
    values[1::2] += 1e-3
    if required >= 0:
        values[~plan.masks[:, required]] = torch.nan
    solution = solve_kernel(plan, values, scope)
    exact = torch.tensor(shapley(game, visible))
    error = solution.attributions[0, :visible] - exact
    assert (error.abs() < 4 * solution.standard_errors[0, :visible]).all()
    # Nine tenths of all coalitions were sampled: nothing but the weights could be far off.
    assert float(error.abs().max()) < 0.01


@pytest.mark.parametrize("required", [-1, 11])
@pytest.mark.parametrize("kind", ["pairs", "permutations"])
def test_estimates_with_random_draws_are_unbiased(kind, required):
    """Values depend on the draw; the mean over seeds must approach the mean game's."""
    n, visible, n_seeds = 12, 5, 40
    game = table_game(visible, 5)
    scope = Scope(torch.tensor([visible]), torch.tensor([required]))
    found = torch.zeros(n_seeds, visible).double()
    for seed in range(n_seeds):
        generator = seeded(seed)
        if kind == "pairs":
            sampled = plan_pairs(n, 1000, generator=generator)
        else:
            sampled = plan_permutations(n, 76, generator=generator)
        plan = join_plans([plan_anchors(n, required=[required], n_empty=8), sampled])
        absent = ~plan.masks[:, :visible]
        texts = torch.randn(int(plan.draws.max()) + 1, visible, generator=generator).double()
        noise = 0.3 * (texts[plan.draws] * absent).sum(1)
        values = (game(plan.masks[:, :visible]) + noise)[:, None]
        if required >= 0:
            values[~plan.masks[:, required]] = torch.nan
        solver = solve_kernel if kind == "pairs" else solve_permutations
        found[seed] = solver(plan, values, scope).attributions[0, :visible]
    error = found.mean(0) - torch.tensor(shapley(game, visible))
    # Four standard deviations of a mean over seeds, and room for the shrinkage of the ridge.
    bound = 4 * found.std(0) / math.sqrt(n_seeds) + 0.06
    assert (error.abs() < bound).all(), (error, bound)
    assert float(found.std(0).max()) < 1.5


@pytest.mark.parametrize("kind", ["pairs", "permutations"])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_confidence_intervals_have_nominal_coverage(kind, noise):
    n, covered = 30, []
    for seed in range(12):
        game, truth = term_game(n, seed, n_terms=30)
        generator = seeded(seed)
        if kind == "pairs":
            sampled, solver = plan_pairs(n, 16 * n, generator=generator), solve_kernel
        else:
            sampled, solver = plan_permutations(n, 16, generator=generator), solve_permutations
        plan = join_plans([plan_anchors(n), sampled])
        values = game(plan.masks)
        values[2:] += noise * torch.randn(len(values) - 2, generator=generator).double()
        solution = solver(plan, values[:, None], whole(n))
        misses = (solution.attributions[0] - truth).abs() > 1.96 * solution.standard_errors[0]
        covered.append(1 - float(misses.double().mean()))
    assert 0.88 < sum(covered) / len(covered) < 0.99


@pytest.mark.parametrize(("multiple", "bound"), [(8, 0.12), (16, 0.06)])
def test_kernel_estimator_reaches_documented_accuracy(multiple, bound):
    """Bounds: what is asked of n = 50 in the design, with a fifth of room."""
    errors = []
    for seed in range(9):
        game, truth = term_game(50, 100 + seed, n_terms=50)
        plan = join_plans([plan_anchors(50), plan_pairs(50, 50 * multiple, generator=seeded(seed))])
        found = solve_kernel(plan, game(plan.masks)[:, None], whole(50)).attributions[0]
        errors.append(float((found - truth).square().sum() / truth.square().sum()))
    assert sorted(errors)[4] < bound


def test_targets_are_solved_independently():
    n = N_PROMPT + N_OUTPUT
    scope, games = generation((-1, 5, -1, -1))
    plan = join_plans([plan_anchors(n, required=[5]), plan_pairs(n, 90, generator=seeded(3))])
    values = play(plan, scope, games)
    together = solve_kernel(plan, values, scope).attributions
    for target in range(len(games)):
        alone = Scope(scope.n_visible[[target]], scope.required[[target]])
        found = solve_kernel(plan, values[:, [target]], alone).attributions
        assert found[0].tolist() == pytest.approx(together[target].tolist(), abs=1e-9)


# Standard errors


def test_exact_standard_errors_equal_the_spread_over_draws():
    n, n_draws = 3, 6
    plan = join_plans([plan_anchors(n), plan_exact(n, n_draws=n_draws, common_draw=True)])
    texts = torch.randn(n_draws + 2, n, generator=seeded(0)).double()
    # An absent feature contributes its text: attribution i is 1 - text_i, draw by draw.
    present = plan.masks.double()
    values = (present + (1 - present) * texts[plan.draws]).sum(1, keepdim=True)
    # The anchored empty row has a draw of its own; give it the mean, so that nothing is added.
    values[1] = texts[2:].sum(1).mean()
    solution = solve_exact(plan, values, whole(n))
    own = 1 - texts[2:]
    assert solution.attributions[0].tolist() == pytest.approx(own.mean(0).tolist(), abs=1e-9)
    # The empty coalition has one draw more than the others, hence not quite the same.
    expected = (own.std(0) / math.sqrt(n_draws)).tolist()
    assert solution.standard_errors[0].tolist() == pytest.approx(expected, rel=0.2)


def test_leave_one_out_standard_errors_equal_those_of_a_mean():
    plan = join_plans([plan_anchors(2), plan_leave_one_out(2, n_draws=5)])
    noise = torch.randn(5, 2, generator=seeded(1)).double()
    values = torch.cat([torch.tensor([3.0, 0.0]).double(), noise.flatten()])[:, None]
    solution = solve_leave_one_out(plan, values, whole(2))
    assert solution.attributions[0].tolist() == pytest.approx((3 - noise.mean(0)).tolist())
    expected = (noise.std(0) / math.sqrt(5)).tolist()
    assert solution.standard_errors[0].tolist() == pytest.approx(expected)


def test_permutation_standard_errors_equal_those_of_pair_means():
    n, n_pairs = 4, 5
    game = table_game(n, 2)
    plan = join_plans([plan_anchors(n), plan_permutations(n, 2 * n_pairs, generator=seeded(0))])
    values = game(plan.masks)[:, None]
    solution = solve_permutations(plan, values, whole(n))
    means = []
    for pair in range(n_pairs):
        rows = torch.cat([torch.arange(2), 2 + 10 * pair + torch.arange(10)])
        part = Plan(plan.masks[rows], plan.draws[rows], n_anchors=2)
        means.append(solve_permutations(part, values[rows], whole(n)).attributions[0])
    spread = torch.stack(means).std(0) / math.sqrt(n_pairs)
    # The mean over features counts as a fifth degree of freedom beside the four of five pairs;
    # 2.5706 is Student's t for five, 97.5 %, and the series is good to 0.5 %.
    leaning = ((4 * spread.square() + spread.square().mean()) / 5).sqrt()
    expected = (leaning * 2.5706 / 1.96).tolist()
    assert solution.standard_errors[0].tolist() == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    ("plan", "solver"),
    [
        (plan_exact(3), solve_exact),
        (plan_leave_one_out(3), solve_leave_one_out),
        (plan_permutations(3, 2, generator=seeded(0)), solve_permutations),
    ],
)
def test_single_draw_has_no_standard_error(plan, solver):
    joined = join_plans([plan_anchors(3), plan])
    solution = solver(joined, table_game(3, 0)(joined.masks)[:, None], whole(3))
    assert solution.standard_errors.isnan().all()
    assert solution.attributions.isfinite().all()


def test_empty_values_average_over_draws():
    plan = Plan(torch.tensor([[1], [0], [0], [0]]).bool(), torch.tensor([0, 1, 2, 2]), 2)
    values = torch.tensor([[5.0], [1.0], [2.0], [2.0]]).double()
    solution = solve_exact(plan, values, whole(1))
    assert float(solution.empty_values) == pytest.approx(1.5)
    assert float(solution.attributions) == pytest.approx(3.5)


# Lime


def lime_case(seed: int = 0) -> tuple[Plan, Tensor, Scope]:
    scope = Scope(torch.tensor([9, 6, 9]), torch.tensor([-1, 8, -1]))
    plan = join_plans([plan_anchors(9, required=[8]), plan_lime(9, 150, generator=seeded(seed))])
    values = play(plan, scope, [table_game(n, seed + n) for n in (9, 6, 9)])
    values[:, 2] += 3 * plan.masks[:, 1].double()
    return plan, values, scope


def sklearn_model(penalty: str | None, alpha: float):
    linear = pytest.importorskip("sklearn.linear_model")
    return {
        "l1": partial(linear.Lasso, alpha=alpha, tol=1e-12, max_iter=100000),
        "l2": partial(linear.Ridge, alpha=alpha),
        None: linear.LinearRegression,
    }[penalty]()


@pytest.mark.parametrize("penalty", ["l1", "l2", None])
@pytest.mark.parametrize("alpha", [0.01, 0.1])
def test_lime_equals_scikit_learn(penalty, alpha):
    plan, values, scope = lime_case()
    solution = solve_lime(plan, values, scope, alpha=alpha, penalty=penalty)
    for target in range(3):
        visible = int(scope.n_visible[target])
        rows = torch.arange(len(values)) >= plan.n_anchors
        rows &= ~values[:, target].isnan()
        masks = plan.masks[rows, :visible]
        model = sklearn_model(penalty, alpha)
        weights = [
            # Captum's default similarity, written out.
            math.exp(-((1 - math.sqrt(sum(row) / visible)) ** 2) / 2)
            for row in masks.tolist()
        ]
        model.fit(masks.numpy(), values[rows, target].numpy(), sample_weight=weights)
        found = solution.attributions[target]
        assert found[:visible].tolist() == pytest.approx(model.coef_.tolist(), abs=1e-7)
        assert not found[visible:].any()
    assert bool(solution.standard_errors[0].isnan().all()) == (penalty == "l1")


def test_lime_kernel_equals_captum():
    lime = pytest.importorskip("captum.attr._core.lime")
    masks = torch.rand(20, 7, generator=seeded(0)) < 0.5
    masks[0] = False
    similarity = lime.get_exp_kernel_similarity_function("cosine", 0.7)
    ones = torch.ones(1, 7)
    expected = [similarity(ones, mask[None].float(), None) for mask in masks]
    # Captum works in float32.
    assert cosine_kernel(masks, width=0.7).tolist() == pytest.approx(expected, abs=1e-6)


def test_least_squares_intervals_cover_additive_games_with_noise():
    weights = torch.linspace(-1, 1, 10).double()
    covered = torch.zeros(10)
    for seed in range(60):
        generator = seeded(seed)
        plan = join_plans([plan_anchors(10), plan_lime(10, 80, generator=generator)])
        noise = torch.randn(len(plan.masks), generator=generator).double()
        values = (plan.masks.double() @ weights + noise)[:, None]
        solution = solve_lime(plan, values, whole(10), penalty=None)
        error = (solution.attributions[0] - weights).abs()
        covered += error <= 1.96 * solution.standard_errors[0]
    # 600 correlated trials: three standard deviations are 0.03, and the jackknife is cautious.
    assert 0.92 < float(covered.mean()) / 60 < 0.99


# ContextCite


def test_log_odds_follow_from_probabilities():
    p = torch.tensor([1e-30, 1e-3, 0.3, 0.5, 0.999]).double()
    assert logit_scaled(p.log()).tolist() == pytest.approx(torch.logit(p).tolist(), rel=1e-9)
    # exp(-800) is no float64, its log-odds are; and certainty has finite ones.
    assert logit_scaled(torch.tensor([-800.0])).tolist() == pytest.approx([-800.0])
    assert logit_scaled(torch.zeros(1)).tolist() == pytest.approx([math.log(1e7)], rel=1e-6)
    assert logit_scaled(torch.tensor([torch.nan])).isnan().all()
    with pytest.raises(ValueError, match="more than log 1"):
        logit_scaled(torch.tensor([0.5]))


def statement_log_probs(n: int, seed: int) -> tuple[Plan, Tensor]:
    plan = join_plans([plan_anchors(n), plan_lime(n, 64, generator=seeded(seed))])
    weights = torch.randn(n, 3, generator=seeded(seed + 1)).double()
    weights[torch.rand(n, generator=seeded(seed + 2)) < 0.6] = 0
    return plan, torch.nn.functional.logsigmoid(plan.masks.double() @ weights - 1)


@pytest.mark.parametrize("alpha", [0.01, 0.1])
@pytest.mark.parametrize("span", [(0, 3), (1, 2)])
def test_contextcite_equals_the_reference_implementation(alpha, span):
    """A standardised lasso of the log-odds per token, with scikit-learn."""
    pipeline = pytest.importorskip("sklearn.pipeline")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    plan, log_probs = statement_log_probs(12, 0)
    solution = solve_contextcite(plan, log_probs, whole(12, 3), spans=[span], alpha=alpha)
    rows = slice(plan.n_anchors, None)
    joint = log_probs[rows, slice(*span)].sum(1)
    length = span[1] - span[0]
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), sklearn_model("l1", alpha))
    model.fit(plan.masks[rows].double().numpy(), (torch.logit(joint.exp()) / length).numpy())
    expected = length * model[-1].coef_ / model[0].scale_
    assert solution.attributions[0].tolist() == pytest.approx(expected.tolist(), abs=1e-7)
    assert 0 < int((solution.attributions[0] == 0).sum()) < 12
    full = torch.logit(log_probs[0, slice(*span)].sum().exp())
    assert float(solution.full_values) == pytest.approx(float(full))


def test_contextcite_refuses_bad_arguments():
    plan, log_probs = statement_log_probs(5, 0)
    with pytest.raises(ValueError, match="span \\(2, 2\\) holds none"):
        solve_contextcite(plan, log_probs, whole(5, 3), spans=[(2, 2)])
    mixed = Scope(torch.tensor([3, 4, 5]), torch.tensor([-1, -1, -1]))
    with pytest.raises(ValueError, match=r"see different features.*output_unit"):
        solve_contextcite(plan, log_probs, mixed)
    assert solve_contextcite(
        plan, log_probs, mixed, spans=[(t, t + 1) for t in range(3)]
    ).attributions.shape == (3, 5)


# Edges

EVERY: dict[str, tuple[Callable[[int], Plan], Solver]] = {
    "leave one out": (plan_leave_one_out, solve_leave_one_out),
    "only one in": (plan_only_one_in, solve_only_one_in),
    "exact": (plan_exact, solve_exact),
    "one order": (lambda n: plan_permutations(n, 1, generator=seeded(0)), solve_permutations),
    "three orders": (lambda n: plan_permutations(n, 3, generator=seeded(0)), solve_permutations),
    "one row": (lambda n: plan_pairs(n, 1, generator=seeded(0)), solve_kernel),
    "few pairs": (lambda n: plan_pairs(n, 6, generator=seeded(0)), solve_kernel),
    "all pairs": (lambda n: plan_pairs(n, 2**n, generator=seeded(0)), solve_kernel),
    "lasso": (lambda n: plan_lime(n, 20, generator=seeded(0)), solve_lime),
    "ridge": (
        lambda n: plan_lime(n, 2, generator=seeded(0)),
        partial(solve_lime, penalty="l2", alpha=1.0),
    ),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("visible", [0, 1, 2, 7])
def test_few_features_and_small_budgets(name, visible):
    planner, solver = EVERY[name]
    n = 7
    plan = join_plans([plan_anchors(n), planner(n)])
    game = table_game(visible, 4)
    scope = Scope(torch.tensor([visible, visible]), torch.tensor([-1, -1]))
    constant = torch.full((len(plan.masks),), 0.7).double()
    values = torch.stack([game(plan.masks[:, :visible]), constant], 1)
    solution = solver(plan, values, scope)
    assert solution.attributions.isfinite().all()
    assert not solution.attributions[:, visible:].any()
    assert solution.attributions[1].tolist() == pytest.approx([0] * n, abs=1e-9)
    gain = float(solution.full_values[0] - solution.empty_values[0])
    if visible == 0:
        assert gain == 0
    elif solver in (solve_exact, solve_kernel, solve_permutations):
        assert float(solution.attributions[0].sum()) == pytest.approx(gain, abs=1e-9)
    if visible == 1 and solver in (solve_exact, solve_kernel, solve_permutations):
        assert float(solution.attributions[0, 0]) == pytest.approx(gain, abs=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_constant_game_has_zero_attributions(name):
    planner, solver = EVERY[name]
    plan = join_plans([plan_anchors(7), planner(7)])
    solution = solver(plan, torch.full((len(plan.masks), 1), -2.5).double(), whole(7))
    assert solution.attributions.tolist() == [pytest.approx([0.0] * 7, abs=1e-12)]
    assert solution.full_values.tolist() == solution.empty_values.tolist() == [-2.5]


@pytest.mark.parametrize("solver", [solve_exact, solve_kernel, solve_permutations, solve_lime])
def test_zero_features(solver):
    plan = join_plans([plan_anchors(0), plan_permutations(0, 2, generator=seeded(0))])
    solution = solver(plan, torch.full((len(plan.masks), 2), 0.5).double(), whole(0, 2))
    assert solution.attributions.shape == (2, 0)
    assert solution.full_values.tolist() == solution.empty_values.tolist() == [0.5, 0.5]


def test_repeated_coalitions_keep_exact_solutions():
    game = table_game(4, 6)
    once = [plan_anchors(4), plan_pairs(4, 16, generator=seeded(0))]
    plan = join_plans([*once, once[1], once[1]])
    solution = solve_kernel(plan, game(plan.masks)[:, None], whole(4))
    assert solution.attributions[0].tolist() == pytest.approx(shapley(game, 4), abs=1e-9)
    assert not solution.standard_errors.any()


def test_joined_rounds_equal_one_sample():
    """Rounds joined one by one are worth what they would have been at once."""
    game, truth = term_game(20, 7, n_terms=15)
    generator = seeded(7)
    rounds = [plan_pairs(20, 100, generator=generator) for _ in range(4)]
    errors = []
    for k in (1, 4):
        plan = join_plans([plan_anchors(20), *rounds[:k]])
        solution = solve_kernel(plan, game(plan.masks)[:, None], whole(20))
        errors.append(float((solution.attributions[0] - truth).square().sum()))
    assert errors[1] < errors[0] / 2


def good() -> tuple[Plan, Tensor, Scope]:
    plan = join_plans([plan_anchors(3), plan_pairs(3, 4, generator=seeded(0))])
    return plan, table_game(3, 0)(plan.masks)[:, None], whole(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, v, s: (p, v[1:], s), "`values` has shape \\(5, 1\\)"),
        (lambda p, v, s: (p, v, whole(4)), "`n_visible` must lie in 0..3"),
        (lambda p, v, s: (p, v, Scope(s.n_visible, torch.tensor([1]))), "`required` be -1"),
        (lambda p, v, s: (p, v * torch.nan, s), "holds NaN or infinity for targets \\[0\\]"),
        (
            lambda p, v, s: (Plan(p.masks[:1], p.draws[:1]), v[:1], s),
            "no full or no empty row.*plan_anchors",
        ),
    ],
)
def test_solvers_refuse_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        solve_kernel(*change(*good()))


@pytest.mark.parametrize("solver", [solve_exact, solve_leave_one_out, solve_permutations])
def test_solvers_refuse_unsuitable_plans(solver):
    with pytest.raises(ValueError, match=r"plan_|planner"):
        solver(*good())


def test_lime_refuses_bad_arguments():
    with pytest.raises(ValueError, match="`alpha` is -1"):
        solve_lime(*good(), alpha=-1)
    with pytest.raises(ValueError, match="`penalty` is 'l0'"):
        solve_lime(*good(), penalty="l0")


def noise_game(n: int, seed: int, additive: float) -> tuple[Game, Tensor]:
    """Noise of its own for every coalition, and an additive part of this size."""
    weights = additive * torch.randn(n, generator=seeded(seed)).double()
    noise = table_game(n, seed + 1)
    plan = join_plans([plan_anchors(n), plan_exact(n, n_draws=1, common_draw=True)])
    truth = solve_exact(plan, noise(plan.masks)[:, None], Scope.of_all(1, n)).attributions[0]
    return lambda masks: noise(masks) + masks.double() @ weights, truth + weights


@pytest.mark.parametrize("additive", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n_pairs", [4, 8])
def test_few_pairs_of_noise_say_little_and_not_much_that_is_wrong(additive, n_pairs):
    """Against all coalitions: errors are not far above the attributions themselves, and hold."""
    n, missed, size, inside = 10, 0.0, 0.0, []
    for seed in range(12):
        game, truth = noise_game(n, 3 * seed, additive)
        plan = join_plans(
            [plan_anchors(n), plan_pairs(n, 2 * n_pairs, generator=seeded(500 + seed))]
        )
        found = solve_few_pairs(plan, game(plan.masks)[:, None], Scope.of_all(1, n))
        off = found.attributions[0] - truth
        missed += float(off.square().sum())
        # What is known beforehand: full minus empty value, in equal parts.
        size += float((truth - truth.mean()).square().sum())
        inside.append(off.abs() <= 1.96 * found.standard_errors[0])
        assert float(found.efficiency_gap.abs().max()) < 1e-9
    # Unbiased estimates miss by 9 to 23 times this where there is mostly noise.
    assert missed < 3 * size
    assert float(torch.stack(inside).double().mean()) > 0.85  # of 120 dependent ones


@pytest.mark.parametrize("solver", [solve_kernel, solve_few_pairs])
@pytest.mark.parametrize("required", [-1, 9])
def test_columns_without_effect_are_exactly_zero(solver, required):
    """What is solved is the game of the other columns, with its own errors."""
    n, unchanging = 10, (0, 3, 4, 8)
    changing = [c for c in range(n) if c not in unchanging]
    generator = torch.Generator().manual_seed(3)
    columns = [required] if required >= 0 else []
    plan = join_plans(
        [plan_anchors(n, required=columns, n_empty=8), plan_pairs(n, 400, generator=generator)]
    )
    noise = torch.randn(int(plan.draws.max()) + 1, generator=generator).double()[plan.draws]
    weights = torch.zeros(n, 2).double()
    weights[changing, 0] = torch.arange(1.0, 7.0).double()
    weights[:6, 1] = weights[:6, 0]  # what the second target sees
    pair = 3 * (plan.masks[:, 1] & plan.masks[:, 5]) + noise * ~plan.masks[:, 2]
    values = plan.masks.double() @ weights + pair[:, None]
    visible = 9 if required >= 0 else 10
    scope = Scope(torch.tensor([visible, 6]), torch.tensor([required, -1]))
    if required >= 0:
        values[~plan.masks[:, required], 0] = torch.nan
    plain = solver(plan, values, scope)
    found = solver(plan, values, replace(scope, unchanging=unchanging))
    assert (plain.attributions[:, list(unchanging)][:, :2] != 0).all()
    assert (found.attributions[:, list(unchanging)] == 0).all()
    assert (found.standard_errors[:, list(unchanging)] == 0).all()
    assert found.efficiency_gap.abs().max() < 1e-9
    fewer = Scope(
        torch.tensor([sum(c < v for c in changing) for v in (visible, 6)]),
        torch.tensor([changing.index(required) if required >= 0 else -1, -1]),
    )
    alone = solver(replace(plan, masks=plan.masks[:, changing]), values, fewer)
    torch.testing.assert_close(found.attributions[:, changing], alone.attributions)
    torch.testing.assert_close(found.standard_errors[:, changing], alone.standard_errors)
    truth = weights[:, 1] + 1.5 * torch.tensor([c in (1, 5) for c in range(n)])
    far = (found.attributions[1] - truth).abs()
    assert (far <= 4 * found.standard_errors[1] + 1e-6).all()
