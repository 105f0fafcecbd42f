"""Samples a game: coalitions are planned, scored and solved, in rounds if a rule stops them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.attribution.game import Game
from captum_llm_ext.coalitions import (
    DrawnTexts,
    Plan,
    Solution,
    join_plans,
    plan_anchors,
    without_draw_effects,
)
from captum_llm_ext.coalitions.stopping import StoppingRule
from captum_llm_ext.coalitions.two_levels import Correction
from captum_llm_ext.methods.estimators import Budget, Estimator

# The value of the empty coalition enters every attribution: more draws of it are the cheapest gain
# in accuracy. Chosen, not measured.
EMPTY_DRAWS = 32
# Budgets that a stopping rule may spend at most: errors are then an eighth of those after the
# first, since they shrink with the square root. More of them is a rule that is not going to be met.
# Chosen, not measured.
MOST_ROUNDS = 64
# With a stopping rule, each round adds about this share of the coalitions so far. Chosen, not
# measured: smaller shares solve more often, larger ones overshoot the rule.
GROWTH = 0.25
# Rounds without new rows cost no evaluation and would never end a run. Chosen, not measured.
_MOST_IDLE_ROUNDS = 8
# A forecast beyond this factor says no more than "long". Chosen, not measured.
_MOST_EXCESS = 1e3
NO_ERROR = (
    "`tol` and `stop` need standard errors, and here there are none (a lasso, or a single draw): "
    "leave them out, or give more samples or draws."
)


@dataclass(frozen=True)
class Effort:
    """Limits on what one attribution may spend; `n_empty` are draws of the empty coalition."""

    budget: Budget
    num_trials: int
    stop: StoppingRule | None
    max_evaluations: int | None
    n_empty: int = EMPTY_DRAWS


@dataclass(frozen=True)
class Outcome:
    """The result of an estimator on a game.

    `options` are the solver's settings; `settled` says whether a stopping rule was met, bool
    ``(n_target,)``, or ``(1,)`` for the whole answer. With a surrogate, `correction` says which
    coalitions correct its values, and `about_surrogate` is for provenance. `whole` are the
    attributions ``(n_features,)`` of the target's summed values, if those of its tokens do not sum
    to them and the output is held fixed. `drawn` are the texts of the coalitions, if their effects
    were removed from the values.
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
    drawn: DrawnTexts | None = None

    @property
    def stopping(self) -> dict[str, Any]:
        """For provenance: the stopping rule, and where it was met."""
        if self.settled is None:
            return {"stop": None, "settled": None, "converged": None}
        settled = self.settled.tolist()
        return {"stop": str(self.stop), "settled": settled, "converged": all(settled)}


def anchors_of(game: Game, n_empty: int = EMPTY_DRAWS) -> Plan:
    """The coalitions that every plan begins with: the full one, and draws of the empty one."""
    n_empty = 1 if game.deterministic else n_empty
    return plan_anchors(game.n_features, required=game.held, n_empty=n_empty)


def sample(game: Game, method: Estimator, effort: Effort) -> Outcome:
    """Plans, scores and solves, in rounds until the stopping rule is met."""
    rule, generator, scorer = effort.stop, game.run.generator, game.run.scorer
    if rule is not None and not method.gives_errors:
        raise ValueError(NO_ERROR)
    first = [method.plan(generator) for _ in range(effort.num_trials)]
    plan = join_plans([anchors_of(game, effort.n_empty), *first])
    n_calls = game.draw_log.n_calls
    values = game.values(plan)
    drawn, adjusted = adjusted_values(game, method, plan, values, [n_calls])
    solution = solved(game, method, plan, adjusted)
    size, idle = len(first[0].masks), 0
    most = effort.max_evaluations or MOST_ROUNDS * size
    excess = None if rule is None else _excess(rule, game, method, plan, adjusted, solution)
    while rule and excess is not None and bool((excess > 1).any()) and method.estimate:
        n_rounds = _n_rounds(plan, size, most - scorer.n_evaluations, method, effort)
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
        calls = range(n_calls, game.draw_log.n_calls)
        drawn, adjusted = adjusted_values(game, method, plan, values, calls)
        solution = solved(game, method, plan, adjusted)
        excess = _excess(rule, game, method, plan, adjusted, solution)
    if rule:
        scorer.forecast(0)
    return Outcome(
        method.name,
        plan,
        values,
        solution,
        method.estimate,
        settled=None if excess is None else excess <= 1,
        stop=rule,
        options=method.options,
        whole=_of_whole(game, method, plan, adjusted),
        drawn=drawn,
    )


def adjusted_values(
    game: Game, method: Estimator, plan: Plan, values: Tensor, calls: Sequence[int]
) -> tuple[DrawnTexts | None, Tensor]:
    """The texts of the coalitions, and the values without their effects.

    None and the values themselves for methods that use each draw as it is, and if texts are
    unknown.

    Args:
        game, method, plan, values: As for `solved`.
        calls: Numbers of the calls that scored the plan's coalitions, in order.
    """
    drawn = game.draw_log.texts(calls) if method.samples_draws else None
    if drawn is None:
        return None, values
    return drawn, without_draw_effects(plan, values, game.scope, drawn)


def _n_rounds(plan: Plan, size: int, n_left: int, method: Estimator, effort: Effort) -> int:
    """Number of rounds to score before the next solution; less than 1 if the budget is spent.

    Args:
        plan: The coalitions so far.
        size: Number of coalitions of a round.
        n_left: Evaluations that may still be spent.
        method: The estimator.
        effort: The limits.
    """
    # Solving after every single round would cost more than the rounds.
    n_rounds = max(1, round(GROWTH * len(plan.masks) / max(size, 1)))
    n_rounds = min(n_rounds, n_left // max(size, 1))
    if effort.budget.grows and not effort.max_evaluations:
        # As many coalitions as without a rule; duplicates among them cost nothing.
        planned = len(plan.masks) - plan.n_anchors
        n_rounds = min(n_rounds, (method.usual - planned) // max(size, 1))
    return n_rounds


def _of_whole(game: Game, method: Estimator, plan: Plan, values: Tensor) -> Tensor | None:
    """A non-additive method's attributions of the target's summed values, as in captum."""
    if method.is_additive or game.generated.n_causes:
        return None
    scope = game.solved_scope.of([game.n_features], [-1])
    return method.solve(plan, values.sum(1, keepdim=True), scope).attributions[0]


def solved(game: Game, method: Estimator, plan: Plan, values: Tensor) -> Solution:
    """Attributions of all targets; with several processes, each solves some of the targets."""
    processes, n_target = game.run.scorer.processes, len(game.scope.n_visible)
    if processes.n_replicas == 1:
        return method.solve(plan, values, game.solved_scope)
    # Several parts per process balance the load, but what targets have in common is computed once
    # per part.
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
    """The ratio of the current errors to those that a rule asks for.

    Raises:
        ValueError: If the method has no standard errors.
    """
    if rule.of == "answer":
        # A token depends on nothing after it, so attributions of the sum are sums of attributions.
        whole = values.sum(1, keepdim=True)
        solution = method.solve(plan, whole, game.solved_scope.of([game.n_features], [-1]))
    return known_excess(rule, solution)


def known_excess(rule: StoppingRule, solution: Solution) -> Tensor:
    """The ratio of the current errors to those that a rule asks for.

    Raises:
        ValueError: If standard errors are unknown.
    """
    excess = rule.excess(solution)
    if bool(excess.isnan().any()):
        raise ValueError(NO_ERROR)
    return excess
