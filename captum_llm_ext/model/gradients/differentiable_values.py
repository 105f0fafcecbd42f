"""Values of target tokens from logits, with gradients."""

from collections.abc import Callable

import torch
from torch import Tensor


def values_by_name(
    logits: Tensor, target: Tensor, attr_target: str, foils: Tensor | None = None
) -> Tensor:
    """Values ``(batch, n_target)``, float64 on the CPU, with gradients.

    `scoring` computes the same in place, without gradients. Softmax and sums are computed in
    float32 at least. A contrast needs no softmax over the vocabulary, except for tokens without
    foils.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found = logits.gather(2, target.expand(len(logits), -1)[..., None])[..., 0].to(dtype)
    if foils is not None:
        foils = foils.to(logits.device)
        others = logits.gather(2, foils.clamp(min=0).expand(len(logits), -1, -1)).to(dtype)
        others = others.masked_fill(foils < 0, -torch.inf)
        against = [
            (others[:, t] if bool((foils[t] >= 0).any()) else logits[:, t].to(dtype)).logsumexp(1)
            for t in range(len(target))
        ]
        found = found - torch.stack(against, 1)
    elif attr_target != "logit":
        found = found - logits.to(dtype).logsumexp(2)
    if attr_target == "prob":
        found = found.exp()
    return found.double().cpu()


def values_by_callable(
    logits: Tensor, target: Tensor, attr_target: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Values of a user's callable, ``(batch, n_target)``, float64, with gradients.

    Raises:
        TypeError: If the callable returns anything else.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found = attr_target(logits, target)
    if not isinstance(found, Tensor) or found.shape != (len(logits), len(target)):
        raise TypeError(
            f"`attr_target` returned {getattr(found, 'shape', type(found).__name__)} for logits of "
            f"shape {tuple(logits.shape)}: return (batch, n_target)."
        )
    return found.double().cpu()
