"""Forward passes over a row with one change: other ids after a position, less text, other rows."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.probe.differences import largest
from captum_llm_ext.model.probe.other_ids import OtherIds
from captum_llm_ext.model.probe.short_passes import ShortPasses

# Number of ids before the target in rows of the target alone. Chosen, not measured.
_CLOSE = 16
# Number of rows with other ids per pass. Chosen, not measured.
_AT_ONCE = 8


class ChangedRows:
    """Log-probabilities of one row under changes, which a causal model does not see.

    Args:
        passes: Runs the model.
        row: The row.
        other: Ids to replace its own.
        n_rows: Number of rows of the run, as many as a batch may have.
    """

    def __init__(self, passes: ShortPasses, row: TokenRow, other: OtherIds, n_rows: int) -> None:
        self._passes, self._row, self._other, self._n_rows = passes, row, other, n_rows

    def among_others(self, at: Sequence[int], most: int, *, start: int = 0) -> Tensor:
        """Output at early positions of the row's beginning in a batch of at most `most`."""
        begin = self._row.ids[: at[-1] + 1]
        mates = [self._other.ids(begin, start + n) for n in range(min(self._n_rows, most) - 1)]
        return self._passes.log_probs_at([begin, *mates], [at] * (1 + len(mates)))[0]

    def continued_otherwise(
        self,
        cuts: Sequence[int],
        at: Sequence[int],
        alone: Tensor,
        *,
        n_places: int,
        at_once: int = _AT_ONCE,
        start: int = 0,
    ) -> list[tuple[Tensor, Tensor]]:
        """Output with other ids following, and that of the original row.

        Args:
            cuts: After each of these positions other ids follow, in a separate row.
            at: Sorted positions of the row, including the cuts.
            alone: Output of the row alone there.
            n_places: Maximum number of these positions, up to the cut, that are compared.
            at_once: Number of rows per pass.
            start: Position from which rows are read.
        """
        found: list[tuple[Tensor, Tensor]] = []
        for i in range(0, len(cuts), at_once):
            some = cuts[i : i + at_once]
            stops = [bisect_right(at, cut) for cut in some]
            firsts = [max(0, stop - n_places) for stop in stops]
            most = max(stop - first for first, stop in zip(firsts, stops, strict=True))
            if at_once == 1:  # as many positions of a row as of the row alone: equal shapes
                most = max(most, n_places)
            own = [
                [*at[first:stop], *[cut] * (most - (stop - first))]
                for cut, first, stop in zip(some, firsts, stops, strict=True)
            ]
            log_probs = self._passes.log_probs_at(
                [self._other.after(cut)[start:] for cut in some],
                [[place - start for place in places] for places in own],
            )
            found += [
                (one[: stop - first], alone[first:stop])
                for one, first, stop in zip(log_probs, firsts, stops, strict=True)
            ]
        return found

    def target_continued_otherwise(
        self, places: Sequence[int], *, at_once: int = _AT_ONCE
    ) -> list[tuple[Tensor, Tensor]]:
        """Like `continued_otherwise`, in short rows of the target, so at each of its positions.

        The effect of one token on another that comes next shows only after that one.
        """
        start = max(0, places[0] - _CLOSE)
        alone = self._passes.log_probs_at(
            [self._row.ids[start:]], [[place - start for place in places]]
        )[0]
        return self.continued_otherwise(
            places, places, alone, n_places=len(places), at_once=at_once, start=start
        )

    def truncated_after(
        self, place: int, at: Sequence[int], alone: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output of the row truncated after a position, and of all of it."""
        return self.truncated(place + 1, at, alone)

    def truncated(self, n_ids: int, at: Sequence[int], alone: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the first `n_ids` of the row, and of all of it, at these of its positions."""
        n = bisect_right(at, n_ids - 1)
        return self._passes.log_probs_at([self._row.ids[:n_ids]], [at[:n]])[0], alone[:n]


class AllChanges(NamedTuple):
    """Output of the longest and the shortest row with all changes at once.

    Attributes:
        at: Positions of the longest row: two of its beginning, then those of `cut_places`.
        alone: Its output there when alone.
        mate: Other ids, as many as the row has.
        padded: The shortest row, continued to the length of the longest one.
        ends: Positions of the shortest row.
        short: Its ids, and its output there when alone.
        in_one_batch: Rows and positions of the batch of both rows, and its output if it was run.
        after: Positions after which ids are replaced, and how many of them are compared.
        later: Output with other ids after these positions, and the original row's.
        endings: Output of the row truncated, and the original row's.
        wide: Output at the first two positions, beside many other rows.
        shows_all: Whether other ids after the target tokens need no rows of their own.
    """

    at: list[int]
    alone: Tensor
    mate: list[int]
    padded: list[int]
    ends: list[int]
    short: tuple[Sequence[int], Tensor]
    in_one_batch: tuple[tuple[list[list[int]], list[list[int]]], Tensor | None]
    after: tuple[Sequence[int], int]
    later: list[tuple[Tensor, Tensor]]
    endings: list[tuple[Tensor, Tensor]]
    wide: Tensor
    shows_all: bool

    @property
    def largest_difference(self) -> float:
        """The largest difference from the output of rows alone."""
        log_probs, (_, alone_short) = self.in_one_batch[1], self.short
        pairs = [(self.wide, self.alone[:2]), *self.later, *self.endings]
        if log_probs is not None:
            pairs += [(log_probs[0], alone_short), (log_probs[1, :3], self.alone[:3])]
        return max(largest(*pair) for pair in pairs)


class SeenAhead(NamedTuple):
    """What output depends on after its position.

    Attributes:
        sees: On the content of what follows, or on its length.
        mixes_lengths: Only on the length of the batch.
        largest_difference: In nats.
    """

    sees: bool
    mixes_lengths: bool
    largest_difference: float
