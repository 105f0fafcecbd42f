"""Which model it is: what it is made like, and every one of its weights."""

from hashlib import blake2b

import torch
from torch import nn

from captum_llm_ext import _compat
from captum_llm_ext.content import checksum
from captum_llm_ext.scoring.exclusive import held


def model_identity(model: nn.Module) -> dict[str, str]:
    """What tells a model from another, wherever its weights lie and however they are spread.

    Where several processes hold it together, all of them have to call this.

    Returns:
        ``"model"``: its class, type of numbers and sizes. ``"weights"``: a digest of all weights.
    """
    found = blake2b(digest_size=8)
    with held(model), torch.no_grad():  # accelerate brings offloaded weights for the time
        sums = dict(_sums(model))
    for name in sorted(sums):
        found.update(f"{name} {sums[name]}\n".encode())
    return {"model": _compat.model_description(model), "weights": found.hexdigest()}


def _sums(model: nn.Module):
    for name, parameter in _compat.own_parameters(model):
        try:
            yield name, int(_compat.summed_over_shards(parameter, checksum))
        except (RuntimeError, TypeError, KeyError):  # some quantised kinds cannot be read
            yield name, None
