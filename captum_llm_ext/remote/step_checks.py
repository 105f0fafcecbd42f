"""Tests of the log-probabilities of generated tokens."""

import math
import re
from collections.abc import Sequence

from captum_llm_ext.remote.chat_endpoint import ChatAnswer, Step
from captum_llm_ext.remote.handshake import HandshakeError, rounding_step, surprise

# Allowed difference in nats of a value reported twice: half precision in batches of other shapes.
# Chosen, not measured.
APART, APART_PER_NAT = 0.05, 0.01
# Quantised models: llama.cpp's values differ by 0.13 depending on its prefix cache. Other models,
# and other prompts, differ more.
NOISY = 0.3
# Log 1 in float32, with rounding; and a sum of probabilities.
_ABOVE_ONE, _MASS = 1e-6, 1e-3
_FIRST_OF = 3  # quarters of the likeliest tokens that are compared; chosen, not measured
# Allowed deviation of the surprisal of sampled tokens, in standard errors: see `handshake`.
_DEVIATIONS = 4.5
# What stands for a part of a character.
_NO_TEXT = re.compile("bytes:|\ufffd")
# Where the likeliest token is below the first, tokens beyond the listed ones have more than the
# second: of SmolLM2 and Gemma 3 270M at least 1.3e-5 beyond 20 tokens, at 919 such positions.
_UNCERTAIN, _NO_REST = 0.9, 1e-6
_PENALISED = (
    "not always the likeliest: the server holds repetitions down when it writes, and tells values "
    "without that"
)


def is_same(value: float, other: float, apart: float = APART) -> bool:
    """Whether two log-probabilities are equal up to rounding; `apart` for two requests."""
    if math.isinf(value) or math.isinf(other):
        return value == other
    return abs(value - other) <= apart + APART_PER_NAT * max(abs(value), abs(other))


def difference(reported: Sequence[tuple[str, float]], again: Sequence[tuple[str, float]]) -> float:
    """Largest difference of the likeliest tokens at one position from earlier values, in nats."""
    # Those at the end of one list may be just missing in the other.
    known, found = dict(reported[: _FIRST_OF * len(reported) // 4]), dict(again)
    lowest = min(found.values(), default=0.0)
    return max((abs(v - found.get(name, lowest)) for name, v in known.items()), default=0.0)


def check_written(answer: ChatAnswer, n: int, top: int) -> str:
    """Tests greedily generated tokens and their log-probabilities.

    Args:
        answer: The generated text.
        n: Number of tokens requested.
        top: Number of likeliest tokens requested.

    Returns:
        Whether they are the likeliest ones.

    Raises:
        HandshakeError: If they are inconsistent; the message names what is wrong.
    """
    steps = answer.steps
    if not steps and not answer.text.strip():
        raise HandshakeError(
            "the model generates nothing after this prompt, so no log-probabilities can be "
            "checked: give a prompt that can be continued, or ask by chat."
        )
    if not steps or not all(step.top for step in steps):
        raise HandshakeError(
            "the provider returns no log-probabilities of the tokens that it generates: only "
            '`attr_target="frequency"` or "similarity" would work with it.'
        )
    if len(steps) > n:
        raise HandshakeError(
            f"the provider lists {len(steps)} tokens of an answer of {n} at most: "
            f"{[step.text for step in steps]}."
        )
    rounding = rounding_step([value for step in steps for _, value in step.top])
    for step in steps:
        _check_distribution([value for _, value in step.top], rounding)
        if not rounding:
            _check_is_whole([value for _, value in step.top], top)
    own = [_own(step) for step in steps]
    is_own = [
        value is not None and is_same(value, step.value)
        for value, step in zip(own, steps, strict=True)
    ]
    is_greedy = [is_same(step.value, max(v for _, v in step.top)) for step in steps]
    if all(is_own) and is_greedy[0]:
        # Later tokens may not be the likeliest though their values are correct: a repetition
        # penalty.
        return "the likeliest" if all(is_greedy) else _PENALISED
    raise HandshakeError(
        "the log-probabilities that the provider returns for generated tokens are inconsistent: "
        f"{_misplaced(steps)}."
    )


def check_spelled(answer: ChatAnswer) -> None:
    """Tests whether the listed tokens spell the answer, as prefilled beginnings are made of them.

    Raises:
        HandshakeError: If they spell it otherwise.
    """
    spelled = "".join(step.text for step in answer.steps)
    # The end may be listed, or cut off at the ends; parts of characters have no text.
    if _NO_TEXT.search(spelled) or answer.text.strip() in spelled:
        return
    if _only_letters(answer.text) not in _only_letters(spelled):  # reasoning, or another answer
        return
    raise HandshakeError(
        f"the tokens that the provider lists spell {spelled!r:.60}, and the answer is "
        f"{answer.text!r:.60}: their spaces are lost or replaced, so that no answer can be begun "
        'with them. `attr_target="label"` would work, of first tokens alone.'
    )


def _only_letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def check_drawn(names: Sequence[str], top: Sequence[tuple[str, float]]) -> str:
    """Tests whether tokens sampled at temperature 1 have the reported surprisal.

    Args:
        names: The sampled tokens.
        top: The values reported for that position.

    Returns:
        The outcome.

    Raises:
        HandshakeError: If not.
    """
    if len(names) < 2 or len(set(names)) == 1:
        return "not looked at: the provider draws no several at a time"
    found, mean, off = surprise(names, dict(top))
    if abs(off) > _DEVIATIONS:
        raise HandshakeError(
            f"tokens drawn at temperature 1 are {found:.2g} nats improbable on average, and the "
            f"provider's log-probabilities give {mean:.2g}: its log-probabilities are of another "
            "temperature."
        )
    return f"as improbable as told, within {abs(off):.1f} standard errors"


def _own(step: Step) -> float | None:
    reported = [value for name, value in step.top if name == step.text]
    return max(reported, default=None)


def _check_distribution(values: Sequence[float], rounding: float) -> None:
    mass = sum(map(math.exp, values)) / math.exp(rounding / 2)
    if max(values) > _ABOVE_ONE:
        raise HandshakeError(
            f"the provider returned {max(values):g} as a log-probability, which is above 0."
        )
    if mass > 1 + _MASS:
        zeros = "all are zero" if not any(values) else "they are of base 10, or so"
        raise HandshakeError(
            f"the {len(values)} likeliest tokens have probabilities of {mass:.3g} in sum, which "
            f"natural log-probabilities cannot have: {zeros}."
        )


def _check_is_whole(values: Sequence[float], top: int) -> None:
    """Tests that a distribution was not cut to a few tokens before it is reported."""
    shares = [math.exp(value) for value in values if math.isfinite(value)]
    if len(shares) < top and max(shares) < _UNCERTAIN and abs(1 - sum(shares)) < _NO_REST:
        raise HandshakeError(
            f"the provider returns {len(shares)} likeliest tokens of {top}, with probabilities "
            "of 1 in sum: it cuts the distribution (`top_p`, `top_k`) before it reports it, and "
            "other tokens have no value. Have it not do so, such as by "
            '`extra_body={"top_p": 1, "top_k": -1}`.'
        )


def _misplaced(steps: Sequence[Step]) -> str:
    """The shift that explains values reported at other positions than their tokens."""
    likeliest = [max(step.top, key=lambda pair: pair[1]) for step in steps]
    for by, which in (
        (1, "left by one, and belong to the token after"),
        (-1, "right by one, and belong to the token before"),
    ):
        pairs = [(i, i + by) for i in range(len(steps)) if 0 <= i + by < len(steps)]
        names = [likeliest[i][0] == steps[j].text for i, j in pairs]
        values = [is_same(steps[i].value, likeliest[j][1]) for i, j in pairs]
        if pairs and (all(names) or all(values)):
            return f"they are shifted {which}"
    return (
        "the token that was written greedily is not the likeliest of those told, or has another "
        "value there: they belong to other tokens (shifted by one?), or to another prompt"
    )
