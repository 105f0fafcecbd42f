"""One layer's attention: what each position takes from each, and how it enters the output."""

from typing import Literal

import torch
from torch import Tensor, nn

from captum_llm_ext.attribution.attention.products import Mixed

Contributions = Literal["weights", "values", "alti", "projection"]
Heads = Literal["mean", "max"] | int

_MAX_PART_NUMBERS = 2**24  # numbers in all parts held at once; chosen, not measured
# Relative error allowed between a sum and its parts: sums of some thousand products in the same
# dtype. The tolerance for half precision is chosen, not measured.
_DECOMPOSITION_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_DECOMPOSITION_TOLERANCE_HALF = 0.05  # of half precision: chosen, not measured
_MIN_FACTOR = 0.01  # smallest factor by which a layer may scale its attention; chosen, not measured


class LayerAttention:
    """One layer in one forward pass: its attention, and how its output depends on it."""

    def __init__(self, name: str, before: Tensor) -> None:
        self._name, self._before = name, before
        self._attention: nn.Module | None = None
        self._mixed: Mixed | None = None
        self._projection: nn.Module | None = None
        self._attended = before
        self._calls: list[tuple[Tensor, Tensor]] = []

    def attended(self, module: nn.Module, mixed: Mixed) -> None:
        """Called when attention mixed positions within the forward of this module."""
        if self._mixed is not None:
            raise NotImplementedError(f"{self._name} attends twice")
        self._attention, self._mixed = module, mixed

    @property
    def has_attended(self) -> bool:
        """Whether the layer has computed attention."""
        return self._mixed is not None

    def note(self, module: nn.Module, given: Tensor, output: Tensor) -> None:
        """Called for every module within the layer."""
        if self._mixed is None:
            return
        if self._is_projection(given):
            # The last one counts: a projection with an adapter ends after the modules within it.
            self._projection, self._attended, self._calls = module, flat(output), []
        elif module is self._attention and self._projection is None:
            self._attended, self._calls = flat(output), []
        elif flat(output).shape == self._before.shape:
            # Models may later modify either in place.
            self._calls.append((flat(given).clone(), flat(output).clone()))

    def _is_projection(self, given: Tensor) -> bool:
        """Whether a module's input is the output of attention."""
        mixed = self._read.output
        if given.numel() != mixed.numel():
            return False
        return torch.equal(flat(given), mixed.reshape(-1, given.shape[-1]))

    @property
    def _read(self) -> Mixed:
        if self._mixed is None:
            raise NotImplementedError(f"{self._name} does not attend")
        return self._mixed

    def weights_at(self, place: int) -> Tensor:
        """Attention weights of each head at one position, ``(heads, length)``."""
        row, sinks = self._read.weights[:, place], self._read.sinks[:, place]
        return row / (row.sum(-1) + sinks)[:, None]

    def map(self, after: Tensor, kind: Contributions, heads: Heads) -> Tensor:
        """How much each position takes from each, ``(length, length)``, float64 on the CPU.

        Rows sum to 1, those of weights to 1 minus the share of attention sinks.

        Args:
            after: The layer's output.
            kind: What the map is made of.
            heads: How heads are combined.

        Raises:
            NotImplementedError: If the layer is not attention followed by position-wise modules, or
                the parts do not sum to what attention adds.
        """
        scale, summed = self._added(after)
        if kind == "weights":
            # Sums in the wider dtype: rows are multiplied across all layers.
            found = _reduce_heads(self._read.weights, heads, self._name).cpu().double()
            sinks = _reduce_heads(self._read.sinks, heads, self._name).cpu().double()
            return found / (found.sum(-1) + sinks)[:, None]
        per_head, constant = self._per_head()
        length, size = self._before.shape
        n_heads = len(per_head)
        found = self._before.new_zeros(length, length, dtype=per_head.dtype)
        rows = max(1, _MAX_PART_NUMBERS // (length * max(size, n_heads)))
        for start in range(0, length, rows):
            here = slice(start, min(start + rows, length))
            # No position attends to later ones.
            weights = self._read.weights[:, here, : here.stop].to(per_head.dtype)
            seen = per_head[:, : here.stop]
            added = (weights @ seen).sum(0) + constant
            self._check(added * scale[here], summed[here])
            whole = self._before[here] + summed[here]
            if kind == "projection":
                # ⟨part, whole⟩ without materialising the parts.
                along = (whole * scale[here]) @ seen.transpose(-1, -2)
                sizes = (weights * along).sum(0)
                sizes.diagonal(here.start).add_((self._before[here] * whole).sum(-1))
            else:
                parts = torch.einsum("hij,hjd->ijd", weights, seen) * scale[here, None]
                if kind == "values":
                    found[here, : here.stop] = torch.linalg.vector_norm(parts, dim=-1)
                    continue
                parts.diagonal(here.start, 0, 1).add_(self._before[here].T)
                rest = torch.linalg.vector_norm(whole[:, None] - parts, ord=1, dim=-1)
                sizes = whole.abs().sum(-1, keepdim=True) - rest
            found[here, : here.stop] = sizes.clamp(min=0).tril(here.start)
        found = found.cpu().double()
        return found / found.sum(-1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)

    def _per_head(self) -> tuple[Tensor, Tensor]:
        """Values after the output projection, ``(heads, length, size)``, and its bias ``(size,)``.

        Raises:
            NotImplementedError: If the output of attention is not passed unchanged to a projection.
        """
        projection, values = self._projection, self._read.values
        if projection is None:
            raise NotImplementedError(
                f"what {self._name} attends to is passed on without an output projection of its own"
            )
        n_heads, length, size = values.shape
        wide = values.new_zeros(1, length, n_heads * size)
        constant = projection(wide[:, :1])[0, 0]
        found: list[Tensor] = []
        for head in range(n_heads):
            own = slice(head * size, (head + 1) * size)
            wide[..., own] = values[head]
            found.append(projection(wide)[0] - constant)
            wide[..., own] = 0
        dtype = torch.promote_types(values.dtype, torch.float32)
        return torch.stack(found).to(dtype), constant.to(dtype)

    def _added(self, after: Tensor) -> tuple[Tensor, Tensor]:
        """How attention is added to the layer's input: a factor, and what is added.

        A norm after attention gives a factor per position and dimension. In layers with parallel
        attention and MLP, the addition happens at the end.

        Raises:
            NotImplementedError: If attention is added in another way.
        """
        scale, added = torch.ones_like(self._attended), self._attended
        for given, output in self._calls:  # norms and dropout that the output of attention passes
            if given.shape == added.shape and torch.equal(given, added):
                ratio = output / given
                scale = scale * ratio.masked_fill(given == 0, 0.0)
                added = output
        if not bool(added.any()):
            return self._wide(scale), self._wide(added)
        candidates = [after, *(given for given, _ in self._calls)]
        candidates += [after - output for _, output in self._calls if output.shape == after.shape]
        for whole in candidates:
            if not whole.shape == added.shape == self._before.shape:
                continue
            change = whole - self._before
            factor = float((change * added).sum() / added.square().sum())
            if abs(factor) < _MIN_FACTOR:  # a module parallel to attention has its input
                continue
            rounding = torch.finfo(change.dtype).eps * float(self._before.norm())
            if _is_close(change, factor * added, beyond=8 * rounding):
                return self._wide(scale * factor), self._wide(factor * added)
        raise NotImplementedError(f"{self._name} does not add its attention to what it was given")

    def _check(self, whole: Tensor, expected: Tensor) -> None:
        if not _is_close(whole, expected, self._before.dtype):
            raise NotImplementedError(
                f"the parts of what {self._name} attends to do not sum to what it adds (those of "
                "quantised weights do not)"
            )

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _is_close(
    found: Tensor, expected: Tensor, dtype: torch.dtype | None = None, beyond: float = 0.0
) -> bool:
    tolerance = _DECOMPOSITION_TOLERANCE.get(dtype or expected.dtype, _DECOMPOSITION_TOLERANCE_HALF)
    return float((found - expected).norm()) <= tolerance * float(expected.norm()) + beyond


def _reduce_heads(weights: Tensor, heads: Heads, name: str) -> Tensor:
    """Weights ``(heads, length, length)`` combined into one map."""
    if heads == "mean":
        return weights.mean(0)
    if heads == "max":
        return weights.amax(0)
    if not -len(weights) <= heads < len(weights):
        raise ValueError(f"`heads` is {heads}: {name} has {len(weights)} heads.")
    return weights[heads]


def flat(hidden: Tensor) -> Tensor:
    """Hidden states of one text, ``(length, size)``."""
    return hidden.reshape(-1, hidden.shape[-1])
