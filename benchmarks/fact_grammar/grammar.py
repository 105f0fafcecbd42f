"""An invented English of short biographies in which every generated word has known causes.

The facts of a biography (name, city, state, occupation, and age and pet, which matter to nothing)
are drawn independently of one another. The words that follow depend on them by table:

* the pronoun on the name,
* interest A on the occupation: one of three, at random, no two occupations sharing any,
* interest B on the city,
* interest C on occupation and state together: either alone says nothing about it,
* the closing words D on interest A as written, and on nothing else.

Everything between these slots depends on nothing.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from .vocabularies import BIOGRAPHIES, Words

T = TypeVar("T")
Part = Literal["prompt", "continuation"]
Cut = Literal["slot", "word", "mark"]

VARIED_PRESENCE = {"name": 1.0, "home": 0.85, "job": 0.85, "age": 0.5, "pet": 0.5}

_WORDS_AND_MARKS = r"\s*[^\s.,()]+|\s*[.,()]+"
_CAUSES = {
    "pronoun": ("name",),
    "A": ("occupation",),
    "B": ("city",),
    "C": ("occupation", "state"),
    "D": ("A",),
}


@dataclass(frozen=True)
class Slot:
    """A fact at its position in a document.

    Attributes:
        name: Which fact: ``"city"``, ``"A"``...
        start: Its first character in the document's text.
        stop: One past its last character.
        text: The words in it.
        alternatives: All that can stand in this slot, ``text`` included.
    """

    name: str
    start: int
    stop: int
    text: str
    alternatives: tuple[str, ...]


@dataclass(frozen=True)
class Segment:
    """A span of a document: a slot, a word of one, or a connecting word.

    Attributes:
        start: Its first character in the document's text: the leading space, if it has one.
        stop: One past its last character, trailing punctuation included.
        slot: The slot that it is, or is a word of; `None` for a connecting word.
        replacements: What else can stand there, spaced and punctuated alike; for a connecting word,
            the word itself, since nothing else ever stands in its place.
    """

    start: int
    stop: int
    slot: str | None
    replacements: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A biography, split into the prompt and the continuation.

    Attributes:
        text: All of it, without special tokens.
        cut: Number of characters in the prompt. The space before the first generated word belongs
            to the continuation, as it belongs to that word's token.
        slots: The facts in the order in which they stand, generated ones included.
        causes: For each slot of the continuation, the slots of this document that determine it, in
            the prompt or earlier in the continuation. Empty where a fact it depends on is missing.
        information: ``-log P(text)`` under the grammar, in nats; NaN for an edited document.
    """

    text: str
    cut: int
    slots: list[Slot]
    causes: dict[str, tuple[str, ...]]
    information: float

    @property
    def prompt(self) -> str:
        """The text given to the model."""
        return self.text[: self.cut]

    @property
    def continuation(self) -> str:
        """The text to be generated, up to the end of the biography."""
        return self.text[self.cut :]

    def slot(self, name: str) -> Slot:
        """The slot of this name.

        Raises:
            KeyError: If the document does not have it.
        """
        for slot in self.slots:
            if slot.name == name:
                return slot
        raise KeyError(f"No slot {name!r} here, only {[slot.name for slot in self.slots]}.")

    def segments(self, part: Part = "prompt", unit: Cut = "slot") -> list[Segment]:
        """Spans that tile the prompt or the continuation, one to a slot or connecting word.

        With the unit ``"word"`` a slot of several words has as many. With ``"mark"`` punctuation
        beside a word belongs to none: it is a connecting word.
        """
        start, stop = (0, self.cut) if part == "prompt" else (self.cut, len(self.text))
        pattern = _WORDS_AND_MARKS if unit == "mark" else r"\s*\S+"
        words = (match.span() for match in re.finditer(pattern, self.text))
        words = [span for span in words if start <= span[0] and span[1] <= stop]
        if unit == "word":
            return [self._segment([span], self._slot_in(*span) or span) for span in words]
        groups = itertools.groupby(words, key=lambda span: self._slot_in(*span) or span)
        return [self._segment(list(group), owner) for owner, group in groups]

    def edited(self, name: str, text: str) -> Document:
        """The same document with another value in one slot.

        What depends on the slot is not adjusted: the result need not be of the language.
        """
        at = self.slot(name)
        more = len(text) - len(at.text)
        slots = [
            replace(
                slot,
                start=slot.start + more * (slot.start > at.start),
                stop=slot.stop + more * (slot.start >= at.start),
                text=text if slot == at else slot.text,
            )
            for slot in self.slots
        ]
        return Document(
            self.text[: at.start] + text + self.text[at.stop :],
            self.cut + more * (at.start < self.cut),
            slots,
            self.causes,
            math.nan,
        )

    def _slot_in(self, start: int, stop: int) -> Slot | None:
        return next((s for s in self.slots if s.start < stop and start < s.stop), None)

    def _segment(self, words: list[tuple[int, int]], owner: Slot | tuple[int, int]) -> Segment:
        start, stop = words[0][0], words[-1][1]
        if not isinstance(owner, Slot):
            return Segment(start, stop, None, (self.text[start:stop],))
        begin, end = max(start, owner.start), min(stop, owner.stop)
        before, after = self.text[start:begin], self.text[end:stop]
        place = len(self.text[owner.start : begin].split()), len(self.text[begin:end].split())
        parts = (_part(other, *place, len(owner.text.split())) for other in owner.alternatives)
        others = (before + part + after for part in parts if part != self.text[begin:end])
        return Segment(start, stop, owner.name, tuple(others))


def _part(text: str, first: int, n: int, n_all: int) -> str:
    """The words of a replacement that correspond to `n` words from `first` of an original of
    `n_all`."""
    words = text.split()
    start = first * len(words) // n_all
    return " ".join(words[start : max(-(-(first + n) * len(words) // n_all), start + 1)])


class _Draws:
    """A random source that sums the information of its draws, in nats."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.nats = 0.0

    def pick(self, options: Sequence[T]) -> T:
        self.nats += math.log(len(options))
        return self.rng.choice(options)

    def happens(self, probability: float) -> bool:
        yes = self.rng.random() < probability
        self.nats -= math.log(probability if yes else 1 - probability)
        return yes

    def shuffle(self, items: Iterable[T]) -> list[T]:
        mixed = list(items)
        self.rng.shuffle(mixed)
        self.nats += math.lgamma(len(mixed) + 1)
        return mixed


class Grammar:
    """The language.

    Args:
        varied: Sentences in any order, two wordings for each, facts sometimes missing. A word that
            depends on a missing fact is drawn from all that can stand in its slot. If `False`, one
            order and one wording, with age and pet present half of the time.
        words: Its vocabulary and sentences.
    """

    def __init__(self, varied: bool = False, words: Words = BIOGRAPHIES):
        self.varied = varied
        self.words = words
        self._generated = words.varied_generated if varied else words.generated
        own = words.pronouns
        pronouns = tuple(own) if varied else tuple(word.capitalize() for word in own)
        self._pronoun_of = {
            name: pronoun
            for pronoun, names in zip(pronouns, own.values(), strict=True)
            for name in names
        }
        self.alternatives: dict[str, tuple[str, ...]] = {
            "name": words.names,
            "age": words.ages,
            "city": tuple(words.cities),
            "state": words.states,
            "pet": words.pets,
            "occupation": tuple(words.occupations),
            "pronoun": pronouns,
            "A": words.interests,
            "B": tuple(words.cities.values()),
            "C": words.shared,
            "D": words.endings,
        }

    def sample(
        self,
        rng: random.Random,
        before: Literal["pronoun", "A"] = "A",
        *,
        stray: float = 0.0,
    ) -> Document:
        """Draw a biography.

        Args:
            rng: Where every draw comes from.
            before: The slot before which the prompt ends: the first word to generate.
            stray: How often A is any interest at all instead of one that the occupation allows. It
                shows a learner what follows an interest under every occupation, which is what it is
                asked when one of the two is replaced.

        Raises:
            ValueError: If `before` is another slot or `stray` is no probability.
        """
        if before not in ("pronoun", "A"):
            raise ValueError(f"`before` is {before!r}: the prompt ends before 'pronoun' or 'A'.")
        if not 0 <= stray < 1:
            raise ValueError(f"`stray` is {stray}: give a probability below 1.")
        draws = _Draws(rng)
        template = self._template(draws)
        facts = {
            name: draws.pick(self.alternatives[name])
            for name in _slot_names(template)
            if name not in _CAUSES
        }
        self._draw_rest(facts, draws, stray)
        return self._document(template, facts, before, draws.nats)

    def allowed(self, name: str, facts: Mapping[str, str]) -> tuple[str, ...]:
        """The words that the grammar allows in a generated slot, all equally likely.

        Args:
            name: ``"pronoun"``, ``"A"``, ``"B"``, ``"C"`` or ``"D"``.
            facts: The words in the other slots, by slot name. If one on which this slot depends is
                missing, everything that can stand in the slot is allowed.
        """
        if any(cause not in facts for cause in _CAUSES[name]):
            return self.alternatives[name]
        if name == "A":
            return self.words.occupations[facts["occupation"]]
        if name == "C":
            jobs, states, shared = (
                self.alternatives[name] for name in ("occupation", "state", "C")
            )
            # Nine occupations by nine states, three classes of each: their sum modulo three is
            # uniform given either one, so C has no marginal signal.
            turn = jobs.index(facts["occupation"]) + states.index(facts["state"])
            return (shared[turn % len(shared)],)
        if name == "D":
            return (self.words.ending_of(facts["A"]),)
        table = self._pronoun_of if name == "pronoun" else self.words.cities
        return (table[facts[_CAUSES[name][0]]],)

    def permits(self, document: Document, continuation: str) -> bool:
        """Whether the grammar can continue the document's prompt by this text to the end."""
        given = {slot.name: slot.text for slot in document.slots if slot.start < document.cut}
        for template in itertools.product(*self._generated):
            match = re.search(self._pattern(template), document.prompt + continuation)
            # It has to begin where the prompt left off, not after something else.
            if match is not None and match.start() <= document.cut + 1:
                facts = given | match.groupdict()
                return all(facts[name] in self.allowed(name, facts) for name in _CAUSES)
        return False

    def _pattern(self, template: Iterable[str]) -> str:
        """A regular expression for these sentences at the end of a text, each slot a group."""
        pattern = ""
        for words, name, _, _ in string.Formatter().parse(" ".join(template)):
            options = "|".join(self.alternatives[name]) if name else ""
            pattern += re.escape(words) + (f"(?P<{name}>{options})" if name else "")
        return pattern + r"\Z"

    def _template(self, draws: _Draws) -> str:
        if self.varied:
            shown = [fact for fact, often in VARIED_PRESENCE.items() if draws.happens(often)]
            sentences = [draws.pick(self.words.varied_facts[fact]) for fact in draws.shuffle(shown)]
        else:
            age = self.words.age if draws.happens(0.5) else ""
            pet = self.words.pet if draws.happens(0.5) else ""
            sentences = [self.words.facts.replace("{age?}", age).replace("{pet?}", pet)]
        return " ".join([*sentences, *(draws.pick(wordings) for wordings in self._generated)])

    def _draw_rest(self, facts: dict[str, str], draws: _Draws, stray: float) -> None:
        for name in _CAUSES:
            options = self.allowed(name, facts)
            if name != "A":
                facts[name] = draws.pick(options)
                continue
            strays = draws.rng.random() < stray
            facts[name] = draws.rng.choice(self.alternatives["A"] if strays else options)
            likely = (1 - stray) / len(options) if facts[name] in options else 0.0
            draws.nats -= math.log(likely + stray / len(self.alternatives["A"]))

    def _document(
        self, template: str, facts: Mapping[str, str], before: str, nats: float
    ) -> Document:
        text = ""
        slots: list[Slot] = []
        for words, name, _, _ in string.Formatter().parse(template):
            text += words
            if name is not None:
                fact = facts[name]
                slots.append(
                    Slot(name, len(text), len(text) + len(fact), fact, self.alternatives[name])
                )
                text += fact
        cut = next(slot.start for slot in slots if slot.name == before) - 1
        causes = {
            slot.name: _CAUSES[slot.name] if set(_CAUSES[slot.name]) <= set(facts) else ()
            for slot in slots
            if slot.start > cut
        }
        return Document(text, cut, slots, causes, nats)


def _slot_names(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
