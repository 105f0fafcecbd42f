"""Whether what rows share can be computed once: seen on rows of the run, before it is relied on."""

from collections.abc import Sequence

from captum_llm_ext import _compat
from captum_llm_ext.scoring.passes import Passes, reason_against
from captum_llm_ext.scoring.plan import Branch
from captum_llm_ext.scoring.rows import TokenRow


def why_not_read_on(passes: Passes, rows: Sequence[TokenRow], root: Branch) -> str | None:
    """Why the model does not read on from its state as it reads whole rows; None where it does.

    Args:
        passes: Of the model.
        rows: Rows of the run.
        root: How they would be run; the longest row that shares anything is read.
    """
    reason = _compat.why_not_read_on(passes.model)
    if reason is not None:
        return reason
    lengths = [len(row.ids) for row in rows]
    depth, batch = max(
        ((branch.stop, b) for branch in root.walk() if branch.stop for b in branch.batches),
        key=lambda pair: (lengths[pair[1][0]], len(pair[1])),
    )
    row, other = rows[batch[0]].ids, rows[batch[-1]].ids
    other = other[: depth + (len(other) - depth + 1) // 2]  # so that there is padding
    return reason_against(lambda: passes.reads_on(row, other, depth))


def why_not_packed(passes: Passes, rows: Sequence[TokenRow]) -> str | None:
    """Why the model does not read a row in a pack as it reads it alone; None where it does."""
    longest = max((row.ids for row in rows), key=len)
    return reason_against(lambda: passes.reads_packed(longest))
