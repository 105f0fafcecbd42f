"""Whether a corpus is of the kind of text that it is to stand in for."""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from captum_llm_ext.base.digest import stacklevel_of_caller
from captum_llm_ext.text.baselines.candidates import Match


@runtime_checkable
class LooksUp(Protocol):
    """A baseline that looks for the surroundings of features, such as `CorpusBaselines`."""

    @property
    def tells(self) -> bool:
        """Whether it is to warn where it does not find them."""
        ...


_SOME = 0.25  # of the features: up to here they stand in unusual places of a usual text
_MOST = 0.5  # … and beyond this the corpus is of another kind
_SHOWN = 3


def warn_of_mismatch(baseline: object, matches: Callable[[], Sequence[Match] | None]) -> None:
    """Says, in every run, how many features have no place like theirs, if these are not a few.

    Args:
        baseline: What stands where features of a prompt are absent. Only a corpus is looked at,
            and none that is asked for any text (``match="any"``), or to be silent.
        matches: Tells what it found for them; None if it does not tell.
    """
    asked, unlike = _unlike(baseline, matches)
    if not unlike or len(unlike) <= _SOME * len(asked):
        return
    shown = ", ".join(f"by {m.level} in {m.surroundings!r}" for m in unlike[:_SHOWN])
    more = ", …" if len(unlike) > _SHOWN else ""
    _warn(
        f"{len(unlike)} of {len(asked)} features have no place like theirs in this corpus: too "
        f"little of their surroundings is found there, any text may stand in for them (matched "
        f"{shown}{more}; `matches(inp)` tells). Give more texts, of the same kind as the prompt, "
        "lower `min_occurrences`, or silence this with min_candidates=0."
    )


def is_mismatch(baseline: object, matches: Callable[[], Sequence[Match] | None]) -> bool:
    """Whether most features have no place like theirs in a corpus."""
    asked, unlike = _unlike(baseline, matches)
    return len(unlike) > _MOST * len(asked)


def _unlike(
    baseline: object, matches: Callable[[], Sequence[Match] | None]
) -> tuple[list[Match], list[Match]]:
    """The matches of what is no white space, and those of them that are not located."""
    if not isinstance(baseline, LooksUp) or not baseline.tells:
        return [], []
    asked = [match for match in matches() or () if match.level != "blank"]
    return asked, [match for match in asked if not match.is_located]


def _warn(message: str) -> None:
    """Warns where the package was called from, also if it has done so before."""
    frame = sys._getframe(stacklevel_of_caller() - 1)  # pyright: ignore[reportPrivateUsage]
    # With a registry of its own: Python's shows equal warnings of one line only once.
    warnings.warn_explicit(
        message, UserWarning, frame.f_code.co_filename, frame.f_lineno, registry={}
    )
