"""`FaithfulnessReport`: all metrics of several attributions, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from captum_llm_ext.base.finite import finite
from captum_llm_ext.evaluation.faithfulness.estimate import Estimate
from captum_llm_ext.evaluation.faithfulness.scores import Kind, Metric, PerturbationCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NORMALIZED = "normalized_"
_SHARE = "1 = all features"


@dataclass(frozen=True, eq=False)
class FaithfulnessReport:
    """Faithfulness metrics of several attributions of one target.

    All attributions were measured on the same draws, orders and coalitions, so that `difference`
    has smaller errors than each.

    Attributes:
        names: Names of the attributions.
        target: The explained text.
        features: Names of the features.
        absence: What replaced absent features.
        unit: Unit of values; None if unknown.
        full, empty: The value with all features, and with none.
        metrics: By name of the attribution and of the metric: ``"insertion_area"``,
            ``"removal_area"`` and ``"area_between"`` in the unit of the value, the same
            ``"normalized_…"`` (see `PerturbationCurve`), ``"comprehensiveness@k"``,
            ``"sufficiency@k"`` and ``"lds"``.
        curves: By name of the attribution and kind (``"removal"``, ``"insertion"``), features of
            the largest attribution first.
        n_draws: Draws of the baseline averaged in every value; 1 if not random.
        n_coalitions: Distinct coalitions scored under each draw.
        seed: Seed of all random choices.
    """

    names: list[str]
    target: str
    features: list[str]
    absence: str
    unit: str | None
    full: Estimate
    empty: Estimate
    metrics: Mapping[str, Mapping[str, Metric]]
    curves: Mapping[str, Mapping[Kind, PerturbationCurve]]
    n_draws: int
    n_coalitions: int
    seed: int

    def difference(self, first: str, second: str) -> dict[str, Estimate]:
        """By how much the first attribution is better than the second, in every metric.

        Args:
            first, second: Names of attributions.

        Returns:
            By metric, above 0 if the first is better, in the metric's unit. Common randomness, such
            as the baseline's draws, cancels in the standard errors.

        Raises:
            ValueError: If there is no such attribution.
        """
        for name in (first, second):
            if name not in self.metrics:
                raise ValueError(f"{name!r} was not measured: there are {', '.join(self.names)}.")
        found: dict[str, Estimate] = {}
        for name, one in self.metrics[first].items():
            difference = one.value - self.metrics[second][name].value
            found[name] = difference if one.higher_is_better else -difference
        return found

    def __repr__(self) -> str:
        draws = "" if self.n_draws == 1 else f", {self.n_draws} draws"
        return (
            f"FaithfulnessReport({', '.join(self.names)}: {self.target}, {len(self.features)} "
            f"features, absent: {self.absence}, {self.n_coalitions} coalitions{draws})"
        )

    def __str__(self) -> str:
        rows = [["", *self.names, "random order"]]
        for name in self._shown():
            own = [self.metrics[one][name] for one in self.names]
            arrow = "higher" if own[0].higher_is_better else "lower"
            unit = _SHARE if name.startswith(_NORMALIZED) else own[0].unit
            unit = f", {unit}" if unit else ""
            # The reference of the linear score is the attribution's own numbers, permuted.
            references = dict.fromkeys(str(metric.reference) for metric in own)
            what = name.removeprefix(_NORMALIZED)
            rows.append(
                [
                    f"{what} ({arrow} is better{unit})",
                    *(str(metric.value) for metric in own),
                    " / ".join(references),
                ]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        unit = f" {self.unit}" if self.unit else ""
        ends = f"all features: {self.full}{unit}; none: {self.empty}{unit}"
        return "\n".join([repr(self), *lines, ends])

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold; None for NaN."""
        return {
            "names": self.names,
            "target": self.target,
            "features": self.features,
            "absence": self.absence,
            "unit": self.unit,
            "full": _numbers(self.full),
            "empty": _numbers(self.empty),
            "metrics": {
                name: {metric.name: _metric(metric) for metric in metrics.values()}
                for name, metrics in self.metrics.items()
            },
            "curves": {
                name: {
                    kind: {
                        "sizes": curve.sizes.tolist(),
                        **_numbers(curve.values),
                        **_numbers(curve.reference, "reference", "reference_error"),
                    }
                    for kind, curve in curves.items()
                }
                for name, curves in self.curves.items()
            },
            "n_draws": self.n_draws,
            "n_coalitions": self.n_coalitions,
            "seed": self.seed,
        }

    def to_dataframe(self) -> Any:
        """The metrics as a table.

        Returns:
            A ``pandas.DataFrame`` with one row per attribution and metric, and the columns
            ``attribution``, ``metric``, ``value``, ``standard_error``, ``reference``,
            ``reference_error``, ``unit`` and ``higher_is_better``.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "`to_dataframe` needs pandas: pip install 'captum-llm-ext[pandas]'."
            ) from error
        rows = [
            {"attribution": name, "metric": metric.name}
            | {key: math.nan if value is None else value for key, value in _metric(metric).items()}
            | {"unit": metric.unit}
            for name in self.names
            for metric in self.metrics[name].values()
        ]
        return pd.DataFrame(rows)

    def plot(
        self, kind: Kind | Literal["both"] = "both", show: bool = False, *, ax: Axes | None = None
    ) -> tuple[Figure, Axes] | None:
        """Draws values while features are removed, beside those of random orders.

        Args:
            kind: ``"removal"``: features of the largest attribution are removed first, so that
                faithful curves fall early. ``"insertion"``: they are added first. ``"both"``:
                removal with the largest first (solid) and with the smallest first (dashed); the
                area between is `area_between`. (Smallest first is insertion, read from its end.)
                Bands are one standard error.
            show: Show the figure, and return None.
            ax: Axes to draw in; by default a new figure.

        Returns:
            ``(figure, axes)``, or None if shown.

        Raises:
            ValueError: If there is no such kind.
        """
        from captum_llm_ext.result import plot

        if kind not in ("removal", "insertion", "both"):
            raise ValueError(f"`kind` is {kind!r}: give 'removal', 'insertion' or 'both'.")
        main: Kind = "insertion" if kind == "insertion" else "removal"
        curve = self.curves[self.names[0]][main]
        values, errors = self._lines(main)
        dashed = dashed_errors = None
        if kind == "both":
            dashed, dashed_errors = (line.flip(1) for line in self._lines("insertion"))
        return plot.perturbation_curves(
            curve.sizes,
            values,
            errors=errors,
            dashed=dashed,
            dashed_errors=dashed_errors,
            reference=curve.reference.value,
            reference_errors=curve.reference.standard_error,
            labels=self.names,
            what="features removed" if main == "removal" else "features present",
            ax=ax,
            show=show,
            title=f"{self.target}  (absent: {self.absence})",
            unit=self.unit,
        )

    def _lines(self, kind: Kind) -> tuple[Tensor, Tensor]:
        """Values and standard errors of one kind of curve, ``(n_attributions, n_points)``."""
        lines = [self.curves[name][kind].values for name in self.names]
        return (
            torch.stack([line.value for line in lines]),
            torch.stack([line.standard_error for line in lines]),
        )

    def _shown(self) -> list[str]:
        """Metrics in the table: areas as shares if these have a meaning."""
        metrics = self.metrics[self.names[0]]
        has_shares = not math.isnan(float(metrics[f"{_NORMALIZED}insertion_area"]))
        areas = {f"{_NORMALIZED}{name}" for name in metrics} & set(metrics)
        shares = {name.removeprefix(_NORMALIZED) for name in areas}
        return [name for name in metrics if name not in (shares if has_shares else areas)]


def _metric(metric: Metric) -> dict[str, Any]:
    return {
        **_numbers(metric.value),
        **_numbers(metric.reference, "reference", "reference_error"),
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
    }


def _numbers(
    estimate: Estimate, value: str = "value", error: str = "standard_error"
) -> dict[str, Any]:
    return {
        value: finite(estimate.value.tolist()),
        error: finite(estimate.standard_error.tolist()),
    }
