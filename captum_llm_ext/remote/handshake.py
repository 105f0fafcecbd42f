"""Handshake: tests whether a provider's numbers are log-probabilities of the requested tokens.

A few short prompts are sent once per provider, before any number is used. Properties of every
language model, and values reported in two ways, are checked:

* Three generated tokens have the same log-probabilities when they are scored as part of a prompt.
* The value of a token depends on the token, and on nothing after it.
* Probabilities of different tokens at one position sum to at most 1; none is above 1.
* A prompt has the same values twice, alone or in a batch with others.
* Log-probabilities of generated tokens do not depend on the temperature, or are known to.
* Tokens sampled at temperature 1 have, on average, the surprisal of their reported distribution.
"""

import math
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from captum_llm_ext.remote.providers import ProviderAdapter, Request, Written, is_ruled_out
from captum_llm_ext.remote.transport import UNKNOWN_ARGUMENT, ApiError, UnusableAnswerError

# Allowed difference in nats of a value reported twice: half precision in batches of other shapes.
# Chosen, not measured. This limit, _SHARP, _TIMES_NOISE and _NEAR were each halved and doubled: all
# cases of tests/test_remote_handshake.py, right servers and wrong ones, end as they do.
_APART, _APART_PER_NAT = 0.05, 0.01
# Log 1 in float32, with rounding.
_ABOVE_ONE = 1e-6
_MASS = 1e-3  # by which probabilities may sum to more than 1; chosen, not measured
# Differences that are not noise if values are otherwise reproduced. Chosen, not measured.
_SHARP, _TIMES_NOISE = 1e-3, 5.0
# Generated tokens, alternatives to the last one, and tokens of the prompt that are sent. Shifts by
# one in either direction show with two tokens and one alternative; the rest is for servers that
# refuse some. Chosen, not measured: more would only cost more before every run.
_N_WRITTEN, _N_OTHERS, _LONGEST = 3, 3, 48
_N_LOOKED_AT = 64  # tokens considered as alternatives; chosen, not measured
# Rounding steps that are coarse enough to be reported, and the allowed deviation of multiples.
# Chosen, not measured.
_GRAINS, _OFF_GRAIN = (1.0, 0.5, 0.25, 0.2, 0.1, 0.05), 1e-3
# Number of samples at temperature 1, and allowed deviation of their surprisal in standard errors.
# Over random distributions of 2,000 tokens with 0.6 to 3 nats of entropy, 32 samples detect values
# of temperature 0.5 in 69 to 99 % and of 0.7 in 19 to 72 % of cases; of 900 correct ones none was
# rejected. 64 samples would detect 84 to 100 and 32 to 97 %; 3 standard errors detect more and
# reject correct ones. In the tests, 2.25 misname one fault, and 9 miss a temperature.
_N_DRAWN, _DEVIATIONS = 32, 4.5
# Position at which a token's own distribution is reported if values are shifted.
_SHIFTS = {
    -1: "they are shifted left by one, and belong to the token after",
    1: "they are shifted right by one, and belong to the token before",
}
# Nats within which a value is recognised: quantised models vary by 0.3 between calls.
_NEAR = 0.5
_ANOTHER = (
    "they are of another distribution (that of the place before or after, another temperature, "
    "a token put before the prompt, a chat template, another tokenizer or model)"
)
_UNLISTED = "not listed: what the model writes comes without it"


class HandshakeError(UnusableAnswerError):
    """A provider's log-probabilities are not those requested; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What a handshake found.

    Attributes:
        way: How log-probabilities of prompts are requested, if there is a choice.
        checks: The checks and their outcomes.
        refused: Ways tried before, and what is wrong with them.
        n_prompts: Number of prompts sent.
        rounding_step: What values are multiples of, if coarse; otherwise 0.
    """

    way: str | None
    checks: Mapping[str, str]
    refused: Mapping[str, str]
    n_prompts: int
    rounding_step: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields for provenance and JSON."""
        return {
            "way": self.way,
            "checks": dict(self.checks),
            "refused": dict(self.refused),
            "n_prompts": self.n_prompts,
        }


_known: "WeakKeyDictionary[Any, dict[tuple[Any, ...], Findings]]" = WeakKeyDictionary()
_lock = threading.RLock()
_busy: set[int] = set()


def is_verified(provider: Any) -> bool:
    """Whether a handshake with the provider has succeeded."""
    try:
        return bool(_known.get(provider))
    except TypeError:  # an unhashable provider is asked each time
        return False


def handshake(
    source: ProviderAdapter, prompt: Sequence[int], target: Sequence[int]
) -> Findings | None:
    """Tests a provider's log-probabilities; findings are cached per provider.

    Args:
        source: The provider.
        prompt: Token ids for the tests, such as the explained prompt.
        target: Token ids after them.

    Returns:
        The findings; None while a handshake with the provider is in progress.

    Raises:
        HandshakeError: If they cannot be used; the message names the fault.
        ApiError, ConnectionError: If it returns none.
    """
    provider = source.provider
    if id(provider) in _busy:
        return None
    with _lock:
        about = (getattr(provider, "model_name", None), source.takes_ids)
        try:
            known = _known.setdefault(provider, {})
        except TypeError:  # an unhashable provider is asked each time
            known = {}
        if about not in known:
            with _exclusive(provider):
                known[about] = _verified(source, prompt, target)
        return known[about]


@contextmanager
def _exclusive(provider: Any) -> Generator[None]:
    _busy.add(id(provider))
    try:
        yield
    finally:
        _busy.discard(id(provider))


def _verified(source: ProviderAdapter, prompt: Sequence[int], target: Sequence[int]) -> Findings:
    ways: Sequence[str | None] = getattr(source.provider, "ways", (None,))
    refused: dict[str, str] = {}
    statuses: list[int | None] = []
    n_prompts = 0
    for way in ways:
        if way is not None:
            source.provider.use(way)
        exam = _Handshake(copy(source), prompt, target)  # which counts the user's requests
        try:
            exam.run()
            source.most_prompts = min(source.most_prompts, exam.source.most_prompts)
            n_prompts += exam.n_prompts
            return Findings(way, exam.checks, refused, n_prompts, rounding_step(exam.reported))
        except ApiError as error:
            if len(ways) == 1 or error.status not in UNKNOWN_ARGUMENT:
                _forget(source.provider, ways)
                raise
            refused[str(way)] = str(error)
            statuses.append(error.status)
            n_prompts += exam.n_prompts
        except BaseException:
            _forget(source.provider, ways)
            raise
    _forget(source.provider, ways)
    faults = " ".join(f"By `{way}`: {fault}" for way, fault in refused.items())
    raise HandshakeError(f"no log-probabilities of prompts are available. {faults}", statuses[-1])


def _forget(provider: Any, ways: Sequence[str | None]) -> None:
    if len(ways) > 1:
        provider.use(None)


@dataclass
class _Handshake:
    """The tests of one provider, with one way of requests."""

    source: ProviderAdapter
    prompt: Sequence[int]
    target: Sequence[int]
    checks: dict[str, str] = field(default_factory=dict[str, str])
    n_prompts: int = 0
    reported: list[float] = field(default_factory=list[float])

    def run(self) -> None:
        """Runs all tests that the provider supports."""
        if self.source.takes_ids:  # text cannot be truncated at any token
            self.prompt = tuple(self.prompt[:_LONGEST])
        written = self._written()
        hot = [] if written is None else self._hot(written)
        ids, reported, likely = self._reference(written, hot)
        rows, values = self._scored(self._rows(ids, list(likely)))
        _, [longer] = self._scored([(*ids, *rows[1][-1:])] if len(rows) > 1 else [ids])
        _, [alone] = self._scored(rows[:1])
        if not any(map(_is_given, alone[-len(ids) :])):
            self._fault("none is told of any token that was asked about")
        self._same_again(values, alone)
        noise = _largest([abs(a - b) for a, b in _pairs(values[0], alone)])
        self._depends_on_nothing_later([*values, longer], noise)
        found = {row[-1]: own[-1] for row, own in zip(rows, values, strict=True)}
        of_last = {i: float(v) for i, v in found.items() if v is not None and _is_given(v)}
        last = list(of_last.values())
        self._depends_on_the_token([*values, longer], last, noise)
        both = [(of_last[i], reported) for i, reported in likely.items() if i in of_last]
        self._agrees(alone, reported, ids, [pair for pair in both if _is_given(pair[1])])
        rounding = rounding_step(self.reported)
        if rounding:
            self._note("rounding", f"values are multiples of {rounding:g}")
        mass = sum(map(math.exp, last)) / math.exp(rounding / 2)
        if mass > 1 + _MASS:
            self._fault(
                f"{len(last)} tokens have probabilities of {mass:.3g} in sum at one place, which "
                "natural log-probabilities cannot have: they may be of base 10, or belong to "
                "different places"
            )

    def _written(self) -> Written | None:
        """Generated text, if reported with log-probabilities."""
        found = self._write(_N_WRITTEN, temperature=0.0)
        if not found or not found[0].values:
            self._note("written tokens", "the provider tells no log-probabilities of them")
            return None
        written = found[0]
        self._counts(written)
        stop = self.source.stop_token
        if not written.has_stopped and stop is not None:
            ended = self._write(2, temperature=0.0, bias={stop: 100.0})
            if ended and ended[0].has_stopped:
                self._counts(ended[0])
        self.checks.setdefault("stop token", "not seen")
        for value in [*written.values, *(v for top in written.top for v in top.values())]:
            if value > _ABOVE_ONE:
                self._fault(f"it tells {value:g} as a log-probability, which is above log 1 = 0")
        for top in written.top:
            mass = sum(math.exp(value) for value in top.values())
            if mass > 1 + _MASS:
                zeros = "all are zero" if not any(top.values()) else "they are of base 10, or so"
                self._fault(
                    f"the {len(top)} likeliest tokens have probabilities of {mass:.3g} in sum, "
                    f"which natural log-probabilities cannot have: {zeros}"
                )
        return written

    def _write(self, n: int, **how: Any) -> list[Written]:
        found = self.source.written(self.prompt, n, **how)
        self.n_prompts += 1 if found else 0
        return found

    def _counts(self, written: Written) -> None:
        n, counted = len(written.values), written.n_completed
        if counted is not None and counted == n + 1 and written.has_stopped:
            self._note("stop token", _UNLISTED)
        elif counted is not None and counted != n:
            self._fault(f"it tells log-probabilities of {n} written tokens and counts {counted}")
        elif written.has_stopped:
            self._note("stop token", "listed")

    def _hot(self, written: Written) -> list[Written]:
        """First tokens sampled at temperature 1, to see whether reported values depend on it."""
        hot = self._write(1, temperature=1.0, n_answers=_N_DRAWN)
        if not hot or not hot[0].top or not written.top:
            return []
        cold, warm = written.top[0], hot[0].top[0]
        both = [name for name in cold if name in warm]
        apart = [abs(a - b) for a, b in _pairs(_of(cold, both), _of(warm, both))]
        is_followed = _largest(apart) > _allowed(_of(cold, both)) or any(
            is_ruled_out(cold[name]) != is_ruled_out(warm[name]) for name in both
        )
        changes = "changes" if is_followed else "does not change"
        self._note("temperature", f"{changes} what is told of written tokens")
        self._drawn([one.texts[0] for one in hot if len(one.values) == 1], warm)
        return hot if is_followed else []

    def _reference(
        self, written: Written | None, hot: Sequence[Written]
    ) -> tuple[tuple[int, ...], list[float], dict[int, float]]:
        """Tokens to score, their values when generated, and those of alternatives to the last."""
        n = _N_WRITTEN if self.source.takes_ids else len(self.target)
        own = () if written is None else written.ids or ()
        if written is None:
            return tuple(self.target[:n]), [], {}
        is_whole = not hot and 0 < len(own) == len(written.values)
        if is_whole and self.source.reads(self.prompt, own):
            last = (*self.prompt, *own[:-1])
            return own, list(written.values), self._ids(last, written.top[-1:])
        # Generated text may be tokenised differently, or reported at another temperature.
        known = self._ids(self.prompt, (hot or [written])[0].top[:1])
        for token, value in known.items():
            if _is_given(value) and self.source.reads(self.prompt, (token,)):
                return (token,), [value], known
        self._note("written tokens", "the provider tells no ids of them")
        return tuple(self.target[:n]), [], {}

    def _ids(self, prompt: Sequence[int], tops: Sequence[Mapping[str, float]]) -> dict[int, float]:
        pairs = (
            (self.source.called(prompt, name), value) for top in tops for name, value in top.items()
        )
        return {token: value for token, value in pairs if token is not None}

    def _rows(self, ids: tuple[int, ...], likely: Sequence[int]) -> list[tuple[int, ...]]:
        """Tokens to score after the prompt: these, and with alternatives to the last."""
        seen = [*likely, *reversed(self.prompt), *self.target, *range(_N_LOOKED_AT)]
        others: list[int] = []
        for token in list(dict.fromkeys(seen))[:_N_LOOKED_AT]:
            if token == ids[-1] or len(others) == _N_OTHERS:
                continue
            instead, longer = (*ids[:-1], token), (*ids, token)
            if self.source.reads(self.prompt, instead) and self.source.reads(self.prompt, longer):
                others.append(token)
        return [ids, *((*ids[:-1], token) for token in others)]

    def _scored(
        self, rows: Sequence[tuple[int, ...]]
    ) -> tuple[list[tuple[int, ...]], list[list[float | None]]]:
        """Rows that can be sent, and values of every position, also the prompt's if reported."""
        first = 0 if self.source.takes_ids else len(self.prompt) - 1
        requests = [
            Request((*self.prompt, *row), first, tuple(range(len(row))), i)
            for i, row in enumerate(rows)
        ]
        kept: list[tuple[int, ...]] = []
        found: list[list[float | None]] = []
        n = self.source.most_prompts
        for i in range(0, len(requests), n):
            try:
                answers = self.source.ask(requests[i : i + n])
            except ApiError:
                raise
            except ValueError:  # texts other than the target may be tokenised differently
                if i == 0:
                    raise
                continue
            kept += rows[i : i + n]
            found += [answer.values for answer in answers]
            self.n_prompts += len(answers)
        reported = [value for own in found for value in own if value is not None]
        self.reported += [value for value in reported if _is_given(value)]
        for value in reported:
            if value > _ABOVE_ONE:
                self._fault(f"it tells {value:g} as a log-probability, which is above log 1 = 0")
        return kept, found

    def _same_again(self, values: Sequence[list[float | None]], alone: list[float | None]) -> None:
        apart = _largest([abs(a - b) for a, b in _pairs(values[0], alone)])
        in_batch = self.source.most_prompts > 1
        lost = any(a is None and b is not None for a, b in zip(values[0], alone, strict=False))
        if in_batch and (lost or apart > _allowed(alone)):
            self._fault(
                "a prompt has other log-probabilities in a batch with others than alone: answers "
                "are mixed up, each given to another prompt, which `prompts_per_request=1` avoids"
            )
        if apart > _allowed(alone):
            self._fault(f"the same prompt has other ones each time, by {apart:.2g} nats")
        self._note("batch" if in_batch else "asked twice", f"the same within {apart:.1g} nats")

    def _agrees(
        self,
        alone: Sequence[float | None],
        reported: Sequence[float],
        ids: tuple[int, ...],
        of_last: Sequence[tuple[float, float]],
    ) -> None:
        """Compares log-probabilities of a prompt with those from when it was generated.

        Args:
            alone: The prompt's values.
            reported: The values reported when `ids` were generated.
            ids: The prompt's last tokens.
            of_last: Both values of several tokens at the last position.
        """
        found = alone[-len(ids) :]
        if not reported or None in found:
            return
        scored = [float(value) for value in found if value is not None]
        apart = _largest([abs(a - b) for a, b in _pairs(scored, reported)])
        if apart > _allowed(reported):
            fault = _named(scored, reported, of_last) or self._moved(ids, reported) or _ANOTHER
            self._fault(
                f"tokens that the model wrote have log-probabilities that differ by {apart:.2g} "
                f"nats when they are part of a prompt: {fault}"
            )
        self._note("written tokens", f"the same within {apart:.1g} nats when scored")

    def _moved(self, ids: tuple[int, ...], reported: Sequence[float]) -> str:
        """Whether reported distributions are shifted relative to the prompt's tokens.

        Args:
            ids: Generated tokens.
            reported: Their values when generated.

        Returns:
            What is wrong; empty if likeliest tokens are not reported, or inconclusive.
        """
        # One more token, so that the last one's distribution is reported even if shifted to the
        # right.
        more = (token for token in (ids[-1], *reversed(self.prompt)))
        after = next((t for t in more if self.source.reads(self.prompt, (*ids, t))), None)
        whole = (*self.prompt, *ids, *(() if after is None else (after,)))
        try:
            tops = self.source.likeliest(whole)[: len(whole)]  # generated tokens come after it
        except (ApiError, ConnectionError):
            return ""
        self.n_prompts += 1

        def apart(i: int, by: int) -> float | None:
            """Difference of a token's value from the one at a shifted position, or None."""
            place = len(self.prompt) + i + by
            top = tops[place] if 0 <= place < len(tops) else {}
            before = (*self.prompt, *ids[:i])
            named = {self.source.called(before, name): value for name, value in top.items()}
            # Parts of characters all have the same name.
            if ids[i] not in named and (None in named or not top):
                return None
            return abs(named.get(ids[i], -math.inf) - reported[i])

        off: dict[int, float] = {}
        for by in (0, *_SHIFTS):
            known = [a for i in range(len(ids)) if (a := apart(i, by)) is not None]
            off[by] = _largest(known) if known else math.inf
        nearest = min(off, key=off.__getitem__)
        # Values that are correct at their own position are not shifted.
        return _SHIFTS.get(nearest, "") if off[nearest] < _NEAR else ""

    def _depends_on_the_token(
        self, values: Sequence[list[float | None]], last: Sequence[float], noise: float
    ) -> None:
        if len(last) < 2 or max(last) - min(last) > max(_ABOVE_ONE, 2 * noise):
            return
        everything = [v for own in values for v in own if v is not None and _is_given(v)]
        if all(value == 0 for value in everything):
            self._fault("all are zero")
        if max(everything) - min(everything) <= _ABOVE_ONE:
            self._fault(f"all are {everything[0]:g}, whatever the token")
        self._fault(
            "the last token of a prompt has the same, whatever token it is: they are shifted right "
            "by one, and belong to the token before"
        )

    def _depends_on_nothing_later(self, values: Sequence[list[float | None]], noise: float) -> None:
        whole, instead, longer = values[0], values[1:-1], values[-1]
        if len(longer) == len(whole):  # no other token can be inserted
            return
        others = [_pairs(whole[:-2], own[:-2]) for own in [*instead, longer[:-1]]]
        noise = max(noise, _largest([abs(a - b) for pairs in others for a, b in pairs]))
        changed = [_pairs(whole[-2:-1], own[-2:-1]) for own in instead]
        changed.append(_pairs(whole[-1:], longer[-2:-1]))
        much = _largest([abs(a - b) for pairs in changed for a, b in pairs])
        if much > min(_allowed(whole[-2:]), max(_SHARP, _TIMES_NOISE * noise)):
            self._fault(
                f"the one of a token changes (by {much:.2g} nats) with the token after it: they "
                "are shifted left by one, and belong to the token after"
            )

    def _drawn(self, names: Sequence[str], top: Mapping[str, float]) -> None:
        """Whether tokens sampled at temperature 1 have the expected surprisal."""
        if len(names) < _N_DRAWN or len(set(names)) == 1:
            self._note("drawn tokens", "the provider draws no several of them")
            return
        found, mean, off = surprise(names, top)
        if abs(off) > _DEVIATIONS:
            self._fault(
                f"tokens drawn at temperature 1 are {found:.2g} nats improbable on average, and "
                f"what it tells says {mean:.2g}: they are of another temperature"
            )
        self._note("drawn tokens", f"as improbable as told, within {abs(off):.1f} standard errors")

    def _note(self, what: str, how: str) -> None:
        self.checks[what] = how

    def _fault(self, what: str) -> None:
        name = type(self.source.provider).__name__
        raise HandshakeError(
            f"the log-probabilities that {name} gets are inconsistent: {what}. Nothing was "
            "attributed."
        )


def surprise(names: Sequence[str], top: Mapping[str, float]) -> tuple[float, float, float]:
    """The surprisal of tokens sampled at one position, compared with its expectation.

    Args:
        names: The tokens.
        top: Log-probabilities of the likeliest tokens, in nats.

    Returns:
        Average surprisal in nats, its expectation, and their difference in standard errors.
    """
    rest = max(1 - sum(map(math.exp, top.values())), 1e-9)
    surprises = {name: -max(value, -30.0) for name, value in top.items()}
    mean = sum(math.exp(-s) * s for s in surprises.values()) - rest * math.log(rest)
    square = sum(math.exp(-s) * s**2 for s in surprises.values()) + rest * math.log(rest) ** 2
    found = sum(surprises.get(name, -math.log(rest)) for name in names) / len(names)
    error = math.sqrt(max(square - mean**2, 1e-6) / len(names))
    return found, mean, (found - mean) / error


def rounding_step(values: Sequence[float]) -> float:
    """The step to which values are rounded, if it is coarse; otherwise 0."""
    finite = [value for value in values if math.isfinite(value) and value]
    for step in _GRAINS:
        if len(finite) > 3 and all(abs(v / step - round(v / step)) < _OFF_GRAIN for v in finite):
            return step
    return 0.0


def _named(
    scored: Sequence[float], reported: Sequence[float], of_last: Sequence[tuple[float, float]]
) -> str:
    """A likely explanation of wrong values; empty if there is none."""
    if all(value == 0 for value in scored):
        return "all are zero"
    stretches: dict[str, Callable[[float], float]] = {
        "they are of base 10": lambda value: value / math.log(10),
        "they are of base 2": lambda value: value / math.log(2),
        "they are probabilities": math.exp,
        "they lack their sign": lambda value: -value,
    }
    pairs = {
        name: [(s, change(t)) for s, t in zip(scored, reported, strict=True)]
        for name, change in stretches.items()
    }
    left, right = zip(scored, reported[1:], strict=False), zip(scored[1:], reported, strict=False)
    pairs[_SHIFTS[-1]], pairs[_SHIFTS[1]] = list(left), list(right)
    errors = {name: _largest([abs(a - b) for a, b in own]) for name, own in pairs.items() if own}
    name = min(errors, key=errors.__getitem__)
    if errors[name] <= _allowed(reported):
        return name
    temperature = _temperature(of_last)
    if temperature is not None:
        return f"they are of temperature {temperature:.2g}"
    return ""


def _temperature(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The temperature that explains the first values by the second, if any does."""
    if len(pairs) < 3:
        return None
    x, y = [pair[1] for pair in pairs], [pair[0] for pair in pairs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    square = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / max(square, 1e-9)
    off = [abs(b - mean_y - slope * (a - mean_x)) for a, b in zip(x, y, strict=True)]
    is_one = slope > _APART and _largest(off) <= _allowed(x) and abs(slope - 1) > _APART
    return 1 / slope if is_one else None


def _of(top: Mapping[str, float], names: Sequence[str]) -> list[float]:
    return [top[name] for name in names]


def _is_given(value: float | None) -> bool:
    return value is not None and not is_ruled_out(value)


def _pairs(a: Sequence[float | None], b: Sequence[float | None]) -> list[tuple[float, float]]:
    """Values of the positions that both report."""
    return [
        (x, y)
        for x, y in zip(a, b, strict=False)
        if x is not None and y is not None and _is_given(x) and _is_given(y)
    ]


def _largest(found: Sequence[float]) -> float:
    return max(found, default=0.0)


def _allowed(values: Sequence[float | None]) -> float:
    """Allowed difference of values that should be equal."""
    return _APART + _APART_PER_NAT * _largest(
        [-v for v in values if v is not None and _is_given(v)]
    )
