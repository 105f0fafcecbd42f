"""Adapters of providers: by token ids if possible, otherwise by text."""

import threading
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast, runtime_checkable

from captum_llm_ext.base.terminal import one_line
from captum_llm_ext.base.warning import stacklevel_of_caller
from captum_llm_ext.remote.transport import ApiError, TooSlowError, UnusableAnswerError, shown_url
from captum_llm_ext.text import tokens

_SHOWN = 60
# Substitute for minus infinity in servers that cannot write it, such as vLLM.
_RULED_OUT = -9999.0
# How far above log 1 = 0 rounding may bring the log-probability of a certain token.
_ROUNDING = 1e-4
# Statuses of problems with a prompt, or with several at a time.
_ABOUT_PROMPTS = (400, 413, 422)
# vLLM's prefix of token names by id.
IDS_AS_TEXT = "token_id:"


@runtime_checkable
class TokenProvider(Protocol):
    """A provider that takes prompts as token ids; `CompletionsProvider` is one.

    Optional attributes: ``max_concurrency``, the maximum number of threads (default 1);
    ``prompts_per_request``, the number of prompts per call; ``generate_tokens(prompt,
    **gen_args)``, which returns generated ids; and ``takes_starts``: if True, ``starts=`` gives the
    first token of each prompt whose log-probability is needed.
    """

    def get_token_logprobs(
        self, prompts: Sequence[Sequence[int]]
    ) -> Sequence[Sequence[Mapping[int, float] | None]]:
        """Log-probabilities of all tokens of prompts.

        Args:
            prompts: Token ids.

        Returns:
            Per prompt one entry per token: log-probabilities in nats, given all tokens before, of
            the token itself and of any number of others, from which `ModelBaselines` draw. None if
            unreported, such as for the first token.
        """
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and the positions whose log-probabilities are needed.

    Attributes:
        ids: All ids that are sent.
        first: The last position before the requested ones.
        wanted: Indices of target tokens among those after it, from 0.
        row: Index of its row, for messages.
    """

    ids: tuple[int, ...]
    first: int
    wanted: tuple[int, ...]
    row: int

    @property
    def continuation_ids(self) -> tuple[int, ...]:
        """The tokens after `first`."""
        return self.ids[self.first + 1 :]


@dataclass(frozen=True, slots=True)
class Answer:
    """Log-probabilities for a `Request`.

    Attributes:
        values: One log-probability for each token after the request's first position; None if
            unreported.
        others: Log-probabilities of other tokens at each of these positions.
    """

    values: list[float | None]
    others: list[Mapping[int, float]] = field(default_factory=list[Mapping[int, float]])


@dataclass(frozen=True, slots=True)
class Written:
    """Generated tokens with their log-probabilities.

    Attributes:
        ids: Its token ids; None if not reported.
        texts: The server's name of each token.
        values: Log-probabilities, in nats.
        top: At each position those of the likeliest tokens, by name; empty if not reported.
        n_completed: Number of tokens as counted by the server, if reported.
        has_stopped: Whether a stop token ended the text, as reported.
    """

    ids: tuple[int, ...] | None
    texts: tuple[str, ...]
    values: list[float]
    top: list[dict[str, float]]
    n_completed: int | None = None
    has_stopped: bool = False


class ProviderAdapter(Protocol):
    """Interface of a provider, as the scorer uses it.

    Attributes:
        takes_ids: Whether prompts are sent as ids.
        n_threads: Maximum number of threads.
        most_prompts: Maximum number of prompts at a time.
        longest: Maximum number of tokens of a prompt, if known.
        provider: The provider.
    """

    provider: Any
    takes_ids: bool
    n_threads: int
    most_prompts: int
    longest: int | None

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """An answer to each request; called from several threads."""
        ...

    def generate(self, prompt: Sequence[int], gen_args: Mapping[str, Any]) -> list[int]:
        """The ids that the model generates after a prompt."""
        ...

    def reads(self, prompt: Sequence[int], target: Sequence[int]) -> bool:
        """Whether the provider is known to read exactly these tokens, target after prompt."""
        ...

    def written(self, prompt: Sequence[int], n: int, **how: Any) -> list[Written]:
        """See `CompletionsProvider.written`; empty for providers without it."""
        ...

    def likeliest(self, prompt: Sequence[int], most: int | None = None) -> list[dict[str, float]]:
        """See `CompletionsProvider.likeliest`; empty for providers without it."""
        ...

    def called(self, prompt: Sequence[int], name: str) -> int | None:
        """The token with this name after a prompt, if there is one."""
        ...

    @property
    def stop_token(self) -> int | None:
        """The id of the end token, if known."""
        ...

    def interrupt(self) -> None:
        """Aborts requests under way."""
        ...

    def provenance(self) -> dict[str, Any]:
        """The provenance of requests."""
        ...


OnMismatch = Literal["error", "warn"]


def adapt_provider(
    provider: Any, tokenizer: Any, max_concurrency: int | None, on_mismatch: OnMismatch
) -> ProviderAdapter:
    """The adapter of a provider.

    Raises:
        TypeError: If it is not a provider.
    """
    takes_ids = isinstance(provider, TokenProvider) and getattr(provider, "takes_ids", True)
    if not takes_ids and not callable(getattr(provider, "get_logprobs", None)):
        raise TypeError(
            f"`provider` is a {type(provider).__name__}: give one of captum's, such as "
            "`captum.attr.VLLMProvider(api_url)`, or `CompletionsProvider(api_url)`."
        )
    n_threads = max_concurrency or int(getattr(provider, "max_concurrency", 1))
    kind = TokenIdAdapter if takes_ids else TextAdapter
    return kind(provider, tokenizer, n_threads, on_mismatch)


def describe_provider(provider: Any) -> dict[str, Any]:
    """Name of the provider and of its model, without secrets."""
    url = getattr(provider, "api_url", None)
    name = getattr(provider, "model_name", None)
    return {
        "provider": type(provider).__name__,
        "model": name if isinstance(name, str) else None,
        "api": shown_url(url) if isinstance(url, str) else None,
    }


class _Adapter:
    """Common to both adapters."""

    def __init__(
        self, provider: Any, tokenizer: Any, n_threads: int, on_mismatch: OnMismatch
    ) -> None:
        self.provider = self._provider = provider
        self._tokenizer, self._on_mismatch = tokenizer, on_mismatch
        self.n_threads = n_threads
        longest = getattr(provider, "max_model_len", None)
        self.longest = longest if isinstance(longest, int) else None

    def interrupt(self) -> None:
        """Aborts requests under way, if the provider supports it."""
        interrupt = getattr(self._provider, "interrupt", None)
        if callable(interrupt):
            interrupt()

    @property
    def stop_token(self) -> int | None:
        """See `ProviderAdapter.stop_token`."""
        found = getattr(self._tokenizer, "eos_token_id", None)
        return found if isinstance(found, int) else None

    def called(self, prompt: Sequence[int], name: str) -> int | None:
        """See `ProviderAdapter.called`."""
        digits = name.removeprefix(IDS_AS_TEXT)
        if digits != name:
            return int(digits) if digits.isascii() and digits.isdigit() else None
        ids = [] if self._tokenizer is None else _encoded_after(self._tokenizer, prompt, name)
        return ids[0] if len(ids) == 1 else None

    def _written(self, prompt: str | Sequence[int], n: int, how: Mapping[str, Any]) -> list[Any]:
        own = getattr(self._provider, "written", None)
        return list(cast(Sequence[Written], own(prompt, n, **how))) if callable(own) else []

    def _likeliest(self, prompt: str | Sequence[int], most: int | None) -> list[dict[str, float]]:
        own = getattr(self._provider, "likeliest", None)
        how = {} if most is None else {"most": most}
        return list(cast(Sequence[Any], own(prompt, **how))) if callable(own) else []

    def _log_prob(self, request: Request, reported: Any) -> float | None:
        value = None if reported is None else log_prob(reported)
        if reported is not None and value is None:
            shown = one_line(repr(reported))[:_SHOWN]
            raise UnusableAnswerError(
                f"{place(request, self._tokenizer)}: the provider gave {shown} as a "
                "log-probability: expected a number of nats, at most 0."
            )
        return value

    def _generates(self, name: str) -> None:
        if not callable(getattr(self._provider, name, None)):
            raise ValueError(
                f"{type(self._provider).__name__} has no `{name}`: give the `target` to explain."
            )


class TokenIdAdapter(_Adapter):
    """Adapter of a provider that takes token ids."""

    takes_ids = True

    def __init__(self, provider: TokenProvider, *rest: Any) -> None:
        super().__init__(provider, *rest)
        self.most_prompts = int(getattr(provider, "prompts_per_request", 1))
        self._anew = False

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """See `ProviderAdapter.ask`."""
        n = self.most_prompts
        if len(requests) > n:
            parts = [requests[i : i + n] for i in range(0, len(requests), n)]
            return [answer for part in parts for answer in self.ask(part)]
        try:
            with request_noted(requests[0], self._tokenizer):
                found = self._fetched(requests)
        except TooSlowError:
            if len(requests) == 1:
                raise
            # Other threads may have reduced it meanwhile.
            self.most_prompts = min(self.most_prompts, len(requests) // 2)
            half = len(requests) // 2
            return [*self.ask(requests[:half]), *self.ask(requests[half:])]
        except ApiError as error:
            if error.status not in _ABOUT_PROMPTS:
                raise
            if len(requests) == 1:
                message = f"{place(requests[0], self._tokenizer)}: {error}"
                raise ApiError(message, error.status) from error
            answers = self._one_by_one(requests)  # or the refused one is reported
            self.most_prompts = 1
            return answers
        if len(found) != len(requests):
            raise ValueError(
                f"the provider gave {len(found)} answers for {len(requests)} prompts, of "
                f"{place(requests[0], self._tokenizer)} and after: expected one each."
            )
        return [self._answer(*pair) for pair in zip(requests, found, strict=True)]

    def _fetched(
        self, requests: Sequence[Request]
    ) -> Sequence[Sequence[Mapping[int, float] | None]]:
        ids = [request.ids for request in requests]
        if getattr(self._provider, "takes_starts", False):
            starts = [request.first + 1 for request in requests]
            provider: Any = self._provider
            return provider.get_token_logprobs(ids, starts=starts)
        return self._provider.get_token_logprobs(ids)

    def _one_by_one(self, requests: Sequence[Request]) -> list[Answer]:
        return [answer for request in requests for answer in self.ask([request])]

    def _answer(self, request: Request, found: Sequence[Mapping[int, float] | None]) -> Answer:
        if len(found) != len(request.ids):
            raise ValueError(
                f"{place(request, self._tokenizer)}: the provider gave log-probabilities of "
                f"{len(found)} tokens for {len(request.ids)} ids: expected one each. A server "
                "that adds tokens to ids, or reads others, cannot be used."
            )
        own = [entry or {} for entry in found[request.first + 1 :]]
        values = [
            entry.get(token) for entry, token in zip(own, request.continuation_ids, strict=True)
        ]
        return Answer([self._log_prob(request, value) for value in values], own)

    def generate(self, prompt: Sequence[int], gen_args: Mapping[str, Any]) -> list[int]:
        """See `ProviderAdapter.generate`."""
        if not hasattr(self._provider, "generate_tokens") and hasattr(self._provider, "generate"):
            text = TextAdapter(self._provider, self._tokenizer, 1, self._on_mismatch)
            self._anew = True
            return text.generate(prompt, gen_args)
        self._generates("generate_tokens")
        found = self._provider.generate_tokens(list(prompt), **gen_args)
        if isinstance(found, str):
            self._anew = True
            warnings.warn(
                "the server returns no ids of the generated tokens: the target is its text, "
                "encoded again by the tokenizer. The model may have written other tokens.",
                stacklevel=stacklevel_of_caller(),
            )
            return _encoded_after(self._tokenizer, prompt, found)
        return [int(token) for token in found]

    def reads(self, prompt: Sequence[int], target: Sequence[int]) -> bool:
        """See `ProviderAdapter.reads`."""
        return True

    def written(self, prompt: Sequence[int], n: int, **how: Any) -> list[Written]:
        """See `ProviderAdapter.written`."""
        return self._written(prompt, n, how)

    def likeliest(self, prompt: Sequence[int], most: int | None = None) -> list[dict[str, float]]:
        """See `ProviderAdapter.likeliest`."""
        return self._likeliest(prompt, most)

    def provenance(self) -> dict[str, Any]:
        """See `ProviderAdapter.provenance`."""
        return {"sent_as": "ids", **({"target_from": "text"} if self._anew else {})}


@dataclass(frozen=True, slots=True)
class _Text:
    """A prompt and a target as text.

    Attributes:
        prompt, target: The texts, to be read together.
        n_alone: Number of tokens of the target's text by itself.
        is_foreseen: Whether together they are tokenised to the prompt's tokens and the target's.
    """

    prompt: str
    target: str
    n_alone: int
    is_foreseen: bool


class TextAdapter(_Adapter):
    """Adapter of a provider that takes text; the tokenizer predicts how the server tokenises it."""

    takes_ids = False
    most_prompts = 1

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._n_retokenized = self._n_mismatches = 0
        self._counts_alone = False  # whether the provider is known to count targets by themselves
        self._lock = threading.Lock()  # fast tokenizers are not thread-safe

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """See `ProviderAdapter.ask`."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Answer:
        target = request.continuation_ids
        with self._lock:
            text = self._text(request, request.ids[: request.first + 1], target)
            if self._counts_alone:
                text = self._with_enough(text, len(target))
        found = self._fetched(request, text)
        if len(found) == text.n_alone < len(target) and text.is_foreseen:
            self._counts_alone = True
            with self._lock:
                text = self._with_enough(text, len(target))
            found = self._fetched(request, text)
        # Captum's providers return as many values as the target has tokens by itself, for the last
        # tokens of both texts: some may belong to the text before the target.
        if len(found) == text.n_alone > len(target) and text.is_foreseen:
            found = found[-len(target) :]
        if len(found) != len(target):
            raise ValueError(
                f"{place(request, self._tokenizer)}: the provider gave {len(found)} "
                f"log-probabilities for {len(target)} target tokens. As text, they are tokenised "
                "differently: give a `target` that is tokenised as it is written, or a provider "
                "that takes ids, such as `CompletionsProvider`."
            )
        return Answer([self._log_prob(request, value) for value in found])

    def _fetched(self, request: Request, text: _Text) -> Sequence[Any]:
        with request_noted(request, self._tokenizer):
            return self._provider.get_logprobs(
                input_prompt=text.prompt, target_str=text.target, tokenizer=self._tokenizer
            )

    def _text(self, request: Request, prompt: tuple[int, ...], target: tuple[int, ...]) -> _Text:
        """The texts to send: those that are tokenised to the ids, if there are any."""
        shown, text = self._prompt_text(prompt)
        whole = tokens.decode(self._tokenizer, (*shown, *target))
        is_continued = whole.startswith(text)
        # A space at the beginning of a target belongs to it, even if its own decoding drops it.
        continued = whole[len(text) :] if is_continued else tokens.decode(self._tokenizer, target)
        alone, joint = self._encoded(text), self._encoded(text + continued)
        if alone != prompt:
            self._n_retokenized += 1
            if self._n_retokenized == 1:
                warnings.warn(
                    f"{place(request, self._tokenizer)}: the prompt is sent as text and read as "
                    "other tokens than it was rendered to (as many rows as that are counted in "
                    "`provenance`): give a provider that takes ids, such as `CompletionsProvider`.",
                    stacklevel=stacklevel_of_caller(),
                )
        is_read_so = joint == (*alone, *target)
        if not is_read_so:
            self._mismatch(request, joint[-len(target) :], target)
        # Providers that join tokens report values of tokens other than those of the joint text.
        is_foreseen = is_read_so and self._on_mismatch == "error"
        return _Text(text, continued, self._n_alone(continued), is_foreseen)

    def _n_alone(self, text: str) -> int:
        return len(self._encoded(text, add_special_tokens=False))

    def _with_enough(self, text: _Text, n: int) -> _Text:
        """The same joint text, split where its second part has at least `n` tokens by itself."""
        border = len(text.prompt)
        while text.n_alone < n and border > 0 and text.is_foreseen:
            border -= 1
            target = text.prompt[border:] + text.target
            n_alone = self._n_alone(target)
            if n_alone >= n:
                return replace(text, prompt=text.prompt[:border], target=target, n_alone=n_alone)
        return text

    def _prompt_text(self, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """Ids and their text, which a server tokenises to the prompt again."""
        bos = getattr(self._tokenizer, "bos_token_id", None)
        kept = prompt[1:] if prompt[:1] == (bos,) else prompt
        # Servers prepend BOS to a text, as the tokenizer does.
        for ids in (kept, prompt):
            text = tokens.decode(self._tokenizer, ids) if ids else ""
            if self._encoded(text) == prompt:
                return ids, text
        return kept, tokens.decode(self._tokenizer, kept) if kept else ""

    def _encoded(self, text: str, **how: Any) -> tuple[int, ...]:
        return tuple(int(token) for token in self._tokenizer.encode(text, **how))

    def _mismatch(self, request: Request, read: tuple[int, ...], target: tuple[int, ...]) -> None:
        self._n_mismatches += 1
        message = (
            f"{place(request, self._tokenizer)}: after this prompt the target's text is read as "
            f"the tokens {self._names(read)}, not {self._names(target)}, and log-probabilities "
            "would belong to the wrong ones"
        )
        if self._on_mismatch == "error":
            raise ValueError(
                f"{message}. Begin the target where the tokenizer does (mostly with its space), "
                "give a provider that takes ids, such as `CompletionsProvider`, or say "
                '`on_mismatch="warn"` if yours joins tokens, not texts.'
            )
        if self._n_mismatches == 1:
            warnings.warn(
                f"{message}, if the provider joins texts.", stacklevel=stacklevel_of_caller()
            )

    def _names(self, ids: Sequence[int]) -> list[str]:
        return [str(name) for name in self._tokenizer.convert_ids_to_tokens(list(ids))]

    def generate(self, prompt: Sequence[int], gen_args: Mapping[str, Any]) -> list[int]:
        """See `ProviderAdapter.generate`."""
        self._generates("generate")
        _, text = self._prompt_text(tuple(prompt))
        found = self._provider.generate(text, **gen_args)
        if not isinstance(found, str):
            raise TypeError(f"the provider generated a {type(found).__name__}: expected a text.")
        return _encoded_after(self._tokenizer, prompt, found)

    def reads(self, prompt: Sequence[int], target: Sequence[int]) -> bool:
        """See `ProviderAdapter.reads`."""
        shown, text = self._prompt_text(tuple(prompt))
        whole = tokens.decode(self._tokenizer, (*shown, *target))
        ids = (*prompt, *target)
        return whole.startswith(text) and self._encoded(whole) == ids

    def written(self, prompt: Sequence[int], n: int, **how: Any) -> list[Written]:
        """See `ProviderAdapter.written`; missing ids are those of the text, if equally many."""
        _, text = self._prompt_text(tuple(prompt))
        found: list[Written] = self._written(text, n, how)
        return [
            replace(one, ids=self._ids_of(text, one)) if one.ids is None else one for one in found
        ]

    def likeliest(self, prompt: Sequence[int], most: int | None = None) -> list[dict[str, float]]:
        """See `ProviderAdapter.likeliest`."""
        return self._likeliest(self._prompt_text(tuple(prompt))[1], most)

    def _ids_of(self, text: str, one: Written) -> tuple[int, ...] | None:
        joint = self._encoded(text + "".join(one.texts))
        before = self._encoded(text)
        ids = joint[len(before) :]
        is_read_so = joint[: len(before)] == before and len(ids) == len(one.values)
        return ids if is_read_so else None

    def provenance(self) -> dict[str, Any]:
        """See `ProviderAdapter.provenance`."""
        reported: dict[str, Any] = {"sent_as": "text", "target_from": "text"}
        return reported | {"n_retokenized": self._n_retokenized, "n_mismatches": self._n_mismatches}


def place(request: Request, tokenizer: Any) -> str:
    """The name of a row in messages."""
    before = request.ids[: request.first + 1]
    text = " ".join(map(str, before)) if tokenizer is None else tokens.decode(tokenizer, before)
    shown = text if len(text) <= _SHOWN else f"…{text[-_SHOWN:]}"
    return f"row {request.row} (after {shown!r})"


@contextmanager
def request_noted(request: Request, tokenizer: Any) -> Generator[None]:
    """Adds the location to a provider's own errors."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This was asked at {place(request, tokenizer)}.")
        raise


def log_prob(reported: Any) -> float | None:
    """A log-probability as a number; None if invalid: text, NaN, or more than log 1."""
    if isinstance(reported, bool | str | bytes):
        return None
    try:
        value = float(reported)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return value if value <= _ROUNDING else None


def is_ruled_out(value: float) -> bool:
    """Whether a log-probability represents minus infinity."""
    return not value > _RULED_OUT


def _encoded_after(tokenizer: Any, prompt: Sequence[int], text: str) -> list[int]:
    """Ids of a text when encoded after a prompt."""
    before = tokens.decode(tokenizer, prompt[-tokens.CONTEXT :])
    return list(tokens.encode_in_place(tokenizer, text, before))
