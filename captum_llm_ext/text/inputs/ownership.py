"""Assigns tokens to spans: one rule for prompts, chats, templates and generated text.

A token belongs to the span that contains its first character other than white space, including
special tokens in the text. Spans that share a token cannot be switched separately: they are merged,
or an error if the user gave them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import NamedTuple, cast

from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.text.baselines import Slot
from captum_llm_ext.text.segment import (
    Span,
    Unit,
    has_explicit_spans,
    nest,
    segment,
    shorten,
    strings,
    unit_name,
)
from captum_llm_ext.text.tokens import Encoding


@dataclass(frozen=True)
class CoarseSpans:
    """The spans of a coarser unit that own features.

    Attributes:
        spans: In reading order.
        part_of: Per span of the finest unit the index of its coarser span.
        numbers: Per span its index among those of the unit; None for a special token.
    """

    spans: list[Span]
    part_of: list[int]
    numbers: list[int | None]


@dataclass(frozen=True)
class Ownership:
    """Spans that own whole tokens.

    Attributes:
        spans: In reading order, none without a token. Each covers the text of its tokens, including
            the leading white space of the first.
        owners: Per token the index of its span, or None for fixed text.
        named: Per span the text that names it: the segment, as far as its tokens cover it.
        coarse: The parts of coarser units, from coarse to fine.
        alone: Per span whether it is a special token outside all segments.
    """

    spans: list[Span]
    owners: list[int | None]
    named: list[Span]
    coarse: list[CoarseSpans] = field(default_factory=list[CoarseSpans])
    alone: list[bool] = field(default_factory=list[bool])


class VisibleSpan(NamedTuple):
    """The characters of a token without surrounding white space."""

    start: int
    stop: int


def assign_tokens(
    text: str,
    units: Sequence[Unit],
    encoding: Encoding,
    *,
    fixed: Sequence[tuple[int, int]] | Sequence[str] = (),
    special_apart: bool = False,
) -> Ownership:
    """Segments a text and assigns every token to the span of its first visible character.

    Args:
        text: The text.
        units: From coarse to fine; the finest makes the spans.
        encoding: Its tokens.
        fixed: Fixed spans or texts: a token with a visible character of these has no owner. Neither
            has an initial BOS that the tokenizer would add.
        special_apart: Whether special tokens split named units and become spans of their own.

    Raises:
        ValueError: If everything is fixed, the user's spans share a token, or one of them owns
            none.
    """
    is_explicit = has_explicit_spans(units[-1])
    # A user's span around BOS is intended.
    fixed_spans = _fixed_spans(
        text, fixed, 0 if special_apart or is_explicit else encoding.n_opening
    )
    coarse, finest = _finest_spans(text, units, encoding, special_apart)
    if units[-1] == "token":
        spans, owners = _span_per_token(text, encoding, coarse[-1] if coarse else None, fixed_spans)
        named = spans
    else:
        finest = _subtract(finest, fixed_spans, text)
        if fixed and not finest:
            raise ValueError("everything is `fixed`: leave something to attribute to.")
        firsts, lasts = _first_and_last_spans(text, finest, encoding, fixed_spans)
        if fixed_spans and not is_explicit:
            firsts = _drop_invisible(text, finest, encoding, firsts)
        if is_explicit:
            _check_explicit_spans(text, finest, encoding, firsts, lasts)
        finest, owners = _merge_sharing_tokens(finest, firsts, lasts, is_explicit)
        spans = _token_extents(text, finest, owners, encoding)
        named = _name_spans(text, finest, spans)
    parts = [
        _coarse_parts(
            text, level, has_explicit_spans(unit), spans, owners, encoding, unit_name(unit)
        )
        for unit, level in zip(units, coarse, strict=False)
    ]
    found = Ownership(spans, owners, named, parts, [False] * len(spans))
    return found if not special_apart else _with_special_tokens(found, encoding)


def owned_slots(
    owned: Ownership,
    ids: Sequence[int],
    context: str,
    unit: str | None,
    *,
    offset: int = 0,
    generated: bool = False,
) -> list[Slot]:
    """One slot per span, each a feature by itself.

    Args:
        owned: The spans and their tokens.
        ids: The token ids.
        context: The whole text.
        unit: Name of the unit, if any.
        offset: Position in `context` at which the segmented text begins.
        generated: Whether the spans are generated text.
    """
    own_ids: list[list[int]] = [[] for _ in owned.spans]
    for token, owner in zip(ids, owned.owners, strict=True):
        if owner is not None:
            own_ids[owner].append(token)
    return [
        Slot(
            context,
            offset + start,
            offset + stop,
            tuple(own_ids[index]),
            index,
            index,
            unit,
            generated,
        )
        for index, (start, stop) in enumerate(owned.spans)
    ]


def _finest_spans(
    text: str, units: Sequence[Unit], encoding: Encoding, special_apart: bool
) -> tuple[list[list[Span]], list[Span]]:
    coarse = nest(text, units[:-1]) if len(units) > 1 else []
    unit = units[-1]
    if unit == "token":
        return coarse, []
    if not special_apart or not isinstance(unit, str):
        return coarse, nest(text, units)[-1]
    special = [
        Span(encoding.starts[i], encoding.stops[i])
        for i, is_special in enumerate(encoding.special)
        if is_special and encoding.anchors[i] is not None
    ]
    finest: list[Span] = []
    for outer in coarse[-1] if coarse else [Span(0, len(text))]:
        for (start, stop), is_special in _split_at_special_tokens(text, outer, special):
            if is_special:
                finest.append(Span(start, stop))
            else:
                inner = segment(text[start:stop], unit)
                finest += [Span(start + a, start + b) for a, b in inner]
    return coarse, finest


def _split_at_special_tokens(
    text: str, outer: Span, special: Sequence[Span]
) -> list[tuple[Span, bool]]:
    """Splits a span at its special tokens; white space alone joins the part after it."""
    cuts: list[tuple[Span, bool]] = []
    position = outer.start
    first = bisect_left([token.start for token in special], outer.start)
    for token in takewhile(lambda token: token.stop <= outer.stop, special[first:]):
        content = len(text[position : token.start].rstrip())
        if content:
            cuts.append((Span(position, position + content), False))
            position += content
        cuts.append((Span(position, token.stop), True))
        position = token.stop
    if text[position : outer.stop].strip():
        cuts.append((Span(position, outer.stop), False))
    elif cuts:
        (start, _), is_special = cuts.pop()
        cuts.append((Span(start, outer.stop), is_special))
    return cuts


def _fixed_spans(
    text: str, fixed: Sequence[tuple[int, int]] | Sequence[str], n_opening: int
) -> list[Span]:
    """The spans that the user fixed, and the BOS at the beginning of the text."""
    if isinstance(fixed, str):
        raise TypeError("`fixed` is one string: give a list of texts or of (start, stop) pairs.")
    fixed_spans: list[Span] = []
    if len(fixed) and all(isinstance(part, str) for part in fixed):
        fixed_spans = segment(text, strings(cast(Sequence[str], fixed)))
    elif len(fixed):
        fixed_spans = segment(text, cast(Sequence[tuple[int, int]], fixed))
    if n_opening and not (fixed_spans and fixed_spans[0].start < n_opening):
        fixed_spans = [Span(0, n_opening), *fixed_spans]
    return fixed_spans


def _subtract(spans: Sequence[Span], fixed_spans: Sequence[Span], text: str) -> list[Span]:
    """The spans minus the fixed ones, without parts that are white space alone."""
    if not fixed_spans:
        return list(spans)
    kept: list[Span] = []
    stops = [fixed_span.stop for fixed_span in fixed_spans]
    for start, stop in spans:
        for fixed_span in fixed_spans[bisect_right(stops, start) :]:
            if fixed_span.start >= stop:
                break
            kept.append(Span(start, max(start, fixed_span.start)))
            start = min(fixed_span.stop, stop)
        kept.append(Span(start, stop))
    return [span for span in kept if text[span.start : span.stop].strip()]


def _visible(text: str, encoding: Encoding, place: int) -> VisibleSpan:
    anchor = cast(int, encoding.anchors[place])
    shown = text[anchor : encoding.stops[place]].rstrip()
    return VisibleSpan(anchor, anchor + len(shown))


def _overlapping(
    text: str, spans: Sequence[Span], starts: Sequence[int], token: VisibleSpan
) -> range:
    """Indices of the spans that contain a visible character of the token."""
    first = bisect_right(starts, token.start) - 1
    if first < 0 or token.start >= spans[first].stop:
        first += 1
    last = first
    while last < len(spans) and (
        spans[last].start <= token.start < spans[last].stop
        or text[max(spans[last].start, token.start) : min(spans[last].stop, token.stop)].strip()
    ):
        last += 1
    return range(first, last)


def _is_fixed(
    text: str, fixed_spans: Sequence[Span], starts: Sequence[int], token: VisibleSpan
) -> bool:
    return bool(fixed_spans) and len(_overlapping(text, fixed_spans, starts, token)) > 0


def _first_and_last_spans(
    text: str, spans: Sequence[Span], encoding: Encoding, fixed_spans: Sequence[Span]
) -> tuple[list[int | None], list[int | None]]:
    """Per token the first and the last span that it overlaps; None for fixed text."""
    starts, fixed_starts = (
        [span.start for span in spans],
        [fixed_span.start for fixed_span in fixed_spans],
    )
    firsts: list[int | None] = []
    lasts: list[int | None] = []
    for place, anchor in enumerate(encoding.anchors):
        first = last = None
        if anchor is not None:
            token = _visible(text, encoding, place)
            overlapping = _overlapping(text, spans, starts, token)
            begins = (
                bool(overlapping)
                and spans[overlapping[0]].start <= anchor < spans[overlapping[0]].stop
            )
            if begins and not _is_fixed(text, fixed_spans, fixed_starts, token):
                first, last = overlapping[0], overlapping[-1]
        firsts.append(first)
        lasts.append(last)
    return firsts, lasts


def _drop_invisible(
    text: str, spans: Sequence[Span], encoding: Encoding, firsts: Sequence[int | None]
) -> list[int | None]:
    """First spans, without spans that fixed tokens reduce to white space."""
    seen: set[int] = set()
    for place, first in enumerate(firsts):
        if first is not None and text[slice(*_visible(text, encoding, place))].strip():
            seen.add(first)
    return [
        first if first is None or first in seen or not text[slice(*spans[first])].strip() else None
        for first in firsts
    ]


def _span_per_token(
    text: str, encoding: Encoding, within: Sequence[Span] | None, fixed_spans: Sequence[Span]
) -> tuple[list[Span], list[int | None]]:
    """One span per token; of several tokens of one character the first has its text."""
    starts = [span.start for span in within or ()]
    fixed_starts = [fixed_span.start for fixed_span in fixed_spans]
    borders = pairwise([*encoding.starts, len(text)])
    spans: list[Span] = []
    owners: list[int | None] = []
    for place, (anchor, (a, b)) in enumerate(zip(encoding.anchors, borders, strict=True)):
        owner = None
        # Text between the coarser spans, such as a chat template's, is fixed.
        inside = anchor is not None and (within is None or _is_within(within, starts, anchor))
        if inside and not _is_fixed(
            text, fixed_spans, fixed_starts, _visible(text, encoding, place)
        ):
            owner = len(spans)
            spans.append(Span(min(a, b), b))
        owners.append(owner)
    return spans, owners


def _is_within(spans: Sequence[Span], starts: Sequence[int], place: int) -> bool:
    at = bisect_right(starts, place) - 1
    return at >= 0 and place < spans[at].stop


def _merge_sharing_tokens(
    spans: Sequence[Span],
    firsts: Sequence[int | None],
    lasts: Sequence[int | None],
    is_explicit: bool,
) -> tuple[list[Span], list[int | None]]:
    """Merges spans that share a token; spans without tokens join the previous one."""
    owning = sorted({first for first in firsts if first is not None})
    # Per span the last one that one of its tokens reaches; everything in between is merged.
    reach: dict[int, int] = {}
    for first, last in zip(firsts, lasts, strict=True):
        if first is not None and last is not None:
            reach[first] = max(last, reach.get(first, first))
    joined: list[tuple[int, int]] = []
    for number in owning:
        if joined and number <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], reach[number]))
        else:
            joined.append((number, reach[number]))
    if joined and not is_explicit:
        # Text that the tokenizer drops is counted with the text before it.
        stops = [*(first for first, _ in joined[1:]), len(spans)]
        for i, ((first, last), stop) in enumerate(zip(joined, stops, strict=True)):
            while last + 1 < stop and spans[last + 1].start == spans[last].stop:
                last += 1
            joined[i] = (first, last)
    begins = [first for first, _ in joined]
    owners = [None if first is None else bisect_right(begins, first) - 1 for first in firsts]
    return [Span(spans[a].start, spans[b].stop) for a, b in joined], owners


def _token_extents(
    text: str, spans: Sequence[Span], owners: Sequence[int | None], encoding: Encoding
) -> list[Span]:
    """Spans extended to the characters of their tokens."""
    places: dict[int, tuple[int, int]] = {}
    for place, owner in enumerate(owners):
        if owner is not None:
            places[owner] = (places.get(owner, (place, place))[0], place)
    # Text before a token is covered; text after it begins with the next token's space.
    covered = [0]
    for stop in encoding.stops:
        covered.append(max(covered[-1], stop))
    n = len(owners)
    following = [len(text)] * (n + 1)
    for place in range(n - 1, -1, -1):
        has_text = encoding.anchors[place] is not None
        following[place] = encoding.starts[place] if has_text else following[place + 1]
    found: list[Span] = []
    for number, span in enumerate(spans):
        first, last = places[number]
        start, stop = encoding.starts[first], covered[last + 1]
        if start > span.start:
            start = min(start, max(span.start, covered[first]))
        stop = max(stop, min(span.stop, following[last + 1]))
        found.append(Span(start, max(start, stop)))
    return found


def _name_spans(text: str, is_explicit: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    """The segments as far as their tokens cover them; wider if tokens show more."""
    named: list[Span] = []
    for (first, last), (start, stop) in zip(is_explicit, spans, strict=True):
        # White space alone does not change the name.
        start = start if text[first:start].strip() else first
        differs = text[last:stop].strip() or text[stop:last].strip()
        named.append(Span(start, stop if differs else last))
    return named


def _check_explicit_spans(
    text: str,
    spans: Sequence[Span],
    encoding: Encoding,
    firsts: Sequence[int | None],
    lasts: Sequence[int | None],
) -> None:
    """Raises if the user's spans share a token; warns if one ends inside a token."""
    barren = set(range(len(spans))) - set(firsts)
    if barren:
        start, stop = spans[min(barren)]
        raise ValueError(
            f"span ({start}, {stop}) {shorten(text[start:stop])!r} owns no whole token (its first "
            "one begins before it): widen it to the border of a token."
        )
    starts = [span.start for span in spans]
    cut: list[tuple[Span, VisibleSpan]] = []
    for place, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        if encoding.anchors[place] is None:
            continue
        token = _visible(text, encoding, place)
        if first is not None and first != last:
            one, other = (text[slice(*spans[i])] for i in (first, first + 1))
            raise ValueError(
                f"spans {shorten(one)!r} and {shorten(other)!r} share the token "
                f"{text[slice(*token)]!r} and cannot be switched apart: draw one span around "
                "both, or end the first where a token ends."
            )
        if first is not None:
            if text[spans[first].stop : token.stop].strip():
                cut.append((spans[first], token))
        elif overlapping := _overlapping(text, spans, starts, token):
            cut.append((spans[overlapping[0]], token))
    if cut:
        (span, token), n = cut[0], len({span for span, _ in cut})
        others = f" (and {n - 1} more spans like it)" if n > 1 else ""
        whose = "is switched with it" if span.start <= token.start else "stays when it is absent"
        warn_user(
            f"span {tuple(span)} {shorten(text[slice(*span)])!r} has a part of the token "
            f"{text[slice(*token)]!r}, all of which {whose}{others}: end spans where tokens end.",
            UserWarning,
        )


def _coarse_parts(
    text: str,
    level: Sequence[Span],
    is_explicit: bool,
    spans: Sequence[Span],
    owners: Sequence[int | None],
    encoding: Encoding,
    name: str,
) -> CoarseSpans:
    """The spans of a coarser unit, merged where a finer span or a token overlaps two."""
    starts = [span.start for span in level]
    firsts: list[int | None] = [None] * len(spans)
    lasts: list[int | None] = [None] * len(spans)
    for place, owner in enumerate(owners):
        if owner is None:
            continue
        overlapping = _overlapping(text, level, starts, _visible(text, encoding, place))
        if not overlapping:
            continue
        known_first, known_last = firsts[owner], lasts[owner]
        firsts[owner] = overlapping[0] if known_first is None else min(known_first, overlapping[0])
        lasts[owner] = overlapping[-1] if known_last is None else max(known_last, overlapping[-1])
        if is_explicit and firsts[owner] != lasts[owner]:
            raise ValueError(
                f"two {name}s share {shorten(text[slice(*spans[owner])])!r}, which one token "
                "spans and which cannot be split: separate them."
            )
    merged, part_of = _merge_sharing_tokens(level, firsts, lasts, is_explicit)
    numbers = [bisect_right(starts, span.start) - 1 for span in merged]
    return CoarseSpans(merged, [0 if part is None else part for part in part_of], [*numbers])


def _with_special_tokens(owned: Ownership, encoding: Encoding) -> Ownership:
    """Adds a span for every special token without an owner, in reading order."""
    keys: list[tuple[bool, int] | None] = [
        (False, owner) if owner is not None else (True, place) if is_special else None
        for place, (owner, is_special) in enumerate(
            zip(owned.owners, encoding.special, strict=True)
        )
    ]
    order = list(dict.fromkeys(key for key in keys if key is not None))
    number = {key: i for i, key in enumerate(order)}
    special_spans: dict[int, Span] = {}
    position = 0
    for alone, i in order:
        if alone:
            start, stop = encoding.starts[i], encoding.stops[i]
            # Tokens added by the tokenizer have no characters: they are placed at the current
            # position.
            has_text = encoding.anchors[i] is not None
            special_spans[i] = Span(start, stop) if has_text else Span(position, position)
        position = special_spans[i].stop if alone else owned.spans[i].stop
    spans = [special_spans[i] if alone else owned.spans[i] for alone, i in order]
    named = [special_spans[i] if alone else owned.named[i] for alone, i in order]
    coarse: list[CoarseSpans] = []
    for parts in owned.coarse:
        pairs = dict.fromkeys((a, i if a else parts.part_of[i]) for a, i in order)
        place = {key: i for i, key in enumerate(pairs)}
        coarse.append(
            CoarseSpans(
                [special_spans[i] if alone else parts.spans[i] for alone, i in pairs],
                [place[a, i if a else parts.part_of[i]] for a, i in order],
                [None if alone else parts.numbers[i] for alone, i in pairs],
            )
        )
    owners = [None if key is None else number[key] for key in keys]
    return Ownership(spans, owners, named, coarse, [alone for alone, _ in order])
