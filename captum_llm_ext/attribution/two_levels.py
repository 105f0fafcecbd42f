"""Two-level estimates: many coalitions on a surrogate, few on the model minus the surrogate."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from captum_llm_ext.attribution.game import Game
from captum_llm_ext.attribution.sampling import (
    GROWTH,
    MOST_ROUNDS,
    NO_ERROR,
    Effort,
    Outcome,
    adjusted_values,
    anchors_of,
    known_excess,
    solved,
)
from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.coalitions import (
    DrawnTexts,
    Plan,
    Solution,
    join_plans,
    plan_anchors,
)
from captum_llm_ext.coalitions.stopping import StoppingRule
from captum_llm_ext.coalitions.two_levels import Correction, Level, split, summed
from captum_llm_ext.methods.estimators import Estimator
from captum_llm_ext.model import RowScorer

NOT_LINEAR = (
    "{} cannot be corrected from a few coalitions: its attributions are not linear in the values, "
    "or need the model on all coalitions. Leave `surrogate` out, or use KernelShap, ShapleyValues, "
    "ShapleyValueSampling, PartitionShap in nested orders, or Lime with a ridge or no penalty."
)
# Draws of the empty coalition that both model and surrogate score: with four, the estimated error
# itself is off by half. Eight is chosen, not measured.
_EMPTY_OF_BOTH = 8
_FEWEST_OF_BOTH = 8  # coalitions, the fewest that give a variance to plan by; chosen, not measured


class _Sample:
    """The coalitions of one estimator and their values.

    Args:
        game: The game.
        method: The estimator.
        anchors: The coalitions that the plan begins with.
        scorers: One or two; with two, the second's values minus the first's are explained.

    Attributes:
        plan: All coalitions up to now.
        values: By each of the scorers, after the first `add`.
        calls: Numbers of the game's calls that these come from.
        foil_values: Of each scorer, numbers of the game's that belong to these.
        solution: What they say, after the first `add`.
        drawn: The texts of the coalitions, if their effects were removed from the values.
    """

    solution: Solution
    drawn: DrawnTexts | None
    _explained: Tensor

    def __init__(
        self, game: Game, method: Estimator, anchors: Plan, scorers: Sequence[RowScorer]
    ) -> None:
        self._game, self.method, self._scorers = game, method, scorers
        self.plan = anchors
        self.foil_values: list[list[int]] = [[] for _ in scorers]
        self.values: list[Tensor] = []
        self.calls: list[int] = []

    def add(self, plans: Sequence[Plan]) -> None:
        """Scores further coalitions (the first call with the anchors), and solves all."""
        more = join_plans(plans)
        self.plan = join_plans([self.plan, more])
        # In one call: few rows take a pass through all weights as many do.
        if self.values:
            found = self._scored(more)
            self.values = [torch.cat(both) for both in zip(self.values, found, strict=True)]
        else:
            self.values = self._scored(self.plan)
        if len(self.values) == 2:
            # The difference hardly depends on single texts.
            self.drawn, self._explained = None, self.values[1] - self.values[0]
        else:
            self.drawn, self._explained = adjusted_values(
                self._game, self.method, self.plan, self.values[0], self.calls
            )
        self.solution = solved(self._game, self.method, self.plan, self._explained)

    def _scored(self, plan: Plan) -> list[Tensor]:
        n_before = self._game.n_foil_values
        self.calls.append(self._game.draw_log.n_calls)
        found = self._game.scored(plan, self._scorers)
        for i in range(n_before, self._game.n_foil_values):
            self.foil_values[i - n_before].append(i)
        return found

    @property
    def n(self) -> int:
        """Number of coalitions besides the anchors."""
        return len(self.plan.masks) - self.plan.n_anchors

    def whole(self) -> Solution:
        """Attributions of the sum over target tokens, each of which depends on nothing after it."""
        summed = self._explained.sum(1, keepdim=True)
        scope = self._game.solved_scope.of([self._game.n_features], [-1])
        return self.method.solve(self.plan, summed, scope)


class _TwoLevels:
    """Coalitions scored on the surrogate alone, and others scored on both model and surrogate.

    Args:
        game: The game.
        method: The estimator of the surrogate's attributions.
        few: See `Estimator`.
        surrogate: The surrogate's scorer.
        work: Cost of a coalition on the model, relative to the surrogate.

    Attributes:
        cost: Cost of a coalition on both, relative to the surrogate alone. Counted, not timed, so
            that plans are reproducible. A ratio wrong by a factor of two costs at most 3 % more
            time, by eight 30 %: shares depend on its square root.
    """

    def __init__(
        self,
        game: Game,
        method: Estimator,
        few: Callable[[int], Estimator],
        surrogate: RowScorer,
        work: float,
    ) -> None:
        self._game, self._method, self._few = game, method, few
        self.cost = 1 + work
        n_empty = 1 if game.deterministic else _EMPTY_OF_BOTH
        both = plan_anchors(game.n_features, required=game.held, n_empty=n_empty)
        self.surrogate = _Sample(game, method, anchors_of(game), [surrogate])
        self.difference = _Sample(game, few(_FEWEST_OF_BOTH), both, [surrogate, game.run.scorer])

    def begin(self, num_trials: int) -> None:
        """Scores the minimum of each level."""
        generator = self._game.run.generator
        self.surrogate.add([self._method.plan(generator) for _ in range(num_trials)])
        self.difference.add([self.difference.method.plan(generator)])

    def levels(self) -> tuple[Level, Level]:
        """Cost of each level in evaluations of the surrogate, and its variance."""
        return (
            Level.of(self.surrogate.n, 1.0, self.surrogate.solution),
            Level.of(self.difference.n, self.cost, self.difference.solution),
        )

    def more_of_both(self, n: int) -> None:
        """Scores about `n` more coalitions on both."""
        if n > 0:
            self.difference.add([self._few(n).plan(self._game.run.generator)])

    def more_of_surrogate(self, n_rounds: int) -> None:
        """Scores more rounds on the surrogate alone."""
        generator = self._game.run.generator
        self.surrogate.add([self._method.plan(generator) for _ in range(n_rounds)])

    @property
    def solution(self) -> Solution:
        """Attributions of the model's game."""
        return summed([self.surrogate.solution, self.difference.solution])

    def excess(self, rule: StoppingRule) -> Tensor:
        """See `_excess`."""
        if rule.of != "answer":
            return known_excess(rule, self.solution)
        return known_excess(rule, summed([self.surrogate.whole(), self.difference.whole()]))


def sample_twice(game: Game, method: Estimator, effort: Effort, surrogate: RowScorer) -> Outcome:
    """Attributes a game through its surrogate and the difference, in rounds if there is a rule."""
    rule, few = effort.stop, method.few
    if few is None or method.adaptive is not None:
        raise ValueError(NOT_LINEAR.format(type(game.run.method).__name__))
    if rule is not None and not method.gives_errors:
        raise ValueError(NO_ERROR)
    both = _TwoLevels(game, method, few, surrogate, game.run.work_of_model)
    both.begin(effort.num_trials)
    n = both.surrogate.n
    first, second = both.levels()
    size = float(both.solution.attributions.square().sum())
    found = split(first, second, both.cost - 1, n, size)
    if not found.pays:
        warn_user(
            f"the surrogate saves nothing here: the difference to the model varies "
            f"{second.each / first.each:.2g} times as much as its values, and the model "
            f"is {both.cost - 1:.2g} times its work. Leave `surrogate` out, or give one that is "
            "closer or smaller.",
        )
    settled = None
    if rule is None:
        # As many coalitions on the surrogate as requested: the others in proportion.
        wanted = round(n * found.difference / found.surrogate)
        both.more_of_both(min(wanted, n) - both.difference.n)
    else:
        settled = _settle(game, both, rule, effort)
    return _outcome_of_both(game, both, rule, settled)


def _settle(game: Game, both: _TwoLevels, rule: StoppingRule, effort: Effort) -> Tensor:
    """Adds coalitions where the error falls most per cost; returns whether the rule was met."""
    method, scorer = both.surrogate.method, game.run.scorer
    size = max(both.surrogate.n // effort.num_trials, 1)
    least = both.difference.n
    most = effort.max_evaluations or MOST_ROUNDS * size
    excess = both.excess(rule)
    while bool((excess > 1).any()):
        first, second = both.levels()
        spent = len(both.surrogate.plan.masks) + len(both.difference.plan.masks)
        n_rounds = max(1, round(GROWTH * first.n / size))
        n_more = max(least, round(GROWTH * second.n))
        grows = effort.budget.grows and not effort.max_evaluations
        can_first = method.estimate and spent + size <= most
        can_second = second.variance > 0 and spent + n_more <= most
        if grows:
            n_rounds = min(n_rounds, (method.usual - first.n) // size)
            can_first = can_first and n_rounds >= 1
            can_second = can_second and second.n + n_more <= method.usual
        n_rounds = max(1, min(n_rounds, (most - spent) // size))
        if can_first and (first.saves >= second.saves or not can_second):
            both.more_of_surrogate(n_rounds)
        elif can_second:
            both.more_of_both(n_more)
        else:
            break
        excess = both.excess(rule)
    scorer.forecast(0)
    return excess <= 1


def _outcome_of_both(
    game: Game, both: _TwoLevels, rule: StoppingRule | None, settled: Tensor | None
) -> Outcome:
    """All coalitions as one plan, with a `Correction` that separates them."""
    first, second = both.surrogate, both.difference
    method = first.method
    game.reorder_foil_values([i for one in (first, second) for of in one.foil_values for i in of])
    plans = [first.plan, *(replace(second.plan, n_anchors=0) for _ in range(2))]
    one, other = both.levels()
    about = {
        "evaluations": first.n + second.n,
        "corrected_by": second.n,
        "cost": 1 / (both.cost - 1),
        "share_of_variance": one.variance / max(one.variance + other.variance, 1e-300),
    }
    return Outcome(
        method.name,
        join_plans(plans),
        torch.cat([*first.values, *second.values]),
        both.solution,
        estimate=True,
        settled=settled,
        stop=rule,
        options=method.options,
        correction=Correction(
            len(second.plan.masks),
            second.plan.n_anchors,
            second.method.name,
            second.method.name,
            second.method.options,
        ),
        about_surrogate=about,
        drawn=first.drawn and first.drawn.padded(2 * len(second.plan.masks)),
    )
