"""Reads what servers answer to chats and texts: text, tokens, log-probabilities, counts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from captum_llm_ext.remote.chat_endpoint import ChatAnswer, Step
from captum_llm_ext.remote.providers import is_ruled_out, log_prob
from captum_llm_ext.remote.transport import GarbageError, UnusableAnswerError

REFUSED = ("refusal", "content_filter", "safety")


def chat_answer(
    choice: Any, answer: Mapping[str, Any], n: int, *, has_logprobs: bool
) -> ChatAnswer:
    """One of `n` choices of a chat completion.

    Args:
        choice, answer: The choice, and the whole answer.
        n: Number of choices.
        has_logprobs: Whether log-probabilities were requested; otherwise they are not read.

    Raises:
        GarbageError: If it has another form.
        UnusableAnswerError: If something is no log-probability.
    """
    held = _object(choice, "choices")
    message = _object(held.get("message"), "message")
    refusal = message.get("refusal")
    logprobs = _told(held.get("logprobs") if has_logprobs else None, "logprobs")
    content = [_told(one, "logprobs.content") for one in _list(logprobs, "content")]
    steps = [
        Step(
            _token(one),
            checked(one.get("logprob")),
            [(_token(top), checked(top.get("logprob"))) for top in _tops(one)],
        )
        for one in content
    ]
    usage = counts(answer)
    return ChatAnswer(
        text_of(message.get("content")) or text_of(refusal),
        steps,
        is_refusal=bool(refusal) or held.get("finish_reason") in REFUSED,
        # The prompt is counted once, however many answers.
        n_in=usage["prompt_tokens"],
        n_out=usage["completion_tokens"] // n,
        model=_text(answer.get("model")),
        fingerprint=_text(answer.get("system_fingerprint")),
        has_stopped=held.get("finish_reason") == "stop",
    )


def completed(choice: Any, answer: Mapping[str, Any], *, has_logprobs: bool) -> ChatAnswer:
    """One choice of a completion of a text; see `chat_answer`."""
    held = _object(choice, "choices")
    logprobs = _told(held.get("logprobs") if has_logprobs else None, "logprobs")
    names, values = _list(logprobs, "tokens"), _list(logprobs, "token_logprobs")
    tops = _list(logprobs, "top_logprobs") or [{}] * len(names)
    steps = [
        Step(
            str(name),
            checked(value),
            [(str(k), checked(v)) for k, v in _told(top, "logprobs.top_logprobs").items()],
        )
        for name, value, top in zip(names, values, tops, strict=False)
    ]
    usage = counts(answer)
    return ChatAnswer(
        text_of(held.get("text")),
        steps,
        # The prompt is counted once, however many answers.
        n_in=usage["prompt_tokens"],
        n_out=usage["completion_tokens"] // len(answer["choices"]),
        model=_text(answer.get("model")),
        fingerprint=_text(answer.get("system_fingerprint")),
        has_stopped=held.get("finish_reason") == "stop",
    )


def steps_of(text: str, tops: Sequence[Mapping[str, float]]) -> list[Step]:
    """Splits a text into tokens, each of which is among the likeliest at its position."""
    steps: list[Step] = []
    left = text
    for top in tops:
        pairs = [(str(name), checked(value)) for name, value in top.items()]
        fitting = [pair for pair in pairs if pair[0] and left.startswith(pair[0])]
        name, value = max(fitting, key=lambda pair: len(pair[0]), default=("", -math.inf))
        steps.append(Step(name, value, pairs))
        left = left[len(name) :]
    return steps


def text_of(content: Any) -> str:
    """A message's text, which some servers return in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        parts = cast(list[Any], content)
        return "".join(
            part if isinstance(part, str) else text_of(part.get("text"))
            for part in parts
            if isinstance(part, str | dict)
        )
    raise GarbageError(f"the server gave {content!r:.80} as the text of its answer.")


def counts(answer: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of tokens, 0 where they are not told as numbers: nothing depends on them."""
    usage = answer.get("usage")
    held = cast(dict[str, Any], usage) if isinstance(usage, dict) else {}
    names = ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens")
    numbers = {name: held.get(name) for name in names}
    return {
        name: n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else 0
        for name, n in numbers.items()
    }


def checked(reported: Any) -> float:
    """A reported log-probability; minus infinity for what the model rules out.

    Raises:
        UnusableAnswerError: If it is none.
    """
    value = log_prob(reported)
    if value is None:
        raise UnusableAnswerError(
            f"the server gave {reported!r:.80} as a log-probability: expected a number of nats, "
            "at most 0."
        )
    return -math.inf if is_ruled_out(value) else value


def _object(found: Any, name: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise GarbageError(_another_form(found, name, "an object"))
    return cast(dict[str, Any], found)


def _told(found: Any, name: str) -> dict[str, Any]:
    """A part of what is reported of tokens; text may be of use without."""
    if not isinstance(found or {}, dict):
        raise UnusableAnswerError(_another_form(found, name, "an object"))
    return cast(dict[str, Any], found or {})


def _list(held: Mapping[str, Any], name: str) -> list[Any]:
    found = held.get(name) or []
    if not isinstance(found, list):
        raise UnusableAnswerError(_another_form(found, name, "a list"))
    return cast(list[Any], found)


def _another_form(found: Any, name: str, wanted: str) -> str:
    return (
        f"the server's answer has {found!r:.80} in `{name}`, where {wanted} was expected: it does "
        "not speak OpenAI's API, or another form of it."
    )


def _tops(one: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_told(top, "top_logprobs") for top in _list(one, "top_logprobs")]


def _token(one: Mapping[str, Any]) -> str:
    """A token's text; for parts of characters their bytes, since they have no text."""
    raw = one.get("bytes")
    if isinstance(raw, list):
        try:
            return bytes(cast(list[int], raw)).decode()
        except (ValueError, TypeError):
            return f"bytes:{raw}"
    return str(one.get("token") or "")


def _text(found: Any) -> str | None:
    return found if isinstance(found, str) else None
