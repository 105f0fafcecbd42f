"""The noise floor: how far values change with nothing but the batch."""

import math
from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

import torch
from torch import Tensor

from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.model.forward import memory
from captum_llm_ext.model.forward.passes import Passes
from captum_llm_ext.model.forward.rounding import rounded_otherwise, rounding
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.forward.value_spec import ValueSpec, explained
from captum_llm_ext.model.probe import Findings
from captum_llm_ext.model.probe.differences import FINE

# Rows that are recomputed: the longest, the shortest, and some at random, in batches that no run
# would form. At most this many, and as many as this share of the run's cost, or as a pass's fixed
# cost pays for; but four.
_ROWS = 64
_LEAST_ROWS = 4
_SHARE = 1 / 16
_PASSES = 4
# One of this many is also computed alone.
_ROWS_PER_ALONE = 8
_LEAST_ALONE = 2  # and no more if each of them takes a pass per token
_CHECKED = 4
# These take at most this share of the run's cost, except for one of them.
_CHECKED_SHARE = 1 / 32
_BATCH = 13
# Number of equal passes that show draws of unknown origin: with probability .97 if it happens in
# one of five.
_AGAIN = 16
# Other batches may differ more than those tried: in 60 small models by less than twice as much, or
# twice the spacing of the logits, of which one may be rounded up, the other down.
_UNSEEN = 2.0
# The floor of n rows is increased by this over n: batches of one row then differed by at most .998
# of the floor for 203 prompts of SmolLM2 and Gemma 3 in bfloat16, n 3 to 10. With half of it, 2 of
# 86 differed up to 1.2 times as much, without it more.
_FEW = 4.0
# Random draws have longer tails than rounding, and may have large effects in few passes: some rows
# are run this often, and this factor then covered three runs of small models with dropout, noise,
# or layers skipped in 3 and 10 % of passes (at most .7 of it).
_DRAWN = 2.5
_DRAWN_PASSES = 48
_DRAWN_ROWS = 6
_LEAST_DRAWN = 4  # passes over each of them
# An event in one pass of this many is missed by all of these with probability .05.
_SELDOM = _DRAWN_PASSES // 3
_DIGITS = 2.0
# If fewer values than this differ in any way tried, this many rows are run with some of the
# internal numbers rounded differently. Values differ by no more than this factor times the likely
# maximum of these: at most .93 of it in 320 small models in bfloat16 and float16, a pass per token
# compared with any batch. By batches alone, 13 of 16 with activations also rounded to 8 bits had
# been up to 2.6 times beyond their floor, and 3 of 16 others up to 1.7 times. With all numbers
# rounded differently, the floor of these would be twice as large. For rows that run alone it has to
# be: with some, batches of SmolLM2 in bfloat16 lay up to 1.17 times beyond it in 2 of 10 prompts.
_FEW_DIFFER = 0.5
_ROUNDED_ROWS = 8
_ROUNDED_SHARE = 1 / 32
_ROUNDED_BEYOND = 1.25
# A value that hardly changes with logits; rounding is measured on the others.
_STEADY = 1e-3
# A noise floor of this many times the expected rounding raises a warning. Chosen, not measured.
_WORTH_TELLING = 6
_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float64, torch.bfloat16, torch.float16)}


class NoiseFloor:
    """Stores some of the scored rows, to recompute them in other ways.

    Args:
        passes: Forward passes of the model.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes, self._attr_target = passes, passes.attr_target
        self._kept: dict[tuple[int, ...], tuple[int, TokenRow, Tensor]] = {}
        self._scale: Tensor | None = None
        self._n = 0

    def note(self, rows: Sequence[TokenRow], values: Tensor) -> None:
        """Stores rows and their values ``(n_rows, n_target)``, as computed."""
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
        """The longest and the shortest row, then the others in random order."""
        by_length = sorted(self._kept, key=len)
        chance = sorted(by_length[1:-1], key=lambda ids: self._kept[ids][0])
        return [*dict.fromkeys((by_length[-1], *chance[:1], by_length[0])), *chance[1:]]

    def floor(
        self, found: Findings, spec: ValueSpec, *, together: bool, cuts: bool
    ) -> tuple[Tensor | None, Findings]:
        """How far values differ between several ways of computing; see `Scorer.noise_floor`.

        Args:
            found: Findings on the model.
            spec: The request.
            together: Whether batches may contain rows of several lengths.
            cuts: Whether truncating a row after a token leaves its value unchanged.

        Returns:
            The floor; and the updated findings.
        """
        # A callable may use all tokens' logits for each value.
        cuts = cuts and isinstance(self._attr_target, str)
        explained = self._explained(found)
        if found.draws:
            floor = self._of_draws(found, spec)
        else:
            checked = 0.0 if found.is_rough or not cuts else self._checked(found, spec)
            if not found.is_rough and checked <= explained:
                return None, found
            floor = self._measured(found, spec, together, cuts).clamp(min=checked)
            is_odd = checked > explained
            if not found.batches_known:  # then no equal passes have been compared
                is_odd |= float(floor.max()) > _WORTH_TELLING * explained
            if is_odd and not found.repeats:
                found = replace(found, repeats=not self._differs_again(found, spec))
                if not found.repeats:
                    found = replace(found, draws="unseen", is_rough=True)
                    floor = floor.maximum(self._of_draws(found, spec))
        if float(floor.max()) > _WORTH_TELLING * explained:
            warn_user(self._warning(found, float(floor.max())))
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
        """The difference between values that rounding explains."""
        sizes = [own.nan_to_num(nan=0.0).abs().max() for _, _, own in self._kept.values()]
        scale = (
            1.0 if self._attr_target in ("log_prob", "contrast") else max(1.0, *map(float, sizes))
        )
        return scale * max(rounding(_DTYPES.get(found.dtype)), rounding(torch.float32))

    def _checked(self, found: Findings, spec: ValueSpec) -> float:
        """Maximum difference of values from those of passes truncated after a token."""
        checked, spent, each = 0.0, 0, self._overhead()
        for i, ids in enumerate(self._order()[:_CHECKED]):
            spent += len(ids) + each
            if i and spent > _CHECKED_SHARE * self._passes.n_positions:
                break
            values = self._in_one_batch([self._cut(ids, i, found)], spec)[0]
            apart = (values - self._kept[ids][2]).abs().nan_to_num(nan=0.0)
            checked = max(checked, float(apart.max()))
        return checked

    def _cut(self, ids: tuple[int, ...], i: int, found: Findings) -> TokenRow:
        """Rows truncated after different target tokens: the same values in other shapes."""
        number, row, _ = self._kept[ids]
        known = [place for place in row.positions if place >= 0]
        if not known:
            return row
        last = known[(number + i) % len(known)]
        # If a model sees ahead, earlier outputs depend on the last id.
        first = last if found.step_by_step else 0
        places = [place if first <= place <= last else -1 for place in row.positions]
        return replace(row, ids=row.ids[: last + 1], positions=places)

    def _differs_again(self, found: Findings, spec: ValueSpec) -> bool:
        """Whether equal passes have different values."""
        _, row, _ = self._kept[min(self._kept, key=len)]
        values = torch.stack([self._in_one_batch([row], spec)[0] for _ in range(_AGAIN)])
        return float(_ranges(values).max()) > self._explained(found)

    def _measured(self, found: Findings, spec: ValueSpec, together: bool, cuts: bool) -> Tensor:
        """The largest observed difference of each token, and what others probably show.

        Relative to how much a value can change at all, and at least the spacing of the logits.

        Args:
            found, spec, together, cuts: As for `floor`.
        """
        order = self._measurable()
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
            alone[i] = self._alone(row, found, spec)
        variants = [computed, alone]
        if together:
            some = [*short[:1], *rows[1:]]  # so that one has another length than in any batch
            batches = [some[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
            variants.append(torch.cat([self._in_one_batch(batch, spec) for batch in batches]))
        # A jump is large, and so rare that other batches may not show it. And rows that run alone
        # do not show the effect of batches.
        if (found.jumps or (found.moved is not None and not together)) and not found.couples_rows:
            variants.append(self._moved(rows, computed, found, spec))
        digit = _DIGITS * found.last_digit if isinstance(self._attr_target, str) else 0.0
        likely = max(self._likely(torch.stack(variants)), digit)
        if found.moved is not None and together and not found.couples_rows:
            likely = max(likely, self._rounded(torch.stack(variants), found, spec))
        assert self._scale is not None
        return likely * self._scale

    def _rounded(self, variants: Tensor, found: Findings, spec: ValueSpec) -> float:
        """The probable effect of 16-bit rounding, if few values differ in the ways tried; else 0.

        The ways tried then show little of other batches, above all if activations are also rounded
        to 8 bits: a last digit changes few values there, but strongly.
        """
        ratios, known = self._ratios(variants)
        if bool(known.any()) and float((ratios[known] > FINE).double().mean()) >= _FEW_DIFFER:
            return 0.0
        kept = [self._kept[ids] for ids in self._order()[:_ROUNDED_ROWS]]
        rows, own = [row for _, row, _ in kept], torch.stack([own for _, _, own in kept])
        with rounded_otherwise(self._passes.model, share=_ROUNDED_SHARE):
            if found.step_by_step:
                moved = torch.stack([self._alone(row, found, spec) for row in rows])
            else:
                moved = self._in_one_batch(rows, spec)
        ratios, known = self._ratios(torch.stack([own, moved]))
        return max(_ROUNDED_BEYOND * self._largest(ratios[known]), float(ratios.max()))

    def _moved(self, rows: list[TokenRow], own: Tensor, found: Findings, spec: ValueSpec) -> Tensor:
        """Values of some rows, like `own`, with perturbed last digits; NaN for others."""
        n = 0 if found.step_by_step else len(rows) // _ROWS_PER_ALONE
        moved = torch.full_like(own, torch.nan)
        with rounded_otherwise(self._passes.model, singles=found.jumps):
            for i, row in enumerate(rows[: max(_LEAST_ALONE, n)]):
                moved[i] = self._alone(row, found, spec)
        return moved

    def _likely(self, variants: Tensor) -> float:
        """The probable largest difference, relative to how much a value can change.

        Args:
            variants: Values ``(n_ways, n_rows, n_target)`` by several ways; complete for the first.
        """
        ratios, known = self._ratios(variants)
        # Values of one row vary together: with few rows, the variance is uncertain.
        few = 1 + _FEW / max(1, int(known.any(1).sum()))
        return few * max(self._largest(ratios[known]), _UNSEEN * float(ratios.max()))

    def _ratios(self, variants: Tensor) -> tuple[Tensor, Tensor]:
        """Differences ``(n_rows, n_target)`` over the possible change; and which are known."""
        return _ranges(variants) / self._scales(variants[0]), ~variants[1:].isnan().all(0)

    def _largest(self, ratios: Tensor) -> float:
        """The probable maximum over all values' differences, from some of them."""
        if not len(ratios):
            return 0.0
        assert self._scale is not None
        # The maximum of n normal numbers is about this many standard deviations.
        usual = float(ratios.square().mean().sqrt())
        return math.sqrt(2 * math.log(2 * self._n * len(self._scale) + 1)) * usual

    def _of_draws(self, found: Findings, spec: ValueSpec) -> Tensor:
        """The floor of a model that draws at random: from repeated passes over the same rows."""
        kept = [self._kept[ids] for ids in self._order()[:_DRAWN_ROWS]]
        rows, own = [row for _, row, _ in kept], torch.stack([own for _, _, own in kept])
        each = len(spec) if found.step_by_step else 1
        n = max(_LEAST_DRAWN, _DRAWN_PASSES // (each * len(rows)))
        seed, again = self._passes.seed, list[Tensor]()
        try:
            for number in range(1, n + 1):
                self._passes.seed = None if seed is None else seed + number
                again.append(torch.stack([self._alone(row, found, spec) for row in rows]))
        finally:
            self._passes.seed = seed
        apart = _ranges(torch.stack([own, *again]))
        # A skipped layer changes certain tokens as much as others.
        return _DRAWN * apart.amax(0).clamp(min=float(apart.square().mean().sqrt()))

    def _measurable(self) -> list[tuple[int, ...]]:
        """Rows to recompute: as many as the run's cost allows."""
        order = self._order()
        most = max(_SHARE * self._passes.n_positions, _PASSES * self._overhead())
        n_rows = int(most) // len(order[0])  # in a batch all have equal length
        return order[: max(_LEAST_ROWS, n_rows)]

    def _overhead(self) -> int:
        return memory.overhead(self._passes.model, self._passes.device)

    def _alone(self, row: TokenRow, found: Findings, spec: ValueSpec) -> Tensor:
        """Values ``(n_target,)`` of a row alone, if need be of each token with nothing after it."""
        if not found.step_by_step:
            return self._in_one_batch([row], spec)[0]
        values = torch.full((len(spec),), torch.nan, dtype=torch.float64, device="cpu")
        for t in range(len(spec)):
            if (end := row.up_to(t)) is not None:
                values[t] = self._in_one_batch([end], spec.only([t]))[0, 0]
        return values

    def _in_one_batch(self, rows: Sequence[TokenRow], spec: ValueSpec) -> Tensor:
        """Explained values of rows computed in one batch, ``(n_rows, n_target)``."""
        return explained(self._passes.in_one_batch(rows, spec), spec, self._attr_target)

    def _scales(self, values: Tensor) -> Tensor:
        """How much values change with logits: those of certain tokens hardly do."""
        if self._attr_target == "log_prob":
            scales = -values.expm1()
        elif self._attr_target == "prob":
            scales = values * (1 - values)
        else:
            scales = torch.ones_like(values)
        return scales.nan_to_num(nan=0.0).clamp(min=_STEADY)


def _ranges(variants: Tensor) -> Tensor:
    """Differences of values ``(n_ways, n_rows, n_target)`` between all ways; NaN is ignored."""
    highest = variants.nan_to_num(nan=-torch.inf).amax(0)
    return (highest - variants.nan_to_num(nan=torch.inf).amin(0)).clamp(min=0)
