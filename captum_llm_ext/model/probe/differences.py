"""Differences of log-probabilities, and whether they exceed rounding."""

import math

import torch
from torch import Tensor, nn

from captum_llm_ext.model.forward.rounding import log_probs_of

# Differences of log-probabilities that need no explanation, as documented.
FINE = 1e-4
HALF = (torch.float16, torch.bfloat16)


def spread(logits: Tensor) -> Tensor:
    """Log-probabilities of logits on the CPU, as by `log_probs_of`."""
    return log_probs_of(logits.cpu())


def differences(one: Tensor, other: Tensor) -> Tensor:
    """Absolute differences."""
    # Excluded tokens have minus infinity in both; NaN is reported where values are computed.
    return (one - other).abs().nan_to_num(nan=0.0)


def largest(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float(differences(one, other).max())


def root_mean_square(one: Tensor, other: Tensor) -> float:
    """The root of the mean square of all differences."""
    return float(differences(one, other).clamp(max=1e3).square().mean().sqrt())


def median_difference(one: Tensor, other: Tensor) -> float:
    """The median of the differences at several positions."""
    differences = sorted(root_mean_square(*place) for place in zip(one, other, strict=True))
    return differences[len(differences) // 2]


def is_equal(output: Tensor, logits: Tensor) -> bool:
    """Whether output equals that of other logits, up to rounding."""
    right = spread(logits)
    limit = max(FINE, bf16_rounding(right)) if logits.dtype.itemsize < 4 else FINE
    return output.shape == right.shape and not exceeds(output, right, limit)


def exceeds(one: Tensor, other: Tensor, limit: float) -> bool:
    """Whether a difference exceeds rounding."""
    if limit <= FINE:
        return largest(one, other) > limit
    return root_mean_square(one, other) > limit


def last_digit(logits: Tensor, model: nn.Module) -> float:
    """The spacing of numbers of the usual magnitude of a position's largest logits.

    Logits are no more precise than the numbers that they are computed from.
    """
    size = float(logits.detach().float().abs().nan_to_num(0.0, 0.0, 0.0).amax(-1).median())
    dtypes = {logits.dtype, *(p.dtype for p in model.parameters() if p.dtype in HALF)}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return eps * 2.0 ** math.floor(math.log2(size)) if size else 0.0


def bf16_rounding(log_probs: Tensor) -> float:
    """Differences of log-probabilities that rounding to 8 bits can cause, as root mean square."""
    finite = log_probs.double()[log_probs.isfinite()]
    return float(finite.std()) * 2.0**-8 if finite.numel() > 1 else 0.0
