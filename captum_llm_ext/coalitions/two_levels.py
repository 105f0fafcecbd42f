"""Two-level estimates: many coalitions of a surrogate, few of its difference from the game.

Estimands are linear in the values: attributions of a game are those of its surrogate plus those of
the difference. The surrogate's are estimated from many coalitions, the difference's from a few
others scored in both games; for a good surrogate, the difference has a low variance. The two
samples are independent, so that their variances are added (Giles 2015, "Multilevel Monte Carlo
methods", section 1.3).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from captum_llm_ext.coalitions.causal_scope import Solution

# Relative variance that counts as rounding. Chosen, not measured.
_EXACT = 1e-6
# If the surrogate's attributions are exact: the squared error that the difference may leave,
# relative to the squared attributions, unless that takes more than this share of the reference's
# cost alone. Chosen, not measured.
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

    The last `n` have the reference's values, the `n` before them the surrogate's values of the same
    coalitions; all others are of the surrogate alone.

    Attributes:
        n: Number of coalitions scored in both games.
        n_anchors: Number of these from `plan_anchors`.
        planned: Name of the estimator whose distribution they follow.
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
        cost: Cost of each, in any unit.
        variance: Variance of the attributions, summed over all of them.
    """

    n: int
    cost: float
    variance: float

    @classmethod
    def of(cls, n: int, cost: float, solution: Solution) -> "Level":
        """The level of a solution; unknown errors count as 0."""
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
    """The number of coalitions at each level.

    Attributes:
        surrogate: Coalitions on the surrogate alone.
        difference: Coalitions in both games.
        pays: Whether they cost less than equal precision from the reference alone.
    """

    surrogate: int
    difference: int
    pays: bool


def split(surrogate: Level, difference: Level, reference_cost: float, n: int, size: float) -> Split:
    """The cheapest split with the precision of `n` coalitions of the reference alone.

    Variances fall with the number of coalitions, and the reference's is taken to equal the
    surrogate's. Costs are minimal for numbers proportional to the square root of variance over
    cost.

    Args:
        surrogate: The surrogate's level; without error if it has all coalitions.
        difference: The difference's level; its cost is that of both games.
        reference_cost: Cost of one coalition of the reference.
        n: Number of reference coalitions of the required precision.
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
