"""`CompletionsProvider`: any server with OpenAI's completions endpoint, by the standard library."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from captum.attr import RemoteLLMProvider

from captum_llm_ext.base.terminal import one_line
from captum_llm_ext.remote import answers
from captum_llm_ext.remote.answers import Entry
from captum_llm_ext.remote.handshake import handshake
from captum_llm_ext.remote.providers import TextAdapter, TokenIdAdapter, Written
from captum_llm_ext.remote.transport import ApiError, Http, Secrets, UnusableAnswerError, api_key

Way = Literal["prompt_logprobs", "echo"]
# Statuses of servers that do not support an argument.
_UNKNOWN_ARGUMENT = (400, 404, 422, 501)
# Bytes of JSON per reported token, including escaped text. Chosen, not measured.
_ENTRY_BYTES = 512
_SHOWN = 200
# Maximum numbers of reported likeliest tokens: vLLM, OpenAI, others.
_TOPS = (20, 5, 1)


class CompletionsProvider(RemoteLLMProvider):
    """A model behind ``/v1/completions`` that reports log-probabilities of prompts, such as vLLM.

    Prompts are sent as token ids, several at a time and in several threads. Requests answered by
    429 or 5xx, or not at all, are retried with increasing waits, or as the server says
    (``Retry-After``). It is also a captum provider: `captum.attr.RemoteLLMAttribution` accepts it.

    Tested servers (``benchmarks/results/real_servers.json``): vLLM 0.32 reports log-probabilities
    within 4e-5 nats of its model, for prompts (by ids and by text) and for any next token.
    llama-cpp-python 0.3.36 takes no ids, and echoes values shifted by one, which the handshake
    detects; those of generated tokens are correct within 0.3 nats. ``transformers serve`` 5.23
    reports none.

    Args:
        api_url: URL up to ``/v1``: ``"http://localhost:8000/v1"``.
        model_name: The server's name of the model. None: the server's first model.
        api_key: Sent to the server and never displayed. By default the environment variable
            OPENAI_API_KEY, only for api.openai.com, the host of OPENAI_BASE_URL and this machine.
        prompts: ``"ids"``; or ``"text"`` for servers without support for ids, with the limits
            described in `RemoteGenerationAttribution`.
        logprobs: How log-probabilities of the prompt are requested: ``"prompt_logprobs"`` (vLLM),
            ``"echo"`` (``echo`` with ``logprobs``), or ``"auto"``: the first that passes the checks
            of `captum_llm_ext.remote.handshake`.
        top_logprobs: Number of likeliest tokens requested at every position with
            ``"prompt_logprobs"``. Saves requests if generated text is a cause.
        max_concurrency: Maximum number of concurrent requests.
        prompts_per_request: Maximum number of prompts per request.
        timeout: Seconds allowed for a whole response, per try.
        max_retries: Number of retries once the server has responded; before, it is given up within
            a few seconds, unless it is busy (429).
        headers: Sent with every request; may contain keys, and are never displayed.
        extra_body: Arguments sent with every request.

    Attributes:
        api_url: The URL without secrets.
        model_name: Name of the model.
        max_model_len: Maximum number of tokens of a prompt, if reported.

    Raises:
        ValueError: If an argument is out of range, or the URL may contain a key.
        ApiError, ConnectionError: If the model's name is requested, and the server does not
            respond.
    """

    def __init__(
        self,
        api_url: str,
        model_name: str | None = None,
        *,
        api_key: str | None = None,
        prompts: Literal["ids", "text"] = "ids",
        logprobs: Literal["auto", "prompt_logprobs", "echo"] = "auto",
        top_logprobs: int = 0,
        max_concurrency: int = 8,
        prompts_per_request: int = 8,
        timeout: float = 120.0,
        max_retries: int = 6,
        headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        _one_of("prompts", prompts, ("ids", "text"))
        _one_of("logprobs", logprobs, ("auto", "prompt_logprobs", "echo"))
        _at_least("top_logprobs", top_logprobs, 0)
        _at_least("max_concurrency", max_concurrency, 1)
        _at_least("prompts_per_request", prompts_per_request, 1)
        _at_least("max_retries", max_retries, 0)
        if not timeout > 0:
            raise ValueError(f"`timeout` is {timeout!r}: give seconds above 0.")
        if top_logprobs and (logprobs == "echo" or prompts == "text"):
            raise ValueError(
                "`top_logprobs` would be ignored: it needs prompts sent as ids, and echoed ones "
                "have no token ids."
            )
        self._http = Http(
            api_url, _secrets(api_key, api_url, headers), timeout=timeout, max_retries=max_retries
        )
        self.api_url = self._http.url
        self.takes_ids = prompts == "ids"
        self.top_logprobs = top_logprobs
        self.max_concurrency, self.prompts_per_request = max_concurrency, prompts_per_request
        self.ways: tuple[Way, ...] = (
            ("prompt_logprobs", "echo") if logprobs == "auto" else (logprobs,)
        )
        self._way: Way | None = None if logprobs == "auto" else logprobs
        self._names = answers.Names()
        self._extra = dict(extra_body or {})
        self.max_model_len: int | None = None
        self.model_name = self._first_model() if model_name is None else model_name

    @classmethod
    def over(cls, http: Http, model: str) -> "CompletionsProvider":
        """The same over an existing connection, with its key, headers and timeouts."""
        found = cls(http.url, model)
        found._http = http
        return found

    @property
    def http(self) -> Http:
        """The connection, for other endpoints of the same server."""
        return self._http

    def __repr__(self) -> str:
        return f"CompletionsProvider({self.api_url!r}, {self.model_name!r})"

    def get_token_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[Entry]]:
        """See `TokenProvider.get_token_logprobs`.

        Raises:
            ApiError: If the server refuses, or returns something else.
            ConnectionError: If it does not respond.
            ValueError: If it reports another number of tokens than were sent, or invalid
                log-probabilities. (Also an `ApiError`.)
        """
        if self._way is None:
            longest = max(prompts, key=len)
            handshake(TokenIdAdapter(self, None, 1, "error"), longest[:-1], longest[-1:])
        return self._logprobs([list(prompt) for prompt in prompts], prompts)

    def get_logprobs(
        self,
        input_prompt: str,
        target_str: str,
        tokenizer: Any = None,
    ) -> list[float]:
        """Log-probabilities of a target's tokens after a prompt, as for captum's providers.

        Args:
            input_prompt: The prompt.
            target_str: The target.
            tokenizer: The model's tokenizer.

        Returns:
            One number for each token of the target. With prompts as ids, prompt and target are
            encoded separately, and no token merges across their border; as text, the target's
            tokens are those after the prompt's.

        Raises:
            ValueError: If there is no tokenizer or no target, a number is missing, or the server
                tokenises the text differently from the tokenizer.
        """
        if tokenizer is None or not target_str:
            raise ValueError("give the model's `tokenizer`, and a target that is not empty.")
        prompt = _ids(tokenizer.encode(input_prompt))
        target = _ids(tokenizer.encode(target_str, add_special_tokens=False))
        kind = TokenIdAdapter if self.takes_ids else TextAdapter
        handshake(kind(self, tokenizer, 1, "error"), prompt, target)
        if self.takes_ids:
            ids = [*prompt, *target]
            [entries] = self._logprobs([ids], [ids])
        else:
            text = input_prompt + target_str
            ids = _ids(tokenizer.encode(text))
            if ids[-len(target) :] != target:
                # A different number of tokens is noticed by the caller; equally many other ones
                # would not be.
                after = ids[len(prompt) :]
                if ids[: len(prompt)] != prompt or len(after) == len(target) or not after:
                    raise ValueError(
                        f"{target_str!r} is read as other tokens after {input_prompt[-40:]!r} "
                        'than by itself: say `prompts="ids"`, or begin it where the tokenizer '
                        "does."
                    )
                target = after
            [entries] = self._logprobs([text], [ids])
        found: list[float] = []
        for token, entry in zip(target, entries[-len(target) :], strict=True):
            value = (entry or {}).get(token)
            if value is None:
                raise ValueError(
                    f"the server gave no log-probability of token id {token} of {target_str!r}."
                )
            found.append(value)
        return found

    def generate(self, prompt: str, **gen_args: Any) -> str:
        """Generates a continuation of a text.

        Args:
            prompt: The text.
            **gen_args: Arguments of the server (``max_tokens``, ``temperature``…), or of
                transformers: ``max_new_tokens``, ``do_sample``. Default: 25 tokens, greedy.
        """
        return answers.text_of(self._generated(prompt, gen_args))

    def generate_tokens(self, prompt: Sequence[int], **gen_args: Any) -> list[int] | str:
        """Generates a continuation of token ids.

        Args:
            prompt: The ids.
            **gen_args: As for `generate`.

        Returns:
            Token ids; the text if the server reports no ids.
        """
        wanted = {"return_token_ids": True, "logprobs": 0, "return_tokens_as_token_ids": True}
        if not self.takes_ids:
            raise ValueError('with `prompts="text"` only `generate` is supported.')
        try:
            choice = self._generated(list(prompt), gen_args | wanted)
        except ApiError as error:
            if error.status not in _UNKNOWN_ARGUMENT:
                raise
            choice = self._generated(list(prompt), gen_args)
        found = answers.generated_ids(choice)
        return answers.text_of(choice) if found is None else list(found)

    def written(
        self,
        prompt: str | Sequence[int],
        n: int,
        *,
        temperature: float,
        n_answers: int = 1,
        bias: Mapping[int, float] | None = None,
    ) -> list[Written]:
        """Generates tokens, with the log-probabilities that the server reports for them.

        Args:
            prompt: Text or token ids.
            n: Maximum number of tokens.
            temperature: 0 for greedy.
            n_answers: Number of sampled answers per request; servers may return fewer.
            bias: Added to the logits of tokens, if the server supports it.

        Returns:
            One for each answer; empty if the server reports no log-probabilities.

        Raises:
            ApiError, ConnectionError: As for `get_token_logprobs`.
        """
        sent = prompt if isinstance(prompt, str) else list(prompt)
        plain: dict[str, Any] = {"max_tokens": n, "temperature": temperature}
        plain |= {"n": n_answers} if n_answers > 1 else {}
        plain |= {"logit_bias": {str(token): b for token, b in bias.items()}} if bias else {}
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        requests = [plain | {"logprobs": _TOPS[0]} | ids, *(plain | {"logprobs": k} for k in _TOPS)]
        for arguments in requests:
            try:
                answer = self._http.post("/completions", self._body(sent, arguments))
            except ApiError as error:
                if error.status not in (400, 422, 501):
                    raise
                continue
            choices = self._choices(answer, None if n_answers > 1 else 1)
            found = [answers.written(answer, choice) for choice in choices]
            return [one for one in found if one is not None]
        return []

    def likeliest(
        self, prompt: str | Sequence[int], most: int | None = None
    ) -> list[dict[str, float]]:
        """The likeliest tokens that the server reports at each position of a prompt.

        Args:
            prompt: Text or token ids.
            most: Number of tokens; if the server refuses it, as many as it accepts.

        Returns:
            One mapping per token of the prompt (and possibly of generated ones), from token names
            to nats; empty, or none, if the server reports nothing.

        Raises:
            ApiError, ConnectionError: As for `get_token_logprobs`.
        """
        sent = prompt if isinstance(prompt, str) else list(prompt)
        is_echo = self._way == "echo"
        tries = _TOPS if most is None else (most, *(k for k in _TOPS if k < most))
        for k in tries:
            how = {"echo": True, "logprobs": k} if is_echo else {"prompt_logprobs": k}
            try:
                answer = self._http.post(
                    "/completions", self._body(sent, {"max_tokens": 1, "temperature": 0.0} | how)
                )
            except ApiError as error:
                if error.status not in (400, 422, 501):
                    raise
                continue
            return answers.likeliest(self._choices(answer, 1)[0])
        return []

    def complete(self, prompt: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The server's whole response to a text; its choices in order."""
        several = arguments.get("n", 1) > 1
        answer = self._http.post(
            "/completions", self._body(prompt, arguments), is_splittable=several
        )
        return cast(dict[str, Any], answer) | {"choices": self._choices(answer, None)}

    def use(self, way: Way | None) -> None:
        """Requests log-probabilities of prompts in this way from now on."""
        self._way = way

    def interrupt(self) -> None:
        """Aborts all requests under way, in all threads."""
        self._http.interrupt()

    def _first_model(self) -> str:
        found = self._http.get("/models")
        models: Any = found.get("data") if isinstance(found, dict) else None
        first: Any = models[0] if isinstance(models, list) and models else None
        name: Any = first.get("id") if isinstance(first, dict) else None
        # It is displayed with results: control characters could affect a terminal.
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ApiError(f"{self.api_url} names no models: give `model_name`.")
        length: Any = cast(dict[str, Any], first).get("max_model_len")
        self.max_model_len = length if answers.is_integer(length) and length > 0 else None
        return name

    def _generated(self, prompt: str | list[int], gen_args: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._http.post("/completions", self._body(prompt, _as_served(gen_args)))
        return self._choices(answer, 1)[0]

    def _body(self, prompt: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model_name, "prompt": prompt, **arguments, **self._extra}

    def _logprobs(self, prompts: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[list[Entry]]:
        """Entries per token of prompts with known ids."""
        way = cast(Way, self._way)
        # One token is generated, since not all servers accept 0.
        arguments: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
        if way == "echo":
            arguments |= {"echo": True, "logprobs": 1}
        else:
            arguments |= {"prompt_logprobs": self.top_logprobs}
        prompt = prompts[0] if len(prompts) == 1 else list(prompts)
        n_entries = sum(map(len, ids)) * (2 + self.top_logprobs)
        answer = self._http.post(
            "/completions",
            self._body(prompt, arguments),
            most_bytes=_ENTRY_BYTES * n_entries,
            is_splittable=len(prompts) > 1,
        )
        choices = self._choices(answer, len(prompts))
        read = answers.echoed_log_probs if way == "echo" else answers.prompt_log_probs
        found = [read(choice, own) for choice, own in zip(choices, ids, strict=True)]
        answers.check_usage(answer, ids)
        if way == "echo":
            for choice, own in zip(choices, ids, strict=True):
                self._names.check(choice, own)
        return found

    def _choices(self, answer: Any, n: int | None) -> list[dict[str, Any]]:
        """The choices of a response in order; exactly `n`, if given."""
        found: Any = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise ApiError(f"{self.api_url} answered without `choices`.")
        choices = cast(list[dict[str, Any]], found)
        n = len(choices) if n is None else n
        numbers: list[Any] = [one.get("index") for one in choices]
        if all(number is None for number in numbers):
            numbers = list(range(len(choices)))
        if not all(map(answers.is_integer, numbers)) or sorted(numbers) != list(range(n)):
            shown = one_line(repr(numbers))[:_SHOWN]
            raise UnusableAnswerError(
                f"{self.api_url} answered with the choices {shown} to {n} prompts: expected one "
                "each. Say `prompts_per_request=1` for servers that take one prompt at a time."
            )
        return [choices[numbers.index(i)] for i in range(n)]


def _as_served(gen_args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` under the server's names."""
    given = dict(gen_args)
    if "max_length" in given:
        raise ValueError("`max_length` cannot be sent to a server: give `max_new_tokens`.")
    n_new = given.pop("max_new_tokens", 25)
    samples = given.pop("do_sample", None)
    given = {name: value for name, value in given.items() if value is not None}
    if samples is False or (samples is None and "temperature" not in given):
        given["temperature"] = 0.0
    return {"max_tokens": n_new} | given


def _ids(encoded: Any) -> list[int]:
    return [int(token) for token in encoded]


def _secrets(key: str | None, url: str, headers: Mapping[str, str] | None) -> Secrets:
    found = api_key(key, url)
    own = {} if found is None else {"Authorization": f"Bearer {found}"}
    return Secrets(own | dict(headers or {}))


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` is {value!r}: give one of {', '.join(map(repr, known))}.")


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` is {value!r}: give an integer of at least {least}.")
