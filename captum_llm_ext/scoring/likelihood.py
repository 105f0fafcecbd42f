"""What a baseline may ask the model under explanation: how probable texts are, and what it says."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat, tokens
from captum_llm_ext.scoring.exclusive import as_found
from captum_llm_ext.scoring.probe import Findings, findings
from captum_llm_ext.scoring.rows import TokenRow

# Rows of one pass. These texts are few and short beside the coalitions that are scored later.
_ROWS_AT_ONCE = 16


class Likelihood:
    """The model under explanation as a `LanguageModel`; it is left as it was found.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._device = _compat.input_device(model)

    def log_likelihoods(self, texts: Sequence[str]) -> Tensor:
        """See `LanguageModel.log_likelihoods`; float64 on the CPU."""
        rows = [self._ids(text) for text in texts]
        # Neighbours in length share a pass.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        sums = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        if not any(len(row) > 1 for row in rows):
            return sums
        found = self._look([row for row in rows if len(row) > 1])
        at_once = 1 if found.couples_rows or found.even else _ROWS_AT_ONCE
        for start in range(0, len(order), at_once):
            batch = order[start : start + at_once]
            some = [rows[i] for i in batch]
            sums[batch] = self._sums(some) if not found.step_by_step else self._stepping(some[0])
        return sums

    def next_token(self, text: str) -> Tensor:
        """See `LanguageModel.next_token`; float64 on the CPU."""
        logits = (
            self._logits(torch.tensor([self._ids(text)], dtype=torch.int64, device="cpu"))[0, -1]
            .double()
            .cpu()
        )
        logits[self._special(len(logits))] = -torch.inf
        return logits.log_softmax(0)

    def continuations(
        self, text: str, n_tokens: int, n: int, generator: torch.Generator
    ) -> list[str]:
        """See `LanguageModel.continuations`."""
        start = self._ids(text)
        at_once = 1 if self._look([[*start, start[-1]]]).couples_rows else _ROWS_AT_ONCE
        written: list[str] = []
        for first in range(0, n, at_once):
            rows = torch.tensor([start] * min(at_once, n - first), dtype=torch.int64, device="cpu")
            for _ in range(n_tokens):
                logits = self._logits(rows)[:, -1].double().cpu()
                logits[:, self._special(logits.shape[1])] = -torch.inf
                drawn = torch.multinomial(logits.softmax(1), 1, generator=generator)
                rows = torch.cat([rows, drawn], dim=1)
            written += [
                "".join(tokens.pieces(self._tokenizer, row[len(start) :], start))
                for row in rows.tolist()
            ]
        return written

    def _ids(self, text: str) -> list[int]:
        ids = list(tokens.encode(self._tokenizer, text).ids)
        start = tokens.start_id(self._tokenizer)
        # The first token has no probability; with BOS or the like before it, every word has one.
        return ids if start is None or ids[:1] == [start] else [start, *ids]

    def _sums(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Log-probability of each row, ``(n_rows,)``."""
        length = max(map(len, rows))
        # What stands right of a row is never seen by it.
        ids = torch.tensor(
            [[*row, *[0] * (length - len(row))] for row in rows], dtype=torch.int64, device="cpu"
        )
        logits = self._logits(ids[:, :-1])
        sums: list[float] = []
        before = logits.shape[1] - ids.shape[1] + 1  # a soft prompt's
        for own, row in zip(logits, rows, strict=True):  # a copy in float32 of one row at a time
            own = own[before : before + len(row) - 1].to(
                torch.promote_types(own.dtype, torch.float32)
            )
            said = torch.tensor(row[1:], device=own.device, dtype=torch.int64)[:, None]
            sums.append(float((own.gather(1, said)[:, 0] - own.logsumexp(1)).double().sum()))
        return torch.tensor(sums, dtype=torch.float64, device="cpu")

    def _stepping(self, row: Sequence[int]) -> Tensor:
        """Log-probability of a row, whose every token is asked with nothing after it, ``(1,)``."""
        total = 0.0
        for n in range(1, len(row)):
            logits = self._logits(torch.tensor([row[:n]], dtype=torch.int64, device="cpu"))[
                0, -1
            ].double()
            total += float(logits.log_softmax(0)[row[n]])
        return torch.tensor([total], dtype=torch.float64, device="cpu")

    def _look(self, rows: Sequence[Sequence[int]]) -> Findings:
        """What the model does with such rows."""
        read = [TokenRow(tuple(row[:-1]), range(len(row) - 1)) for row in rows]
        with as_found(self._model):
            return findings(self._model, read)

    def _logits(self, ids: Tensor) -> Tensor:
        arguments = {}
        if "use_cache" in _compat.forward_arguments(self._model):
            arguments["use_cache"] = False
        with as_found(self._model):
            output = _compat.called(self._model, ids.to(self._device), **arguments)
        return _compat.sequence_logits(output)

    def _special(self, size: int) -> list[int]:
        """Ids that end or pad a text: none of its words."""
        ids: set[int] = set(getattr(self._tokenizer, "all_special_ids", None) or ())
        return [token for token in ids if token < size]
