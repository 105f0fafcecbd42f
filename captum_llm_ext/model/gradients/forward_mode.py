"""Forward-mode derivatives of all values along features, instead of backward passes."""

import importlib
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import in_this_thread_only
from captum_llm_ext.model.gradients.forward_pass import ForwardPass, Row
from captum_llm_ext.model.gradients.layers import Layers

# Cost of a derivative in backward passes: attention stores its weights (and the plain kernel is
# slower than the fused one), everything else is the same products. Chosen, not measured.
_COST = 1.5
# Additional passes: the head's gradients, and what all derivatives of a pass share; counted.
_BESIDE = 2


def n_extra_passes(n_features: int | None, n_values: int) -> float:
    """Number of passes beside the forward pass for `n_values`: backward passes, or fewer.

    Args:
        n_features: Number of features for forward-mode derivatives; None: not possible.
        n_values: Number of values.
    """
    if n_features is None:
        return n_values
    return min(n_values, _BESIDE + _COST * n_features)


class FeatureDerivatives:
    """Derivatives of each value along each feature at points, by forward mode.

    Forward mode gives the derivative of the head's input along a feature; a short backward pass
    through the head gives the derivative of values by that input. So no derivative is as wide as
    the vocabulary.

    Args:
        reader: The model's forward.
        layers: Where activations are replaced.
        row: The token row.
        members: Which target tokens' values are summed to each value.
        values: Runs the model on a number of rows; returns values of single tokens ``(n_rows, n)``.
        owners: The feature of each position, int64 ``(length,)``.
        n_owners: Number of features; positions of higher indices are left out.
        most_tokens: Suitable number of token ids per pass.
    """

    def __init__(
        self,
        reader: ForwardPass,
        layers: Layers,
        row: Row,
        members: Sequence[Sequence[int]],
        values: Callable[[int], Tensor],
        owners: Tensor,
        n_owners: int,
        most_tokens: int,
    ) -> None:
        self._reader, self._layers, self._row = reader, layers, row
        self._members, self._values = members, values
        self.owners, self.n_owners = owners, n_owners
        self._most_tokens = most_tokens

    def products(self, points: list[Tensor], factors: list[Tensor]) -> Tensor:
        """Derivatives along the factors, feature by feature.

        Args:
            points: Per layer activations ``(n_rows, length, size)``.
            factors: Directions, of the same shapes.

        Returns:
            ``(n_rows, n_values, n_owners)``, float64 on the CPU.
        """
        n_rows, length = points[0].shape[:2]
        gradients = self._gradients_at_head(points)
        wide = torch.promote_types(gradients.dtype, torch.float32)
        order = self._reader.order(self._row.at, length, gradients.shape[1])
        found = torch.zeros(
            n_rows, len(self._members), self.n_owners, dtype=torch.float64, device="cpu"
        )
        features = self.owners[self.owners < self.n_owners].unique()
        # All features of a point share one pass: the point is run once.
        n_together = max(1, min(len(features), self._most_tokens // length))
        most_rows = max(1, self._most_tokens // (n_together * length))
        for start in range(0, n_rows, most_rows):
            rows = slice(start, start + most_rows)
            some_points, some_factors = ([one[rows] for one in of] for of in (points, factors))
            for some in features.split(n_together):
                at = self.owners == some[:, None]
                moved = self._moved(some_points, some_factors, at).to(wide)
                each = (moved * gradients[rows].to(moved)).sum(-1)  # (n_features, n_rows, n_kept)
                summed = [each[..., [order[i] for i in own]].sum(-1) for own in self._members]
                found[rows, :, some] = torch.stack(summed, 1).permute(2, 1, 0).double().cpu()
        return found

    def _gradients_at_head(self, points: list[Tensor]) -> Tensor:
        """Gradients of the values by the head's input, ``(n_rows, n_kept, size)``."""
        given: list[Tensor] = []

        def note(_: nn.Module, arguments: Any) -> Any:
            given.append(arguments[0].detach().requires_grad_())
            torch.set_grad_enabled(True)  # until the block below ends
            return (given[0], *arguments[1:])

        with torch.no_grad(), self._layers.replaced(points), self._head(note):
            values = self._values(len(points[0]))
            (gradients,) = torch.autograd.grad(values.sum(), given[0])
        return gradients

    def _moved(self, points: list[Tensor], factors: list[Tensor], at: Tensor) -> Tensor:
        """Derivatives of the head's input, ``(n, n_rows, n_kept, size)``, at some positions."""
        directions = tuple(
            torch.where(at[:, None, :, None].to(factor.device), factor, 0.0).to(point.dtype)
            for point, factor in zip(points, factors, strict=True)
        )
        ids = self._row.ids.expand(len(points[0]), -1)

        def before_head(*replaced: Tensor) -> Tensor:
            given: list[Tensor] = []

            def note(_: nn.Module, arguments: Any) -> Any:
                given.append(arguments[0])
                first = arguments[0]  # logits are not needed: one constant position suffices
                blank = torch.zeros(
                    len(first), 1, first.shape[2], dtype=first.dtype, device=first.device
                )
                return (blank, *arguments[1:])

            with self._layers.replaced(replaced), self._head(note):
                self._reader.run(ids, self._row.at)
            return given[0]

        def along(*direction: Tensor) -> Tensor:
            return torch.func.jvp(before_head, tuple(points), direction)[1]

        _load()
        with torch.no_grad(), _PlainAttention():
            return torch.func.vmap(along)(*directions)

    @contextmanager
    def _head(self, note: Callable[[nn.Module, Any], Any]) -> Generator[None]:
        head: Any = _compat.embeddings(self._reader.model, "get_output_embeddings")
        hook = head.register_forward_pre_hook(in_this_thread_only(note))
        try:
            yield
        finally:
            hook.remove()


@cache
def _load() -> None:
    """Makes torch load its forward mode; torch 2.13 (2026) announces a rewrite of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


class _PlainAttention(TorchFunctionMode):
    """In this thread, attention by products and softmax: fused kernels lack forward mode."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is nn.functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_attention_math(*args, **named)[0]
        return func(*args, **named)
