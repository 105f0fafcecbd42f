"""Digests of objects that are equal across processes, and the differences of two runs."""

import copyreg
import dis
import functools
import inspect
import io
import json
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from hashlib import blake2b
from pathlib import PurePath
from typing import Any, cast

import torch
from torch import Tensor, nn

_PACKAGE = __name__.partition(".")[0]
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, PurePath, range, slice),
    *(torch.dtype, torch.device),
)
# Elements summed at a time, since they are converted to larger integers; chosen, not measured.
_PART = 1 << 22
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Texts up to this length are shown unchanged.
_SHOWN = 200
# Libraries whose objects record their own use.
_LIBRARIES = ("transformers", "tokenizers", "accelerate", "datasets")
# Entries that differ between processes, or releases, for the same object.
_OF_THE_MOMENT = ("transformers_version", "initial_timestamp")
_OF_CALLS = ("padding", "truncation")


def describe(thing: Any) -> Any:
    """A JSON value for an object: texts and numbers unchanged, others as a name and a digest.

    Objects are digested by their class's ``__getstate__``, or by their public attributes and those
    named like arguments of their constructor; the user's own classes and functions by their code,
    closures, and the constants they refer to. An object with an unreadable part (a lock, an open
    file) gets a name that says so: two of these count as equal, since nothing distinguishes them
    across processes.
    """
    try:
        text = json.dumps(thing)
    except (TypeError, ValueError, RecursionError):
        found = _Digest()
        found.add(thing)
        left = (
            f" (less what cannot be told of: {', '.join(found.unreadable)})"
            if found.unreadable
            else ""
        )
        return f"{_shown(thing)} {found.hexdigest()}{left}"
    return json.loads(text) if len(text) <= _SHOWN else f"{type(thing).__name__} {digest(thing)}"


def digest(thing: Any) -> str:
    """The digest of an object's content, 16 characters; see `describe`."""
    found = _Digest()
    found.add(thing)
    return found.hexdigest()


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's elements, their bits read as integers.

    Exactly the same for any order, partition and device. For tensors made of others (quantised
    ones, subclasses) the sum over all of these.

    Returns:
        Shape (), int64, on the tensor's device.

    Raises:
        Exception: Anything, for tensors that cannot be read.
    """
    inner = _inner(tensor)
    if inner is not None:
        sums = [checksum(part).cpu() * _odd(name, part) for name, part in inner]
        return sum(sums, torch.zeros((), dtype=torch.int64, device="cpu")).to(tensor.device)
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    numbers = flat.view(_INTEGERS[flat.element_size()])
    sums = [part.sum(dtype=torch.int64) for part in numbers.split(_PART)]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64, device="cpu")


def _inner(tensor: Tensor) -> list[tuple[str, Tensor]] | None:
    """The tensors inside a tensor, by name; None for a plain one."""
    thing: Any = tensor
    if hasattr(thing, "__tensor_flatten__"):
        names, settings = thing.__tensor_flatten__()
        parts = [(name, getattr(thing, name)) for name in names]
        # As a tensor, since settings matter like content.
        text = torch.frombuffer(bytearray(digest(settings).encode()), dtype=torch.int64)
        return [*parts, ("settings", text[:1]), ("more settings", text[1:])]
    if tensor.is_quantized:
        if thing.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            scale = torch.tensor(thing.q_scale(), dtype=torch.float64, device="cpu")
            zero = torch.tensor(thing.q_zero_point(), dtype=torch.int64, device="cpu")
        else:
            scale, zero = thing.q_per_channel_scales(), thing.q_per_channel_zero_points()
        return [("integers", thing.int_repr()), ("scales", scale), ("zero points", zero)]
    if tensor.layout is not torch.strided or tensor.is_mkldnn:
        return [("dense", tensor.to_dense())]
    return None


def _odd(name: str, tensor: Tensor) -> int:
    """An odd multiplier that distinguishes sums of other tensors without losing bits."""
    text = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big") | 1


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The differences of two descriptions in words; empty if there are none."""
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


class _Digest:
    """A digest of objects added one after another.

    Attributes:
        unreadable: Names of parts that cannot be read.
    """

    def __init__(self) -> None:
        self._found = blake2b(digest_size=8)
        self.unreadable: dict[str, None] = {}

    def hexdigest(self) -> str:
        """The digest as text."""
        return self._found.hexdigest()

    def add(self, thing: Any, within: tuple[int, ...] = ()) -> None:
        """Adds an object; `within` are the ids of the objects that contain it."""
        if id(thing) in within:
            kind, content = "again", ()
        else:
            try:
                kind, content = self._content(thing)
                content = tuple(content)
            except Exception as error:  # objects may raise anything when inspected
                del error
                kind, content = _kind(type(thing)), ()
                self.unreadable[type(thing).__name__] = None
        self._found.update(f"\n{kind} {len(content)}\n".encode("utf-8", "surrogatepass"))
        for part in content:
            self.add(part, (*within, id(thing)))

    def _content(self, thing: Any) -> tuple[str, Iterable[Any]]:
        """The kind of an object, and its parts."""
        if isinstance(thing, _PLAIN):
            return repr(thing), ()
        if isinstance(thing, Tensor):
            self._found.update(_bytes(thing))
            return f"{thing.dtype} {tuple(thing.shape)}", ()
        if isinstance(thing, bytearray | memoryview):
            return "bytes", (bytes(thing),)
        if isinstance(thing, Mapping):
            return "mapping", cast(Iterable[Any], thing.items())
        if isinstance(thing, Set):
            return "set", sorted(digest(part) for part in cast(Set[Any], thing))
        if isinstance(thing, Sequence):
            return "sequence", cast(Sequence[Any], thing)
        if isinstance(thing, nn.Module):
            return _kind(type(thing)), _weights(thing)
        if isinstance(thing, functools.partial):
            return "partial", (thing.func, thing.args, thing.keywords)
        if isinstance(thing, types.MethodType):
            return "method", (thing.__func__, thing.__self__)
        if isinstance(thing, types.FunctionType):
            return _kind(thing), _function(thing)
        if isinstance(thing, types.CodeType):
            return thing.co_name, (thing.co_code, thing.co_consts, thing.co_names)
        if isinstance(thing, types.BuiltinFunctionType | types.MethodWrapperType):
            owner = thing.__self__
            return _kind(thing), () if isinstance(owner, types.ModuleType) else (owner,)
        if isinstance(thing, type | types.ModuleType):
            return _kind(thing), ()
        return _kind(type(thing)), _state(thing)


def _kind(thing: Any) -> str:
    name = getattr(thing, "__qualname__", getattr(thing, "__name__", ""))
    return f"{getattr(thing, '__module__', '')}.{name}"


def _function(function: types.FunctionType) -> Iterable[Any]:
    """What determines a function: code, defaults, closure, constant globals."""
    closed: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell
            closed[name] = cell.cell_contents
    steps = dis.get_instructions(function.__code__)
    written = {step.argval for step in steps if step.opname == "STORE_GLOBAL"}  # such as counters
    names = {name for name in function.__code__.co_names if not name.startswith("__")} - written
    seen = {name: function.__globals__.get(name) for name in names}
    return (
        function.__code__,
        function.__defaults__,
        function.__kwdefaults__,
        sorted(closed.items(), key=lambda pair: pair[0]),
        sorted(
            ((name, value) for name, value in seen.items() if _is_constant(value)),
            key=lambda pair: pair[0],
        ),
    )


def _is_constant(thing: Any) -> bool:
    """Whether it is an immutable value, or a container of such."""
    if isinstance(thing, tuple | frozenset):
        return all(map(_is_constant, cast(Iterable[Any], thing)))
    return isinstance(thing, _PLAIN)


def _state(thing: object) -> Iterable[Any]:
    """The state of an object; private caches are left out."""
    cls = type(thing)
    package = cls.__module__.partition(".")[0]
    if package in _LIBRARIES:
        return _library_state(thing)
    own = package == _PACKAGE
    code = () if own else _own_code(cls)
    if getattr(cls, "__getstate__", None) is not getattr(object, "__getstate__", None):
        state: Any = cast(Any, thing).__getstate__()
        return (state, *code)
    held: dict[str, Any] = getattr(thing, "__dict__", {})
    if isinstance(thing, io.IOBase):  # its attributes are not its content
        raise TypeError("the content of a file cannot be determined")
    if not held and hasattr(thing, "tolist"):  # of numpy
        return (cast(Any, thing).tolist(),)
    if not held:
        return (*_reduced(thing), *code)
    if own:
        return tuple(sorted(held.items(), key=lambda pair: pair[0]))
    return (*_attributes(thing, _arguments(cls)), *code)


def _attributes(thing: object, arguments: Iterable[str]) -> list[tuple[str, Any]]:
    """Public attributes, and private ones that are named like some arguments."""
    named = {f"_{name}" for name in arguments}
    held = vars(thing)
    kept = (name for name in sorted(held) if not name.startswith("_") or name in named)
    return [(name, held[name]) for name in kept if name not in _OF_THE_MOMENT]


def _arguments(cls: type) -> list[str]:
    """Names of a constructor's arguments."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        parameters = inspect.signature(cls.__init__).parameters.values()
    except (TypeError, ValueError):
        return []
    return [one.name for one in parameters if one.kind not in kinds][1:]


def _library_state(thing: Any) -> Iterable[Any]:
    """The relevant state of objects of libraries, which modify their own."""
    if hasattr(thing, "get_vocab"):
        return _tokenizer_state(thing)
    if callable(getattr(thing, "to_dict", None)):  # a configuration
        state: dict[str, Any] = thing.to_dict()
        left = _OF_THE_MOMENT
        return [(k, state[k]) for k in sorted(state) if not k.startswith("_") and k not in left]
    fingerprint = getattr(thing, "_fingerprint", None)
    if fingerprint is not None:  # a data set
        return (fingerprint,)
    held: dict[str, Any] = getattr(thing, "__dict__", {})
    if not held:
        return _reduced(thing)
    arguments = _arguments(type(thing))
    if arguments and all(name in held for name in arguments):
        return [(name, held[name]) for name in arguments if name not in _OF_THE_MOMENT]
    return _attributes(thing, arguments)


def _tokenizer_state(thing: Any) -> Iterable[Any]:
    backend = getattr(thing, "backend_tokenizer", thing)
    extra = getattr(thing, "special_tokens_map", None), getattr(thing, "chat_template", None)
    if not hasattr(backend, "to_str"):
        return (json.dumps(thing.get_vocab(), sort_keys=True), *extra)
    content: dict[str, Any] = json.loads(backend.to_str())
    kept = {k: v for k, v in content.items() if k not in _OF_CALLS}
    return (json.dumps(kept, sort_keys=True), *extra)


def _reduced(thing: object) -> Iterable[Any]:
    """The pickling state of an object: patterns, dates, objects with slots."""
    registered = copyreg.dispatch_table.get(type(thing))
    made: Any = thing.__reduce_ex__(4) if registered is None else registered(thing)
    if isinstance(made, str):
        return (made,)
    return [part if isinstance(part, tuple | dict) else _listed(part) for part in made[1:]]


def _listed(part: Any) -> Any:
    return list(part) if hasattr(part, "__next__") else part


def _own_code(cls: type) -> list[Any]:
    """The methods and attributes of a user's own class and its bases."""
    found: list[Any] = []
    for one in cls.__mro__:
        if _is_installed(one.__module__):
            continue
        for name, value in sorted(vars(one).items()):
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, types.FunctionType):
                found.append((name, function))
            elif not name.startswith("_") and _is_constant(value):
                found.append((name, value))
    return found


@functools.cache
def _is_installed(module: str) -> bool:
    """Whether a module belongs to Python, an installed package, or this one."""
    if module.partition(".")[0] == _PACKAGE:
        return True
    if module == "__main__":  # a notebook, or a script
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return True
    paths = sysconfig.get_paths()
    return any(file.startswith(paths[name]) for name in ("stdlib", "purelib", "platlib"))


def _weights(module: nn.Module) -> Iterable[Any]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device.type != "meta":
            yield name, int(checksum(tensor))


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))
