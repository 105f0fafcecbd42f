"""Shapley values of a Gaussian process with interactions of up to three features.

Only the odd part of an interaction moves Shapley values, and pairs (S, complement) observe just it
(OddSHAP, arXiv 2602.01399). Here all interactions of three features are fitted at once, by their
kernel: each has a prior variance, the product of its features' relevances, so features that matter
alone are expected to matter together. Weighted like KernelSHAP, such a fit keeps the estimand: what
is left over is orthogonal to every additive game.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Noise, relative to the mean prior variance of an observation, and what three features together
# may explain relative to single ones.
_NOISE = torch.logspace(-3.5, 1.5, 11).double().tolist()
_STRENGTH = (0.1, 0.3, 1.0, 3.0, 10.0)
_START = (5, 2)
_MOST_FOR_SEARCH = 512


@dataclass(frozen=True)
class Fit:
    """One target's answer.

    Attributes:
        deviations: From equal attributions, shape ``(n_features,)``.
        variances: Posterior variances, the scale estimated by maximum likelihood.
        error: Weighted sum of squared leave-one-out errors.
    """

    deviations: Tensor
    variances: Tensor
    error: Tensor


@dataclass(frozen=True)
class _Prior:
    """Covariances under the prior, as far as they are needed.

    Attributes:
        observations: Between weighted observations, ``(n_observations, n_observations)``.
        cross: Of observations with attributions, ``(n_observations, n_features)``.
        variances: Of attributions, ``(n_features,)``.
    """

    observations: Tensor
    cross: Tensor
    variances: Tensor

    def plus(self, other: "_Prior", strength: float) -> "_Prior":
        return _Prior(
            self.observations + strength * other.observations,
            self.cross + strength * other.cross,
            self.variances + strength * other.variances,
        )

    def head(self, rows: Tensor) -> "_Prior":
        return _Prior(self.observations[rows][:, rows], self.cross[rows], self.variances)


class Interactions:
    """A model of one set of masks, fitted to one target after another.

    Args:
        x: Masks less the share present, shape ``(n_observations, n_features)``.
        weights: Shape ``(n_observations,)``, mean 1.
        paired: bool, shape ``(n_observations,)``: False where an observation is no difference of
            complements, so that interactions of two features show.
    """

    def __init__(self, x: Tensor, weights: Tensor, paired: Tensor) -> None:
        n_observations, n = x.shape
        self._signs = torch.cat([torch.where(x > 0, 1.0, -1.0), torch.ones(1, n)]).double()
        self._root = weights.sqrt()
        self._single = (~paired).double()
        moved = 2 * x * self._root[:, None]
        self._linear = _Prior(
            moved @ moved.T / n, 2 / n * moved, torch.full((n,), 4 / n * (1 - 1 / n)).double()
        )
        step = max(n_observations // _MOST_FOR_SEARCH, 1)
        self._few = torch.arange(0, n_observations, step)[:_MOST_FOR_SEARCH]

    def fit(self, y: Tensor, attributions: Tensor) -> Fit:
        """Fit one target.

        Args:
            y: Observations less those of equal attributions, shape ``(n_observations,)``.
            attributions: First guess, says which features are relevant.
        """
        y = y * self._root
        cubic = self._cubic(_relevance(attributions))
        strength, noise = _search(self._linear.head(self._few), cubic.head(self._few), y[self._few])
        prior = self._linear.plus(cubic, strength)
        inverse, solved, error = _leave_one_out(prior, noise, y)
        explained = (prior.cross * (inverse @ prior.cross)).sum(0)
        scale = (y * solved).mean()
        return Fit(
            prior.cross.T @ solved, scale * (prior.variances - explained).clamp_min(0), error
        )

    def _cubic(self, relevance: Tensor) -> _Prior:
        # Newton's identities: sums over sets of features from sums of powers. Signs square to 1.
        scaled = self._signs * relevance
        first = scaled @ self._signs.T
        second = relevance.square().sum()
        third = (self._signs * relevance**3) @ self._signs.T
        share = self._signs[:-1].mean(1, keepdim=True)
        triples = _anchored((first**3 - 3 * first * second + 2 * third) / 6, share)
        pairs = _anchored((first.square() - second) / 2, torch.ones_like(share))
        triples += pairs * self._single[:, None] * self._single

        # A triple's term is worth 2/3 to each member: 1/3 of what it gains from empty to full.
        others = scaled.sum(1, keepdim=True) - scaled
        cross = scaled * (others.square() - (second - relevance.square())) / 3
        cross = cross[:-1] - share * cross[-1]
        cross = (cross - cross.mean(1, keepdim=True)) * self._root[:, None]
        return _Prior(triples * self._root[:, None] * self._root, cross, _spread(relevance))


def _relevance(attributions: Tensor) -> Tensor:
    """Shares that sum to 1; a tenth is equal, so that nothing is ruled out."""
    size = attributions.abs()
    share = size / size.mean().clamp_min(torch.finfo(size.dtype).tiny) + 0.1
    return share / share.sum()


def _anchored(kernel: Tensor, share: Tensor) -> Tensor:
    """Take from each function the additive one that agrees with it at the empty and full mask.

    Args:
        kernel: Observations, and the full mask last.
        share: Of its value at the full mask, what each observation loses, ``(n_observations, 1)``.
    """
    edge = kernel[:-1, -1:] * share.T
    return kernel[:-1, :-1] - edge - edge.T + kernel[-1, -1] * share * share.T


def _spread(relevance: Tensor) -> Tensor:
    """Prior variances of what triples give each feature, less the mean over features."""
    total, square = relevance.sum(), relevance.square().sum()
    apart = total - relevance
    both = relevance[:, None] * relevance * (apart[:, None] - relevance)
    own = relevance * (apart.square() - (square - relevance.square())) / 2
    covariance = 4 / 9 * torch.where(torch.eye(len(relevance)).bool(), own[:, None], both)
    return covariance.diag() - 2 * covariance.mean(1) + covariance.mean()


def _search(linear: _Prior, cubic: _Prior, y: Tensor) -> tuple[float, float]:
    """Strength and noise with the least leave-one-out error, walking downhill on their grid."""
    errors: dict[tuple[int, int], float] = {}

    def error(place: tuple[int, int]) -> float:
        if place not in errors:
            prior = linear.plus(cubic, _STRENGTH[place[1]])
            errors[place] = float(_leave_one_out(prior, _NOISE[place[0]], y)[2])
        return errors[place]

    place = _START
    while True:
        nearby = [
            (place[0] + i, place[1] + j)
            for i, j in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
            if 0 <= place[0] + i < len(_NOISE) and 0 <= place[1] + j < len(_STRENGTH)
        ]
        best = min(nearby, key=error)
        if best == place:
            return _STRENGTH[place[1]], _NOISE[place[0]]
        place = best


def _leave_one_out(prior: _Prior, noise: float, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse covariance, it times y, and the squared error of left-out observations.

    Rasmussen and Williams 2006, section 5.4.2.
    """
    covariance = prior.observations.clone()
    covariance.diagonal().add_(noise * covariance.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    solved = inverse @ y
    return inverse, solved, (solved / inverse.diagonal()).square().sum()
