"""Attention weights of all heads of all layers at one position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np
import numpy.typing as npt

from captum_llm_ext.result.plot.arrays import array, notable, numbers, scale
from captum_llm_ext.result.plot.axes import (
    Canvas,
    CanvasArguments,
    headings,
    inches_per_unit,
    label_columns,
    thinned,
)
from captum_llm_ext.result.plot.cells import Colours, colour_bar, images
from captum_llm_ext.result.plot.labels import text_style
from captum_llm_ext.result.plot.style import FAINT, LABEL_POINTS, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from captum_llm_ext.result.plot.axes import Drawing

_GAP = 0.6  # columns
_FIXED = "Greys"  # on a separate scale, since it takes most of the weight in many heads
_HIGHEST = 9.0  # maximum height of all rows in inches


def head_map(
    weights: npt.ArrayLike,
    fixed: npt.ArrayLike,
    *,
    labels: Sequence[str],
    n_prompt: int,
    cmap: str | Colormap | None = None,
    **canvas: Unpack[CanvasArguments],
) -> Drawing:
    """Draws the attention weights of one token, a row per head, grouped by layer.

    Fixed text is the first column, in grey from 0 to 1; the features have a scale of their own.

    Args:
        weights: Shape ``(n_layers, n_heads, n_features)``; NaN if a layer has no such head.
        fixed: Shape ``(n_layers, n_heads)``.
        labels: Text of the features.
        n_prompt: Number of prompt features, which come first.
        cmap: A sequential colour map, by default ``"Purples"``.
        **canvas: See `Canvas`.

    Raises:
        ValueError: If labels and arrays do not match in number.
    """
    given = numbers(weights)
    n_layers, n_heads = given.shape[:2]
    cells = array("weights", given, (n_layers, n_heads, len(labels)))
    cells = cells.reshape(n_layers * n_heads, len(labels))
    held = array("fixed", fixed, (n_layers, n_heads)).reshape(-1, 1)
    n_output = len(labels) - n_prompt
    # Fixed text, a gap, the prompt, a gap, earlier output.
    prompt_at = 1 + _GAP
    output_at = prompt_at + n_prompt + (_GAP if n_output else 0)
    columns = [prompt_at + np.arange(float(n_prompt)), output_at + np.arange(float(n_output))]
    places = np.concatenate(columns).astype(np.float64)

    paper = Canvas(**canvas)
    height = min(_HIGHEST, 0.16 * len(cells))
    fig, ax = paper.open(2.4 + 0.4 * (output_at + n_output), 1.9 + height)
    ax.imshow(
        held,
        cmap=_FIXED,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, 0.5, len(held) - 0.5, -0.5),
    )
    colours = Colours(cmap, scale(cells), is_unsigned=True)
    parts = [(prompt_at, cells[:, :n_prompt]), (output_at, cells[:, n_prompt:])]
    bar = colour_bar(fig, ax, colours) if images(ax, colours, parts) else None
    ax.set_xlim(-0.5, output_at + n_output - 0.5)
    ax.set_ylim(max(len(cells), 1) - 0.5, -0.5)
    ax.set_autoscale_on(False)
    headings(
        ax,
        {
            "fixed text": (0.0, 1),
            "prompt": (prompt_at, n_prompt),
            "generated before": (output_at, n_output),
        },
    )
    label_columns(ax, places, labels, notable(np.nan_to_num(cells)))
    _label_layers(ax, n_layers, n_heads)
    if bar is not None:
        bar.set_label("Attention weight", size=LABEL_POINTS + 1)
    return paper.finish(fig, ax)


def _label_layers(ax: Axes, n_layers: int, n_heads: int) -> None:
    """Numbers the layers, and draws a line between them."""
    kept = thinned(n_layers, inches_per_unit(ax)[1] * n_heads * 0.9)
    middles = [(layer + 0.5) * n_heads - 0.5 for layer in kept]
    texts = [str(layer) for layer in kept]
    ax.set_yticks(middles, labels=texts, **text_style(texts))
    ax.tick_params(axis="y", length=0)
    ax.set_ylabel("layer, and its heads from above", size=LABEL_POINTS + 1, color=MUTED)
    ax.spines[:].set_visible(False)
    ax.grid(False)
    lines = [layer * n_heads - 0.5 for layer in range(1, n_layers)]
    ax.hlines(lines, *ax.get_xlim(), color=FAINT, linewidth=0.4)
