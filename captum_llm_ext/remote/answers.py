"""Parses responses of OpenAI's completions endpoint, token by token."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from captum_llm_ext.base.terminal import one_line
from captum_llm_ext.remote.providers import IDS_AS_TEXT, Written, log_prob
from captum_llm_ext.remote.transport import ApiError, UnusableAnswerError

Entry = Mapping[int, float] | None
# More than any vocabulary has, and no more than a tensor can hold.
_MOST_DIGITS = 12
_SHOWN = 200


def check_usage(answer: Any, ids: Sequence[Sequence[int]]) -> None:
    """Checks that the server counted as many tokens as were sent.

    Raises:
        UnusableAnswerError: If ``usage.prompt_tokens`` differs.
    """
    found, wanted = _usage(answer, "prompt_tokens"), sum(map(len, ids))
    if found is not None and found != wanted:
        raise wrong_count(found, wanted, len(ids))


def n_generated(answer: Any) -> int | None:
    """Number of generated tokens, as counted by the server."""
    return _usage(answer, "completion_tokens")


def _usage(answer: Any, name: str) -> int | None:
    usage: Any = cast(dict[str, Any], answer).get("usage") if isinstance(answer, dict) else None
    found: Any = cast(dict[str, Any], usage).get(name) if isinstance(usage, dict) else None
    return found if is_integer(found) and found > 0 else None  # 0: not counted


def prompt_log_probs(choice: Mapping[str, Any], ids: Sequence[int]) -> list[Entry]:
    """Parses vLLM's ``prompt_logprobs``: a mapping of ids for each token of the prompt."""
    found: Any = choice.get("prompt_logprobs")
    if not isinstance(found, list):
        raise ApiError(
            "the server's answer has no `prompt_logprobs`: it ignores the request for them."
        )
    entries = cast(list[Any], found)
    if len(entries) != len(ids):
        raise wrong_count(len(entries), len(ids))
    read = choice.get("prompt_token_ids")
    if isinstance(read, list) and read != list(ids):
        raise UnusableAnswerError(
            "the server read the prompt as other token ids than were sent: it adds tokens to ids, "
            "or leaves some out, and cannot be used."
        )
    return [None if entry is None else _entry(entry) for entry in entries]


def _entry(reported: Any) -> dict[int, float]:
    if not isinstance(reported, dict):
        raise unusable("an entry of `prompt_logprobs`", reported, "a mapping of token ids")
    found: dict[int, float] = {}
    for token, number in cast(dict[str, Any], reported).items():
        if not _is_number(token):
            raise unusable("a key of `prompt_logprobs`", token, "a token id")
        value = cast(dict[str, Any], number).get("logprob") if isinstance(number, dict) else number
        found[int(token)] = _number(value)
    return found


def echoed_log_probs(choice: Mapping[str, Any], ids: Sequence[int]) -> list[Entry]:
    """Parses the log-probabilities of an echoed prompt, which generated tokens follow."""
    logprobs: Any = choice.get("logprobs")
    reported: Any = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(reported, list):
        raise ApiError(
            "the server's answer has no `logprobs` of the echoed prompt: it ignores the request "
            "for them."
        )
    values = cast(list[Any], reported)
    names: Any = cast(dict[str, Any], logprobs).get("tokens")
    n_named = len(cast(list[Any], names)) if isinstance(names, list) else len(values)
    if len(values) <= 1 < len(ids) and n_named == len(values):
        raise UnusableAnswerError(
            f"the server returned log-probabilities of {len(values)} tokens to a prompt of "
            f"{len(ids)}: "
            "it ignores `echo`, and returns only those of the generated tokens."
        )
    if len(values) not in (len(ids), len(ids) + 1) or n_named != len(values):
        # One more is the generated token.
        raise wrong_count(max(len(values) - 1, 0), len(ids))
    if len(values) == len(ids) and values and values[0] is not None:
        raise UnusableAnswerError(
            "the server returned as many log-probabilities as the prompt has tokens, and one of "
            "the first, which has none: whether they are shifted by one cannot be determined."
        )
    pairs = zip(ids, values[: len(ids)], strict=True)
    return [None if value is None else {token: _number(value)} for token, value in pairs]


def likeliest(choice: Mapping[str, Any]) -> list[dict[str, float]]:
    """The likeliest tokens at each position of a prompt, by name."""
    reported: Any = choice.get("prompt_logprobs")
    if isinstance(reported, list):
        entries = [{} if entry is None else _entry(entry) for entry in cast(list[Any], reported)]
        return [{f"{IDS_AS_TEXT}{i}": v for i, v in entry.items()} for entry in entries]
    logprobs: Any = choice.get("logprobs")
    tops: Any = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(tops, list):
        return []
    return [
        {str(name): _number(value) for name, value in cast(dict[str, Any], top).items()}
        if isinstance(top, dict)
        else {}
        for top in cast(list[Any], tops)
    ]


class Names:
    """Texts of tokens as the server writes them; a change means mixed-up responses.

    Parts of characters have context-dependent names and are not checked.
    """

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def check(self, choice: Mapping[str, Any], ids: Sequence[int]) -> None:
        """Checks that tokens have the same texts as in earlier answers.

        Raises:
            UnusableAnswerError: If one has changed.
        """
        for token, name in zip(ids, _names(choice), strict=False):
            text = name.strip()
            if not text or not re.fullmatch(r"[A-Za-z0-9]+", text):
                continue
            known = self._known.setdefault(token, text)
            if known != text:
                raise UnusableAnswerError(
                    f"the server calls token id {token} {known!r} in one answer and "
                    f"{one_line(text)!r} in another: it gives answers to other prompts than were "
                    "asked. Say `prompts_per_request=1`, or `max_concurrency=1`."
                )


def _names(choice: Mapping[str, Any]) -> list[str]:
    logprobs: Any = choice.get("logprobs")
    names: Any = logprobs.get("tokens") if isinstance(logprobs, dict) else None
    return [str(name) for name in cast(list[Any], names)] if isinstance(names, list) else []


def wrong_count(found: int, wanted: int, n_prompts: int = 1) -> ApiError:
    """The error for an unexpected number of tokens, with likely reasons."""
    what = "it reads it as other tokens"
    if found - wanted == n_prompts:
        what = "it may put a token (BOS) before each"
    prompts = "a prompt" if n_prompts == 1 else f"{n_prompts} prompts"
    return UnusableAnswerError(
        f"the server returned log-probabilities of {found} tokens to {prompts} of {wanted}: "
        f"{what}, "
        "and nothing says which is which. Check that the tokenizer is the model's; a server that "
        'takes no ids wants `prompts="text"`.'
    )


def written(answer: Any, choice: Mapping[str, Any]) -> Written | None:
    """The generated text with log-probabilities; None if the server reports none."""
    logprobs: Any = choice.get("logprobs")
    found: Any = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(found, list):
        return None
    names, values = _names(choice), [_number(value) for value in cast(list[Any], found)]
    has_stopped = choice.get("finish_reason") == "stop"
    if len(names) != len(values) or not (values or has_stopped):
        return None
    reported: Any = cast(dict[str, Any], logprobs).get("top_logprobs")
    entries = cast(list[Any], reported) if isinstance(reported, list) else []
    tops = [
        {str(k): _number(v) for k, v in cast(dict[str, Any], entry).items()}
        for entry in entries
        if isinstance(entry, dict)
    ]
    return Written(
        ids=generated_ids(choice),
        texts=tuple(names),
        values=values,
        top=tops if len(tops) == len(values) else [],
        n_completed=n_generated(answer),
        has_stopped=has_stopped,
    )


def generated_ids(choice: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The generated ids, if the server reports them."""
    if isinstance(choice.get("token_ids"), list):
        return tuple(_token_ids(choice["token_ids"]))
    names = _names(choice)
    if not names or not all(name.startswith(IDS_AS_TEXT) for name in names):
        return None
    digits = [name.removeprefix(IDS_AS_TEXT) for name in names]
    return tuple(_token_ids([int(d) if _is_number(d) else d for d in digits]))


def text_of(choice: Mapping[str, Any]) -> str:
    """The generated text."""
    text = choice.get("text")
    if not isinstance(text, str):
        raise unusable("what the model wrote", text, "a text")
    return text


def is_integer(value: Any) -> bool:
    """Whether it is an integer, other than True."""
    return isinstance(value, int) and not isinstance(value, bool)


def unusable(what: str, found: Any, wanted: str) -> ApiError:
    """The error for a response of unexpected form."""
    try:
        shown = one_line(repr(found))[:_SHOWN]
    except (RecursionError, ValueError):  # too deep, or an integer of too many digits
        shown = f"a {type(found).__name__}"
    return UnusableAnswerError(f"the server gave {shown} as {what}: expected {wanted}.")


def _number(reported: Any) -> float:
    """A log-probability, -inf for an excluded token."""
    value = log_prob(reported)
    if value is None:
        raise unusable("a log-probability", reported, "a number of nats, at most 0")
    return value


def _token_ids(reported: Any) -> list[int]:
    ids = cast(list[Any], reported)
    for token in ids:
        if not is_integer(token) or not 0 <= token < 10**_MOST_DIGITS:
            raise unusable("a token id", token, "an integer of at least 0")
    return ids


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
