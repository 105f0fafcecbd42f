"""Owen values from orders that complete each group of a hierarchy before the next."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Scope, Solution, View, solve_views
from captum_llm_ext.coalitions.clustered_errors import gap_shares, normal_scale
from captum_llm_ext.coalitions.plans import Plan

Tree: TypeAlias = int | tuple["Tree", ...]
"""A feature's index, or a group of trees; made by `as_tree`, without groups of one."""


def as_tree(nested: object, n_features: int) -> Tree:
    """Nested lists of feature indices as a tree.

    Args:
        nested: Such as ``[[0, 1], [2, [3, 4]]]``. Groups of one are unwrapped, empty ones dropped.
        n_features: Every index below it must occur exactly once.

    Raises:
        ValueError: If a feature is missing, repeated or does not exist.
        TypeError: If an entry is neither an integer nor a list.
    """
    tree = _opened(nested)
    found = leaves(tree)
    if sorted(found) != list(range(n_features)):
        wrong = sorted(set(found) ^ set(range(n_features))) or [
            number for number in set(found) if found.count(number) > 1
        ]
        raise ValueError(
            f"the hierarchy does not hold each of {n_features} features once (see {wrong[:8]}): "
            f"nest the numbers 0 to {n_features - 1} in lists."
        )
    return tree


def tree_of_levels(n_features: int, levels: Sequence[Sequence[int]]) -> Tree:
    """The tree of features within parts, within coarser parts.

    Args:
        n_features: Number of features.
        levels: From coarse to fine, the part of each feature. Parts of a finer level that overlap
            several coarser ones are split.
    """

    def grouped(features: Sequence[int], depth: int) -> Tree:
        if depth == len(levels):
            return _group(list(features))
        parts: dict[int, list[int]] = {}
        for feature in features:
            parts.setdefault(levels[depth][feature], []).append(feature)
        return _group([grouped(part, depth + 1) for part in parts.values()])

    return grouped(range(n_features), 0)


def balanced(parts: Sequence[Tree]) -> Tree:
    """A binary tree over `parts` in their order, by repeated halving."""
    if len(parts) < 3:
        return _group(list(parts))
    middle = (len(parts) + 1) // 2
    return balanced(parts[:middle]), balanced(parts[middle:])


def binary(tree: Tree) -> Tree:
    """The tree with every larger group split by halving."""
    return tree if isinstance(tree, int) else balanced([binary(child) for child in tree])


def pruned(tree: Tree, n_features: int) -> Tree:
    """The tree restricted to the first `n_features` features; ``()`` if none is left."""
    if isinstance(tree, int):
        return tree if tree < n_features else ()
    return _group([child for part in tree if (child := pruned(part, n_features)) != ()])


def children_of(tree: Tree) -> tuple[Tree, ...]:
    """The children of a group; empty for a single feature."""
    return () if isinstance(tree, int) else tree


def leaves(tree: Tree) -> list[int]:
    """Features in the order of the tree."""
    return [tree] if isinstance(tree, int) else [leaf for child in tree for leaf in leaves(child)]


def plan_nested_orders(
    tree: Tree, n_features: int, n_orders: int, *, generator: torch.Generator, held: int = -1
) -> Plan:
    """Antithetic pairs of orders in which the features of each group are consecutive.

    An order shuffles the children of every node; its reverse is another such order and shares its
    draw. Restricted to a prefix of the columns, these are again such orders.

    Args:
        tree: The hierarchy.
        n_features: Number of columns.
        n_orders: Single orders; an order and its reverse count as two.
        generator: Source of the orders.
        held: A column that is always present, in walks over the columns before it, for targets that
            require it.

    Returns:
        ``n_orders`` walks, each with one row more than it has columns.
    """
    tree = tree if held < 0 else pruned(tree, held)
    n_walked = len(leaves(tree))
    n_pairs = (n_orders + 1) // 2
    rank = torch.full((n_pairs, n_features), n_features, dtype=torch.int64, device="cpu")
    _place(tree, torch.zeros(n_pairs, dtype=torch.long, device="cpu"), rank, generator)
    reverse = torch.where(rank < n_features, n_walked - 1 - rank, rank)
    ranks = torch.stack([rank, reverse], 1).flatten(0, 1)[:n_orders]
    steps = torch.arange(n_walked + 1, device="cpu")[:, None]
    masks = (ranks[:, None, :] < steps).flatten(0, 1)
    if held >= 0:
        masks[:, held] = True
    return Plan(masks, (torch.arange(n_orders, device="cpu") // 2).repeat_interleave(n_walked + 1))


def solve_nested_orders(plan: Plan, values: Tensor, scope: Scope) -> Solution:
    """Owen values (Owen 1977): the average gain when a feature joins its walk.

    With a flat tree these are Shapley values.

    Args:
        plan: Joined from `plan_anchors` and one or more `plan_nested_orders`, including some for
            each required column.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target.

    Returns:
        Attributions that sum to ``full - empty``. Standard errors come from the variance over pairs
        of an order and its reverse, with Student's t for few of them; NaN for a single pair.

    Raises:
        ValueError: If the rows are not walks, or none has a required column.
    """
    chain, held = _chains(plan)
    return solve_views(plan, values, scope, lambda view: _walk(plan, view, chain, held))


def _opened(nested: object) -> Tree:
    if isinstance(nested, int) and not isinstance(nested, bool):
        return nested
    if not isinstance(nested, list | tuple):
        raise TypeError(
            f"the hierarchy holds a {type(nested).__name__}: give nested lists of feature numbers, "
            "such as [[0, 1], [2, 3]]."
        )
    return _group([child for part in nested if (child := _opened(part)) != ()])


def _group(children: list[Tree]) -> Tree:
    return children[0] if len(children) == 1 else tuple(children)


def _place(tree: Tree, start: Tensor, rank: Tensor, generator: torch.Generator) -> None:
    """Fills in the rank of every leaf, for walks that enter the tree at step `start`."""
    if isinstance(tree, int):
        rank[:, tree] = start
        return
    order = torch.rand(
        len(start), len(tree), generator=generator, dtype=torch.float32, device="cpu"
    ).argsort(1)
    sizes = torch.tensor([len(leaves(child)) for child in tree], dtype=torch.long, device="cpu")[
        order
    ]
    before = torch.empty_like(order).scatter_(1, order, sizes.cumsum(1) - sizes)
    for child, offset in zip(tree, before.T, strict=True):
        _place(child, start + offset, rank, generator)


def _chains(plan: Plan) -> tuple[Tensor, Tensor]:
    """Per row the index of its walk (-1: an anchor); per walk the column always present, or -1."""
    masks, draws = plan.masks, plan.draws
    begins = torch.zeros(len(masks), dtype=torch.bool, device="cpu")
    begins[plan.n_anchors : plan.n_anchors + 1] = True
    left = (masks[:-1] & ~masks[1:]).any(1) | (draws[1:] != draws[:-1])
    begins[1:] |= left & (torch.arange(1, len(masks), device="cpu") > plan.n_anchors)
    chain = begins.cumsum(0) - 1
    first = masks[begins]
    size = first.sum(1)
    if bool((size > 1).any()):
        raise ValueError(
            "Rows are not walks from the empty to the full coalition: use `plan_nested_orders`."
        )
    held = torch.where(size == 0, -1, first.int().argmax(1) if plan.n_features else -1)
    return chain, held


def _walk(plan: Plan, view: View, chain: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Attributions of one view and their variances."""
    ours = (chain >= 0) & (held == view.required)[chain.clamp_min(0)]
    if not bool(ours.any()):
        raise ValueError(
            f"No walk holds column {view.required}, which targets {view.targets.tolist()} require: "
            f"join `plan_nested_orders(…, held={view.required})`."
        )
    chosen = ours[view.rows].nonzero()[:, 0]
    rows, values = view.rows[chosen], view.values[chosen]
    inside = chain[rows[1:]] == chain[rows[:-1]]
    joined = (plan.masks[rows[1:]] & ~plan.masks[rows[:-1]])[inside]
    n_orders = len(chain[rows].unique())
    _check_walks(plan, view, joined, rows, n_orders)

    column = joined[:, : view.n_visible].int().argmax(1) if view.n_visible else joined.sum(1)
    seen = joined[:, : view.n_visible].any(1)
    numbers, cluster = plan.draws[rows].unique(return_inverse=True)
    gains = values.diff(dim=0)[inside][seen]
    cell = cluster[1:][inside][seen] * view.n_visible + column[seen]
    sums = torch.zeros(
        len(numbers) * view.n_visible, values.shape[1], dtype=values.dtype, device="cpu"
    )
    sums = sums.index_add_(0, cell, gains).view(len(numbers), view.n_visible, -1)

    attributions = sums.sum(0) / n_orders
    walks = torch.stack([chain[rows], cluster], 1).unique(dim=0)[:, 1].bincount()
    spread = (sums - walks[:, None, None] * attributions).square().sum(0) / n_orders**2
    gap = view.full_values - view.empty_values - attributions.sum(0)
    return attributions + gap * gap_shares(spread), _variances(spread, len(numbers))


def _check_walks(plan: Plan, view: View, joined: Tensor, rows: Tensor, n_orders: int) -> None:
    full = plan.masks[rows][:, : view.n_visible].all(1).sum()
    if bool((joined.sum(1) != 1).any()) or len(joined) + n_orders != len(rows) or full < n_orders:
        raise ValueError(
            "Rows are not walks from the empty to the full coalition: use `plan_nested_orders`."
        )


def _variances(spread: Tensor, n_draws: int) -> Tensor:
    if n_draws < 2:
        return torch.full_like(spread, torch.nan)
    return spread * n_draws / (n_draws - 1) * normal_scale(n_draws - 1) ** 2
