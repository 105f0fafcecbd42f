"""Absent features drawn from a language model's own distribution, without corpus or lists."""

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product, takewhile
from typing import Any

import torch

from captum_llm_ext.text.baselines import words
from captum_llm_ext.text.baselines.candidates import BLANK, MOST_TEXTS, Candidates, Match
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

_CANDIDATES = 4  # 4, 6, 8 and 12 name equally many causes on real prompts
_TOLD = 10
# Number of places before an answer that are conditioned on its kinds of words. Those further away
# hardly affect these, and cost most: on 42 real prompts the last 8 to 64 name the same causes, and
# the last 5 fewer.
_REACH = 8
_STEM = 3  # least letters of a word with endings; chosen, not measured
_LEFT_BEHIND = "left behind"  # placeholder of a proposer that was not copied
_NO_OTHER = "its place, where no other text of its kind is likely"


class ModelBaselines:
    """Replaces absent features by draws from a language model's own conditional distribution.

    An absent feature is one that is unknown. So it is drawn from the model's distribution given the
    text before it, *with the feature's own text among the candidates*. A word that this text
    determines ("in", "is", "the") hardly ever changes and gets no attribution; a name that nothing
    determines nearly always changes. This is removal by the conditional distribution (Covert,
    Lundberg & Lee, JMLR 2021, section 4.2; Aas, Jullum & Løland 2021), given the left context, as a
    causal model defines it. Candidates have the same kind (a capitalised word, a number, …) and
    script as the original, and keep its white space and punctuation.

    *Words after a place* restrict the kind of word: of the 16 likeliest words after "was", few
    continue with ", so", as "hungry" does. So the weight of a candidate is its probability given
    the text before, times the likelihood of the next two words relative to the original's, capped
    at 1; the `n_candidates` of largest weight are kept. A name, a number, the end of a sentence or
    a word determined by the place ends these two: they would identify the word itself, and words
    that determine one another could never be absent. For the same reason, if the words after leave
    no alternative ("master of *arts*"), the text before alone determines how probable the original
    is, and the words after only which others replace it. A masked model conditions on all of the
    text after a place anyway.

    *The answer* conditions draws only by the kinds of its words, not by the words: a candidate's
    weight is also multiplied by the probability that words of these kinds come next (for each of
    the first 8 tokens, the generated token or one of the 128 likeliest that are written alike).
    Among the last 5 tokens of the prompt, it is also multiplied by the likelihood of what follows
    the answer's first word after other words of its kind, the likeliest ones given the candidate:
    "she left because" and "she left for" both continue with a word, but "he" continues with "was",
    and "work" does not. So words that only determine the grammar of the answer get no attribution,
    words that decide between alternatives do.

    This applies to the 8 words and phrases before the answer: those further away hardly affect its
    kinds. It does not apply to features of many words and generated text (what follows it was
    generated because of it).

    *Copied words*: a word that answer and prompt share, with whatever ending, is drawn in no other
    place. For "milk and cheese, but forgot the", the draw "milk and eggs, but forgot the" would
    change the answer "eggs" by mentioning eggs, not by the absence of cheese.

    *Labels* of solved examples are drawn from these labels, if one of them recurs: other words
    ("apple -> orange") would remove the task, not the label. The examples are lines in which a cue
    ("->", "Sentiment:") precedes the label; another line ends with the cue.

    *Phrases*: words that determine one another are absent together. A word is bound to the one
    before it if it is more likely than not after that, and unlikely after others ("Lake" after
    "Salt"); if any word of such a phrase is absent, the whole phrase is drawn. Words that are
    likely anywhere in the text ("of" after "proud") end no phrase. A feature of many words (a
    sentence, a passage, an example, a turn) is drawn word by word and phrase by phrase, so it keeps
    its form and loses its content; a repeated word or phrase is drawn once.

    Features that are absent together are each drawn given the *original* text before them, whether
    present or not, with one exception: neighbours of which one determines the other (a state after
    its city) are drawn as one text, left to right, if both are absent.

    *Cost*: candidates beyond 95 % of the probability mass are not tried, nor any if the original
    has that much, nor those that could not be among the likeliest whatever follows. The search
    takes one forward pass over the text for the candidates of all places, and a few batched ones:
    some tokens per candidate, and for the last places also the text up to the answer. It is done
    once per text and answer.

    *Behind an API* candidates are the likeliest tokens that the provider reports; how much of the
    probability they cover is in ``provenance["search"]``. If it takes ids and reports them for
    prompts (vLLM), one request tells all places, and a further one completes a candidate or scores
    a trial; kinds of the answer's words are recognised among the reported tokens. If it reports
    those of next tokens only, each place takes one or more requests, and the answer conditions
    draws only by copied words. The search then stays below `RemoteGenerationAttribution.estimate`,
    which names it (`n_search`).

    Args:
        proposer: The proposing model, if not the explained one: ``(model, tokenizer)``, causal or
            masked, with any tokenizer; a transformers pipeline; or a model with the explained
            model's tokenizer. A masked one conditions on both sides of a place, except for the next
            word.
        n_candidates: Number of candidates per place, besides the original.

    Raises:
        ValueError: If `n_candidates` is below 1; on use, if there is no model, a masked model's
            tokenizer has no mask token, or an API reports no likeliest tokens.
        TypeError: On use, if the proposer is not a causal or masked language model.
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
        """One replacement for the feature, including its white space and punctuation."""
        filling = self._filling(slot)
        return slot.text if filling is None else filling.draw(generator)

    @property
    def has_proposer(self) -> bool:
        """Whether another model than the explained one proposes texts."""
        return self._proposer is not None

    def with_model(self, model: LanguageModel) -> "ModelBaselines":
        """A copy with a model, if it has no proposer."""
        if self._proposer is _LEFT_BEHIND:
            raise ValueError(
                "these `ModelBaselines` used a model of their own, which is not copied: construct "
                "them again, with the `proposer`."
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
        """Proposes texts for all places at once (see `KnowsPhrases`)."""
        if not slots:
            return Bonds()
        context = slots[0].context
        alternatives = self._alternatives(context, (slots[0].start, slots[-1].stop))
        # A word of several features is a phrase, too.
        parts = alternatives.parts(0, len(context), ties=False)
        if slots[0].generated:
            alternatives.read(parts)
        else:
            alternatives.fit(parts)
        ties = [(one[0], other[1]) for one, other in alternatives.ties]
        bonds = Bonds(*([*_runs(slots, spans)] for spans in (parts, ties)))
        if self._fit is not None:
            self._weight_by_answer(self._fit, slots, bonds)
        return bonds

    def explain(self, slot: Slot) -> Match:
        """The candidates for a feature, each with its probability.

        ``constant`` means that the text before determines it: at least 95 % of draws are the
        original.
        """
        filling = self._filling(slot)
        return BLANK if filling is None else filling.match

    def distribution(self, slot: Slot) -> dict[str, float]:
        """See `KnowsDistribution`."""
        filling = self._filling(slot)
        return {} if filling is None else filling.distribution()

    def matches(self, inp: HasSlots) -> list[Match]:
        """The candidates of each feature of an input, in reading order, or those of its phrase."""
        slots = inp.slots
        phrase_of = {i: run for run in bonds_of(self, slots).phrases for i in run}
        together = ([slots[i] for i in phrase_of.get(i, (i,))] for i in range(len(slots)))
        return [self.explain(joined(run)) for run in together]

    def __getstate__(self) -> dict[str, Any]:
        # Caches are recomputed; a local model cannot be sent to another process.
        return {"n_candidates": self.n_candidates, "has_proposer": self._proposer is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        proposer = _LEFT_BEHIND if state["has_proposer"] else None
        ModelBaselines.__init__(self, proposer, n_candidates=state["n_candidates"])

    def __repr__(self) -> str:
        return f"ModelBaselines(n_candidates={self.n_candidates})"

    def _alternatives(self, text: str, within: Span) -> Alternatives:
        """The alternatives of a text, or of a part of it that contains these characters."""
        known = self._read.setdefault(text, [])
        for (start, stop), alternatives in known:
            if start <= within[0] and within[1] <= stop:
                return alternatives
        found = Alternatives(text, self._required_proposer(), self.n_candidates, within)
        known.append((within, found))
        return found

    def _filling(self, slot: Slot) -> "_Filling | None":
        """The candidates of a slot; None for white space, which remains."""
        if slot not in self._known:
            place = surroundings_of(slot)
            self._known[slot] = None if place is None else self._find(_first_of(slot), place)
        return self._known[slot]

    def _find(self, slot: Slot, place: Surroundings) -> "_Filling":
        start, stop = _core(slot)
        alternatives = self._alternatives(slot.context, (start, stop))
        parts = alternatives.parts(start, stop) or [(start, stop)]
        alternatives.read(parts)
        # Each of several words is followed by the others, which are absent as well.
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
            present = _words_of(text) if self._answer else frozenset[str]()
            answered = sorted(_words_of(self._answer))
            self._copied[text] = [word for word in answered if _has_form_of(word, present)]
        return self._copied[text]

    def _weight_by_answer(self, fit: AnswerFit, slots: Sequence[Slot], bonds: Bonds) -> None:
        """Weights candidates of the last places by the probability of the answer's kinds.

        For features of many words, the effect of the whole is unknown.
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
        """A text in a slot, and in those of its feature with the same text."""
        core = _core_text(slot)
        places = [s for s in slot.siblings if _core_text(s) == core] or [slot]
        fillings = {place: self._filling(place) for place in places}
        return {place: found.place.filled(text) for place, found in fillings.items() if found}

    def _required_proposer(self) -> Proposer:
        if self._model is None:
            raise ValueError(
                "`ModelBaselines` asks the model under explanation: use it in an input of "
                "`GenerationAttribution`, or bind a model by `with_model`."
            )
        return self._model


@dataclass(frozen=True)
class _Filling:
    """The candidates of a slot, part by part.

    Attributes:
        place: The place.
        parts: Candidates for the words and phrases in it.
        between: Text before, between and after these.
        same_as: Per part the first one with the same text, whose draw it shares.
    """

    place: Surroundings
    parts: list[Candidates]
    between: list[str]
    same_as: list[int]

    @property
    def texts(self) -> list[str]:
        """The candidates, if the slot is one word or phrase; otherwise empty."""
        if len(self.parts) != 1:
            return []
        return [self._assembled([text]) for (text,) in self.parts[0].choices]

    @property
    def n_texts(self) -> int:
        """Number of `texts`."""
        return len(self.parts[0].choices) if len(self.parts) == 1 else 0

    def weighted(self, gains: Sequence[float]) -> "_Filling":
        """A copy with `texts` reweighted by log-factors in nats."""
        weights = self.parts[0].weights()
        gained = {
            text: weight * math.exp(gain)
            for (text, weight), gain in zip(weights.items(), gains, strict=True)
        }
        return replace(self, parts=[Candidates.of(self.parts[0].match, gained, (self.place.core,))])

    def draw(self, generator: torch.Generator) -> str:
        """One text, with the white space and punctuation of the slot."""
        drawn: list[str] = []
        for number, candidates in enumerate(self.parts):
            first = self.same_as[number]
            if first < number:
                drawn.append(drawn[first])
            else:
                drawn.append(candidates.draw(part_of(generator, number))[0])
        return self.place.filled(self._assembled(drawn))

    def distribution(self) -> dict[str, float]:
        """All texts with their probabilities; empty if there are too many."""
        own = [number for number, first in enumerate(self.same_as) if first == number]
        if math.prod(len(self.parts[number].choices) for number in own) > MOST_TEXTS:
            return {}
        found: dict[str, float] = {}
        every = [self.parts[number].probabilities().items() for number in own]
        for chosen in product(*every):
            drawn = dict(zip(own, (text for (text,), _ in chosen), strict=True))
            text = self._assembled([drawn[first] for first in self.same_as])
            share = math.prod(share for _, share in chosen)
            filled = self.place.filled(text)
            found[filled] = found.get(filled, 0.0) + share
        return found

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
        listed = tuple((self._assembled(texts), share) for share, texts in likely)
        others = tuple(text for text, _ in listed if text != self.place.core)
        n = math.prod(len(self.parts[number].choices) for number in {*self.same_as}) - 1
        return Match(
            level="model",
            surroundings="what comes before" if n else _NO_OTHER,
            n_occurrences=0,
            n_candidates=n,
            constant=own >= ENOUGH,
            examples=others,
            candidates=listed,
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
    """Texts with probabilities, the original first, which remains if there is no other."""
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
    """The first slot of the feature with the same text: a repeated name is drawn once."""
    core = _core_text(slot)
    return next((s for s in slot.siblings if _core_text(s) == core), slot)


def _core_text(slot: Slot) -> str:
    """The text of a slot, without white space and punctuation at its ends."""
    return slot.context[slice(*_core(slot))]


def _core(slot: Slot) -> Span:
    """A slot without white space and punctuation at its ends; a word fragment unchanged."""
    place = surroundings_of(slot)
    if place is None:
        return slot.start, slot.stop
    start = slot.start + len(place.head) - round(place.part[0] * len(place.core))
    return start, start + len(place.core)


def _within(slots: Sequence[Slot], span: Span) -> list[int]:
    """The slots that overlap a span in more than white space."""
    first = bisect_right(slots, span[0], key=lambda slot: slot.stop)
    inside = takewhile(lambda i: slots[i].start < span[1], range(first, len(slots)))
    return [i for i in inside if slots[i].stop - len(slots[i].text.lstrip()) < span[1]]


def _runs(slots: Sequence[Slot], spans: Sequence[Span]) -> Iterator[list[int]]:
    """Slots of spans that cover several features without fixed text."""
    for span in spans:
        run = _within(slots, span)
        is_whole = all(slots[i].stop == slots[i + 1].start for i in run[:-1])
        if is_whole and len({slots[i].feature for i in run}) > 1:
            yield run
