"""Two-level estimates: many coalitions of a surrogate, few of its difference from the game.

What a method estimates is linear in the values: attributions of a game are those of its surrogate
plus those of the difference. The surrogate's are estimated from many coalitions, the difference's
from few others, on which both games are played; where the surrogate is close, the difference varies
little. The two samples are independent, so that their variances add up (Giles 2015, "Multilevel
Monte Carlo methods", section 1.3).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from captum_llm_ext.coalitions.causal_scope import Solution

# What is left of a variance by rounding alone, beside another one.
_EXACT = 1e-6
# Where the surrogate is known without error: of the attributions' squares, the difference may leave
# so much, as long as that takes less than this share of what the reference alone would.
_ENOUGH, _MOST = 1e-3, 0.5


def summed(levels: Sequence[Solution]) -> Solution:
    """The sum of independent solutions, with standard errors of the sum."""
    first = levels[0]
    if len(levels) == 1:
        return first
    errors = torch.stack([level.standard_errors for level in levels])
    return Solution(
        sum((level.attributions for level in levels[1:]), first.attributions),
        errors.square().sum(0).sqrt(),
        sum((level.full_values for level in levels[1:]), first.full_values),
        sum((level.empty_values for level in levels[1:]), first.empty_values),
    )


@dataclass(frozen=True)
class Correction:
    """Which coalitions of a plan correct the surrogate's attributions.

    Of the reference are the last ones; as many before them are the same coalitions, of the
    surrogate; all others are of the surrogate alone.

    Attributes:
        n: How many.
        n_anchors: How many of these come from `plan_anchors`.
        planned: Name of the estimator whose law they follow.
        solved: Name of the estimator that solves the differences.
        options: Its options.
    """

    n: int
    n_anchors: int
    planned: str
    solved: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Level:
    """Cost and variance of one level.

    Attributes:
        n: Number of coalitions.
        cost: Of each, in any unit.
        variance: Of the attributions, summed over all of them.
    """

    n: int
    cost: float
    variance: float

    @classmethod
    def of(cls, n: int, cost: float, solution: Solution) -> "Level":
        """With the variance of a solution; errors that are unknown count as none."""
        return cls(n, cost, float(solution.standard_errors.nan_to_num(nan=0.0).square().sum()))

    @property
    def each(self) -> float:
        """Variance of an estimate from a single coalition."""
        return self.variance * self.n

    @property
    def saves(self) -> float:
        """Reduction of variance by one more coalition, per unit of cost."""
        return self.variance / max(self.n * self.cost, 1e-12)


@dataclass(frozen=True)
class Split:
    """How many coalitions each level should have.

    Attributes:
        surrogate: Of the surrogate alone.
        difference: Of both games.
        pays: Whether they cost less than as good an answer from the reference alone.
    """

    surrogate: int
    difference: int
    pays: bool


def split(surrogate: Level, difference: Level, reference_cost: float, n: int, size: float) -> Split:
    """The cheapest split that is as good as `n` coalitions of the reference alone.

    Variances fall with the number of coalitions, and a coalition of the reference leaves as much as
    one of the surrogate. Costs are least where numbers are as the roots of variance over cost.

    Args:
        surrogate: What was found of the surrogate; without error, where it has all coalitions.
        difference: Of the difference; its cost is that of both games.
        reference_cost: Of one coalition of the reference.
        n: How many coalitions of it alone would do.
        size: Sum of squares of all attributions.
    """
    if surrogate.variance <= _EXACT * difference.variance:
        wanted = difference.each / max(_ENOUGH * size, 1e-300)
        most = max(difference.n, _MOST * n * reference_cost / difference.cost)
        return Split(n, math.ceil(min(max(wanted, difference.n), most)), True)
    share = math.sqrt(difference.each * surrogate.cost / (surrogate.each * difference.cost))
    n_surrogate = n * (1 + (difference.each / surrogate.each / share if share else 0.0))
    cost = n_surrogate * (surrogate.cost + share * difference.cost)
    pays = cost < n * reference_cost
    return Split(math.ceil(n_surrogate), math.ceil(share * n_surrogate), pays)
