"""Stacks segments of a pack, so that few attention calls serve many of them.

Every segment has its own keys in its own order, so they are gathered; the cost grows with queries
times keys, whose padding `_FULL` limits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captum_llm_ext.model.forward.packing import Segment

# Minimum share of the queries and of the keys of a stack that is not padding, except for short
# ones. Chosen, not measured.
_FULL = 0.75
_SHORT = 8  # tokens of segments whose padding does not matter; chosen, not measured
# Maximum number of pairs of queries and keys at once: their biases, and a copy of each key, take
# memory. Chosen, not measured.
_MOST_PAIRS = 2**17
# Pairs whose visibility is computed at once. Chosen, not measured.
_MOST_PRODUCTS = 2**24


@dataclass(frozen=True)
class Stack:
    """Segments that attend in one call.

    Attributes:
        queries: Positions of their tokens in the pack, int64 ``(n_segments, length)``; shorter ones
            are padded with their last token.
        keys: Positions of all visible tokens, ``(n_segments, n_keys)``; padded with the last one,
            masked by the bias.
        own: Indices of queries that are not padding, ``(n,)``; their positions, ``(n,)``.
        bias: Added to scores: 0 or minus infinity, ``(n_segments, 1, length, n_keys)``.
    """

    queries: Tensor
    keys: Tensor
    own: tuple[Tensor, Tensor]
    bias: Tensor


def stacks(
    segments: Sequence[Segment],
    n_read: int,
    n_gone: int,
    seen: Callable[[int, int, int], Tensor],
    like: Tensor,
) -> Iterator[Stack]:
    """Stacks segments of similar shape.

    Args:
        segments: Segments of one pack.
        n_read: Number of ids that were read before the pack.
        n_gone: Number of the first of these that the cache no longer holds.
        seen: Takes a number of queries, of keys, and the depth of the first query; returns whether
            each query sees each key, bool ``(n_queries, n_keys)``. The first key is that of the
            first id in the cache.
        like: Dtype and device of biases.
    """
    for group in _groups(segments, n_gone):
        length = max(one.stop - one.start for one in group)
        n_keys = max(_n_keys(one, n_gone) for one in group)
        first = min(one.depth for one in group)
        last = max(one.depth + one.stop - one.start for one in group)
        table = torch.zeros(last - first, n_keys, dtype=like.dtype, device=like.device)
        table.masked_fill_(~seen(last - first, n_keys, first), -torch.inf)

        queries = _padded([torch.arange(one.start, one.stop, device="cpu") for one in group])
        keys = _padded([_path(one, n_gone) for one in group])
        lengths = torch.tensor([x.stop - x.start for x in group], dtype=torch.int64, device="cpu")
        depths = torch.tensor([one.depth - first for one in group], dtype=torch.int64, device="cpu")
        steps = torch.arange(length, device="cpu")
        of_table = depths[:, None] + steps.minimum(lengths[:, None] - 1)
        own = (steps < lengths[:, None]).flatten().nonzero()[:, 0]
        to = like.device
        queries -= n_read
        yield Stack(
            queries.to(to),
            keys.to(to),
            (own.to(to), queries.flatten()[own].to(to)),
            table[of_table.to(to)][:, None],
        )


def _groups(segments: Sequence[Segment], n_gone: int) -> Iterator[list[Segment]]:
    """Segments of similar length and depth."""
    classes: dict[tuple[int, int], list[Segment]] = {}
    for one in segments:
        kind = _class(one.stop - one.start), _class(_n_keys(one, n_gone))
        classes.setdefault(kind, []).append(one)
    for alike in classes.values():
        alike.sort(key=lambda one: one.depth)
        length = max(one.stop - one.start for one in alike)
        group: list[Segment] = []
        for one in alike:
            # The deepest comes last: it has the most keys, up to a few.
            n_keys = one.depth - n_gone + length
            n_pairs = (len(group) + 1) * length * n_keys
            n_products = (one.depth + length - (group or [one])[0].depth) * n_keys
            if group and (n_pairs > _MOST_PAIRS or n_products > _MOST_PRODUCTS):
                yield group
                group = []
            group.append(one)
        yield group


def _class(n: int) -> int:
    """Equal for numbers that are similar, or small."""
    return math.ceil(math.log(max(n, _SHORT)) / -math.log(_FULL))


def _n_keys(segment: Segment, n_gone: int) -> int:
    return segment.depth - n_gone + segment.stop - segment.start


def _path(segment: Segment, n_gone: int) -> Tensor:
    """Positions in the cache of what precedes a segment, and of the segment itself."""
    path = [*segment.path, (segment.start, segment.stop)]
    here = [(max(0, start - n_gone), stop - n_gone) for start, stop in path]
    return torch.cat([torch.arange(*one, device="cpu") for one in here if one[1] > one[0]])


def _padded(places: Sequence[Tensor]) -> Tensor:
    """As one tensor, padded with the last entry of each."""
    lengths = torch.tensor([len(one) for one in places], dtype=torch.int64, device="cpu")
    padded = pad_sequence(list(places), batch_first=True)
    steps = torch.arange(padded.shape[1], device="cpu")
    return padded.gather(1, steps.minimum(lengths[:, None] - 1))
