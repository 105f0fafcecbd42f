"""Words and sentences of biographies: those of the shipped model, and others for evaluation.

`TOWNS` and `PHRASES` have what the matcher was not made on: fillers of several words that share
words, so that each word of a phrase is told by the others ("Lake" in "Salt Lake City"), is as
frequent as the words between the slots, and stands in several slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Words:
    """All that a grammar of biographies needs.

    Attributes:
        pronouns: Two, each with eight names.
        cities: Twelve, each with its B.
        occupations: Nine, each with three A; all 27 differ.
        states: Nine.
        shared: The three C.
        endings: The nine D.
        pets: What the pet is; decides nothing.
        facts: The facts in one sentence, with marks where age and pet may stand.
        age, pet: What stands there, half of the time.
        varied_facts: Per fact its wordings.
        generated: The sentences to be continued, each in its wordings.
        varied_generated: The same for the varied grammar.
    """

    pronouns: Mapping[str, tuple[str, ...]]
    cities: Mapping[str, str]
    occupations: Mapping[str, tuple[str, ...]]
    states: tuple[str, ...]
    shared: tuple[str, ...]
    endings: tuple[str, ...]
    pets: tuple[str, ...]
    facts: str
    varied_facts: Mapping[str, tuple[str, ...]]
    generated: tuple[tuple[str, ...], ...]
    varied_generated: tuple[tuple[str, ...], ...]
    age: str = ", {age},"
    pet: str = " with a {pet}"
    ages: tuple[str, ...] = field(default=tuple(str(age) for age in range(21, 80)))

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return tuple(itertools.chain(*self.pronouns.values()))

    @property
    def interests(self) -> tuple[str, ...]:
        """All A."""
        return tuple(itertools.chain(*self.occupations.values()))

    def ending_of(self, interest: str) -> str:
        """The D that an A decides: three different ones for the three of an occupation."""
        job, place = divmod(self.interests.index(interest), 3)
        return self.endings[(job + 3 * place) % len(self.endings)]


BIOGRAPHIES = Words(
    pronouns={
        "his": ("Dave", "Adam", "Carl", "Hugo", "Ivan", "Noah", "Oscar", "Peter"),
        "her": ("Anna", "Clara", "Emma", "Julia", "Laura", "Maria", "Nora", "Sara"),
    },
    cities={
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
    },
    # What an occupation allows as A. Its three lead to three D: D cannot be told from it.
    occupations={
        "lawyer": ("golf", "poker", "table tennis"),
        "nurse": ("yoga", "knitting", "gardening"),
        "teacher": ("chess", "poetry", "hiking"),
        "farmer": ("fly fishing", "woodwork", "rodeo"),
        "pilot": ("gliding", "cycling", "skating"),
        "chemist": ("brewing", "pottery", "juggling"),
        "banker": ("squash", "bridge", "opera"),
        "dancer": ("jazz piano", "boxing", "swimming"),
        "plumber": ("darts", "bowling", "karaoke"),
    },
    states=("FL", "OH", "TX", "GA", "ME", "UT", "NJ", "WI", "KS"),
    shared=("history", "painting", "cooking"),
    endings=(
        "strong coffee",
        "old friends",
        "long walks",
        "loud music",
        "clean air",
        "warm bread",
        "good stories",
        "bright stars",
        "deep sleep",
    ),
    pets=("cat", "dog", "parrot", "rabbit", "pony", "turtle"),
    facts="{name}{age?} lives in {city}, {state}{pet?} and is a {occupation}.",
    varied_facts={
        "name": ("Meet {name}.", "This is {name}."),
        "home": ("Lives in {city}, {state}.", "Has a house in {city}, {state}."),
        "job": ("Works as a {occupation}.", "Earns a living as a {occupation}."),
        "age": ("Turned {age} this year.", "Is {age} years old."),
        "pet": ("Keeps a {pet}.", "Shares the house with a {pet}."),
    },
    generated=(
        ("{pronoun} personal interests include {A}, {B} and {C}.",),
        ("A good day ends with {D}.",),
    ),
    # A fixed opening, so that the pronoun does not also carry the surprise that the facts are over.
    varied_generated=(
        (
            "Above all, {pronoun} personal interests include {A}, {B} and {C}.",
            "For fun, {pronoun} favorite things are {A}, {B} and {C}.",
        ),
        ("A good day ends with {D}.", "Weekends are for {D}."),
    ),
)

TOWNS = replace(
    BIOGRAPHIES,
    pronouns={
        "his": ("Boris", "Cesar", "Edgar", "Felix", "Gustav", "Jonas", "Kevin", "Milan"),
        "her": ("Agnes", "Betty", "Daisy", "Flora", "Heidi", "Irene", "Wanda", "Zelda"),
    },
    cities={
        "Baton Rouge": "canoeing",
        "Silver Lake City": "archery",
        "Union City": "beekeeping",
        "Rapid City": "rafting",
        "Fort Grant City": "dog shows",
        "Fort Collins": "mountain biking",
        "Lake Charles": "fishing at night",
        "Bend": "telemark",
        "Tulsa": "lacrosse",
        "Omaha": "polo",
        "Denver": "curling",
        "Macon": "croquet",
    },
    occupations={
        "baker": ("cricket", "origami", "magic tricks"),
        "judge": ("rugby", "ballet", "sudoku"),
        "tailor": ("horse riding", "go", "salsa"),
        "sailor": ("judo", "quilting", "puppets"),
        "miner": ("snooker", "crosswords", "drumming"),
        "waiter": ("handball", "sculpture", "fencing"),
        "barber": ("badminton", "stand-up comedy", "falconry"),
        "editor": ("pilates", "calligraphy", "hockey"),
        "welder": ("volleyball", "tap dance", "astronomy"),
    },
    states=("AL", "CO", "IA", "LA", "MN", "NE", "OK", "OR", "VA"),
    shared=("geology", "baking", "chemistry"),
    endings=(
        "green tea",
        "a hot bath",
        "wild parties",
        "soft blankets",
        "ripe plums",
        "quiet nights",
        "silly jokes",
        "crisp apples",
        "high winds",
    ),
    pets=("ferret", "canary", "goat", "lizard", "hen", "mouse"),
)

PHRASES = Words(
    pronouns={
        "his": (
            "Juan Carlos",
            "Carlos Luis",
            "Jean Paul",
            "Paul Henry",
            "Henry James",
            "Jean Luc",
            "Luis Alberto",
            "James Paul Scott",
        ),
        "her": (
            "Mary Ann",
            "Ann Sophie",
            "Sophie Claire",
            "Rose Mary",
            "Claire Rose",
            "Mary Beth",
            "Beth Ann",
            "Rose",
        ),
    },
    cities={
        "Lake Placid": "luge",
        "Salt Lake City": "ski jumping",
        "Lake City": "water skiing",
        "New York City": "street dance",
        "Fort York": "street hockey",
        "Fort Lee City": "ice dance",
        "Fort Worth": "bull riding",
        "New Haven": "ice skating",
        "Salt Fork": "trail riding",
        "Grand Haven": "water polo",
        "Grand Rapids": "trail running",
        "Rapid City": "rock climbing",
    },
    occupations={
        "doctor of medicine": ("table tennis", "lawn bowls", "card games"),
        "doctor of law": ("lawn tennis", "board games", "chess"),
        "professor of law": ("table football", "card tricks", "choir singing"),
        "master of arts": ("beach football", "video games", "throat singing"),
        "head of sales": ("beach tennis", "word games", "speed chess"),
        "sales agent": ("carpet bowls", "word puzzles", "bell ringing"),
        "travel agent": ("beach volleyball", "jigsaw puzzles", "magic tricks"),
        "law clerk": ("water colors", "rope tricks", "speed dating"),
        "sales clerk": ("oil colors", "rope jumping", "dating"),
    },
    states=(
        "New Zealand",
        "New Caledonia",
        "Gulf of Oman",
        "Oman",
        "Isle of Man",
        "Republic of Guinea",
        "Papua New Guinea",
        "South Sudan",
        "South Korea",
    ),
    shared=("folk music", "folk tales", "early music"),
    endings=(
        "black tea",
        "strong black coffee",
        "strong winds",
        "fresh winds",
        "fresh white bread",
        "white beans",
        "black beans",
        "old white wine",
        "old friends",
    ),
    pets=("guinea pig", "mini pig", "sea horse", "horse", "house cat", "sea lion"),
    facts="{name}{age?} moved to {city} from {state}{pet?} and became a {occupation} last year.",
    age=" ({age})",
    pet=", got a {pet}",
    varied_facts={
        "name": ("Say hello to {name}.", "Our guest is {name}."),
        "home": ("Moved to {city} from {state}.", "Left {state} for {city}."),
        "job": (
            "Was hired as a {occupation} last year.",
            "Trained to be a {occupation} for years.",
        ),
        "age": ("Birthday number {age} is near.", "Soon {age} years old."),
        "pet": ("Adores the {pet}.", "Has to feed a {pet}."),
    },
    generated=(
        ("{pronoun} free time goes to {A}, to {B} and to {C}.",),
        ("Nothing beats {D} then.",),
    ),
    varied_generated=(
        (
            "As we know, {pronoun} free time goes to {A}, {B} and {C}.",
            "On Sundays, {pronoun} plans are {A}, {B} and {C}.",
        ),
        ("Nothing beats {D} then.", "Best of all is {D}."),
    ),
)

VOCABULARIES = {"biographies": BIOGRAPHIES, "towns": TOWNS, "phrases": PHRASES}
