"""Absent features replaced by what stands in the same surroundings elsewhere in a corpus."""

import os
import warnings
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from captum_llm_ext.baselines.documents import documents
from captum_llm_ext.baselines.index import CorpusIndex
from captum_llm_ext.baselines.place import Place, place_of
from captum_llm_ext.baselines.search import Found, Level, Query, Search, query_of
from captum_llm_ext.baselines.slot import Slot

__all__ = ["CorpusBaselines", "Match"]

# A slot is constant if at most this share of its occurrences differs: no match is without a slip.
SLIPS = 0.05
_LOCATED: tuple[Level, ...] = ("both", "left", "right")


@dataclass(frozen=True, slots=True)
class Match:
    """What a corpus has for one feature in its surroundings.

    Attributes:
        level: How the candidates were found: in the same surroundings on ``"both"`` sides, or on
            the ``"left"`` or ``"right"`` only; by ``"shape"`` (same number of words, of the same
            kinds: capitalised, number, …), by ``"length"`` (same number of words), ``"any"``;
            or ``"blank"``: the feature is white space, and stays.
        surroundings: The surroundings that were asked for, ``_`` in place of the feature and a
            kind in angle brackets where any word of that kind would do.
        n_occurrences: Places of the corpus found, those with the original text included.
        n_candidates: Distinct texts other than the original found there.
        constant: Whether the corpus shows the slot always filled with the original text, which
            then stays.
        examples: The most frequent candidates, at most ten.
    """

    level: Level
    surroundings: str
    n_occurrences: int
    n_candidates: int
    constant: bool
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Filling:
    """What may stand in a slot: texts and, cumulated, how often each occurs."""

    match: Match
    texts: tuple[str, ...]
    cumulated: tuple[int, ...]


class CorpusBaselines:
    """Text of a corpus that stands where the feature could stand, without labels.

    The surroundings of a feature are compared with every place of the corpus by their *frame*
    words, those that their neighbours lead one to expect; fillers, which carry the facts of a text,
    count only by their kind (capitalised, number, …). So "lives in _, FL and is a lawyer" finds
    what is lived in whatever the state and the occupation, and a replacement carries nothing over
    from the neighbouring facts. Of all surroundings seen at least `min_occurrences` times the most
    telling one is taken, on both sides if there is one; then on one side, then by shape, length,
    and at last any text. A draw takes one of the places found at random: frequent texts often.

    The replacement may have another number of words. It carries the white space and punctuation
    the feature has at its ends. For a feature that is a part of a word, the same part is cut out
    of a word that could stand there.

    Args:
        corpus: Texts; or the path of a UTF-8 text file with one document per line, or of a
            ``.jsonl`` file with the document under ``"text"``. Line breaks count as borders.
        match: ``"context"`` as above; ``"length"``: any text with as many words; ``"any"``: any
            text up to twice as long. The last two are plain variants for comparison.
        seed: For the sample of places looked at where surroundings play no part.
        exclude_original: Whether the feature's own text is never drawn, except where it is the
            only one.
        min_occurrences: Surroundings seen less often are not trusted; by default one in 2,000
            words, at least 10 and at most 50. Also how often a slot must have been seen always the
            same to count as constant.
        min_candidates: Fewer candidates for a slot that is not constant warn, once per slot. The
            first feature whose surroundings the corpus does not have warns, too. 0 silences both.
        errors: ``"replace"`` accepts files with invalid UTF-8.

    Raises:
        FileNotFoundError: If `corpus` is a path that cannot be read.
        ValueError: If the corpus holds no text, the file is not UTF-8 text, or an argument is
            not one of those allowed.
        TypeError: If the corpus is neither a path nor texts.
    """

    deterministic = False

    def __init__(
        self,
        corpus: Iterable[str] | str | os.PathLike[str],
        *,
        match: Literal["context", "length", "any"] = "context",
        seed: int = 0,
        exclude_original: bool = True,
        min_occurrences: int | None = None,
        min_candidates: int = 1,
        errors: Literal["strict", "replace"] = "strict",
    ) -> None:
        if match not in ("context", "length", "any"):
            raise ValueError(f"`match` is {match!r}: give 'context', 'length' or 'any'.")
        if min_occurrences is not None and min_occurrences < 1:
            raise ValueError(f"`min_occurrences` is {min_occurrences}: give at least 1, or None.")
        self._index = CorpusIndex(documents(corpus, errors))
        self.match = match
        self.seed = seed
        self.exclude_original = exclude_original
        self.min_occurrences = min_occurrences or min(max(len(self._index) // 2000, 10), 50)
        self.min_candidates = min_candidates
        self._search = Search(self._index, match, self.min_occurrences, seed)
        self._expects_context = match == "context"
        self._places: dict[Slot, tuple[Place, _Filling] | None] = {}
        self._fillings: dict[Query, _Filling] = {}

    def __repr__(self) -> str:
        return f"CorpusBaselines({len(self._index):,} words, match={self.match!r})"

    def __call__(self, slot: Slot, generator: torch.Generator) -> str:
        """One replacement for the feature, its leading white space and punctuation included."""
        filled = self._filled(slot)
        if filled is None:
            return slot.text
        place, filling = filled
        device = generator.device
        total = filling.cumulated[-1]
        at = int(torch.randint(total, (), generator=generator, device=device))
        return place.filled(filling.texts[bisect_right(filling.cumulated, at)])

    def explain(self, slot: Slot) -> Match:
        """How the candidates for a feature were found, and what they are."""
        filled = self._filled(slot)
        return Match("blank", "_", 0, 0, True, ()) if filled is None else filled[1].match

    def _filled(self, slot: Slot) -> tuple[Place, _Filling] | None:
        if slot not in self._places:
            place = place_of(slot)
            self._places[slot] = None if place is None else (place, self._filling(place))
        return self._places[slot]

    def _filling(self, place: Place) -> _Filling:
        query = query_of(place, self._index)
        filling = self._fillings.get(query)
        if filling is None:
            filling = self._fillings[query] = self._find(query)
            self._warn(query, filling.match)
        return filling

    def _find(self, query: Query) -> _Filling:
        for found in self._search(query):
            filling = self._judged(query, found)
            if filling is not None:
                return filling
        return _filling(Match("any", "_", 0, 0, False, ()), [(query.core, 1)])

    def _judged(self, query: Query, found: Found) -> _Filling | None:
        """What the places found offer; None if that is nothing."""
        texts = self._index.texts(found.spans)
        seen, same = texts.total(), texts.pop(query.core, 0)
        located = found.level in _LOCATED
        constant = located and seen > 0 and seen - same <= SLIPS * seen
        if not texts and not constant:
            return None
        others = sorted(texts.items(), key=lambda entry: (-entry[1], entry[0]))
        match = Match(
            level=found.level,
            surroundings=found.surroundings,
            n_occurrences=seen,
            n_candidates=len(others),
            constant=constant,
            examples=tuple(text for text, _ in others[:10]),
        )
        original = [(query.core, same)] if same else []
        if constant:
            return _filling(match, original)
        return _filling(match, others if self.exclude_original else others + original)

    def _warn(self, query: Query, match: Match) -> None:
        if match.n_candidates < self.min_candidates and not match.constant:
            self._say(
                f"The corpus has {match.n_candidates} other texts for {query.core!r} in "
                f"{match.surroundings!r} (matched by {match.level}), fewer than "
                f"`min_candidates`={self.min_candidates}. Give a larger corpus of the same kind of "
                "text, or silence this with min_candidates=0."
            )
        elif self._expects_context and match.level not in _LOCATED and self.min_candidates > 0:
            self._expects_context = False
            self._say(
                f"The surroundings of {query.core!r} do not occur {self.min_occurrences} times in "
                f"the corpus: it was matched by {match.level}, and other features may be; "
                "`explain(slot)` tells. Give a larger corpus of the same kind of text, lower "
                "`min_occurrences`, or silence this with min_candidates=0."
            )

    @staticmethod
    def _say(message: str) -> None:
        warnings.warn(message, UserWarning, stacklevel=6)


def _filling(match: Match, candidates: list[tuple[str, int]]) -> _Filling:
    texts, counts = zip(*candidates, strict=True)
    return _Filling(match, texts, tuple(accumulate(counts)))
