"""What a language model would have written at each word of a text, all of it from one pass."""

import math
from collections.abc import Sequence

from captum_llm_ext.baselines import words
from captum_llm_ext.baselines.slot import LanguageModel

Span = tuple[int, int]
Word = tuple[str, float]
# More likely than not after the word before it: below, a word is free, and is redrawn by itself.
# Lower, "York" of "New York" stays bound where a text speaks of New Jersey as often.
_DETERMINED = 0.5
# Other first words of the phrase leave less than this share of that probability. On sentences of
# real text the share is either below .1 (names, fixed expressions) or above .4 (grammar).
_LEFT_OVER = 0.2
_LONGEST = 4  # words of a phrase
_TO_THE_END = 2  # tokens in which a word that was begun ends


def _looks_like(word: str, kind: str) -> bool:
    """Whether a token may begin a word of a kind (see `words.kind`), and holds nothing else."""
    return words.kind(word) == kind and all(c.isalnum() or c in "-'’" for c in word)


class Alternatives:
    """The words that might have stood in the places of a text, given what comes before each.

    Args:
        text: The text.
        model: Is asked once for all places.
        n: Words that are tried in every place, beside the one that stands there.
    """

    def __init__(self, text: str, model: LanguageModel, n: int) -> None:
        self._text, self._model, self._n = text, model, n
        self._atoms = words.atoms(text)
        worded = [i for i, atom in enumerate(self._atoms) if not words.is_mark(atom.text)]
        kinds = [words.kind(self._atoms[i].text) for i in worded]
        listed = model.likeliest(
            text,
            [self._atoms[i].start for i in worded],
            n,
            lambda number, piece: _looks_like(piece, kinds[number]),
        )
        self._listed = dict(zip(worded, listed, strict=True))
        self._at_start = {self._atoms[i].start: own for i, own in self._listed.items()}
        self._whole: dict[int, list[str]] = {}

    def at(self, start: int, kind: str) -> list[Word]:
        """What may stand in a place, with log-probabilities in nats.

        Args:
            start: The place's first character.
            kind: Of the word that stands there (see `words.kind`): others are of its kind.

        Returns:
            Beginnings of words, first that of what stands there; empty where nothing comes before.
        """
        if start not in self._at_start:  # within a word, or punctuation
            (self._at_start[start],) = self._model.likeliest(
                self._text, [start], self._n, lambda _, piece: _looks_like(piece, kind)
            )
        return self._at_start[start]

    def whole(self, start: int) -> list[str]:
        """The words that the beginnings in a place are, each ended as is most likely.

        Args:
            start: A place that `at` was asked for.
        """
        if start not in self._whole:
            # All that have not been asked for, at once: what comes before them is read once.
            starts = [place for place in self._at_start if place not in self._whole]
            pieces = [[piece for piece, _ in self._at_start[place]] for place in starts]
            written = iter(
                self._model.greedy(
                    [
                        self._text[:place] + piece
                        for place, own in zip(starts, pieces, strict=True)
                        for piece in own
                    ],
                    _TO_THE_END,
                )
            )
            for place, own in zip(starts, pieces, strict=True):
                ended = [piece + next(written) for piece in own]
                self._whole[place] = [text[: words.atoms(text)[0].stop] for text in ended]
        return self._whole[start]

    def phrases(self) -> list[Span]:
        """Stretches of several words of which the first decides the others.

        A word is bound to the phrase before it if it is determined by it (more likely than not) and
        would not be if the phrase began with another word: what grammar determines comes after
        other words as well.

        Returns:
            Spans of characters, in reading order.
        """
        found: list[Span] = []
        first = 0
        while first < len(self._atoms):
            stop = first + 1
            # What is itself determined begins no phrase.
            if 0 < _probability(self._listed.get(first)) < _DETERMINED:
                while (
                    stop < first + _LONGEST
                    and _probability(self._listed.get(stop)) > _DETERMINED
                    and self._is_bound(first, stop)
                ):
                    stop += 1
            if stop > first + 1:
                found.append((self._atoms[first].start, self._atoms[stop - 1].stop))
            first = stop
        return found

    def _is_bound(self, first: int, at: int) -> bool:
        """Whether a word would hardly come if the phrase before it began otherwise."""
        (_, own), *others = self._listed[first]
        if not others:
            return False
        left = self._text[: self._atoms[first].start]
        word = self._text[self._atoms[at - 1].stop : self._atoms[at].stop]
        after = self._model.log_probs_after([left + piece for piece, _ in others], word)
        weights = [math.exp(log_prob) for log_prob in (own, *(value for _, value in others))]
        chances = [_probability(self._listed[at]), *after.exp().tolist()]
        mean = sum(w * p for w, p in zip(weights, chances, strict=True)) / sum(weights)
        return mean < _LEFT_OVER * chances[0]


def _probability(alternatives: Sequence[Word] | None) -> float:
    """Of what stands there; 0 where there is no word."""
    return math.exp(alternatives[0][1]) if alternatives else 0.0
