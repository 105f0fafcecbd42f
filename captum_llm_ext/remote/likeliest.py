"""What an API tells of the likeliest tokens: of prompts as ids, position by position."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor

from captum_llm_ext.model import Journal, Processes, TokenRow
from captum_llm_ext.remote.providers import log_prob
from captum_llm_ext.remote.scorer import RemoteScorer
from captum_llm_ext.remote.search import OTHERWISE
from captum_llm_ext.remote.transport import UnusableAnswerError

Ids = tuple[int, ...]
Entry = Mapping[int, float]


class TopOfPrompts:
    """The likeliest tokens at every position of prompts, one request for each prompt.

    Args:
        scorer: Sends requests, counts and stores them.
        tokenizer: The model's tokenizer.
        most: Number of likeliest tokens requested.
    """

    def __init__(self, scorer: RemoteScorer, tokenizer: Any, most: int) -> None:
        self._scorer, self._tokenizer, self._most = scorer, tokenizer, most

    def of(self, prompts: Sequence[Ids]) -> list[list[Entry]]:
        """Per prompt and position the log-probabilities of the reported tokens, by id.

        The tokens of the prompts are among them; the first position has none.

        Raises:
            ValueError: If nothing but these is reported, or they are invalid.
        """
        found = self._scorer.further(f"top {self._most}", prompts, self._ask)
        return [_unpacked(numbers) for numbers in found]

    def distributions(self, ids: Sequence[int], at: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """See `Distributions`: unreported tokens have minus infinity."""
        if not at:
            return
        [entries] = self.of([tuple(ids)])
        special: set[int] = set(getattr(self._tokenizer, "all_special_ids", None) or ())
        for place in at:
            entry = {t: v for t, v in entries[place].items() if t not in special}
            # As if no special token could come: the others share its probability.
            left = 1 - sum(math.exp(v) for t, v in entries[place].items() if t in special)
            size = max(len(self._tokenizer), *(t + 1 for t in (*entry, *ids)))
            row = torch.full((size,), -torch.inf, dtype=torch.float64, device="cpu")
            row[[*entry]] = torch.tensor([*entry.values()], dtype=torch.float64, device="cpu")
            yield place, row - math.log(left) if left > 0 else row

    def _ask(self, ids: Ids) -> list[float]:
        source = self._scorer.source
        named = source.likeliest(ids, self._most)
        if not named:
            [entries] = source.provider.get_token_logprobs([list(ids)])
            return _packed([_checked(entry or {}) for entry in entries], ids)
        found: list[Entry] = []
        for i, entry in enumerate(named[: len(ids)]):
            by_id = {source.called(ids[:i], name): value for name, value in entry.items()}
            found.append({t: v for t, v in by_id.items() if t is not None})
        return _packed(found, ids)


def _packed(entries: Sequence[Entry], ids: Ids) -> list[float]:
    """Entries as numbers: per position how many, ids and log-probabilities."""
    if len(entries) != len(ids):
        raise UnusableAnswerError(
            f"the provider returned likeliest tokens of {len(entries)} positions to a prompt of "
            f"{len(ids)} ids: it reads other tokens than are sent."
        )
    if len(ids) > 1 and all(len(entry) <= 1 for entry in entries):
        raise UnusableAnswerError(
            "the provider returns log-probabilities of no tokens but those sent, so nothing can "
            "be drawn from its distribution: have it return the likeliest tokens of each position "
            f"(`top_logprobs=20`), or {OTHERWISE}."
        )
    numbers: list[float] = []
    for entry, token in zip(entries[1:], ids[1:], strict=True):
        if token not in entry:
            raise UnusableAnswerError(
                f"the provider returned {len(entry)} likely tokens in place of token id {token}, "
                "and that one is not among them: they are of other positions, or of a prompt that "
                f"is read as other tokens. For absent features, {OTHERWISE}."
            )
        numbers += [len(entry), *entry, *entry.values()]
    return numbers


def _unpacked(numbers: Sequence[float]) -> list[Entry]:
    found: list[Entry] = [{}]
    at = 0
    while at < len(numbers):
        n = int(numbers[at])
        ids, values = numbers[at + 1 : at + 1 + n], numbers[at + 1 + n : at + 1 + 2 * n]
        found.append({int(t): v for t, v in zip(ids, values, strict=True)})
        at += 1 + 2 * n
    return found


def _checked(entry: Mapping[int, Any]) -> dict[int, float]:
    found = {int(token): log_prob(value) for token, value in entry.items()}
    if any(value is None for value in found.values()):
        raise UnusableAnswerError(
            f"the provider gave {list(entry.values())!r:.80} as log-probabilities: expected "
            "numbers of nats, at most 0."
        )
    return {token: value for token, value in found.items() if value is not None}


class TopScorer:
    """A `RowScorer` for words of an answer's kinds, by the reported tokens: see `AnswerKinds`.

    Args:
        top: The likeliest tokens of prompts.
        scorer: The scorer of coalitions, for limits of length and the progress bar.
    """

    attr_target: Any = "log_prob"
    scores_continuations = True

    def __init__(self, top: TopOfPrompts, scorer: RemoteScorer) -> None:
        self._top, self._scorer = top, scorer
        self.n_evaluations, self.n_scored = 0, [0]

    @property
    def processes(self) -> Processes:
        """This process alone."""
        return Processes()

    def likeliest(self, rows: Sequence[TokenRow], n: int) -> tuple[Tensor, Tensor]:
        """See `Scorer.likeliest`; as many as are reported."""
        # Any token after the last position makes the provider report the alternatives there.
        found = self._told([(*row.ids, row.ids[-1]) for row in rows])
        entries = [
            sorted(((v, t) for t, v in own[p + 1].items()), reverse=True)[:n] if p >= 0 else []
            for row, own in zip(rows, found, strict=True)
            for p in row.positions
        ]
        most = max(map(len, entries))
        log_probs = torch.full((len(entries), most), -torch.inf, dtype=torch.float64, device="cpu")
        ids = torch.full(log_probs.shape, -1, dtype=torch.int64, device="cpu")
        for i, entry in enumerate(entries):
            for j, (value, token) in enumerate(entry):
                log_probs[i, j], ids[i, j] = value, token
        shape = len(rows), -1, most
        return log_probs.view(shape), ids.view(shape)

    def values(
        self, rows: Sequence[TokenRow], target: Tensor, foils: Tensor | None = None
    ) -> Tensor:
        """See `Scorer.values`: unreported foils count as impossible."""
        found = self.known(rows, target)
        wanted = target.tolist()
        own = [
            [entry.get(token, -math.inf) for entry, token in zip(entries, wanted, strict=True)]
            for entries in found
        ]
        values = torch.tensor(own, dtype=torch.float64, device="cpu")
        if foils is None:
            return values
        others = foils.tolist()
        of_foils = torch.tensor(
            [
                [
                    _log_sum([entry.get(foil, -math.inf) for foil in of])
                    for entry, of in zip(entries, others, strict=True)
                ]
                for entries in found
            ],
            dtype=torch.float64,
            device="cpu",
        )
        return torch.cat([values, of_foils], dim=1)

    def known(self, rows: Sequence[TokenRow], target: Tensor) -> list[list[Entry]]:
        """Per row and target token the log-probabilities of the reported tokens: `KnownTokens`."""
        wanted = target.tolist()
        last = [max(range(len(wanted)), key=lambda t: row.positions[t]) for row in rows]
        found = self._told(
            [
                (*row.ids[: row.positions[t] + 1], wanted[t])
                for row, t in zip(rows, last, strict=True)
            ]
        )
        return [
            [entries[p + 1] for p in row.positions]
            for row, entries in zip(rows, found, strict=True)
        ]

    def _told(self, prompts: Sequence[Ids]) -> list[list[Entry]]:
        with self._scorer.searching():
            return self._top.of(prompts)

    def check_length(self, length: int, what: str) -> None:
        """See `Scorer.check_length`."""
        self._scorer.check_length(length, what)

    def progress(self) -> AbstractContextManager[None]:
        """See `RemoteScorer.progress`."""
        return self._scorer.progress()

    def noise_floor(self, row: TokenRow, target: Tensor, foils: Tensor | None = None) -> None:
        """None: the server's precision is unknown."""

    def tolerance(self, values: Tensor) -> Tensor:
        """See `RemoteScorer.tolerance`."""
        return self._scorer.tolerance(values)

    def generate(self, row: TokenRow, gen_args: Mapping[str, Any], seed: int) -> NoReturn:
        """Not supported."""
        raise NotImplementedError

    def keeping(self, open_journal: Callable[[], Journal] | None) -> NoReturn:
        """Not supported: `RemoteScorer.keeping` stores what is requested here."""
        raise NotImplementedError

    def forecast(self, n_rows: int) -> None:
        """Does nothing."""


def _log_sum(values: Sequence[float]) -> float:
    """The logarithm of summed probabilities."""
    return math.log(total) if (total := sum(map(math.exp, values))) > 0 else -math.inf
