"""LIME: a weighted linear fit of every target on the columns it can depend on."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Scope, Solution, views
from captum_llm_ext.coalitions.clustered_errors import sandwich
from captum_llm_ext.coalitions.lasso import Regression, centred, fill_lasso
from captum_llm_ext.coalitions.plans import Plan


def cosine_kernel(masks: Tensor, width: float = 1.0) -> Tensor:
    """Captum's default similarity: from the cosine distance of each mask to the full one.

    Args:
        masks: bool, shape ``(n_rows, n_visible)``.
        width: Width of the exponential; infinite weights all rows equally (the surrogate of
            ContextCite, arXiv 2409.00729).

    Returns:
        ``exp(-distance**2 / (2 * width**2))``, float64, shape ``(n_rows,)``.
    """
    distance = 1 - (masks.sum(1).double() / max(masks.shape[1], 1)).sqrt()
    return torch.exp(-distance.square() / (2 * width**2))


def solve_lime(
    plan: Plan,
    values: Tensor,
    scope: Scope,
    *,
    alpha: float = 0.01,
    penalty: Literal["l1", "l2"] | None = "l1",
    kernel: Callable[[Tensor], Tensor] = cosine_kernel,
) -> Solution:
    """Coefficients of a weighted linear fit with a free intercept (LIME, Ribeiro et al. 2016).

    Args:
        plan: Joined from `plan_anchors` and one or more `plan_lime`; anchors are not fitted.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target. Distances refer to the visible columns.
        alpha: Strength of the penalty, with scikit-learn's meaning: the lasso adds it to half the
            weighted mean of squares, ridge to the weighted sum.
        penalty: ``"l1"`` (lasso, Captum's default), ``"l2"`` (ridge), or None (least squares; of
            minimum norm if underdetermined).
        kernel: Maps visible masks to positive weights of rows.

    Returns:
        Attributions without completeness. Standard errors are clustered by draw (jackknife
        sandwich); NaN for the lasso.

    Raises:
        ValueError: If an option is out of range, or nothing was sampled.
    """
    if alpha < 0:
        raise ValueError(f"`alpha` is {alpha}: give 0 for no penalty, or a positive number.")
    if penalty not in ("l1", "l2", None):
        raise ValueError(f'`penalty` is {penalty!r}: give "l1", "l2" or None.')
    solution = Solution.blank(len(scope.n_visible), plan.n_features)
    if penalty == "l1":
        fill_lasso(solution, views(plan, values, scope), kernel, alpha)
        return solution
    for view in views(plan, values, scope):
        solution.fill(view, *_linear(centred(view, kernel), alpha if penalty else 0.0))
    return solution


def _linear(fit: Regression, alpha: float) -> tuple[Tensor, Tensor]:
    ridge = alpha / fit.total * torch.eye(len(fit.gram), dtype=torch.float64, device="cpu")
    inverse = torch.linalg.pinv(fit.gram + ridge, hermitian=True, rtol=1e-12)
    coefficients = inverse @ fit.product
    influence = fit.x @ inverse
    leverage = fit.weights * (1 + (influence * fit.x).sum(1, keepdim=True))
    left_out = (fit.y - fit.x @ coefficients) / (1 - leverage).clamp_min(0.01)
    return coefficients, sandwich(influence, fit.weights * left_out, fit.draws)
