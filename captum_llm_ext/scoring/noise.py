"""How much a value changes by nothing but the company a row is computed in."""

import torch
from torch import Tensor

from captum_llm_ext.scoring.passes import Passes
from captum_llm_ext.scoring.plan import Branch
from captum_llm_ext.scoring.rows import TokenRow

# Rows of the batches that a row is computed in: kernels are chosen by size.
_BATCHES = (1, 2, 8)
_PADDING = 7
_SHORTEST = 4  # of a beginning that is read apart


def noise_floor(
    passes: Passes, row: TokenRow, target: Tensor, *, most_rows: int, reads_on: bool
) -> Tensor:
    """Largest difference between values of one row in batches of several shapes.

    The row is computed alone, beside copies of itself, padded, and read on from its own beginning.
    In exact arithmetic all values were the same; an attribution that is not larger than their
    difference may be rounding.

    Args:
        passes: Of the model.
        row: Any row, best the one of the whole text.
        target: Token ids ``(n_target,)``.
        most_rows: So many rows at most in a batch.
        reads_on: Whether reading on from a state is used at all.

    Returns:
        Shape ``(n_target,)``, float64, in the unit of the values; NaN where the row gives none.
    """
    longer = TokenRow((*row.ids, *row.ids[:_PADDING]), row.positions, row.extras, row.key)
    found: list[Tensor] = []
    for n in sorted({min(n, most_rows) for n in _BATCHES}):
        found.append(_together(passes, [row] * n, target, 0))
    if row.extras is None and most_rows > 1:
        found.append(_together(passes, [longer, row], target, 0))
    shared = min(row.first, len(row.ids) - 2) // 2 * 2
    if reads_on and shared >= _SHORTEST:
        found.append(_together(passes, [row] * min(2, most_rows), target, shared))
    values = torch.cat(found)
    return values.amax(0) - values.amin(0)


def _together(passes: Passes, rows: list[TokenRow], target: Tensor, shared: int) -> Tensor:
    """Values ``(n_rows, n_target)`` of rows in one batch, after reading `shared` ids once."""
    every = tuple(range(len(rows)))
    whole = Branch(0, shared, every, (every,))
    return torch.cat([values for _, values in passes.run(whole, rows, target)])
