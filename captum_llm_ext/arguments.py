"""What is said of arguments alike: of those that cannot be used, and of several without names."""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

TARGETS = ("log_prob", "prob", "logit")


def at_least_one(name: str, value: object) -> int:
    """The value.

    Raises:
        ValueError: If it is no integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is {value!r}: give an integer of at least 1.")
    return value


def check_counts(**given: int | None) -> None:
    """Refuses numbers, by name, that are below 1; None is one that was not given.

    Raises:
        ValueError: If there is one.
    """
    for name, value in given.items():
        if value is not None:
            at_least_one(name, value)


def check_attr_target(attr_target: object) -> None:
    """Refuses what names no value of a target token.

    Raises:
        ValueError: If it is neither a known name nor a callable.
    """
    if not callable(attr_target) and attr_target not in TARGETS:
        raise ValueError(
            f"`attr_target` is {attr_target!r}: give one of {', '.join(map(repr, TARGETS))}, "
            "or a callable `(logits, target) -> values`."
        )


def unknown_argument(
    name: str,
    attribute: Callable[..., Any],
    *,
    called: str = "attribute",
    which: str = "it does not take",
) -> str:
    """What to tell of an argument that does not exist.

    Args:
        name: The argument.
        attribute: What has arguments, one of which may be meant.
        called: What was called.
        which: Who does not take it.
    """
    said = f"{called}() got {name!r}, which {which}"
    close = get_close_matches(name, inspect.signature(attribute).parameters, n=1, cutoff=0.8)
    if close:
        return f"{said}: did you mean {close[0]!r}?"
    if name == "baselines":
        return f"{said}: what stands for absent features is said by the input."
    return f"{said}: leave it out."


def numbered(kinds: Sequence[str], entries: Sequence[Any]) -> dict[str, Any]:
    """Entries by their kinds, with a number where several are of one kind.

    Args:
        kinds: What the entries are, one each.
        entries: As many.
    """
    seen: Counter[str] = Counter()
    named: dict[str, Any] = {}
    for kind, entry in zip(kinds, entries, strict=True):
        seen[kind] += 1
        named[kind if kinds.count(kind) == 1 else f"{kind} {seen[kind]}"] = entry
    return named
