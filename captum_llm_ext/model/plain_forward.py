"""A plain forward pass without any reuse: the reference for all other ways of scoring."""

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import exclusive_use
from captum_llm_ext.model.forward.rows import TokenRow


def plain_log_probs(model: nn.Module, row: TokenRow) -> Tensor:
    """Log-probabilities of the vocabulary at the positions that predict the target tokens.

    A single uncached, unpadded pass over the row alone; softmax in float64.

    Args:
        model: A causal language model.
        row: The row; for positions of -1 the result has no meaning.

    Returns:
        Shape ``(n_target, vocabulary)``, float64 on the CPU.
    """
    arguments = {} if row.extras is None else dict(row.extras)
    if "use_cache" in _compat.forward_arguments(model):
        arguments["use_cache"] = False
    ids = torch.tensor([row.ids], dtype=torch.int64, device=_compat.input_device(model))
    with exclusive_use(model):
        logits = _compat.sequence_logits(_compat.called(model, ids, **arguments))[0]
    # The probe: what a model does, found in a few forward passes over rows of the run.  Does a
    # token's value depend on what follows it, on the other rows of its batch, on the lengths of
    # these rows; where are the logits of an id; how far does rounding alone change a value. Nothing
    # is inferred from a model's name. `findings` runs the probe once for a model in one state (see
    # `state`), and again for longer rows; its findings decide how the model is run.
    places = [place - len(row.ids) for place in row.positions]
    return logits[places].double().cpu().log_softmax(1)
