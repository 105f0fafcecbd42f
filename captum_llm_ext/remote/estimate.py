"""Estimates the cost of an attribution on a rung; nothing is sent."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.model import TokenRow
from captum_llm_ext.model.forward.value_spec import ValueSpec
from captum_llm_ext.model.scoring.progress import ProgressBar
from captum_llm_ext.remote.ladder import LadderScorer
from captum_llm_ext.remote.metered import CHARACTERS_PER_TOKEN
from captum_llm_ext.text.baselines import Listed
from captum_llm_ext.text.inputs import Prompt

# Probability of the original in each place, and of all others; their log-likelihood by the words
# after them, in nats. So all of them are tried.
_UNLIKELY, _LIKELY, _NEVER = 0.01, 0.5, -60.0
# Requests for a trial of a replacement close to the answer, and number of last tokens that are
# close: see `AnswerKinds`, with four words of its kind besides its own.
_OF_TRIAL, _NEAR = 7, 5
LENGTHS = {"max_new_tokens", "max_tokens", "max_completion_tokens", "max_length"}

# Most requests of a handshake, with the generation of the target and the repetition at the end: of
# any next token by a bias, with two ways to prefill an answer.
N_CHECKS = 12


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimated requests, tokens and costs of an attribution; printed as a table by rung.

    Attributes:
        n_coalitions: Number of distinct coalitions, including the full and the empty one.
        n_requests: Maximum number of requests, without those that check the server, up to 12.
        n_search: Those of them that search replacements (`ModelBaselines`), if all candidates have
            to be tried.
        tokens_in, tokens_out: Maximum numbers of input and output tokens; approximate without a
            tokenizer.
        usd: Their cost at the given prices; None without prices.
        rung: The rung that takes this.
        rungs: The same for every rung that may be chosen, the first that works being used; this one
            is the most expensive.
    """

    n_coalitions: int
    n_requests: int
    tokens_in: int
    tokens_out: int
    usd: float | None
    rung: str = ""
    rungs: tuple["Estimate", ...] = ()
    n_search: int = 0

    def __str__(self) -> str:
        names = ("rung", "coalitions", "requests", "tokens in", "tokens out")
        rows = [
            (
                one.rung,
                *(f"{n:,}" for n in (one.n_coalitions, one.n_requests)),
                *(f"{n:,}" for n in (one.tokens_in, one.tokens_out)),
                *(() if one.usd is None else (f"{one.usd:.4f}",)),
            )
            for one in self.rungs or (self,)
        ]
        shown = [(*names, *(() if self.usd is None else ("US dollars",))), *rows]
        return "\n".join(f"{row[0]:<10}" + "".join(f"{n:>12}" for n in row[1:]) for row in shown)


class Counter(LadderScorer):
    """A scorer that counts requests without sending any.

    Args:
        by_ids: Whether one request reports likeliest tokens at all positions of a prompt.
    """

    def __init__(self, *, by_ids: bool) -> None:
        self.by_ids = by_ids
        self.attr_target: Any = "frequency"
        self.n_evaluations = self.n_read = 0
        self.n_search = self.n_read_in_search = 0
        self.n_scored = [0]
        self._bar = ProgressBar("coalitions", "coalition", is_shown=False)
        self._seen: set[bytes] = set()

    def values(
        self, rows: Sequence[TokenRow], target: Tensor, foils: Tensor | None = None
    ) -> Tensor:
        """Zeros."""
        spec = ValueSpec(target)
        for row in rows:
            d = spec.digest(row)
            if d not in self._seen:
                self._seen.add(d)
                self.n_evaluations += 1
                self.n_read += row.first + 1
        return torch.zeros(len(rows), len(target), dtype=torch.float64, device="cpu")

    def search(self, n_requests: int, n_read: int) -> None:
        """Counts requests of a search for replacements, and the tokens of their prompts."""
        self.n_search += n_requests
        self.n_read_in_search += n_read

    def count_trials(self, prompts: Sequence[tuple[int, ...]]) -> list[float]:
        """Counts trials of replacements with the answer after them (see `AnswerKinds`); zeros."""
        whole = max(prompts, key=len, default=())
        for ids in {*prompts} if self.by_ids else ():
            n = _OF_TRIAL if _n_common(ids, whole) >= len(whole) - _NEAR else 1
            self.search(n, n * len(ids))
        return [0.0] * len(prompts)


class CountingProposer:
    """A `Proposer` that counts the requests of a search without sending any.

    As many as there may be: nothing is certain, and the words after a place fit none of the
    candidates, so that all of them are tried. What it proposes is spelt unlike the original.

    Args:
        counter: The counter.
    """

    reads_rest = False

    def __init__(self, counter: Counter) -> None:
        self._counter, self._text = counter, ""

    def likeliest(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        n: int,
        fits: Callable[[int, str], bool],
    ) -> list[Listed | None]:
        """See `Proposer.likeliest`."""
        self._text = text
        own = [text[start:stop] for start, stop in spans]
        if self._counter.by_ids:
            self._counter.search(1, _n_tokens(text))
        else:
            for start, stop in spans:
                n_pieces = _n_tokens(text[start:stop])
                self._counter.search(n_pieces, n_pieces * _n_tokens(text[:start]))
        return [self._listed(word, n, partial(fits, i)) for i, word in enumerate(own)]

    def _listed(self, own: str, n: int, fits: Callable[[str], bool]) -> Listed:
        others = [own + own[-1] * (i + 1) for i in range(n)]
        chance = math.log(_LIKELY / n)
        return Listed(
            math.log(_UNLIKELY), own, math.log(_UNLIKELY), [(o, chance) for o in others if fits(o)]
        )

    def log_probs_between(
        self, beginnings: Sequence[str], texts: Sequence[str], rests: Sequence[str]
    ) -> Tensor:
        """See `Proposer.log_probs_between`."""
        for before, text in zip(beginnings, texts, strict=True):
            n = 1 if self._counter.by_ids else _n_tokens(text)
            self._counter.search(n, n * _n_tokens(before + text))
        is_own = [self._text.startswith(before) for before in beginnings]
        return torch.tensor(is_own, dtype=torch.float64, device="cpu") * -_NEVER + _NEVER

    def greedy(
        self,
        beginnings: Sequence[str],
        rests: Sequence[str],
        n_words: Sequence[int],
        is_enough: Callable[[int, str], bool],
    ) -> list[str]:
        """See `Proposer.greedy`."""
        for before in beginnings:
            self._counter.search(1, _n_tokens(before))
        return [""] * len(beginnings)


def _n_tokens(text: str) -> int:
    """Number of tokens of a text, approximately, at least one."""
    return max(1, round(len(text) / CHARACTERS_PER_TOKEN))


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def rendered(prompt: Prompt, is_present: bool) -> tuple[int, ...]:
    """Token ids of a prompt with all, or no, features present."""
    mask = torch.full((1, prompt.n_features), is_present, dtype=torch.bool, device="cpu")
    return prompt.render(mask, torch.Generator().manual_seed(0))[0].ids


def n_new(gen_args: Mapping[str, Any] | None, target: str | None) -> int:
    """Maximum number of tokens of an answer."""
    given = dict(gen_args or {})
    found = next((given[name] for name in sorted(LENGTHS & set(given)) if given[name]), None)
    if found is not None:
        return int(found)
    return 25 if target is None else max(25, round(len(target) / 2))


def finite(values: Tensor) -> list[Any]:
    """As nested lists, with None for infinite bounds, which JSON cannot hold."""
    if values.dim() > 1:
        return [finite(one) for one in values]
    return [v if math.isfinite(v) else None for v in values.tolist()]
