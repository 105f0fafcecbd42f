"""Running text, shaded by the attributions of its parts."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt

from captum_llm_ext.result.plot.arrays import Array, array, numbers, scale
from captum_llm_ext.result.plot.axes import (
    KEY_LINE,
    Canvas,
    CanvasArguments,
    inches,
    key_lines,
    settle,
)
from captum_llm_ext.result.plot.cells import Colours, colour_bar
from captum_llm_ext.result.plot.labels import drawable, text_style
from captum_llm_ext.result.plot.style import (
    DARK,
    DOWN,
    FAINT,
    LABEL_POINTS,
    MUTED,
    PALE,
    SIGN_FROM,
    SURE,
    UP,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.text import Text

    from captum_llm_ext.result.plot.axes import Drawing

_SIZES = (11.0, 9.5, 8.0, 7.0, 6.0)  # points, the largest at which all of the text fits
_LINE = 1.75  # line height in font sizes, with room for an underline
_MOST_INCHES = 12.0
_BAR_INCHES = 0.7  # height of a colour bar below the text
_WHERE = (" to the prompt", " to the answer so far")
_WORDS = re.compile(r"\n|[^\S\n]+|\S+")

_Measure = Callable[[str], float]


def running_text(
    pieces: Sequence[tuple[str, int | None]],
    values: npt.ArrayLike,
    *,
    errors: npt.ArrayLike | None = None,
    n_first: int | None = None,
    sure: float = SURE,
    headings: Mapping[int, str] | None = None,
    explained: Collection[int] = (),
    later: Collection[int] = (),
    cmap: str | Colormap | None = None,
    is_unsigned: bool = False,
    **canvas: Unpack[CanvasArguments],
) -> Drawing:
    """Draws running text, each part shaded by its value; line breaks and indentation are kept.

    A solid line below a part means that it raises, a dashed one that it lowers. White space around
    a part is not shaded; parts of white space alone are marked.

    Args:
        pieces: The text in reading order, each piece with the index of its value, or None.
        values: Shape ``(n_values,)``.
        errors: Standard errors of the same shape, NaN if unknown; values within `sure` of them are
            pale and not underlined.
        n_first: This many first values, such as those of the prompt, have their own scale, the rest
            another. None: one scale.
        sure: Number of standard errors beyond which a value is significant.
        headings: Headings, by the index of the piece below.
        explained: Explained pieces, which are framed.
        later: Later pieces, which are grey.
        cmap: A diverging colour map, centred at zero, by default ``"RdBu"``; if unsigned a
            sequential one, by default ``"Purples"``.
        is_unsigned: Whether attributions are magnitudes without a sign.
        **canvas: See `Canvas`. In given axes the font shrinks to 6 points at least, and text that
            does not fit is cut at the end.

    Raises:
        ValueError: If values and errors do not match in number.
    """
    from captum_llm_ext.result.plot.responsive import Fitted

    shades = _shades(values, errors, n_first, sure, cmap, is_unsigned)
    atoms = list(_atoms(pieces, headings or {}))
    style = text_style(atom.text for atom in atoms)
    passage = _Passage(atoms, shades, style, frozenset(explained), frozenset(later))
    paper = Canvas(**canvas)
    fig, ax = paper.open(9.0, 4.0)
    ax.set_axis_off()
    # The last bar is next to the text.
    for colours, where in reversed(list(zip(shades.scales, _WHERE, strict=False))):
        bar = colour_bar(fig, ax, colours, below=1.0)
        what = paper.with_unit("Attribution" + where * (len(shades.scales) > 1))
        bar.set_label(what, size=LABEL_POINTS + 1)
    settle(ax)
    if paper.ax is None:
        below = _BAR_INCHES * len(shades.scales)
        fig.set_figheight(passage.height(ax, _MOST_INCHES * 72) / 72 + 0.4 + below)
        settle(ax)
    Fitted(ax, passage.lay_out)
    return paper.finish(fig, ax)


@dataclass(frozen=True)
class _Passage:
    """The text and its shading, independent of the size of the axes."""

    atoms: Sequence[_Atom]
    shades: _Shades
    style: Mapping[str, Any]
    explained: frozenset[int]
    later: frozenset[int]

    def height(self, ax: Axes, most: float) -> float:
        """Height of the text in points at the width of the axes, limited to about `most`."""
        width, _ = _points(ax)
        lines, size = self._fitted(ax, width, most, None)
        return len(lines) * _LINE * size + self._key(width)[1]

    def lay_out(self, ax: Axes, renderer: Any) -> None:
        """Draws the text into the axes; what does not fit is cut at the end."""
        width, room = _points(ax)
        key, below = self._key(width)
        lines, size = self._fitted(ax, width, room, renderer)
        most = max(int((room - below) / (_LINE * size) + 0.01), 1)
        if len(lines) > most:
            lines = [*lines[: most - 1], [_Run("…", -1, None, 0.0, 0.0)]]
        ax.set_xlim(0, width)
        ax.set_ylim(max(room, 1.0), 0)
        _draw(ax, lines, self.shades, {**self.style, "size": size}, self.explained, self.later)
        text = ax.text(0, 0, key, transform=ax.transAxes, va="bottom", color=MUTED)
        text.set(size=LABEL_POINTS)
        text.set_in_layout(False)

    def _fitted(
        self, ax: Axes, width: float, room: float, renderer: Any
    ) -> tuple[list[list[_Run]], float]:
        """The lines, and the largest font size that fits, or the smallest."""
        below = self._key(width)[1]
        lines: list[list[_Run]] = []
        size, probe = _SIZES[0], ax.text(0, 0, "", **self.style)
        for size in _SIZES:
            probe.set_fontsize(size)
            lines = _lines(self.atoms, width, _measure(probe, renderer))
            if len(lines) * _LINE * size + below <= room + 0.01:
                break
        probe.remove()
        return lines, size

    def _key(self, width: float) -> tuple[str, float]:
        """The explanation of signs in lines, and its height in points."""
        shades = self.shades
        signs = {shades.sign(i) for i in range(len(shades.values))}
        parts = {
            "framed: explained": bool(self.explained),
            "solid line: raises": 1 in signs,
            "dashed: lowers": -1 in signs,
            "pale: within its error": bool(
                (shades.pale & ~shades.unknown & (shades.values != 0)).any()
            ),
            "pale: error unknown": bool(shades.unknown.any()),
        }
        text = key_lines([text for text, needed in parts.items() if needed], width)
        return text, (1 + text.count("\n")) * KEY_LINE + 0.75 * LABEL_POINTS


def _points(ax: Axes) -> tuple[float, float]:
    """Width and height of the axes in points, in the current layout."""
    width, height = inches(ax)
    return width * 72, height * 72


@dataclass(frozen=True)
class _Shades:
    """Colours and significance of the values.

    Attributes:
        scales: One for all values, or one for the first `n_first` and one for the rest.
        n_first: Number of values on the first scale.
        values: Shape ``(n_values,)``.
        pale: bool, ``(n_values,)``: within the error, or of unknown error.
        unknown: bool, ``(n_values,)``: estimates of unknown error.
    """

    scales: Sequence[Colours]
    n_first: int
    values: Array
    pale: npt.NDArray[np.bool_]
    unknown: npt.NDArray[np.bool_]

    def colours(self, i: int) -> Colours:
        """The scale of a value."""
        return self.scales[0] if i < self.n_first else self.scales[-1]

    def face(self, i: int) -> tuple[float, ...] | None:
        value = float(self.values[i])
        if value == 0:
            return None
        red, green, blue, _ = self.colours(i).rgba(value)
        return (red, green, blue, PALE if self.pale[i] else 1.0)

    def ink(self, i: int) -> str:
        value = float(self.values[i])
        return DARK if self.pale[i] or np.isnan(value) else self.colours(i).ink(value)

    def sign(self, i: int) -> int:
        """1 or -1 if a line shows the sign, 0 if the colour is too pale to need one."""
        value = self.values[i]
        if self.colours(i).is_unsigned:
            return 0
        if self.pale[i] or not abs(value) >= SIGN_FROM * self.colours(i).scale:
            return 0
        return 1 if value > 0 else -1


def _shades(
    values: npt.ArrayLike,
    errors: npt.ArrayLike | None,
    n_first: int | None,
    sure: float,
    cmap: str | Colormap | None,
    is_unsigned: bool,
) -> _Shades:
    known = numbers(values).reshape(-1)
    pale, unknown = np.zeros(known.shape, dtype=bool), np.zeros(known.shape, dtype=bool)
    if errors is not None:
        known_errors = array("errors", errors, known.shape)
        pale = ~(np.abs(known) >= sure * known_errors)
        unknown = np.isnan(known_errors) & (known != 0)
    first = len(known) if n_first is None else n_first
    # No scale without attributions: for the first token, or an answer held fixed.
    parts = [known[:first], known[first:]] if known[first:].any() else [known]
    scales = [Colours(cmap, scale(part), is_unsigned=is_unsigned) for part in parts]
    return _Shades(scales, first, known, pale, unknown)


# Lines -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Atom:
    """A word, white space, a new line (``"\\n"``) or a heading.

    Attributes:
        text: The drawn text.
        piece: Index of its piece, -1 for a heading.
        value: Index of its value.
        is_edge: Whether it is white space at an end of its piece.
    """

    text: str
    piece: int
    value: int | None
    is_edge: bool = False

    @property
    def is_space(self) -> bool:
        return self.text.isspace()


@dataclass(frozen=True)
class _Run:
    """The part of one piece on one line, from `left` to `right` in points."""

    text: str
    piece: int
    value: int | None
    left: float
    right: float


def _atoms(
    pieces: Sequence[tuple[str, int | None]], headings: Mapping[int, str]
) -> Iterator[_Atom]:
    for i, (text, value) in enumerate(pieces):
        if i in headings:
            yield from (_Atom("\n", -1, None),) * (2 if i else 0)
            yield from (_Atom(headings[i], -1, None), _Atom("\n", -1, None))
            text = text.removeprefix(" ") or text  # not indentation
        text = text.replace("\r\n", "\n").replace("\t", "    ")
        words: list[str] = _WORDS.findall(text)
        if not text.strip():
            yield from _marked(words, i, value)
            continue
        inner = [k for k, word in enumerate(words) if not word.isspace()]
        for k, word in enumerate(words):
            if word.isspace():
                yield _Atom(word, i, value, is_edge=not inner[0] < k < inner[-1])
            else:
                yield _Atom("".join(map(drawable, word)), i, value)


def _marked(words: list[str], piece: int, value: int | None) -> Iterator[_Atom]:
    """A piece of white space alone: visible if it has a value, otherwise unchanged."""
    for word in words or ["∅"]:
        if value is None or word == "∅":
            yield from [_Atom(word, piece, value)] if value is not None or words else []
        elif word == "\n":
            yield from (_Atom("⏎", piece, value), _Atom("\n", piece, value))
        else:
            yield _Atom("␣" * len(word), piece, value)


def _lines(atoms: Sequence[_Atom], width: float, measure: _Measure) -> list[list[_Run]]:
    """Wraps at white space, and within words that do not fit a line."""
    lines: list[list[_Atom]] = [[]]
    x = 0.0
    for group in _groups(atoms):
        if group[0].text == "\n":
            lines.append([])
            x = 0.0
            continue
        wide = sum(measure(atom.text) for atom in group)
        if x and x + wide > width and (group[0].is_space or wide <= width / 2):
            lines.append([])
            x = 0.0
            if group[0].is_space:
                continue  # white space at a line break is dropped
        for atom in group if x + wide <= width else _letters(group):
            step = measure(atom.text)
            if x and x + step > width:
                lines.append([])
                x = 0.0
            lines[-1].append(atom)
            x += step
    return [_runs(line, measure) for line in lines]


def _groups(atoms: Sequence[_Atom]) -> Iterator[list[_Atom]]:
    """Atoms that no line break may separate: adjacent words without space in between."""
    group: list[_Atom] = []
    for atom in atoms:
        if atom.is_space and group:
            yield group
            group = []
        if atom.is_space:
            yield [atom]
        else:
            group.append(atom)
    if group:
        yield group


def _letters(group: Sequence[_Atom]) -> Iterator[_Atom]:
    for atom in group:
        for letter in atom.text:
            yield _Atom(letter, atom.piece, atom.value)


def _runs(line: Sequence[_Atom], measure: _Measure) -> list[_Run]:
    """Joins atoms of one piece, so that shading covers the space between words."""
    runs: list[_Run] = []
    x, start = 0.0, 0
    for stop in range(1, len(line) + 1):
        first = line[start]
        if stop < len(line) and _key(line[stop]) == _key(first):
            continue
        text = "".join(atom.text for atom in line[start:stop])
        right = x + measure(text)
        if text.strip():
            runs.append(_Run(text, first.piece, first.value, x, right))
        x, start = right, stop
    return runs


def _key(atom: _Atom) -> tuple[int, bool]:
    return atom.piece, atom.is_edge


def _measure(probe: Text, renderer: Any) -> _Measure:
    """Measures the advance width of text in points, white space included."""
    dpi = fig.dpi if (fig := probe.get_figure(root=True)) else 72.0

    @functools.cache
    def extent(text: str) -> float:
        probe.set_text(f"|{text}|")  # trailing spaces have no extent of their own
        return probe.get_window_extent(renderer).width * 72 / dpi

    return lambda text: extent(text) - extent("")


# Drawing -----------------------------------------------------------------------------------------


def _draw(
    ax: Axes,
    lines: Sequence[Sequence[_Run]],
    shades: _Shades,
    style: Mapping[str, Any],
    explained: Collection[int],
    later: Collection[int],
) -> None:
    size: float = style["size"]
    placed = [
        (run, (number + 0.62) * _LINE * size) for number, line in enumerate(lines) for run in line
    ]
    for run, base in placed:
        ink = MUTED if run.piece < 0 or run.value is None else shades.ink(run.value)
        ink = DARK if run.piece in explained else FAINT if run.piece in later else ink
        text = ax.text(run.left, base, run.text, va="baseline", color=ink, **style)
        text.set_in_layout(False)  # its place is known, and measuring hundreds is slow
    _draw_shades(ax, placed, shades, size)
    _draw_signs(ax, placed, shades, size)
    boxes = [_box(run, base, size) for run, base in placed if run.piece in explained]
    _add_boxes(ax, boxes, facecolors="none", edgecolors=DARK, linewidths=1.2)


def _draw_shades(
    ax: Axes, placed: Sequence[tuple[_Run, float]], shades: _Shades, size: float
) -> None:
    found = [
        (_box(run, base, size), face)
        for run, base in placed
        if run.value is not None and (face := shades.face(run.value))
    ]
    boxes, faces = [box for box, _ in found], [face for _, face in found]
    _add_boxes(ax, boxes, facecolors=faces, linewidths=0, zorder=0.5)


def _draw_signs(
    ax: Axes, placed: Sequence[tuple[_Run, float]], shades: _Shades, size: float
) -> None:
    from matplotlib.collections import LineCollection

    for sign, colour, style in ((1, UP, "-"), (-1, DOWN, (0, (2.5, 1.5)))):
        lines = [
            [(run.left, base + 0.42 * size), (run.right, base + 0.42 * size)]
            for run, base in placed
            if run.value is not None and shades.sign(run.value) == sign
        ]
        if lines:
            drawn = LineCollection(lines, colors=colour, linewidths=1.2, linestyles=[style])
            ax.add_collection(drawn, autolim=False)


def _box(run: _Run, base: float, size: float) -> list[tuple[float, float]]:
    top, bottom = base - 0.95 * size, base + 0.33 * size
    return [(run.left, top), (run.right, top), (run.right, bottom), (run.left, bottom)]


def _add_boxes(ax: Axes, boxes: Sequence[list[tuple[float, float]]], **look: Any) -> None:
    """Adds one collection for all boxes: hundreds of patches are slow."""
    from matplotlib.collections import PolyCollection

    if boxes:
        ax.add_collection(PolyCollection(boxes, **look), autolim=False)
