"""Solvers of enumerated coalitions: leave-one-out, only-one-in, exact Shapley values."""

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Scope, Solution, View, solve_views
from captum_llm_ext.coalitions.clustered_errors import squared_influences
from captum_llm_ext.coalitions.plans import Plan


def solve_leave_one_out(plan: Plan, values: Tensor, scope: Scope) -> Solution:
    """The loss of each target when one feature is absent: ``full - without``.

    The cheapest: what is necessary. Of two features that each suffice it finds neither; see
    `solve_only_one_in` and the solvers of Shapley values.

    Args:
        plan: Joined from `plan_anchors` and `plan_leave_one_out`.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target.

    Returns:
        Attributions without completeness. Standard errors come from the variance over draws; one
        common draw counts as exact.

    Raises:
        ValueError: If a required row is missing.
    """
    return solve_views(plan, values, scope, _leave_one_out)


def solve_only_one_in(plan: Plan, values: Tensor, scope: Scope) -> Solution:
    """The gain of each target when one feature alone is present: ``only - empty``.

    The complement of `solve_leave_one_out`, with the same arguments and errors: it finds what is
    sufficient, even if another feature is too. The plan is joined from `plan_anchors` and
    `plan_only_one_in`, with the same `required`.
    """
    return solve_views(plan, values, scope, _only_one_in)


def solve_exact(plan: Plan, values: Tensor, scope: Scope) -> Solution:
    """Shapley values by their definition (Shapley 1953), from every coalition.

    For up to a dozen features; for more see `solve_kernel`.

    Args:
        plan: Joined from `plan_anchors` and `plan_exact`.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target. Coalitions that coincide on the visible columns are averaged.

    Returns:
        Attributions that sum to ``full - empty``. Standard errors come from the variance over
        draws; one common draw counts as exact.

    Raises:
        ValueError: If a coalition is missing.
    """
    return solve_views(plan, values, scope, exact)


def shapley_coefficients(n_features: int) -> Tensor:
    """The matrix that maps values of all coalitions to Shapley values.

    Returns:
        Shape ``(2**n_features, n_features)``; row index = sum of 2**i over the features present.
    """
    if not n_features:
        return torch.zeros(1, 0, dtype=torch.float64, device="cpu")
    present = (
        torch.arange(2**n_features, device="cpu")[:, None] >> torch.arange(n_features, device="cpu")
        & 1
    ).bool()
    others = present.sum(1, keepdim=True) - present.long()
    share = [1 / (n_features * comb(n_features - 1, size)) for size in range(n_features)]
    weight = torch.tensor(share, dtype=torch.float64, device="cpu")[others]
    return torch.where(present, weight, -weight)


@dataclass(frozen=True)
class _Table:
    """Values averaged by coalition within each draw, since draws, not rows, are independent.

    `codes`, `draws` and `residuals` have one entry per pair of code and draw; `scale` makes the
    sum of squares of ``residuals * scale`` the variance of a mean.
    """

    means: Tensor
    n_draws: Tensor
    codes: Tensor
    draws: Tensor
    residuals: Tensor
    scale: Tensor


def _leave_one_out(view: View) -> tuple[Tensor, Tensor]:
    means, variances = _by_odd_one_out(view, view.n_visible - 1, is_present=False)
    return view.full_values - means, variances


def _only_one_in(view: View) -> tuple[Tensor, Tensor]:
    means, variances = _by_odd_one_out(view, 1, is_present=True)
    return means - view.empty_values, variances + view.empty_variances


def _by_odd_one_out(view: View, size: int, *, is_present: bool) -> tuple[Tensor, Tensor]:
    """Values and variances of the coalitions with a single feature present, or absent."""
    rows = view.sizes == size
    odd = (view.masks[rows] == is_present).int()
    feature = odd.argmax(1) if view.n_visible else view.rows[:0]
    table = _tabulate(view, rows, feature, view.n_visible)
    variances = torch.zeros_like(table.means)
    variances.index_add_(0, table.codes, (table.residuals * table.scale).square())
    if not _one_draw(view):
        variances[table.n_draws < 2] = torch.nan
    return table.means, variances


def exact(view: View) -> tuple[Tensor, Tensor]:
    """Shapley values of one view and their variances, both ``(n_visible, n_group)``."""
    code = (view.masks.long() << torch.arange(view.n_visible, device="cpu")).sum(1)
    table = _tabulate(view, torch.ones_like(view.sampled), code, 2**view.n_visible)
    coefficients = shapley_coefficients(view.n_visible)
    variances = squared_influences(
        coefficients[table.codes] * table.scale, table.residuals, table.draws
    )
    single = (table.n_draws[1:-1] < 2).any()  # the full and the empty coalition are anchors
    if bool(single) and not _one_draw(view):
        variances += torch.nan
    return coefficients.T @ table.means, variances


def _tabulate(view: View, rows: Tensor, codes: Tensor, n_codes: int) -> _Table:
    cells, cell_of_row = torch.stack([codes, view.draws[rows]], 1).unique(
        dim=0, return_inverse=True
    )
    values = _mean_by(cell_of_row, view.values[rows], len(cells))
    n_draws = cells[:, 0].bincount(minlength=n_codes)
    if not bool(n_draws.all()):
        raise ValueError(
            f"{int((n_draws == 0).sum())} of {n_codes} coalitions are missing for targets "
            f"{view.targets.tolist()}: use the planner named like this solver."
        )
    means = _mean_by(cells[:, 0], values, n_codes)
    scale = (n_draws * (n_draws - 1)).clamp_min(1).double().rsqrt()
    residuals = values - means[cells[:, 0]]
    return _Table(means, n_draws, cells[:, 0], cells[:, 1], residuals, scale[cells[:, :1]])


def _mean_by(index: Tensor, values: Tensor, n: int) -> Tensor:
    sums = torch.zeros(n, values.shape[1], dtype=values.dtype, device="cpu").index_add_(
        0, index, values
    )
    return sums / index.bincount(minlength=n).clamp_min(1)[:, None]


def _one_draw(view: View) -> bool:
    draws = view.draws[view.sampled]
    return len(draws) > 1 and bool((draws == draws[0]).all())
