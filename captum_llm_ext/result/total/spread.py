"""The spread of shares over the coalitions behind the attributions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_llm_ext.result.influence import Influence, of_spans
from captum_llm_ext.result.total.graph import Graph

# Draws of attributions for the spread of shares; an error from 50 draws is off by a tenth, and each
# takes a triangular solve, a thirtieth of a second for 500 tokens.
_N_DRAWS, _N_DRAWS_OF_LONG = 200, 50
_LONG = 2e7  # multiplications of such a solve from which the smaller number is used; chosen
_AT_ONCE = 4_000_000  # numbers per chunk: 32 MB, so that small results take one


@dataclass(frozen=True)
class Spread:
    """Draws attributions as other coalitions might have given, and the spread of their shares.

    Attributes:
        graph: How attributions become shares.
        attributions: The attributions, ``(T, columns)``.
        errors: Their standard errors; NaN if unknown.
        moved: Jackknife deviations, ``(n_groups, T, columns)``, or None.
        seed: Seeds the draws.
    """

    graph: Graph
    attributions: Tensor
    errors: Tensor
    moved: Tensor | None
    seed: int

    def tokens(self) -> Tensor:
        """Standard errors of the shares in each target token, ``(T, P + G)``."""
        return self.spans([range(t, t + 1) for t in range(len(self.attributions))])

    def spans(self, spans: Sequence[range], part_of: Sequence[int] | None = None) -> Tensor:
        """Standard errors of the shares in several target tokens together.

        Args:
            spans: Spans of target tokens.
            part_of: Per output feature the part in which shares are summed; None: each its own.

        Returns:
            Shape ``(n_spans, P + n_parts)``: 0 if attributions are exact, NaN if unknown.
        """
        return self.readings([(spans, part_of)])[0]

    def readings(
        self, requests: Sequence[tuple[Sequence[range], Sequence[int] | None]]
    ) -> list[Tensor]:
        """Like `spans`, for several lists of spans and parts at once, from the same draws."""
        view, n_tokens = self.graph.view, len(self.attributions)
        found: list[_Moments] = []
        for spans, part_of in requests:
            parts = range(view.n_output) if part_of is None else part_of
            found.append(_Moments(*view.within(spans, n_tokens), list(parts), view.n_prompt))
        if not bool((self.errors != 0).any()):
            return [torch.zeros_like(own.first) for own in found]
        if self.moved is None:
            strength = self.graph.influence(self.attributions)[0].strength
            zero = [torch.zeros_like(own.first) for own in found]
            return [
                is_zero.masked_fill((own.inside @ strength > 0)[:, None], torch.nan)
                for own, is_zero in zip(found, zero, strict=True)
            ]
        cost = view.n_output**2 * (view.n_prompt + view.n_output)
        n = _N_DRAWS if cost <= _LONG else _N_DRAWS_OF_LONG
        self._draw(self.moved, found, n)
        return [own.error(n) for own in found]

    def _draw(self, moved: Tensor, found: Sequence["_Moments"], n: int) -> None:
        """Accumulates moments of shares over `n` draws of the attributions."""
        moved, rest = _scaled_to_errors(moved, self.errors)
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

        most = max(self.attributions.numel(), *(own.inside.numel() for own in found))
        for steps in normal(n, len(moved)).split(max(1, _AT_ONCE // most)):
            others = self.attributions + torch.tensordot(steps, moved, 1)
            if rest is not None:
                others = others + torch.stack([normal(*rest.shape) for _ in steps]) * rest
            rows, nodes = self.graph.influence(others)
            for own in found:
                own.add(rows, nodes)


class _Moments:
    """The first two moments of shares in some spans, by parts.

    Args:
        inside, own: Which tokens and features are in each span, see `of_spans`.
        parts: Per output feature its part.
        n_prompt: Number of prompt parts.
    """

    def __init__(self, inside: Tensor, own: Tensor, parts: Sequence[int], n_prompt: int) -> None:
        self.inside, self._own, self._n_prompt = inside, own, n_prompt
        self._parts = torch.tensor(parts, dtype=torch.int64, device="cpu")
        width = n_prompt + max([*parts, -1]) + 1
        self.first = torch.zeros(len(inside), width, dtype=torch.float64, device="cpu")
        self._second = torch.zeros_like(self.first)

    def add(self, rows: Influence, nodes: Influence) -> None:
        """Adds the shares of a chunk of draws, of influence on tokens and on output features."""
        prompt, output = of_spans(self.inside, self._own, rows, nodes)
        shares = self.first.new_zeros(len(prompt), *self.first.shape)
        shares[..., : self._n_prompt] = prompt
        shares[..., self._n_prompt :].index_add_(-1, self._parts, output)
        self.first += shares.sum(0)
        self._second += shares.square().sum(0)

    def error(self, n: int) -> Tensor:
        """Standard deviations over `n` draws."""
        # Shares lie between 0 and 1: float64 keeps 8 digits of their variance.
        variance = (self._second / n - (self.first / n).square()).clamp_min(0) * n / (n - 1)
        return variance.sqrt().where(variance > 1e-15, 0)


def _scaled_to_errors(moved: Tensor, errors: Tensor) -> tuple[Tensor, Tensor | None]:
    """Deviations scaled to the standard errors, if these are known.

    Jackknife groups give the correlation of errors. The solver, which accounts for interactions,
    gives better magnitudes.

    Returns:
        Deviations, and errors of entries that no group changed; None if every entry with an error
        was changed.
    """
    size = moved.square().sum(0).sqrt()
    is_known = errors.isfinite() & (size > 0)
    scaled = moved * (errors / size.clamp_min(torch.finfo(size.dtype).tiny)).where(is_known, 1.0)
    rest = errors.where(errors.isfinite() & (size == 0), 0.0)
    return scaled, rest if bool(rest.any()) else None
