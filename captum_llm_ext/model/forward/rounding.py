"""How far rounding alone moves a value, and whether a way of computing it is as right as others."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Apart:
    """How far log-probabilities of all tokens lie apart that were computed in two ways.

    Attributes:
        usual: The root of the mean square, in nats.
        most: The largest.
    """

    usual: float
    most: float

    @classmethod
    def between(cls, found: Tensor, plain: Tensor) -> "Apart":
        """Of logits ``(…, vocabulary)``; what one of the ways alone rules out is infinitely far."""
        expected, said = log_probs_of(plain), log_probs_of(found)
        # What a model rules out is minus infinity in both.
        differences = (said - expected).abs_().masked_fill_(expected.isneginf(), 0.0)
        differences = differences.nan_to_num_(nan=math.inf)
        usual = differences.square().mean(dtype=torch.float64).sqrt()
        return cls(float(usual), float(differences.max()))

    def over(self, dtype: torch.dtype) -> float:
        """The largest difference over what logits of this type explain."""
        return self.most / _ROUNDING.get(dtype, 1e-9)

    def beyond(self, moved: "Apart") -> float:
        """The differences over what other last digits explain; they make no more up to 1."""
        usual = self.usual / max(BEYOND * moved.usual, 1e-9)
        return max(usual, self.most / max(moved.explained, 1e-9))

    @property
    def explained(self) -> float:
        """The largest difference that these explain as rounding, if other last digits made them."""
        return _BEYOND_MOST * self.most


def log_probs_of(logits: Tensor) -> Tensor:
    """Log-probabilities of logits, on their device: in float32, or float64 where the logits are.

    What is looked for is a hundred times as large as the last digits of float32, which takes a
    tenth of the time.
    """
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@contextmanager
def rounded_otherwise(
    model: nn.Module, *, singles: float = 0.0, share: float = 1.0
) -> Generator[None]:
    """Layers that return numbers of sixteen bits round them otherwise within, at random.

    So a pass shows how far rounding moves what comes out, whatever shapes it is computed in:
    Monte Carlo arithmetic (Parker, 1997). In this thread alone; what is compiled runs uncompiled
    meanwhile, for its code would keep it, or go past it.

    Args:
        model: Its hooks are taken off again.
        singles: By how much of themselves numbers of 32 bits are moved as well: what is rounded to
            few bits after that falls to the other side where it was near. 0: they are not.
        share: Of the numbers, chosen at random, that are moved at all.
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
        digits = torch.finfo(x.dtype).eps if x.dtype in _HALF else singles
        # Draws up to the share are chosen, and spread over it.
        moves = (draws / share - 0.5).masked_fill_(draws >= share, 0.0)
        return (x.float() * (1 + digits * moves)).to(x.dtype)

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (moved(output[0]), *output[1:]) if type(output) is tuple else moved(output)

    hooks: list[RemovableHandle] = []
    try:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            if next(module.parameters(recurse=False), None) is not None:
                hooks.append(module.register_forward_hook(in_this_thread_only(hook)))
        with _compat.uncompiled_passes(model):
            yield
    finally:
        for one in hooks:
            one.remove()
