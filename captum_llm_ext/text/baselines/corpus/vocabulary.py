"""The distinct words of a corpus as tensors: a few dozen bytes each."""

import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, islice
from typing import Any, cast

import torch
from torch import Tensor

from captum_llm_ext.text.baselines import words

# Words in Python dictionaries at a time, about 150 bytes each; chosen, not measured.
_REMEMBERED = 1_000_000
_PART = 1 << 20  # words moved at a time; chosen, not measured


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Words and their indices, in both directions.

    Attributes:
        characters: All words in UTF-8, one after the other, uint8.
        ends: End of each word in `characters`, shape ``(n_words + 1,)``, int64; the first is 0.
        digests: Digests of all words in ascending order, shape ``(n_words,)``, int64.
        numbers: Word index of each digest, shape ``(n_words,)``, int32.
        kinds: The kind of each word, as its index in `words.KINDS`, shape ``(n_words,)``, uint8.
        borders: Strength of each word as a border, shape ``(n_words,)``, uint8.
    """

    characters: Tensor
    ends: Tensor
    digests: Tensor
    numbers: Tensor
    kinds: Tensor
    borders: Tensor

    def __len__(self) -> int:
        return len(self.kinds)

    def number(self, word: str) -> int:
        """The index of a word, -1 if unknown."""
        digest = int.from_bytes(_digest(_encoded(word)), sys.byteorder, signed=True)
        at = int(torch.searchsorted(self.digests, digest))
        if at == len(self) or int(self.digests[at]) != digest:
            return -1
        return int(self.numbers[at])

    def words(self, numbers: Tensor) -> list[str]:
        """The words of these indices."""
        characters = memoryview(cast(Any, self.characters.numpy()))
        starts, stops = self.ends[numbers].tolist(), self.ends[numbers + 1].tolist()
        return [
            str(characters[start:stop], "utf-8", "surrogatepass")
            for start, stop in zip(starts, stops, strict=True)
        ]


class Numbering(dict[str, int]):
    """Numbers words in order of first use.

    If there are more words than fit into a dictionary, those that recur after it was full get a
    second number; `vocabulary` merges the numbers of equal words.

    Args:
        first: Words to number before all others.
        remembered: Capacity of the dictionary.
    """

    def __init__(self, first: Iterable[str], remembered: int = _REMEMBERED) -> None:
        super().__init__()
        self._remembered = remembered
        self._forgotten = 0
        self._characters = bytearray()
        self._ends = array("q", [0])
        self._digests, self._kinds, self._borders = bytearray(), bytearray(), bytearray()
        for word in first:
            self[word]

    def __missing__(self, word: str) -> int:
        if len(self) >= self._remembered:
            self._forget()
        number = self[word] = self._forgotten + len(self)
        return number

    def _forget(self) -> None:
        raw = [*map(_encoded, self)]
        self._ends.extend(islice(accumulate(map(len, raw), initial=self._ends[-1]), 1, None))
        self._characters += b"".join(raw)
        self._digests += b"".join(map(_digest, raw))
        self._kinds += bytes(map(words.kind_number, self))
        self._borders += bytes(map(words.border, self))
        self._forgotten += len(self)
        self.clear()

    def vocabulary(self) -> tuple[Vocabulary, Tensor | None]:
        """All words, and the word index of each number; None if they are equal."""
        self._forget()
        characters = torch.frombuffer(self._characters, dtype=torch.uint8)
        ends = torch.frombuffer(self._ends, dtype=torch.int64)
        kinds = torch.frombuffer(self._kinds, dtype=torch.uint8)
        borders = torch.frombuffer(self._borders, dtype=torch.uint8)
        digests, numbers = torch.frombuffer(self._digests, dtype=torch.int64).sort(stable=True)
        first = torch.ones(len(digests), dtype=torch.bool, device="cpu")
        first[1:] = digests[1:] != digests[:-1]
        if bool(first.all()):
            return Vocabulary(characters, ends, digests, numbers.int(), kinds, borders), None
        # The sort is stable: of equal digests the word's first number comes first.
        kept = torch.zeros(len(digests), dtype=torch.bool, device="cpu")
        kept[numbers[first]] = True
        renumbered = kept.cumsum(0, dtype=torch.int32) - 1
        owner = renumbered[numbers[first]]
        same = torch.empty_like(renumbered)
        same[numbers] = owner[first.cumsum(0) - 1]
        characters, ends = _kept(characters, ends, kept)
        return Vocabulary(characters, ends, digests[first], owner, kinds[kept], borders[kept]), same


def _kept(characters: Tensor, ends: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The characters of some of the words, and their ends."""
    lengths = ends.diff()
    parts: list[Tensor] = []
    for start in range(0, len(kept), _PART):
        stop = min(start + _PART, len(kept))
        inside = kept[start:stop].repeat_interleave(lengths[start:stop])
        parts.append(characters[ends[start] : ends[stop]][inside])
    ends = torch.zeros(int(kept.sum()) + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(lengths[kept], 0, out=ends[1:])
    return torch.cat(parts), ends


def _encoded(word: str) -> bytes:
    # Python's strings may contain lone surrogates.
    return word.encode("utf-8", "surrogatepass")


def _digest(raw: bytes) -> bytes:
    # Equal digests are taken for equal words: among ten million, the probability of an error is 1
    # in 300,000.
    return blake2b(raw, digest_size=8).digest()
