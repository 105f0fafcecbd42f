"""Answers that owe nothing to the package: plain loops and defining formulas."""

from collections.abc import Callable, Sequence
from itertools import combinations
from math import factorial

import torch
from torch import Tensor


@torch.no_grad()
def loop_log_probs(
    model: torch.nn.Module,
    prompt: Sequence[int],
    read: Sequence[Sequence[int]],
    target: Sequence[int],
) -> Tensor:
    """Log-probability of every target token: one uncached, unpadded forward of batch 1 each.

    Args:
        model: The model, in eval mode.
        prompt: Prompt ids of the coalition.
        read: Per target token the ids of generated text that the model has read before it.
        target: What it is asked for.
    """
    values = []
    for before, token in zip(read, target, strict=True):
        ids = torch.tensor([[*prompt, *before]])
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
        values.append(logits.double().log_softmax(-1)[token])
    return torch.stack(values)


def tokens_read(
    target: Sequence[int], present: Sequence[bool], replacement: int | None
) -> list[list[int]]:
    """What has been read before each target token when some earlier ones are absent.

    Args:
        target: Target ids.
        present: Per target token whether it is present.
        replacement: The id in place of an absent one; None deletes it.
    """
    read: list[list[int]] = []
    so_far: list[int] = []
    for token, stands in zip(target, present, strict=True):
        read.append(list(so_far))
        if stands:
            so_far.append(token)
        elif replacement is not None:
            so_far.append(replacement)
    return read


def shapley_values(value: Callable[[frozenset[int]], float], n: int) -> list[float]:
    """Shapley values by their definition, over all coalitions."""
    found = []
    for player in range(n):
        others = [p for p in range(n) if p != player]
        total = 0.0
        for size in range(n):
            weight = factorial(size) * factorial(n - size - 1) / factorial(n)
            for chosen in combinations(others, size):
                members = frozenset(chosen)
                total += weight * (value(members | {player}) - value(members))
        found.append(total)
    return found
