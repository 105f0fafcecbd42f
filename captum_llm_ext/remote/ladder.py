"""`LadderScorer`: scores rows on a rung, each coalition once, concurrently."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from captum_llm_ext.coalitions import (
    Plan,
    Scope,
    Solution,
    solve_exact,
    solve_leave_one_out,
    solve_only_one_in,
    solve_permutations,
)
from captum_llm_ext.model import Journal, Processes, TokenRow
from captum_llm_ext.model.forward.value_spec import ValueSpec
from captum_llm_ext.model.scoring.progress import ProgressBar, Shown
from captum_llm_ext.remote.metered import MeteredEndpoint
from captum_llm_ext.remote.rung import Rung, Scored
from captum_llm_ext.remote.sampled import TWO
from captum_llm_ext.remote.step_checks import NOISY
from captum_llm_ext.remote.workers import do_all
from captum_llm_ext.text import tokens
from captum_llm_ext.text.plain_tokenizer import messages_of

# Estimators whose attributions are fixed linear combinations of the values.
_LINEAR: Mapping[str, Callable[[Plan, Tensor, Scope], Solution]] = {
    "leave-one-out": solve_leave_one_out,
    "only one in": solve_only_one_in,
    "exact": solve_exact,
    "antithetic permutations": solve_permutations,
}


class LadderScorer:
    """A `RowScorer` over a rung.

    Args:
        rung: How coalitions are scored.
        as_probability: Whether log-probabilities are reported as probabilities.
        endpoint: The endpoint that it uses.
        tokenizer: Spells rows and target.
        n_threads: Number of concurrent coalitions.
        show_progress: Whether `progress` shows a bar.
    """

    takes_ids = False

    def __init__(
        self,
        rung: Rung,
        endpoint: MeteredEndpoint,
        tokenizer: Any,
        *,
        n_threads: int,
        show_progress: Shown,
        as_probability: bool = False,
    ) -> None:
        self.attr_target: Any = "prob" if as_probability else rung.attr_target
        self.n_evaluations = 0
        self.n_scored = [0]
        self.rung, self.endpoint = rung, endpoint
        self._tokenizer, self._n_threads = tokenizer, n_threads
        self._bar = ProgressBar("coalitions", "coalition", is_shown=show_progress)
        self._known: dict[bytes, Scored] = {}
        self._in_order: list[bytes] = []
        self._wanted: list[str] = []

    def forget(self) -> None:
        """Has coalitions scored again, since the rung now has more answers."""
        self._known.clear()
        self._in_order.clear()
        self.n_evaluations, self.n_scored = 0, [0]

    def shows(self, show_progress: Shown) -> None:
        """Whether `progress` shows a bar."""
        self._bar = ProgressBar("coalitions", "coalition", is_shown=show_progress)

    @property
    def reads_on(self) -> bool:
        """False: every row would be a request."""
        return False

    @property
    def processes(self) -> Processes:
        """This process alone."""
        return Processes()

    def generate(self, row: TokenRow, gen_args: Mapping[str, Any], seed: int) -> NoReturn:
        """Not supported: targets are not ids."""
        raise NotImplementedError

    def likeliest(self, rows: Sequence[TokenRow], n: int) -> NoReturn:
        """Not supported."""
        raise NotImplementedError

    def check_length(self, length: int, what: str) -> None:
        """Does nothing: the maximum length is unknown."""

    def noise_floor(self, row: TokenRow, target: Tensor, foils: Tensor | None = None) -> None:
        """None: the server's precision is unknown."""

    def tolerance(self, values: Tensor) -> Tensor:
        """Allowed difference of values of one coalition."""
        return torch.full_like(values, 0.2, dtype=torch.float64)

    def values(
        self, rows: Sequence[TokenRow], target: Tensor, foils: Tensor | None = None
    ) -> Tensor:
        """See `Scorer.values`, without foils; bounds and errors are stored for `known`.

        Raises:
            ValueError: If a row is not a text, or the full and empty prompts do not differ.
            ConnectionError, RuntimeError: If the provider gives up, or a limit is reached.
        """
        self._wanted = wanted = [tokens.decode(self._tokenizer, [i]) for i in target.tolist()]
        spec = ValueSpec(target)
        digests = [spec.digest(row) for row in rows]
        new = {d: row for d, row in zip(digests, rows, strict=True) if d not in self._known}
        if any(row.extras is not None for row in new.values()):
            raise ValueError("the input renders to more than text, which cannot be sent.")
        jobs = [
            (d, as_messages(self._tokenizer, row.ids[: row.first + 1])) for d, row in new.items()
        ]
        self._bar.announce(len(jobs))

        def take(job: tuple[bytes, Any], scored: Scored) -> None:
            self._known[job[0]] = scored
            self.n_evaluations += 1
            self.n_scored[0] += 1
            self._bar.advance()

        def score(job: tuple[bytes, Any]) -> Scored:
            return self.rung.score(job[1], wanted)

        do_all(
            jobs,
            score,
            take,
            n_threads=self._n_threads,
            interrupt=getattr(self.endpoint.provider, "interrupt", lambda: None),
        )
        self._in_order += digests
        return self._stored("values", digests)

    def known(self) -> dict[str, Tensor]:
        """Scores of all coalitions, in the order of requests.

        Returns:
            ``"lower"``, ``"upper"``, ``"variances"``, each ``(n_coalitions, n_target)``; the first
            two include the provider's observed noise.
        """
        return {
            name: self._stored(name, self._in_order) for name in ("lower", "upper", "variances")
        }

    def only_first(self, n: int) -> None:
        """Keeps only the first `n` requested coalitions: the others repeated them."""
        del self._in_order[n:]

    def _stored(self, name: str, digests: Sequence[bytes]) -> Tensor:
        found = [getattr(self._known[d], name) for d in digests]
        values = torch.tensor(found, dtype=torch.float64, device="cpu")
        values += self.rung.noise * {"lower": -1, "upper": 1}.get(name, 0)
        return values.exp() if self.attr_target == "prob" and name != "variances" else values

    def uncertainty(self, weight: Tensor) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Uncertainty of attributions due to that of the values.

        Args:
            weight: Weights of the coalitions' values in attributions, ``(n_coalitions,
                n_features)``: see `weights`.

        Returns:
            Standard errors ``(n_target, n_features)`` if values are sampled, otherwise the bounds
            of attributions; None for the other.
        """
        known, merged = self._merged(weight)
        if self.rung.is_sampled:
            return (known["variances"].T @ merged.square()).sqrt(), None
        return None, interval_of(merged, known["lower"], known["upper"])

    def separates_causes(self, weight: Tensor, attributions: Tensor) -> dict[str, Any] | None:
        """Whether the strongest cause is significantly stronger than the second.

        Args:
            weight: As for `uncertainty`.
            attributions: Attributions of the whole target, ``(n_features,)``.

        Returns:
            The two, whether they are separated, and by which factor more answers would be needed if
            values are sampled. None for fewer than two features.
        """
        if len(attributions) < 2:
            return None
        first, second = attributions.argsort(descending=True)[:2].tolist()
        known, merged = self._merged(weight[:, [first]] - weight[:, [second]])
        difference = float(attributions[first] - attributions[second])
        found: dict[str, Any] = {"first": first, "second": second}
        if not self.rung.is_sampled:
            is_product = self.attr_target == "prob"
            ends = [known[end] for end in ("lower", "upper")]
            whole = [(end.prod(1) if is_product else end.sum(1))[:, None] for end in ends]
            lower, _ = interval_of(merged, *whole)
            return found | {"is_told_apart": bool(lower[0, 0] > 0)}
        error = float((known["variances"].sum(1) @ merged[:, 0].square()).sqrt())
        times = (TWO * error / difference) ** 2 if difference > 0 else math.inf
        return found | {
            "is_told_apart": difference > TWO * error,
            "times_as_many_answers": times if math.isfinite(times) else None,
        }

    def drift(self, full: Sequence[Any]) -> list[str]:
        """Problems that show when all answers are there; sends one more request."""
        target = [*self._wanted]
        apart = self.rung.drift(full, target)
        found = self.endpoint.doubts()
        if apart is not None and apart > NOISY:
            found.append(
                "the whole prompt has other log-probabilities than at the beginning, by "
                f"{apart:.2g} nats: another model answers by now, or not the same one each time"
            )
        return found

    def _merged(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Scores of distinct coalitions, and the weights of each."""
        # A repeated coalition is one unknown value, not two.
        numbers = {d: i for i, d in enumerate(dict.fromkeys(self._in_order))}
        row_of = [numbers[d] for d in self._in_order]
        first = {row: at for at, row in reversed(list(enumerate(row_of)))}
        known = {
            name: values[[first[row] for row in range(len(numbers))]]
            for name, values in self.known().items()
        }
        index = torch.tensor(row_of, dtype=torch.int64, device="cpu")
        merged = torch.zeros(len(numbers), weight.shape[1], dtype=weight.dtype, device="cpu")
        return known, merged.index_add(0, index, weight)

    def provenance(self) -> dict[str, Any]:
        """Provenance of the requests."""
        own = list(self._known.values())
        n_values = sum(len(one.values) for one in own)
        n_censored = sum(one.n_censored for one in own)
        reported: dict[str, Any] = {
            "rung": self.rung.name,
            "cannot_see": self.rung.blind_spots,
            "sent_as": "messages",
            "way": self.endpoint.way,
            "share_censored": n_censored / n_values if n_values else 0.0,
            "n_refusals": sum(one.n_refused for one in own),
            "n_answers": sum(one.n_samples for one in own),
        }
        return reported | self.rung.details | self.endpoint.provenance()

    def progress(self) -> AbstractContextManager[None]:
        """Shows one bar over all coalitions within."""
        return self._bar.shown()

    @contextmanager
    def keeping(self, open_journal: Callable[[], Journal] | None) -> Generator[None]:
        """Answers are cached by the endpoint as they arrive; no journal is opened."""
        del open_journal
        yield

    def forecast(self, n_rows: int) -> None:
        """See `Scorer.forecast`."""
        self._bar.note(f"about {n_rows} more coalitions" if n_rows > 0 else "")


def as_messages(tokenizer: Any, ids: Sequence[int]) -> list[dict[str, str]]:
    """A prompt as messages."""
    special = getattr(tokenizer, "bos_token_id", None)
    own = ids[1:] if ids and ids[0] == special else ids
    found = messages_of(tokens.decode(tokenizer, own) if own else "")
    # Messages without any present text are not sent, since APIs refuse empty ones.
    messages = [message for message in found if message["content"].strip()]
    return messages or [{"role": "user", "content": " "}]


def weights(name: str, plan: Plan) -> Tensor | None:
    """Weights of the coalitions' values in the attributions, ``(n_coalitions, n_features)``.

    Args:
        name: Name of the estimator.
        plan: Its coalitions.

    Returns:
        None for estimators that are not linear in the values.
    """
    solve = _LINEAR.get(name)
    if solve is None:
        return None
    n = len(plan.masks)
    scope = Scope.of_all(n, plan.n_features)
    return solve(plan, torch.eye(n, dtype=torch.float64, device="cpu"), scope).attributions


def interval_of(weight: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of attributions from bounds of values, each ``(n_target, n_features)``.

    Args:
        weight: Weights of distinct rows, ``(n_rows, n_features)``.
        lower, upper: ``(n_rows, n_target)``; infinite without a bound.
    """
    positive, negative = weight.clamp_min(0)[:, None], weight.clamp_max(0)[:, None]

    def total(of_positive: Tensor, of_negative: Tensor) -> Tensor:
        # A weight of 0 times an infinite bound counts as 0.
        terms = [
            torch.where(w == 0, 0.0, w * v[:, :, None])
            for w, v in ((positive, of_positive), (negative, of_negative))
        ]
        return torch.stack(terms).sum((0, 1))

    return total(lower, upper), total(upper, lower)
