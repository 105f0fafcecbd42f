"""What every estimator owes to every game, and what others find where they mean the same."""

import itertools
import math
import warnings
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from captum.attr import ShapleyValues
from torch import Tensor

from captum_llm_ext.coalitions import (
    Plan,
    Scope,
    Solution,
    cosine_kernel,
    join_plans,
    plan_anchors,
    plan_exact,
    plan_leave_one_out,
    plan_only_one_in,
    plan_pairs,
    solve_exact,
    solve_kernel,
    solve_leave_one_out,
    solve_lime,
    solve_only_one_in,
    solve_permutations,
)

N = 6
Game = Callable[[Tensor], Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_order() -> Plan:
    """All walks, so that nothing is left to chance."""
    orders = list(itertools.permutations(range(N)))
    ranks = torch.tensor(orders).argsort(1)
    walks = (ranks[:, None, :] < torch.arange(N + 1)[:, None]).flatten(0, 1)
    return Plan(walks, torch.arange(len(orders)).repeat_interleave(N + 1))


def lime(plan: Plan, values: Tensor, scope: Scope) -> Solution:
    """All rows weigh the same: columns are then independent, and a dummy has no part in any."""
    kernel = partial(cosine_kernel, width=math.inf)
    return solve_lime(plan, values, scope, kernel=kernel, penalty="l2", alpha=0.01)


# Estimators with coalitions that leave nothing to chance, and whether attributions sum to the gain.
ESTIMATORS = {
    "exact": (lambda: plan_exact(N, common_draw=True), solve_exact, True),
    "kernel": (lambda: plan_pairs(N, 2**N, generator=seeded()), solve_kernel, True),
    "permutations": (every_order, solve_permutations, True),
    "leave-one-out": (lambda: plan_leave_one_out(N), solve_leave_one_out, False),
    "only one in": (lambda: plan_only_one_in(N), solve_only_one_in, False),
    "lime": (lambda: plan_exact(N), lime, False),
}


def attributions(name: str, *games: Game) -> tuple[Tensor, Tensor]:
    """Attributions ``(n_games, N)`` and what they should sum to, where they sum to anything."""
    planner, solver, _ = ESTIMATORS[name]
    plan = join_plans([plan_anchors(N), planner()])
    values = torch.stack([game(plan.masks) for game in games], 1)
    scope = Scope(torch.full((len(games),), N), torch.full((len(games),), -1))
    found = solver(plan, values, scope)
    return found.attributions, found.full_values - found.empty_values


def table(seed: int, n: int = N) -> Game:
    worth = torch.randn(2**n, generator=seeded(seed)).double()
    return lambda masks: worth[(masks.long() << torch.arange(n)).sum(1)]


@pytest.mark.parametrize("name", [name for name, (*_, sums) in ESTIMATORS.items() if sums])
def test_efficiency(name):
    found, gain = attributions(name, table(1), table(2))
    assert found.sum(1).tolist() == pytest.approx(gain.tolist(), abs=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_symmetry(name):
    """The second of two features that mean the same gets what the first gets."""
    inner = table(3, 5)

    def game(masks: Tensor) -> Tensor:
        return inner(torch.stack([masks[:, 0] | masks[:, 1], *masks[:, 2:].T], 1))

    found = attributions(name, game)[0][0]
    assert float(found[0]) == pytest.approx(float(found[1]), abs=1e-9)
    assert float(found[2:].abs().min()) > 1e-3


@pytest.mark.parametrize("name", ESTIMATORS)
def test_dummy(name):
    inner = table(4, 5)
    found = attributions(name, lambda masks: inner(masks[:, :5]))[0][0]
    assert float(found[5]) == pytest.approx(0, abs=1e-9)
    assert float(found[:5].abs().min()) > 1e-3


@pytest.mark.parametrize("name", ESTIMATORS)
def test_linearity(name):
    first, second = table(5), table(6)
    a, b, both = attributions(
        name, first, second, lambda masks: 2 * first(masks) - 3 * second(masks)
    )[0]
    assert both.tolist() == pytest.approx((2 * a - 3 * b).tolist(), abs=1e-9)


@cache
def peers():
    """Shapley values of one game by captum and by shap; captum takes N * N! evaluations."""
    shap = pytest.importorskip("shap")
    game = table(7)
    captum = ShapleyValues(lambda masks: game(masks.bool()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = shap.explainers.Exact(
            lambda masks: game(torch.from_numpy(masks).bool()).numpy(),
            torch.zeros(1, N).numpy(),
        )
        theirs = explainer(torch.ones(1, N).numpy()).values[0]
    return captum.attribute(torch.ones(1, N))[0].tolist(), theirs.tolist()


@pytest.mark.parametrize("name", ["exact", "kernel", "permutations"])
def test_shapley_values_equal_captum_and_shap(name):
    captum, shap = peers()
    ours = attributions(name, table(7))[0][0].tolist()
    assert captum == pytest.approx(ours, abs=1e-6)
    assert shap == pytest.approx(ours, abs=1e-9)
