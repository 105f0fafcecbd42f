"""What a model finds likely at places of a text, from its distributions over a vocabulary."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import Listed

# Number of likeliest tokens that are examined, besides the requested ones: at the beginning of a
# chat, and after a first word, the likeliest 1,024 of some models contain no words.
_LOOKED_AT = 4096
_TO_THE_END = 3  # maximum number of tokens of a word after its first; chosen, not measured
_TOKENS_PER_WORD = 3  # additional tokens per further word; chosen, not measured
# Texts whose ids are cached, the latest ones: about 10 MB for texts of some hundred words. A search
# over a prompt of 60 words encodes some hundred different texts. Chosen, not measured.
_MOST_ENCODED = 4096

Distributions = Callable[[Sequence[int], Sequence[int]], Iterable[tuple[int, Tensor]]]
"""Yields, for indices of ids, the log-probabilities of the vocabulary there, given the ids before.

Float64 on the CPU; minus infinity for tokens that are excluded or unknown.
"""


class Listing:
    """Texts of a vocabulary at places of a text.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        self._encoded: dict[str, Sequence[int]] = {}

    def ids(self, text: str) -> Sequence[int]:
        """The ids of a text, with what a text begins with."""
        # Beginnings recur: first for the end of a word, then for what follows.
        known = self._encoded.get(text)
        if known is None:
            ids = tokens.encode(self._tokenizer, text).ids
            known = tokens.after_start(self._tokenizer, ids)
            if len(self._encoded) >= _MOST_ENCODED:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[text] = known
        return known

    def likeliest(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        n: int,
        fits: Callable[[int, str], bool],
        distributions: Distributions,
    ) -> list[Listed | None]:
        """See `Proposer.likeliest`, by these distributions."""
        encoding = tokens.encode(self._tokenizer, text)
        ids = self.ids(text)
        shift = len(ids) - len(encoding.ids)
        anchors = list(accumulate((a if a is not None else -1 for a in encoding.anchors), max))
        # The tokens whose first characters are in the place; preceding white space may be a token
        # of its own.
        originals = [
            range(bisect_left(anchors, start) + shift, bisect_left(anchors, stop) + shift)
            for start, stop in spans
        ]
        known = [own if own and own[0] > 0 else range(0) for own in originals]
        first = {own[0]: number for number, own in enumerate(known) if own}
        begins = torch.tensor(sorted({ids[at] for at in first}), dtype=torch.int64, device="cpu")
        log_probs: dict[int, float] = {}
        others: dict[int, list[tuple[str, float]]] = {}
        chances: dict[int, Tensor] = {}
        for at, distribution in distributions(ids, sorted({at for own in known for at in own})):
            log_probs[at] = float(distribution[ids[at]])
            if (number := first.get(at)) is not None:
                others[number] = self._best(
                    distribution, ids[at - 1 : at + 1], n, partial(fits, number)
                )
                chances[ids[at]] = chances.get(ids[at], torch.zeros_like(distribution[begins]))
                chances[ids[at]] += distribution[begins].exp()
        elsewhere = _elsewhere(begins.tolist(), [ids[at] for at in first], chances)
        return [
            Listed(
                sum(log_probs[at] for at in own),
                self._piece(ids[own[0]], ids[own[0] - 1]).strip(),
                log_probs[own[0]],
                others[number],
                elsewhere[ids[own[0]]],
            )
            if own
            else None
            for number, own in enumerate(known)
        ]

    def _best(
        self, log_probs: Tensor, around: Sequence[int], n: int, fits: Callable[[str], bool]
    ) -> list[tuple[str, float]]:
        """The likeliest tokens at a position besides the original one.

        Args:
            log_probs: Log-probabilities of the vocabulary.
            around: The previous token, and the original one.
            n: Number of tokens.
            fits: Whether a text is allowed.
        """
        before, own = around
        spaced = self._piece(own, before)[:1].isspace()
        found: list[tuple[str, float]] = []
        best = log_probs.topk(min(_LOOKED_AT + n, len(log_probs)))
        for log_prob, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if len(found) == n or log_prob == -torch.inf:
                break
            piece = self._piece(token, before)
            shown = piece.strip()
            if token != own and shown and piece[:1].isspace() == spaced and fits(shown):
                found.append((shown, log_prob))
        return found

    def _piece(self, token: int, before: int) -> str:
        """The text of a token after another one."""
        if token not in self._pieces:
            self._pieces[token] = tokens.pieces(self._tokenizer, [token], [before])[0]
        return self._pieces[token]


def longest_continuation(n_words: int) -> int:
    """Maximum number of tokens of a continuation: see `Proposer.greedy`."""
    return _TO_THE_END + _TOKENS_PER_WORD * n_words


def _elsewhere(
    begins: Sequence[int], originals: Sequence[int], chances: Mapping[int, Tensor]
) -> dict[int, float]:
    """The mean probability of each token at the positions of other ones.

    Args:
        begins: The tokens.
        originals: The original token of every position.
        chances: By original token, the probabilities of `begins` summed over its positions.
    """
    total = sum(chances.values(), torch.zeros(len(begins), dtype=torch.float64, device="cpu"))
    return {
        token: float(total[i] - chances[token][i]) / max(len(originals) - originals.count(token), 1)
        for i, token in enumerate(begins)
    }
