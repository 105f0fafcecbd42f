"""Shapley values by regression on coalitions of uniform size."""

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import (
    Scope,
    Solution,
    View,
    solve_changing_views,
)
from captum_llm_ext.coalitions.clustered_errors import sandwich
from captum_llm_ext.coalitions.enumeration import exact
from captum_llm_ext.coalitions.interactions import Interactions, cost
from captum_llm_ext.coalitions.plans import Plan

# Ridge penalties tried, in units of the mean eigenvalue. Half or twice as large, median errors of
# ten games (`benchmarks/games.py`, 24 and 64 features, 4 to 16 evaluations each) differ by at most
# 1.6 %.
_PENALTIES = torch.cat(
    [
        torch.zeros(1, dtype=torch.float32, device="cpu"),
        torch.logspace(-6, 1.5, 31, dtype=torch.float32, device="cpu"),
    ]
).double()
# With fewer observations, interactions cannot be distinguished from noise. Half or twice as many
# change no digit on the games above: only very short samples come near it.
_FEWEST_OBSERVATIONS = 8
# A Gaussian process on a smaller part of the observations adds nothing to a regression on all. Only
# many targets, or many features, exhaust the effort and come near it; the games above do not.
_LARGEST_STRIDE = 8
_MOST_OF_WALKS = 1024  # observations of walks that a ridge is fitted to; chosen, not measured
# Entries of a matrix of interactions, several of which are in memory at a time. Chosen, not
# measured.
_MOST_ENTRIES = 2**24
# Floating point operations spent on interactions: some seconds on two cores. A limit of time: the
# games above need less than half of it, and less of it fits fewer rows, which costs accuracy.
EFFORT = 3e11
# The additional share of effort for learning which features interact. Chosen, not measured.
_LEARNING = 1 / 3
# Columns multiplied at a time. Chosen, not measured.
_BLOCK = 96


def solve_kernel(plan: Plan, values: Tensor, scope: Scope, *, effort: float = EFFORT) -> Solution:
    """KernelSHAP's estimand (Lundberg and Lee 2017, section 4.1) from complementary pairs.

    The usual choice for more than a dozen features; for unbiased estimates, and exact zeros of
    dummy features, see `solve_permutations`.

    Differences within pairs are regressed on the masks with importance weights that turn uniform
    sizes into the Shapley kernel (Leverage SHAP, arXiv 2410.01917), under the constraint that the
    attributions sum to ``full - empty``; generalised cross-validation chooses the ridge.
    `Interactions` replaces this for targets whose left-out values it predicts better, on as many
    rows as `effort` allows.

    Args:
        plan: Joined from `plan_anchors` and one or more `plan_pairs`.
        values: Shape ``(n_coalitions, n_target)``.
        scope: One entry per target. Rows that are empty or full on the visible columns of a target
            only count for its full and empty values.
        effort: Floating point operations that all targets together may spend on interactions, as
            forecast; 0 for none. The default takes some seconds on two cores, whatever the shape.

    Returns:
        Attributions that sum to ``full - empty``. Standard errors are clustered by draw (jackknife
        sandwich) or those of the interaction model. A plan with every coalition equally often gives
        the exact values, with standard error 0 if the empty coalition has the same value in every
        draw.
    """
    effort = scope.share(effort)

    def solve(view: View) -> tuple[Tensor, Tensor]:
        return exact_attributions(view) if is_complete(view) else regress(view, effort)

    return solve_changing_views(plan, values, scope, solve)


def exact_attributions(view: View) -> tuple[Tensor, Tensor]:
    """Attributions of a view with every coalition, and their variances."""
    attributions, variances = exact(view)
    unrepeated = variances.isnan() & (view.empty_variances == 0)
    return attributions, variances.masked_fill(unrepeated, 0)


def regress(view: View, effort: float) -> tuple[Tensor, Tensor]:
    """Attributions of one view and their variances, both ``(n_visible, n_group)``.

    Args:
        view: Sizes of the sampled rows must be uniform on all columns of the plan.
        effort: Floating point operations per target for interactions.
    """
    n = view.n_visible
    gain = view.full_values - view.empty_values
    if n < 2:
        return gain.expand(n, -1), view.empty_variances.expand(n, -1)
    observed = observe(view, gain)
    # Rows of a walk are dependent: when left out, they are predicted by their neighbours instead of
    # by the model. The ridge then fits the noise; thinning them loses little.
    walks = len(observed.draws.unique()) < len(observed.draws)
    if walks:
        observed = observed.thinned(_MOST_OF_WALKS)
    deviations, variances, errors = _ridge(observed)
    stride = _affordable(len(observed.x), n, effort)
    if n > 2 and stride and not (walks and stride > 1):
        model = Interactions(observed.x, observed.weights, observed.paired, stride)
        for target, y in enumerate(observed.y.T):
            fit = model.fit(y, gain[target] / n + deviations[:, target], effort * _LEARNING)
            if walks or fit.error < errors[target]:
                least = variances[:, target] * (fit.error / errors[target]).nan_to_num()
                deviations[:, target], variances[:, target] = fit.deviations, fit.variances
                if not walks and bool(view.empty_variances[target] > 0):
                    # What texts drawn at random add is noise to any model, and relevances are
                    # learnt from it: without this, 95 % intervals cover .79 to .87.
                    variances[:, target] = variances[:, target].maximum(least)
    return gain / n + deviations, variances + view.empty_variances / n**2


def _affordable(n_observations: int, n_features: int, effort: float) -> int:
    """The smallest stride at which interactions cost no more than `effort`, 0 if there is none."""
    for stride in range(1, _LARGEST_STRIDE + 1):
        n_fitted = -(-n_observations // stride)
        if n_fitted < _FEWEST_OBSERVATIONS:
            return 0
        entries = n_observations * n_fitted
        if entries <= _MOST_ENTRIES and cost(n_observations, n_fitted, n_features) <= effort:
            return stride
    return 0


@dataclass(frozen=True)
class Observations:
    """Observations of a regression constrained by the empty and the full coalition.

    Attributes:
        x: Masks minus the share present, ``(n_observations, n_visible)``: rows sum to 0, so that
            deviations from equal attributions keep their sum.
        y: Values minus those of equal attributions, ``(n_observations, n_group)``.
        weights: Shapley kernel over the sampling distribution, ``(n_observations,)``, mean 1.
        draws: ``(n_observations,)``.
        paired: bool, ``(n_observations,)``: half the difference of a coalition and its complement.
        chance: bool, ``(n_observations, n_group)``: whether the observation is random.
    """

    x: Tensor
    y: Tensor
    weights: Tensor
    draws: Tensor
    paired: Tensor
    chance: Tensor

    def thinned(self, most: int) -> "Observations":
        """At most `most` observations, evenly spaced."""
        rows = torch.arange(0, len(self.x), max(-(-len(self.x) // most), 1), device="cpu")
        weights = self.weights[rows]
        return Observations(
            self.x[rows],
            self.y[rows],
            weights / weights.mean(),
            self.draws[rows],
            self.paired[rows],
            self.chance[rows],
        )


def observe(view: View, gain: Tensor) -> Observations:
    """Observations of a view; `gain` is the value of the full minus that of the empty mask."""
    rows = view.informative.nonzero()[:, 0]
    sizes, draws, paired = view.sizes[rows, None].double(), view.draws[rows], view.paired[rows]
    y = view.values[rows] - view.empty_values - gain * sizes / view.n_visible
    weights = kernel_weights(view, rows)
    # A complement has the weight of its coalition and the opposite x: one difference contains both.
    y = torch.where(paired[:, None], (y - y.roll(-1, 0)) / 2, y)
    weights = torch.where(paired, 2 * weights, weights)
    # Steps of a walk that add invisible columns repeat the previous row.
    repeated = torch.zeros_like(paired)
    repeated[1:] = (draws[1:] == draws[:-1]) & (sizes[1:] == sizes[:-1])[:, 0] & ~paired[:-1]
    weights = weights * _run_lengths(repeated)

    keep = ~(repeated | paired.roll(1))
    rows, weights = rows[keep], weights[keep]
    x = view.masks[rows].double() - sizes[keep] / view.n_visible
    # If replacement texts do not vary, a complete size is not random.
    chance = ~view.complete[rows, None] | (view.empty_variances > 0)
    return Observations(x, y[keep], weights / weights.mean(), draws[keep], paired[keep], chance)


def kernel_weights(view: View, rows: Tensor) -> Tensor:
    """Shapley kernel over the sampling distribution, shape ``(n_rows,)``; 0 for empty and full."""
    sizes = view.sizes[rows].double()
    weights = view.weights[rows] / (sizes * (view.n_visible - sizes))
    # Given that one more column is present, larger coalitions are likelier: u has density 2u.
    return weights / (sizes + 1) if view.required >= 0 else weights


def ridge(view: View) -> tuple[Tensor, Tensor, Tensor]:
    """The additive fit to one view.

    Returns:
        Deviations from equal attributions and their variances, ``(n_visible, n_group)``, and
        weighted mean squares of left-out residuals, ``(n_group,)``.
    """
    return _ridge(observe(view, view.full_values - view.empty_values))


def _run_lengths(repeated: Tensor) -> Tensor:
    """The length of each run of repetitions, at each of its rows."""
    run = (~repeated).cumsum(0) - 1
    return run.bincount()[run].double()


def _gram(x: Tensor) -> Tensor:
    """``x.T @ x``, of which only one triangle is computed."""
    n = x.shape[1]
    gram = x.new_empty(n, n)
    for start in range(0, n, _BLOCK):
        block = slice(start, start + _BLOCK)
        part = x[:, start:].T @ x[:, block]
        gram[start:, block] = part
        gram[block, start:] = part.T
    return gram


def _ridge(observed: Observations) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations from equal attributions, their variances, and mean squared left-out residuals."""
    x, y, weights = observed.x, observed.y, observed.weights[:, None]
    n_observations, n = x.shape
    if not n_observations:
        nothing = torch.zeros(n, y.shape[1], dtype=y.dtype, device="cpu")
        return nothing, nothing + torch.nan, nothing.sum(0)
    rooted = x * weights.sqrt()
    eigenvalues, vectors = torch.linalg.eigh(_gram(rooted))
    # The direction in which all attributions grow together is fixed by the constraint.
    live = eigenvalues > 1e-10 * eigenvalues[-1]
    determined = int(live.sum()) == n - 1 and n_observations > n
    penalties = _PENALTIES[0 if determined else 1 :, None] * eigenvalues[live].mean()
    inverses = torch.where(live, 1 / (eigenvalues + penalties), 0)
    projected = vectors.T @ (rooted.T @ (y * weights.sqrt()))

    explained = ((2 - eigenvalues * inverses) * inverses) @ projected.square()
    unexplained = ((weights * y.square()).sum(0) - explained).clamp_min(0)
    freedom = n_observations - (eigenvalues * inverses).sum(1, keepdim=True)
    chosen = (unexplained / freedom.clamp_min(1e-6).square()).argmin(0)
    deviations = vectors @ (inverses[chosen].T * projected)

    variances, errors = torch.empty_like(deviations), torch.empty_like(deviations[0])
    residuals = y - x @ deviations
    # Standard errors and a comparison need no more precision, which halves the time.
    x, residuals, weights = x.float(), residuals.float(), weights.float()
    for choice in chosen.unique().tolist():
        ours = chosen == choice
        influence = x @ ((vectors * inverses[choice]) @ vectors.T).float()
        leverage = weights * (influence * x).sum(1, keepdim=True)
        left_out = residuals[:, ours] / (1 - leverage).clamp_min(0.01)
        errors[ours] = (weights * left_out.square()).mean(0).double()
        varying = weights * left_out * observed.chance[:, ours]
        variances[:, ours] = sandwich(influence, varying, observed.draws).double()
    return deviations, variances, errors


def is_complete(view: View) -> bool:
    """Whether every coalition was scored, equally often if replacement texts vary."""
    n, masks = view.n_visible, view.masks[view.sampled]
    if n < 2 or len(masks) < 2**n - 2:
        return False
    # The empty and the full coalition are anchors, too.
    counts = (masks.long() << torch.arange(n, device="cpu")).sum(1).bincount(minlength=2**n)[1:-1]
    return bool(counts.all()) and _settled(counts, view)


def _settled(counts: Tensor, view: View) -> bool:
    return bool((counts == counts[0]).all()) or not bool(view.empty_variances.any())
