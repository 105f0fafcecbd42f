"""Locates the values of a template in its text."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from captum.attr import TextTemplateInput

from captum_llm_ext.text.baselines.slot import Slot


def template_parts(
    template: str | Callable[..., str], values: Sequence[str] | Mapping[str, str]
) -> list[tuple[str, int | None]] | None:
    """The text of a template, divided into values (with their index) and the text around them.

    Returns:
        Texts in reading order, each with the index of its value; or None if the values cannot be
        located, since a template function may transform them.
    """
    opening, closing = "\ue000", "\ue001"
    make = template.format if isinstance(template, str) else template
    given = list(values.values() if isinstance(values, Mapping) else values)
    marked = [f"{opening}{i}{closing}{value}{closing}" for i, value in enumerate(given)]

    def text(parts: Sequence[str]) -> str:
        if isinstance(values, Mapping):
            return make(**dict(zip(values, parts, strict=True)))
        return make(*parts)

    try:
        first, *rest = text(marked).split(opening)
        found: list[tuple[str, int | None]] = [(first, None)]
        for part in rest:
            number, value, after = part.split(closing)
            found += [(value, int(number)), (after, None)]
    except Exception:  # a function may raise anything for unexpected values
        return None
    if "".join(part for part, _ in found) != text(given):
        return None
    if sorted(number for _, number in found if number is not None) != list(range(len(given))):
        return None  # a value is omitted, or used twice
    return [(part, number) for part, number in found if part or number is not None]


def template_slots(inp: TextTemplateInput) -> list[Slot]:
    """The slot of every value of a captum `TextTemplateInput`, in the order of the values.

    Raises:
        ValueError: If the values cannot be located in the text.
    """
    values = dict(zip(inp.dict_keys, inp.values, strict=True)) if inp.dict_keys else inp.values
    parts = template_parts(inp.format_fn, values)
    if parts is None:
        raise ValueError(
            "the values cannot be found in the text that the template makes of them: a baseline "
            "that looks at their surroundings needs that. Give lists of values, or "
            "`TextSegmentInput`."
        )
    text = "".join(part for part, _ in parts)
    span_of: dict[int, tuple[int, int]] = {}
    position = 0
    for part, number in parts:
        if number is not None:
            span_of[number] = (position, position + len(part))
        position += len(part)
    mask = range(len(inp.values)) if inp.mask is None else inp.mask
    # Captum numbers groups in hash order; numbered by first appearance they are reproducible.
    feature_of = {label: number for number, label in enumerate(dict.fromkeys(mask))}
    slots = [
        Slot(
            text,
            *span_of[number],
            index=number,
            feature=feature_of[label],
            label=inp.dict_keys[number] if inp.dict_keys else None,
        )
        for number, label in enumerate(mask)
    ]
    return with_siblings(slots)


def with_siblings(slots: Sequence[Slot]) -> list[Slot]:
    """Slots of one text, with siblings for features of several slots."""
    own: dict[int, list[Slot]] = {}
    for slot in sorted(slots, key=lambda slot: slot.start):
        own.setdefault(slot.feature, []).append(replace(slot, siblings=()))
    return [
        replace(slot, siblings=tuple(own[slot.feature]) if len(own[slot.feature]) > 1 else ())
        for slot in slots
    ]


def calling_template(baselines: object) -> TextTemplateInput | None:
    """The template input that is calling its baselines, or None.

    captum 0.9 (2026) calls the baselines of a template without arguments ("TODO: support callable
    baselines"), so the text has to be found from the caller.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, TextTemplateInput) and caller.baselines is baselines:
            return caller
        frame = frame.f_back
    return None
