"""Absent features drawn anew from a language model's own distribution: no corpus, no lists."""

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any

import torch

from captum_llm_ext.text.baselines import words
from captum_llm_ext.text.baselines.candidates import BLANK, Candidates, Match
from captum_llm_ext.text.baselines.corpus.baselines import HasSlots
from captum_llm_ext.text.baselines.draws import part_of
from captum_llm_ext.text.baselines.model.alternatives import ENOUGH, Alternatives, Span
from captum_llm_ext.text.baselines.slot import (
    AnswerFit,
    Bonds,
    LanguageModel,
    Proposer,
    Slot,
    bonds_of,
    joined,
)
from captum_llm_ext.text.baselines.surroundings import Surroundings, surroundings_of

_CANDIDATES = 4  # more changed nothing: 4, 6, 8 and 12 name as many causes on real prompts
_TOLD = 10
# Places before an answer that are drawn given its kinds of words. Those far before it hardly decide
# these, and cost most to ask about: on 42 real prompts the last 8 to 64 name the same causes, and
# the last 5 fewer.
_REACH = 12
_STEM = 3  # letters of a word that has endings: a guess
_LEFT_BEHIND = "left behind"  # in place of a proposer that was not copied
_NO_OTHER = "its place, where no other text of its kind is likely"


class ModelBaselines:
    """What a language model would have written where a feature is absent; it needs nothing else.

    An absent feature is one that is not known. So it is drawn anew from the model's own
    distribution of what may come after the text before it, *the feature's own text among the
    candidates*. What that text determines ("in", "is", "the") is then hardly ever another word,
    and is not blamed; a name that nothing determines is nearly always another one. This is removal
    by the conditional distribution (Covert, Lundberg & Lee, JMLR 2021, section 4.2; Aas, Jullum &
    Løland 2021), given what comes before, as a causal model has it. Candidates are of the kind of
    what they stand for (a capitalised word, a number, …) and of its script, and carry its white
    space and punctuation.

    The words after a place tell *what sort of word* stands there: of the 16 likeliest words after
    "was" few go on with ", so", as "hungry" does. So a word or phrase is another one as likely as
    the text before makes that, times how likely it makes the next two words, set against what
    stands there and at most 1; of these the `n_candidates` likeliest are kept. A name, a number,
    the end of a sentence and what the place itself decides end these two: they tell which word it
    is, and words that determine one another would none of them be absent. For the same reason the
    text before is all where the words after leave no other one ("master of *arts*"). A masked model
    goes by all of the text after a place anyhow.

    What comes after is the answer, of which the draw knows *what kinds of words* it begins with,
    and not which: a candidate is as likely as the text before makes it, times how likely it makes a
    word of that kind next (the token that was written or one of the 128 likeliest that are written
    alike, for each of the first 8 tokens). Where it is among the last 5 tokens, also times how
    likely what follows the answer's first word is after other words of the kind, those that the
    text with the candidate in place makes likeliest: "she left because" and "she left for" both go
    on with a word, but "he" goes on with "was", and "work" does not. What grammar determines is not
    blamed, what decides between words that do the same there is.

    What the answer copies is said where it stands alone: a word that both have, with whatever
    ending, is drawn in no other place. "milk and eggs, but forgot the" for "milk and cheese, but
    forgot the" would tell another answer by what it says of the *eggs*, not by being silent on the
    cheese; and so would one name for another.

    So weighed are words and phrases, the 12 before the answer: what stands further from it hardly
    decides its kinds. Not weighed so are features of many words, generated text (what follows it
    was written because of it), and prompts of models behind an API.

    Words that determine one another are absent together: a word is bound to the one before it if it
    is more likely than not after that, and hardly after others ("Lake" after "Salt"), and whichever
    word of such a phrase is absent, the phrase is drawn anew as a whole. Words that are likely
    anywhere in the text ("of" after "proud") end no phrase. A feature of many words (a
    sentence, a passage, an example, a turn) is drawn word by word and phrase by phrase, so that it
    keeps its form and loses what it says; a word or phrase that it says twice is drawn once.

    Features that are absent at once are each drawn given the *original* text before them, whether
    that is present or not, with one exception: neighbours of which one decides the other (a state
    after its city) are drawn as one text, left to right, where both are absent.

    Few words are tried where the model is sure: none beyond 95 % of what may stand in a place,
    none where the place's own word has as much, and none that would not be among the likeliest
    whatever came after it. The search takes one pass over the text for the candidates of all
    places, and a few more that each ask about all places at once: some tokens for every word that
    is tried, and for the last places what comes after it, up to the answer. It is done once for a
    text and an answer.

    Args:
        proposer: The model that is asked, if it is not the one under explanation: ``(model,
            tokenizer)``, causal or masked, with any tokenizer; a pipeline of transformers; or a
            model with the tokenizer of the one under explanation. A masked one goes by the text on
            both sides of a place, the next word excepted.
        n_candidates: Texts that may be drawn in every place, beside the one that stands there.

    Raises:
        ValueError: If `n_candidates` is below 1; on use, if there is no model to ask, or a masked
            model's tokenizer has no mask.
        TypeError: On use, if the proposer is no causal or masked language model.
    """

    deterministic = False

    def __init__(self, proposer: Any = None, *, n_candidates: int = _CANDIDATES) -> None:
        if n_candidates < 1:
            raise ValueError(f"`n_candidates` is {n_candidates}: give at least 1.")
        self._proposer = proposer
        self._model: Proposer | None = proposer if isinstance(proposer, Proposer) else None
        self.n_candidates = n_candidates
        self._fit: AnswerFit | None = None
        self._answer = ""
        self._copied: dict[str, list[str]] = {}
        self._known: dict[Slot, _Filling | None] = {}
        self._weighed: set[Slot] = set()
        self._read: dict[str, list[tuple[Span, Alternatives]]] = {}

    def __call__(self, slot: Slot, generator: torch.Generator) -> str:
        """One replacement for the feature, its white space and punctuation included."""
        filling = self._filling(slot)
        return slot.text if filling is None else filling.draw(generator)

    def with_model(self, model: LanguageModel) -> "ModelBaselines":
        """The same with a model to ask, if it has none of its own."""
        if self._proposer is _LEFT_BEHIND:
            raise ValueError(
                "these `ModelBaselines` asked a model of their own, which stayed where they were "
                "copied from: make them anew, with the `proposer`."
            )
        if self._model is not None and self._proposer is not None:
            return self
        other = ModelBaselines(self._proposer, n_candidates=self.n_candidates)
        other._model = model if self._proposer is None else model.proposing(self._proposer)
        return other

    def with_answer(self, fit: AnswerFit, text: str) -> "ModelBaselines":
        """See `UsesAnswer`."""
        other = ModelBaselines(self._proposer, n_candidates=self.n_candidates)
        other._model, other._read, other._fit = self._model, self._read, fit
        other._answer = text
        return other

    def read(self, slots: Sequence[Slot]) -> Bonds:
        """Asks the model for all places at once (see `KnowsPhrases`)."""
        if not slots:
            return Bonds()
        context = slots[0].context
        alternatives = self._alternatives(context, (slots[0].start, slots[-1].stop))
        # A word that is several features is one thing, too.
        parts = alternatives.parts(0, len(context), ties=False)
        if slots[0].generated:
            alternatives.read(parts)
        else:
            alternatives.fit(parts)
        ties = [(one[0], other[1]) for one, other in alternatives.ties]
        bonds = Bonds(*([*_runs(slots, spans)] for spans in (parts, ties)))
        if self._fit is not None:
            self._heed(self._fit, slots, bonds)
        return bonds

    def explain(self, slot: Slot) -> Match:
        """The candidates for a feature, each with its probability.

        ``constant`` says that the text before determines it: at least 95 % of all draws are its own
        text.
        """
        filling = self._filling(slot)
        return BLANK if filling is None else filling.match

    def matches(self, inp: HasSlots) -> list[Match]:
        """The candidates of each feature of an input, in reading order; of a phrase the whole."""
        slots = inp.slots
        phrase_of = {i: run for run in bonds_of(self, slots).phrases for i in run}
        together = ([slots[i] for i in phrase_of.get(i, (i,))] for i in range(len(slots)))
        return [self.explain(joined(run)) for run in together]

    def __getstate__(self) -> dict[str, Any]:
        # What was found is found again; a model of this process cannot be sent to another.
        return {"n_candidates": self.n_candidates, "has_proposer": self._proposer is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        proposer = _LEFT_BEHIND if state["has_proposer"] else None
        ModelBaselines.__init__(self, proposer, n_candidates=state["n_candidates"])

    def __repr__(self) -> str:
        return f"ModelBaselines(n_candidates={self.n_candidates})"

    def _alternatives(self, text: str, within: Span) -> Alternatives:
        """Those of a text, or of a part of it that holds these characters."""
        known = self._read.setdefault(text, [])
        for (start, stop), alternatives in known:
            if start <= within[0] and within[1] <= stop:
                return alternatives
        found = Alternatives(text, self._asked(), self.n_candidates, within)
        known.append((within, found))
        return found

    def _filling(self, slot: Slot) -> "_Filling | None":
        """What may stand in a place; None for white space, which stays."""
        if slot not in self._known:
            place = surroundings_of(slot)
            self._known[slot] = None if place is None else self._find(_first_of(slot), place)
        return self._known[slot]

    def _find(self, slot: Slot, place: Surroundings) -> "_Filling":
        start, stop = _core(slot)
        alternatives = self._alternatives(slot.context, (start, stop))
        parts = alternatives.parts(start, stop) or [(start, stop)]
        alternatives.read(parts)
        # Of several words each has the others, which are absent as well, after it.
        goes_on = len(parts) == 1 and not slot.generated
        texts = alternatives.fitting if goes_on else alternatives.texts
        copied = self._copied_from(slot.context)
        found = [_candidates(_without(texts(part), copied)) for part in parts]
        ends = pairwise([(start, start), *parts, (stop, stop)])
        between = [slot.context[one[1] : other[0]] for one, other in ends]
        own = [slot.context[slice(*part)] for part in parts]
        return _Filling(place, found, between, [own.index(text) for text in own])

    def _copied_from(self, text: str) -> list[str]:
        """Words of the answer that a text says."""
        if text not in self._copied:
            said = _words_of(text) if self._answer else frozenset[str]()
            answered = sorted(_words_of(self._answer))
            self._copied[text] = [word for word in answered if _has_form_of(word, said)]
        return self._copied[text]

    def _heed(self, fit: AnswerFit, slots: Sequence[Slot], bonds: Bonds) -> None:
        """Weighs what may stand in the last places by what it makes of the answer's kinds.

        Of features of many words each is one of many, and what the whole makes is not known.
        """
        bound = {i for run in bonds.phrases for i in run}
        runs = [*bonds.phrases, *bonds.ties, *([i] for i in range(len(slots)) if i not in bound)]
        units = [joined([slots[i] for i in run]) for run in runs]
        fillings = {
            unit: filling
            for unit in sorted(units, key=lambda unit: unit.stop)[-_REACH:]
            if unit not in self._weighed
            and (filling := self._filling(unit)) is not None
            and filling.n_texts > 1
        }
        trials: list[dict[Slot, str]] = [{}]
        for unit, filling in fillings.items():
            trials += [self._everywhere(unit, text) for text in filling.texts]
        if not fillings:
            return
        values = iter(fit(trials))
        own = next(values)
        self._weighed.update(fillings)
        for unit, filling in fillings.items():
            gains = [next(values) - own for _ in filling.texts]
            self._known[unit] = filling.weighted([0.0 if math.isnan(g) else g for g in gains])

    def _everywhere(self, slot: Slot, text: str) -> dict[Slot, str]:
        """A text in a place, and in those of its feature that say the same."""
        core = _said(slot)
        places = [s for s in slot.siblings if _said(s) == core] or [slot]
        fillings = {place: self._filling(place) for place in places}
        return {place: found.place.filled(text) for place, found in fillings.items() if found}

    def _asked(self) -> Proposer:
        if self._model is None:
            raise ValueError(
                "`ModelBaselines` asks the model under explanation: use it in an input of "
                "`GenerationAttribution`, or bind a model by `with_model`."
            )
        return self._model


@dataclass(frozen=True)
class _Filling:
    """What may stand in a place, part by part.

    Attributes:
        place: The place.
        parts: Candidates for the words and phrases in it.
        between: What stands before, between and after these.
        same_as: Per part the first one with its text, which is drawn for both.
    """

    place: Surroundings
    parts: list[Candidates]
    between: list[str]
    same_as: list[int]

    @property
    def texts(self) -> list[str]:
        """What may stand there, where that is one word or phrase; none otherwise."""
        if len(self.parts) != 1:
            return []
        return [self._assembled([text]) for (text,) in self.parts[0].choices]

    @property
    def n_texts(self) -> int:
        """How many `texts` there are."""
        return len(self.parts[0].choices) if len(self.parts) == 1 else 0

    def weighted(self, gains: Sequence[float]) -> "_Filling":
        """The same, each of the `texts` more likely by so much, in nats."""
        weights = self.parts[0].weights()
        gained = {
            text: weight * math.exp(gain)
            for (text, weight), gain in zip(weights.items(), gains, strict=True)
        }
        return replace(self, parts=[Candidates.of(self.parts[0].match, gained, (self.place.core,))])

    def draw(self, generator: torch.Generator) -> str:
        """One text, with the white space and punctuation of the place."""
        drawn: list[str] = []
        for number, candidates in enumerate(self.parts):
            first = self.same_as[number]
            if first < number:
                drawn.append(drawn[first])
            else:
                drawn.append(candidates.draw(part_of(generator, number))[0])
        return self.place.filled(self._assembled(drawn))

    @property
    def match(self) -> Match:
        """The likeliest texts with their probabilities."""
        likely: list[tuple[float, tuple[str, ...]]] = [(1.0, ())]
        own = 1.0
        for number, candidates in enumerate(self.parts):
            if (first := self.same_as[number]) < number:
                likely = [(share, (*texts, texts[first])) for share, texts in likely]
                continue
            own *= candidates.match.determined
            longer = [
                (share * weight, (*texts, text))
                for share, texts in likely
                for text, weight in candidates.match.candidates
            ]
            likely = heapq.nlargest(_TOLD, longer, key=lambda choice: choice[0])
        told = tuple((self._assembled(texts), share) for share, texts in likely)
        others = tuple(text for text, _ in told if text != self.place.core)
        n = math.prod(len(self.parts[number].choices) for number in {*self.same_as}) - 1
        return Match(
            level="model",
            surroundings="what comes before" if n else _NO_OTHER,
            n_occurrences=0,
            n_candidates=n,
            constant=own >= ENOUGH,
            examples=others,
            candidates=told,
            determined=own,
        )

    def _assembled(self, texts: Sequence[str]) -> str:
        first, *rest = self.between
        return first + "".join(t + b for t, b in zip(texts, rest, strict=True))


def _words_of(text: str) -> frozenset[str]:
    """The words of a text, in lower case."""
    found = (atom.text for atom in words.atoms(text))
    return frozenset(word.casefold() for word in found if not words.is_mark(word))


def _has_form_of(word: str, others: Iterable[str]) -> bool:
    """Whether one of these is the word, or it with another ending ("egg" and "eggs")."""
    for other in others:
        short, long = sorted((word, other), key=len)
        if word == other or (len(short) >= _STEM and long.startswith(short)):
            return True
    return False


def _without(texts: Mapping[str, float], others: Sequence[str]) -> dict[str, float]:
    """Texts with probabilities, the original first; of the rest those that say no other word."""
    own = _words_of(next(iter(texts)))
    others = [word for word in others if not _has_form_of(word, own)]
    return {
        text: chance
        for text, chance in texts.items()
        if not any(_has_form_of(word, others) for word in _words_of(text) - own)
    }


def _candidates(texts: dict[str, float]) -> Candidates:
    """Texts with probabilities, the original first; where no other is known, it stays."""
    original, *others = texts
    kept, enough = {original: texts[original]}, ENOUGH * sum(texts.values())
    for text in sorted(others, key=texts.__getitem__, reverse=True):
        if sum(kept.values()) >= enough:
            break
        kept[text] = texts[text]
    weights = {(text,): share for text, share in kept.items() if share > 0} or {(original,): 1.0}
    match = Match("model", "what comes before", 0, len(weights) - 1, len(weights) == 1, ())
    return Candidates.of(match, weights, (original,))


def _first_of(slot: Slot) -> Slot:
    """The first place of a slot's feature that says the same: a name is drawn once."""
    core = _said(slot)
    return next((s for s in slot.siblings if _said(s) == core), slot)


def _said(slot: Slot) -> str:
    """The text of a place, without white space and punctuation at its ends."""
    return slot.context[slice(*_core(slot))]


def _core(slot: Slot) -> Span:
    """A place without white space and punctuation at its ends; of a part of a word all of it."""
    place = surroundings_of(slot)
    if place is None:
        return slot.start, slot.stop
    start = slot.start + len(place.head) - round(place.part[0] * len(place.core))
    return start, start + len(place.core)


def _within(slots: Sequence[Slot], span: Span) -> list[int]:
    """The slots that show some of a stretch of text that is not white space."""
    first = bisect_right(slots, span[0], key=lambda slot: slot.stop)
    inside = takewhile(lambda i: slots[i].start < span[1], range(first, len(slots)))
    return [i for i in inside if slots[i].stop - len(slots[i].text.lstrip()) < span[1]]


def _runs(slots: Sequence[Slot], spans: Sequence[Span]) -> Iterator[list[int]]:
    """The slots in stretches of text that show some of several features, and nothing fixed."""
    for span in spans:
        run = _within(slots, span)
        is_whole = all(slots[i].stop == slots[i + 1].start for i in run[:-1])
        if is_whole and len({slots[i].feature for i in run}) > 1:
            yield run
