"""`findings`: what a model does, probed once for a model in one state."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from captum_llm_ext import _compat
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.probe.findings import Findings, Packing
from captum_llm_ext.model.probe.probing import ComparePacked, Probe
from captum_llm_ext.model.probe.state import State, differences, state_of

# Kinds of drawing, in order of decreasing knowledge.
_HOW = (None, "seeded", "free", "unseen")


@dataclass
class _Known:
    """Findings on a model, its state, and the part of the state that its own passes change."""

    state: State
    passing: frozenset[tuple[Any, ...]]
    found: Findings


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def findings(
    model: nn.Module,
    rows: Sequence[TokenRow],
    extras: Mapping[str, Any] | None = None,
    compare_packed: ComparePacked | None = None,
) -> Findings:
    """What a model does on rows like these.

    The probe takes about the time of ten rows, and of five more if packs are not used, once for a
    model in one state; again for longer or shorter rows than before, and then up to half as long
    again, or down to half as long.

    Args:
        model: The model, in evaluation mode and without gradients.
        rows: The rows of the run, of which the longest and the shortest are probed.
        extras: Other arguments of its forward, batch size 1, on its device; rows are then probed
            one by one.
        compare_packed: Compares a row in a pack with the row alone, if packs may be used.

    Raises:
        TypeError: If the model does not run on token ids alone, or returns no logits of a
            vocabulary for each.
        ValueError: If its logits cannot be distinguished from others that it returns.
    """
    lengths = [len(row.ids) for row in rows]
    known = _known.get(model)
    # Processes that hold a model together must all probe, or none; extras belong to one prompt.
    keeps = not extras and not _compat.model_ranks(model)
    before = state_of(model) if keeps else {}
    same = keeps and known is not None and not differences(known.state, before) - known.passing
    earlier = known.found if same and known is not None else None
    if earlier is not None and earlier.covers(min(lengths), max(lengths), packs=compare_packed):
        return earlier
    if earlier is not None:
        rows = [*rows, *_beyond(model, rows, earlier, compare_packed)]
    found = Probe(model, rows, dict(extras or {}), compare_packed, earlier).findings()
    if keeps:
        after = state_of(model)
        if earlier is not None:
            found = _both(earlier, found)
        _known[model] = _Known(after, frozenset(differences(before, after)), found)
    return found


def _beyond(
    model: nn.Module, rows: Sequence[TokenRow], earlier: Findings, packs: ComparePacked | None
) -> Iterator[TokenRow]:
    """Rows longer and shorter than those of a run, if these are longer or shorter than before.

    Attributed texts grow: a probe at each length would cost more.
    """
    longest, shortest = max(rows, key=_length), min(rows, key=_length)
    n = len(longest.ids)
    is_news = n > max(earlier.longest, earlier.packed)
    if is_news or (packs is not None and not earlier.packs_known(n)):
        is_long = n > earlier.longest
        most = (_compat.longest_sequence(model) or 2 * n) if is_long else earlier.longest
        ids = (*longest.ids, *longest.ids[-(n // 2) :])[: max(n, most)]
        yield TokenRow(ids, (*longest.positions, *range(n, len(ids))))
    if earlier.batches_known and len(shortest.ids) < earlier.shortest:
        yield TokenRow(shortest.ids[: (len(shortest.ids) + 1) // 2], (0,))


def _length(row: TokenRow) -> int:
    return len(row.ids)


def record_findings(model: nn.Module, found: Findings) -> None:
    """Stores what a run has shown of a model beyond its probe."""
    known = _known.get(model)
    if known is not None:
        known.found = _both(known.found, found)


def _both(one: Findings, other: Findings) -> Findings:
    """The combined findings on two sets of rows."""
    ahead = [x.ahead for x in (one, other) if x.ahead is not None]
    coupling = [x.coupling for x in (one, other) if x.coupling is not None]
    return replace(
        other,
        shortest=min(one.shortest, other.shortest),
        longest=max(one.longest, other.longest),
        packed=max(one.packed, other.packed),
        sees_ahead=one.sees_ahead or other.sees_ahead,
        couples_rows=one.couples_rows or other.couples_rows,
        mixes_lengths=one.mixes_lengths or other.mixes_lengths,
        ahead=max(ahead, default=None),
        coupling=max(coupling, default=None),
        rounding=max(one.rounding, other.rounding),
        draws=max(one.draws, other.draws, key=_HOW.index),
        repeats=one.repeats or other.repeats,
        is_rough=one.is_rough or other.is_rough,
        packing=_packing_of_both(one.packing, other.packing),
    )


def _packing_of_both(one: Packing | None, other: Packing | None) -> Packing | None:
    return other if one is None else one if other is None else one.joined(other)
