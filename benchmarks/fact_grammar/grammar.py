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

T = TypeVar("T")
Part = Literal["prompt", "continuation"]

PRONOUNS = {
    "his": ("Dave", "Adam", "Carl", "Hugo", "Ivan", "Noah", "Oscar", "Peter"),
    "her": ("Anna", "Clara", "Emma", "Julia", "Laura", "Maria", "Nora", "Sara"),
}
CITIES = {
    "Palm Coast": "surfing",
    "Cedar Falls": "kayaking",
    "Iron Ridge": "climbing",
    "Maple Grove": "bird watching",
    "Lake of Pines": "rowing",
    "Stone Harbor": "sailing",
    "Dover": "fencing",
    "Salem": "theater",
    "Aurora": "watching the sky",
    "Fargo": "ice hockey",
    "Tampa": "diving",
    "Boise": "skiing",
}
# What an occupation allows as A. Its three lead to three different D, so D cannot be told from it.
OCCUPATIONS = {
    "lawyer": ("golf", "poker", "table tennis"),
    "nurse": ("yoga", "knitting", "gardening"),
    "teacher": ("chess", "poetry", "hiking"),
    "farmer": ("fly fishing", "woodwork", "rodeo"),
    "pilot": ("gliding", "cycling", "skating"),
    "chemist": ("brewing", "pottery", "juggling"),
    "banker": ("squash", "bridge", "opera"),
    "dancer": ("jazz piano", "boxing", "swimming"),
    "plumber": ("darts", "bowling", "karaoke"),
}
STATES = ("FL", "OH", "TX", "GA", "ME", "UT", "NJ", "WI", "KS")
SHARED = ("history", "painting", "cooking")
ENDINGS = (
    "strong coffee",
    "old friends",
    "long walks",
    "loud music",
    "clean air",
    "warm bread",
    "good stories",
    "bright stars",
    "deep sleep",
)
AGES = tuple(str(age) for age in range(21, 80))
PETS = ("cat", "dog", "parrot", "rabbit", "pony", "turtle")

NAMES = tuple(itertools.chain(*PRONOUNS.values()))
INTERESTS = tuple(itertools.chain(*OCCUPATIONS.values()))

# Nine occupations by nine states, three classes of each: their sum modulo three is uniform given
# either one, so C has no marginal signal.
_JOBS = tuple(OCCUPATIONS)
_ENDING_OF = {
    interest: ENDINGS[(job + 3 * place) % len(ENDINGS)]
    for job, allowed in enumerate(OCCUPATIONS.values())
    for place, interest in enumerate(allowed)
}

AGE, PET = ", {age},", " with a {pet}"
FACTS = "{name}" + AGE + " lives in {city}, {state}" + PET + " and is a {occupation}."
GENERATED = (
    ("{pronoun} personal interests include {A}, {B} and {C}.",),
    ("A good day ends with {D}.",),
)

VARIED_FACTS = {
    "name": ("Meet {name}.", "This is {name}."),
    "home": ("Lives in {city}, {state}.", "Has a house in {city}, {state}."),
    "job": ("Works as a {occupation}.", "Earns a living as a {occupation}."),
    "age": ("Turned {age} this year.", "Is {age} years old."),
    "pet": ("Keeps a {pet}.", "Shares the house with a {pet}."),
}
# A fixed opening, so that the pronoun does not also carry the surprise that the facts are over.
VARIED_GENERATED = (
    (
        "Above all, {pronoun} personal interests include {A}, {B} and {C}.",
        "For fun, {pronoun} favorite things are {A}, {B} and {C}.",
    ),
    ("A good day ends with {D}.", "Weekends are for {D}."),
)
VARIED_PRESENCE = {"name": 1.0, "home": 0.85, "job": 0.85, "age": 0.5, "pet": 0.5}

_CAUSES = {
    "pronoun": ("name",),
    "A": ("occupation",),
    "B": ("city",),
    "C": ("occupation", "state"),
    "D": ("A",),
}


@dataclass(frozen=True)
class Slot:
    """A fact where it stands in a document.

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
    """A stretch of a document: a whole slot, or a word outside of any.

    Attributes:
        start: Its first character in the document's text: the leading space, if it has one.
        stop: One past its last character, trailing punctuation included.
        slot: The slot it holds, `None` for a connecting word.
        replacements: What else can stand there, spaced and punctuated alike; for a connecting word,
            the word itself, since nothing else ever stands in its place.
    """

    start: int
    stop: int
    slot: str | None
    replacements: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A biography, cut into what a model is given and what it has to write.

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
        """What the model is given."""
        return self.text[: self.cut]

    @property
    def continuation(self) -> str:
        """What it has to write, up to the end of the biography."""
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

    def segments(self, part: Part = "prompt") -> list[Segment]:
        """Spans that tile the prompt or the continuation, one to a slot or connecting word."""
        start, stop = (0, self.cut) if part == "prompt" else (self.cut, len(self.text))
        words = (match.span() for match in re.finditer(r"\s*\S+", self.text))
        words = [span for span in words if start <= span[0] and span[1] <= stop]
        groups = itertools.groupby(words, key=lambda span: self._slot_in(*span) or span)
        return [self._segment(list(group), owner) for owner, group in groups]

    def edited(self, name: str, text: str) -> Document:
        """The same document with other words in one slot and everything else left as it is.

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
        before, after = self.text[start : owner.start], self.text[owner.stop : stop]
        others = (before + other + after for other in owner.alternatives if other != owner.text)
        return Segment(start, stop, owner.name, tuple(others))


class _Draws:
    """A random source that keeps count of how surprising its draws were, in nats."""

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
    """

    def __init__(self, varied: bool = False):
        self.varied = varied
        self._generated = VARIED_GENERATED if varied else GENERATED
        pronouns = tuple(PRONOUNS) if varied else tuple(word.capitalize() for word in PRONOUNS)
        self._pronoun_of = {
            name: pronoun
            for pronoun, names in zip(pronouns, PRONOUNS.values(), strict=True)
            for name in names
        }
        self.alternatives: dict[str, tuple[str, ...]] = {
            "name": NAMES,
            "age": AGES,
            "city": tuple(CITIES),
            "state": STATES,
            "pet": PETS,
            "occupation": tuple(OCCUPATIONS),
            "pronoun": pronouns,
            "A": INTERESTS,
            "B": tuple(CITIES.values()),
            "C": SHARED,
            "D": ENDINGS,
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
        """What the grammar lets stand in a generated slot, all equally likely.

        Args:
            name: ``"pronoun"``, ``"A"``, ``"B"``, ``"C"`` or ``"D"``.
            facts: The words in the other slots, by slot name. If one on which this slot depends is
                missing, everything that can stand in the slot is allowed.
        """
        if any(cause not in facts for cause in _CAUSES[name]):
            return self.alternatives[name]
        if name == "A":
            return OCCUPATIONS[facts["occupation"]]
        if name == "C":
            turn = _JOBS.index(facts["occupation"]) + STATES.index(facts["state"])
            return (SHARED[turn % len(SHARED)],)
        table = {"pronoun": self._pronoun_of, "B": CITIES, "D": _ENDING_OF}[name]
        return (table[facts[_CAUSES[name][0]]],)

    def permits(self, document: Document, continuation: str) -> bool:
        """Whether the grammar could have continued the document's prompt like this, to the end."""
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
            sentences = [draws.pick(VARIED_FACTS[fact]) for fact in draws.shuffle(shown)]
        else:
            age = AGE if draws.happens(0.5) else ""
            pet = PET if draws.happens(0.5) else ""
            sentences = [FACTS.replace(AGE, age).replace(PET, pet)]
        return " ".join([*sentences, *(draws.pick(wordings) for wordings in self._generated)])

    def _draw_rest(self, facts: dict[str, str], draws: _Draws, stray: float) -> None:
        for name in _CAUSES:
            options = self.allowed(name, facts)
            if name != "A":
                facts[name] = draws.pick(options)
                continue
            strays = draws.rng.random() < stray
            facts[name] = draws.rng.choice(INTERESTS if strays else options)
            likely = (1 - stray) / len(options) if facts[name] in options else 0.0
            draws.nats -= math.log(likely + stray / len(INTERESTS))

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
