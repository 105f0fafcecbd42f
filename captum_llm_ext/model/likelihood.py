"""The explained model as baselines use it: probabilities of texts, and proposals."""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import exclusive_use
from captum_llm_ext.model.forward.draws import repeated_draws
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.listing import Listing, longest_continuation
from captum_llm_ext.model.masked import MaskedProposer
from captum_llm_ext.model.probe import Findings, findings
from captum_llm_ext.model.scoring.scorer import Scorer
from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import Listed, Proposer

# Rows per pass. These texts are few and short compared with the coalitions scored later. Chosen,
# not measured.
_ROWS_AT_ONCE = 16
# A probe of the model is valid for rows up to this many tokens longer. Chosen, not measured.
_BEYOND = 48


class Likelihood:
    """The explained model as a `LanguageModel`; it is not modified.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
    """

    reads_rest = False

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._device = _compat.input_device(model)
        self._listing = Listing(tokenizer)
        self._seed: int | None = None

    def proposing(self, proposer: Any) -> Proposer:
        """See `LanguageModel.proposing`."""
        return as_proposer(proposer, self._tokenizer)

    def log_likelihoods(self, texts: Sequence[str]) -> Tensor:
        """See `LanguageModel.log_likelihoods`; float64 on the CPU."""
        rows = [self._ids(text) for text in texts]
        # Rows of similar length share a pass.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        sums = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        if not any(len(row) > 1 for row in rows):
            return sums
        found = self._probe([row for row in rows if len(row) > 1])
        at_once = 1 if found.apart or found.even else _ROWS_AT_ONCE
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
        self, text: str, n: int, n_tokens: int, generator: torch.Generator
    ) -> list[str]:
        """See `LanguageModel.continuations`."""
        start = self._ids(text)
        at_once = 1 if self._probe([[*start, start[-1]]]).apart else _ROWS_AT_ONCE
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
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        n: int,
        fits: Callable[[int, str], bool],
    ) -> list[Listed | None]:
        """See `Proposer.likeliest`."""
        ids = self._ids(text)
        if self._most is None or len(ids) <= self._most:
            self._scorer.expect(ids)  # the next request continues its prefixes
        return self._listing.likeliest(text, spans, n, fits, self._distributions_at)

    def _distributions_at(
        self, ids: Sequence[int], at: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields positions of a row, and log-probabilities of the vocabulary there (float64, CPU).

        Args:
            ids: The row.
            at: Positions after the first, in order.
        """
        for begin, stop, some in self._windows(at):
            window = [*ids[:1], *ids[begin + 1 : stop]] if begin else [*ids[:stop]]
            # A row that is read alone needs no look at batches where the model is given packs.
            read = [TokenRow(tuple(own), range(len(own))) for own in (window[:1], window)]
            found = self._scorer.probe(read)
            self._seed = 0 if found.seeds else None
            if found.step_by_step:
                for place in some:
                    row = torch.tensor([window[: place - begin]], dtype=torch.int64, device="cpu")
                    yield place, self._log_softmax(self._logits(row)[0, -1])
                continue
            row = torch.tensor([window[:-1]], dtype=torch.int64, device="cpu")
            logits = self._logits(row)[0]
            for place in some:
                # Counted from the end: a soft prompt adds logits in front.
                yield place, self._log_softmax(logits[place - stop])

    def _windows(self, at: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        """Windows of a row that fit the model's maximum length, as (start, stop).

        Every position has at least half of the maximum length before it.
        """
        most = self._most
        begin, todo = 0, list(at)
        while todo:
            fits = [place for place in todo if most is None or place < begin + most]
            if fits:
                yield begin, fits[-1] + 1, fits
                todo = todo[len(fits) :]
            if todo and most is not None:
                begin = todo[0] - most // 2

    def _log_softmax(self, logits: Tensor) -> Tensor:
        logits = logits.double().cpu()
        logits[self._special(len(logits))] = -torch.inf
        return logits.log_softmax(0)

    def log_probs_between(
        self, beginnings: Sequence[str], texts: Sequence[str], rests: Sequence[str]
    ) -> Tensor:
        """See `Proposer.log_probs_between`; float64 on the CPU."""
        starts = [self._ids(beginning) for beginning in beginnings]
        parts = [
            tokens.encode_in_place(self._tokenizer, text, beginning)
            for text, beginning in zip(texts, beginnings, strict=True)
        ]
        # One target for all: each row predicts its own part of it.
        first: dict[tuple[int, ...], int] = {}
        target: list[int] = []
        for own in parts:
            if own not in first:
                first[own] = len(target)
                target += own
        rows: list[TokenRow] = []
        for ids, own in zip(starts, parts, strict=True):
            ids = self._last(ids, len(own))
            positions = [-1] * len(target)
            positions[first[own] : first[own] + len(own)] = range(
                len(ids) - 1, len(ids) - 1 + len(own)
            )
            rows.append(TokenRow((*ids, *own[:-1]), positions))
        if not target:
            return torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        values = self._scorer.values(rows, torch.tensor(target, dtype=torch.int64, device="cpu"))
        return values.nansum(1)

    def greedy(
        self,
        beginnings: Sequence[str],
        rests: Sequence[str],
        n_words: Sequence[int],
        is_enough: Callable[[int, str], bool],
    ) -> list[str]:
        """See `Proposer.greedy`."""
        limits = [longest_continuation(n) for n in n_words]
        starts = [self._ids(beginning) for beginning in beginnings]
        written: list[list[int]] = [[] for _ in starts]
        texts = [""] * len(starts)
        special = set(self._special(sys.maxsize))
        todo = list(range(len(starts)))
        while todo := [i for i in todo if len(written[i]) < limits[i]]:
            rows = [self._last([*starts[i], *written[i]], 0) for i in todo]
            _, best = self._scorer.likeliest(
                [TokenRow(tuple(row), (len(row) - 1,)) for row in rows], 1 + len(special)
            )
            for i, [tokens_there] in zip(todo, best.tolist(), strict=True):
                written[i].append(next(t for t in tokens_there if t not in special))
                texts[i] = "".join(tokens.pieces(self._tokenizer, written[i], starts[i]))
            todo = [i for i in todo if not is_enough(i, texts[i])]
        return texts

    def _last(self, ids: Sequence[int], n_after: int) -> Sequence[int]:
        """The last of these ids that fit the model's maximum length, with `n_after` more."""
        if self._most is None or len(ids) + n_after <= self._most:
            return ids
        return [*ids[:1], *ids[len(ids) + n_after + 1 - self._most :]]

    @cached_property
    def _most(self) -> int | None:
        return _compat.longest_sequence(self._model)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._model)

    def _ids(self, text: str) -> Sequence[int]:
        return self._listing.ids(text)

    def _sums(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Log-probability of each row, ``(n_rows,)``."""
        length = max(map(len, rows))
        # Padding on the right is never visible to a row.
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
            predicted = torch.tensor(row[1:], device=own.device, dtype=torch.int64)[:, None]
            sums.append(float((own.gather(1, predicted)[:, 0] - own.logsumexp(1)).double().sum()))
        return torch.tensor(sums, dtype=torch.float64, device="cpu")

    def _stepping(self, row: Sequence[int]) -> Tensor:
        """Log-probability of a row with one pass per token, with nothing after it, ``(1,)``."""
        total = 0.0
        for n in range(1, len(row)):
            logits = self._logits(torch.tensor([row[:n]], dtype=torch.int64, device="cpu"))[
                0, -1
            ].double()
            total += float(logits.log_softmax(0)[row[n]])
        return torch.tensor([total], dtype=torch.float64, device="cpu")

    def _probe(self, rows: Sequence[Sequence[int]]) -> Findings:
        """Findings of the probe for such rows, also shorter and somewhat longer ones.

        Words are tried after every prefix of a text, and the attributed text is somewhat longer:
        one probe serves all.
        """
        longest = max(rows, key=len)
        beyond = [*longest, *longest[-_BEYOND:]]
        beyond = beyond[: max(len(longest), self._most or len(beyond))]
        read = [TokenRow(tuple(row), range(len(row))) for row in (longest[:1], beyond[:-1])]
        with exclusive_use(self._model):
            found = findings(self._model, read)
        self._seed = 0 if found.seeds else None
        return found

    def _logits(self, ids: Tensor) -> Tensor:
        arguments = {}
        if "use_cache" in _compat.forward_arguments(self._model):
            arguments["use_cache"] = False
        with exclusive_use(self._model), repeated_draws(self._seed, ids):
            output = _compat.called(self._model, ids.to(self._device), **arguments)
        return _compat.sequence_logits(output)

    def _special(self, size: int) -> list[int]:
        """Ids that end or pad a text, which are not words."""
        ids: set[int] = set(getattr(self._tokenizer, "all_special_ids", None) or ())
        return [token for token in ids if token < size]


def as_proposer(given: Any, tokenizer: Any) -> Proposer:
    """A causal or masked language model as a `Proposer`.

    Args:
        given: A model and its tokenizer, an object with both (a transformers pipeline), or a model
            with the explained model's tokenizer.
        tokenizer: That tokenizer.

    Raises:
        TypeError: If it is none of these, or the model is neither causal nor masked.
        ValueError: If a model without a tokenizer has another vocabulary, or one has no room for
            a word after another one.
    """
    if isinstance(given, tuple) and len(given) == 2:
        model, own = given
    else:
        model, own = getattr(given, "model", given), getattr(given, "tokenizer", None)
    if isinstance(given, nn.Module):
        model, own = given, tokenizer
        size = _compat.vocabulary_size(model)
        if size is not None and len(tokenizer) > size:
            raise ValueError(
                f"`proposer` is a {type(model).__name__} of {size:,} token ids, and the tokenizer "
                f"of the model under explanation has {len(tokenizer):,}: give "
                "`(proposer, its tokenizer)`."
            )
    if not isinstance(model, nn.Module) or own is None:
        raise TypeError(
            f"`proposer` is a {type(given).__name__}: give `(model, tokenizer)`, a causal or "
            "masked language model of transformers and its tokenizer."
        )
    n_positions, is_masked = _compat.longest_sequence(model), _compat.is_masked(model)
    # A word after another one; or between the marks that a text begins and ends with.
    if n_positions is not None and n_positions < (least := 3 if is_masked else 2):
        raise ValueError(
            f"`proposer` is a {type(model).__name__} with room for {n_positions} tokens; at least "
            f"{least} are needed to propose replacements: give another model."
        )
    if is_masked:
        return MaskedProposer(model, own)
    try:
        _compat.check_causal(model)
    except TypeError as error:
        raise TypeError(f"`proposer`: {error}") from None
    return Likelihood(model, own)
