"""A corpus index: finds the occurrences of surroundings, and the text within them."""

import functools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from captum_llm_ext.text.baselines import words
from captum_llm_ext.text.baselines.corpus import index_file as store
from captum_llm_ext.text.baselines.corpus.postings import Postings
from captum_llm_ext.text.baselines.corpus.reader import Atoms, read
from captum_llm_ext.text.baselines.corpus.template_words import context_classes
from captum_llm_ext.text.baselines.corpus.vocabulary import Vocabulary
from captum_llm_ext.text.baselines.words import SENTENCE_END, WORD

P = ParamSpec("P")
T = TypeVar("T")

_SAMPLE = 2_000_000  # atoms from which template words are learnt; chosen, not measured
_LONG = 300  # atoms of a document that is split into passages; chosen, not measured
_STRETCHES = 20  # parts of the corpus that make up the sample; chosen, not measured
# Maximum number of atoms per element of surroundings, on average; chosen, not measured.
_STRETCH = 2
_LOOKED = 20_000  # maximum number of places examined per search; chosen, not measured
_STEPS = 400_000  # maximum number of places times lengths; chosen, not measured
_SPELLED = 500_000  # maximum number of atoms in the spans found; chosen, not measured

_N_KINDS = len(words.KINDS)


@dataclass(frozen=True, slots=True)
class Spans:
    """Places of the corpus, all of shape ``(n_spans,)``: first atom and number of atoms.

    `left` and `right` are the numbers of atoms of the surroundings that match before and after.
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
        """One past the last atom."""
        return self.starts + self.lengths

    def _parts(self) -> tuple[Tensor, ...]:
        return self.starts, self.lengths, self.left, self.right

    @staticmethod
    def joined(parts: Sequence["Spans"]) -> "Spans":
        """All spans of all parts."""
        if not parts:
            return NO_SPANS
        return Spans(*map(torch.cat, zip(*(part._parts() for part in parts), strict=True)))

    def distinct(self) -> "Spans":
        """Each span once."""
        keys = self.starts * (int(self.lengths.max()) + 1 if len(self) else 1) + self.lengths
        ordered, order = keys.sort(stable=True)
        first = torch.ones(len(order), dtype=torch.bool, device="cpu")
        first[1:] = ordered[1:] != ordered[:-1]
        return self[order[first]]

    def thinned(self, most: int, generator: torch.Generator) -> "Spans":
        """All spans, or a random sample with about `most` atoms in total."""
        total = int(self.lengths.sum())
        if total <= most:
            return self
        return self[
            torch.rand(len(self), generator=generator, dtype=torch.float32, device="cpu")
            < most / total
        ]


def _of_an_unchanged_file(method: Callable[P, T]) -> Callable[P, T]:
    """Makes a method fail if the index's mapped file was changed meanwhile."""

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        file = cast("CorpusIndex", args[0]).mapped
        if file is None:
            return method(*args, **kwargs)
        file.check()
        found = method(*args, **kwargs)
        file.check()
        return found

    return checked


class CorpusIndex:
    """All atoms of a corpus (see `words`), each with its context class.

    Takes 8 bytes per atom of the corpus and about 40 per distinct word, and reads the documents
    once, in order. A search examines at most a few times 20,000 places: if the rarest element of
    the surroundings is more frequent, a sample of its occurrences, drawn evenly from all parts of
    the corpus.

    Args:
        documents: The texts; each line of each is surrounded by line breaks.

    Attributes:
        mapped: The memory-mapped file; None if the index is in memory.

    Raises:
        ValueError: If no document contains any text, or there are 2³¹ atoms or more.
        TypeError: If a document is not a string.
    """

    mapped: store.MappedFile | None = None

    def __init__(self, documents: Iterable[str]) -> None:
        atoms = read(documents)
        classes = _classes(atoms)
        postings = Postings.of(
            lambda start, stop: classes.index_select(0, atoms.numbers[start:stop] >> 1),
            len(atoms.numbers),
            int(classes.max()) + 1,
        )
        self._hold(atoms, classes, postings)

    def _hold(self, atoms: Atoms, classes: Tensor, postings: Postings) -> None:
        self._atoms, self._classes, self._postings = atoms, classes, postings
        self._numbers, self._vocabulary = atoms.numbers, atoms.vocabulary
        self._bits = -(postings.counts.double().clamp(min=1) / len(self)).log2()
        self._members = torch.bincount(classes)

    @_of_an_unchanged_file
    def __getstate__(self) -> dict[str, Any]:
        # Caches are recomputed; a pickled index is no longer mapped to the file.
        left = ("_classes_of_kind", "mapped")
        return {k: v for k, v in self.__dict__.items() if k not in left}

    def __copy__(self) -> "CorpusIndex":
        return self  # immutable

    @_of_an_unchanged_file
    def save(self, path: str | os.PathLike[str], extra: Mapping[str, str] | None = None) -> None:
        """Writes the index to one file.

        Args:
            path: The file; an existing one is replaced atomically.
            extra: Further content.
        """
        tensors = {
            "numbers": self._numbers,
            "documents": self._atoms.documents,
            "classes": self._classes,
            **{f"vocabulary.{name}": t for name, t in vars(self._vocabulary).items()},
            **{f"postings.{name}": t for name, t in vars(self._postings).items()},
        }
        store.save(path, tensors, extra or {})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple["CorpusIndex", dict[str, str]]:
        """Loads an index written by `save`, and the file's further content.

        The file is read once to verify its digest, and memory-mapped: all processes that map it
        share its pages. Replacing the file has no effect; if it is modified, every later use of the
        index raises a `ValueError`.

        Raises:
            OSError: If there is no such file, or it cannot be read.
            ValueError: If the file is not a saved index, damaged, or of another version.
        """
        tensors, extra, mapped = store.load(path)
        try:
            vocabulary = Vocabulary(**_part(tensors, "vocabulary."))
            atoms = Atoms(tensors["numbers"], tensors["documents"], vocabulary)
            index = cls.__new__(cls)
            index._hold(atoms, tensors["classes"], Postings(**_part(tensors, "postings.")))
        except (*store.BROKEN, RuntimeError) as error:
            raise store.broken(path, error) from error
        index.mapped = mapped
        return index, extra

    def __len__(self) -> int:
        return len(self._numbers)

    @_of_an_unchanged_file
    def context(self, atoms: Iterable[str]) -> list[int]:
        """The context classes of atoms; unknown words count as their kind."""
        return [self._class(atom, self._unknown(atom)) for atom in atoms]

    def _class(self, atom: str, otherwise: int = -1) -> int:
        number = self._vocabulary.number(atom)
        return int(self._classes[number]) if number >= 0 else otherwise

    def _unknown(self, atom: str) -> int:
        return -1 if words.border(atom) > WORD else words.kind_number(atom)

    def is_template_word(self, context_class: int) -> bool:
        """Whether a class is more specific than a kind of word."""
        return context_class >= _N_KINDS

    def is_lone_template_word(self, context_class: int) -> bool:
        """Whether a class consists of one template word or mark."""
        return self.is_template_word(context_class) and int(self._members[context_class]) == 1

    def bits(self, context_class: int) -> float:
        """The surprisal of the class in bits."""
        return float(self._bits[context_class]) if context_class >= 0 else 0.0

    @_of_an_unchanged_file
    def texts(self, spans: Spans) -> Counter[str]:
        """Counts of the texts in the spans, without leading white space."""
        rows: Counter[tuple[int, ...]] = Counter()
        for _, found in self._rows(spans):
            rows.update(found)
        counts: Counter[str] = Counter()
        for text, count in zip(self._spelled(rows), rows.values(), strict=True):
            counts[text] += count
        return counts

    @_of_an_unchanged_file
    def text_of(self, spans: Spans) -> list[str]:
        """The text of each span, as in `texts`."""
        texts = [""] * len(spans)
        for numbers, rows in self._rows(spans):
            distinct = set(rows)
            text = dict(zip(distinct, self._spelled(distinct), strict=True))
            for number, row in zip(numbers, rows, strict=True):
                texts[number] = text[row]
        return texts

    @_of_an_unchanged_file
    def document_of(self, places: Tensor) -> Tensor:
        """The document index of each atom, in the order given."""
        return torch.bucketize(places, self._atoms.documents, right=True) - 1

    @_of_an_unchanged_file
    def surrounded(
        self,
        left: Sequence[int],
        right: Sequence[int],
        lengths: range,
        hardest: int,
        generator: torch.Generator,
    ) -> Spans:
        """Spans after `left[0]` and before `right[0]`.

        Args:
            left: Classes before the span, the nearest first.
            right: Classes after the span, the nearest first. One of the two may be empty, which
                then matches anything.
            lengths: Allowed numbers of atoms of the span.
            hardest: The strongest border allowed inside the span.
            generator: Samples places if there are too many.
        """
        sides = {1: left, -1: right}
        found: list[Spans] = []
        for toward, offset in self._anchors({way: side for way, side in sides.items() if side}):
            near, far = sides[toward], sides[-toward]
            edges = self._places([near[offset]], lengths, generator)
            edges += 1 + offset if toward > 0 else -offset
            depth = self._depth(edges, -toward, range(1), near)[:, 0]
            free = self._free(edges, lengths, hardest, toward)
            fitting = (depth > offset) & (free >= lengths.start)
            edges, depth, free = edges[fitting], depth[fitting], free[fitting]
            beyond = self._depth(edges, toward, lengths, far)
            hits = (beyond > 0) if far else torch.ones_like(beyond, dtype=torch.bool)
            hits &= torch.tensor(lengths, dtype=torch.int64, device="cpu") <= free[:, None]
            row, column = hits.nonzero(as_tuple=True)
            length = column + lengths.start
            depths = depth[row], beyond[row, column]
            starts = edges[row] if toward > 0 else edges[row] - length
            found.append(Spans(starts, length, *depths[::toward]))
        spans = found[0] if len(found) == 1 else Spans.joined(found).distinct()
        return spans.thinned(_SPELLED, generator)

    def _anchors(self, sides: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, int]]:
        """The atoms of the surroundings at which to start the search: side and distance.

        The rarer of the nearest ones. If that is too frequent to examine all its places, also rare
        ones further away: otherwise the few places where all surroundings match would be missed.
        """
        counts = {way: [*map(self._postings.count, side)] for way, side in sides.items()}
        rarer = min(counts, key=lambda way: counts[way][0])
        yield rarer, 0
        if counts[rarer][0] <= _LOOKED:
            return
        for way, row in counts.items():
            least = row[0]
            for offset, count in enumerate(row):
                if least <= _LOOKED or count == 0:
                    break
                if _n_near(sides[way]) < offset and sides[way][offset - 1] < _N_KINDS:
                    # A run of fillers has any length, so the distance of the next atom is unknown.
                    break
                if count <= least / 2:
                    yield way, offset
                    least = count

    @_of_an_unchanged_file
    def shaped(self, shape: Sequence[str], generator: torch.Generator) -> Spans:
        """Spans with one kind of word, or one punctuation mark, at each atom."""
        keys = [
            self._classes_of_kind[words.KINDS.index(wanted)]
            if wanted in words.KINDS
            else [self._class(wanted)]
            for wanted in shape
        ]
        counts = [sum(map(self._postings.count, some)) for some in keys]
        rarest = counts.index(min(counts))
        starts = self._postings.holding(keys[rarest], _LOOKED, generator) - rarest
        starts = starts[(starts >= 0) & (starts < len(self) - len(shape))]
        for offset, wanted in enumerate(shape):
            starts = starts[self.is_like(starts + offset, wanted)]
        return _placed(starts, torch.full_like(starts, len(shape)))

    @_of_an_unchanged_file
    def is_like(self, places: Tensor, wanted: str) -> Tensor:
        """Whether the atoms at these places are of a kind, or a given mark."""
        if wanted not in words.KINDS:
            return self._class_at(places) == self._class(wanted)
        alike = self.kinds_at(places) == words.KINDS.index(wanted)
        return alike & (self._borders_at(places) == WORD)

    @cached_property
    def _classes_of_kind(self) -> list[list[int]]:
        """For each kind, itself and the template classes that contain such a word."""
        is_template = self._classes >= _N_KINDS
        classes, kinds = self._classes[is_template], self._vocabulary.kinds[is_template]
        return [[kind, *classes[kinds == kind].unique().tolist()] for kind in range(_N_KINDS)]

    @_of_an_unchanged_file
    def anywhere(self, lengths: range, hardest: int, generator: torch.Generator) -> Spans:
        """Spans at random places, of random lengths, that begin and end with a word."""
        starts = torch.randint(len(self), (_LOOKED,), generator=generator, device="cpu")
        starts = starts[self._borders_at(starts) == WORD]
        wanted = torch.randint(
            lengths.start, lengths.stop, (len(starts),), generator=generator, device="cpu"
        )
        fitting = self._free(starts, lengths, hardest) >= wanted
        starts, wanted = starts[fitting], wanted[fitting]
        ended = self._borders_at(starts + wanted - 1) == WORD
        return _placed(starts[ended], wanted[ended])

    @_of_an_unchanged_file
    def sentences(self, lengths: range, hardest: int, generator: torch.Generator) -> Spans:
        """Spans that begin after, and end before, the end of a sentence or line."""
        ends = [self._class(mark) for mark in (words.BREAK, *sorted(words.SENTENCE_ENDS))]
        starts = self._places(ends, lengths, generator) + 1
        free = self._free(starts, lengths, hardest)
        found: list[Spans] = []
        for length in lengths:
            begin = starts[free >= length]
            begin = begin[self._borders_at(begin + length) >= SENTENCE_END]
            found.append(_placed(begin, torch.full_like(begin, length)))
        return Spans.joined(found).thinned(_SPELLED, generator)

    @_of_an_unchanged_file
    def kinds_at(self, places: Tensor) -> Tensor:
        """The kinds of the words at these places, as indices in `words.KINDS`."""
        return self._vocabulary.kinds.index_select(0, self._words_at(places))

    @_of_an_unchanged_file
    def is_template_at(self, places: Tensor) -> Tensor:
        """Whether the atoms at these places are template words."""
        return self._class_at(places) >= _N_KINDS

    @_of_an_unchanged_file
    def closed_at(self, places: Tensor) -> Tensor:
        """Whether the atoms at these places are punctuation between clauses, or breaks."""
        return self._borders_at(places) > WORD

    @_of_an_unchanged_file
    def is_atom(self, places: Tensor, atom: str) -> Tensor:
        """Whether exactly this atom is at these places."""
        return self._words_at(places) == self._vocabulary.number(atom)

    def _words_at(self, places: Tensor) -> Tensor:
        return self._numbers.index_select(0, places) >> 1

    def _class_at(self, places: Tensor) -> Tensor:
        return self._classes.index_select(0, self._words_at(places))

    def _borders_at(self, places: Tensor) -> Tensor:
        return self._vocabulary.borders.index_select(0, self._words_at(places))

    def _places(self, classes: Sequence[int], lengths: range, generator: torch.Generator) -> Tensor:
        """Places of some classes, at most as many as spans of these lengths can be tried at."""
        most = max(min(_LOOKED, _STEPS // lengths.stop), _LOOKED // 20)
        return self._postings.holding(classes, most, generator)

    def _depth(self, edges: Tensor, toward: int, skipped: range, context: Sequence[int]) -> Tensor:
        """How many consecutive atoms match a context, beyond skipped atoms from an edge.

        Args:
            edges: The edges of spans: their first atom, or one past the last.
            toward: 1 for the right of the edge, -1 for the left.
            skipped: Numbers of atoms to skip before the context.
            context: Classes, the nearest first.

        Returns:
            Shape ``(n_edges, n_skipped)``, int8.
        """
        depth = torch.zeros(len(edges), len(skipped), dtype=torch.int8, device="cpu")
        places = self._along(edges, toward, skipped.stop - 1 + _STRETCH * len(context))
        outside = (places < 0) | (places >= len(self))
        numbers = self._numbers.take(places.clamp_(0, len(self) - 1)) >> 1
        classes = self._classes.take(numbers.long()).masked_fill_(outside, -2)
        element, head = _elements(classes)
        # Next to the span it is unknown where its slot ends: every atom counts by itself.
        n_near = _n_near(context)
        fits = torch.ones_like(depth, dtype=torch.bool)
        for offset, wanted in enumerate(context):
            here = slice(skipped.start + min(offset, n_near), skipped.stop + min(offset, n_near))
            if offset < n_near:
                found = classes[:, here]
            else:
                at = element[:, here] + (offset - n_near)
                found = head.gather(1, at.clamp(max=head.shape[1] - 1))
            fits &= found == wanted
            depth += fits
        return depth

    def _free(self, edges: Tensor, lengths: range, hardest: int, toward: int = 1) -> Tensor:
        """Number of atoms from each edge that cross no stronger border, within `lengths`."""
        parts = edges.split(max(_STEPS // lengths.stop, 1))
        return torch.cat([self._free_of(part, lengths, hardest, toward) for part in parts])

    def _free_of(self, edges: Tensor, lengths: range, hardest: int, toward: int) -> Tensor:
        places = self._along(edges, toward, lengths.stop - 1)
        inside = (places > 0) & (places < len(self) - 1)
        numbers = self._numbers.take(places.clamp_(0, len(self) - 1)) >> 1
        closed = (self._vocabulary.borders.take(numbers.long()) > hardest) | ~inside
        # The first closed one or, if there is none, one past the last.
        closed = torch.nn.functional.pad(closed, (0, 1), value=True)
        return closed.byte().argmax(1)

    def _along(self, edges: Tensor, toward: int, n: int) -> Tensor:
        steps = torch.arange(n, device="cpu")
        return edges[:, None] + (steps if toward > 0 else -1 - steps)

    def _rows(self, spans: Spans) -> Iterator[tuple[list[int], list[tuple[int, ...]]]]:
        """Per length, which spans have it, and their atoms."""
        for length in spans.lengths.unique().tolist():
            of = (spans.lengths == length).nonzero()[:, 0]
            starts = spans.starts[of]
            columns = (self._numbers.index_select(0, starts + n).tolist() for n in range(length))
            yield of.tolist(), list(zip(*columns, strict=True))

    def _spelled(self, rows: Collection[tuple[int, ...]]) -> Iterator[str]:
        numbers = torch.tensor(
            sorted(set(chain.from_iterable(rows))), dtype=torch.int64, device="cpu"
        )
        spelled = {
            number: " " * (number % 2) + word
            for number, word in zip(
                numbers.tolist(), self._vocabulary.words(numbers >> 1), strict=True
            )
        }
        for row in rows:
            text = "".join(map(spelled.__getitem__, row))
            yield text.strip().replace("\n ", "\n")


def _n_near(context: Sequence[int]) -> int:
    """Number of fillers at the beginning of a context."""
    return next((n for n, number in enumerate(context) if number >= _N_KINDS), len(context))


def _elements(classes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of classes with each run of fillers merged into one element.

    Returns:
        The element index of each atom, and the class of each element's first atom, padded with -2:
        one column wider than `classes`.
    """
    filler = (classes >= 0) & (classes < _N_KINDS)
    goes_on = torch.zeros_like(filler)
    goes_on[:, 1:] = filler[:, 1:] & filler[:, :-1]
    element = (~goes_on).cumsum(1) - 1
    head = torch.nn.functional.pad(torch.full_like(classes, -2), (0, 1), value=-2)
    row, column = (~goes_on).nonzero(as_tuple=True)
    head[row, element[row, column]] = classes[row, column]
    return element, head


def _classes(atoms: Atoms) -> Tensor:
    """The context class of each word, shape ``(n_words,)``, int32, numbered without gaps."""
    vocabulary = atoms.vocabulary
    places = _sampled(len(atoms.numbers))
    words_there = atoms.numbers.index_select(0, places) >> 1
    known, sample = words_there.unique(return_inverse=True)
    passages = torch.bucketize(places, atoms.documents, right=True)
    if len(atoms.numbers) > _LONG * len(atoms.documents):
        passages = (words_there == 0).cumsum(0)  # line breaks
    is_mark = vocabulary.borders > WORD
    classes = vocabulary.kinds.int()
    classes[known] = context_classes(
        sample, vocabulary.kinds[known].long(), is_mark[known], passages
    ).int()
    # Marks that do not occur in the sample.
    single = (is_mark & (classes < _N_KINDS)).nonzero()[:, 0]
    classes[single] = (
        int(classes.max()) + 1 + torch.arange(len(single), dtype=torch.int32, device="cpu")
    )
    is_template = classes >= _N_KINDS
    classes[is_template] = _N_KINDS + classes[is_template].unique(return_inverse=True)[1].int()
    return classes


def _sampled(n: int) -> Tensor:
    """Sampled stretches from all parts of a corpus of `n` atoms, or all of it if small."""
    if n <= _SAMPLE:
        return torch.arange(n, device="cpu")
    size = _SAMPLE // _STRETCHES
    starts = torch.linspace(0, n - size, _STRETCHES, dtype=torch.float64, device="cpu").long()
    return (starts[:, None] + torch.arange(size, device="cpu")).flatten()


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _placed(starts: Tensor, lengths: Tensor) -> Spans:
    unmatched = torch.zeros_like(starts, dtype=torch.int8)
    return Spans(starts, lengths, unmatched, unmatched)


NO_SPANS = _placed(
    torch.zeros(0, dtype=torch.int64, device="cpu"), torch.zeros(0, dtype=torch.int64, device="cpu")
)
