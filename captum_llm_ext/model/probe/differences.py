"""How far apart log-probabilities are, and whether that is more than rounding."""

import math

import torch
from torch import Tensor, nn

from captum_llm_ext.model.forward.rounding import log_probs_of

# Differences of log-probabilities that the contract allows: what is below needs no explanation.
FINE = 1e-4
HALF = (torch.float16, torch.bfloat16)


def spread(logits: Tensor) -> Tensor:
    """Log-probabilities of logits, on the CPU, as `log_probs_of` gives them."""
    return log_probs_of(logits.cpu())


def differences(one: Tensor, other: Tensor) -> Tensor:
    """How far each is from the other."""
    # What a model rules out is minus infinity in both; a NaN is told where values are made.
    return (one - other).abs().nan_to_num(nan=0.0)


def largest(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float(differences(one, other).max())


def root_mean_square(one: Tensor, other: Tensor) -> float:
    """The root of the mean square of all differences."""
    return float(differences(one, other).clamp(max=1e3).square().mean().sqrt())


def usual(one: Tensor, other: Tensor) -> float:
    """The difference at the middle one of several places."""
    differences = sorted(root_mean_square(*place) for place in zip(one, other, strict=True))
    return differences[len(differences) // 2]


def is_as(said: Tensor, logits: Tensor) -> bool:
    """Whether what is said is what other logits say, up to rounding."""
    right = spread(logits)
    limit = max(FINE, rough(right)) if logits.dtype.itemsize < 4 else FINE
    return said.shape == right.shape and not exceeds(said, right, limit)


def exceeds(one: Tensor, other: Tensor, limit: float) -> bool:
    """Whether a difference is more than rounding."""
    if limit <= FINE:
        return largest(one, other) > limit
    return root_mean_square(one, other) > limit


def last_digit(logits: Tensor, model: nn.Module) -> float:
    """The distance between numbers of the size that the largest logits of a place usually have.

    Logits are no finer than the numbers that they are made from.
    """
    size = float(logits.detach().float().abs().nan_to_num(0.0, 0.0, 0.0).amax(-1).median())
    dtypes = {logits.dtype, *(p.dtype for p in model.parameters() if p.dtype in HALF)}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return eps * 2.0 ** math.floor(math.log2(size)) if size else 0.0


def rough(said: Tensor) -> float:
    """What rounding to eight bits may make of log-probabilities, as a root mean square."""
    finite = said.double()[said.isfinite()]
    return float(finite.std()) * 2.0**-8 if finite.numel() > 1 else 0.0
