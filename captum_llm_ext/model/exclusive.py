"""Locks a model for attributions of one thread; other threads can still use it.

During a forward pass, layers are hooked, outputs replaced and attention computed differently. This
affects only the attributing thread (see `in_this_thread_only` and `_compat.attention_of`); two
attributing threads take turns.
"""

import os
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from captum_llm_ext import _compat

# An interrupted thread may have released a model without notifying others.
_LOOK_AGAIN = 1.0  # seconds


@dataclass(frozen=True, eq=False)
class _Hold:
    """What a thread holds of a model, or waits for: ids of modules and weights."""

    thread: int
    parts: frozenset[Any]


_changed = threading.Condition()
_held: list[_Hold] = []
_awaited: dict[int, _Hold] = {}


@contextmanager
def locked(model: nn.Module) -> Generator[None]:
    """Locks the model, and others that share modules or weights with it, for this thread.

    Reentrant; a thread may hold several models at once.

    Raises:
        RuntimeError: If waiting would be a deadlock.
    """
    hold = _Hold(threading.get_ident(), _parts(model))
    try:
        _take(hold)
        yield
    finally:
        with _changed:
            if hold in _held:
                _held.remove(hold)
            _changed.notify_all()


@contextmanager
def exclusive_use(model: nn.Module) -> Generator[None]:
    """Locks the model, in evaluation mode and without gradients; modes are restored.

    Also leaves inference mode, whose tensors do not count modifications, and makes tensors without
    an explicit device on the model's, whatever `torch.set_default_device`.
    """
    with locked(model), outside_inference_mode(), _where_it_is(model):
        training = [module for module in model.modules() if module.training]
        try:
            if training:
                with suppress(NotImplementedError):  # an exported program has one mode only
                    model.eval()
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def outside_inference_mode() -> Generator[None]:
    """Tensors made within are ordinary ones; the gradient mode is unchanged."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    takes_gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(takes_gradients):
        yield


def _where_it_is(model: nn.Module) -> AbstractContextManager[Any]:
    """Makes tensors on the model's input device, unless the default device is unchanged.

    Plain forward passes are affected by a changed default as well.
    """
    is_usual = torch.get_default_device().type == "cpu"
    return nullcontext() if is_usual else _compat.input_device(model)


def in_this_thread_only(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Restricts a module's hook to passes of this thread.

    In other threads, torch calls it with other arguments while it is being added or removed.
    """
    owner = threading.get_ident()
    return lambda *arguments: hook(*arguments) if threading.get_ident() == owner else None


def _take(hold: _Hold) -> None:
    with _changed:
        try:
            while _holders(hold):
                _awaited[hold.thread] = hold
                if _is_awaited_by_its_holders(hold):
                    raise RuntimeError(
                        "two threads each hold a model and wait for the other's: use one model "
                        "after another, not one inside a pass of another (`attr_target`, hooks)."
                    )
                _changed.wait(_LOOK_AGAIN)
            _held.append(hold)
        finally:
            _awaited.pop(hold.thread, None)


def _holders(wanted: _Hold) -> set[int]:
    """Threads that hold part of it."""
    return {
        hold.thread
        for hold in _held
        if hold.thread != wanted.thread and not hold.parts.isdisjoint(wanted.parts)
    }


def _is_awaited_by_its_holders(wanted: _Hold) -> bool:
    """Whether a holder waits for this thread, directly or indirectly."""
    todo, seen = [wanted.thread], set[int]()
    while todo:
        if (waiting := _awaited.get(todo.pop())) is None:
            continue
        holders = _holders(waiting)
        if wanted.thread in holders:
            return True
        todo += holders - seen
        seen |= holders
    return False


def _parts(model: nn.Module) -> frozenset[Any]:
    """What identifies shared models: modules or weights in common, as of wrappers and heads."""
    found: set[Any] = {id(module) for module in model.modules()}
    for parameter in model.parameters():
        found.add(id(parameter))
        if type(parameter) is nn.Parameter and (start := parameter.untyped_storage().data_ptr()):
            found.add(("storage", start))
    return frozenset(found)


def _forget_other_threads() -> None:
    """After a fork there are no other threads, though one of them may have held the lock."""
    global _changed
    _changed = threading.Condition()
    _held[:] = [hold for hold in _held if hold.thread == threading.get_ident()]
    _awaited.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
