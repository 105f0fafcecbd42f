"""Providers that take messages and return text, with or without log-probabilities."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from captum_llm_ext.remote.chat_answers import (
    REFUSED,
    chat_answer,
    completed,
    counts,
    steps_of,
    text_of,
)
from captum_llm_ext.remote.chat_endpoint import ChatAnswer, ChatEndpoint, ChatRequest, Prefill
from captum_llm_ext.remote.completions import CompletionsProvider
from captum_llm_ext.remote.transport import (
    ApiError,
    GarbageError,
    Http,
    Secrets,
    api_key,
)


class _HttpProvider:
    """A provider given by its URL, or by the user's client, which has its own URL."""

    model_name: str
    _http: Http | None = None

    @property
    def http(self) -> Http | None:
        """The connection, for other endpoints of the same server."""
        return self._http

    @property
    def api_url(self) -> str | None:
        """URL of the API; None for a user's client."""
        return None if self._http is None else self._http.url

    def interrupt(self) -> None:
        """Aborts the requests under way."""
        if self._http is not None:
            self._http.interrupt()

    def _by_client(self, create: Callable[[], Any]) -> Any:
        try:
            return create().model_dump()
        except Exception as error:
            status = getattr(error, "status_code", None)
            if isinstance(status, int):
                raise ApiError(f"{self.model_name}: {error}", status) from error
            raise


class ChatProvider(_HttpProvider):
    """A model behind OpenAI's chat completions: OpenAI, Azure, vLLM, llama.cpp and many others.

    The capabilities of each are found automatically: vLLM 0.32 continues prefilled answers
    (``"continue"``), llama-cpp-python 0.3.36 does not, which leaves first tokens (``"label"``), and
    ``transformers serve`` 5.23 returns only text (``benchmarks/results/real_servers.json``).

    Args:
        model: The server's name of the model.
        client: An `openai.OpenAI()` or `AzureOpenAI()`, used instead of this package's connection.
        api_url: URL up to ``/v1``, without a client.
        prefill: How the model is made to continue a prefilled answer: ``"continue"``
            (``continue_final_message``, as in vLLM and transformers), ``"assistant"`` (the chat
            ends with a message of the assistant), ``"none"``, or ``"auto"``: the first that works.
        api_key: As for `CompletionsProvider`.
        max_concurrency: Maximum number of concurrent requests.
        timeout: Seconds allowed for a whole response.
        max_retries: As for `CompletionsProvider`.
        headers, extra_body: As for `CompletionsProvider`.

    Raises:
        ValueError: If neither a client nor a URL is given, or both.
    """

    def __init__(
        self,
        model: str,
        client: Any = None,
        *,
        api_url: str | None = None,
        prefill: Literal["auto", "continue", "assistant", "none"] = "auto",
        api_key: str | None = None,
        max_concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 6,
        headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if (client is None) == (api_url is None):
            raise ValueError("give either `client`, such as `openai.OpenAI()`, or `api_url`.")
        if prefill not in ("auto", "continue", "assistant", "none"):
            raise ValueError(
                f"`prefill` is {prefill!r}: give one of 'auto', 'continue', 'assistant', 'none'."
            )
        if not isinstance(max_concurrency, int) or max_concurrency < 1:
            raise ValueError(f"`max_concurrency` is {max_concurrency!r}: give at least 1.")
        self.model_name, self._client = model, client
        self.max_concurrency, self._extra = max_concurrency, dict(extra_body or {})
        ways: tuple[Prefill, ...] = ("continue", "assistant")
        self.prefills: tuple[Prefill, ...] = ways if prefill == "auto" else (prefill,)
        if prefill == "none":
            self.prefills = ()
        if api_url is not None:
            url = api_url.rstrip("/").removesuffix("/chat/completions")
            key = _key(api_key, url, "OPENAI_API_KEY")
            own = {} if key is None else {"Authorization": f"Bearer {key}"}
            secrets = Secrets(own | dict(headers or {}))
            self._http = Http(url, secrets, timeout=timeout, max_retries=max_retries)

    takes_bias = takes_ids = True

    @classmethod
    def over(cls, http: Http, model: str) -> "ChatProvider":
        """The same over an existing connection, with its key, headers and timeouts."""
        found = cls(model, api_url=http.url)
        found._http = http
        return found

    def __repr__(self) -> str:
        return f"ChatProvider({self.model_name!r})"

    def chat(self, question: ChatRequest) -> list[ChatAnswer]:
        """See `ChatEndpoint.chat`."""
        body: dict[str, Any] = {
            "model": self.model_name,
            "messages": [dict(message) for message in question.messages],
        }
        if question.prefill:
            body["messages"].append({"role": "assistant", "content": question.prefill})
            if question.way == "continue":
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        top = question.top
        body |= {"logprobs": True, "top_logprobs": top} if top else {}
        body |= _settings(question)
        answer = self._posted(body | self._extra)
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            raise ApiError(f"{self.model_name} answered without `choices`.")
        several = cast(list[Any], choices)
        return [chat_answer(one, answer, len(several), has_logprobs=top > 0) for one in several]

    def _posted(self, body: dict[str, Any]) -> dict[str, Any]:
        if self._http is not None:
            several = body.get("n", 1) > 1
            found = self._http.post("/chat/completions", body, is_splittable=several)
        else:
            known = ("model", "messages", "max_tokens", "temperature", "logprobs", "top_logprobs")
            own = {k: v for k, v in body.items() if k in (*known, "n", "seed", "logit_bias")}
            extra = {k: v for k, v in body.items() if k not in own}
            more = {"extra_body": extra} if extra else {}
            found = self._by_client(lambda: self._client.chat.completions.create(**own, **more))
        if not isinstance(found, dict):
            raise GarbageError(f"{self.model_name} returned something other than an object.")
        return cast(dict[str, Any], found)


class AnthropicProvider(_HttpProvider):
    """A model behind Anthropic's messages API, which returns only text.

    Args:
        model: Its name.
        client: An `anthropic.Anthropic()`.
        api_url: Instead of ``https://api.anthropic.com/v1``, without a client.
        api_key: By default the environment variable ANTHROPIC_API_KEY, for api.anthropic.com, the
            host of ANTHROPIC_BASE_URL and this machine.
        max_concurrency, timeout, max_retries, headers: As for `ChatProvider`.
    """

    prefills: tuple[Prefill, ...] = ()

    def __init__(
        self,
        model: str,
        client: Any = None,
        *,
        api_url: str = "https://api.anthropic.com/v1",
        api_key: str | None = None,
        max_concurrency: int = 4,
        timeout: float = 120.0,
        max_retries: int = 6,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.model_name, self._client, self.max_concurrency = model, client, max_concurrency
        if client is None:
            key = _key(api_key, api_url, "ANTHROPIC_API_KEY")
            own = {"anthropic-version": "2023-06-01"} | ({} if key is None else {"x-api-key": key})
            secrets = Secrets(own | dict(headers or {}))
            self._http = Http(api_url, secrets, timeout=timeout, max_retries=max_retries)

    def __repr__(self) -> str:
        return f"AnthropicProvider({self.model_name!r})"

    def chat(self, question: ChatRequest) -> list[ChatAnswer]:
        """See `ChatEndpoint.chat`; one answer at a time, without log-probabilities."""
        asked = question.messages
        system = [str(m["content"]) for m in asked if m["role"] == "system"]
        rest = [dict(m) for m in asked if m["role"] != "system"]
        body: dict[str, Any] = {
            "model": self.model_name,
            "max_tokens": question.n_tokens,
            "temperature": question.temperature,
            "messages": rest or [{"role": "user", "content": " "}],
        }
        body |= {"system": "\n\n".join(system)} if any(system) else {}
        if self._http is not None:
            found: Any = self._http.post("/messages", body)
        else:
            found = self._by_client(lambda: self._client.messages.create(**body))
        parts: Any = found.get("content") if isinstance(found, dict) else None
        if not isinstance(parts, list):
            raise ApiError(f"{self.model_name} answered without `content`.")
        held = cast(dict[str, Any], found)
        text = text_of(parts)
        usage = counts(held)
        return [
            ChatAnswer(
                text,
                is_refusal=held.get("stop_reason") in REFUSED,
                n_in=usage["input_tokens"],
                n_out=usage["output_tokens"],
                model=held["model"] if isinstance(held.get("model"), str) else None,
                has_stopped=held.get("stop_reason") == "end_turn",
            )
        ]


class CallableProvider:
    """A model behind any function.

    Args:
        fn: Called as ``fn(messages, max_tokens=…, temperature=…, prefill=…, top_logprobs=…,
            seed=…)``; returns the text after `prefill`, or ``(text, top)`` with the
            log-probabilities of the likeliest tokens at each position: a list of mappings from a
            token to nats (or one, for the first position). Also with ``logit_bias=`` or
            ``logprob_token_ids=`` (token ids to report instead of the likeliest), if it has such
            an argument.
        name: Name in results.
        prefill: Whether it continues a prefilled answer (``prefill=``).
        max_concurrency: Maximum number of threads.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        prefill: bool = True,
        max_concurrency: int = 1,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"`fn` is a {type(fn).__name__}: give a function of messages.")
        self._fn, self.max_concurrency = fn, max_concurrency
        self.model_name = name or str(getattr(fn, "__name__", type(fn).__name__))
        self.prefills: tuple[Prefill, ...] = ("continue",) if prefill else ()
        self.takes_bias = _takes(fn, "logit_bias")
        self.takes_ids = _takes(fn, "logprob_token_ids")

    def __repr__(self) -> str:
        return f"CallableProvider({self.model_name})"

    def chat(self, question: ChatRequest) -> list[ChatAnswer]:
        """See `ChatEndpoint.chat`; one answer at a time."""
        found = self._fn(
            [dict(message) for message in question.messages],
            max_tokens=question.n_tokens,
            temperature=question.temperature,
            prefill=question.prefill,
            top_logprobs=question.top,
            seed=question.seed,
            **({"logit_bias": dict(question.bias)} if question.bias else {}),
            **({"logprob_token_ids": list(question.reported)} if question.reported else {}),
        )
        text, tops = cast(tuple[Any, Any], found) if isinstance(found, tuple) else (found, ())
        if not isinstance(text, str):
            raise TypeError(
                f"the function returned a {type(text).__name__}: expected a text, or a text and "
                "log-probabilities of the likeliest tokens."
            )
        several = [tops] if isinstance(tops, Mapping) else list(cast(Sequence[Any], tops))
        return [ChatAnswer(text, steps_of(text, cast(list[Mapping[str, float]], several)))]


class ChatOverCompletions:
    """A `CompletionsProvider` that is sent texts, in which a prefilled answer is just more text."""

    prefills: tuple[Prefill, ...] = ("continue",)
    takes_bias = takes_ids = True

    def __init__(self, provider: CompletionsProvider) -> None:
        self._provider, self.max_concurrency = provider, provider.max_concurrency
        self.model_name, self.api_url = provider.model_name, provider.api_url

    def interrupt(self) -> None:
        """Aborts requests under way."""
        self._provider.interrupt()

    def chat(self, question: ChatRequest) -> list[ChatAnswer]:
        """See `ChatEndpoint.chat`; the messages are concatenated."""
        texts = [str(message["content"]) for message in question.messages]
        prompt = "\n".join(texts) + question.prefill
        body = _settings(question) | ({"logprobs": question.top} if question.top else {})
        answer = self._provider.complete(prompt, body)
        has_logprobs = question.top > 0
        return [completed(one, answer, has_logprobs=has_logprobs) for one in answer["choices"]]


def chat_endpoint(provider: Any) -> ChatEndpoint | None:
    """A provider as a `ChatEndpoint`; None if it is none."""
    if isinstance(provider, CompletionsProvider):
        return ChatOverCompletions(provider)
    return provider if isinstance(provider, ChatEndpoint) else None


def other_endpoint(provider: Any) -> tuple[ChatEndpoint | None, str]:
    """The chat endpoint of a server with a completions endpoint, or vice versa.

    Returns:
        The other provider and its class name; None for other providers.
    """
    if isinstance(provider, CompletionsProvider):
        return ChatProvider.over(provider.http, provider.model_name), "ChatProvider"
    if isinstance(provider, ChatProvider) and provider.http is not None:
        other = CompletionsProvider.over(provider.http, provider.model_name)
        return ChatOverCompletions(other), "CompletionsProvider"
    return None, ""


def _settings(question: ChatRequest) -> dict[str, Any]:
    """Settings that chat and completions requests share."""
    found: dict[str, Any] = {
        "max_tokens": question.n_tokens,
        "temperature": question.temperature,
    }
    found |= {"n": question.n} if question.n > 1 else {}
    found |= {} if question.seed is None else {"seed": question.seed}
    found |= {"logprob_token_ids": list(question.reported)} if question.reported else {}
    bias = {str(token): value for token, value in (question.bias or {}).items()}
    return found | ({"logit_bias": bias} if bias else {})


def _takes(fn: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(fn).parameters
    except (TypeError, ValueError):  # a builtin
        return False


def _key(given: str | None, url: str, variable: str) -> str | None:
    return api_key(given, url, variable)
