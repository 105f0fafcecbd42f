"""What the model reads for one coalition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenRow:
    """What the model reads for one coalition, and where it says each target token.

    Attributes:
        ids: Token ids of the prompt and of the generated text before the last target token.
        positions: ``(n_target,)``: the place in `ids` whose logits predict the target token; -1
            where the coalition gives the token no value.
        extras: Other arguments of the model's forward, batch size 1.
        key: Tells rows apart whose extras differ.
    """

    ids: tuple[int, ...]
    positions: Sequence[int]
    extras: Mapping[str, Any] | None = None
    key: object = None

    @property
    def first(self) -> int:
        """The first place that a target token is said at."""
        return min((place for place in self.positions if place >= 0), default=len(self.ids) - 1)

    def up_to(self, t: int) -> "TokenRow | None":
        """The row up to where it says target token `t`, which it says alone, with nothing after it.

        None where it does not.
        """
        place = self.positions[t]
        if place < 0:
            return None
        return TokenRow(self.ids[: place + 1], (place,), self.extras, self.key)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows as one tensor ``(n_rows, longest)``."""
    length = max(len(row) for row in rows)
    # What stands right of a row is never seen by it: its own first id is as good as any.
    return torch.tensor(
        [[*row, *[row[0]] * (length - len(row))] for row in rows], dtype=torch.int64, device="cpu"
    )
