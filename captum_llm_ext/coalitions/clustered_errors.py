"""Variances clustered by draw, the independent unit of rows."""

import math

import torch
from torch import Tensor


def mean_over_draws(values: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean value of rows of one coalition, and its variance over draws.

    Args:
        values: Shape ``(n_rows, n_group)``.
        draws: Shape ``(n_rows,)``.

    Returns:
        The mean over draws of each draw's mean, and its variance (0 for a single draw).
    """
    _, draw_of_row, count = draws.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(count), values.shape[1], dtype=values.dtype, device="cpu")
    means = sums.index_add_(0, draw_of_row, values) / count[:, None]
    if len(means) < 2:
        return means[0], torch.zeros_like(means[0])
    variance = means.var(0) / len(means)
    rounding = (1e-12 * means.abs().amax(0)).square()
    return means.mean(0), torch.where(variance > rounding, variance, 0)


def squared_influences(influence: Tensor, residuals: Tensor, draws: Tensor) -> Tensor:
    """Per attribution the sum over draws of their squared contributions.

    Args:
        influence: Influence of a row's residual on the attributions, shape ``(n_rows, n_visible)``.
        residuals: Shape ``(n_rows, n_group)``.
        draws: Shape ``(n_rows,)``.

    Returns:
        Shape ``(n_visible, n_group)``.
    """
    numbers, cluster = draws.unique(return_inverse=True)
    if len(numbers) == len(draws):
        return influence.square().T @ residuals.square()
    squares = torch.empty(
        influence.shape[1], residuals.shape[1], dtype=residuals.dtype, device="cpu"
    )
    for target, residual in enumerate(residuals.T):
        sums = torch.zeros(len(numbers), influence.shape[1], dtype=residuals.dtype, device="cpu")
        sums.index_add_(0, cluster, influence * residual[:, None])
        squares[:, target] = sums.square().sum(0)
    return squares


def sandwich(influence: Tensor, left_out: Tensor, draws: Tensor) -> Tensor:
    """Variances of regression coefficients, clustered by draw (jackknife form of the sandwich).

    Args:
        influence: Influence of a row's residual on the coefficients, shape ``(n_rows, n_visible)``.
        left_out: Leave-one-out residual of each row, shape ``(n_rows, n_group)``.
        draws: Shape ``(n_rows,)``.

    Returns:
        Shape ``(n_visible, n_group)``; NaN for a single draw.
    """
    n_draws = len(draws.unique())
    correction = n_draws / (n_draws - 1) if n_draws > 1 else torch.nan
    return squared_influences(influence, left_out, draws) * correction


def gap_shares(spread: Tensor) -> Tensor:
    """The shares of an efficiency gap: proportional to the variances of the attributions.

    Args:
        spread: Variances up to scale, shape ``(n_visible, n_group)``.

    Returns:
        The same shape; columns sum to 1.
    """
    total = spread.sum(0)
    equal = torch.full_like(spread, 1 / max(len(spread), 1))
    return torch.where(total > 0, spread / total.clamp_min(torch.finfo(total.dtype).tiny), equal)


def normal_scale(degrees_of_freedom: int) -> float:
    """The 97.5 % quantile of Student's t over that of the normal distribution.

    Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5), accurate to 0.2 % from three degrees
    on; one and two have closed forms.
    """
    v, z = degrees_of_freedom, 1.959964
    if v == 1:
        return math.tan(0.475 * math.pi) / z
    if v == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2)) / z
    s = z**2
    first = (s + 1) / 4
    second = (5 * s**2 + 16 * s + 3) / 96
    third = (3 * s**3 + 19 * s**2 + 17 * s - 15) / 384
    fourth = (79 * s**4 + 776 * s**3 + 1482 * s**2 - 1920 * s - 945) / 92160
    return 1 + first / v + second / v**2 + third / v**3 + fourth / v**4
