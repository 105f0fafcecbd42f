"""`Batching`: which rows run together, and whether common prefixes are read once.

Rows run separately, in padded batches; from a prefix cache; or packed in one sequence. The cheapest
way is used, the latter two after a comparison on rows of the run has shown equal values.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from captum_llm_ext import _compat
from captum_llm_ext.model.forward import memory
from captum_llm_ext.model.forward.memory import Memory
from captum_llm_ext.model.forward.passes import Passes
from captum_llm_ext.model.forward.prefixes import common_length
from captum_llm_ext.model.forward.rounding import LogProbDifference
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.forward.schedule import Branch, plan, plan_forked, plan_packed
from captum_llm_ext.model.forward.value_spec import ValueSpec
from captum_llm_ext.model.probe import ComparePacked, Findings, Packing
from captum_llm_ext.model.probe.reuse import packing_of, why_no_prefix_reuse

Reuse = Literal["auto", "off", "copy", "share", "pack"]

_logger = logging.getLogger(__name__)
# Maximum number of rows read twice: by themselves, and from a prefix cache or in a pack. Chosen,
# not measured.
_COMPARISON = 4
# With several processes there are this many batches, as long as a pass's fixed cost stays below one
# in this many of its positions. Chosen, not measured.
_BATCHES = 32
_WORTH_A_PASS = 50  # passes of more positions, in fixed costs, gain little; chosen, not measured


class Batching:
    """Plans the passes of one model, by cost and by what has been verified.

    Args:
        passes: Forward passes of the model.
        max_rows: As for `Scorer`.
        reuse: As for `Scorer`.
        overhead: As for `Scorer`.
        shares_work: Whether several processes share the batches.

    Attributes:
        max_rows: Maximum number of rows per batch.
        overhead: Fixed cost of a pass, in positions.
        repeats: Whether batches must equal those of other processes or of an earlier run, so that
            they may not depend on later findings.
        budget: Bytes a batch may take; None: from the free memory at planning.
    """

    def __init__(
        self,
        passes: Passes,
        *,
        max_rows: int | None,
        reuse: Reuse,
        overhead: int | None,
        shares_work: bool,
    ) -> None:
        model, device = passes.model, passes.device
        self._passes = passes
        self.max_rows = max_rows or sys.maxsize
        self.overhead = memory.overhead(model, device) if overhead is None else overhead
        self._row_overhead = memory.start(model, device) if overhead is None else overhead
        self.repeats = self._shares_work = shares_work
        self.budget: int | None = None
        self._always_packs = reuse == "pack"
        self._reuse = reuse != "off" and _compat.state_argument(model) is not None
        self._compared = 0  # length up to which prefix caches have been verified
        self._packing: Packing | None = None
        self._has_packed = False
        # Rows of a pack attend one by one, which leaves a GPU idle.
        self._packs = reuse == "pack" or (reuse == "auto" and device.type == "cpu")
        self._head: tuple[tuple[int, ...], Any] = ((), None)
        self._text: tuple[tuple[int, ...], Any] = ((), None)
        self._even = False

    @property
    def uses_packing(self) -> bool:
        """Whether rows have been packed in one sequence."""
        return self._has_packed

    def provenance(self) -> dict[str, bool | None]:
        """The provenance of batching; None for unknown entries."""
        return {
            "reuses_beginnings": (
                self._compared > 0 if self._compared or not self._reuse else None
            ),
            "shares_beginnings": self._passes.shares_cache,
            "packs_rows": True if self._has_packed else None,
        }

    def apply_findings(self, found: Findings) -> None:
        """Applies the probe's findings."""
        self._even = found.even
        if found.apart:
            self.max_rows = 1
            self._reuse = self._packs = False
        packing = found.packing
        if packing is None or packing == self._packing or not self._packs:
            return
        self._packing = packing
        if packing.reason is None:
            self._passes.use_packing(packing.chains, packing.spares_ends)
            return
        self._packs = False
        name = type(self._passes.model).__name__
        _logger.info("%s gets separate rows (%s).", name, packing.reason)

    @property
    def compare_packed(self) -> ComparePacked | None:
        """Compares a row in a pack with the row alone; None without packing."""
        return self._compare_packed if self._packs and self._reuse else None

    def expect(self, ids: Sequence[int]) -> None:
        """See `Scorer.expect`."""
        if self._text[0] != tuple(ids):
            self._text = (tuple(ids), None)

    def plan(self, rows: Sequence[TokenRow], spec: ValueSpec) -> Branch:
        """Plans how rows are run.

        Args:
            rows: Distinct token rows.
            spec: Their request.

        Raises:
            RuntimeError: If even the smallest initial comparison runs out of memory.
        """
        while True:
            try:
                return self._cheapest(rows, spec)
            except RuntimeError as error:
                if not memory.is_out_of_memory(error) or not self.back_off(self._passes.n_rows):
                    raise

    def read_common_prefix(
        self, root: Branch, rows: Sequence[TokenRow], spec: ValueSpec
    ) -> tuple[Branch, Any]:
        """Reads the common prefix of all rows of a plan, once on every process.

        Returns:
            The plan of the rest, and the prefix cache; None if there is no prefix.
        """
        if root.n_reused is not None:
            ids, state = self._text
            if state is None:
                self._text = ids, (state := self._passes.state_after(ids))
            return root, state
        state = self._head[1] if root.start else None
        if root.stop == root.start:
            return root, state

        def keep(state: Any) -> None:
            self._head = (rows[0].ids[: root.stop], state)

        head = replace(root, batches=(), branches=())
        for _ in self._passes.run(head, rows, spec, state, keep):
            pass
        return replace(root, start=root.stop), self._head[1]

    def mixes_positions(self, longest: int) -> bool:
        """Whether the meaning of positions depends on the other rows of a batch."""
        return self._even or longest > (_compat.fixed_positions(self._passes.model) or sys.maxsize)

    def back_off(self, n_rows: int) -> bool:
        """Reduces memory of further passes after one of `n_rows` failed; whether it could."""
        self._head, self._text = ((), None), ((), None)
        if n_rows > 1:
            self.max_rows = n_rows // 2
        elif self._reuse:
            self._reuse = False
        else:
            return False
        return True

    def _cheapest(self, rows: Sequence[TokenRow], spec: ValueSpec) -> Branch:
        """The cheapest way that is known to be correct."""
        apart = self._cut(rows, spec, shares=False)
        if not self._reuse or any(row.extras is not None for row in rows):
            return apart
        together = self._cut(rows, spec, shares=True)
        if (packed := self._plan_packed(rows, spec, apart, together)) is not None:
            return packed
        lengths = [len(row.ids) for row in rows]
        saved = apart.positions(lengths) - together.positions(lengths)
        longest = max(
            (lengths[b[0]] for branch in together.walk() if branch.stop for b in branch.batches),
            default=0,
        )
        if longest <= self._compared:
            return together if saved > 0 else apart
        if saved <= _COMPARISON * longest or not self._compare(rows, together):
            return apart
        self._compared = longest
        return self._cut(rows, spec, shares=True)  # now that the size of a cache is known

    def _plan_packed(
        self, rows: Sequence[TokenRow], spec: ValueSpec, apart: Branch, together: Branch
    ) -> Branch | None:
        """Packs, if they are cheaper than the other ways and known to be correct."""
        longest = max(len(row.ids) for row in rows)
        is_known = self._packing is not None and longest <= self._packing.longest
        if not self._packs or not is_known or self.mixes_positions(longest):
            return None
        lengths = [len(row.ids) for row in rows]
        first = min(row.first for row in rows)
        head = len(self._head[0]) if self._begin_with_cached_prefix(rows, first) else 0
        # In a pack, logits are only at requested positions; for a callable, at every token.
        n_queried = [sum(place >= 0 for place in row.positions) for row in rows]
        is_called = spec.callable_of(self._passes.attr_target) is not None
        fits = self._memory(len(spec) if is_called else max(1, *n_queried))
        most_ids, most_rows = fits.most_packed(longest, head)

        root = plan_packed(
            [row.ids for row in rows],
            overhead=self.overhead,
            most_ids=most_ids,
            most_rows=min(most_rows, self._most_rows(len(rows), longest)),
            head=head,
            most_head=first,
            # Packs that are run on other processes, or were run earlier, must not depend on each
            # other.
            chained=self._passes.chains and not self.repeats,
        )

        def cost(one: Branch) -> int:
            return one.positions(lengths) + one.n_passes() * self.overhead

        if self._text[0] and self._passes.chains and not self.repeats:
            forked = self._plan_forked(rows, longest, most_rows)
            root = min(root, forked, key=cost)
        if self._always_packs:
            pays = root.positions(lengths) < apart.positions(lengths)
        else:
            here = cost(root) + len(rows) * self._row_overhead
            here -= self._passes.spared_in_packs(root.positions(lengths), sum(n_queried))
            comparison = _COMPARISON * longest if longest > self._compared else 0
            pays = here < min(cost(apart), cost(together) + comparison)
        if not pays:
            return None
        self._has_packed = True
        return root

    def _plan_forked(self, rows: Sequence[TokenRow], longest: int, most_rows: int) -> Branch:
        """Packs that continue from the expected text, each from where it parts from it."""
        text = self._text[0]
        n_reused = [min(common_length(row.ids, text), row.first, len(row.ids) - 1) for row in rows]
        most_ids, _ = self._memory(1).most_packed(longest, len(text))
        return plan_forked(
            [row.ids for row in rows], n_reused, len(text), most_ids=most_ids, most_rows=most_rows
        )

    def _cut(self, rows: Sequence[TokenRow], spec: ValueSpec, *, shares: bool) -> Branch:
        fits = self._memory(len(spec))
        longest = max(len(row.ids) for row in rows)
        # Pixel values and the like belong to one prompt each.
        has_extras = any(row.extras is not None for row in rows)
        most = 1 if has_extras else self._most_rows(len(rows), longest)
        even = self.mixes_positions(longest)
        first = min(row.first for row in rows)
        # A callable takes the logits of all target tokens at once.
        whole = spec.callable_of(self._passes.attr_target) is not None
        shareable = [min(len(row.ids) - 2, row.first if whole else sys.maxsize) for row in rows]
        usable = (
            shares and not even and self._begin_with_cached_prefix(rows, min(first, *shareable))
        )
        return plan(
            [row.ids for row in rows],
            shareable if shares and not even else [0] * len(rows),
            overhead=self.overhead,
            most_padding=0 if even else self.overhead,
            most_rows=lambda longest, before: min(most, fits.most_rows(longest, before)),
            head=len(self._head[0]) if usable else 0,
            most_head=first,
        )

    def _memory(self, n_target: int) -> Memory:
        return Memory(
            self._passes.model,
            self._passes.device,
            kept=self._passes.kept,
            n_target=n_target,
            state_bytes=self._passes.state_bytes,
            budget=self.budget,
            shares_cache=bool(self._passes.shares_cache),
            # Later findings must not change batches with which an earlier run may have begun.
            makes_logits=self._passes.makes_logits or self.repeats,
        )

    def _most_rows(self, n_rows: int, longest: int) -> int:
        """How many rows may run together, regardless of memory."""
        if not self._shares_work:
            return self.max_rows
        # By the rows alone, not by the number of processes, so that values are equal.
        worth = _WORTH_A_PASS * self.overhead // longest
        return min(self.max_rows, max(-(-n_rows // _BATCHES), worth, 1))

    def _begin_with_cached_prefix(self, rows: Sequence[TokenRow], most: int) -> bool:
        """Whether all rows begin with the cached text, within what may be shared."""
        head = self._head[0]
        return len(head) <= most and all(row.ids[: len(head)] == head for row in rows)

    def _compare_packed(
        self,
        row: Sequence[int],
        places: Sequence[int],
        kept: str | None,
        moved: LogProbDifference | None,
    ) -> tuple[Packing | None, Tensor | None]:
        self._passes.kept, self._passes.moved = kept, moved
        n_before = self._passes.n_positions
        try:
            return packing_of(self._passes, row, places)
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
        finally:
            # The probe's positions are not counted: a later run may reuse its findings.
            self._passes.n_positions = n_before
        self._packs = False  # which says nothing about the model
        return None, None

    def _compare(self, rows: Sequence[TokenRow], root: Branch) -> bool:
        """Whether values from a prefix cache equal those of whole rows."""
        reason = why_no_prefix_reuse(self._passes, rows, root)
        if reason is not None:
            _logger.warning(
                "%s computes every row on its own, beginnings are not reused (%s).",
                type(self._passes.model).__name__,
                reason,
            )
            self._reuse = False
        return self._reuse
