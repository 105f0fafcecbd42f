"""What a baseline is asked: one place of a text whose feature is absent."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True, slots=True)
class Slot:
    """One contiguous place of a text that an absent feature leaves to be filled.

    Attributes:
        context: The whole text the feature stands in, the feature included.
        start: First character of the feature in `context`; its leading white space belongs to it.
        stop: One past the feature's last character.
        ids: The feature's own token ids.
        index: Number of the slot, counted in reading order within prompt or output.
        feature: Number of the feature it belongs to: `index` itself unless slots are tied.
        unit: ``"token"``, ``"word"``, ``"sentence"`` and the like, or None for spans of the
            user's own.
        generated: Whether the feature is a part of the model's own output.
    """

    context: str
    start: int
    stop: int
    ids: tuple[int, ...] = ()
    index: int = 0
    feature: int = 0
    unit: str | None = None
    generated: bool = False

    @property
    def text(self) -> str:
        """The feature's own text, leading white space included."""
        return self.context[self.start : self.stop]

    @property
    def left(self) -> str:
        """All text before the feature."""
        return self.context[: self.start]

    @property
    def right(self) -> str:
        """All text after the feature."""
        return self.context[self.stop :]


@runtime_checkable
class Baseline(Protocol):
    """What stands where a feature is absent.

    Called once per absent feature and draw. Returns text (tokenised in place; ``""`` deletes; the
    feature's leading white space is put before text that has none) or token ids (used as they
    are). Random choices come from `generator` alone. A baseline whose answer never depends on
    `generator` says so with an attribute ``deterministic = True``: one draw of it is then enough.
    """

    def __call__(self, slot: Slot, generator: torch.Generator, /) -> str | Sequence[int]:
        """The replacement for `slot`."""
        ...
