"""Whether a model says the same of a token whatever follows it."""

from collections.abc import Sequence

import torch
from torch import nn

from captum_llm_ext import _compat
from captum_llm_ext.scoring.passes import rounding

# A few ids tell whether a model sees ahead, and fit into any number of positions.
_PROBE = 8
# Larger differences between log-probabilities come from what follows.
_SEEN_AHEAD = 1e-3


def is_causal(model: nn.Module, ids: Sequence[int]) -> bool:
    """Whether a model sees nothing ahead.

    Where that is not known of its kind two forwards of one shape tell, which differ in what
    follows. Where rows of a batch change one another, nothing tells: it is taken for causal.

    Args:
        model: The model, in evaluation mode and without gradients.
        ids: Token ids of the model's, one at least; of these a few are read.
    """
    if _compat.is_known_causal(model) or _compat.couples_rows(model):
        return True
    head = list(ids[:_PROBE])
    # Without positions, ids that are there already would change nothing.
    ends = [int(head[0] == 0)], [head[0]]
    one, other = (
        _compat.sequence_logits(
            model(
                input_ids=torch.tensor(
                    [[*head, *end * len(head)]],
                    device=_compat.input_device(model),
                    dtype=torch.int64,
                )
            )
        )[:, : len(head)].double()
        for end in ends
    )
    differences = (one.log_softmax(-1) - other.log_softmax(-1)).abs().nan_to_num(0.0)
    half = _compat.half_precision(model)
    return float(differences.max()) <= (rounding(getattr(torch, half)) if half else _SEEN_AHEAD)
