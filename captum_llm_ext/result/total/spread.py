"""How far shares vary with the coalitions that attributions came from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_llm_ext.result.influence import passed_back
from captum_llm_ext.result.total.graph import Graph

_N_DRAWS = 200  # of attributions, for the spread of shares


@dataclass(frozen=True)
class Spread:
    """Attributions as other coalitions might have given them, and what becomes of their shares.

    Attributes:
        graph: How attributions become shares.
        attributions: As they are, ``(T, columns)``.
        errors: Their standard errors; NaN where unknown.
        moved: How far leaving out each group of coalitions moves them, ``(n_groups, T, columns)``;
            None where that cannot be told.
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
            spans: Of target tokens.
            part_of: Per feature of the output the part whose shares are added up; None: each its
                own.

        Returns:
            Shape ``(n_spans, P + n_parts)``: 0 where attributions are exact, NaN where nothing
            tells.
        """
        n_output = self.graph.view.n_output
        parts = list(range(n_output)) if part_of is None else list(part_of)
        width = self.graph.view.n_prompt + max([*parts, -1]) + 1
        shape = len(spans), width
        if not bool((self.errors != 0).any()):
            return torch.zeros(shape, dtype=torch.float64, device="cpu")
        if self.moved is None:
            strength = self.graph.influence(self.attributions)[0].strength
            has_cause = [bool(strength[span.start : span.stop].any()) for span in spans]
            unknown = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
            at = torch.tensor(has_cause, dtype=torch.bool, device="cpu")
            return unknown.where(at[:, None], 0)
        inside = torch.zeros(len(spans), len(self.attributions), dtype=torch.float64, device="cpu")
        for row, span in zip(inside, spans, strict=True):
            row[span.start : span.stop] = 1
        return self._of_draws(inside, torch.tensor(parts, dtype=torch.int64, device="cpu"), width)

    def _of_draws(self, inside: Tensor, parts: Tensor, width: int) -> Tensor:
        """Standard deviations over draws; only their first two moments are kept."""
        assert self.moved is not None
        moved, rest = _as_told(self.moved, self.errors)
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

        n_prompt, tiny = self.graph.view.n_prompt, torch.finfo(torch.float64).tiny
        first = torch.zeros(len(inside), width, dtype=torch.float64, device="cpu")
        second = torch.zeros_like(first)
        for step in normal(_N_DRAWS, len(moved)):
            other = self.attributions + torch.tensordot(step, moved, 1)
            if rest is not None:
                other = other + normal(*rest.shape) * rest
            rows, nodes = self.graph.influence(other)
            prompt, output = passed_back(rows, nodes)
            weights = inside * rows.strength
            weights = weights / weights.sum(1, keepdim=True).clamp_min(tiny)
            shares = torch.zeros_like(first)
            shares[:, :n_prompt] = weights @ prompt
            shares[:, n_prompt:].index_add_(1, parts, weights @ output)
            first += shares / _N_DRAWS
            second += shares.square() / _N_DRAWS
        # Shares lie between 0 and 1: float64 keeps 8 digits of their spread.
        variance = (second - first.square()).clamp_min(0) * _N_DRAWS / (_N_DRAWS - 1)
        return variance.sqrt().where(variance > 1e-15, 0)


def _as_told(moved: Tensor, errors: Tensor) -> tuple[Tensor, Tensor | None]:
    """Deviations that are as large as the standard errors say, where these are known.

    Groups left out tell how errors go together. How large they are, the solver knows better, which
    takes interactions into account.

    Returns:
        Deviations, and errors of what never moved; None where all that has an error did.
    """
    size = moved.square().sum(0).sqrt()
    is_told = errors.isfinite() & (size > 0)
    scaled = moved * (errors / size.clamp_min(torch.finfo(size.dtype).tiny)).where(is_told, 1.0)
    rest = errors.where(errors.isfinite() & (size == 0), 0.0)
    return scaled, rest if bool(rest.any()) else None
