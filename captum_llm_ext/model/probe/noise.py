"""How much a value changes by nothing but the company a row is computed in."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

import torch
from torch import Tensor

from captum_llm_ext.model.forward import memory
from captum_llm_ext.model.forward.asked import Asked, explained
from captum_llm_ext.model.forward.passes import Passes
from captum_llm_ext.model.forward.rounding import rounded_otherwise, rounding
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.probe import Findings
from captum_llm_ext.model.probe.differences import FINE

# Rows that are computed once more: the longest, the shortest, and some that chance chooses, in
# batches that nobody else would cut. So many at most, and as many as this share of what the run
# took, or as few passes cost beside their positions; but two, or up to four to have so many values.
_ROWS = 64
_LEAST_ROWS, _MOST_OF_LEAST = 2, 4
_LEAST_VALUES = 48
_SHARE = 1 / 16
_PASSES = 4
# And of so many one is computed alone.
_ROWS_PER_ALONE = 8
_LEAST_ALONE = 2  # and no more where each of them takes a pass per token
_CHECKED = 4
# What these take is no more than this share of what the run took, but for one of them.
_CHECKED_SHARE = 1 / 32
_BATCH = 13
# So many equal passes show what draws from nobody knows what: of what happens in one of five, all
# but three times of a hundred.
_AGAIN = 16
# Other batches than those seen may lie further apart: in 60 small models by less than twice as
# much, or twice the last digit of the logits, of which one may be rounded up, the other down.
_UNSEEN = 2.0
# Of n rows these are told too small: with this over n added, batches of one row lay at most .998 of
# the floor apart for 203 prompts of SmolLM2 and Gemma 3 in bfloat16, n 3 to 10. With half of it 2
# of 86 lay up to 1.2 times as far, without it more.
_FEW = 4.0
# What is drawn at random has longer tails than rounding, and may move values far in few passes:
# some rows are run so often, and this factor of what is seen then covered three runs of small
# models with dropout, noise, or layers left out in 3 and 10 % of passes (at most .7 of it).
_DRAWN = 2.5
_DRAWN_PASSES = 48
_DRAWN_ROWS = 6
_LEAST_DRAWN = 4  # passes over each of them
# What happens in one pass of so many is not seen in any of these with one chance in twenty.
_SELDOM = _DRAWN_PASSES // 3
_DIGITS = 2.0
# Where fewer values than this differ in any way tried, so many rows are run with some of the
# numbers within rounded otherwise. Values lie no further apart than so many times what these make
# likely: .93 of it at most in 320 small models in bfloat16 and float16, a pass for each token
# beside any batch. By batches alone, 13 of 16 whose activations are rounded to 8 bits besides had
# been up to 2.6 times beyond their floor, and 3 of 16 others up to 1.7 times. With all numbers
# rounded otherwise, the floor of these would be twice as large.
_FEW_DIFFER = 0.5
_ROUNDED_ROWS = 8
_ROUNDED_SHARE = 1 / 32
_ROUNDED_BEYOND = 1.25
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
        return [*dict.fromkeys((by_length[-1], *chance[:1], by_length[0])), *chance[1:]]

    def floor(
        self, found: Findings, asked: Asked, *, together: bool, cuts: bool
    ) -> tuple[Tensor | None, Findings]:
        """How far apart values lie that are computed in several ways; see `Scorer.noise_floor`.

        Args:
            found: What is known of the model.
            asked: What it was asked.
            together: Whether the model is ever given rows of several lengths at once.
            cuts: Whether a row without what follows a token says the same of it.

        Returns:
            The floor; and what is known of the model now.
        """
        # A callable may make of one token's logits another value without the others'.
        cuts = cuts and isinstance(self._attr_target, str)
        explained = self._explained(found)
        if found.draws:
            floor = self._of_draws(found, asked)
        else:
            checked = 0.0 if found.is_rough or not cuts else self._checked(found, asked)
            if not found.is_rough and checked <= explained:
                return None, found
            floor = self._measured(found, asked, together, cuts).clamp(min=checked)
            is_odd = checked > explained
            if not found.batches_known:  # then no equal passes have been compared
                is_odd |= float(floor.max()) > _WORTH_TELLING * explained
            if is_odd and self._differs_again(found, asked):
                found = replace(found, draws="unseen", is_rough=True)
                floor = floor.maximum(self._of_draws(found, asked))
        if float(floor.max()) > _WORTH_TELLING * explained:
            warnings.warn(self._warning(found, float(floor.max())), stacklevel=5)
        return floor, found

    def _warning(self, found: Findings, much: float) -> str:
        name = type(self._passes.model).__name__
        below = "attributions below that mean nothing (see `noise_floor`)"
        if found.draws is None and found.jumps:
            return (
                f"{name} rounds numbers within to few digits, or chooses among them: last digits, "
                f"which every batch has its own of, move values by up to {much:.2g}, and {below}."
            )
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

    def _checked(self, found: Findings, asked: Asked) -> float:
        """How far values are at most from those of passes that end with a token of their row."""
        checked, spent, each = 0.0, 0, self._overhead()
        for i, ids in enumerate(self._order()[:_CHECKED]):
            spent += len(ids) + each
            if i and spent > _CHECKED_SHARE * self._passes.n_positions:
                break
            values = self._together([self._cut(ids, i, found)], asked)[0]
            apart = (values - self._kept[ids][2]).abs().nan_to_num(nan=0.0)
            checked = max(checked, float(apart.max()))
        return checked

    def _cut(self, ids: tuple[int, ...], i: int, found: Findings) -> TokenRow:
        """A row up to a target token, of each row to another one: in another shape the same."""
        number, row, _ = self._kept[ids]
        known = [place for place in row.positions if place >= 0]
        if not known:
            return row
        last = known[(number + i) % len(known)]
        # What is said before the last hangs on that, where a model sees ahead.
        first = last if found.step_by_step else 0
        places = [place if first <= place <= last else -1 for place in row.positions]
        return replace(row, ids=row.ids[: last + 1], positions=places)

    def _differs_again(self, found: Findings, asked: Asked) -> bool:
        """Whether equal passes have other values."""
        _, row, _ = self._kept[min(self._kept, key=len)]
        values = torch.stack([self._together([row], asked)[0] for _ in range(_AGAIN)])
        return float(_apart(values).max()) > self._explained(found)

    def _measured(self, found: Findings, asked: Asked, together: bool, cuts: bool) -> Tensor:
        """The largest difference that was seen of any token, and what others are likely to show.

        That is in proportion to how far a value can move at all, and not less than what the last
        digits of the logits are worth.

        Args:
            found, asked, together, cuts: As for `floor`.
        """
        order = self._measurable(asked)
        rows = [self._kept[ids][1] for ids in order]
        computed = torch.stack([self._kept[ids][2] for ids in order])
        short = [self._cut(ids, i, found) for i, ids in enumerate(order)] if cuts else rows
        if together:
            n_alone = len(rows) // _ROWS_PER_ALONE
        else:
            n_alone = _LEAST_ALONE if found.step_by_step else len(rows)
        alone = torch.full_like(computed, torch.nan)
        for i in range(min(n_alone, len(rows))):
            row = rows[i] if found.step_by_step else short[i]
            alone[i] = self._alone(row, found, asked)
        ways = [computed, alone]
        if together:
            some = [*short[:1], *rows[1:]]  # so that one is of another length than in any batch
            batches = [some[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
            ways.append(torch.cat([self._together(batch, asked) for batch in batches]))
        # A jump is far, and so seldom that other batches may not show it. And rows that are run
        # alone do not show what batches would make of them.
        if (found.jumps or (found.moved is not None and not together)) and not found.couples_rows:
            ways.append(self._moved(rows, computed, found, asked))
        digit = _DIGITS * found.last_digit if isinstance(self._attr_target, str) else 0.0
        likely = max(self._likely(torch.stack(ways)), digit)
        if found.moved is not None and together and not found.couples_rows:
            likely = max(likely, self._rounded(torch.stack(ways), found, asked))
        assert self._scale is not None
        return likely * self._scale

    def _rounded(self, ways: Tensor, found: Findings, asked: Asked) -> float:
        """How far 16 bits are likely to move values, where few differ in the ways tried; else 0.

        These tell little of other batches then, above all where activations are rounded to 8 bits
        besides: a last digit moves few values there, but far.
        """
        ratios, known = self._ratios(ways)
        if bool(known.any()) and float((ratios[known] > FINE).double().mean()) >= _FEW_DIFFER:
            return 0.0
        kept = [self._kept[ids] for ids in self._order()[:_ROUNDED_ROWS]]
        rows, own = [row for _, row, _ in kept], torch.stack([own for _, _, own in kept])
        with rounded_otherwise(self._passes.model, share=_ROUNDED_SHARE):
            if found.step_by_step:
                moved = torch.stack([self._alone(row, found, asked) for row in rows])
            else:
                moved = self._together(rows, asked)
        ratios, known = self._ratios(torch.stack([own, moved]))
        return max(_ROUNDED_BEYOND * self._largest(ratios[known]), float(ratios.max()))

    def _moved(self, rows: list[TokenRow], own: Tensor, found: Findings, asked: Asked) -> Tensor:
        """Values of some rows, as `own`, with other last digits within; NaN for others."""
        n = 0 if found.step_by_step else len(rows) // _ROWS_PER_ALONE
        moved = torch.full_like(own, torch.nan)
        with rounded_otherwise(self._passes.model, singles=found.jumps):
            for i, row in enumerate(rows[: max(_LEAST_ALONE, n)]):
                moved[i] = self._alone(row, found, asked)
        return moved

    def _likely(self, ways: Tensor) -> float:
        """What the largest difference is likely to be, over how far a value can move.

        Args:
            ways: Values ``(n_ways, n_rows, n_target)``, in several ways; of the first, all.
        """
        ratios, known = self._ratios(ways)
        # The values of one row move together: of few rows, how far is not known well.
        few = 1 + _FEW / max(1, int(known.any(1).sum()))
        return few * max(self._largest(ratios[known]), _UNSEEN * float(ratios.max()))

    def _ratios(self, ways: Tensor) -> tuple[Tensor, Tensor]:
        """Differences ``(n_rows, n_target)`` over how far a value can move; and which are known."""
        return _apart(ways) / self._scales(ways[0]), ~ways[1:].isnan().all(0)

    def _largest(self, ratios: Tensor) -> float:
        """What the largest of all values' differences is likely to be, by some of them."""
        if not len(ratios):
            return 0.0
        assert self._scale is not None
        # Of n normal numbers the largest is about so many standard deviations away.
        usual = float(ratios.square().mean().sqrt())
        return math.sqrt(2 * math.log(2 * self._n * len(self._scale) + 1)) * usual

    def _of_draws(self, found: Findings, asked: Asked) -> Tensor:
        """The floor of a model that draws: from passes over the same rows that draw anew."""
        kept = [self._kept[ids] for ids in self._order()[:_DRAWN_ROWS]]
        rows, own = [row for _, row, _ in kept], torch.stack([own for _, _, own in kept])
        each = len(asked) if found.step_by_step else 1
        n = max(_LEAST_DRAWN, _DRAWN_PASSES // (each * len(rows)))
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

    def _measurable(self, asked: Asked) -> list[tuple[int, ...]]:
        """Rows that are computed once more: as many as the run took time for."""
        order = self._order()
        most = max(_SHARE * self._passes.n_positions, _PASSES * self._overhead())
        least = min(_MOST_OF_LEAST, max(_LEAST_ROWS, -(-_LEAST_VALUES // len(asked))))
        return order[: max(least, int(most) // len(order[0]))]  # in a batch all are as long

    def _overhead(self) -> int:
        return memory.overhead(self._passes.model, self._passes.device)

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
