"""Rows in one sequence: of each there is only what follows its beginning in common with others.

A model whose tokens meet in attention alone, and know their place from ``position_ids``, is then
given no token twice: `attention.packed` lets every token see those that it follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_llm_ext.model.forward.prefixes import shared_prefix_lengths

# So many ids of a row part from another's where its tokens are read again.
LAST = 8
# From place to place: first those that were read before the pack, then the pack itself.
Stretch = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """The end of a row that no row before it has.

    Attributes:
        start: The place where it begins.
        stop: The place where it ends.
        depth: Number of ids of the row that come before it.
        path: Where these are.
    """

    start: int
    stop: int
    depth: int
    path: tuple[Stretch, ...]


@dataclass(frozen=True)
class Pack:
    """Rows as one sequence.

    Attributes:
        ids: Token ids.
        depths: Number of ids that each follows in its row.
        segments: What they belong to; they tile the pack.
        places: Of every row, where its ids are: int64, ``(n_ids,)``. The pack's own come after
            those read before it.
        n_read: The number of these.
    """

    ids: tuple[int, ...]
    depths: tuple[int, ...]
    segments: tuple[Segment, ...]
    places: tuple[Tensor, ...]
    n_read: int


def pack(
    rows: Sequence[Sequence[int]], n_read: int = 0, begun: Sequence[int] | None = None
) -> Pack:
    """Packs rows; each shares what it has in common with the one before it.

    Args:
        rows: Token ids, best in the order of `sorted_rows`.
        n_read: So many ids are read before.
        begun: Of each row, how many of its first ids may be taken from these. None: all of these
            are of the first row.
    """
    ids: list[int] = []
    depths: list[int] = []
    segments: list[Segment] = []
    places: list[Tensor] = []
    path: tuple[Stretch, ...] = ((0, n_read),)
    _, *shared = shared_prefix_lengths(rows)
    n_of_read = n_read if begun is None else 0
    for i, (row, alike) in enumerate(zip(rows, [n_of_read, *shared], strict=True)):
        depth, n_of_read, is_fork = _parting(alike, n_of_read, None if begun is None else begun[i])
        path = ((0, depth),) if is_fork else _first(path, depth)
        start = n_read + len(ids)
        stop = start + len(row) - depth
        if stop > start:
            segments.append(Segment(start, stop, depth, path))
            path = _joined(path, (start, stop))
            ids += row[depth:]
            depths += range(depth, len(row))
        places.append(torch.cat([torch.arange(*stretch, device="cpu") for stretch in path]))
    return Pack(tuple(ids), tuple(depths), tuple(segments), tuple(places), n_read)


def pack_again(
    row: Sequence[int], other: Sequence[int], places: Sequence[int], *, is_read: bool
) -> tuple[Pack, list[int], list[int]]:
    """A row that parts from another one, and then its tokens at some places once more.

    Each of these is the end of a row of its own: what comes before it is where the row is, and what
    stands after it in the pack is none of what follows it in the row, but for chance, neither next
    to it nor further on, nor is there as much of it.

    Args:
        row: Token ids.
        other: Ids that go on where the row has its last ones, as many at most, the first another.
        places: Of the row, sorted.
        is_read: Whether the row has been read before; then little of it is in the pack.

    Returns:
        The pack; places of the row; and where these are in the pack, in order.
    """
    length = len(row)
    parting = length - LAST if length > LAST else 1
    n_read = length if is_read else 0
    ids: list[int] = []
    depths: list[int] = []
    segments: list[Segment] = []

    def add(some: Sequence[int], depth: int, path: Sequence[Stretch]) -> int:
        start = n_read + len(ids)
        segments.append(Segment(start, start + len(some), depth, tuple(path)))
        ids.extend(some)
        depths.extend(range(depth, depth + len(some)))
        return start

    path = [(0, parting)]
    if not is_read:
        add(row[:parting], 0, ())
    add(other, parting, path)
    own = row[parting : parting + len(other)] if is_read else row[parting:]
    start = add(own, parting, path)
    of_row, in_pack = [parting, parting + len(own) - 1], [start, start + len(own) - 1]
    path = [(0, length)] if is_read else [(0, parting), (start, start + len(own))]
    order = _backwards(row, places, n_before=len(ids))
    for place in order:
        of_row.append(place)
        in_pack.append(add(row[place : place + 1], place, _first(path, place)))
    every = torch.cat([torch.arange(*stretch, device="cpu") for stretch in path])
    return Pack(tuple(ids), tuple(depths), tuple(segments), (every,), n_read), of_row, in_pack


def _backwards(row: Sequence[int], places: Sequence[int], n_before: int) -> list[int]:
    """Places from the last to the first, some of them twice, in the manner of `pack_again`."""
    order: list[int] = []
    for place in reversed(places):
        after = row[order[-1] + 1 : order[-1] + 2] if order else ()
        if after and after[0] == row[place]:
            order += [p for p in places if row[p] != after[0]][:1]
        order.append(place)
    # As many tokens stand after one in the pack as in the row where that is even: at one at most.
    more = next(
        n
        for n in (0, 1, 2, 3, 4, 5)
        if (len(places) - 1 - n) % 2 and (n_before + len(order) + n - len(row)) % 3
    )
    return order + [places[0]] * more


def ends(pack: Pack, needed: Tensor) -> tuple[Segment, ...]:
    """Of every segment what is from the first to the last of the places needed.

    Args:
        pack: The rows.
        needed: Places, sorted, none of them read before the pack.
    """
    found: list[Segment] = []
    for one in pack.segments:
        first, after = torch.searchsorted(
            needed, torch.tensor([one.start, one.stop], dtype=torch.int64, device="cpu")
        ).tolist()
        if after > first:
            start, stop = int(needed[first]), int(needed[after - 1]) + 1
            path = _joined(one.path, (one.start, start)) if start > one.start else one.path
            found.append(Segment(start, stop, one.depth + start - one.start, path))
    return tuple(found)


def packs(
    rows: Sequence[Sequence[int]],
    order: Sequence[int],
    shared: Sequence[int],
    start: int,
    most_ids: int,
    most_rows: int,
    most_shared: int = 0,
    begun: Sequence[int] | None = None,
) -> tuple[list[tuple[int, ...]], dict[int, int]]:
    """Cuts rows into packs.

    Args:
        rows: Token ids.
        order: Indices of the rows, sorted by what they begin with.
        shared: What each of these has in common with the one before it.
        start: So many ids, which all have in common, are read before.
        begun: Where each may take another number of them: how many.
        most_ids: So many ids in a pack, unless a single row has more.
        most_rows: So many rows at most in a pack.
        most_shared: So many of its first ids at most a pack need not read again, where the last row
            of the one before it begins with them.

    Returns:
        Indices of the rows of each pack, and of each row how many of its ids are its own there.
    """
    found: list[list[int]] = []
    own: dict[int, int] = {}
    n_ids = n_of_read = 0
    for i, alike in zip(order, shared, strict=True):
        depth, n_there, _ = _parting(
            max(alike, start), n_of_read, None if begun is None else begun[i]
        )
        more = len(rows[i]) - depth
        if not found or n_ids + more > most_ids or len(found[-1]) == most_rows:
            found.append([])
            n_there = max(start, min(alike, most_shared)) if begun is None else begun[i]
            n_ids, more = 0, len(rows[i]) - n_there
        n_of_read = n_there
        found[-1].append(i)
        own[i] = more
        n_ids += more
    return [tuple(one) for one in found], own


def _parting(alike: int, n_of_read: int, n_begun: int | None) -> tuple[int, int, bool]:
    """Where a row of a pack parts from the one before it, or from what was read before the pack.

    Args:
        alike: How many ids it begins with as the row before it.
        n_of_read: How many ids that one takes from what was read before.
        n_begun: How many it may take from there itself. None: what the one before it does.

    Returns:
        How many ids it takes in all, how many of these from what was read, and whether it has none
        from the row before.
    """
    if n_begun is not None and (n_begun > alike or min(n_of_read, alike) > n_begun):
        return n_begun, n_begun, True
    return alike, min(n_of_read, alike), False


def _first(path: Sequence[Stretch], n: int) -> tuple[Stretch, ...]:
    """The first `n` places of a path."""
    found: list[Stretch] = []
    for start, stop in path:
        stop = min(stop, start + n)
        if stop > start:
            found.append((start, stop))
        n -= stop - start
    return tuple(found)


def _joined(path: Sequence[Stretch], more: Stretch) -> tuple[Stretch, ...]:
    if path and path[-1][1] == more[0]:
        return (*path[:-1], (path[-1][0], more[1]))
    return (*path, more)
