"""Absent features drawn anew from a language model's own distribution: no corpus, no lists."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from captum_llm_ext.baselines import words
from captum_llm_ext.baselines.alternatives import Alternatives, Span
from captum_llm_ext.baselines.candidates import BLANK, Candidates, Match
from captum_llm_ext.baselines.corpus import HasSlots
from captum_llm_ext.baselines.place import Place, place_of
from captum_llm_ext.baselines.slot import LanguageModel, Slot

_CANDIDATES = 8  # more changed nothing: 4, 6, 8 and 12 name as many causes on real prompts
_TOKENS_PER_WORD = 3
_MORE_WORDS = 2  # that a stand-in may have than what it stands for
_SURE = 0.95  # the model's own text, at least so often, is what it would have written anyway


class ModelBaselines:
    """What a language model would have written where a feature is absent; it needs nothing else.

    An absent feature is one that is not known. So it is drawn anew from the model's own
    distribution of what may come after the text before it, *the feature's own text among the
    candidates*. What that text determines ("in", "is", "the") is then hardly ever another word,
    and is not blamed; a name that nothing determines is nearly always another one. This is removal
    by the conditional distribution (Covert, Lundberg & Lee, JMLR 2021, section 4.2; Aas, Jullum &
    Løland 2021), given what comes before, as a causal model has it. Candidates are of the kind of
    what they stand for (a capitalised word, a number, …) and carry its white space and punctuation.

    Several features that are absent at once are each drawn given the original text before them,
    with one exception: words that determine one another are absent together. A word is bound to
    the one before it if it is more likely than not after that, and hardly after others ("Lake"
    after "Salt"): whichever word of such a phrase is absent, the phrase is drawn anew as a whole.

    Args:
        proposer: The model that is asked, if it is not the one under explanation.
        n_candidates: Words that are tried in every place, beside the one that stands there.

    Raises:
        ValueError: If `n_candidates` is below 1; on use, if there is no model to ask.
    """

    deterministic = False

    def __init__(
        self, proposer: LanguageModel | None = None, *, n_candidates: int = _CANDIDATES
    ) -> None:
        if n_candidates < 1:
            raise ValueError(f"`n_candidates` is {n_candidates}: give at least 1.")
        self._proposer = self._model = proposer
        self.n_candidates = n_candidates
        self._known: dict[Slot, Candidates | None] = {}
        self._read: dict[str, Alternatives] = {}
        self._bound: dict[str, list[Span]] = {}

    def __call__(self, slot: Slot, generator: torch.Generator) -> str:
        """One replacement for the feature, its white space and punctuation included."""
        place, found = place_of(slot), self._candidates(slot)
        return (
            slot.text if place is None or found is None else place.filled(found.draw(generator)[0])
        )

    def with_model(self, model: LanguageModel) -> "ModelBaselines":
        """The same with a model to ask, if it has none of its own."""
        if self._proposer is not None:
            return self
        other = ModelBaselines(n_candidates=self.n_candidates)
        other._model = model
        return other

    def phrases(self, slots: Sequence[Slot]) -> list[list[int]]:
        """Places that are absent together (see `KnowsPhrases`)."""
        found: list[list[int]] = []
        for start, stop in self._phrases(slots[0].context) if slots else ():
            within = [i for i, s in enumerate(slots) if _core_start(s) < stop and start < s.stop]
            if len(within) > 1 and len({slots[i].feature for i in within}) > 1:
                found.append(within)
        return found

    def explain(self, slot: Slot) -> Match:
        """The candidates for a feature, each with its probability.

        ``constant`` says that the text before determines it: at least 95 % of all draws are its own
        text.
        """
        found = self._candidates(slot)
        return BLANK if found is None else found.match

    def matches(self, inp: HasSlots) -> list[Match]:
        """The candidates of each feature of an input, in reading order."""
        return [self.explain(slot) for slot in inp.slots]

    def __getstate__(self) -> dict[str, Any]:
        # What was found is found again; a model of this process cannot be sent to another.
        return {"n_candidates": self.n_candidates}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ModelBaselines.__init__(self, n_candidates=state["n_candidates"])

    def __repr__(self) -> str:
        return f"ModelBaselines(n_candidates={self.n_candidates})"

    def _phrases(self, text: str) -> list[Span]:
        if text not in self._bound:
            self._bound[text] = self._alternatives(text).phrases()
        return self._bound[text]

    def _alternatives(self, text: str) -> Alternatives:
        if text not in self._read:
            self._read[text] = Alternatives(text, self._asked(), self.n_candidates)
        return self._read[text]

    def _candidates(self, slot: Slot) -> Candidates | None:
        """What may stand in a place; None for white space, which stays."""
        if slot not in self._known:
            place = place_of(slot)
            self._known[slot] = None if place is None else self._find(slot, place)
        return self._known[slot]

    def _find(self, slot: Slot, place: Place) -> Candidates:
        start = slot.start + len(place.head)
        alternatives = self._alternatives(slot.context)
        listed = alternatives.at(start, words.kind(place.atoms[0]))
        if not listed:
            return _weighed({place.core: 1.0}, place)
        left, pieces = slot.context[:start], [piece for piece, _ in listed]
        n_words = len([atom for atom in place.atoms if not words.is_mark(atom)])
        texts = alternatives.whole(start) if n_words < 2 else self._written(left, pieces, place)
        probabilities = [math.exp(log_prob) for _, log_prob in listed]
        own = probabilities[0]
        if pieces[0] != place.core:  # what begins as the feature does may go on otherwise
            own = min(own, float(self._asked().log_probs_after([left], place.core).exp()))
        weights = {place.core: own}
        probabilities[0] -= own
        for text, probability in zip(texts, probabilities, strict=True):
            weights[text] = weights.get(text, 0.0) + probability
        return _weighed(weights, place)

    def _written(self, left: str, pieces: Sequence[str], place: Place) -> list[str]:
        """The likeliest texts of several words that begin with the pieces, to the feature's end."""
        n_words = len([atom for atom in place.atoms if not words.is_mark(atom)])
        n_tokens = _TOKENS_PER_WORD * (n_words + _MORE_WORDS)
        written = self._asked().greedy([left + piece for piece in pieces], n_tokens)
        after = next(iter(place.right), None)
        return [
            _cut(piece + rest, n_words, after) for piece, rest in zip(pieces, written, strict=True)
        ]

    def _asked(self) -> LanguageModel:
        if self._model is None:
            raise ValueError(
                "`ModelBaselines` asks the model under explanation: use it in an input of "
                "`GenerationAttribution`, or bind a model by `with_model`."
            )
        return self._model


def _core_start(slot: Slot) -> int:
    return slot.stop - len(slot.text.lstrip())


def _cut(text: str, n_words: int, after: str | None) -> str:
    """A text up to what comes after the feature, or punctuation; or else as many words."""
    atoms = words.atoms(text)
    stops = [atoms[0].stop]
    for atom in atoms[1 : n_words + _MORE_WORDS + 1]:
        if atom.text == after or words.is_mark(atom.text):
            return text[: stops[-1]]
        stops.append(atom.stop)
    return text[: stops[min(n_words, len(stops)) - 1]]


def _weighed(weights: dict[str, float], place: Place) -> Candidates:
    if not any(weights.values()):  # it stands where the model has nothing to say
        weights = {place.core: 1.0}
    total = sum(weights.values())
    shares = {text: weight / total for text, weight in weights.items() if weight > 0}
    likely = sorted(shares, key=lambda text: -shares[text])
    others = [text for text in likely if text != place.core]
    match = Match(
        level="model",
        surroundings="what comes before",
        n_occurrences=0,
        n_candidates=len(others),
        constant=shares.get(place.core, 0.0) >= _SURE,
        examples=tuple(f"{text} ({shares[text]:.2f})" for text in likely[:10]),
    )
    return Candidates.of(match, {(text,): share for text, share in shares.items()})
