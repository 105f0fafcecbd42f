"""Named spans of one text."""

from collections.abc import Sequence

from captum_llm_ext.text.segment.span import Span


class Parts:
    """Named spans of one text, as a unit.

    Args:
        names: One per span.
        spans: In reading order.
        title: Name of the level in results.
        wholes: Spans with equal numbers belong to one part. By default each is one.
    """

    positional = True  # see `segment.has_explicit_spans`

    def __init__(
        self,
        names: Sequence[str],
        spans: Sequence[Span],
        title: str = "part",
        wholes: Sequence[int] | None = None,
    ) -> None:
        self.names, self._spans, self.title = list(names), list(spans), title
        self.wholes = list(range(len(spans)) if wholes is None else wholes)

    def __call__(self, text: str) -> list[Span]:
        """The spans, for every text."""
        return self._spans

    def __repr__(self) -> str:
        return f"{len(self._spans)} {self.title}s"
