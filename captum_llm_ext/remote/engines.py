"""`EngineProvider`: log-probabilities of prompts from an inference engine in this process.

vLLM and SGLang provide tensor parallelism, FP8, paged memory and prefix caching. An engine is a
provider like any other, without HTTP: rows, checkpoints, the handshake and the results are those of
`RemoteGenerationAttribution`.

Their particularity is the *prefix cache*: positions taken from it have no logits. SGLang is given
the start of log-probabilities, and reuses only what is before. vLLM recomputes the whole prompt by
default; otherwise it leaves uninitialised memory at positions that it did not compute: these are
never read, and a prompt of which too much was reused is requested again.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from captum_llm_ext.remote.answers import Entry
from captum_llm_ext.remote.providers import IDS_AS_TEXT, Written

# Prompts handed to an engine at a time; how they are batched is the engine's decision. Chosen, not
# measured.
_PER_CALL = 512
# Number of likeliest tokens requested for generated text. Chosen, not measured.
_TOP = 5
_SHOWN = 60


class EngineProvider:
    """A model in an inference engine of this process: a vLLM ``LLM`` or an SGLang ``Engine``.

    ::

        provider = EngineProvider(vllm.LLM("…", enable_prefix_caching=True))
        method = KernelShap(RemoteLLMAttribution.placeholder_model)
        result = RemoteGenerationAttribution(method, tokenizer, provider).attribute(inp)

    vLLM 0.32 was run beside the model itself; SGLang was not run: its interface is followed as its
    sources say.

    Prompts are sent as token ids, hundreds at a time; common prefixes are computed once if the
    engine's prefix cache is enabled. Log-probabilities are those before any temperature.

    Args:
        engine: The engine; it is not started, modified or stopped.
        top_logprobs: Number of likeliest tokens requested at every position. Saves prompts if
            generated text is a cause, and gives foils for a contrast.
        prompts_per_request: Maximum number of prompts per call of the engine.

    Attributes:
        model_name: The engine's name of its model.
        max_model_len: Maximum number of tokens of a prompt, if reported.

    Raises:
        TypeError: If it is neither of these.
        ValueError: If a number is out of range.
    """

    takes_starts = True  # `get_token_logprobs` accepts the start of requested values
    max_concurrency = 1  # an engine batches the prompts of one call itself

    def __init__(
        self, engine: Any, *, top_logprobs: int = 0, prompts_per_request: int = _PER_CALL
    ) -> None:
        if top_logprobs < 0 or prompts_per_request < 1:
            raise ValueError(
                f"`top_logprobs` is {top_logprobs} and `prompts_per_request` "
                f"{prompts_per_request}: give at least 0 and 1."
            )
        self._engine = _adapted(engine)
        self._top_logprobs = top_logprobs
        self.prompts_per_request = prompts_per_request
        self.model_name = self._engine.model_name
        self.max_model_len = self._engine.max_model_len

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._engine.name}, {self.model_name!r})"

    def get_token_logprobs(
        self, prompts: Sequence[Sequence[int]], starts: Sequence[int] | None = None
    ) -> list[list[Entry]]:
        """Log-probabilities of the tokens of prompts.

        Args:
            prompts: Token ids.
            starts: Per prompt the first token whose log-probability is needed; by default the
                second one, which is the first that has one.

        Returns:
            As for `TokenProvider`; None before a prompt's start.

        Raises:
            RuntimeError: If the engine reports other tokens than requested.
        """
        ids = [[int(token) for token in prompt] for prompt in prompts]
        first = [max(start, 1) for start in starts] if starts is not None else [1] * len(ids)
        found = self._engine.scored(ids, first, self._top_logprobs)
        for own, start, entries in zip(ids, first, found, strict=True):
            _check(self._engine.name, own, start, entries)
        return found

    def generate_tokens(self, prompt: Sequence[int], **gen_args: Any) -> list[int]:
        """Generates a continuation of token ids.

        Args:
            prompt: The ids.
            **gen_args: ``max_new_tokens`` (25 by default), ``do_sample`` (greedy by default), and
                the engine's own sampling parameters: ``temperature``, ``top_p``…
        """
        given = dict(gen_args)
        n_new = int(given.pop("max_new_tokens", 25))
        if given.pop("do_sample", "temperature" in given) is False:
            given["temperature"] = 0.0
        given.setdefault("temperature", 0.0 if "do_sample" not in gen_args else 1.0)
        [answer] = self._engine.written(list(prompt), n_new, 1, given)
        return list(answer.ids or ())

    def written(
        self,
        prompt: str | Sequence[int],
        n: int,
        *,
        temperature: float,
        n_answers: int = 1,
        bias: Mapping[int, float] | None = None,
    ) -> list[Written]:
        """Generated text with log-probabilities: see `CompletionsProvider.written`."""
        if isinstance(prompt, str) or bias:
            return []
        return self._engine.written(list(prompt), n, n_answers, {"temperature": temperature})


class _Engine(Protocol):
    """Interface of an engine.

    Attributes:
        name: Display name.
        model_name, max_model_len: See `EngineProvider`.
    """

    name: str
    model_name: str | None
    max_model_len: int | None

    def scored(
        self, prompts: Sequence[list[int]], starts: Sequence[int], top: int
    ) -> list[list[Entry]]:
        """Entries of all tokens of prompts, None before each one's start."""
        ...

    def written(
        self, prompt: list[int], n: int, n_answers: int, how: Mapping[str, Any]
    ) -> list[Written]:
        """`n_answers` answers of at most `n` tokens; `how` are the engine's sampling parameters."""
        ...


class _VLLM:
    """A vLLM ``LLM`` (0.11 and later).

    Uses ``prompt_logprobs``. ``skip_reading_prefix_cache`` is off, so that prefixes are reused;
    ``num_cached_tokens`` gives the number of reused tokens.
    """

    name = "vLLM"

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        settings: Any = getattr(llm, "model_config", None)
        settings = settings or getattr(getattr(llm, "llm_engine", None), "model_config", None)
        self.model_name: str | None = getattr(settings, "model", None)
        self.max_model_len: int | None = getattr(settings, "max_model_len", None)

    def scored(
        self, prompts: Sequence[list[int]], starts: Sequence[int], top: int
    ) -> list[list[Entry]]:
        """See `_Engine.scored`."""
        outputs = self._requested(prompts, top, rereads=False)
        # The first token whose value comes from a computed position.
        computed = [int(output.num_cached_tokens or 0) + 1 for output in outputs]
        again = [i for i, start in enumerate(starts) if computed[i] > start]
        if again:
            anew = self._requested([prompts[i] for i in again], top, rereads=True)
            for i, output in zip(again, anew, strict=True):
                outputs[i] = output
        return [
            [None] * start + [_log_probs(entry) for entry in output.prompt_logprobs[start:]]
            for start, output in zip(starts, outputs, strict=True)
        ]

    def _requested(self, prompts: Sequence[list[int]], top: int, *, rereads: bool) -> list[Any]:
        how = self._parameters(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=top,
            skip_reading_prefix_cache=rereads,
            # For invalid ids at positions that were not computed it raises OverflowError.
            detokenize=False,
        )
        sent = [{"prompt_token_ids": ids} for ids in prompts]
        return list(self._llm.generate(sent, how, use_tqdm=False))

    def written(
        self, prompt: list[int], n: int, n_answers: int, how: Mapping[str, Any]
    ) -> list[Written]:
        """See `_Engine.written`."""
        parameters = self._parameters(max_tokens=n, n=n_answers, logprobs=_TOP, **how)
        [output] = self._llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
        return [
            _written(
                tuple(answer.token_ids),
                [cast(dict[int, float], _log_probs(entry)) for entry in answer.logprobs or ()],
                answer.finish_reason == "stop",
            )
            for answer in output.outputs
        ]

    def _parameters(self, **given: Any) -> Any:
        # The class without an import; its defaults are the class's own, not this model's.
        return type(self._llm.get_default_sampling_params())(**given)


class _SGLang:
    """An SGLang ``Engine`` (0.4 and later).

    ``logprob_start_len`` is the start of log-probabilities; positions before are reused, and the
    first returned entry belongs to a token without one.

    Written after its sources, of which those of autumn 2026 have the same arguments and answers;
    not run with a real engine, which needs a GPU.
    """

    name = "SGLang"

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        settings: Any = getattr(engine, "server_args", None)
        self.model_name: str | None = getattr(settings, "model_path", None)
        # The setting is None unless a user gives one: the model's own length is kept elsewhere.
        manager: Any = getattr(engine, "tokenizer_manager", None)
        lengths = (getattr(settings, "context_length", None), getattr(manager, "context_len", None))
        self.max_model_len: int | None = next((n for n in lengths if isinstance(n, int)), None)

    def scored(
        self, prompts: Sequence[list[int]], starts: Sequence[int], top: int
    ) -> list[list[Entry]]:
        """See `_Engine.scored`."""
        found: list[dict[str, Any]] = self._engine.generate(
            input_ids=list(prompts),
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=[start - 1 for start in starts],
            top_logprobs_num=top,
        )
        return [
            [None] * start + _entries(entries["meta_info"], "input", ids[start:])
            for ids, start, entries in zip(prompts, starts, found, strict=True)
        ]

    def written(
        self, prompt: list[int], n: int, n_answers: int, how: Mapping[str, Any]
    ) -> list[Written]:
        """See `_Engine.written`."""
        found: list[dict[str, Any]] = self._engine.generate(
            input_ids=[prompt] * n_answers,
            sampling_params={"max_new_tokens": n, **how},
            return_logprob=True,
            top_logprobs_num=_TOP,
        )
        answers: list[Written] = []
        for answer in found:
            about: dict[str, Any] = answer["meta_info"]
            ids = tuple(int(own[1]) for own in about["output_token_logprobs"])
            tops = [cast(dict[int, float], entry) for entry in _entries(about, "output", ids)]
            reason: Any = about.get("finish_reason")
            kind = cast(dict[str, Any], reason).get("type") if isinstance(reason, dict) else reason
            answers.append(_written(ids, tops, kind == "stop"))
        return answers


def _adapted(engine: Any) -> _Engine:
    """Wraps an engine by the module of its class, without importing vLLM or SGLang."""
    home = type(engine).__module__.partition(".")[0]
    if home == "vllm" or hasattr(engine, "llm_engine"):
        return _VLLM(engine)
    if home == "sglang" or hasattr(engine, "tokenizer_manager"):
        return _SGLang(engine)
    raise TypeError(
        f"`engine` is a {type(engine).__name__}: give a vLLM `LLM` or an SGLang `Engine`, offline "
        "in this process. For a served one, use `CompletionsProvider(url)`."
    )


def _log_probs(entry: Mapping[int, Any] | None) -> Entry:
    """Log-probabilities of one position, from vLLM."""
    return None if entry is None else {int(k): float(own.logprob) for k, own in entry.items()}


def _entries(about: Mapping[str, Any], side: str, ids: Sequence[int]) -> list[Entry]:
    """Log-probabilities of the last positions, from SGLang: of the tokens and of the likeliest.

    A token at the end of the vocabulary may have the id 0, if SGLang takes it for an image's.
    """
    own: list[Any] = about[f"{side}_token_logprobs"]
    tops: list[Any] = about.get(f"{side}_top_logprobs") or [None] * len(own)
    found: list[Entry] = []
    last: Any = zip(ids, own[len(own) - len(ids) :], tops[len(tops) - len(ids) :], strict=False)
    for token, (value, reported, *_), top in last:
        if value is None or reported not in (token, 0):
            found.append(None)
            continue
        likeliest = {int(other): float(number) for number, other, *_ in top or ()}
        found.append(likeliest | {token: float(value)})
    return found


def _written(ids: tuple[int, ...], tops: Sequence[Mapping[int, float]], stops: bool) -> Written:
    return Written(
        ids=ids,
        texts=tuple(f"{IDS_AS_TEXT}{token}" for token in ids),
        values=[top[token] for top, token in zip(tops, ids, strict=True)],
        top=[{f"{IDS_AS_TEXT}{k}": value for k, value in top.items()} for top in tops],
        n_completed=len(ids),
        has_stopped=stops,
    )


def _check(name: str, ids: Sequence[int], start: int, entries: Sequence[Entry]) -> None:
    """Raises if these are not log-probabilities of these tokens."""
    pairs = zip(ids, entries, strict=False)
    found = [entry is not None and token in entry for token, entry in pairs]
    if len(entries) != len(ids) or not all(found[start:]):
        shown = str(list(ids))[:_SHOWN]
        raise RuntimeError(
            f"{name} told of {len(entries)} tokens, {sum(found)} of them those that were sent, for "
            f"the {len(ids)} ids {shown}…: it reads other prompts than it is given, or this "
            "version of it answers in another way."
        )
