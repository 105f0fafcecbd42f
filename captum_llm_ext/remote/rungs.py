"""What can be known of a coalition from servers that tell less than log-probabilities of prompts.

From the top: the likeliest tokens at each step of the answer (`TopK`), how often the answer is
given (`Frequency`), how similar to it what is written instead is (`Similarity`). Each says what it
cannot see, gives an interval where it has no number, and refuses where it would tell noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Protocol

import torch

from captum_llm_ext.remote.chat_providers import Message, Said, Step
from captum_llm_ext.remote.handshake import HandshakeError
from captum_llm_ext.remote.metered import Asker
from captum_llm_ext.remote.transport import ApiError

Similar = Callable[[str, str], float]
# As between two ways of telling one value, see `handshake`.
_APART, _APART_PER_NAT = 0.05, 0.01
_ABOVE_ONE, _MASS = 1e-6, 1e-3
_N_WRITTEN = 3
# Samples of the full and the empty prompt that decide whether more are worth it.
_FIRST = 8
_TWO = 2.0  # standard errors
_N_RESAMPLED = 1000
_UNKNOWN_ARGUMENT = (400, 404, 422, 501)


class IndistinguishableError(ValueError):
    """The full and the empty prompt are not told apart: no cause would be."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What is known of one coalition, per target token.

    Attributes:
        values: The values ``(n_target,)``; where there is only a bound, that.
        lower, upper: Between them each value lies: surely where tokens are censored, at two
            standard errors where answers are sampled.
        variances: Of the values; 0 where they are exact.
        n_refused: Answers that were refusals.
        n_samples: Answers that were looked at.
    """

    values: list[float]
    lower: list[float]
    upper: list[float]
    variances: list[float]
    n_refused: int = 0
    n_samples: int = 0


class Rung(Protocol):
    """A way to know something of a coalition.

    Attributes:
        name: For people and provenance.
        blind: What it cannot see.
    """

    name: str
    blind: str

    def begin(self, full: Sequence[Message], empty: Sequence[Message], target: list[str]) -> None:
        """Looks at the two prompts that matter most, before others are paid for.

        Raises:
            IndistinguishableError: If no cause would be found.
        """
        ...

    def score(self, messages: Sequence[Message], target: list[str]) -> Scored:
        """What is known of a coalition."""
        ...


class TopK:
    """Log-probabilities of the target's tokens, step by step, where they are among the likeliest.

    Args:
        asker: Whom to ask.
        top: How many of the likeliest tokens are told.
    """

    name = "stepwise top-k"

    def __init__(self, asker: Asker, top: int) -> None:
        self._asker, self._top = asker, top
        self.blind = (
            f"a token that is not among the {top} likeliest has a bound, no value: what lowers it "
            "further is not seen"
        )
        self.checks: dict[str, str] = {}

    def meet(self, messages: Sequence[Message]) -> None:
        """Finds out how answers are gone on with, and whether what is told can be believed.

        Raises:
            HandshakeError: If they are not, or it cannot; it names what is wrong.
            ApiError: If the provider refuses.
        """
        written = self._step(messages, "", _N_WRITTEN, 0.0)
        steps = written.steps
        if not steps or not all(step.top for step in steps):
            raise HandshakeError(
                "the provider tells no log-probabilities of the tokens that it writes: only "
                '`attr_target="frequency"` or "similarity" would work with it.'
            )
        self._credible(steps)
        refused: list[str] = []
        ways = self._asker.speaker.prefills if len(steps) > 1 else ()
        for way in ways:
            self._asker.way = way
            problem = self._goes_on(messages, steps)
            if problem is None:
                self.checks["prefill"] = way
                return
            refused.append(f"{way}: {problem}")
        self._asker.way = "none"
        raise HandshakeError(
            "the provider does not go on with an answer that is begun "
            f"({'; '.join(refused) or 'it has no way to'}): only the first token of an answer "
            'could be explained. `attr_target="frequency"` or "similarity" would work.'
        )

    def _goes_on(self, messages: Sequence[Message], steps: Sequence[Step]) -> str | None:
        """What is wrong with going on after the tokens but the last, if anything."""
        begun = "".join(step.text for step in steps[:-1])
        try:
            again = self._step(messages, begun, 1, 0.0)
        except ApiError as error:
            if error.status not in _UNKNOWN_ARGUMENT:
                raise
            return f"refused ({error})"
        wanted, found = steps[-1], again.steps[:1]
        told = dict(found[0].top) if found else {}
        if wanted.text not in told:
            return f"{wanted.text!r} does not follow {begun!r} there, as it did when it was written"
        apart = abs(told[wanted.text] - wanted.value)
        if apart > _APART + _APART_PER_NAT * abs(wanted.value):
            return f"{wanted.text!r} differs by {apart:.2g} nats from when it was written"
        first = self._step(messages, "", 1, 1.0).steps[:1]
        hot = dict(first[0].top).get(steps[0].text) if first else None
        if hot is None or abs(hot - steps[0].value) > _APART + _APART_PER_NAT * abs(hot):
            self.checks["temperature"] = "changes what is told; 1 is asked for"
        self.checks["agrees"] = f"within {apart:.1g} nats"
        return None

    def _credible(self, steps: Sequence[Step]) -> None:
        for step in steps:
            values = [value for _, value in step.top]
            mass = sum(map(math.exp, values))
            if max(values) > _ABOVE_ONE:
                raise HandshakeError(
                    f"the provider tells {max(values):g} as a log-probability, which is above 0."
                )
            if mass > 1 + _MASS:
                zeros = "all are zero" if not any(values) else "they are of base 10, or so"
                raise HandshakeError(
                    f"the {len(values)} likeliest tokens have probabilities of {mass:.3g} in sum, "
                    f"which natural log-probabilities have not: {zeros}."
                )

    def _step(self, messages: Sequence[Message], prefill: str, n: int, temperature: float) -> Said:
        return self._asker.one(
            messages, n_tokens=n, temperature=temperature, prefill=prefill, top=self._top
        )

    def begin(self, full: Sequence[Message], empty: Sequence[Message], target: list[str]) -> None:
        """See `Rung.begin`; values are no samples."""

    def cut(self, messages: Sequence[Message], text: str) -> list[str]:
        """A text as the tokens that the model writes it with.

        Raises:
            ValueError: If it would not.
        """
        found: list[str] = []
        left = text
        while left:
            steps = self._step(messages, "".join(found), 1, 1.0).steps
            told = [name for name, _ in steps[0].top] if steps else []
            fitting = [name for name in told if name and left.startswith(name)]
            if not fitting:
                raise ValueError(
                    f"after {''.join(found)!r} the target goes on with {left[:20]!r}, which is "
                    f"none of the {len(told)} likeliest tokens: its tokens are not known. Leave "
                    "`target` out to explain what the model writes, or give "
                    "`attr_target='frequency'`."
                )
            found.append(max(fitting, key=len))
            left = left[len(found[-1]) :]
        return found

    def score(self, messages: Sequence[Message], target: list[str]) -> Scored:
        """See `Rung.score`: a request for each token."""
        scored = Scored([], [], [], [0.0] * len(target))
        for t, token in enumerate(target):
            steps = self._step(messages, "".join(target[:t]), 1, 1.0).steps
            if not steps or not steps[0].top:
                raise ApiError("the provider told no likeliest tokens of an answer that is begun.")
            told: dict[str, float] = {}
            for name, value in steps[0].top:  # two tokens may have one text
                told[name] = max(value, told.get(name, -math.inf))
            if math.isfinite(told.get(token, -math.inf)):
                value = lower = told[token]
            else:
                finite = [v for _, v in steps[0].top if math.isfinite(v)]
                rest = 1 - sum(map(math.exp, finite))
                value = min(min(finite), math.log(max(rest, 1e-9)))
                lower = -math.inf
            scored.values.append(value)
            scored.lower.append(lower)
            scored.upper.append(value)
        return scored


class _Sampled:
    """What rungs that draw answers have in common.

    Args:
        asker: Whom to ask.
        n: Answers per coalition.
        n_tokens: Tokens of an answer at most.
        temperature: Answers are drawn at.
    """

    def __init__(self, asker: Asker, n: int, n_tokens: int, temperature: float) -> None:
        self._asker, self._n, self._n_tokens = asker, n, n_tokens
        self._temperature = temperature

    def _drawn(self, messages: Sequence[Message], numbers: range) -> tuple[list[str], int]:
        """Answers that are none of them refusals, and how many were."""
        said = self._asker.many(
            messages, numbers, n_tokens=self._n_tokens, temperature=self._temperature
        )
        kept = [one.text for one in said if not one.is_refusal]
        return kept, len(said) - len(kept)


class Frequency(_Sampled):
    """How often the answer is given: log-odds with Jeffreys' prior.

    Args:
        asker, n, n_tokens, temperature: See `_Sampled`.
        predicate: Whether a text is the answer; by default whether it is equal, but for white space
            at its ends.
    """

    name = "frequency"
    blind = (
        "only changes in how often this very answer is given are seen, and only those that stand "
        "out of the samples: log-odds of rare answers are rough"
    )

    def __init__(
        self,
        asker: Asker,
        n: int,
        n_tokens: int,
        temperature: float,
        predicate: Callable[[str], bool] | None,
    ) -> None:
        super().__init__(asker, n, n_tokens, temperature)
        self._predicate = predicate

    def _is_answer(self, text: str, target: list[str]) -> bool:
        if self._predicate is not None:
            return bool(self._predicate(text))
        return text.strip() == target[0].strip()

    def _count(
        self, messages: Sequence[Message], numbers: range, target: list[str]
    ) -> tuple[int, int, int]:
        texts, n_refused = self._drawn(messages, numbers)
        return sum(self._is_answer(text, target) for text in texts), len(texts), n_refused

    def begin(self, full: Sequence[Message], empty: Sequence[Message], target: list[str]) -> None:
        """See `Rung.begin`."""

        def look(n: int) -> _Apart:
            (k_full, n_full, _), (k_empty, n_empty, _) = (
                self._count(messages, range(n), target) for messages in (full, empty)
            )
            if not n_full or not n_empty:
                raise IndistinguishableError("every answer was a refusal: nothing can be counted.")
            p, q = (k_full + 0.5) / (n_full + 1), (k_empty + 0.5) / (n_empty + 1)
            said = (
                f"the answer was given {k_full} of {n_full} times with the whole prompt and "
                f"{k_empty} of {n_empty} times with none of it"
            )
            difference = k_full / n_full - k_empty / n_empty
            return _Apart(difference, p * (1 - p) + q * (1 - q), n, said)

        _check_apart(
            look,
            self._n,
            "Give a shorter answer, a `predicate` that more texts satisfy, or "
            "`attr_target='similarity'`.",
        )

    def score(self, messages: Sequence[Message], target: list[str]) -> Scored:
        """See `Rung.score`."""
        half = max(self._n // 2, min(_FIRST, self._n))
        k, n, n_refused = self._count(messages, range(half), target)
        if not (n and k in (0, n) and n >= 3 * _FIRST):  # what is always so needs no more draws
            more = self._count(messages, range(half, self._n), target)
            k, n, n_refused = k + more[0], n + more[1], n_refused + more[2]
        value = math.log((k + 0.5) / (n - k + 0.5))
        lower, upper = wilson(k, n)
        variance = 1 / (k + 0.5) + 1 / (n - k + 0.5)
        return Scored([value], [_logit(lower)], [_logit(upper)], [variance], n_refused, n)


class Similarity(_Sampled):
    """How similar to the answer what is written is, on average.

    Args:
        asker, n, n_tokens, temperature: See `_Sampled`.
        similar: ``(text, answer) -> similarity``.
        kind: What it is called.
    """

    name = "similarity"
    blind = "what leaves the answer as similar as before is not seen, whatever it means"

    def __init__(
        self,
        asker: Asker,
        n: int,
        n_tokens: int,
        temperature: float,
        similar: Similar,
        kind: str,
    ) -> None:
        super().__init__(asker, n, n_tokens, temperature)
        self._similar, self.kind = similar, kind
        self.ceiling: float | None = None
        self.floor: float | None = None

    def _found(
        self, messages: Sequence[Message], numbers: range, target: list[str]
    ) -> tuple[list[float], int]:
        texts, n_refused = self._drawn(messages, numbers)
        return [float(self._similar(text, target[0])) for text in texts], n_refused

    def begin(self, full: Sequence[Message], empty: Sequence[Message], target: list[str]) -> None:
        """See `Rung.begin`; notes the answer's similarity to itself, and the empty prompt's."""

        def look(n: int) -> _Apart:
            (a, _), (b, _) = (self._found(messages, range(n), target) for messages in (full, empty))
            if not a or not b:
                raise IndistinguishableError("every answer was a refusal: nothing is compared.")
            self.ceiling, self.floor = _mean(a), _mean(b)
            said = (
                f"answers are {self.ceiling:.2f} similar to the target with the whole prompt, and "
                f"{self.floor:.2f} with none of it"
            )
            return _Apart(self.ceiling - self.floor, _variance(a) + _variance(b), n, said)

        _check_apart(look, self._n, "Give more `n_answers`, or another `similarity`.")

    def score(self, messages: Sequence[Message], target: list[str]) -> Scored:
        """See `Rung.score`."""
        found, n_refused = self._found(messages, range(self._n), target)
        if not found:
            raise ApiError(
                f"all {n_refused} answers to a coalition were refusals, which have no similarity: "
                "give other baselines, or `attr_target='frequency'` with a `predicate` of them."
            )
        value, error = _mean(found), bootstrap(found)
        spread = _TWO * error
        return Scored(
            [value], [value - spread], [value + spread], [error**2], n_refused, len(found)
        )


def lexical(text: str, answer: str) -> float:
    """Share of characters in common, in order; 0 to 1."""
    return SequenceMatcher(None, text.strip(), answer.strip(), autojunk=False).ratio()


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of the shares of words in common; 0 to 1."""
    one, other = text.lower().split(), answer.lower().split()
    left = list(other)
    n = 0
    for word in one:
        if word in left:
            left.remove(word)
            n += 1
    return 2 * n / (len(one) + len(other)) if one or other else 1.0


def wilson(k: int, n: int) -> tuple[float, float]:
    """Where a probability lies at two standard errors, of `k` in `n` (Wilson 1927)."""
    if not n:
        return 0.0, 1.0
    z2 = _TWO**2
    middle = (k + z2 / 2) / (n + z2)
    spread = _TWO * math.sqrt(k * (n - k) / n + z2 / 4) / (n + z2)
    return (0.0 if k == 0 else middle - spread), (1.0 if k == n else middle + spread)


def bootstrap(found: Sequence[float]) -> float:
    """Standard error of a mean, from resampling; of few equal values it is not taken for 0."""
    values = torch.tensor(found, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(
        len(found), (_N_RESAMPLED, len(found)), generator=generator, device="cpu"
    )
    n = len(found)
    # The n - 1 that resampling misses, and one imagined value of another kind.
    grain = 0.5 / (n + 1)
    error = float(values[picked].mean(1).std()) * math.sqrt(n / max(n - 1, 1))
    return max(error, grain / math.sqrt(n))


@dataclass(frozen=True, slots=True)
class _Apart:
    """How the full and the empty prompt differ, of `n` samples each."""

    difference: float
    variance: float
    n: int
    said: str

    @property
    def is_seen(self) -> bool:
        return abs(self.difference) > _TWO * math.sqrt(self.variance / self.n)

    @property
    def n_wanted(self) -> float:
        """How many samples would tell this difference."""
        if abs(self.difference) < 1e-9:
            return math.inf
        return math.ceil(_TWO**2 * self.variance / self.difference**2)


def _check_apart(look: Callable[[int], _Apart], n: int, advice: str) -> None:
    """Refuses what a few samples do not tell apart, unless all that are to be drawn anyway may.

    Raises:
        IndistinguishableError: If the full and the empty prompt are not told apart.
    """
    found = look(min(_FIRST, n))
    if not found.is_seen and found.n_wanted <= n:
        found = look(n)
    if found.is_seen:
        return
    more = (
        "No difference was seen at all: ten times as many may tell nothing either."
        if math.isinf(found.n_wanted)
        else f"About {found.n_wanted:.0f} samples of each would tell this difference."
    )
    raise IndistinguishableError(
        f"{found.said}: they are not told apart, and no cause would be. {more} {advice}"
    )


def _logit(p: float) -> float:
    if p <= 0:
        return -math.inf
    return math.inf if p >= 1 else math.log(p / (1 - p))


def _mean(found: Sequence[float]) -> float:
    return sum(found) / len(found)


def _variance(found: Sequence[float]) -> float:
    mean = _mean(found)
    # A second value at the other end keeps few equal ones from looking certain.
    return max(sum((v - mean) ** 2 for v in found) / max(len(found) - 1, 1), 1e-4)
