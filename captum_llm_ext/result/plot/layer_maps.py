"""Effects of patched cells on one token: layers over positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np
import numpy.typing as npt

from captum_llm_ext.result.plot.arrays import array, notable, scale
from captum_llm_ext.result.plot.axes import (
    Canvas,
    CanvasArguments,
    inches,
    key_lines,
    label_along,
    label_columns,
    label_rows,
    settle,
)
from captum_llm_ext.result.plot.cells import Colours, colour_bar, images, mark_cells
from captum_llm_ext.result.plot.labels import text_style
from captum_llm_ext.result.plot.style import DARK, LABEL_POINTS, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from captum_llm_ext.result.plot.axes import Drawing


def patching_map(
    effects: npt.ArrayLike,
    *,
    place_names: Sequence[str],
    replaced: Sequence[int],
    saying: Sequence[int],
    what: str,
    cmap: str | Colormap | None = None,
    **canvas: Unpack[CanvasArguments],
) -> Drawing:
    """Draws the effects of patched cells on one token.

    One row per stream, the one that enters the first layer at the bottom; one column per position.
    Numbers and minus signs as in `heat_map`; cells that were not patched are grey.

    Args:
        effects: Shape ``(n_layers + 1, n_places)``.
        place_names: The text at each position.
        replaced: Columns of the replaced feature.
        saying: The column that predicts the token.
        what: The meaning of an effect: value restored, or lost.
        cmap: A diverging colour map, centred at zero, by default ``"RdBu"``.
        **canvas: See `Canvas`.

    Raises:
        ValueError: If names and effects do not match in number.
    """
    cells = array("effects", effects, (len(np.asarray(effects)), len(place_names)))[::-1]
    n_streams, n_places = cells.shape

    paper = Canvas(**canvas)
    fig, ax = paper.open(2.8 + 0.46 * n_places, 2.2 + 0.3 * n_streams)
    colours = Colours(cmap, scale(np.nan_to_num(cells)))
    drawn = images(ax, colours, [(0.0, cells)])
    bar = colour_bar(fig, ax, colours) if drawn else None
    ax.set_xlim(-0.5, max(n_places, 1) - 0.5)
    ax.set_ylim(n_streams - 0.5, -0.5)
    ax.set_autoscale_on(False)
    places = np.arange(float(n_places))
    label_columns(ax, places, place_names, (*replaced, *saying, *notable(np.nan_to_num(cells))))
    label_rows(ax, [str(layer) for layer in reversed(range(n_streams))], "layers passed")
    _mark(ax, replaced, n_streams, "solid")
    _mark(ax, saying, n_streams, "dashed")
    numbered = mark_cells(ax, places, cells, ~np.isnan(cells), colours)
    if bar is not None:
        settle(ax)
        text = label_along(what, paper.with_unit("the gain"), inches(ax)[1])
        bar.set_label(text, size=LABEL_POINTS + 1)
    parts = ["▬ replaced", "╍ says the token"]
    parts += ["− lowers"] * (not numbered) + ["grey: not patched"] * bool(np.isnan(cells).any())
    key = key_lines(parts, inches(ax)[0] * 72)
    ax.set_xlabel(key, color=MUTED, labelpad=10, **text_style([key]))
    return paper.finish(fig, ax)


def _mark(ax: Axes, columns: Sequence[int], n_rows: int, style: str) -> None:
    """A line below columns."""
    below = n_rows - 0.5
    for column in columns:
        ax.plot(
            [column - 0.42, column + 0.42],
            [below, below],
            color=DARK,
            linewidth=3.0,
            linestyle=(0, (1.2, 0.8)) if style == "dashed" else "solid",
            solid_capstyle="butt",
            dash_capstyle="butt",
            clip_on=False,
            zorder=3,
        )
