"""How far from the true Shapley values is each estimator, and do its intervals cover them?

Games with closed-form values (AND and OR terms) and four other kinds, whose values come from a
thousand antithetic orders. Captum's own estimators run in the same process on
the same games. The error is the squared distance from the truth relative to its squared length.

    python benchmarks/estimators.py [--games 12] [--seed 0] [--out FILE]
"""

import argparse
import json
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from captum.attr import KernelShap, ShapleyValueSampling
from environment import environment
from torch import Generator, Tensor

from captum_llm_ext.coalitions import (
    Plan,
    Scope,
    join_plans,
    plan_anchors,
    plan_pairs,
    plan_permutations,
    solve_kernel,
    solve_permutations,
)

RESULTS = Path(__file__).parent / "results"
SIZES = ((50, 8), (50, 16), (200, 8), (200, 16))
REFERENCE_ORDERS = 1000

Worth = Callable[[Tensor], Tensor]  # bool (n_coalitions, n_features) -> (n_coalitions,)


@dataclass(frozen=True)
class Game:
    """A worth of coalitions and its Shapley values."""

    worth: Worth
    truth: Tensor


@dataclass(frozen=True)
class Answer:
    """Attributions, standard errors where the estimator has them, and seconds to solve."""

    attributions: Tensor
    errors: Tensor | None = None
    seconds: float | None = None


def terms(n: int, generator: Generator, skew: float = 2.0) -> Game:
    """As many AND and OR terms as features, of 2-8 neighbours or scattered, with heavy tails.

    A term of k features is as frequent as ``k ** -skew``.
    """
    member = torch.zeros(n, n, dtype=torch.bool)
    frequency = torch.arange(2.0, 9.0).pow(-skew)
    for row in member:
        size = 2 + int(torch.multinomial(frequency, 1, generator=generator))
        start = int(torch.randint(n - size + 1, (), generator=generator))
        scattered = torch.randperm(n, generator=generator)[:size]
        near = torch.rand((), generator=generator) < 0.5
        row[torch.arange(start, start + size) if near else scattered] = True
    normal = torch.randn(n, 4, generator=generator).double()
    weight = normal[:, 0] / normal[:, 1:].square().mean(1).sqrt()  # Student's t, 3 degrees
    any_will_do = torch.rand(n, generator=generator) < 0.5
    size, columns = member.sum(1), member.T.double()

    def worth(masks: Tensor) -> Tensor:
        present = masks.double() @ columns
        return torch.where(any_will_do, present > 0, present == size).double() @ weight

    return Game(worth, columns @ (weight / size))


def long_terms(n: int, generator: Generator) -> Game:
    """All sizes equally frequent: harder than what estimators are usually shown."""
    return terms(n, generator, skew=0.0)


def trees(n: int, generator: Generator) -> Game:
    """Thirty oblivious trees of depth 4."""
    features = torch.randint(n, (30, 4), generator=generator)
    leaves = torch.randn(30, 16, generator=generator).double()
    leaves *= torch.randn(30, 1, generator=generator).double().exp()

    def worth(masks: Tensor) -> Tensor:
        leaf = (masks[:, features].long() << torch.arange(4)).sum(2)
        return leaves[torch.arange(30), leaf].sum(1)

    return _measured(worth, n, generator)


def network(n: int, generator: Generator) -> Game:
    """A sparse hidden layer of tanh units; features of log-normal size."""
    into = torch.randn(n, 40, generator=generator).double()
    into *= torch.rand(n, 40, generator=generator) < 0.15
    into *= torch.randn(n, 1, generator=generator).double().exp()
    bias = torch.randn(40, generator=generator).double() - into.sum(0) / 2
    out = torch.randn(40, generator=generator).double()
    return _measured(lambda masks: torch.tanh(masks.double() @ into + bias) @ out, n, generator)


def classifier(n: int, generator: Generator) -> Game:
    """Log-probability of one of 20 classes, logits additive."""
    logits = torch.randn(n, 20, generator=generator).double() / 2
    logits *= torch.randn(n, 1, generator=generator).double().exp()
    return _measured(
        lambda masks: torch.log_softmax(masks.double() @ logits, 1)[:, 0], n, generator
    )


def attention(n: int, generator: Generator) -> Game:
    """Eight heads attend to the present features; log-probability of one of 30 classes."""
    salience = (2 * torch.randn(8, n, generator=generator).double()).exp()
    content = torch.randn(8, n, 6, generator=generator).double()
    out = 0.6 * torch.randn(48, 30, generator=generator).double()

    def worth(masks: Tensor) -> Tensor:
        seen = salience * masks[:, None, :].double()
        share = seen / (1 + seen.sum(2, keepdim=True))
        state = torch.einsum("rhn,hnd->rhd", share, content).flatten(1)
        return torch.log_softmax(torch.tanh(state) @ out, 1)[:, 0]

    return _measured(worth, n, generator)


def _measured(worth: Worth, n: int, generator: Generator) -> Game:
    total = torch.zeros(n).double()
    for _ in range(REFERENCE_ORDERS // 200):
        plan = _anchored(plan_permutations(n, 200, generator=generator))
        total += _solve(solve_permutations, plan, worth).attributions
    return Game(worth, total / (REFERENCE_ORDERS // 200))


GAMES = {
    "terms": terms,
    "long terms": long_terms,
    "trees": trees,
    "network": network,
    "classifier": classifier,
    "attention": attention,
}


def kernel(game: Game, n: int, multiple: int, generator: Generator) -> Answer:
    plan = _anchored(plan_pairs(n, multiple * n - 2, generator=generator))
    return _solve(solve_kernel, plan, game.worth)


def permutations(game: Game, n: int, multiple: int, generator: Generator) -> Answer:
    plan = _anchored(plan_permutations(n, multiple, generator=generator))
    return _solve(solve_permutations, plan, game.worth)


def captum_kernel(game: Game, n: int, multiple: int, generator: Generator) -> Answer:
    return _captum(KernelShap, game, n, multiple * n, generator)


def captum_sampling(game: Game, n: int, multiple: int, generator: Generator) -> Answer:
    return _captum(ShapleyValueSampling, game, n, multiple, generator)


ESTIMATORS = {
    "kernel": kernel,
    "permutations": permutations,
    "Captum KernelShap": captum_kernel,
    "Captum ShapleyValueSampling": captum_sampling,
}


def _anchored(plan: Plan) -> Plan:
    return join_plans([plan_anchors(plan.n_features), plan])


def _solve(solver: Callable[..., Any], plan: Plan, worth: Worth) -> Answer:
    scope = Scope(torch.tensor([plan.n_features]), torch.tensor([-1]))
    values = worth(plan.masks)[:, None]
    start = time.perf_counter()
    solution = solver(plan, values, scope)
    seconds = time.perf_counter() - start
    return Answer(solution.attributions[0], solution.standard_errors[0], seconds)


def _captum(method: Any, game: Game, n: int, n_samples: int, generator: Generator) -> Answer:
    # Captum draws from the global state.
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    explained = method(lambda masks: game.worth(masks.bool()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = explained.attribute(
            torch.ones(1, n), n_samples=n_samples, perturbations_per_eval=64
        )
    return Answer(found[0].double())


def rows(n_games: int, seed: int) -> Iterator[dict[str, Any]]:
    """One result per kind of game, size, budget and estimator."""
    for kind, build in GAMES.items():
        for n in sorted({n for n, _ in SIZES}):
            games = [build(n, _seeded(seed, n, g)) for g in range(n_games)]
            for multiple in (m for size, m in SIZES if size == n):
                for name, estimate in ESTIMATORS.items():
                    answers = [
                        estimate(game, n, multiple, _seeded(seed + 1, n, g))
                        for g, game in enumerate(games)
                    ]
                    yield {
                        "game": kind,
                        "n_features": n,
                        "evaluations_per_feature": multiple,
                        "estimator": name,
                        **_summary(games, answers),
                    }


def _seeded(*numbers: int) -> Generator:
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


def _summary(games: list[Game], answers: list[Answer]) -> dict[str, Any]:
    errors, covered, seconds = [], [], []
    for game, answer in zip(games, answers, strict=True):
        miss = answer.attributions - game.truth
        errors.append(float(miss.square().sum() / game.truth.square().sum()))
        if answer.errors is not None:
            covered.append(float((miss.abs() <= 1.96 * answer.errors).double().mean()))
        if answer.seconds is not None:
            seconds.append(answer.seconds)
    return {
        "median_error": median(errors),
        "errors": errors,
        "coverage": mean(covered) if covered else None,
        "solver_seconds": seconds or None,
    }


def large(seed: int) -> dict[str, Any]:
    """128 targets, each with its own number of 500 features, from 8,000 coalitions."""
    n_target, n = 128, 500
    generator = _seeded(seed)
    plan = _anchored(plan_pairs(n, 8000, generator=generator))
    scope = Scope(torch.arange(n - n_target, n), torch.full((n_target,), -1))
    weights = torch.randn(n, n_target, generator=generator).double()
    weights *= torch.arange(n)[:, None] < scope.n_visible
    values = 10 * torch.tanh(plan.masks.double() @ weights / 10)
    start, cpu = time.perf_counter(), time.process_time()
    solution = solve_kernel(plan, values, scope)
    gap = solution.attributions.sum(1) - solution.full_values + solution.empty_values
    return {
        "n_target": n_target,
        "n_features": n,
        "n_coalitions": 8000,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "largest_efficiency_gap": float(gap.abs().max()),
    }


def main() -> None:
    """Prints a line per result and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "estimators.json")
    arguments = parser.parse_args()

    size = large(arguments.seed)
    print(f"128 x 500 x 8000: {size['seconds']:.1f} s, {size['peak_gigabytes']:.1f} GB", flush=True)
    torch.set_num_threads(1)  # everything below is tiny
    found = []
    for row in rows(arguments.games, arguments.seed):
        found.append(row)
        coverage = "" if row["coverage"] is None else f"coverage {row['coverage']:.2f}"
        print(
            f"{row['game']:10} n={row['n_features']:<3} {row['evaluations_per_feature']:2}n "
            f"{row['estimator']:27} {row['median_error']:.4f} {coverage}",
            flush=True,
        )
    report = {
        **environment(seed=arguments.seed, dtype="float64"),
        "games": arguments.games,
        "error": "median over games of |estimate - truth|^2 / |truth|^2",
        "large": size,
        "reference_orders": REFERENCE_ORDERS,
        "rows": found,
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
