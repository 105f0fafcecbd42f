"""A token row that is read with gradients, and the forward pass over it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.forward.draws import repeated_draws


@dataclass(frozen=True)
class Row:
    """The model's input, and what is computed for it.

    Attributes:
        ids: Token ids ``(1, length)``, on the model's input device.
        at: ``(n_target,)``: the position whose logits predict each target token.
        target: Token ids ``(n_target,)``.
        foils: Foils of each, ``(n_target, n_foils)``, padded with -1. None if values are not
            contrasts.
        chosen: Indices of the target tokens with a value. None: all.
    """

    ids: Tensor
    at: Tensor
    target: Tensor
    foils: Tensor | None = None
    chosen: tuple[int, ...] | None = None

    @property
    def n_values(self) -> int:
        """Number of target tokens with values."""
        return len(self.target) if self.chosen is None else len(self.chosen)

    @property
    def length(self) -> int:
        """Number of ids."""
        return self.ids.shape[1]

    def of(self, targets: list[int], length: int) -> "Row":
        """A row with some of the target tokens, and `length` of the ids."""
        foils = None if self.foils is None else self.foils[targets]
        return Row(self.ids[:, :length], self.at[targets], self.target[targets], foils)


class ForwardPass:
    """The model's forward pass on token ids, with the logits of some positions.

    Args:
        model: The model, in evaluation mode whenever it is called.

    Attributes:
        kept: How logits of some positions are requested; None: all are computed.
        seed: As for `Passes`: all points of a path draw the same.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept = _compat.kept_logits(model)
        self.seed: int | None = None
        self._uncached = _compat.uncached(model)

    def logits(self, ids: Tensor, at: Tensor) -> Tensor:
        """Logits ``(batch, n, vocabulary)`` at positions ``at (n,)`` of ``ids (batch, length)``."""
        logits = _compat.sequence_logits(self.run(ids, at))
        places = self.places(at, ids.shape[1], logits.shape[1])
        return logits if places is None else logits[:, places.to(logits.device)]

    def run(self, ids: Tensor, at: Tensor) -> Any:
        """The model's output when these logits are requested, whatever it returns."""
        kept = _compat.keeping_logits(self.kept, at.expand(len(ids), -1), ids)
        with repeated_draws(self.seed, ids):
            return _compat.called(self.model, ids, **self._uncached, **kept)

    def keep_all(self) -> None:
        """Requests the logits of all positions from now on."""
        self.kept = None

    def places(self, at: Tensor, length: int, n_kept: int) -> Tensor | None:
        """Indices of these positions among the returned logits; None: in order."""
        return None if self.kept == "positions" else at - (length - n_kept)

    def order(self, at: Tensor, length: int, n_kept: int) -> list[int]:
        """Like `places`, always one index for each of `at`."""
        places = self.places(at, length, n_kept)
        return list(range(n_kept)) if places is None else places.tolist()
