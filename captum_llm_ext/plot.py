"""Drawings of attributions. The only module that imports matplotlib, and only when it draws.

Plain arrays in, ``(fig, ax)`` out. Red lowers and blue raises, as in Captum's bars; a sign can also
be read without colour. Global matplotlib settings are read, never written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["bars", "heat_map"]

_Array = npt.NDArray[np.float64]

_UP, _DOWN = "#2166ac", "#b2182b"  # the two ends of RdBu, told apart also by the colour-blind
_UNKNOWN = "#e4e4e4"
_MUTED = "#6b6b6b"

_LABEL_POINTS = 8.0
_LABEL_PITCH = 0.14  # inches from one label to the next at that size
_CHAR = 0.063  # inches one character of a number in a cell takes, with some air around it all
_NUMBER_HEIGHT = 0.17
_SIGN_FROM = 0.1  # share of the scale below which a colour is too pale to need a sign

# Asked for only when the text needs them and only if installed; emoji fonts made of bitmaps cannot
# be drawn by matplotlib, so they are not among these.
_FALLBACK_FONTS = (
    "DejaVu Sans",  # comes with matplotlib: has the marks for white space
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Noto Sans SC",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Nirmala UI",
    "Arial Unicode MS",
    "Segoe UI Emoji",
    "Noto Emoji",
)


def heat_map(
    prompt_attr: npt.ArrayLike,
    output_attr: npt.ArrayLike | None,
    *,
    input_labels: Sequence[str],
    output_feature_labels: Sequence[str] | None,
    output_labels: Sequence[str],
    output_features: Sequence[int | None] | None = None,
    ax: Axes | None = None,
    cmap: str | Colormap = "RdBu",
    show: bool = False,
    title: str | None = None,
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
        cmap: A diverging colour map; its middle is put at zero.
        show: Show the figure and return ``None``, as in Captum.
        title: Title above the column labels.

    Returns:
        Figure and axes, or ``None`` if `show`.

    Raises:
        ValueError: If labels and arrays do not match in number.
    """
    prompt = _array("prompt_attr", prompt_attr, (len(output_labels), len(input_labels)))
    output = _output_array(output_attr, output_feature_labels, len(output_labels))
    (n_target, n_prompt), n_output = prompt.shape, output.shape[1]
    open_columns = _open_columns(output, output_features)
    closed = np.arange(n_output) >= open_columns[:, None]
    gap = max(0.6, 0.015 * (n_prompt + n_output)) if n_output else 0.0
    start = n_prompt + gap  # place of the first generated column
    n_columns = start + n_output

    fig, ax = _figure(ax, 3.0 + 0.5 * n_columns, 1.9 + 0.3 * n_target)
    colours = _Colours(cmap, _scale(prompt, output[~closed]))
    bar = _images(fig, ax, colours, [(0.0, prompt), (start, np.where(closed, np.nan, output))])
    ax.set_xlim(-0.5, max(n_columns, 1) - 0.5)
    ax.set_ylim(max(n_target, 1) - 0.5, -0.5)
    ax.set_autoscale_on(False)
    if n_output:
        _hatch_closed(ax, open_columns, start, n_output)
        _headings(ax, {"prompt": (0.0, n_prompt), "generated before": (start, n_output)})
    places = np.concatenate([np.arange(float(n_prompt)), start + np.arange(n_output)])
    _column_labels(ax, places, [*input_labels, *(output_feature_labels or ())])
    _row_labels(ax, output_labels)
    shown = np.concatenate([np.ones(prompt.shape, dtype=bool), ~closed], axis=1)
    cells = np.concatenate([prompt, output], axis=1)
    numbered = _mark_cells(ax, places, cells, shown, colours)
    if bar is not None:
        marks = "" if numbered else "  (− marks what lowers)"
        bar.set_label("Token attribution" + marks, size=_LABEL_POINTS + 1)
    return _finish(fig, ax, title, show)


def bars(
    seq_attr: npt.ArrayLike,
    *,
    labels: Sequence[str],
    errors: npt.ArrayLike | None = None,
    ax: Axes | None = None,
    show: bool = False,
    title: str | None = None,
) -> tuple[Figure, Axes] | None:
    """Draws the attribution of the whole answer to each feature.

    Args:
        seq_attr: Attributions, shape ``(n_features,)``; NaN is drawn as a question mark.
        labels: Text of the features.
        errors: Standard errors, shape ``(n_features,)``, drawn as whiskers of one standard error
            where known (not NaN). A bar within 1.96 standard errors of zero is pale.
        ax: Axes to draw into; by default a new figure whose width follows the number of bars.
        show: Show the figure and return ``None``, as in Captum.
        title: Title above the labels.

    Returns:
        Figure and axes, or ``None`` if `show`.

    Raises:
        ValueError: If labels, values and errors do not match in number, or an error is negative.
    """
    values = _array("seq_attr", seq_attr, (len(labels),))
    spread = np.full_like(values, np.nan)
    if errors is not None:
        spread = _array("errors", errors, (len(labels),))
    if (spread < 0).any():
        raise ValueError(
            f"`errors` holds {float(np.nanmin(spread)):g}: standard errors cannot be negative; "
            "give NaN where one is unknown."
        )
    fig, ax = _figure(ax, 1.8 + 0.42 * len(values), 4.2)
    places = np.arange(len(values), dtype=np.float64)
    drawn = ax.bar(
        places,
        np.nan_to_num(values),
        width=0.8,
        color=[_UP if value > 0 else _DOWN for value in values],
    )
    for bar, pale in zip(drawn, np.abs(values) < 1.96 * spread, strict=True):
        bar.set_alpha(0.35 if pale else 1.0)
    known = np.isfinite(values) & np.isfinite(spread)
    _whiskers(
        ax, places[known], values[known], spread[known], cap=min(3.0, 90.0 / max(len(values), 1))
    )
    for place in places[np.isnan(values)]:
        ax.text(place, 0.0, "?", ha="center", va="bottom", size=_LABEL_POINTS, color=_MUTED)
    ax.axhline(0.0, color="#3a3a3a", linewidth=0.8)
    ax.set_xlim(-0.7, len(values) - 0.3)
    ax.margins(y=0.08)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", labelsize=_LABEL_POINTS)
    _column_labels(ax, places, labels)
    ax.tick_params(axis="x", length=0)
    name = "Sequence attribution" + (" ± standard error" if known.any() else "")
    ax.set_ylabel(name, size=_LABEL_POINTS + 1)
    return _finish(fig, ax, title, show)


# Arrays ------------------------------------------------------------------------------------------


def _array(name: str, values: Any, shape: tuple[int, ...]) -> _Array:
    if hasattr(values, "detach"):  # a tensor: numpy knows neither bfloat16 nor gradients
        values = values.detach().double().cpu()
    array = np.asarray(values, dtype=np.float64)
    if array.shape != shape and (array.size or math.prod(shape)):
        raise ValueError(
            f"`{name}` has shape {array.shape}, the labels ask for {shape}: give one label per "
            "row and column."
        )
    return array.reshape(shape)


def _output_array(values: Any, labels: Sequence[str] | None, n_target: int) -> _Array:
    if (values is None) != (labels is None):
        raise ValueError(
            "`output_attr` and `output_feature_labels` belong together: give both, or neither "
            "where the output was held fixed."
        )
    if values is None or labels is None:
        return np.zeros((n_target, 0))
    return _array("output_attr", values, (n_target, len(labels)))


def _open_columns(output: _Array, features: Sequence[int | None] | None) -> npt.NDArray[np.intp]:
    """How many of the generated columns lie wholly before each row's token, shape (n_target,)."""
    n_target, n_output = output.shape
    if features is None:
        if n_target == n_output:
            return np.arange(n_target)
        last = np.where(np.nan_to_num(output, nan=1.0) != 0, np.arange(1, n_output + 1), 0)
        return np.maximum.accumulate(last.max(axis=1, initial=0))
    if len(features) != n_target:
        raise ValueError(
            f"`output_features` has {len(features)} entries for {n_target} rows: give the column "
            "of every explained token, or None."
        )
    ends = np.zeros(n_output, dtype=np.intp)  # the last token of each column
    for token, feature in enumerate(features):
        if feature is not None:
            ends[feature] = token
    return (ends[None, :] < np.arange(n_target)[:, None]).sum(axis=1)


def _scale(*parts: _Array) -> float:
    """The largest magnitude, so that zero is the middle of the colour map."""
    known = np.concatenate([part[np.isfinite(part)] for part in parts])
    return float(np.abs(known).max(initial=0.0)) or 1.0


# Axes --------------------------------------------------------------------------------------------


def _figure(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """The axes to draw into; a new figure stays between postcard and poster, in inches."""
    if ax is not None:
        return ax.figure, ax  # pyright: ignore[reportReturnType]
    import matplotlib.pyplot as plt

    size = (float(np.clip(width, 5.0, 16.0)), float(np.clip(height, 3.2, 14.0)))
    return plt.subplots(figsize=size, layout="constrained")


def _finish(fig: Figure, ax: Axes, title: str | None, show: bool) -> tuple[Figure, Axes] | None:
    if title is not None:
        ax.set_title(title, loc="left", size=_LABEL_POINTS + 3, pad=10)
    if not show:
        return fig, ax
    import matplotlib.pyplot as plt

    plt.show()
    return None


def _inches_per_unit(ax: Axes) -> tuple[float, float]:
    """Width and height of one cell as laid out so far."""
    fig = ax.get_figure(root=True)
    if fig is None:
        raise ValueError("`ax` belongs to no figure: pass axes made by `plt.subplots()`.")
    box, (left, right), (low, high) = ax.bbox, ax.get_xlim(), ax.get_ylim()
    return (
        box.width / fig.dpi / max(abs(right - left), 1.0),
        box.height / fig.dpi / max(abs(high - low), 1.0),
    )


def _settle(ax: Axes) -> None:
    """Lays the figure out, where it has a layout engine, so that sizes are those to be drawn."""
    fig = ax.get_figure(root=True)
    engine = None if fig is None else fig.get_layout_engine()
    if fig is not None and engine is not None:
        engine.execute(fig)


def _column_labels(ax: Axes, places: _Array, names: Sequence[str]) -> None:
    cell = _inches_per_unit(ax)[0] * 0.9
    kept = _thinned(len(names), cell)
    texts = [_label(names[i]) for i in kept]
    steep = cell < 0.3
    ax.set_xticks(
        places[kept],
        labels=texts,
        rotation=90 if steep else 40,
        ha="center" if steep else "left",
        rotation_mode="default" if steep else "anchor",
        **_text_style(texts),
    )
    ax.tick_params(axis="x", top=True, bottom=False, labeltop=True, labelbottom=False)
    ax.tick_params(axis="both", length=2.5, color=_MUTED)


def _row_labels(ax: Axes, names: Sequence[str]) -> None:
    kept = _thinned(len(names), _inches_per_unit(ax)[1] * 0.9)
    texts = [_label(names[i]) for i in kept]
    ax.set_yticks(kept, labels=texts, **_text_style(texts))
    ax.set_ylabel("explained token", size=_LABEL_POINTS + 1, color=_MUTED)
    ax.spines[:].set_visible(False)
    ax.grid(False)


def _thinned(n: int, pitch: float) -> list[int]:
    """Every k-th index, with k such that labels do not run into each other."""
    return list(range(0, n, max(1, math.ceil(_LABEL_PITCH / max(pitch, 1e-6)))))


def _headings(ax: Axes, parts: dict[str, tuple[float, int]]) -> None:
    """A ruled heading under each part of the columns."""
    across = ax.get_xaxis_transform()
    for name, (start, width) in parts.items():
        if width:
            ends = [start - 0.5, start + width - 0.5]
            ax.plot(ends, [-0.012] * 2, transform=across, color=_MUTED, lw=1.0, clip_on=False)
            middle = (ends[0] + ends[1]) / 2
            label = ax.text(middle, -0.02, name, transform=across, ha="center", va="top")
            label.set(size=_LABEL_POINTS + 1, color=_MUTED)


# Cells -------------------------------------------------------------------------------------------


def _hatch_closed(
    ax: Axes, open_columns: npt.NDArray[np.intp], start: float, n_output: int
) -> None:
    """Covers each row from its first closed column on: one staircase, whatever its size."""
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


def _images(
    fig: Figure, ax: Axes, colours: _Colours, parts: list[tuple[float, _Array]]
) -> Colorbar | None:
    """Draws each part from its column on, all in one scale; returns the scale's bar, if any."""
    image = None
    for left, values in parts:
        if values.size:
            image = ax.imshow(
                values,
                cmap=colours.cmap,
                vmin=-colours.scale,
                vmax=colours.scale,
                aspect="auto",
                interpolation="nearest",
                extent=(left - 0.5, left + values.shape[1] - 0.5, len(values) - 0.5, -0.5),
            )
    if image is None:
        return None
    bar = fig.colorbar(image, ax=ax, fraction=0.05, pad=0.02, aspect=30)
    bar.ax.tick_params(labelsize=_LABEL_POINTS)
    bar.ax.spines[:].set_visible(False)
    return bar


def _mark_cells(
    ax: Axes, places: _Array, cells: _Array, shown: npt.NDArray[np.bool_], colours: _Colours
) -> bool:
    """Numbers where all of them fit, else a minus sign on what lowers: colour is not enough.

    Returns:
        Whether the cells hold numbers.
    """
    needed = _CHAR * (len(_number(-colours.scale, colours.scale)) + 0.4)
    if _inches_per_unit(ax)[0] > 0.5 * needed:  # else no layout would make them fit
        _settle(ax)
    width, height = _inches_per_unit(ax)
    fits = width >= needed and height >= _NUMBER_HEIGHT
    if fits and 1e-3 <= colours.scale < 1e4:
        for row, column in np.argwhere(shown).tolist():
            _write_cell(ax, places[column], row, float(cells[row, column]), colours)
        return True
    rows, columns = np.nonzero((cells < -_SIGN_FROM * colours.scale) & shown)
    inks = [colours.ink(value) for value in cells[rows, columns].tolist()]
    points = max(72 * 0.5 * min(width, height, 0.16), 1.2)
    ax.scatter(
        places[columns], rows, s=points**2, c=inks, marker="_", linewidths=max(0.15 * points, 0.4)
    )
    return False


def _write_cell(ax: Axes, x: float, y: float, value: float, colours: _Colours) -> None:
    text, ink = _number(value, colours.scale), colours.ink(value)
    if not text.strip("0."):
        return  # a page of zeros hides what is none
    number = ax.text(x, y, text, ha="center", va="center", size=_LABEL_POINTS - 1, color=ink)
    number.set_in_layout(False)  # within its cell anyway, and measuring hundreds is slow


class _Colours:
    """A diverging colour map with zero in its middle, and the ink that reads on it."""

    def __init__(self, cmap: str | Colormap, scale: float) -> None:
        import matplotlib

        self.cmap = matplotlib.colormaps.get_cmap(cmap).with_extremes(bad=_UNKNOWN)
        self.scale = scale

    def ink(self, value: float) -> str:
        """Dark or white, whichever reads better on the cell of this value."""
        if math.isnan(value):
            return _MUTED
        red, green, blue, _ = self.cmap((value / self.scale + 1) / 2)
        return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#222222"


def _number(value: float, scale: float) -> str:
    """Signed, with as many decimals as give the largest value two or three digits."""
    if math.isnan(value):
        return "?"
    decimals = max(int(scale < 100), 1 - math.floor(math.log10(scale)))
    text = f"{value:+.{decimals}f}"
    unsigned = text[1:]
    return unsigned if float(unsigned) == 0 else text.replace("-", "−")


def _whiskers(ax: Axes, x: _Array, y: _Array, spread: _Array, cap: float) -> None:
    if x.size:
        style = {"ecolor": "#3a3a3a", "elinewidth": 1.0, "capsize": cap}
        ax.errorbar(x, y, yerr=spread, fmt="none", **style)  # pyright: ignore[reportArgumentType]


# Text --------------------------------------------------------------------------------------------


def _label(text: str, width: int = 22) -> str:
    """A token's text on one line: white space visible where it matters, long text cut."""
    inner = text.strip(" ")
    if not inner:
        inner = "␣" * len(text) or "∅"
    inner = inner.replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥")
    if len(inner) > width:
        inner = inner[: width - 1] + "…"
    return "".join(_drawable(char) for char in inner)


def _drawable(char: str) -> str:
    """The character, or its escape where no font here can draw it."""
    if char.isprintable() and any(ord(char) in _glyphs(name) for name in _fonts()):
        return char
    return char.encode("unicode_escape").decode("ascii")


def _text_style(texts: Iterable[str]) -> dict[str, Any]:
    """Text properties under which token text is drawn as it is: ``$`` and ``_`` mean themselves."""
    needed = {ord(char) for text in texts for char in text}
    family: list[str] = []
    for name in _fonts():
        if not family or needed - _glyphs(family[0]) & _glyphs(name):
            family.append(name)
            needed -= _glyphs(name)
    return {"family": family, "size": _LABEL_POINTS, "parse_math": False, "usetex": False}


def _fonts() -> list[str]:
    """The user's font, then those installed here that may have what it lacks."""
    from matplotlib import font_manager

    default = font_manager.FontProperties()  # follows rcParams at the time of drawing
    path = font_manager.findfont(default)
    own = font_manager.get_font(path).family_name
    installed = set(font_manager.fontManager.get_font_names())
    return [own, *(name for name in _FALLBACK_FONTS if name in installed and name != own)]


@functools.cache
def _glyphs(name: str) -> frozenset[int]:
    """The code points that a font of this name can draw."""
    from matplotlib import font_manager

    path = font_manager.findfont(name)
    return frozenset(font_manager.get_font(path).get_charmap())
