"""Where the randomness of one feature's draw comes from, and how draws cover what may be drawn."""

import torch

# Binary digits of a draw's place that its number decides; what is finer is random.
_LEVELS = 10
_WORD = 2**64 - 1


class DrawGenerator(torch.Generator):
    """The generator of one draw of one feature, and its place among the feature's draws.

    Attributes:
        numbers: Its seed, and those of the draw and of the feature.
        place: A number in [0, 1), uniform over seeds. Places of draws with consecutive numbers are
            spread evenly: of 2^k draws, the first of them numbered by a multiple of 2^k, each lies
            in another one of 2^k equal parts, so that a text of weight w is drawn about w times as
            often as there are draws. Places of different features are independent.
    """

    place: float
    numbers: tuple[int, int, int]

    def part(self, number: int) -> "DrawGenerator":
        """The generator of one of several things that are drawn for the feature."""
        seed, draw, feature = self.numbers
        return draw_generator(_hashed(seed + number), draw, feature) if number else self


def draw_generator(seed: int, draw: int, feature: int = 0) -> DrawGenerator:
    """The generator of one feature's draw: the same whatever else is drawn, and when."""
    # An odd multiplier (2^64 divided by the golden ratio) keeps neighbouring draws apart.
    mixed = (seed + (draw + 1) * 0x9E3779B97F4A7C15 + feature * 0xD1B54A32D192ED03) % 2**63
    generator = DrawGenerator()
    generator.manual_seed(mixed)
    generator.numbers = seed, draw, feature
    key = _hashed((seed + (feature + 1) * 0xD1B54A32D192ED03) & _WORD)
    rest = _hashed(mixed) / 2**64
    generator.place = min((_spread(draw, key) + rest) / 2**_LEVELS, 1 - 2**-53)
    return generator


def uniform(generator: torch.Generator) -> float:
    """A number in [0, 1): of a draw its place, which is the same every time; otherwise the next."""
    if isinstance(generator, DrawGenerator):
        return generator.place
    at = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
    return float(at)


def part_of(generator: torch.Generator, number: int) -> torch.Generator:
    """The generator of one of several things that are drawn for one feature."""
    return generator.part(number) if isinstance(generator, DrawGenerator) else generator


def _spread(draw: int, key: int) -> int:
    """A part of 2^`_LEVELS` for the draw of a feature: its number's binary digits in reverse.

    Numbers are first shuffled within blocks of 2^`_LEVELS`, and what comes out is scrambled (Owen
    1995; both: Burley, JCGT 2020): what two features draw is then paired at random.
    """
    number = 0
    for level in reversed(range(_LEVELS)):  # what a digit is turned by: those that count more
        above = draw >> (level + 1)
        digit = (draw >> level & 1) ^ (_hashed(~key & _WORD ^ (above << 6 | level)) & 1)
        number |= digit << level
    found = 0
    for level in range(_LEVELS):
        before = number & ((1 << level) - 1)
        found = found << 1 | (number >> level & 1) ^ (_hashed(key ^ (before << 6 | level)) & 1)
    return found


def _hashed(number: int) -> int:
    """Any number as 64 random bits (splitmix64, Steele, Lea & Flood 2014)."""
    number = number + 0x9E3779B97F4A7C15 & _WORD
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _WORD
    return number ^ number >> 31
