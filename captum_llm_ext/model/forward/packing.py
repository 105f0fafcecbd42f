"""Packing of rows in one sequence: each row without the prefix it shares with others.

A model whose tokens interact in attention alone, and whose positions come from ``position_ids``,
then reads no token twice: `attention.packed_attention` lets every token see those of its own row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_llm_ext.model.forward.prefixes import shared_prefix_lengths

# Number of last ids by which a row differs from another in tests, where its tokens are read again.
# Chosen, not measured.
LAST = 8
# Position ranges: first those read before the pack, then the pack itself.
Stretch = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """The end of a row that no row before it has.

    Attributes:
        start: Position at which it begins.
        stop: Position at which it ends.
        depth: Number of ids of the row before it.
        path: Positions of these.
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
        depths: Number of ids before each in its row.
        segments: The segments, which tile the pack.
        places: Positions of every row's ids, int64 ``(n_ids,)``. The pack's own come after those
            read before.
        n_read: Number of ids read before.
    """

    ids: tuple[int, ...]
    depths: tuple[int, ...]
    segments: tuple[Segment, ...]
    places: tuple[Tensor, ...]
    n_read: int


def pack(
    rows: Sequence[Sequence[int]], n_read: int = 0, n_reused: Sequence[int] | None = None
) -> Pack:
    """Packs rows; each shares its common prefix with the previous one.

    Args:
        rows: Token ids, preferably sorted by prefix.
        n_read: Number of ids read before.
        n_reused: Per row, how many of its first ids may be taken from these. None: they all
            belong to the first row.
    """
    ids: list[int] = []
    depths: list[int] = []
    segments: list[Segment] = []
    places: list[Tensor] = []
    path: tuple[Stretch, ...] = ((0, n_read),)
    _, *shared = shared_prefix_lengths(rows)
    n_of_read = n_read if n_reused is None else 0
    for i, (row, alike) in enumerate(zip(rows, [n_of_read, *shared], strict=True)):
        depth, n_of_read, is_fork = _parting(
            alike, n_of_read, None if n_reused is None else n_reused[i]
        )
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
    """A row that parts from another one, with its tokens at some positions once more.

    Each of these is the end of a separate row: its prefix is that of the row, but what follows it
    in the pack differs, except by chance, from what follows it in the row, in content and in
    length.

    Args:
        row: Token ids.
        other: Alternative ids for the row's last ones, at most as many, with a different first one.
        places: Positions in the row, sorted.
        is_read: Whether the row has been read before, so that little of it is in the pack.

    Returns:
        The pack; positions in the row; and their positions in the pack, in order.
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
    """Positions from last to first, some repeated, for `pack_again`."""
    order: list[int] = []
    for place in reversed(places):
        after = row[order[-1] + 1 : order[-1] + 2] if order else ()
        if after and after[0] == row[place]:
            order += [p for p in places if row[p] != after[0]][:1]
        order.append(place)
    # In the pack, a token is followed by as many tokens as in the row at one position at most.
    more = next(
        n
        for n in (0, 1, 2, 3, 4, 5)
        if (len(places) - 1 - n) % 2 and (n_before + len(order) + n - len(row)) % 3
    )
    return order + [places[0]] * more


def ends(pack: Pack, needed: Tensor) -> tuple[Segment, ...]:
    """For every segment, the part from the first to the last needed position.

    Args:
        pack: The rows.
        needed: Sorted positions, none of them read before the pack.
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


def split_into_packs(
    rows: Sequence[Sequence[int]],
    order: Sequence[int],
    shared: Sequence[int],
    start: int,
    most_ids: int,
    most_rows: int,
    most_shared: int = 0,
    n_reused: Sequence[int] | None = None,
) -> tuple[list[tuple[int, ...]], dict[int, int]]:
    """Splits rows into packs.

    Args:
        rows: Token ids.
        order: Indices of the rows, sorted by prefix.
        shared: Length of the prefix that each of these shares with the previous one.
        start: Number of common ids read before.
        n_reused: How many of them each row may take, if these differ.
        most_ids: Maximum number of ids in a pack, unless a single row has more.
        most_rows: Maximum number of rows in a pack.
        most_shared: Maximum number of first ids that a pack takes from the last row of the previous
            pack.

    Returns:
        Indices of the rows of each pack, and how many ids of each row are its own there.
    """
    found: list[list[int]] = []
    own: dict[int, int] = {}
    n_ids = n_of_read = 0
    for i, alike in zip(order, shared, strict=True):
        depth, n_there, _ = _parting(
            max(alike, start), n_of_read, None if n_reused is None else n_reused[i]
        )
        more = len(rows[i]) - depth
        if not found or n_ids + more > most_ids or len(found[-1]) == most_rows:
            found.append([])
            n_there = max(start, min(alike, most_shared)) if n_reused is None else n_reused[i]
            n_ids, more = 0, len(rows[i]) - n_there
        n_of_read = n_there
        found[-1].append(i)
        own[i] = more
        n_ids += more
    return [tuple(one) for one in found], own


def _parting(alike: int, n_of_read: int, n_own: int | None) -> tuple[int, int, bool]:
    """Where a row of a pack parts from the previous one, or from what was read before.

    Args:
        alike: Length of its common prefix with the previous row.
        n_of_read: Number of ids that the previous row takes from those read before.
        n_own: How many it may take itself. None: as many as the previous one.

    Returns:
        How many ids it takes in total, how many of these from those read before, and whether it
        takes none from the previous row.
    """
    if n_own is not None and (n_own > alike or min(n_of_read, alike) > n_own):
        return n_own, n_own, True
    return alike, min(n_of_read, alike), False


def _first(path: Sequence[Stretch], n: int) -> tuple[Stretch, ...]:
    """The first `n` positions of a path."""
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
