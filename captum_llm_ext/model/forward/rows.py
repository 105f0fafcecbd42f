"""The model's input for one coalition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenRow:
    """The model's input for one coalition, and the positions that predict the target tokens.

    Attributes:
        ids: Token ids of the prompt and of the generated text before the last target token.
        positions: ``(n_target,)``: the index in `ids` whose logits predict the target token; -1 if
            the coalition defines no value for it.
        extras: Other arguments of the model's forward, batch size 1.
        key: Distinguishes rows with different extras.
    """

    ids: tuple[int, ...]
    positions: Sequence[int]
    extras: Mapping[str, Any] | None = None
    key: object = None

    @property
    def first(self) -> int:
        """The first position that predicts a target token."""
        return min((place for place in self.positions if place >= 0), default=len(self.ids) - 1)

    def up_to(self, t: int) -> "TokenRow | None":
        """The row up to the position that predicts target token `t`, for this token alone.

        None if there is no such position.
        """
        place = self.positions[t]
        if place < 0:
            return None
        return TokenRow(self.ids[: place + 1], (place,), self.extras, self.key)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows as one tensor ``(n_rows, longest)``."""
    length = max(len(row) for row in rows)
    # Padding on the right is never visible to a row: its first id is as good as any.
    return torch.tensor(
        [[*row, *[row[0]] * (length - len(row))] for row in rows], dtype=torch.int64, device="cpu"
    )
