"""Attributions of one token under several baselines, and where they disagree."""

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from captum_llm_ext.evaluation.rank_correlation import spearman

Verdict = Literal["robust", "depends", "open", "none"]


class View:
    """Attributions of the possible causes of one token under every baseline.

    Args:
        attr: Attributions, float64 of shape ``(n_baselines, n_features)``.
        se: Standard errors of that shape, NaN if unknown: intervals then have no width.
        scale: Reference magnitude per baseline, ``(n_baselines,)``.
        z: Half the width of intervals, in standard errors.
        least: Attributions up to this share of `scale` count as zero.

    Attributes:
        low, high: Ends of the intervals around the magnitudes.
        clear: `attr` if significant, otherwise 0.
    """

    def __init__(self, attr: Tensor, se: Tensor, scale: Tensor, *, z: float, least: float) -> None:
        self.attr, self.se = attr, se
        self._size = attr.abs()
        self._scale = scale.where(scale > 0, 1.0)
        self._largest = max(float(scale.max()), torch.finfo(scale.dtype).tiny)
        self._floor = least * scale
        width = z * se.nan_to_num(nan=0.0)
        self.low, self.high = self._size - width, self._size + width
        self.clear = attr * ((self.low > 0) & (self._size > self._floor[:, None]))

    @cached_property
    def ranks(self) -> Tensor:
        """Ranks by magnitude, 1 = strongest; ties share the best rank."""
        ordered = self._size.sort(dim=1).values
        stronger = torch.searchsorted(ordered, self._size.contiguous(), right=True)
        return self.attr.shape[1] - stronger + 1

    @property
    def tops(self) -> list[int | None]:
        """The strongest feature under each baseline, or None."""
        found = [self.strongest(row, 1) for row in range(len(self.attr))]
        return [columns[0] if columns else None for columns in found]

    def strongest(self, row: int, k: int) -> list[int]:
        """The at most `k` strongest features under one baseline, strongest first."""
        size = self.clear[row].abs()
        order = size.argsort(descending=True, stable=True)[:k].tolist()
        return [column for column in order if size[column] > 0]

    def moves(self, a: int, b: int) -> Tensor:
        """Differences of attributions between two baselines, from 0 to 1.

        1 is the difference between the largest attribution and its negative, so that values are
        comparable across features and pairs of baselines.
        """
        return (self.attr[a] - self.attr[b]).abs() / (2 * self._largest)

    def sign_changes(self, a: int, b: int) -> list[int]:
        """Features significantly positive under one baseline and negative under the other."""
        return (self.clear[a] * self.clear[b] < 0).nonzero()[:, 0].tolist()

    def rank_changes(self, a: int, b: int) -> dict[int, tuple[int, ...]]:
        """Features significantly above another one under one baseline and below it under the other.

        Returns:
            Per column the features it changes rank with, by decreasing disagreement: the mean of
            the lead under one baseline and the lag under the other, each relative to its scale.
        """
        # A feature above another is itself significant: no others need to be compared.
        columns = ((self.clear[a] != 0) | (self.clear[b] != 0)).nonzero()[:, 0]
        over_a, over_b = self._above(a, columns), self._above(b, columns)
        lead = (self._leads(a, columns) + self._leads(b, columns).T) / 2
        one_way = torch.where(over_a & over_b.T, lead, 0.0)
        weight = torch.maximum(one_way, one_way.T)
        found: dict[int, tuple[int, ...]] = {}
        for column, row in zip(columns.tolist(), weight, strict=True):
            order = row.argsort(descending=True, stable=True)[: int((row > 0).sum())]
            if len(order):
                found[column] = tuple(columns[order].tolist())
        return found

    def presence_changes(self, a: int, b: int) -> list[int]:
        """Features that are significant under one baseline and zero under the other."""
        found: set[int] = set()
        for some, none in ((a, b), (b, a)):
            floor = torch.maximum(self._floor[some], self._floor[none])
            apart = self.low[some] - self.high[none] > floor
            gone = (self.clear[some] != 0) & (self.clear[none] == 0) & apart
            found.update(gone.nonzero()[:, 0].tolist())
        return sorted(found)

    def verdict(self) -> Verdict:
        """Whether the baselines agree on the strongest feature or differ, perhaps significantly."""
        tops = self.tops
        named = {top for top in tops if top is not None}
        if not named:
            return "none"
        rows = range(len(tops))
        if any(self._contradict(a, b) for a in rows for b in rows if a < b):
            return "depends"
        return "robust" if len(named) == 1 and None not in tops else "open"

    def rank_correlation(self, a: int, b: int) -> float:
        """Spearman's correlation of the magnitudes of `clear`; NaN if one side has only ties."""
        return float(spearman(self.clear[a].abs(), self.clear[b].abs()))

    def overlap(self, a: int, b: int, k: int) -> float:
        """Share of the `k` strongest features that two baselines have in common.

        If both have fewer, relative to the longer list. NaN if neither has any.
        """
        one, other = set(self.strongest(a, k)), set(self.strongest(b, k))
        longest = max(len(one), len(other))
        return len(one & other) / longest if longest else torch.nan

    def _contradict(self, a: int, b: int) -> bool:
        """Whether the strongest features under two baselines contradict each other."""
        i, j = self.tops[a], self.tops[b]
        if i is None or j is None:
            if i is None and j is None:
                return False
            row, other, top = (a, b, i) if i is not None else (b, a, j)
            floor = torch.maximum(self._floor[row], self._floor[other])
            return bool(self.low[row, top] - self.high[other, top] > floor)
        if i == j:
            return bool(self.clear[a, i] * self.clear[b, j] < 0)
        pair = torch.tensor([i, j], dtype=torch.int64, device="cpu")
        return bool(self._above(a, pair)[0, 1] and self._above(b, pair)[1, 0])

    def _above(self, row: int, columns: Tensor) -> Tensor:
        """``[i, j]``: whether the first is significantly stronger than the second."""
        margin = self.low[row, columns][:, None] - self.high[row, columns]
        return margin > self._floor[row]

    def _leads(self, row: int, columns: Tensor) -> Tensor:
        """``[i, j]``: by how much the first is stronger, relative to the scale."""
        size = self._size[row, columns] / self._scale[row]
        return size[:, None] - size
