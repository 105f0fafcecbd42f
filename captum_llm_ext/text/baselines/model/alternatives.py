"""A language model's alternatives for places of a text, computed for all places at once."""

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from captum_llm_ext.text.baselines import words
from captum_llm_ext.text.baselines.model.examples import labels_of_examples
from captum_llm_ext.text.baselines.slot import Proposer
from captum_llm_ext.text.baselines.words import SENTENCE_END, border

Span = tuple[int, int]
# Each of the limits below was halved and doubled (shares and _MORE_WORDS: moved both ways) on 20
# natural prompts of SmolLM2 with known causes: all name the same strongest word on every prompt, 16
# of them the cause, unless a comment says otherwise. What moves are replacements.
#
# A word is determined if it is more likely than not given the words before it; otherwise it is free
# and drawn by itself. With a lower limit, "York" of "New York" stays bound in a text that mentions
# New Jersey as often. At .25 or .75, attributions of 3 and 2 of the prompts differ.
_DETERMINED = 0.5
# After other beginnings of a phrase, less than this share of a bound word's probability is left. In
# real text the share is either below .03 (names, fixed expressions) or above .24 (grammar). At .05
# and .2 all attributions are equal.
_LEFT_OVER = 0.1
# A word is a function word if its mean probability at other positions exceeds this. In real text
# "of", "to", "was" have .002 to .03 there; "York", "Lake", "Vegas", "cream" at most .0003. At
# half and twice as much, attributions of one prompt differ.
_COMMON = 5e-4
_INCOMPLETE = "\ufffd"  # decoded part of a character, with which no candidate may begin
_LONGEST = 4  # words of a phrase; with 2 and 8 all attributions are equal
# Candidates beyond this probability mass are neither searched nor drawn: on 42 real prompts .95 to
# 1 name the same causes, .9 and .8 fewer.
ENOUGH = 0.95
# Words that a replacement may have more than the original: with 0 and 2, attributions of 4 and 3 of
# the prompts differ.
_MORE_WORDS = 1
# Of this many likeliest words, those are kept after which the following words are likeliest: of
# four after "was", as in "was hungry, so", possibly none ("a", "born", "the", "an"). Nearly all
# attributions follow it: 8 take 11 % less computation, and the cause leads by 4.7 instead of 4.9
# nats; 32 take 25 % more, lead by 5.0, and name one cause more.
_TRIED = 16
# Words after a place that are scored. Nearly all attributions follow it: 1 takes 4 % less
# computation, names 18 causes, and these lead by 5.2 nats; 4 name 16, and lead by 5.0. On 20
# prompts that is no significant difference; others were not measured.
_AFTER = 2
# Probability of the own word beyond which the following words leave hardly another one. At .9,
# attributions of 7 prompts differ, and one cause less is named. Larger ones were not measured.
_DECIDED = 0.95


def looks_like(piece: str, word: str) -> bool:
    """Whether a token is the beginning of a word of the same kind and script, and nothing else."""
    return (
        words.kind(piece) == words.kind(word)
        and words.is_one_word(piece)
        and words.keeps_script(piece, word)
    )


class Alternatives:
    """Alternative texts for the places of a text, given what precedes each.

    One forward pass gives the candidates of all words; further requests (how incomplete words end,
    which words belong together) are batched over all places.

    Args:
        text: The text.
        model: The proposing model.
        n: Number of candidates per place, besides the original.
        within: Character range of the places, ``(start, stop)``.

    Attributes:
        phrases: Phrases of several words, in reading order.
        ties: Neighbouring words or phrases of which one determines the other.
    """

    def __init__(self, text: str, model: Proposer, n: int, within: Span) -> None:
        self._text, self._model, self._n = text, model, n
        self._atoms = words.atoms(text)
        worded = [
            i
            for i, atom in enumerate(self._atoms)
            if within[0] < atom.stop and not words.is_mark(atom.text)
        ]
        # Text after a place may belong to its phrase, or be determined by it.
        n_within = sum(self._atoms[i].start < within[1] for i in worded)
        worded = worded[: n_within + _AFTER]
        own = [self._atoms[i].text for i in worded]
        spans = [(self._atoms[i].start, self._atoms[i].stop) for i in worded]
        listed = model.likeliest(
            text, spans, max(n, _TRIED), lambda number, piece: looks_like(piece, own[number])
        )
        self._listed = dict(zip(worded, listed, strict=True))
        self._number = {self._atoms[i].start: i for i in worded}
        self._ended: dict[Span, list[str]] = {}
        self._fitting: dict[Span, dict[str, float]] = {}
        self._labels = self._found_labels()
        self.read(spans)
        self.ties: list[tuple[Span, Span]] = []
        self.phrases = self._found_phrases()
        self.ties = self._found_ties()

    def parts(self, start: int, stop: int, *, ties: bool = True) -> list[Span]:
        """The phrases and single words between two characters, in reading order.

        Args:
            start: The first character.
            stop: One past the last.
            ties: Whether tied phrases are merged.
        """
        found: list[Span] = []
        for atom in self._atoms:
            is_inside = start <= atom.start and atom.stop <= stop and atom.start in self._number
            if not is_inside or words.is_mark(atom.text) or (found and atom.start < found[-1][1]):
                continue
            phrase = next((p for p in self.phrases if p[0] == atom.start and p[1] <= stop), None)
            found.append(phrase or (atom.start, atom.stop))
            if ties and len(found) > 1 and (found[-2], found[-1]) in self.ties:
                found[-2:] = [(found[-2][0], found[-1][1])]
        return found

    def read(self, spans: Iterable[Span]) -> None:
        """Finds the endings of incomplete candidates, for all of these places at once.

        Args:
            spans: Words, phrases or ties.
        """
        todo = [span for span in dict.fromkeys(spans) if span not in self._ended]
        if not todo:
            return
        shapes = {span: self._shape(span) for span in todo}
        stems = [(span, piece) for span in todo for piece, _ in self._first_pieces(span)]
        sizes = {span: len(shape.numbers) + len(shape.marks) for span, shape in shapes.items()}
        written = self._model.greedy(
            [self._text[: span[0]] + piece for span, piece in stems],
            [self._text[span[1] :] for span, _ in stems],
            [sizes[span] - 1 for span, _ in stems],
            lambda i, rest: _end(stems[i][1] + rest, shapes[stems[i][0]]) is not None,
        )
        self._ended.update((span, []) for span in todo)
        for (span, piece), rest in zip(stems, written, strict=True):
            text = piece + rest
            stop = _end(text, shapes[span]) or _end(text + "\n.", shapes[span]) or 0
            # In scripts without spaces a token may be several words, and is not split.
            self._ended[span].append(text[: max(stop, len(piece))])

    def texts(self, span: Span) -> dict[str, float]:
        """The candidates of a place with their probabilities, the original first.

        These are the likeliest texts, whose probabilities do not sum to one. If nothing precedes
        the place, it is the original alone.
        """
        if span in self._labels:
            return dict(self._labels[span])
        if span not in self._ended:
            self.read([span, *((one[0], other[1]) for one, other in self.ties)])
        own = self._text[span[0] : span[1]]
        found = {own: self._chance(span)}
        for (_, chance), text in zip(self._first_pieces(span), self._ended[span], strict=True):
            # A word may continue in another script than it began in.
            if _INCOMPLETE not in text and words.keeps_script(text, own):
                found[text] = found.get(text, 0.0) + chance
        return found

    def fitting(self, span: Span) -> dict[str, float]:
        """The candidates of a place given also the words after it, the original first.

        More words are tried than there are `texts`. The weight of each is its probability given the
        text before, times the likelihood of the words after it relative to the original's, capped
        at 1: the ones of largest weight are kept.
        """
        if span not in self._fitting:
            self.fit([span])
        return self._fitting[span]

    def fit(self, spans: Iterable[Span]) -> None:
        """Scores candidates by the words after them, for all of these places at once.

        First the `texts`, then less likely words, as long as they can still be among the likeliest.

        Args:
            spans: Words, phrases or ties.
        """
        todo = [span for span in dict.fromkeys(spans) if span not in self._fitting]
        self.read([*todo, *((one[0], other[1]) for one, other in self.ties)])
        after = {span: self._after(span) for span in todo}
        fitting = self._weighed({span: self.texts(span) for span in todo}, after)
        more = {span: self._less_likely(span, fitting[span]) for span in todo if after[span]}
        for span, weights in self._weighed(more, after).items():
            fitting[span] |= weights
        for span, weights in fitting.items():
            own, others = self._text[slice(*span)], dict(weights)
            chance = others.pop(own)
            likeliest = heapq.nlargest(self._n, others, key=others.__getitem__)
            kept = {own: chance} | {text: others[text] for text in likeliest}
            if chance > _DECIDED * sum(kept.values()):
                # A word determined by the words after it alone belongs to them ("master" of
                # *arts*): the text before tells how certain it is, the words after which others
                # fit.
                kept = _scaled(kept, own, like=self.texts(span))
            self._fitting[span] = kept

    def _weighed(
        self, texts: Mapping[Span, Mapping[str, float]], after: Mapping[Span, str]
    ) -> dict[Span, dict[str, float]]:
        """Candidates weighted by their probabilities and the likelihood of the words after them.

        Args:
            texts: Per place, with probabilities given the text before.
            after: Per place the words after it; empty if these are not scored.
        """
        candidates = [
            (span, text)
            for span, own in texts.items()
            if after[span] and len({self._text[slice(*span)], *own}) > 1
            for text in dict.fromkeys([self._text[slice(*span)], *own])
        ]
        if not candidates:
            return {span: dict(own) for span, own in texts.items()}
        log_probs = self._model.log_probs_between(
            [self._text[: span[0]] + text for span, text in candidates],
            [after[span] for span, _ in candidates],
            [self._text[span[1] + len(after[span]) :] for span, _ in candidates],
        )
        follows = dict(zip(candidates, log_probs.tolist(), strict=True))

        def weight(span: Span, text: str, chance: float) -> float:
            one, own = follows.get((span, text), 0.0), (span, self._text[slice(*span)])
            return chance * math.exp(min(one - follows.get(own, 0.0), 0.0))

        return {
            span: {text: weight(span, text, chance) for text, chance in own.items()}
            for span, own in texts.items()
        }

    def _after(self, span: Span) -> str:
        """The words after a place that indicate which kind of word fits.

        The next two of its sentence, up to a name, a number or a word determined by the place:
        these would identify the word itself.
        """
        if self._model.reads_rest:
            return ""
        decided = [other[0] for one, other in self.ties if one == span]
        decided += [
            span[1] for phrase in self.phrases if phrase[0] <= span[0] < span[1] < phrase[1]
        ]
        most = min(decided, default=len(self._text))
        stop, n_words = span[1], 0
        for atom in self._atoms[bisect_left(self._atoms, span[1], key=lambda a: a.start) :]:
            is_mark = words.is_mark(atom.text)
            is_function_word = is_mark or words.kind(atom.text) in ("lower", "letters")
            if n_words == _AFTER or atom.start >= most or not is_function_word:
                break
            stop, n_words = atom.stop, n_words + (not is_mark)
            if is_mark and border(atom.text) >= SENTENCE_END:
                break
        return self._text[span[1] : stop]

    def _less_likely(self, span: Span, weights: Mapping[str, float]) -> dict[str, float]:
        """Single-token words beyond the `texts` of a one-word place, if they may matter.

        The weight of a word is at most its probability given the text before. So words are left out
        that could not be among the likeliest, and the least likely ones as long as their total is
        negligible.

        Args:
            span: The place.
            weights: Weights of its `texts`, as far as known.
        """
        shape = self._shape(span)
        listed = self._listed.get(shape.numbers[0]) if shape.n_words == 1 else None
        if listed is None or span in self._labels:
            return {}
        texts, own = self.texts(span), self._text[slice(*span)]
        others = heapq.nlargest(self._n, (w for text, w in weights.items() if text != own))
        least = others[-1] if len(others) == self._n else 0.0
        found = {
            text: chance
            for text, log_prob in listed.others
            if text not in texts and (chance := math.exp(log_prob)) > least
        }
        left_out, most = 0.0, (1 - ENOUGH) * sum(weights.values())
        for text in sorted(found, key=found.__getitem__):
            if (left_out := left_out + found[text]) > most:
                break
            del found[text]
        return found

    def _found_labels(self) -> dict[Span, dict[str, float]]:
        """Labels of solved examples: per place their probabilities, the original first."""
        asked = [
            (span, label)
            for span, labels in labels_of_examples(self._text).items()
            if span[0] in self._number
            for label in dict.fromkeys([self._text[slice(*span)], *labels])
        ]
        if not asked:
            return {}
        found: dict[Span, dict[str, float]] = {}
        log_probs = self._model.log_probs_between(
            [self._text[: self._gap(span)] for span, _ in asked],
            [self._text[self._gap(span) : span[0]] + label for span, label in asked],
            [self._text[span[1] :] for span, _ in asked],
        )
        for (span, label), log_prob in zip(asked, log_probs.tolist(), strict=True):
            found.setdefault(span, {})[label] = math.exp(log_prob)
        return found

    def _found_phrases(self) -> list[Span]:
        """Phrases of several words of which the first determines the others, in reading order.

        A word is bound to the phrase before it if it is determined by it (more likely than not) but
        not by other phrases in its place: what grammar determines also follows other words.
        Function words occur inside phrases ("Gulf of Oman") but end none ("proud of"). A repeated
        text is a phrase only if it was one before, since repetition alone makes it predictable.
        """
        # Two-word phrases first, in all places at once; longer ones extend these.
        longest: dict[int, int] = {}
        grown = {i: i + 1 for i in range(len(self._atoms)) if self._is_free(i)}
        for _ in range(_LONGEST - 1):
            grown = {i: n for i, n in grown.items() if self._chance_of(n) > _DETERMINED}
            pairs = [(self._span(i, n), n) for i, n in grown.items()]
            self.read([span for span, _ in pairs])
            bound = dict(zip(grown, self._are_bound(pairs), strict=True))
            # Other phrases may make a word unlikely that other words before it leave unchanged.
            last = {i: (self._span(n - 1, n), n) for i, n in grown.items() if bound[i]}
            last = {i: pair for i, pair in last.items() if pair[1] > i + 1}
            last = {i: pair for i, pair in last.items() if self._others(pair[0])}
            bound |= zip(last, self._are_bound([*last.values()]), strict=True)
            grown = {i: n + 1 for i, n in grown.items() if bound[i]}
            longest |= grown
        longest = {i: self._before_grammar(i, n) for i, n in longest.items()}
        stops = {i: n for i, n in sorted(longest.items()) if n > i + 1}
        return [self._span(i, n) for i, n in stops.items() if not self._is_repeated(i, n, stops)]

    def _before_grammar(self, first: int, stop: int) -> int:
        """Where a phrase ends without trailing function words."""
        while stop > first + 1 and (listed := self._listed.get(stop - 1)) is not None:
            if listed.elsewhere < _COMMON:
                break
            stop -= 1
        return stop

    def _is_repeated(self, first: int, stop: int, stops: Mapping[int, int]) -> bool:
        """Whether the words of a phrase occurred before and were not a phrase."""
        words_of = [atom.text for atom in self._atoms[first:stop]]
        earlier = (
            i
            for i in range(first)
            if [atom.text for atom in self._atoms[i : i + len(words_of)]] == words_of
        )
        before = next(earlier, None)
        return before is not None and stops.get(before, before) < before + len(words_of)

    def _found_ties(self) -> list[tuple[Span, Span]]:
        """Neighbours of which one determines the other, with punctuation between.

        As in a phrase; but each can be absent by itself, such as a city and its state.
        """
        stops = {span[0]: span[1] for span in self.phrases}
        pairs: list[tuple[Span, int]] = []
        for i, atom in enumerate(self._atoms):
            if not self._is_free(i):
                continue
            span = atom.start, stops.get(atom.start, atom.stop)
            stop = bisect_right(self._atoms, span[1], key=lambda atom: atom.stop)
            after = self._after_marks(stop)
            if after > stop and self._chance_of(after) > _DETERMINED:
                pairs.append((span, after))
        bound = zip(pairs, self._are_bound(pairs), strict=True)
        return [(span, self._span(at, at + 1)) for (span, at), is_bound in bound if is_bound]

    def _are_bound(self, pairs: Sequence[tuple[Span, int]]) -> list[bool]:
        """Whether words would be unlikely with other text in a place before them.

        Args:
            pairs: The place, and the index of the word's atom, with nothing but punctuation
                between.
        """
        if not pairs:
            return []
        beginnings: list[str] = []
        texts: list[str] = []
        rests: list[str] = []
        for span, at in pairs:
            stop = self._atoms[at - 1].stop
            left, marks = self._text[: span[0]], self._text[span[1] : stop]
            others = [left + text + marks for text in self._others(span)]
            beginnings += others
            texts += [self._text[stop : self._atoms[at].stop]] * len(others)
            rests += [self._text[self._atoms[at].stop :]] * len(others)
        chances = iter(self._model.log_probs_between(beginnings, texts, rests).exp().tolist())
        found: list[bool] = []
        for span, at in pairs:
            weights = self._others(span).values()
            left_over = sum(weight * next(chances) for weight in weights)
            own = self._chance_of(at)
            found.append(bool(weights) and left_over < _LEFT_OVER * own * sum(weights))
        return found

    def _gap(self, span: Span) -> int:
        """Where the white space before a place begins."""
        return len(self._text[: span[0]].rstrip())

    def _others(self, span: Span) -> dict[str, float]:
        """Other texts for a place, with their probabilities."""
        own = self._text[span[0] : span[1]]
        return {text: chance for text, chance in self.texts(span).items() if text != own}

    def _span(self, first: int, stop: int) -> Span:
        """The characters from one atom to before another."""
        return self._atoms[first].start, self._atoms[stop - 1].stop

    def _is_free(self, number: int) -> bool:
        """Whether an atom is a word that may begin a phrase: not determined by the text before."""
        return 0 < self._chance_of(number) < _DETERMINED

    def _after_marks(self, number: int) -> int:
        """The index of the first atom from there on that is a word of the same sentence."""
        at = number
        while at < len(self._atoms) and words.is_mark(self._atoms[at].text):
            if border(self._atoms[at].text) >= SENTENCE_END:
                return number
            at += 1
        return at if at < len(self._atoms) else number

    def _chance_of(self, number: int) -> float:
        """The probability of an atom; 0 if it is not a word, or unknown."""
        if number >= len(self._atoms) or self._listed.get(number) is None:
            return 0.0
        return self._chance(self._span(number, number + 1))

    def _chance(self, span: Span) -> float:
        """The probability of the text in a place, without punctuation."""
        known = [self._listed.get(i) for i in self._shape(span).numbers]
        return math.exp(sum(listed.log_prob for listed in known if listed is not None))

    def _first_pieces(self, span: Span) -> list[tuple[str, float]]:
        """The beginnings of candidates for a place, with their probabilities."""
        number = self._number.get(span[0])
        listed = None if number is None else self._listed[number]
        if listed is None:
            return []
        own = self._text[span[0] : span[1]]
        covered = self._chance(span)
        choices = [(text, math.exp(log_prob)) for text, log_prob in listed.others]
        # A candidate that begins like the original may continue differently.
        if listed.piece not in ("", own) and _INCOMPLETE not in listed.piece:
            choices.append((listed.piece, math.exp(listed.piece_log_prob) - covered))
        found: list[tuple[str, float]] = []
        for piece, chance in heapq.nlargest(self._n, choices, key=lambda choice: choice[1]):
            if covered >= ENOUGH or chance <= 0:
                break
            found.append((piece, chance))
            covered += chance
        return found

    def _shape(self, span: Span) -> "_Shape":
        starts = bisect_left(self._atoms, span[0], key=lambda atom: atom.start)
        stops = bisect_right(self._atoms, span[1], key=lambda atom: atom.stop)
        inside = range(starts, stops)
        marks = [self._atoms[i].text for i in inside if words.is_mark(self._atoms[i].text)]
        numbers = [i for i in inside if not words.is_mark(self._atoms[i].text)]
        after = self._atoms[inside[-1] + 1].text if inside[-1] + 1 < len(self._atoms) else None
        first = self._atoms[inside[0]]
        before = self._atoms[inside[0] - 1].text if inside[0] else words.BREAK
        is_name = words.kind(first.text) == "capital" and border(before) < SENTENCE_END
        return _Shape(numbers, marks, after, is_name)


def _scaled(weights: Mapping[str, float], own: str, like: Mapping[str, float]) -> dict[str, float]:
    """Weights of which all but the own text's sum to as much as others do; these if that is 0."""
    most, others = sum(like.values()) - like[own], sum(weights.values()) - weights[own]
    if others <= 0:
        return dict(like)
    scale = most / others
    return {text: weight * (1.0 if text == own else scale) for text, weight in weights.items()}


class _Shape(NamedTuple):
    """The shape of the text in a place.

    Attributes:
        numbers: Indices of its words among all atoms.
        marks: The punctuation between them.
        after: The atom that comes after it.
        is_name: Whether it begins with a capital that does not begin a sentence.
    """

    numbers: list[int]
    marks: list[str]
    after: str | None
    is_name: bool

    @property
    def n_words(self) -> int:
        """Number of words."""
        return len(self.numbers)


def _end(text: str, shape: _Shape) -> int | None:
    """The end of a candidate's text; None if it may continue.

    Before the text after the place, or punctuation outside the shape; otherwise after as many
    words. One word is replaced by one word, or by a name of several ("New York"). After an
    apostrophe or a hyphen a word may continue ("d'une").
    """
    if words.may_go_on(text):
        return None
    marks, stops = list(shape.marks), list[int]()
    most = shape.n_words + _MORE_WORDS
    for atom in words.atoms(text):
        if words.is_mark(atom.text):
            if marks and atom.text == marks[0]:
                marks.pop(0)
            elif stops:
                return stops[-1]
            continue
        if stops and not marks and atom.text == shape.after:
            return stops[-1]
        goes_on = (
            not stops or shape.n_words > 1 or (shape.is_name and words.kind(atom.text) == "capital")
        )
        if not goes_on:
            return stops[-1]
        if len(stops) == most:
            return stops[shape.n_words - 1]
        stops.append(atom.stop)
    return None
