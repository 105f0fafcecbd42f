"""A text that a model reads with gradients, and its forward pass on it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.forward.draws import drawn_again


@dataclass(frozen=True)
class Row:
    """What the model reads, and what it is asked for.

    Attributes:
        ids: Token ids ``(1, length)``, on the device where the model reads them.
        at: ``(n_target,)``: the place whose logits predict each target token.
        target: Token ids ``(n_target,)``.
        foils: Token ids that each is held against, ``(n_target, n_foils)``; -1 where there are
            fewer. None where a value is no contrast.
        chosen: Which of the target tokens have a value. None: all.
    """

    ids: Tensor
    at: Tensor
    target: Tensor
    foils: Tensor | None = None
    chosen: tuple[int, ...] | None = None

    @property
    def n_values(self) -> int:
        """Of how many target tokens values are taken."""
        return len(self.target) if self.chosen is None else len(self.chosen)

    @property
    def length(self) -> int:
        """Number of ids."""
        return self.ids.shape[1]

    def of(self, targets: list[int], length: int) -> "Row":
        """Some of the target tokens, and as many of the ids."""
        foils = None if self.foils is None else self.foils[targets]
        return Row(self.ids[:, :length], self.at[targets], self.target[targets], foils)


class ForwardPass:
    """The model's forward on token ids, with the logits of some places.

    Args:
        model: The model, in evaluation mode whenever it is called.

    Attributes:
        kept: How it is asked for the logits of some places only; None: it gives all.
        seed: As for `Passes`: all points of a path draw the same.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept = _compat.kept_logits(model)
        self.seed: int | None = None
        self._uncached = _compat.uncached(model)

    def logits(self, ids: Tensor, at: Tensor) -> Tensor:
        """Logits ``(batch, n, vocabulary)`` at places ``at (n,)`` of ``ids (batch, length)``."""
        logits = _compat.sequence_logits(self.run(ids, at))
        places = self.places(at, ids.shape[1], logits.shape[1])
        return logits if places is None else logits[:, places.to(logits.device)]

    def run(self, ids: Tensor, at: Tensor) -> Any:
        """What the model returns that is asked for these logits, whatever it made of that."""
        kept = _compat.keeping_logits(self.kept, at.expand(len(ids), -1), ids)
        with drawn_again(self.seed, ids):
            return _compat.called(self.model, ids, **self._uncached, **kept)

    def keep_all(self) -> None:
        """Has the model make the logits of all places from now on."""
        self.kept = None

    def places(self, at: Tensor, length: int, n_kept: int) -> Tensor | None:
        """Where the logits of these places are among those that the model gives; None: in order."""
        return None if self.kept == "positions" else at - (length - n_kept)

    def order(self, at: Tensor, length: int, n_kept: int) -> list[int]:
        """As `places`, one for each of `at` however the model gives them."""
        places = self.places(at, length, n_kept)
        return list(range(n_kept)) if places is None else places.tolist()
