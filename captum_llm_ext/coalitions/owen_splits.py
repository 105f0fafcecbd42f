"""Owen values by splitting groups: all of them, or best-first within a budget.

The gain of a group depends on its context: the features present besides it. Splitting distributes
the gain among its children, each in the contexts formed by the others (the recursion of shap's
``PartitionExplainer``). Within a budget a group is split in one context first, and in others only
if these make a difference; gains in the remaining contexts are distributed as in those.
Attributions always sum to ``full - empty``.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Scope, Solution, View, solve_views, views
from captum_llm_ext.coalitions.clustered_errors import normal_scale
from captum_llm_ext.coalitions.owen_orders import Tree, children_of, leaves, pruned
from captum_llm_ext.coalitions.plans import Plan

# The remaining splits are chosen in this many rounds: large enough for batches, yet nearly best
# first. Chosen, not measured.
_PARTS_OF_BUDGET = 16


class Unresolved(NamedTuple):
    """A group that was never split: its total is shared equally.

    Attributes:
        columns: Columns of its features.
        totals: Gain of the group, ``(n_target,)``.
    """

    columns: tuple[int, ...]
    totals: Tensor


def n_splits(tree: Tree) -> int:
    """Number of coalitions for splitting every group, besides the empty and the full one."""
    if isinstance(tree, int) or not tree:
        return 0
    return 2 ** len(tree) - 2 + 2 ** (len(tree) - 1) * sum(map(n_splits, tree))


def plan_splits(tree: Tree, n_features: int, *, n_draws: int = 1, held: int = -1) -> Plan:
    """All coalitions that Owen values depend on, once per draw.

    Args:
        tree: The hierarchy.
        n_features: Number of columns.
        n_draws: Repetitions. All rows of one share its draw, so that compared rows differ only in
            the coalition. Two are the fewest that give a standard error.
        held: A column that is always present, with none after it, for targets that require it.

    Returns:
        ``n_draws * (2 + n_splits(tree))`` rows.
    """
    tree, start = _held(tree, n_features, held)
    found = [start, start | _mask(tree, n_features)]
    _collect(tree, start, found)
    return _drawn(torch.cat(found), n_draws)


def split_best_first(
    score: Callable[[Plan], Tensor],
    tree: Tree,
    n_features: int,
    scope: Scope,
    *,
    n_evaluations: int,
    n_draws: int = 1,
) -> tuple[Plan, Tensor]:
    """Splits the group with the largest effect, repeatedly, until the budget is spent.

    One set of coalitions serves all targets: effects are summed in magnitude over them.

    Args:
        score: Maps a plan to values ``(n_coalitions, n_target)``; equal draws must have equal
            replacements in every call.
        tree: The hierarchy, preferably binary, since a split of k children takes ``2**k - 2``
            evaluations.
        n_features: Number of columns.
        scope: One entry per target.
        n_evaluations: Maximum number of rows; the full and the empty coalition are always scored.
        n_draws: Draws in which every coalition is scored.

    Returns:
        The plan, without anchors, and its values.
    """
    queue = _Queue(score, n_features, n_draws)
    kinds = [-1, *sorted(set(scope.required.tolist()) - {-1})]
    queue.begin(
        [
            (*_held(tree, n_features, held), (scope.required == held).nonzero()[:, 0])
            for held in kinds
        ]
    )
    while batch := queue.pop((n_evaluations - queue.n_rows) // n_draws):
        queue.split(batch)
    return queue.result()


def solve_splits(plan: Plan, values: Tensor, scope: Scope, *, tree: Tree) -> Solution:
    """Owen values (Owen 1977); groups that were not split share their total equally.

    Args:
        plan: Joined from `plan_anchors` and `plan_splits` or the plan of `split_best_first`; or any
            other plan with the necessary coalitions, such as `plan_exact`.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target.
        tree: The hierarchy of the plan.

    Returns:
        Attributions that sum to ``full - empty``. Standard errors come from the variance over
        draws, 0 for a single one; NaN for features whose group was not split in every context.
    """
    return solve_views(plan, values, scope, partial(_credit, tree=tree))


def unresolved(plan: Plan, values: Tensor, scope: Scope, *, tree: Tree) -> list[Unresolved]:
    """Groups that were never split, by decreasing total.

    Args:
        plan, values, scope, tree: As for `solve_splits`.
    """

    def of_view(view: View) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        credit = _Credit(_Table.of(view))
        credit.share(pruned(tree, view.n_visible))
        for columns, amounts in credit.unresolved.items():
            yield columns, amounts.mean(0)

    return unresolved_totals(plan, values, scope, of_view)


def unresolved_totals(
    plan: Plan,
    values: Tensor,
    scope: Scope,
    of_view: Callable[[View], Iterable[tuple[tuple[int, ...], Tensor]]],
) -> list[Unresolved]:
    """Totals of groups of features that were not resolved, by decreasing size.

    Args:
        plan: Coalitions.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target.
        of_view: Returns the columns of such groups, and the total of each, ``(n_target of view,)``.
    """
    totals: dict[tuple[int, ...], Tensor] = {}
    for view in views(plan, values, scope):
        for columns, amount in of_view(view):
            total = totals.setdefault(
                columns, torch.zeros(len(scope.n_visible), dtype=torch.float64, device="cpu")
            )
            total[view.targets] += amount
    found = [Unresolved(columns, total) for columns, total in totals.items()]
    return sorted(found, key=lambda group: -float(group.totals.abs().sum()))


def _held(tree: Tree, n_features: int, held: int) -> tuple[Tree, Tensor]:
    """The tree without the `held` column, and the initial coalition ``(1, n_features)``."""
    start = torch.zeros(1, n_features, dtype=torch.bool, device="cpu")
    if held < 0:
        return tree, start
    start[0, held] = True
    return pruned(tree, held), start


def _mask(tree: Tree, n_features: int) -> Tensor:
    mask = torch.zeros(n_features, dtype=torch.bool, device="cpu")
    mask[leaves(tree)] = True
    return mask


def _subsets(tree: tuple[Tree, ...], n_features: int) -> Tensor:
    """Unions of children, ``(2**n_children, n_features)``; row index = sum of 2**i over them."""
    children = torch.stack([_mask(child, n_features) for child in tree])
    chosen = (
        torch.arange(2 ** len(tree), device="cpu")[:, None] >> torch.arange(len(tree), device="cpu")
        & 1
    )
    return chosen.float() @ children.float() > 0


def _without(child: int, n_children: int) -> tuple[Tensor, Tensor]:
    """Codes of the sets without a child, and the share of orders in which exactly these precede it.

    Returns:
        Both of shape ``(2**(n_children - 1),)``.
    """
    codes = torch.arange(2**n_children, device="cpu")
    codes = codes[codes >> child & 1 == 0]
    sizes = (codes[:, None] >> torch.arange(n_children, device="cpu") & 1).sum(1).tolist()
    shares = [1 / (n_children * comb(n_children - 1, size)) for size in sizes]
    return codes, torch.tensor(shares, dtype=torch.float64, device="cpu")


def _collect(tree: Tree, contexts: Tensor, found: list[Tensor]) -> None:
    """Appends the coalitions needed to split `tree` in all `contexts`."""
    if isinstance(tree, int) or not tree:
        return
    subsets = _subsets(tree, contexts.shape[1])
    unions = contexts[:, None] | subsets
    found.append(unions[:, 1:-1].flatten(0, 1))
    for place, child in enumerate(tree):
        _collect(child, unions[:, _without(place, len(tree))[0]].flatten(0, 1), found)


def _drawn(masks: Tensor, n_draws: int) -> Plan:
    draws = torch.arange(n_draws, device="cpu").repeat_interleave(len(masks))
    return Plan(masks.repeat(n_draws, 1), draws)


@dataclass(frozen=True)
class _Item:
    """A group in one context.

    Attributes:
        tree: The group.
        context: bool, ``(n_features,)``.
        without, with_it: Values ``(n_draws, n_target)`` of the context, and with the group present.
        weight: Weight of the context among all.
        targets: Targets for whose values it is split.
    """

    tree: Tree
    context: Tensor
    without: Tensor
    with_it: Tensor
    weight: float
    targets: Tensor

    @property
    def gain(self) -> Tensor:
        return (self.with_it - self.without).mean(0)[self.targets]


@dataclass
class _Queue:
    """Priority queue of groups that can still be split, and the values scored so far."""

    score: Callable[[Plan], Tensor]
    n_features: int
    n_draws: int
    n_rows: int = 0
    _heap: list[tuple[float, int, _Item]] = field(default_factory=list[tuple[float, int, _Item]])
    _plans: list[Plan] = field(default_factory=list[Plan])
    _values: list[Tensor] = field(default_factory=list[Tensor])
    _split_gains: dict[int, list[Tensor]] = field(default_factory=dict[int, list[Tensor]])
    _number: Iterator[int] = field(default_factory=count)

    def begin(self, roots: list[tuple[Tree, Tensor, Tensor]]) -> None:
        """Scores every root's empty and full coalition."""
        masks = [
            torch.cat([start, start | _mask(tree, self.n_features)]) for tree, start, _ in roots
        ]
        values = self._scored(torch.cat(masks))
        for i, (tree, start, targets) in enumerate(roots):
            ends = values[:, 2 * i], values[:, 2 * i + 1]
            self._push(_Item(tree, start[0], *ends, 1.0, targets))

    def pop(self, n_affordable: int) -> list[_Item]:
        """The next groups to split within the affordable number of coalitions."""
        batch: list[_Item] = []
        wanted = max(n_affordable // _PARTS_OF_BUDGET, 1)
        while self._heap and wanted > 0:
            priority, _, item = self._heap[0]
            cost = 2 ** len(children_of(item.tree)) - 2
            if cost > n_affordable:
                break
            heapq.heappop(self._heap)
            if self._priority(item) < -priority:  # its priority has changed by a split elsewhere
                self._push(item)
                continue
            batch.append(item)
            self._split_gains.setdefault(id(item.tree), []).append(item.gain)
            n_affordable -= cost
            wanted -= cost
        return batch

    def split(self, batch: list[_Item]) -> None:
        """Scores the unions of children of each group, and queues the children."""
        unions = [
            item.context | _subsets(children_of(item.tree), self.n_features) for item in batch
        ]
        values = self._scored(torch.cat([union[1:-1] for union in unions]))
        position = 0
        for item, union in zip(batch, unions, strict=True):
            inner = values[:, position : position + len(union) - 2]
            position += len(union) - 2
            table = torch.cat([item.without[:, None], inner, item.with_it[:, None]], 1)
            self._push_children(item, union, table)

    def result(self) -> tuple[Plan, Tensor]:
        masks = torch.cat([plan.masks for plan in self._plans])
        draws = torch.cat([plan.draws for plan in self._plans])
        return Plan(masks, draws), torch.cat(self._values)

    def _push_children(self, item: _Item, union: Tensor, table: Tensor) -> None:
        children = children_of(item.tree)
        for place, child in enumerate(children):
            codes, shares = _without(place, len(children))
            for code, share in zip(codes.tolist(), shares.tolist(), strict=True):
                ends = table[:, code], table[:, code + 2**place]
                self._push(_Item(child, union[code], *ends, item.weight * share, item.targets))

    def _push(self, item: _Item) -> None:
        if children_of(item.tree) and len(item.targets):
            heapq.heappush(self._heap, (-self._priority(item), next(self._number), item))

    def _priority(self, item: _Item) -> float:
        """The part of ``full - empty`` that a split would distribute, summed over targets.

        The first split of a group distributes its whole gain; further ones the difference made by
        their context.
        """
        gain = float(item.gain.abs().sum())
        elsewhere = self._split_gains.get(id(item.tree))
        if elsewhere is None:
            return gain
        changed = float((item.gain - sum(elsewhere) / len(elsewhere)).abs().sum())
        return item.weight * (changed + gain / 2)

    def _scored(self, masks: Tensor) -> Tensor:
        """Values ``(n_draws, n_masks, n_target)``."""
        plan = _drawn(masks, self.n_draws)
        values = self.score(plan).double()
        self.n_rows += len(plan.masks)
        self._plans.append(plan)
        self._values.append(values)
        return values.view(self.n_draws, len(masks), -1)


@dataclass(frozen=True)
class _Table:
    """Values of the distinct coalitions of a view.

    Attributes:
        masks: bool, ``(n_distinct, n_visible)``.
        values: ``(n_distinct, n_draws, n_group)``.
        keys: Sorted, one per mask.
    """

    masks: Tensor
    values: Tensor
    keys: Tensor

    @classmethod
    def of(cls, view: View) -> "_Table":
        rows, sizes = view.sampled, view.sizes[view.sampled]
        if not (bool((sizes == 0).any()) and bool((sizes == view.n_visible).any())):
            rows = torch.ones_like(rows)  # the anchors are the only values of these coalitions
        masks, draws, values = view.masks[rows], view.draws[rows], view.values[rows]
        keys, first, code = _distinct(_keys(masks))
        numbers, draw = draws.unique(return_inverse=True)
        cell = code * len(numbers) + draw
        counts = cell.bincount(minlength=len(keys) * len(numbers))
        if not bool(counts.all()):  # averages over incomplete draws
            numbers, cell = numbers[:1], code
            counts = cell.bincount(minlength=len(keys))
        sums = torch.zeros(len(counts), values.shape[1], dtype=values.dtype, device="cpu")
        means = sums.index_add_(0, cell, values) / counts[:, None]
        return cls(masks[first], means.view(len(keys), len(numbers), -1), keys)

    def find(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of coalitions ``(…, n_visible)``, and whether each was scored."""
        at = torch.searchsorted(self.keys, _keys(masks)).clamp_max(len(self.keys) - 1)
        return at, (self.masks[at] == masks).all(-1)


def _keys(masks: Tensor) -> Tensor:
    """A hash per coalition; collisions are found by comparing masks."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (masks.shape[-1],), generator=generator, device="cpu")
    return (masks.long() * factors).sum(-1)


def _distinct(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted distinct keys, the first row of each, and each row's place among them."""
    distinct, place = keys.unique(return_inverse=True)
    first = torch.full((len(distinct),), len(keys), dtype=torch.int64, device="cpu")
    first.scatter_reduce_(0, place, torch.arange(len(keys), device="cpu"), "amin")
    return distinct, first, place


class _Credit:
    """Distributes the total of the tree over its leaves.

    Attributes:
        shares: ``(n_visible, n_draws, n_group)``.
        unresolved: Gain of each group that was split in no context, ``(n_draws, n_group)``.
        uncertain: Features of groups that were not split in every context.
    """

    def __init__(self, table: _Table) -> None:
        self._table = table
        self.shares = torch.zeros(
            table.masks.shape[1], *table.values.shape[1:], dtype=torch.float64, device="cpu"
        )
        self.unresolved: dict[tuple[int, ...], Tensor] = {}
        self.uncertain: set[int] = set()

    def share(self, tree: Tree) -> None:
        """Distributes the tree's gain if everything else is absent."""
        if tree == ():
            return
        empty = torch.zeros(1, self._table.masks.shape[1], dtype=torch.bool, device="cpu")
        ends = torch.cat([empty, empty | _mask(tree, empty.shape[1])])
        total = self._table.values[self._table.find(ends)[0]]
        self._share(
            tree,
            empty,
            torch.ones(1, dtype=torch.float64, device="cpu"),
            total[1] - total[0],
        )

    def _share(self, tree: Tree, contexts: Tensor, weights: Tensor, total: Tensor) -> None:
        """Distributes the total gain of `tree`.

        Args:
            tree: A group or a feature.
            contexts: ``(m, n_visible)``.
            weights: Weights of the contexts, ``(m,)``.
            total: ``(n_draws, n_group)``.
        """
        children = children_of(tree)
        if not children:
            self.shares[leaves(tree)] += total
            return
        index, known = self._lookup(children, contexts)
        if not bool(known.all()):
            self.uncertain |= set(leaves(tree))
        if not bool(known.any()):
            self.shares[leaves(tree)] += total / len(leaves(tree))
            self.unresolved[tuple(sorted(leaves(tree)))] = total
            return
        values = self._table.values[index[known]]
        weights = weights[known] / weights[known].sum()
        totals = _totals(children, values, weights, total)
        unions = contexts[known, None] | _subsets(children, contexts.shape[1])
        for place, child in enumerate(children):
            codes, shares = _without(place, len(children))
            inner = (weights[:, None] * shares).flatten()
            self._share(child, unions[:, codes].flatten(0, 1), inner, totals[place])

    def _lookup(self, children: tuple[Tree, ...], contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of all unions ``(m, 2**k)``, and the contexts ``(m,)`` that have all of them."""
        if 2 ** len(children) > len(self._table.keys):
            return contexts[:, :0].long(), torch.zeros(
                len(contexts), dtype=torch.bool, device="cpu"
            )
        unions = contexts[:, None] | _subsets(children, contexts.shape[1])
        index, found = self._table.find(unions)
        return index, found.all(1)


def _totals(
    children: tuple[Tree, ...], values: Tensor, weights: Tensor, total: Tensor
) -> list[Tensor]:
    """The share of each child in the group's gain over all contexts.

    Args:
        children: Children of the group.
        values: Values of all unions in the contexts in which it was split, ``(m, 2**k, n_draws,
            n_group)``.
        weights: Weights of these contexts, ``(m,)``, which sum to 1.
        total: ``(n_draws, n_group)``.
    """
    gains: list[Tensor] = []
    sizes: list[Tensor] = []
    for place in range(len(children)):
        codes, shares = _without(place, len(children))
        gain = values[:, codes + 2**place] - values[:, codes]
        weight = (weights[:, None] * shares)[:, :, None, None]
        gains.append((gain * weight).sum((0, 1)))
        sizes.append((gain.abs() * weight).sum((0, 1)))
    # Gains in contexts without a split probably come from the same children as in the others.
    rest, size = total - torch.stack(gains).sum(0), torch.stack(sizes).sum(0)
    n_leaves = [len(leaves(child)) for child in children]
    return [
        gain + rest * torch.where(size > 0, own / size.clamp_min(1e-300), n / sum(n_leaves))
        for gain, own, n in zip(gains, sizes, n_leaves, strict=True)
    ]


def _credit(view: View, tree: Tree) -> tuple[Tensor, Tensor]:
    """Attributions of one view and their variances."""
    credit = _Credit(_Table.of(view))
    credit.share(pruned(tree, view.n_visible))
    n_draws = credit.shares.shape[1]
    attributions = credit.shares.mean(1)
    variances = torch.zeros_like(attributions)
    if n_draws > 1:
        variances = credit.shares.var(1) / n_draws * normal_scale(n_draws - 1) ** 2
    elif len(view.draws[view.sampled].unique()) > 1:
        variances += torch.nan
    variances[sorted(credit.uncertain)] = torch.nan
    # The empty coalition is known from more draws than were split.
    gap = view.full_values - view.empty_values - attributions.sum(0)
    return attributions + gap / max(view.n_visible, 1), variances
