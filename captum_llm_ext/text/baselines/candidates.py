"""Candidate replacements of a feature, their weights, and how they were found."""

import heapq
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from captum_llm_ext.text.baselines import words
from captum_llm_ext.text.baselines.draws import uniform

_TOLD = 10  # candidates listed in a match

# A distribution over more texts has hardly any of them twice among the draws of one attribution,
# and nothing can be learned of a text from one value. Chosen, not measured.
MOST_TEXTS = 128

Texts = tuple[str, ...]
"""One text per place of a feature; most features have one place."""


@dataclass(frozen=True, slots=True)
class Match:
    """The candidates of a corpus for one feature in its surroundings.

    Attributes:
        level: How the candidates were found: in the same surroundings on ``"both"`` sides, or on
            the ``"left"`` or ``"right"`` only; between words and punctuation of the same
            ``"kinds"`` (capitalised, number, …), with few or no words of the surroundings equal; by
            ``"shape"`` (same number of words, of the same kinds), by ``"length"`` (same number of
            words), ``"any"``; in one ``"document"`` with the other places of the feature; by the
            user's ``"label"``; by the ``"model"`` itself; or ``"blank"``: the feature is white
            space and remains.
        surroundings: The surroundings that were searched, with ``_`` in place of the feature and a
            kind in angle brackets if any word of that kind matches; or the label.
        n_occurrences: Number of matching places in the corpus, including those with the original
            text.
        n_candidates: Number of distinct texts found other than the original.
        constant: Whether only the original text was found in the slot, which then remains.
        examples: The most frequent candidates, at most ten.
        candidates: The likeliest replacements with their probabilities, at most ten; including the
            original if it may be drawn.
        determined: The probability that a draw is the original text: 1 if that remains.
    """

    level: str
    surroundings: str
    n_occurrences: int
    n_candidates: int
    constant: bool
    examples: tuple[str, ...]
    candidates: tuple[tuple[str, float], ...] = ()
    determined: float = 1.0

    @property
    def is_located(self) -> bool:
        """Whether the surroundings matched in words, not only in their kinds."""
        return self.level not in ("kinds", "shape", "length", "any")

    def __str__(self) -> str:
        if self.level == "model":
            shown = ", ".join(f"{text} ({share:.2f})" for text, share in self.candidates[:4])
            if not self.n_candidates:
                return f"constant in {self.surroundings}"
            return f"{'constant' if self.constant else 'drawn'} by the model: {shown}"
        if self.constant:
            return f"constant in {self.surroundings!r} ({self.n_occurrences:,} occurrences)"
        shown = ", ".join(self.examples[:4]) + (", …" if len(self.examples) > 4 else "")
        where = f"by {self.level} in {self.surroundings!r}"
        return f"{self.n_candidates:,} candidates {where}: {shown}"


BLANK = Match("blank", "_", 0, 0, True, ())


@dataclass(frozen=True, slots=True)
class Candidates:
    """Weighted choices from which a draw takes one.

    Attributes:
        match: How they were found.
        choices: At least one; one text per place of the feature.
        cumulated: Cumulative weights of the choices.
    """

    match: Match
    choices: Sequence[Texts]
    cumulated: Sequence[float]

    @staticmethod
    def of(match: Match, weights: Mapping[Texts, float], original: Texts = ()) -> "Candidates":
        """Choices with weights that need not sum to one; the match records them.

        Args:
            match: How they were found.
            weights: Weight of each choice.
            original: The feature's own texts, if they may be drawn.
        """
        total = sum(weights.values())
        likely = heapq.nlargest(_TOLD, weights, key=lambda texts: weights[texts])
        shares = tuple((" … ".join(texts), weights[texts] / total) for texts in likely)
        own = 1.0 if match.constant else weights.get(original, 0.0) / total
        match = replace(match, candidates=shares, determined=own)
        return Candidates(match, list(weights), list(accumulate(weights.values())))

    @staticmethod
    def counted(
        level: str,
        surroundings: str,
        counts: Mapping[Texts, int],
        original: Texts,
        *,
        exclude_original: bool = True,
        constant: bool = False,
    ) -> "Candidates":
        """Choices weighted by their counts; the original if nothing else was found.

        Args:
            level: See `Match`.
            surroundings: See `Match`.
            counts: Number of occurrences of each, including the original.
            original: The feature's own texts.
            exclude_original: Whether these may not be drawn.
            constant: Whether these are the only choice, whatever else was found.
        """
        others = {texts: n for texts, n in counts.items() if texts != original}
        # Most frequent first; ties in alphabetical order, independent of the order of the corpus.
        ordered = dict(sorted(others.items(), key=lambda entry: (-entry[1], entry[0])))
        constant = constant or (bool(counts) and not others)
        match = Match(
            level=level,
            surroundings=surroundings,
            n_occurrences=sum(counts.values()),
            n_candidates=len(others),
            constant=constant,
            examples=tuple(map(" … ".join, list(ordered)[:_TOLD])),
        )
        if constant or not others:
            return Candidates.of(match, {original: 1.0})
        if original in counts and not exclude_original:
            ordered[original] = counts[original]
        return Candidates.of(match, ordered, original)

    def draw(self, generator: torch.Generator) -> Texts:
        """One choice at random, by weight."""
        place = bisect_right(self.cumulated, uniform(generator) * self.cumulated[-1])
        return self.choices[min(place, len(self.choices) - 1)]

    def weights(self) -> dict[Texts, float]:
        """The weight of every choice."""
        steps = torch.tensor([0.0, *self.cumulated], dtype=torch.float64, device="cpu").diff()
        return dict(zip(self.choices, steps.tolist(), strict=True))

    def probabilities(self) -> dict[Texts, float]:
        """The probability of every choice."""
        total = self.cumulated[-1]
        return {texts: weight / total for texts, weight in self.weights().items()}

    def sample(self, n: int, seed: int) -> "Candidates":
        """At most `n` different choices, drawn by weight, with their weights."""
        if len(self.choices) <= n:
            return self
        weights = self.weights()
        rates = torch.tensor(list(weights.values()), dtype=torch.float64, device="cpu")
        generator = torch.Generator().manual_seed(seed)
        # Exponential clocks with the weights as rates: a weighted sample without replacement
        # (Efraimidis & Spirakis 2006).
        clocks = (
            -torch.rand(len(rates), generator=generator, dtype=torch.float64, device="cpu").log()
            / rates
        )
        chosen = clocks.argsort()[:n].sort().values.tolist()
        return Candidates.of(
            self.match, {self.choices[i]: weights[self.choices[i]] for i in chosen}
        )

    def kept(self, fits: Callable[[Texts], bool]) -> "Candidates | None":
        """The choices that fit; None if none does."""
        weights = {texts: weight for texts, weight in self.weights().items() if fits(texts)}
        return self._with(weights) if weights else None

    def weighted(self, log_weights: Sequence[float]) -> "Candidates":
        """The same choices with other weights, given as logarithms."""
        weights = torch.tensor(log_weights, dtype=torch.float64, device="cpu").softmax(0).tolist()
        return self._with(dict(zip(self.choices, weights, strict=True)))

    def divided(self, sizes: Sequence[Sequence[int]]) -> "Candidates":
        """The same choices, each text divided among adjacent places.

        Args:
            sizes: Per text the number of atoms in each of the feature's places.
        """
        weights: dict[Texts, float] = {}
        for choice, weight in self.weights().items():
            pieces = map(divided, choice, sizes)
            texts = tuple(piece for own in pieces for piece in own)
            weights[texts] = weights.get(texts, 0.0) + weight
        return Candidates.of(self.match, weights)

    def _with(self, weights: Mapping[Texts, float]) -> "Candidates":
        likely = sorted(weights, key=lambda texts: -weights[texts])[:_TOLD]
        match = replace(
            self.match, n_candidates=len(weights), examples=tuple(map(" … ".join, likely))
        )
        return Candidates.of(self.match if self.match.constant else match, weights)


def divided(text: str, sizes: Sequence[int]) -> list[str]:
    """A text divided in proportion to sizes, by words; pieces of short texts may be empty."""
    ends = [0, *accumulate(sizes)]
    n = len(words.atoms(text))
    return [part_of(text, n * a // ends[-1], n * b // ends[-1]) for a, b in pairwise(ends)]


def part_of(text: str, start: int, stop: int) -> str:
    """The text from one atom to before another."""
    atoms = words.atoms(text)[start:stop]
    return text[atoms[0].start : atoms[-1].stop] if atoms else ""
