"""Finds layers of a model."""

from typing import Any

from torch import nn

from captum_llm_ext._compat.model import is_compiled, number_of_layers
from captum_llm_ext._compat.processes import model_ranks


def embeddings(model: nn.Module, method: str) -> Any:
    """The module that a method such as ``get_input_embeddings`` returns; None without one."""
    find = getattr(model, method, None)
    try:
        return find() if callable(find) else None
    except NotImplementedError:  # transformers 5.23 (2026): classes without a known location
        return None


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The LM head, if it is a plain linear layer on a CPU."""
    layer = None if is_compiled(model) else embeddings(model, "get_output_embeddings")
    if type(layer) is not nn.Linear:
        return None
    plain = all(type(p) is nn.Parameter and p.device.type == "cpu" for p in layer.parameters())
    return layer if plain else None


def decoder_layers(model: nn.Module) -> list[nn.Module] | None:
    """The decoder layers in order, if they can be found."""
    if is_compiled(model) or model_ranks(model):
        return None
    n = number_of_layers(model)
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n)
    # Modules come before their parts: layers before the experts of one.
    return next((list(layers) for layers in lists), None)


def outer_layers(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The first and the last decoder layer, if they can be found."""
    layers = decoder_layers(model)
    return None if layers is None else (layers[0], layers[-1])
