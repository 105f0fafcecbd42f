"""Runs the model on whole rows, or on the rest of rows after a prefix cache."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from captum_llm_ext import _compat
from captum_llm_ext.model.forward import attention
from captum_llm_ext.model.forward import token_wise_layers as edges
from captum_llm_ext.model.forward.draws import repeated_draws
from captum_llm_ext.model.forward.inconclusive import is_inconclusive
from captum_llm_ext.model.forward.lm_head import HeadOutput, LMHead
from captum_llm_ext.model.forward.logits import AttrTarget, called_values
from captum_llm_ext.model.forward.packing import LAST, Pack, pack, pack_again
from captum_llm_ext.model.forward.prefix_cache import cache_part, copied_cache, shared_cache
from captum_llm_ext.model.forward.rounding import (
    LogProbDifference,
    reason_against,
    rounded_otherwise,
)
from captum_llm_ext.model.forward.rows import TokenRow, padded
from captum_llm_ext.model.forward.schedule import Branch
from captum_llm_ext.model.forward.value_spec import ValueSpec

# How rows get the shared prefix: as copies or as it is ("share"), whichever is cheaper.
Sharing = Literal["auto", "copy", "share"]
# A context for the model in a pass over these rows.
Around = Callable[[Sequence[TokenRow]], AbstractContextManager[Any]]

_logger = logging.getLogger(__name__)
# Tokens whose copies are saved from which on sharing pays: it takes more operations, each on less.
# Chosen, not measured.
_WORTH_SHARING = 4096
# assumed number of rows in a batch before it is known; chosen, not measured
_ROWS_IN_MIND = 16


@dataclass(frozen=True)
class _Queries:
    """Rows and their requests.

    Attributes:
        rows: Token rows.
        spec: The target tokens.
        positions: Positions that predict them, int64 ``(n_rows, n_target)``; -1 if there is none.
    """

    rows: Sequence[TokenRow]
    spec: ValueSpec
    positions: Tensor

    @staticmethod
    def of(rows: Sequence[TokenRow], spec: ValueSpec) -> "_Queries":
        positions = [list(row.positions) for row in rows]
        return _Queries(rows, spec, torch.tensor(positions, dtype=torch.int64, device="cpu"))

    def some(self, indices: Sequence[int]) -> tuple[list[TokenRow], Tensor]:
        """Some of the rows, and their positions."""
        index = torch.tensor(indices, dtype=torch.int64, device="cpu")
        return [self.rows[i] for i in indices], self.positions[index]


class Passes:
    """Forward passes of one model, with rows padded on the right and without an attention mask.

    A causal model cannot see the padding, and positions follow from the order.

    Args:
        model: The model, in evaluation mode and without gradients whenever it is called.
        attr_target: As for `Scorer`.
        device: The model's input device.
        sharing: How rows get the shared prefix cache.
        around: Context of every pass over whole rows, called with these.

    Attributes:
        shares_cache: Whether a comparison has shown that caches can be shared.
        chains: Whether the latest comparison of packs showed that packs can continue from one
            another.
        kept: How logits of some positions can be requested, see `_compat.kept_logits`.
        n_positions: Number of token positions computed so far, including padding.
        n_rows: Number of rows of the latest pass, even if it failed.
        moved: How far perturbed last digits change the output; None: unknown.
        seed: Random draws of passes follow from it and the ids; None: unchanged.
        state_bytes: Bytes of prefix cache per position, once known.
    """

    def __init__(
        self,
        model: nn.Module,
        attr_target: AttrTarget,
        device: torch.device,
        sharing: Sharing = "auto",
        around: Around | None = None,
    ) -> None:
        self._around = around
        self._least = {"copy": sys.maxsize, "share": 0}.get(sharing, _WORTH_SHARING)
        self.shares_cache: bool | None = None
        self.chains = False
        self.model, self.attr_target, self.device = model, attr_target, device
        self.kept = _compat.kept_logits(model)
        self._head = LMHead(model)
        self._ends_of_model = _compat.outer_layers(model)
        self.n_positions = self.n_rows = 0
        self.moved: LogProbDifference | None = None
        self.seed: int | None = None
        self.state_bytes: int | None = None
        self._arguments = _compat.forward_arguments(model)
        self._state = _compat.state_argument(model)

    @property
    def spares_ends(self) -> bool:
        """Whether packs skip tokens at the model's first and last layer."""
        return self._ends_of_model is not None

    def use_packing(self, chains: bool, spares_ends: bool) -> None:
        """Adopts the findings of another comparison of packs for this model."""
        self.chains = chains
        if not spares_ends:
            self._ends_of_model = None

    @property
    def makes_logits(self) -> bool:
        """Whether passes materialise logits, as far as is known."""
        return self._head.makes_logits

    def spared_in_packs(self, n_positions: int, n_queried: int) -> int:
        """Positions that packs save at the ends of the model.

        Most of the last layer is skipped for tokens without a request, and the beginning of the
        first one for repeated tokens: about one layer in total.

        Args:
            n_positions: Number of positions that the packs have.
            n_queried: Number of those with a request.
        """
        layers = _compat.number_of_layers(self.model)
        if self._ends_of_model is None or not layers or 2 * n_queried >= n_positions:
            return 0
        return (n_positions - n_queried) // layers

    def run(
        self,
        root: Branch,
        rows: Sequence[TokenRow],
        spec: ValueSpec,
        state: Any = None,
        on_head: Callable[[Any], None] | None = None,
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Runs the branches of a plan.

        Args:
            root: The plan.
            rows: The planned rows.
            spec: Their request.
            state: The model's prefix cache after the ids before the root; it is not modified.
            on_head: Called with the cache after the root's own ids, which is then not modified.

        Yields:
            Indices of rows and their values ``(n_indices, per_token * n_target)``, batch by batch.
        """
        queries = _Queries.of(rows, spec)
        values = spec.blank(len(rows))
        todo = [(root, state, False)]
        while todo:
            branch, state, is_last = todo.pop()
            if branch.stop > branch.start:
                state = state if is_last else copied_cache(state)
                state = self._stretch(branch, queries, state, values)
            if branch is root and on_head is not None:
                on_head(state)
            run = self._batches if branch.own is None else self._packs
            for batch, found in run(branch, queries, state):
                index = torch.tensor(batch, dtype=torch.int64, device="cpu")
                values[index] = values[index].where(found.isnan(), found)
                is_none = queries.positions[index][:, None] < 0
                yield batch, values[index].masked_fill(is_none, torch.nan).flatten(1)
            # The last branch may modify the cache, since no other follows.
            todo += [
                (grown, state, grown is branch.branches[-1] and branch is not root)
                for grown in reversed(branch.branches)
            ]

    def state_after(self, ids: Sequence[int]) -> Any:
        """The model's prefix cache after ids, with a separate entry for each."""
        row = torch.tensor([ids], dtype=torch.int64, device="cpu")
        last = torch.tensor([[len(ids) - 1]], dtype=torch.int64, device="cpu")
        return self._pass(row, last, keeps_state=True)[1]

    def in_one_batch(self, rows: Sequence[TokenRow], spec: ValueSpec) -> Tensor:
        """Values ``(n_rows, per_token * n_target)`` of whole rows in one batch."""
        every = tuple(range(len(rows)))
        [(_, values)] = self.run(Branch(0, 0, every, (every,)), rows, spec)
        return values

    def _batches(
        self, branch: Branch, queries: _Queries, state: Any
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Values of the ends of rows in padded batches; NaN at positions before the ends."""
        for batch in branch.batches:
            rows, positions = queries.some(batch)
            at = positions - branch.stop
            yield batch, self._ends(rows, at, branch.stop, queries.spec, state)

    def _packs(
        self, branch: Branch, queries: _Queries, state: Any
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Like `_batches`, from packed sequences."""
        lengths = [len(row.ids) for row in queries.rows]
        last: _LastRow | None = None
        for batch in branch.batches:
            if last is None:
                n_read, before = branch.stop, state
            else:
                n_read = branch.read_before(batch, lengths)
                before = last.after(n_read)
                last = None  # not both caches at a time
            rows, positions = queries.some(batch)
            n_reused = None if branch.n_reused is None else [branch.n_reused[i] for i in batch]
            packed = pack([row.ids for row in rows], n_read, n_reused)
            found, read = self._packed(packed, positions, queries.spec, before)
            last = _LastRow(read, packed.places[-1]) if branch.chained else None
            del read, before
            yield batch, found

    def _stretch(self, branch: Branch, queries: _Queries, state: Any, values: Tensor) -> Any:
        """Reads a shared prefix; values predicted within are written to `values`."""
        rows, places = queries.some(branch.rows)
        inside = (places >= branch.start) & (places < branch.stop)
        which, tokens = inside.nonzero(as_tuple=True)
        needed, back = (places[which, tokens] - branch.start).unique(return_inverse=True)
        ids = torch.tensor(
            [rows[0].ids[branch.start : branch.stop]], dtype=torch.int64, device="cpu"
        )
        at = (
            needed
            if len(needed)
            else torch.tensor([ids.shape[1] - 1], dtype=torch.int64, device="cpu")
        )
        output, state = self._pass(ids, at[None], state=state, keeps_state=True)
        if len(needed) and queries.spec.callable_of(self.attr_target) is None:
            index = torch.tensor(branch.rows, dtype=torch.int64, device="cpu")[which]
            found = queries.spec.values(output, back, tokens, self.attr_target)
            values[index, :, tokens] = found
        return state

    def _ends(
        self, rows: Sequence[TokenRow], at: Tensor, start: int, spec: ValueSpec, state: Any
    ) -> Tensor:
        """Values ``(n_rows, per_token, n_target)`` of rows read from `start` on.

        NaN where `at` is below 0.
        """
        ids = padded([row.ids[start:] for row in rows])
        arguments = self.extras(rows[0], ids.shape[1] - len(rows[0].ids) + start)
        call = spec.callable_of(self.attr_target)
        columns = (at >= 0).any(0)
        places = (at[:, columns] if call is None else at).clamp(min=0)
        output = None
        if self.shares_cache and state is not None and start * len(rows) >= self._least:
            try:
                output = self._continue_from(
                    ids, places, state, shares_cache=True, extras=arguments
                )
            except NotImplementedError as failure:  # a case that the comparison did not include
                self._stop_sharing(failure)
        if output is None:
            with nullcontext() if self._around is None else self._around(rows):
                output = self._continue_from(
                    ids, places, state, shares_cache=False, extras=arguments
                )
        if call is not None:
            values = called_values(output.logits(), spec.target, call)[:, None]
        else:
            values = spec.blank(len(rows))
            tokens = columns.nonzero()[:, 0].repeat(len(rows))
            where = torch.arange(len(tokens), device="cpu")
            found = spec.values(output, where, tokens, self.attr_target)
            values[:, :, columns] = found.view(*places.shape, -1).transpose(1, 2)
        return values.masked_fill(at[:, None] < 0, torch.nan)

    def _packed(
        self, packed: Pack, positions: Tensor, spec: ValueSpec, state: Any
    ) -> tuple[Tensor, Any]:
        """Values ``(n_rows, per_token, n_target)`` of packed rows, and the cache afterwards.

        NaN at positions that were read before.
        """
        places = pad_sequence(list(packed.places), batch_first=True)
        where = places.gather(1, positions.clamp(min=0))
        predicted = (positions >= 0) & (where >= packed.n_read)
        which, tokens = predicted.nonzero(as_tuple=True)
        needed, back = where[predicted].unique(return_inverse=True)
        answer, state = self._read_pack(packed, needed, state)
        if (call := spec.callable_of(self.attr_target)) is not None:
            index = torch.zeros(predicted.shape, dtype=torch.int64, device="cpu")
            index[predicted] = back
            logits = answer.logits()[0]
            values = called_values(logits[index.to(logits.device)], spec.target, call)
            return values.masked_fill(~predicted, torch.nan)[:, None], state
        values = spec.blank(len(predicted))
        values[which, :, tokens] = spec.values(answer, back, tokens, self.attr_target)
        return values, state

    def _read_pack(
        self, packed: Pack, needed: Tensor, state: Any, *, cuts: bool = False
    ) -> tuple[HeadOutput, Any]:
        """The output ``(1, n)`` at positions of a pack, and the cache afterwards.

        Args:
            packed: The rows.
            needed: The positions, none of them read before.
            state: The model's cache after the ids read before.
            cuts: Whether to skip tokens at the ends of the model even if that does not pay.

        Raises:
            NotImplementedError: If the model's attention is not supported.
        """
        if "position_ids" not in self._arguments:
            raise NotImplementedError("no `position_ids`")
        ids, depths = (
            torch.tensor(packed.ids, dtype=torch.int64, device="cpu"),
            torch.tensor(packed.depths, dtype=torch.int64, device="cpu"),
        )
        at, length = needed - packed.n_read, len(packed.ids)
        with (
            attention.packed_attention(self.model, packed, needed) as packing,
            ExitStack() as stack,
        ):
            if self._ends_of_model is not None:
                first, last = self._ends_of_model
                for layer, (some, spread), is_time in (
                    (first, edges.representatives(ids, depths), packing.is_before),
                    (last, edges.queried(at, length), packing.is_through),
                ):
                    if cuts or 2 * len(some) < length:
                        stack.enter_context(
                            edges.computed_for_some(layer, some, spread, length, is_time)
                        )
            answer, state = self._pass(
                ids[None],
                at[None],
                state=copied_cache(state),
                keeps_state=True,  # with an empty cache, models do not infer where sequences begin
                extras={"position_ids": depths[None].to(self.device)},
                n_rows=len(packed.places),
            )
        if not packing.is_through():
            raise NotImplementedError(f"{packing.n_attended} layers attend")
        return answer, state

    def _continue_from(
        self,
        ids: Tensor,
        at: Tensor,
        state: Any,
        *,
        shares_cache: bool,
        extras: Mapping[str, Any] | None = None,
    ) -> HeadOutput:
        """The output for rows whose prefix is in the cache of one row, if any."""
        if state is None or not shares_cache:
            return self._pass(ids, at, state=copied_cache(state, len(ids)), extras=extras)[0]
        borrowed, shared = shared_cache(state, len(ids))
        with attention.merged_attention(self.model):
            logits, _ = self._pass(ids, at, state=borrowed, extras=extras)
        if not all(one.was_used for one in shared):
            raise NotImplementedError("attention that does not see the shared prefix")
        return logits

    def _pass(
        self,
        ids: Tensor,
        at: Tensor,
        *,
        state: Any = None,
        keeps_state: bool = False,
        extras: Mapping[str, Any] | None = None,
        n_rows: int | None = None,
    ) -> tuple[HeadOutput, Any]:
        """Output at positions ``at (batch, n)`` of ``ids (batch, length)``, and the new cache.

        Valid until the next pass.
        """
        self.check_ids(ids)
        self.n_rows = n_rows or len(ids)
        arguments = dict(extras or {})
        if "use_cache" in self._arguments:
            arguments["use_cache"] = keeps_state or state is not None
        if state is not None:
            arguments[self._state or ""] = state
        given = ids.to(self.device)
        arguments |= _compat.keeping_logits(self.kept, at, given)
        # A user's callable may keep its arguments.
        head = self._head.watched() if isinstance(self.attr_target, str) else nullcontext()
        with head, repeated_draws(self.seed, ids):
            output = _compat.called(self.model, given, **arguments)
        self.n_positions += ids.numel()
        head_output = self._head.output_of(_compat.sequence_logits(output))
        if self.kept != "positions":
            head_output = head_output.at(at - (ids.shape[1] - head_output.vectors.shape[1]))
        return head_output, getattr(output, self._state, None) if self._state else None

    def check_ids(self, ids: Tensor) -> None:
        """Raises a ValueError if an id is outside the model's vocabulary."""
        size = _compat.vocabulary_size(self.model)
        low, high = int(ids.min()), int(ids.max())
        if size is not None and not 0 <= low <= high < size:
            raise ValueError(
                f"a row holds token id {low if low < 0 else high}, outside the model's vocabulary "
                f"of {size} tokens: check the baselines, and that tokenizer and model belong "
                "together."
            )

    def extras(self, row: TokenRow, padding: int) -> dict[str, Any]:
        """The row's other arguments; those with one entry per token padded to the ids' length."""
        arguments: dict[str, Any] = {}
        for name, value in (row.extras or {}).items():
            if isinstance(value, Tensor):
                value = value.to(self.device)
                if name.endswith("token_type_ids"):
                    short = len(row.ids) + padding - value.shape[-1]
                    value = nn.functional.pad(value, (0, short))
            arguments[name] = value
        return arguments

    def packing_error(
        self, row: Sequence[int], places: Sequence[int] = ()
    ) -> tuple[Callable[[], float], Tensor]:
        """How much distributions of next tokens change when a row is read in a pack.

        In the pack it parts from another row, which continues with a different id. Its tokens at
        the given positions are read again, each as the end of a row (see `pack_again`): if the
        output there is the same, the model does not see what follows them. If the cache supports
        it, packs continue from the cache after the whole row.

        Args:
            row: Token ids, at least two.
            places: Positions in the row, sorted.

        Returns:
            A function that runs the pack and returns its error, as `prefix_cache_error`; it raises
            a NotImplementedError if the attention is not supported. And the logits of the row alone
            at these positions, ``(1, n, vocabulary)``.
        """
        first = max(1, len(row) - LAST)
        other = [_unlike(row, row[first]), *row[first + 1 : first + LAST // 2]]
        every = sorted({*places, first, min(first + len(other), len(row)) - 1, len(row) - 1})
        at = torch.tensor(every, dtype=torch.int64, device="cpu")
        output, state = self._pass(
            torch.tensor([row], dtype=torch.int64, device="cpu"), at[None], keeps_state=True
        )
        alone = output.logits().clone()
        self.chains = state is not None and _compat.keeps_every_id(state)
        mixes = state is not None and _compat.keeps_recurrent_states(state)
        state = copied_cache(state) if self.chains else None
        packed, of_row, in_pack = pack_again(
            row, other, [*places] or every, is_read=state is not None
        )
        needed = torch.tensor(in_pack, dtype=torch.int64, device="cpu")
        which = torch.tensor([every.index(p) for p in of_row], dtype=torch.int64, device="cpu")

        def once() -> float:
            found, _ = self._read_pack(packed, needed, state, cuts=True)
            here = which.to(alone.device)
            return self._error(found.logits().clone(), alone[:, here], [row], at[which][None])

        def error() -> float:
            if mixes:
                raise NotImplementedError("layers that mix ids otherwise than by attention")
            if self._ends_of_model is not None:
                try:
                    if (found := once()) <= 1:
                        return found
                except Exception as failure:  # models may raise anything: there is another way
                    if is_inconclusive(failure):
                        raise
                self._ends_of_model = None
            return once()

        here = torch.tensor([every.index(p) for p in places], dtype=torch.int64, device="cpu")
        return error, alone[:, here.to(alone.device)]

    def prefix_cache_error(self, row: Sequence[int], other: Sequence[int], shared: int) -> float:
        """How much distributions of next tokens change when rows continue from a prefix cache.

        The shared prefix is read in two parts, then both rows from copies of the cache, the other
        one padded. The output of each is compared with that of a separate pass.

        Args:
            row: Token ids.
            other: Token ids; a row not longer than the first.
            shared: Number of ids that both begin with, fewer than either has.

        Returns:
            Largest difference between log-probabilities relative to rounding: correct up to 1.
        """
        state: Any = None
        middle = shared // 4 * 2
        for a, b in ((0, middle), (middle, shared)):
            if b > a:
                ids = torch.tensor([row[a:b]], dtype=torch.int64, device="cpu")
                _, state = self._pass(
                    ids,
                    torch.tensor([[b - a - 1]], dtype=torch.int64, device="cpu"),
                    state=state,
                    keeps_state=True,
                )
        if state is None:
            return float("inf")
        self.state_bytes = _compat.state_bytes(state) // shared
        ends = [row[shared:], other[shared:]]
        # The first that has only the cache before it, and the last.
        at = torch.tensor([[0, len(end) - 1] for end in ends], dtype=torch.int64, device="cpu")
        alone = self._alone((row, other), at + shared)

        def error(*, shares_cache: bool) -> float:
            found = self._continue_from(padded(ends), at, state, shares_cache=shares_cache)
            return self._error(found.logits().clone(), alone, (row, other), at + shared)

        copied = error(shares_cache=False)
        if copied <= 1 and self.shares_cache is not False and shared * _ROWS_IN_MIND >= self._least:
            self.shares_cache = self._can_share(error)
        return copied

    def _alone(self, rows: Sequence[Sequence[int]], at: Tensor) -> Tensor:
        """Logits ``(n_rows, n, vocabulary)`` at positions ``(n_rows, n)``, by one pass per row."""
        found = [
            self._pass(torch.tensor([row], dtype=torch.int64, device="cpu"), places[None])[0]
            .logits()
            .clone()
            for row, places in zip(rows, at, strict=True)
        ]
        return torch.cat(found)

    def _error(
        self, found: Tensor, alone: Tensor, rows: Sequence[Sequence[int]], at: Tensor
    ) -> float:
        """Difference of logits from those of rows alone, relative to rounding."""
        difference = LogProbDifference.between(found, alone)
        error = difference.over(found.dtype)
        is_fine = alone.dtype.itemsize > 2 and not _compat.half_precision(self.model)
        if error <= 1 or is_fine:
            return error
        if self.moved is not None and difference.beyond(self.moved) <= 1:
            return difference.beyond(self.moved)
        with rounded_otherwise(self.model):
            otherwise = self._alone(rows, at)
        return min(error, difference.beyond(LogProbDifference.between(otherwise, alone)))

    def _can_share(self, error: Callable[..., float]) -> bool:
        """Whether rows give correct values from a cache without copies."""
        reason = reason_against(partial(error, shares_cache=True))
        if reason is not None:
            self._stop_sharing(reason)
        return reason is None

    def _stop_sharing(self, reason: object) -> None:
        self.shares_cache = False
        _logger.info("%s gets copies of the shared prefix (%s).", type(self.model).__name__, reason)


@dataclass(frozen=True)
class _LastRow:
    """The row that was read last.

    Attributes:
        state: The model's cache after it, and after others.
        places: Positions of its ids in the cache.
    """

    state: Any
    places: Tensor

    def after(self, n: int) -> Any:
        """The cache after its first `n` ids."""
        return cache_part(self.state, self.places[:n])


def _unlike(row: Sequence[int], one: int) -> int:
    """An id other than the given one."""
    return next((i for i in row if i != one), int(one == 0))
