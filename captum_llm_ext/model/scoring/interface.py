"""The interface of scorers, wherever the model runs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from captum_llm_ext.model.forward.logits import AttrTarget
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.processes.group import Processes
from captum_llm_ext.model.scoring.checkpoint import Journal


class RowScorer(Protocol):
    """Scores token rows for a target; `Scorer` is the implementation for a local model.

    Attributes:
        attr_target: The kind of value.
        n_evaluations: Number of distinct rows scored.
        n_scored: Number of rows that each replica of the model scored.
    """

    attr_target: AttrTarget
    n_evaluations: int
    n_scored: list[int]

    @property
    def scores_continuations(self) -> bool:
        """See `Scorer.scores_continuations`."""
        ...

    @property
    def processes(self) -> Processes:
        """The processes that share the work."""
        ...

    def generate(self, row: TokenRow, gen_args: Mapping[str, Any], seed: int) -> Tensor:
        """See `Scorer.generate`."""
        ...

    def check_length(self, length: int, what: str) -> None:
        """See `Scorer.check_length`."""
        ...

    def values(
        self, rows: Sequence[TokenRow], target: Tensor, foils: Tensor | None = None
    ) -> Tensor:
        """See `Scorer.values`."""
        ...

    def likeliest(self, rows: Sequence[TokenRow], n: int) -> tuple[Tensor, Tensor]:
        """See `Scorer.likeliest`."""
        ...

    def noise_floor(
        self, row: TokenRow, target: Tensor, foils: Tensor | None = None
    ) -> Tensor | None:
        """See `Scorer.noise_floor`."""
        ...

    def tolerance(self, values: Tensor) -> Tensor:
        """See `Scorer.tolerance`."""
        ...

    def progress(self) -> AbstractContextManager[None]:
        """See `Scorer.progress`."""
        ...

    def keeping(self, open_journal: Callable[[], Journal] | None) -> AbstractContextManager[None]:
        """See `Scorer.keeping`."""
        ...

    def forecast(self, n_rows: int) -> None:
        """See `Scorer.forecast`."""
        ...
