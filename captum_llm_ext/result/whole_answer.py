"""What a whole answer is owed to in the end, and whether that is what to read first.

A long answer follows mostly from its own words. What the prompt does to each token directly, summed
over the answer, is nearly its whole effect on the probability of the answer as it is: by the chain
rule of probability that is the sum of what it does to each token after those before it. So direct
effects tell which part of the prompt an answer came from.

Shares tell where chains of causes begin, and what nudged the first words counts in all that follows
from them, however small it was: of an answer whose passage is worth 25 nats, the question 16 and a
passage that is only spoken of 11, they give 20, 40 and 27 % (tests/test_html_totals.py). They are
read first only where direct effects do not tell which part did most, as their errors add up over a
long answer, and are not spoken of where these do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from captum_llm_ext.result.levels import answer_levels
from captum_llm_ext.result.reading import TOKEN, Reading, first_level, part_names
from captum_llm_ext.result.total import Share, TotalAttribution

if TYPE_CHECKING:
    from captum_llm_ext.result.numbers import ResultNumbers

# Of what led to the tokens: beyond, an answer is said to follow from its own words. A guess: what
# real models said lies between 0.59 and 0.93, of the demo at 0.53.
OWN_WORDS = 0.75
LEAST = 0.05  # share of the whole answer below which a part is not told of in a line
_SURE = 1.96  # standard errors that tell one share from none
_MOST_CELLS = 1_000_000  # of tokens times columns: errors of single tokens are told up to there


@dataclass(frozen=True)
class WholeAnswerShares:
    """What the whole answer is owed to, through its own words.

    Attributes:
        level: What the parts of the prompt are: the coarsest that are at least two.
        shares: Of them, and of words of the answer that chains begin with, by size.
        directly: The prompt's share of what led directly to the tokens.
        is_first: Whether this is what to read first.
    """

    level: str
    shares: list[Share]
    directly: float
    is_first: bool

    @property
    def is_listed(self) -> bool:
        """Whether there is something to tell: the answer follows from its own words."""
        return self.directly < 1 - OWN_WORDS

    @property
    def listed(self) -> list[Share]:
        """Those that a line has: large enough, and told from nothing where errors are known."""
        return [
            share
            for share in self.shares
            if share.share >= LEAST and not share.share < _SURE * share.standard_error
        ]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "level": self.level,
            "shares": [_plain(share) for share in self.shares],
            "directly": self.directly,
            "first": self.is_first,
        }


def whole_answer_shares(
    result: "ResultNumbers", level: str | None = None
) -> WholeAnswerShares | None:
    """What the answer is owed to in the end; None where it has no chains.

    Args:
        result: The result.
        level: Of the prompt; None: the coarsest with at least two parts.
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
    is_first = found.is_listed and _tells_of_the_prompt(found)
    is_first = is_first and not Reading(result).tells_the_first()
    return replace(found, is_first=is_first)


def _tells_of_the_prompt(found: WholeAnswerShares) -> bool:
    """Whether the largest share is of a part of the prompt, with an error that is known.

    That most chains begin with a word of the answer says that nothing was told from noise there.
    """
    first = next(iter(found.listed), None)
    return first is not None and not first.is_output and first.standard_error >= 0


def totals(result: "ResultNumbers", levels: Sequence[str]) -> dict[str, TotalAttribution]:
    """Totals by levels of the prompt; none where the answer was held fixed or came of nothing."""
    whole = cast(Any, result)
    if not result.output_features or len(result.output_tokens) < 2:
        return {}
    try:
        found: dict[str, TotalAttribution] = {name: whole.total(level=name) for name in levels}
    except ValueError:  # probabilities of a word's tokens do not add up
        return {}
    return found if all(bool((one.strength > 0).any()) for one in found.values()) else {}


def share_errors(result: "ResultNumbers", total: TotalAttribution) -> list[dict[str, Any]]:
    """Standard errors of shares in every part of the answer, and in the whole.

    Returns:
        Per level that the answer can be read by its name as ``level``, ``spans`` of tokens, and per
        span in ``se`` the columns that have an error (the prompt's parts, then the answer's by
        that level) and these; None for an error that nothing tells.
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
    """Per feature of the answer the run that it is in."""
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
