"""`Prompt`: the interface between inputs and attribution, whatever the input is made of."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import (
    AnswerFit,
    Baseline,
    Bonds,
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
"""Per prompt, given as ids, the log-probability that words of the answer's kinds come next."""

_NO_PLACES = (
    "this needs features that own tokens, which templates, images and inputs of other kinds do "
    "not tell: give captum's `TextTokenInput`, or `TextSegmentInput` (`from_template` for a "
    "template) or `ChatInput`."
)


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """The model's input for one coalition of prompt features.

    Attributes:
        ids: Token ids.
        extras: Other arguments of the model's forward (pixel values…), batch size 1. None for text.
        key: Tells prompts with equal ids and different extras apart.
    """

    ids: tuple[int, ...]
    extras: Mapping[str, Any] | None = None
    key: object = None


@dataclass(frozen=True, slots=True)
class RenderedText:
    """The model's input for one coalition of prompt features and features of the target.

    Attributes:
        prompt: Its beginning.
        ids: Token ids of the prompt and of the generated text before the last target token.
        positions: Per target token the index in `ids` whose logits predict it; -1 where the
            coalition gives the token no value.
    """

    prompt: RenderedPrompt
    ids: tuple[int, ...]
    positions: Sequence[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text.

    Attributes:
        text: As it stands.
        feature: The feature it shows; None for fixed text.
        role: Whose message of a chat it is in; ``"template"`` for what no one said (what a chat
            template puts around messages, special tokens); None for other text.
    """

    text: str
    feature: int | None
    role: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Its parts by name; the role only where there is one."""
        told = {"text": self.text, "feature": self.feature}
        return told if self.role is None else told | {"role": self.role}


@dataclass(frozen=True, slots=True)
class Level:
    """Features grouped into the parts of a coarser unit.

    Attributes:
        name: Its unit: ``"sentence"``, ``"turn"``…
        parts: One name per part.
        part_of: Per feature the part it is in.
    """

    name: str
    parts: list[str]
    part_of: list[int]


@dataclass(frozen=True, slots=True)
class Place:
    """Positions of a feature's tokens, or of a part of them that is replaced as a whole.

    Attributes:
        positions: Indices of token ids, in reading order.
        feature: The feature they are of.
    """

    positions: tuple[int, ...]
    feature: int


class Prompt(ABC):
    """A prompt as features that can be absent.

    Attributes:
        n_features: Features that are switched; columns of `masks`.
        names: One name per column of the result.
        columns: Per column of the result the feature whose score it shows.
        pieces: The prompt as text, in reading order; a piece's number is a column of the result.
        text: The prompt as one text: what generated text continues.
        own_baseline: What stands where features of the prompt are absent: a baseline, or what
            captum's inputs have for one. None: nothing.
        output_baseline: What stands where generated features are absent, unless the user says
            otherwise.
        deterministic: Whether two renderings of one coalition are always equal.
        levels: Coarser readings of the columns, from coarse to fine; empty for most inputs.
        unit_name: What one feature is called: ``"word"``, ``"turn"``…
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
        """The prompts of several coalitions.

        Args:
            masks: Bool, shape ``(n_coalitions, n_features)``, True = present.
            generator: Source of every random choice; one number is taken from it.
            draws: Shape ``(n_coalitions,)``: coalitions with equal number share one draw of
                replacements. By default each has its own.

        Returns:
            One rendered prompt per coalition.
        """

    def places(self) -> list[Place]:
        """Positions of the features in the ids of the prompt with every feature present.

        Raises:
            TypeError: If absent features change more than the tokens in their own places.
        """
        raise TypeError(_NO_PLACES)

    def places_without(self, features: Collection[int]) -> frozenset[int]:
        """Positions whose ids may change if these features, and no others, are absent.

        Args:
            features: Numbers of features.

        Returns:
            Indices of token ids: their own, and those of places that are absent with them.

        Raises:
            TypeError: As `places`.
        """
        return frozenset(
            p for own in self.places() if own.feature in features for p in own.positions
        )

    def stand_ins(self, n_draws: int, generator: torch.Generator) -> list[list[tuple[int, ...]]]:
        """Replacement ids for every one of `places`; none for deletion.

        Args:
            n_draws: Number of draws.
            generator: One number is taken from it.

        Returns:
            Per draw and place the ids, as many as the baseline gives.

        Raises:
            TypeError: As `places`.
        """
        raise TypeError(_NO_PLACES)

    def feature_names(self, joiner: str = " + ") -> list[str]:
        """One name per feature; of one that spans several columns, all of theirs."""
        columns: list[list[str]] = [[] for _ in range(self.n_features)]
        for name, feature in zip(self.names, self.columns, strict=True):
            columns[feature].append(name)
        return [joiner.join(own) for own in columns]

    def with_default(self, baselines: Any) -> "Prompt":
        """A copy with these baselines, if the user gave none; otherwise the prompt itself."""
        return self

    def with_model(self, model: LanguageModel) -> "Prompt":
        """A copy whose baselines can ask this model; the prompt itself if none does."""
        return self

    def with_answer(self, log_probs: AnswerLogProbs, text: str) -> "Prompt":
        """A copy whose baselines are conditioned on an answer; the prompt itself if none can be."""
        return self

    def matches(self) -> list[Match] | None:
        """How the baseline found candidates for each slot; None if it does not say."""
        return None

    def unchanging(self) -> list[int]:
        """Features that stay as they are when absent, as far as the baseline says."""
        return []


class Replacements:
    """Draws the ids that replace absent features.

    Args:
        baseline: What stands there.
        slots: All places, in reading order.
        tokenizer: Tokenises replacement texts in place.
        by_phrase: Whether places that the baseline takes for one thing are absent together.
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

    def with_model(self, model: LanguageModel) -> "Replacements":
        """A copy whose baseline can ask this model."""
        return self._of(with_model(self._baseline, model), self._slots)

    @property
    def uses_answer(self) -> bool:
        """Whether the baseline can be conditioned on the text after the prompt."""
        return isinstance(self._baseline, UsesAnswer)

    def with_answer(self, fit: AnswerFit, text: str) -> "Replacements":
        """A copy conditioned on an answer, where the baseline can be."""
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
        """How the baseline found candidates for the first `n` slots; None if it does not say.

        Of a phrase that is absent as one, every slot has those of the phrase.
        """
        explain = getattr(self._baseline, "explain", None)
        if explain is None:
            return None
        phrase_of = {index: run for run in self._found_bonds().phrases for index in run}
        runs = [phrase_of.get(index, (index,)) for index in range(len(self._slots[:n]))]
        return [explain(joined([self._slots[i] for i in run])) for run in runs]

    def unchanging(self, n: int | None = None) -> set[int]:
        """Indices of those of the first `n` slots in which nothing but their own text is drawn.

        What is drawn for a slot may be another thing where its neighbours are absent too.
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
        """Slots that are drawn together where some are absent.

        Args:
            absent: Indices of slots.

        Returns:
            For these, and for all that are absent with them, the slots drawn together with each, in
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
    ) -> list[Callable[..., tuple[int, ...]]]:
        """Per row a function from indices of slots to replacement ids.

        Its arguments are a unit (see `units`), or a single slot.

        Args:
            n_rows: Number of coalitions.
            generator: One number is taken from it; all draws follow from that one.
            draws: Shape ``(n_rows,)``: rows with equal number share a draw. None: each its own.
        """
        seed = draw_seed(generator)
        numbers = range(n_rows) if draws is None else draws.tolist()
        known: dict[tuple[int, ...], tuple[int, ...]] = {}

        def ids(draw: int, *unit: int) -> tuple[int, ...]:
            if (draw, *unit) not in known:
                self._found_bonds()  # asked of all places at once
                slot = joined([self._slots[i] for i in unit])
                # A generator for each feature: a row draws only what it lacks, and the same as
                # every other row of its draw. Slots of one feature share it: what they draw from
                # lists of equal length stands at one place of them.
                known[draw, *unit] = self._ids(slot, draw_generator(seed, draw, slot.feature))
            return known[draw, *unit]

        return [partial(ids, 0 if self.deterministic else number) for number in numbers]

    def _ids(self, slot: Slot, generator: torch.Generator) -> tuple[int, ...]:
        found = self._baseline(slot, generator)
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
        # A part of a character has no text that other text could stand for.
        if not content or not slot.text:
            return ()
        own = slot.text
        # The white space that the feature's tokens hold at their ends is not what it says.
        text = own[: len(own) - len(own.lstrip())] + content
        if own.strip() and content == content.rstrip():
            text += own[len(own.rstrip()) :]
        left = slot.context[max(0, slot.start - tokens.CONTEXT) : slot.start]
        if (text, left) not in self._in_place:
            self._in_place[text, left] = tokens.encode_in_place(self._tokenizer, text, left)
        return self._in_place[text, left]


def template_pieces(
    template: str | Callable[..., str], values: Sequence[str] | Mapping[str, str]
) -> list[Piece] | None:
    """The text that a template makes, its values numbered; None if they cannot be found in it."""
    parts = template_parts(template, values)
    return None if parts is None else [Piece(text, number) for text, number in parts if text]


def draw_seed(generator: torch.Generator) -> int:
    """A seed for all draws of one rendering, taken from the generator."""
    return int(torch.randint(2**62, (), generator=generator, device="cpu"))
