"""What a thing holds, as a digest that another process finds too, and what two runs differ in."""

import functools
import inspect
import json
import types
from collections.abc import Iterable, Mapping, Sequence, Set
from hashlib import blake2b
from pathlib import PurePath
from typing import Any, cast

import torch
from torch import Tensor, nn

_PACKAGE = __name__.partition(".")[0]
_PLAIN = (type(None), bool, int, float, complex, str, bytes, PurePath, torch.dtype, torch.device)
_PART = 1 << 22  # elements summed at a time: as integers they take more room than they are
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What is no longer than this is shown as it is.
_SHOWN = 200
# Their objects note down what became of them while they are used.
_LIBRARIES = ("transformers", "tokenizers", "accelerate", "datasets")


def told(thing: Any) -> Any:
    """What JSON shows of a thing: texts and numbers themselves, of others a name and a digest.

    Objects count with what their class's ``__getstate__`` gives, or else with their public
    attributes; functions with their code and what they close over.
    """
    try:
        text = json.dumps(thing)
    except (TypeError, ValueError):
        return f"{_shown(thing)} {digest(thing)}"
    return json.loads(text) if len(text) <= _SHOWN else f"{type(thing).__name__} {digest(thing)}"


def digest(thing: Any) -> str:
    """The digest of what a thing holds, 16 characters."""
    found = blake2b(digest_size=8)
    _feed(found, thing, ())
    return found.hexdigest()


def level_of_caller() -> int:
    """How far up the stack the package was called from: warnings come from many places."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    return level


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's elements, their bits read as integers.

    Whatever the order, and whatever parts are summed apart: it is the same to the last bit, on
    every device.

    Returns:
        Shape (), int64, on the tensor's device.

    Raises:
        RuntimeError, TypeError: If the elements cannot be read (some quantised tensors).
    """
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    numbers = flat.view(_INTEGERS[flat.element_size()])
    sums = [part.sum(dtype=torch.int64) for part in numbers.split(_PART)]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what two descriptions differ, in words; empty where they do not."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(
        f"`{name}` was {then.get(name)!r} and is {now.get(name)!r}"
        if len(f"{then.get(name)}{now.get(name)}") <= _SHOWN
        else f"another `{name}`"
        for name in names
    )


def _shown(thing: Any) -> str:
    name = getattr(thing, "__qualname__", None)
    if isinstance(name, str):
        return name
    text = repr(thing)
    return type(thing).__name__ if " at 0x" in text or len(text) > _SHOWN / 2 else text


def _feed(found: Any, thing: Any, within: tuple[int, ...]) -> None:
    """Adds a thing to a digest; `within` are the ids of those it is a part of."""

    def add(*parts: Any) -> None:
        for part in parts:
            _feed(found, part, (*within, id(thing)))

    if id(thing) in within:
        kind, content = "again", ()
    elif isinstance(thing, _PLAIN):
        kind, content = repr(thing), ()
    elif isinstance(thing, Tensor):
        kind, content = f"{thing.dtype} {tuple(thing.shape)}", ()
        found.update(_bytes(thing))
    elif isinstance(thing, Mapping):
        kind, content = "mapping", cast(Iterable[Any], thing.items())
    elif isinstance(thing, Set):
        kind, content = "set", sorted(digest(part) for part in cast(Set[Any], thing))
    elif isinstance(thing, Sequence):
        kind, content = "sequence", cast(Sequence[Any], thing)
    elif isinstance(thing, nn.Module):
        kind, content = _kind(type(thing)), _weights(thing)
    elif isinstance(thing, functools.partial):
        kind, content = "partial", (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, types.MethodType):
        kind, content = "method", (thing.__func__, thing.__self__)
    elif isinstance(thing, types.FunctionType):
        kind, content = _kind(thing), _function(thing)
    elif isinstance(thing, types.CodeType):
        kind, content = thing.co_name, (thing.co_code, thing.co_consts, thing.co_names)
    elif isinstance(thing, type | types.BuiltinFunctionType | types.ModuleType):
        kind, content = _kind(thing), ()
    else:
        kind, content = _kind(type(thing)), _state(thing)
    content = tuple(content)
    found.update(f"\n{kind} {len(content)}\n".encode("utf-8", "surrogatepass"))
    add(*content)


def _kind(thing: Any) -> str:
    name = getattr(thing, "__qualname__", getattr(thing, "__name__", ""))
    return f"{getattr(thing, '__module__', '')}.{name}"


def _function(function: types.FunctionType) -> Iterable[Any]:
    """What a function computes with: its code, its defaults, and what it closes over."""
    closed = inspect.getclosurevars(function).nonlocals
    return (
        function.__code__,
        function.__defaults__,
        function.__kwdefaults__,
        sorted(closed.items(), key=lambda pair: pair[0]),
    )


def _state(thing: object) -> Iterable[Any]:
    """What an object holds; what it remembers for speed is private, and left out."""
    cls = type(thing)
    package = cls.__module__.partition(".")[0]
    if package in _LIBRARIES:
        return (getattr(thing, "name_or_path", None),)
    if getattr(cls, "__getstate__", None) is not getattr(object, "__getstate__", None):
        state: Any = cast(Any, thing).__getstate__()
        return (state,)
    own = package == _PACKAGE
    held = getattr(thing, "__dict__", {})
    if not held and hasattr(thing, "tolist"):  # of numpy
        return (cast(Any, thing).tolist(),)
    return tuple((k, held[k]) for k in sorted(held) if own or not k.startswith("_"))


def _weights(module: nn.Module) -> Iterable[Any]:
    for name, parameter in module.named_parameters():
        if parameter.device.type != "meta":
            yield name, int(checksum(parameter))


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))
