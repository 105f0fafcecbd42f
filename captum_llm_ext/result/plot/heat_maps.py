"""Heat maps of attributions: for every token, or for one token under several baselines."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import numpy as np
import numpy.typing as npt

from captum_llm_ext.result.plot.arrays import (
    Array,
    array,
    notable,
    open_columns,
    output_array,
    scale,
)
from captum_llm_ext.result.plot.axes import (
    Canvas,
    CanvasArguments,
    headings,
    inches,
    inches_per_unit,
    key_lines,
    label_along,
    label_columns,
    label_rows,
    settle,
)
from captum_llm_ext.result.plot.cells import (
    Colours,
    colour_bar,
    frame,
    hatch_closed,
    images,
    mark_cells,
    mark_columns,
    write_marks,
)
from captum_llm_ext.result.plot.labels import text_style
from captum_llm_ext.result.plot.style import LABEL_POINTS, MUTED, PALE, SURE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from captum_llm_ext.result.plot.axes import Drawing

_WHERE = ("to the prompt", "to the answer so far")
_SIGN = 0.13  # inches for a sign below a column


def heat_map(
    prompt_attr: npt.ArrayLike,
    output_attr: npt.ArrayLike | None,
    *,
    input_labels: Sequence[str],
    output_feature_labels: Sequence[str] | None,
    output_labels: Sequence[str],
    output_features: Sequence[int | None] | None = None,
    prompt_errors: npt.ArrayLike | None = None,
    output_errors: npt.ArrayLike | None = None,
    sure: float = SURE,
    cmap: str | Colormap | None = None,
    is_unsigned: bool = False,
    has_common_scale: bool = False,
    **canvas: Unpack[CanvasArguments],
) -> Drawing:
    """Draws the attributions of every generated token to the prompt and to earlier output.

    One row per explained token; the prompt's columns, a gap, then the generated columns, each on
    its own scale, since earlier tokens dominate in most answers. Impossible causes (the token
    itself and later ones) are hatched. Cells hold numbers if they fit, otherwise negative cells
    carry a minus sign. Unknown (NaN) cells are grey.

    Args:
        prompt_attr: Attributions to the prompt, shape ``(n_target, n_prompt_features)``.
        output_attr: Attributions to earlier output, shape ``(n_target, n_output_features)``, or
            ``None`` if the output was held fixed.
        input_labels: Text of the prompt features.
        output_feature_labels: Text of the output features; ``None`` without `output_attr`.
        output_labels: Text of the explained tokens.
        output_features: Column of `output_attr` that each explained token belongs to. Without it, a
            square `output_attr` is assumed to have one column per token; otherwise a column counts
            as a possible cause from the first row on in which it, or a later one, is not zero.
        prompt_errors, output_errors: Standard errors of the same shapes, NaN where unknown. Values
            within `sure` of them are blank, like zeros.
        sure: Number of standard errors beyond which a value is significant.
        cmap: A diverging colour map, centred at zero, by default ``"RdBu"``; if unsigned a
            sequential one, by default ``"Purples"``.
        is_unsigned: Whether attributions are magnitudes without a sign.
        has_common_scale: Whether both parts share a scale, as shares of the same whole.
        **canvas: See `Canvas`.

    Raises:
        ValueError: If labels and arrays do not match in number.
    """
    prompt = array("prompt_attr", prompt_attr, (len(output_labels), len(input_labels)))
    output = output_array(output_attr, output_feature_labels, len(output_labels))
    (n_target, n_prompt), n_output = prompt.shape, output.shape[1]
    n_open = open_columns(output, output_features)
    shown = np.ones((n_target, n_prompt + n_output), dtype=bool)
    shown[:, n_prompt:] = np.arange(n_output) < n_open[:, None]
    cells = np.concatenate([prompt, output], axis=1)
    errors = [
        np.zeros(known.shape) if spread is None else array(name, spread, known.shape)
        for name, spread, known in (
            ("prompt_errors", prompt_errors, prompt),
            ("output_errors", output_errors, output),
        )
    ]
    noise = np.abs(cells) < sure * np.concatenate(errors, axis=1)  # false if an error is unknown
    cells = np.where(noise, 0.0, cells)
    columns = _Columns(n_prompt, n_output)

    paper = Canvas(**canvas)
    fig, ax = paper.open(3.0 + 0.5 * columns.width, 1.9 + 0.3 * n_target)
    shown_cells = np.where(shown, cells, 0.0)
    # Columns without any cause need no scale: a first token has nothing before it.
    is_one = has_common_scale or not shown_cells[:, n_prompt:].any()
    parts = [shown_cells] if is_one else columns.parts(shown_cells)
    colours = [Colours(cmap, scale(part), is_unsigned=is_unsigned) for part in parts]
    bars = columns.draw(fig, ax, colours, np.where(shown, cells, np.nan))
    ax.set_ylim(max(n_target, 1) - 0.5, -0.5)
    hatch_closed(ax, n_open, columns.start, n_output)
    names = [*input_labels, *(output_feature_labels or ())]
    label_columns(ax, columns.places, names, notable(np.where(shown, cells, 0)))
    label_rows(ax, output_labels)
    numbered = mark_cells(ax, columns.places, cells, shown, columns.each(colours))
    _label_bars(ax, bars, paper, "Token attribution")
    if bars:
        what = bars[-1].ax.get_ylabel()
        if bool((noise & shown).any()):
            what = label_along(f"{what};", "blank: may be noise", inches(ax)[1])
        if not numbered and not is_unsigned:
            what = label_along(f"{what},", "− marks what lowers", inches(ax)[1])
        bars[-1].set_label(what, size=LABEL_POINTS + 1)
    return paper.finish(fig, ax)


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
    cmap: str | Colormap | None = None,
    **canvas: Unpack[CanvasArguments],
) -> Drawing:
    """Draws the attributions of one token under several baselines.

    One row per baseline; the prompt's columns, a gap, then the generated columns, each with one
    scale for all rows. The strongest cause of each row is framed; ``±`` below a feature means that
    it changes sign, ``⇅`` that it changes rank; columns too narrow for these have lines in two
    rows. Numbers and minus signs as in `heat_map`.

    Args:
        attr: Attributions, shape ``(n_baselines, n_features)``.
        labels: Text of the features.
        row_labels: Names of the baselines.
        n_prompt: Number of prompt features, which come first.
        pale: Which values are not significant, bool of the shape of `attr`.
        strongest: Per row the column to frame, or None.
        changes_sign: Columns that change sign.
        changes_rank: Columns that change rank.
        cmap: A diverging colour map, centred at zero, by default ``"RdBu"``.
        **canvas: See `Canvas`.

    Raises:
        ValueError: If labels and arrays do not match in number.
    """
    cells = array("attr", attr, (len(row_labels), len(labels)))
    shade = np.where(array("pale", pale, cells.shape) > 0, PALE, 1.0)
    n_rows, n_output = len(cells), len(labels) - n_prompt
    columns = _Columns(n_prompt, n_output)
    places = columns.places

    paper = Canvas(**canvas)
    fig, ax = paper.open(3.0 + 0.5 * columns.width, 2.2 + 0.4 * n_rows)
    parts = columns.parts(cells) if cells[:, n_prompt:].any() else [cells]
    colours = [Colours(cmap, scale(part)) for part in parts]
    bars = columns.draw(fig, ax, colours, cells, shade)
    # Further rows for the changes: one of signs or, if these would touch, two of lines.
    is_narrow = inches_per_unit(ax)[0] < _SIGN
    kinds: dict[str, Collection[int]] = {"changes": ()}
    if is_narrow:
        kinds = {"changes sign": changes_sign, "changes rank": changes_rank}
    ax.set_ylim(n_rows + len(kinds) - 0.5, -0.5)
    framed = [column for column in strongest if column is not None]
    label_columns(ax, places, labels, (*framed, *changes_sign, *changes_rank))
    label_rows(ax, [*row_labels, *kinds], "absent means")
    frame(ax, [(places[c], row) for row, c in enumerate(strongest) if c is not None])
    if is_narrow:
        for row, changed in enumerate(kinds.values(), n_rows):
            mark_columns(ax, places[sorted(changed)], row)
    else:
        for column, place in enumerate(places):
            signs = ("±" * (column in changes_sign), "⇅" * (column in changes_rank))
            write_marks(ax, place, n_rows, "\n".join(filter(None, signs)))
    if not (changes_sign or changes_rank):
        write_marks(ax, (places[0] + places[-1]) / 2, n_rows, "none")
    shown = np.ones(cells.shape, dtype=bool)
    numbered = mark_cells(ax, places, cells, shown, columns.each(colours), shade)
    _label_bars(ax, bars, paper, "Attribution")
    said = {
        "□ strongest": bool(framed),
        "pale and grey: within its error": bool((shade < 1).any()),
        "− lowers": not numbered,
        "± changes sign": bool(changes_sign) and not is_narrow,
        "⇅ changes rank": bool(changes_rank) and not is_narrow,
    }
    key = key_lines([text for text, needed in said.items() if needed], inches(ax)[0] * 72)
    ax.set_xlabel(key, color=MUTED, labelpad=16 if n_output else 6, **text_style([key]))
    return paper.finish(fig, ax)


def _label_bars(ax: Axes, bars: Sequence[Colorbar], paper: Canvas, what: str) -> None:
    """Labels each colour bar."""
    settle(ax)
    for bar, where in zip(bars, _WHERE, strict=False):
        text = what if len(bars) < 2 else label_along(what, where, inches(ax)[1])
        bar.set_label(paper.with_unit(text), size=LABEL_POINTS + 1)


@dataclass(frozen=True)
class _Columns:
    """The prompt's columns, a gap, then the generated ones."""

    n_prompt: int
    n_output: int

    @property
    def start(self) -> float:
        """Position of the first generated column."""
        n = self.n_prompt + self.n_output
        return self.n_prompt + (max(0.6, 0.015 * n) if self.n_output else 0.0)

    @property
    def width(self) -> float:
        """Total width in cells."""
        return self.start + self.n_output

    @property
    def places(self) -> Array:
        """Centre of each column, shape ``(n_columns,)``."""
        prompt = np.arange(float(self.n_prompt))
        return np.concatenate([prompt, self.start + np.arange(self.n_output)])

    def parts(self, cells: Array) -> list[Array]:
        """Cells ``(n_rows, n_columns)`` of the prompt, and generated ones."""
        return np.split(cells, [self.n_prompt], axis=1)

    def each(self, colours: Sequence[Colours]) -> list[Colours]:
        """The scale of each column."""
        return [colours[0]] * self.n_prompt + [colours[-1]] * self.n_output

    def draw(
        self,
        fig: Figure,
        ax: Axes,
        colours: Sequence[Colours],
        cells: Array,
        shade: Array | None = None,
    ) -> list[Colorbar]:
        """Draws cells ``(n_rows, n_columns)`` and the headings of the columns.

        Args:
            fig, ax: Figure and axes.
            colours: One scale for all, or one for each part.
            cells: The values.
            shade: Opacity of each cell.

        Returns:
            The colour bars.

        Afterwards the axes are as wide as the columns; their height is to be set by the caller.
        """
        parts = list(zip((0.0, self.start), self.parts(cells), strict=True))
        shades = None if shade is None else self.parts(shade)
        if len(colours) == 1:
            drawn = images(ax, colours[0], parts, shades)
        else:
            drawn = False
            for i, own in enumerate(colours):
                drawn |= images(ax, own, [parts[i]], None if shades is None else [shades[i]])
        # The last bar is next to the axes: they are read from the prompt's on.
        bars = [colour_bar(fig, ax, own) for own in reversed(colours)] if drawn else []
        ax.set_xlim(-0.5, max(self.width, 1) - 0.5)
        ax.set_autoscale_on(False)
        if self.n_output:
            generated = (self.start, self.n_output)
            headings(ax, {"prompt": (0.0, self.n_prompt), "generated before": generated})
        return bars[::-1]
