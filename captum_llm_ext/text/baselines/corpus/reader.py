"""Reads a corpus once, in order, into numbers."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from re import compile as pattern

import torch
from torch import Tensor

from captum_llm_ext.text.baselines import words
from captum_llm_ext.text.baselines.corpus.vocabulary import Numbering, Vocabulary

_PIECES = 500_000  # pieces cached while the corpus is read; chosen, not measured
_SHORT = 24  # characters of a piece that is cached; chosen, not measured
_LONG = 1 << 20  # characters of a line that is not split all at once; chosen, not measured
_BLOCK = 1 << 22  # atoms renumbered at a time; chosen, not measured
_MOST = 2**31 - 1  # positions are stored as int32

_PIECE = pattern(r"\S+")


@dataclass(frozen=True, eq=False)
class Atoms:
    """All atoms of a corpus; each line begins after, and ends before, a line break.

    Attributes:
        numbers: Twice the index of each atom's word, plus one if white space precedes it. Shape
            ``(n_atoms,)``, int32.
        documents: The first atom of each document, shape ``(n_documents,)``, int64.
        vocabulary: The words; `words.BREAK` has index 0.
    """

    numbers: Tensor
    documents: Tensor
    vocabulary: Vocabulary


class _Pieces(dict[str, "array[int]"]):
    """The atoms of white-space-separated pieces, cached since most repeat."""

    def __init__(self, numbering: Numbering) -> None:
        super().__init__()
        self._numbering = numbering

    def __missing__(self, piece: str) -> "array[int]":
        numbering = self._numbering
        numbers = array("i", (2 * numbering[chunk] for chunk in words.chunks(piece)))
        numbers[0] += 1
        if len(piece) <= _SHORT:
            if len(self) >= _PIECES:
                self.clear()
            self[piece] = numbers
        return numbers


def read(documents: Iterable[str]) -> Atoms:
    """Reads each document once, in order.

    Raises:
        ValueError: If no document contains any text, or there are more than 2³¹ atoms.
        TypeError: If a document is not a string.
    """
    numbering = Numbering([words.BREAK])
    numbers_of = _Pieces(numbering)
    numbers, starts = array("i", [0]), array("q")
    for position, document in enumerate(documents):
        if not isinstance(document, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"Document {position} of the corpus is a {type(document).__name__}: "
                "give strings (of a data set, the column that holds the text)."
            )
        starts.append(len(numbers))
        for line in document.splitlines():
            before = len(numbers)
            for piece in _pieces(line):
                numbers.extend(numbers_of[piece])
            if len(numbers) > before:
                numbers.append(0)
        if len(numbers) > _MOST:
            raise ValueError(f"The corpus has more than {_MOST:,} words: give a part of it.")
    if len(numbers) == 1:
        raise ValueError("The corpus holds no text: give at least one document with a word.")
    vocabulary, same = numbering.vocabulary()
    found = torch.frombuffer(numbers, dtype=torch.int32)
    if same is not None:
        for block in found.split(_BLOCK):
            block.copy_(2 * same.index_select(0, block >> 1) + (block & 1))
    return Atoms(found, torch.frombuffer(starts, dtype=torch.int64), vocabulary)


def _pieces(line: str) -> Iterable[str]:
    # A whole corpus may be one line.
    return line.split() if len(line) <= _LONG else _found(line)


def _found(line: str) -> Iterator[str]:
    return (match.group() for match in _PIECE.finditer(line))
