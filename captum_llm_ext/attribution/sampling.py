"""Sampling a game: coalitions are planned, scored and solved, in rounds if a rule asks for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.attribution.game import Game
from captum_llm_ext.coalitions import Plan, Solution, join_plans, plan_anchors
from captum_llm_ext.coalitions.stopping import StoppingRule
from captum_llm_ext.coalitions.two_levels import Correction
from captum_llm_ext.methods.estimators import Budget, Estimator

# The value of the empty coalition enters every attribution: its draws are the cheapest accuracy.
EMPTY_DRAWS = 32
# Budgets that a stopping rule may spend at most: errors are then an eighth of those after the
# first, since they shrink with the square root. More of them is a rule that is not going to be met.
MOST_ROUNDS = 64
# With a tolerance, each round adds about this share of what there is.
GROWTH = 0.25
# Rounds that hold nothing new cost no evaluation: they would never end a run.
_MOST_IDLE_ROUNDS = 8
# A forecast beyond it says no more than "long".
_MOST_EXCESS = 1e3
NO_ERROR = (
    "`tol` and `stop` need standard errors, and here there are none (a lasso, or a single draw): "
    "leave them out, or give more samples or draws."
)


@dataclass(frozen=True)
class Effort:
    """What the user allows one attribution to spend."""

    budget: Budget
    num_trials: int
    stop: StoppingRule | None
    max_evaluations: int | None


@dataclass(frozen=True)
class Outcome:
    """What was found, and how.

    `options` are those of the solver; `settled` says of what a stopping rule judged whether it was
    met, bool ``(n_target,)``, of the whole answer ``(1,)``. With a surrogate, `correction` says
    which coalitions its values are corrected by, and `about_surrogate` is for provenance. `whole`
    are the attributions ``(n_features,)`` of the target's summed values, where those of its tokens
    do not sum to them and the output is held fixed.
    """

    name: str
    plan: Plan
    values: Tensor
    solution: Solution
    estimate: bool
    settled: Tensor | None = None
    stop: StoppingRule | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    correction: Correction | None = None
    about_surrogate: Mapping[str, Any] | None = None
    whole: Tensor | None = None

    @property
    def stopping(self) -> dict[str, Any]:
        """For provenance: what the run stopped by, and where it was met."""
        if self.settled is None:
            return {"stop": None, "settled": None, "converged": None}
        settled = self.settled.tolist()
        return {"stop": str(self.stop), "settled": settled, "converged": all(settled)}


def anchors_of(game: Game) -> Plan:
    """What every plan begins with: all features, and none in as many draws as that is worth."""
    n_empty = 1 if game.deterministic else EMPTY_DRAWS
    return plan_anchors(game.n_features, required=game.held, n_empty=n_empty)


def sample(game: Game, method: Estimator, effort: Effort) -> Outcome:
    """Plans, scores and solves, in rounds until the stopping rule is met."""
    rule, generator, scorer = effort.stop, game.run.generator, game.run.scorer
    if rule is not None and not method.tells_error:
        raise ValueError(NO_ERROR)
    first = [method.plan(generator) for _ in range(effort.num_trials)]
    plan = join_plans([anchors_of(game), *first])
    values = game.values(plan)
    solution = solved(game, method, plan, values)
    if rule is None:
        return Outcome(
            method.name,
            plan,
            values,
            solution,
            method.estimate,
            options=method.options,
            whole=_of_whole(game, method, plan, values),
        )
    size, idle = len(first[0].masks), 0
    most = effort.max_evaluations or MOST_ROUNDS * size
    excess = _excess(rule, game, method, plan, values, solution)
    while bool((excess > 1).any()) and method.estimate:
        # Solving everything again after every single round would cost more than the rounds.
        n_rounds = max(1, round(GROWTH * len(plan.masks) / max(size, 1)))
        n_rounds = min(n_rounds, (most - scorer.n_evaluations) // max(size, 1))
        if effort.budget.grows and not effort.max_evaluations:
            # As many coalitions as without a rule; some of them are alike and cost nothing.
            planned = len(plan.masks) - plan.n_anchors
            n_rounds = min(n_rounds, (method.usual - planned) // max(size, 1))
        if n_rounds < 1 or idle > _MOST_IDLE_ROUNDS:
            break
        more = join_plans([method.plan(generator) for _ in range(n_rounds)])
        # Standard errors shrink with the square root of the evaluations.
        likely = scorer.n_evaluations * min(float(excess.max()), _MOST_EXCESS) ** 2
        scorer.forecast(round(min(likely, most)) - scorer.n_evaluations)
        plan = join_plans([plan, more])
        scored_before = scorer.n_evaluations
        values = torch.cat([values, game.values(more)])
        idle = idle + 1 if scorer.n_evaluations == scored_before else 0
        solution = solved(game, method, plan, values)
        excess = _excess(rule, game, method, plan, values, solution)
    scorer.forecast(0)
    return Outcome(
        method.name,
        plan,
        values,
        solution,
        method.estimate,
        excess <= 1,
        rule,
        method.options,
    )


def _of_whole(game: Game, method: Estimator, plan: Plan, values: Tensor) -> Tensor | None:
    """What a method that is not additive makes of the target's summed values, as in captum."""
    if method.is_additive or game.generated.n_causes:
        return None
    scope = game.solved_scope.of([game.n_features], [-1])
    return method.solve(plan, values.sum(1, keepdim=True), scope).attributions[0]


def solved(game: Game, method: Estimator, plan: Plan, values: Tensor) -> Solution:
    """Attributions of all targets; of several processes each solves for some of the targets."""
    processes, n_target = game.run.scorer.processes, len(game.scope.n_visible)
    if processes.n_replicas == 1:
        return method.solve(plan, values, game.solved_scope)
    # Several parts each, for all to be through at the same time; but what targets have in common
    # is computed once for each part.
    n_parts = min(4 * processes.n_replicas, n_target)
    borders = [i * n_target // n_parts for i in range(n_parts + 1)]
    parts = [slice(start, stop) for start, stop in pairwise(borders)]

    def solve(part: slice) -> Solution:
        return method.solve(plan, values[:, part], game.solved_scope.part(part))

    return Solution.joined(processes.each(parts, solve))


def _excess(
    rule: StoppingRule,
    game: Game,
    method: Estimator,
    plan: Plan,
    values: Tensor,
    solution: Solution,
) -> Tensor:
    """How many times too large the errors are that a rule goes by.

    Raises:
        ValueError: If there is no standard error to go by.
    """
    if rule.of == "answer":
        # A token depends on nothing after it: the sum's attributions are the sums.
        whole = values.sum(1, keepdim=True)
        solution = method.solve(plan, whole, game.solved_scope.of([game.n_features], [-1]))
    return known_excess(rule, solution)


def known_excess(rule: StoppingRule, solution: Solution) -> Tensor:
    """How many times too large the errors are.

    Raises:
        ValueError: If they are unknown.
    """
    excess = rule.excess(solution)
    if bool(excess.isnan().any()):
        raise ValueError(NO_ERROR)
    return excess
