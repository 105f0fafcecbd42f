"""LIME: a weighted linear fit of every target on the columns it can depend on."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.coalitions.causal_scope import Scope, Solution, View, views
from captum_llm_ext.coalitions.clustered_errors import sandwich
from captum_llm_ext.coalitions.plans import Plan

# The lasso converges after 12 to 112 sweeps (12 to 100 features, 2 and 8 rows per feature, `alpha`
# of .001 to .1); the rest is for nearly collinear columns. A warning says if it has not converged.
_MOST_SWEEPS = 1000
# Bytes of Gram matrices in memory at a time. Chosen, not measured.
_GRAM_MEMORY = 2**29


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
        _fill_lasso(solution, views(plan, values, scope), kernel, alpha)
        return solution
    for view in views(plan, values, scope):
        solution.fill(view, *_linear(_centred(view, kernel), alpha if penalty else 0.0))
    return solution


def logit_scaled(log_probs: Tensor) -> Tensor:
    """Log-odds of probabilities given by their logarithms: ``log p - log(1 - p)``.

    Args:
        log_probs: In nats, any shape; NaN stays. Above -1e-7, which float32 cannot distinguish from
            certainty, they count as -1e-7, log-odds of 16.

    Returns:
        float64, same shape.

    Raises:
        ValueError: If one is positive.
    """
    log_probs = log_probs.double()
    if bool((log_probs > 1e-4).any()):
        raise ValueError(
            f"`log_probs` holds {float(log_probs.nan_to_num().max()):.3g}, more than log 1 = 0: "
            'give log-probabilities (`attr_target="log_prob"`).'
        )
    log_probs = log_probs.clamp_max(-1e-7)
    return log_probs - (-log_probs.expm1()).log()


def solve_contextcite(
    plan: Plan,
    log_probs: Tensor,
    scope: Scope,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    alpha: float = 0.01,
) -> Solution:
    """ContextCite: a sparse linear surrogate of a statement's log-odds.

    Cohen-Wang et al. 2024, "ContextCite: Attributing model generation to context", section 3
    (arXiv 2409.00729): coalitions with each feature present with probability 1/2, the log-odds of
    the whole statement, and a lasso. As in the authors' implementation, masks are standardised and
    the log-odds divided by the number of tokens before the penalty applies.

    Args:
        plan: Joined from `plan_anchors` and `plan_lime`; anchors are not fitted.
        log_probs: Log-probabilities of each target token, in nats, shape ``(n_coalitions,
            n_target)``.
        scope: One entry per target token.
        spans: Statements, as first and one past the last of their tokens; by default one, the whole
            target.
        alpha: Strength of the penalty, with scikit-learn's meaning.

    Returns:
        One row per span, in log-odds, without completeness and standard errors (NaN).

    Raises:
        ValueError: If a span is empty or outside the target, its tokens see different features, or
            an option is out of range.
    """
    n_target = len(scope.n_visible)
    spans = [(0, n_target)] if spans is None else list(spans)
    for start, end in spans:
        _check_span(start, end, scope)
    if not alpha >= 0:
        raise ValueError(f"`alpha` is {alpha}: give 0 for no penalty, or a positive number.")
    joint = torch.stack([log_probs[:, a:b].double().sum(1) for a, b in spans], 1)
    first = torch.tensor([start for start, _ in spans], dtype=torch.int64, device="cpu")
    lengths = torch.tensor([end - start for start, end in spans], dtype=torch.int64, device="cpu")
    values = logit_scaled(joint) / lengths
    seen = Scope(scope.n_visible[first], scope.required[first])
    solution = Solution.blank(len(spans), plan.n_features)
    _fill_lasso(
        solution, views(plan, values, seen), partial(cosine_kernel, width=math.inf), alpha, True
    )
    # Results are per token.
    parts = (solution.attributions, solution.full_values, solution.empty_values)
    for part in parts:
        part *= lengths.view(-1, *[1] * (part.dim() - 1))
    return solution


def _check_span(start: int, end: int, scope: Scope) -> None:
    n_target = len(scope.n_visible)
    if not 0 <= start < end <= n_target:
        raise ValueError(
            f"span ({start}, {end}) holds none of the {n_target} target tokens, or not only them: "
            "give the first and one past the last token."
        )
    kinds = torch.stack([scope.n_visible, scope.required], 1)[start:end]
    if len(kinds.unique(dim=0)) > 1:
        raise ValueError(
            f"the tokens of span ({start}, {end}) see different features, so that their joint "
            "probability belongs to no coalition: hold the output fixed (`output_unit=None`), or "
            "give spans of one token."
        )


@dataclass(frozen=True)
class _Regression:
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


def _centred(view: View, kernel: Callable[[Tensor], Tensor]) -> _Regression:
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
    return _Regression(x, y, weights, total, weighted @ x, weighted @ y, draws)


def _linear(fit: _Regression, alpha: float) -> tuple[Tensor, Tensor]:
    ridge = alpha / fit.total * torch.eye(len(fit.gram), dtype=torch.float64, device="cpu")
    inverse = torch.linalg.pinv(fit.gram + ridge, hermitian=True, rtol=1e-12)
    coefficients = inverse @ fit.product
    influence = fit.x @ inverse
    leverage = fit.weights * (1 + (influence * fit.x).sum(1, keepdim=True))
    left_out = (fit.y - fit.x @ coefficients) / (1 - leverage).clamp_min(0.01)
    return coefficients, sandwich(influence, fit.weights * left_out, fit.draws)


def _fill_lasso(
    solution: Solution,
    every: Iterable[View],
    kernel: Callable[[Tensor], Tensor],
    alpha: float,
    standardised: bool = False,
) -> None:
    """Solves the lassos of many views at once: a step over all costs as much as over one."""
    n = solution.attributions.shape[1]
    together = max(_GRAM_MEMORY // max(8 * n**2, 1), 1)
    waiting = iter(every)
    while batch := list(islice(waiting, together)):
        grams = torch.zeros(len(batch), n, n, dtype=torch.float64, device="cpu")
        products = torch.zeros_like(solution.attributions)
        units = torch.ones(len(batch), n, dtype=torch.float64, device="cpu")
        groups = torch.full((len(products),), -1, dtype=torch.int64, device="cpu")
        for group, view in enumerate(batch):
            n_seen, fit = view.n_visible, _centred(view, kernel)
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
