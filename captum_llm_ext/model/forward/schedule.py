"""Plans which rows run together, and which prefixes they share: pure functions of token ids.

Rows with common prefixes form a tree. Every branch that pays is run once, and the prefix cache is
then copied for the rows that continue from there. Costs are counted in token positions; a pass has
a fixed cost in addition.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from captum_llm_ext.model.forward.packing import split_into_packs
from captum_llm_ext.model.forward.prefixes import heavy_paths_first, sort_by_prefix

MostRows = Callable[[int, int], int]
Cut = Callable[[Sequence[int], int], tuple[tuple[int, ...], ...]]
# The search of a tree takes time that grows with the square of its size. Chosen, not measured.
_ROWS_PER_TREE = 512
# Recurrent models process a single token by other code than several, sometimes with another result:
# no part is shorter than this.
_SHORTEST = 2


@dataclass(frozen=True, slots=True)
class Branch:
    """A part of ids that its rows have in common, and how they continue.

    Attributes:
        start: Number of ids before: those of the parent branch.
        stop: Number of ids that all of `rows` share. The part in between is run once.
        rows: Indices of the rows.
        batches: Indices of rows that are run to their ends from here, one pass per batch; the
            longest row first.
        branches: Child branches, whose rows share more.
        own: If rows of a batch are packed (see `packing`), per row the number of ids not shared
            with earlier rows of the batch. None: batches are padded.
        chained: Whether a pack continues from the last row of the previous one, which has the ids
            missing in `own` of its first row.
        n_reused: If rows of packs begin with different numbers of the `stop` ids before: the number
            for each row. None: with all of them.
    """

    start: int
    stop: int
    rows: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]
    branches: tuple["Branch", ...] = ()
    own: Mapping[int, int] | None = None
    chained: bool = False
    n_reused: Sequence[int] | None = None

    def walk(self) -> Iterator["Branch"]:
        """This branch and all its descendants."""
        todo: list[Branch] = [self]
        while todo:
            branch = todo.pop()
            todo.extend(branch.branches)
            yield branch

    def positions(self, lengths: Sequence[int]) -> int:
        """Number of token positions computed by all of it, including padding.

        Args:
            lengths: Number of ids of every row.
        """
        return sum(
            branch.stop
            - branch.start
            + sum(branch.positions_of(batch, lengths) for batch in branch.batches)
            for branch in self.walk()
        )

    def positions_of(self, batch: Sequence[int], lengths: Sequence[int]) -> int:
        """Number of token positions computed by one of the batches."""
        if self.own is not None:
            return sum(self.own[row] for row in batch)
        return len(batch) * (lengths[batch[0]] - self.stop)

    def read_before(self, batch: Sequence[int], lengths: Sequence[int]) -> int:
        """Number of ids in the prefix cache that one of the batches uses."""
        if self.own is None or not self.chained:
            return self.stop
        return lengths[batch[0]] - self.own[batch[0]]

    @property
    def is_each_alone(self) -> bool:
        """Whether every row has its own pass over all its ids."""
        return not (self.stop or self.branches or any(len(batch) > 1 for batch in self.batches))

    def n_passes(self) -> int:
        """Number of passes of all of it."""
        return sum(len(one.batches) + (one.stop > one.start) for one in self.walk())


def plan(
    rows: Sequence[Sequence[int]],
    shareable: Sequence[int],
    *,
    overhead: int,
    most_padding: int,
    most_rows: MostRows,
    head: int = 0,
    most_head: int = 0,
) -> Branch:
    """Splits rows into batches that share prefixes if that pays.

    Args:
        rows: Token ids.
        shareable: Per row how many of its first ids may be shared, at least two fewer than it has.
            Zeros: nothing is shared, and rows of similar length form batches.
        overhead: Fixed cost of a pass, in positions.
        most_padding: Maximum number of padding positions in a batch.
        most_rows: Called with the length of the longest row of a batch and the number of ids before
            it; returns how many rows it may have.
        head: Number of first ids, equal for all rows, that are already in the cache.
        most_head: Maximum number of ids in the root's own part.

    Returns:
        The root branch. Its own part, after `head`, is shared by all rows.
    """
    order, shared = sort_by_prefix(rows, shareable)
    stop = _whole_steps(min([*shared[1:], most_head]), head)
    if (len(rows) - 1) * (stop - head) <= 2 * overhead:
        stop = head
    lengths = [len(row) for row in rows]

    def cut(ends: Sequence[int], depth: int) -> tuple[tuple[int, ...], ...]:
        return _batches(ends, lengths, depth, most_padding, most_rows)

    batches: list[tuple[int, ...]] = []
    branches: list[Branch] = []
    step = _ROWS_PER_TREE if any(shared) else len(rows)
    for begin in range(0, len(rows), step):
        tree = _tree(order[begin : begin + step], shared[begin : begin + step], stop)
        _mark(tree, overhead)
        grown = _grow(tree, stop, cut)
        batches += grown.batches
        branches += grown.branches
    return Branch(head, stop, tuple(order), tuple(batches), tuple(branches))


def plan_packed(
    rows: Sequence[Sequence[int]],
    *,
    overhead: int,
    most_ids: int,
    most_rows: int,
    head: int = 0,
    most_head: int = 0,
    chained: bool = False,
) -> Branch:
    """Splits rows into packs, in each of which no id is computed twice.

    Args:
        rows: Token ids.
        overhead: Fixed cost of a pass, in positions.
        most_ids: Maximum number of ids in a pack, unless a single row has more.
        most_rows: Maximum number of rows in a pack.
        head: Number of first ids, equal for all rows, that are already in the cache.
        most_head: Maximum number of ids read before the packs, without requests.
        chained: Whether packs may continue from the last row of the previous one: ids before
            `most_head` are then computed once.
    """
    order, shared = heavy_paths_first(*sort_by_prefix(rows, [len(row) for row in rows]))
    most_shared = most_head if chained else 0
    stop = _whole_steps(
        min([*(len(row) - _SHORTEST for row in rows), *shared[1:], most_head]), head
    )
    batches, own = split_into_packs(
        rows, order, shared, max(stop, head), most_ids, most_rows, most_shared
    )
    # A head that is read separately saves all packs but one from reading it; in a chain, it saves
    # those of the next rows.
    if stop > head and (len(batches) - 1) * (stop - head) <= overhead:
        stop = head
        batches, own = split_into_packs(rows, order, shared, stop, most_ids, most_rows, most_shared)
    return Branch(head, stop, tuple(order), tuple(batches), own=own, chained=chained)


def plan_forked(
    rows: Sequence[Sequence[int]],
    n_reused: Sequence[int],
    n_read: int,
    *,
    most_ids: int,
    most_rows: int,
) -> Branch:
    """Splits rows into packs that continue from ids read before, each from its own position.

    Args:
        rows: Token ids.
        n_reused: Number of ids read before with which each row begins.
        n_read: Number of ids read before.
        most_ids, most_rows: As for `plan_packed`.
    """
    order, shared = heavy_paths_first(*sort_by_prefix(rows, [len(row) for row in rows]))
    batches, own = split_into_packs(rows, order, shared, 0, most_ids, most_rows, n_reused=n_reused)
    return Branch(n_read, n_read, tuple(order), tuple(batches), own=own, n_reused=tuple(n_reused))


def distinct_positions(rows: Sequence[Sequence[int]]) -> int:
    """Number of positions that a perfect tree computes: no prefix twice, no padding."""
    order, shared = sort_by_prefix(rows, [len(row) for row in rows])
    return sum(len(rows[i]) for i in order) - sum(shared)


def _whole_steps(depth: int, start: int) -> int:
    """A position not after `depth`, and a multiple of the shortest part after `start`."""
    return start + max(0, depth - start) // _SHORTEST * _SHORTEST


@dataclass(slots=True)
class _Node:
    """A position where rows part.

    Attributes:
        depth: Number of ids before it.
        parent: The previous node.
        leaves: The rows that do not part again.
        children: The next nodes.
        n_rows: Number of rows below it that are not below a marked node below it.
        n_marked: Number of marked nodes below it without another in between.
        marked: Whether its prefix cache pays.
    """

    depth: int
    parent: "_Node | None" = None
    leaves: list[int] = field(default_factory=list[int])
    children: list["_Node"] = field(default_factory=list["_Node"])
    n_rows: int = 0
    n_marked: int = 0
    marked: bool = False


def _tree(order: Sequence[int], shared: Sequence[int], start: int) -> _Node:
    """The tree of sorted rows from the lengths of their common prefixes."""
    root = _Node(start)
    path = [root]
    for place, row in enumerate(order):
        depth = _whole_steps(shared[place], start) if place else start
        last: _Node | None = None
        while path[-1].depth > depth:
            last = path.pop()
        if path[-1].depth < depth:
            node = _Node(depth)
            # The previous row ends at the node above: it is moved down to this one.
            if last is None:
                node.leaves.append(path[-1].leaves.pop())
            else:
                path[-1].children.remove(last)
                node.children.append(last)
            path[-1].children.append(node)
            path.append(node)
        path[-1].leaves.append(row)
    for node in reversed(_below(root)):
        node.n_rows = len(node.leaves) + sum(child.n_rows for child in node.children)
        for child in node.children:
            child.parent = node
    return root


def _below(node: _Node) -> list[_Node]:
    """The node and all below it up to marked ones, parents first."""
    found = [node]
    for one in found:  # extended during the loop
        found += [child for child in one.children if not child.marked]
    return found


def _mark(root: _Node, overhead: int) -> None:
    """Marks the nodes whose prefix cache pays, the most profitable first."""
    todo = [root]
    while todo:
        above = todo.pop()
        while True:
            inside = _below(above)
            best = max(inside, key=lambda node: _gain(node, above, overhead))
            if _gain(best, above, overhead) <= 0:
                break
            best.marked = True
            n_rows, n_marked = best.n_rows, best.n_marked - 1
            node = best
            while node is not above and node.parent is not None:
                node = node.parent
                node.n_rows -= n_rows
                node.n_marked -= n_marked
            todo.append(best)


def _gain(node: _Node, above: _Node, overhead: int) -> int:
    """Positions saved by running the part between two nodes once.

    The rows and marked nodes below no longer need it; it is run itself; and there is one more pass
    for it, and one for the rows that no longer share a batch with others.
    """
    return (node.n_rows + node.n_marked - 1) * (node.depth - above.depth) - 2 * overhead


def _grow(root: _Node, start: int, cut: Cut) -> Branch:
    """The branch of a marked node."""
    ends: list[int] = []
    marked: list[_Node] = []
    for node in _below(root):
        ends += node.leaves
        marked += [child for child in node.children if child.marked]
    branches = [_grow(node, root.depth, cut) for node in marked]
    # The last branch needs no copy of the cache: best for the one with most children.
    branches.sort(key=lambda branch: len(branch.rows))
    rows = (*ends, *(row for branch in branches for row in branch.rows))
    return Branch(start, root.depth, rows, cut(ends, root.depth), tuple(branches))


def _batches(
    rows: Sequence[int],
    lengths: Sequence[int],
    depth: int,
    most_padding: int,
    most_rows: MostRows,
) -> tuple[tuple[int, ...], ...]:
    """Rows in batches of similar length."""
    # The longest first: running out of memory then shows immediately.
    queue = sorted(rows, key=lambda row: -lengths[row])
    batches: list[tuple[int, ...]] = []
    while queue:
        longest = lengths[queue[0]]
        most = most_rows(longest, depth)
        most = -(-len(queue) // -(-len(queue) // most))  # all of about the same size
        size, padding = 0, 0
        for row in queue[:most]:
            padding += longest - lengths[row]
            if padding > most_padding:
                break
            size += 1
        batches.append(tuple(queue[:size]))
        queue = queue[size:]
    return tuple(batches)
