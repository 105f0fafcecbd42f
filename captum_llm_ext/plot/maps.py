"""Heat maps: what every token, or one token under several baselines, owes to each feature."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from captum_llm_ext.plot.arrays import array, notable, open_columns, output_array, scale
from captum_llm_ext.plot.axes import (
    figure,
    finish,
    headings,
    inches,
    inches_per_unit,
    key_lines,
    label_along,
    label_columns,
    label_rows,
    named,
    settle,
)
from captum_llm_ext.plot.cells import (
    Colours,
    frame,
    hatch_closed,
    images,
    mark_cells,
    mark_columns,
    write_marks,
)
from captum_llm_ext.plot.style import LABEL_POINTS, MUTED, PALE
from captum_llm_ext.plot.text import text_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_SIGN = 0.13  # inches that a sign below a column takes


def heat_map(
    prompt_attr: npt.ArrayLike,
    output_attr: npt.ArrayLike | None,
    *,
    input_labels: Sequence[str],
    output_feature_labels: Sequence[str] | None,
    output_labels: Sequence[str],
    output_features: Sequence[int | None] | None = None,
    ax: Axes | None = None,
    cmap: str | Colormap | None = None,
    is_unsigned: bool = False,
    show: bool = False,
    title: str | None = None,
    unit: str | None = None,
) -> tuple[Figure, Axes] | None:
    """Draws what every generated token owes to the prompt and to the tokens before it.

    One row per explained token; the prompt's columns, a gap, then the generated columns. What a
    token cannot owe anything to (itself and what follows) is hatched. Cells hold numbers while
    they fit, beyond that lowering cells carry a minus sign. Unknown (NaN) cells are plain grey.

    Args:
        prompt_attr: Attributions to the prompt, shape ``(n_target, n_prompt_features)``.
        output_attr: Attributions to earlier output, shape ``(n_target, n_output_features)``, or
            ``None`` where the output was held fixed.
        input_labels: Text of the prompt features.
        output_feature_labels: Text of the output features; ``None`` without `output_attr`.
        output_labels: Text of the explained tokens.
        output_features: Column of `output_attr` that each explained token belongs to. Without it,
            a square `output_attr` is taken to have one column per token, and in any other a column
            counts as a possible cause from the first row on that it, or one after it, affects.
        ax: Axes to draw into; by default a new figure whose size follows the number of cells.
        cmap: A diverging colour map, whose middle is put at zero, by default ``"RdBu"``; of what
            has no sign a sequential one, by default ``"Purples"``.
        is_unsigned: Whether attributions are sizes, which neither raise nor lower.
        show: Show the figure and return ``None``, as in Captum.
        title: Title above the column labels.
        unit: Of the attributions.

    Returns:
        Figure and axes, or ``None`` if `show`.

    Raises:
        ValueError: If labels and arrays do not match in number.
    """
    prompt = array("prompt_attr", prompt_attr, (len(output_labels), len(input_labels)))
    output = output_array(output_attr, output_feature_labels, len(output_labels))
    (n_target, n_prompt), n_output = prompt.shape, output.shape[1]
    n_open = open_columns(output, output_features)
    closed = np.arange(n_output) >= n_open[:, None]
    gap = max(0.6, 0.015 * (n_prompt + n_output)) if n_output else 0.0
    start = n_prompt + gap  # place of the first generated column
    n_columns = start + n_output

    fig, ax = figure(ax, 3.0 + 0.5 * n_columns, 1.9 + 0.3 * n_target)
    colours = Colours(cmap, scale(prompt, output[~closed]), is_unsigned=is_unsigned)
    bar = images(fig, ax, colours, [(0.0, prompt), (start, np.where(closed, np.nan, output))])
    ax.set_xlim(-0.5, max(n_columns, 1) - 0.5)
    ax.set_ylim(max(n_target, 1) - 0.5, -0.5)
    ax.set_autoscale_on(False)
    if n_output:
        hatch_closed(ax, n_open, start, n_output)
        headings(ax, {"prompt": (0.0, n_prompt), "generated before": (start, n_output)})
    places = np.concatenate([np.arange(float(n_prompt)), start + np.arange(n_output)])
    shown = np.concatenate([np.ones(prompt.shape, dtype=bool), ~closed], axis=1)
    cells = np.concatenate([prompt, output], axis=1)
    names = [*input_labels, *(output_feature_labels or ())]
    label_columns(ax, places, names, notable(np.where(shown, cells, 0)))
    label_rows(ax, output_labels)
    numbered = mark_cells(ax, places, cells, shown, colours)
    if bar is not None:
        what = named("Token attribution", unit)
        if not numbered and not is_unsigned:
            settle(ax)
            what = label_along(f"{what},", "− marks what lowers", inches(ax)[1])
        bar.set_label(what, size=LABEL_POINTS + 1)
    return finish(fig, ax, title, show)


def baseline_map(
    attr: npt.ArrayLike,
    *,
    labels: Sequence[str],
    row_labels: Sequence[str],
    n_prompt: int,
    pale: npt.ArrayLike,
    strongest: Sequence[int | None],
    changes_sign: Collection[int] = (),
    changes_rank: Collection[int] = (),
    ax: Axes | None = None,
    cmap: str | Colormap = "RdBu",
    show: bool = False,
    title: str | None = None,
    unit: str | None = None,
) -> tuple[Figure, Axes] | None:
    """Draws what one token is attributed to under several baselines, in one scale.

    One row per baseline; the prompt's columns, a gap, then the generated columns. The strongest
    cause of each row is framed, ``±`` stands below features that change sign and ``⇅`` below those
    that change rank; below columns too narrow for these, lines in two rows. Numbers and minus signs
    as in `heat_map`.

    Args:
        attr: Attributions, shape ``(n_baselines, n_features)``.
        labels: Text of the features.
        row_labels: Names of the baselines.
        n_prompt: How many of the features are the prompt's; they come first.
        pale: What lies within its error, bool of the shape of `attr`.
        strongest: Per row the column to be framed, or None.
        changes_sign: Columns that change sign.
        changes_rank: Columns that change rank.
        ax: Axes to draw into; by default a new figure whose size follows the number of cells.
        cmap: A diverging colour map; its middle is put at zero.
        show: Show the figure and return ``None``, as in Captum.
        title: Title above the column labels.
        unit: Of the attributions.

    Returns:
        Figure and axes, or ``None`` if `show`.

    Raises:
        ValueError: If labels and arrays do not match in number.
    """
    cells = array("attr", attr, (len(row_labels), len(labels)))
    shade = np.where(array("pale", pale, cells.shape) > 0, PALE, 1.0)
    n_rows, n_output = len(cells), len(labels) - n_prompt
    gap = max(0.6, 0.015 * len(labels)) if n_output else 0.0
    places = np.arange(float(len(labels)))
    places[n_prompt:] += gap

    fig, ax = figure(ax, 3.0 + 0.5 * (len(labels) + gap), 2.2 + 0.4 * n_rows)
    colours = Colours(cmap, scale(cells))
    parts = [(0.0, cells[:, :n_prompt]), (n_prompt + gap, cells[:, n_prompt:])]
    bar = images(fig, ax, colours, parts, [shade[:, :n_prompt], shade[:, n_prompt:]])
    ax.set_xlim(-0.5, max(len(labels) + gap, 1) - 0.5)
    # Rows more for what changes: one of signs, or where these would touch two of lines.
    is_narrow = inches_per_unit(ax)[0] < _SIGN
    kinds: dict[str, Collection[int]] = {"changes": ()}
    if is_narrow:
        kinds = {"changes sign": changes_sign, "changes rank": changes_rank}
    ax.set_ylim(n_rows + len(kinds) - 0.5, -0.5)
    ax.set_autoscale_on(False)
    if n_output:
        headings(ax, {"prompt": (0.0, n_prompt), "generated before": (n_prompt + gap, n_output)})
    framed = [column for column in strongest if column is not None]
    label_columns(ax, places, labels, (*framed, *changes_sign, *changes_rank))
    label_rows(ax, [*row_labels, *kinds], "absent means")
    frame(ax, [(places[c], row) for row, c in enumerate(strongest) if c is not None])
    if is_narrow:
        for row, columns in enumerate(kinds.values(), n_rows):
            mark_columns(ax, places[sorted(columns)], row)
    else:
        for column, place in enumerate(places):
            signs = ("±" * (column in changes_sign), "⇅" * (column in changes_rank))
            write_marks(ax, place, n_rows, "\n".join(filter(None, signs)))
    if not (changes_sign or changes_rank):
        write_marks(ax, (places[0] + places[-1]) / 2, n_rows, "none")
    numbered = mark_cells(ax, places, cells, np.ones(cells.shape, dtype=bool), colours, shade)
    if bar is not None:
        bar.set_label(named("Attribution", unit), size=LABEL_POINTS + 1)
    said = {
        "□ strongest": bool(framed),
        "pale and grey: within its error": bool((shade < 1).any()),
        "− lowers": not numbered,
        "± changes sign": bool(changes_sign) and not is_narrow,
        "⇅ changes rank": bool(changes_rank) and not is_narrow,
    }
    key = key_lines([text for text, needed in said.items() if needed], inches(ax)[0] * 72)
    ax.set_xlabel(key, color=MUTED, labelpad=16 if n_output else 6, **text_style([key]))
    return finish(fig, ax, title, show)
