"""Interactions: their Shapley values by enumeration, what they add, and what they tell."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from captum_llm_ext.coalitions import (
    Plan,
    Scope,
    additive_fit,
    join_plans,
    plan_anchors,
    plan_exact,
    plan_pairs,
    plan_permutations,
    redundant_pairs,
    solve_exact,
    solve_kernel,
    solve_permutations,
)
from captum_llm_ext.coalitions.interactions import Interactions, _Hyper, _unevenness, cost


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole(n: int) -> Scope:
    return Scope(torch.tensor([n]), torch.tensor([-1]))


def anchored(plan: Plan) -> Plan:
    return join_plans([plan_anchors(plan.n_features), plan])


def every_mask(n: int) -> Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=n)))


def terms(n: int, seed: int, n_terms: int, longest: int) -> tuple[object, Tensor]:
    """AND and OR terms; each shares its weight equally among its members."""
    generator = seeded(seed)
    member = torch.zeros(n_terms, n, dtype=torch.bool)
    for row in member:
        size = int(torch.randint(2, longest + 1, (), generator=generator))
        row[torch.randperm(n, generator=generator)[:size]] = True
    weight = torch.randn(n_terms, generator=generator).double()
    any_will_do = torch.rand(n_terms, generator=generator) < 0.5
    size, columns = member.sum(1), member.T.double()

    def worth(masks: Tensor) -> Tensor:
        present = masks.double() @ columns
        return torch.where(any_will_do, present > 0, present == size).double() @ weight

    return worth, columns @ (weight / size)


# The prior


@pytest.mark.parametrize("kind", ["product", "local"])
def test_covariances_equal_those_of_the_kernels_games(kind):
    """Every interaction is a game of its own, with Shapley values by enumeration."""
    n = 6
    generator = seeded(0)
    masks = torch.rand(9, n, generator=generator) < 0.5
    masks[:, 0], masks[:, 1] = True, False
    x = masks.double() - masks.double().mean(1, keepdim=True)
    model = Interactions(x, torch.ones(9).double(), torch.ones(9, dtype=torch.bool))
    relevance = torch.rand(n, generator=generator).double()
    prior = getattr(model, f"_{kind}")(relevance, torch.arange(9), 9, 9)

    plan = anchored(plan_exact(n))
    covariance, cross, variance = torch.zeros(9, 9), torch.zeros(9, n), torch.zeros(n)
    for size in (3, 5):
        for members in map(list, itertools.combinations(range(n), size)):
            if kind == "product":
                scale = relevance.tanh()[members].prod() * relevance.cosh().prod()
            else:
                scale = relevance[members].prod().sqrt()
                if size > 3 or members[-1] - members[0] > 4:
                    continue

            def game(rows: Tensor, members: list[int] = members) -> Tensor:
                return (2.0 * rows[:, members].double() - 1).prod(1)

            shapley = solve_exact(plan, game(plan.masks)[:, None], whole(n)).attributions[0]
            # Less the additive game that agrees with it at the empty and the full coalition.
            seen = game(masks) - (2 * masks.double().mean(1) - 1)
            deviation = shapley - shapley.mean()
            covariance += scale * seen[:, None] * seen
            cross += scale * seen[:, None] * deviation
            variance += scale * deviation.square()
    assert prior.observations.numpy() == pytest.approx(covariance.numpy(), rel=1e-4, abs=1e-4)
    assert prior.cross.numpy() == pytest.approx(cross.numpy(), rel=1e-4, abs=1e-4)
    # The square of 1 / k is integrated with a logarithm, which eight nodes do to a per cent.
    assert prior.variances.numpy() == pytest.approx(variance.numpy(), rel=0.02, abs=1e-4)


# What it adds


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).square().sum() / truth.square().sum())


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_interaction_correction_is_more_accurate_within_its_cost(share):
    """With a third of the effort, a part of the rows is fitted and the others correct it."""
    n, ratios = 40, []
    full = cost(8 * n - 1, 8 * n - 1, n)
    for seed in range(7):
        worth, truth = terms(n, seed, n_terms=30, longest=6)
        plan = anchored(plan_pairs(n, 16 * n - 2, generator=seeded(seed)))
        values = worth(plan.masks)[:, None]
        plain, better = (
            relative_error(solve_kernel(plan, values, whole(n), effort=e).attributions[0], truth)
            for e in (0.0, share * full + 5e8 * (share < 1))
        )
        ratios.append(better / plain)
    assert sorted(ratios)[3] < 0.75


def test_interacting_features_are_learnt_from_values():
    """Most features matter together alone: what single features do gives little of it away."""
    n, ratios = 36, []
    for seed in range(7):
        generator = seeded(seed)
        alone = torch.zeros(n).double()
        alone[24:] = torch.randn(12, generator=generator).double()
        weight = torch.randn(12, generator=generator).double()
        members = torch.arange(24)[torch.randperm(24, generator=generator)].view(12, 2).tolist()
        third = torch.randint(12, (12,), generator=generator).tolist()

        def worth(masks: Tensor, members=members, third=third, weight=weight, alone=alone):
            both = zip(members, third, strict=True)
            threes = [masks[:, [*pair, members[t][0]]] for pair, t in both]
            odd = torch.stack([three.sum(1) % 2 for three in threes], 1).double()
            return odd @ weight + masks.double() @ alone

        truth = alone.clone()
        for pair, t, w in zip(members, third, weight, strict=True):
            of = [*pair, members[t][0]]
            once = [i for i in set(of) if of.count(i) == 1]
            # An odd parity is shared equally; two that cancel leave the third one, or nothing.
            if len(once) == 3:
                truth[once] += w / 3
            elif len(once) == 1:
                truth[once] += w
        plan = anchored(plan_pairs(n, 16 * n, generator=seeded(seed)))
        values = worth(plan.masks)[:, None]
        pairs = 8 * n
        without = 1.01 * cost(pairs, pairs, n)
        few, plenty = (
            relative_error(solve_kernel(plan, values, whole(n), effort=e).attributions[0], truth)
            for e in (without, 1e12)
        )
        ratios.append(plenty / few)
    assert sorted(ratios)[3] < 0.8


def test_unfitted_rows_correct_the_estimate():
    n = 30
    worth, truth = terms(n, 3, n_terms=20, longest=4)
    plan = anchored(plan_pairs(n, 40 * n, generator=seeded(3)))
    view_rows = slice(plan.n_anchors, None)
    masks = plan.masks[view_rows][::2].double()
    x = masks - masks.mean(1, keepdim=True)
    sizes = masks.sum(1)
    weights = 1 / (sizes * (n - sizes))
    values = worth(plan.masks)
    gain = values[0] - values[1]
    level = values[view_rows] - values[1] - gain * plan.masks[view_rows].sum(1) / n
    y = (level[::2] - level[1::2]) / 2
    paired = torch.ones(len(x), dtype=torch.bool)
    errors = []
    for rows, stride in ((slice(None, None, 6), 1), (slice(None), 6)):
        w = weights[rows] / weights[rows].mean()
        model = Interactions(x[rows], w, paired[rows], stride)
        fit = model.fit(y[rows], truth)
        errors.append(relative_error(gain / n + fit.deviations, truth))
        assert float(fit.deviations.sum()) == pytest.approx(0, abs=1e-9)
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("kind", ["pairs", "permutations"])
@pytest.mark.parametrize("multiple", [8, 16])
@pytest.mark.parametrize("longest", [3, 8])
def test_intervals_have_coverage_at_small_budgets(kind, multiple, longest):
    """1.96 standard errors cover .90 to .98 of the truth, at 8n and at 16n."""
    n, covered = 40, []
    for seed in range(10):
        worth, truth = terms(n, 50 + seed, n_terms=40, longest=longest)
        if kind == "pairs":
            plan, solver = plan_pairs(n, multiple * n, generator=seeded(seed)), solve_kernel
        else:
            plan = plan_permutations(n, multiple, generator=seeded(seed))
            solver = solve_permutations
        plan = anchored(plan)
        found = solver(plan, worth(plan.masks)[:, None], whole(n))
        inside = (found.attributions[0] - truth).abs() <= 1.96 * found.standard_errors[0]
        covered.append(float(inside.double().mean()))
    # 400 correlated trials: two hundredths for chance.
    assert 0.88 < sum(covered) / len(covered) <= 1.0
    assert sum(covered) / len(covered) < 0.995


def test_errors_account_for_uneven_residuals():
    """Expected left-out errors are 1; the game keeps to a quarter of that on half of the rows."""
    surprise = torch.tensor([0.25, 0.25, 1.75, 1.75])
    everywhere, tame, wild = torch.ones(4), surprise.lt(1).float(), surprise.gt(1).float()
    found = _unevenness(torch.stack([everywhere, 3 * tame, wild], 1), surprise)
    torch.testing.assert_close(found, torch.tensor([1.0, 4.0, 1.0]).double())


# Additivity


def brute_force_share(worth: object, n: int) -> float:
    """R² of the best additive fit through both ends, weighted by the Shapley kernel."""
    masks = every_mask(n)
    sizes = masks.sum(1)
    inner = (sizes > 0) & (sizes < n)
    weights = torch.tensor(
        [1 / (math.comb(n, s) * s * (n - s)) for s in sizes[inner].tolist()], dtype=torch.float64
    )
    values, x = worth(masks), masks[inner].double()
    y = values[inner] - values[0]
    gain = values[-1] - values[0]
    # The last feature gets what the others leave: no constraint is left over.
    design, aim = x[:, :-1] - x[:, -1:], y - gain * x[:, -1]
    root = weights.sqrt()[:, None]
    others = torch.linalg.lstsq(design * root, aim[:, None] * root).solution[:, 0]
    left = aim - design @ others
    mean = (weights * y).sum() / weights.sum()
    return float(1 - (weights * left.square()).sum() / (weights * (y - mean).square()).sum())


def test_additive_fit_equals_explained_variance_of_all_coalitions():
    n = 6
    worth, _ = terms(n, 2, n_terms=5, longest=4)
    expected = brute_force_share(worth, n)
    assert abs(expected) < 0.9
    for plan in (plan_exact(n), plan_pairs(n, 2**n - 2, generator=seeded(0))):
        plan = anchored(plan)
        share = additive_fit(plan, worth(plan.masks)[:, None], whole(n))
        assert float(share) == pytest.approx(expected, abs=1e-9)


def test_additive_fit_of_a_sample_converges():
    n = 12
    shares, expected = [], []
    for seed in range(8):
        worth, _ = terms(n, seed, n_terms=8, longest=3)
        plan = anchored(plan_pairs(n, 500, generator=seeded(seed)))
        shares.append(float(additive_fit(plan, worth(plan.masks)[:, None], whole(n))))
        expected.append(brute_force_share(worth, n))
    assert shares == pytest.approx(expected, abs=0.06)


def test_additive_fit_is_not_inflated_by_few_coalitions():
    """As many unknowns as observations fit anything; left out, noise is not predicted."""
    n = 40
    plan = anchored(plan_pairs(n, 2 * n, generator=seeded(0)))
    noise = torch.randn(len(plan.masks), 20, generator=seeded(1)).double()
    scope = Scope(torch.full((20,), n), torch.full((20,), -1))
    assert float(additive_fit(plan, noise, scope).mean()) < 0.05


def test_additive_fit_of_additive_and_constant_games():
    n = 10
    plan = anchored(plan_pairs(n, 100, generator=seeded(0)))
    values = torch.stack(
        [plan.masks.double() @ torch.linspace(-1, 2, n).double(), torch.ones(102).double()], 1
    )
    scope = Scope(torch.tensor([n, n]), torch.tensor([-1, -1]))
    # Standard errors and what is left out are computed in float32.
    assert additive_fit(plan, values, scope).tolist() == pytest.approx([1, 1], abs=1e-5)


# Redundancy


def either(masks: Tensor) -> Tensor:
    """Features 3 and 7 say the same, 1 and 2 are needed together, the rest adds up."""
    rest = masks.double() @ torch.linspace(-0.5, 0.5, masks.shape[1]).double()
    said = (masks[:, 3] | masks[:, 7]).double()
    return rest + 3 * said + 2 * (masks[:, 1] & masks[:, 2])


@pytest.mark.parametrize("n", [9, 30])
def test_redundant_features_are_detected(n):
    plan = plan_exact(n) if n < 12 else plan_pairs(n, 16 * n, generator=seeded(1))
    plan = anchored(plan)
    (pairs,) = redundant_pairs(plan, either(plan.masks)[:, None], whole(n))
    assert [(pair.first, pair.second) for pair in pairs] == [(3, 7)]
    full = torch.ones(4, n, dtype=torch.bool)
    full[1, 3] = full[2, 7] = full[3, [3, 7]] = False
    values = either(full)
    tolerance = 1e-9 if n < 12 else 0.8
    assert pairs[0].alone == pytest.approx((values[0] - values[1:3]).tolist(), abs=tolerance)
    assert pairs[0].together == pytest.approx(float(values[0] - values[3]), abs=tolerance)
    assert (pairs[0].z_score == math.inf) == (n < 12)


@pytest.mark.parametrize("seed", range(4))
def test_no_redundancy_in_additive_games_and_noise(seed):
    n = 25
    plan = anchored(plan_pairs(n, 12 * n, generator=seeded(seed)))
    weights = torch.randn(n, generator=seeded(seed)).double()
    noise = torch.randn(len(plan.masks), generator=seeded(seed + 10)).double()
    additive = plan.masks.double() @ weights
    values = torch.stack([additive, additive + noise, noise], 1)
    scope = Scope(torch.full((3,), n), torch.full((3,), -1))
    assert redundant_pairs(plan, values, scope) == [[], [], []]


@pytest.mark.parametrize("n", [0, 1, 2])
def test_very_few_features_have_no_redundancy(n):
    plan = anchored(plan_permutations(n, 2, generator=seeded(0)))
    values = plan.masks.double().sum(1, keepdim=True)
    assert redundant_pairs(plan, values, whole(n)) == [[]]
    assert additive_fit(plan, values, whole(n)).tolist() == [1.0]


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_relevance_gradients_equal_autograd(local, paired):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(60, 9, generator=generator) < torch.rand(60, 1, generator=generator)
    x = masks.double() - masks.double().mean(1, keepdim=True)
    model = Interactions(x, torch.ones(60).double(), torch.full((60,), paired))
    rows = torch.arange(60)
    random = torch.randn(60, 60, generator=generator)
    gradient = (random + random.T) / 2
    relevances = [torch.rand(9, generator=generator).double() + 0.1 for _ in range(2)]
    logs = [relevance.log().requires_grad_() for relevance in relevances]
    one = torch.ones((), dtype=torch.float32)
    hyper = _Hyper(logs[0].exp(), logs[1].exp(), local, one, one)
    linear, product = model._priors(hyper, rows, 60, 0)
    ((linear.observations + 0.7 * product.observations) * gradient).sum().backward()
    alone, together = relevances
    agreement = model._agreement(together, rows, 60)
    raw = model._product(together, rows, 60, 0).observations
    near = model._local(together / together.sum(), rows, 60, 0).observations if local else None
    found = [
        model._gradient_of_linear(gradient, alone, rows),
        model._gradient_of_product(0.7 * gradient, raw, near, agreement, together, rows),
    ]
    for own, log in zip(found, logs, strict=True):
        # Float32 throughout, of sums over 3,600 pairs.
        torch.testing.assert_close(
            own, log.grad, rtol=1e-3, atol=1e-3 * float(log.grad.abs().max())
        )
