"""How far rounding alone moves a value, and whether a way of computing it is as right as others."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import in_this_thread_only
from captum_llm_ext.model.forward.swallowed import is_no_answer

# Largest difference between log-probabilities that other shapes of the same products make.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.25}
_HALF = (torch.float16, torch.bfloat16)
# So many last digits of a number of 32 bits: sums in another order move it by about one.
_SINGLE_DIGITS = 2
# An effect is what exceeds by so much what other last digits do, both as root mean squares, or as
# the largest differences. On SmolLM2 and Gemma 3 in bfloat16 two ways of computing the same lay
# less than 1.6 times as far apart as other digits had moved a pass, at most once as far.
BEYOND = 3.0
_BEYOND_MOST = 2.0


def rounding(dtype: torch.dtype | None) -> float:
    """Largest difference between log-probabilities that other shapes of the same products make."""
    return _ROUNDING.get(dtype or torch.float32, _ROUNDING[torch.float32])


def reason_against(error_of: Callable[[], float]) -> str | None:
    """Why a way of computing values is not right; None where it is.

    Args:
        error_of: Goes that way; returns the largest difference that it makes, over what rounding
            explains.
    """
    try:
        error = error_of()
    except Exception as failure:  # whatever a model does with a state: there is a way without
        if is_no_answer(failure):
            raise
        return f"{type(failure).__name__}: {failure}"
    return None if error <= 1 else f"values differ by {error:.2g} times rounding"


def error_over_rounding(found: Tensor, expected: Tensor, otherwise: Tensor | None = None) -> float:
    """Largest difference between log-probabilities over what rounding explains.

    Args:
        found: Logits, computed in some way.
        expected: The same, computed plainly.
        otherwise: The same, computed plainly but `rounded_otherwise`, where numbers are so coarse
            that what rounding explains differs from model to model.
    """
    plain = expected.double().log_softmax(-1)
    differences = _apart(found, plain)
    worst = float(differences.max())
    error = worst / _ROUNDING.get(found.dtype, 0.0)
    if otherwise is None:
        return error
    moved = _apart(otherwise, plain)
    usual = _root_mean_square(differences) / max(BEYOND * _root_mean_square(moved), 1e-9)
    return min(error, max(usual, worst / max(_BEYOND_MOST * float(moved.max()), 1e-9)))


@contextmanager
def rounded_otherwise(model: nn.Module, *, singles: bool = False) -> Generator[None]:
    """Layers that return numbers of sixteen bits round them otherwise within, at random.

    So a pass shows how far rounding moves what comes out, whatever shapes it is computed in:
    Monte Carlo arithmetic (Parker, 1997). In this thread alone, and not of compiled models, whose
    code would keep it.

    Args:
        model: Its hooks are taken off again.
        singles: Whether numbers of 32 bits are moved as well, by some of their last digits: what is
            rounded to few bits after that falls to the other side where it was near.
    """
    moving = (*_HALF, torch.float32) if singles else _HALF
    generators: dict[torch.device, torch.Generator] = {}

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in moving:
            return x
        generator = generators.get(x.device)
        if generator is None:
            generator = generators[x.device] = torch.Generator(x.device).manual_seed(0)
        draws = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        digits = torch.finfo(x.dtype).eps * (1 if x.dtype in _HALF else _SINGLE_DIGITS)
        return (x.float() * (1 + digits * (draws - 0.5))).to(x.dtype)

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (moved(output[0]), *output[1:]) if type(output) is tuple else moved(output)

    hooks: list[RemovableHandle] = []
    try:
        if not _compat.is_compiled(model):
            for module in model.modules():
                if next(module.parameters(recurse=False), None) is not None:
                    hooks.append(module.register_forward_hook(in_this_thread_only(hook)))
        yield
    finally:
        for one in hooks:
            one.remove()


def _apart(logits: Tensor, log_probs: Tensor) -> Tensor:
    # What a model rules out is minus infinity in both.
    apart = (logits.double().log_softmax(-1) - log_probs).abs()
    return apart.masked_fill(log_probs.isneginf(), 0.0).nan_to_num(nan=torch.inf)


def _root_mean_square(differences: Tensor) -> float:
    return float(differences.square().mean().sqrt())
