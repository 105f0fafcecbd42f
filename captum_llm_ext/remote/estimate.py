"""Estimates the cost of an attribution on a rung; nothing is sent."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.model import TokenRow
from captum_llm_ext.model.forward.value_spec import ValueSpec
from captum_llm_ext.model.scoring.progress import ProgressBar
from captum_llm_ext.remote.ladder import LadderScorer
from captum_llm_ext.text.inputs import Prompt

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
    """A scorer that counts requests without sending any."""

    def __init__(self) -> None:
        self.attr_target: Any = "frequency"
        self.n_evaluations = self.n_read = 0
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
