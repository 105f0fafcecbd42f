"""Places of a corpus that a feature could stand in, the most alike first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from captum_llm_ext.baselines import words
from captum_llm_ext.baselines.index import (
    MARK,
    NO_SPANS,
    SENTENCE_END,
    WORD,
    CorpusIndex,
    Spans,
    border,
)
from captum_llm_ext.baselines.place import Place

# What the bits of an atom weigh, by those of its neighbour nearer to the slot.
NEARNESS = 0.5

Level = Literal["both", "left", "right", "shape", "length", "any", "blank"]
Side = Literal["left", "right"]
Agreeing = tuple[Side, int, str]


@dataclass(frozen=True, slots=True)
class Query:
    """A feature and its surroundings as the corpus counts them; equal ones find the same.

    Attributes:
        core: The feature's text.
        atoms: Its atoms.
        left: Classes before it, the nearest first.
        right: Classes after it, the nearest first.
        whole: Whether it is a sentence or several, from border to border.
        agreeing: Surrounding fillers to agree with: side, how many atoms away, and the atom.
        names: What to call the surroundings: those of `left`, then those of `right`.
    """

    core: str
    atoms: tuple[str, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    whole: bool
    agreeing: tuple[Agreeing, ...]
    names: tuple[tuple[str, ...], tuple[str, ...]] = field(compare=False)

    @property
    def hardest(self) -> int:
        """The hardest border that a stand-in may have inside."""
        return max(*map(border, self.atoms), MARK if self.whole else WORD)

    @property
    def n_atoms(self) -> int:
        """How many atoms the feature has."""
        return len(self.atoms)


@dataclass(frozen=True, slots=True)
class Found:
    """Places found at one level, and the surroundings they share with the feature."""

    level: Level
    surroundings: str
    spans: Spans
    telling: float = 0.0


def query_of(place: Place, index: CorpusIndex) -> Query:
    """What to ask the corpus for a feature."""
    left, right = tuple(index.context(place.left)), tuple(index.context(place.right))
    bordered = bool(left) and border(place.left[0]) >= SENTENCE_END
    bordered = bordered and bool(right) and border(place.right[0]) >= SENTENCE_END
    names = (_names(place.left, left, index), _names(place.right, right, index))
    whole = bordered or place.is_sentence
    agreeing: list[Agreeing] = []
    if all(map(index.is_lone_frame, index.context(place.atoms))):
        agreeing.extend(("right", n, place.right[n]) for n in _nearest_filler(right, index))
        agreeing.extend(("left", n, place.left[n]) for n in _nearest_filler(left, index))
    return Query(place.core, place.atoms, left, right, whole, tuple(agreeing), names)


def _nearest_filler(classes: Sequence[int], index: CorpusIndex) -> list[int]:
    return [n for n, number in enumerate(classes) if not index.is_frame(number)][:1]


def _names(atoms: Sequence[str], classes: Sequence[int], index: CorpusIndex) -> tuple[str, ...]:
    return tuple(
        "⏎" if atom == words.BREAK else atom if index.is_frame(number) else f"<{words.kind(atom)}>"
        for atom, number in zip(atoms, classes, strict=True)
    )


class Search:
    """Searches of one corpus.

    Args:
        index: The corpus.
        match: How alike places must be: see `CorpusBaselines`.
        min_occurrences: Surroundings seen less often are not trusted.
        seed: For the choice of places where surroundings play no part.
    """

    def __init__(
        self,
        index: CorpusIndex,
        match: Literal["context", "length", "any"],
        min_occurrences: int,
        seed: int,
    ) -> None:
        self._index = index
        self._match = match
        self._min_occurrences = min_occurrences
        self._seed = seed

    def __call__(self, query: Query) -> Iterator[Found]:
        """The places of one level after the other, from the most alike to any."""
        if self._match == "context":
            yield from self._surrounded(query)
            if not query.whole:
                shape = [words.kind(atom) for atom in query.atoms]
                yield Found("shape", "_", self._index.shaped(shape))
        generator = torch.Generator().manual_seed(self._seed)
        n = query.n_atoms
        if self._match != "any":
            if query.whole:
                lengths = range(max(n // 2, 1), 2 * n + 1)
                spans = self._index.sentences(lengths, query.hardest)
            else:
                spans = self._index.anywhere(range(n, n + 1), query.hardest, generator)
            yield Found("length", "_", spans)
        lengths = range(1, max(2 * n, 3) + 1)
        yield Found("any", "_", self._index.anywhere(lengths, query.hardest, generator))

    def _surrounded(self, query: Query) -> Iterator[Found]:
        if query.left and query.right:
            lengths = self._lengths(query)
            spans = self._index.between(query.left, query.right, lengths, query.hardest)
            yield from self._narrowed(query, "both", spans)
        one_sided = [
            *self._narrowed(query, "left", self._beside(query, "left")),
            *self._narrowed(query, "right", self._beside(query, "right")),
        ]
        yield from sorted(one_sided, key=lambda found: -found.telling)

    def _beside(self, query: Query, side: Side) -> Spans:
        context = query.left if side == "left" else query.right
        if not context:
            return NO_SPANS
        return self._index.beside(side, context, query.n_atoms, query.hardest)

    def _lengths(self, query: Query) -> range:
        n = query.n_atoms
        if query.whole or n > 4:
            return range(max(n // 2, 1), 2 * n + 1)
        # What is a word of the frame for two others would let words of the next slot in.
        framed = all(map(self._index.is_frame, self._index.context(query.atoms)))
        return range(n, n + 1) if framed else range(1, n + 3)

    def _narrowed(self, query: Query, level: Level, spans: Spans) -> Iterator[Found]:
        """The spans in the most telling surroundings that are seen often enough, if any are."""
        spans = self._agreeing(query, self._aligned(query, spans))
        left = () if level == "right" else query.left
        right = () if level == "left" else query.right
        telling, i, j = self._most_telling(spans, left, right)
        if telling > 0:
            before, after = query.names[0][:i], query.names[1][:j]
            surroundings = " ".join([*before[::-1], "_", *after])
            spans = spans[(spans.left >= i) & (spans.right >= j)]
            yield Found(level, surroundings, self._of_a_kind(query, spans), telling)

    def _aligned(self, query: Query, spans: Spans) -> Spans:
        """Those that leave the words of neighbouring slots to these.

        Next to a filler it is unknown where its slot ends: " in" in "lives in Cedar Falls" would
        else match the " in Palm" of "lives in Palm Coast".
        """
        index = self._index
        framed = [index.is_frame(number) for number in index.context(query.atoms)]
        if query.left and not index.is_frame(query.left[0]):
            spans = spans[index.framed_at(spans.starts) == framed[0]]
        if query.right and not index.is_frame(query.right[0]):
            spans = spans[index.framed_at(spans.stops - 1) == framed[-1]]
        return spans

    def _agreeing(self, query: Query, spans: Spans) -> Spans:
        """Those next to the very fillers that are next to the feature, as far as there are enough.

        Asked of words of the frame only. They state no fact of their own, and "is" in "is a nurse"
        is no slot that the "has" of "has a parrot" may fill.
        """
        for side, offset, atom in query.agreeing:
            places = spans.starts - 1 - offset if side == "left" else spans.stops + offset
            depth = spans.left if side == "left" else spans.right
            # Further out than the surroundings fit, another text's filler would be asked.
            fits = (depth > offset).nonzero()[:, 0]
            same = fits[self._index.is_atom(places[fits], atom)]
            if len(same) >= self._min_occurrences:
                spans = spans[same]
        return spans

    def _most_telling(
        self, spans: Spans, left: Sequence[int], right: Sequence[int]
    ) -> tuple[float, int, int]:
        """How much of the surroundings to ask for: how telling it is, and the atoms on each side.

        Of what occurs often enough: with words of the frame on as many sides as can be, then with
        the most bits, where a near atom counts for more than all beyond it.
        """
        bits_left, framed_left = self._weight(left)
        bits_right, framed_right = self._weight(right)
        shape = (len(left) + 1, len(right) + 1)
        cells = spans.left.long() * shape[1] + spans.right.long()
        counts = torch.bincount(cells, minlength=shape[0] * shape[1]).view(shape)
        at_least = counts.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1)
        framed = framed_left[:, None].int() + framed_right
        allowed = (at_least >= self._min_occurrences) & (framed > 0)
        allowed[: min(len(left), 1)] = False
        allowed[:, : min(len(right), 1)] = False
        # The bits of one side, weighted, stay far below 1,000.
        telling = (framed * 1000 + bits_left[:, None] + bits_right).where(allowed, 0)
        best = int(telling.argmax())
        return float(telling.flatten()[best]), best // shape[1], best % shape[1]

    def _weight(self, context: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of the nearest 0, 1, 2, … atoms: their weighted bits, and whether one is of the frame."""
        bits = [self._index.bits(number) * NEARNESS**n for n, number in enumerate(context)]
        bits = torch.tensor([0.0, *bits])
        framed = torch.tensor([False, *map(self._index.is_frame, context)])
        return bits.cumsum(0), framed.cumsum(0) > 0

    def _of_a_kind(self, query: Query, spans: Spans) -> Spans:
        """Those that begin with the same kind of word, if that leaves a choice."""
        kind = words.kind(query.atoms[0])
        if kind not in words.KINDS:
            return spans
        same = spans[self._index.kinds_at(spans.starts) == words.KINDS.index(kind)]
        if len(same) < self._min_occurrences:
            return spans
        others = self._index.texts(same).keys() - {query.core}
        return same if len(others) >= 3 else spans
