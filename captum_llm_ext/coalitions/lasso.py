"""Weighted regressions of many views, and their solution with an L1 penalty (lasso)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.coalitions.causal_scope import Solution, View

# The lasso converges after 12 to 112 sweeps (12 to 100 features, 2 and 8 rows per feature, `alpha`
# of .001 to .1); the rest is for nearly collinear columns. A warning says if it has not converged.
_MOST_SWEEPS = 1000
# Bytes of Gram matrices in memory at a time. Chosen, not measured.
_GRAM_MEMORY = 2**29


@dataclass(frozen=True)
class Regression:
    """Weighted normal equations of one view, centred so that the intercept drops out.

    Attributes:
        x, y: Centred, ``(n_rows, n_visible)`` and ``(n_rows, n_group)``.
        weights: Weights that sum to 1, shape ``(n_rows, 1)``.
        total: Their sum before normalisation.
        gram, product: ``x' W x`` and ``x' W y``.
        draws: Shape ``(n_rows,)``.
    """

    x: Tensor
    y: Tensor
    weights: Tensor
    total: float
    gram: Tensor
    product: Tensor
    draws: Tensor


def centred(view: View, kernel: Callable[[Tensor], Tensor]) -> Regression:
    """The regression of one view's values on its masks, without anchors.

    Args:
        view: Targets of one scope.
        kernel: Maps visible masks to positive weights of rows.

    Raises:
        ValueError: If no row was sampled for these targets.
    """
    masks = view.masks[view.sampled]
    if not len(masks):
        raise ValueError(
            f"No sampled row has column {view.required} present, which targets "
            f"{view.targets.tolist()} need: raise `n_samples`."
        )
    weights = kernel(masks).double()[:, None]
    total = float(weights.sum())
    weights = weights / total
    x, y = masks.double(), view.values[view.sampled]
    x = x - (weights * x).sum(0)
    y = y - (weights * y).sum(0)
    weighted = (weights * x).T
    draws = view.draws[view.sampled]
    return Regression(x, y, weights, total, weighted @ x, weighted @ y, draws)


def fill_lasso(
    solution: Solution,
    of_views: Iterable[View],
    kernel: Callable[[Tensor], Tensor],
    alpha: float,
    standardised: bool = False,
) -> None:
    """Solves the lassos of many views at once: a step over all costs as much as over one.

    Args:
        solution: Is filled in, without standard errors (NaN).
        of_views: Views of different targets.
        kernel: As for `centred`.
        alpha: Strength of the penalty.
        standardised: Whether columns are scaled to variance 1 before the penalty applies.

    Warns:
        RuntimeWarning: If it does not converge.
    """
    n = solution.attributions.shape[1]
    at_once = max(_GRAM_MEMORY // max(8 * n**2, 1), 1)
    waiting = iter(of_views)
    while batch := list(islice(waiting, at_once)):
        grams = torch.zeros(len(batch), n, n, dtype=torch.float64, device="cpu")
        products = torch.zeros_like(solution.attributions)
        units = torch.ones(len(batch), n, dtype=torch.float64, device="cpu")
        groups = torch.full((len(products),), -1, dtype=torch.int64, device="cpu")
        for group, view in enumerate(batch):
            n_seen, fit = view.n_visible, centred(view, kernel)
            unit = (
                fit.gram.diagonal().sqrt()
                if standardised
                else torch.ones(n_seen, dtype=torch.float64, device="cpu")
            )
            # Constant columns have no coefficient, whatever their unit.
            units[group, :n_seen] = unit.clamp_min(1e-12)
            grams[group] = torch.nn.functional.pad(fit.gram, (0, n - n_seen, 0, n - n_seen))
            products[view.targets, :n_seen] = fit.product.T
            groups[view.targets] = group
        ours = groups >= 0
        grams = grams / units[:, :, None] / units[:, None, :]
        of_target = units[groups[ours]]
        products[ours] = _lasso(grams, products[ours] / of_target, groups[ours], alpha) / of_target
        for view in batch:
            attributions = products[view.targets, : view.n_visible].T
            solution.fill(view, attributions, torch.full_like(attributions, torch.nan))


def _lasso(grams: Tensor, products: Tensor, groups: Tensor, alpha: float) -> Tensor:
    """Cyclic coordinate descent (Friedman et al. 2010, "Regularization paths", section 2.2).

    Args:
        grams: Shape ``(n_groups, n, n)``; a feature without variation has a row of zeros.
        products: Shape ``(n_target, n)``.
        groups: Index of each target's Gram matrix, shape ``(n_target,)``.
        alpha: Penalty.

    Returns:
        Shape ``(n_target, n)``.
    """
    coefficients = torch.zeros_like(products)
    slack = products.clone()
    curvature = grams.diagonal(dim1=1, dim2=2)
    varies = curvature > 1e-12
    # Constant columns are never updated.
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
        warn_user(
            f"The lasso still moves by {moved:.1g} after {_MOST_SWEEPS} sweeps: its coefficients "
            "are approximate. More samples, fewer features or a larger `alpha` would help.",
            RuntimeWarning,
        )
    return coefficients
