"""Additivity of values, and redundant features.

Both use stored coalitions and their values; the model is not called.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Scope, View, views
from captum_llm_ext.coalitions.enumeration import exact
from captum_llm_ext.coalitions.gaussian_process import factor, left_out_error
from captum_llm_ext.coalitions.interactions import relevance_of
from captum_llm_ext.coalitions.kernel import is_complete, kernel_weights, ridge
from captum_llm_ext.coalitions.plans import Plan

# How fast relevance falls with the order of an interaction, and noise relative to the variance: the
# pair with the smallest left-out error is used. On games of 30 and 60 features with three redundant
# pairs, three complementary ones and noise, 16 rows per feature, these find .50 to .60 of the
# redundant pairs, (1, 3) .35 to .57, 3 alone .08 to .58; no other pair is reported. A single noise
# of .01 finds fewer if there is more noise, and reports others. Strong pairs are all found.
_REACHES, _NOISE = (0.25, 0.5, 1.0), (1e-3, 1e-2, 1e-1, 1.0)
# On the same games, half as many rows find .08 to .67, a search on half as many .08 to .75; twice
# as many rows find more for 60 features (.67 instead of .50) in 2.5 times the time (.03 s per
# target); searches on more do not help. With 12 features .50 to .67 are found, with 48 as many as
# with 24.
_MOST_ROWS, _MOST_FOR_SEARCH, _MOST_FEATURES = 768, 256, 24


@dataclass(frozen=True)
class RedundantPair:
    """Two redundant features: removing one changes little, removing both changes much.

    Attributes:
        first, second: The columns of the two features.
        alone: Loss without the first, and without the second, in the unit of the values.
        together: Loss without both.
        z_score: ``together`` minus the sum of ``alone``, in standard errors; infinite if every
            coalition was scored.
    """

    first: int
    second: int
    alone: tuple[float, float]
    together: float
    z_score: float


def additive_fit(plan: Plan, values: Tensor, scope: Scope) -> Tensor:
    """Share of the variance over coalitions that an additive model explains (R²).

    Coalitions are weighted by the Shapley kernel (Lundberg and Lee 2017, section 4.1), and each is
    predicted by the regression on the others, so that few coalitions do not look like a good fit.
    If every coalition was scored, it is the R² of the Shapley values themselves.

    Args:
        plan: Joined from `plan_anchors` and plans of uniform sizes (`plan_pairs`,
            `plan_permutations`), or `plan_exact`.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target.

    Returns:
        R², shape ``(n_target,)``: 1 for an additive game, below 0 if the mean predicts better, NaN
        if nothing was sampled. Replacement texts that vary count as unexplained.
    """
    shares = torch.full((len(scope.n_visible),), torch.nan, dtype=torch.float64, device="cpu")
    for view in views(plan, values, scope):
        shares[view.targets] = _additive_share(view)
    return shares


def redundant_pairs(
    plan: Plan, values: Tensor, scope: Scope, *, most: int = 5, least_z: float = 3.0
) -> list[list[RedundantPair]]:
    """Pairs of features of which either one is sufficient.

    Losses without one or two features are exact if all coalitions were scored, otherwise predicted
    by a Gaussian process over interactions of all orders. With many features, the 24 of largest
    attribution are examined.

    Args:
        plan: As for `additive_fit`.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target.
        most: Maximum number of pairs per target.
        least_z: Number of standard errors by which the joint loss must exceed the sum of the single
            losses.

    Returns:
        For each target, the pairs whose joint loss is more than twice as large as either alone, and
        larger than both together by `least_z`; the largest excess first.
    """
    found: list[list[RedundantPair]] = [[] for _ in scope.n_visible]
    for view in views(plan, values, scope):
        for column, target in enumerate(view.targets.tolist()):
            losses = _losses(view, column)
            found[target] = [] if losses is None else _redundant(losses, most, least_z)
    return found


@dataclass(frozen=True)
class _Losses:
    """Change of the value without single features and without pairs of them.

    Attributes:
        features: Columns, ``(n,)``.
        alone: ``(n,)``.
        together: ``(n, n)``, meaningful above the diagonal.
        error: Standard error of ``together[i, j] - alone[i] - alone[j]``, ``(n, n)``.
    """

    features: Tensor
    alone: Tensor
    together: Tensor
    error: Tensor


def _redundant(losses: _Losses, most: int, least_z: float) -> list[RedundantPair]:
    alone, together = losses.alone, losses.together
    excess = together - alone[:, None] - alone
    z = excess * together.sign() / losses.error
    each = torch.maximum(alone.abs()[:, None], alone.abs())
    least = 1e-9 * together.abs().max()  # rounding is not redundancy
    flagged = (2 * each < together.abs()) & (z >= least_z) & (excess.abs() > least)
    pairs = flagged.triu(1).nonzero()
    order = excess[pairs[:, 0], pairs[:, 1]].abs().argsort(descending=True)[:most]
    return [
        RedundantPair(
            first=int(losses.features[i]),
            second=int(losses.features[j]),
            alone=(float(alone[i]), float(alone[j])),
            together=float(together[i, j]),
            z_score=float(z[i, j]),
        )
        for i, j in pairs[order].tolist()
    ]


def _additive_share(view: View) -> Tensor:
    n = view.n_visible
    if n < 2:
        return torch.ones(len(view.targets), dtype=torch.float64, device="cpu")
    rows = view.informative.nonzero()[:, 0]
    if not len(rows):
        return torch.full((len(view.targets),), torch.nan, dtype=torch.float64, device="cpu")
    gain = view.full_values - view.empty_values
    if is_complete(view):
        return _share_of_all(view, exact(view)[0])
    weights = kernel_weights(view, rows)[:, None]
    values = view.values[rows]
    spread = (weights * (values - (weights * values).sum(0) / weights.sum()).square()).sum(0)

    # Attributions cannot explain the common part of a coalition and its complement.
    level = values - view.empty_values - gain * view.sizes[rows, None] / n
    paired = view.paired[rows, None]
    even = ((level + level.roll(-1, 0)) / 2).square() * paired * 2 * weights
    unexplained = ridge(view)[2] * weights.sum() + even.sum(0)
    return _share(unexplained, spread)


def _share_of_all(view: View, attributions: Tensor) -> Tensor:
    """Like `_additive_share`, if every coalition was scored; repetitions count once."""
    n = view.n_visible
    rows = view.informative
    codes = (view.masks[rows].long() << torch.arange(n, device="cpu")).sum(1)
    sizes = view.sizes[rows].double()
    log_weights = (sizes + 1).lgamma() + (n - sizes + 1).lgamma() - (sizes * (n - sizes)).log()
    weights = (log_weights - log_weights.max()).exp() / codes.bincount()[codes]
    weights = weights[:, None]
    values = view.values[rows]
    spread = (weights * (values - (weights * values).sum(0) / weights.sum()).square()).sum(0)
    left = values - view.empty_values - view.masks[rows].double() @ attributions
    return _share((weights * left.square()).sum(0), spread)


def _share(unexplained: Tensor, spread: Tensor) -> Tensor:
    constant = spread <= 1e-20
    return torch.where(constant, 1.0, 1 - unexplained / spread.clamp_min(1e-20))


def _losses(view: View, column: int) -> _Losses | None:
    n = view.n_visible
    if n < 2 or not bool(view.informative.any()):
        return None
    if is_complete(view) and not float(view.empty_variances[column]):
        return _looked_up(view, column)
    deviations = ridge(view)[0][:, column]
    gain = float(view.full_values[column] - view.empty_values[column])
    return _predicted(view, column, gain / n + deviations)


def _looked_up(view: View, column: int) -> _Losses:
    n = view.n_visible
    codes = (view.masks.long() << torch.arange(n, device="cpu")).sum(1)
    worth = torch.zeros(2**n, dtype=torch.float64, device="cpu")
    worth.index_add_(0, codes, view.values[:, column])
    worth /= codes.bincount(minlength=2**n)
    bit = 2 ** torch.arange(n, device="cpu")
    alone = worth[-1] - worth[2**n - 1 - bit]
    pairs = 2**n - 1 - (bit[:, None] | bit)
    together = worth[-1] - worth[pairs]
    return _Losses(
        torch.arange(n, device="cpu"),
        alone,
        together,
        torch.zeros(n, n, dtype=torch.float64, device="cpu"),
    )


def _predicted(view: View, column: int, attributions: Tensor) -> _Losses:
    """Losses predicted by a Gaussian process around the additive fit (see `interactions`)."""
    features = attributions.abs().topk(min(len(attributions), _MOST_FEATURES)).indices.sort()[0]
    signs, y = _residuals(view, column, attributions)
    scale = y.square().mean().sqrt().clamp_min(1e-30)
    relevance = relevance_of(attributions, 0.1)
    few = torch.arange(0, len(y), max(len(y) // _MOST_FOR_SEARCH, 1), device="cpu")[
        :_MOST_FOR_SEARCH
    ]
    _, reach, noise = min(
        (left_out_error(_agreement(signs[few], signs[few], r * relevance), e, y[few]), r, e)
        for r in _REACHES
        for e in _NOISE
    )
    relevance = reach * relevance
    covariance = _agreement(signs, signs, relevance)
    cholesky, _ = factor(covariance, noise)
    solved = torch.cholesky_solve((y / scale)[:, None], cholesky)[:, 0]

    m = len(features)
    first, second = torch.triu_indices(m, m, 1, device="cpu")
    points = torch.ones(1 + m + len(first), view.n_visible, dtype=torch.float64, device="cpu")
    points[1 + torch.arange(m, device="cpu"), features] = -1
    points[1 + m + torch.arange(len(first), device="cpu"), features[first]] = -1
    points[1 + m + torch.arange(len(first), device="cpu"), features[second]] = -1
    cross = _agreement(points, signs, relevance)
    moved = scale * (cross @ solved)
    alone = moved[0] - moved[1 : 1 + m]
    together = torch.zeros(m, m, dtype=torch.float64, device="cpu")
    together[first, second] = moved[0] - moved[1 + m :]
    own = attributions[features]
    alone, together = alone + own, together + (own[:, None] + own)

    # Variance of f(without i) + f(without j) - f(full) - f(without both): prior minus explained.
    contrast = cross[1 + first] + cross[1 + second] - cross[0] - cross[1 + m :]
    prior = _contrast_variance(points, relevance, first, second, m)
    explained = (contrast @ torch.cholesky_inverse(cholesky) * contrast).sum(1)
    size = (y / scale @ solved) / len(y) * scale.square()
    error = torch.full((m, m), torch.inf, dtype=torch.float64, device="cpu")
    error[first, second] = (size * (prior - explained)).clamp_min(1e-30).sqrt()
    return _Losses(features, alone, together, error)


def _residuals(view: View, column: int, attributions: Tensor) -> tuple[Tensor, Tensor]:
    rows = view.informative.nonzero()[:, 0]
    rows = rows[:: max(-(-len(rows) // _MOST_ROWS), 1)]
    masks = view.masks[rows].double()
    y = view.values[rows, column] - view.empty_values[column] - masks @ attributions
    # The full coalition is known to have no residual.
    full = torch.ones(1, view.n_visible, dtype=torch.float64, device="cpu")
    return torch.cat([full, 2 * masks - 1]), torch.cat(
        [torch.zeros(1, dtype=y.dtype, device="cpu"), y]
    )


def _agreement(left: Tensor, right: Tensor, relevance: Tensor) -> Tensor:
    """Product kernel over interactions of all orders, 1 where two masks agree on everything."""
    return ((left * relevance) @ right.T - relevance.sum()).exp()


def _contrast_variance(
    points: Tensor, relevance: Tensor, first: Tensor, second: Tensor, m: int
) -> Tensor:
    """Prior variances of the contrasts of four corners: a product over the two features."""
    differing = 1 - (-2 * relevance).exp()
    features = (points[1 : 1 + m] < 0).int().argmax(1)
    own = 2 * differing[features]
    return own[first] * own[second]
