"""Whether a corpus is of the kind of text that it is to replace."""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from captum_llm_ext.base.warning import stacklevel_of_caller
from captum_llm_ext.text.baselines.candidates import Match


@runtime_checkable
class LooksUp(Protocol):
    """A baseline that searches for the surroundings of features, such as `CorpusBaselines`."""

    @property
    def warns_of_mismatch(self) -> bool:
        """Whether to warn if they are not found."""
        ...


# Share of features up to which they are unusual parts of a usual text; chosen, not measured.
_SOME = 0.25
_MOST = 0.5  # share beyond which the corpus is of another kind; chosen, not measured
_SHOWN = 3


def warn_of_mismatch(baseline: object, matches: Callable[[], Sequence[Match] | None]) -> None:
    """Warns, in every run, of features without matching places, unless they are few.

    Args:
        baseline: The prompt's baseline. Only a corpus is checked, unless it may give any text
            (``match="any"``) or its warnings are disabled.
        matches: Returns what it found for them; None if unknown.
    """
    nonblank, unlike = _unlike(baseline, matches)
    if not unlike or len(unlike) <= _SOME * len(nonblank):
        return
    shown = ", ".join(f"by {m.level} in {m.surroundings!r}" for m in unlike[:_SHOWN])
    more = ", …" if len(unlike) > _SHOWN else ""
    _warn(
        f"{len(unlike)} of {len(nonblank)} features have no similar context in this corpus: too "
        "little of their surroundings is found there, so any text may replace them (matched "
        f"{shown}{more}; `matches(inp)` tells). Give more texts, of the same kind as the prompt, "
        "lower `min_occurrences`, or silence this with min_candidates=0."
    )


def is_mismatch(baseline: object, matches: Callable[[], Sequence[Match] | None]) -> bool:
    """Whether most features have no matching place in a corpus."""
    nonblank, unlike = _unlike(baseline, matches)
    return len(unlike) > _MOST * len(nonblank)


def _unlike(
    baseline: object, matches: Callable[[], Sequence[Match] | None]
) -> tuple[list[Match], list[Match]]:
    """The matches of features other than white space, and those of them that are not located."""
    if not isinstance(baseline, LooksUp) or not baseline.warns_of_mismatch:
        return [], []
    nonblank = [match for match in matches() or () if match.level != "blank"]
    return nonblank, [match for match in nonblank if not match.is_located]


def _warn(message: str) -> None:
    """Warns at the package's caller, even if the same warning was raised before."""
    frame = sys._getframe(stacklevel_of_caller() - 1)  # pyright: ignore[reportPrivateUsage]
    # With a separate registry: Python's shows equal warnings of one line only once.
    warnings.warn_explicit(
        message, UserWarning, frame.f_code.co_filename, frame.f_lineno, registry={}
    )
