"""The random generators available to a model, and their states.

Torch reports the draws of its own functions (see `draws`). Others are noticed by a changed state:
the global generators are known; a model's own are searched where its code has access: in a module,
a hook's closure, a global variable of a function.
"""

import gc
import random
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

# These draw by torch, or from global generators. (Their code leads to a thousand times as many
# objects as a model has.)
_KNOWN = ("torch", "transformers")
# Objects examined, the nearest first: SmolLM2 has 5,000, which takes 5 ms.
_MOST = 100_000
_NOT_OWN = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, tuple, dict, set, frozenset)
_LEAVES = (str, bytes, int, float, complex, type(None), Tensor, CodeType, ModuleType)


def states(generators: Sequence[Any]) -> tuple[object, ...]:
    """Comparable states of the global generators and given ones."""
    found = [random.getstate(), *(_state_of(one) for one in generators)]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found.append(_plain(numpy.random.get_state(legacy=False)))
    return tuple(found)


def generators_of(model: nn.Module) -> list[Any]:
    """Generators of a model's modules, its hooks and the functions that these call."""
    kinds: tuple[type, ...] = (random.Random, torch.Generator)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        own = numpy.random
        kinds += (own.Generator, own.RandomState, own.BitGenerator)
    seen: set[int] = set()
    found: list[Any] = []
    todo: deque[object] = deque(thing for m in model.modules() for thing in _parts(m))
    while todo and len(seen) < _MOST:
        one = todo.popleft()
        if id(one) in seen or isinstance(one, _LEAVES):
            continue
        seen.add(id(one))
        if not isinstance(one, kinds):
            todo += _reached(one)
        elif not isinstance(one, random.SystemRandom):  # which has no state
            found.append(one)
    return found


def _parts(module: nn.Module) -> Iterator[object]:
    """A module's attributes other than tensors and modules, and its code."""
    yield from [value for name, value in vars(module).items() if name not in _NOT_OWN]
    yield from type(module).__mro__


def _reached(one: object) -> Iterator[object]:
    """The objects reachable from one in one step."""
    if isinstance(one, FunctionType | type):
        if (one.__module__ or "").split(".")[0] in _KNOWN:
            return
        yield from list(vars(one).values())
        if isinstance(one, FunctionType):
            yield from (one.__defaults__, one.__kwdefaults__)
            yield from _variables_of(one)
    elif not (isinstance(one, _CONTAINERS) and len(one) > _MOST):
        yield from [other for other in gc.get_referents(one) if not isinstance(other, type)]


def _variables_of(function: FunctionType) -> Iterator[object]:
    """A function's variables as far as its code names them, including those of other modules."""
    names = {*_names(function.__code__)}
    around = _named(function.__globals__, names)
    for value in (*around, *gc.get_referents(*(function.__closure__ or ()))):
        if isinstance(value, ModuleType):
            yield from _named(vars(value), names)
        else:
            yield value


def _named(variables: dict[str, Any], names: set[str]) -> list[Any]:
    return [variables[name] for name in names if name in variables]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _state_of(generator: Any) -> object:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return _plain(generator.get_state().numpy())
    bits = getattr(generator, "_bit_generator", generator)
    return _plain(bits.state)


def _plain(state: Any) -> object:
    """A comparable state of a numpy generator."""
    if isinstance(state, dict):
        items = cast(dict[str, Any], state).items()
        return tuple((key, _plain(value)) for key, value in items)
    return state.tobytes() if hasattr(state, "tobytes") else state
