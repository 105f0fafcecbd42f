"""How errors and shares are told in a line: none as a zero that is none."""

import math


def plus_minus(error: float | None, decimals: int = 2) -> str:
    """What stands behind an estimate: ``" ± 0.05"``, or ``" ± <0.01"`` where that rounds to zero.

    Args:
        error: The standard error. NaN or None where nobody knows it: ``" ± ?"``. 0 where the
            number is exact: nothing.
        decimals: Digits after the point.
    """
    if error is None or math.isnan(error):
        return " ± ?"
    if error == 0:
        return ""
    return f" ± {_rounded(error, decimals)}"


def percent(share: float, error: float | None = 0.0, space: str = " ") -> str:
    """A share of what led to something: ``"98 ± 1 %"``, or ``"<1 %"`` where it rounds to zero.

    Args:
        share: From 0 to 1.
        error: Its standard error, as of `plus_minus`.
        space: What stands before the sign.
    """
    spread = plus_minus(None if error is None else 100 * error, 0)
    return f"{_rounded(100 * share, 0)}{spread}{space}%"


def _rounded(size: float, decimals: int) -> str:
    shown = f"{size:.{decimals}f}"
    return f"<{10**-decimals:.{decimals}f}" if size > 0 and float(shown) == 0 else shown
