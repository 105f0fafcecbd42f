"""`Label`: the rung that compares two first tokens, without a prefilled answer."""

import math
from collections.abc import Sequence

from captum_llm_ext.remote.chat_endpoint import Message
from captum_llm_ext.remote.rung import Scored
from captum_llm_ext.remote.stepwise import Forced, TopK


class Label:
    """Log-odds of one label against another as the first token of the answer.

    No prefill is needed, so this works with every provider that reports log-probabilities: exact by
    `Forced`, if the server reports given tokens, otherwise with bounds.

    Args:
        by: How first tokens are looked up.
        labels: The explained label and the one it is compared with; by default what the model
            generates, and the likeliest other one.
    """

    name = "label contrast"
    attr_target = "label"
    is_sampled = False
    n_answers = 1

    def __init__(self, by: TopK, labels: tuple[str | None, str | None]) -> None:
        self._by, self._labels = by, labels
        self._tokens: tuple[str, str] | None = None

    @property
    def takes_ids(self) -> bool:
        """Whether tokens that are not among the likeliest are looked up by their ids."""
        return isinstance(self._by, Forced)

    @property
    def noise(self) -> float:
        """See `Rung.noise`: of both labels."""
        return 2 * self._by.noise

    @property
    def blind_spots(self) -> str:
        """See `Rung.blind_spots`."""
        return f"only the first tokens of two labels are compared; {self._by.blind_spots}"

    @property
    def details(self) -> dict[str, object]:
        """See `Rung.details`."""
        pair = None if self._tokens is None else list(self._tokens)
        return self._by.details | {"labels": pair}

    def handshake(self, messages: Sequence[Message]) -> None:
        """See `Rung.handshake`."""
        self._by.look(messages)

    def target(self, messages: Sequence[Message], text: str | None) -> list[str]:
        """See `Rung.target`: the label as a whole."""
        top = self._by.likeliest(messages)
        named = [name for name, _ in top if name.strip()]
        label, other = text if text is not None else self._labels[0], self._labels[1]
        first, second = (None if one is None else self._first(one, named) for one in (label, other))
        first = first or next((name for name in named if name != second), None)
        second = second or next((name for name in named if name != first), None)
        if first is None or second is None or first == second:
            raise ValueError(
                f"the labels {label!r} and {other!r} both begin with {first!r}: they cannot be "
                "distinguished. Give `labels` with other first tokens."
            )
        self._tokens = first, second
        return [label if label is not None else first]

    def _first(self, label: str, named: Sequence[str]) -> str:
        """The first token of a label as the model would generate it, with or without a space."""
        spellings = list(dict.fromkeys([label, f" {label.lstrip()}", label.lstrip()]))
        known = [self._by.first_token(text) for text in spellings]
        own = [name for name in known if name is not None]
        if own:  # by the tokenizer: a likely token may begin like a label and not be its first
            # As the likeliest are, unless the user has written a space.
            is_spaced = label.startswith(" ") or (bool(named) and named[0].startswith(" "))
            usual = [name for name in own if name.startswith(" ") == is_spaced]
            return next((name for name in own if name in named), (usual or own)[0])
        for text in spellings:
            fitting = [name for name in named if text.startswith(name)]
            if fitting:
                return max(fitting, key=len)
        raise ValueError(
            f"the label {label!r} begins with none of the {len(named)} likeliest tokens after "
            "the whole prompt, and how the model would write it is not known: give another, "
            "or the model's `tokenizer`."
        )

    def begin(self, full: Sequence[Message], empty: Sequence[Message], target: list[str]) -> None:
        """See `Rung.begin`; values are no samples."""

    def drift(self, messages: Sequence[Message], target: list[str]) -> float | None:
        """See `Rung.drift`."""
        return self._by.drift(messages, target)

    def draw_more(self) -> bool:
        """See `Rung.draw_more`: never, values are no samples."""
        return False

    def score(self, messages: Sequence[Message], target: list[str]) -> Scored:
        """See `Rung.score`."""
        if self._tokens is None:
            raise RuntimeError("call `target` first.")
        (a, a_low, a_high), (b, b_low, b_high) = self._by.values_of(messages, "", self._tokens)
        lower = a_low - b_high
        upper = math.inf if b_low == -math.inf else a_high - b_low
        return Scored([a - b], [lower], [upper], [0.0])
