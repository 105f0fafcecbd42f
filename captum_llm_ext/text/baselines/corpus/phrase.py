"""The phrase of a word: the part of a text that other texts replace as a whole."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from captum_llm_ext.text.baselines import words
from captum_llm_ext.text.baselines.candidates import part_of
from captum_llm_ext.text.baselines.corpus.index import CorpusIndex
from captum_llm_ext.text.baselines.surroundings import Surroundings
from captum_llm_ext.text.baselines.words import SENTENCE_END, WORD, border

# Words of a phrase that contains template words. With 2, right draws of connecting words rise from
# .867 to .956 in one of three invented languages, whose phrases are short, but names such as "Isle
# of Wight" are no phrases then; with 8, none differs.
_LONGEST = 4
# If at least this share of the texts without a word also occur next to it, the word is an addition
# to them. With .25 or .99, shares of right draws in three invented languages are the same.
_ADDED = 0.5


def phrases(place: Surroundings, index: CorpusIndex) -> list[tuple[int, int]]:
    """Possible phrases of a feature: numbers of atoms before and after it, the shortest first.

    A phrase begins and ends next to a template word, and may contain some ("Gulf of Oman"). It
    crosses no punctuation and is not a whole sentence.
    """
    lefts, rights = (list(_ends(side, index)) for side in (place.left, place.right))
    most = _LONGEST - len(place.atoms)
    found = [
        (n, m)
        for n, m in product(lefts, rights)
        # Without template words inside, a phrase may have any length.
        if n + m <= most or (n, m) == (lefts[0], rights[0])
    ]
    found = [
        (n, m)
        for n, m in found
        if n + m > 0 and not (_is_end(place.left, n) and _is_end(place.right, m))
    ]
    return sorted(found, key=lambda ends: (sum(ends), ends[0]))


def _ends(atoms: Sequence[str], index: CorpusIndex) -> Iterator[int]:
    """Numbers of the nearest atoms on one side after which a phrase may end."""
    for n, number in enumerate(index.context(atoms)):
        if index.is_template_word(number) or border(atoms[n]) > WORD:
            yield n
        if border(atoms[n]) > WORD:
            return
    yield len(atoms)


def _is_end(atoms: Sequence[str], n: int) -> bool:
    return n == len(atoms) or border(atoms[n]) >= SENTENCE_END


def parts(
    texts: Mapping[str, int], own: Sequence[str], n_left: int, n_right: int
) -> Counter[str] | None:
    """The parts of other phrases that correspond to a word of one phrase.

    Args:
        texts: Texts in place of the phrase, with counts.
        own: The word, as atoms.
        n_left: Number of atoms of the phrase before it.
        n_right: Number of atoms after it.

    Returns:
        The parts of phrases without the word, in proportion to their lengths, with counts. None if
        these occur beside the word itself: "KS" is not an alternative to "KS with a".
    """
    n, n_all = len(own), n_left + len(own) + n_right
    adjacent: set[str] = set()
    others: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for text, count in texts.items():
        atoms = [atom.text for atom in words.atoms(text)]
        at = next((i for i in range(len(atoms)) if atoms[i : i + n] == [*own]), None)
        if at is None:
            start = n_left * len(atoms) // n_all
            stop = max(-(-(n_left + n) * len(atoms) // n_all), start + 1)
            found[part_of(text, start, stop)] += count
            others[" ".join(atoms)] += count
        else:
            adjacent.update(" ".join(atoms[:stop]) for stop in range(1, at + 1))
            adjacent.update(" ".join(atoms[start:]) for start in range(at + n, len(atoms)))
    added = sum(others[text] for text in adjacent)
    return None if added and added >= _ADDED * others.total() else found
