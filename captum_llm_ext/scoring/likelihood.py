"""What a baseline may ask the model under explanation: how probable texts are, and what it says."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat, tokens
from captum_llm_ext.scoring.exclusive import as_found
from captum_llm_ext.scoring.probe import Findings, findings
from captum_llm_ext.scoring.rows import TokenRow
from captum_llm_ext.scoring.scorer import Scorer

# Rows of one pass. These texts are few and short beside the coalitions that are scored later.
_ROWS_AT_ONCE = 16
# Of so many tokens per wanted one it is looked up what they show.
_LOOKED_AT = 64


class Likelihood:
    """The model under explanation as a `LanguageModel`; it is left as it was found.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._device = _compat.input_device(model)
        self._pieces: dict[int, str] = {}

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

    def likeliest(
        self, text: str, places: Sequence[int], n: int, fits: Callable[[int, str], bool]
    ) -> list[list[tuple[str, float]]]:
        """See `LanguageModel.likeliest`."""
        encoding = tokens.encode(self._tokenizer, text)
        ids = self._ids(text)
        shift = len(ids) - len(encoding.ids)
        anchors = list(accumulate((a if a is not None else -1 for a in encoding.anchors), max))
        # The tokens that show the places' characters; white space before may be tokens of its own.
        stand = [bisect_right(anchors, place) - 1 + shift for place in places]
        said = self._log_probs(ids, [at for at in stand if at > 0])
        return [
            self._best(said[at], ids[at - 1 : at + 1], n, partial(fits, number)) if at > 0 else []
            for number, at in enumerate(stand)
        ]

    def _best(
        self, log_probs: Tensor, around: Sequence[int], n: int, fits: Callable[[str], bool]
    ) -> list[tuple[str, float]]:
        """What stands in a place, and the likeliest others.

        Args:
            log_probs: Of the vocabulary.
            around: The token before the place, and the one that stands there.
            n: Number of others.
            fits: Whether a text may stand there.
        """
        before, own = around
        stands = self._piece(own, before)
        found = [(stands.strip(), float(log_probs[own]))]
        best = log_probs.topk(min(_LOOKED_AT * n, len(log_probs)))
        for log_prob, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if len(found) > n or log_prob == -torch.inf:
                break
            piece = self._piece(token, before)
            is_like = piece[:1].isspace() == stands[:1].isspace() and piece.strip() != ""
            if token != own and is_like and fits(piece.strip()):
                found.append((piece.strip(), log_prob))
        return found

    def _log_probs(self, ids: Sequence[int], at: Sequence[int]) -> dict[int, Tensor]:
        """Log-probabilities of the vocabulary in places of a row, float64 on the CPU."""
        if not at:
            return {}
        steps = self._look([ids]).step_by_step
        rows = {n: ids[:n] for n in at} if steps else {0: ids[: max(at)]}
        logits = {
            n: self._logits(torch.tensor([row], dtype=torch.int64, device="cpu"))[0]
            for n, row in rows.items()
        }
        found: dict[int, Tensor] = {}
        for n in at:
            # Counted from the end: a soft prompt has logits of its own in front.
            own = logits[n][-1] if steps else logits[0][n - 1 - max(at)]
            own = own.double().cpu()
            own[self._special(len(own))] = -torch.inf
            found[n] = own.log_softmax(0)
        return found

    def log_probs_after(self, beginnings: Sequence[str], text: str) -> Tensor:
        """See `LanguageModel.log_probs_after`; float64 on the CPU."""
        target: tuple[int, ...] | None = None
        rows: list[TokenRow] = []
        for beginning in beginnings:
            ids = tuple(self._ids(beginning))
            target = target or tokens.encode_in_place(self._tokenizer, text, beginning)
            places = range(len(ids) - 1, len(ids) - 1 + len(target))
            rows.append(TokenRow((*ids, *target[:-1]), places))
        return self._scorer.values(rows, torch.tensor(target, dtype=torch.int64, device="cpu")).sum(
            1
        )

    def greedy(self, beginnings: Sequence[str], n_tokens: int) -> list[str]:
        """See `LanguageModel.greedy`."""
        starts = [self._ids(beginning) for beginning in beginnings]
        rows = [list(ids) for ids in starts]
        for _ in range(n_tokens):
            likeliest = self._greedy.values(
                [TokenRow(tuple(row), (len(row) - 1,)) for row in rows],
                torch.tensor([0], dtype=torch.int64, device="cpu"),
            )
            for row, token in zip(rows, likeliest[:, 0].tolist(), strict=True):
                row.append(int(token))
        return [
            "".join(tokens.pieces(self._tokenizer, row[len(start) :], start))
            for row, start in zip(rows, starts, strict=True)
        ]

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._model)

    @cached_property
    def _greedy(self) -> Scorer:
        """Tells the likeliest token instead of the probability of one."""

        def likeliest(logits: Tensor, target: Tensor) -> Tensor:
            logits = logits.index_fill(
                2,
                torch.tensor(
                    self._special(logits.shape[2]), dtype=torch.int64, device=logits.device
                ),
                -torch.inf,
            )
            return logits.argmax(2).double()

        return Scorer(self._model, attr_target=likeliest)

    def _piece(self, token: int, before: int) -> str:
        """What a token shows after another one."""
        if token not in self._pieces:
            self._pieces[token] = tokens.pieces(self._tokenizer, [token], [before])[0]
        return self._pieces[token]

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
