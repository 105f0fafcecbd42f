"""Similarity of a text to the answer, from 0 to 1."""

import re
from collections.abc import Callable, Mapping
from difflib import SequenceMatcher

Similar = Callable[[str, str], float]
# Length of character n-grams: trigrams, as usual for words with endings.
_LETTERS = 3


def lexical(text: str, answer: str) -> float:
    """Mean overlap of the words of two texts, and of their character trigrams.

    Trigrams recognise related words (plurals, compounds) and, unlike common characters in any
    order, rarely match unrelated ones.
    """
    return (token_f1(text, answer) + _f1(_runs(text), _runs(answer))) / 2


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of the shares of common words, 0 to 1."""
    return _f1(_words(text), _words(answer))


def in_order(text: str, answer: str) -> float:
    """Share of common characters in order, as found by `difflib`."""
    return SequenceMatcher(None, text.strip(), answer.strip(), autojunk=False).ratio()


SIMILAR: Mapping[str, Similar] = {"lexical": lexical, "f1": token_f1, "difflib": in_order}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _runs(text: str) -> list[str]:
    padded = f"  {' '.join(text.lower().split())} "  # beginnings of words count, and short texts
    return [padded[i : i + _LETTERS] for i in range(len(padded) - _LETTERS + 1)]


def _f1(one: list[str], other: list[str]) -> float:
    left = list(other)
    n = 0
    for part in one:
        if part in left:
            left.remove(part)
            n += 1
    return 2 * n / (len(one) + len(other)) if one or other else 1.0
