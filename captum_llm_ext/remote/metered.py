"""Metered requests: each answer is requested once, cached and counted, within limits."""

import json
import math
import os
import sqlite3
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from captum_llm_ext.remote.chat_endpoint import ChatAnswer, ChatEndpoint, ChatRequest, Prefill
from captum_llm_ext.remote.transport import ApiError, TooSlowError, shown_url
from captum_llm_ext.remote.workers import do_all

# Maximum number of answers per request, and the fallback: servers have lower limits of their own.
# Chosen, not measured.
_MOST_AT_ONCE, _FEW = 128, 8
CHARACTERS_PER_TOKEN = 4.0  # for English, without a tokenizer: the usual rule of thumb
# A prompt is truncated if, among prompts of at least this many tokens, one is longer by this share
# but has the same count. Chosen, not measured.
_FEW_TOKENS, _CUT = 32, 0.1
Identity = tuple[str | None, str | None]


class BudgetError(RuntimeError):
    """A limit of requests or cost would be exceeded; answers so far are kept."""


@dataclass
class Limits:
    """Limits of requests and cost.

    Attributes:
        max_requests: Total number of requests; None: unlimited.
        max_usd: Total cost, at `prices`.
        prices: US dollars per million input and output tokens.
    """

    max_requests: int | None = None
    max_usd: float | None = None
    prices: tuple[float, float] | None = None

    def usd(self, n_in: float, n_out: float) -> float | None:
        """Cost of tokens, if prices are known."""
        if self.prices is None:
            return None
        return (n_in * self.prices[0] + n_out * self.prices[1]) / 1e6


@dataclass
class Usage:
    """Requests, tokens and cost so far."""

    n_requests: int = 0
    n_cached: int = 0
    n_in: int = 0
    n_out: int = 0
    models: set[str] = field(default_factory=set[str])


class Cache:
    """A cache of answers by request, in memory and, with a path, in an SQLite file.

    Args:
        path: The file; created if missing, and may be shared by several runs.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()
        self._file = None
        if path is not None:
            self._path = os.fspath(path)
            with self._database_errors():
                self._file = sqlite3.connect(self._path, check_same_thread=False, timeout=30)
                self._file.execute(
                    "CREATE TABLE IF NOT EXISTS answers (k TEXT PRIMARY KEY, v TEXT)"
                )
                self._file.commit()

    @contextmanager
    def _database_errors(self) -> Generator[None]:
        try:
            yield
        # A full disk, a missing folder, missing permissions.
        except sqlite3.OperationalError as error:
            raise OSError(f"answers cannot be stored in {self._path!r}: {error}.") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self._path!r} is not a cache of answers ({error}): give another name."
            ) from error

    @property
    def is_file(self) -> bool:
        """Whether answers persist on disk."""
        return self._file is not None

    def get(self, key: str) -> ChatAnswer | None:
        """The cached answer, if there is one."""
        with self._lock:
            found = self._known.get(key)
            if found is None and self._file is not None:
                with self._database_errors():
                    row = self._file.execute("SELECT v FROM answers WHERE k = ?", (key,)).fetchone()
                found = None if row is None else str(row[0])
        try:
            return None if found is None else ChatAnswer.from_json(found)
        except (ValueError, TypeError, KeyError, AttributeError):  # of another version, or damaged
            return None

    def put(self, key: str, answer: ChatAnswer) -> None:
        """Stores an answer, on disk before this returns."""
        content = answer.to_json()
        with self._lock:
            self._known[key] = content
            if self._file is not None:
                with self._database_errors():
                    row = (key, content)
                    self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", row)
                    self._file.commit()


class MeteredEndpoint:
    """A provider with cached answers and limits.

    Args:
        provider: The provider.
        cache: The cache of answers.
        limits: Limits of requests and cost.
        n_threads: Number of threads.
    """

    def __init__(
        self, provider: ChatEndpoint, cache: Cache, limits: Limits, *, n_threads: int = 1
    ) -> None:
        self.provider, self.limits, self.usage = provider, limits, Usage()
        self.n_threads = n_threads
        self.way: Prefill = "none"
        self._cache, self._lock = cache, threading.Lock()
        url = getattr(provider, "api_url", None)
        own = [type(provider).__name__, getattr(provider, "model_name", None)]
        self._who = [*own, shown_url(url) if isinstance(url, str) else None]
        self._identities: list[Identity] = []  # models that have answered
        self._most_at_once = _MOST_AT_ONCE
        # Characters of prompts, and their counted tokens.
        self._lengths: set[tuple[int, int]] = set()

    def answer(self, question: ChatRequest) -> ChatAnswer:
        """The first answer; see `answers`."""
        return self.answers(question, range(1))[0]

    def answers(
        self, question: ChatRequest, numbers: range, *, at_once: bool = False
    ) -> list[ChatAnswer]:
        """Answers with these draw numbers, from 0; each number is another draw.

        Cached answers are used if they are of the model that answers now; to identify it, the first
        request is always sent.

        Args:
            question: The request; its `way`, `n` and `seed` are set here.
            numbers: The draw numbers.
            at_once: Whether the answers of a single request suffice.

        Raises:
            BudgetError: If another request is not allowed.
        """
        question = replace(question, way=self.way if question.prefill else "none")
        # The model is unknown before the first answer.
        asks_anyway = not self._identities
        found = self._kept(question, numbers)
        while None in found:
            first = found.index(None)
            n = sum(one is None for one in found[first:])
            self._allow()
            came = self._request_answers(replace(question, n=n, seed=numbers[first]))
            self._count(question, came)
            identities = [self._note_identity(one) for one in came]
            if asks_anyway:
                found, asks_anyway = self._kept(question, numbers), False
            places = [i for i, one in enumerate(found) if one is None]
            for place, one, identity in zip(places, came, identities, strict=False):
                self._cache.put(self._key(identity, question, numbers[place]), one)
                found[place] = one
            if at_once:
                break
        return [one for one in found if one is not None]

    def uncached(self, question: ChatRequest) -> list[ChatAnswer]:
        """Sends a request without the cache.

        Raises:
            BudgetError: If another request is not allowed.
        """
        question = replace(question, way=self.way if question.prefill else "none")
        self._allow()
        came = self._request_answers(question)
        self._count(question, came)
        for one in came:
            self._note_identity(one)
        return came

    def concurrent(self, questions: Sequence[ChatRequest]) -> list[ChatAnswer]:
        """Answers to several requests sent concurrently; without the cache."""
        found: dict[int, ChatAnswer] = {}

        def ask(i: int) -> ChatAnswer:
            return self.uncached(questions[i])[0]

        do_all(
            range(len(questions)),
            ask,
            found.__setitem__,
            n_threads=self.n_threads,
            interrupt=getattr(self.provider, "interrupt", lambda: None),
        )
        return [found[i] for i in range(len(questions))]

    def doubts(self) -> list[str]:
        """Problems indicated by token counts and model names of answers."""
        found: list[str] = []
        if len(self.usage.models) > 1:
            names = ", ".join(map(repr, sorted(self.usage.models)))
            found.append(f"several models have answered: {names}")
        longest = max(self._lengths, key=lambda pair: pair[1], default=(0, 0))
        same = [n_characters for n_characters, n in self._lengths if n == longest[1] > _FEW_TOKENS]
        if same and max(same) - min(same) > _CUT * max(same):
            found.append(
                f"prompts of {min(same)} and of {max(same)} characters are counted as "
                f"{longest[1]} tokens alike: the server cuts them, and does not read all"
            )
        return found

    def limit_to_one(self) -> None:
        """Requests no more than one answer at a time from now on."""
        self._most_at_once = 1

    def _request_answers(self, question: ChatRequest) -> list[ChatAnswer]:
        """Answers to a request, as many at once as the provider returns."""
        while True:
            asked = replace(question, n=min(question.n, self._most_at_once))
            try:
                return self.provider.chat(asked)
            except TooSlowError:
                if asked.n == 1:
                    raise
                self._most_at_once = min(self._most_at_once, asked.n // 2)
            except ApiError as error:
                if asked.n == 1 or error.status not in (400, 422, 501):
                    raise
                self._most_at_once = _FEW if asked.n > _FEW else 1

    def _note_identity(self, answer: ChatAnswer) -> Identity:
        identity = (answer.model, answer.fingerprint)
        with self._lock:
            if identity not in self._identities:
                self._identities.append(identity)
        return identity

    def _key(self, identity: Identity, question: ChatRequest, number: int) -> str:
        q = question
        about = [q.way if q.prefill else None, list(map(dict, q.messages)), q.prefill]
        about += [q.n_tokens, q.temperature, q.top, sorted((q.bias or {}).items())]
        about += [sorted(q.reported)] if q.reported else []  # keeps the keys of earlier files
        return _digest([self._who, identity, *about, number])

    def _kept(self, question: ChatRequest, numbers: range) -> list[ChatAnswer | None]:
        found: list[ChatAnswer | None] = []
        for number in numbers:
            keys = [self._key(identity, question, number) for identity in list(self._identities)]
            found.append(next((s for k in keys if (s := self._cache.get(k)) is not None), None))
        with self._lock:
            self.usage.n_cached += sum(one is not None for one in found)
        return found

    def _allow(self) -> None:
        with self._lock:
            limits, usage = self.limits, self.usage
            if limits.max_requests is not None and usage.n_requests >= limits.max_requests:
                raise BudgetError(
                    f"{usage.n_requests} requests were sent, and `max_requests` allows no more: "
                    "received answers are kept. Allow more, and the same call resumes (in "
                    "another program with the same `cache`)."
                )
            usd = limits.usd(usage.n_in, usage.n_out)
            if limits.max_usd is not None and usd is not None and usd >= limits.max_usd:
                raise BudgetError(
                    f"{usd:.4f} US dollars were spent, and `max_usd` allows {limits.max_usd}: "
                    "received answers are kept. Allow more, and the same call resumes."
                )
            usage.n_requests += 1

    def _count(self, question: ChatRequest, came: Sequence[ChatAnswer]) -> None:
        length = sum(len(str(message["content"])) for message in question.messages)
        length += len(question.prefill)
        n_in = max((one.n_in for one in came), default=0)
        with self._lock:
            if n_in:
                self._lengths.add((length, n_in))
            # Providers without token counts are estimated, otherwise `max_usd` would never be
            # reached.
            self.usage.n_in += n_in or math.ceil(length / CHARACTERS_PER_TOKEN)
            self.usage.n_out += sum(
                one.n_out or math.ceil(len(one.text) / CHARACTERS_PER_TOKEN) for one in came
            )
            self.usage.models |= {one.model for one in came if one.model}

    def provenance(self) -> dict[str, Any]:
        """Provenance of the requests."""
        usage = self.usage
        return {
            "n_requests": usage.n_requests,
            "n_cached_answers": usage.n_cached,
            "tokens_in": usage.n_in,
            "tokens_out": usage.n_out,
            "usd": self.limits.usd(usage.n_in, usage.n_out),
            "answered_by": sorted(usage.models),
        }


def _digest(about: Sequence[Any]) -> str:
    content = json.dumps(about, sort_keys=True, ensure_ascii=True).encode()
    return blake2b(content, digest_size=20).hexdigest()


def as_limits(
    max_requests: int | None, max_usd: float | None, prices: Sequence[float] | None
) -> Limits:
    """Limits from a user's arguments.

    Raises:
        ValueError: If one is out of range, or the cost is limited without prices.
    """
    if max_requests is not None and (not isinstance(max_requests, int) or max_requests < 1):
        raise ValueError(f"`max_requests` is {max_requests!r}: give at least 1.")
    if prices is not None and (len(prices) != 2 or min(prices) < 0):
        raise ValueError(
            f"`prices` is {prices!r}: give US dollars per million tokens read, and written."
        )
    if max_usd is not None and (prices is None or not max_usd > 0):
        raise ValueError(
            f"`max_usd` is {max_usd!r}: give a number above 0, and `prices`, the US dollars per "
            "million tokens read and written."
        )
    pair = None if prices is None else (float(prices[0]), float(prices[1]))
    return Limits(max_requests, max_usd, pair)
