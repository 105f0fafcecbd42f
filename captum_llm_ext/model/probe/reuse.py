"""Whether prefix reuse gives correct values: checked on rows of the run before use."""

from collections.abc import Sequence

from torch import Tensor

from captum_llm_ext import _compat
from captum_llm_ext.model.forward.passes import Passes
from captum_llm_ext.model.forward.rounding import reason_against
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.forward.schedule import Branch
from captum_llm_ext.model.probe.findings import Packing


def why_no_prefix_reuse(passes: Passes, rows: Sequence[TokenRow], root: Branch) -> str | None:
    """Why values from a prefix cache differ from those of whole rows; None if they do not.

    Args:
        passes: Forward passes of the model.
        rows: Rows of the run.
        root: Their plan; the longest row with a shared prefix is used.
    """
    reason = _compat.why_no_prefix_reuse(passes.model)
    if reason is not None:
        return reason
    lengths = [len(row.ids) for row in rows]
    depth, batch = max(
        ((branch.stop, b) for branch in root.walk() if branch.stop for b in branch.batches),
        key=lambda pair: (lengths[pair[1][0]], len(pair[1])),
    )
    row, other = rows[batch[0]].ids, rows[batch[-1]].ids
    other = other[: depth + (len(other) - depth + 1) // 2]  # so that there is padding
    return reason_against(lambda: passes.prefix_cache_error(row, other, depth))


def packing_of(
    passes: Passes, row: Sequence[int], places: Sequence[int] = ()
) -> tuple[Packing, Tensor | None]:
    """Whether the model reads a row in a pack as it reads it alone, and its capabilities there.

    Args:
        passes: Forward passes of the model.
        row: Token ids, preferably of the longest row of the run.
        places: Sorted positions after which the pack differs from the row.

    Returns:
        The findings; and the logits of the row alone at these positions, ``(1, n, vocabulary)``, if
        computed.
    """
    errors: list[float] = []
    alone: list[Tensor] = []

    def error() -> float:
        compare, log_probs = passes.packing_error(row, places)
        alone.append(log_probs)
        errors.append(compare())
        return errors[0]

    reason = reason_against(error)
    differs = reason is not None and len(errors) > 0
    found = Packing(len(row), reason, passes.chains, passes.spares_ends, differs)
    return found, alone[0] if alone else None
