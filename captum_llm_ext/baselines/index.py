"""The corpus as numbers: where surroundings like a slot's occur, and the text that stands there."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_llm_ext.baselines import words
from captum_llm_ext.baselines.frames import context_classes

# How closed a border an atom is: a stand-in crosses none that is harder than those inside the
# text it stands for.
WORD, MARK, SENTENCE_END, LINE_BREAK = range(4)


_SAMPLE = 2_000_000  # atoms from which the frame words are learnt
_PIECES = 500_000  # remembered while the corpus is read
_DRAWN = 20_000  # random places looked at where surroundings play no part


class _Numbering(dict[str, int]):
    """Numbers things in the order in which they are first asked for."""

    def __missing__(self, key: str) -> int:
        self[key] = number = len(self)
        return number


class _Pieces(dict[str, tuple[int, ...]]):
    """The chunks of what stands between white spaces: most of it has been seen before."""

    def __init__(self, numbering: _Numbering) -> None:
        super().__init__()
        self._numbering = numbering

    def __missing__(self, key: str) -> tuple[int, ...]:
        if len(self) >= _PIECES:
            self.clear()
        self[key] = numbers = tuple(map(self._numbering.__getitem__, words.chunks(" " + key)))
        return numbers


@dataclass(frozen=True, slots=True)
class Spans:
    """Places of the corpus, all of shape ``(n_spans,)``: first atom and number of atoms.

    `left` and `right` tell how many atoms of the surroundings asked for stand before and after.
    """

    starts: Tensor
    lengths: Tensor
    left: Tensor
    right: Tensor

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, chosen: Tensor) -> "Spans":
        return Spans(*(part[chosen] for part in self._parts()))

    @property
    def stops(self) -> Tensor:
        """The atom after the last."""
        return self.starts + self.lengths

    def _parts(self) -> tuple[Tensor, ...]:
        return self.starts, self.lengths, self.left, self.right

    @staticmethod
    def joined(parts: Sequence["Spans"]) -> "Spans":
        """All spans of all parts."""
        return Spans(*map(torch.cat, zip(*(part._parts() for part in parts), strict=True)))


class CorpusIndex:
    """All atoms of a corpus (see `words`), each under the class that counts as context.

    Takes about 9 bytes per atom of the corpus.

    Args:
        documents: The texts; each line of each is surrounded by line breaks.

    Raises:
        ValueError: If no document holds any text.
        TypeError: If a document is not a string.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        numbering = _Numbering({words.BREAK: 0})
        numbers_of = _Pieces(numbering)
        numbers = array("i", [0])
        for position, document in enumerate(documents):
            if not isinstance(document, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"Document {position} of the corpus is a {type(document).__name__}: "
                    "give strings (of a data set, the column that holds the text)."
                )
            for line in document.splitlines():
                pieces = line.split()
                for piece in pieces:
                    numbers.extend(numbers_of[piece])
                if pieces:
                    numbers.append(0)
        if len(numbering) == 1:
            raise ValueError("The corpus holds no text: give at least one document with a word.")
        self._chunks = list(numbering)
        self._numbers = torch.frombuffer(numbers, dtype=torch.int32)
        self._classify()

    def _classify(self) -> None:
        atoms = _Numbering({words.BREAK: 0})
        # The same word with and without white space before it is one atom of the vocabulary.
        atom_of = torch.tensor([atoms[c.strip() or words.BREAK] for c in self._chunks])
        kinds = [words.kind(atom) for atom in atoms]
        kind_ids = torch.tensor([_kind_number(kind) for kind in kinds])
        borders = torch.tensor([border(atom) for atom in atoms], dtype=torch.uint8)
        sample = atom_of[self._numbers[:_SAMPLE].long()]
        classes = context_classes(sample, kind_ids, borders > WORD, line_break=0)
        self._atoms, self._atom_of = dict(atoms), atom_of
        self._class_of = dict(zip(atoms, classes.tolist(), strict=True))
        self._joined = {number for number, n in Counter(classes.tolist()).items() if n > 1}
        # By way of the chunks: scans read one small number per atom of the corpus.
        numbers = self._numbers
        self._classes = classes.to(torch.int32)[atom_of].index_select(0, numbers)
        self._kinds = kind_ids.to(torch.uint8)[atom_of].index_select(0, numbers)
        self._borders = borders[atom_of].index_select(0, numbers)
        counts = torch.bincount(self._classes, minlength=int(classes.max()) + 1)
        self._bits = -(counts.double().clamp(min=1) / len(numbers)).log2()

    def __len__(self) -> int:
        return len(self._numbers)

    def context(self, atoms: Iterable[str]) -> list[int]:
        """The classes of atoms; words the corpus does not have count as their kind."""
        return [self._class_of.get(atom, self._unknown(atom)) for atom in atoms]

    def _unknown(self, atom: str) -> int:
        return -1 if border(atom) > WORD else _kind_number(words.kind(atom))

    def is_frame(self, context_class: int) -> bool:
        """Whether a class tells more than what kind of word stands there."""
        return context_class >= len(words.KINDS)

    def is_lone_frame(self, context_class: int) -> bool:
        """Whether a class is that of one word or mark of the frame."""
        return self.is_frame(context_class) and context_class not in self._joined

    def bits(self, context_class: int) -> float:
        """How surprising the class is, in bits."""
        return float(self._bits[context_class]) if context_class >= 0 else 0.0

    def texts(self, spans: Spans) -> Counter[str]:
        """How often each text stands in the spans, the white space before it left out."""
        found: Counter[str] = Counter()
        for length in spans.lengths.unique().tolist():
            starts = spans.starts[spans.lengths == length]
            rows = self._numbers[starts[:, None] + torch.arange(length)]
            # The flat form is much the faster, and most spans are one word.
            rows = rows if length > 1 else rows[:, 0]
            rows, counts = rows.unique(dim=0 if length > 1 else None, return_counts=True)
            rows = rows.view(-1, length)
            for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
                text = "".join(self._chunks[number] for number in row)
                found[text.strip().replace("\n ", "\n")] += count
        return found

    def between(
        self, left: Sequence[int], right: Sequence[int], lengths: range, hardest: int
    ) -> Spans:
        """Spans after `left[0]` and before `right[0]`.

        Args:
            left: Classes before the span, the nearest first, at least one.
            right: Classes after the span, the nearest first, at least one.
            lengths: How many atoms the span may have.
            hardest: The hardest border inside the span.
        """
        starts, before = self._matched(left, forward=False)
        stops, after = self._matched(right, forward=True)
        depth = torch.zeros(len(self) + 1, dtype=torch.int8).index_put((stops,), after)
        found: list[Spans] = []
        for length, (begin, chosen) in self._grown(starts, lengths, hardest):
            ends = depth[begin + length]
            hit = ends > 0
            found.append(
                Spans(
                    begin[hit], torch.full_like(begin[hit], length), before[chosen][hit], ends[hit]
                )
            )
        return Spans.joined(found) if found else NO_SPANS

    def beside(self, side: str, context: Sequence[int], length: int, hardest: int) -> Spans:
        """Spans of one length after (`side` is ``"left"``) or before (``"right"``) a context."""
        places, depth = self._matched(context, forward=side == "right")
        starts = places if side == "left" else places - length
        depth, starts = depth[starts > 0], starts[starts > 0]
        for _, (begin, chosen) in self._grown(starts, range(length, length + 1), hardest):
            none = torch.zeros_like(depth[chosen])
            sides = (depth[chosen], none) if side == "left" else (none, depth[chosen])
            return Spans(begin, torch.full_like(begin, length), *sides)
        return NO_SPANS

    def shaped(self, shape: Sequence[str]) -> Spans:
        """Spans with one kind of word, or one punctuation mark, at each atom."""
        last = len(self) - len(shape)
        same = torch.ones(max(last, 0), dtype=torch.bool)
        for offset, wanted in enumerate(shape):
            here = slice(offset, max(last, 0) + offset)
            if wanted in words.KINDS:
                same &= self._kinds[here] == words.KINDS.index(wanted)
                same &= self._borders[here] == WORD
            else:
                same &= self._classes[here] == self._class_of.get(wanted, -1)
        return _placed(same.nonzero()[:, 0], len(shape))

    def anywhere(self, lengths: range, hardest: int, generator: torch.Generator) -> Spans:
        """Spans at random places, each of a random length, that begin and end with a word."""
        starts = torch.randint(len(self), (_DRAWN,), generator=generator)
        starts = starts[self._borders[starts] == WORD]
        wanted = torch.randint(lengths.start, lengths.stop, (len(starts),), generator=generator)
        found = [NO_SPANS]
        for length, (begin, chosen) in self._grown(starts, lengths, hardest):
            begin = begin[wanted[chosen] == length]
            found.append(_placed(begin[self._borders[begin + length - 1] == WORD], length))
        return Spans.joined(found)

    def sentences(self, lengths: range, hardest: int) -> Spans:
        """Spans that begin after, and end before, the end of a sentence or line."""
        starts = (self._borders >= SENTENCE_END).nonzero()[:, 0] + 1
        found = [NO_SPANS]
        for length, (begin, _) in self._grown(starts, lengths, hardest):
            found.append(_placed(begin[self._borders[begin + length] >= SENTENCE_END], length))
        return Spans.joined(found)

    def kinds_at(self, places: Tensor) -> Tensor:
        """The kind of the words there, as its place in `words.KINDS`."""
        return self._kinds[places]

    def framed_at(self, places: Tensor) -> Tensor:
        """Whether the atoms there are of the frame."""
        return self._classes[places] >= len(words.KINDS)

    def is_atom(self, places: Tensor, atom: str) -> Tensor:
        """Whether exactly this atom stands there."""
        return self._atom_of[self._numbers[places].long()] == self._atoms.get(atom, -1)

    def _matched(self, context: Sequence[int], *, forward: bool) -> tuple[Tensor, Tensor]:
        """Borders next to which the nearest atom fits, and how many atoms in a row fit there."""
        step = 1 if forward else -1
        at = (self._classes == context[0]).nonzero()[:, 0]
        borders = at if forward else at + 1
        depth = torch.ones(len(at), dtype=torch.int8)
        row = torch.arange(len(at))
        for offset, wanted in enumerate(context[1:], start=1):
            here = at[row] + step * offset
            inside = (here >= 0) & (here < len(self))
            row, here = row[inside], here[inside]
            row = row[self._classes[here] == wanted]
            depth[row] += 1
        return borders, depth

    def _grown(
        self, starts: Tensor, lengths: range, hardest: int
    ) -> Iterable[tuple[int, tuple[Tensor, Tensor]]]:
        """Per length, the starts from which so many atoms cross no harder border."""
        chosen = torch.arange(len(starts))
        for length in range(1, lengths.stop):
            here = starts[chosen] + length - 1
            inside = here < len(self) - 1
            chosen, here = chosen[inside], here[inside]
            chosen = chosen[self._borders[here] <= hardest]
            if length in lengths:
                yield length, (starts[chosen], chosen)


def border(atom: str) -> int:
    """How hard a border an atom is: `WORD` is none, `LINE_BREAK` the hardest."""
    if atom == words.BREAK:
        return LINE_BREAK
    if atom in words.SENTENCE_ENDS:
        return SENTENCE_END
    return MARK if atom in words.CLAUSE_MARKS else WORD


def _kind_number(kind: str) -> int:
    return words.KINDS.index(kind if kind in words.KINDS else "symbol")


def _placed(starts: Tensor, length: int) -> Spans:
    unmatched = torch.zeros_like(starts, dtype=torch.int8)
    return Spans(starts, torch.full_like(starts, length), unmatched, unmatched)


NO_SPANS = _placed(torch.zeros(0, dtype=torch.int64), 0)
