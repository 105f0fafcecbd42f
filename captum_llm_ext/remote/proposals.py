"""`PromptProposer`: a served model as `Proposer`, by log-probabilities of prompts as ids."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.model.listing import Listing, longest_continuation
from captum_llm_ext.remote.likeliest import TopOfPrompts
from captum_llm_ext.remote.scorer import RemoteScorer
from captum_llm_ext.remote.search import OTHERWISE
from captum_llm_ext.remote.transport import ApiError
from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import Listed

Ids = tuple[int, ...]


class PromptProposer:
    """A served model that reports the likeliest tokens at every position of a prompt.

    All places of a text take one request; the end of each candidate and the score of each trial
    text one more.

    Args:
        scorer: Sends requests, counts and stores them.
        tokenizer: The model's tokenizer.
        most: Number of likeliest tokens requested at every position.

    Attributes:
        top: The likeliest tokens of prompts.
    """

    reads_rest = False

    def __init__(self, scorer: RemoteScorer, tokenizer: Any, most: int) -> None:
        self._scorer, self._tokenizer = scorer, tokenizer
        self._listing = Listing(tokenizer)
        self._special: set[int] = set(getattr(tokenizer, "all_special_ids", None) or ())
        self.top = TopOfPrompts(scorer, tokenizer, most)

    def likeliest(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        n: int,
        fits: Callable[[int, str], bool],
    ) -> list[Listed | None]:
        """See `Proposer.likeliest`.

        Raises:
            ValueError: If the provider reports no tokens other than those sent, or invalid numbers.
            ApiError: If it refuses.
        """
        with self._scorer.searching():
            return self._listing.likeliest(text, spans, n, fits, self._distributions)

    def log_probs_between(
        self, beginnings: Sequence[str], texts: Sequence[str], rests: Sequence[str]
    ) -> Tensor:
        """See `Proposer.log_probs_between`; float64 on the CPU."""
        starts = [self._listing.ids(beginning) for beginning in beginnings]
        rows = [
            (*ids, *tokens.encode_in_place(self._tokenizer, text, beginning))
            for ids, text, beginning in zip(starts, texts, beginnings, strict=True)
        ]
        if not rows:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        with self._scorer.searching():
            return self._scorer.sums(rows, [len(ids) for ids in starts])

    def greedy(
        self,
        beginnings: Sequence[str],
        rests: Sequence[str],
        n_words: Sequence[int],
        is_enough: Callable[[int, str], bool],
    ) -> list[str]:
        """See `Proposer.greedy`; one request per text."""
        starts = [tuple(self._listing.ids(beginning)) for beginning in beginnings]
        limits = [longest_continuation(n) for n in n_words]
        with self._scorer.searching():
            found = {
                limit: iter(
                    self._scorer.further(
                        f"greedy {limit}",
                        [ids for ids, own in zip(starts, limits, strict=True) if own == limit],
                        lambda ids, limit=limit: self._written(ids, limit),
                    )
                )
                for limit in dict.fromkeys(limits)
            }
        texts: list[str] = []
        for i, (ids, limit) in enumerate(zip(starts, limits, strict=True)):
            written = [int(token) for token in next(found[limit])[1:]]
            text = ""
            for n in range(1, len(written) + 1):
                if written[n - 1] in self._special:
                    break
                text = "".join(tokens.pieces(self._tokenizer, written[:n], ids))
                if is_enough(i, text):
                    break
            texts.append(text)
        return texts

    def _distributions(self, ids: Sequence[int], at: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for place, distribution in self.top.distributions(ids, at):
            self._scorer.search.note(distribution[distribution > -torch.inf].tolist())
            yield place, distribution

    def _written(self, ids: Ids, limit: int) -> list[float]:
        """Ids generated greedily, after their number."""
        generate = getattr(self._scorer.source.provider, "generate_tokens", None)
        if not callable(generate):
            raise ApiError(
                f"{type(self._scorer.source.provider).__name__} has no `generate_tokens`, by which "
                f"incomplete words are completed: {OTHERWISE}."
            )
        found: Any = generate(list(ids), max_new_tokens=limit, do_sample=False, temperature=0.0)
        if isinstance(found, str):
            found = tokens.encode_in_place(
                self._tokenizer, found, tokens.decode(self._tokenizer, ids[-tokens.CONTEXT :])
            )
        return [float(len(found)), *map(float, found)]
