"""Hierarchical leave-one-out: a part is refined only if removing all of it matters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Scope, Solution, View, solve_views
from captum_llm_ext.coalitions.clustered_errors import mean_over_draws, normal_scale
from captum_llm_ext.coalitions.owen_orders import Tree, children_of, leaves
from captum_llm_ext.coalitions.owen_splits import Unresolved, unresolved_totals
from captum_llm_ext.coalitions.plans import Plan

# Parts refined together change some target by at least this share of the largest change. Chosen,
# not measured: with a larger share, rounds are too small to fill a batch; with a smaller one, parts
# are refined that a word of another one would have ruled out.
_TOGETHER = 0.5


def search(
    score: Callable[[Plan], Tensor],
    tree: Tree,
    n_features: int,
    *,
    share: float,
    top_k: int | None = None,
    n_evaluations: int | None = None,
    n_draws: int = 1,
) -> tuple[Plan, Tensor]:
    """Removes parts, the coarsest first, and their children only if that makes a difference.

    A part is refined if its removal changes some target's value by at least `share` of the largest
    change found and, given `top_k`, by more than the target's `top_k`-th strongest column of the
    tree among those removed alone. Best first: in each round the parts of largest change, at any
    level, are refined and scored together.

    Args:
        score: Maps a plan to values ``(n_coalitions, n_target)``; equal draws must have equal
            replacements in every call.
        tree: The hierarchy of the first columns. The others are removed one by one.
        n_features: Number of columns.
        share: Between 0 (everything is refined) and 1.
        top_k: Number of causes wanted per target, if not all.
        n_evaluations: Maximum number of rows. The parts of the coarsest level and the columns
            outside the tree are always scored.
        n_draws: Draws in which every coalition is scored.

    Returns:
        The plan, without anchors, and its values.
    """
    full = torch.ones(1, n_features, dtype=torch.bool, device="cpu")
    outside = sorted(set(range(n_features)) - set(leaves(tree)))
    parts: list[Tree] = [*_roots(tree), *outside]
    frontier = _Frontier(share, top_k, set(outside))
    plans: list[Plan] = []
    found: list[Tensor] = []
    whole: Tensor | None = None
    n_rows = 0
    while parts or whole is None:
        scored = torch.cat([_without(part, n_features) for part in parts] or [full[:0]])
        if whole is None:
            scored = torch.cat([full, scored])
        draws = torch.arange(n_draws, device="cpu").repeat_interleave(len(scored))
        plans.append(Plan(scored.repeat(n_draws, 1), draws))
        found.append(score(plans[-1]).double())
        n_rows += len(draws)
        values = found[-1].view(n_draws, len(scored), -1)
        if whole is None:
            whole, values = values[:, :1], values[:, 1:]
        # A target has no value if the word that it continues is absent; it does not depend on that
        # word.
        frontier.add(parts, (whole - values).mean(0).nan_to_num().abs())
        left = None if n_evaluations is None else (n_evaluations - n_rows) // n_draws
        parts = frontier.refined(left)
    masks, draws = (torch.cat([getattr(p, name) for p in plans]) for name in ("masks", "draws"))
    return Plan(masks, draws), torch.cat(found)


class _Frontier:
    """Parts that were removed but not refined, and the known effects of single columns.

    Args:
        share, top_k: As for `search`.
        outside: Columns outside the prompt's tree.
    """

    def __init__(self, share: float, top_k: int | None, outside: set[int]) -> None:
        self._share, self._top_k, self._outside = share, top_k, outside
        self._waiting: list[tuple[Tree, Tensor]] = []
        self._alone: list[Tensor] = []
        self._most = 0.0

    def add(self, parts: Sequence[Tree], changes: Tensor) -> None:
        """Adds parts and the changes without each, ``(n_parts, n_target)``."""
        for part, change in zip(parts, changes, strict=True):
            self._most = max(self._most, float(change.max()))
            if children_of(part):
                self._waiting.append((part, change))
            elif part not in self._outside:
                self._alone.append(change)

    def refined(self, most_rows: int | None) -> list[Tree]:
        """The children of the parts refined next, at most `most_rows`; empty if there are none."""
        bar = self._bar()
        worth = [float(own.where(own > bar, -1.0).max()) for _, own in self._waiting]
        least = max([self._share * self._most, _TOGETHER * max(worth, default=0.0)])
        chosen: list[Tree] = []
        places: list[int] = []
        for place in sorted(range(len(worth)), key=lambda place: -worth[place]):
            parts = children_of(self._waiting[place][0])
            fits = most_rows is None or len(chosen) + len(parts) <= most_rows
            if worth[place] >= least and fits:
                chosen += parts
                places.append(place)
        self._waiting = [own for i, own in enumerate(self._waiting) if i not in places]
        return chosen

    def _bar(self) -> Tensor | float:
        """The change of each target's value that a part must exceed for its columns to matter."""
        if self._top_k is None or len(self._alone) < self._top_k:
            return -1.0
        return torch.stack(self._alone).topk(self._top_k, dim=0).values[-1]


def solve_search(plan: Plan, values: Tensor, scope: Scope, *, tree: Tree) -> Solution:
    """Per feature the effect of its removal, or an equal share of that of its part.

    Args:
        plan: Joined from `plan_anchors` and the plan of `search`.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target.
        tree: The hierarchy that was searched.

    Returns:
        Leave-one-out attributions. Standard errors come from the variance over draws, 0 for a
        single one; NaN for features that were not removed alone.
    """

    def solve(view: View) -> tuple[Tensor, Tensor]:
        losses = _Losses.of(view)
        attributions = torch.zeros(
            view.n_visible, len(view.targets), dtype=torch.float64, device="cpu"
        )
        variances = torch.zeros_like(attributions)
        for part, is_alone in _known(losses, tree, view.n_visible):
            mean, variance = losses.of_part(part)
            attributions[list(part)] = mean / len(part)
            variances[list(part)] = variance if is_alone else torch.nan
        return attributions, variances

    return solve_views(plan, values, scope, solve)


def unrefined(plan: Plan, values: Tensor, scope: Scope, *, tree: Tree) -> list[Unresolved]:
    """Parts that were not refined, by decreasing effect.

    Args:
        plan, values, scope, tree: As for `solve_search`.
    """

    def of_view(view: View) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        losses = _Losses.of(view)
        for part, is_alone in _known(losses, tree, view.n_visible):
            if not is_alone:
                yield part, losses.of_part(part)[0]

    return unresolved_totals(plan, values, scope, of_view)


def _roots(tree: Tree) -> tuple[Tree, ...]:
    return (tree,) if isinstance(tree, int) else tree


def _without(part: Tree, n_features: int) -> Tensor:
    mask = torch.ones(1, n_features, dtype=torch.bool, device="cpu")
    mask[0, leaves(part)] = False
    return mask


@dataclass(frozen=True)
class _Losses:
    """Per draw the values without each part that was removed.

    Attributes:
        rows: Rows of each set of absent visible columns.
        values: ``(n_rows, n_group)``.
        draws: ``(n_rows,)``.
    """

    rows: dict[tuple[int, ...], list[int]]
    values: Tensor
    draws: Tensor

    @classmethod
    def of(cls, view: View) -> "_Losses":
        rows: dict[tuple[int, ...], list[int]] = {}
        for place, mask in enumerate(view.masks):
            if bool(view.sampled[place]):
                rows.setdefault(tuple((~mask).nonzero()[:, 0].tolist()), []).append(place)
        return cls(rows, view.values, view.draws)

    def of_part(self, part: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mean and variance over draws, ``(n_group,)`` each."""
        full, without = (
            {int(self.draws[row]): row for row in self.rows[key]} for key in ((), part)
        )
        common = sorted(full.keys() & without.keys())
        losses = self.values[[full[d] for d in common]] - self.values[[without[d] for d in common]]
        mean, variance = mean_over_draws(
            losses, torch.tensor(common, dtype=torch.int64, device="cpu")
        )
        if len(common) > 1:
            variance = losses.var(0) / len(common) * normal_scale(len(common) - 1) ** 2
        return mean, variance


def _known(losses: _Losses, tree: Tree, n_visible: int) -> list[tuple[tuple[int, ...], bool]]:
    """The finest parts that were removed, and whether each is a single feature."""
    inside = leaves(tree)
    found: list[tuple[tuple[int, ...], bool]] = []
    todo: list[Tree] = [*_roots(tree), *sorted(set(range(n_visible)) - set(inside))]
    for part in todo:  # extended during the loop
        children = children_of(part)
        if children and all(tuple(sorted(leaves(c))) in losses.rows for c in children):
            todo.extend(children)
        else:
            found.append((tuple(sorted(leaves(part))), not children))
    return found
