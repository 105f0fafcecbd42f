"""Spearman's rank correlation."""

import torch
from torch import Tensor


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation along the last dimension; ties share their mean rank.

    Args:
        x, y: Of broadcastable shapes, ``(*shape, n)``.

    Returns:
        Shape ``(*shape)``; NaN if all values of one side are tied.
    """
    x, y = _ranks(x), _ranks(y)
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def _ranks(values: Tensor) -> Tensor:
    # Sums of the same numbers in another order differ in their last digits.
    step = 1e-9 * values.abs().amax(-1, keepdim=True)
    values = torch.where(step > 0, (values / step).round(), values).contiguous()
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values)
    return (below + torch.searchsorted(ordered, values, right=True)).double() / 2
