"""Shapley values of a Gaussian process over interactions.

Only odd interactions affect Shapley values, and pairs (S, complement) observe exactly these
(OddSHAP, arXiv 2602.01399). Here all odd interactions are fitted at once, by their kernel: the
prior variance of each is the product of its features' relevances, so features that matter alone are
expected to interact; a second kernel expects interactions among neighbours. Relevances are then
learnt from the values. With KernelSHAP's weights the fit keeps the estimand: the residual is
orthogonal to every additive game.

If there are more observations than the effort allows, the process is fitted to some of them, and
the rest corrects its attributions: a regression adjustment (Witter et al., arXiv 2506.11849).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from captum_llm_ext.coalitions.gaussian_process import LEAST_NOISE, GridSearch, factor

# Neighbours are up to this many columns apart. With 8, mean errors of ten games
# (`benchmarks/games.py`) rise by 2 % (64 features) to 18 % (24); groups of three need at least 3.
_REACH = 4
# With these four values, 24 games of 36 and 100 features (`benchmarks/games.py`) are solved as well
# as with twice as many rows and steps, in a half to a third of the time; without learning, errors
# double.
_MOST_FOR_SEARCH = 128
_SEARCH_STEPS = 20  # of strength and noise, as counted in costs; about as many are usual
# Relevances are learnt from this many rows, by steps of this size in their logarithms.
_MOST_FOR_LEARNING = 320
_LEARNING_STEPS = 6
_LEARNING_RATE = 0.4
# Maximum iterations of a fixed point, which three usually reach.
_ROUNDS = 8
_TINY = 1e-30  # avoids logarithms of 0
# Gauss-Legendre nodes: interactions of up to 16 features are integrated exactly.
_LOWER_NODES = (0.0198550718, 0.1016667613, 0.2372337950, 0.4082826788)
_NODES = torch.tensor(
    [*_LOWER_NODES, *(1 - node for node in _LOWER_NODES)], dtype=torch.float64, device="cpu"
)
_NODE_WEIGHTS = torch.tensor(
    2 * (0.0506142681, 0.1111905172, 0.1568533229, 0.1813418917), dtype=torch.float64, device="cpu"
)


class _Kind(NamedTuple):
    """A kernel: how relevance falls with the order of an interaction, and whether it is local."""

    reach: float
    local: bool


# Initial kernels, of which the best is used. Without one of the first three, errors change by 3 %
# (24 games of 36 features, 12 of 100, 8 and 16 rows per feature, geometric mean; without 6, those
# of attention by a tenth); without the last one they are 15 % larger, for games with terms over
# neighbours by half.
_KINDS = (_Kind(1.0, False), _Kind(3.0, False), _Kind(6.0, False), _Kind(3.0, True))


@dataclass(frozen=True)
class Fit:
    """The solution for one target.

    Attributes:
        deviations: Deviations from equal attributions, shape ``(n_features,)``.
        variances: Posterior variances.
        error: Weighted mean squared leave-one-out error.
    """

    deviations: Tensor
    variances: Tensor
    error: float


def cost(n_observations: int, n_fitted: int, n_features: int) -> float:
    """Floating point operations of one `Interactions.fit`, to within a factor of two."""
    few = min(n_fitted, _MOST_FOR_SEARCH)
    near = n_features * _REACH * (_REACH - 1) // 2
    per_entry = 4 * n_features + 2 * near + 100
    kernels = (n_observations * n_fitted + len(_KINDS) * few**2) * per_entry
    return kernels + n_fitted**3 + 4 * n_fitted**2 * n_features + _SEARCH_STEPS * few**3


def learning_cost(n_rows: int, n_features: int, *, local: bool = True) -> float:
    """Floating point operations of learning from `n_rows`, to within a factor of two."""
    near = n_features * _REACH * (_REACH - 1) // 2 if local else 0
    per_entry = 12 * n_features + 6 * near + 200
    return _LEARNING_STEPS * (2 * n_rows**3 + n_rows**2 * per_entry)


class _Hyper(NamedTuple):
    """Hyperparameters of the prior.

    Attributes:
        alone: Prior variance of each feature's main effect, up to scale; ``(n_features,)``.
        together: Relevance of each feature in interactions, ``(n_features,)``.
        local: Whether neighbours additionally interact.
        strength: Strength of interactions, relative to main effects.
        noise: Noise, relative to both.
    """

    alone: Tensor
    together: Tensor
    local: bool
    strength: Tensor
    noise: Tensor


@dataclass(frozen=True)
class _Prior:
    """Covariances under the prior, as far as they are needed.

    Attributes:
        observations: Covariances of all rows with the fitted ones, which come first, ``(n_rows,
            n_fitted)``.
        cross: Covariances of fitted rows with attributions, ``(n_fitted, n_features)``; empty in a
            search, which does not need them.
        variances: Variances of attributions, ``(n_features,)``.
    """

    observations: Tensor
    cross: Tensor
    variances: Tensor

    def scaled(self) -> "_Prior":
        """Scaled to mean variance 1 of the fitted rows."""
        size = self.observations.diagonal().mean().clamp_min(1e-30)
        return _Prior(self.observations / size, self.cross / size, self.variances / size)

    def plus(self, other: "_Prior", strength: float = 1.0) -> "_Prior":
        return _Prior(
            self.observations + strength * other.observations,
            self.cross + strength * other.cross,
            self.variances + strength * other.variances,
        )


class Interactions:
    """A model of one set of masks, fitted to one target after another.

    Args:
        x: Masks minus the share present, shape ``(n_observations, n_features)``.
        weights: Shape ``(n_observations,)``, mean 1.
        paired: bool, shape ``(n_observations,)``: False if an observation is not a difference of
            complements, so that it includes even interactions.
        stride: The process is fitted to every `stride`-th observation; the others correct it.
    """

    def __init__(self, x: Tensor, weights: Tensor, paired: Tensor, stride: int = 1) -> None:
        n_observations, n = x.shape
        first = torch.arange(0, n_observations, stride, device="cpu")
        rest = torch.ones(n_observations, dtype=torch.bool, device="cpu")
        rest[first] = False
        self._order = torch.cat([first, rest.nonzero()[:, 0]])
        self._n_fitted = len(first)
        self._x, self._weights = x[self._order], weights[self._order]
        # Half precision of float64 suffices beside the noise, and takes half the time.
        self._signs = 2 * (self._x > 0).float() - 1
        self._root = self._weights.sqrt().float()[:, None]
        self._single = (~paired)[self._order].float()[:, None]
        self._moved = 2 * self._x.float() * self._root
        self._near = _neighbours(n)

    def fit(self, y: Tensor, attributions: Tensor, effort: float = 0.0) -> Fit:
        """Fits one target.

        Args:
            y: Observations minus those of equal attributions, shape ``(n_observations,)``.
            attributions: Initial attributions, which give the initial relevances.
            effort: Floating point operations allowed for learning the relevances.
        """
        y = y[self._order] * self._root[:, 0]
        size = y.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        y = y / size
        head, fitted = y.float(), y[: self._n_fitted].float()
        few = _every(self._n_fitted, _MOST_FOR_SEARCH)
        hyper = self._found(attributions, few, head[few])
        freedom = len(attributions)
        if n_learning := self._affordable(hyper.local, effort):
            freedom *= 2
            some = _every(self._n_fitted, n_learning)
            hyper = self._learnt(hyper, some, head[some])
        rows = torch.arange(len(y), device="cpu")
        n = self._n_fitted
        linear, product = self._priors(hyper, rows, n, n)
        prior, noise = linear.plus(product, float(hyper.strength)), float(hyper.noise)
        covariance = prior.observations[: self._n_fitted]
        cholesky, noise = factor(covariance, noise)
        inverse = torch.cholesky_inverse(cholesky)
        solved = inverse @ fitted
        left_out = solved / inverse.diagonal()
        # Strength, noise and relevances are fitted to these very rows: use the larger of two
        # estimates of the scale, enlarged for the degrees of freedom of the relevances.
        scale = torch.maximum((fitted * solved).mean(), (left_out * solved).mean())
        scale = scale * (1 + freedom / len(y))
        influence = inverse @ prior.cross
        explained = (prior.cross * influence).sum(0)
        # Rounding may cancel all of a small difference. Noise alone contributes at least a part to
        # the variance that can be computed without cancellation.
        least = noise * covariance.diagonal().mean() * influence.square().sum(0)
        variances = (scale * torch.maximum(prior.variances - explained, least)).double()
        variances = variances * _unevenness(influence, left_out * solved)
        found = _Answer((prior.cross.T @ solved).double(), variances)
        if self._n_fitted == len(y):
            error = float(left_out.square().mean())
        else:
            rest = slice(self._n_fitted, None)
            residuals = y[rest] - (prior.observations[rest] @ solved).double()
            moved = self._x[rest] * self._weights[rest, None].sqrt()
            found, error = _corrected(found, moved, residuals)
        # Corrects the sum for rounding.
        deviations = found.deviations - found.deviations.mean()
        return Fit(deviations * size, found.variances * size**2, error * float(size) ** 2)

    def _affordable(self, local: bool, effort: float) -> int:
        """Number of rows from which relevances can be learnt, 0 if too few are affordable."""
        n = self._x.shape[1]
        most = min(self._n_fitted, _MOST_FOR_LEARNING)
        while most > n and learning_cost(most, n, local=local) > effort:
            most = most * 3 // 4
        return most if most > n else 0

    def _found(self, attributions: Tensor, rows: Tensor, y: Tensor) -> _Hyper:
        """The kind of kernel that predicts best, with its strength and noise.

        Common parts of the kinds are computed once.
        """
        alone, even = relevance_of(attributions, 1.0), relevance_of(attributions, 0.1)
        linear = self._linear(alone, rows, len(rows), 0).scaled().observations
        products = {
            reach: self._product(reach * even, rows, len(rows), 0).scaled()
            for reach in {kind.reach for kind in _KINDS}
        }
        searches: list[tuple[GridSearch, _Kind]] = []
        for kind in _KINDS:
            interactions = products[kind.reach]
            if kind.local and len(self._near):
                near = self._local(even, rows, len(rows), 0)
                interactions = interactions.plus(near.scaled()).scaled()
            searches.append((GridSearch(linear, interactions.observations, y), kind))
        search, kind = min(searches, key=lambda one: one[0].error)
        strength, noise = torch.tensor(search.walk(), dtype=torch.float64, device="cpu")
        return _Hyper(alone, kind.reach * even, kind.local, strength, noise)

    def _learnt(self, start: _Hyper, rows: Tensor, y: Tensor) -> _Hyper:
        """Automatic relevance determination: the most probable prior given the observations.

        Maximises the marginal likelihood (Rasmussen and Williams 2006, section 5.4.1), with its
        scale profiled out and a normal prior on the logarithms of relevances around their initial
        values, with standard deviation 1: few observations then change little.
        """
        logs = [part.clamp_min(1e-12).log() for part in start if isinstance(part, Tensor)]
        begin, steps = [log.clone() for log in logs], [_Adam(_LEARNING_RATE) for _ in logs]
        for _ in range(_LEARNING_STEPS):
            alone, together, strength, noise = (log.exp() for log in logs)
            linear = self._linear(alone, rows, len(rows), 0).scaled()
            agreement = self._agreement(together, rows, len(rows))
            product = self._product(together, rows, len(rows), 0, agreement).observations
            near = None
            if start.local and len(self._near):
                near = self._local(together / together.sum(), rows, len(rows), 0).observations
            both = product / _mean_variance(product)
            if near is not None:
                both = (both + near / _mean_variance(near)) / 2
            covariance = linear.observations + strength.float() * both
            # Both parts have mean variance 1.
            covariance.diagonal().add_((noise * (1 + strength)).float())
            inverse = torch.cholesky_inverse(factor(covariance, 0.0)[0])
            solved = inverse @ y
            scale = (y @ solved / len(y)).clamp_min(_TINY)
            gradient = inverse.sub_(torch.outer(solved, solved / scale)).div_(2)
            of_level = noise * gradient.diagonal().sum()
            gradients = [
                self._gradient_of_linear(gradient, alone, rows) + logs[0] - begin[0],
                self._gradient_of_product(
                    strength.float() * gradient, product, near, agreement, together, rows
                )
                + logs[1]
                - begin[1],
                strength * ((gradient * both).sum() + of_level),
                (1 + strength) * of_level,
            ]
            logs = [step(log, own) for step, log, own in zip(steps, logs, gradients, strict=True)]
        alone, together, strength, noise = (log.exp() for log in logs)
        return _Hyper(alone, together, start.local, strength, noise.clamp_min(LEAST_NOISE))

    def _gradient_of_linear(self, gradient: Tensor, relevance: Tensor, rows: Tensor) -> Tensor:
        """Gradient with respect to log-relevances, from that in the scaled covariance."""
        moved = self._moved[rows]
        own = _squares_along(gradient, moved)
        level = moved.square().mean(0)
        return _less_of_scale(own, level, relevance.float())

    def _gradient_of_product(
        self,
        gradient: Tensor,
        product: Tensor,
        near: Tensor | None,
        known: tuple[Tensor, Tensor],
        relevance: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Like `_gradient_of_linear`, for products and for interactions of neighbours."""
        of_near: Tensor | float = 0.0
        if near is not None:  # two scaled parts were scaled together
            gradient = gradient / 2
            of_near = self._gradient_of_local(_of_scaled(gradient, near), relevance, rows)
        gradient = _of_scaled(gradient, product)
        each, factor = relevance.tanh(), relevance.cosh().log().sum().exp()
        (signs, agreement), root, single = known, self._root[rows], self._single[rows]
        gradient = gradient * root * root.T
        share = signs[:-1].mean(1, keepdim=True)
        odd = _anchored_back(gradient, share)
        of_agreement = odd * agreement.cosh()
        if bool(single.any()):
            even = _anchored_back(single * gradient * single.T, torch.ones_like(share))
            of_agreement += even * agreement.sinh()
        found = _squares_along(of_agreement, signs).double()
        of_single = _squares_along(odd, signs).double()
        found -= factor * ((1 - each.square()) * of_single + each * (each * of_single).sum())
        return relevance * found + of_near

    def _gradient_of_local(self, gradient: Tensor, relevance: Tensor, rows: Tensor) -> Tensor:
        size = (relevance / relevance.sum())[self._near].prod(1).sqrt().float()
        of_term = size * _squares_along(gradient, self._near_terms[rows]) / 2
        found = torch.zeros(len(relevance), dtype=torch.float32, device="cpu")
        for member in self._near.T:
            found.index_add_(0, member, of_term)
        return found.double()

    def _priors(
        self, hyper: _Hyper, rows: Tensor, n_fitted: int, n_cross: int
    ) -> tuple[_Prior, _Prior]:
        """Priors of main effects and of interactions, each with mean variance 1."""
        linear = self._linear(hyper.alone, rows, n_fitted, n_cross)
        interactions = self._product(hyper.together, rows, n_fitted, n_cross).scaled()
        if hyper.local and len(self._near):
            relevance = hyper.together / hyper.together.sum()
            near = self._local(relevance, rows, n_fitted, n_cross)
            interactions = interactions.plus(near.scaled())
        return linear.scaled(), interactions.scaled()

    @cached_property
    def _near_terms(self) -> Tensor:
        """Interactions of neighbours in every row, minus those at the full mask."""
        s, n = self._signs, self._signs.shape[1]
        blocks = [s[:, : n - b] * s[:, a : n - b + a] * s[:, b:] for a, b in _lag_pairs(n)]
        return (torch.cat(blocks, 1) - s.mean(1, keepdim=True)) * self._root

    def _linear(self, relevance: Tensor, rows: Tensor, n_fitted: int, n_cross: int) -> _Prior:
        n = len(relevance)
        moved = self._moved[rows]
        cross = 2 * relevance.float() * moved[:n_fitted]
        return _Prior(
            moved @ cross.T / 2,
            cross[:n_cross] - cross[:n_cross].mean(1, keepdim=True),
            (4 * (relevance - 2 * relevance / n + relevance.sum() / n**2)).float(),
        )

    def _agreement(self, relevance: Tensor, rows: Tensor, n_fitted: int) -> tuple[Tensor, Tensor]:
        """Signs of the rows and of the full mask, and their agreement with fitted rows and it."""
        full = torch.ones(1, len(relevance), dtype=torch.float32, device="cpu")
        signs = torch.cat([self._signs[rows], full])
        right = torch.cat([signs[:n_fitted], full])
        return signs, (signs * relevance.float()) @ right.T

    def _product(
        self,
        relevance: Tensor,
        rows: Tensor,
        n_fitted: int,
        n_cross: int,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> _Prior:
        """All odd interactions of three features and more: sinh of a weighted agreement.

        ``exp(sum_i r_i s_i t_i)`` is, up to a factor, the product of ``1 + tanh(r_i) s_i t_i``,
        whose terms are the interactions; sinh is its odd half.
        """
        each, factor = relevance.tanh(), relevance.cosh().log().sum().exp()
        signs, agreement = known or self._agreement(relevance, rows, n_fitted)
        right = torch.cat([signs[:n_fitted], signs[-1:]])
        odd = agreement.sinh() - (signs * (factor * each).float()) @ right.T
        share = signs.mean(1, keepdim=True)
        covariance = _anchored(odd, share, n_fitted)
        single = self._single[rows]
        if bool(single.any()):
            even = _anchored(agreement.cosh(), torch.ones_like(share), n_fitted)
            covariance = covariance + single * even * single[:n_fitted].T
        root = self._root[rows]
        covariance = covariance * root * root[:n_fitted].T
        if not n_cross:
            return _Prior(covariance, signs[:0], relevance)
        needed = torch.cat([signs[:n_cross], signs[-1:]])
        cross, variances = _shapley_of_product(needed, each, factor)
        cross = cross[:-1] - share[:n_cross] * cross[-1]
        cross = (cross - cross.mean(1, keepdim=True)) * root[:n_cross]
        return _Prior(covariance, cross, variances)

    def _local(self, relevance: Tensor, rows: Tensor, n_fitted: int, n_cross: int) -> _Prior:
        """Interactions of three neighbours; less relevant features have them, too."""
        size = relevance[self._near].prod(1).sqrt().float()
        terms = self._near_terms[rows]
        right = terms[:n_fitted] * size
        if not n_cross:
            return _Prior(terms @ right.T, terms[:0, : len(relevance)], relevance)
        n = len(relevance)
        # A term adds 2/3 to each of its three members, and 2/n to the mean over all features.
        cross = torch.zeros(n_cross, n, dtype=torch.float32, device="cpu")
        variances = torch.zeros(n, dtype=torch.float32, device="cpu")
        for member in self._near.T:
            cross.index_add_(1, member, 2 / 3 * right[:n_cross])
            variances.index_add_(0, member, (4 / 9 - 8 / (3 * n)) * size)
        cross -= 2 / n * right[:n_cross].sum(1, keepdim=True)
        return _Prior(terms @ right.T, cross, variances + 4 / n**2 * size.sum())


class _Adam:
    """Descent steps of Kingma and Ba 2015, algorithm 1."""

    def __init__(self, rate: float) -> None:
        self._rate, self._n = rate, 0
        self._mean: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    def __call__(self, at: Tensor, gradient: Tensor) -> Tensor:
        self._n += 1
        self._mean = 0.9 * self._mean + 0.1 * gradient
        self._square = 0.999 * self._square + 0.001 * gradient.square()
        size = (self._square / (1 - 0.999**self._n)).sqrt() + 1e-8
        return at - self._rate * self._mean / (1 - 0.9**self._n) / size


def _squares_along(gradient: Tensor, columns: Tensor) -> Tensor:
    """The quadratic form c' S c of every column c, ``(n_columns,)``."""
    return ((gradient @ columns) * columns).sum(0)


def _less_of_scale(own: Tensor, level: Tensor, relevance: Tensor) -> Tensor:
    """Gradients with respect to log-relevances of a sum of squares scaled to mean variance 1."""
    size = (relevance * level).sum().clamp_min(_TINY)
    whole = (relevance * own).sum() / size
    return (relevance * (own - whole * level) / size).double()


def _mean_variance(covariance: Tensor) -> Tensor:
    return covariance.diagonal().mean().clamp_min(_TINY)


def _of_scaled(gradient: Tensor, covariance: Tensor) -> Tensor:
    """The gradient with respect to a covariance, from that with respect to its scaled version."""
    size = _mean_variance(covariance)
    found = gradient / size
    found.diagonal().sub_((found * covariance).sum() / size / len(covariance))
    return found


def _anchored_back(gradient: Tensor, share: Tensor) -> Tensor:
    """The gradient with respect to the input of `_anchored`, from that of its square result."""
    along = gradient @ share
    return torch.cat(
        [
            torch.cat([gradient, -along], 1),
            torch.cat([-along.T, share.T @ along], 1),
        ]
    )


def _every(n: int, most: int) -> Tensor:
    """At most `most` of n rows, evenly spaced."""
    return torch.arange(0, n, max(n // most, 1), device="cpu")[:most]


def relevance_of(attributions: Tensor, equal: float) -> Tensor:
    """Shares that sum to 1; part of them is equal, so that no feature is excluded."""
    size = attributions.abs()
    share = size / size.mean().clamp_min(torch.finfo(size.dtype).tiny) + equal
    return share / share.sum()


def _unevenness(influence: Tensor, surprise: Tensor) -> Tensor:
    """Variance inflation for observations that are unequally predictable, at least 1.

    The prior assumes equal variance for all sizes of coalitions. If the game varies little on most
    and much on a few, attributions depend on the former, whose left-out errors are too small for
    the rest.

    Args:
        influence: Influence of each observation on each attribution, ``(n_observations,
            n_features)``.
        surprise: Squared left-out errors over their expectations, ``(n_observations,)``.
    """
    share = influence.square()
    own = (surprise @ share) / share.sum(0).clamp_min(_TINY)
    return (surprise.mean() / own.clamp_min(_TINY)).clamp_min(1).double()


def _lag_pairs(n: int) -> list[tuple[int, int]]:
    """Distances of the second and third of three neighbours from the first."""
    return [(a, b) for b in range(2, min(_REACH, n - 1) + 1) for a in range(1, b)]


def _neighbours(n: int) -> Tensor:
    """Triples of columns at most `_REACH` apart, shape ``(n_triples, 3)``."""
    first = torch.arange(n, device="cpu")[:, None]
    triples = [
        first[: n - b] + torch.tensor([0, a, b], dtype=torch.int64, device="cpu")
        for a, b in _lag_pairs(n)
    ]
    return torch.cat([torch.zeros(0, 3, dtype=torch.int64, device="cpu"), *triples])


def _anchored(kernel: Tensor, share: Tensor, n_fitted: int) -> Tensor:
    """Subtracts from each function the additive one that equals it at the empty and full mask.

    Args:
        kernel: Rows and columns are masks; the full mask is last in both.
        share: Share of the value at the full mask to subtract in each row, ``(n_rows + 1, 1)``.
        n_fitted: Number of leading rows that are the columns.
    """
    left, right = share[:-1], share[:n_fitted]
    full = kernel[-1, -1] * left - kernel[:-1, -1:]
    return kernel[:-1, :-1] - left * kernel[-1, :-1] + full * right.T


def _shapley_of_product(signs: Tensor, each: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Covariances of product interactions with attributions, and variances of the latter.

    An odd interaction of k features contributes 2/k to each: ``1 / k`` is the integral of ``t ** (k
    - 1)``, and its square that of ``-log(t) * t ** (k - 1)``, over the unit interval.

    Args:
        signs: Shape ``(n_rows, n_features)``, the last row all ones.
        each: Contribution of each feature to the product, shape ``(n_features,)``.
        factor: Common factor of all products.

    Returns:
        Shape ``(n_rows, n_features)`` and, minus the mean over features, ``(n_features,)``.
    """
    n = len(each)
    cross = torch.zeros_like(signs)
    variances = torch.zeros(n, dtype=torch.float64, device="cpu")
    for node, weight in zip(_NODES, _NODE_WEIGHTS, strict=True):
        part = node * each
        up, down = torch.log1p(part), torch.log1p(-part)
        agreement = signs @ ((up - down) / 2).float()[:, None]
        level = ((up + down) / 2).sum().float()
        own = part.float() * signs
        # Both halves exclude the feature itself: its even interactions with the others.
        others = (level + agreement).exp() / (1 + own) + (level - agreement).exp() / (1 - own)
        others = others / 2 - 1
        cross += weight.float() * others
        variances -= weight * node.log() * others[-1].double()
    shared = each * cross[-1].double() / n
    whole = (torch.sinh(each.atanh().sum()) / factor - each.sum()) / n**2
    variances = 4 * factor * (each * variances - 2 * shared + whole)
    return 2 * (factor * each).float() * signs * cross, variances.clamp_min(0).float()


@dataclass(frozen=True)
class _Answer:
    deviations: Tensor
    variances: Tensor


def _corrected(found: _Answer, x: Tensor, residuals: Tensor) -> tuple[_Answer, float]:
    """Estimates the error of the attributions from rows that were not fitted.

    Bayesian linear regression: the posterior of the process is the prior of the correction, and the
    non-additive part of the residuals is noise.

    Returns:
        The corrected solution, and the mean of squared left-out residuals.
    """
    root = found.variances.sqrt()
    scaled = x * root
    eigenvalues, vectors = torch.linalg.eigh(scaled.T @ scaled)
    projected = vectors.T @ (scaled.T @ residuals)
    eigenvalues, rotated = eigenvalues.clamp_min(0), scaled @ vectors
    noise = residuals.square().mean().clamp_min(_TINY)
    for _ in range(_ROUNDS):
        shrunk = 1 / (eigenvalues + noise)
        unexplained = (residuals - rotated @ (shrunk * projected)).square().sum()
        freedom = len(residuals) - (eigenvalues * shrunk).sum()
        noise = (unexplained / freedom.clamp_min(1)).clamp_min(_TINY)
    shrunk = 1 / (eigenvalues + noise)
    leverage = (rotated.square() * shrunk).sum(1)
    left_out = (residuals - rotated @ (shrunk * projected)) / (1 - leverage).clamp_min(0.01)
    deviations = found.deviations + root * (vectors @ (shrunk * projected))
    variances = found.variances * noise * (vectors.square() @ shrunk)
    return _Answer(deviations, variances), float(left_out.square().mean())
