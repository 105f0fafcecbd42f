"""Checks and messages on arguments, and names for several values without any."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, cast

TARGETS = ("log_prob", "prob", "logit", "contrast")


def at_least_one(name: str, value: object) -> int:
    """The value, if it is an integer of at least 1.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is {value!r}: give an integer of at least 1.")
    return value


def position_of(
    given: int | str, names: Sequence[str], kind: str, *, displayed: Sequence[str] = ()
) -> int:
    """The index of a token or feature that is given by number or by name.

    Args:
        given: Its number from 0, negative ones from the end; or its name. White space around names
            does not count.
        names: All names.
        kind: What they name, for messages: ``"token"`` or ``"feature"``.
        displayed: Their names as displayed, tried if `names` do not determine one.

    Raises:
        ValueError: If there is none of this number or name, or several have the name.
    """
    if isinstance(given, int):
        if not -len(names) <= given < len(names):
            raise ValueError(f"there is no {kind} {given}: there are {len(names)}.")
        return given % len(names)
    wanted = given.strip()
    found = [i for i, name in enumerate(names) if name.strip() == wanted]
    if len(found) != 1:
        found = [i for i, name in enumerate(displayed) if name.strip() == wanted] or found
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} {kind}s are {given!r}: give the position"
            + (f", one of {found}." if found else f" of one of {[*names]}.")
        )
    return found[0]


def check_counts(**given: int | None) -> None:
    """Checks that counts, given by name, are at least 1; None is allowed.

    Raises:
        ValueError: If one is not.
    """
    for name, value in given.items():
        if value is not None:
            at_least_one(name, value)


def check_attr_target(attr_target: object) -> None:
    """Checks that `attr_target` is a value of a target token.

    Raises:
        ValueError: If it is neither a known name nor a callable.
    """
    if not callable(attr_target) and attr_target not in TARGETS:
        raise ValueError(
            f"`attr_target` is {attr_target!r}: give one of {', '.join(map(repr, TARGETS))}, "
            "a `Contrast`, or a callable `(logits, target) -> values`."
        )


def check_passed_on(
    given: Mapping[str, Any],
    method: object,
    attribute: Callable[..., Any],
    *,
    called: str = "attribute",
    which: str | None = None,
) -> None:
    """Refuses arguments that captum would pass on, and that would have no effect here.

    Arguments of the method's own ``attribute`` that repeat the default are accepted, as is None for
    any argument of earlier captum methods.

    Args:
        given: Arguments that `attribute` does not name.
        method: The attribution method.
        attribute: The function whose argument names are suggested.
        called: Name of the called function.
        which: The subject of the message; by default the method.

    Raises:
        TypeError: If there is one.
    """
    own = inspect.signature(cast(Any, method).attribute).parameters
    name = type(method).__name__
    for argument, value in given.items():
        if argument in own and own[argument].kind is not inspect.Parameter.VAR_KEYWORD:
            if not _says_nothing(argument, value, own[argument].default):
                raise TypeError(
                    f"{called}() got {argument!r}, which would be ignored: coalitions or points of "
                    f"{name} are planned here. " + _INSTEAD.get(argument, "Leave it out.")
                )
        elif value is not None or _close(argument, attribute):
            raise TypeError(
                unknown_argument(
                    argument, attribute, called=called, which=which or f"{name} does not take"
                )
            )


_INSTEAD = {
    "baselines": "What stands for absent features is set by the input.",
    "additional_forward_args": "What the model is to read beside text is set by the input.",
}


def _says_nothing(name: str, value: object, default: object) -> bool:
    """Whether an argument has the meaning of its default."""
    if isinstance(value, tuple | list) and len(cast(Sequence[Any], value)) == 1:
        return _says_nothing(name, cast(Sequence[Any], value)[0], default)
    if name == "baselines" and hasattr(value, "any"):  # a tensor
        return not bool(cast(Any, value).any())
    if name == "baselines" and value == 0:  # captum's None
        return True
    return value is default or (isinstance(value, int | float | str) and value == default)


def _close(name: str, attribute: Callable[..., Any]) -> list[str]:
    return get_close_matches(name, inspect.signature(attribute).parameters, n=1, cutoff=0.8)


def unknown_argument(
    name: str,
    attribute: Callable[..., Any],
    *,
    called: str = "attribute",
    which: str = "it does not take",
) -> str:
    """The message on an unknown argument.

    Args:
        name: The argument.
        attribute: The function whose argument names are suggested.
        called: Name of the called function.
        which: The subject of the message.
    """
    message = f"{called}() got {name!r}, which {which}"
    if close := _close(name, attribute):
        return f"{message}: did you mean {close[0]!r}?"
    if name == "baselines":
        return f"{message}: what stands for absent features is set by the input."
    return f"{message}: leave it out."


def numbered(kinds: Sequence[str], entries: Sequence[Any]) -> dict[str, Any]:
    """Entries by the names of their kinds, numbered if several have the same.

    Args:
        kinds: Name of each entry's kind.
        entries: The entries.
    """
    seen: Counter[str] = Counter()
    named: dict[str, Any] = {}
    for kind, entry in zip(kinds, entries, strict=True):
        seen[kind] += 1
        named[kind if kinds.count(kind) == 1 else f"{kind} {seen[kind]}"] = entry
    return named
