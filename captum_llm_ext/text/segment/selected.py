"""Selected parts of a text. Text between them is fixed."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, get_args

from captum_llm_ext.text.segment.named import Named
from captum_llm_ext.text.segment.span import Segmenter, Span, shorten, tiles, whole

Delimiter = Literal["fixed", "following"]


def pattern(regex: str | re.Pattern[str], group: int | str = 0) -> Segmenter:
    r"""Each match of a regular expression, or of one of its groups, is a feature.

    A match that ends inside a grapheme cluster is extended to all of it, so ``pattern(r"(?s).")``
    gives one feature per visible character. Empty matches are ignored.

    Example:
        >>> text = "city=Paris year=2024"
        >>> [text[start:stop] for start, stop in pattern(r"=(\w+)", 1)(text)]
        ['Paris', '2024']

    Raises:
        ValueError: Immediately, if `regex` is malformed or has no such group; on a text, if nothing
            matches.
    """
    compiled = _compiled(regex)
    if group not in compiled.groupindex and group not in range(compiled.groups + 1):
        raise ValueError(
            f"regular expression {compiled.pattern!r} has no group {group!r}: give one of "
            f"{[*range(compiled.groups + 1), *compiled.groupindex]}."
        )
    call = (
        f"pattern({compiled.pattern!r})"
        if group == 0
        else f"pattern({compiled.pattern!r}, {group!r})"
    )

    def find(text: str) -> list[Span]:
        found = (match.span(group) for match in compiled.finditer(text))
        return _check_found(whole(text, (span for span in found if span[0] < span[1])), call, text)

    return Named(call, find)


def between(opening: str | re.Pattern[str], closing: str | re.Pattern[str]) -> Segmenter:
    """The text between an opening and the next closing marker is a feature.

    For passages in ``<doc>…</doc>`` etc.: markers, and white space before a closing one, are fixed
    text; white space after an opening one belongs to the passage. Markers do not nest.

    Args:
        opening: A string taken literally, or a compiled pattern.
        closing: As `opening`; it may be the same.

    Raises:
        ValueError: Immediately, if a marker is empty; on a text, if there is nothing between
            markers, or an opening one is never closed.

    Example:
        >>> text = "Read <doc>one</doc> and <doc>two</doc>."
        >>> [text[start:stop] for start, stop in between("<doc>", "</doc>")(text)]
        ['one', 'two']
    """
    first, last = _marker(opening), _marker(closing)
    call = f"between({_marker_text(opening)}, {_marker_text(closing)})"

    def find(text: str) -> list[Span]:
        return _check_found(
            whole(text, _stripped_parts(text, _enclosed(text, first, last, call))), call, text
        )

    return Named(call, find)


def blocks(delimiter: str | re.Pattern[str], *, delimiter_is: Delimiter = "fixed") -> Segmenter:
    r"""Blocks separated, or begun, by a delimiter: few-shot examples, turns of a dialogue.

    Args:
        delimiter: A string taken literally, or a compiled pattern.
        delimiter_is: ``"fixed"``: the delimiter separates blocks and belongs to no feature
            (``blocks("###")``). ``"following"``: it begins a block and belongs to it
            (``blocks("Q:", delimiter_is="following")``), so that the blocks tile the text. In both
            cases the text before the first delimiter is a block too.

    Raises:
        ValueError: Immediately, if the delimiter is empty or `delimiter_is` unknown; on a text, if
            it does not contain the delimiter, or nothing else.

    Example:
        >>> text = "Q: 1+1 A: 2 Q: 2+2 A: 4"
        >>> [text[start:stop] for start, stop in blocks("Q:", delimiter_is="following")(text)]
        ['Q: 1+1 A: 2', ' Q: 2+2 A: 4']
    """
    if delimiter_is not in get_args(Delimiter):
        choices = ", ".join(map(repr, get_args(Delimiter)))
        raise ValueError(f"`delimiter_is` is {delimiter_is!r}: give one of {choices}.")
    marker = _marker(delimiter)
    call = f"blocks({_marker_text(delimiter)}, delimiter_is={delimiter_is!r})"

    def find(text: str) -> list[Span]:
        marks = list(_marker_spans(marker, text))
        _check_found(marks, call, text)
        if delimiter_is == "following":
            return tiles(text, (mark.start for mark in marks))
        return _check_found(whole(text, _stripped_parts(text, _gaps(text, marks))), call, text)

    return Named(call, find)


def strings(texts: Iterable[str]) -> Segmenter:
    """Each of these strings is a feature, searched in order, each after the previous one.

    Raises:
        TypeError: If `texts` is one string, or contains anything but strings.
        ValueError: Immediately, if there is none, or one is empty; on a text, if one is not found.
    """
    wanted = list(texts)
    if isinstance(texts, str) or not all(isinstance(item, str) for item in wanted):
        raise TypeError(f"`strings` takes a list of strings, not {texts!r}.")
    if not wanted or not all(wanted):
        raise ValueError("`strings` needs at least one string, and none that is empty.")
    return Named(f"strings({wanted!r})", lambda text: _find_in_order(text, wanted), positional=True)


def spans(pairs: Iterable[tuple[int, int]]) -> Segmenter:
    """These ``(start, stop)`` character positions, for every text.

    Raises:
        TypeError: If one of them is not a pair of integers.
    """
    fixed = [as_span(pair) for pair in pairs]
    return Named(f"spans({[tuple(span) for span in fixed]!r})", lambda _: fixed, positional=True)


def as_span(pair: Iterable[int]) -> Span:
    """A checked pair of character positions."""
    values = tuple(pair) if isinstance(pair, Iterable) else (pair,)
    if len(values) != 2 or not all(isinstance(value, int) for value in values):
        raise TypeError(f"span {pair!r} is not a (start, stop) pair of character positions.")
    return Span(*values)


def _compiled(regex: str | re.Pattern[str]) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        raise ValueError(f"{regex!r} is not a regular expression: {error}.") from error


def _marker(marker: str | re.Pattern[str]) -> re.Pattern[str]:
    compiled = re.compile(re.escape(marker)) if isinstance(marker, str) else marker
    if not compiled.pattern:
        raise ValueError("an empty marker marks nothing: give a string, or a compiled pattern.")
    return compiled


def _marker_text(marker: str | re.Pattern[str]) -> str:
    return repr(marker) if isinstance(marker, str) else f"re.compile({marker.pattern!r})"


def _enclosed(
    text: str, opening: re.Pattern[str], closing: re.Pattern[str], call: str
) -> Iterator[tuple[int, int]]:
    position = 0
    while after := _next_match(opening, text, position):
        before = _next_match(closing, text, after.stop)
        if not before:
            raise ValueError(
                f"{call}: the marker at character {after.start} "
                f"({shorten(text[after.start :])!r}) is never closed: close it, or use `blocks`."
            )
        yield after.stop, before.start
        position = before.stop


def _next_match(marker: re.Pattern[str], text: str, position: int) -> Span | None:
    return next(_marker_spans(marker, text, position), None)


def _marker_spans(marker: re.Pattern[str], text: str, position: int = 0) -> Iterator[Span]:
    """Spans of all matches of the marker, empty ones left out."""
    found = (Span(*match.span()) for match in marker.finditer(text, position))
    return (span for span in found if span.start < span.stop)


def _gaps(text: str, marks: Sequence[Span]) -> Iterator[tuple[int, int]]:
    for before, after in pairwise([Span(0, 0), *marks, Span(len(text), len(text))]):
        yield before.stop, after.start


def _stripped_parts(text: str, parts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts stripped of white space; empty ones are left out."""
    for start, stop in parts:
        content = text[start:stop].rstrip()
        if content:
            # At the end of the text, white space has nothing else to belong to.
            yield start, stop if stop == len(text) else start + len(content)


def _find_in_order(text: str, wanted: Sequence[str]) -> list[Span]:
    found: list[Span] = []
    position = 0
    for number, item in enumerate(wanted):
        start = text.find(item, position)
        if start < 0:
            earlier = text.find(item)
            hint = f"it stands at character {earlier} only" if earlier >= 0 else "it is nowhere"
            raise ValueError(
                f"string {number} {shorten(item)!r} is not found from character {position} on "
                f"({hint}): give strings of the text, in its order."
            )
        position = start + len(item)
        found.append(Span(start, position))
    return found


def _check_found(found: list[Span], call: str, text: str) -> list[Span]:
    if not found:
        raise ValueError(f"{call} finds nothing in the text {shorten(text)!r}.")
    return found
