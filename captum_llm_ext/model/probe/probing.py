"""The forward passes of the probe."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.forward.draws import random_draws
from captum_llm_ext.model.forward.inconclusive import is_inconclusive
from captum_llm_ext.model.forward.rounding import BEYOND, LogProbDifference, rounded_otherwise
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.probe.changed_rows import AllChanges, ChangedRows, SeenAhead
from captum_llm_ext.model.probe.differences import (
    FINE,
    bf16_rounding,
    exceeds,
    is_equal,
    largest,
    last_digit,
    median_difference,
    root_mean_square,
    spread,
)
from captum_llm_ext.model.probe.findings import Findings, Packing
from captum_llm_ext.model.probe.jumps import jumps_at
from captum_llm_ext.model.probe.other_ids import OtherIds
from captum_llm_ext.model.probe.places import cut_places, n_cuts, n_cuts_of_rounding, spaced
from captum_llm_ext.model.probe.short_passes import ShortPasses

# Number of ids in the first pass, which shows what a model returns. Chosen, not measured.
_FIRST = 8
# Number of rows that end at a later position; only these if a pack has shown what follows next.
# Chosen, not measured.
_ENDED = 3
# Number of target tokens at which these rows, and a pack, are compared, since each takes a token in
# a pack. For 16 bits half of them: effects beyond rounding show there as well.
_LATER = 32
# Number of positions at which the shortest row is compared. Chosen, not measured.
_PLACES = 5
# Number of rows, and of ids in each, that show whether only larger batches are coupled. Chosen, not
# measured.
_WIDE = 16
_WIDE_IDS = 8
# Maximum effect of the number of rows on a float32 model.
_BATCHED = 1e-3


# Called with a row, positions in it, how logits can be requested, and the effect of perturbed
# digits, if known; returns the findings on packs, and the logits of the row alone at these
# positions.
ComparePacked = Callable[
    [Sequence[int], Sequence[int], str | None, LogProbDifference | None],
    tuple[Packing | None, Tensor | None],
]


class Probe:
    """One probe of a model.

    Args:
        model: The model.
        rows: Rows of the run.
        extras: Further arguments of its forward.
        compare_packed: As for `findings`.
        earlier: Earlier findings on the model.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[TokenRow],
        extras: dict[str, Any],
        compare_packed: ComparePacked | None,
        earlier: Findings | None,
    ) -> None:
        self._model, self._extras, self._n_rows = model, extras, len(rows)
        self._read_packed, self._earlier = compare_packed, earlier
        self._passes = ShortPasses(model, extras)
        self._row = max(rows, key=lambda row: len(row.ids))
        self._short = min(rows, key=lambda row: len(row.ids)).ids
        self._other = OtherIds(self._row, of_target=bool(extras))
        self._changed = ChangedRows(self._passes, self._row, self._other, len(rows))
        self._n_before, self._last_only = 0, False

    def findings(self) -> Findings:
        """The findings."""
        ids = self._row.ids
        shorter = ids if self._extras else ids[:_FIRST]
        drawn, logits = random_draws(self._model, lambda: self._passes.all(shorter))
        if drawn == "seeded":
            self._passes.seed, logits = 0, self._passes.all(shorter)
        found = self._first(shorter, logits)
        found = replace(found, shortest=len(self._short), longest=len(ids))
        found = self._rounding_within(replace(found, draws=drawn), shorter, logits)
        if found.last_only:
            return self._last(found)
        if self._extras:
            return self._alone(found)
        at, alone, packing = self._reference(logits, found)
        found = replace(found, kept=self._passes.kept, packing=packing)
        earlier = self._earlier
        is_read = packing is not None and not packing.differs
        if is_read and earlier is not None and earlier.covers(found.shortest, found.longest):
            return replace(found, is_rough=earlier.is_rough)  # only packs were to be probed
        if packing is not None and packing.reason is None and self._tells_rounding(found):
            # Rows in packs meet no other row, and packs have shown what follows. But what tokens
            # before the position had seen of it, they had seen in the cache as well.
            ending = self._changed.truncated_after(at[2], at, alone)
            rounding = largest(*ending)
            if rounding <= FINE or median_difference(*ending) <= self._usual_rounding(found):
                found = replace(found, shortest=sys.maxsize, longest=0, packed=len(ids))
                return replace(found, ahead=0.0, rounding=rounding, is_rough=self._is_rough(found))
        return self._in_batches(found, at, alone)

    # Rounding -------------------------------------------------------------------------------------

    def _rounding_within(self, found: Findings, ids: Sequence[int], logits: Tensor) -> Findings:
        """The effect of perturbed last digits on the logits of a few ids."""
        if self._earlier is not None:
            return replace(found, moved=self._earlier.moved, jumps=self._earlier.jumps)
        if found.draws not in (None, "seeded"):
            return found
        if not self._is_half(found):
            return replace(
                found, jumps=jumps_at(self._model, lambda: self._passes.all(ids), logits)
            )
        with rounded_otherwise(self._model):
            moved = LogProbDifference.between(self._passes.all(ids), logits)
        return replace(found, moved=moved if moved.usual else None)

    def _tells_rounding(self, found: Findings) -> bool:
        """Whether the effect of rounding is known without batches."""
        return found.draws is None and (found.moved is not None or not self._is_rough(found))

    def _usual_rounding(self, found: Findings) -> float:
        """The largest effect of rounding at several positions, estimated from a few ids."""
        return 0.0 if found.moved is None else max(FINE, BEYOND * found.moved.usual)

    def _beyond_rounding(
        self,
        found: Findings,
        pairs: Sequence[tuple[Tensor, Tensor]],
        limit: float,
        plain: tuple[Sequence[int], Sequence[int], Tensor],
    ) -> bool:
        """Whether 16-bit logits differ at most positions by more than between lengths.

        Other lengths are other shapes with other rounding. And rounding may change a close choice
        of an expert, at some position.

        Args:
            found: Findings so far.
            pairs: Outputs at several positions, and those to compare.
            limit: Largest difference that is not an effect in any case.
            plain: Ids, positions, and the output there; repeated with perturbed digits if needed.
        """
        most = max(median_difference(*pair) for pair in pairs)
        if most <= max(limit, self._usual_rounding(found)):
            return False
        ids, at, log_probs = plain
        with rounded_otherwise(self._model):
            digits = self._passes.log_probs_at([ids], [at])[0]
        return most > max(limit, BEYOND * median_difference(digits, log_probs))

    def _is_rough(self, found: Findings) -> bool:
        """Whether rounding is worth measuring."""
        is_coarse = self._is_half(found) or _compat.computes_roughly(self._model)
        return found.draws is not None or is_coarse or found.jumps > 0

    def _is_half(self, found: Findings) -> bool:
        """Whether rounding may look like an effect."""
        return found.dtype not in ("float32", "float64") or _compat.half_precision(self._model)

    # Returned logits ------------------------------------------------------------------------------

    def _first(self, ids: Sequence[int], logits: Tensor) -> Findings:
        """Findings from all logits of a few ids."""
        n, vocabulary = logits.shape[1:]
        name = type(self._model).__name__
        size = _compat.vocabulary_size(self._model) or 0
        if vocabulary < size or vocabulary <= max(self._row.ids):
            raise TypeError(
                f"{name} returns {vocabulary} numbers for each id, of a vocabulary of "
                f"{max(size, max(self._row.ids) + 1)} at least: these are no logits. Give a causal "
                "language model, with its language head."
            )
        if len(logits) != 1 or n == 0:
            raise TypeError(f"{name} returns logits of shape {tuple(logits.shape)} for one row.")
        if n > len(ids):
            self._n_before = self._in_front(ids, logits)
        elif n < len(ids):
            if n > 1:
                raise ValueError(
                    f"{name} returns {n} logits for {len(ids)} ids: which belong to which is "
                    "unknown. Return logits for every id."
                )
            self._last_only = True
        if self._n_before or self._last_only:
            self._passes.kept = None
        reason = _compat.why_not_batched(self._model)
        return Findings(
            0,
            0,
            dtype=str(logits.dtype).removeprefix("torch."),
            vocabulary=vocabulary,
            kept=self._passes.kept,
            last_digit=last_digit(logits, self._model),
            n_before=self._n_before,
            last_only=self._last_only,
            couples_rows=reason is not None,
            reasons=() if reason is None else (reason,),
        )

    def _reference(
        self, logits: Tensor, found: Findings
    ) -> tuple[list[int], Tensor, Packing | None]:
        """Positions of the row, its output alone, and what a pack shows.

        Args:
            logits: All logits of the beginning, read alone.
            found: Findings so far.

        Returns:
            Positions, two of the beginning first; ``(n, vocabulary)``; and findings on packs, if
            any.
        """
        n_later = _LATER // 2 if self._is_half(found) else _LATER
        ids, places = self._row.ids, cut_places(self._row, max(n_later, n_cuts(self._n_rows)))
        at = [0, min(places[0] // 2, _WIDE_IDS - 1), *places]
        kept = self._passes.kept
        if kept != "positions":
            self._find_kept(ids[:_FIRST], logits)
        packing, log_probs = self._packing(found, at)
        if log_probs is None and kept == "positions":
            try:
                log_probs = self._passes.log_probs_at([ids], [at])[0]
            except Exception as error:  # an argument of this name may mean anything
                if is_inconclusive(error):
                    raise
        if kept == "positions" and not (
            log_probs is not None and self._is_equal(found, log_probs, logits, at)
        ):
            self._find_kept(ids[:_FIRST], logits)
            if self._passes.kept != kept:  # the result was not what was requested
                packing, log_probs = self._packing(found, at)
        return (
            at,
            self._passes.log_probs_at([ids], [at])[0] if log_probs is None else log_probs,
            packing,
        )

    def _is_equal(
        self, found: Findings, log_probs: Tensor, logits: Tensor, at: Sequence[int]
    ) -> bool:
        """Whether the first outputs are those of the beginning alone."""
        if is_equal(log_probs[:2], logits[0, at[:2]]):
            return True
        return median_difference(log_probs[:2], spread(logits[0, at[:2]])) <= self._usual_rounding(
            found
        )

    def _find_kept(self, ids: Sequence[int], logits: Tensor) -> None:
        """Whether the model returns the requested logits, if it has that argument."""
        if self._passes.kept is None:
            return
        ends = [0, len(ids) - 1]
        try:
            # The last positions first: a count is requested by its smallest position.
            log_probs = [self._passes.log_probs_at([ids], [own])[0] for own in (ends, ends[1:])]
        except Exception as error:  # an argument of this name may mean anything
            if is_inconclusive(error):
                raise
            self._passes.kept = None
            return
        if not (
            is_equal(log_probs[0], logits[0, ends]) and is_equal(log_probs[1], logits[0, ends[1:]])
        ):
            self._passes.kept = None

    def _in_front(self, ids: Sequence[int], logits: Tensor) -> int:
        """Number of logits before those of the first id: all surplus ones."""
        n = logits.shape[1] - len(ids)
        # One id less: if the surplus is in front, all but the last position are equal; otherwise
        # the logits behind have moved.
        fewer = self._passes.all(ids[:-1]) if len(ids) > 1 else logits[:, :-1]
        if fewer.shape[1] != logits.shape[1] - 1 or (
            largest(spread(fewer[:, n:]), spread(logits[:, n:-1])) > FINE
            and root_mean_square(spread(fewer[:, n:]), spread(logits[:, n:-1]))
            > bf16_rounding(logits)
        ):
            raise ValueError(
                f"{type(self._model).__name__} returns {logits.shape[1]} logits for {len(ids)} "
                f"ids: it is unknown which belong to the ids. Return logits of the ids alone, "
                f"`logits[:, -{len(ids)}:]` of a soft prompt's model."
            )
        return n

    # Effects on the output ------------------------------------------------------------------------

    def _alone(self, found: Findings) -> Findings:
        """Findings on one row, unchanged and with other ids after some positions."""
        places = cut_places(self._row, n_cuts(self._n_rows))
        row = self._passes.log_probs_at([self._row.ids], [places])[0]
        pairs = self._changed.continued_otherwise(places, places, row, n_places=1, at_once=1)
        limit = max(FINE, bf16_rounding(row)) if self._is_half(found) else FINE
        return replace(
            found,
            sees_ahead=any(exceeds(*pair, limit) for pair in pairs),
            ahead=max(largest(*pair) for pair in pairs),
            is_rough=self._is_rough(found),
        )

    def _last(self, found: Findings) -> Findings:
        """Findings on a row alone and beside another, if only the last position has output."""
        ids, at = self._row.ids, [len(self._row.ids) - 1]
        alone, copies = (
            self._passes.log_probs_at([ids], [at])[0],
            self._passes.log_probs_at([ids] * 2, [at] * 2)[0],
        )
        beside = self._passes.log_probs_at([self._other.ids(ids), ids], [at] * 2)[1]
        is_rough = self._is_rough(found)
        rounding, limit, is_half = largest(copies, alone), FINE, self._is_half(found)
        if is_half:
            limit = max(FINE, BEYOND * root_mean_square(copies, alone), bf16_rounding(alone))
        couples = exceeds(beside, copies, limit) or self._counts_rows(
            found, [(copies, alone)], (ids, at, alone)
        )
        return replace(
            found,
            couples_rows=couples or found.couples_rows,
            coupling=largest(beside, copies),
            rounding=rounding,
            is_rough=is_rough or couples or rounding > FINE,
        )

    def _in_batches(self, found: Findings, at: list[int], alone: Tensor) -> Findings:
        """Findings on the longest and the shortest row, alone and in batches.

        Args:
            found: Findings so far.
            at: Positions of the longest row: two of its beginning, then those of `cut_places`.
            alone: Its output there when alone.
        """
        is_rough, is_half = self._is_rough(found), self._is_half(found)
        if is_half and (rounding := self._rounding_alone(found, at, alone)) is not None:
            return replace(found, ahead=0.0, coupling=0.0, rounding=rounding, is_rough=True)
        seen = self._all_changes_at_once(found, at, alone)
        if (rounding := seen.largest_difference) <= FINE:
            return replace(found, ahead=0.0, coupling=0.0, rounding=rounding, is_rough=is_rough)
        # The same passes once more: differences are random draws.
        shorter = self._changed.among_others(at[:2], 1)
        equal = self._equal_passes(seen, shorter)
        if (most := max(largest(*pair) for pair in equal)) > FINE and found.draws is None:
            differ = f"equal passes differ by {most:.2g} nats"
            found = replace(found, draws="unseen", reasons=(*found.reasons, differ))
        draws = found.draws is not None
        # One change after another, in passes of one shape.
        copies = self._passes.log_probs_at([self._row.ids] * 2, [at[:3]] * 2)[0]
        limit = FINE
        if is_half or draws:
            moved = max(root_mean_square(*pair) for pair in [(copies, alone[:3]), *equal])
            limit = max(FINE, BEYOND * moved, bf16_rounding(alone) if is_half else 0.0)
        mates = [seen.mate] if is_half else [seen.mate, seen.padded]
        beside = [self._passes.log_probs_at([one, self._row.ids], [at[:3]] * 2)[1] for one in mates]
        couples = any(exceeds(copies, one, limit) for one in beside)
        couples |= self._couples_many(found, seen, copies, shorter, limit)
        ahead = self._ahead(found, seen, limit, are_coupled=couples)
        if ahead.sees or couples or ahead.mixes_lengths:
            rounding = largest(copies, alone[:3])
        return replace(
            found,
            sees_ahead=ahead.sees,
            couples_rows=couples or found.couples_rows,
            mixes_lengths=ahead.mixes_lengths,
            ahead=ahead.largest_difference,
            coupling=max(
                *(largest(copies, one) for one in beside),
                largest(alone[:3], beside[0]),
                largest(seen.wide, shorter),
            ),
            rounding=rounding,
            is_rough=is_rough or couples or draws or rounding > FINE,
        )

    def _all_changes_at_once(self, found: Findings, at: list[int], alone: Tensor) -> AllChanges:
        """Output with other rows beside, other ids after, and padding; for `_in_batches`."""
        is_half = self._is_half(found)
        ids, length, cut_at = self._row.ids, len(self._row.ids), at[2]
        mate = self._other.ids(ids)
        short = self._short if len(self._short) < length else mate
        ends = [i * (len(short) - 1) // (_PLACES - 1) for i in range(_PLACES)]
        padded = [*short, *self._other.ids(ids[len(short) :])]
        alone_short = self._passes.log_probs_at([short], [ends])[0]
        # With 16 bits, everything at once always shows some difference.
        both = [padded, self._other.after(cut_at)], [ends, [*at[:3], *at[2:3] * 2]]
        log_probs = None if is_half else self._passes.log_probs_at(*both)
        after, ended = self._later(found, at[2:], is_half=is_half)
        # At few positions, rounding is distinguished from an effect more reliably than at many.
        n_places = 1 if is_half else len(at)
        later = self._changed.continued_otherwise(after, at, alone, n_places=n_places)
        shows_all = is_half or (found.packing is not None and found.packing.reason is None)
        if not shows_all:
            later += self._changed.target_continued_otherwise(at[2:])
        endings = [self._changed.truncated_after(place, at, alone) for place in ended]
        wide = self._changed.among_others(at[:2], _WIDE)
        return AllChanges(
            at=at,
            alone=alone,
            mate=mate,
            padded=padded,
            ends=ends,
            short=(short, alone_short),
            in_one_batch=(both, log_probs),
            after=(after, n_places),
            later=later,
            endings=endings,
            wide=wide,
            shows_all=shows_all,
        )

    def _equal_passes(self, seen: AllChanges, shorter: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Outputs of passes over the same rows, twice each."""
        at, (both, log_probs) = seen.at, seen.in_one_batch
        if log_probs is None:
            return [(self._changed.among_others(at[:2], 1), shorter)]
        return [
            (self._passes.log_probs_at([self._row.ids], [at])[0], seen.alone),
            (self._passes.log_probs_at(*both), log_probs),
            (self._changed.among_others(at[:2], _WIDE), seen.wide),
        ]

    def _couples_many(
        self, found: Findings, seen: AllChanges, copies: Tensor, shorter: Tensor, limit: float
    ) -> bool:
        """Whether the row differs beside itself, or beside many others."""
        is_half, draws = self._is_half(found), found.draws is not None
        at, alone = seen.at, seen.alone
        differs = False
        if is_half or draws:
            differs = exceeds(seen.wide, self._changed.among_others(at[:2], _WIDE, start=1), limit)
        if is_half or not draws:
            pairs = [(copies, alone[:3]), (seen.wide, shorter)]
            differs |= self._counts_rows(found, pairs, (self._row.ids, at, alone))
        return differs

    def _ahead(
        self, found: Findings, seen: AllChanges, limit: float, *, are_coupled: bool
    ) -> SeenAhead:
        """Whether output depends on what follows: on its content, or only on its length.

        Args:
            found: Findings so far.
            seen: Output with all changes at once.
            limit: The largest difference that is rounding.
            are_coupled: Whether rows of a batch influence one another: each then has its own pass.
        """
        ids, at, alone = self._row.ids, seen.at, seen.alone
        cut_at, (short, alone_short) = at[2], seen.short
        cut = self._passes.log_probs_at([self._other.after(cut_at)], [at[:3]])[0]
        longer = self._passes.log_probs_at([seen.padded], [seen.ends])[0]
        later, is_half = seen.later, self._is_half(found)
        if are_coupled:
            after, n_places = seen.after
            later = self._changed.continued_otherwise(
                after, at, alone, n_places=n_places, at_once=1
            )
            if not seen.shows_all:
                later += self._changed.target_continued_otherwise(at[2:], at_once=1)
        followed = [(cut, alone[:3]), *later]
        if not is_half:
            again = [*short, *self._other.ids(seen.padded[len(short) :])]
            followed.append((longer, self._passes.log_probs_at([again], [seen.ends])[0]))
        sees = any(exceeds(*pair, limit) for pair in followed)
        # The length of what follows may matter as well as its content.
        endings = [
            *seen.endings,
            *(
                (self._passes.log_probs_at([ids[: cut_at + n]], [at[:3]])[0], alone[:3])
                for n in (1, 2)
            ),
        ]
        if is_half:
            part = short, seen.ends, alone_short
            mixes = self._beyond_rounding(found, [(longer, alone_short)], limit, part)
            sees |= self._beyond_rounding(found, endings, limit, (ids, at, alone))
        else:
            mixes = exceeds(longer, alone_short, limit)
            sees |= any(exceeds(*pair, limit) for pair in endings)
        most = max(largest(*pair) for pair in [*followed, *endings])
        return SeenAhead(sees, mixes and not sees, most)

    def _counts_rows(
        self,
        found: Findings,
        pairs: Sequence[tuple[Tensor, Tensor]],
        plain: tuple[Sequence[int], Sequence[int], Tensor],
    ) -> bool:
        """Whether the output of a row beside others differs from that alone.

        Args:
            found, pairs, plain: As for `_beyond_rounding`.
        """
        if self._is_half(found):
            return self._beyond_rounding(found, pairs, max(FINE, bf16_rounding(plain[2])), plain)
        return max(largest(*pair) for pair in pairs) > _BATCHED

    def _rounding_alone(self, found: Findings, at: Sequence[int], alone: Tensor) -> float | None:
        """The effect of 16-bit rounding on the output, if it is the only one; otherwise None.

        Passes of one shape round equally, so differences there are effects, or may be.
        """
        if found.draws is not None:
            return None
        places = spaced(at[2:], n_cuts_of_rounding(self._n_rows))
        alike = self._changed.continued_otherwise(places, at, alone, n_places=len(at), at_once=1)
        # In a batch, with odd length if the row's is even.
        ids, n = self._row.ids, at[2] + 1
        shorter = ids[: n + (n + len(ids) + 1) % 2]
        mates = [self._other.ids(shorter, start) for start in (0, 1)]
        one, other = (self._passes.log_probs_at([shorter, mate], [at[:3]] * 2)[0] for mate in mates)
        alike.append((one, other))
        shapes = [(one, alone[:3]), (self._changed.among_others(at[:2], _WIDE), alone[:2])]
        if len(self._short) < n:
            shapes.append(self._changed.truncated(len(self._short), at, alone))
        limit = max(FINE, bf16_rounding(alone), self._usual_rounding(found))
        if (
            max(largest(*pair) for pair in alike) > FINE
            or max(median_difference(*p) for p in shapes) > limit
        ):
            return None
        return max(largest(*pair) for pair in shapes)

    def _packing(self, found: Findings, at: Sequence[int]) -> tuple[Packing | None, Tensor | None]:
        """Findings on packs, if they may be used; and the output of the row alone."""
        if self._read_packed is None or found.apart or found.n_before:
            return None, None
        if self._earlier is not None and self._earlier.packs_known(len(self._row.ids)):
            return self._earlier.packing, None
        places = sorted({*at})
        packing, log_probs = self._read_packed(
            self._row.ids, places, self._passes.kept, found.moved
        )
        if log_probs is None:
            return packing, None
        where = torch.tensor([places.index(p) for p in at], dtype=torch.int64, device="cpu")
        return packing, spread(log_probs[0, where.to(log_probs.device)])

    def _later(
        self, found: Findings, places: Sequence[int], *, is_half: bool
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Later positions after which ids are replaced, and at which the row ends.

        The output at the end of a row is independent of what follows, in content and length: it
        shows most, except for rounding, which differs for each length.
        """
        some, packing = spaced(places, n_cuts(self._n_rows)), found.packing
        if is_half:
            return some[-max(2, len(some) // 2) :], ()
        if packing is not None and packing.differs:
            return places, places
        # Adjacent lengths, and a distant one.
        ended = sorted({places[0], *spaced(places, _ENDED - 1), *places[-2:-1]})
        if packing is not None and packing.reason is None:
            return (), ended
        return [place for place in some if place not in ended], ended
