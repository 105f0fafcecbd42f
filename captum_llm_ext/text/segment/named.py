"""A segmenter that says how it was made."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from captum_llm_ext.text.segment.span import Span


@final
@dataclass(frozen=True, repr=False, eq=False)
class Named:
    """A segmenter made by a factory.

    Attributes:
        call: The call that makes it, which is also its `repr`.
        find: Text to spans.
        positional: Whether it speaks of one whole text (its positions, its order), so that running
            it on a part of the text would make no sense.
    """

    call: str
    find: Callable[[str], list[Span]]
    positional: bool = False

    def __call__(self, text: str) -> list[Span]:
        """The spans of `text`."""
        return self.find(text)

    def __repr__(self) -> str:
        return self.call
