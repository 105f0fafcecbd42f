"""`CoalitionGame`: an attribution as a cooperative game, for other packages."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_llm_ext.attribution.game import Game
from captum_llm_ext.coalitions import Plan
from captum_llm_ext.text.baselines.candidates import Match


class CoalitionGame:
    """The values of coalitions for one target token or a span of them, as a function of masks.

    shapiq's approximators accept it directly (``approximator.approximate(budget, game)``), as does
    any code that expects a function of a boolean matrix. Players are the prompt's features and the
    generated ones before the span. The span itself is always present, so the value of several
    tokens is that of the whole span: the sum of their values, or the product of their
    probabilities. A coalition has the same value in every call: with random baselines, the mean
    over `n_draws` draws shared by all coalitions. Rows that were scored before are not scored
    again.

    Args:
        game: The game of an attribution.
        start, stop: The span of target tokens.
        n_draws: Draws of a random baseline.
        normalize: Whether the empty coalition's value is subtracted, so that it becomes 0.

    Attributes:
        n_players: Number of players.
        n_draws: Draws that each value averages; 1 if baselines are not random.
        deterministic: Whether baselines are not random.
        player_names: One name per player.
        empty_coalition_value, grand_coalition_value: Values before normalisation.
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
        """How replacements of the prompt's features were found; None for fixed baselines."""
        return self._game.run.prompt.matches()

    def __call__(self, coalitions: Any) -> Any:
        """The values of coalitions.

        Args:
            coalitions: Booleans, True = present, shape ``(n_coalitions, n_players)`` or
                ``(n_players,)``.

        Returns:
            A numpy array of float64, shape ``(n_coalitions,)``.

        Raises:
            ValueError: If the number of players differs.
        """
        return self.draw_values(coalitions).mean(0)

    def draw_values(self, coalitions: Any) -> Any:
        """The values of coalitions under each draw, which a call averages.

        Args:
            coalitions: As for a call.

        Returns:
            A numpy array of float64, shape ``(n_draws, n_coalitions)``.

        Raises:
            ValueError: If the number of players differs.
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
