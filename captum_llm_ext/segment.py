"""Where the features of a text begin and end.

A segmenter maps a text to the spans of its features. White space always belongs to what follows
it: a word that is removed together with its leading space leaves every other token as it was,
one removed with its trailing space never does. White space at the very end has nothing after it
and stays with the last span.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple


class Span(NamedTuple):
    """Characters ``start`` up to, not including, ``stop``."""

    start: int
    stop: int


Segmenter = Callable[[str], list[Span]]
Unit = str | Segmenter | Sequence[tuple[int, int]]

# Scripts written without spaces: one character is the smallest thing a reader would call a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"\s*(?:[{_UNSPACED}][^\w\s]*|[^\s{_UNSPACED}]+)")

_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr rev hon gen col capt lt sgt gov sen rep pres messrs mt ft "
    "vs etc al cf e.g i.e a.m p.m no nos vol pp p fig figs eq sec ch ed eds dept univ approx "
    "inc ltd co corp bros u.s u.k u.n d.c ph.d b.a m.a jan feb mar apr jun jul aug sep sept "
    "oct nov dec mon tue wed thu fri sat sun".split()
)
# These do end sentences as often as not: a capital after them decides.
_MAY_END = frozenset("etc a.m p.m inc ltd co corp jr sr u.s u.k u.n d.c al ph.d b.a m.a".split())
_STOP = re.compile(
    r"(?:(?P<wide>[。！？｡]+[」』）”’]*)|(?P<mark>[.!?…]+)[\"'”’)\]»]*(?=\s)|(?P<gap>\n[^\S\n]*\n))"
)


def words(text: str) -> list[Span]:
    """White-space separated words, punctuation attached; one character each in CJK scripts."""
    return _with_trailing_space([Span(*match.span()) for match in _WORD.finditer(text)], text)


def sentences(text: str) -> list[Span]:
    """Sentences by rule: abbreviations, initials and decimals end none, an empty line always does.

    The rules are for languages that end sentences with ``. ! ? …`` or their full-width forms.
    """
    spans: list[Span] = []
    start = 0
    for match in _STOP.finditer(text):
        stop = match.start() if match["gap"] else match.end()
        if not text[start:stop].strip():
            continue
        if match["mark"] and not _ends_sentence(text, match.start("mark"), match.end()):
            continue
        spans.append(Span(start, stop))
        start = stop
    if text[start:].strip():
        spans.append(Span(start, len(text)))
    return _with_trailing_space(spans, text)


def segmenter(unit: Unit) -> Segmenter:
    """The segmenter that a unit names.

    Args:
        unit: ``"word"``, ``"sentence"``, a callable ``text -> list[Span]``, or the spans
            themselves as ``(start, stop)`` pairs. (``"token"`` needs a tokenizer: see
            `TextSegmentInput`.)

    Raises:
        ValueError: If the name is unknown.
        TypeError: If `unit` is of none of these kinds.
    """
    if isinstance(unit, str):
        if unit not in _SEGMENTERS:
            names = ", ".join(repr(name) for name in ("token", *_SEGMENTERS))
            raise ValueError(
                f"unknown unit {unit!r}: give one of {names}, (start, stop) pairs, "
                "or a callable `text -> list of (start, stop)`."
            )
        return _SEGMENTERS[unit]
    if callable(unit):
        return unit
    if isinstance(unit, Sequence):
        spans = [_as_span(pair) for pair in unit]
        return lambda text: spans
    raise TypeError(
        f"`unit` is a {type(unit).__name__}: give a name such as 'word', (start, stop) pairs, "
        "or a callable `text -> list of (start, stop)`."
    )


def segment(text: str, unit: Unit) -> list[Span]:
    """The spans of `unit` in `text`, checked and in reading order.

    What lies between spans belongs to no feature.

    Raises:
        ValueError: If there is no span, or spans are empty, overlap or leave the text.
    """
    spans = sorted(_as_span(pair) for pair in segmenter(unit)(text))
    if not spans:
        raise ValueError(
            f"unit {unit!r} finds no feature in the text {shorten(text)!r}: "
            "give a text with content, or other spans."
        )
    for span in spans:
        if not 0 <= span.start < span.stop <= len(text):
            raise ValueError(
                f"span ({span.start}, {span.stop}) is empty or leaves the text of "
                f"{len(text)} characters: give 0 <= start < stop <= {len(text)}."
            )
    for before, after in pairwise(spans):
        if after.start < before.stop:
            raise ValueError(
                f"spans ({before.start}, {before.stop}) and ({after.start}, {after.stop}) "
                "overlap: give spans that share no character."
            )
    return spans


def shorten(text: str, width: int = 40) -> str:
    """The beginning of a text, for messages."""
    return text if len(text) <= width else text[: width - 1] + "…"


def _ends_sentence(text: str, mark: int, after: int) -> bool:
    if text[mark] != "." or text[mark : mark + 2] == "..":
        return not _next_is_lower(text, after)
    word = re.search(r"[\w.]*$", text[max(0, mark - 24) : mark])
    token = word.group().lower() if word else ""
    if token in _ABBREVIATIONS:
        return token in _MAY_END and _next_is_upper(text, after)
    if len(token) == 1 and token.isalpha() and text[mark - 1].isupper() and token != "i":
        return False  # an initial: "J. Smith"
    return not _next_is_lower(text, after)


def _next_character(text: str, position: int) -> str:
    match = re.compile(r"\w").search(text, position)
    return match.group() if match else ""


def _next_is_lower(text: str, position: int) -> bool:
    return _next_character(text, position).islower()


def _next_is_upper(text: str, position: int) -> bool:
    return _next_character(text, position).isupper()


def _with_trailing_space(spans: list[Span], text: str) -> list[Span]:
    if spans and spans[-1].stop < len(text):
        spans[-1] = Span(spans[-1].start, len(text))
    return spans


def _as_span(pair: Iterable[int]) -> Span:
    values = tuple(pair) if isinstance(pair, Iterable) else (pair,)
    if len(values) != 2 or not all(isinstance(value, int) for value in values):
        raise TypeError(f"span {pair!r} is no (start, stop) pair of character positions.")
    return Span(*values)


_SEGMENTERS: dict[str, Segmenter] = {"word": words, "sentence": sentences}
