"""Draws which parts of the prompt led to which tokens, and which of these to later ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt

from captum_llm_ext.result.plot.arrays import Array, array, output_array, scale
from captum_llm_ext.result.plot.axes import (
    KEY_LINE,
    Canvas,
    CanvasArguments,
    inches,
    inches_per_unit,
    key_lines,
    settle,
    thinned,
)
from captum_llm_ext.result.plot.labels import label, text_style
from captum_llm_ext.result.plot.style import DARK, DOWN, FAINT, LABEL_POINTS, MUTED, SIZE, SURE, UP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    from captum_llm_ext.result.plot.axes import Drawing

_FEW = 30  # prompts of up to this many features are shown completely; chosen, not measured
_FEW_TOKENS = 60  # answers of up to this many tokens are shown completely; chosen, not measured
_MOST_LINKS = 200  # maximum number of links, for readability; chosen, not measured
_MOST_PER_TOKEN = 3
_WIDEST = 6.0  # points
_PITCH = 0.21  # inches between tokens
_APART = 0.13  # rows
_MARGIN = 0.32  # inches above and below, for headings and key
_GAP = 0.06  # inches between a word and a curve
_LABEL_WIDTH = 24


def flow(
    prompt_attr: npt.ArrayLike,
    output_attr: npt.ArrayLike | None,
    *,
    input_labels: Sequence[str],
    output_feature_labels: Sequence[str] | None,
    output_labels: Sequence[str],
    output_features: Sequence[int | None] | None = None,
    prompt_errors: npt.ArrayLike | None = None,
    output_errors: npt.ArrayLike | None = None,
    towards: int | None = None,
    least: float = 0.05,
    most: int = _MOST_PER_TOKEN,
    sure: float = SURE,
    is_unsigned: bool = False,
    **canvas: Unpack[CanvasArguments],
) -> Drawing:
    """Draws causes as curves: from the prompt to a generated token, and on to later ones.

    Prompt and answer are columns side by side, both read downwards. Curves from the prompt end on
    the left of a token; arcs on the right lead from a token to a later one that it caused. Widths
    are proportional to attributions, on separate scales for prompt and earlier output; negative
    ones are dashed. Each token has only its strongest causes. Of a long prompt or answer, only
    features and tokens with links are shown. At most the 200 largest links are drawn.

    Args:
        prompt_attr: Attributions to the prompt, shape ``(n_target, n_prompt_features)``.
        output_attr: Attributions to earlier output, shape ``(n_target, n_output_features)``, or
            ``None`` if the output was held fixed.
        input_labels: Text of the prompt features.
        output_feature_labels: Text of the output features; ``None`` without `output_attr`.
        output_labels: Text of the explained tokens.
        output_features: Column of `output_attr` that each explained token belongs to. Not needed
            with one column per token.
        prompt_errors, output_errors: Standard errors of the same shapes, NaN where unknown.
            Attributions within `sure` of them are left out.
        towards: Draw only what led to this token, directly or indirectly.
        least: Leave out attributions below this share of the largest one of the prompt, or of
            earlier output.
        most: Maximum number of causes per token, the strongest on their scales.
        sure: Number of standard errors beyond which a value is significant.
        is_unsigned: Whether attributions are magnitudes without a sign.
        **canvas: See `Canvas`.

    Raises:
        ValueError: If labels and arrays do not match in number, or the tokens of output features
            are unknown.
    """
    from captum_llm_ext.result.plot.responsive import Fitted

    paper = Canvas(**canvas)
    prompt = array("prompt_attr", prompt_attr, (len(output_labels), len(input_labels)))
    output = output_array(output_attr, output_feature_labels, len(output_labels))
    owned = _owned(output_features, *output.shape)
    widest = scale(prompt), scale(output)
    links = _strongest_of_each(
        [
            *_links(prompt, prompt_errors, least, widest[0], sure, True),
            *_links(output, output_errors, least, widest[1], sure, False),
        ],
        most,
    )
    if towards is not None:
        links = _leading_to(towards, links, owned)
    links.sort(key=lambda link: -abs(link.share))
    n_links, links = len(links), links[:_MOST_LINKS]
    led = list(dict.fromkeys(link.feature for link in links if link.is_prompt))
    taken = list(dict.fromkeys(token for link in links for token in _joined(link, owned)))
    if towards is not None and towards not in taken:
        taken.append(towards)
    few = len(output_labels) <= _FEW_TOKENS or not taken
    shown = range(len(input_labels)) if len(input_labels) <= _FEW else sorted(led)
    labelled = range(len(output_labels)) if few else sorted(taken)
    drawn = _Flow(
        links,
        {i: label(input_labels[i], _LABEL_WIDTH) for i in shown},
        {i: label(output_labels[i], _LABEL_WIDTH) for i in labelled},
        led,
        taken,
        owned,
        towards,
        bool(output.size),
        widest,
        least,
        most,
        n_links,
        len(output_labels) if not few else 0,
        paper.unit,
        is_unsigned,
    )
    fig, ax = paper.open(8.0, 2 * _MARGIN + _PITCH * drawn.height)
    ax.set_axis_off()
    settle(ax)
    Fitted(ax, drawn.lay_out)
    return paper.finish(fig, ax)


@dataclass(frozen=True)
class _Flow:
    """The content of the plot, independent of the size of the axes.

    Attributes:
        links: The strongest first.
        words: Text of the prompt's features that are shown.
        tokens: Text of the tokens that are shown.
        led, taken: Which of these are linked, by priority for room.
        owned: The tokens of each output feature.
        towards: The token that is explained, if only one is.
        has_arcs: Whether there may be links from earlier output.
        widest: The largest attribution to the prompt, and to earlier output.
        least: Share of it below which links are left out.
        most: Maximum number of causes per token.
        n_links: Number of links, including those that are not drawn.
        n_tokens: Number of tokens, if not all are shown; otherwise 0.
        unit: Unit of the attributions.
        is_unsigned: Whether these have no sign.
    """

    links: Sequence[_Link]
    words: dict[int, str]
    tokens: dict[int, str]
    led: Sequence[int]
    taken: Sequence[int]
    owned: Sequence[Sequence[int]]
    towards: int | None
    has_arcs: bool
    widest: tuple[float, float]
    least: float
    most: int
    n_links: int
    n_tokens: int
    unit: str | None
    is_unsigned: bool

    @property
    def height(self) -> int:
        """Height in rows."""
        return max(len(self.words), len(self.tokens), 1)

    def lay_out(self, ax: Axes, renderer: Any) -> None:
        """Draws the plot into the axes."""
        width, tall = inches(ax)
        key = self._key(width * 72)
        below = _MARGIN + key.count("\n") * KEY_LINE / 72
        row = max(tall - _MARGIN - below, 0.1) / self.height
        ax.set_xlim(0, width)
        ax.set_ylim(self.height - 0.5 + below / row, -0.5 - _MARGIN / row)
        columns = ((self.words, self.led), (self.tokens, self.taken))
        words, tokens = (
            _written(ax, texts, _spread(len(texts), self.height), linked, renderer)
            for texts, linked in columns
        )
        _place(ax, words, tokens, self.has_arcs)
        for link in self.links:
            _draw(ax, link, words, tokens, self.owned, self.is_unsigned)
        if self.towards is not None:
            _frame(tokens, self.towards)
        text = ax.text(0, 0, key, transform=ax.transAxes, va="bottom", color=MUTED)
        text.set(size=LABEL_POINTS)
        text.set_in_layout(False)

    def _key(self, width: float) -> str:
        unit = f" {self.unit}" if self.unit else ""
        drawn = {link.is_prompt for link in self.links}
        names = ((True, "prompt"), (False, "generated"))
        widest = [
            f"{name} {size:.3g}{unit}" if len(drawn) > 1 else f"{size:.3g}{unit}"
            for (side, name), size in zip(names, self.widest, strict=True)
            if side in drawn
        ]
        parts = {
            f"widest: {' and '.join(widest)}": bool(widest),
            "solid: raises": not self.is_unsigned and any(link.value > 0 for link in self.links),
            "dashed: lowers": any(link.value < 0 for link in self.links),
            f"the {self.most} strongest of each token": True,
            f"left out: what may be noise, of unknown error, or below {self.least:.0%}": True,
            f"the {len(self.links)} strongest of {self.n_links:,}": self.n_links > len(self.links),
            f"{len(self.tokens)} of {self.n_tokens} tokens: those with links": self.n_tokens > 0,
        }
        return key_lines([text for text, needed in parts.items() if needed], width)


class _Link(NamedTuple):
    """A drawn attribution: to a feature of the prompt, or one of the output."""

    is_prompt: bool
    feature: int
    token: int
    value: float
    share: float  # relative to the largest of its kind


def _owned(features: Sequence[int | None] | None, n_target: int, n_output: int) -> list[list[int]]:
    """The tokens of each output feature."""
    if features is None:
        if n_output not in (0, n_target):
            raise ValueError(
                f"there are {n_output} output features for {n_target} tokens: give "
                "`output_features`, the feature of every token."
            )
        features = range(n_output)
    owned: list[list[int]] = [[] for _ in range(n_output)]
    for token, feature in enumerate(features):
        if feature is not None and n_output:
            owned[feature].append(token)
    return owned


def _links(
    values: Array,
    errors: npt.ArrayLike | None,
    least: float,
    widest: float,
    sure: float,
    is_prompt: bool,
) -> Iterator[_Link]:
    name = "prompt_errors" if is_prompt else "output_errors"
    spread = np.zeros(values.shape) if errors is None else array(name, errors, values.shape)
    size = np.abs(np.nan_to_num(values))
    significant = (size > 0) & (size >= least * widest) & (size >= sure * spread)
    for token, feature in np.argwhere(significant):
        value = float(values[token, feature])
        yield _Link(is_prompt, int(feature), int(token), value, value / widest)


def _strongest_of_each(links: Sequence[_Link], most: int) -> list[_Link]:
    """The strongest links of every token, on their own scales."""
    of_token: dict[int, list[_Link]] = {}
    for link in sorted(links, key=lambda link: -abs(link.share)):
        of_token.setdefault(link.token, []).append(link)
    return [link for own in of_token.values() for link in own[:most]]


def _leading_to(token: int, links: Sequence[_Link], owned: Sequence[Sequence[int]]) -> list[_Link]:
    reached, kept = {token}, list[_Link]()
    for link in sorted(links, key=lambda link: -link.token):
        if link.token in reached:
            kept.append(link)
            reached |= set() if link.is_prompt else set(owned[link.feature])
    return kept


def _joined(link: _Link, owned: Sequence[Sequence[int]]) -> list[int]:
    """The tokens at both ends."""
    return [link.token, *(() if link.is_prompt else owned[link.feature])]


def _spread(n: int, height: int) -> Array:
    """`n` rows centred in the height, spread a little if there is room."""
    pitch = min(2.0, (height - 1) / max(n - 1, 1))
    places = (height - 1) / 2 + (np.arange(n) - (n - 1) / 2) * pitch
    return np.asarray(places, dtype=np.float64)


# Words -------------------------------------------------------------------------------------------


@dataclass
class _Column:
    """A column of words.

    Attributes:
        rows: Row of each item, from the top.
        texts: The items that fit.
        widths: Widths of the texts in inches.
        edge: Inches from the left at which curves to the other column end.
    """

    rows: dict[int, float]
    texts: dict[int, Text]
    widths: dict[int, float]
    edge: float = 0.0

    @property
    def width(self) -> float:
        return max(self.widths.values(), default=0.0)


def _written(
    ax: Axes, texts: dict[int, str], rows: Array, linked: Sequence[int], renderer: Any
) -> _Column:
    """Writes the texts that fit, linked ones first; `_place` positions them later."""
    items, style = list(texts), text_style(texts.values())
    pitch = inches_per_unit(ax)[1] * (rows[1] - rows[0] if len(rows) > 1 else 1.0)
    kept = thinned(len(items), pitch, [items.index(item) for item in linked])
    column = _Column(dict(zip(items, rows.tolist(), strict=True)), {}, {})
    dpi = fig.dpi if (fig := ax.get_figure(root=True)) else 72.0
    for item in (items[k] for k in kept):
        ink = DARK if item in linked else FAINT
        text = ax.text(0, column.rows[item], texts[item], va="center", color=ink, **style)
        text.set_in_layout(False)
        column.texts[item] = text
        column.widths[item] = text.get_window_extent(renderer).width / dpi
    return column


def _place(ax: Axes, words: _Column, tokens: _Column, has_arcs: bool) -> None:
    """Places the prompt on the left, the answer in the middle, and leaves room for arcs."""
    free = max(inches(ax)[0] - words.width - tokens.width - 4 * _GAP, 1.0)
    words.edge = words.width + _GAP
    tokens.edge = words.edge + free * (0.5 if has_arcs else 1.0)
    for text in words.texts.values():
        text.set(x=words.edge - _GAP, ha="right")
    for text in tokens.texts.values():
        text.set(x=tokens.edge + _GAP, ha="left")
    headings = {"prompt": (words.edge - _GAP, "right"), "generated": (tokens.edge + _GAP, "left")}
    for name, (x, side) in headings.items():
        heading = ax.text(x, ax.get_ylim()[1], name, ha=side, va="top", color=MUTED)
        heading.set(size=LABEL_POINTS + 1)


# Curves ------------------------------------------------------------------------------------------


def _draw(
    ax: Axes,
    link: _Link,
    words: _Column,
    tokens: _Column,
    owned: Sequence[Sequence[int]],
    is_unsigned: bool,
) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    end = tokens.rows[link.token]
    if link.is_prompt:
        start, middle = words.rows[link.feature], (words.edge + tokens.edge) / 2
        xs = (words.edge, middle, middle, tokens.edge)
    else:
        own = owned[link.feature]
        # Outgoing curves start below incoming ones.
        start = float(np.mean([tokens.rows[token] for token in own])) + _APART
        end -= _APART
        left = max(_right(tokens, token) for token in own)
        ends = left, _right(tokens, link.token)
        bulge = max(ends) + _bulge(ax, tokens, max(ends), end - start)
        xs = (ends[0], bulge, bulge, ends[1])
    points = list(zip(xs, (start, start, end, end), strict=True))
    width = max(_WIDEST * abs(link.share), 0.6)
    raises = link.value > 0
    curve = PathPatch(
        Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]),
        facecolor="none",
        edgecolor=SIZE if is_unsigned else UP if raises else DOWN,
        alpha=0.75,
        linewidth=width,
        linestyle="-" if raises else (0, (2.0 + 3.0 / width, 1.0 + 1.5 / width)),
        capstyle="butt",
        gid=f"{'prompt' if link.is_prompt else 'output'} {link.feature} {link.token}",
    )
    curve.set_in_layout(False)
    ax.add_patch(curve)


def _right(tokens: _Column, token: int) -> float:
    return tokens.edge + _GAP + tokens.widths.get(token, 0.0) + _GAP / 2


def _bulge(ax: Axes, tokens: _Column, start: float, rows: float) -> float:
    """How far the control points of an arc extend: far arcs pass outside near ones."""
    room = inches(ax)[0] - start
    share = rows / max(max(tokens.rows.values()) - min(tokens.rows.values()), 1.0)
    return 0.2 + 1.2 * room * share**0.8


def _frame(tokens: _Column, token: int) -> None:
    text = tokens.texts.get(token)
    if text is not None:
        text.set_bbox({"facecolor": "none", "edgecolor": DARK, "pad": 2.0})
