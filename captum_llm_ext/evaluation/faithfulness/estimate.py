"""`Estimate`: numbers with jackknife standard errors over several sources of randomness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.base.amounts import plus_minus


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number, or several, with the standard error.

    Jackknife standard errors (Efron and Stein 1981), for each source of randomness separately:
    draws of a random baseline, random orders, random coalitions. Variances of several sources are
    added. Estimates from the same draws are compared by their difference, whose error includes
    their covariance.

    Attributes:
        value: float64, of any shape.
        left_out: Per source the value without each of its units, shape ``(n_units, *shape)``; empty
            if nothing is random.
    """

    value: Tensor
    left_out: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def standard_error(self) -> Tensor:
        """Standard error of the shape of `value`: 0 if exact, NaN from a single unit."""
        variance = torch.zeros_like(self.value)
        for values in self.left_out.values():
            n = len(values)
            spread = (values - values.mean(0)).square().sum(0)
            variance = variance + (spread * (n - 1) / n if n > 1 else spread * torch.nan)
        return variance.sqrt()

    def map(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """The estimate of a function of the value.

        Args:
            function: From ``(n, *shape)`` to ``(n, *other_shape)``, for each of the n separately.
        """
        left_out = {source: function(values) for source, values in self.left_out.items()}
        return Estimate(function(self.value[None])[0], left_out)

    def __getitem__(self, index: Any) -> Estimate:
        return self.map(lambda values: values[:, index])

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference; units of a common source are left out on both sides at once."""
        left_out = {
            source: self._without(source) - other._without(source)
            for source in dict.fromkeys([*self.left_out, *other.left_out])
        }
        return Estimate(self.value - other.value, left_out)

    def __neg__(self) -> Estimate:
        return self.map(torch.neg)

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        if self.value.dim():
            return repr(self)
        value = round(float(self.value), 2) + 0.0  # avoids -0.00
        return f"{value:.2f}{plus_minus(float(self.standard_error))}"

    def _without(self, source: str) -> Tensor:
        return self.left_out.get(source, self.value[None])


def average(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the units of a source, and the means without each of them.

    Args:
        values: Shape ``(n_units, *shape)``.

    Returns:
        Shapes ``(*shape)`` and ``(n_units, *shape)``; for a single unit the mean itself, twice.
    """
    mean, n = values.mean(0), len(values)
    return mean, values if n < 2 else mean + (mean - values) / (n - 1)
