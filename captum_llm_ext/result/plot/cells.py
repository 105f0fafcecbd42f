"""Coloured cells, and the signs and numbers in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from captum_llm_ext.result.plot.arrays import Array
from captum_llm_ext.result.plot.axes import inches_per_unit, settle
from captum_llm_ext.result.plot.labels import text_style
from captum_llm_ext.result.plot.style import (
    DARK,
    FAINT,
    LABEL_POINTS,
    MUTED,
    SIGN_FROM,
    SIZES,
    UNKNOWN,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_CHAR = 0.063  # inches per character of a number in a cell, including spacing
_NUMBER_HEIGHT = 0.17  # inches per line of numbers


def hatch_closed(ax: Axes, open_columns: npt.NDArray[np.intp], start: float, n_output: int) -> None:
    """Hatches each row from its first closed column on, as one staircase."""
    from matplotlib.patches import Polygon

    right = start + n_output - 0.5
    steps = [
        (start + count - 0.5, row + edge)
        for row, count in enumerate(open_columns)
        for edge in (-0.5, 0.5)
    ]
    if steps and n_output:
        corners = [*steps, (right, steps[-1][1]), (right, -0.5)]
        ax.add_patch(
            Polygon(corners, facecolor="#f3f3f3", edgecolor="#d5d5d5", hatch="////", linewidth=0)
        )


def images(
    ax: Axes,
    colours: Colours,
    parts: Sequence[tuple[float, Array]],
    shades: Sequence[Array] | None = None,
) -> bool:
    """Draws each part from its column on, on one scale; returns whether there was any."""
    drawn = False
    for i, (left, values) in enumerate(parts):
        if values.size:
            drawn = True
            ax.imshow(
                values,
                alpha=None if shades is None else shades[i],  # pyright: ignore[reportArgumentType]
                cmap=colours.cmap,
                vmin=colours.low,
                vmax=colours.scale,
                aspect="auto",
                interpolation="nearest",
                extent=(left - 0.5, left + values.shape[1] - 0.5, len(values) - 0.5, -0.5),
            )
    return drawn


def colour_bar(fig: Figure, ax: Axes, colours: Colours, *, below: float | None = None) -> Colorbar:
    """The colour bar, beside the axes, or below them at this share of their width."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    # Not made from an image, which may be shaded.
    shown = ScalarMappable(Normalize(colours.low, colours.scale), colours.cmap)
    look: dict[str, Any] = {}
    if below is not None:
        look = {"location": "bottom", "shrink": 0.35, "anchor": (below, 0.0)}
    bar = fig.colorbar(shown, ax=ax, fraction=0.05, pad=0.02, aspect=30, **look)
    bar.ax.tick_params(labelsize=LABEL_POINTS)
    bar.ax.spines[:].set_visible(False)
    return bar


def mark_cells(
    ax: Axes,
    places: Array,
    cells: Array,
    shown: npt.NDArray[np.bool_],
    colours: Colours | Sequence[Colours],
    shade: Array | None = None,
) -> bool:
    """Writes numbers if all fit, otherwise minus signs: colour alone does not show the sign.

    Args:
        ax: The axes.
        places: Centre of each column.
        cells: Shape ``(n_rows, n_columns)``.
        shown: Which cells are drawn.
        colours: Colour scale of all cells, or one per column.
        shade: Opacity of the cells.

    Returns:
        Whether the cells hold numbers.
    """
    faint = np.zeros(cells.shape, dtype=bool) if shade is None else shade < 1
    each = [colours] * len(places) if isinstance(colours, Colours) else list(colours)
    scales = np.array([own.scale for own in each])
    needed = _CHAR * (max((len(_number(-own.scale, own)) for own in each), default=0) + 0.4)
    if inches_per_unit(ax)[0] > 0.5 * needed:  # otherwise no layout would make them fit
        settle(ax)
    width, height = inches_per_unit(ax)
    fits = width >= needed and height >= _NUMBER_HEIGHT
    if fits and bool(((scales >= 1e-3) & (scales < 1e4)).all()):
        for row, column in np.argwhere(shown).tolist():
            value, is_faint = float(cells[row, column]), bool(faint[row, column])
            ink = FAINT if is_faint else each[column].ink(value)
            _write_cell(ax, places[column], row, _number(value, each[column]), ink)
        return True
    rows, columns = np.nonzero((cells < -SIGN_FROM * scales) & shown)
    inks = [
        FAINT if faint[row, column] else each[column].ink(float(cells[row, column]))
        for row, column in zip(rows, columns, strict=True)
    ]
    points = max(72 * 0.5 * min(width, height, 0.16), 1.2)
    ax.scatter(
        places[columns], rows, s=points**2, c=inks, marker="_", linewidths=max(0.15 * points, 0.4)
    )
    return False


def _write_cell(ax: Axes, x: float, y: float, text: str, ink: str) -> None:
    if not text.strip("0."):
        return  # zeros everywhere carry no information
    number = ax.text(x, y, text, ha="center", va="center", size=LABEL_POINTS - 1, color=ink)
    number.set_in_layout(False)  # within its cell anyway, and measuring hundreds is slow


def frame(ax: Axes, cells: Sequence[tuple[float, float]]) -> None:
    """A frame around each of the cells (x, y)."""
    from matplotlib.patches import Rectangle

    for x, y in cells:
        corner = (x - 0.5, y - 0.5)
        ax.add_patch(
            Rectangle(corner, 1, 1, fill=False, edgecolor=DARK, linewidth=1.6, clip_on=False)
        )


def write_marks(ax: Axes, x: float, y: float, text: str) -> None:
    """Muted text in place of a cell."""
    if text:
        mark = ax.text(x, y, text, ha="center", va="center", color=MUTED, **text_style([text]))
        mark.set_in_layout(False)


def mark_columns(ax: Axes, places: Array, row: float) -> None:
    """A line below each of the columns."""
    ax.vlines(places, row - 0.3, row + 0.3, color=MUTED, linewidth=0.8)


class Colours:
    """A diverging colour map centred at zero, and the text colour that is readable on it.

    For unsigned values, a map that begins at zero.
    """

    def __init__(
        self, cmap: str | Colormap | None, scale: float, *, is_unsigned: bool = False
    ) -> None:
        import matplotlib

        cmap = cmap or (SIZES if is_unsigned else "RdBu")
        self.is_unsigned, self.low = is_unsigned, 0.0 if is_unsigned else -scale
        self.cmap = matplotlib.colormaps.get_cmap(cmap).with_extremes(bad=UNKNOWN)
        self.scale = scale

    def rgba(self, value: float) -> tuple[float, float, float, float]:
        """The colour of a value; grey if unknown."""
        return self.cmap(float("nan") if math.isnan(value) else self._part(value))

    def _part(self, value: float) -> float:
        """The position of a value in the map, from 0 to 1."""
        return (value - self.low) / (self.scale - self.low)

    def ink(self, value: float) -> str:
        """Dark or white, whichever is more readable on the cell of this value."""
        if math.isnan(value):
            return MUTED
        red, green, blue, _ = self.rgba(value)
        return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else DARK


def _number(value: float, colours: Colours) -> str:
    """A signed number, with as many decimals as give the largest value two or three digits."""
    if math.isnan(value):
        return "?"
    scale = colours.scale
    decimals = max(int(scale < 100), 1 - math.floor(math.log10(scale)))
    text = f"{value:+.{decimals}f}"
    unsigned = text[1:]
    return unsigned if float(unsigned) == 0 or colours.is_unsigned else text.replace("-", "−")
