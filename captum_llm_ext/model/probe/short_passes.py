"""Forward passes whose complete output is used: all logits, or those of some positions."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.forward.draws import Draws
from captum_llm_ext.model.forward.memory import is_out_of_memory
from captum_llm_ext.model.probe.differences import spread


class ShortPasses:
    """Passes without a cache.

    Args:
        model: The model.
        extras: Further arguments of its forward.

    Attributes:
        kept: How logits of some positions can be requested, see `_compat.kept_logits`.
        seed: Seed of random draws in every pass; None: unchanged.
    """

    def __init__(self, model: nn.Module, extras: Mapping[str, Any]) -> None:
        self._model, self._extras = model, dict(extras)
        self._device = _compat.input_device(model)
        self._uncached = _compat.uncached(model)
        self.kept = _compat.kept_logits(model)
        self.seed: int | None = None

    def all(self, ids: Sequence[int]) -> Tensor:
        """All logits ``(1, length, vocabulary)`` that the model returns for a row.

        Raises:
            TypeError: If it does not run on token ids alone.
        """
        given = torch.tensor([[*ids]], dtype=torch.int64, device=self._device)
        try:
            with self._repeated_draws():
                output = _compat.called(self._model, given, **self._uncached, **self._extras)
        except (TypeError, ValueError, AttributeError) as error:
            part = _compat.language_part(self._model)
            if self._extras or part is None or not _compat.is_transformers(self._model):
                raise
            raise TypeError(
                f"{type(self._model).__name__} does not run on token ids alone ({error}): give "
                f"`{part}`, or an input with all that it needs."
            ) from error
        return _compat.sequence_logits(output)

    def log_probs_at(self, rows: Sequence[Sequence[int]], at: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities ``(n_rows, n_places, vocabulary)`` at positions of rows of one length.

        On the CPU, as by `spread`. One row at a time if memory is short.
        """
        try:
            return self._pass(rows, at)
        except RuntimeError as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
        return torch.cat([self._pass([row], [own]) for row, own in zip(rows, at, strict=True)])

    def _pass(self, rows: Sequence[Sequence[int]], at: Sequence[Sequence[int]]) -> Tensor:
        ids = torch.tensor([[*row] for row in rows], dtype=torch.int64, device=self._device)
        places = torch.tensor([[*own] for own in at], dtype=torch.int64, device="cpu")
        arguments = {**self._uncached, **self._extras}
        arguments |= _compat.keeping_logits(self.kept, places, ids)
        with self._repeated_draws():
            logits = _compat.sequence_logits(_compat.called(self._model, ids, **arguments))
        if self.kept != "positions":
            where = (places - (ids.shape[1] - logits.shape[1])).to(logits.device)
            logits = logits.gather(1, where[..., None].expand(-1, -1, logits.shape[2]))
        elif logits.shape[1] != places.shape[1]:
            raise ValueError("logits of other positions than those requested")
        return spread(logits)

    def _repeated_draws(self) -> AbstractContextManager[Any]:
        """Every pass of one shape draws the same."""
        return nullcontext() if self.seed is None else Draws(self.seed)
