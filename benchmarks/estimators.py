"""Error of each estimator against exact Shapley values, and coverage of its intervals.

Games with known values (see `games.py`), among them families that no choice was made with. Captum's
own estimators, and shapiq's where it is installed, run in the same process on the same games. The
error is the squared distance from the truth relative to its squared length.

    python benchmarks/estimators.py [--games 10] [--seed 0] [--workers 1] [--threads N]
        [--only games] [--out FILE]
"""

import argparse
import importlib.util
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from captum.attr import KernelShap, ShapleyValueSampling
from environment import environment
from games import DEVELOPED_ON, HELD_OUT, REFERENCE_ORDERS, Game, Worth
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
SHAPES = ((100, 200, 3186), (128, 500, 8000))


@dataclass(frozen=True)
class Answer:
    """Attributions, standard errors where the estimator has them, and CPU seconds to solve."""

    attributions: Tensor
    errors: Tensor | None = None
    seconds: float | None = None


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


def shapiq_estimator(name: str, game: Game, n: int, multiple: int, generator: Generator) -> Answer:
    import shapiq

    def worth(masks: Any) -> Any:
        return game.worth(torch.from_numpy(masks).bool().reshape(-1, n)).numpy()

    seed = int(torch.randint(2**31, (), generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = getattr(shapiq, name)(n, random_state=seed).approximate(multiple * n, worth)
    return Answer(torch.tensor([float(found[(i,)]) for i in range(n)]).double())


ESTIMATORS: dict[str, Callable[[Game, int, int, Generator], Answer]] = {
    "kernel": kernel,
    "permutations": permutations,
    "Captum KernelShap": captum_kernel,
    "Captum ShapleyValueSampling": captum_sampling,
}
if importlib.util.find_spec("shapiq"):
    for approximator in ("KernelSHAP", "PermutationSamplingSV"):
        ESTIMATORS[f"shapiq {approximator}"] = partial(shapiq_estimator, approximator)


def _anchored(plan: Plan) -> Plan:
    return join_plans([plan_anchors(plan.n_features), plan])


def _solve(solver: Callable[..., Any], plan: Plan, worth: Worth) -> Answer:
    scope = Scope(torch.tensor([plan.n_features]), torch.tensor([-1]))
    values = worth(plan.masks)[:, None]
    start = time.process_time()
    solution = solver(plan, values, scope)
    seconds = time.process_time() - start
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


def rows(task: tuple[str, int, int, int]) -> list[dict[str, Any]]:
    """One result per budget and estimator, for one family of games and number of features."""
    torch.set_num_threads(1)  # everything here is tiny
    kind, n, n_games, seed = task
    found = []
    games = [(DEVELOPED_ON | HELD_OUT)[kind](n, _seeded(seed, n, g)) for g in range(n_games)]
    for multiple in (m for size, m in SIZES if size == n):
        for name, estimate in ESTIMATORS.items():
            answers = [
                estimate(game, n, multiple, _seeded(seed + 1, n, g)) for g, game in enumerate(games)
            ]
            found.append(
                {
                    "game": kind,
                    "held_out": kind in HELD_OUT,
                    "n_features": n,
                    "evaluations_per_feature": multiple,
                    "estimator": name,
                    **_summary(games, answers),
                }
            )
            _print(found[-1])
    return found


def _print(row: dict[str, Any]) -> None:
    coverage = "" if row["coverage"] is None else f"coverage {row['coverage']:.2f}"
    print(
        f"{row['game']:15} n={row['n_features']:<3} {row['evaluations_per_feature']:2}n "
        f"{row['estimator']:28} {row['median_error']:.4f} {coverage}",
        flush=True,
    )


def _seeded(*numbers: int) -> Generator:
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


def _summary(games: list[Game], answers: list[Answer]) -> dict[str, Any]:
    errors, covered, seconds = [], [], []
    for game, answer in zip(games, answers, strict=True):
        miss = answer.attributions - game.truth
        errors.append(float(miss.square().sum() / game.truth.square().sum()))
        if answer.errors is not None:
            # What is exact up to rounding is no miss.
            least = 1e-6 * float(game.truth.abs().max())
            covered.append(float((miss.abs() <= 1.96 * answer.errors + least).double().mean()))
        if answer.seconds is not None:
            seconds.append(answer.seconds)
    return {
        "median_error": median(errors),
        "errors": errors,
        "coverage": mean(covered) if covered else None,
        "solver_cpu_seconds": seconds or None,
    }


def large(n_target: int, n: int, n_coalitions: int, seed: int) -> dict[str, Any]:
    """Time and memory of the solver if each target sees a different number of features."""
    generator = _seeded(seed)
    plan = _anchored(plan_pairs(n, n_coalitions, generator=generator))
    scope = Scope(torch.arange(n - n_target, n), torch.full((n_target,), -1))
    weights = torch.randn(n, n_target, generator=generator).double()
    weights *= torch.arange(n)[:, None] < scope.n_visible
    values = 10 * torch.tanh(plan.masks.double() @ weights / 10)
    start, cpu = time.perf_counter(), time.process_time()
    solution = solve_kernel(plan, values, scope)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    gap = solution.attributions.sum(1) - solution.full_values + solution.empty_values
    found = {
        "n_target": n_target,
        "n_features": n,
        "n_coalitions": n_coalitions,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "largest_efficiency_gap": float(gap.abs().max()),
    }
    print(f"{n_target} x {n} x {n_coalitions}: {seconds:.1f} s, {cpu:.1f} s of CPU", flush=True)
    return found


def main() -> None:
    """Prints a line per result and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None, help="of the large shapes")
    parser.add_argument("--out", type=Path, default=RESULTS / "estimators.json")
    parser.add_argument("--only", choices=("games", "shapes"), help="keep the other as measured")
    arguments = parser.parse_args()

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {}
    if arguments.only:
        report = json.loads(arguments.out.read_text(encoding="utf-8"))
    report |= {
        **environment(seed=arguments.seed, dtype="float64"),
        "others": {"shapiq": version("shapiq")} if importlib.util.find_spec("shapiq") else {},
        "games": arguments.games,
        "error": "median over games of |estimate - truth|^2 / |truth|^2",
        "reference_orders": REFERENCE_ORDERS,
    }
    if arguments.only != "games":
        report["shapes"] = [large(*shape, arguments.seed) for shape in SHAPES]
    arguments.out.parent.mkdir(exist_ok=True)
    if arguments.only != "shapes":
        report["rows"] = []
        tasks = [
            (kind, n, arguments.games, arguments.seed)
            for n in sorted({n for n, _ in SIZES})
            for kind in DEVELOPED_ON | HELD_OUT
        ]
        spawn = multiprocessing.get_context("spawn")  # threads do not survive a fork
        with ProcessPoolExecutor(arguments.workers, mp_context=spawn) as workers:
            for part in workers.map(rows, tasks):
                report["rows"] += part
                _write(arguments.out, report)
    _write(arguments.out, report)


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
