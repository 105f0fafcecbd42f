"""`Rung`: one way to score coalitions through an API; `Scored`: its result.

Below log-probabilities of whole prompts (`scorer`) there are a token's log-probability at each step
of the answer (`stepwise.Forced`), those of the likeliest tokens only (`stepwise.TopK`), the
comparison of two first tokens (`label`), the frequency of the answer, and the similarity of others
to it (`sampled`). Each documents its blind spots, gives an interval if it has no number, and raises
an error rather than report noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from captum_llm_ext.remote.chat_endpoint import Message


class IndistinguishableError(ValueError):
    """The full and the empty prompt do not differ measurably, so no cause could be found."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Values of one coalition per target token, with bounds and errors.

    Attributes:
        values: The values ``(n_target,)``; imputed if there is only a bound.
        lower, upper: Bounds of each value: guaranteed if tokens are censored, two standard errors
            if answers are sampled.
        variances: Variances of the values; 0 if exact.
        n_refused: Number of refusals.
        n_samples: Number of answers used.
    """

    values: list[float]
    lower: list[float]
    upper: list[float]
    variances: list[float]
    n_refused: int = 0
    n_samples: int = 0

    @property
    def n_censored(self) -> int:
        """Number of values that are imputed within bounds."""
        ends = zip(self.lower, self.upper, self.variances, strict=True)
        return sum(math.isinf(high - low) and not variance for low, high, variance in ends)


class Rung(Protocol):
    """A way to score coalitions through an API.

    Attributes:
        name: A name for messages and provenance.
        is_sampled: Whether more answers would give more precision.
        n_answers: Number of answers per coalition.
        attr_target: The kind of value.
    """

    name: str
    is_sampled: bool
    n_answers: int
    attr_target: str

    @property
    def noise(self) -> float:
        """Observed difference of values between repeated requests."""
        ...

    @property
    def blind_spots(self) -> str:
        """Its blind spots."""
        ...

    @property
    def details(self) -> dict[str, object]:
        """Further provenance."""
        ...

    def handshake(self, messages: Sequence[Message]) -> None:
        """Checks that the provider supports this, and that its values are correct.

        Raises:
            HandshakeError: If not; the message names what is wrong.
            ApiError: If the provider refuses.
        """
        ...

    def target(self, messages: Sequence[Message], text: str | None) -> list[str]:
        """The target as the texts that are scored; `text` is None for what the model generates.

        Raises:
            ValueError: If it cannot be scored, or nothing is generated.
        """
        ...

    def begin(self, full: Sequence[Message], empty: Sequence[Message], target: list[str]) -> None:
        """Scores the full and the empty prompt, before others are paid for.

        Raises:
            IndistinguishableError: If they do not differ measurably.
        """
        ...

    def score(self, messages: Sequence[Message], target: list[str]) -> Scored:
        """Values of a coalition, with bounds and errors."""
        ...

    def drift(self, messages: Sequence[Message], target: list[str]) -> float | None:
        """Repeats the first request.

        Returns:
            The difference in nats from the first response; None if answers are sampled, or a limit
            is reached.
        """
        ...

    def draw_more(self) -> bool:
        """Samples more answers from now on, including those so far; False if not possible."""
        ...
