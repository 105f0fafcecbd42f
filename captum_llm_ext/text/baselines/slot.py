"""What a baseline is asked: one place of a text whose feature is absent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slot:
    """One contiguous place of a text that an absent feature leaves to be filled.

    Attributes:
        context: The whole text the feature stands in, the feature included.
        start: First character of the feature in `context`; its leading white space belongs to it.
        stop: One past the feature's last character.
        ids: The feature's own token ids.
        index: Number of the slot, counted in reading order within prompt or output.
        feature: Number of the feature it belongs to: `index` itself unless slots are tied.
        unit: ``"token"``, ``"word"``, ``"sentence"`` and the like, or None for spans of the
            user's own.
        generated: Whether the feature is a part of the model's own output.
        label: What the user calls the kind of thing that stands here: ``"city"``.
        siblings: All places of a feature that has several, in reading order, this one included (and
            none of them with siblings); empty for a feature that stands in one place.
        n_tokens: How many tokens a text takes after another: ``n_tokens(text, left)``; None where
            nobody can say.
    """

    context: str
    start: int
    stop: int
    ids: tuple[int, ...] = ()
    index: int = 0
    feature: int = 0
    unit: str | None = None
    generated: bool = False
    label: str | None = None
    siblings: "tuple[Slot, ...]" = ()
    n_tokens: Callable[[str, str], int] | None = field(default=None, compare=False)

    @property
    def text(self) -> str:
        """The feature's own text, leading white space included."""
        return self.context[self.start : self.stop]

    @property
    def left(self) -> str:
        """All text before the feature."""
        return self.context[: self.start]

    @property
    def right(self) -> str:
        """All text after the feature."""
        return self.context[self.stop :]


@runtime_checkable
class Baseline(Protocol):
    """What stands where a feature is absent.

    Called once per absent feature and draw. Returns text (tokenised in place; ``""`` deletes; the
    feature's leading white space is put before text that has none) or token ids (used as they
    are). Random choices come from `generator` alone. A baseline whose answer never depends on
    `generator` says so with an attribute ``deterministic = True``: one draw of it is then enough.
    """

    def __call__(self, slot: Slot, generator: torch.Generator, /) -> str | Sequence[int]:
        """The replacement for `slot`."""
        ...


@dataclass(frozen=True, slots=True)
class Listed:
    """What a model finds likely in a place of a text; log-probabilities are in nats.

    Attributes:
        log_prob: Of what stands there.
        piece: What the first token shows of that, without white space.
        piece_log_prob: Of that token.
        others: The likeliest other tokens that fit, as text without white space, and the
            log-probability of each.
        elsewhere: The mean probability of the first token where other words of the text stand; 0
            where nobody can say.
    """

    log_prob: float
    piece: str
    piece_log_prob: float
    others: Sequence[tuple[str, float]]
    elsewhere: float = 0.0


@runtime_checkable
class Proposer(Protocol):
    """What a baseline may ask of a model that knows what may stand in a place.

    Attributes:
        reads_rest: Whether what it finds `likeliest` goes by the text after a place, too.
    """

    reads_rest: bool

    def likeliest(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        n: int,
        fits: Callable[[int, str], bool],
    ) -> list[Listed | None]:
        """What may stand in places of a text, all of them asked for at once.

        Args:
            text: The text.
            spans: Of its characters, ``(start, stop)``, in reading order; none begins with white
                space.
            n: At most so many tokens a place.
            fits: Called with the number of a place and what a token shows there, without white
                space; whether the token may stand there.

        Returns:
            One entry per place; None where nothing is known of it: nothing comes before, or no
            token begins there.
        """
        ...

    def log_probs_between(
        self, beginnings: Sequence[str], texts: Sequence[str], rests: Sequence[str]
    ) -> Tensor:
        """The log-probability of each text between its beginning and the rest, ``(n,)``.

        A causal model does not see the rest.
        """
        ...

    def greedy(
        self,
        beginnings: Sequence[str],
        rests: Sequence[str],
        n_words: Sequence[int],
        is_enough: Callable[[int, str], bool],
    ) -> list[str]:
        """What most likely follows each text, token by token, all of them at once.

        Args:
            beginnings: The texts. Each ends with what may be a word, or the beginning of one.
            rests: What comes after; a causal model does not see it.
            n_words: About how many words and marks are wanted beyond the one that a text ends with.
            is_enough: Called with the number of a text and what follows it so far; True ends it.
        """
        ...


class LanguageModel(Proposer, Protocol):
    """What a baseline may ask the model that is being explained.

    Arguments are texts first, then numbers, then callables, then a generator.
    """

    def log_likelihoods(self, texts: Sequence[str]) -> Tensor:
        """The log-probability of each text as a whole, in nats, shape ``(n_texts,)``."""
        ...

    def next_token(self, text: str) -> Tensor:
        """Log-probabilities of what follows a text, ``(vocabulary,)``; special tokens have none."""
        ...

    def continuations(
        self, text: str, n: int, n_tokens: int, generator: torch.Generator
    ) -> list[str]:
        """Samples of what follows a text: `n` texts of at most `n_tokens` tokens each."""
        ...

    def proposing(self, proposer: Any) -> Proposer:
        """Another model as a `Proposer`.

        Args:
            proposer: ``(model, tokenizer)``, or what has both; or a model with the tokenizer of
                this one.

        Raises:
            TypeError, ValueError: If it is none that can propose.
        """
        ...


@runtime_checkable
class AsksModel(Protocol):
    """A baseline that needs the model: it is given it once, before a run."""

    def with_model(self, model: LanguageModel, /) -> Baseline:
        """The same baseline with a model to ask; the object itself stays as it is."""
        ...


@runtime_checkable
class KnowsPhrases(Protocol):
    """A baseline for which several places may be one thing."""

    def read(self, slots: Sequence[Slot], /) -> "Bonds":
        """Which places of one context are absent, or drawn, together.

        It is asked once, before any of them is drawn: what has to be found out of all of them is
        best found out here.
        """
        ...


AnswerFit = Callable[[Sequence[Mapping[Slot, str]]], Sequence[float]]
"""Of texts that stand in places at once, per trial the log-probability that words of the kinds that
were written come next; NaN where nobody can say. A trial of no place is the text as it is."""


@runtime_checkable
class UsesAnswer(Protocol):
    """A baseline that goes by what was written after the text, too."""

    def with_answer(self, fit: AnswerFit, text: str, /) -> Baseline:
        """The same for an answer; the object itself stays as it is.

        Args:
            fit: How likely words of its kinds are.
            text: What was written.
        """
        ...


@dataclass(frozen=True, slots=True)
class Bonds:
    """Neighbouring slots that belong together, as indices.

    Attributes:
        phrases: Slots that are one thing: where one of them is absent, all are.
        ties: Phrases or slots, each of them by itself, that are drawn as one text where all of
            their slots are absent.
    """

    phrases: Sequence[Sequence[int]] = ()
    ties: Sequence[Sequence[int]] = ()


def bonds_of(baseline: Baseline, slots: Sequence[Slot]) -> Bonds:
    """Slots of one context that belong together; none for most baselines."""
    return baseline.read(slots) if isinstance(baseline, KnowsPhrases) else Bonds()


def joined(slots: Sequence[Slot]) -> Slot:
    """Neighbouring slots as one; its number and feature are those of the first."""
    if len(slots) == 1:
        return slots[0]
    ids = tuple(token for slot in slots for token in slot.ids)
    return replace(slots[0], stop=slots[-1].stop, ids=ids, siblings=())
