"""Logits in, values of the target tokens out."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

AttrTarget = str | Callable[[Tensor, Tensor], Tensor]

# Logits are reduced piece by piece: a copy of each in float32 is all that exists beside them. On a
# CPU a piece stays in its cache.
_PIECE = {"cpu": 2**19}
_PIECE_ELSEWHERE = 2**27
_LOG2_E = math.log2(math.e)


def wanted_values(logits: Tensor, wanted: Tensor, attr_target: str) -> Tensor:
    """Values of the ids wanted at each place.

    Args:
        logits: Shape ``(..., vocabulary)``.
        wanted: Token ids ``(...)``.
        attr_target: ``"log_prob"``, ``"prob"`` or ``"logit"``.

    Returns:
        Shape ``(...)``, float64 on the CPU. Softmax and sums are taken in float32 at least.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found = flat.gather(1, wanted.to(logits.device).reshape(-1, 1))[:, 0].to(dtype)
    if attr_target != "logit":
        found = found - _logsumexp(flat, dtype)
    if attr_target == "prob":
        found = found.exp()
    return found.double().cpu().view(wanted.shape)


def _logsumexp(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-sum-exps ``(n,)`` of logits ``(n, vocabulary)``.

    On CPUs ``torch.logsumexp`` takes nearly twice the time, for the sake of its exponential.
    """
    n, vocabulary = logits.shape
    size = max(1, _PIECE.get(logits.device.type, _PIECE_ELSEWHERE) // vocabulary)
    piece = logits.new_empty(min(n, size), vocabulary, dtype=dtype)
    found: list[Tensor] = []
    for some in logits.split(size):
        largest = some.amax(1, keepdim=True).to(dtype)
        powers = torch.sub(some, largest, out=piece[: len(some)]).mul_(_LOG2_E).exp2_()
        found.append(powers.sum(1).log_() + largest[:, 0])
    return torch.cat(found)


def called_values(
    logits: Tensor, target: Tensor, attr_target: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Values as a callable of the user's gives them, row by row.

    Args:
        logits: Shape ``(batch, n_target, vocabulary)``.
        target: Token ids ``(n_target,)``.
        attr_target: ``(logits (batch, n_target, vocabulary), target) -> (batch, n_target)``.

    Returns:
        Shape ``(batch, n_target)``, float64 on the CPU.

    Raises:
        TypeError: If the callable returns anything else.
    """
    target = target.to(logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows: list[Tensor] = []
    for row in logits.split(1):
        row = row.to(dtype)
        found = attr_target(row, target)
        if not isinstance(found, Tensor) or found.shape != (1, len(target)):
            raise TypeError(
                f"`attr_target` returned {getattr(found, 'shape', type(found).__name__)} "
                f"for logits of shape {tuple(row.shape)}: return (batch, n_target)."
            )
        rows.append(found.detach())
    return torch.cat(rows).double().cpu()
