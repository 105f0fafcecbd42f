"""`CoalitionGame`: an attribution as a cooperative game, for other packages."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_llm_ext.attribution.game import Game
from captum_llm_ext.coalitions import Plan
from captum_llm_ext.text.baselines.candidates import Match


class CoalitionGame:
    """What the model gives one target token, or a span of them, for coalitions of what precedes it.

    shapiq's approximators take it as it is (``approximator.approximate(budget, game)``), and so
    does whatever else wants a function of a boolean matrix. Players are the prompt's features and
    the generated ones before the span. The span itself is always present, and so the value of
    several tokens is that of the span as a whole: the sum of their values, or the product of
    probabilities. A coalition is worth the same in every call: with random baselines the mean over
    `n_draws` draws, which all coalitions share. Rows that were scored before are not scored again.

    Args:
        game: What is played.
        start, stop: The span of target tokens.
        n_draws: Draws of a random baseline.
        normalize: Whether the empty coalition is subtracted, so that it is worth 0.

    Attributes:
        n_players: Number of players.
        n_draws: Draws that a value averages; 1 where nothing is drawn.
        deterministic: Whether nothing is drawn.
        player_names: One name each.
        empty_coalition_value, grand_coalition_value: Before anything is subtracted.
        normalization_value: What is subtracted.
    """

    def __init__(
        self, game: Game, start: int, stop: int, *, n_draws: int = 8, normalize: bool = True
    ) -> None:
        self._game, self._span = game, slice(start, stop)
        self.deterministic = game.deterministic
        self.n_draws = 1 if game.deterministic else n_draws
        self._seed = int(torch.randint(2**62, (), generator=game.run.generator, device="cpu"))
        self.n_players = int(game.scope.n_visible[start])
        self.player_names = game.names[: self.n_players]
        ends = self._values(
            torch.tensor([[False], [True]], dtype=torch.bool, device="cpu").expand(
                2, self.n_players
            )
        ).mean(0)
        self.empty_coalition_value, self.grand_coalition_value = ends.tolist()
        self.normalization_value = self.empty_coalition_value if normalize else 0.0

    @property
    def matches(self) -> list[Match] | None:
        """How replacements for the prompt's features were found; None for fixed baselines."""
        return self._game.run.prompt.matches()

    def __call__(self, coalitions: Any) -> Any:
        """The values of coalitions.

        Args:
            coalitions: Of booleans, shape ``(n_coalitions, n_players)`` or ``(n_players,)``, True
                = present.

        Returns:
            A numpy array of float64, shape ``(n_coalitions,)``.

        Raises:
            ValueError: If there is another number of players.
        """
        return self.draw_values(coalitions).mean(0)

    def draw_values(self, coalitions: Any) -> Any:
        """The values of coalitions under each draw: what a call averages.

        Args:
            coalitions: As of a call.

        Returns:
            A numpy array of float64, shape ``(n_draws, n_coalitions)``.

        Raises:
            ValueError: If there is another number of players.
        """
        masks = torch.from_numpy(np.atleast_2d(np.array(coalitions, dtype=bool)))
        if masks.dim() != 2 or masks.shape[1] != self.n_players:
            raise ValueError(
                f"coalitions have shape {tuple(masks.shape)}: give (n_coalitions, "
                f"{self.n_players})."
            )
        return (self._values(masks) - self.normalization_value).numpy()

    def __repr__(self) -> str:
        return f"CoalitionGame({self.n_players} players)"

    def _values(self, masks: Tensor) -> Tensor:
        if not len(masks):
            return torch.zeros(self.n_draws, 0, dtype=torch.float64, device="cpu")
        rest = self._game.n_features - self.n_players
        masks = torch.nn.functional.pad(masks, (0, rest), value=True)
        draws = torch.arange(self.n_draws, device="cpu").repeat_interleave(len(masks))
        plan = Plan(masks.repeat(self.n_draws, 1), draws)
        values = self._game.values(plan, self._seed)[:, self._span]
        is_probability = self._game.run.scorer.attr_target == "prob"
        worth = values.prod(1) if is_probability else values.sum(1)
        return worth.view(self.n_draws, -1)
