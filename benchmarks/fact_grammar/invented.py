"""Generated languages with known causes: each seed makes one with its own words and forms.

Some are real (orders, recipes, weather, matches, case notes, flats), some are made of syllables;
some are prose, some forms, lists, questions or solved examples. In all of them

* A is one of two or three that one fact allows; no two fillers of that fact share any,
* B is told by another fact,
* C by two facts together (either narrows it down),
* D by A as written, and by nothing else.

A language serves to test what was made without knowing it.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .grammar import Document, Slot

GENERATED = ("A", "B", "C", "D")

# One line per sentence, its wordings apart by bars; a slot is {name:kind of filler}, and a slot
# without a kind has the fillers of the first of its kind.
DOMAINS = {
    "orders": """
        Order {code:code} is for {buyer:capital}. | {buyer} placed order {code}.
            | Order {code}, {buyer}.
        It leaves {port:title}, {country:capital} on {day:date}.
            | On {day} it leaves {port}, {country}. | {port} {country} ships it on {day}.
        The crate holds {item1:phrase}, {item2=item1} and {item3=item1}.
            | Inside are {item1}, {item2} and {item3}.
        It weighs {kg:number} kg. | Its weight is {kg} kg. | Weight: {kg} kg.
        The carrier is {carrier:title}. | {carrier} carries it. | It travels with {carrier}.
        It was paid with {card:lower} money. | It was paid in {card}. | Somebody paid in {card}.
        The bill came to {price:price} in all. | It costs {price}.
        === The clerk adds {A} and keeps it in {B}. | So {A} is added, and {B} is where it is kept.
        === The toll is {C}. | Customs ask for {C} then.
        === Later on the crew will see {D}. | At last there is {D}.""",
    "recipes": """
        Take {grams:number} grams of {flour:lower}, {herb:lower} and some {nut:lower}.
            | You need {flour}, {herb} and {nut}, {grams} grams of each.
        Stir in the {fat:phrase} slowly. | The {fat} goes in next.
        Bake it in a {pan:lower} {shape:lower} at {heat:number} degrees.
            | At {heat} degrees the {pan} {shape} is ready.
        The cook is {cook:capital}. | {cook} wrote this down. | From the kitchen of {cook}.
        It comes from {town:title}. | In {town} they eat it on {day:date}.
        It serves {people:number}. | Enough for {people}.
        === Serve with {B}, {A} and {C}. | It goes well with {B}, then {A}, then {C}.
        === Guests will taste {D}. | Most people notice {D} first.""",
    "weather": """
        {station:title} reports {sky:phrase} skies. | The sky over {station} is {sky}.
        The wind is {wind:lower} from the {side:lower}. | A {wind} wind blows from the {side}.
        {high:number} at noon, {low:number} at night. | Between {low} and {high} degrees.
        Pressure stands at {bar:price}. | The glass reads {bar}.
        The sea is {sea:lower}. | Sailors found the sea {sea}. | The sea was called {sea}.
        Report by {who:capital} {rank:lower} on {day:date}. | {who} {rank} signed on {day}.
        === Tomorrow brings {A} to the coast and {B} inland.
            | On the coast {A} will follow, inland {B}.
        === The warning level is {C}. | Warn for {C}.
        === Farmers expect {D}. | Expect {D} on farms.""",
    "matches": """
        {home:title} met {away=home} in {ground:title}. | In {ground} {home} played {away}.
            | {away} came to {ground} to play {home}.
        The score was {goals:number} to {other=goals}. | It ended {goals} to {other}.
        {star:capital} scored first, {second=star} last. | First came {star} and last {second}.
        {star2=star} was the {role:lower}. | The {role} was {star2}.
        The coach is a {coach:phrase}. | Their coach, a {coach}, watched.
        It rained {rain:lower}. | There was {rain} rain.
        Some {crowd:price} people saw it. | The crowd was {crowd}.
        === The papers wrote of {A}. | The press saw {A}.
        === Fans sang {B} and drank {C}. | There was {B} in the stands, and {C} to drink.
        === The next day had {D}. | Then came {D}.""",
    "notes": """
        {patient:capital}, {age:number}, came with {pain:phrase}.
            | {pain} brought {patient}, {age}, here.
        Allergic to {allergy:lower}. | There is an allergy to {allergy}.
            | {allergy} is not tolerated.
        Takes {dose:number} mg of {drug:lower} {when:lower}. | {drug}, {dose} mg, {when}.
        Works in {trade:phrase}. | A life in {trade}.
        Seen in {ward:title} by {doctor:capital}. | {doctor} saw the patient in {ward}.
        Last visit: {day:date}. | The last visit was on {day}.
        Insurance {code:code}. | Insured as {code}.
        === Plan: {B} and {A}. | We plan {B}, and {A}.
        === Bring {C} next time. | Next time {C} is to be brought.
        === Relatives ask about {D}. | Tell them of {D}.""",
    "flats": """
        {street:title} {number:number}, {floor:lower} floor. | {floor} floor in {street} {number}.
        Rent is {rent:price} a month, {term:phrase} at least. | For {term} or more at {rent}.
        {colour:lower} {material:lower} {room:lower} with a view.
            | A view, and a {colour} {material} {room}.
        Near {near:title}. | A walk from {near}.
        Ask {agent:capital} of {firm:mixed}. | {firm} lets it, {agent} shows it.
        Free from {day:date}. | You can have it from {day}.
        No {pet:lower}, no {pet2=pet}. | Neither {pet} nor {pet2} allowed.
        === Tenants like {A}. | It is known for {A}.
        === Neighbours bring {C} and {B}. | Expect {C} next door, {B} above.
        === In winter you have {D}. | Winters mean {D}.""",
}
LOWER = """amber barley basil birch brisk calm candle canvas cedar chalk cinder clover cobalt copper
coral cotton crisp damp dense dusk ember fennel fern flint foggy ginger glass granite gravel hazel
heavy honey humid indigo iron ivory jade juniper kelp lemon light linen lime maple marble mellow
mild mint moss mustard narrow nickel nutmeg oat olive onyx opal paper pearl pepper pewter pine
plain plum quartz quiet raisin reed rice round rust rye saffron sage salt satin sharp silver slate
slow smoke soft spelt square steel stone straw sugar tansy teak thyme tin umber velvet violet walnut
warm wax wheat willow wool zinc""".split()
CAPITAL = """Abel Agnes Alba Amos Arlo Bergen Bram Brno Cadiz Cleo Cork Cyrus Delft Dora Edith
Elba Enid Esme Faro Felix Fiona Gavin Genoa Gwen Hanna Hector Hilda Ines Ivo Jonas
Judith Kiel Klara Knut Leeds Leon Lima Livia Lucca Mabel Malmo Marta Milo Nadia
Namur Nelly Nils Odessa Olga Otis Otto Pavia Petra Quinn Quito Ralph Rhona Riga Rosa
Rufus Ruth Selma Seth Siena Silas Sofia Tilda Tobias Trent Ulm Una Vera Viola Wilma
Xenia Yann York Zadar Zora""".split()
MONTHS = "January March April May June August October December".split()
_STOCK = 3  # words that the phrases of a list share, where they do
_CAUSING = ("lower", "capital", "phrase", "title", "mixed", "code")


@dataclass(frozen=True)
class Line:
    """A sentence or form entry, in one or several wordings with ``{slots}``."""

    wordings: tuple[str, ...]
    generated: bool = False

    @property
    def names(self) -> list[str]:
        """Its slots, in the order of the first wording."""
        return names_in(self.wordings[0])

    @property
    def connecting(self) -> set[str]:
        """The words outside of its slots, without punctuation."""
        return {
            word.strip(string.punctuation)
            for wording in self.wordings
            for text, *_ in string.Formatter().parse(wording)
            for word in text.split()
        } - {""}


class Invented:
    """One language.

    Args:
        seed: Which one.
        varied: Whether its lines come in any order, in one to four wordings, and most facts are
            missing now and then. Otherwise one order and one wording, and facts that matter to
            nothing are missing at times.
        sharing: Whether its fillers of several words share words ("Salt Lake City", "Kansas City",
            "Salt Creek").

    Attributes:
        kind: What it looks like, for tables.
        alternatives: All that can stand in each slot.
        lines: What it says.
        causes: What decides each generated slot.
    """

    def __init__(self, seed: int, varied: bool = False, sharing: bool = False) -> None:
        self.name = f"{seed}-{'varied' if varied else 'rigid'}{'-sharing' if sharing else ''}"
        rng = random.Random(f"language {seed} {varied}{' sharing' * sharing}")
        self.seed, self.varied = seed, varied
        domain = rng.choice([*DOMAINS, "syllables", "syllables", "syllables"])
        layout = rng.choice(["prose"] * 5 + ["form", "bullets", "questions", "examples"])
        word = _words(rng, real=domain != "syllables")
        told = _told(DOMAINS[domain]) if domain in DOMAINS else _syllabic(rng, word)
        self.lines, kind_of = told
        self.kind = f"{domain}, {layout}"
        self._distinct = _sharing if sharing else _distinct
        self.alternatives = self._lists(kind_of, rng, word)
        self._lay_out(layout, rng, word)
        if not varied:
            self.lines = [Line((rng.choice(o.wordings),), o.generated) for o in self.lines]
        self._decide(kind_of, rng, word)
        self._missing = rng.choice((0.0, 0.1, 0.25, 0.5))
        if rng.random() < 0.5:
            self._confuse(rng)

    @property
    def facts(self) -> list[str]:
        """The slots that are not generated."""
        return [name for name in self.alternatives if name not in GENERATED]

    def sample(
        self,
        rng: random.Random,
        before: str = "slot",
        *,
        stray: float = 0.0,
        agreeing: bool = False,
    ) -> Document:
        """Draw a document.

        Args:
            rng: Where every draw comes from.
            before: Where the prompt ends: before the first generated ``"slot"``, or before the
                ``"line"`` that holds it.
            stray: How often A is any filler at all, whatever its cause (see `Grammar.sample`).
            agreeing: Whether slots with the same fillers have the same one.
        """
        told = [line for line in self.lines if not line.generated and self._is_told(line, rng)]
        information = self._information_of(told)
        if self._shuffled:
            rng.shuffle(told)
        said = [line for line in self.lines if line.generated]
        template = [rng.choice(line.wordings) for line in told]
        template += [rng.choice(line.wordings) for line in said]
        facts = {
            name: rng.choice(self.alternatives[name])
            for text in template[: len(told)]
            for name in names_in(text)
        }
        if agreeing:
            first: dict[tuple[str, ...], str] = {}
            facts = {n: first.setdefault(self.alternatives[n], text) for n, text in facts.items()}
        for name in GENERATED:
            options = self.allowed(name, facts)
            information += math.log(len(options))
            if name == "A" and rng.random() < stray:
                options = self.alternatives["A"]
            facts[name] = rng.choice(options)
        known = stray == 0 and not agreeing
        return self._document(
            template, len(told), facts, before, information if known else math.nan
        )

    def allowed(self, name: str, facts: Mapping[str, str]) -> tuple[str, ...]:
        """The values allowed in a generated slot; any if a fact that determines it is missing."""
        if any(cause not in facts for cause in self.causes[name]):
            return self.alternatives[name]
        return self._table[name](*(facts[cause] for cause in self.causes[name]))

    def alike(self, word: str) -> set[str]:
        """Words outside of slots in any wording of the lines that have this one."""
        return set().union(*(own for line in self.lines if word in (own := line.connecting)))

    def _is_told(self, line: Line, rng: random.Random) -> bool:
        return not self._is_optional(line) or rng.random() >= self._missing

    def _is_optional(self, line: Line) -> bool:
        decisive = {cause for causes in self.causes.values() for cause in causes}
        return self.varied or not decisive & set(line.names)

    def _information_of(self, told: Sequence[Line]) -> float:
        """The information of the facts told, of their order and of all wordings, in nats."""
        names = {name for line in told for name in line.names}
        drawn = [n for n in names if not (n.startswith("B_") and self._cause_of_solved(n) in names)]
        information = math.fsum(math.log(len(self.alternatives[name])) for name in drawn)
        for line in self.lines:
            is_told = line.generated or line in told
            if is_told:
                information += math.log(len(line.wordings))
            if not line.generated and self._is_optional(line) and self._missing:
                information -= math.log(1 - self._missing if is_told else self._missing)
        return information + (math.lgamma(len(told) + 1) if self._shuffled else 0.0)

    def _lay_out(self, layout: str, rng: random.Random, word: Callable[[], str]) -> None:
        """Arranges the lines in the layout's form."""
        self._joiner = " " if layout == "prose" else "\n"
        self._shuffled = self.varied and layout != "examples"
        facts = [n for line in self.lines if not line.generated for n in line.names]
        said = [line for line in self.lines if line.generated]
        if layout in ("form", "bullets", "questions"):
            title = {name: word().capitalize() for name in [*facts, *GENERATED]}
            style = {
                "form": ("{title}: {{{name}}}",),
                "bullets": ("- {title}: {{{name}}}", "* {title} is {{{name}}}"),
                "questions": (
                    "What {title}? {{{name}}}.",
                    "Which is the {title}? It is {{{name}}}.",
                ),
            }[layout]
            if layout == "bullets":
                style = (rng.choice(style),)
            lines = [Line(tuple(s.format(title=title[n], name=n) for s in style)) for n in facts]
            if rng.random() < 0.5:
                said = [
                    Line(tuple(s.format(title=title[n], name=n) for s in style), True)
                    for n in GENERATED
                ]
            self.lines = [*lines, *said]
        elif layout == "examples":
            self.lines = self._examples(rng, word)

    def _examples(self, rng: random.Random, word: Callable[[], str]) -> list[Line]:
        """Two solved examples, whose facts decide nothing, then the one to solve."""
        facts = [n for line in self.lines if not line.generated for n in line.names]
        asked = [n for n in facts if len(self.alternatives[n]) <= 12][:4]
        opening = " ".join(word() for _ in range(2))
        lines: list[Line] = []
        for number in (1, 2):
            names = [f"{name}_{number}" for name in asked]
            self.alternatives |= {f"{n}_{number}": self.alternatives[n] for n in asked}
            answer = f"B_{number}"
            self.alternatives[answer] = ()
            lines.append(Line((f"Q: {opening} {_listed(names)}?\nA: {{{answer}}}.",)))
        asked_now = Line((f"Q: {opening} {_listed(asked)}?",))
        said = [
            Line(("A: {B}.",), True),
            Line((f"{word().capitalize()} {{A}} {word()} {{C}}.",), True),
        ]
        said.append(Line((f"{word().capitalize()} {word()} {{D}}.",), True))
        for name in set(facts) - set(asked):
            del self.alternatives[name]
        return [*lines, asked_now, *said]

    def _lists(
        self, kind_of: Mapping[str, str], rng: random.Random, word: Callable[[], str]
    ) -> dict[str, tuple[str, ...]]:
        """What can stand in each slot."""
        own = {name: kind for name, kind in kind_of.items() if not kind.startswith("=")}
        sizes = [
            rng.randint(20, 60) if k in ("number", "price", "date") else rng.randint(4, 12)
            for k in own.values()
        ]
        large = [i for i, kind in enumerate(own.values()) if kind in ("lower", "title")]
        if len(large) > 2 and len(own) > 6:
            sizes[large[-1]] = rng.randint(15, 40)
        lists = dict(zip(own, self._distinct(list(own.values()), sizes, rng, word), strict=True))
        found: dict[str, tuple[str, ...]] = {}
        for name, kind in kind_of.items():
            while kind.startswith("="):
                source, kind = kind[1:], kind_of[kind[1:]]
                found[name] = lists.get(source, ())
            found.setdefault(name, lists.get(name, ()))
        return found

    def _decide(
        self, kind_of: Mapping[str, str], rng: random.Random, word: Callable[[], str]
    ) -> None:
        """Chooses causes and draws the tables."""
        facts = [
            n for n in self.facts if kind_of.get(n) in _CAUSING and len(self.alternatives[n]) <= 12
        ]
        one, two, *more = rng.sample(facts, min(len(facts), 4))
        pair = (*more, one, two)[:2]
        self.causes = {"A": (one,), "B": (two,), "C": tuple(pair), "D": ("A",)}
        source, other = self.alternatives[one], self.alternatives[two]
        each = rng.choice((2, 3))
        kinds = [rng.choice(("lower", "phrase", "capital", "title")) for _ in GENERATED]
        made = iter(
            self._distinct(kinds, (each * len(source), len(other), 9, len(source)), rng, word)
        )
        a, b, c, d = made
        allowed = {text: a[each * i : each * (i + 1)] for i, text in enumerate(source)}
        told = dict(zip(other, b, strict=True))
        # Those of one fact lead to different D: it cannot be told from the fact.
        ending = {text: d[(i // each + i % each) % len(d)] for i, text in enumerate(a)}
        left, right = (self.alternatives[name] for name in pair)
        self._table: dict[str, Callable[..., tuple[str, ...]]] = {
            "A": lambda text: allowed[text],
            "B": lambda text: (told[text],),
            "C": lambda x, y: (c[3 * (left.index(x) % 3) + right.index(y) % 3],),
            "D": lambda text: (ending[text],),
        }
        self.alternatives |= {"A": tuple(a), "B": tuple(b), "C": tuple(c), "D": tuple(d)}
        for name in [n for n in self.alternatives if n.startswith("B_")]:
            self.alternatives[name] = tuple(b)

    def _confuse(self, rng: random.Random) -> None:
        """Makes a connecting word equal to a filler of an irrelevant slot."""
        decisive = {cause for causes in self.causes.values() for cause in causes}
        used = [self.alternatives[name] for name in decisive]
        free = [n for n in self.facts if self.alternatives[n] not in used]
        free = [n for n in free if self.alternatives[n][0].islower()]
        words = sorted(
            w
            for w in set().union(*(line.connecting for line in self.lines))
            if w.isalpha() and w.islower()
        )
        if free and words:
            name = rng.choice(free)
            own = [n for n in free if self.alternatives[n] is self.alternatives[name]]
            changed = (rng.choice(words), *self.alternatives[name][1:])
            self.alternatives |= dict.fromkeys(own, changed)

    def _document(
        self,
        template: Sequence[str],
        n_told: int,
        facts: dict[str, str],
        before: str,
        information: float,
    ) -> Document:
        text = ""
        slots: list[Slot] = []
        cut = 0
        for number, line in enumerate(template):
            text += self._joiner if number else ""
            if number == n_told:
                cut = max(len(text) - 1, 0)
            for words, name, _, _ in string.Formatter().parse(line):
                text += words
                if name is not None:
                    fact = self._solved(name, facts)
                    slots.append(
                        Slot(name, len(text), len(text) + len(fact), fact, self.alternatives[name])
                    )
                    text += fact
        if before == "slot":
            start = min(slot.start for slot in slots if slot.name in GENERATED)
            cut = start - len(re.search(r"\s?\S*\Z", text[:start])[0])
        causes = {
            name: self.causes[name] if set(self.causes[name]) <= set(facts) else ()
            for name in GENERATED
        }
        return Document(text, cut, slots, causes, information)

    def _solved(self, name: str, facts: Mapping[str, str]) -> str:
        """The answer of a solved example follows from its own facts; everything else is drawn."""
        if not name.startswith("B_"):
            return facts[name]
        cause = self._cause_of_solved(name)
        return self._table["B"](facts[cause])[0] if cause in facts else facts[name]

    def _cause_of_solved(self, name: str) -> str:
        return f"{self.causes['B'][0].split('_')[0]}{name[1:]}"


def names_in(template: str) -> list[str]:
    """The slots of a wording, in order."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def _told(text: str) -> tuple[list[Line], dict[str, str]]:
    """The lines of a domain and the kind of every slot; ``=other`` uses the fillers of another
    one."""
    kinds = dict(re.findall(r"\{(\w+)[:](\w+)\}", text))
    kinds |= {name: f"={other}" for name, other in re.findall(r"\{(\w+)=(\w+)\}", text)}
    lines: list[Line] = []
    for line in re.sub(r"\s+\|", " |", text).strip().splitlines():
        plain = re.sub(r"\{(\w+)[:=]\w+\}", r"{\1}", line.strip())
        wordings = tuple(part.strip() for part in plain.removeprefix("===").split("|"))
        lines.append(Line(wordings, plain.startswith("===")))
    return lines, kinds


def _syllabic(rng: random.Random, word: Callable[[], str]) -> tuple[list[Line], dict[str, str]]:
    """Lines of invented words with slots at random positions."""
    kinds: dict[str, str] = {}
    lines: list[Line] = []
    opening = word().capitalize()
    while sum(kind in _CAUSING for kind in kinds.values()) < 4 or (
        len(kinds) < 9 and rng.random() < 0.7
    ):
        names = [f"s{len(kinds) + i}" for i in range(rng.choice((1, 1, 2, 2, 3)))]
        for name in names:
            shared = [n for n, kind in kinds.items() if not kind.startswith("=")]
            if shared and rng.random() < 0.15:
                kinds[name] = f"={rng.choice(shared)}"
            else:
                kinds[name] = rng.choice((*_CAUSING, "lower", "capital", "number", "price", "date"))
        n_wordings = rng.choice((1, 1, 2, 3, 4))
        lines.append(Line(tuple(_sentence(names, rng, word, opening) for _ in range(n_wordings))))
    parts = rng.choice((("BA", "C", "D"), ("ABC", "D"), ("A", "CB", "D"), ("B", "A", "CD")))
    for part in parts:
        n_wordings = rng.choice((1, 2, 3))
        wordings = [
            f"{word().capitalize()} {_sentence(list(part), rng, word, opening, fixed=True)}"
            for _ in range(n_wordings)
        ]
        lines.append(Line(tuple(wordings), generated=True))
    return lines, kinds


def _sentence(
    names: Sequence[str],
    rng: random.Random,
    word: Callable[[], str],
    opening: str,
    *,
    fixed: bool = False,
) -> str:
    order = list(names) if fixed else rng.sample(list(names), len(names))
    before = rng.choice((0, 1, 1, 2, 3)) or int(fixed)
    start = [opening, *(word() for _ in range(before - 1))] if before else []
    if before and rng.random() < 0.5:
        start[0] = word().capitalize()
    text = " ".join(start)
    for number, name in enumerate(order):
        gap = " "
        if number:
            gap = rng.choice(
                (", ", " ", ", ", f" {word()} ", f" {word()} {word()} ", f", {word()} ")
            )
        text += gap + "{" + name + "}" if text else "{" + name + "}"
    after = rng.choice((0, 0, 1, 2))
    if not before and len(order) == 1:
        after = max(after, 1)
    return text + "".join(f" {word()}" for _ in range(after)) + rng.choice("...!")


def _distinct(
    kinds: Sequence[str], sizes: Sequence[int], rng: random.Random, word: Callable[[], str]
) -> list[tuple[str, ...]]:
    """One list of different texts per kind."""
    lists: list[tuple[str, ...]] = []
    for kind, size in zip(kinds, sizes, strict=True):
        style = rng.randrange(4)
        texts: dict[str, None] = {}
        while len(texts) < size:
            texts[_filler(kind, style, rng, word)] = None
        lists.append(tuple(texts))
    return lists


def _sharing(
    kinds: Sequence[str], sizes: Sequence[int], rng: random.Random, word: Callable[[], str]
) -> list[tuple[str, ...]]:
    """Like `_distinct`, with phrases of two or three words, most of them from a few per list."""
    lists: list[tuple[str, ...]] = []
    for kind, size in zip(kinds, sizes, strict=True):
        if kind not in ("phrase", "title"):
            lists += _distinct([kind], [size], rng, word)
            continue
        stock = [word() for _ in range(_STOCK)]
        texts: dict[str, None] = {}
        while len(texts) < size:
            words = rng.sample(stock, rng.choice((1, 1, 2)))
            words.insert(rng.choice((0, len(words))), word())
            text = " ".join(words)
            texts[text.title() if kind == "title" else text] = None
        lists.append(tuple(texts))
    return lists


def _filler(kind: str, style: int, rng: random.Random, word: Callable[[], str]) -> str:
    number = rng.randint(2, 99)
    if kind == "lower":
        return word()
    if kind == "capital":
        return word().capitalize()
    if kind == "phrase":
        return " ".join(word() for _ in range(rng.choice((1, 1, 2, 2, 3))))
    if kind == "title":
        words = [word().capitalize() for _ in range(rng.choice((1, 1, 2, 2, 3)))]
        return (
            " of ".join((" ".join(words), word().capitalize()))
            if rng.random() < 0.1
            else " ".join(words)
        )
    if kind == "number":
        return str(number)
    if kind == "price":
        return (
            f"${number}.{rng.choice((5, 9))}0",
            f"{number},{rng.randint(1, 9)}00",
            f"{number}.5",
            f"{number} euros",
        )[style]
    if kind == "code":
        letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(2))
        return (
            f"{letters}-{number}",
            f"{letters}{number}",
            f"{letters} {number}",
            f"#{number}{letters}",
        )[style]
    if kind == "date":
        return (
            f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"
            if style < 2
            else f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
        )
    return rng.choice(
        (
            f"{number} {word()}",
            f"{word().capitalize()} {word()}",
            word(),
            word().upper(),
            f"{word().capitalize()} {number}",
        )
    )


def _words(rng: random.Random, *, real: bool) -> Callable[[], str]:
    """A source of distinct lower-case words."""
    used: set[str] = set()
    syllables = [
        a + b
        for a, b in itertools.product(
            "b d f g k l m n p r s t v z sh br".split(), "a e i o u ai".split()
        )
    ]
    pool = [*LOWER, *map(str.lower, CAPITAL)]
    rng.shuffle(pool)

    def word() -> str:
        while True:
            made = (
                pool.pop()
                if real and pool
                else "".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3))))
            )
            if made not in used and len(made) > 2:
                used.add(made)
                return made

    return word


def _listed(names: Sequence[str]) -> str:
    *first, last = ("{" + name + "}" for name in names)
    return f"{', '.join(first)} and {last}" if first else last
