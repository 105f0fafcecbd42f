"""Ranks what to patch first by attribution patching (Nanda 2023; Syed et al. 2023).

To first order a cell's effect is the difference of the two streams times the gradient, which takes
one backward pass per token. Where layers saturate, it is wrong by factors: it only ranks cells and
is never reported as an effect.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_llm_ext.attribution.patching.corruption import Corruption
from captum_llm_ext.attribution.patching.runs import PatchedRuns
from captum_llm_ext.contrast import Foils
from captum_llm_ext.model import AttrTarget
from captum_llm_ext.model.gradients.differentiable_values import values_by_callable, values_by_name

_NO_GRADIENT = (
    "no gradient comes back through the model's streams (quantised layers, or `torch.no_grad` in "
    "its forward), and what to patch first cannot be guessed: leave `first` out."
)


def first_order(
    runs: PatchedRuns,
    base: Corruption,
    source: Corruption,
    target: Tensor,
    attr_target: AttrTarget,
    foils: Foils | None,
) -> Tensor:
    """First-order change of values if a stream of one text is put into another.

    Args:
        runs: Runs that have taken both texts.
        base: The text that is read.
        source: The text whose stream is put there.
        target: Token ids ``(n_target,)``.
        attr_target: The kind of value.
        foils: Foils of a contrast.

    Returns:
        Shape ``(n_kept, n_layers + 1, length)``, float64 on the CPU; `n_kept` is the number of
        target tokens that both texts predict.

    Raises:
        ValueError: If no gradient reaches the streams.
    """
    predicted = [t for t, place in enumerate(base.positions) if place >= 0]
    pairs = list(zip(runs.streams(source), runs.streams(base), strict=True))
    with runs.graph(base) as (logits, streams):
        own = target[predicted].to(logits.device)
        if callable(attr_target):
            values = values_by_callable(logits, own, attr_target)
        else:
            against = None if foils is None else foils.tensor[predicted]
            values = values_by_name(logits, own, attr_target, against)
        if not values.requires_grad:
            raise ValueError(_NO_GRADIENT)
        found: list[Tensor] = []
        for number in range(len(predicted)):
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                values[0, number], streams, retain_graph=True, allow_unused=True
            )
            found.append(
                torch.stack([_product(g, *pair) for g, pair in zip(gradients, pairs, strict=True)])
            )
    return torch.stack(found)


def _product(gradient: Tensor | None, there: Tensor, here: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros(len(here), dtype=torch.float64, device="cpu")
    wide = torch.promote_types(here.dtype, torch.float32)
    return (
        ((there.to(wide) - here.to(wide)) * gradient[0].to(here.device, wide))
        .sum(-1)
        .double()
        .cpu()
    )


def ranked(estimates: Tensor, groups: Sequence[Sequence[int]], candidates: Tensor) -> Tensor:
    """Ranks of cells, in the order in which to patch them.

    Args:
        estimates: Shape ``(n_kept, n_layers + 1, length)``.
        groups: Positions that are patched together.
        candidates: Bool ``(n_layers + 1, n_groups)``: cells that may have an effect.

    Returns:
        Int64 ``(n_layers + 1, n_groups)``: 0 for the first, -1 if not a candidate.
    """
    summed = torch.stack([estimates[..., list(group)].sum(-1) for group in groups], -1)
    size = summed.abs().amax(0).masked_fill(~candidates, -1.0).flatten()
    order = size.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), dtype=torch.int64, device="cpu")
    return ranks.view(candidates.shape).masked_fill(~candidates, -1)
