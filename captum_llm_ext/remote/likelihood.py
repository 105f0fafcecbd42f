"""`RemoteLikelihood`: a served model as baselines use it, as far as its provider reports."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from captum_llm_ext.model.likelihood import as_proposer
from captum_llm_ext.remote.ladder import LadderScorer
from captum_llm_ext.remote.scorer import RemoteScorer
from captum_llm_ext.remote.search import OTHERWISE
from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import Listed, Proposer

_NO_MODEL = (
    "this baseline asks the model for {what}, which {who}: give another one, such as "
    '`CorpusBaselines(texts)` with `match="context"`{instead}.'
)


class RemoteLikelihood:
    """The served model as a `LanguageModel`, as far as possible.

    Args:
        scorer: Requests each text once, and counts these requests.
        tokenizer: The model's tokenizer.
        proposer: Proposes texts by what the provider reports; None if it reports no tokens other
            than those sent.
    """

    reads_rest = False

    def __init__(
        self, scorer: RemoteScorer | LadderScorer, tokenizer: Any, proposer: Proposer | None = None
    ) -> None:
        self._scorer, self._tokenizer = scorer, tokenizer
        self._proposer = proposer

    def log_likelihoods(self, texts: Sequence[str]) -> Tensor:
        """See `LanguageModel.log_likelihoods`; float64.

        Raises:
            ValueError: If the provider takes texts, whose first token has no probability.
        """
        if not isinstance(self._scorer, RemoteScorer) or not self._scorer.takes_ids:
            self._refuse("the probability of texts", "a provider that takes texts does not return")
        return self._scorer.sums([self._ids(text) for text in texts])

    def next_token(self, text: str) -> Tensor:
        """Not supported."""
        self._refuse("distributions", "an API does not return", ", or `output_unit=None`")

    def continuations(
        self, text: str, n: int, n_tokens: int, generator: torch.Generator
    ) -> list[str]:
        """Not supported: an API does not sample from a generator."""
        self._refuse("samples from a seed", "an API does not give", ", or `output_unit=None`")

    def likeliest(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        n: int,
        fits: Callable[[int, str], bool],
    ) -> list[Listed | None]:
        """See `Proposer.likeliest`."""
        return self._proposing.likeliest(text, spans, n, fits)

    def log_probs_between(
        self, beginnings: Sequence[str], texts: Sequence[str], rests: Sequence[str]
    ) -> Tensor:
        """See `Proposer.log_probs_between`."""
        return self._proposing.log_probs_between(beginnings, texts, rests)

    def greedy(
        self,
        beginnings: Sequence[str],
        rests: Sequence[str],
        n_words: Sequence[int],
        is_enough: Callable[[int, str], bool],
    ) -> list[str]:
        """See `Proposer.greedy`."""
        return self._proposing.greedy(beginnings, rests, n_words, is_enough)

    def proposing(self, proposer: Any) -> Proposer:
        """See `LanguageModel.proposing`: a local model proposes for one behind an API."""
        return as_proposer(proposer, self._tokenizer)

    @property
    def _proposing(self) -> Proposer:
        if self._proposer is None:
            raise ValueError(
                "`ModelBaselines` ask the model for its likeliest words in each place, and this "
                "provider reports no tokens other than those sent: give one that does, such as "
                f"`CompletionsProvider`, or {OTHERWISE}."
            )
        return self._proposer

    def _ids(self, text: str) -> tuple[int, ...]:
        return tokens.after_start(self._tokenizer, tokens.encode(self._tokenizer, text).ids)

    def _refuse(self, what: str, hint: str, instead: str = "") -> NoReturn:
        raise ValueError(_NO_MODEL.format(what=what, who=hint, instead=instead))
