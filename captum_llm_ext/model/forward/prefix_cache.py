"""Prefix caches for several rows: copies, or the cache itself."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext import _compat

# Attribute by which keys carry the shared ones to `attention`.
_SHARED = "_captum_llm_ext_shared"


@dataclass
class SharedLayer:
    """Keys and values ``(1, n_heads, n, size)`` before new ones, and whether they were used."""

    keys: Tensor
    values: Tensor
    was_used: bool = False


def copied_cache(state: Any, n: int | None = None) -> Any:
    """A copy of a one-row cache for `n` rows; without a number, for one row.

    Keys and values of plain layers are never modified in place: these are views, not copies.
    """
    if state is None:
        return None
    kinds = _compat.growing_layers()
    if not _compat.is_list_of_layers(state):
        kinds = ()
    if not kinds:
        state = copy.deepcopy(state)
        if n is not None:
            state.reorder_cache(torch.zeros(n, dtype=torch.long, device="cpu"))
        return state
    found = copy.copy(state)
    found.layers = [
        _seen(layer, n) if type(layer) in kinds else _copied(layer, n) for layer in state.layers
    ]
    return found


def cache_part(state: Any, places: Tensor) -> Any:
    """The cache after some of its ids, as if there had been no others.

    Args:
        state: The cache of one row.
        places: Positions of these ids, in order, int64 ``(n,)``; if empty, there is no cache.

    Raises:
        NotImplementedError: If the cache has no separate entry per id.
    """
    if not len(places):
        return None
    if not _compat.keeps_every_id(state):
        raise NotImplementedError(f"a part of a {type(state).__name__}")
    found = copy.copy(state)
    found.layers = [copy.copy(layer) for layer in state.layers]
    for layer in found.layers:
        if isinstance(layer.keys, Tensor) and layer.keys.numel():
            here = places.to(layer.keys.device)
            layer.keys = layer.keys.index_select(-2, here)
            layer.values = layer.values.index_select(-2, here)
    return found


def shared_cache(state: Any, n: int) -> tuple[Any, list[SharedLayer]]:
    """A one-row cache shared by `n` rows without copies.

    For one pass within `attention.merged_attention`, where keys carry the shared ones.

    Returns:
        The cache, and a list that the pass fills with what was shared, and whether it was used.

    Raises:
        NotImplementedError: If no layer of the cache can be shared.
    """
    kinds = _compat.growing_layers()
    if not _compat.is_list_of_layers(state) or not any(type(x) in kinds for x in state.layers):
        raise NotImplementedError(f"the layers of a {type(state).__name__} cannot be shared")
    found, shared = copy.copy(state), list[SharedLayer]()
    found.layers = [
        _shared_layer(layer, n, shared) if type(layer) in kinds else _copied(layer, n)
        for layer in state.layers
    ]
    return found, shared


def shared_with(keys: Tensor) -> SharedLayer | None:
    """The shared keys and values before given ones, or None."""
    return getattr(keys, _SHARED, None)


def _seen(layer: Any, n: int | None) -> Any:
    found = _with_own_dicts(layer, n)
    if n is not None and isinstance(layer.keys, Tensor) and layer.keys.dim() == 4:
        found.keys = layer.keys.expand(n, -1, -1, -1)
        found.values = layer.values.expand(n, -1, -1, -1)
    return found


def _copied(layer: Any, n: int | None) -> Any:
    layer = copy.deepcopy(layer)
    if n is not None:
        layer.reorder_cache(torch.zeros(n, dtype=torch.long, device="cpu"))
    return layer


def _shared_layer(layer: Any, n: int, shared: list[SharedLayer]) -> Any:
    if not isinstance(layer.keys, Tensor) or layer.keys.dim() != 4:
        return _copied(layer, n)
    found = _with_own_dicts(layer, n)
    found.__class__ = _sharing_kind(type(layer))
    found.shared = shared
    return found


def _with_own_dicts(layer: Any, n: int | None) -> Any:
    """A shallow copy; recurrent states, which layers modify in place in dicts, are copied."""
    found = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(found, name, {k: _own(v, n) for k, v in value.items()})
    return found


def _own(value: Any, n: int | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone() if n is None else value.repeat_interleave(n, 0)


@cache
def _sharing_kind(kind: type[Any]) -> type[Any]:
    """The layer class that keeps its entries and attaches them to new keys."""

    def update(self: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
        one = SharedLayer(self.keys, self.values)
        self.shared.append(one)
        setattr(keys, _SHARED, one)
        return keys, values

    return type(f"Shared{kind.__name__}", (kind,), {"update": update})
