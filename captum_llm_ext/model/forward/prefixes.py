"""Rows sorted by prefix, and the lengths of common prefixes."""

from collections.abc import Sequence
from itertools import pairwise
from struct import Struct

import torch
from torch import Tensor

# Rows in order, and the length of each one's common prefix with the previous one.
_Rows = tuple[list[int], list[int]]


def sort_by_prefix(
    rows: Sequence[Sequence[int]], shareable: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The rows' order by content, and the prefix length that each may share with the previous one.

    Args:
        rows: Token ids.
        shareable: Per row how many of its first ids may be shared. Zeros: the order is unchanged.
    """
    if not any(shareable):
        return list(range(len(rows))), [0] * len(rows)
    keys = [_key(row) for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    shared = [0]
    for before, after in pairwise(order):
        most = min(shareable[before], shareable[after])
        shared.append(_common(keys[before], keys[after], most))
    return order, shared


def heavy_paths_first(order: Sequence[int], shared: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sorted rows in another order: where rows part, the branch with most rows comes first.

    Equally much is shared. But the parts that a row shares with earlier ones form few contiguous
    ranges, at most one more than the logarithm of their number: the largest branches are the heavy
    paths of the tree of rows (Sleator and Tarjan, A data structure for dynamic trees, 1983, section
    4).

    Args:
        order, shared: As from `sort_by_prefix`.

    Returns:
        The same for the new order.
    """
    if not order:
        return [], []
    # Branching points on the way to the latest row: the depth, and the branches before its own.
    way: list[tuple[int, list[_Rows]]] = []
    latest: _Rows = ([order[0]], [0])
    for row, depth in zip(order[1:], shared[1:], strict=True):
        while way and way[-1][0] > depth:
            above, branches = way.pop()
            latest = _joined([*branches, latest], above)
        if not way or way[-1][0] < depth:
            way.append((depth, []))
        way[-1][1].append(latest)
        latest = ([row], [depth])
    while way:
        depth, branches = way.pop()
        latest = _joined([*branches, latest], depth)
    latest[1][0] = 0
    return latest


def shared_prefix_lengths(rows: Sequence[Sequence[int]]) -> list[int]:
    """Length of each row's common prefix with the previous one; 0 for the first."""
    keys = [_key(row) for row in rows]
    return [0, *(_common(one, other, len(one)) for one, other in pairwise(keys))][: len(rows)]


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix of two id sequences."""
    return _common(_key(one), _key(other), len(one))


def distinct_pairs(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct pairs of numbers.

    Encoded as single numbers, they sort ten times as fast as columns of a matrix.

    Args:
        one, other: int64 ``(n,)``, 0 or more; the product of their maxima must fit.

    Returns:
        The pairs, int64 ``(2, n_distinct)``, sorted; and the index of each given pair among them.
    """
    size = int(other.max()) + 1 if len(other) else 1
    found, back = (one * size + other).unique(return_inverse=True)
    return torch.stack([found // size, found % size]), back


def _joined(branches: list[_Rows], depth: int) -> _Rows:
    """The rows of all branches, those of the largest first."""
    most = max(branches, key=lambda branch: len(branch[0]))
    for branch in branches:
        if branch is not most:
            branch[1][0] = depth
            most[0].extend(branch[0])
            most[1].extend(branch[1])
    return most


def _key(row: Sequence[int]) -> bytes:
    # As bytes, rows are compared by the C library.
    return Struct(f">{len(row)}q").pack(*row)


def _common(one: bytes, other: bytes, most: int) -> int:
    """Length of the common prefix in ids of 8 bytes each, at most `most`, by bisection."""
    low, high = 0, min(len(one) // 8, len(other) // 8, most)
    while low < high:
        middle = (low + high + 1) // 2
        if one[8 * low : 8 * middle] == other[8 * low : 8 * middle]:
            low = middle
        else:
            high = middle - 1
    return low
