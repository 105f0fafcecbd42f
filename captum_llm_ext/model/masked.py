"""A masked language model as a `Proposer`, which conditions on both sides of a position."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import exclusive_use
from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import Listed

# Rows per pass. A causal model of 135 million weights took 82 ms of one core for 12 tokens alone,
# 44 per row in batches of 4, 32 in 16 and 30 in 64, which have four times the logits.
_ROWS_AT_ONCE = 16
_LOOKED_AT = 64  # tokens examined per requested one; chosen, not measured
_Row = tuple[list[int], list[int]]  # ids, and the masked positions that are requested


class MaskedProposer:
    """A masked language model (such as BERT) as a `Proposer`; it is not modified.

    Predictions depend on the text on both sides, except for the next word: otherwise two words of a
    phrase would determine each other.

    Args:
        model: A masked language model.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: If the tokenizer has no mask token.
    """

    reads_rest = True

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        mask = getattr(tokenizer, "mask_token_id", None)
        if mask is None:
            raise ValueError(
                f"the tokenizer of {type(model).__name__} has no mask token: give the one that the "
                "model was trained with."
            )
        self._model, self._tokenizer, self._mask = model, tokenizer, int(mask)
        self._device = _compat.input_device(model)
        longest = _compat.longest_sequence(model)
        # Some models number positions from two on.
        self._most = None if longest is None else max(longest - 2, 3)
        self._is_uncased = self._encode("A").ids == self._encode("a").ids

    def likeliest(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        n: int,
        fits: Callable[[int, str], bool],
    ) -> list[Listed | None]:
        """See `Proposer.likeliest`; the others are words of one token."""
        encoding = self._encode(text)
        ids = encoding.ids
        own = [_inside(encoding, span) for span in spans]
        whole: list[_Row] = []
        single: list[_Row] = []
        for number, places in enumerate(own):
            nxt = number + 1
            is_near = nxt < len(spans) and not text[spans[number][1] : spans[nxt][0]].strip()
            hidden = list(ids)
            for place in [*places, *(own[nxt] if is_near else ())]:
                hidden[place] = self._mask
            whole.append((hidden, places))
            first, last = (places[0], places[-1]) if places else (0, 0)
            single.append(([*hidden[:first], *hidden[last:]], places[:1]))
        found: list[Listed | None] = []
        for number, (log_probs, one) in enumerate(
            zip(self._log_probs(whole), self._log_probs(single), strict=True)
        ):
            places, (start, stop) = own[number], spans[number]
            if not places:
                found.append(None)
                continue
            # For a word longer than the maximum length, the part that fits.
            chance = sum(
                float(row[ids[place]]) for row, place in zip(log_probs, places, strict=False)
            )
            before = ids[places[0] - 1] if places[0] else None
            others = self._best(one[0], text[start:stop], before, n, partial(fits, number))
            found.append(Listed(chance, text[start:stop], chance, others))
        return found

    def log_probs_between(
        self, beginnings: Sequence[str], texts: Sequence[str], rests: Sequence[str]
    ) -> Tensor:
        """See `Proposer.log_probs_between`; several tokens are predicted independently."""
        rows: list[_Row] = []
        wanted: list[list[int]] = []
        for beginning, text, rest in zip(beginnings, texts, rests, strict=True):
            encoding = self._encode(beginning + text + rest)
            places = _inside(encoding, (len(beginning), len(beginning) + len(text)))
            hidden = list(encoding.ids)
            for place in places:
                hidden[place] = self._mask
            rows.append((hidden, places))
            wanted.append([encoding.ids[place] for place in places])
        sums = [
            sum(float(row[token]) for row, token in zip(log_probs, own, strict=False))
            for log_probs, own in zip(self._log_probs(rows), wanted, strict=True)
        ]
        return torch.tensor(sums, dtype=torch.float64, device="cpu")

    def greedy(
        self,
        beginnings: Sequence[str],
        rests: Sequence[str],
        n_words: Sequence[int],
        is_enough: Callable[[int, str], bool],
    ) -> list[str]:
        """See `Proposer.greedy`; one token for each of the `n_words`, from left to right."""
        mask = f" {self._tokenizer.mask_token}"
        texts = [
            list(self._encode(beginning + mask * n + rest).ids)
            for beginning, rest, n in zip(beginnings, rests, n_words, strict=True)
        ]
        places = [[i for i, token in enumerate(ids) if token == self._mask] for ids in texts]
        for step in range(max(n_words, default=0)):
            some = [i for i, own in enumerate(places) if step < len(own)]
            rows: list[_Row] = [(texts[i], places[i][step : step + 1]) for i in some]
            for i, log_probs in zip(some, self._log_probs(rows), strict=True):
                texts[i][places[i][step]] = int(log_probs[0].argmax())
        return [
            "".join(
                tokens.pieces(self._tokenizer, [ids[at] for at in own], ids[: own[0]])
                if own
                else ()
            )
            for ids, own in zip(texts, places, strict=True)
        ]

    def _best(
        self,
        log_probs: Tensor,
        own: str,
        before: int | None,
        n: int,
        fits: Callable[[str], bool],
    ) -> list[tuple[str, float]]:
        """The likeliest single-token words at a position, with the case of the original word."""
        found: dict[str, float] = {}
        best = log_probs.topk(min(_LOOKED_AT * n, len(log_probs)))
        ahead = [] if before is None else [before]
        for log_prob, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if len(found) == n or log_prob == -torch.inf:
                break
            piece = tokens.pieces(self._tokenizer, [token], ahead)[0]
            # A token that continues the previous word is not a word.
            starts = piece[:1].isspace() or before in tokens.special_ids(self._tokenizer)
            shown = _cased(piece.strip(), own) if self._is_uncased else piece.strip()
            if starts and shown and shown != own and shown not in found and fits(shown):
                found[shown] = log_prob
        return [*found.items()]

    def _log_probs(self, rows: Sequence[_Row]) -> list[Tensor]:
        """Log-probabilities of the vocabulary at positions of rows, ``(n_places, size)`` each."""
        cut = [self._window(*row) for row in rows]
        found: list[Tensor] = [torch.empty(0, dtype=torch.float64, device="cpu")] * len(rows)
        lengths = [len(ids) for ids, _ in cut]
        order = sorted((i for i, (_, at) in enumerate(cut) if at), key=lengths.__getitem__)
        for _, group in groupby(order, key=lengths.__getitem__):  # equal lengths: no padding
            same = list(group)
            for first in range(0, len(same), _ROWS_AT_ONCE):
                some = same[first : first + _ROWS_AT_ONCE]
                ids = torch.tensor([cut[i][0] for i in some], dtype=torch.int64, device="cpu")
                with exclusive_use(self._model):
                    logits = _compat.sequence_logits(
                        _compat.called(self._model, ids.to(self._device))
                    )
                for i, own in zip(some, logits, strict=True):
                    log_probs = own[cut[i][1]].double().cpu()
                    log_probs[:, [*tokens.special_ids(self._tokenizer)]] = -torch.inf
                    found[i] = log_probs.log_softmax(1)
        return found

    def _window(self, ids: Sequence[int], places: Sequence[int]) -> _Row:
        """The part of a row around the positions that fits the maximum length, and its two ends."""
        if self._most is None or len(ids) <= self._most or not places:
            return list(ids), list(places)
        inner = self._most - 2
        begin = min(max(places[0] - inner // 2, 1), len(ids) - 1 - inner)
        kept = [0, *range(begin, begin + inner), len(ids) - 1]
        return [ids[i] for i in kept], [kept.index(place) for place in places if place in kept]

    def _encode(self, text: str) -> tokens.Encoding:
        return tokens.encode(self._tokenizer, text)


def _inside(encoding: tokens.Encoding, span: tuple[int, int]) -> list[int]:
    """The tokens that contain characters of a span, from its first one that is not a space."""
    return [
        i
        for i, anchor in enumerate(encoding.anchors)
        if anchor is not None and span[0] <= anchor < span[1]
    ]


def _cased(piece: str, like: str) -> str:
    """A word capitalised like another one."""
    if like[:1].isupper():
        return piece.upper() if len(like) > 1 and like.isupper() else piece.capitalize()
    return piece
