"""`Prompt`: the interface between inputs and attribution, for all kinds of inputs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import (
    AnswerFit,
    Baseline,
    Bonds,
    KnowsDistribution,
    LanguageModel,
    Slot,
    UsesAnswer,
    bonds_of,
    draw_generator,
    is_deterministic,
    joined,
    template_parts,
    with_model,
)
from captum_llm_ext.text.baselines.candidates import Match

AnswerLogProbs = Callable[[Sequence[tuple[int, ...]]], Sequence[float]]
"""Maps prompts, as ids, to the log-probability that words of the answer's kinds come next."""

_NO_PLACES = (
    "this needs features that own tokens, which templates, images and inputs of other kinds do "
    "not tell: give captum's `TextTokenInput`, or `TextSegmentInput` (`from_template` for a "
    "template) or `ChatInput`."
)


@dataclass(frozen=True, slots=True, eq=False)
class DrawnUnit:
    """Slots that are drawn together, from texts of known probabilities.

    Attributes:
        feature: The last of their features, counted within the prompt or the target.
        probabilities: Of each of the texts.
    """

    feature: int
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """The model's input for one coalition of prompt features.

    Attributes:
        ids: Token ids.
        extras: Other arguments of the model's forward (pixel values…), batch size 1. None for text.
        key: Distinguishes prompts with equal ids and different extras.
        drawn: Units that were drawn at random, and the index of the text; if known.
    """

    ids: tuple[int, ...]
    extras: Mapping[str, Any] | None = None
    key: object = None
    drawn: Mapping[DrawnUnit, int] = field(default_factory=dict[DrawnUnit, int], compare=False)


@dataclass(frozen=True, slots=True)
class RenderedText:
    """The model's input for one coalition of prompt features and features of the target.

    Attributes:
        prompt: The rendered prompt.
        ids: Token ids of the prompt and of the generated text before the last target token.
        positions: Per target token the index in `ids` whose logits predict it; -1 if the coalition
            defines no value for the token.
        drawn: As for `RenderedPrompt`, for units of the target.
    """

    prompt: RenderedPrompt
    ids: tuple[int, ...]
    positions: Sequence[int]
    drawn: Mapping[DrawnUnit, int] = field(default_factory=dict[DrawnUnit, int], compare=False)


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous part of the text.

    Attributes:
        text: Its text.
        feature: Its feature; None for fixed text.
        role: Role of its chat message; ``"template"`` for text around messages and special tokens;
            None for other text.
    """

    text: str
    feature: int | None
    role: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; the role only if there is one."""
        fields = {"text": self.text, "feature": self.feature}
        return fields if self.role is None else fields | {"role": self.role}


@dataclass(frozen=True, slots=True)
class Level:
    """Features grouped into the parts of a coarser unit.

    Attributes:
        name: Its unit: ``"sentence"``, ``"turn"``…
        parts: One name per part.
        part_of: Per feature the index of its part.
    """

    name: str
    parts: list[str]
    part_of: list[int]


@dataclass(frozen=True, slots=True)
class Place:
    """Positions of a feature's tokens, or of a part of them that is replaced as a whole.

    Attributes:
        positions: Indices of token ids, in reading order.
        feature: Index of the feature.
    """

    positions: tuple[int, ...]
    feature: int


class Prompt(ABC):
    """A prompt as features that can be absent.

    Attributes:
        n_features: Number of features: columns of `masks`.
        names: One name per column of the result.
        columns: Per column of the result the feature whose attribution it holds.
        pieces: The prompt as text, in reading order; a piece's `feature` is a column of the result.
        text: The prompt as one text.
        own_baseline: Replaces absent prompt features: a baseline, or the one of captum's inputs.
            None: deletion.
        output_baseline: Default replacement of absent generated features.
        deterministic: Whether a coalition is always rendered the same.
        levels: Coarser units of the columns, from coarse to fine; empty for most inputs.
        unit_name: Name of the unit of features: ``"word"``, ``"turn"``…
    """

    n_features: int
    names: list[str]
    columns: list[int]
    pieces: list[Piece]
    text: str
    own_baseline: Any
    output_baseline: Baseline
    deterministic: bool
    levels: Sequence[Level] = ()
    unit_name: str = "feature"

    @abstractmethod
    def render(
        self, masks: Tensor, generator: torch.Generator, draws: Tensor | None = None
    ) -> list[RenderedPrompt]:
        """The rendered prompts of several coalitions.

        Args:
            masks: Bool, shape ``(n_coalitions, n_features)``, True = present.
            generator: Source of all random choices; advanced by one number.
            draws: Shape ``(n_coalitions,)``: coalitions with equal numbers share one draw of
                replacements. By default each has its own.

        Returns:
            One rendered prompt per coalition.
        """

    def places(self) -> list[Place]:
        """Positions of the features in the ids of the prompt with every feature present.

        Raises:
            TypeError: If absent features change more than their own tokens.
        """
        raise TypeError(_NO_PLACES)

    def places_without(self, features: Collection[int]) -> frozenset[int]:
        """Positions whose ids may change if these features, and no others, are absent.

        Args:
            features: Indices of features.

        Returns:
            Indices of token ids: the features' own, and those of places that are absent with them.

        Raises:
            TypeError: As for `places`.
        """
        return frozenset(
            p for own in self.places() if own.feature in features for p in own.positions
        )

    def replacement_ids(
        self, n_draws: int, generator: torch.Generator
    ) -> list[list[tuple[int, ...]]]:
        """Replacement ids for every one of `places`; empty for deletion.

        Args:
            n_draws: Number of draws.
            generator: Advanced by one number.

        Returns:
            Per draw and place the replacement ids, of any number.

        Raises:
            TypeError: As for `places`.
        """
        raise TypeError(_NO_PLACES)

    def feature_names(self, joiner: str = " + ") -> list[str]:
        """One name per feature; a feature of several columns has their joined names."""
        columns: list[list[str]] = [[] for _ in range(self.n_features)]
        for name, feature in zip(self.names, self.columns, strict=True):
            columns[feature].append(name)
        return [joiner.join(own) for own in columns]

    def with_default(self, baselines: Any) -> "Prompt":
        """A copy with these baselines if the user gave none; otherwise the prompt itself."""
        return self

    def with_model(self, model: LanguageModel) -> "Prompt":
        """A copy whose baselines can use this model; the prompt itself if none does."""
        return self

    def with_answer(self, log_probs: AnswerLogProbs, text: str) -> "Prompt":
        """A copy whose baselines are conditioned on an answer; the prompt itself if none can be."""
        return self

    def matches(self) -> list[Match] | None:
        """How the baseline found candidates for each slot; None if unknown."""
        return None

    def unchanging(self) -> list[int]:
        """Features that remain unchanged when absent, as far as the baseline reports."""
        return []


class Replacements:
    """Draws the ids that replace absent features.

    Args:
        baseline: Provides the replacements.
        slots: All places, in reading order.
        tokenizer: Tokenises replacement texts in place.
        by_phrase: Whether slots of one phrase are absent together.
    """

    def __init__(
        self, baseline: Baseline, slots: Sequence[Slot], tokenizer: Any, *, by_phrase: bool = False
    ) -> None:
        self.deterministic = not slots or is_deterministic(baseline)
        self._baseline = baseline
        self._slots = slots
        self._tokenizer = tokenizer
        self._by_phrase = by_phrase
        self._in_place: dict[tuple[str, str], tuple[int, ...]] = {}
        self._bonds: Bonds | None = None
        self._units: dict[tuple[int, ...], tuple[DrawnUnit, dict[str, int]] | None] = {}

    def with_model(self, model: LanguageModel) -> "Replacements":
        """A copy whose baseline can use this model."""
        return self._of(with_model(self._baseline, model), self._slots)

    @property
    def uses_answer(self) -> bool:
        """Whether the baseline can be conditioned on the text after the prompt."""
        return isinstance(self._baseline, UsesAnswer)

    def with_answer(self, fit: AnswerFit, text: str) -> "Replacements":
        """A copy conditioned on an answer, if the baseline supports it."""
        found = self._baseline
        return self._of(
            found.with_answer(fit, text) if isinstance(found, UsesAnswer) else found, self._slots
        )

    def over(self, slots: Sequence[Slot]) -> "Replacements":
        """A copy for other slots."""
        return self._of(self._baseline, slots)

    def _of(self, baseline: Baseline, slots: Sequence[Slot]) -> "Replacements":
        return Replacements(baseline, slots, self._tokenizer, by_phrase=self._by_phrase)

    def matches(self, n: int | None = None) -> list[Match] | None:
        """How the baseline found candidates for the first `n` slots; None if unknown.

        For a phrase, every slot has the candidates of the phrase.
        """
        explain = getattr(self._baseline, "explain", None)
        if explain is None:
            return None
        phrase_of = {index: run for run in self._found_bonds().phrases for index in run}
        runs = [phrase_of.get(index, (index,)) for index in range(len(self._slots[:n]))]
        return [explain(joined([self._slots[i] for i in run])) for run in runs]

    def unchanging(self, n: int | None = None) -> set[int]:
        """Indices of those of the first `n` slots for which only their own text is drawn.

        If neighbours are absent too, other text may be drawn for a slot.
        """
        bonds = self._found_bonds()
        tied = {index for run in bonds.ties for index in run}
        tied |= {index for run in bonds.phrases if not tied.isdisjoint(run) for index in run}
        return {
            index
            for index, match in enumerate(self.matches(n) or ())
            if match.constant and match.determined == 1 and index not in tied
        }

    def units(self, absent: Collection[int]) -> Mapping[int, tuple[int, ...]]:
        """Slots that are drawn together when some are absent.

        Args:
            absent: Indices of slots.

        Returns:
            For these, and for all slots absent with them, the slots drawn together with each, in
            reading order.
        """
        if not absent:
            return {}
        bonds = self._found_bonds()
        unit_of = {index: (index,) for index in absent}
        for run in bonds.phrases:
            if any(index in unit_of for index in run):
                unit_of |= dict.fromkeys(run, tuple(run))
        for run in bonds.ties:
            if all(index in unit_of for index in run):
                whole = tuple(sorted({index for part in run for index in unit_of[part]}))
                unit_of |= dict.fromkeys(whole, whole)
        return unit_of

    def _found_bonds(self) -> Bonds:
        if self._bonds is None:
            found = bonds_of(self._baseline, self._slots)
            self._bonds = found if self._by_phrase else Bonds()
        return self._bonds

    def draws(
        self, n_rows: int, generator: torch.Generator, draws: Tensor | None
    ) -> list["RowDraw"]:
        """Per row a function from indices of slots to replacement ids.

        Its arguments are a unit (see `units`), or a single slot.

        Args:
            n_rows: Number of coalitions.
            generator: Advanced by one number, from which all draws follow.
            draws: Shape ``(n_rows,)``: rows with equal numbers share a draw. None: each has its
                own.
        """
        seed = draw_seed(generator)
        numbers = range(n_rows) if draws is None else draws.tolist()
        known: dict[tuple[int, ...], _Replacement] = {}

        def drawn(draw: int, unit: tuple[int, ...]) -> _Replacement:
            if (draw, *unit) not in known:
                self._found_bonds()  # computed for all slots at once
                slot = joined([self._slots[i] for i in unit])
                # A generator per feature: a row draws only what it lacks, and the same as every
                # other row of its draw. Slots of one feature share it: lists of equal length are
                # drawn at the same index.
                generator = draw_generator(seed, draw, slot.feature)
                found = self._baseline(slot, generator)
                ids = self._ids(slot, found)
                known[draw, *unit] = _Replacement(ids, *self._numbered(unit, slot, found))
            return known[draw, *unit]

        return [RowDraw(drawn, 0 if self.deterministic else number) for number in numbers]

    def _numbered(
        self, unit: tuple[int, ...], slot: Slot, found: Any
    ) -> tuple[DrawnUnit, int] | tuple[None, int]:
        """The unit as drawn at random and the index of its text; None if that is unknown."""
        if self.deterministic:
            return None, 0
        if unit not in self._units:
            baseline = self._baseline
            knows = isinstance(baseline, KnowsDistribution)
            texts = baseline.distribution(slot) if knows else {}
            last = max((self._slots[i].feature for i in unit), default=0)
            self._units[unit] = (
                (DrawnUnit(last, tuple(texts.values())), {text: i for i, text in enumerate(texts)})
                if len(texts) > 1
                else None
            )
        known = self._units[unit]
        # Ids, or a text that was not announced.
        if known is None or not isinstance(found, str) or found not in known[1]:
            return None, 0
        return known[0], known[1][found]

    def _ids(self, slot: Slot, found: Any) -> tuple[int, ...]:
        if not isinstance(found, str):
            try:
                return tuple(int(token) for token in found)
            except (TypeError, ValueError):
                raise TypeError(
                    f"the baseline returned {found!r} for {slot.text!r}: return a text or "
                    "token ids."
                ) from None
        return self.in_place(slot, found)

    def in_place(self, slot: Slot, found: str) -> tuple[int, ...]:
        """Ids of a replacement text, with the white space around the text that it replaces."""
        content = found.lstrip()
        # A part of a character has no text that could be replaced.
        if not content or not slot.text:
            return ()
        own = slot.text
        # White space at the ends of the feature's tokens is not part of its content.
        text = own[: len(own) - len(own.lstrip())] + content
        if own.strip() and content == content.rstrip():
            text += own[len(own.rstrip()) :]
        left = slot.context[max(0, slot.start - tokens.CONTEXT) : slot.start]
        if (text, left) not in self._in_place:
            self._in_place[text, left] = tokens.encode_in_place(self._tokenizer, text, left)
        return self._in_place[text, left]


class _Replacement(NamedTuple):
    """What was drawn for a unit: its ids, and which of the unit's texts, if known."""

    ids: tuple[int, ...]
    unit: DrawnUnit | None
    text: int


class RowDraw:
    """The draw of one row: maps a unit to the ids of its replacement.

    Attributes:
        drawn: Units that the row has drawn, with the index of the text; if known.
    """

    def __init__(self, draw: Callable[[int, tuple[int, ...]], _Replacement], number: int) -> None:
        self._draw, self._number = draw, number
        self.drawn: dict[DrawnUnit, int] = {}

    def __call__(self, *unit: int) -> tuple[int, ...]:
        """The replacement of a unit (see `Replacements.units`), or of a single slot."""
        found = self._draw(self._number, unit)
        if found.unit is not None:
            self.drawn[found.unit] = found.text
        return found.ids


def template_pieces(
    template: str | Callable[..., str], values: Sequence[str] | Mapping[str, str]
) -> list[Piece] | None:
    """The text of a template, its values numbered; None if they cannot be located in it."""
    parts = template_parts(template, values)
    return None if parts is None else [Piece(text, number) for text, number in parts if text]


def draw_seed(generator: torch.Generator) -> int:
    """A seed for all draws of one rendering, taken from the generator."""
    return int(torch.randint(2**62, (), generator=generator, device="cpu"))
