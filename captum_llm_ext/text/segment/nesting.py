"""Nests finer features in coarser ones, as groups of hierarchical estimators."""

from bisect import bisect_right
from collections.abc import Sequence

from captum_llm_ext.text.segment.named import Named
from captum_llm_ext.text.segment.span import Span, shorten
from captum_llm_ext.text.segment.unit import Unit, segment, segmenter, shown_unit


def nest(text: str, units: Sequence[Unit]) -> list[list[Span]]:
    """The spans of each unit, coarse to fine, each within exactly one of the level above.

    A finer segmenter runs on the text of each coarser span separately, so that e.g. no sentence
    extends beyond its paragraph. Units that refer to the whole text (pairs, `spans`, `strings`) run
    on it once, and must nest. Every span contains a finer one, at every level.

    Args:
        text: The text.
        units: Coarse to fine, such as ``("paragraph", "sentence", "word")``; see `segmenter`.

    Returns:
        One list of spans per unit, each in reading order; `parents` joins one to the next.

    Raises:
        ValueError: If there is no unit, a unit finds nothing in a span of the level above, or a
            span crosses the border of one.
    """
    if isinstance(units, str) or not units:
        raise ValueError(f"`units` is {units!r}: give units from coarse to fine, at least one.")
    levels = [segment(text, units[0])]
    for unit in units[1:]:
        levels.append(_within(text, levels[-1], unit))
    return levels


def parents(coarse: Sequence[Span], fine: Sequence[Span]) -> list[int]:
    """For each fine span the index of the coarse span that contains it.

    Args:
        coarse: Disjoint spans in reading order.
        fine: Spans, each within one of them.

    Raises:
        ValueError: If a fine span is in none, or in more than one.
    """
    starts = [span.start for span in coarse]
    indices: list[int] = []
    for start, stop in fine:
        index = bisect_right(starts, start) - 1
        if index < 0 or stop > coarse[index].stop:
            raise ValueError(
                f"span ({start}, {stop}) lies within none of the {len(coarse)} coarser spans: "
                "give spans that stay within one each."
            )
        indices.append(index)
    return indices


def _within(text: str, coarse: Sequence[Span], unit: Unit) -> list[Span]:
    cut = segmenter(unit)
    if not (isinstance(cut, Named) and cut.positional):
        return [span for outer in coarse for span in _inside(text, outer, unit)]
    fine = segment(text, unit)
    barren = set(range(len(coarse))) - set(parents(coarse, fine))
    if barren:
        raise ValueError(_nothing(text, coarse[min(barren)], unit))
    return fine


def _inside(text: str, outer: Span, unit: Unit) -> list[Span]:
    try:
        found = segment(text[outer.start : outer.stop], unit)
    except ValueError as error:
        raise ValueError(f"{_nothing(text, outer, unit)} {error}") from error
    return [Span(outer.start + start, outer.start + stop) for start, stop in found]


def _nothing(text: str, outer: Span, unit: Unit) -> str:
    return (
        f"unit {shown_unit(unit)} gives no features for the coarser span "
        f"({outer.start}, {outer.stop}) {shorten(text[outer.start : outer.stop])!r}: give units "
        "that find some in each."
    )
