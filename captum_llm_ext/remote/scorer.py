"""`RemoteScorer`: scores rows through an API, each prompt once, concurrently."""

import math
import time
import warnings
from array import array
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor

from captum_llm_ext.base.warning import stacklevel_of_caller
from captum_llm_ext.model import Journal, Processes, TokenRow, check_same
from captum_llm_ext.model.forward.value_spec import ValueSpec
from captum_llm_ext.model.scoring.progress import ProgressBar, Shown
from captum_llm_ext.remote.bounds import Bounds, bound_of_unreported, bounds_of_contrast
from captum_llm_ext.remote.handshake import Findings, handshake
from captum_llm_ext.remote.providers import (
    Answer,
    ProviderAdapter,
    Request,
    is_ruled_out,
    log_prob,
    place,
)
from captum_llm_ext.remote.request_keys import key, merged
from captum_llm_ext.remote.search import Search
from captum_llm_ext.remote.transport import UnusableAnswerError
from captum_llm_ext.remote.workers import do_all

# Allowed difference in nats between repeated responses: batching changes last digits of half
# precision. Chosen, not measured.
_NOISE = 0.2
_NOISE_PER_NAT = 0.01  # additional share of large values; chosen, not measured
# Seconds after which one prompt is repeated, to detect a change of the server. Chosen, not
# measured.
LONG = 60.0
# Maximum share of imputed values: beyond it, these would dominate the explanation. Chosen, not
# measured.
_MOST_MISSING = 0.2


class RemoteScorer:
    """A `RowScorer` over a provider.

    A row takes one request for all tokens in it. A target token whose own feature is absent is not
    in the row and takes a separate request: the row's prefix followed by that token. So does a foil
    of a target token. These are saved if another row has this prefix and token, as always in
    leave-one-out and enumeration, or if the provider reports the token among the likeliest.

    Args:
        provider: The provider's adapter.
        tokenizer: For messages.
        attr_target: ``"log_prob"``, ``"prob"`` or ``"contrast"``.
        max_rows: Maximum number of prompts per call.
        show_progress: Whether `progress` shows a bar over the requests on stderr.
        missing: Assumed value of unreported log-probabilities, which have bounds; None: an error.
        most_requests: Warn beforehand if a call of `values` needs more, because of absent generated
            features.
    """

    def __init__(
        self,
        provider: ProviderAdapter,
        tokenizer: Any,
        *,
        attr_target: Literal["log_prob", "prob", "contrast"],
        max_rows: int | None,
        show_progress: Shown,
        missing: float | None,
        most_requests: int,
    ) -> None:
        self.attr_target: Any = attr_target
        self.n_evaluations = self.n_requests = self.n_missing = self._n_values = 0
        self.n_scored = [0]
        self.search = Search()
        self._source, self._tokenizer = provider, tokenizer
        self._most_prompts = min(provider.most_prompts, max_rows or provider.most_prompts)
        self._missing, self._most_requests = missing, most_requests
        self._bar = ProgressBar("requests", "prompt", is_shown=show_progress)
        self._rows: dict[bytes, Tensor] = {}
        self._in_order: list[bytes] = []
        # Bounds of rows with unreported values, (2, n_target).
        self._ends: dict[bytes, Tensor] = {}
        # Those of single log-probabilities, by request and index in it.
        self._upper_of: dict[tuple[bytes, int], float] = {}
        self._known: dict[bytes, Tensor] = {}
        # For prefixes followed by a token: the request that contains it, and its position.
        self._steps: dict[bytes, tuple[bytes, int]] = {}
        self._journal: Journal | None = None
        self._generated: Tensor | None = None
        self._trusts_journal = self._has_warned = False
        self._findings: Findings | None = None
        self._first: Request | None = None  # sent by this run
        self._since = 0.0

    @property
    def takes_ids(self) -> bool:
        """Whether prompts are sent as ids."""
        return self._source.takes_ids

    @property
    def source(self) -> ProviderAdapter:
        """The provider's adapter."""
        return self._source

    @property
    def scores_continuations(self) -> bool:
        """False: scoring the text after foils would take a request for each."""
        return False

    @property
    def processes(self) -> Processes:
        """This process alone."""
        return Processes()

    def generate(self, row: TokenRow, gen_args: Mapping[str, Any], seed: int) -> Tensor:
        """See `Scorer.generate`; `seed` is an argument like others."""
        del seed
        if self._generated is not None:  # by the run that is resumed
            return self._generated
        ids = torch.tensor(self._source.generate(row.ids, gen_args), dtype=torch.long, device="cpu")
        if self._journal is not None:
            self._journal.keep_target(ids)
        return ids

    def check_length(self, length: int, what: str) -> None:
        """See `Scorer.check_length`."""
        most = self._source.longest
        if most is not None and length >= most:  # the target's last token is sent as well
            raise ValueError(
                f"{what} take {length + 1} positions, the server has {most}: shorten the prompt "
                "or the target."
            )

    def likeliest(self, rows: Sequence[TokenRow], n: int) -> tuple[Tensor, Tensor]:
        """See `Scorer.likeliest`; as many as the provider reports.

        Raises:
            ValueError: If it reports no tokens other than those sent.
        """
        del n
        # Any token after the last position makes the provider report the alternatives at that
        # position.
        requests = [
            Request((*row.ids, row.ids[-1]), row.first, (), self.n_evaluations) for row in rows
        ]
        answers = self._source.ask(requests)
        self.n_requests += len(requests)
        reported = [
            answer.others[p - row.first] if p >= 0 else {}
            for row, answer in zip(rows, answers, strict=True)
            for p in row.positions
        ]
        most = max(map(len, reported))
        if most <= 1:
            raise ValueError(
                "the provider returns log-probabilities of no tokens but those sent, so no "
                "foils can be found: give them (`Contrast(foils=…)`), or have it return the "
                "likeliest tokens "
                "of each position, such as `CompletionsProvider(url, top_logprobs=20)`."
            )
        log_probs = torch.full((len(reported), most), -torch.inf, dtype=torch.float64, device="cpu")
        ids = torch.full(log_probs.shape, -1, dtype=torch.int64, device="cpu")
        for t, others in enumerate(reported):
            values = ((token, log_prob(number)) for token, number in others.items())
            known = sorted(((v, token) for token, v in values if v is not None), reverse=True)
            for i, (value, token) in enumerate(known):
                log_probs[t, i], ids[t, i] = value, token
        shape = len(rows), -1, most
        return log_probs.view(shape), ids.view(shape)

    def noise_floor(
        self, row: TokenRow, target: Tensor, foils: Tensor | None = None
    ) -> Tensor | None:
        """None: the server's precision is unknown."""
        return None

    def tolerance(self, values: Tensor) -> Tensor:
        """See `Scorer.tolerance`; the server's precision is unknown."""
        if self.attr_target == "prob":
            return _NOISE * values.double()
        return _noise(values)

    def values(
        self, rows: Sequence[TokenRow], target: Tensor, foils: Tensor | None = None
    ) -> Tensor:
        """See `Scorer.values`.

        Raises:
            ValueError: If a row cannot be sent, or a log-probability is missing or not finite.
            ConnectionError, RuntimeError: If the provider gives up. Answers until then are kept.
        """
        spec = ValueSpec(target, foils)
        digests = [spec.digest(row) for row in rows]
        new = {d: row for d, row in zip(digests, rows, strict=True) if d not in self._rows}
        parts = {
            d: self._parts(row, spec, self.n_evaluations + i)
            for i, (d, row) in enumerate(new.items())
        }
        whole = merged(own[0] for own in parts.values())
        apart = merged(part for own in parts.values() for part in own[1:])
        self._look_up([*whole, *apart])
        if apart:
            self._note_steps(whole)
            apart = {k: part for k, part in apart.items() if k not in self._steps}
        n_apart = self._n_unknown(apart)
        n = self._n_unknown(whole) + n_apart
        self._warn_of_cost(n, len(new), foils is not None)
        self._bar.announce(n)
        # Requests of whole rows first: they may contain what the others need.
        self._request(whole, wanted={k for k in apart if k not in self._known})
        self._bar.announce(self._n_unknown(apart) - n_apart)
        self._request(apart)
        for d, row in new.items():
            self._rows[d], ends = self._assembled(row, parts[d], spec)
            if ends is not None:
                self._ends[d] = ends
            self.n_evaluations += 1
            self.n_scored[0] += 1
        if self.n_missing > _MOST_MISSING * self._n_values:
            raise UnusableAnswerError(
                f"{self.n_missing} of {self._n_values} log-probabilities are missing, and "
                f"`missing={self._missing}` would be most of what is explained: such a server "
                "returns the likeliest tokens only. Have it return those of all prompt tokens "
                "(vLLM: `prompt_logprobs`)."
            )
        self._in_order += digests
        found = torch.stack([self._rows[d] for d in digests])
        return found.exp() if self.attr_target == "prob" else found

    def bounds(self, n: int) -> Bounds | None:
        """Bounds of the values of the first `n` rows; None if all are reported."""
        rows = self._in_order[:n]
        if self._ends.keys().isdisjoint(rows):
            return None
        both = torch.stack([self._ends.get(d, self._rows[d].expand(2, -1)) for d in rows], dim=1)
        lower, upper = both.exp() if self.attr_target == "prob" else both
        return Bounds(rows, lower, upper)

    def sums(
        self, rows: Sequence[tuple[int, ...]], n_before: Sequence[int] | None = None
    ) -> Tensor:
        """Summed log-probability of each row's last ids.

        Args:
            rows: Token ids; each row is requested once.
            n_before: Per row the number of ids that do not count; by default 1.

        Returns:
            Shape ``(n_rows,)``, float64, in nats.
        """
        before = [1] * len(rows) if n_before is None else n_before
        asked = [
            Request(ids, n - 1, tuple(range(len(ids) - n)), i)
            for i, (ids, n) in enumerate(zip(rows, before, strict=True))
        ]
        requests = merged(request for request in asked if request.continuation_ids)
        self._look_up([*requests])
        self._bar.announce(self._n_unknown(requests))
        self._request(requests)
        instead = self._missing or 0.0
        sums = {k: self._known[k].nan_to_num(nan=instead).sum() for k in requests}
        nothing = torch.zeros((), dtype=torch.float64, device="cpu")
        return torch.stack([sums.get(key(request), nothing) for request in asked])

    def further(
        self,
        kind: str,
        prompts: Sequence[tuple[int, ...]],
        ask: Callable[[tuple[int, ...]], Sequence[float]],
    ) -> list[list[float]]:
        """What requests of another kind return, as numbers; each is sent once.

        The handshake comes first. Like values, the numbers are stored in a checkpoint.

        Args:
            kind: Distinguishes kinds of requests.
            prompts: Token ids.
            ask: Sends a request; called from several threads.
        """
        keys = [
            blake2b(array("q", ids).tobytes(), digest_size=16, key=kind.encode()).digest()
            for ids in prompts
        ]
        self._look_up(keys)
        todo = {k: ids for k, ids in zip(keys, prompts, strict=True) if k not in self._known}
        if todo:
            longest = max(todo.values(), key=len)
            self._ensure_handshake({b"": Request(longest, max(len(longest) - 2, 0), (0,), 0)})
        self._bar.announce(len(todo))

        def take(job: tuple[bytes, tuple[int, ...]], numbers: Sequence[float]) -> None:
            self.n_requests += 1
            self._bar.advance()
            found = torch.tensor(list(numbers), dtype=torch.float64, device="cpu")
            self._known[job[0]] = found
            if self._journal is not None:
                self._journal.add([job[0]], found[None])

        do_all(
            [*todo.items()],
            lambda job: ask(job[1]),
            take,
            n_threads=self._source.n_threads,
            interrupt=self._source.interrupt,
        )
        return [self._known[k].tolist() for k in keys]

    @contextmanager
    def searching(self) -> Generator[None]:
        """Counts the requests within as those of the search for replacements."""
        before = self.n_requests
        try:
            yield
        finally:
            self.search.n_requests += self.n_requests - before

    def _parts(self, row: TokenRow, spec: ValueSpec, number: int) -> list[Request]:
        """The requests for a row: all its tokens first, then tokens that it does not contain."""
        target = spec.target.tolist()
        if row.extras is not None:
            raise ValueError(
                "the input renders to more than text (an image?), which the provider cannot be "
                "sent: explain it with a model of your own, by `GenerationAttribution`."
            )
        last = max(range(len(target)), key=lambda t: (row.positions[t], t))
        ids = (*row.ids[: row.positions[last] + 1], target[last])
        places = [(t, p) for t, p in enumerate(row.positions) if p >= 0]
        read = tuple(p - row.first for t, p in places if ids[p + 1] == target[t])
        apart = dict.fromkeys((p, target[t]) for t, p in places if ids[p + 1] != target[t])
        apart |= dict.fromkeys((p, foil) for t, p in places for foil in _foils(spec, t))
        if not self._source.takes_ids and (apart or len(read) < len(ids) - row.first - 1):
            raise ValueError(
                "generated tokens as causes need a provider that takes ids, such as "
                "`CompletionsProvider`, and this one takes text: give `output_unit=None`."
            )
        whole = Request(ids, row.first, read, number)
        return [whole] + [
            Request((*row.ids[: p + 1], token), p, (0,), number) for p, token in apart
        ]

    def _note_steps(self, whole: Mapping[bytes, Request]) -> None:
        """Records the steps in requests of whole rows, since other rows may need the same.

        The absence of a feature affects what follows it, so its original token is scored by the row
        that contains it, if the prefix is the same.
        """
        for k, request in whole.items():
            content = blake2b(
                array("q", request.ids[: request.first + 1]).tobytes(), digest_size=16
            )
            for i, token in enumerate(request.continuation_ids):
                content.update(array("q", (token,)).tobytes())
                if i in request.wanted:
                    self._steps.setdefault(content.digest(), (k, i))

    def _look_up(self, keys: Sequence[bytes]) -> None:
        """Takes over values stored by an earlier run."""
        if self._journal is not None:
            unknown = [k for k in keys if k not in self._known]
            for i, values in self._journal.found(unknown).items():
                self._known[unknown[i]] = values

    def _n_unknown(self, requests: Mapping[bytes, Request]) -> int:
        return sum(k not in self._known for k in requests)

    def _warn_of_cost(self, n: int, n_rows: int, has_foils: bool) -> None:
        if n > max(n_rows, self._most_requests) and not self._has_warned:
            self._has_warned = True
            fewer = "fewer foils; " if has_foils else ""
            which = "every foil, and " if has_foils else ""
            most = "up to " if has_foils else ""  # those among the likeliest are reported
            warnings.warn(
                f"{n_rows} coalitions take {most}{n} requests, because {which}a target token at a "
                "place where generated text is absent has to be requested separately. Fewer: "
                f"{fewer}a coarser `output_unit`, or None; fewer evaluations; a provider that "
                "returns the likeliest tokens (`top_logprobs`).",
                stacklevel=stacklevel_of_caller(),
            )

    def _ensure_handshake(self, requests: Mapping[bytes, Request]) -> None:
        """Runs the handshake before the first request."""
        request = next(iter(requests.values()), None)
        if self._findings is None and request is not None:
            prompt = request.ids[: request.first + 1]
            self._findings = handshake(self._source, prompt, request.continuation_ids)

    def _request(self, requests: Mapping[bytes, Request], wanted: set[bytes] | None = None) -> None:
        """Sends unknown requests; stores `wanted` ones that answers contain as well."""
        self._ensure_handshake(requests)
        self._check_stored(requests)
        todo = [request for k, request in requests.items() if k not in self._known]
        n = min(self._most_prompts, -(-len(todo) // self._source.n_threads))
        batches = [todo[i : i + n] for i in range(0, len(todo), max(n, 1))]

        def take(batch: Sequence[Request], answers: Sequence[Answer]) -> None:
            problems: list[str] = []
            for request, answer in zip(batch, answers, strict=True):
                problem = self._take_in(request, answer, wanted or set())
                problems += [] if problem is None else [problem]
            if problems:
                raise UnusableAnswerError(problems[0])

        do_all(
            batches,
            self._source.ask,
            take,
            n_threads=self._source.n_threads,
            interrupt=self._source.interrupt,
        )

    def _check_stored(self, requests: Mapping[bytes, Request]) -> None:
        """Compares one answer of an earlier run with the server's answer now."""
        stored = [request for k, request in requests.items() if k in self._known]
        if self._trusts_journal or self._journal is None or not stored:
            self._trusts_journal = True  # from now on, all known values are of this run
            return
        # In a short one, attention has little or no effect.
        request = max(stored, key=lambda request: len(request.ids))
        [answer] = self._source.ask([request])
        self.n_requests += 1
        wanted = list(request.wanted)
        now, then = _as_tensor(answer.values)[wanted], self._known[key(request)][wanted]
        check_same(
            now,
            then,
            _noise(then),
            whose=f"the checkpoint holds values ({place(request, self._tokenizer)})",
            advice="Give another file, or delete this one to begin anew.",
        )
        self._trusts_journal = True

    def _take_in(self, request: Request, answer: Answer, wanted: set[bytes]) -> str | None:
        """Stores an answer, or what is wrong with an unusable one."""
        self.n_requests += 1
        self._bar.advance()
        for i in request.wanted:
            value = answer.values[i]
            if value is None and self._missing is None:
                return self._no_value(request, request.continuation_ids[i], _UNTOLD, _NULL)
            if value is None:
                others = answer.others[i] if i < len(answer.others) else {}
                known = (log_prob(number) for number in others.values())
                told = [v for v in known if v is not None and not is_ruled_out(v)]
                upper = bound_of_unreported(told, told, self._rounding_step)
                self._upper_of[key(request), i] = upper
            elif is_ruled_out(value):
                return self._no_value(
                    request, request.continuation_ids[i], f"gives {value:g} to", _INFINITE
                )
        self._keep(key(request), answer.values)
        if self._first is None:
            self._first, self._since = request, time.monotonic()
        for i, others in enumerate(answer.others):
            if wanted and len(others) > 1:
                before = request.ids[: request.first + i + 1]
                for token, value in others.items():
                    k = key(Request((*before, token), len(before) - 1, (0,), 0))
                    known = log_prob(value) if k in wanted and k not in self._known else None
                    if known is not None and not is_ruled_out(known):
                        self._keep(k, [known])
        return None

    def _no_value(self, request: Request, token: int, what: str, advice: str) -> str:
        name = f"{self._tokenizer.convert_ids_to_tokens([token])[0]!r} (id {token})"
        return f"{place(request, self._tokenizer)}: the provider {what} {name}. {advice}"

    def _keep(self, k: bytes, values: Sequence[float | None]) -> None:
        self._known[k] = _as_tensor(values)
        if self._journal is not None:
            self._journal.add([k], self._known[k][None])

    def _assembled(
        self, row: TokenRow, parts: Sequence[Request], spec: ValueSpec
    ) -> tuple[Tensor, Tensor | None]:
        """The row's values from its requests, and their bounds if some are not reported.

        Returns:
            Log-probabilities, those of all foils after those of the target; and ``(2, n_target)``,
            bounds of what is explained: of the contrast if there are foils.
        """
        whole, *others = parts
        of_whole = key(whole)
        apart = {(part.first, part.ids[-1]): self._step(key(part)) for part in others}
        target = spec.target
        shape = (3, len(target))  # values, lower and upper bounds
        own = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
        of_foils = own.clone()
        n_missing = 0
        for t, (p, token) in enumerate(zip(row.positions, target.tolist(), strict=True)):
            if p < 0:
                continue
            steps = [apart.get((p, token), (of_whole, p - whole.first))]
            steps += [apart[p, foil] for foil in _foils(spec, t)]
            known = torch.stack([self._log_prob(k, i) for k, i in steps])
            missing = known[:, 1].isneginf()
            if self._missing is None and bool(missing.any()):
                name = int(token if missing[0] else _foils(spec, t)[int(missing[1:].nonzero()[0])])
                raise UnusableAnswerError(self._no_value(whole, name, _UNTOLD, _NULL))
            n_missing += int(missing.sum())
            self._n_values += len(steps)
            own[:, t] = known[0]
            of_foils[:, t] = known[1:].logsumexp(0) if len(steps) > 1 else 0.0
        self.n_missing += n_missing
        if spec.foils is None:
            return own[0], own[1:] if n_missing else None
        values = torch.cat([own[0], of_foils[0]])
        if not n_missing:
            return values, None
        has_foils = (spec.foils >= 0).any(1)
        return values, bounds_of_contrast(own[1:], of_foils[1:], has_foils, self._rounding_step)

    @property
    def _rounding_step(self) -> float:
        return 0.0 if self._findings is None else self._findings.rounding_step

    def _log_prob(self, k: bytes, i: int) -> Tensor:
        """A log-probability and its bounds, ``(3,)``; imputed if it is not reported."""
        value = self._known[k][i]
        if not value.isnan():
            return value.expand(3)
        upper = self._upper_of.get((k, i), 0.0)
        imputed = min(upper, -math.inf if self._missing is None else self._missing)
        return value.new_tensor([imputed, -math.inf, upper])

    def _step(self, k: bytes) -> tuple[bytes, int]:
        """The request that contains a single token's value, and its index in it."""
        return (k, 0) if k in self._known else self._steps[k]

    def drift(self) -> list[str]:
        """Problems that show when all answers are there; repeats one request.

        Only after a while: a minute ago nothing had changed.
        """
        if self._first is None or time.monotonic() - self._since < LONG:
            return []
        [answer] = self._source.ask([self._first])
        self.n_requests += 1
        wanted = list(self._first.wanted)
        now, then = _as_tensor(answer.values)[wanted], self._known[key(self._first)][wanted]
        apart = (now - then).abs()
        if bool((apart <= _noise(then)).all()):
            return []
        return [
            "the whole prompt has other log-probabilities than at the beginning, by "
            f"{float(apart.max()):.2g} nats: another model answers by now, or not the same one "
            "each time"
        ]

    def provenance(self) -> dict[str, Any]:
        """Provenance of the requests."""
        counts = {"n_requests": self.n_requests, "n_missing": self.n_missing}
        findings = None if self._findings is None else self._findings.to_dict()
        about = {"handshake": findings, "search": self.search.provenance()}
        return self._source.provenance() | counts | about

    def progress(self) -> AbstractContextManager[None]:
        """Shows one bar over all requests within, over any number of calls."""
        return self._bar.shown()

    @contextmanager
    def keeping(self, open_journal: Callable[[], Journal] | None) -> Generator[None]:
        """See `Scorer.keeping`."""
        if open_journal is None:
            yield
            return
        self._journal = open_journal()
        try:
            self._generated = self._journal.target
            yield
        finally:
            self._journal.close()

    def forecast(self, n_rows: int) -> None:
        """See `Scorer.forecast`."""
        self._bar.note(f"about {n_rows} more coalitions" if n_rows > 0 else "")


def _foils(spec: ValueSpec, t: int) -> list[int]:
    """Ids of the foils of a target token."""
    return [] if spec.foils is None else [i for i in spec.foils[t].tolist() if i >= 0]


def _noise(values: Tensor) -> Tensor:
    """Allowed difference of repeated answers, for each of these log-probabilities."""
    return _NOISE + _NOISE_PER_NAT * values.double().abs().nan_to_num()


_UNTOLD = "gave no log-probability of"
_NULL = (
    "Servers that tell the likeliest tokens only, or none of the prompt, cannot be used: have it "
    "tell those of all prompt tokens (vLLM: `prompt_logprobs`), or say what to take in their place "
    "with `missing=-20.0`."
)
_INFINITE = "The model rules that token out: do not explain it."


def _as_tensor(values: Sequence[float | None]) -> Tensor:
    """Log-probabilities, NaN if missing."""
    reported = [float("nan") if v is None or is_ruled_out(v) else v for v in values]
    return torch.tensor(reported, dtype=torch.float64, device="cpu")
