"""Words that belong together in the eyes of a language model: "Salt Lake", "doctor of medicine"."""

import math
from collections.abc import Sequence

from captum_llm_ext.baselines import words
from captum_llm_ext.baselines.slot import LanguageModel
from captum_llm_ext.baselines.words import Atom

Span = tuple[int, int]
Word = tuple[str, float]
# More likely than not after the word before it: below, a word is free, and is redrawn by itself.
# Lower, "York" of "New York" stays bound where a text speaks of New Jersey as often.
_DETERMINED = 0.5
# Other first words of the phrase leave less than this share of that probability. On sentences of
# real text the share is either below .1 (names, fixed expressions) or above .4 (grammar).
_LEFT_OVER = 0.2
_LONGEST = 4  # words of a phrase


def looks_like(word: str, kind: str) -> bool:
    """Whether a token may begin a word of a kind (see `words.kind`), and holds nothing else."""
    return words.kind(word) == kind and all(c.isalnum() or c in "-'’" for c in word)


def bound_words(text: str, model: LanguageModel, n_candidates: int) -> list[Span]:
    """Stretches of several words of which the first decides the others.

    A word is bound to the phrase before it if it is determined by it (more likely than not) and
    would not be if the phrase began with another word: what grammar determines comes after other
    words as well. All of it is read off what comes *before*, as the model itself reads.

    Args:
        text: The text.
        model: The model.
        n_candidates: Other first words that are tried for each.

    Returns:
        Spans of characters, in reading order.
    """
    atoms = words.atoms(text)
    at = [i for i, atom in enumerate(atoms) if not words.is_mark(atom.text)]
    kinds = [words.kind(atoms[i].text) for i in at]
    listed = model.likeliest(
        text,
        [atoms[i].start for i in at],
        n_candidates,
        lambda number, piece: looks_like(piece, kinds[number]),
    )
    alternatives = dict(zip(at, listed, strict=True))
    found: list[Span] = []
    first = 0
    while first < len(atoms):
        stop = first + 1
        head = alternatives.get(first)
        if head and head[0][1] < math.log(_DETERMINED):
            while (
                stop < first + _LONGEST
                and _probability(alternatives.get(stop)) > _DETERMINED
                and _is_bound(text, atoms, first, stop, head, alternatives[stop][0][1], model)
            ):
                stop += 1
        if stop > first + 1:
            found.append((atoms[first].start, atoms[stop - 1].stop))
        first = stop
    return found


def _probability(alternatives: Sequence[Word] | None) -> float:
    """Of what stands there; 0 where there is no word."""
    return math.exp(alternatives[0][1]) if alternatives else 0.0


def _is_bound(
    text: str,
    atoms: Sequence[Atom],
    first: int,
    at: int,
    head: Sequence[Word],
    own: float,
    model: LanguageModel,
) -> bool:
    """Whether a word would hardly come if the phrase before it began otherwise."""
    others = [piece for piece, _ in head[1:]]
    if not others:
        return False
    left = text[: atoms[first].start]
    word = text[atoms[at - 1].stop : atoms[at].stop]
    after = model.log_probs_after([left + piece for piece in others], word).exp().tolist()
    weights = [math.exp(log_prob) for _, log_prob in head]
    chances = [math.exp(own), *after]
    mean = sum(w * p for w, p in zip(weights, chances, strict=True)) / sum(weights)
    return mean < _LEFT_OVER * chances[0]
