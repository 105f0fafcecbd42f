"""Perturbation curves and the linear datamodeling score, from values of coalitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from captum_llm_ext.evaluation.faithfulness.estimate import Estimate, average
from captum_llm_ext.evaluation.rank_correlation import spearman

Kind = Literal["removal", "insertion"]
# Full minus empty, relative to the larger of them, below which it is float32 rounding.
_ROUNDING = 1e-6
_Z_95 = 1.96  # standard errors: 95 % of a normal distribution
# Their mean misses the expectation by a tenth of the standard deviation, without scoring
# coalitions. Chosen by that.
_N_SHUFFLES = 100
# Numbers in a jackknife over coalitions, to limit memory; chosen, not measured.
_MAX_JACKKNIFE_NUMBERS = 2**22


@dataclass(frozen=True, eq=False)
class Metric:
    """One metric of an attribution, beside that of a random order of the features.

    Attributes:
        name: Such as ``"insertion_area"``, ``"comprehensiveness@3"`` or ``"lds"``.
        value: Value of the attribution.
        reference: The mean over random orders of the features (for ``"lds"``: over random
            permutations of its attributions).
        unit: Unit of both; None for dimensionless numbers.
        higher_is_better: Whether higher values are better; otherwise lower ones.
    """

    name: str
    value: Estimate
    reference: Estimate
    unit: str | None
    higher_is_better: bool

    @property
    def gain(self) -> Estimate:
        """How much better than a random order: above 0 is better for every metric."""
        difference = self.value - self.reference
        return difference if self.higher_is_better else -difference

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.name} {self.value}{unit} (random order: {self.reference})"


@dataclass(frozen=True, eq=False)
class PerturbationCurve:
    """Values while features are removed, or added, one after another.

    Attributes:
        kind: ``"removal"`` starts with all features, ``"insertion"`` with none.
        first: Whether features of the largest or of the smallest attribution come first.
        sizes: Increasing numbers of removed or added features, from 0 to all, ``(n_points,)``.
        values: Shape ``(n_points,)``.
        reference: The same, averaged over random orders.
        unit: Unit of the values.
    """

    kind: Kind
    first: Literal["strongest", "weakest"]
    sizes: Tensor
    values: Estimate
    reference: Estimate
    unit: str | None = None

    @property
    def area(self) -> Metric:
        """Mean height above the empty coalition, in the unit of the value."""
        return self._metric(f"{self.kind}_area", self.unit, self._height, self._rises)

    @property
    def normalized_area(self) -> Metric:
        """`area` divided by full minus empty.

        1 for a curve at the value of all features throughout, 0 at that of none. NaN unless full
        exceeds empty significantly (1.96 standard errors): otherwise features do not raise the
        value together, and shares have no meaning.
        """
        span = self.values.map(lambda path: self._full(path) - self._empty(path))
        least = _ROUNDING * float(self.values.value[[0, -1]].abs().max())
        error = float(span.standard_error.nan_to_num())
        has_meaning = float(span) > max(least, _Z_95 * error)

        def share(path: Tensor) -> Tensor:
            if not has_meaning:
                return torch.full_like(path[:, 0], torch.nan)
            return self._height(path) / (self._full(path) - self._empty(path))

        return self._metric(f"normalized_{self.kind}_area", None, share, self._rises)

    def lost_at(self, k: int) -> Metric:
        """Value of all features minus that after k were removed, or added.

        Comprehensiveness and sufficiency of DeYoung et al. 2020 (ERASER, arXiv 1911.03429, sec.
        4.3), for any value instead of a probability.

        Raises:
            ValueError: If k is not in `sizes`.
        """
        found = (self.sizes == k).nonzero()
        if not len(found):
            raise ValueError(
                f"the curve is not known at {k} features: give one of {self.sizes.tolist()}."
            )
        place = int(found[0, 0])
        name = "comprehensiveness" if self.kind == "removal" else "sufficiency"

        def lost(path: Tensor) -> Tensor:
            return self._full(path) - path[:, place]

        return self._metric(f"{name}@{k}", self.unit, lost, not self._rises)

    @property
    def _rises(self) -> bool:
        """Whether higher curves are better."""
        return (self.kind == "insertion") == (self.first == "strongest")

    def _empty(self, path: Tensor) -> Tensor:
        return path[:, 0 if self.kind == "insertion" else -1]

    def _full(self, path: Tensor) -> Tensor:
        return path[:, -1 if self.kind == "insertion" else 0]

    def _height(self, path: Tensor) -> Tensor:
        share = self.sizes.double() / int(self.sizes[-1])
        return torch.trapezoid(path - self._empty(path)[:, None], share)

    def _metric(
        self,
        name: str,
        unit: str | None,
        of_path: Callable[[Tensor], Tensor],
        higher_is_better: bool,
    ) -> Metric:
        return Metric(
            name, self.values.map(of_path), self.reference.map(of_path), unit, higher_is_better
        )


# Curves ------------------------------------------------------------------------------------------


class PerturbationPaths:
    """Coalitions along the order of each attribution, and along random orders.

    Removing the weakest leaves the same coalition as adding the strongest, and a reversed random
    order is random as well. So two paths give all curves of an attribution, and one path per random
    order gives the reference of all of them.

    Args:
        attributions: By name, float64 ``(n,)``.
        k: Sizes at which the curves must be known.
        max_steps: Maximum number of steps from none to all, besides those at `k`.
        n_orders: Number of random orders.
        generator: Source of all random choices.

    Attributes:
        masks: Bool ``(n_coalitions, n)``.
    """

    def __init__(
        self,
        attributions: Mapping[str, Tensor],
        *,
        k: Sequence[int],
        max_steps: int,
        n_orders: int,
        generator: torch.Generator,
    ) -> None:
        self._names, self._n_orders = list(attributions), n_orders
        n = len(next(iter(attributions.values())))
        self._sizes = _sizes(n, k, max_steps)
        ties = torch.randperm(n, generator=generator, device="cpu")
        orders: list[Tensor] = []
        for attr in attributions.values():
            order = strongest_first(attr, ties)
            orders += [order, order.flip(0)]
        orders += [torch.randperm(n, generator=generator, device="cpu") for _ in range(n_orders)]
        self.masks = torch.cat([self._along(order) for order in orders])

    def read(
        self, coalition_values: Estimate, unit: str | None, first: Literal["strongest", "weakest"]
    ) -> dict[str, dict[Kind, PerturbationCurve]]:
        """The curves of every attribution.

        Args:
            coalition_values: Values of `masks`.
            unit: Unit of the values.
            first: Which features are removed, or added, first.
        """
        paths = coalition_values.map(lambda rows: rows.view(len(rows), -1, len(self._sizes)))
        random = self._reference(paths[2 * len(self._names) :])
        found: dict[str, dict[Kind, PerturbationCurve]] = {}
        for i, name in enumerate(self._names):
            own = paths[2 * i], paths[2 * i + 1]
            added, others = own if first == "strongest" else own[::-1]
            of_kind: dict[Kind, tuple[Estimate, Estimate]] = {
                "removal": (_reversed(others), _reversed(random)),
                "insertion": (added, random),
            }
            sizes = torch.tensor(self._sizes, dtype=torch.int64, device="cpu")
            found[name] = {
                kind: PerturbationCurve(kind, first, sizes, *values, unit)
                for kind, values in of_kind.items()
            }
        return found

    def _along(self, order: Tensor) -> Tensor:
        """The leading features of an order: bool ``(n_points, n)``."""
        place = order.argsort()
        return place < torch.tensor(self._sizes, dtype=torch.int64, device="cpu")[:, None]

    def _reference(self, paths: Estimate) -> Estimate:
        """The mean over orders of ``(n_orders, n_points)``, with the orders' own jackknife."""
        mean = paths.map(lambda rows: rows.mean(1))
        return Estimate(mean.value, {**mean.left_out, "orders": average(paths.value)[1]})


def strongest_first(attributions: Tensor, ties: Tensor) -> Tensor:
    """Features in order of decreasing attribution, negative ones last.

    By signed value: removing positive ones first makes the value fall. By magnitude, positive and
    negative ones would cancel along the curve.

    Args:
        attributions: Shape ``(n,)``, signed.
        ties: An order of the features that breaks ties. It should be random: in reading order,
            zeros would be judged by their position.
    """
    return ties[attributions[ties].argsort(descending=True, stable=True)]


def _sizes(n: int, k: Sequence[int], max_steps: int) -> list[int]:
    """From 0 to n; with every size also n minus it, so that paths can be read from both ends."""
    steps = min(n, max_steps)
    chosen = {round(i * n / steps) for i in range(steps + 1)} | {*k}
    return sorted(chosen | {n - size for size in chosen})


def _reversed(path: Estimate) -> Estimate:
    return path.map(lambda rows: rows.flip(1))


# Linear datamodeling score -----------------------------------------------------------------------


class RandomCoalitions:
    """Random coalitions whose values additive attributions should predict.

    Each feature is present with probability `share`, as in ContextCite (Cohen-Wang et al. 2024,
    arXiv 2409.00729, sec. 3); all coalitions if these are no more than requested and equally
    likely.

    Args:
        n: Number of features.
        n_coalitions: Number of coalitions.
        share: Probability that a feature is present.
        generator: Source of all random choices.

    Attributes:
        masks: Bool ``(n_coalitions, n)``.
    """

    def __init__(self, n: int, n_coalitions: int, share: float, generator: torch.Generator) -> None:
        self._are_all = share == 0.5 and 2**n <= n_coalitions
        self._generator = generator
        if self._are_all:
            self.masks = (
                torch.arange(2**n, device="cpu")[:, None] >> torch.arange(n, device="cpu") & 1
            ).bool()
        else:
            self.masks = (
                torch.rand(n_coalitions, n, generator=generator, dtype=torch.float32, device="cpu")
                < share
            )

    def read(
        self, coalition_values: Estimate, attributions: Mapping[str, Tensor]
    ) -> dict[str, Metric]:
        """The score of every attribution.

        Args:
            coalition_values: Values of `masks`.
            attributions: By name, float64 ``(n,)``.
        """
        n = self.masks.shape[1]
        shuffles = torch.stack(
            [torch.randperm(n, generator=self._generator, device="cpu") for _ in range(_N_SHUFFLES)]
        )
        return {
            name: self._metric(coalition_values, attr, shuffles)
            for name, attr in attributions.items()
        }

    def _metric(self, coalition_values: Estimate, attr: Tensor, shuffles: Tensor) -> Metric:
        present = self.masks.double()
        value = coalition_values.map(lambda rows: spearman(present @ attr, rows))
        if not self._are_all:
            one_less = _left_out_correlations(present @ attr, coalition_values.value)
            value = Estimate(value.value, {**value.left_out, "coalitions": one_less})
        sums = attr[shuffles] @ present.T
        each = coalition_values.map(lambda rows: spearman(sums, rows[:, None]))  # per shuffle
        reference = each.map(lambda rows: rows.mean(1))
        reference = Estimate(
            reference.value, {**reference.left_out, "orders": average(each.value)[1]}
        )
        return Metric("lds", value, reference, None, True)


def _left_out_correlations(x: Tensor, y: Tensor) -> Tensor:
    """The correlation without each of the coalitions, shape ``(n_coalitions,)``."""
    n = len(x)
    places = torch.arange(n, device="cpu")
    found: list[Tensor] = []
    for part in places.split(max(1, _MAX_JACKKNIFE_NUMBERS // n)):
        others = places.expand(len(part), n)[places != part[:, None]].view(len(part), n - 1)
        found.append(spearman(x[others], y[others]))
    return torch.cat(found)
