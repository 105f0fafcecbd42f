"""Posting lists: for each key, all positions of a long sequence that hold it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 21  # places sorted at a time; chosen, not measured


@dataclass(frozen=True, eq=False)
class Postings:
    """All positions of a sequence, grouped by key.

    Attributes:
        places: The positions, by key and then in order, shape ``(n_places,)``, int32.
        ends: Ends of the positions of each key, shape ``(n_keys + 1,)``, int64; the first is 0.
    """

    places: Tensor
    ends: Tensor

    @staticmethod
    def of(keys: Callable[[int, int], Tensor], n_places: int, n_keys: int) -> "Postings":
        """Sorts a sequence by key, block by block: it need not exist as a whole.

        Args:
            keys: Returns the keys from one position to before another.
            n_places: Length of the sequence.
            n_keys: Number of keys, which count from 0.
        """
        blocks = [(at, min(at + _BLOCK, n_places)) for at in range(0, n_places, _BLOCK)]
        ends = torch.zeros(n_keys + 1, dtype=torch.int64, device="cpu")
        for start, stop in blocks:
            ends[1:] += torch.bincount(keys(start, stop), minlength=n_keys)
        ends = ends.cumsum(0)
        places = torch.empty(n_places, dtype=torch.int32, device="cpu")
        free = ends[:-1].clone()
        for start, stop in blocks:
            ordered, order = keys(start, stop).sort(stable=True)
            counts = torch.bincount(ordered, minlength=n_keys)
            rank = torch.arange(stop - start, device="cpu") - (counts.cumsum(0) - counts)[ordered]
            places[free[ordered] + rank] = (order + start).int()
            free += counts
        return Postings(places, ends)

    @property
    def counts(self) -> Tensor:
        """Number of positions of each key, shape ``(n_keys,)``."""
        return self.ends.diff()

    def count(self, key: int) -> int:
        """Number of positions of a key; 0 if it is negative."""
        return int(self.ends[key + 1] - self.ends[key]) if key >= 0 else 0

    def holding(self, keys: Sequence[int], most: int, generator: torch.Generator) -> Tensor:
        """The positions of any of the keys, int64.

        If there are more than `most`, about `most` of them, drawn evenly from all parts of the
        sequence.
        """
        chosen = torch.tensor([key for key in keys if key >= 0], dtype=torch.int64, device="cpu")
        starts, counts = self.ends[chosen], self.ends[chosen + 1] - self.ends[chosen]
        total = int(counts.sum())
        if total <= most:
            parts = [self.places[a : a + n] for a, n in zip(starts, counts, strict=True)]
            return torch.cat(parts).long() if parts else chosen
        # One from each stretch of equal length. Equidistant ones might be in step with a corpus of
        # equal documents.
        at = torch.arange(most, device="cpu") + torch.rand(
            most, generator=generator, dtype=torch.float64, device="cpu"
        )
        at = (at * (total / most)).long().clamp(max=total - 1).unique_consecutive()
        ends = counts.cumsum(0)
        of = torch.bucketize(at, ends, right=True)
        return self.places[starts[of] + at - (ends - counts)[of]].long()
