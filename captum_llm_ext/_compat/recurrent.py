"""Functions of transformers in which linear attention and state-space layers mix positions."""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# transformers 5.23 (2026): looked up in the model's module at every call. By name the argument that
# is mixed; all others define how. For Qwen 3 Next, Qwen 3.5, OLMo Hybrid; Mamba, Jamba; Mamba 2,
# Bamba, Falcon-H1, Granite 4, Nemotron-H.
_FUNCTIONS = {
    "torch_chunk_gated_delta_rule": "value",
    "torch_recurrent_gated_delta_rule": "value",
    "mamba_selective_scan": "hidden_states",
    "mamba2_chunk_scan": "hidden_states",
}
_lock = threading.Lock()
# For each replaced function: the original, and how many passes replace it.
_replaced: dict[tuple[str, str], tuple[Any, int]] = {}


class _Here(threading.local):
    """The treatment of these arguments, in this thread."""

    hold: Callable[[Tensor], Tensor] | None = None


_here = _Here()


@contextmanager
def values_mixed_by(model: nn.Module, hold: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Transforms the arguments that define the mixing of positions, in passes of this thread.

    Args:
        model: The model whose functions these are.
        hold: Transforms such a tensor.
    """
    homes = {type(module).__module__ for module in model.modules()}
    names = [
        (home, name)
        for home in homes
        for name in _FUNCTIONS
        if hasattr(sys.modules.get(home), name)
    ]
    before = _here.hold
    try:
        for key in names:
            _replace(key)
        _here.hold = hold
        yield
    finally:
        _here.hold = before
        for key in names:
            _put_back(key)


def _replace(key: tuple[str, str]) -> None:
    home, name = key
    with _lock:
        plain, n = _replaced.get(key, (getattr(sys.modules[home], name), 0))
        _replaced[key] = (plain, n + 1)
        if n == 0:
            setattr(sys.modules[home], name, _held(plain, _FUNCTIONS[name]))


def _put_back(key: tuple[str, str]) -> None:
    home, name = key
    with _lock:
        if key not in _replaced:  # interrupted before it was replaced
            return
        plain, n = _replaced.pop(key)
        if n > 1:
            _replaced[key] = (plain, n - 1)
        else:
            setattr(sys.modules[home], name, plain)


def _held(plain: Callable[..., Any], mixed: str) -> Callable[..., Any]:
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def function(*args: Any, **kwargs: Any) -> Any:
        hold = _here.hold
        if hold is None:
            return plain(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        for name, own in given.arguments.items():
            if isinstance(own, Tensor) and name != mixed:
                given.arguments[name] = hold(own)
        return plain(*given.args, **given.kwargs)

    return function
