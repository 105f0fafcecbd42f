"""Whether those that hold a model together left a pass together."""

from collections.abc import Callable

# How the sessions that are going on ask, the innermost last.
asking: list[Callable[[], bool]] = []


def failed_on_all() -> bool:
    """Whether the pass that failed here failed on all that hold the model; waits for them.

    Where it did not, the others are in it for ever.
    """
    return asking[-1]() if asking else True
