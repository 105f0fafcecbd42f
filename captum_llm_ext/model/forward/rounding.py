"""How far rounding alone changes values, and whether a way of computing them is correct."""

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
from captum_llm_ext.model.forward.inconclusive import is_inconclusive

# Largest difference between log-probabilities due to other shapes of the same products.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.25}
_HALF = (torch.float16, torch.bfloat16)
# An effect exceeds the change by perturbed last digits by this factor, both as root mean squares,
# or as maxima. On SmolLM2 and Gemma 3 in bfloat16, two ways of computing the same differed by less
# than 1.6 times that change, at most once by as much.
BEYOND = 3.0
_BEYOND_MOST = 2.0  # the same for maxima


def rounding(dtype: torch.dtype | None) -> float:
    """Largest difference between log-probabilities due to other shapes of the same products."""
    return _ROUNDING.get(dtype or torch.float32, _ROUNDING[torch.float32])


def reason_against(error_of: Callable[[], float]) -> str | None:
    """Why a way of computing values is incorrect; None if it is correct.

    Args:
        error_of: Computes that way; returns the largest difference relative to rounding.
    """
    try:
        error = error_of()
    except Exception as failure:  # models may raise anything on a cache: there is another way
        if is_inconclusive(failure):
            raise
        return f"{type(failure).__name__}: {failure}"
    return None if error <= 1 else f"values differ by {error:.2g} times rounding"


@dataclass(frozen=True)
class LogProbDifference:
    """Difference of the log-probabilities of all tokens between two computations.

    Attributes:
        usual: Root mean square, in nats.
        most: Maximum, in nats.
    """

    usual: float
    most: float

    @classmethod
    def between(cls, found: Tensor, plain: Tensor) -> "LogProbDifference":
        """Of logits ``(…, vocabulary)``; a token excluded in only one differs infinitely."""
        expected, actual = log_probs_of(plain), log_probs_of(found)
        # Excluded tokens have minus infinity in both.
        differences = (actual - expected).abs_().masked_fill_(expected.isneginf(), 0.0)
        differences = differences.nan_to_num_(nan=math.inf)
        usual = differences.square().mean(dtype=torch.float64).sqrt()
        return cls(float(usual), float(differences.max()))

    def over(self, dtype: torch.dtype) -> float:
        """The maximum, relative to the rounding of logits of this dtype."""
        return self.most / _ROUNDING.get(dtype, 1e-9)

    def beyond(self, moved: "LogProbDifference") -> float:
        """The differences relative to those by perturbed last digits; at most 1 is rounding."""
        usual = self.usual / max(BEYOND * moved.usual, 1e-9)
        return max(usual, self.most / max(moved.explained, 1e-9))

    @property
    def explained(self) -> float:
        """The largest difference that counts as rounding, if these are due to perturbed digits."""
        return _BEYOND_MOST * self.most


def log_probs_of(logits: Tensor) -> Tensor:
    """Log-probabilities of logits, on their device, in float32, or float64 for float64 logits.

    The effects in question are a hundred times the last digits of float32, which takes a tenth of
    the time.
    """
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@contextmanager
def rounded_otherwise(
    model: nn.Module, *, singles: float = 0.0, share: float = 1.0
) -> Generator[None]:
    """Makes layers with 16-bit outputs round them randomly within.

    A pass then shows how far rounding changes the output, independent of shapes: Monte Carlo
    arithmetic (Parker, 1997). Only in this thread; compiled code runs uncompiled meanwhile, since
    it would keep the hooks, or bypass them.

    Args:
        model: The model; hooks are removed again.
        singles: Relative perturbation of 32-bit numbers: values near a rounding boundary then cross
            it when rounded to few bits. 0: none.
        share: Share of the numbers, chosen at random, that are perturbed.
    """
    moving = (*_HALF, torch.float32) if singles else _HALF
    generators: dict[torch.device, torch.Generator] = {}

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in moving:
            return x
        generator = generators.get(x.device)
        if generator is None:
            generator = generators[x.device] = torch.Generator(x.device).manual_seed(0)
        digits = torch.finfo(x.dtype).eps if x.dtype in _HALF else singles
        draws = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        if share == 1:
            return (x.float() * (1 + digits * (draws - 0.5))).to(x.dtype)
        # Draws up to the share are chosen, and spread over it; few are, so others are not computed.
        found, draws = x.clone(memory_format=torch.contiguous_format), draws.view(-1)
        flat, chosen = found.view(-1), (draws < share).nonzero()[:, 0]
        moves = draws[chosen] / share - 0.5
        flat[chosen] = (flat[chosen].float() * (1 + digits * moves)).to(x.dtype)
        return found

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (moved(output[0]), *output[1:]) if type(output) is tuple else moved(output)

    hooks: list[RemovableHandle] = []
    try:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # does not support hooks
                continue
            if next(module.parameters(recurse=False), None) is not None:
                hooks.append(module.register_forward_hook(in_this_thread_only(hook)))
        with _compat.uncompiled_passes(model):
            yield
    finally:
        for one in hooks:
            one.remove()
