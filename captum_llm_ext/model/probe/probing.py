"""The passes of the probe."""

import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.forward.draws import drawing
from captum_llm_ext.model.forward.rounding import BEYOND, Apart, rounded_otherwise
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.forward.swallowed import is_no_answer
from captum_llm_ext.model.probe.differences import (
    FINE,
    exceeds,
    is_as,
    largest,
    last_digit,
    root_mean_square,
    rough,
    spread,
    usual,
)
from captum_llm_ext.model.probe.findings import Findings, Packing
from captum_llm_ext.model.probe.jumps import jumps_at
from captum_llm_ext.model.probe.other_ids import OtherIds
from captum_llm_ext.model.probe.short_passes import ShortPasses

# Of so many ids the first pass is, which shows what a model returns.
_FIRST = 8
# So many more rows, of as many target tokens, show whether one sees what comes after it, as far as
# that is a quarter of the run; where it is large, one for every so many rows of it.
_CUTS = 8
_ROWS_PER_CUT = 32
# Of these so many end there. Where a pack has shown what follows next, it is these alone.
_ENDED = 3
# At so many target tokens it is seen what those rows say, and a pack: there each takes a token. Of
# 16 bits, at half of them: what rounding does not hide is seen there as well.
_LATER = 32
# Rows of the target alone have so many ids before it.
_CLOSE = 16
# The shortest row is looked at in so many places.
_PLACES = 5
# So many rows of them are in one pass.
_AT_ONCE = 8
# So many rows, of so many ids each, show whether it is only larger batches whose rows are coupled.
_WIDE = 16
_WIDE_IDS = 8
# And what the number of rows may do to a model in float32 at most.
_BATCHED = 1e-3


# Called with a row, places in it, how many logits the model can be asked for, and how far other
# digits move them, if known; what packs show, and the logits of the row alone at these places.
ReadPacked = Callable[
    [Sequence[int], Sequence[int], str | None, Apart | None],
    tuple[Packing | None, Tensor | None],
]


class Probe:
    """One look at a model.

    Args:
        model: The model.
        rows: Of the run.
        extras: Other arguments of its forward.
        read_packed: As for `findings`.
        earlier: What was seen of the model before.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[TokenRow],
        extras: dict[str, Any],
        read_packed: ReadPacked | None,
        earlier: Findings | None,
    ) -> None:
        self._model, self._extras, self._n_rows = model, extras, len(rows)
        self._read_packed, self._earlier = read_packed, earlier
        self._passes = ShortPasses(model, extras)
        self._row = max(rows, key=lambda row: len(row.ids))
        self._short = min(rows, key=lambda row: len(row.ids)).ids
        self._other = OtherIds(self._row, of_target=bool(extras))
        self._n_before, self._last_only = 0, False

    def findings(self) -> Findings:
        """What is seen."""
        ids = self._row.ids
        begun = ids if self._extras else ids[:_FIRST]
        drawn, logits = drawing(self._model, lambda: self._passes.all(begun))
        if drawn == "seeded":
            self._passes.seed, logits = 0, self._passes.all(begun)
        found = self._first(begun, logits)
        found = replace(found, shortest=len(self._short), longest=len(ids))
        found = self._rounding_within(replace(found, draws=drawn), begun, logits)
        if found.last_only:
            return self._last(found)
        if self._extras:
            return self._alone(found)
        at, alone, packing = self._reference(logits, found)
        found = replace(found, kept=self._passes.kept, packing=packing)
        earlier = self._earlier
        is_read = packing is not None and not packing.differs
        if is_read and earlier is not None and earlier.covers(found.shortest, found.longest):
            return replace(found, is_rough=earlier.is_rough)  # packs alone were news
        if packing is not None and packing.reason is None and self._tells_rounding(found):
            # What is read in packs alone meets no other row, and these have shown what follows. But
            # what tokens before the place had seen of it, they had seen in the state as well.
            ending = self._ending(at[2], at, alone)
            rounding = largest(*ending)
            if rounding <= FINE or usual(*ending) <= self._usual_rounding(found):
                found = replace(found, shortest=sys.maxsize, longest=0, packed=len(ids))
                return replace(found, ahead=0.0, rounding=rounding, is_rough=self._is_rough(found))
        return self._together(found, at, alone)

    # How it rounds --------------------------------------------------------------------------------

    def _rounding_within(self, found: Findings, ids: Sequence[int], logits: Tensor) -> Findings:
        """What moved digits within make of the logits that the model returned for a few ids."""
        if self._earlier is not None:
            return replace(found, moved=self._earlier.moved, jumps=self._earlier.jumps)
        if found.draws not in (None, "seeded"):
            return found
        if not self._is_half(found):
            return replace(
                found, jumps=jumps_at(self._model, lambda: self._passes.all(ids), logits)
            )
        with rounded_otherwise(self._model):
            moved = Apart.between(self._passes.all(ids), logits)
        return replace(found, moved=moved if moved.usual else None)

    def _tells_rounding(self, found: Findings) -> bool:
        """Whether it is known how far rounding alone moves values, without batches."""
        return found.draws is None and (found.moved is not None or not self._is_rough(found))

    def _usual_rounding(self, found: Findings) -> float:
        """What rounding makes of several places at most, as far as a few ids have shown."""
        return 0.0 if found.moved is None else max(FINE, BEYOND * found.moved.usual)

    def _beyond_rounding(
        self,
        found: Findings,
        pairs: Sequence[tuple[Tensor, Tensor]],
        limit: float,
        plain: tuple[Sequence[int], Sequence[int], Tensor],
    ) -> bool:
        """Whether logits of 16 bits differ in most places by more than in other lengths.

        Those are other shapes, whose rounding is unlike that of one shape. And where an expert was
        chosen by a hair, rounding may choose another, in some place.

        Args:
            found: What is known up to now.
            pairs: What is said at several places, and what is said otherwise.
            limit: What is no effect anyway.
            plain: Ids, places, and what is said there; with other digits if that is needed.
        """
        most = max(usual(*pair) for pair in pairs)
        if most <= max(limit, self._usual_rounding(found)):
            return False
        ids, at, said = plain
        with rounded_otherwise(self._model):
            digits = self._passes.said([ids], [at])[0]
        return most > max(limit, BEYOND * usual(digits, said))

    def _is_rough(self, found: Findings) -> bool:
        """Whether rounding is worth measuring."""
        is_coarse = self._is_half(found) or _compat.computes_roughly(self._model)
        return found.draws is not None or is_coarse or found.jumps > 0

    def _is_half(self, found: Findings) -> bool:
        """Whether rounding may be taken for an effect."""
        return found.dtype not in ("float32", "float64") or _compat.half_precision(self._model)

    # What it returns ------------------------------------------------------------------------------

    def _first(self, ids: Sequence[int], logits: Tensor) -> Findings:
        """What the model returned for a few ids, all logits asked for."""
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
                    f"{name} returns {n} logits for {len(ids)} ids: which belong to which cannot "
                    "be told. Return logits for every id."
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
        """Places of the row, what is said there of it alone, and what a pack shows of that.

        Args:
            logits: All of the beginning, read alone.
            found: What is known up to now.

        Returns:
            Places, two of the beginning first; ``(n, vocabulary)``; and what packs show, if any.
        """
        n_later = _LATER // 2 if self._is_half(found) else _LATER
        ids, cuts = self._row.ids, self._cuts(max(n_later, self._wanted()))
        at = [0, min(cuts[0] // 2, _WIDE_IDS - 1), *cuts]
        kept = self._passes.kept
        if kept != "positions":
            self._find_kept(ids[:_FIRST], logits)
        packing, said = self._packing(found, at)
        if said is None and kept == "positions":
            try:
                said = self._passes.said([ids], [at])[0]
            except Exception as error:  # whatever an argument of this name means there
                if is_no_answer(error):
                    raise
        if kept == "positions" and not (said is not None and self._is_as(found, said, logits, at)):
            self._find_kept(ids[:_FIRST], logits)
            if self._passes.kept != kept:  # nothing of it was what was asked for
                packing, said = self._packing(found, at)
        return at, self._passes.said([ids], [at])[0] if said is None else said, packing

    def _is_as(self, found: Findings, said: Tensor, logits: Tensor, at: Sequence[int]) -> bool:
        """Whether the first of what is said is what the beginning alone said there."""
        if is_as(said[:2], logits[0, at[:2]]):
            return True
        return usual(said[:2], spread(logits[0, at[:2]])) <= self._usual_rounding(found)

    def _find_kept(self, ids: Sequence[int], logits: Tensor) -> None:
        """Whether the model gives the logits that it is asked for, where it takes that argument."""
        if self._passes.kept is None:
            return
        ends = [0, len(ids) - 1]
        try:
            # The last places first: a number of them is asked for by its smallest.
            said = [self._passes.said([ids], [own])[0] for own in (ends, ends[1:])]
        except Exception as error:  # whatever an argument of this name means there
            if is_no_answer(error):
                raise
            self._passes.kept = None
            return
        if not (is_as(said[0], logits[0, ends]) and is_as(said[1], logits[0, ends[1:]])):
            self._passes.kept = None

    def _in_front(self, ids: Sequence[int], logits: Tensor) -> int:
        """How many logits there are in front of those of the first id: all that are too many."""
        n = logits.shape[1] - len(ids)
        # One id less: of what both say, all but the last place is the same where what is too much
        # stands in front; else what stands behind has moved.
        fewer = self._passes.all(ids[:-1]) if len(ids) > 1 else logits[:, :-1]
        if fewer.shape[1] != logits.shape[1] - 1 or (
            largest(spread(fewer[:, n:]), spread(logits[:, n:-1])) > FINE
            and root_mean_square(spread(fewer[:, n:]), spread(logits[:, n:-1])) > rough(logits)
        ):
            raise ValueError(
                f"{type(self._model).__name__} returns {logits.shape[1]} logits for {len(ids)} "
                f"ids: it cannot be told which belong to the ids. Return logits of the ids alone, "
                f"`logits[:, -{len(ids)}:]` of a soft prompt's model."
            )
        return n

    # What changes what it says --------------------------------------------------------------------

    def _alone(self, found: Findings) -> Findings:
        """Of one row, as it is and with something else after some places."""
        cuts, is_rough = self._cuts(self._wanted()), self._is_rough(found)
        row = self._passes.said([self._row.ids], [cuts])[0]
        pairs = self._after(cuts, cuts, row, n_places=1, at_once=1)
        limit = max(FINE, rough(row)) if self._is_half(found) else FINE
        return replace(
            found,
            sees_ahead=any(exceeds(*pair, limit) for pair in pairs),
            ahead=max(largest(*pair) for pair in pairs),
            is_rough=is_rough,
        )

    def _last(self, found: Findings) -> Findings:
        """Of a row alone and beside another, where the last place alone is said."""
        ids, at = self._row.ids, [len(self._row.ids) - 1]
        alone, copies = self._passes.said([ids], [at])[0], self._passes.said([ids] * 2, [at] * 2)[0]
        beside = self._passes.said([self._other.ids(ids), ids], [at] * 2)[1]
        is_rough = self._is_rough(found)
        rounding, limit, is_half = largest(copies, alone), FINE, self._is_half(found)
        if is_half:
            limit = max(FINE, BEYOND * root_mean_square(copies, alone), rough(alone))
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

    def _together(self, found: Findings, at: list[int], alone: Tensor) -> Findings:
        """Of the longest and the shortest row, alone and in batches.

        Args:
            found: What is known up to now.
            at: Places of the longest row: two of its beginning, then those of `_cuts`.
            alone: What is said there of it alone.
        """
        is_rough, is_half = self._is_rough(found), self._is_half(found)
        if is_half and (rounding := self._rounding_alone(found, at, alone)) is not None:
            return replace(found, ahead=0.0, coupling=0.0, rounding=rounding, is_rough=True)
        ids, length, cut_at = self._row.ids, len(self._row.ids), at[2]
        mate = self._other.ids(ids)
        short = self._short if len(self._short) < length else mate
        ends = [i * (len(short) - 1) // (_PLACES - 1) for i in range(_PLACES)]
        padded = [*short, *self._other.ids(ids[len(short) :])]
        whole, alone_short = (ids, at, alone), self._passes.said([short], [ends])[0]
        # Everything at once: other rows, other ids after these, and padding. Where numbers are of
        # 16 bits that always shows something.
        both = [padded, self._other.after(cut_at)], [ends, [*at[:3], *at[2:3] * 2]]
        said = None if is_half else self._passes.said(*both)
        after, ended = self._later(found, at[2:], is_half=is_half)
        # Of a few places rounding is told apart from an effect more surely than of many.
        n_places = 1 if is_half else len(at)
        later = self._after(after, at, alone, n_places=n_places)
        shows_all = is_half or (found.packing is not None and found.packing.reason is None)
        if not shows_all:
            later += self._close(at[2:])
        endings = [self._ending(place, at, alone) for place in ended]
        wide = self._wide(at[:2], _WIDE)
        pairs = [(wide, alone[:2]), *later, *endings]
        if said is not None:
            pairs += [(said[0], alone_short), (said[1, :3], alone[:3])]
        rounding = max(largest(*pair) for pair in pairs)
        if rounding <= FINE:
            return replace(found, ahead=0.0, coupling=0.0, rounding=rounding, is_rough=is_rough)
        # The same passes once more: what differs then was drawn at random.
        begun = self._wide(at[:2], 1)
        if said is None:
            equal = [(self._wide(at[:2], 1), begun)]
        else:
            equal = [(self._passes.said([ids], [at])[0], alone), (self._passes.said(*both), said)]
            equal.append((self._wide(at[:2], _WIDE), wide))
        if (most := max(largest(*pair) for pair in equal)) > FINE and found.draws is None:
            differ = f"equal passes differ by {most:.2g} nats"
            found = replace(found, draws="unseen", reasons=(*found.reasons, differ))
        draws = found.draws is not None
        # One thing after the other, in passes of one shape.
        copies = self._passes.said([ids, ids], [at[:3]] * 2)[0]
        mates = [mate] if is_half else [mate, padded]
        beside = [self._passes.said([one, ids], [at[:3]] * 2)[1] for one in mates]
        cut = self._passes.said([self._other.after(cut_at)], [at[:3]])[0]
        longer = self._passes.said([padded], [ends])[0]
        limit = FINE
        if is_half or draws:
            moved = max(root_mean_square(*pair) for pair in [(copies, alone[:3]), *equal])
            limit = max(FINE, BEYOND * moved, rough(alone) if is_half else 0.0)
        couples = any(exceeds(copies, one, limit) for one in beside)
        # Beside itself a row must be what it is alone, too, and beside many others.
        if is_half or draws:
            couples |= exceeds(wide, self._wide(at[:2], _WIDE, start=1), limit)
        if is_half or not draws:
            couples |= self._counts_rows(found, [(copies, alone[:3]), (wide, begun)], whole)
        if couples:
            later = self._after(after, at, alone, n_places=n_places, at_once=1)
            if not shows_all:
                later += self._close(at[2:], at_once=1)
        followed = [(cut, alone[:3]), *later]
        if not is_half:
            again = [*short, *self._other.ids(padded[len(short) :])]
            followed.append((longer, self._passes.said([again], [ends])[0]))
        sees = any(exceeds(*pair, limit) for pair in followed)
        # How much follows may count as well as what.
        endings += [
            (self._passes.said([ids[: cut_at + n]], [at[:3]])[0], alone[:3]) for n in (1, 2)
        ]
        if is_half:
            part = short, ends, alone_short
            mixes = self._beyond_rounding(found, [(longer, alone_short)], limit, part)
            sees |= self._beyond_rounding(found, endings, limit, whole)
        else:
            mixes = exceeds(longer, alone_short, limit)
            sees |= any(exceeds(*pair, limit) for pair in endings)
        mixes &= not sees
        if sees or couples or mixes:
            rounding = largest(copies, alone[:3])
        return replace(
            found,
            sees_ahead=sees,
            couples_rows=couples or found.couples_rows,
            mixes_lengths=mixes,
            ahead=max(largest(*pair) for pair in [*followed, *endings]),
            coupling=max(
                *(largest(copies, one) for one in beside),
                largest(alone[:3], beside[0]),
                largest(wide, begun),
            ),
            rounding=rounding,
            is_rough=is_rough or couples or draws or rounding > FINE,
        )

    def _counts_rows(
        self,
        found: Findings,
        pairs: Sequence[tuple[Tensor, Tensor]],
        plain: tuple[Sequence[int], Sequence[int], Tensor],
    ) -> bool:
        """Whether what is said of a row beside others is not what is said of it alone.

        Args:
            found, pairs, plain: As for `_beyond_rounding`.
        """
        if self._is_half(found):
            return self._beyond_rounding(found, pairs, max(FINE, rough(plain[2])), plain)
        return max(largest(*pair) for pair in pairs) > _BATCHED

    def _rounding_alone(self, found: Findings, at: Sequence[int], alone: Tensor) -> float | None:
        """How far rounding to 16 bits moves what is said, where nothing else does; None: it may.

        Passes of one shape round alike, so that what differs there is an effect, or may be one.
        """
        if found.draws is not None:
            return None
        places = _spaced(at[2:], max(2, min(_CUTS, self._n_rows // _ROWS_PER_CUT)))
        alike = self._after(places, at, alone, n_places=len(at), at_once=1)
        # In company, of a length that is odd if the row's is even.
        ids, n = self._row.ids, at[2] + 1
        begun = ids[: n + (n + len(ids) + 1) % 2]
        mates = [self._other.ids(begun, start) for start in (0, 1)]
        one, other = (self._passes.said([begun, mate], [at[:3]] * 2)[0] for mate in mates)
        alike.append((one, other))
        shapes = [(one, alone[:3]), (self._wide(at[:2], _WIDE), alone[:2])]
        if len(self._short) < n:
            shapes.append(self._of_length(len(self._short), at, alone))
        limit = max(FINE, rough(alone), self._usual_rounding(found))
        if max(largest(*pair) for pair in alike) > FINE or max(usual(*p) for p in shapes) > limit:
            return None
        return max(largest(*pair) for pair in shapes)

    def _packing(self, found: Findings, at: Sequence[int]) -> tuple[Packing | None, Tensor | None]:
        """How the model reads packs, where it might be given any; and what is said there alone."""
        if self._read_packed is None or found.apart or found.n_before:
            return None, None
        if self._earlier is not None and self._earlier.packs_known(len(self._row.ids)):
            return self._earlier.packing, None
        places = sorted({*at})
        packing, said = self._read_packed(self._row.ids, places, self._passes.kept, found.moved)
        if said is None:
            return packing, None
        where = torch.tensor([places.index(p) for p in at], dtype=torch.int64, device="cpu")
        return packing, spread(said[0, where.to(said.device)])

    def _later(
        self, found: Findings, places: Sequence[int], *, is_half: bool
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Of later places those after which something else is put, and where the row ends.

        What a model says where the row ends hangs on nothing that follows, neither on what it is
        nor on how much: it shows the most, but for rounding, which is another for each length.
        """
        some, packing = _spaced(places, self._wanted()), found.packing
        if is_half:
            return some[-max(2, len(some) // 2) :], ()
        if packing is not None and packing.differs:
            return places, places
        # Lengths next to each other, and a distant one.
        ended = sorted({places[0], *_spaced(places, _ENDED - 1), *places[-2:-1]})
        if packing is not None and packing.reason is None:
            return (), ended
        return [place for place in some if place not in ended], ended

    def _wide(self, at: Sequence[int], most: int, *, start: int = 0) -> Tensor:
        """What is said at early places of the row's beginning in a batch of so many at most."""
        begin = self._row.ids[: at[-1] + 1]
        mates = [self._other.ids(begin, start + n) for n in range(min(self._n_rows, most) - 1)]
        return self._passes.said([begin, *mates], [at] * (1 + len(mates)))[0]

    def _wanted(self) -> int:
        """After how many later places something else is put, by the number of rows."""
        return max(2, min(_CUTS, self._n_rows // 4), self._n_rows // _ROWS_PER_CUT)

    def _cuts(self, n_later: int) -> list[int]:
        """The place of the first target token, and at most so many others that anything follows."""
        last = len(self._row.ids) - 1
        places = sorted({p for p in self._row.positions if p >= 0} or {last})
        return [places[0], *_spaced([place for place in places[1:] if place < last], n_later)]

    def _after(
        self,
        cuts: Sequence[int],
        at: Sequence[int],
        alone: Tensor,
        *,
        n_places: int,
        at_once: int = _AT_ONCE,
        start: int = 0,
    ) -> list[tuple[Tensor, Tensor]]:
        """What is said where something else follows, beside what is said of the row as it is.

        Args:
            cuts: After each of these places something else follows, in a row of its own.
            at: Places of the row, sorted, the cuts among them.
            alone: What is said there of the row alone.
            n_places: So many of these places at most, up to the cut, are looked at.
            at_once: So many rows are read in one pass.
            start: Rows are read from this place on.
        """
        found: list[tuple[Tensor, Tensor]] = []
        for i in range(0, len(cuts), at_once):
            some = cuts[i : i + at_once]
            stops = [bisect_right(at, cut) for cut in some]
            firsts = [max(0, stop - n_places) for stop in stops]
            most = max(stop - first for first, stop in zip(firsts, stops, strict=True))
            if at_once == 1:  # as many places of a row as of the row alone: of one shape
                most = max(most, n_places)
            own = [
                [*at[first:stop], *[cut] * (most - (stop - first))]
                for cut, first, stop in zip(some, firsts, stops, strict=True)
            ]
            said = self._passes.said(
                [self._other.after(cut)[start:] for cut in some],
                [[place - start for place in places] for places in own],
            )
            found += [
                (one[: stop - first], alone[first:stop])
                for one, first, stop in zip(said, firsts, stops, strict=True)
            ]
        return found

    def _close(
        self, places: Sequence[int], *, at_once: int = _AT_ONCE
    ) -> list[tuple[Tensor, Tensor]]:
        """As `_after`, of the target and the ids close before it: short rows, so after each place.

        What one token makes of another that comes next is seen after that one alone.
        """
        start = max(0, places[0] - _CLOSE)
        alone = self._passes.said([self._row.ids[start:]], [[place - start for place in places]])[0]
        return self._after(
            places, places, alone, n_places=len(places), at_once=at_once, start=start
        )

    def _ending(self, place: int, at: Sequence[int], alone: Tensor) -> tuple[Tensor, Tensor]:
        """What is said of the row where it ends at a place, and of all of it; as for `_after`."""
        return self._of_length(place + 1, at, alone)

    def _of_length(self, n_ids: int, at: Sequence[int], alone: Tensor) -> tuple[Tensor, Tensor]:
        """What is said of so many first ids of the row, and of all of it; as for `_after`."""
        n = bisect_right(at, n_ids - 1)
        return self._passes.said([self._row.ids[:n_ids]], [at[:n]])[0], alone[:n]


def _spaced(places: Sequence[int], n: int) -> list[int]:
    """At most so many of some places, the last among them."""
    n = min(len(places), n)
    return sorted({places[-1 - i * len(places) // n] for i in range(n)} if n else ())
