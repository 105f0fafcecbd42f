"""A segmenter with a name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from captum_llm_ext.text.segment.span import Span


@final
@dataclass(frozen=True, repr=False, eq=False)
class Named:
    """A segmenter made by a factory.

    Attributes:
        call: The call that creates it, also its `repr`.
        find: Maps a text to spans.
        positional: Whether it refers to positions or order in one whole text, so that it cannot run
            on a part of the text.
    """

    call: str
    find: Callable[[str], list[Span]]
    positional: bool = False

    def __call__(self, text: str) -> list[Span]:
        """The spans of `text`."""
        return self.find(text)

    def __repr__(self) -> str:
        return self.call
