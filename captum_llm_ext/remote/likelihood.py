"""`RemoteLikelihood`: a served model as baselines use it; it only gives probabilities of texts."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from captum_llm_ext.model.likelihood import as_proposer
from captum_llm_ext.remote.scorer import RemoteScorer
from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import Listed, Proposer

_NO_MODEL = (
    "this baseline asks the model for {what}, which {who}: give another one, such as "
    '`CorpusBaselines(texts)` with `match="context"`{instead}.'
)

_ANOTHER = ", or `ModelBaselines((model, tokenizer))` with a model of this process"


class RemoteLikelihood:
    """The served model as a `LanguageModel`, as far as possible.

    Args:
        scorer: Requests each text once, and counts these requests.
        tokenizer: The model's tokenizer.
    """

    reads_rest = False

    def __init__(self, scorer: RemoteScorer, tokenizer: Any) -> None:
        self._scorer, self._tokenizer = scorer, tokenizer

    def log_likelihoods(self, texts: Sequence[str]) -> Tensor:
        """See `LanguageModel.log_likelihoods`; float64.

        Raises:
            ValueError: If the provider takes texts, whose first token has no probability.
        """
        if not self._scorer.takes_ids:
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
        """Not supported."""
        self._refuse("distributions", "an API does not return", _ANOTHER)

    def log_probs_between(
        self, beginnings: Sequence[str], texts: Sequence[str], rests: Sequence[str]
    ) -> Tensor:
        """Not supported without distributions."""
        self._refuse("distributions", "an API does not return", _ANOTHER)

    def greedy(
        self,
        beginnings: Sequence[str],
        rests: Sequence[str],
        n_words: Sequence[int],
        is_enough: Callable[[int, str], bool],
    ) -> list[str]:
        """Not supported without distributions."""
        self._refuse("distributions", "an API does not return", _ANOTHER)

    def proposing(self, proposer: Any) -> Proposer:
        """See `LanguageModel.proposing`: a local model proposes for one behind an API."""
        return as_proposer(proposer, self._tokenizer)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tokens.after_start(self._tokenizer, tokens.encode(self._tokenizer, text).ids)

    def _refuse(self, what: str, hint: str, instead: str = "") -> NoReturn:
        raise ValueError(_NO_MODEL.format(what=what, who=hint, instead=instead))
