"""`CompletionsProvider`: any server with OpenAI's completions endpoint, by the standard library."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from captum.attr import RemoteLLMProvider

from captum_llm_ext.remote.providers import log_prob
from captum_llm_ext.remote.transport import (
    ApiError,
    Http,
    Secrets,
    UnusableAnswerError,
    api_key,
)
from captum_llm_ext.result.terminal import one_line

Entry = Mapping[int, float] | None
Way = Literal["prompt_logprobs", "echo"]
# What a server says that does not know an argument.
_UNKNOWN_ARGUMENT = (400, 404, 422, 501)
_IDS_AS_TEXT = "token_id:"
# More than any vocabulary has, and no more than a tensor holds.
_MOST_DIGITS = 12
# That much JSON tells of one token, with its text of escaped characters.
_ENTRY_BYTES = 512
_SHOWN = 200


class CompletionsProvider(RemoteLLMProvider):
    """A model behind ``/v1/completions`` that tells log-probabilities of prompts, as vLLM does.

    Prompts are sent as token ids, several at a time and in several threads. What is answered by
    429 or 5xx, or not at all, is asked for again, later and later, or when the server says
    (``Retry-After``). It is one of captum's providers too: `captum.attr.RemoteLLMAttribution`
    takes it.

    Args:
        api_url: Up to ``/v1``: ``"http://localhost:8000/v1"``.
        model_name: As the server calls it. None: the first that the server has.
        api_key: By default the environment variable OPENAI_API_KEY. It is sent to the server and
            shown nowhere.
        prompts: ``"ids"``; or ``"text"`` for servers that take nothing else, with the loss that
            comes of it: see `RemoteGenerationAttribution`.
        logprobs: How the server is asked for log-probabilities of the prompt:
            ``"prompt_logprobs"`` (vLLM), ``"echo"`` (``echo`` with ``logprobs``), or ``"auto"``:
            whichever it answers first.
        top_logprobs: With ``"prompt_logprobs"``, so many of the likeliest tokens are asked for at
            every place. It saves requests where generated text is a cause.
        max_concurrency: At most so many requests at a time.
        prompts_per_request: At most so many prompts in one.
        timeout: Seconds that a whole answer may take, each time that it is asked for.
        max_retries: So many further tries.
        headers: Sent with every request; they may hold keys, and are shown nowhere.
        extra_body: Arguments sent with every request.

    Attributes:
        api_url: The URL, without anything secret.
        model_name: The model.
        max_model_len: Tokens of the longest prompt, if the server has told.

    Raises:
        ValueError: If an argument is out of range, or the URL holds what may be a key.
        ApiError, ConnectionError: If the model's name is asked for, and there is no answer.
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
                "`top_logprobs` would be ignored: it is of use with prompts as ids alone, and "
                "echoed ones have no token ids."
            )
        self._http = Http(
            api_url, _secrets(api_key, headers), timeout=timeout, max_retries=max_retries
        )
        self.api_url = self._http.url
        self.takes_ids = prompts == "ids"
        self.top_logprobs = top_logprobs
        self.max_concurrency, self.prompts_per_request = max_concurrency, prompts_per_request
        self._way: Way | None = None if logprobs == "auto" else logprobs
        self._extra = dict(extra_body or {})
        self.max_model_len: int | None = None
        self.model_name = self._first_model() if model_name is None else model_name

    def __repr__(self) -> str:
        return f"CompletionsProvider({self.api_url!r}, {self.model_name!r})"

    def get_token_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[Entry]]:
        """See `TokenProvider.get_token_logprobs`.

        Raises:
            ApiError: If the server refuses, or answers something else.
            ConnectionError: If it does not answer.
            ValueError: If it tells another number of tokens than were sent, or what is no
                log-probability. (An `ApiError` as well.)
        """
        return self._logprobs([list(prompt) for prompt in prompts], prompts)

    def get_logprobs(
        self,
        input_prompt: str,
        target_str: str,
        tokenizer: Any = None,
    ) -> list[float]:
        """Captum's question: log-probabilities of a target's tokens after a prompt.

        Args:
            input_prompt: The prompt.
            target_str: The target.
            tokenizer: The model's tokenizer.

        Returns:
            One number for each token of the target. With prompts as ids, prompt and target are
            encoded apart, and no token merges across their border; as text, its tokens are those
            after the prompt's.

        Raises:
            ValueError: If there is no tokenizer or no target, a number is missing, or the server
                reads the text as other tokens than the tokenizer.
        """
        if tokenizer is None or not target_str:
            raise ValueError("give the model's `tokenizer`, and a target that is not empty.")
        prompt = _ids(tokenizer.encode(input_prompt))
        target = _ids(tokenizer.encode(target_str, add_special_tokens=False))
        if self.takes_ids:
            ids = [*prompt, *target]
            [entries] = self._logprobs([ids], [ids])
        else:
            text = input_prompt + target_str
            ids = _ids(tokenizer.encode(text))
            if ids[-len(target) :] != target:
                # Another number of tokens is seen by who asks; as many other ones would not be.
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
        """What the model writes after a text.

        Args:
            prompt: The text.
            **gen_args: Of the server (``max_tokens``, ``temperature``…), or as transformers has
                them: ``max_new_tokens``, ``do_sample``. By default 25 tokens, greedy.
        """
        return _text(self._generated(prompt, gen_args))

    def generate_tokens(self, prompt: Sequence[int], **gen_args: Any) -> list[int] | str:
        """What the model writes after token ids.

        Args:
            prompt: The ids.
            **gen_args: As of `generate`.

        Returns:
            Token ids; the text alone where the server tells no ids.
        """
        wanted = {"return_token_ids": True, "logprobs": 0, "return_tokens_as_token_ids": True}
        if not self.takes_ids:
            raise ValueError('with `prompts="text"` there is `generate` alone.')
        try:
            choice = self._generated(list(prompt), gen_args | wanted)
        except ApiError as error:
            if error.status not in _UNKNOWN_ARGUMENT:
                raise
            choice = self._generated(list(prompt), gen_args)
        if isinstance(choice.get("token_ids"), list):
            return _token_ids(choice["token_ids"])
        logprobs: Any = choice.get("logprobs")
        told: Any = logprobs.get("tokens") if isinstance(logprobs, dict) else None
        names = cast(list[Any], told) if isinstance(told, list) else []
        if names and all(str(token).startswith(_IDS_AS_TEXT) for token in names):
            digits = [str(token).removeprefix(_IDS_AS_TEXT) for token in names]
            return _token_ids([int(d) if _is_number(d) else d for d in digits])
        return _text(choice)

    def interrupt(self) -> None:
        """Ends all requests that are under way, in whatever thread."""
        self._http.interrupt()

    def _first_model(self) -> str:
        found = self._http.get("/models")
        models: Any = found.get("data") if isinstance(found, dict) else None
        first: Any = models[0] if isinstance(models, list) and models else None
        name: Any = first.get("id") if isinstance(first, dict) else None
        # It is shown wherever results are: a terminal would obey other characters.
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ApiError(f"{self.api_url} names no models: give `model_name`.")
        length: Any = cast(dict[str, Any], first).get("max_model_len")
        self.max_model_len = length if _is_integer(length) and length > 0 else None
        return name

    def _generated(self, prompt: str | list[int], gen_args: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._http.post("/completions", self._body(prompt, _as_served(gen_args)))
        return self._choices(answer, 1)[0]

    def _body(self, prompt: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model_name, "prompt": prompt, **arguments, **self._extra}

    def _logprobs(self, prompts: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[list[Entry]]:
        """Entries per token of prompts, of which the ids are known."""
        if self._way is not None:
            return self._logprobs_by(self._way, prompts, ids)
        try:
            found = self._logprobs_by("prompt_logprobs", prompts, ids)
            self._way = "prompt_logprobs"
            return found
        except UnusableAnswerError:
            raise
        except ApiError as error:
            if error.status not in (None, *_UNKNOWN_ARGUMENT):
                raise
            first = error
        try:
            found = self._logprobs_by("echo", prompts, ids)
        except UnusableAnswerError:
            raise
        except ApiError as error:
            raise ApiError(
                f"no log-probabilities of prompts are to be had. By `prompt_logprobs`: {first} "
                f"By `echo`: {error}",
                error.status,
            ) from error
        self._way = "echo"
        return found

    def _logprobs_by(
        self, way: Way, prompts: Sequence[Any], ids: Sequence[Sequence[int]]
    ) -> list[list[Entry]]:
        # One token has to be generated: not all servers take 0.
        arguments: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
        if way == "echo":
            arguments |= {"echo": True, "logprobs": 1}
        else:
            arguments |= {"prompt_logprobs": self.top_logprobs}
        prompt = prompts[0] if len(prompts) == 1 else list(prompts)
        n_entries = sum(map(len, ids)) * (2 + self.top_logprobs)
        answer = self._http.post(
            "/completions", self._body(prompt, arguments), most_bytes=_ENTRY_BYTES * n_entries
        )
        choices = self._choices(answer, len(prompts))
        read = _echoed if way == "echo" else _told
        return [read(choice, own) for choice, own in zip(choices, ids, strict=True)]

    def _choices(self, answer: Any, n: int) -> list[dict[str, Any]]:
        found: Any = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise ApiError(f"{self.api_url} answered without `choices`.")
        choices = cast(list[dict[str, Any]], found)
        numbers: list[Any] = [one.get("index") for one in choices]
        if all(number is None for number in numbers):
            numbers = list(range(len(choices)))
        if not all(map(_is_integer, numbers)) or sorted(numbers) != list(range(n)):
            shown = one_line(repr(numbers))[:_SHOWN]
            raise UnusableAnswerError(
                f"{self.api_url} answered with the choices {shown} to {n} prompts: one each is "
                "wanted. Say `prompts_per_request=1` for servers that take one prompt at a time."
            )
        return [choices[numbers.index(i)] for i in range(n)]


def _told(choice: Mapping[str, Any], ids: Sequence[int]) -> list[Entry]:
    """Log-probabilities as vLLM tells them: a mapping of ids for each token of the prompt."""
    told: Any = choice.get("prompt_logprobs")
    if not isinstance(told, list):
        raise ApiError("the server's answer holds no `prompt_logprobs`.")
    entries = cast(list[Any], told)
    if len(entries) != len(ids):
        raise _wrong_count(len(entries), len(ids))
    read = choice.get("prompt_token_ids")
    if isinstance(read, list) and read != list(ids):
        raise UnusableAnswerError(
            "the server read the prompt as other token ids than were sent: it adds tokens to ids, "
            "or leaves some out, and cannot be used."
        )
    return [None if entry is None else _entry(entry) for entry in entries]


def _entry(told: Any) -> dict[int, float]:
    if not isinstance(told, dict):
        raise _unusable("an entry of `prompt_logprobs`", told, "a mapping of token ids")
    found: dict[int, float] = {}
    for token, said in cast(dict[str, Any], told).items():
        if not _is_number(token):
            raise _unusable("a key of `prompt_logprobs`", token, "a token id")
        value = cast(dict[str, Any], said).get("logprob") if isinstance(said, dict) else said
        found[int(token)] = _number(value)
    return found


def _echoed(choice: Mapping[str, Any], ids: Sequence[int]) -> list[Entry]:
    """Log-probabilities of an echoed prompt; what was generated stands after it."""
    logprobs: Any = choice.get("logprobs")
    told: Any = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(told, list):
        raise ApiError("the server's answer holds no `logprobs` of the echoed prompt.")
    values = cast(list[Any], told)
    names: Any = cast(dict[str, Any], logprobs).get("tokens")
    n_named = len(cast(list[Any], names)) if isinstance(names, list) else len(values)
    if len(values) not in (len(ids), len(ids) + 1) or n_named != len(values):
        raise _wrong_count(len(values), len(ids))
    if len(values) == len(ids) and values and values[0] is not None:
        raise UnusableAnswerError(
            "the server told as many log-probabilities as the prompt has tokens, and one of the "
            "first, which has none: whether they are shifted by one is not to be seen."
        )
    pairs = zip(ids, values[: len(ids)], strict=True)
    return [None if value is None else {token: _number(value)} for token, value in pairs]


def _wrong_count(found: int, wanted: int) -> ApiError:
    return UnusableAnswerError(
        f"the server told log-probabilities of {found} tokens to a prompt of {wanted}: it reads it "
        "as other tokens, and nothing says which is which. Check that the tokenizer is the "
        'model\'s; a server that takes no ids wants `prompts="text"`.'
    )


def _number(said: Any) -> float:
    """A log-probability, -inf for a token that is ruled out."""
    value = log_prob(said)
    if value is None:
        raise _unusable("a log-probability", said, "a number of nats, 0 at most")
    return value


def _token_ids(told: Any) -> list[int]:
    ids = cast(list[Any], told)
    for token in ids:
        if not _is_integer(token) or not 0 <= token < 10**_MOST_DIGITS:
            raise _unusable("a token id", token, "an integer of at least 0")
    return ids


def _text(choice: Mapping[str, Any]) -> str:
    text = choice.get("text")
    if not isinstance(text, str):
        raise _unusable("what the model wrote", text, "a text")
    return text


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unusable(what: str, found: Any, wanted: str) -> ApiError:
    try:
        shown = one_line(repr(found))[:_SHOWN]
    except (RecursionError, ValueError):  # too deep, or an integer of too many digits
        shown = f"a {type(found).__name__}"
    return UnusableAnswerError(f"the server gave {shown} as {what}: {wanted} is wanted.")


def _as_served(gen_args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` as servers call them."""
    given = dict(gen_args)
    if "max_length" in given:
        raise ValueError("`max_length` is nothing that a server knows: give `max_new_tokens`.")
    n_new = given.pop("max_new_tokens", 25)
    samples = given.pop("do_sample", None)
    given = {name: value for name, value in given.items() if value is not None}
    if samples is False or (samples is None and "temperature" not in given):
        given["temperature"] = 0.0
    return {"max_tokens": n_new} | given


def _ids(encoded: Any) -> list[int]:
    return [int(token) for token in encoded]


def _secrets(key: str | None, headers: Mapping[str, str] | None) -> Secrets:
    found = api_key(key)
    own = {} if found is None else {"Authorization": f"Bearer {found}"}
    return Secrets(own | dict(headers or {}))


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` is {value!r}: give one of {', '.join(map(repr, known))}.")


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` is {value!r}: give an integer of at least {least}.")
