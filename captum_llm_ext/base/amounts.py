"""Formats standard errors, shares and probabilities; small nonzero ones are never shown as zero."""

import math


def plus_minus(error: float | None, decimals: int = 2) -> str:
    """The error after an estimate: ``" ± 0.05"``, or ``" ± <0.01"`` if it rounds to zero.

    Args:
        error: The standard error. NaN or None if unknown: ``" ± ?"``. 0 if exact: empty.
        decimals: Decimal places.
    """
    if error is None or math.isnan(error):
        return " ± ?"
    if error == 0:
        return ""
    return f" ± {_rounded(error, decimals)}"


def percent(share: float, error: float | None = 0.0, space: str = " ") -> str:
    """A share as a percentage: ``"98 ± 1 %"``, or ``"<1 %"`` if it rounds to zero.

    Args:
        share: From 0 to 1.
        error: Its standard error, as for `plus_minus`.
        space: Text before the percent sign.
    """
    spread = plus_minus(None if error is None else 100 * error, 0)
    return f"{_rounded(100 * share, 0)}{spread}{space}%"


def probability(log_probability: float) -> str:
    """A probability as a percentage: ``"82 %"``, or ``"<0.01 %"``."""
    share = math.exp(min(log_probability, 0.0))
    return "<0.01 %" if share < 1e-4 else f"{float(f'{100 * share:.2g}'):g} %"


def _rounded(size: float, decimals: int) -> str:
    shown = f"{size:.{decimals}f}"
    return f"<{10**-decimals:.{decimals}f}" if size > 0 and float(shown) == 0 else shown
