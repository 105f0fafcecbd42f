"""Whether a model is unchanged, without reading a weight, and without a pass."""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat

State = Mapping[tuple[Any, ...], object]
_SIMPLE = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)
# Set and restored by every attribution.
_PASSING = frozenset({"training"})
_APART = ("_parameters", "_buffers", "_modules")  # listed by themselves


def state_of(model: nn.Module) -> dict[tuple[Any, ...], object]:
    """A state that differs if the model may behave differently.

    Its modules, the location and modification count of every weight and buffer, all numbers, names
    and switches of its modules and configurations (active adapters, windows, the kind of attention,
    quantisation), hooks, and torch's settings.
    """
    found: dict[tuple[Any, ...], object] = {("torch",): _torch_settings()}
    seen: set[int] = set()
    for name, module in model.named_modules():
        found[name, "module"] = (id(module), type(module))
        held = {**module._parameters, **module._buffers}  # pyright: ignore[reportPrivateUsage]
        found |= {(name, key): _place_of(t) for key, t in held.items() if t is not None}
        found |= {
            (name, key): _content(value, seen)
            for key, value in vars(module).items()
            if key not in _APART and key not in _PASSING
        }
    return found


def differences(one: State, other: State) -> set[tuple[Any, ...]]:
    """The differences of two states."""
    return {key for key in {*one, *other} if one.get(key, _NONE) != other.get(key, _NONE)}


_NONE = object()


def _torch_settings() -> tuple[object, ...]:
    kinds = ("cpu", "cuda")
    return (
        *(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in kinds),
        torch.get_float32_matmul_precision(),
    )


def _place_of(tensor: Tensor) -> tuple[object, ...]:
    about = (tensor.dtype, tensor.device, tuple(tensor.shape), type(tensor))
    if tensor.device.type == "meta":  # loaded by a hook during a pass
        return about
    try:
        where = tensor.data_ptr()
    except RuntimeError:  # some subclasses have none
        where = id(tensor)
    try:
        version = tensor._version
    except RuntimeError:  # tensors of inference mode have no version counter
        version = -1
    return (*about, where, version)


def _content(value: object, seen: set[int], depth: int = 0) -> object:
    """Something that is equal as long as a value is unchanged; for large objects their identity."""
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, Tensor):
        return _place_of(value)
    if depth > 3:
        return type(value)
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return tuple((str(key), _content(item, seen, depth + 1)) for key, item in items)
    if isinstance(value, Sequence | set | frozenset):
        return tuple(_content(item, seen, depth + 1) for item in cast("Sequence[Any]", value))
    if isinstance(value, nn.Module):
        return id(value)
    if _is_settings(value):
        # Many modules share one configuration.
        if id(value) in seen:
            return id(value)
        seen.add(id(value))
        return (id(value), tuple(_settings(value, seen, depth)))
    return (type(value), id(value)) if callable(value) else type(value)


def _is_settings(value: object) -> bool:
    """Whether it is a configuration: of transformers, or a user's own record."""
    is_record = is_dataclass(value) or isinstance(value, SimpleNamespace | Namespace)
    is_own = is_record and not isinstance(value, type)
    return (is_own or _compat.is_transformers_object(value)) and hasattr(value, "__dict__")


def _settings(value: object, seen: set[int], depth: int) -> Iterator[tuple[str, object]]:
    for key, item in vars(value).items():
        yield key, _content(item, seen, depth + 1)
