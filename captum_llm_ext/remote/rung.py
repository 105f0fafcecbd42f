"""`Rung`: one way to score coalitions through an API; `Scored`: what it found.

Below log-probabilities of whole prompts (`scorer`) come a token's log-probability at each step of
the answer (`stepwise.Forced`), those of the likeliest ones alone (`stepwise.TopK`), how two first
tokens compare (`label`), how often the answer is given, and how similar to it others are
(`sampled`). Each says what it cannot see, gives an interval where it has no number, and refuses
where it would tell noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from captum_llm_ext.remote.chat_endpoint import Message


class IndistinguishableError(ValueError):
    """The full and the empty prompt do not differ measurably, so no cause would."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Values of one coalition per target token, with bounds and errors.

    Attributes:
        values: The values ``(n_target,)``; where there is only a bound, a guess.
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

    @property
    def n_censored(self) -> int:
        """Number of values that are imputed within bounds."""
        ends = zip(self.lower, self.upper, self.variances, strict=True)
        return sum(math.isinf(high - low) and not variance for low, high, variance in ends)


class Rung(Protocol):
    """A way to score coalitions through an API.

    Attributes:
        name: For people and provenance.
        is_sampled: Whether more answers would tell more.
        n_answers: How many are drawn for each coalition.
        attr_target: What a value is.
    """

    name: str
    is_sampled: bool
    n_answers: int
    attr_target: str

    @property
    def noise(self) -> float:
        """By how much values may be others when asked for again, as far as was seen."""
        ...

    @property
    def blind_spots(self) -> str:
        """What it cannot see."""
        ...

    @property
    def details(self) -> dict[str, object]:
        """Further provenance."""
        ...

    def handshake(self, messages: Sequence[Message]) -> None:
        """Finds out whether the provider can do this, and whether what it tells can be believed.

        Raises:
            HandshakeError: If not; it names what is wrong.
            ApiError: If the provider refuses.
        """
        ...

    def target(self, messages: Sequence[Message], text: str | None) -> list[str]:
        """The target as the texts that are scored; `text` is None for what the model writes.

        Raises:
            ValueError: If it cannot be scored, or nothing is written.
        """
        ...

    def begin(self, full: Sequence[Message], empty: Sequence[Message], target: list[str]) -> None:
        """Looks at the two prompts that matter most, before others are paid for.

        Raises:
            IndistinguishableError: If no cause would be found.
        """
        ...

    def score(self, messages: Sequence[Message], target: list[str]) -> Scored:
        """What is known of a coalition."""
        ...

    def drift(self, messages: Sequence[Message], target: list[str]) -> float | None:
        """Asks once more what was asked first.

        Returns:
            By how many nats the answer is another one by now; None where answers are drawn, or no
            more may be spent.
        """
        ...

    def draw_more(self) -> bool:
        """Draws more answers from now on, those that came among them; False where it may not."""
        ...
