"""Shapley values from orders in which features join one after another."""

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Scope, Solution, View, solve_views, views
from captum_llm_ext.coalitions.clustered_errors import gap_shares, normal_scale
from captum_llm_ext.coalitions.kernel import EFFORT, regress
from captum_llm_ext.coalitions.plans import Plan


def solve_permutations(
    plan: Plan, values: Tensor, scope: Scope, *, effort: float = EFFORT
) -> Solution:
    """The average gain when a feature joins (Castro et al. 2009).

    Restricted to a prefix of the columns, a walk is again a walk. If a target requires a column
    that may be absent, the rows with that column are not a walk, but their sizes are distributed as
    in `plan_pairs`: these targets are solved by kernel regression.

    Args:
        plan: Joined from `plan_anchors` and one or more `plan_permutations`.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target.
        effort: As for `solve_kernel`, for targets that require a column.

    Returns:
        Attributions that sum to ``full - empty``. Standard errors come from the variance over pairs
        of an order and its reverse; NaN for a single pair. Gains have heavy tails, which few pairs
        rarely show: each variance is averaged with the mean over features, which counts as one more
        degree of freedom of Student's t (Smyth 2004, "Linear models and empirical Bayes methods",
        section 4). So even a feature that never had a gain has a positive error.

    Raises:
        ValueError: If the rows are not walks.
    """
    order = _orders(plan)
    effort = scope.share(effort)

    def solve(view: View) -> tuple[Tensor, Tensor]:
        return regress(view, effort) if view.required >= 0 else _walk(view, order)

    return solve_views(plan, values, scope, solve)


def part_errors(plan: Plan, values: Tensor, scope: Scope, part_of: Tensor) -> Tensor:
    """Standard errors of attributions by `solve_permutations`, summed over features.

    Gains within one walk are dependent: they have the same sum in every walk.

    Args:
        plan, values, scope: As for `solve_permutations`.
        part_of: int64, shape ``(n_features,)``: the part of each feature, -1 for none.

    Returns:
        Shape ``(n_target, n_parts)``; for parts of one feature, that feature's. NaN for targets
        that require a column, and for a single pair of walks.
    """
    order, n_parts = _orders(plan), int(part_of.max()) + 1
    errors = torch.full(
        (len(scope.n_visible), n_parts), torch.nan, dtype=torch.float64, device="cpu"
    )
    for view in views(plan, values, scope):
        if view.required >= 0:
            continue
        gains, cluster = _gains(view, order)
        inside = (part_of[: view.n_visible] >= 0).nonzero()[:, 0]
        ours = part_of[inside]
        parts = gains.new_zeros(len(gains), n_parts, gains.shape[2])
        parts.index_add_(1, ours, gains[:, inside])
        sizes = ours.bincount(minlength=n_parts)[:, None]
        each = _spread(gains, cluster).mean(0)
        variances = _moderated(_spread(parts, cluster), int(cluster.max()) + 1, sizes * each)
        errors[view.targets] = variances.masked_fill(sizes == 0, 0).sqrt().T
    return errors


def _orders(plan: Plan) -> Tensor:
    """The feature that joins at each step, shape ``(n_orders, n_features)``."""
    n = plan.n_features
    masks = plan.masks[plan.n_anchors :]
    if not len(masks) or len(masks) % (n + 1):
        raise ValueError(
            f"{len(masks)} rows are not walks over {n} features, which have {n + 1} rows each: "
            "join `plan_anchors` and `plan_permutations`, in this order."
        )
    walks = masks.view(len(masks) // (n + 1), n + 1, n)
    joined = walks[:, 1:] & ~walks[:, :-1]
    if bool((walks.sum(2) != torch.arange(n + 1, device="cpu")).any()) or bool(
        (joined.sum(2) != 1).any()
    ):
        raise ValueError(
            "Rows are not walks from the empty to the full coalition: use `plan_permutations`."
        )
    return joined.int().argmax(2) if n else joined.sum(2)


def _walk(view: View, order: Tensor) -> tuple[Tensor, Tensor]:
    gains, cluster = _gains(view, order)
    attributions, spread = gains.mean(0), _spread(gains, cluster)
    variances = _moderated(spread, int(cluster.max()) + 1, spread.mean(0))
    gap = view.full_values - view.empty_values - attributions.sum(0)
    return attributions + gap * gap_shares(spread), variances


def _gains(view: View, order: Tensor) -> tuple[Tensor, Tensor]:
    """The gain of each visible feature, ``(n_orders, n_visible, n_group)``, and draws by order."""
    n_orders, n = order.shape
    walks = view.values[view.sampled].view(n_orders, n + 1, -1)
    gains = torch.empty(n_orders, n, len(view.targets), dtype=walks.dtype, device="cpu")
    gains.scatter_(1, order[:, :, None].expand_as(gains), walks.diff(dim=1))
    # The independent unit is the draw: an order and its reverse, or a single last order.
    draws = view.draws[view.sampled].view(n_orders, n + 1)[:, 0]
    return gains[:, : view.n_visible], draws.unique(return_inverse=True)[1]


def _spread(gains: Tensor, cluster: Tensor) -> Tensor:
    """Sums of squares over draws of their mean gains."""
    sums = torch.zeros(int(cluster.max()) + 1, *gains.shape[1:], dtype=gains.dtype, device="cpu")
    sums.index_add_(0, cluster, gains - gains.mean(0))
    return sums.square().sum(0) / len(gains) ** 2


def _moderated(spread: Tensor, n_draws: int, expected: Tensor) -> Tensor:
    """Moderated variances: sums of squares over draws, shrunk towards their mean over features."""
    if n_draws < 2 or not len(spread):
        return torch.full_like(spread, torch.nan)
    own, others = (part * n_draws / (n_draws - 1) for part in (spread, expected))
    moderated = ((n_draws - 1) * own + others) / n_draws
    return moderated * normal_scale(n_draws) ** 2
