"""The interface of baselines: a slot in a text whose feature is absent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slot:
    """One contiguous place of an absent feature, to be replaced.

    Attributes:
        context: The whole text, including the feature.
        start: First character of the feature in `context`; its leading white space belongs to it.
        stop: One past the feature's last character.
        ids: The feature's own token ids.
        index: Index of the slot in reading order within prompt or output.
        feature: Index of its feature: `index` itself unless slots are grouped.
        unit: ``"token"``, ``"word"``, ``"sentence"`` etc., or None for the user's own spans.
        generated: Whether the feature is generated text.
        label: The user's label for the kind of text: ``"city"``.
        siblings: All slots of a feature that has several, in reading order, including this one
            (themselves without siblings); empty for a feature with one slot.
        n_tokens: Number of tokens of a text after another: ``n_tokens(text, left)``; None if
            unknown.
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
    """Replaces absent features: a callable from a slot and a generator to text or token ids.

    Called once per absent feature and draw. Returns text (tokenised in place; ``""`` deletes; the
    feature's leading white space is prepended to text without any) or token ids (used unchanged).
    Random choices come from `generator` alone. A baseline that never uses `generator` declares this
    by an attribute ``deterministic = True``: one draw is then enough.
    """

    def __call__(self, slot: Slot, generator: torch.Generator, /) -> str | Sequence[int]:
        """The replacement for `slot`."""
        ...


@dataclass(frozen=True, slots=True)
class Listed:
    """What a model finds likely at a position of a text; log-probabilities are in nats.

    Attributes:
        log_prob: Log-probability of the original text.
        piece: Text of its first token, without white space.
        piece_log_prob: Log-probability of that token.
        others: The likeliest other tokens that fit, as text without white space, with their
            log-probabilities.
        elsewhere: Mean probability of the first token at the positions of other words; 0 if
            unknown.
    """

    log_prob: float
    piece: str
    piece_log_prob: float
    others: Sequence[tuple[str, float]]
    elsewhere: float = 0.0


@runtime_checkable
class Proposer(Protocol):
    """A model that proposes texts for positions, as baselines use it.

    Attributes:
        reads_rest: Whether `likeliest` also depends on the text after a position.
    """

    reads_rest: bool

    def likeliest(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        n: int,
        fits: Callable[[int, str], bool],
    ) -> list[Listed | None]:
        """Likely texts at positions of a text, for all of them at once.

        Args:
            text: The text.
            spans: Character spans ``(start, stop)`` in reading order; none begins with white space.
            n: Maximum number of tokens per span.
            fits: Called with the index of a span and a token's text without white space; returns
                whether the token is allowed.

        Returns:
            One entry per span; None if nothing precedes it, or no token begins there.
        """
        ...

    def log_probs_between(
        self, beginnings: Sequence[str], texts: Sequence[str], rests: Sequence[str]
    ) -> Tensor:
        """The log-probability of each text between its beginning and the rest, ``(n,)``.

        A causal model ignores the rest.
        """
        ...

    def greedy(
        self,
        beginnings: Sequence[str],
        rests: Sequence[str],
        n_words: Sequence[int],
        is_enough: Callable[[int, str], bool],
    ) -> list[str]:
        """The likeliest continuation of each text, token by token, for all texts at once.

        Args:
            beginnings: The texts. Each ends with a word or the beginning of one.
            rests: The texts after the continuations; a causal model ignores them.
            n_words: Approximate number of words and punctuation marks beyond the one that a text
                ends with.
            is_enough: Called with the index of a text and its continuation so far; True ends it.
        """
        ...


class LanguageModel(Proposer, Protocol):
    """The explained model, as baselines use it.

    Arguments are texts first, then numbers, then callables, then a generator.
    """

    def log_likelihoods(self, texts: Sequence[str]) -> Tensor:
        """The log-probability of each whole text, in nats, shape ``(n_texts,)``."""
        ...

    def next_token(self, text: str) -> Tensor:
        """Log-probabilities of the next token, ``(vocabulary,)``; special tokens are excluded."""
        ...

    def continuations(
        self, text: str, n: int, n_tokens: int, generator: torch.Generator
    ) -> list[str]:
        """Samples of what follows a text: `n` texts of at most `n_tokens` tokens each."""
        ...

    def proposing(self, proposer: Any) -> Proposer:
        """Another model as a `Proposer`.

        Args:
            proposer: ``(model, tokenizer)``, or an object with both; or a model with the same
                tokenizer as this one.

        Raises:
            TypeError, ValueError: If it cannot propose texts.
        """
        ...


@runtime_checkable
class AsksModel(Protocol):
    """A baseline that uses the model, which it is given once before a run."""

    def with_model(self, model: LanguageModel, /) -> Baseline:
        """A copy of the baseline with the model; the object itself is unchanged."""
        ...


@runtime_checkable
class KnowsPhrases(Protocol):
    """A baseline that treats several slots as one phrase."""

    def read(self, slots: Sequence[Slot], /) -> "Bonds":
        """Which slots of one context are absent, or drawn, together.

        Called once before any draw, so that computations for all slots can be done here.
        """
        ...


@runtime_checkable
class KnowsDistribution(Protocol):
    """A baseline that knows with which probability it draws each text."""

    def distribution(self, slot: Slot, /) -> Mapping[str, float]:
        """Every text that a call may return for the slot, with its probability.

        Empty if unknown, or if there are too many. Probabilities sum to 1.
        """
        ...


AnswerFit = Callable[[Sequence[Mapping[Slot, str]]], Sequence[float]]
"""Scores texts with replacements by the log-probability that words of the answer's kinds follow.

One number per trial; NaN if unknown. A trial without replacements is the original text.
"""


@runtime_checkable
class UsesAnswer(Protocol):
    """A baseline that can also use the text generated after the prompt."""

    def with_answer(self, fit: AnswerFit, text: str, /) -> Baseline:
        """A copy conditioned on an answer; the object itself is unchanged.

        Args:
            fit: Likelihood of words of the same kinds as the answer's.
            text: The answer.
        """
        ...


@dataclass(frozen=True, slots=True)
class Bonds:
    """Neighbouring slots that belong together, as indices.

    Attributes:
        phrases: Slots of one phrase: if one of them is absent, all are.
        ties: Phrases or slots that can be absent separately, but are drawn as one text if all of
            them are absent.
    """

    phrases: Sequence[Sequence[int]] = ()
    ties: Sequence[Sequence[int]] = ()


def bonds_of(baseline: Baseline, slots: Sequence[Slot]) -> Bonds:
    """Slots of one context that belong together; empty for most baselines."""
    return baseline.read(slots) if isinstance(baseline, KnowsPhrases) else Bonds()


def joined(slots: Sequence[Slot]) -> Slot:
    """Neighbouring slots as one, with the index and feature of the first."""
    if len(slots) == 1:
        return slots[0]
    ids = tuple(token for slot in slots for token in slot.ids)
    return replace(slots[0], stop=slots[-1].stop, ids=ids, siblings=())
