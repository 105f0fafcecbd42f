"""Shapley values from a handful of complementary pairs, such as those of a surrogate's error.

With fewer pairs than features, unbiased estimates are worse than zero for all features: the squares
of the attributions sum to about the variance of the values, and unbiased estimates have that error
for every feature and pair. Estimates are therefore shrunk towards equal attributions, as far as the
pairs say: the share of the variance that attributions explain is unknown, all of its values are
equally likely beforehand, and what they imply is averaged by their likelihood.
"""

import math

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Scope, Solution, View, solve_changing_views
from captum_llm_ext.coalitions.clustered_errors import gap_shares, normal_scale
from captum_llm_ext.coalitions.kernel import (
    EFFORT,
    Observations,
    exact_attributions,
    is_complete,
    observe,
    regress,
)
from captum_llm_ext.coalitions.plans import Plan

# Pairs per feature from which a regression's own standard errors are valid: with 11 pairs for 7
# features it nearly interpolated, and was off by 43 of them; over 24 games at most by 5.4 with 1.5
# pairs and 3.0 with 3.
_DETERMINED = 3.0
# Weight, in draws, of the error expected from all features. Chosen, not measured.
_LEANING = 4
# Shares of the variance explained by attributions.
_SHARES = torch.cat(
    [
        torch.linspace(0, 0.95, 20, dtype=torch.float64, device="cpu"),
        torch.tensor([0.98, 0.99, 0.999, 0.9999], dtype=torch.float64, device="cpu"),
    ]
)
# Likelihood of the shares that count for errors, relative to the most likely one. 95 % intervals
# then cover .92 to 1.00 in games of noise, of one and of many effects and of interactions with 5,
# 10 and 36 features and 4 to 16 pairs, 24 each. Averaged by likelihood they cover .82 to 1.00; with
# exp(-1.9), .93 to 1.00, and errors are told to be 1.6 times as large as they are.
_LEAST_LIKELY = math.exp(-1)
# Distance in standard errors by which an estimate is moved at most from the unbiased one: all
# effects being equally likely, a single large one would be lost (Efron and Morris 1972, "Limiting
# the risk of Bayes and empirical Bayes estimators"). Chosen, not measured: between 1 and 2, which
# they recommend.
_MOST_MOVED = 1.5


def solve_few_pairs(plan: Plan, values: Tensor, scope: Scope) -> Solution:
    """Like `solve_kernel`, with valid standard errors from a handful of pairs on.

    Below six coalitions per feature a regression has no valid errors. Then the mean over pairs of
    each one's estimate (Covert and Lee 2021, arXiv 2012.01536, equation 10) is shrunk towards equal
    attributions: if values are mostly noise, such as the difference of a model and a rounded copy,
    its error falls by the number of features over that of pairs, or more.
    """
    effort = scope.share(EFFORT)

    def solve(view: View) -> tuple[Tensor, Tensor]:
        n = view.n_visible
        gain = view.full_values - view.empty_values
        if n < 2:
            return gain.expand(n, -1), view.empty_variances.expand(n, -1)
        if is_complete(view):
            found = exact_attributions(view)
            # Every coalition once, with random texts: the solution is complete, but without an
            # error. Pairs give one.
            if not bool(found[1].isnan().any()):
                return found
        observed = observe(view, gain)
        if len(observed.x) >= _DETERMINED * n:
            return regress(view, effort)
        deviations, variances = _limited(_shrunk(observed), _unbiased(observed))
        return gain / n + deviations, variances + view.empty_variances / n**2

    return solve_changing_views(plan, values, scope, solve)


def _limited(
    shrunk: tuple[Tensor, Tensor], unbiased: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Shrunk estimates and variances, where they are not too far from the unbiased ones."""
    estimates, variances = shrunk
    centre, own = unbiased
    most = _MOST_MOVED * own.sqrt()
    limited = estimates.clamp(centre - most, centre + most)
    # Unknown variances of a single pair limit nothing.
    moved = (limited != estimates) & ~own.isnan()
    estimates = torch.where(moved, limited, estimates)
    variances = torch.where(moved, variances.maximum(own), variances)
    return estimates - estimates.sum(0) * gap_shares(variances), variances


def _shrunk(observed: Observations) -> tuple[Tensor, Tensor]:
    """Posterior deviations from equal attributions and variances, ``(n_visible, n_group)``.

    Deviations are normal with one variance, and sum to 0; so is the rest of the values. For each
    share of the variance that the former explain, the scale is the most likely one.
    """
    root = observed.weights.sqrt()[:, None]
    x, y = observed.x * root, observed.y * root
    n_observations, n = x.shape
    if not n_observations:
        nothing = torch.zeros(n, y.shape[1], dtype=y.dtype, device="cpu")
        return nothing, nothing + torch.nan
    gram = x @ x.T
    level = gram.diagonal().mean()
    eigenvalues, vectors = torch.linalg.eigh(gram / level)
    x, y = vectors.T @ x, vectors.T @ y
    shares = _SHARES[:, None]
    spread = shares * eigenvalues.clamp_min(0) + 1 - shares  # (n_shares, n_observations)
    solved = y / spread[:, :, None]
    scale = (y * solved).mean(1).clamp_min(torch.finfo(y.dtype).tiny)
    likelihood = -(n_observations * scale.log() + spread.log().sum(1, keepdim=True)) / 2
    likelihood = (likelihood - likelihood.amax(0)).exp()

    size = (shares / level)[:, :, None]
    each = size * torch.einsum("on,sot->snt", x, solved)
    deviations = (likelihood[:, None] * each).sum(0) / likelihood.sum(0)
    unexplained = 1 - 1 / n - size[:, :, 0] * (x.square()[None] / spread[:, :, None]).sum(1)
    variances = scale[:, None] * (size * unexplained.clamp_min(0)[:, :, None])
    variances = variances * normal_scale(n_observations) ** 2 + (each - deviations).square()
    # The largest that is not excluded: those averaged would be too small if there are effects.
    variances = variances.masked_fill((likelihood < _LEAST_LIKELY)[:, None], 0)
    return deviations, variances.amax(0)


def _unbiased(observed: Observations) -> tuple[Tensor, Tensor]:
    """Deviations from equal attributions and their variances, ``(n_visible, n_group)``.

    The sampling distribution is symmetric in the features: the expected Gram matrix is a multiple
    of the identity on vectors that sum to 0, and only this multiple is estimated.
    """
    x, y, weights = observed.x, observed.y, observed.weights[:, None]
    n_observations, n = x.shape
    if not n_observations:
        nothing = torch.zeros(n, y.shape[1], dtype=y.dtype, device="cpu")
        return nothing, nothing + torch.nan
    sizes = weights * x.square().sum(1, keepdim=True) / (n - 1)
    level = sizes.mean()
    deviations = (weights * x).T @ y / (n_observations * level)
    clusters, which = observed.draws.unique(return_inverse=True)
    # The contribution of each draw to the sum, minus what its weight explains.
    own = x[:, :, None] * (weights * y)[:, None] - sizes[:, :, None] * deviations
    sums = torch.zeros(len(clusters), *own.shape[1:], dtype=own.dtype, device="cpu")
    sums.index_add_(0, which, own)
    n_draws = len(clusters)
    if n_draws < 2:
        return deviations, torch.full_like(deviations, torch.nan)
    spread = sums.square().sum(0) * n_draws / (n_draws - 1)
    variances = spread / (n_observations * level) ** 2
    # With few draws, some features happen to have almost no data: each is shrunk to the mean of
    # all.
    shared = variances.mean(0, keepdim=True)
    variances = ((n_draws - 1) * variances + _LEANING * shared) / (n_draws - 1 + _LEANING)
    return deviations, variances * normal_scale(n_draws - 1) ** 2
