"""Warnings that point at the line of the user's code from which the package was called."""

import inspect
import warnings

_PACKAGE = __name__.partition(".")[0]


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns as if at the line that called the package.

    Args:
        message: What is wrong, and what to do.
        category: The kind of warning.
    """
    warnings.warn(message, category, stacklevel=stacklevel_of_caller())


def stacklevel_of_caller() -> int:
    """The stack level of the package's caller, for warnings."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    return level
