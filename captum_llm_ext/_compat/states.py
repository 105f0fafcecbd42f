"""A model's cache: keys and values, or recurrent states, of the tokens read."""

from typing import Any, cast

from torch import Tensor, nn

from captum_llm_ext._compat.forward import forward_arguments
from captum_llm_ext._compat.model import is_transformers, is_transformers_object, text_config


def state_argument(model: nn.Module) -> str | None:
    """Name of the argument for the model's cache; None if it has none."""
    if not is_transformers(model):
        return None
    names = forward_arguments(model)
    # transformers calls it `cache` since 5.24 (2026), and still accepts the older names.
    known = ("cache", "past_key_values", "cache_params")
    return next((name for name in known if name in names), None)


def why_no_prefix_reuse(model: nn.Module) -> str | None:
    """The reason why several tokens must not continue from a cache, or None.

    transformers 5.23 (2026): these assume that one token follows a cache, and give wrong numbers
    without an error. Drop one when its row in `tests/test_prefix_reuse.py` says that it is correct.
    """
    kind = getattr(text_config(model), "model_type", None)
    broken = ("mamba", "falcon_mamba", "jamba", "bamba", "recurrent_gemma")
    return f"{kind} reads only one token on from a state" if kind in broken else None


def state_bytes(state: Any) -> int:
    """Size of a cache, in bytes."""
    layers = getattr(state, "layers", None) or [state]
    return sum(_tensor_bytes(vars(layer)) for layer in layers)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_tensor_bytes(item) for item in cast(dict[Any, Any], value).values())
    return 0


def is_list_of_layers(state: Any) -> bool:
    """Whether a cache is a plain list of layer caches, each on its layer's device.

    transformers 5.23 (2026): `DynamicCache`. Others have further states, or move layers between
    devices.
    """
    plain = type(state).__name__ == "DynamicCache" and is_transformers_object(state)
    return plain and not getattr(state, "offloading", False)


def growing_layers() -> tuple[type[Any], ...]:
    """Layer cache classes that append keys and values by concatenation, never in place.

    transformers 5.23 (2026): their other states are in dicts of tensors, which are modified in
    place.
    """
    from transformers import cache_utils

    names = ("DynamicLayer", "DynamicSlidingWindowLayer")
    names += (
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    )
    kinds = (getattr(cache_utils, name, None) for name in names)
    return tuple(kind for kind in kinds if kind is not None)


def keeps_recurrent_states(state: Any) -> bool:
    """Whether some layers of a cache keep a summary of all ids before, not an entry for each.

    transformers 5.23 (2026): linear attention, state spaces and convolutions.
    """
    from transformers import cache_utils

    kind = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())
    return any(isinstance(layer, kind) for layer in getattr(state, "layers", ()))


def keeps_every_id(state: Any) -> bool:
    """Whether a cache has only keys and values, for every id read."""
    plain = growing_layers()[:1]
    return is_list_of_layers(state) and all(type(layer) in plain for layer in state.layers)
