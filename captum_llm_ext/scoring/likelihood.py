"""What a baseline may ask the model under explanation: how probable texts are, and what it says."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat, tokens
from captum_llm_ext.scoring.exclusive import as_found

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
        found = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        for start in range(0, len(order), _ROWS_AT_ONCE):
            batch = order[start : start + _ROWS_AT_ONCE]
            found[batch] = self._sums([rows[i] for i in batch])
        return found

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
        written: list[str] = []
        for first in range(0, n, _ROWS_AT_ONCE):
            rows = torch.tensor(
                [start] * min(_ROWS_AT_ONCE, n - first), dtype=torch.int64, device="cpu"
            )
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
        for own, row in zip(logits, rows, strict=True):  # a copy in float32 of one row at a time
            own = own[: len(row) - 1].to(torch.promote_types(own.dtype, torch.float32))
            said = torch.tensor(row[1:], device=own.device, dtype=torch.int64)[:, None]
            sums.append(float((own.gather(1, said)[:, 0] - own.logsumexp(1)).double().sum()))
        return torch.tensor(sums, dtype=torch.float64, device="cpu")

    def _logits(self, ids: Tensor) -> Tensor:
        arguments = {}
        if "use_cache" in _compat.forward_arguments(self._model):
            arguments["use_cache"] = False
        with as_found(self._model):
            output = self._model(input_ids=ids.to(self._device), **arguments)
        return _compat.sequence_logits(output)

    def _special(self, size: int) -> list[int]:
        """Ids that end or pad a text: none of its words."""
        ids: set[int] = set(getattr(self._tokenizer, "all_special_ids", None) or ())
        return [token for token in ids if token < size]
