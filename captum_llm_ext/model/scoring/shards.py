"""Which process does which part of a plan: pure functions of its branches.

Batches are those of the plan, whoever runs them, so values do not depend on the number of
processes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from captum_llm_ext.model.forward.schedule import Branch

Batch = tuple[int, ...]


def shards(root: Branch, lengths: Sequence[int], n: int, *, overhead: int) -> list[Branch]:
    """Splits a plan into parts that processes take one by one.

    Neighbours stay together, since they share prefixes. Parts become smaller: large ones at first
    save repeated prefixes, small ones at the end balance the load.

    Args:
        root: The plan; its own part belongs to all parts.
        lengths: Number of ids of every row.
        n: Number of replicas that work at the same time.
        overhead: Fixed cost of a pass, in positions.

    Returns:
        Plans with the same branches and batches, each batch in one of them.
    """
    batches = list(_batches(root))
    if n == 1 or len(batches) < 2:
        return [root] if batches else []
    costs = [branch.positions_of(b, lengths) + overhead for branch, b in batches]
    share_of: dict[int, int] = {}
    rest, spent, part, size = sum(costs), 0, 0, sum(costs) / (2 * n)
    for (_, batch), cost in zip(batches, costs, strict=True):
        if spent and spent + cost / 2 > size:
            part, rest, spent = part + 1, rest - spent, 0
            size = rest / (2 * n)
        share_of[batch[0]] = part
        spent += cost
    return [_kept(root, _only(share_of, number)) for number in range(part + 1)]


def without(root: Branch, rows: set[int]) -> Branch:
    """The plan without rows that need not be run."""
    return _kept(root, lambda batch: tuple(row for row in batch if row not in rows))


def _batches(branch: Branch) -> Iterator[tuple[Branch, Batch]]:
    """Batches with their branches, in running order."""
    todo = [branch]
    while todo:
        one = todo.pop()
        for batch in one.batches:
            yield one, batch
        todo += reversed(one.branches)


def _only(share_of: dict[int, int], number: int) -> Callable[[Batch], Batch]:
    return lambda batch: batch if share_of[batch[0]] == number else ()


def _kept(branch: Branch, keep: Callable[[Batch], Batch]) -> Branch:
    """The branch with the kept batches, without branches that lead to none.

    The rows listed in branches remain complete: what a shared part computes must not depend on who
    computes it.
    """
    batches = tuple(kept for batch in branch.batches if (kept := keep(batch)))
    grown = (_kept(one, keep) for one in branch.branches)
    branches = tuple(one for one in grown if one.batches or one.branches)
    return replace(branch, batches=batches, branches=branches)
