"""Bars of one number per feature, and convergence plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt

from captum_llm_ext.result.plot.arrays import Array, array, notable, numbers, standard_errors
from captum_llm_ext.result.plot.axes import Canvas, CanvasArguments, inches, label_columns, settle
from captum_llm_ext.result.plot.labels import label, text_style
from captum_llm_ext.result.plot.style import LABEL_POINTS, LINES, MUTED, PALE, SIZES, SURE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from captum_llm_ext.result.plot.axes import Drawing


_LABEL_PITCH = 0.15  # inches
_LONGEST = 40  # characters


def bars(
    seq_attr: npt.ArrayLike,
    *,
    labels: Sequence[str],
    errors: npt.ArrayLike | None = None,
    sure: float = SURE,
    cmap: str | Colormap | None = None,
    is_unsigned: bool = False,
    **canvas: Unpack[CanvasArguments],
) -> Drawing:
    """Draws the attribution of the whole answer to each feature.

    Args:
        seq_attr: Attributions, shape ``(n_features,)``; NaN is drawn as a question mark.
        labels: Text of the features.
        errors: Standard errors, shape ``(n_features,)``, drawn as whiskers of one standard error
            where known (not NaN). A bar within `sure` of them, or of unknown error, is pale.
        sure: Number of standard errors beyond which a value is significant.
        cmap: A colour map whose ends colour the bars. By default ``"RdBu"``, or ``"Purples"`` if
            unsigned.
        is_unsigned: Whether attributions are magnitudes without a sign.
        **canvas: See `Canvas`.

    Raises:
        ValueError: If labels, values and errors do not match in number, or an error is negative.
    """
    values = array("seq_attr", seq_attr, (len(labels),))
    spread = standard_errors("errors", errors, values)
    if (spread < 0).any():
        raise ValueError(
            f"`errors` holds {float(np.nanmin(spread)):g}: standard errors cannot be negative; "
            "give NaN where one is unknown."
        )
    paper = Canvas(**canvas)
    fig, ax = paper.open(1.8 + 0.42 * len(values), 4.2)
    places = np.arange(len(values), dtype=np.float64)
    down, up = _ends(cmap or (SIZES if is_unsigned else "RdBu"))
    drawn = ax.bar(
        places,
        np.nan_to_num(values),
        width=0.8,
        color=[up if value > 0 else down for value in values],
    )
    is_sure = np.abs(values) >= sure * (0.0 if errors is None else spread)
    for bar, pale in zip(drawn, ~is_sure & ~np.isnan(values), strict=True):
        bar.set_alpha(PALE if pale else 1.0)
    known = np.isfinite(values) & np.isfinite(spread)
    _whiskers(
        ax, places[known], values[known], spread[known], cap=min(3.0, 90.0 / max(len(values), 1))
    )
    for place in places[np.isnan(values)]:
        ax.text(place, 0.0, "?", ha="center", va="bottom", size=LABEL_POINTS, color=MUTED)
    ax.axhline(0.0, color="#3a3a3a", linewidth=0.8)
    ax.set_xlim(-0.7, len(values) - 0.3)
    ax.margins(y=0.08)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", labelsize=LABEL_POINTS)
    label_columns(ax, places, labels, notable(values))
    ax.tick_params(axis="x", length=0)
    paper.label_values(ax, "Sequence attribution", has_errors=bool(known.any()))
    return paper.finish(fig, ax)


def convergence(
    n_coalitions: npt.ArrayLike,
    attributions: npt.ArrayLike,
    *,
    labels: Sequence[str],
    errors: npt.ArrayLike | None = None,
    **canvas: Unpack[CanvasArguments],
) -> Drawing:
    """Draws how estimates converge as coalitions are added.

    Args:
        n_coalitions: Increasing numbers of coalitions of the estimates, shape ``(n_estimates,)``.
        attributions: Shape ``(n_estimates, n_causes)``.
        labels: Names of the causes, written beside their last estimates.
        errors: Standard errors of the shape of `attributions`, drawn as bands of one standard error
            if known (not NaN).
        **canvas: See `Canvas`.

    Raises:
        ValueError: If the shapes do not match.
    """
    counts = numbers(n_coalitions).reshape(-1)
    values = array("attributions", attributions, (len(counts), len(labels)))
    spread = standard_errors("errors", errors, values)
    paper = Canvas(**canvas)
    fig, ax = paper.open(8.0, 4.2)
    ax.axhline(0.0, color="#3a3a3a", linewidth=0.8)
    for i, (line, error) in enumerate(zip(values.T, spread.T, strict=True)):
        colour, marker = LINES[i % len(LINES)]
        ax.axhline(line[-1], color=colour, lw=0.8, ls=":", zorder=0.5)
        ax.fill_between(counts, line - error, line + error, color=colour, alpha=0.18, linewidth=0)
        ax.plot(counts, line, color=colour, marker=marker, markersize=4.5, lw=1.5)
    _log_counts(ax, counts)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=LABEL_POINTS)
    ax.set_xlabel("coalitions", size=LABEL_POINTS + 1)
    paper.label_values(ax, "Attribution", has_errors=bool(np.isfinite(spread).any()))
    if values.size:
        _label_ends(ax, values[-1], labels)
    return paper.finish(fig, ax)


def _log_counts(ax: Axes, counts: Array) -> None:
    """A logarithmic axis of the numbers of coalitions."""
    from matplotlib.ticker import NullLocator

    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    kept = [*range(len(counts) - 1, -1, -2)][::-1]  # always the last one
    ax.set_xticks(counts[kept], labels=[f"{count:,.0f}" for count in counts[kept]])


def _label_ends(ax: Axes, ends: Array, labels: Sequence[str]) -> None:
    """Names on the right, at the height of the last estimates as far as there is room."""
    texts = [label(text, _LONGEST) for text in labels]
    settle(ax)
    low, high = ax.get_ylim()
    pitch = _LABEL_PITCH * (high - low) / inches(ax)[1]
    for (i, text), y in zip(
        sorted(enumerate(texts), key=lambda pair: ends[pair[0]]),
        _moved_apart(np.sort(ends), pitch),
        strict=True,
    ):
        across, colour = ax.get_yaxis_transform(), LINES[i % len(LINES)][0]
        lead = ax.plot([1.0, 1.02], [ends[i], y], transform=across, color=colour, lw=0.8)
        lead[0].set(clip_on=False, linestyle=":")
        written = ax.text(1.027, y, text, transform=across, va="center", color=colour)
        written.set(**text_style([text]))


def _moved_apart(places: Array, pitch: float) -> Array:
    """The nearest positions that are at least `pitch` apart, in the same, increasing order."""
    # Solved as isotonic regression on distances beyond the pitch.
    blocks: list[tuple[float, int]] = []
    for place in places - pitch * np.arange(len(places)):
        blocks.append((float(place), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    pooled = [value for value, n in blocks for _ in range(n)]
    return np.array(pooled, dtype=np.float64) + pitch * np.arange(len(places))


def _ends(cmap: str | Colormap) -> tuple[Any, Any]:
    import matplotlib

    colours = matplotlib.colormaps.get_cmap(cmap)
    return colours(0.1), colours(0.9)


def _whiskers(ax: Axes, x: Array, y: Array, spread: Array, cap: float) -> None:
    if x.size:
        style = {"ecolor": "#3a3a3a", "elinewidth": 1.0, "capsize": cap}
        ax.errorbar(x, y, yerr=spread, fmt="none", **style)  # pyright: ignore[reportArgumentType]
