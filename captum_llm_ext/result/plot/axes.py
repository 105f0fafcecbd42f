"""Figures, axes and their labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from captum_llm_ext.result.plot.arrays import Array
from captum_llm_ext.result.plot.labels import drawable, label, text_style
from captum_llm_ext.result.plot.style import LABEL_POINTS, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Drawing = tuple[Figure, Axes] | None

_LABEL_PITCH = 0.14  # inches between labels
_SHORTEST, _LONGEST = 8, 22  # limits of characters in column labels
_LETTER = 0.56  # width of a character including spacing, in font sizes
KEY_LINE = 1.35 * LABEL_POINTS  # points between lines of a key


class CanvasArguments(TypedDict, total=False):
    """The arguments that all plots share: those of `Canvas`."""

    ax: Axes | None
    show: bool
    title: str | None
    unit: str | None


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The axes of a plot, and what is written around it.

    Args:
        ax: Axes to draw into; by default a new figure of suitable size.
        show: Show the figure and return ``None``, as in captum; otherwise figure and axes are
            returned.
        title: Title above the plot.
        unit: Unit of the values.
    """

    ax: Axes | None = None
    show: bool = False
    title: str | None = None
    unit: str | None = None

    def open(self, width: float, height: float) -> tuple[Figure, Axes]:
        """The axes to draw into; a new figure's size in inches is limited to a readable range."""
        if self.ax is not None:
            return self.ax.figure, self.ax  # pyright: ignore[reportReturnType]
        import matplotlib.pyplot as plt

        size = (float(np.clip(width, 5.0, 16.0)), float(np.clip(height, 3.2, 14.0)))
        return plt.subplots(figsize=size, layout="constrained")

    def finish(self, fig: Figure, ax: Axes) -> Drawing:
        """Sets the title; shows the figure, or returns it."""
        if self.title is not None:
            title = "".join(map(drawable, self.title))  # it may quote a token
            heading = ax.set_title(title, loc="left", pad=10)
            heading.set(**text_style([title]) | {"size": LABEL_POINTS + 3})
        if not self.show:
            return fig, ax
        import matplotlib.pyplot as plt

        plt.show()
        return None

    def with_unit(self, what: str) -> str:
        """An axis label with its unit."""
        return f"{what} ({self.unit})" if self.unit else what

    def label_values(self, ax: Axes, what: str, *, has_errors: bool = True) -> None:
        """Labels the value axis."""
        settle(ax)
        more = self.with_unit("± standard error" if has_errors else "").strip()
        ax.set_ylabel(label_along(what, more, inches(ax)[1]), size=LABEL_POINTS + 1)


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the axes in inches, in the current layout."""
    fig = ax.get_figure(root=True)
    if fig is None:
        raise ValueError("`ax` belongs to no figure: pass axes made by `plt.subplots()`.")
    return ax.bbox.width / fig.dpi, ax.bbox.height / fig.dpi


def inches_per_unit(ax: Axes) -> tuple[float, float]:
    """Width and height of one cell in inches, in the current layout."""
    (width, height), (left, right), (low, high) = inches(ax), ax.get_xlim(), ax.get_ylim()
    return width / max(abs(right - left), 1.0), height / max(abs(high - low), 1.0)


def settle(ax: Axes) -> None:
    """Runs the figure's layout engine, if any, so that sizes are final."""
    fig = ax.get_figure(root=True)
    engine = None if fig is None else fig.get_layout_engine()
    if fig is not None and engine is not None:
        engine.execute(fig)


def label_columns(
    ax: Axes, places: Array, names: Sequence[str], wanted: Iterable[int] = ()
) -> None:
    """Labels above the columns; if not all fit, `wanted` come first."""
    cell = inches_per_unit(ax)[0] * 0.9
    kept = thinned(len(names), cell, wanted)
    # No longer than the axes are high: otherwise labels would leave no room for the plot.
    longest = int(inches(ax)[1] * 72 / (_LETTER * LABEL_POINTS))
    texts = [label(names[i], min(max(longest, _SHORTEST), _LONGEST)) for i in kept]
    steep = cell < 0.3
    ax.set_xticks(
        places[kept],
        labels=texts,
        rotation=90 if steep else 40,
        ha="center" if steep else "left",
        rotation_mode="default" if steep else "anchor",
        **text_style(texts),
    )
    ax.tick_params(axis="x", top=True, bottom=False, labeltop=True, labelbottom=False)
    ax.tick_params(axis="both", length=2.5, color=MUTED)


def label_rows(ax: Axes, names: Sequence[str], what: str = "explained token") -> None:
    """Labels left of the rows, as many as fit."""
    kept = thinned(len(names), inches_per_unit(ax)[1] * 0.9)
    texts = [label(names[i]) for i in kept]
    ax.set_yticks(kept, labels=texts, **text_style(texts))
    ax.set_ylabel(what, size=LABEL_POINTS + 1, color=MUTED)
    ax.spines[:].set_visible(False)
    ax.grid(False)


def label_along(what: str, more: str, length: float) -> str:
    """An axis label for this length in inches: on two lines if one is too long."""
    needed = _LETTER * (LABEL_POINTS + 1) / 72 * len(f"{what} {more}")
    return what if not more else f"{what}{' ' if needed <= length else chr(10)}{more}"


def key_lines(parts: Sequence[str], width: float) -> str:
    """The explanation of signs, wrapped to a width in points."""
    lines: list[str] = []
    for part in parts:
        longer = f"{lines[-1]}    {part}" if lines else part
        if lines and _LETTER * LABEL_POINTS * len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return "\n".join(lines)


def thinned(n: int, pitch: float, wanted: Iterable[int] = ()) -> list[int]:
    """Indices far enough apart that labels do not overlap: first `wanted`, then others."""
    step = max(1, math.ceil(_LABEL_PITCH / max(pitch, 1e-6)))
    kept: list[int] = []
    for i in (*wanted, *range(0, n, step)):
        if all(abs(i - j) >= step for j in kept):
            kept.append(i)
    return sorted(kept)


def headings(ax: Axes, parts: dict[str, tuple[float, int]]) -> None:
    """A ruled heading under each part of the columns."""
    across = ax.get_xaxis_transform()
    for name, (start, width) in parts.items():
        if width:
            ends = [start - 0.5, start + width - 0.5]
            ax.plot(ends, [-0.012] * 2, transform=across, color=MUTED, lw=1.0, clip_on=False)
            middle = (ends[0] + ends[1]) / 2
            if _LETTER * (LABEL_POINTS + 1) / 72 * len(name) > inches_per_unit(ax)[0] * width:
                name = name.replace(" ", "\n")  # otherwise it would overlap its neighbour
            heading = ax.text(middle, -0.02, name, transform=across, ha="center", va="top")
            heading.set(size=LABEL_POINTS + 1, color=MUTED)
