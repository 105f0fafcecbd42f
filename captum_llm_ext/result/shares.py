"""Total shares of parts of an answer, with standard errors, for pages.

Shares show where chains of causes begin. Whatever changed a first word counts in all that follows
from it, however small it was. A part of the answer is one node: what its own words did to one
another is inside it. Without that, of an answer whose passage is worth 25 nats, the question 16 and
a passage that is only mentioned 10, the shares were 20, 41 and 26 %; so they are 41, 27 and 19 %.
They are shown on request only, and what an answer came from is told by its `AnswerAttribution`, or
by direct effects.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from captum_llm_ext.result.levels import answer_levels
from captum_llm_ext.result.reading import TOKEN
from captum_llm_ext.result.total import TotalAttribution

if TYPE_CHECKING:
    from captum_llm_ext.result.numbers import ResultNumbers

# Target tokens times columns up to which errors of single tokens are computed; chosen, not
# measured.
_MOST_CELLS = 1_000_000


def totals(result: "ResultNumbers", levels: Sequence[str]) -> dict[str, TotalAttribution]:
    """Totals by levels of the prompt; empty if the output was held fixed or has no causes."""
    whole = cast(Any, result)
    if not result.output_features or len(result.output_tokens) < 2:
        return {}
    try:
        found: dict[str, TotalAttribution] = {name: whole.total(level=name) for name in levels}
    except ValueError:  # probabilities of a word's tokens are not additive
        return {}
    return found if all(bool((one.strength > 0).any()) for one in found.values()) else {}


def share_errors(result: "ResultNumbers", total: TotalAttribution) -> list[dict[str, Any]]:
    """Standard errors of shares in every part of the answer, and in the whole.

    Returns:
        Per level of the answer its name as ``level``, ``spans`` of tokens, and per span in ``se``
        the columns that have an error (the prompt's parts, then the answer's at that level) and the
        errors; None if unknown.
    """
    n = len(result.output_tokens)
    is_large = n * (len(total.names) + len(total.output_names)) > _MOST_CELLS
    levels = {TOKEN: list(range(n))} | {
        level["name"]: level["part_of"] for level in answer_levels(result)
    }
    names: list[str] = []
    asked: list[tuple[list[range], list[int] | None]] = []
    for name, part_of in levels.items():
        cuts = [t for t in range(n) if not t or part_of[t] != part_of[t - 1]]
        runs = [range(*run) for run in zip(cuts, [*cuts[1:], n], strict=True)]
        parts = None if name == TOKEN else _parts_of_features(result, runs)
        names.append(name)
        asked.append(([range(n), *([] if is_large else (r for r in runs if len(r) < n))], parts))
    return [
        {
            "level": name,
            "spans": [[span.start, span.stop] for span in spans],
            "se": [_sparse(row) for row in errors.tolist()],
        }
        for name, (spans, _), errors in zip(names, asked, total.spread.readings(asked), strict=True)
    ]


def _parts_of_features(result: "ResultNumbers", runs: Sequence[range]) -> list[int]:
    """The run of each feature of the answer."""
    owner = {t: i for i, run in enumerate(runs) for t in run}
    found = [0] * len(result.output_features or ())
    for t, piece in enumerate(result.output_pieces):
        if piece.feature is not None:
            found[piece.feature] = owner[t]
    return found


def _sparse(row: Sequence[float]) -> list[list[Any]]:
    kept = [(i, None if x != x else float(f"{x:.4g}")) for i, x in enumerate(row) if x != 0]
    return [[i for i, _ in kept], [x for _, x in kept]]
