"""The phrase that a word is a part of: what stands where other texts have something else."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from captum_llm_ext.text.baselines import words
from captum_llm_ext.text.baselines.candidates import part_of
from captum_llm_ext.text.baselines.corpus.index import CorpusIndex
from captum_llm_ext.text.baselines.surroundings import Surroundings
from captum_llm_ext.text.baselines.words import SENTENCE_END, WORD, border

_LONGEST = 4  # words of a phrase that has words of the frame inside
# Where so many of the texts without a word go on with it elsewhere, it is of an addition.
_ADDED = 0.5


def phrases(place: Surroundings, index: CorpusIndex) -> list[tuple[int, int]]:
    """What may be the phrase of a feature: how many atoms before it and after, the shortest first.

    A phrase begins and ends next to a word of the frame, and may have some inside ("Gulf of
    Oman"). It crosses no punctuation and is no whole sentence.
    """
    lefts, rights = (list(_ends(side, index)) for side in (place.left, place.right))
    most = _LONGEST - len(place.atoms)
    found = [
        (n, m)
        for n, m in product(lefts, rights)
        # Without words of the frame inside a phrase may be as long as it likes.
        if n + m <= most or (n, m) == (lefts[0], rights[0])
    ]
    found = [
        (n, m)
        for n, m in found
        if n + m > 0 and not (_is_end(place.left, n) and _is_end(place.right, m))
    ]
    return sorted(found, key=lambda ends: (sum(ends), ends[0]))


def _ends(atoms: Sequence[str], index: CorpusIndex) -> Iterator[int]:
    """After how many of the nearest atoms on one side a phrase may end."""
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
    """What phrases have in place of a word of one of them.

    Args:
        texts: What stands in place of the phrase, and how often.
        own: The word, as atoms.
        n_left: How many atoms the phrase has before it.
        n_right: How many after it.

    Returns:
        The parts of phrases that do not have the word, in proportion to their lengths, and how
        often they stand there. None if these are what stands beside the word where it is: "KS" is
        no other "KS with a".
    """
    n, n_all = len(own), n_left + len(own) + n_right
    beside: set[str] = set()
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
            beside.update(" ".join(atoms[:stop]) for stop in range(1, at + 1))
            beside.update(" ".join(atoms[start:]) for start in range(at + n, len(atoms)))
    added = sum(others[text] for text in beside)
    return None if added and added >= _ADDED * others.total() else found
