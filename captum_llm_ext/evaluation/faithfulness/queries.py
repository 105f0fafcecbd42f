"""Evaluates a game of coalitions in one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.evaluation.faithfulness.estimate import Estimate, average

Game = Callable[[Any], Any]


def evaluate_coalitions(game: Game, masks: Tensor) -> Estimate:
    """Scores all coalitions in one call, equal ones once.

    Args:
        game: A function of a numpy array of booleans ``(n_coalitions, n_players)``, True = present.
            If it has a method `draw_values`, like `CoalitionGame`, its draws give standard errors.
        masks: Bool ``(n_coalitions, n_players)``.

    Returns:
        Shape ``(n_coalitions,)``; its source of randomness is ``"draws"``.

    Raises:
        ValueError: If it returns another number of values, or values that are not finite.
    """
    distinct, places = masks.unique(dim=0, return_inverse=True)
    draw_values = getattr(game, "draw_values", None)
    given = game(distinct.numpy()) if draw_values is None else draw_values(distinct.numpy())
    values = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
    wanted = (len(distinct),) if draw_values is None else (len(values), len(distinct))
    if values.shape != wanted:
        raise ValueError(
            f"the game gave values of shape {tuple(values.shape)} for {len(distinct)} coalitions: "
            "it must give one number for each."
        )
    if not bool(values.isfinite().all()):
        raise ValueError(
            "the game gave a value that is not finite: from such values no curve and no rank "
            "can be computed."
        )
    if draw_values is None:
        return Estimate(values[places])
    if getattr(game, "deterministic", False):
        return Estimate(values.mean(0)[places])
    mean, left_out = average(values)
    return Estimate(mean[places], {"draws": left_out[:, places]})
