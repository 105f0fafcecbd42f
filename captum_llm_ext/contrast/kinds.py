"""The kinds of words in an answer, and their probability after other prompts."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from captum_llm_ext.contrast.context import FoilContext
from captum_llm_ext.contrast.continuation import Continuation
from captum_llm_ext.model import RowScorer, TokenRow

# Number of words that represent a kind: on natural prompts whose cause is known, 64 to 256 name
# equally many causes; with fewer, other answers of the kind are missing, with more, any word
# counts.
_WORDS = 128
_LOOKED_AT = 1024  # likeliest tokens examined; chosen, not measured
# Later tokens follow from those before them, whatever the prompt. Chosen, not measured.
_TOKENS = 8

# Tokens before the answer that determine its grammar. There two texts may both continue with words
# of a kind ("late because she", "late for work"), and differ in what follows these. Chosen, not
# measured.
_NEAR = 5
_NEAR_WORDS = 4  # likeliest words of the prompt's own; chosen, not measured
# One token: later ones depend on the content of the answer ("right" is repeated), not on its
# function. Chosen, not measured.
_FOLLOWING = 1

# Least share of a kind, for finite logarithms: chosen, not measured.
_LEAST = 1e-12

Ids = tuple[int, ...]
KnownTokens = Callable[[Sequence[TokenRow], Tensor], Sequence[Sequence[Mapping[int, float]]]]
"""Per row and target token the log-probabilities of the known tokens in its place."""


class AnswerKinds:
    """The probability that words of an answer's kinds follow prompts, at its first positions.

    A kind is a token and the likeliest others that are written alike (leading space, capital) after
    the whole prompt. For a prompt that differs just before the answer, the likelihood of what
    follows the answer's first word is included, averaged over the prompt's own words of that kind:
    these must have the same grammatical function.

    If only few of the likeliest tokens of each position are known, other prompts may have others of
    the kind among them: then it is the share of the kind in the probability of the known tokens.

    Args:
        context: The prompt and the answer.
        model: Scores the words.
        known: The log-probabilities of the known tokens at positions of rows, which include the
            row's own. Used if `model` knows fewer than 128 of them.
    """

    def __init__(
        self, context: FoilContext, model: RowScorer, known: KnownTokens | None = None
    ) -> None:
        self._context, self._model, self._known = context, model, known

    def __call__(self, prompts: Sequence[Ids]) -> list[float]:
        """The log-probability of these kinds after each prompt; NaN if the text is too long."""
        at, foils = self._kinds
        if not at:
            return [0.0] * len(prompts)
        target = torch.tensor(
            [self._context.target[t] for t in at], device="cpu", dtype=torch.int64
        )
        before = self._context.target[: at[-1]]
        rows = {
            ids: TokenRow((*ids, *before), [len(ids) - 1 + t for t in at])
            for ids in dict.fromkeys(prompts)
            if ids and self._has_positions(len(ids) + len(before))
        }
        found: dict[Ids, float] = {}
        if rows:
            with self._model.progress():
                sums = self._sums([*rows.values()], target, foils)
            found = dict(zip(rows, sums, strict=True))
            for ids, gain in self._followed([*found]).items():
                found[ids] += gain
        return [found.get(ids, float("nan")) for ids in prompts]

    def _sums(self, rows: Sequence[TokenRow], target: Tensor, foils: Tensor) -> list[float]:
        """The log-probability of the kinds after each row."""
        if self._known is not None and self._likeliest.shape[1] < _WORDS:
            return [self._share(entries) for entries in self._known(rows, target)]
        own, others = self._model.values(rows, target, foils).split(len(target), dim=1)
        others = others.masked_fill((foils < 0).all(1), -torch.inf)
        return own.logaddexp(others).sum(1).tolist()

    def _share(self, entries: Sequence[Mapping[int, float]]) -> float:
        context, total = self._context, 0.0
        for t, entry in zip(self._kinds[0], entries, strict=True):
            chances = {token: math.exp(value) for token, value in entry.items()}
            own = (c for i, c in chances.items() if i == context.target[t] or context.fits(i, t))
            share = sum(own) / max(sum(chances.values()), _LEAST)
            total += math.log(max(share, _LEAST))
        return total

    def _followed(self, prompts: Sequence[Ids]) -> dict[Ids, float]:
        """Loss in likelihood of what follows the answer's first word, for prompts that differ."""
        whole = self._context.full.ids
        near = [
            ids for ids in prompts if ids != whole and _n_common(ids, whole) >= len(whole) - _NEAR
        ]
        if not near or self._first_word is None or not self._model.scores_continuations:
            return {}
        own, *others = self._following([whole, *near])
        return {ids: min(other - own, 0.0) for ids, other in zip(near, others, strict=True)}

    @cached_property
    def _following(self) -> Continuation:
        return Continuation(
            self._context,
            self._model,
            self._first_word or 0,
            n_words=_NEAR_WORDS,
            n_looked=_LOOKED_AT,
            n_tokens=_FOLLOWING,
        )

    @cached_property
    def _first_word(self) -> int | None:
        """The first position with other tokens of its kind; None if there is none."""
        return next((t for t in self._kinds[0] if not self._context.is_space(t)), None)

    @cached_property
    def _likeliest(self) -> Tensor:
        """The likeliest tokens at each position of the answer, as far as the model knows."""
        [ids] = self._context.likeliest(self._model, _LOOKED_AT)[1]
        return ids

    @cached_property
    def _kinds(self) -> tuple[list[int], Tensor]:
        """Positions of the answer that have a kind, and the other tokens of it, padded with -1."""
        context = self._context
        first = range(min(_TOKENS, len(context.target)))
        word_starts = [
            t for t in first if not (context.is_special(context.target[t]) or context.goes_on(t))
        ]
        if not word_starts or context.full.extras is not None:
            return [], torch.empty(0, 0, dtype=torch.int64, device="cpu")
        ids = self._likeliest
        kinds = {
            t: [token for token in ids[t].tolist() if token >= 0 and context.fits(token, t)][
                :_WORDS
            ]
            for t in word_starts
        }
        # Where digits are tokens, white space before a number is one as well, without others.
        at = [t for t in word_starts if kinds[t] or context.is_space(t)]
        most = max((len(kinds[t]) for t in at), default=0)
        rows = [[*kinds[t], *[-1] * (most - len(kinds[t]))] for t in at]
        return at, torch.tensor(rows, dtype=torch.int64, device="cpu")

    def _has_positions(self, n: int) -> bool:
        try:
            self._model.check_length(n, "a text that is tried")
        except ValueError:
            return False
        return True


def _n_common(one: Ids, other: Ids) -> int:
    """Length of the common prefix of two id sequences."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
