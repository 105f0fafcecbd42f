"""Bounds of values that an API does not report, and of attributions that are linear in values."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.coalitions import (
    Plan,
    Scope,
    Solution,
    solve_exact,
    solve_leave_one_out,
    solve_only_one_in,
    solve_permutations,
)

# Estimators whose attributions are fixed linear combinations of the values.
_LINEAR: Mapping[str, Callable[[Plan, Tensor, Scope], Solution]] = {
    "leave-one-out": solve_leave_one_out,
    "only one in": solve_only_one_in,
    "exact": solve_exact,
    "antithetic permutations": solve_permutations,
}
# Minimum rounding of reported values in nats: six digits are usual.
_ROUNDED = 1e-6


@dataclass(frozen=True)
class Bounds:
    """Bounds of the values of coalitions.

    Attributes:
        rows: What each coalition was rendered to: equal for equal rows.
        lower, upper: Shape ``(n_coalitions, n_target)``; infinite without a bound.
    """

    rows: Sequence[bytes]
    lower: Tensor
    upper: Tensor

    def of_attributions(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of attributions, each ``(n_target, n_features)``.

        Args:
            weight: Weights of the coalitions' values in attributions, ``(n_coalitions,
                n_features)``: see `weights`.
        """
        first, merged = distinct(self.rows, weight)
        return interval_of(merged, self.lower[first], self.upper[first])

    def first_cause(
        self, weight: Tensor, attributions: Tensor, *, is_product: bool
    ) -> dict[str, Any] | None:
        """Whether the strongest cause of the whole target is stronger than any other.

        It is told apart if it is so for all values within the bounds.

        Args:
            weight: As for `of_attributions`.
            attributions: Of the whole target, ``(n_features,)``.
            is_product: Whether the target's value is the product of its tokens', not their sum.

        Returns:
            The strongest; the second, or if only others may be stronger, the one that may be so by
            most; and whether the first is told apart. None for fewer than two features.
        """
        if len(attributions) < 2:
            return None
        first, second = attributions.argsort(descending=True)[:2].tolist()
        ends = [end.prod(1) if is_product else end.sum(1) for end in (self.lower, self.upper)]
        whole = Bounds(self.rows, *(end[:, None] for end in ends))
        lead, _ = whole.of_attributions(weight[:, [first]] - weight)
        lead[0, first] = torch.inf
        is_apart = bool((lead > 0).all())
        second = second if is_apart or not lead[0, second] > 0 else int(lead[0].argmin())
        return {"first": first, "second": second, "is_told_apart": is_apart}


def bound_of_unreported(
    told: Sequence[float], likeliest: Sequence[float], rounding_step: float = 0.0
) -> float:
    """Upper bound of the log-probability of a token that is not reported.

    Args:
        told: All log-probabilities reported at its position, in nats.
        likeliest: Those of tokens that are certainly likelier.
        rounding_step: What reported values are multiples of.
    """
    # Reported values are rounded, and so is their complement to 1.
    off = rounding_step / 2 + _ROUNDED
    rest = 1 - sum(math.exp(value - off) for value in told)
    ends = [value + off for value in likeliest if math.isfinite(value)]
    return min([math.log(max(rest, _ROUNDED)), *ends])


def bounds_of_contrast(
    target: Tensor, foils: Tensor, has_foils: Tensor, rounding_step: float = 0.0
) -> Tensor:
    """Bounds of log-odds of tokens against their foils, ``(2, n_target)``.

    Args:
        target: Bounds of the tokens' log-probabilities, ``(2, n_target)``.
        foils: Bounds of those of all foils of a token together, ``(2, n_target)``; 0 for none.
        has_foils: Which tokens have foils, ``(n_target,)``.
        rounding_step: What reported values are multiples of.
    """
    (low, high), (foils_low, foils_high) = target, foils
    off = rounding_step / 2 + _ROUNDED
    # Foils have at most the mass that the token leaves, and vice versa.
    rest, rest_of_foils = (
        (1 - (end - off).exp()).clamp_min(_ROUNDED).log() for end in (low, foils_low)
    )
    is_open, is_open_of_foils = has_foils & (high > low), has_foils & (foils_high > foils_low)
    foils_high = torch.where(is_open_of_foils, foils_high.minimum(rest), foils_high)
    high = torch.where(is_open, high.minimum(rest_of_foils), high)
    # Without a lower bound of the foils there is no upper one of the contrast.
    return torch.stack([low - foils_high, high - foils_low])


def weights(name: str, plan: Plan) -> Tensor | None:
    """Weights of the coalitions' values in the attributions, ``(n_coalitions, n_features)``.

    Args:
        name: Name of the estimator.
        plan: Its coalitions.

    Returns:
        None for estimators that are not linear in the values.
    """
    solve = _LINEAR.get(name)
    if solve is None:
        return None
    n = len(plan.masks)
    scope = Scope.of_all(n, plan.n_features)
    return solve(plan, torch.eye(n, dtype=torch.float64, device="cpu"), scope).attributions


def distinct(rows: Sequence[bytes], weight: Tensor) -> tuple[list[int], Tensor]:
    """Indices of distinct rows, and the summed weights of each.

    A repeated coalition is one unknown value, not two.
    """
    numbers = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    index = torch.tensor([numbers[row] for row in rows], dtype=torch.int64, device="cpu")
    merged = torch.zeros(len(numbers), weight.shape[1], dtype=weight.dtype, device="cpu")
    first = {row: at for at, row in reversed(list(enumerate(rows)))}
    return [first[row] for row in numbers], merged.index_add(0, index, weight)


def interval_of(weight: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of attributions from bounds of values, each ``(n_target, n_features)``.

    Args:
        weight: Weights of distinct rows, ``(n_rows, n_features)``.
        lower, upper: ``(n_rows, n_target)``; infinite without a bound.
    """
    positive, negative = weight.clamp_min(0)[:, None], weight.clamp_max(0)[:, None]

    def total(of_positive: Tensor, of_negative: Tensor) -> Tensor:
        # A weight of 0 times an infinite bound counts as 0.
        terms = [
            torch.where(w == 0, 0.0, w * v[:, :, None])
            for w, v in ((positive, of_positive), (negative, of_negative))
        ]
        return torch.stack(terms).sum((0, 1))

    return total(lower, upper), total(upper, lower)
