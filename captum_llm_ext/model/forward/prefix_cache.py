"""What rows are given of a model's state after the ids they share: copies, or the state itself."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext import _compat

# Where keys carry the ones that were shared, for `attention` to find them.
_SHARED = "_captum_llm_ext_shared"


@dataclass
class SharedLayer:
    """Keys and values ``(1, n_heads, n, size)`` that go before new ones, and whether they did."""

    keys: Tensor
    values: Tensor
    was_used: bool = False


def copied_cache(state: Any, n: int | None = None) -> Any:
    """A state of the model for `n` rows from that of one; without a number, for that one.

    Keys and values of plain layers are never changed in place: they are seen, not copied.
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
    """The state after some of the ids that one has read, as if there had been no others.

    Args:
        state: Of one row.
        places: Where these ids are, in order, int64 ``(n,)``; without any there is no state.

    Raises:
        NotImplementedError: If the state does not keep every id apart from all others.
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
    """The state of one row for `n` rows to read on from, without a copy of it for each.

    Made for one pass within `attention.merged`: keys then come with those that were shared.

    Returns:
        The state, and a list that the pass fills: of all that was shared, and whether it was used.

    Raises:
        NotImplementedError: If no layer of the state can be shared.
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
    """What goes before these keys; None if nothing does."""
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
    """A shallow copy; recurrent states, which layers keep in dicts and change in place, are own."""
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
    """The kind of layer that keeps what it has for itself and sends it along with new keys."""

    def update(self: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
        one = SharedLayer(self.keys, self.values)
        self.shared.append(one)
        setattr(keys, _SHARED, one)
        return keys, values

    return type(f"Shared{kind.__name__}", (kind,), {"update": update})
