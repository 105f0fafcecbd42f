"""What follows a word of the answer, as evidence for the kind of word that fits."""

import math
from collections.abc import Mapping, Sequence

import torch

from captum_llm_ext.contrast.context import FoilContext
from captum_llm_ext.model import RowScorer, TokenRow

Ids = tuple[int, ...]
# Probability mass of the words that are scored: rarer ones hardly affect the mean. Chosen, not
# measured.
_ENOUGH = 0.95


class Continuation:
    """The likelihood of what follows a word of the answer, averaged over possible words.

    Args:
        context: The prompt and the answer.
        model: Scores the words.
        t: Index of the word's first token.
        n_words: Number of likeliest words of the same kind per prompt, besides the answer's own.
        n_looked: Number of likeliest tokens that are examined.
        n_tokens: Number of tokens after the word that are scored.
    """

    def __init__(
        self,
        context: FoilContext,
        model: RowScorer,
        t: int,
        *,
        n_words: int,
        n_looked: int,
        n_tokens: int,
    ) -> None:
        self._context, self._model, self._t = context, model, t
        self._n_words, self._n_looked = n_words, n_looked
        later = range(t + 1, len(context.target))
        stop = next((i for i in later if not context.goes_on(i)), len(context.target))
        continuation = context.target[stop : stop + n_tokens]
        if len(continuation) < n_tokens:
            continuation += context.continuation(model, n_tokens - len(continuation))
        self._word, self._continuation = context.target[t:stop], continuation

    def __call__(self, prompts: Sequence[Ids]) -> list[float]:
        """The log-probability of what follows after each prompt and a word of the kind.

        The mean over such words, weighted by their probability after the prompt. It is capped at
        the likelihood after the answer's own word and the whole prompt, since what follows was
        generated after that.
        """
        if not self._continuation:
            return [0.0] * len(prompts)
        whole = self._context.full.ids
        words = self._likeliest([*dict.fromkeys(prompts)])
        asked = dict.fromkeys((ids, word) for ids, own in words.items() for word in own)
        asked[whole, self._word] = None
        found = dict(zip(asked, self._log_probs([*asked]), strict=True))
        most = found[whole, self._word]
        means: dict[Ids, float] = {}
        for ids, own in words.items():
            follow = [min(found[ids, word], most) for word in own]
            chances = torch.tensor([*own.values()], dtype=torch.float64, device="cpu")
            joint = chances + torch.tensor(follow, dtype=torch.float64, device="cpu")
            means[ids] = float(joint.logsumexp(0) - chances.logsumexp(0))
        return [means[ids] for ids in prompts]

    def _likeliest(self, prompts: Sequence[Ids]) -> dict[Ids, dict[Ids, float]]:
        """Log-probabilities of words of the kind after each prompt, including the answer's own."""
        rows = [
            TokenRow(ids := (*prompt, *self._context.target[: self._t]), (len(ids) - 1,))
            for prompt in prompts
        ]
        log_probs, tokens = (
            found[:, 0].tolist() for found in self._model.likeliest(rows, self._n_looked)
        )
        return {
            prompt: self._of_kind(dict(zip(ids, chances, strict=True)))
            for prompt, ids, chances in zip(prompts, tokens, log_probs, strict=True)
        }

    def _of_kind(self, likeliest: Mapping[int, float]) -> dict[Ids, float]:
        """The allowed ones among tokens, the likeliest first."""
        context, t, n_others = self._context, self._t, 0
        found: dict[Ids, float] = {}
        for token, log_prob in likeliest.items():
            if token == context.target[t]:
                found[self._word] = log_prob
            elif token >= 0 and n_others < self._n_words and context.fits(token, t):
                found[(token,)] = log_prob
                n_others += 1
        return _likely(found)

    def _log_probs(self, asked: Sequence[tuple[Ids, Ids]]) -> list[float]:
        """Log-probabilities of what follows, after prompts and words."""
        before, continuation = self._context.target[: self._t], self._continuation
        rows = [
            TokenRow(
                (*prompt, *before, *word, *continuation[:-1]),
                range(n := len(prompt) + len(before) + len(word) - 1, n + len(continuation)),
            )
            for prompt, word in asked
        ]
        target = torch.tensor(continuation, dtype=torch.int64, device="cpu")
        return self._model.values(rows, target).sum(1).tolist()


def _likely(words: Mapping[Ids, float]) -> dict[Ids, float]:
    """The likeliest words, by log-probabilities, without negligible ones."""
    left = sum(map(math.exp, words.values()))
    hardly = (1 - _ENOUGH) * left
    found: dict[Ids, float] = {}
    for word, log_prob in sorted(words.items(), key=lambda entry: -entry[1]):
        if left <= hardly:
            break
        found[word] = log_prob
        left -= math.exp(log_prob)
    return found
