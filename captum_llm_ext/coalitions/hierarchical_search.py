"""Hierarchical leave-one-out: a part is opened only where removing all of it matters."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Scope, Solution, View, solve_views, views
from captum_llm_ext.coalitions.clustered_errors import mean_over_draws, normal_scale
from captum_llm_ext.coalitions.owen_orders import Tree, children_of, leaves
from captum_llm_ext.coalitions.owen_splits import Unresolved
from captum_llm_ext.coalitions.plans import Plan


def search(
    score: Callable[[Plan], Tensor],
    tree: Tree,
    n_features: int,
    scope: Scope,
    *,
    share: float,
    n_evaluations: int | None = None,
    n_draws: int = 1,
) -> tuple[Plan, Tensor]:
    """Removes parts, the coarsest first, and their children only where that makes a difference.

    A part is opened where taking it out changes some target's value by at least `share` of the
    largest change that was found. Parts of one level are scored together.

    Args:
        score: Values ``(n_coalitions, n_target)`` of a plan; rows of equal draws must mean equal
            replacements in every call.
        tree: The nesting of the first columns. The others are taken out one by one.
        n_features: Number of columns.
        scope: One entry per target, of which each must see all columns of the tree.
        share: Between 0 (everything is opened) and 1.
        n_evaluations: Rows at most; the largest parts are opened first. The parts of the coarsest
            level and the columns beside the tree are always scored.
        n_draws: Draws that every coalition is scored in.

    Returns:
        The plan, without anchors, and its values.
    """
    full = torch.ones(1, n_features, dtype=torch.bool, device="cpu")
    beside = sorted(set(range(n_features)) - set(leaves(tree)))
    waiting: list[Tree] = [*_roots(tree), *beside]
    plans: list[Plan] = []
    found: list[Tensor] = []
    scored = torch.cat([full, *(_without(part, n_features) for part in waiting)])
    n_rows, most = 0, 0.0
    whole = torch.zeros(0, dtype=torch.float32, device="cpu")
    while len(scored):
        draws = torch.arange(n_draws, device="cpu").repeat_interleave(len(scored))
        plans.append(Plan(scored.repeat(n_draws, 1), draws))
        found.append(score(plans[-1]).double())
        n_rows += len(draws)
        values = found[-1].view(n_draws, len(scored), -1)
        if n_rows == len(draws):
            whole, values = values[:, :1], values[:, 1:]
        # A target has no value where a word that it continues is absent, and depends on no such.
        changes = (whole - values).mean(0).nan_to_num().abs().amax(1)
        most = max([most, *changes.tolist()])
        wanted: list[Tree] = []
        for place in changes.argsort(descending=True).tolist():
            parts = children_of(waiting[place])
            cost = n_draws * (len(wanted) + len(parts))
            fits = n_evaluations is None or n_rows + cost <= n_evaluations
            if parts and float(changes[place]) >= share * most and fits:
                wanted += parts
        waiting = wanted
        rows = [_without(part, n_features) for part in waiting]
        scored = torch.cat([full[:0], *rows])
    masks, draws = (torch.cat([getattr(p, name) for p in plans]) for name in ("masks", "draws"))
    return Plan(masks, draws), torch.cat(found)


def solve_search(plan: Plan, values: Tensor, scope: Scope, *, tree: Tree) -> Solution:
    """Per feature what its removal costs, or an equal share of what removing its part costs.

    Args:
        plan: Joined from `plan_anchors` and what `search` returned.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target.
        tree: The nesting that was searched.

    Returns:
        Leave-one-out attributions. Standard errors come from the spread over draws, 0 where there
        is a single one; NaN for features that were not taken out alone.
    """

    def solve(view: View) -> tuple[Tensor, Tensor]:
        losses = _Losses.of(plan, view)
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


def unopened(plan: Plan, values: Tensor, scope: Scope, *, tree: Tree) -> list[Unresolved]:
    """Parts that were not opened, by falling size of their effect.

    Args:
        plan, values, scope, tree: As for `solve_search`.
    """
    totals: dict[tuple[int, ...], Tensor] = {}
    for view in views(plan, values, scope):
        losses = _Losses.of(plan, view)
        for part, is_alone in _known(losses, tree, view.n_visible):
            if not is_alone:
                total = totals.setdefault(
                    part,
                    torch.zeros(len(scope.n_visible), dtype=torch.float64, device="cpu"),
                )
                total[view.targets] += losses.of_part(part)[0]
    found = [Unresolved(columns, total) for columns, total in totals.items()]
    return sorted(found, key=lambda part: -float(part.totals.abs().sum()))


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
        rows: For each set of absent visible columns its rows.
        values: ``(n_rows, n_group)``.
        draws: ``(n_rows,)``.
    """

    rows: dict[tuple[int, ...], list[int]]
    values: Tensor
    draws: Tensor

    @classmethod
    def of(cls, plan: Plan, view: View) -> "_Losses":
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
    for part in todo:  # grows while it is read
        children = children_of(part)
        if children and all(tuple(sorted(leaves(c))) in losses.rows for c in children):
            todo.extend(children)
        else:
            found.append((tuple(sorted(leaves(part))), not children))
    return found
