"""Runs the model: on whole rows, or on what follows ids that it has read before."""

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
from captum_llm_ext.model.forward.asked import Asked
from captum_llm_ext.model.forward.draws import drawn_again
from captum_llm_ext.model.forward.lm_head import HeadOutput, LMHead
from captum_llm_ext.model.forward.logits import AttrTarget, called_values
from captum_llm_ext.model.forward.packing import LAST, Pack, pack, pack_again
from captum_llm_ext.model.forward.prefix_cache import cache_part, copied_cache, shared_cache
from captum_llm_ext.model.forward.rounding import Apart, reason_against, rounded_otherwise
from captum_llm_ext.model.forward.rows import TokenRow, padded
from captum_llm_ext.model.forward.schedule import Branch
from captum_llm_ext.model.forward.swallowed import is_no_answer

# How rows are given what they share: as copies or as it is ("share"), whichever costs less.
Sharing = Literal["auto", "copy", "share"]
# What is done to the model in a pass over these rows.
Around = Callable[[Sequence[TokenRow]], AbstractContextManager[Any]]

_logger = logging.getLogger(__name__)
# Tokens that the rows of a pass must be spared a copy of for sharing to pay: it takes more
# operations, each of them on less.
_WORTH_SHARING = 4096
# A batch of so many rows is thought of before it is known.
_ROWS_IN_MIND = 16


@dataclass(frozen=True)
class _Queries:
    """Rows and what they are asked.

    Attributes:
        rows: Token rows.
        asked: The target tokens.
        positions: Where each row says them, int64 ``(n_rows, n_target)``; -1 where it does not.
    """

    rows: Sequence[TokenRow]
    asked: Asked
    positions: Tensor

    @staticmethod
    def of(rows: Sequence[TokenRow], asked: Asked) -> "_Queries":
        positions = [list(row.positions) for row in rows]
        return _Queries(rows, asked, torch.tensor(positions, dtype=torch.int64, device="cpu"))

    def some(self, indices: Sequence[int]) -> tuple[list[TokenRow], Tensor]:
        """Some of the rows, and their positions."""
        index = torch.tensor(indices, dtype=torch.int64, device="cpu")
        return [self.rows[i] for i in indices], self.positions[index]


class Passes:
    """Forward passes of one model. Rows are padded on the right, without an attention mask: a
    causal model cannot see what comes after, and its positions then need no telling.

    Args:
        model: The model, in evaluation mode and without gradients whenever it is called.
        attr_target: As for `Scorer`.
        device: Where the model reads its ids.
        sharing: How rows are given the state that they share.
        around: Entered for every pass over whole rows, with these.

    Attributes:
        shares_cache: Whether a comparison has shown that states can be shared.
        chains: Whether the latest comparison of packs saw a state that packs can hand on.
        kept: How many logits the model can be asked for, as `_compat.kept_logits` says.
        n_positions: Number of token positions computed up to now, padding included.
        n_rows: Number of rows of the latest pass, come what came of it.
        moved: How far other last digits have moved what the model says; None: not known.
        seed: What passes draw at random is drawn from it and from their ids; None: as ever.
        state_bytes: What the model remembers of one position, where it has been seen.
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
        self.moved: Apart | None = None
        self.seed: int | None = None
        self.state_bytes: int | None = None
        self._arguments = _compat.forward_arguments(model)
        self._state = _compat.state_argument(model)

    @property
    def spares_ends(self) -> bool:
        """Whether tokens are left out at the model's first and last layer in packs."""
        return self._ends_of_model is not None

    def use_packing(self, chains: bool, spares_ends: bool) -> None:
        """Takes over what another comparison of packs has shown of this model."""
        self.chains = chains
        if not spares_ends:
            self._ends_of_model = None

    @property
    def makes_logits(self) -> bool:
        """Whether logits are there in a pass, as far as is known."""
        return self._head.makes_logits

    def spared_in_packs(self, n_positions: int, n_said: int) -> int:
        """What packs leave out at the ends of the model (see `edges`), in positions.

        Most of the last layer is left out for tokens that nobody asks about, and the beginning of
        the first one for those that others stand for: about a layer in all.

        Args:
            n_positions: Number of positions that the packs have.
            n_said: Number of those that are asked about.
        """
        layers = _compat.number_of_layers(self.model)
        if self._ends_of_model is None or not layers or 2 * n_said >= n_positions:
            return 0
        return (n_positions - n_said) // layers

    def run(
        self,
        root: Branch,
        rows: Sequence[TokenRow],
        asked: Asked,
        state: Any = None,
        on_head: Callable[[Any], None] | None = None,
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Runs the branches of a plan.

        Args:
            root: The plan.
            rows: The rows that it was made for.
            asked: What they are asked.
            state: The model's state after the ids before the root. It is left as it is.
            on_head: Given the state after the root's own stretch, which is then left as it is.

        Yields:
            Indices of rows and their values ``(n_indices, per_token * n_target)``, batch by batch.
        """
        queries = _Queries.of(rows, asked)
        values = asked.blank(len(rows))
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
            # The last branch may change the state: no other comes after it.
            todo += [
                (grown, state, grown is branch.branches[-1] and branch is not root)
                for grown in reversed(branch.branches)
            ]

    def state_after(self, ids: Sequence[int]) -> Any:
        """The model's state after ids, each of which it keeps apart."""
        row = torch.tensor([ids], dtype=torch.int64, device="cpu")
        last = torch.tensor([[len(ids) - 1]], dtype=torch.int64, device="cpu")
        return self._pass(row, last, keeps_state=True)[1]

    def together(self, rows: Sequence[TokenRow], asked: Asked) -> Tensor:
        """Values ``(n_rows, per_token * n_target)`` of whole rows in one batch."""
        every = tuple(range(len(rows)))
        [(_, values)] = self.run(Branch(0, 0, every, (every,)), rows, asked)
        return values

    def _batches(
        self, branch: Branch, queries: _Queries, state: Any
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Values of the ends of rows in padded batches; NaN at places before the ends."""
        for batch in branch.batches:
            rows, positions = queries.some(batch)
            at = positions - branch.stop
            yield batch, self._ends(rows, at, branch.stop, queries.asked, state)

    def _packs(
        self, branch: Branch, queries: _Queries, state: Any
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """As `_batches`, from sequences in which no id comes twice."""
        lengths = [len(row.ids) for row in queries.rows]
        last: _LastRow | None = None
        for batch in branch.batches:
            if last is None:
                n_read, before = branch.stop, state
            else:
                n_read = branch.read_before(batch, lengths)
                before = last.after(n_read)
                last = None  # not both states at a time
            rows, positions = queries.some(batch)
            begun = None if branch.begun is None else [branch.begun[i] for i in batch]
            packed = pack([row.ids for row in rows], n_read, begun)
            found, read = self._packed(packed, positions, queries.asked, before)
            last = _LastRow(read, packed.places[-1]) if branch.chained else None
            del read, before
            yield batch, found

    def _stretch(self, branch: Branch, queries: _Queries, state: Any, values: Tensor) -> Any:
        """Reads what rows share; the values that are said there are put into `values`."""
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
        said, state = self._pass(ids, at[None], state=state, keeps_state=True)
        if len(needed) and queries.asked.callable_of(self.attr_target) is None:
            index = torch.tensor(branch.rows, dtype=torch.int64, device="cpu")[which]
            found = queries.asked.values(said, back, tokens, self.attr_target)
            values[index, :, tokens] = found
        return state

    def _ends(
        self, rows: Sequence[TokenRow], at: Tensor, start: int, asked: Asked, state: Any
    ) -> Tensor:
        """Values ``(n_rows, per_token, n_target)`` of rows read from `start` on.

        They are NaN where `at` is below 0.
        """
        ids = padded([row.ids[start:] for row in rows])
        arguments = self.extras(rows[0], ids.shape[1] - len(rows[0].ids) + start)
        call = asked.callable_of(self.attr_target)
        columns = (at >= 0).any(0)
        places = (at[:, columns] if call is None else at).clamp(min=0)
        said = None
        if self.shares_cache and state is not None and start * len(rows) >= self._least:
            try:
                said = self._read_on(ids, places, state, shares_cache=True, extras=arguments)
            except NotImplementedError as failure:  # what the comparison did not meet
                self._stop_sharing(failure)
        if said is None:
            with nullcontext() if self._around is None else self._around(rows):
                said = self._read_on(ids, places, state, shares_cache=False, extras=arguments)
        if call is not None:
            values = called_values(said.logits(), asked.target, call)[:, None]
        else:
            values = asked.blank(len(rows))
            tokens = columns.nonzero()[:, 0].repeat(len(rows))
            where = torch.arange(len(tokens), device="cpu")
            found = asked.values(said, where, tokens, self.attr_target)
            values[:, :, columns] = found.view(*places.shape, -1).transpose(1, 2)
        return values.masked_fill(at[:, None] < 0, torch.nan)

    def _packed(
        self, packed: Pack, positions: Tensor, asked: Asked, state: Any
    ) -> tuple[Tensor, Any]:
        """Values ``(n_rows, per_token, n_target)`` of rows in one sequence, and the state after it.

        They are NaN at positions that were read before.
        """
        places = pad_sequence(list(packed.places), batch_first=True)
        where = places.gather(1, positions.clamp(min=0))
        said = (positions >= 0) & (where >= packed.n_read)
        which, tokens = said.nonzero(as_tuple=True)
        needed, back = where[said].unique(return_inverse=True)
        answer, state = self._read_pack(packed, needed, state)
        if (call := asked.callable_of(self.attr_target)) is not None:
            index = torch.zeros(said.shape, dtype=torch.int64, device="cpu")
            index[said] = back
            logits = answer.logits()[0]
            values = called_values(logits[index.to(logits.device)], asked.target, call)
            return values.masked_fill(~said, torch.nan)[:, None], state
        values = asked.blank(len(said))
        values[which, :, tokens] = asked.values(answer, back, tokens, self.attr_target)
        return values, state

    def _read_pack(
        self, packed: Pack, needed: Tensor, state: Any, *, cuts: bool = False
    ) -> tuple[HeadOutput, Any]:
        """What is said ``(1, n)`` at places of a pack, and the state after it.

        Args:
            packed: The rows.
            needed: The places, none of them read before.
            state: The model's state after the ids read before.
            cuts: Whether tokens are left out at the ends of the model even if that does not pay.

        Raises:
            NotImplementedError: If the model does not attend in a way that is known.
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
                keeps_state=True,  # with an empty state, nobody looks for where sequences begin
                extras={"position_ids": depths[None].to(self.device)},
                n_rows=len(packed.places),
            )
        if not packing.is_through():
            raise NotImplementedError(f"{packing.n_attended} layers attend")
        return answer, state

    def _read_on(
        self,
        ids: Tensor,
        at: Tensor,
        state: Any,
        *,
        shares_cache: bool,
        extras: Mapping[str, Any] | None = None,
    ) -> HeadOutput:
        """What rows say that begin with what a state of one row has read, if any."""
        if state is None or not shares_cache:
            return self._pass(ids, at, state=copied_cache(state, len(ids)), extras=extras)[0]
        borrowed, shared = shared_cache(state, len(ids))
        with attention.merged_attention(self.model):
            said, _ = self._pass(ids, at, state=borrowed, extras=extras)
        if not all(one.was_used for one in shared):
            raise NotImplementedError("attention that does not see what is shared")
        return said

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
        """What is said at places ``at (batch, n)`` of ``ids (batch, length)``; the state after.

        It is good until the next pass.
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
        # A callable of the user's may keep what it is given.
        head = self._head.watched() if isinstance(self.attr_target, str) else nullcontext()
        with head, drawn_again(self.seed, ids):
            output = _compat.called(self.model, given, **arguments)
        self.n_positions += ids.numel()
        said = self._head.said(_compat.sequence_logits(output))
        if self.kept != "positions":
            said = said.at(at - (ids.shape[1] - said.vectors.shape[1]))
        return said, getattr(output, self._state, None) if self._state else None

    def check_ids(self, ids: Tensor) -> None:
        """Raises a ValueError if an id is none of the model's."""
        size = _compat.vocabulary_size(self.model)
        low, high = int(ids.min()), int(ids.max())
        if size is not None and not 0 <= low <= high < size:
            raise ValueError(
                f"a row holds token id {low if low < 0 else high}, outside the model's vocabulary "
                f"of {size} tokens: check the baselines, and that tokenizer and model belong "
                "together."
            )

    def extras(self, row: TokenRow, padding: int) -> dict[str, Any]:
        """The row's other arguments; those with one entry per token are made as long as its ids."""
        arguments: dict[str, Any] = {}
        for name, value in (row.extras or {}).items():
            if isinstance(value, Tensor):
                value = value.to(self.device)
                if name.endswith("token_type_ids"):
                    short = len(row.ids) + padding - value.shape[-1]
                    value = nn.functional.pad(value, (0, short))
            arguments[name] = value
        return arguments

    def reads_packed(
        self, row: Sequence[int], places: Sequence[int] = ()
    ) -> tuple[Callable[[], float], Tensor]:
        """How much distributions of next tokens change when a row is read in a pack.

        There it parts from another one, which goes on after a different id: what is to be seen
        differs, whatever tokens themselves have in common. And its tokens at the places given are
        read again, each as the end of a row (see `pack_again`): a model that says the same there
        does not see what comes after them. Where the state is one that packs go on from, they go
        on from that after the whole row.

        Args:
            row: Token ids, at least two.
            places: Of the row, sorted.

        Returns:
            What the pack shows when it is called, as `reads_on`; it raises a NotImplementedError if
            the model does not attend in a way that is known. And the logits of the row alone at
            these places, ``(1, n, vocabulary)``.
        """
        first = max(1, len(row) - LAST)
        other = [_unlike(row, row[first]), *row[first + 1 : first + LAST // 2]]
        every = sorted({*places, first, min(first + len(other), len(row)) - 1, len(row) - 1})
        at = torch.tensor(every, dtype=torch.int64, device="cpu")
        said, state = self._pass(
            torch.tensor([row], dtype=torch.int64, device="cpu"), at[None], keeps_state=True
        )
        alone = said.logits().clone()
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
                except Exception as failure:  # whatever a model does: there is a way without
                    if is_no_answer(failure):
                        raise
                self._ends_of_model = None
            return once()

        here = torch.tensor([every.index(p) for p in places], dtype=torch.int64, device="cpu")
        return error, alone[:, here.to(alone.device)]

    def reads_on(self, row: Sequence[int], other: Sequence[int], shared: int) -> float:
        """How much distributions of next tokens change when rows are read on from a state.

        The shared beginning is read in two stretches, then both rows from copies of the state, the
        other one padded. What the model says in each is held against a pass of its own.

        Args:
            row: Token ids.
            other: Token ids; a row not longer than the first.
            shared: Number of ids that both begin with, fewer than either has.

        Returns:
            Largest difference between log-probabilities over what rounding explains: reading on
            is right up to 1.
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
        # The first that has nothing but the state before it, and the last.
        at = torch.tensor([[0, len(end) - 1] for end in ends], dtype=torch.int64, device="cpu")
        alone = self._alone((row, other), at + shared)

        def error(*, shares_cache: bool) -> float:
            found = self._read_on(padded(ends), at, state, shares_cache=shares_cache)
            return self._error(found.logits().clone(), alone, (row, other), at + shared)

        copied = error(shares_cache=False)
        if copied <= 1 and self.shares_cache is not False and shared * _ROWS_IN_MIND >= self._least:
            self.shares_cache = self._can_share(error)
        return copied

    def _alone(self, rows: Sequence[Sequence[int]], at: Tensor) -> Tensor:
        """Logits ``(n_rows, n, vocabulary)`` at places ``(n_rows, n)``, of a pass for each row."""
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
        """How far logits are from those of rows alone, over what rounding explains."""
        apart = Apart.between(found, alone)
        error = apart.over(found.dtype)
        is_fine = alone.dtype.itemsize > 2 and not _compat.half_precision(self.model)
        if error <= 1 or is_fine:
            return error
        if self.moved is not None and apart.beyond(self.moved) <= 1:
            return apart.beyond(self.moved)
        with rounded_otherwise(self.model):
            otherwise = self._alone(rows, at)
        return min(error, apart.beyond(Apart.between(otherwise, alone)))

    def _can_share(self, error: Callable[..., float]) -> bool:
        """Whether rows read on rightly from a state that they have no copies of."""
        reason = reason_against(partial(error, shares_cache=True))
        if reason is not None:
            self._stop_sharing(reason)
        return reason is None

    def _stop_sharing(self, reason: object) -> None:
        self.shares_cache = False
        _logger.info(
            "%s is given copies of what rows share (%s).", type(self.model).__name__, reason
        )


@dataclass(frozen=True)
class _LastRow:
    """The row that was read last.

    Attributes:
        state: The model's state after it, and after others.
        places: Where its ids are in the state.
    """

    state: Any
    places: Tensor

    def after(self, n: int) -> Any:
        """The state after its first `n` ids."""
        return cache_part(self.state, self.places[:n])


def _unlike(row: Sequence[int], one: int) -> int:
    """Another id than that given."""
    return next((i for i in row if i != one), int(one == 0))
