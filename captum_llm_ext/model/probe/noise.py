"""How much a value changes by nothing but the company a row is computed in."""

import math
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from zlib import crc32

import torch
from torch import Tensor

from captum_llm_ext import _compat
from captum_llm_ext.model.forward import memory
from captum_llm_ext.model.forward.asked import Asked, explained
from captum_llm_ext.model.forward.passes import Passes
from captum_llm_ext.model.forward.rounding import rounded_otherwise, rounding
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.probe import Findings

# Rows that are computed once more: the longest, the shortest, and some that chance chooses; the
# first of them alone, all of them in batches that nobody else would cut. So many at most, and as
# many as this share of what the run took, or as few passes cost beside their positions.
_ROWS = 64
_LEAST_ROWS = 4
_SHARE = 1 / 8
_PASSES = 16
_ROWS_PER_ALONE = 8
_LEAST_ALONE = 2  # and no more where each of them takes a pass per token
_CHECKED = 4
# What these take is no more than this share of what the run took, but for one of them.
_CHECKED_SHARE = 1 / 32
_BATCH = 13
# Other batches than those seen may lie further apart: in 60 small models by less than twice as
# much, or twice the last digit of the logits, of which one may be rounded up, the other down.
_UNSEEN = 2.0
# What is drawn at random has longer tails than rounding, and may move values far in few passes:
# some rows are run so often, and this factor of what is seen then covered three runs of small
# models with dropout, noise, or layers left out in 3 and 10 % of passes (at most .7 of it).
_DRAWN = 2.5
_DRAWN_PASSES = 48
_DRAWN_ROWS = 6
# What happens in one pass of so many is not seen in any of these with one chance in twenty.
_SELDOM = _DRAWN_PASSES // 3
_DIGITS = 2.0
# A value that can hardly move: rounding is told of those that can.
_STEADY = 1e-3
# A noise floor of so many times what rounding explains is warned of.
_WORTH_TELLING = 4
_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float64, torch.bfloat16, torch.float16)}


class NoiseFloor:
    """Remembers some of the rows that were scored, to compute them in other ways.

    Args:
        passes: Of the model.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes, self._attr_target = passes, passes.attr_target
        self._kept: dict[tuple[int, ...], tuple[int, TokenRow, Tensor]] = {}
        self._scale: Tensor | None = None
        self._n = 0

    def note(self, rows: Sequence[TokenRow], values: Tensor) -> None:
        """Takes notice of rows and their values ``(n_rows, n_target)``, as they were computed."""
        if self._scale is not None and len(self._scale) != values.shape[1]:
            self._kept, self._scale, self._n = {}, None, 0  # another target
        scale = self._scales(values).amax(0)
        self._scale = scale if self._scale is None else self._scale.maximum(scale)
        self._n += len(rows)
        for row, own in zip(rows, values, strict=True):
            self._kept[row.ids] = (crc32(repr(row.ids).encode()), row, own)
        if len(self._kept) > _ROWS:
            self._kept = {ids: self._kept[ids] for ids in self._order()[:_ROWS]}

    def _order(self) -> list[tuple[int, ...]]:
        """The longest and the shortest row, and the others as chance will have it."""
        by_length = sorted(self._kept, key=len)
        chance = sorted(by_length[1:-1], key=lambda ids: self._kept[ids][0])
        return [*dict.fromkeys((by_length[-1], by_length[0])), *chance]

    def floor(self, found: Findings, asked: Asked, *, together: bool, cuts: bool) -> Tensor | None:
        """How far apart values lie that are computed in several ways; see `Scorer.noise_floor`.

        Args:
            found: What is known of the model.
            asked: What it was asked.
            together: Whether the model is ever given rows of several lengths at once.
            cuts: Whether a row without what follows a token says the same of it.
        """
        is_named = isinstance(self._attr_target, str)
        explained = self._explained(found)
        # A callable may make of one token's logits another value without the others'.
        has_checks = is_named and cuts and not found.draws
        ends = self._ends(found, asked) if has_checks else []
        checked = max((self._difference(ids, values) for ids, values in ends), default=0.0)
        if not found.is_rough and checked <= explained:
            return None
        alone = [] if found.step_by_step else [values for _, values in ends]
        floor = self._measured(found, asked, alone, together)
        floor = floor.clamp(min=checked if checked > explained else 0.0)
        if float(floor.max()) > _WORTH_TELLING * explained:
            warnings.warn(self._warning(found, float(floor.max())), stacklevel=5)
        return floor

    def _warning(self, found: Findings, much: float) -> str:
        name = type(self._passes.model).__name__
        below = "attributions below that mean nothing (see `noise_floor`)"
        if found.draws is None:
            return (
                f"{name} gives equal rows values up to {much:.2g} apart, by the batches they are "
                f"computed in: {below}. `perturbations_per_eval=1` may help."
            )
        seldom = f"What it does in fewer than one pass of {_SELDOM} may not have been seen"
        if found.draws == "unseen":
            return (
                f"{name} gives equal rows values up to {much:.2g} apart, pass by pass: it draws at "
                f"random, or keeps something of earlier passes; {below}. {seldom}."
            )
        again = "Another run draws the same" if found.seeds else "Another run draws others"
        return (
            f"{name} draws at random in every pass (dropout that is left on, noise, layers left "
            f"out): by that, equal rows have values up to {much:.2g} apart, and {below}. {seldom}. "
            f"{again}; explain the model without what draws."
        )

    def _explained(self, found: Findings) -> float:
        """What rounding explains of a difference between values."""
        sizes = [own.nan_to_num(nan=0.0).abs().max() for _, _, own in self._kept.values()]
        scale = (
            1.0 if self._attr_target in ("log_prob", "contrast") else max(1.0, *map(float, sizes))
        )
        return scale * max(rounding(_DTYPES.get(found.dtype)), rounding(torch.float32))

    def _ends(self, found: Findings, asked: Asked) -> list[tuple[tuple[int, ...], Tensor]]:
        """Values ``(n_target,)`` of passes that end with a token of their row, and these rows' ids.

        NaN for tokens that such a pass does not say.
        """
        ends: list[tuple[tuple[int, ...], Tensor]] = []
        most = _CHECKED_SHARE * self._passes.n_positions
        n_before = self._passes.n_positions
        for i, ids in enumerate(self._order()[:_CHECKED]):
            if i and self._passes.n_positions - n_before + len(ids) > most:
                break
            number, row, own = self._kept[ids]
            values = torch.full_like(own, torch.nan)
            known = [t for t, place in enumerate(row.positions) if place >= 0]
            if known:
                last = row.positions[known[(number + i) % len(known)]]  # of each row another token
                first = last if found.step_by_step else 0  # what it says before hangs on that token
                some = [t for t in known if first <= row.positions[t] <= last]
                places = [row.positions[t] for t in some]
                end = replace(row, ids=row.ids[: last + 1], positions=places)
                values[some] = self._together([end], asked.only(some))[0]
            ends.append((ids, values))
        return ends

    def _difference(self, ids: tuple[int, ...], values: Tensor) -> float:
        """How far values of a row are at most from those that were noted."""
        return float((values - self._kept[ids][2]).abs().nan_to_num(nan=0.0).max())

    def _measured(
        self, found: Findings, asked: Asked, known: Sequence[Tensor], together: bool
    ) -> Tensor:
        """The largest difference that was seen of any token, and what others are likely to show.

        That is in proportion to how far a value can move at all, and not less than what the last
        digits of the logits are worth. Where that is more than what some rows alone show, no others
        are computed.

        Args:
            found, asked, together: As for `floor`.
            known: Values of the first rows alone, as far as they are known.
        """
        kept = [self._kept[ids] for ids in self._measurable(found)]
        rows = [row for _, row, _ in kept]
        computed = torch.stack([own for _, _, own in kept])
        if found.draws:
            return self._of_draws(rows, computed, found, asked)
        digit = _DIGITS * found.last_digit if isinstance(self._attr_target, str) else 0.0
        ways = [computed, *self._some_alone(rows, computed, known, found, asked)]
        largest = self._likely(torch.stack(ways))
        if together and largest > digit:
            batches = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
            ways.append(torch.cat([self._together(batch, asked) for batch in batches]))
            largest = self._likely(torch.stack(ways))
        assert self._scale is not None
        return max(largest, digit) * self._scale

    def _likely(self, ways: Tensor) -> float:
        """What the largest difference is likely to be, over how far a value can move.

        Args:
            ways: Values ``(n_ways, n_rows, n_target)``, in several ways; of the first, all.
        """
        ratios = _apart(ways) / self._scales(ways[0])
        # Of n normal numbers the largest is about so many standard deviations away.
        known = ~ways[1:].isnan().all(0)
        usual = float(ratios[known].square().mean().sqrt()) if bool(known.any()) else 0.0
        likely = math.sqrt(2 * math.log(2 * self._n * ways.shape[2] + 1)) * usual
        return max(likely, _UNSEEN * float(ratios.max()))

    def _some_alone(
        self,
        rows: list[TokenRow],
        own: Tensor,
        known: Sequence[Tensor],
        found: Findings,
        asked: Asked,
    ) -> list[Tensor]:
        """Values of the first rows alone, in one or two ways, each as `own`; NaN for others."""
        n_alone = _LEAST_ALONE if found.step_by_step else len(rows) // _ROWS_PER_ALONE
        n_alone = max(_LEAST_ALONE, n_alone)
        alone = torch.full_like(own, torch.nan)
        for i, row in enumerate(rows[: max(n_alone, len(known))]):
            alone[i] = known[i] if i < len(known) else self._alone(row, found, asked)
        is_half = found.dtype != "float32" or _compat.half_precision(self._passes.model)
        if is_half or found.couples_rows:  # those have one way of being computed
            return [alone]
        # What is rounded to few bits jumps where the last digit of a float decides which way: far,
        # and so seldom that other batches may not show it.
        moved = torch.full_like(own, torch.nan)
        with rounded_otherwise(self._passes.model, singles=True):
            for i, row in enumerate(rows[:n_alone]):
                moved[i] = self._alone(row, found, asked)
        return [alone, moved]

    def _of_draws(self, rows: list[TokenRow], own: Tensor, found: Findings, asked: Asked) -> Tensor:
        """The floor of a model that draws: from passes over the same rows that draw anew."""
        each = len(asked) if found.step_by_step else 1
        n = max(_LEAST_ROWS, _DRAWN_PASSES // (each * len(rows)))
        seed, again = self._passes.seed, list[Tensor]()
        try:
            for number in range(1, n + 1):
                self._passes.seed = None if seed is None else seed + number
                again.append(torch.stack([self._alone(row, found, asked) for row in rows]))
        finally:
            self._passes.seed = seed
        apart = _apart(torch.stack([own, *again]))
        # A layer that is left out moves sure tokens as far as others.
        return _DRAWN * apart.amax(0).clamp(min=float(apart.square().mean().sqrt()))

    def _measurable(self, found: Findings) -> list[tuple[int, ...]]:
        """Rows that are computed once more: as many as the run took time for."""
        passes, order = self._passes, self._order()
        if found.draws:
            return order[:_DRAWN_ROWS]
        each = memory.overhead(passes.model, passes.device)
        most = max(_SHARE * passes.n_positions, _PASSES * each)
        taken = [*accumulate(len(ids) for ids in order)]
        return order[: max(_LEAST_ROWS, bisect_right(taken, most))]

    def _alone(self, row: TokenRow, found: Findings, asked: Asked) -> Tensor:
        """Values ``(n_target,)`` of a row alone, of each token with nothing after it if need be."""
        if not found.step_by_step:
            return self._together([row], asked)[0]
        values = torch.full((len(asked),), torch.nan, dtype=torch.float64, device="cpu")
        for t in range(len(asked)):
            if (end := row.up_to(t)) is not None:
                values[t] = self._together([end], asked.only([t]))[0, 0]
        return values

    def _together(self, rows: Sequence[TokenRow], asked: Asked) -> Tensor:
        """What is attributed of rows that are computed in one batch, ``(n_rows, n_target)``."""
        return explained(self._passes.together(rows, asked), asked, self._attr_target)

    def _scales(self, values: Tensor) -> Tensor:
        """How far values move with logits: those of sure tokens hardly do."""
        if self._attr_target == "log_prob":
            scales = -values.expm1()
        elif self._attr_target == "prob":
            scales = values * (1 - values)
        else:
            scales = torch.ones_like(values)
        return scales.nan_to_num(nan=0.0).clamp(min=_STEADY)


def _apart(ways: Tensor) -> Tensor:
    """How far values ``(n_ways, n_rows, n_target)`` lie apart, way by way; NaN says nothing."""
    highest = ways.nan_to_num(nan=-torch.inf).amax(0)
    return (highest - ways.nan_to_num(nan=torch.inf).amin(0)).clamp(min=0)
