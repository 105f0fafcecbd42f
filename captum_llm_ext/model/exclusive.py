"""One thread at a time asks a model for attributions; all others may go on using it.

For the time of a pass layers are watched, outputs replaced and attention computed in another way.
That is for the thread alone that asks (see `in_this_thread_only` and `_compat.attention_of`), and
two threads that both want it wait for one another.
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

# A thread that was interrupted while it let go of a model may have told nobody.
_LOOK_AGAIN = 1.0  # seconds


@dataclass(frozen=True, eq=False)
class _Hold:
    """What a thread has of a model, or waits for: modules and weights, by what identifies them."""

    thread: int
    parts: frozenset[Any]


_changed = threading.Condition()
_held: list[_Hold] = []
_awaited: dict[int, _Hold] = {}


@contextmanager
def locked(model: nn.Module) -> Generator[None]:
    """No other thread holds the model meanwhile, or one that has modules or weights of it.

    A thread may hold what it holds already, and several models at once.

    Raises:
        RuntimeError: If waiting for another thread would never end, for it waits for this one.
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
    """The model is held, in evaluation mode and without gradients; its modes are put back.

    Inference mode is left as well: its tensors do not tell when they are written to. And what the
    model makes without saying where is made where the model is, whatever `torch.set_default_device`
    has been told.
    """
    with locked(model), outside_inference_mode(), _where_it_is(model):
        training = [module for module in model.modules() if module.training]
        try:
            if training:
                with suppress(NotImplementedError):  # an exported program has one mode
                    model.eval()
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def outside_inference_mode() -> Generator[None]:
    """Tensors made within are ordinary ones; whether gradients are taken stays as it is."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    takes_gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(takes_gradients):
        yield


def _where_it_is(model: nn.Module) -> AbstractContextManager[Any]:
    """Has tensors made where the model reads its ids, unless they are made where they always were.

    Plain passes meet the latter as well.
    """
    is_usual = torch.get_default_device().type == "cpu"
    return nullcontext() if is_usual else _compat.input_device(model)


def in_this_thread_only(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A module's hook that passes of other threads go through unchanged.

    torch gives it other arguments, in other threads, while it is being put on or taken off.
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
                        "two threads that hold a model each wait for that of the other: ask one "
                        "model after another, not one within a pass of another (`attr_target`, "
                        "hooks)."
                    )
                _changed.wait(_LOOK_AGAIN)
            _held.append(hold)
        finally:
            _awaited.pop(hold.thread, None)


def _holders(wanted: _Hold) -> set[int]:
    """Threads that hold some of it."""
    return {
        hold.thread
        for hold in _held
        if hold.thread != wanted.thread and not hold.parts.isdisjoint(wanted.parts)
    }


def _is_awaited_by_its_holders(wanted: _Hold) -> bool:
    """Whether one whom this thread waits for waits for this one, at one remove or many."""
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
    """What makes two models one: modules in common, or weights, as wrappers and heads have."""
    found: set[Any] = {id(module) for module in model.modules()}
    for parameter in model.parameters():
        found.add(id(parameter))
        if type(parameter) is nn.Parameter and (start := parameter.untyped_storage().data_ptr()):
            found.add(("storage", start))
    return frozenset(found)


def _forget_other_threads() -> None:
    """In a forked process there are none; the lock may have been taken by one of them."""
    global _changed
    _changed = threading.Condition()
    _held[:] = [hold for hold in _held if hold.thread == threading.get_ident()]
    _awaited.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
