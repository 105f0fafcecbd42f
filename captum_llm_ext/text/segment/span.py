"""Spans of a text, and two ways to make them: tile the text, or select parts of it."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from captum_llm_ext.text.segment.graphemes import joints


class Span(NamedTuple):
    """Characters from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int


Segmenter = Callable[[str], list[Span]]


def tiles(text: str, cuts: Iterable[int]) -> list[Span]:
    """The pieces of `text` between `cuts`, which tile it; none is white space alone.

    White space before a cut goes to the piece after it. Cuts inside a grapheme cluster are ignored.

    Args:
        text: The text.
        cuts: Positions in the text, ascending; 0 and ``len(text)`` need not be among them.
    """
    inside = joints(text)
    spans: list[Span] = []
    # Content before the last cut ends at `end`; each cut looks back no further than the previous
    # one, so that the cost is linear in text and cuts.
    start = end = last = 0
    for cut in cuts:
        end = _content_end(text, last, cut, end)
        last = cut
        if end > start and end not in inside:
            spans.append(Span(start, end))
            start = end
    if _content_end(text, last, len(text), end) > start:
        spans.append(Span(start, len(text)))
    elif spans:
        spans[-1] = Span(spans[-1].start, len(text))
    return spans


def whole(text: str, spans: Iterable[tuple[int, int]]) -> list[Span]:
    """`spans`, ascending, each extended to whole grapheme clusters; overlapping ones are merged."""
    inside = joints(text)
    widened: list[Span] = []
    for start, stop in spans:
        shared = bool(widened) and start < widened[-1].stop
        if shared:
            # Its cluster is already taken: only the part beyond can be new.
            start, taken = widened.pop()
            stop = max(stop, taken)
        while not shared and start in inside:
            start -= 1
        while stop in inside:
            stop += 1
        widened.append(Span(start, stop))
    return widened


def shorten(text: str, width: int = 40) -> str:
    """The beginning of a text, for messages and names: "It is 1,64…" is worse than "It is…".

    Cut behind a word where that keeps half of the width, and inside no grapheme cluster. A text in
    quotation marks, or that ends with such, keeps the closing one.

    Args:
        text: The text.
        width: Characters at most, with the sign that something is missing.
    """
    if len(text) <= width:
        return text
    missing = "…”" if text.endswith("”") and "“" in text[: width - 2] else "…"
    stop, inside = width - len(missing), joints(text[: 2 * width])
    while stop in inside:
        stop -= 1
    kept = text[:stop].rstrip()
    if len(kept) == stop and not text[stop].isspace():
        behind = kept[: max(kept.rfind(" "), 0)].rstrip()
        kept = behind if len(behind) >= width // 2 else kept
    return kept + missing


def _content_end(text: str, start: int, stop: int, otherwise: int) -> int:
    content = text[start:stop].rstrip()
    return start + len(content) if content else otherwise
