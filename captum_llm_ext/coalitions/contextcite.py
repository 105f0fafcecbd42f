"""ContextCite: a sparse linear surrogate of the log-odds of statements."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Scope, Solution, views
from captum_llm_ext.coalitions.lasso import fill_lasso
from captum_llm_ext.coalitions.lime import cosine_kernel
from captum_llm_ext.coalitions.plans import Plan


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
    fill_lasso(
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
