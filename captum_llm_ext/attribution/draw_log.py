"""Which texts the coalitions of a game were scored with, call by call."""

from collections.abc import Callable, Sequence

import torch

from captum_llm_ext.coalitions.draw_effects import DrawnTexts
from captum_llm_ext.text.inputs import DrawnUnit, RenderedText


class DrawLog:
    """Records the texts drawn for each coalition.

    Args:
        prompt_column, target_column: Map a feature of the prompt or the target to its column.
    """

    def __init__(
        self, prompt_column: Callable[[int], int], target_column: Callable[[int], int]
    ) -> None:
        self._prompt_column, self._target_column = prompt_column, target_column
        self._units: dict[DrawnUnit, int] = {}
        self._columns: list[int] = []  # of the units' last features
        self._calls: list[list[dict[int, int]]] = []  # per call and coalition: units and texts

    @property
    def n_calls(self) -> int:
        """Number of calls of `add`."""
        return len(self._calls)

    def add(self, texts: Sequence[RenderedText]) -> None:
        """Notes the texts of coalitions that are scored together."""
        self._calls.append([self._texts_of(text) for text in texts])

    def texts(self, calls: Sequence[int]) -> DrawnTexts | None:
        """The texts of the coalitions of some calls, in this order; None if none is known."""
        rows = [row for call in calls for row in self._calls[call]]
        places = [(i, unit, text) for i, row in enumerate(rows) for unit, text in row.items()]
        if not places:
            return None
        found = torch.full((len(rows), len(self._units)), -1, dtype=torch.int32, device="cpu")
        which, units, texts = torch.tensor(places, dtype=torch.int64, device="cpu").T
        found[which, units] = texts.int()
        most = max(len(unit.probabilities) for unit in self._units)
        probabilities = torch.zeros(len(self._units), most, dtype=torch.float64, device="cpu")
        for unit, number in self._units.items():
            own = torch.tensor(unit.probabilities, dtype=torch.float64, device="cpu")
            probabilities[number, : len(own)] = own
        columns = torch.tensor(self._columns, dtype=torch.int64, device="cpu")
        return DrawnTexts(found, probabilities, columns)

    def _texts_of(self, text: RenderedText) -> dict[int, int]:
        """Per unit that was drawn for a coalition the index of its text."""
        found: dict[int, int] = {}
        for drawn, column_of in (
            (text.prompt.drawn, self._prompt_column),
            (text.drawn, self._target_column),
        ):
            for unit, number in drawn.items():
                if unit not in self._units:
                    self._units[unit] = len(self._units)
                    self._columns.append(column_of(unit.feature))
                found[self._units[unit]] = number
        return found
