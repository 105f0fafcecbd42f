"""Which rows run together, and what they share: pure functions of token ids.

Rows that begin alike form a tree. Every branch of it that pays is run once, alone, and the
model's state is then copied for the rows that go on from there. What pays is counted in token
positions; a pass costs some on top, however short it is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from captum_llm_ext.model.forward.packing import packs
from captum_llm_ext.model.forward.prefixes import heavy_paths_first, sort_by_prefix

MostRows = Callable[[int, int], int]
Cut = Callable[[Sequence[int], int], tuple[tuple[int, ...], ...]]
# A tree is searched for what pays in time that grows with its size squared.
_ROWS_PER_TREE = 512
# Recurrent models read a single token on by other code than several, and not always to the same
# result: no stretch is shorter than this.
_SHORTEST = 2


@dataclass(frozen=True, slots=True)
class Branch:
    """A stretch of ids that its rows have in common, and how they go on.

    Attributes:
        start: The number of ids that come before: those of the branch this one grows from.
        stop: The number of ids that all of `rows` share. The stretch in between is run once.
        rows: Indices of the rows.
        batches: Indices of those that are run to their ends from here, one pass for each batch; the
            longest row first.
        branches: The other ones share more: the branches that grow from here.
        own: Where rows of a batch are packed (see `packing`), of each how many of its ids no row
            before it in the batch has. None: batches are padded.
        chained: Whether a pack goes on from the last row of the one before it: what `own` leaves
            out of its first row has been read there.
        begun: Where rows of packs begin with more or less of the `stop` ids that come before: with
            how many, of each row. None: with all of them.
    """

    start: int
    stop: int
    rows: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]
    branches: tuple["Branch", ...] = ()
    own: Mapping[int, int] | None = None
    chained: bool = False
    begun: Sequence[int] | None = None

    def walk(self) -> Iterator["Branch"]:
        """This branch and all that grow from it."""
        todo: list[Branch] = [self]
        while todo:
            branch = todo.pop()
            todo.extend(branch.branches)
            yield branch

    def positions(self, lengths: Sequence[int]) -> int:
        """Number of token positions that running all of it computes, padding included.

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
        """Number of token positions that one of the batches computes."""
        if self.own is not None:
            return sum(self.own[row] for row in batch)
        return len(batch) * (lengths[batch[0]] - self.stop)

    def read_before(self, batch: Sequence[int], lengths: Sequence[int]) -> int:
        """Number of ids of its rows that one of the batches goes on from."""
        if self.own is None or not self.chained:
            return self.stop
        return lengths[batch[0]] - self.own[batch[0]]

    @property
    def is_each_alone(self) -> bool:
        """Whether every row has a pass of its own, from its first id on."""
        return not (self.stop or self.branches or any(len(batch) > 1 for batch in self.batches))

    def n_passes(self) -> int:
        """Number of passes that running all of it takes."""
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
    """Cuts rows into batches that share their beginnings where that pays.

    Args:
        rows: Token ids.
        shareable: Per row how many of its first ids may be shared, at least two fewer than it has.
            Zeros: nothing is shared, and rows of similar length form batches.
        overhead: What a pass costs beside its positions, in positions.
        most_padding: So many positions at most are padding in a batch.
        most_rows: Called with the length of the longest row of a batch and the number of ids before
            it; returns how many rows it may have.
        head: So many ids, the same for all rows, are there already.
        most_head: So many ids at most are in the stretch of the branch returned.

    Returns:
        The branch that all others grow from. Its stretch, after `head`, is what all rows share.
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
    """Cuts rows into packs: no id is computed twice in one.

    Args:
        rows: Token ids.
        overhead: What a pass costs beside its positions, in positions.
        most_ids: So many ids in a pack, unless a single row has more.
        most_rows: So many rows at most in a pack.
        head: So many ids, the same for all rows, are there already.
        most_head: So many ids at most are read before the packs: nothing is asked about them.
        chained: Whether packs may go on from the last row of the one before: then what comes
            before `most_head` is computed once for all.
    """
    order, shared = heavy_paths_first(*sort_by_prefix(rows, [len(row) for row in rows]))
    most_shared = most_head if chained else 0
    stop = _whole_steps(
        min([*(len(row) - _SHORTEST for row in rows), *shared[1:], most_head]), head
    )
    batches, own = packs(rows, order, shared, max(stop, head), most_ids, most_rows, most_shared)
    # A head that is read on its own spares all packs but one from reading it; in a chain, it spares
    # those of the next rows.
    if stop > head and (len(batches) - 1) * (stop - head) <= overhead:
        stop = head
        batches, own = packs(rows, order, shared, stop, most_ids, most_rows, most_shared)
    return Branch(head, stop, tuple(order), tuple(batches), own=own, chained=chained)


def plan_forked(
    rows: Sequence[Sequence[int]],
    begun: Sequence[int],
    n_read: int,
    *,
    most_ids: int,
    most_rows: int,
) -> Branch:
    """Cuts rows into packs that go on from ids read before, each from wherever it parts from them.

    Args:
        rows: Token ids.
        begun: With how many of the ids read before each row begins.
        n_read: How many of these there are.
        most_ids, most_rows: As for `plan_packed`.
    """
    order, shared = heavy_paths_first(*sort_by_prefix(rows, [len(row) for row in rows]))
    batches, own = packs(rows, order, shared, 0, most_ids, most_rows, begun=begun)
    return Branch(n_read, n_read, tuple(order), tuple(batches), own=own, begun=tuple(begun))


def distinct_positions(rows: Sequence[Sequence[int]]) -> int:
    """Number of positions that a perfect tree would compute: no beginning twice, no padding."""
    order, shared = sort_by_prefix(rows, [len(row) for row in rows])
    return sum(len(rows[i]) for i in order) - sum(shared)


def _whole_steps(depth: int, start: int) -> int:
    """A place not after `depth`, and a multiple of the shortest stretch after `start`."""
    return start + max(0, depth - start) // _SHORTEST * _SHORTEST


@dataclass(slots=True)
class _Node:
    """A place where rows part.

    Attributes:
        depth: Number of ids before it.
        parent: The place before it.
        leaves: The rows whose next place is their end.
        children: The places after it.
        n_rows: Number of rows after it that are not after a marked place after it.
        n_marked: Number of marked places after it that are after no other one.
        marked: Whether its state is worth having.
    """

    depth: int
    parent: "_Node | None" = None
    leaves: list[int] = field(default_factory=list[int])
    children: list["_Node"] = field(default_factory=list["_Node"])
    n_rows: int = 0
    n_marked: int = 0
    marked: bool = False


def _tree(order: Sequence[int], shared: Sequence[int], start: int) -> _Node:
    """The tree of sorted rows from what each has in common with the one before it."""
    root = _Node(start)
    path = [root]
    for place, row in enumerate(order):
        depth = _whole_steps(shared[place], start) if place else start
        last: _Node | None = None
        while path[-1].depth > depth:
            last = path.pop()
        if path[-1].depth < depth:
            node = _Node(depth)
            if last is None:  # the row before ends at the place above: it comes down to this one
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
    """The node and all after it up to marked ones, parents first."""
    found = [node]
    for one in found:  # grows while it is read
        found += [child for child in one.children if not child.marked]
    return found


def _mark(root: _Node, overhead: int) -> None:
    """Marks the places whose state is worth having, the most rewarding first."""
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
    """Positions saved by running what leads from one place to another once.

    The rows and marked places beyond need it no more; it is run itself; and there is one pass more
    for it, and one for the rows that no longer share a batch with others.
    """
    return (node.n_rows + node.n_marked - 1) * (node.depth - above.depth) - 2 * overhead


def _grow(root: _Node, start: int, cut: Cut) -> Branch:
    """The branch of a marked place."""
    ends: list[int] = []
    marked: list[_Node] = []
    for node in _below(root):
        ends += node.leaves
        marked += [child for child in node.children if child.marked]
    branches = [_grow(node, root.depth, cut) for node in marked]
    # The state need not be copied for the last branch: best for the one that others grow from.
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
    # The longest first: what does not fit in memory fails at once.
    queue = sorted(rows, key=lambda row: -lengths[row])
    batches: list[tuple[int, ...]] = []
    while queue:
        longest = lengths[queue[0]]
        most = most_rows(longest, depth)
        most = -(-len(queue) // -(-len(queue) // most))  # all about the same size
        size, padding = 0, 0
        for row in queue[:most]:
            padding += longest - lengths[row]
            if padding > most_padding:
                break
            size += 1
        batches.append(tuple(queue[:size]))
        queue = queue[size:]
    return tuple(batches)
