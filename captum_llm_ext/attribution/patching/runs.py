"""Runs of the model on original and corrupted texts, with cells of one patched into another."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.attribution.patching.corruption import Corruption
from captum_llm_ext.contrast import Foils
from captum_llm_ext.model import AttrTarget, Processes, Scorer, TokenRow
from captum_llm_ext.model.exclusive import exclusive_use
from captum_llm_ext.model.gradients.forward_pass import ForwardPass
from captum_llm_ext.model.residual_stream import Patch, ResidualStream

# A noise floor is measured on a few batches; others may differ by more. Chosen, not measured.
_FLOORS = 2.0


@dataclass(frozen=True)
class Patched:
    """One row: a text, with the stream of another text at some positions of a layer.

    Attributes:
        base: Key of the text that is read.
        source: Key of the text whose stream is put there; "" if none is.
        layer: Index of the stream.
        places: Patched positions.
    """

    base: str
    source: str = ""
    layer: int = 0
    places: tuple[int, ...] = ()


class PatchedRuns:
    """Values of target tokens in patched runs.

    Args:
        model: The model.
        stream: Its residual streams.
        attr_target: The kind of value, as for `Scorer`.
        max_rows: Maximum number of rows per pass; None: as memory allows.
        show_progress: Whether to show a bar.
        processes: The processes that share the rows. Each reads the streams itself.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: ResidualStream,
        attr_target: AttrTarget,
        *,
        max_rows: int | None,
        show_progress: bool,
        processes: Processes | None = None,
    ) -> None:
        self._model, self._stream = model, stream
        self._texts: dict[str, Corruption] = {}
        self._streams: dict[str, list[Tensor]] = {}
        self.scorer = Scorer(
            model,
            attr_target=attr_target,
            max_rows=max_rows,
            show_progress=show_progress,
            processes=processes,
            around=self._around,
        )

    def take(self, texts: Sequence[Corruption], target: Tensor, foils: Foils | None) -> None:
        """Takes texts of one length, which rows refer to, and reads their streams.

        Args:
            texts: The original and the corrupted texts.
            target: Token ids ``(n_target,)`` scored in all texts.
            foils: Foils of a contrast.

        Raises:
            ValueError: If the model's positions cannot be patched, or its streams are not one
                vector per position of the text.
        """
        self._target, self._foils = target, foils
        self._texts |= {text.key: text for text in texts}
        self.values([Patched(text.key) for text in texts])
        self._check_model()
        for text in texts:
            self._streams[text.key] = self._read(text)

    def values(self, cells: Sequence[Patched]) -> Tensor:
        """Values ``(n_cells, n_target)``, float64; NaN for tokens that a text does not predict."""
        rows = [self._row(cell) for cell in cells]
        foils = None if self._foils is None else self._foils.tensor
        values = self.scorer.values(rows, self._target, foils)
        if foils is None:
            return values
        own, others = values.split(len(self._target), dim=1)
        return own - others

    def streams(self, text: Corruption) -> list[Tensor]:
        """Residual streams ``(length, size)`` by layer."""
        return self._streams[text.key]

    def tolerance(self, text: Corruption, values: Tensor) -> Tensor:
        """How far rounding may change each of the values, ``(n_target,)``."""
        usual = self.scorer.tolerance(values)
        foils = None if self._foils is None else self._foils.tensor
        floor = self.scorer.noise_floor(self._row(Patched(text.key)), self._target, foils)
        return usual if floor is None else usual + _FLOORS * floor

    @contextmanager
    def graph(self, text: Corruption) -> Generator[tuple[Tensor, list[Tensor]]]:
        """A pass with gradients: logits ``(1, n_kept, vocabulary)``, and the streams of its graph.

        The logits are those of the positions that predict a target token, in order.
        """
        at = [p for p in text.positions if p >= 0]
        with exclusive_use(self._model), torch.enable_grad():
            with self._noised([text]), self._stream.read(with_gradients=True) as streams:
                logits = self._reader.logits(*self._given(text, at))
            yield logits, streams

    @property
    def _reader(self) -> ForwardPass:
        reader, found = ForwardPass(self._model), self.scorer.findings
        if found is not None and found.kept is None:
            reader.keep_all()
        reader.seed = 0 if found is not None and found.seeds else None
        return reader

    def _given(self, text: Corruption, at: Sequence[int]) -> tuple[Tensor, Tensor]:
        device = _compat.input_device(self._model)
        ids = torch.tensor([text.ids], dtype=torch.int64, device=device)
        return ids, torch.tensor(list(at), dtype=torch.int64, device=device)

    def _read(self, text: Corruption) -> list[Tensor]:
        with exclusive_use(self._model), self._noised([text]), self._stream.read() as streams:
            self._reader.logits(*self._given(text, [len(text.ids) - 1]))
        length = len(text.ids)
        for number, stream in enumerate(streams):
            if stream.shape[:2] != (1, length):
                raise ValueError(
                    f"stream {number} of {type(self._model).__name__} is {tuple(stream.shape)} "
                    f"for a row of {length} token ids: patching needs (1, {length}, size), a "
                    "vector for each token (no soft prompts, no parallel streams)."
                )
        return [stream[0] for stream in streams]

    def _row(self, cell: Patched) -> TokenRow:
        text = self._texts[cell.base]
        # A token that the other text does not predict has no effect from its stream.
        positions = text.positions
        if cell.source:
            other = self._texts[cell.source].positions
            positions = tuple(min(a, b) for a, b in zip(positions, other, strict=True))
        return TokenRow(text.ids, positions, key=cell)

    @contextmanager
    def _around(self, rows: Sequence[TokenRow]) -> Generator[None]:
        cells = [cast(Patched, row.key) for row in rows]
        texts = [self._texts[cell.base] for cell in cells]
        patches = [self._patch(row, cell) for row, cell in zip(rows, cells, strict=True)]
        with self._noised(texts), self._stream.patched(patches):
            yield

    def _patch(self, row: TokenRow, cell: Patched) -> Patch | None:
        if not cell.source:
            return None
        places = tuple(p for p in cell.places if p < len(row.ids))  # rows may be truncated
        return Patch(cell.layer, places, self._streams[cell.source][cell.layer][list(places)])

    def _noised(self, texts: Sequence[Corruption]) -> AbstractContextManager[None]:
        return self._stream.noised([text.noise for text in texts])

    def _check_model(self) -> None:
        found, name = self.scorer.findings, type(self._model).__name__
        if found is not None and found.step_by_step:
            raise ValueError(
                f"{name} is scored one token per pass ({found.batching}): activation patching "
                "needs a model that predicts every token of a text in one pass, with causal "
                "attention."
            )
        if found is not None and found.n_before:
            raise ValueError(
                f"{name} puts {found.n_before} vectors of its own in front of every text (a soft "
                "prompt): places of its streams are not those of the text's tokens."
            )

    def provenance(self) -> Mapping[str, Any]:
        """The provenance of values."""
        return self.scorer.provenance()
