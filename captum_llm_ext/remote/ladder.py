"""`LadderScorer`: scores rows on a rung, each coalition once, concurrently."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from captum_llm_ext.model import Journal, Processes, TokenRow
from captum_llm_ext.model.forward.value_spec import ValueSpec
from captum_llm_ext.model.scoring.progress import ProgressBar, Shown
from captum_llm_ext.remote.bounds import Bounds, distinct
from captum_llm_ext.remote.chat_providers import CallableProvider
from captum_llm_ext.remote.handshake import rounding_step
from captum_llm_ext.remote.metered import MeteredEndpoint
from captum_llm_ext.remote.rung import Rung, Scored
from captum_llm_ext.remote.sampled import TWO
from captum_llm_ext.remote.search import Search
from captum_llm_ext.remote.step_checks import NOISY
from captum_llm_ext.remote.workers import do_all
from captum_llm_ext.text import tokens
from captum_llm_ext.text.plain_tokenizer import messages_of

# Log-probabilities nearer to 0 have few digits in float32. Chosen, not measured.
_NOT_CERTAIN = 1e-2


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
        self.search = Search()
        self._tokenizer, self._n_threads = tokenizer, n_threads
        self._bar = ProgressBar("coalitions", "coalition", is_shown=show_progress)
        self._known: dict[bytes, Scored] = {}
        self._sent: dict[bytes, str] = {}  # rows of other ids may be the same messages
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
    def scores_continuations(self) -> bool:
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
            self._known[job[0]], self._sent[job[0]] = scored, repr(job[1])
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
        if self.rung.is_sampled:
            first, merged = distinct(self._in_order, weight)
            return (self.known()["variances"][first].T @ merged.square()).sqrt(), None
        return None, self._bounds.of_attributions(weight)

    def separates_causes(self, weight: Tensor, attributions: Tensor) -> dict[str, Any] | None:
        """Whether the strongest cause is significantly stronger than any other.

        Args:
            weight: As for `uncertainty`.
            attributions: Attributions of the whole target, ``(n_features,)``.

        Returns:
            The strongest, the one that is least certainly weaker, whether they are separated, and
            by which factor more answers would be needed if values are sampled. None for fewer than
            two features.
        """
        if not self.rung.is_sampled:
            is_product = self.attr_target == "prob"
            return self._bounds.first_cause(weight, attributions, is_product=is_product)
        if len(attributions) < 2:
            return None
        first = int(attributions.argmax())
        rows, merged = distinct(self._in_order, weight[:, [first]] - weight)
        variances = self.known()["variances"][rows].sum(1)
        errors = (variances @ merged.square()).sqrt()
        lead: list[float] = (attributions[first] - attributions).tolist()
        needed = [
            TWO * error / ahead if ahead > 0 else math.inf
            for error, ahead in zip(errors.tolist(), lead, strict=True)
        ]
        # The one that is least certainly weaker, which the next strongest need not be.
        second = max((needed[j], -lead[j], j) for j in range(len(lead)) if j != first)[-1]
        times = needed[second] ** 2
        return {
            "first": first,
            "second": second,
            "is_told_apart": times < 1,
            "times_as_many_answers": times if math.isfinite(times) else None,
        }

    @property
    def _bounds(self) -> Bounds:
        known = self.known()
        return Bounds(self._in_order, known["lower"], known["upper"])

    def drift(self, full: Sequence[Any]) -> list[str]:
        """Problems that show when all answers are there; sends one more request."""
        target = [*self._wanted]
        apart = self.rung.drift(full, target)
        found = self.endpoint.doubts() or self._copies()  # of which the former may be the reason
        if apart is not None and apart > NOISY:
            found.append(
                "the whole prompt has other log-probabilities than at the beginning, by "
                f"{apart:.2g} nats: another model answers by now, or not the same one each time"
            )
        return found

    def _copies(self) -> list[str]:
        """Whether different prompts have the same values, to the last digit."""
        # Of a function, a prompt's part may have no effect at all; of a language model it has some.
        is_of_tokens = self.rung.attr_target not in ("frequency", "similarity")
        if not is_of_tokens or isinstance(self.endpoint.provider, CallableProvider):
            return []
        by_prompt = {self._sent[d]: one for d, one in self._known.items()}
        own = [tuple(one.values) for one in by_prompt.values() if not one.n_censored]
        # Of what is certain, or coarsely rounded, equal values are no wonder.
        rounded = rounding_step([value for values in own for value in values])
        likely = [one for one in own if max(map(abs, one)) > _NOT_CERTAIN and not rounded]
        n_copies = len(likely) - len(set(likely))
        if not n_copies:
            return []
        return [
            f"{n_copies} of {len(own)} coalitions have the values of another one to the last "
            "digit: the server answers similar prompts from a cache, cuts them, or reads a part"
        ]

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
            "search": self.search.provenance(),
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
