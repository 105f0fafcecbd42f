"""LIME: a local linear fit, for every target on its own columns."""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from captum_llm_ext.coalitions.draws import sandwich
from captum_llm_ext.coalitions.plans import Plan
from captum_llm_ext.coalitions.scope import Scope, Solution, View, views

_MOST_SWEEPS = 1000
# Gram matrices held at a time, in bytes.
_GRAM_MEMORY = 2**29


def solve_lime(
    plan: Plan,
    values: Tensor,
    scope: Scope,
    *,
    alpha: float = 0.01,
    penalty: Literal["l1", "l2"] | None = "l1",
    kernel_width: float = 1.0,
) -> Solution:
    """Coefficients of a weighted linear fit with a free intercept (LIME, Ribeiro et al. 2016).

    Args:
        plan: Joined from `plan_anchors` and one or more `plan_lime`; anchors are not fitted.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target. Distances are those of the visible columns.
        alpha: Strength of the penalty, with scikit-learn's meaning: the lasso adds it to half the
            weighted mean of squares, ridge to the weighted sum.
        penalty: ``"l1"`` (lasso, Captum's default), ``"l2"`` (ridge), or None (least squares; of
            least norm where the rows do not determine it).
        kernel_width: Of Captum's default similarity ``exp(-d**2 / (2 * kernel_width**2))``, where d
            is the cosine distance of the visible mask to the full one; infinite weights all rows
            alike (the surrogate of ContextCite, arXiv 2409.00729).

    Returns:
        Attributions that need not sum to anything. Standard errors are clustered by draw
        (jackknife sandwich); NaN for the lasso.

    Raises:
        ValueError: If an option is out of range, or nothing was sampled.
    """
    if alpha < 0:
        raise ValueError(f"`alpha` is {alpha}: give 0 for no penalty, or a positive number.")
    if penalty not in ("l1", "l2", None):
        raise ValueError(f'`penalty` is {penalty!r}: give "l1", "l2" or None.')
    if not kernel_width > 0:
        raise ValueError(f"`kernel_width` is {kernel_width}: give a positive number.")
    solution = Solution.blank(len(scope.n_visible), plan.n_features)
    waiting: list[_Moments] = []
    for view in views(plan, values, scope):
        moments = _moments(view, kernel_width)
        if penalty == "l1":
            waiting.append(moments)
        else:
            solution.fill(view, *_linear(moments, alpha if penalty == "l2" else 0.0))
    together = max(_GRAM_MEMORY // max(8 * plan.n_features**2, 1), 1)
    for start in range(0, len(waiting), together):
        _fill_lasso(solution, waiting[start : start + together], alpha)
    return solution


@dataclass(frozen=True)
class _Moments:
    """A weighted regression with the intercept taken out; weights sum to 1.

    Attributes:
        view: Whose targets.
        x, y: Centred, ``(n_rows, n_visible)`` and ``(n_rows, n_group)``.
        weights: Shape ``(n_rows, 1)``.
        total: What the weights summed to.
        gram, product: ``x' W x`` and ``x' W y``.
    """

    view: View
    x: Tensor
    y: Tensor
    weights: Tensor
    total: float
    gram: Tensor
    product: Tensor


def _moments(view: View, kernel_width: float) -> _Moments:
    masks = view.masks[view.sampled]
    if not len(masks):
        raise ValueError(
            f"No sampled row has column {view.required} present, which targets "
            f"{view.targets.tolist()} need: raise `n_samples`."
        )
    distances = 1 - (masks.sum(1, keepdim=True) / max(masks.shape[1], 1)).double().sqrt()
    weights = torch.exp(-distances.square() / (2 * kernel_width**2))
    total = float(weights.sum())
    weights = weights / total
    x, y = masks.double(), view.values[view.sampled]
    x = x - (weights * x).sum(0)
    y = y - (weights * y).sum(0)
    weighted = (weights * x).T
    return _Moments(view, x, y, weights, total, weighted @ x, weighted @ y)


def _linear(moments: _Moments, alpha: float) -> tuple[Tensor, Tensor]:
    ridge = alpha / moments.total * torch.eye(len(moments.gram), dtype=torch.float64)
    inverse = torch.linalg.pinv(moments.gram + ridge, hermitian=True, rtol=1e-12)
    coefficients = inverse @ moments.product
    influence = moments.x @ inverse
    leverage = moments.weights * (1 + (influence * moments.x).sum(1, keepdim=True))
    left_out = (moments.y - moments.x @ coefficients) / (1 - leverage).clamp_min(0.01)
    draws = moments.view.draws[moments.view.sampled]
    return coefficients, sandwich(influence, moments.weights * left_out, draws)


def _fill_lasso(solution: Solution, batch: list[_Moments], alpha: float) -> None:
    """Solve the targets of several views at once: one step costs the same for all of them."""
    n = max(len(moments.gram) for moments in batch)
    grams = torch.zeros(len(batch), n, n, dtype=torch.float64)
    products: list[Tensor] = []
    groups: list[Tensor] = []
    for group, moments in enumerate(batch):
        visible, n_group = moments.product.shape
        grams[group, :visible, :visible] = moments.gram
        products.append(torch.nn.functional.pad(moments.product.T, (0, n - visible)))
        groups.append(torch.full((n_group,), group))
    coefficients = _lasso(grams, torch.cat(products), torch.cat(groups), alpha)
    for moments, ours in zip(
        batch, coefficients.split([len(group) for group in groups]), strict=True
    ):
        attributions = ours[:, : moments.view.n_visible].T
        solution.fill(moments.view, attributions, torch.full_like(attributions, torch.nan))


def _lasso(grams: Tensor, products: Tensor, groups: Tensor, alpha: float) -> Tensor:
    """Cyclic coordinate descent (Friedman et al. 2010, "Regularization paths", section 2.2).

    Args:
        grams: Shape ``(n_groups, n, n)``; a feature without variation has a row of zeros.
        products: Shape ``(n_target, n)``.
        groups: Whose Gram matrix a target has, shape ``(n_target,)``.
        alpha: Penalty.

    Returns:
        Shape ``(n_target, n)``.
    """
    coefficients = torch.zeros_like(products)
    slack = products.clone()
    curvature = grams.diagonal(dim1=1, dim2=2)
    varies = curvature > 1e-12
    # What never varies is never moved.
    inverse = torch.where(varies, 1 / curvature.clamp_min(1e-12), 0)[groups]
    curvature = curvature[groups]
    columns = varies.any(0).nonzero()[:, 0].tolist()
    moved = largest = 0.0
    for _ in range(_MOST_SWEEPS):
        moved = 0.0
        for column in columns:
            old = coefficients[:, column]
            wanted = slack[:, column] + curvature[:, column] * old
            new = torch.nn.functional.softshrink(wanted, alpha) * inverse[:, column]
            step = new - old
            size = float(step.abs().max())
            if size:
                slack -= step[:, None] * grams[groups, column]
                coefficients[:, column] = new
                moved = max(moved, size)
        largest = float(coefficients.abs().max()) if columns else 0.0
        if moved <= 1e-10 * largest:
            return coefficients
    if moved > 1e-4 * largest:
        warnings.warn(
            f"The lasso still moves by {moved:.1g} after {_MOST_SWEEPS} sweeps: its coefficients "
            "are approximate. More samples, fewer features or a larger `alpha` settle them.",
            RuntimeWarning,
            stacklevel=4,
        )
    return coefficients
