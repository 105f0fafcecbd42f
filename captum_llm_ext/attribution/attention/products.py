"""Observes attention where it is computed: a softmax whose output multiplies vectors of positions.

Layers compute attention by functions of transformers, or by code of their own (Bloom, Falcon,
GPT-J, GPT-Neo, MPT). Both have these two calls in common, which are observed here. The weights are
the very numbers that the model multiplies by, whatever went into them (position encodings, windows,
soft caps, biases); softmax columns that multiply nothing are attention sinks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SOFTMAX = frozenset({"softmax", "_softmax"})
_PRODUCTS = frozenset({"matmul", "bmm", "__matmul__"})


@dataclass(frozen=True)
class Mixed:
    """What one attention computes for a text.

    Attributes:
        weights: Shape ``(heads, length, length)``, float32 at least: how much each position takes
            from each.
        sinks: Shape ``(heads, length)``: the share of attention sinks. Including it, weights sum to
            1 up to rounding.
        values: Value vectors, shape ``(heads, length, size)``.
        output: Weighted sums of the values, shape ``(length, heads * size)``.
    """

    weights: Tensor
    sinks: Tensor
    values: Tensor
    output: Tensor


class AttentionProducts(TorchFunctionMode):
    """Reports every attention computed on one text in this thread, while the context is active.

    Args:
        length: Length of the text, the only one of its batch.
        take: Called with each attention.
    """

    def __init__(self, length: int, take: Callable[[Mixed], None]) -> None:
        super().__init__()
        self._length, self._take = length, take
        self._softmax: Tensor | None = None  # the last softmax over positions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _SOFTMAX:
            # An attention sink is one more column.
            is_over_places = (
                found.dim() >= 2
                and found.shape[-2] == self._length
                and found.shape[-1] - self._length in (0, 1)
            )
            self._softmax = found if is_over_places else self._softmax
        elif name in _PRODUCTS and self._softmax is not None and len(args) == 2:
            mixed = self._mixed(args[0], args[1], found)
            if mixed is not None:
                self._softmax = None
                self._take(mixed)
        return found

    def _mixed(self, weights: Tensor, values: Tensor, output: Tensor) -> Mixed | None:
        """The attention, if the product used the weights of the softmax."""
        length, softmax = self._length, self._softmax
        if softmax is None or weights.shape[-2:] != (length, length) or values.dim() < 3:
            return None
        used = weights.reshape(-1, length, length)
        softmax = softmax.reshape(-1, length, softmax.shape[-1])
        kept = next((c for c in _columns(softmax, length) if _is_same(c, used)), None)
        if kept is None:
            return None
        values = values.expand(*output.shape[:-2], *values.shape[-2:])
        values = values.reshape(-1, length, values.shape[-1])
        wide = torch.promote_types(used.dtype, torch.float32)
        if softmax.shape[-1] == length:
            sinks = used.new_zeros(used.shape[:2], dtype=wide)
        else:
            sinks = (softmax.to(wide).sum(-1) - kept.to(wide).sum(-1)).clamp(min=0)
        by_place = output.reshape(-1, length, output.shape[-1]).transpose(0, 1)
        return Mixed(used.to(wide), sinks, values, by_place.reshape(length, -1))


def _columns(softmax: Tensor, length: int) -> list[Tensor]:
    """The columns that may be positions: a sink comes first or last."""
    if softmax.shape[-1] == length:
        return [softmax]
    return [softmax[..., :length], softmax[..., -length:]]


def _is_same(softmax: Tensor, used: Tensor) -> bool:
    """Whether the multiplied numbers are those of the softmax, perhaps in another dtype."""
    return softmax.shape == used.shape and torch.equal(softmax.to(used.dtype), used)
