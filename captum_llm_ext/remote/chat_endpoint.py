"""`ChatEndpoint`: the interface of providers that take messages."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Message = Mapping[str, Any]
Prefill = Literal["continue", "assistant", "none"]
# Log 1/2: nothing is likelier than what has more than this.
_NEVER_SECOND = -math.log(2)


@dataclass(frozen=True, slots=True)
class Step:
    """One token that a model wrote.

    Attributes:
        text: The token.
        value: Its log-probability, in nats.
        top: The likeliest tokens there, with theirs. Some servers list the token that was written
            as well, or in place of the last, however improbable it is.
    """

    text: str
    value: float
    top: list[tuple[str, float]]

    @property
    def likeliest(self) -> list[tuple[str, float]]:
        """Those of `top` than which every token that is not told is less probable, best first.

        The token that was written may be listed for that alone where it is the least of them.
        """
        pairs = sorted(self.top, key=lambda pair: -pair[1])
        is_written = bool(pairs) and pairs[-1][0] == self.text and pairs[-1][1] <= _NEVER_SECOND
        return pairs[:-1] if is_written else pairs


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """One answer.

    Attributes:
        text: What the model wrote.
        steps: Its tokens, where the provider tells log-probabilities of them.
        is_refusal: Whether the provider says that the model, or a filter, refused.
        n_in, n_out: Tokens read (for all answers of a request together) and written, as the
            provider counts them.
        model, fingerprint: Which model answered, and in what set-up, as it says.
        has_stopped: Whether the model ended the answer itself.
    """

    text: str
    steps: list[Step] = field(default_factory=list[Step])
    is_refusal: bool = False
    n_in: int = 0
    n_out: int = 0
    model: str | None = None
    fingerprint: str | None = None
    has_stopped: bool = False

    def to_json(self) -> str:
        """For a cache."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ChatAnswer":
        """What `to_json` wrote."""
        held = json.loads(text)
        steps = [
            Step(s["text"], s["value"], [(name, value) for name, value in s["top"]])
            for s in held.pop("steps")
        ]
        return cls(steps=steps, **held)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A question to a model: messages and settings.

    Attributes:
        messages: The chat.
        n_tokens: Tokens of an answer at most.
        temperature: 0 for the likeliest.
        prefill: How the answer begins; what is returned comes after it.
        way: How the model is made to go on with it.
        top: So many of the likeliest tokens are to be reported at every place.
        bias: Added to the logits of token ids; asked of speakers with `takes_bias` alone.
        n: So many answers; fewer may come.
        seed: Of the first answer, for providers that take one.
    """

    messages: Sequence[Message]
    n_tokens: int = field(kw_only=True)
    temperature: float = field(kw_only=True)
    prefill: str = field(default="", kw_only=True)
    way: Prefill = field(default="none", kw_only=True)
    top: int = field(default=0, kw_only=True)
    bias: Mapping[int, float] | None = field(default=None, kw_only=True)
    n: int = field(default=1, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)


@runtime_checkable
class ChatEndpoint(Protocol):
    """A provider that is sent messages.

    Attributes:
        prefills: Ways to have the model go on with an answer that is begun, to be tried in this
            order; none where there is no way.
        max_concurrency: In how many threads it may be asked.

    One that applies a bias says so by ``takes_bias = True``.
    """

    prefills: tuple[Prefill, ...]
    max_concurrency: int

    def chat(self, question: ChatRequest) -> list[ChatAnswer]:
        """Answers to a question, at least one."""
        ...
