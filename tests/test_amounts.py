"""How errors and shares are told: nothing that is not zero is told as zero."""

import math
import re
from pathlib import Path

import pytest

import captum_llm_ext
from captum_llm_ext import Cause
from captum_llm_ext.base.amounts import percent, plus_minus

PACKAGE = Path(captum_llm_ext.__file__).parent


@pytest.mark.parametrize(
    ("error", "decimals", "told"),
    [
        (0.05, 2, " ± 0.05"),
        (0.005001, 2, " ± 0.01"),
        (0.004999, 2, " ± <0.01"),
        (1e-12, 2, " ± <0.01"),
        (0.4, 0, " ± <1"),
        (0.6, 0, " ± 1"),
        (12.345, 1, " ± 12.3"),
        (0.0, 2, ""),
        (math.nan, 2, " ± ?"),
        (None, 2, " ± ?"),
    ],
)
def test_small_errors_are_never_printed_as_zero(error, decimals, told):
    assert plus_minus(error, decimals) == told


@pytest.mark.parametrize(
    ("share", "error", "told"),
    [
        (0.98, 0.01, "98 ± 1 %"),
        (0.98, 0.001, "98 ± <1 %"),
        (0.98, 0.0, "98 %"),
        (0.98, math.nan, "98 ± ? %"),
        (0.004, 0.0, "<1 %"),
        (0.006, 0.0, "1 %"),
        (0.0, 0.0, "0 %"),
        (1.0, None, "100 ± ? %"),
    ],
)
def test_only_zero_shares_are_printed_as_zero(share, error, told):
    assert percent(share, error) == told


def test_cause_prints_small_errors_as_a_bound():
    assert str(Cause("Palm", 10.74, 0.001, 0, is_output=False)) == "Palm +10.74 ± <0.01"


def test_standard_errors_are_formatted_in_one_module():
    """Elsewhere ``±`` is in sentences about errors, not before a number."""
    writes = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r"± [{<]", path.read_text(encoding="utf-8"))
    }
    assert writes == {"base/amounts.py"}
