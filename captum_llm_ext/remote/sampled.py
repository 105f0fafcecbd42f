"""Rungs without log-probabilities: the frequency of the answer, or similarity to it."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from captum_llm_ext.base.warning import stacklevel_of_caller
from captum_llm_ext.remote.chat_endpoint import ChatRequest, Message
from captum_llm_ext.remote.draw_checks import Draws, check_draws
from captum_llm_ext.remote.handshake import HandshakeError
from captum_llm_ext.remote.metered import MeteredEndpoint
from captum_llm_ext.remote.rung import IndistinguishableError, Scored
from captum_llm_ext.remote.similarities import Similar
from captum_llm_ext.remote.transport import ApiError

# Samples of the full and the empty prompt that decide whether more are worthwhile. Chosen, not
# measured.
_FIRST = 8
TWO = 2.0  # standard errors: about 95 %
_N_RESAMPLED = 1000  # bootstrap samples: an error is then off by a fiftieth


class _Sampled:
    """Common parts of rungs that sample answers.

    Args:
        endpoint: The endpoint.
        n: Number of answers per coalition, at first and at most.
        n_tokens: Maximum number of tokens of an answer.
        temperature: Sampling temperature.
    """

    def __init__(
        self, endpoint: MeteredEndpoint, n: tuple[int, int], n_tokens: int, temperature: float
    ) -> None:
        self._endpoint, (self.n_answers, self._most), self._n_tokens = endpoint, n, n_tokens
        self._temperature, self.noise = temperature, 0.0  # sampling has noise anyway
        self.is_sampled, self._varies = True, False
        self.checks: dict[str, str] = {}

    @property
    def details(self) -> dict[str, object]:
        """See `Rung.details`."""
        about: dict[str, object] = {"handshake": dict(self.checks)}
        return about | {"n_answers_each": self.n_answers, "answers_vary": self._varies}

    def handshake(self, messages: Sequence[Message]) -> None:
        """See `Rung.handshake`: checks that there is text, and that answers are sampled."""
        draws: Draws = "never vary"
        if self._temperature > 0:
            draws, self.checks["draws"] = check_draws(self._endpoint, self._temperature)
        if draws == "never vary":
            self._do_without_draws()

    def _do_without_draws(self) -> None:
        """Switches to one answer per coalition.

        Raises:
            HandshakeError: If one answer is not informative.
        """
        raise NotImplementedError

    def target(self, messages: Sequence[Message], text: str | None) -> list[str]:
        """See `Rung.target`: the answer as a whole."""
        if text is not None:
            return [text]
        answer = self._endpoint.answer(
            ChatRequest(messages, n_tokens=self._n_tokens, temperature=0.0)
        )
        if answer.is_refusal:
            raise ValueError(f"the model refuses to answer ({answer.text!r:.80}): give a `target`.")
        return [answer.text]

    def drift(self, messages: Sequence[Message], target: list[str]) -> float | None:
        """See `Rung.drift`: samples always differ."""
        return None

    def draw_more(self) -> bool:
        """See `Rung.draw_more`: doubles the number, up to the maximum."""
        before, self.n_answers = self.n_answers, min(2 * self.n_answers, self._most)
        return self.n_answers > before

    def _drawn(self, messages: Sequence[Message], numbers: range) -> tuple[list[str], int]:
        """Answers other than refusals, and the number of refusals."""
        question = ChatRequest(messages, n_tokens=self._n_tokens, temperature=self._temperature)
        answers = self._endpoint.answers(question, numbers)
        kept = [one.text for one in answers if not one.is_refusal]
        self._varies |= len(set(kept)) > 1
        return kept, len(answers) - len(kept)


class Frequency(_Sampled):
    """Frequency of the answer: log-odds with Jeffreys' prior.

    Args:
        endpoint, n, n_tokens, temperature: See `_Sampled`.
        predicate: Whether a text counts as the answer; by default equality up to white space at the
            ends.
    """

    name = attr_target = "frequency"
    blind_spots = (
        "only changes in how often this very answer is given are seen, and only those that stand "
        "out of the samples: log-odds of rare answers are rough"
    )

    def __init__(
        self,
        endpoint: MeteredEndpoint,
        n: tuple[int, int],
        n_tokens: int,
        temperature: float,
        predicate: Callable[[str], bool] | None,
    ) -> None:
        super().__init__(endpoint, n, n_tokens, temperature)
        self._predicate = predicate

    def _do_without_draws(self) -> None:
        raise HandshakeError(
            "the provider has the same answer to an open question each time, at temperature "
            f"{self._temperature:g}: it ignores the temperature, or caches its answers, and "
            'frequencies would all be 0 or 1. `attr_target="similarity"` would work, by one '
            "answer to each coalition."
        )

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

        def look(n: int) -> _Gap:
            (k_full, n_full, _), (k_empty, n_empty, _) = (
                self._count(messages, range(n), target) for messages in (full, empty)
            )
            if not n_full or not n_empty:
                raise IndistinguishableError("every answer was a refusal: nothing can be counted.")
            p, q = (k_full + 0.5) / (n_full + 1), (k_empty + 0.5) / (n_empty + 1)
            shown = (
                f"the answer was given {k_full} of {n_full} times with the whole prompt and "
                f"{k_empty} of {n_empty} times with none of it"
            )
            difference = k_full / n_full - k_empty / n_empty
            return _Gap(difference, p * (1 - p) + q * (1 - q), n, shown)

        _check_gap(
            look,
            self._most,
            "Give a shorter answer, a `predicate` that more texts satisfy, or "
            "`attr_target='similarity'`.",
        )

    def score(self, messages: Sequence[Message], target: list[str]) -> Scored:
        """See `Rung.score`."""
        half = max(self.n_answers // 2, min(_FIRST, self.n_answers))
        k, n, n_refused = self._count(messages, range(half), target)
        if not (n and k in (0, n) and n >= 3 * _FIRST):  # unanimous answers need no more samples
            more = self._count(messages, range(half, self.n_answers), target)
            k, n, n_refused = k + more[0], n + more[1], n_refused + more[2]
        value = math.log((k + 0.5) / (n - k + 0.5))
        lower, upper = wilson(k, n)
        variance = 1 / (k + 0.5) + 1 / (n - k + 0.5)
        return Scored([value], [_logit(lower)], [_logit(upper)], [variance], n_refused, n)


class Similarity(_Sampled):
    """Mean similarity of sampled answers to the explained one.

    Args:
        endpoint, n, n_tokens, temperature: See `_Sampled`.
        similar: ``(text, answer) -> similarity``.
        kind: Its name.
    """

    name = attr_target = "similarity"

    def __init__(
        self,
        endpoint: MeteredEndpoint,
        n: tuple[int, int],
        n_tokens: int,
        temperature: float,
        similar: Similar,
        kind: str,
    ) -> None:
        super().__init__(endpoint, n, n_tokens, temperature)
        self._similar, self.kind = similar, kind
        self.ceiling: float | None = None
        self.floor: float | None = None

    @property
    def blind_spots(self) -> str:
        """See `Rung.blind_spots`."""
        alike = "what leaves the answer as similar as before is not seen, whatever it means"
        if self.is_sampled:
            return alike
        return f"only changes of the likeliest answer are seen, for answers do not vary; {alike}"

    @property
    def details(self) -> dict[str, object]:
        """See `Rung.details`: the similarities of the empty and of the full prompt."""
        about = {"kind": self.kind, "ceiling": self.ceiling, "floor": self.floor}
        return super().details | about

    def _do_without_draws(self) -> None:
        self.is_sampled, self.n_answers, self._most = False, 1, 1
        if self._temperature > 0:
            warnings.warn(
                "the provider has the same answer to an open question each time, at temperature "
                f"{self._temperature:g}: it ignores the temperature, or caches its answers. One "
                "answer per coalition is used, so only changes of the likeliest answer are "
                "visible.",
                stacklevel=stacklevel_of_caller(),
            )

    def _found(
        self, messages: Sequence[Message], numbers: range, target: list[str]
    ) -> tuple[list[float], int]:
        texts, n_refused = self._drawn(messages, numbers)
        return [float(self._similar(text, target[0])) for text in texts], n_refused

    def begin(self, full: Sequence[Message], empty: Sequence[Message], target: list[str]) -> None:
        """See `Rung.begin`; stores the answer's similarity to itself, and the empty prompt's."""

        def look(n: int) -> _Gap:
            (a, _), (b, _) = (self._found(messages, range(n), target) for messages in (full, empty))
            if not a or not b:
                raise IndistinguishableError("every answer was a refusal: nothing is compared.")
            self.ceiling, self.floor = _mean(a), _mean(b)
            shown = (
                f"answers are {self.ceiling:.2f} similar to the target with the whole prompt, and "
                f"{self.floor:.2f} with none of it"
            )
            variance = _variance(a) + _variance(b) if self.is_sampled else 0.0
            return _Gap(self.ceiling - self.floor, variance, n, shown)

        _check_gap(look, self._most, "Give more `n_answers`, or another `similarity`.")

    def score(self, messages: Sequence[Message], target: list[str]) -> Scored:
        """See `Rung.score`."""
        found, n_refused = self._found(messages, range(self.n_answers), target)
        if not found:
            raise ApiError(
                f"all {n_refused} answers to a coalition were refusals, which have no similarity: "
                "give other baselines, or `attr_target='frequency'` with a `predicate` of them."
            )
        value, error = _mean(found), bootstrap(found) if self.is_sampled else 0.0
        spread = TWO * error
        return Scored(
            [value], [value - spread], [value + spread], [error**2], n_refused, len(found)
        )


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's interval of a probability at two standard errors, for `k` of `n` (Wilson 1927)."""
    if not n:
        return 0.0, 1.0
    z2 = TWO**2
    middle = (k + z2 / 2) / (n + z2)
    spread = TWO * math.sqrt(k * (n - k) / n + z2 / 4) / (n + z2)
    return (0.0 if k == 0 else middle - spread), (1.0 if k == n else middle + spread)


def bootstrap(found: Sequence[float]) -> float:
    """Bootstrap standard error of a mean, which is not 0 for a few equal values."""
    values = torch.tensor(found, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(
        len(found), (_N_RESAMPLED, len(found)), generator=generator, device="cpu"
    )
    n = len(found)
    # The n - 1 that resampling misses, and one imagined value of another kind.
    rounding_step = 0.5 / (n + 1)
    error = float(values[picked].mean(1).std()) * math.sqrt(n / max(n - 1, 1))
    return max(error, rounding_step / math.sqrt(n))


@dataclass(frozen=True, slots=True)
class _Gap:
    """Difference of the full and the empty prompt, from `n` samples each."""

    difference: float
    variance: float
    n: int
    shown: str

    @property
    def is_significant(self) -> bool:
        return abs(self.difference) > TWO * math.sqrt(self.variance / self.n)

    @property
    def n_wanted(self) -> float:
        """Number of samples that would make this difference significant; infinite if negligible.

        A difference below a fifth of its own standard error gives no number.
        """
        if abs(self.difference) <= math.sqrt(self.variance / self.n) / 5:
            return math.inf
        return math.ceil(TWO**2 * self.variance / self.difference**2)


def _check_gap(look: Callable[[int], _Gap], most: int, advice: str) -> None:
    """Refuses what a few samples do not separate, unless the maximum number would.

    Raises:
        IndistinguishableError: If the full and the empty prompt are not separated.
    """
    found = look(min(_FIRST, most))
    if not found.is_significant and found.n_wanted <= most:
        found = look(most)
    if found.is_significant:
        return
    more = (
        "Next to no difference was seen: ten times as many may tell nothing either."
        if math.isinf(found.n_wanted)
        else f"About {found.n_wanted:.0f} samples of each would tell this difference."
    )
    raise IndistinguishableError(
        f"{found.shown}: they cannot be distinguished, and no effect could be. {more} {advice}"
    )


def _logit(p: float) -> float:
    if p <= 0:
        return -math.inf
    return math.inf if p >= 1 else math.log(p / (1 - p))


def _mean(found: Sequence[float]) -> float:
    return sum(found) / len(found)


def _variance(found: Sequence[float]) -> float:
    mean = _mean(found)
    # A second value at the other end keeps a few equal ones from appearing certain.
    return max(sum((v - mean) ** 2 for v in found) / max(len(found) - 1, 1), 1e-4)
