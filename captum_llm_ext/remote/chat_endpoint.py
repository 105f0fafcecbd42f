"""`ChatEndpoint`: the interface of providers that take messages."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Message = Mapping[str, Any]
Prefill = Literal["continue", "assistant", "none"]
# Log 1/2: a more probable token is always the likeliest.
_NEVER_SECOND = -math.log(2)


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token.

    Attributes:
        text: The token.
        value: Its log-probability, in nats.
        top: The likeliest tokens there, with theirs. Some servers also list the generated token, or
            in place of the last, however improbable it is.
    """

    text: str
    value: float
    top: list[tuple[str, float]]

    @property
    def likeliest(self) -> list[tuple[str, float]]:
        """Those of `top` that bound every unreported token, best first.

        The generated token, if the least of them, may only be listed because it was generated.
        """
        pairs = sorted(self.top, key=lambda pair: -pair[1])
        is_written = bool(pairs) and pairs[-1][0] == self.text and pairs[-1][1] <= _NEVER_SECOND
        return pairs[:-1] if is_written else pairs


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """One answer.

    Attributes:
        text: The generated text.
        steps: Its tokens, if the provider reports log-probabilities.
        is_refusal: Whether the provider reports a refusal by the model or a filter.
        n_in, n_out: Input tokens (for all answers of a request together) and output tokens, as
            counted by the provider.
        model, fingerprint: The reported model and system fingerprint.
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
        """As JSON, for a cache."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ChatAnswer":
        """Restores an answer from `to_json`."""
        held = json.loads(text)
        steps = [
            Step(s["text"], s["value"], [(name, value) for name, value in s["top"]])
            for s in held.pop("steps")
        ]
        return cls(steps=steps, **held)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request to a model: messages and settings.

    Attributes:
        messages: The chat.
        n_tokens: Maximum number of tokens of an answer.
        temperature: 0 for greedy.
        prefill: Beginning of the answer; the response continues it.
        way: How the model is made to continue it.
        top: Number of likeliest tokens to report at every position.
        bias: Added to the logits of token ids; only for endpoints with `takes_bias`.
        reported: Token ids to report at every position instead of the likeliest; only for
            endpoints with `takes_ids`.
        n: Number of answers requested; fewer may be returned.
        seed: Seed of the first answer, for providers that support it.
    """

    messages: Sequence[Message]
    n_tokens: int = field(kw_only=True)
    temperature: float = field(kw_only=True)
    prefill: str = field(default="", kw_only=True)
    way: Prefill = field(default="none", kw_only=True)
    top: int = field(default=0, kw_only=True)
    bias: Mapping[int, float] | None = field(default=None, kw_only=True)
    reported: Sequence[int] = field(default=(), kw_only=True)
    n: int = field(default=1, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)


@runtime_checkable
class ChatEndpoint(Protocol):
    """A provider that takes messages.

    Attributes:
        prefills: Ways to make the model continue a prefilled answer, in the order to try them;
            empty if there are none.
        max_concurrency: Maximum number of threads.

    One that supports a bias declares ``takes_bias = True``, and one that reports given token ids
    ``takes_ids = True``. Servers behind it may still ignore or refuse either.
    """

    prefills: tuple[Prefill, ...]
    max_concurrency: int

    def chat(self, question: ChatRequest) -> list[ChatAnswer]:
        """Answers to a request, at least one."""
        ...
