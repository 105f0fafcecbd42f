"""Places of a corpus where a feature could occur, the most similar first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from captum_llm_ext.text.baselines import words
from captum_llm_ext.text.baselines.corpus.index import NO_SPANS, CorpusIndex, Spans
from captum_llm_ext.text.baselines.surroundings import Surroundings
from captum_llm_ext.text.baselines.words import MARK, SENTENCE_END, WORD, border

# Weight of an atom's bits relative to its neighbour nearer to the slot. With .25 or .99, shares of
# right draws in three invented languages (`benchmarks/unseen.py`, 300 texts) are the same.
NEARNESS = 0.5
# Minimum count of surroundings with the same fillers: by chance, all of them agree in one case in
# 32 for two equally frequent ones.
AGREED = 5
# Surroundings in which the feature is this much rarer than in others are not those of its slot, if
# the others' rates are certain to this many standard errors. In three invented languages, with .375
# right draws of connecting words fall from .867 to .844 in one; with .99, and with half or twice
# the standard errors, none differs.
AS_LIKELY = 0.75
SURE = 1.5  # standard errors
# Minimum information of template words in bits: about that of one word next to the feature. With
# half or twice as many, shares of right draws in three invented languages are the same.
TELLING = 3.5

Level = Literal["both", "left", "right", "kinds", "shape", "length", "any", "blank"]
Side = Literal["left", "right"]
Agreeing = tuple[Side, int, str]


@dataclass(frozen=True, slots=True)
class Query:
    """A feature and its surroundings as corpus classes; equal queries give equal results.

    Attributes:
        core: The feature's text.
        atoms: Its atoms.
        left: Classes before it, the nearest first.
        right: Classes after it, the nearest first.
        whole: Whether it is a sentence or several, from border to border.
        agreeing: Surrounding fillers to agree with: side, distance in atoms, and the atom.
        names: Names of the surroundings: of `left`, then of `right`.
        info: Information of the template words among the nearest 0, 1, 2, … of `left`, and of
            `right`, in bits weighted by nearness.
    """

    core: str
    atoms: tuple[str, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    whole: bool
    agreeing: tuple[Agreeing, ...]
    names: tuple[tuple[str, ...], tuple[str, ...]] = field(compare=False)
    info: tuple[tuple[float, ...], tuple[float, ...]] = field(compare=False)

    @property
    def hardest(self) -> int:
        """The strongest border that a replacement may contain."""
        return max(*map(border, self.atoms), MARK if self.whole else WORD)

    @property
    def n_atoms(self) -> int:
        """Number of atoms of the feature."""
        return len(self.atoms)


@dataclass(frozen=True, slots=True)
class Found:
    """Places found at one level, and the surroundings they share with the feature."""

    level: Level
    surroundings: str
    spans: Spans
    telling: float = 0.0


def query_of(place: Surroundings, index: CorpusIndex) -> Query:
    """The query for a feature."""
    left, left_names, left_info = _side(place.left, index)
    right, right_names, right_info = _side(place.right, index)
    bordered = bool(left) and border(place.left[0]) >= SENTENCE_END
    bordered = bordered and bool(right) and border(place.right[0]) >= SENTENCE_END
    whole = bordered or place.is_sentence
    agreeing: list[Agreeing] = []
    if all(map(index.is_lone_template_word, index.context(place.atoms))):
        agreeing.extend(("right", n, place.right[n]) for n in _nearest_filler(right, index))
        agreeing.extend(("left", n, place.left[n]) for n in _nearest_filler(left, index))
    names, info = (left_names, right_names), (left_info, right_info)
    return Query(place.core, place.atoms, left, right, whole, tuple(agreeing), names, info)


def _side(
    atoms: Sequence[str], index: CorpusIndex
) -> tuple[tuple[int, ...], tuple[str, ...], tuple[float, ...]]:
    """The surroundings on one side, the nearest first: classes, names, and information."""
    classes = index.context(atoms)
    names = _names(atoms, classes, index)
    # The number of words of a neighbouring fact must not matter.
    kept = _elements(classes, index)
    elements = [(atoms[n], classes[n]) for n in kept]
    found, names = [number for _, number in elements], [names[n] for n in kept]
    return tuple(found), tuple(names), tuple(accumulate(_bits(elements, index), initial=0.0))


def _bits(elements: Sequence[tuple[str, int]], index: CorpusIndex) -> Iterator[float]:
    """The information of each element of the surroundings; a kind or a mark has none."""
    weight = 1.0
    for atom, number in elements:
        is_word = index.is_template_word(number) and not words.is_mark(atom)
        yield weight * index.bits(number) if is_word else 0.0
        if not words.is_mark(atom):
            weight *= NEARNESS


def _elements(classes: Sequence[int], index: CorpusIndex) -> list[int]:
    """Which classes begin an element: all but fillers that continue a run of fillers.

    Next to the slot it is unknown where that ends, so every atom is an element.
    """
    is_template = [index.is_template_word(number) for number in classes]
    return [
        n
        for n, here in enumerate(is_template)
        if here or not any(is_template[:n]) or is_template[n - 1]
    ]


def _nearest_filler(classes: Sequence[int], index: CorpusIndex) -> list[int]:
    return [n for n, number in enumerate(classes) if not index.is_template_word(number)][:1]


def _names(atoms: Sequence[str], classes: Sequence[int], index: CorpusIndex) -> tuple[str, ...]:
    return tuple(
        "⏎"
        if atom == words.BREAK
        else atom
        if index.is_template_word(number)
        else f"<{words.kind(atom)}>"
        for atom, number in zip(atoms, classes, strict=True)
    )


class Search:
    """Searches of one corpus.

    Args:
        index: The corpus.
        match: Kind of similarity: see `CorpusBaselines`.
        min_occurrences: Minimum count of surroundings.
        seed: Seeds samples of places, if not all can be examined.
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
        """Yields the places of one level after another, from the most similar to any."""
        if self._match == "context":
            yield from self._surrounded(query)
            if not query.whole:
                shape = [words.kind(atom) for atom in query.atoms]
                yield Found("shape", "_", self._index.shaped(shape, self._generator()))
        generator = self._generator()
        n = query.n_atoms
        if self._match != "any":
            if query.whole:
                lengths = range(max(n // 2, 1), 2 * n + 1)
                spans = self._index.sentences(lengths, query.hardest, self._generator())
            else:
                spans = self._index.anywhere(range(n, n + 1), query.hardest, generator)
            yield Found("length", "_", spans)
        lengths = range(1, max(2 * n, 3) + 1)
        yield Found("any", "_", self._index.anywhere(lengths, query.hardest, generator))

    def _surrounded(self, query: Query) -> Iterator[Found]:
        if query.left and query.right:
            spans = self._index.surrounded(
                query.left, query.right, self._lengths(query), query.hardest, self._generator()
            )
            yield from self._narrowed(query, "both", spans)
        one_sided = [
            *self._narrowed(query, "left", self._bounded_on(query, "left")),
            *self._narrowed(query, "right", self._bounded_on(query, "right")),
        ]
        yield from sorted(one_sided, key=lambda found: -found.telling)

    def _bounded_on(self, query: Query, side: Side) -> Spans:
        left, right = (query.left, ()) if side == "left" else ((), query.right)
        if not left and not right:
            return NO_SPANS
        spans = self._index.surrounded(
            left, right, self._lengths(query), query.hardest, self._generator()
        )
        if query.whole or self._is_between_template_words(query):
            return spans[spans.lengths == query.n_atoms]
        # On the other side the slot ends at punctuation, or at a template word.
        beyond = spans.stops if side == "left" else spans.starts - 1
        for closed in (self._index.closed_at(beyond), self._index.is_template_at(beyond)):
            if int(closed.sum()) >= self._min_occurrences:
                return spans[closed]
        return spans[spans.lengths == query.n_atoms]

    def _generator(self) -> torch.Generator:
        # One per search: results do not depend on earlier searches.
        return torch.Generator().manual_seed(self._seed)

    def _lengths(self, query: Query) -> range:
        n = query.n_atoms
        if query.whole or n > 4:
            return range(max(n // 2, 1), 2 * n + 1)
        return range(1, n + 3)

    def _narrowed(self, query: Query, level: Level, spans: Spans) -> Iterator[Found]:
        """The spans in the most informative surroundings that are frequent enough, if any.

        Surroundings whose words carry almost no information have the level ``"kinds"``.
        """
        spans = self._aligned(query, self._apart(query, spans))
        agreeing = self._agreeing(query, spans)
        is_agreed, enough = agreeing is not spans, self._min_occurrences
        if len(agreeing) < len(spans):
            spans, enough = agreeing, min(enough, len(agreeing))
        left = () if level == "right" else query.left
        right = () if level == "left" else query.right
        telling, i, j = self._most_telling(
            spans, left, right, enough, self._same_text_or_shape(query, spans)
        )
        if telling > 0:
            before, after = query.names[0][:i], query.names[1][:j]
            surroundings = " ".join([*before[::-1], "_", *after])
            spans = spans[(spans.left >= i) & (spans.right >= j)]
            if query.info[0][i] + query.info[1][j] < TELLING and not is_agreed:
                level = "kinds"
            yield Found(level, surroundings, self._of_a_kind(query, spans), telling)

    def _apart(self, query: Query, spans: Spans) -> Spans:
        """For template words, excludes spans with further words, which belong to the next slot.

        "lives" must not become "lives Palm" between a name and "Coast".
        """
        if not self._is_between_template_words(query):
            return spans
        longer = (spans.lengths > query.n_atoms).nonzero()[:, 0]
        begin, end = spans.starts[longer], spans.stops[longer] - query.n_atoms
        apart = torch.ones(len(spans), dtype=torch.bool, device="cpu")
        apart[longer] = ~(self._spells(query, begin) | self._spells(query, end))
        return spans[apart]

    def _spells(self, query: Query, starts: Tensor) -> Tensor:
        """Whether the feature's own text is at these places."""
        same = torch.ones(len(starts), dtype=torch.bool, device="cpu")
        for offset, atom in enumerate(query.atoms):
            same &= self._index.is_atom(starts + offset, atom)
        return same

    def _is_between_template_words(self, query: Query) -> bool:
        return all(map(self._index.is_template_word, self._index.context(query.atoms)))

    def _aligned(self, query: Query, spans: Spans) -> Spans:
        """Excludes spans that contain words of neighbouring slots.

        Next to a filler it is unknown where its slot ends: otherwise " in" in "lives in Cedar
        Falls" would match the " in Palm" of "lives in Palm Coast".
        """
        index = self._index
        is_template = [index.is_template_word(number) for number in index.context(query.atoms)]
        if query.left and not index.is_template_word(query.left[0]):
            spans = spans[self._same_template_word(spans.starts, query.atoms[0], is_template[0])]
        if query.right and not index.is_template_word(query.right[0]):
            spans = spans[
                self._same_template_word(spans.stops - 1, query.atoms[-1], is_template[-1])
            ]
        return spans

    def _same_template_word(self, places: Tensor, atom: str, is_template: bool) -> Tensor:
        """Whether the words at these places are template words like this one, or of its kind."""
        like = self._index.is_template_at(places) == is_template
        kind = words.kind(atom)
        if is_template and kind in words.KINDS:
            like &= self._index.kinds_at(places) == words.KINDS.index(kind)
        return like

    def _agreeing(self, query: Query, spans: Spans) -> Spans:
        """Spans next to the same fillers as the feature, if there are enough.

        For template words only: they state no fact of their own, and "is" in "is a nurse" cannot be
        replaced by the "has" of "has a parrot".
        """
        for side, offset, atom in query.agreeing:
            places = spans.starts - 1 - offset if side == "left" else spans.stops + offset
            depth = spans.left if side == "left" else spans.right
            # Beyond the matching surroundings, fillers belong to another text.
            fits = (depth > offset).nonzero()[:, 0]
            same = fits[self._index.is_atom(places[fits], atom)]
            if len(same) >= min(self._min_occurrences, AGREED):
                spans = spans[same]
        return spans

    def _most_telling(
        self,
        spans: Spans,
        left: Sequence[int],
        right: Sequence[int],
        enough: int,
        alike: Tensor,
    ) -> tuple[float, int, int]:
        """How much of the surroundings to use: information, and number of atoms on each side.

        Among those that occur often enough: with template words on as many sides as possible, then
        with the most bits, where a near atom counts for more than all beyond it. Only surroundings
        in which the feature is about as frequent as in any others are used: those of another slot
        may contain more surprising words.

        Args:
            spans: Places with some of the surroundings.
            left: The surroundings on the left.
            right: Those on the right.
            enough: Minimum number of places.
            alike: Which spans are like the feature.
        """
        bits_left, template_left = self._weight(left)
        bits_right, template_right = self._weight(right)
        shape = (len(left) + 1, len(right) + 1)
        cells = spans.left.long() * shape[1] + spans.right.long()
        at_least = _at_least(cells, shape)
        is_template = template_left[:, None].int() + template_right
        allowed = (at_least >= enough) & (is_template > 0)
        allowed[: min(len(left), 1)] = False
        allowed[:, : min(len(right), 1)] = False
        found = _at_least(cells[alike], shape).double()
        surely = (found - SURE * found.sqrt()) / at_least.clamp(min=1)
        likely = AS_LIKELY * surely.where(allowed, 0).max()
        allowed &= found >= likely * at_least
        # The bits of one side, weighted, stay far below 1,000.
        telling = (is_template * 1000 + bits_left[:, None] + bits_right).where(allowed, 0)
        best = int(telling.argmax())
        return float(telling.flatten()[best]), best // shape[1], best % shape[1]

    def _same_text_or_shape(self, query: Query, spans: Spans) -> Tensor:
        """Which spans have the feature's text, or its shape if hardly any has the text."""
        same = spans.lengths == query.n_atoms
        starts = spans.starts[same]
        alike = self._spells(query, starts)
        # In a slot with phrases of all lengths, the shape is less specific: single-word cities are
        # rarer there than in slots that contain only names.
        if int(alike.sum()) < AGREED:
            alike = torch.ones(len(starts), dtype=torch.bool, device="cpu")
            for offset, atom in enumerate(query.atoms):
                alike &= self._index.is_like(starts + offset, words.kind(atom))
        return same.masked_scatter(same, alike)

    def _weight(self, context: Sequence[int]) -> tuple[Tensor, Tensor]:
        """For the nearest 0, 1, 2, … atoms: weighted bits, and whether any is a template word."""
        bits = [self._index.bits(number) * NEARNESS**n for n, number in enumerate(context)]
        bits = torch.tensor([0.0, *bits], dtype=torch.float32, device="cpu")
        is_template = torch.tensor(
            [False, *map(self._index.is_template_word, context)], dtype=torch.bool, device="cpu"
        )
        return bits.cumsum(0), is_template.cumsum(0) > 0

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


def _at_least(cells: Tensor, shape: tuple[int, int]) -> Tensor:
    """Number of spans that match at least this much of each side."""
    counts = torch.bincount(cells, minlength=shape[0] * shape[1]).view(shape)
    return counts.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1)
