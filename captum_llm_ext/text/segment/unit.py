"""Converts what a user may give as a unit to checked spans."""

from collections.abc import Sequence
from itertools import pairwise

from captum_llm_ext.text.segment.markdown import markdown_blocks
from captum_llm_ext.text.segment.prose import lines, paragraphs, sentences, words
from captum_llm_ext.text.segment.selected import as_span, spans
from captum_llm_ext.text.segment.span import Segmenter, Span, shorten

Unit = str | Segmenter | Sequence[tuple[int, int]]

_SEGMENTERS: dict[str, Segmenter] = {
    "word": words,
    "sentence": sentences,
    "line": lines,
    "paragraph": paragraphs,
    "block": markdown_blocks,
}
NAMED_UNITS = tuple(_SEGMENTERS)
"""Named units, besides ``"token"``, which needs a tokenizer."""


def segmenter(unit: Unit) -> Segmenter:
    """The segmenter of a unit.

    Args:
        unit: ``"word"``, ``"sentence"``, ``"line"``, ``"paragraph"``, ``"block"`` (of Markdown), a
            callable ``text -> list[Span]``, or the spans themselves as ``(start, stop)`` pairs.
            (``"token"`` needs a tokenizer: see `TextSegmentInput`.)

    Raises:
        ValueError: If the name is unknown.
        TypeError: If `unit` is none of these.
    """
    if isinstance(unit, str):
        if unit == "token":
            raise ValueError(
                "unit 'token' needs a tokenizer: give it to `TextSegmentInput`, or give the "
                "tokens' own (start, stop) pairs."
            )
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
        return spans(unit)
    raise TypeError(
        f"`unit` is a {type(unit).__name__}: give a name such as 'word', (start, stop) pairs, "
        "or a callable `text -> list of (start, stop)`."
    )


def has_explicit_spans(unit: Unit) -> bool:
    """Whether a unit is the user's own spans of one text, which are used unchanged."""
    by_hand = isinstance(unit, Sequence) and not isinstance(unit, str)
    return by_hand or bool(getattr(unit, "positional", False))


def unit_name(unit: Unit) -> str:
    """The name of one span of the unit, for messages and plots."""
    if isinstance(unit, str):
        return unit
    return str(getattr(unit, "title", None) or getattr(unit, "__name__", "span"))


def shown_unit(unit: object) -> str:
    """A unit as shown in messages: functions by their names, other units as written."""
    return str(getattr(unit, "__name__", None) or repr(unit))


def segment(text: str, unit: Unit) -> list[Span]:
    """The spans of `unit` in `text`, checked and in reading order.

    Text between spans belongs to no feature.

    Raises:
        ValueError: If there is no span, or spans are empty, overlap or exceed the text.
    """
    found = sorted(as_span(pair) for pair in segmenter(unit)(text))
    if not found:
        raise ValueError(
            f"unit {shown_unit(unit)} finds no feature in the text {shorten(text)!r}: "
            "give a text with content, or other spans."
        )
    for span in found:
        if not 0 <= span.start < span.stop <= len(text):
            raise ValueError(
                f"span ({span.start}, {span.stop}) is empty or leaves the text of "
                f"{len(text)} characters: give 0 <= start < stop <= {len(text)}."
            )
    for before, after in pairwise(found):
        if after.start < before.stop:
            raise ValueError(
                f"spans ({before.start}, {before.stop}) and ({after.start}, {after.stop}) "
                "overlap: give spans that share no character."
            )
    return found
