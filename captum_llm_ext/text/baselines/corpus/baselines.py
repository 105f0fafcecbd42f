"""Replaces absent features by corpus text from the same surroundings."""

import copy
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor

from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.text.baselines import reweighting as weighing
from captum_llm_ext.text.baselines.candidates import BLANK, MOST_TEXTS, Candidates, Match
from captum_llm_ext.text.baselines.corpus import mismatch as unlike
from captum_llm_ext.text.baselines.corpus.documents import documents
from captum_llm_ext.text.baselines.corpus.index import CorpusIndex
from captum_llm_ext.text.baselines.corpus.index_file import BROKEN, broken
from captum_llm_ext.text.baselines.corpus.lookup import Lookup
from captum_llm_ext.text.baselines.corpus.search import Search
from captum_llm_ext.text.baselines.draws import draw_generator, uniform
from captum_llm_ext.text.baselines.labels import Labels, TextsByName
from captum_llm_ext.text.baselines.slot import LanguageModel, Slot
from captum_llm_ext.text.baselines.surroundings import Surroundings, surroundings_of
from captum_llm_ext.text.baselines.template import calling_template, template_slots

__all__ = ["CorpusBaselines", "Match"]

How = Literal["context", "length", "any", "model"]
_HOW = ("context", "length", "any", "model")
_MEASURED = 2_000  # candidates whose tokens are counted; chosen, not measured
_SETTINGS = {
    "match": str,
    "seed": int,
    "exclude_original": bool,
    "same_n_tokens": bool,
    "min_occurrences": int,
    "min_candidates": int,
}


class HasSlots(Protocol):
    """An input with slots for its features, such as `TextSegmentInput`."""

    slots: Sequence[Slot]


class CorpusBaselines:
    """Replaces absent features by corpus text that occurs in the same surroundings, without labels.

    The surroundings of a feature are compared with every position of the corpus by their *template*
    words, which are predictable from their neighbours; fillers, which carry the facts of a text,
    count only by their kind (capitalised, number, …). So "lives in _, FL and is a lawyer" matches
    places of residence whatever the state and the occupation, and a replacement is independent of
    neighbouring facts. Of all surroundings seen at least `min_occurrences` times the most
    informative one is used, on both sides if possible; then on one side, then those without
    template words, then by shape, length, and finally any text. A word that the rest of its phrase
    determines ("Lake" in "Salt Lake City") is replaced by its part of another phrase. A draw takes
    one of the places found uniformly, so frequent texts are drawn often.

    The replacement may have a different number of words. It keeps the white space and punctuation
    at the feature's ends. For a word fragment, the same part of a candidate word is used. The slots
    of a grouped feature are replaced by texts from one document: a city with *its* state. Adjacent
    slots are one phrase.

    Captum's `TextTemplateInput` accepts it too, also in captum's own `LLMAttribution`.

    Args:
        corpus: Texts; the column of a Hugging Face data set; or the path of a UTF-8 text file with
            one document per line, or of a ``.jsonl`` file with the document under `field`. Line
            breaks are borders.
        match: ``"context"`` as above. ``"model"``: candidates found like that are weighted by the
            explained model's probability of the whole text with each in place, so that a draw is a
            sample from the conditional distribution; generated features are replaced by samples
            from the model. ``"length"``: any text with as many words; ``"any"``: any text up to
            twice as long. The last two are for comparison.
        seed: Seeds samples taken during the search.
        labels: Texts to draw from for selected features: by their label (`labels` of
            `TextSegmentInput`; the names of a template's values), their index in the prompt, or
            their own text. A feature whose text is in exactly one of the lists needs no label. All
            others are looked up in the corpus.
        exclude_original: Whether the feature's own text is never drawn, unless it is the only one.
        same_n_tokens: Whether only texts with as many tokens as the feature are drawn, so that
            everything after it keeps its position.
        min_occurrences: Minimum count of surroundings; by default one in 2,000 words, at least 10
            and at most 50. Also the minimum count for a slot to be constant.
        min_candidates: Warn, once per slot, if a slot that is not constant has fewer candidates.
            Every run also warns of features whose surroundings are not in the corpus. 0 disables
            both.
        field: Key of the documents in a ``.jsonl`` file.
        errors: ``"replace"`` accepts files with invalid UTF-8.

    Raises:
        FileNotFoundError: If `corpus` is a path that cannot be read.
        ValueError: If the corpus contains no text, the file is not UTF-8 text, or an argument is
            invalid.
        TypeError: If the corpus is neither a path nor texts, or the labels are not lists of texts.
    """

    deterministic = False

    def __init__(
        self,
        corpus: Iterable[str] | str | os.PathLike[str],
        *,
        match: How = "context",
        seed: int = 0,
        labels: TextsByName | None = None,
        exclude_original: bool = True,
        same_n_tokens: bool = False,
        min_occurrences: int | None = None,
        min_candidates: int = 1,
        field: str = "text",
        errors: Literal["strict", "replace"] = "strict",
    ) -> None:
        if match not in _HOW:
            raise ValueError(f"`match` is {match!r}: give one of {', '.join(map(repr, _HOW))}.")
        if min_occurrences is not None and min_occurrences < 1:
            raise ValueError(f"`min_occurrences` is {min_occurrences}: give at least 1, or None.")
        self._labels = Labels(labels or {})
        texts = _Distinct(documents(corpus, errors, field))
        self._index = CorpusIndex(texts)
        if texts.n > 1 and not texts.differ and min_candidates > 0:
            warn_user(
                f"All {texts.n:,} documents of the corpus are identical: it shows no slot with "
                "more than one text. Give other texts of the same kind.",
            )
        self.match: How = match
        self.seed = seed
        self.exclude_original = exclude_original
        self.same_n_tokens = same_n_tokens
        self.min_occurrences = min_occurrences or min(max(len(self._index) // 2000, 10), 50)
        self.min_candidates = min_candidates
        self._start()

    def _start(self, model: LanguageModel | None = None) -> None:
        """Initialises the caches."""
        self._model = model
        how = "context" if self.match == "model" else self.match
        self._lookup = Lookup(
            self._index,
            Search(self._index, how, self.min_occurrences, self.seed),
            exclude_original=self.exclude_original,
            min_candidates=self.min_candidates,
        )
        self._known: dict[Slot, _Filling | _Tokens | None] = {}
        self._draws = torch.Generator().manual_seed(self.seed)
        self._has_warned = False

    def __repr__(self) -> str:
        return f"CorpusBaselines({len(self._index):,} words, match={self.match!r})"

    @overload
    def __call__(self, slot: Slot, generator: torch.Generator, /) -> str | list[int]: ...
    @overload
    def __call__(self) -> list[str] | dict[str, str]: ...
    def __call__(self, slot: Slot | None = None, generator: torch.Generator | None = None) -> Any:
        """One replacement for the feature, including its leading white space and punctuation.

        Without arguments, as called by captum's `TextTemplateInput`: another text for each value of
        that template.

        Raises:
            TypeError: If it is called without arguments by other code.
        """
        if slot is None or generator is None:
            return self._for_template()
        filling = self._filling(slot)
        return slot.text if filling is None else filling.draw(generator)

    def distribution(self, slot: Slot) -> dict[str, float]:
        """See `KnowsDistribution`."""
        filling = self._filling(slot)
        return filling.distribution() if isinstance(filling, _Filling) else {}

    @property
    def warns_of_mismatch(self) -> bool:
        """Whether it searches for surroundings, and warns if the corpus does not contain them."""
        return self.match in ("context", "model") and self.min_candidates > 0

    def explain(self, slot: Slot) -> Match:
        """How the candidates for a feature were found, and what they are."""
        filling = self._filling(slot)
        return BLANK if filling is None else filling.match

    def matches(self, inp: HasSlots) -> list[Match]:
        """How the candidates of each feature of an input were found, in reading order."""
        return [self.explain(slot) for slot in inp.slots]

    def with_model(self, model: LanguageModel) -> "CorpusBaselines":
        """A copy with the same index and a model."""
        if self.match != "model":
            return self
        other = copy.copy(self)
        other._start(model)
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index and all settings into one file."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        labels = list(self._labels.texts.items())
        self._index.save(path, {"settings": json.dumps(settings), "labels": json.dumps(labels)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], **changed: Any) -> "CorpusBaselines":
        """Loads the file of `save`, memory-mapped: nothing is built again.

        Replacing the file later has no effect. If the file itself is modified or truncated, every
        later use of the baselines raises a `ValueError`.

        Args:
            path: The file.
            **changed: Settings to change: any keyword argument of the class except those on reading
                the corpus.

        Raises:
            OSError: If there is no such file, or it cannot be read.
            ValueError: If the file is not such a file, damaged, or of another version.
            TypeError: If there is no such setting.
        """
        index, extra = CorpusIndex.load(path)
        try:
            settings: dict[str, Any] = dict(json.loads(extra["settings"]))
            if {name: type(value) for name, value in settings.items()} != _SETTINGS:
                raise ValueError(f"its settings are {settings}")
            settings["labels"] = dict(json.loads(extra["labels"]))
            # The constructor checks all arguments, on a corpus of one word that is then replaced.
            baselines = cls(["."], **settings)
        except BROKEN as error:
            raise broken(path, error) from error
        unknown = changed.keys() - settings.keys()
        if unknown:
            raise TypeError(
                f"{min(unknown)!r} cannot be changed on loading: give some of "
                f"{', '.join(settings)}."
            )
        if changed:
            baselines = cls(["."], **{**settings, **changed})
        baselines._index = index
        baselines._start()
        return baselines

    def __getstate__(self) -> dict[str, Any]:
        # Caches refer to inputs and models, and are quickly recomputed.
        return {name: self.__dict__[name] for name in (*_SETTINGS, "_index", "_labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _filling(self, slot: Slot) -> "_Filling | _Tokens | None":
        if slot not in self._known:
            self._known[slot] = self._fill(slot)
        return self._known[slot]

    def _fill(self, slot: Slot) -> "_Filling | _Tokens | None":
        own = surroundings_of(slot)
        if own is None:
            return None
        if self.match == "model" and slot.generated and not self._is_labelled(slot, own):
            return self._draw_generated(slot, own)
        together = [(s, surroundings_of(s)) for s in slot.siblings or (slot,)]
        members = [(s, place) for s, place in together if place is not None]
        candidates = self._jointly(members)
        if candidates is None:
            members = [(slot, own)]
            candidates = self._singly(slot, own)
        candidates = self._weighed(self._fitting(candidates, members), members)
        member = next(i for i, (s, _) in enumerate(members) if s.start == slot.start)
        return _Filling(candidates, own, member)

    def _singly(self, slot: Slot, place: Surroundings) -> Candidates:
        return self._listed([(slot, place)]) or self._lookup.single(place)

    def _jointly(self, members: Sequence[tuple[Slot, Surroundings]]) -> Candidates | None:
        """Joint candidates of all slots of a feature; None if unknown."""
        if len(members) == 1:
            return self._singly(*members[0])
        if any(self._is_labelled(slot, place) for slot, place in members):
            return self._listed(members)
        runs = _side_by_side(members)
        phrases = [_joined(run) for run in runs]
        if len(phrases) == 1:
            found = self._lookup.single(phrases[0])
        else:
            found = self._lookup.joint(phrases, self.seed)
        if found is None or len(runs) == len(members):
            return found
        sizes = [[len(place.atoms) for _, place in run] for run in runs]
        return found.divided(sizes)

    def _is_labelled(self, slot: Slot, place: Surroundings) -> bool:
        return self._label(slot, place) is not None

    def _label(self, slot: Slot, place: Surroundings) -> str | int | None:
        name = self._labels.named(slot)
        return self._labels.containing(place.core) if name is None else name

    def _listed(self, members: Sequence[tuple[Slot, Surroundings]]) -> Candidates | None:
        """The user's own texts; for several slots lists of equal length, drawn in step."""
        names = [self._label(slot, place) for slot, place in members]
        lists = [self._labels.texts[name] for name in names if name is not None]
        if len(lists) < len(members) or len({len(texts) for texts in lists}) != 1:
            return None
        original = tuple(place.core for _, place in members)
        counts = Counter(zip(*lists, strict=True))
        return Candidates.counted(
            "label",
            " … ".join(map(str, names)),
            counts,
            original,
            exclude_original=self.exclude_original,
        )

    def _draw_generated(self, slot: Slot, place: Surroundings) -> "_Filling | _Tokens":
        """The model's alternatives to a generated feature."""
        found = self._lookup.single(place)
        if found.match.constant:
            # Without the original, only stray matches remain, which are not representative.
            return _Filling(found, place, 0)
        model = self._language_model()
        if len(slot.ids) == 1:
            ids, probabilities = weighing.next_tokens(slot, model)
            match = Match("model", "_", 0, len(ids), False, ())
            return _Tokens(match, ids, probabilities)
        candidates = weighing.continued(slot, place, model, self.seed)
        return _Filling(self._fitting(candidates, [(slot, place)]), place, 0)

    def _weighed(
        self, candidates: Candidates, members: Sequence[tuple[Slot, Surroundings]]
    ) -> Candidates:
        if self.match != "model" or candidates.match.constant or candidates.match.level == "label":
            return candidates
        few = candidates.sample(weighing.MOST_WEIGHED, self.seed)
        slots, places = zip(*members, strict=True)
        return weighing.in_place(few, slots, places, self._language_model())

    def _language_model(self) -> LanguageModel:
        if self._model is None:
            raise ValueError(
                "match='model' asks the model under explanation: use these baselines in an input "
                "of `GenerationAttribution`, or bind a model by `with_model`."
            )
        return self._model

    def _fitting(
        self, candidates: Candidates, members: Sequence[tuple[Slot, Surroundings]]
    ) -> Candidates:
        """Candidates with as many tokens as the feature, if `same_n_tokens`."""
        if not self.same_n_tokens or candidates.match.constant:
            return candidates

        lengths = [s.n_tokens(s.text, s.left) if s.n_tokens else 0 for s, _ in members]

        def fits(texts: Sequence[str]) -> bool:
            return all(
                slot.n_tokens is None or slot.n_tokens(place.filled(text), slot.left) == wanted
                for (slot, place), wanted, text in zip(members, lengths, texts, strict=True)
            )

        few = candidates.sample(_MEASURED, self.seed)
        original = tuple(place.core for _, place in members)
        kept = few.kept(fits)
        return kept or self._lookup.nothing_fits(original, candidates.match)

    def _for_template(self) -> list[str] | dict[str, str]:
        inp = calling_template(self)
        if inp is None:
            raise TypeError(
                "`CorpusBaselines` was called without arguments, and not by a `TextTemplateInput` "
                "that it is the baseline of: call it with a slot and a generator."
            )
        if not self._has_warned:
            # Captum has no notion of a run: it calls for every evaluation.
            self._has_warned = True
            unlike.warn_of_mismatch(
                self, lambda: [self.explain(slot) for slot in template_slots(inp)]
            )
        seed = int(torch.randint(2**62, (), generator=self._draws, device="cpu"))
        texts = [str(self(s, draw_generator(seed, 0, s.feature))) for s in template_slots(inp)]
        return dict(zip(inp.dict_keys, texts, strict=True)) if inp.dict_keys else texts


def _side_by_side(
    members: Sequence[tuple[Slot, Surroundings]],
) -> list[list[tuple[Slot, Surroundings]]]:
    """Runs of places of words with nothing in between."""
    runs: list[list[tuple[Slot, Surroundings]]] = []
    for slot, place in members:
        if runs and _goes_on(*runs[-1][-1], slot, place):
            runs[-1].append((slot, place))
        else:
            runs.append([(slot, place)])
    return runs


def _goes_on(slot: Slot, place: Surroundings, later: Slot, other: Surroundings) -> bool:
    is_whole = place.part == other.part == (0.0, 1.0)
    return is_whole and slot.stop == later.start and not place.tail and not other.head.strip()


def _joined(run: Sequence[tuple[Slot, Surroundings]]) -> Surroundings:
    """The places of a run as one."""
    (first, start), (last, stop) = run[0], run[-1]
    core = first.context[first.start + len(start.head) : last.stop - len(stop.tail)]
    atoms = tuple(atom for _, place in run for atom in place.atoms)
    return replace(start, core=core, atoms=atoms, right=stop.right, tail=stop.tail)


class _Distinct:
    """Documents, and whether any two of them differ."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.n = 0
        self.differ = False

    def __iter__(self) -> Iterator[str]:
        first: str | None = None
        for text in self._texts:
            self.n += 1
            first = text if first is None else first
            self.differ = self.differ or text != first
            yield text


@dataclass(frozen=True, slots=True)
class _Filling:
    """Candidates for all slots of a feature, and the slot to be filled."""

    candidates: Candidates
    place: Surroundings
    member: int

    @property
    def match(self) -> Match:
        return self.candidates.match

    def draw(self, generator: torch.Generator) -> str:
        return self.place.filled(self.candidates.draw(generator)[self.member])

    def distribution(self) -> dict[str, float]:
        if len(self.candidates.choices) > MOST_TEXTS:
            return {}
        found: dict[str, float] = {}
        for texts, share in self.candidates.probabilities().items():
            text = self.place.filled(texts[self.member])
            found[text] = found.get(text, 0.0) + share
        return found


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Token ids that may replace one token."""

    match: Match
    ids: Sequence[int]
    probabilities: Tensor

    def draw(self, generator: torch.Generator) -> list[int]:
        at = uniform(generator) * float(self.probabilities.sum())
        place = int((self.probabilities.cumsum(0) <= at).sum())
        return [self.ids[min(place, len(self.ids) - 1)]]
