"""`StepProposer`: a served model as `Proposer`, by the likeliest next tokens of a text."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from captum_llm_ext.model.listing import longest_continuation
from captum_llm_ext.remote.bounds import bound_of_unreported
from captum_llm_ext.remote.chat_endpoint import ChatRequest, Message
from captum_llm_ext.remote.chat_providers import ChatOverCompletions
from captum_llm_ext.remote.search import OTHERWISE, Search
from captum_llm_ext.remote.stepwise import BELOW_BOUND, TopK
from captum_llm_ext.remote.transport import UNKNOWN_ARGUMENT, ApiError, UnusableAnswerError
from captum_llm_ext.remote.workers import do_all
from captum_llm_ext.text.baselines import Listed
from captum_llm_ext.text.plain_tokenizer import messages_of

S = TypeVar("S")
T = TypeVar("T")
# What a chat model is told before it continues a text of the user's in its own turn. Chosen, not
# measured.
_CONTINUE = "Write a text."


class StepProposer:
    """A served model that reports the likeliest next tokens, asked about one place at a time.

    The text before a place is sent as the prompt, or, to chat models, as the beginning of the
    answer, after the messages before it. Only reported tokens are candidates. The probability of an
    unreported token of the original is estimated as for `TopK`: 2 nats below its bound.

    Args:
        rung: Sends requests for likeliest tokens; its endpoint caches and counts them.
        search: Counts of the requests, and what they told.
    """

    reads_rest = False

    def __init__(self, rung: TopK, search: Search) -> None:
        self._rung, self._search = rung, search
        self._endpoint = rung.endpoint
        self._is_text = isinstance(self._endpoint.provider, ChatOverCompletions)
        # The reported tokens after texts; also those along greedy continuations.
        self._known: dict[str, Mapping[str, float]] = {}
        self._noted: set[str] = set()
        self._is_checked = False

    def likeliest(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        n: int,
        fits: Callable[[int, str], bool],
    ) -> list[Listed | None]:
        """See `Proposer.likeliest`; one request per place, and per further token of a word.

        Raises:
            ValueError: If the provider reports no likeliest tokens, or continues no text.
            BudgetError: If a limit is reached.
        """
        starts = [self._start(text, start) for start, _ in spans]
        asked = [(i, start) for i, start in enumerate(starts) if self._has_text(text[:start])]
        with self._counted():
            if asked:
                self._check(text[: asked[-1][1]])
            found = self._each(
                asked, lambda job: self._listed(text, job[1], spans[job[0]], n, _of(fits, job[0]))
            )
        listed = dict(zip((i for i, _ in asked), found, strict=True))
        for before in dict.fromkeys(text[:start] for _, start in asked):
            if before not in self._noted:
                self._noted.add(before)
                self._search.note([*self._after(before).values()])
        own = [text[start:stop] for start, (_, stop) in zip(starts, spans, strict=True)]
        return [
            None
            if i not in listed
            else replace(listed[i], elsewhere=self._elsewhere(text, starts, own, i, asked))
            for i in range(len(spans))
        ]

    def log_probs_between(
        self, beginnings: Sequence[str], texts: Sequence[str], rests: Sequence[str]
    ) -> Tensor:
        """See `Proposer.log_probs_between`; one request per token, float64 on the CPU."""
        pairs = [*dict.fromkeys(zip(beginnings, texts, strict=True))]
        with self._counted():
            found = dict(zip(pairs, self._each(pairs, lambda p: self._log_prob(*p)), strict=True))
        return torch.tensor(
            [found[pair] for pair in zip(beginnings, texts, strict=True)],
            dtype=torch.float64,
            device="cpu",
        )

    def greedy(
        self,
        beginnings: Sequence[str],
        rests: Sequence[str],
        n_words: Sequence[int],
        is_enough: Callable[[int, str], bool],
    ) -> list[str]:
        """See `Proposer.greedy`; one request per text."""
        with self._counted():
            return self._each(
                [*range(len(beginnings))],
                lambda i: self._written(
                    beginnings[i], longest_continuation(n_words[i]), _of(is_enough, i)
                ),
            )

    def _listed(
        self,
        text: str,
        start: int,
        span: tuple[int, int],
        n: int,
        fits: Callable[[str], bool],
    ) -> Listed:
        """What is likely at a place, whose first token begins at `start`."""
        before, own = text[:start], text[start : span[1]]
        top = self._after(before)
        piece, piece_log_prob = self._first_piece(before, own, top)
        is_spaced = own[:1].isspace()
        others: dict[str, float] = {}
        for name, value in sorted(top.items(), key=lambda pair: -pair[1]):
            shown = name.strip()
            if name != piece and shown and name[:1].isspace() == is_spaced and fits(shown):
                others.setdefault(shown, value)
        rest = own[len(piece) :]
        log_prob = piece_log_prob + (self._log_prob(before + piece, rest) if rest else 0.0)
        return Listed(log_prob, piece.strip(), piece_log_prob, [*others.items()][:n])

    def _elsewhere(
        self,
        text: str,
        starts: Sequence[int],
        own: Sequence[str],
        i: int,
        asked: Sequence[tuple[int, int]],
    ) -> float:
        """Mean probability of a place's first token in the places of other words."""
        piece, _ = self._first_piece(text[: starts[i]], own[i], self._after(text[: starts[i]]))
        others = [start for j, start in asked if own[j] != own[i]]
        chances = [self._after(text[:start]).get(piece, -math.inf) for start in others]
        return sum(map(math.exp, chances)) / max(len(others), 1)

    def _first_piece(self, before: str, text: str, top: Mapping[str, float]) -> tuple[str, float]:
        """The first token of a text, as far as it is known, and its log-probability."""
        fitting = [name for name in top if name.strip() and text.startswith(name)]
        if fitting:
            piece = max(fitting, key=len)
            return piece, top[piece]
        piece = self._rung.first_token(text, before)
        if piece is not None:
            messages, prefix = self._asked(before)
            return piece, self._rung.value_of(messages, prefix, piece)[0]
        return text, bound_of_unreported([*top.values()], [*top.values()]) - BELOW_BOUND

    def _log_prob(self, before: str, text: str) -> float:
        """The log-probability of a text after another one, token by token."""
        total = 0.0
        while text:
            piece, value = self._first_piece(before, text, self._after(before))
            total += value
            before, text = before + piece, text[len(piece) :]
        return total

    def _written(self, before: str, limit: int, is_enough: Callable[[str], bool]) -> str:
        messages, prefix = self._asked(before)
        answer = self._endpoint.answer(
            ChatRequest(
                messages, n_tokens=limit, temperature=0.0, prefill=prefix, top=self._rung.top
            )
        )
        if not answer.steps:
            return answer.text
        text = ""
        for step in answer.steps:
            # What a server reports at temperature 0 may be of that temperature.
            if self._rung.is_of_any_temperature and step.likeliest:
                self._known.setdefault(before + text, _by_name(step.top))
            if not step.text or (answer.has_stopped and text == answer.text):
                break
            text += step.text
            if is_enough(text):
                break
        return text

    def _after(self, before: str) -> Mapping[str, float]:
        """Log-probabilities of the reported tokens after a text, by their text."""
        if before not in self._known:
            messages, prefix = self._asked(before)
            step = self._rung.reported_of(messages, prefix)
            if step is None:
                raise UnusableAnswerError(
                    f"the provider reports no likeliest tokens after {before[-40:]!r}, so nothing "
                    f"can be drawn in place of what follows: {OTHERWISE}."
                )
            self._known[before] = _by_name(step.top)
        return self._known[before]

    def _check(self, text: str) -> None:
        """Tests what the provider reports, before any place is asked about."""
        if self._is_checked:
            return
        messages, prefix = self._asked(text)
        try:
            if self._is_text and not self._rung.checks:
                self._rung.look(messages)
            elif not self._is_text and "prefill" not in self._rung.checks:
                self._rung.handshake([*messages, {"role": "user", "content": prefix}])
        except ApiError as error:
            if error.status not in UNKNOWN_ARGUMENT:
                raise
            # Other kinds of requests would not help: what is explained is reported.
            raise ValueError(
                "`ModelBaselines` draw from the likeliest tokens after a text, and this provider "
                f"does not report them as needed: {error} For absent features, {OTHERWISE}."
            ) from error
        self._is_checked = True

    def _asked(self, before: str) -> tuple[list[Message], str]:
        """The messages and the beginning of the answer by which a text is continued."""
        *complete, last = messages_of(before)
        if self._is_text:  # joined by the endpoint
            return [*complete, last], ""
        if last["role"] != "assistant":
            complete = [*complete, {"role": "user", "content": _CONTINUE}]
        return list(complete), last["content"]

    def _start(self, text: str, start: int) -> int:
        """Where the first token of a place begins: with the space before it."""
        return start - 1 if text[:start].endswith(" ") else start

    def _has_text(self, before: str) -> bool:
        """Whether any text precedes a place in its message."""
        return bool(messages_of(before)[-1]["content"].strip())

    def _each(self, jobs: Sequence[S], work: Callable[[S], T]) -> list[T]:
        """Results of jobs, concurrently."""
        found: dict[int, T] = {}
        do_all(
            range(len(jobs)),
            lambda i: work(jobs[i]),
            found.__setitem__,
            n_threads=self._endpoint.n_threads,
            interrupt=getattr(self._endpoint.provider, "interrupt", lambda: None),
        )
        return [found[i] for i in range(len(jobs))]

    @contextmanager
    def _counted(self) -> Generator[None]:
        before = self._endpoint.usage.n_requests
        try:
            yield
        finally:
            self._search.n_requests += self._endpoint.usage.n_requests - before


def _of(function: Callable[[int, str], bool], i: int) -> Callable[[str], bool]:
    return lambda text: function(i, text)


def _by_name(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Values by token text; two tokens may have one text."""
    found: dict[str, float] = {}
    for name, value in pairs:
        found[name] = max(value, found.get(name, -math.inf))
    return found
