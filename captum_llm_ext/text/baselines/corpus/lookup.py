"""From features to candidates: what a corpus offers for one slot, or for several at once."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.text.baselines import words
from captum_llm_ext.text.baselines.candidates import Candidates, Match
from captum_llm_ext.text.baselines.corpus.index import CorpusIndex
from captum_llm_ext.text.baselines.corpus.joint import Occurrences, joint_occurrences
from captum_llm_ext.text.baselines.corpus.phrase import parts, phrases
from captum_llm_ext.text.baselines.corpus.search import Found, Query, Search, query_of
from captum_llm_ext.text.baselines.surroundings import Surroundings
from captum_llm_ext.text.baselines.words import SENTENCE_END, WORD, border

# A slot is constant if at most this share of its occurrences differs, since matches contain stray
# ones. With .025, shares of right draws in three invented languages are the same; with .1, those of
# connecting words rise from .867 to .911 in one, since more of them stay.
SLIPS = 0.05
# This many other texts, all of template words without names or numbers, count as paraphrases of the
# original, but not after a template word and without a filler inside: "lives in" and "has moved to"
# have fillers around, "red wine" and "green tea" after "drinks" are values. With 1 or 4, shares
# of right draws in three invented languages are the same.
WORDINGS = 2
_LOCATED = ("both", "left", "right")
_PLACED = (*_LOCATED, "kinds")


@dataclass(frozen=True, slots=True)
class _Offer:
    """Corpus places for a feature, and their texts with counts."""

    found: Found
    texts: Counter[str]
    constant: bool


class Lookup:
    """Looks up features in a corpus, each distinct query once.

    Args:
        index: The corpus.
        search: Finds places in it.
        exclude_original: Whether a feature's own text is excluded.
        min_candidates: Warn if there are fewer; 0 disables all warnings.
    """

    def __init__(
        self,
        index: CorpusIndex,
        search: Search,
        *,
        exclude_original: bool,
        min_candidates: int,
    ) -> None:
        self._index, self._search = index, search
        self._exclude_original = exclude_original
        self._min_candidates = min_candidates
        self._known: dict[Query, Candidates] = {}

    def single(self, place: Surroundings) -> Candidates:
        """Candidates for one slot."""
        query = query_of(place, self._index)
        if query not in self._known:
            found = self._find(query)
            if found.match.constant:
                found = self._within_phrase(place) or found
            self._known[query] = found
            self._warn(query, found.match)
        return self._known[query]

    def joint(self, places: Sequence[Surroundings], seed: int) -> Candidates | None:
        """Joint candidates, from one document, for the slots of one feature.

        Returns:
            None, with a warning, if no document has texts for all of them.
        """
        original = tuple(place.core for place in places)
        queries = [query_of(place, self._index) for place in places]
        offers = [next(self._offers(query), None) for query in queries]
        varying = [i for i, offer in enumerate(offers) if offer is None or not offer.constant]
        if not varying:
            return Candidates.counted(
                "document", "_", {original: 1}, original, exclude_original=True
            )
        members = [self._occurrences(offers[i]) for i in varying]
        found: Counter[tuple[str, ...]] = Counter()
        for texts, n in joint_occurrences(members, torch.Generator().manual_seed(seed)).items():
            whole = list(original)
            for i, text in zip(varying, texts, strict=True):
                whole[i] = text
            found[tuple(whole)] += n
        if not found.keys() - {original}:
            self._warn_user(
                f"No document of the corpus has other texts for all places of the tied feature "
                f"{' … '.join(original)!r}: each place is drawn by itself."
            )
            return None
        surroundings = " … ".join("_" if o is None else o.found.surroundings for o in offers)
        return Candidates.counted(
            "document", surroundings, found, original, exclude_original=self._exclude_original
        )

    def _within_phrase(self, place: Surroundings) -> Candidates | None:
        """Candidates for a word that the rest of its own phrase determines.

        "Lake" is constant before "of Pines", but the phrase is not: the word is replaced by the
        corresponding part of other phrases in its place.
        """
        known = phrases(place, self._index)
        if not known or (len(known) > 1 and self._never_lacks(place, known)):
            return None
        for n_left, n_right in known:
            offer = self._of_phrase(place, n_left, n_right)
            found = None if offer is None else parts(offer.texts, place.atoms, n_left, n_right)
            if offer is None or not found or found.total() <= SLIPS * offer.texts.total():
                continue
            if self._are_wordings(place, n_left, n_right, found):
                continue
            own = {(place.core,): offer.texts.total() - found.total()}
            return Candidates.counted(
                offer.found.level,
                offer.found.surroundings,
                own | {(text,): n for text, n in found.items()},
                (place.core,),
                exclude_original=self._exclude_original,
            )
        return None

    def _are_wordings(
        self, place: Surroundings, n_left: int, n_right: int, found: Collection[str]
    ) -> bool:
        """Whether a phrase and the few others in its place are taken to say the same."""
        if len(found) > WORDINGS or not all(map(self._is_all_template_words, found)):
            return False
        before = place.left[n_left] if n_left < len(place.left) else words.BREAK
        begins = border(before) >= SENTENCE_END and not n_left
        if any(_is_name(text, begins) for text in (place.core, *found)):
            return False
        around = place.left[:n_left] + place.right[:n_right]
        return border(before) > WORD or not all(map(self._is_all_template_words, around))

    def _is_all_template_words(self, text: str) -> bool:
        atoms = [atom.text for atom in words.atoms(text)]
        return all(map(self._index.is_template_word, self._index.context(atoms)))

    def _never_lacks(self, place: Surroundings, known: Sequence[tuple[int, int]]) -> bool:
        """Whether all texts in place of the longest phrase contain the word.

        Then so do all texts in place of the shorter ones: one search suffices for nearly all
        template words.
        """
        ends = (max(n for n, _ in known), max(n for _, n in known))
        offer = self._of_phrase(place, *ends)
        if offer is None:
            return False
        found = parts(offer.texts, place.atoms, *ends)
        return found is not None and found.total() <= SLIPS * offer.texts.total()

    def _of_phrase(self, place: Surroundings, n_left: int, n_right: int) -> _Offer | None:
        """Texts in place of a feature with this many atoms around it."""
        query = query_of(place.widened(n_left, n_right), self._index)
        offer = next(self._offers(query), None)
        return offer if offer is not None and offer.found.level in _LOCATED else None

    def nothing_fits(self, original: tuple[str, ...], match: Match) -> Candidates:
        """The original, with a warning, if no candidate has as many tokens."""
        self._warn_user(
            f"None of the {match.n_candidates} candidates for {' … '.join(original)!r} has as many "
            "tokens: its text stays. Leave `same_n_tokens` out, or give a larger corpus."
        )
        return Candidates.of(replace(match, n_candidates=0, examples=()), {original: 1.0})

    def _occurrences(self, offer: _Offer | None) -> Occurrences:
        if offer is None:
            none = torch.zeros(0, dtype=torch.int64, device="cpu")
            return Occurrences(none, none, [])
        spans = offer.found.spans
        return Occurrences(
            self._index.document_of(spans.starts), spans.starts, self._index.text_of(spans)
        )

    def _find(self, query: Query) -> Candidates:
        original = (query.core,)
        offer = next(self._offers(query), None)
        if offer is None:
            return Candidates.of(Match("any", "_", 0, 0, False, ()), {original: 1.0})
        return Candidates.counted(
            offer.found.level,
            offer.found.surroundings,
            {(text,): n for text, n in offer.texts.items()},
            original,
            exclude_original=self._exclude_original,
            constant=offer.constant,
        )

    def _offers(self, query: Query) -> Iterator[_Offer]:
        """Corpus offers in order of similarity of the surroundings, as far as they are useful."""
        for found in self._search(query):
            texts = self._index.texts(found.spans)
            seen, same = texts.total(), texts[query.core]
            constant = found.level in _PLACED and seen > 0 and seen - same <= SLIPS * seen
            if seen > same or constant:
                yield _Offer(found, texts, constant)

    def _warn(self, query: Query, match: Match) -> None:
        if match.n_candidates < self._min_candidates and not match.constant:
            self._warn_user(
                f"The corpus has {match.n_candidates} other texts for {query.core!r} in "
                f"{match.surroundings!r} (matched by {match.level}), fewer than "
                f"`min_candidates`={self._min_candidates}. Give a larger corpus of the same kind "
                "of text, or silence this with min_candidates=0."
            )

    def _warn_user(self, message: str) -> None:
        if self._min_candidates > 0:
            warn_user(message)


def _is_name(text: str, begins_sentence: bool) -> bool:
    """Whether a text contains a name or a number, which paraphrases do not."""
    kinds = [words.kind(atom.text) for atom in words.atoms(text)]
    return not {*kinds[begins_sentence:]}.isdisjoint(("capital", "upper", "number"))
