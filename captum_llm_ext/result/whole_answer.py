"""Total shares of a whole answer, and whether they should be read first.

Shares show where chains of causes begin. Whatever changed the first words counts in all that
follows from them, however small it was: of an answer whose passage is worth 25 nats, the question
16 and a passage that is only mentioned 11, the shares are 20, 40 and 27 %
(tests/test_html_totals.py). What an answer came from is told by `AnswerAttribution`, in nats, where
it is known. Otherwise shares are read first only if the direct effects, summed over the answer, are
too uncertain to say which part contributed most, as errors add up over a long answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from captum_llm_ext.result.levels import answer_levels
from captum_llm_ext.result.reading import TOKEN, Reading, first_level, part_names
from captum_llm_ext.result.total import Share, TotalAttribution

if TYPE_CHECKING:
    from captum_llm_ext.result.numbers import ResultNumbers

# Share of direct influence from the answer itself beyond which an answer is said to follow from its
# own words. Chosen: answers of real models lie between 0.59 and 0.93, the demo's at 0.53.
OWN_WORDS = 0.75
LEAST = 0.05  # share of the whole answer below which a part is not listed; chosen, not measured
_SURE = 1.96  # standard errors for significance: 95 %
# Target tokens times columns up to which errors of single tokens are computed; chosen, not
# measured.
_MOST_CELLS = 1_000_000


@dataclass(frozen=True)
class WholeAnswerShares:
    """The causes of the whole answer, including those through its own words.

    Attributes:
        level: Level of the prompt's parts: the coarsest with at least two.
        shares: Shares of these parts, and of words of the answer at which chains begin, by size.
        directly: The prompt's share of the direct influence on the tokens.
        is_first: Whether these should be read first.
    """

    level: str
    shares: list[Share]
    directly: float
    is_first: bool

    @property
    def is_listed(self) -> bool:
        """Whether there are any to list: if the answer follows mostly from its own words."""
        return self.directly < 1 - OWN_WORDS

    @property
    def listed(self) -> list[Share]:
        """The shares to list: large enough and, if errors are known, significant."""
        return [
            share
            for share in self.shares
            if share.share >= LEAST and not share.share < _SURE * share.standard_error
        ]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {
            "level": self.level,
            "shares": [_plain(share) for share in self.shares],
            "directly": self.directly,
            "first": self.is_first,
        }


def whole_answer_shares(
    result: "ResultNumbers", level: str | None = None
) -> WholeAnswerShares | None:
    """Total shares of the whole answer; None if it has no chains.

    Args:
        result: The result.
        level: Level of the prompt; None: the coarsest with at least two parts.
    """
    totals_of = totals(result, [level or first_level(result)])
    if not totals_of:
        return None
    (total,) = totals_of.values()
    weights = total.strength / total.strength.sum()
    directly = float((weights @ total.direct).sum())
    names = part_names(total.level, total.names)
    shares = [
        share if share.is_output else share._replace(name=names[share.column])
        for share in total.why(None, len(total.names) + len(total.output_names))
    ]
    found = WholeAnswerShares(total.level, shares, directly, is_first=False)
    is_first = result.answer is None and found.is_listed and _tells_of_the_prompt(found)
    is_first = is_first and not Reading(result).tells_the_first()
    return replace(found, is_first=is_first)


def _tells_of_the_prompt(found: WholeAnswerShares) -> bool:
    """Whether the largest share belongs to a part of the prompt and has a known error.

    If most chains begin with a word of the answer, no part of the prompt is significant.
    """
    first = next(iter(found.listed), None)
    return first is not None and not first.is_output and first.standard_error >= 0


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


def _plain(share: Share) -> dict[str, Any]:
    error = share.standard_error
    return {
        "name": share.name,
        "share": share.share,
        "standard_error": None if error != error else error,
        "in_answer": share.is_output,
    }
