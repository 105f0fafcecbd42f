"""Random generators of features' draws, and how draws cover the candidates evenly."""

import torch

# Number of binary digits of a draw's place that its index determines; finer ones are random. Enough
# for 1,024 draws.
_LEVELS = 10
_WORD = 2**64 - 1


class DrawGenerator(torch.Generator):
    """The generator of one draw of one feature, and its place among the feature's draws.

    Attributes:
        numbers: The seed, and the indices of draw and feature.
        place: A number in [0, 1), uniform over seeds. Consecutive draws are stratified: of 2^k
            draws whose first index is a multiple of 2^k, each lies in a different one of 2^k equal
            intervals, so that a text of weight w is drawn about w times the number of draws. Places
            of different features are independent.
    """

    place: float
    numbers: tuple[int, int, int]

    def part(self, number: int) -> "DrawGenerator":
        """The generator of one of several items drawn for the feature."""
        seed, draw, feature = self.numbers
        return draw_generator(_hashed(seed + number), draw, feature) if number else self


def draw_generator(seed: int, draw: int, feature: int = 0) -> DrawGenerator:
    """The generator of one feature's draw, independent of other draws and their order."""
    # An odd multiplier (2^64 divided by the golden ratio) separates neighbouring draws.
    mixed = (seed + (draw + 1) * 0x9E3779B97F4A7C15 + feature * 0xD1B54A32D192ED03) % 2**63
    generator = DrawGenerator()
    generator.manual_seed(mixed)
    generator.numbers = seed, draw, feature
    key = _hashed((seed + (feature + 1) * 0xD1B54A32D192ED03) & _WORD)
    rest = _hashed(mixed) / 2**64
    generator.place = min((_spread(draw, key) + rest) / 2**_LEVELS, 1 - 2**-53)
    return generator


def uniform(generator: torch.Generator) -> float:
    """A number in [0, 1): the fixed place of a `DrawGenerator`, otherwise a random one."""
    if isinstance(generator, DrawGenerator):
        return generator.place
    at = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
    return float(at)


def part_of(generator: torch.Generator, number: int) -> torch.Generator:
    """The generator of one of several items drawn for one feature."""
    return generator.part(number) if isinstance(generator, DrawGenerator) else generator


def _spread(draw: int, key: int) -> int:
    """One of 2^`_LEVELS` intervals for the draw of a feature: its index in bit-reversed order.

    Indices are first shuffled within blocks of 2^`_LEVELS`, and the result is Owen-scrambled (Owen
    1995; both: Burley, JCGT 2020), so that the draws of two features are paired at random.
    """
    number = 0
    # Each digit is flipped depending on the more significant ones.
    for level in reversed(range(_LEVELS)):
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
