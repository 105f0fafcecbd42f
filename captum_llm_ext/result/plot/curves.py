"""Perturbation curves: values while features are removed one after another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Unpack

import numpy.typing as npt

from captum_llm_ext.result.plot.arrays import Array, array, numbers, standard_errors
from captum_llm_ext.result.plot.axes import Canvas, CanvasArguments
from captum_llm_ext.result.plot.labels import label, text_style
from captum_llm_ext.result.plot.style import FAINT, LABEL_POINTS, LINES, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from captum_llm_ext.result.plot.axes import Drawing

_LONGEST = 40  # characters
_MOST_MARKS = 25  # markers of a line at most


def perturbation_curves(
    sizes: npt.ArrayLike,
    values: npt.ArrayLike,
    *,
    labels: Sequence[str],
    errors: npt.ArrayLike | None = None,
    dashed: npt.ArrayLike | None = None,
    dashed_errors: npt.ArrayLike | None = None,
    reference: npt.ArrayLike | None = None,
    reference_errors: npt.ArrayLike | None = None,
    what: str = "features removed",
    **canvas: Unpack[CanvasArguments],
) -> Drawing:
    """Draws values along orders of features, beside those along random orders.

    Args:
        sizes: Numbers of removed or added features, shape ``(n_points,)``.
        values: With the largest attributions first, shape ``(n_curves, n_points)``.
        labels: Names of the curves.
        errors: Standard errors of that shape, drawn as bands if known (not NaN).
        dashed: With the smallest attributions first, of that shape.
        dashed_errors: Standard errors of `dashed`.
        reference: The mean over random orders, shape ``(n_points,)``.
        reference_errors: Standard errors of `reference`.
        what: Label of the axis of sizes.
        **canvas: See `Canvas`.

    Raises:
        ValueError: If the shapes do not match.
    """
    x = numbers(sizes).reshape(-1)
    shape = (len(labels), len(x))
    solid = array("values", values, shape)
    paper = Canvas(**canvas)
    fig, ax = paper.open(8.0, 4.2)
    if reference is not None:
        line = array("reference", reference, (len(x),))
        _curve(
            ax, x, line, standard_errors("reference_errors", reference_errors, line), colour=FAINT
        )
        ax.plot([], [], color=FAINT, label="random order")
    for i, text in enumerate(labels):
        colour, marker = LINES[i % len(LINES)]
        spread = standard_errors("errors", errors, solid)[i]
        wider = (len(labels) - 1 - i) / max(len(labels) - 1, 1)
        curve = partial(_curve, ax, x, colour=colour, marker=marker, wider=wider)
        curve(solid[i], spread)
        ax.plot([], [], color=colour, marker=marker, markersize=4.5, label=label(text, _LONGEST))
        if dashed is not None:
            weakest = array("dashed", dashed, shape)
            curve(
                weakest[i], standard_errors("dashed_errors", dashed_errors, weakest)[i], style="--"
            )
    if dashed is not None:
        ax.plot([], [], color=MUTED, linestyle="--", label="smallest attribution first")
    _label(ax, what, labels)
    paper.label_values(ax, "Value")
    return paper.finish(fig, ax)


def _curve(
    ax: Axes,
    x: Array,
    y: Array,
    spread: Array,
    *,
    colour: str,
    style: str = "-",
    marker: str | None = None,
    wider: float = 0.0,
) -> None:
    ax.fill_between(x, y - spread, y + spread, color=colour, alpha=0.18, linewidth=0)
    every = max(1, -(-len(x) // _MOST_MARKS))
    # Later lines would hide equal ones below.
    ax.plot(
        x,
        y,
        style,
        color=colour,
        marker=marker,
        markersize=4.5 + 3.0 * wider,
        markevery=every,
        linewidth=1.5 + 2.0 * wider,
    )


def _label(ax: Axes, what: str, labels: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=LABEL_POINTS)
    ax.set_xlabel(what, size=LABEL_POINTS + 1)
    legend = ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in legend.get_texts():
        text.set(**text_style(labels))
