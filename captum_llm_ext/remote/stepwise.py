"""Rungs that score the answer token by token: `TopK`, and `Forced` for any token."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from captum_llm_ext.remote.bounds import bound_of_unreported
from captum_llm_ext.remote.chat_endpoint import ChatAnswer, ChatRequest, Message, Step
from captum_llm_ext.remote.handshake import HandshakeError, rounding_step
from captum_llm_ext.remote.metered import BudgetError, MeteredEndpoint
from captum_llm_ext.remote.rung import Scored
from captum_llm_ext.remote.step_checks import (
    NOISY,
    check_drawn,
    check_spelled,
    check_written,
    difference,
    is_same,
)
from captum_llm_ext.remote.transport import UNKNOWN_ARGUMENT, ApiError
from captum_llm_ext.text import tokens

# Tokens generated in a test: the third follows two generated ones, so that a prompt that is not
# continued shows. And sampled first tokens: see `handshake._N_DRAWN`.
_N_WRITTEN, _N_DRAWN = 3, 32
# Imputed distance below the bound: tokens of SmolLM2 outside the likeliest 20 were 6 nats below
# (median, 0.7 to 12). On 65 prompts of four sentences ranks of causes were alike from 1 to 3, and
# no better by a regression over coalitions (Gaussian, with the bounds as censoring), by the tail of
# the reported values, or by the values of another model.
BELOW_BOUND = 2.0
# Imputed value of a token without any report. Chosen, not measured: the bounds of 20 likeliest
# tokens are -5 to -6.
_UNTOLD = -8.0
_SAME_TEMPERATURE = "does not change what is told"
_N_ASKED = 4  # tries for a distribution; chosen, not measured
# The maximum that servers accept; and how often another bias is tried.
_MOST_BIAS, N_TRIES = 100.0, 3
# Nats below the bound at which a token is assumed, and by which the bias is changed. Chosen, not
# measured.
_LOOKED_FOR, _CHANGE = 6.0, 6.0
# Closer to certain than this, only float32 rounding is reported.
_CERTAIN = -0.01
# How a server reports a given token: if its id is given, or biased, without or with the bias; or
# only if it is among the likeliest.
_Mode = Literal["by id", "raw", "biased", "likeliest"]
# Token ids given in a test: a sampled token is reported anyway, so one would not show whether a
# server ignores them.
_N_GIVEN = 2


class TopK:
    """Log-probabilities of the target's tokens, step by step, if they are among the likeliest.

    Args:
        endpoint: The endpoint.
        top: Number of likeliest tokens requested.
        n_tokens: Maximum number of tokens of a generated answer.

    Attributes:
        endpoint, top: As given.
        checks: Outcomes of the handshake.
    """

    name = "stepwise top-k"
    attr_target = "log_prob"
    is_sampled = False
    n_answers = 1

    def __init__(self, endpoint: MeteredEndpoint, top: int, n_tokens: int) -> None:
        self.endpoint, self.top, self._n_top = endpoint, top, top
        self._n_tokens, self._rounding_step, self._n_asked = n_tokens, 0.0, 0
        self.noise = 0.0
        self.checks: dict[str, str] = {}

    @property
    def blind_spots(self) -> str:
        """See `Rung.blind_spots`."""
        return (
            f"a token that is not among the {self._n_top} likeliest has a bound, no value: what "
            "lowers it further is not seen"
        )

    @property
    def details(self) -> dict[str, object]:
        """See `Rung.details`."""
        return {"handshake": dict(self.checks)}

    @property
    def is_of_any_temperature(self) -> bool:
        """Whether what is reported does not depend on the requested temperature."""
        return self.checks.get("temperature") == _SAME_TEMPERATURE

    def handshake(self, messages: Sequence[Message]) -> None:
        """See `Rung.handshake`: values of generated tokens, and prefills."""
        steps = self.look(messages)
        check_spelled(self._step(messages, "", _N_WRITTEN, 0.0))  # as before, from the cache
        refused: list[str] = []
        ways = self.endpoint.provider.prefills if len(steps) > 1 else ()
        for way in ways:
            self.endpoint.way = way
            problem = self._goes_on(messages, steps)
            if problem is None:
                self.checks["prefill"] = way
                return
            refused.append(f"{way}: {problem}")
        self.endpoint.way = "none"
        nothing = "it has no way to" if len(steps) > 1 else "the model wrote one token alone"
        raise HandshakeError(
            "the provider does not continue a prefilled answer "
            f"({'; '.join(refused) or nothing}), so that only the first token of an answer could "
            'be explained: `attr_target="label"` would work, which compares two of them; and '
            '"frequency" or "similarity".'
        )

    def look(self, messages: Sequence[Message]) -> list[Step]:
        """Tests the log-probabilities of generated tokens.

        Returns:
            Tokens generated greedily after the prompt.

        Raises:
            HandshakeError: If a test fails; the message names what is wrong.
        """
        answer = self._step(messages, "", _N_WRITTEN, 0.0)
        self.checks["written tokens"] = check_written(answer, _N_WRITTEN, self.top)
        self._n_top = min(self.top, *(len(step.top) for step in answer.steps))
        if self._n_top < self.top:
            self.checks["likeliest tokens"] = f"{self._n_top} told of {self.top} asked for"
        self._note_stop(answer)
        n_kept = self.endpoint.usage.n_cached
        drawn = self._drawn(messages)
        is_kept = self.endpoint.usage.n_cached > n_kept
        warm = _likeliest(drawn[0]) if drawn else []
        first = answer.steps[0]
        hot = dict(warm).get(first.text)
        changes = hot is None or not is_same(hot, first.value, NOISY)
        self.checks["temperature"] = (
            "changes what is told; 1 is asked for" if changes else _SAME_TEMPERATURE
        )
        self._repeats(messages, warm, is_kept)
        names = [one.steps[0].text for one in drawn if one.steps]
        self.checks["drawn tokens"] = check_drawn(names, warm)
        tops = [step.top for step in [*answer.steps, *drawn[0].steps[:1]]]
        self._rounding_step = rounding_step([value for top in tops for _, value in top])
        if self._rounding_step:
            self.checks["rounding"] = f"values are multiples of {self._rounding_step:g}"
        return answer.steps

    def _repeats(
        self, messages: Sequence[Message], reported: list[tuple[str, float]], is_kept: bool
    ) -> None:
        """Whether the same prompt has the same values each time, also among others.

        Raises:
            HandshakeError: If not.
        """
        first = self._first(messages)
        again = difference(reported, _likeliest(self.endpoint.uncached(first)[0]))
        if again > NOISY and is_kept:
            raise HandshakeError(
                f"the answers that are kept differ by {again:.2g} nats from what the provider "
                "returns now: another model answers by this name. Give another `cache`."
            )
        if again > NOISY:
            raise HandshakeError(
                f"the same prompt has other log-probabilities each time, by {again:.2g} nats: "
                "several models answer, or answers are mixed up."
            )
        self.checks["asked again"] = f"the same within {again:.1g} nats"
        in_batch = 0.0
        if self.endpoint.n_threads > 1 and not is_kept:  # otherwise an earlier run has tested it
            *before, last = messages
            shorter = {**last, "content": last["content"][: len(last["content"]) // 2] or "?"}
            others = replace(first, messages=[*before, shorter])
            in_batch = difference(
                reported, _likeliest(self.endpoint.concurrent([first, others])[0])
            )
            if in_batch > NOISY:
                raise HandshakeError(
                    "a prompt has other log-probabilities when others are asked about at the same "
                    f"time, by {in_batch:.2g} nats: answers are mixed up, which "
                    "`max_concurrency=1` avoids."
                )
            self.checks["asked beside others"] = f"the same within {in_batch:.1g} nats"
        self.noise = max(self.noise, again, in_batch)
        self._n_asked = self.endpoint.usage.n_requests

    def _first(self, messages: Sequence[Message]) -> ChatRequest:
        return ChatRequest(messages, n_tokens=1, temperature=1.0, top=self.top)

    def drift(self, messages: Sequence[Message], target: list[str]) -> float | None:
        """See `Rung.drift`: of the first token, if more was requested since."""
        if self.endpoint.usage.n_requests == self._n_asked:
            return None
        try:
            again = _likeliest(self.endpoint.uncached(self._first(messages))[0])
        except BudgetError:
            return None
        apart = difference(self.likeliest(messages), again)
        if apart <= NOISY:
            self.noise = max(self.noise, apart)
        return apart

    def _drawn(self, messages: Sequence[Message]) -> list[ChatAnswer]:
        """First tokens sampled at temperature 1, as many as one request returns."""
        return self.endpoint.answers(self._first(messages), range(_N_DRAWN), at_once=True)

    def _note_stop(self, answer: ChatAnswer) -> None:
        """Records whether the end token of answers is reported."""
        if answer.has_stopped and answer.steps:
            is_missing = answer.n_out == len(answer.steps) + 1
            self.checks["stop token"] = (
                "not listed: what the model writes comes without it" if is_missing else "listed"
            )
        self.checks.setdefault("stop token", "not seen")

    def _goes_on(self, messages: Sequence[Message], steps: Sequence[Step]) -> str | None:
        """What is wrong with continuing after all tokens but the last, if anything."""
        prefix = "".join(step.text for step in steps[:-1])
        try:
            again = self._step(messages, prefix, 1, 0.0)
        except ApiError as error:
            if error.status not in UNKNOWN_ARGUMENT:
                raise
            return f"refused ({error})"
        wanted, found = steps[-1], again.steps[:1]
        reported = dict(found[0].top) if found else {}
        if wanted.text not in reported:
            return (
                f"{wanted.text!r} does not follow {prefix!r} there, as it did when it was written"
            )
        apart = abs(reported[wanted.text] - wanted.value)
        if not is_same(reported[wanted.text], wanted.value, NOISY):
            return f"{wanted.text!r} differs by {apart:.2g} nats from when it was written"
        self.noise = max(self.noise, apart)
        self.checks["agrees"] = f"within {apart:.1g} nats"
        return None

    def _step(
        self,
        messages: Sequence[Message],
        prefill: str,
        n: int,
        temperature: float,
        bias: dict[int, float] | None = None,
    ) -> ChatAnswer:
        how: dict[str, Any] = {"prefill": prefill, "top": self.top, "bias": bias}
        return self.endpoint.answer(
            ChatRequest(messages, n_tokens=n, temperature=temperature, **how)
        )

    def target(self, messages: Sequence[Message], text: str | None) -> list[str]:
        """See `Rung.target`: the tokens with which the model generates it."""
        if text is not None:
            return self._cut(messages, text)
        answer = self._step(messages, "", self._n_tokens, 0.0)
        self._note_stop(answer)
        names = [step.text for step in answer.steps if step.text]
        if answer.has_stopped and "".join(names) != answer.text:
            # Some list the end token, with any text, which is not part of the answer.
            while names and len("".join(names)) > len(answer.text):
                names.pop()
        return names

    def _cut(self, messages: Sequence[Message], text: str) -> list[str]:
        found: list[str] = []
        left = text
        while left:
            prefix = "".join(found)
            step = self.reported_of(messages, prefix)
            known = [] if step is None else [name for name, _ in step.top]
            fitting = [name for name in known if name and left.startswith(name)]
            name = max(fitting, key=len) if fitting else self.first_token(left, prefix)
            if name is None:
                raise ValueError(
                    f"after {prefix!r} the target continues with {left[:20]!r}, which is none of "
                    f"the {len(known)} likeliest tokens: its tokens are not known. Leave `target` "
                    "out to explain what the model writes, give the model's `tokenizer`, or "
                    "`attr_target='frequency'`."
                )
            found.append(name)
            left = left[len(name) :]
        return found

    def first_token(self, text: str, prefix: str = "") -> str | None:
        """The first token of a text, if known without being reported."""
        return None

    def begin(self, full: Sequence[Message], empty: Sequence[Message], target: list[str]) -> None:
        """See `Rung.begin`; values are no samples."""

    def likeliest(self, messages: Sequence[Message]) -> list[tuple[str, float]]:
        """The likeliest first tokens of an answer."""
        step = self.reported_of(messages, "")
        return [] if step is None else step.likeliest or step.top

    def values_of(
        self, messages: Sequence[Message], prefix: str, names: Sequence[str]
    ) -> list[tuple[float, float, float]]:
        """`value_of` of several tokens at one position, by as few requests as possible."""
        return [self.value_of(messages, prefix, name) for name in names]

    def score(self, messages: Sequence[Message], target: list[str]) -> Scored:
        """See `Rung.score`: at least one request per token."""
        known = [
            self.value_of(messages, "".join(target[:t]), token) for t, token in enumerate(target)
        ]
        values, lower, upper = (list(column) for column in zip(*known, strict=True))
        return Scored(values, lower, upper, [0.0] * len(target))

    def draw_more(self) -> bool:
        """See `Rung.draw_more`: never, values are no samples."""
        return False

    def value_of(
        self, messages: Sequence[Message], prefix: str, token: str
    ) -> tuple[float, float, float]:
        """A token's log-probability after the beginning of an answer, and its bounds."""
        step = self.reported_of(messages, prefix)
        if step is None:
            return _UNTOLD, -math.inf, 0.0
        value = _by_name(step.top).get(token, -math.inf)
        if math.isfinite(value):
            return self._rounded(value)
        told, likeliest = ([value for _, value in p] for p in (step.top, step.likeliest))
        bound = bound_of_unreported(told, likeliest, self._rounding_step)
        return bound - BELOW_BOUND, -math.inf, bound

    def reported_of(self, messages: Sequence[Message], prefix: str) -> Step | None:
        """The reported distribution at a position; None if the provider reports nothing.

        If a sample ends the answer, some servers report no token: another sample may.
        """
        return self._first_step(replace(self._first(messages), prefill=prefix))

    def _first_step(self, question: ChatRequest) -> Step | None:
        for i in range(_N_ASKED):
            steps = self.endpoint.answers(question, range(i, i + 1))[0].steps
            if steps and steps[0].top:
                return steps[0]
        return None

    def _rounded(self, value: float) -> tuple[float, float, float]:
        """A reported value, and the bounds of what it may have been rounded from."""
        return value, value - self._rounding_step / 2, min(value + self._rounding_step / 2, 0.0)


class Forced(TopK):
    """Log-probabilities of the target's tokens, step by step, of any token.

    If the server reports given token ids (``logprob_token_ids``), one request is enough. Otherwise
    a token that is not among the likeliest becomes one by a bias on its logit (``logit_bias``).
    Some servers then report its log-probability without the bias, others with it, which is
    converted back. Which of these holds is tested beforehand.

    Args:
        endpoint, top, n_tokens: As for `TopK`.
        tokenizer: The model's tokenizer, since biases refer to ids.
        is_required: Whether a server that reports the likeliest tokens alone is refused.
    """

    name = "stepwise forced"

    def __init__(
        self,
        endpoint: MeteredEndpoint,
        top: int,
        n_tokens: int,
        tokenizer: Any,
        *,
        is_required: bool = True,
    ) -> None:
        super().__init__(endpoint, top, n_tokens)
        self._tokenizer, self._is_required = tokenizer, is_required
        self._mode: _Mode = "biased"

    @property
    def blind_spots(self) -> str:
        """See `Rung.blind_spots`."""
        if self._mode == "likeliest":
            return super().blind_spots
        if self._mode == "by id":
            return "nothing but what rounding leaves out"
        return "nothing but what rounding and a few tries at a bias leave out, which has a bound"

    def look(self, messages: Sequence[Message]) -> list[Step]:
        """See `TopK.look`; also tests whether given ids are reported, or the effect of a bias."""
        steps = super().look(messages)
        try:
            self._find_mode(messages)
        except HandshakeError as error:
            if self._is_required:
                raise
            self._mode = "likeliest"
            self.checks["given tokens"] = f"not reported: {error}"
        return steps

    def _find_mode(self, messages: Sequence[Message]) -> None:
        """Finds out how the provider reports given tokens.

        Raises:
            HandshakeError: If it reports none.
        """
        top = self.likeliest(messages)
        best = max((value for _, value in top), default=-math.inf)
        pairs = [(name, v) for name, v in reversed(top[1:]) if v > best - _MOST_BIAS]
        known = [(name, v, self._id(name, "")) for name, v in pairs]
        probes = [(name, v, number) for name, v, number in known if number is not None]
        if self._reports_ids(messages, probes[:_N_GIVEN]):
            self._mode = "by id"
            self.checks["logprob_token_ids"] = "told"
            return
        if not getattr(self.endpoint.provider, "takes_bias", False) or not probes:
            raise HandshakeError(
                "the provider reports no given ids and takes no `logit_bias`, or no token's id is "
                'known: `rung="top-k"` would work, with bounds.'
            )
        name, value, number = probes[0]
        bias = min(best - value + 1, _MOST_BIAS)
        modes: list[tuple[_Mode, float]] = [("biased", bias), ("raw", _MOST_BIAS)]
        try:
            for self._mode, given in modes:
                found = self._reported(messages, "", name, number, given)
                if found is not None and is_same(found, value):
                    how = "without it" if self._mode == "raw" else "with it"
                    self.checks["logit_bias"] = f"told {how}"
                    return
        except ApiError as error:
            if error.status not in UNKNOWN_ARGUMENT or isinstance(error, HandshakeError):
                raise
            raise HandshakeError(
                f"the provider refuses `logit_bias`: {error}", error.status
            ) from error
        raise HandshakeError(
            f"the provider ignores `logit_bias`: {name!r} was given one of {bias:.3g}, and its "
            'log-probability does not follow. `rung="top-k"` would work, with bounds.'
        )

    def _reports_ids(
        self, messages: Sequence[Message], probes: Sequence[tuple[str, float, int]]
    ) -> bool:
        """Whether tokens of known values are reported if their ids are given."""
        if not getattr(self.endpoint.provider, "takes_ids", False) or len(probes) < _N_GIVEN:
            return False
        try:
            found = self._of_ids(messages, "", [number for _, _, number in probes])
        except ApiError as error:
            if error.status not in UNKNOWN_ARGUMENT:
                raise
            return False
        return all(name in found and is_same(found[name], value) for name, value, _ in probes)

    def _of_ids(
        self, messages: Sequence[Message], prefix: str, ids: Sequence[int]
    ) -> dict[str, float]:
        """What is reported at a position if these token ids are to be."""
        # A server that ignores ids reports no more than the likeliest and the sampled token.
        step = self._first_step(replace(self._first(messages), prefill=prefix, top=1, reported=ids))
        return {} if step is None else _by_name([*step.top, (step.text, step.value)])

    def values_of(
        self, messages: Sequence[Message], prefix: str, names: Sequence[str]
    ) -> list[tuple[float, float, float]]:
        """See `TopK.values_of`: one request, if tokens are reported by their ids."""
        if self._mode != "by id":
            return super().values_of(messages, prefix, names)
        numbers = {name: self._id(name, prefix) for name in names}
        ids = [number for number in numbers.values() if number is not None]
        reported = self._of_ids(messages, prefix, ids) if ids else {}
        found: list[tuple[float, float, float]] = []
        for name in names:
            value = -math.inf if numbers[name] is None else reported.get(name, -math.inf)
            is_given = math.isfinite(value)
            found.append(
                self._rounded(value) if is_given else super().value_of(messages, prefix, name)
            )
        return found

    def value_of(
        self, messages: Sequence[Message], prefix: str, token: str
    ) -> tuple[float, float, float]:
        """See `TopK.value_of`: exact, if reported by its id or brought among the likeliest."""
        if self._mode == "by id":
            return self.values_of(messages, prefix, [token])[0]
        bound = super().value_of(messages, prefix, token)
        number = self._id(token, prefix)
        if math.isfinite(bound[1]) or number is None or self._mode == "likeliest":
            return bound
        step = self.reported_of(messages, prefix)
        best = max((value for _, value in step.top), default=0.0) if step else 0.0
        bias = min(best - bound[2] + _LOOKED_FOR, _MOST_BIAS)
        for _ in range(N_TRIES):
            bias = _MOST_BIAS if self._mode == "raw" else bias
            found = self._reported(messages, prefix, token, number, bias)
            if found is not None and math.isfinite(found):
                # It cannot be likelier than those that were reported.
                if not found <= bound[2] and not is_same(found, bound[2], NOISY):
                    raise HandshakeError(
                        f"{token!r} is reported as {found:.3g} with a bias on it, and is not among "
                        f"the likeliest without, of which the least has {bound[2]:.3g}: answers "
                        "are mixed up, or the reported tokens are not the likeliest."
                    )
                value = min(found, bound[2])
                return value, value, value
            if self._mode == "raw":
                break
            bias += _CHANGE if found is None else -_CHANGE
            if not 0 < bias < _MOST_BIAS:
                break
        return bound

    def _reported(
        self, messages: Sequence[Message], prefix: str, token: str, number: int, bias: float
    ) -> float | None:
        """A token's log-probability from an answer with a bias on it.

        Returns:
            None if not reported; infinity if it is too certain to be converted back.
        """
        steps = self._step(messages, prefix, 1, 1.0, {number: bias}).steps[:1]
        reported = {step.text: step.value for step in steps}
        if self._mode == "raw":  # nothing new is reported about others
            return reported.get(token)
        found = max(
            (v for name, v in (steps[0].top if steps else []) if name == token), default=None
        )
        found = reported.get(token) if found is None else found
        if found is None or found == -math.inf:
            return None
        if found > _CERTAIN:
            return math.inf
        # q = p e^b / (1 - p + p e^b)
        return -_softplus(math.log(math.expm1(-found)) + bias)

    def first_token(self, text: str, prefix: str = "") -> str | None:
        """See `TopK.first_token`."""
        ids = tokens.encode_in_place(self._tokenizer, text, prefix[-tokens.CONTEXT :])
        name = tokens.decode(self._tokenizer, ids[:1]) if ids else ""
        return name if name and text.startswith(name) else None

    def _id(self, token: str, prefix: str) -> int | None:
        """The id of a token, if its text is a single token."""
        ids = tokens.encode_in_place(self._tokenizer, token, prefix[-tokens.CONTEXT :])
        return int(ids[0]) if len(ids) == 1 else None


def reports_any_token(provider: object) -> bool:
    """Whether the values of tokens that are not among the likeliest may be requested."""
    return bool(getattr(provider, "takes_ids", False) or getattr(provider, "takes_bias", False))


def _by_name(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Values by token text; two tokens may have one text."""
    found: dict[str, float] = {}
    for name, value in pairs:
        found[name] = max(value, found.get(name, -math.inf))
    return found


def _likeliest(answer: ChatAnswer) -> list[tuple[str, float]]:
    return answer.steps[0].likeliest if answer.steps else []


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
