"""Whether what rows share can be computed once: seen on rows of the run, before it is relied on."""

from collections.abc import Sequence

from captum_llm_ext import _compat
from captum_llm_ext.model.forward.passes import Passes
from captum_llm_ext.model.forward.rounding import reason_against
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.forward.schedule import Branch
from captum_llm_ext.model.probe.findings import Packing


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


def packing_of(passes: Passes, row: Sequence[int], places: Sequence[int] = ()) -> Packing:
    """Whether the model reads a row in a pack as it reads it alone, and what it can do there.

    Args:
        passes: Of the model.
        row: Token ids, best of the longest row of the run.
        places: Where something else follows in the pack, at the place itself and in its row.
    """
    errors: list[float] = []

    def error() -> float:
        errors.append(passes.reads_packed(row, places))
        return errors[0]

    reason = reason_against(error)
    differs = reason is not None and len(errors) > 0
    return Packing(len(row), reason, passes.chains, passes.spares_ends, differs)
