"""How far rounding alone moves a value, and whether a way of computing it is as right as others."""

from collections.abc import Callable

import torch
from torch import Tensor

from captum_llm_ext.model.forward.memory import is_out_of_memory

# Largest difference between log-probabilities that other shapes of the same products make.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.25}


def rounding(dtype: torch.dtype | None) -> float:
    """Largest difference between log-probabilities that other shapes of the same products make."""
    return _ROUNDING.get(dtype or torch.float32, _ROUNDING[torch.float32])


def reason_against(error_of: Callable[[], float]) -> str | None:
    """Why a way of computing values is not right; None where it is.

    Args:
        error_of: Goes that way; returns the largest difference that it makes, over what rounding
            explains.
    """
    try:
        error = error_of()
    except Exception as failure:  # whatever a model does with a state: there is a way without
        if is_out_of_memory(failure):
            raise
        return f"{type(failure).__name__}: {failure}"
    return None if error <= 1 else f"values differ by {error:.2g} times rounding"


def error_over_rounding(found: Tensor, expected: Tensor) -> float:
    """Largest difference between log-probabilities over what rounding explains."""
    differences = found.double().log_softmax(-1) - expected.double().log_softmax(-1)
    worst = float(differences.abs().nan_to_num(nan=torch.inf).max())
    return worst / _ROUNDING.get(found.dtype, 0.0)
