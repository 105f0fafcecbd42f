"""Which token belongs to which span."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from captum_llm_ext.segment import Span, Unit, nest, segment, shorten, strings
from captum_llm_ext.tokens import Encoding


@dataclass(frozen=True)
class Ownership:
    """Spans that own whole tokens.

    Attributes:
        spans: In reading order, none without a token.
        owners: Per token the number of its span, or None for fixed text.
        coarse: The spans of coarser units, from coarse to fine.
    """

    spans: list[Span]
    owners: list[int | None]
    coarse: list[list[Span]]


def own(
    text: str,
    units: Sequence[Unit],
    encoding: Encoding,
    *,
    fixed: Sequence[tuple[int, int]] | Sequence[str] = (),
    with_special: bool = False,
) -> Ownership:
    """Cuts a text and gives every token to the span that holds its first visible character.

    Args:
        text: The text.
        units: From coarse to fine; the finest makes the spans.
        encoding: Its tokens.
        fixed: Spans or texts whose tokens are nobody's.
        with_special: Whether special tokens become spans of their own.

    Raises:
        ValueError: If nothing owns a token, or a span of the user's owns none.
    """
    *coarse, finest = _levels(text, units, encoding)
    spans = _without(finest, _fixed_spans(text, fixed), text)
    if units[-1] == "token":
        spans, owners = _one_each(spans, encoding)
    else:
        owners = _by_anchor(spans, encoding)
    if not any(owner is not None for owner in owners):
        raise ValueError(f"the prompt {shorten(text)!r} has no token of its own to attribute to.")
    spans, owners = _owning(text, spans, owners, may_merge=isinstance(units[-1], str))
    if with_special:
        spans, owners = _with_special(spans, owners, encoding)
    return Ownership(spans, owners, coarse)


def _levels(text: str, units: Sequence[Unit], encoding: Encoding) -> list[list[Span]]:
    if units[-1] != "token":
        return nest(text, units)
    coarse = nest(text, units[:-1]) if len(units) > 1 else []
    borders = pairwise([*encoding.starts, len(text)])
    own = [
        Span(min(a, b), b)
        for anchor, (a, b) in zip(encoding.anchors, borders, strict=True)
        # What lies between the coarser spans, such as a chat's template, is fixed text.
        if anchor is not None and (not coarse or _is_within(anchor, coarse[-1]))
    ]
    return [*coarse, own]


def _is_within(place: int, spans: Sequence[Span]) -> bool:
    at = bisect_right([span.start for span in spans], place) - 1
    return at >= 0 and place < spans[at].stop


def _fixed_spans(text: str, fixed: Sequence[tuple[int, int]] | Sequence[str]) -> list[Span]:
    if isinstance(fixed, str):
        raise TypeError("`fixed` is one string: give a list of texts or of (start, stop) pairs.")
    if not len(fixed):
        return []
    if all(isinstance(part, str) for part in fixed):
        return segment(text, strings(cast(Sequence[str], fixed)))
    return segment(text, cast(Sequence[tuple[int, int]], fixed))


def _without(spans: Sequence[Span], holes: Sequence[Span], text: str) -> list[Span]:
    """What the holes leave of the spans; nothing but white space is not worth a feature."""
    if not holes:
        return list(spans)
    kept: list[Span] = []
    stops = [hole.stop for hole in holes]
    for start, stop in spans:
        for hole in holes[bisect_right(stops, start) :]:
            if hole.start >= stop:
                break
            kept.append(Span(start, max(start, hole.start)))
            start = min(hole.stop, stop)
        kept.append(Span(start, stop))
    kept = [span for span in kept if text[span.start : span.stop].strip()]
    if not kept:
        raise ValueError("everything is `fixed`: leave something to attribute to.")
    return kept


def _by_anchor(spans: Sequence[Span], encoding: Encoding) -> list[int | None]:
    starts = [span.start for span in spans]
    owners: list[int | None] = []
    for anchor in encoding.anchors:
        at = -1 if anchor is None else bisect_right(starts, anchor) - 1
        owners.append(at if at >= 0 and anchor is not None and anchor < spans[at].stop else None)
    return owners


def _one_each(spans: Sequence[Span], encoding: Encoding) -> tuple[list[Span], list[int | None]]:
    """Every token a span. Of several tokens of one character the first has its text."""
    if len(spans) == sum(anchor is not None for anchor in encoding.anchors):
        numbers = iter(range(len(spans)))
        return list(spans), [None if a is None else next(numbers) for a in encoding.anchors]
    # Some are fixed: what is left of a token is its own if it holds its first visible character.
    owners = _by_anchor(spans, encoding)
    return list(spans), owners


def _owning(
    text: str, spans: Sequence[Span], owners: Sequence[int | None], *, may_merge: bool
) -> tuple[list[Span], list[int | None]]:
    """Leaves out spans without a token.

    Tokens of some tokenizers run across words: such words are one feature. Spans that the user
    drew are never changed.
    """
    owning = {owner for owner in owners if owner is not None}
    if len(owning) == len(spans):
        return list(spans), list(owners)
    if not may_merge:
        start, stop = next(span for i, span in enumerate(spans) if i not in owning)
        raise ValueError(
            f"span ({start}, {stop}) {text[start:stop]!r} owns no whole token (its first one "
            "begins before it): widen it to the border of a token."
        )
    kept = sorted(owning)
    number = {old: new for new, old in enumerate(kept)}
    stops = [spans[after - 1].stop for after in [*kept[1:], len(spans)]]
    merged = [Span(spans[old].start, stop) for old, stop in zip(kept, stops, strict=True)]
    return merged, [None if owner is None else number[owner] for owner in owners]


def _with_special(
    spans: Sequence[Span], owners: Sequence[int | None], encoding: Encoding
) -> tuple[list[Span], list[int | None]]:
    """Every special token as a span of its own, numbered in reading order."""
    keys: list[int | tuple[int, int] | None] = [
        (place, -1) if anchor is None else owner
        for place, (owner, anchor) in enumerate(zip(owners, encoding.anchors, strict=True))
    ]
    order = list(dict.fromkeys(key for key in keys if key is not None))
    number = {key: i for i, key in enumerate(order)}
    found = [
        spans[key]
        if isinstance(key, int)
        else Span(encoding.starts[key[0]], encoding.starts[key[0]])
        for key in order
    ]
    return found, [None if key is None else number[key] for key in keys]
