"""Whether all processes that hold a model left a pass together."""

from collections.abc import Callable

# Queries of the active sessions, the innermost last.
parting_checks: list[Callable[[], bool]] = []


def failed_on_all() -> bool:
    """Whether a failed pass failed on all processes that hold the model; waits for them.

    If not, the others remain in it forever.
    """
    return parting_checks[-1]() if parting_checks else True
