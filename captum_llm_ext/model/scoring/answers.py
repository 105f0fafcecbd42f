"""Generates answers to many prompts: those of equal length together, distributed over processes."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.base.seeded import reseeded, seeded, seeded_rows
from captum_llm_ext.model.exclusive import exclusive_use
from captum_llm_ext.model.forward import memory
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.generation import Generation, continued, continued_by_row
from captum_llm_ext.model.processes.group import Processes

# Answers generated at a time. Chosen, not measured: a step reads all weights once for all rows,
# which dominates the cost; but all rows wait for the longest, and their caches are in memory
# together.
_MOST_ROWS = 32
# In all prompts of a batch: their caches take about 100 MB in models of 1 billion weights.
_MOST_TOKENS = 8_192

Extras = Mapping[str, Tensor]


class AnswerWriter:
    """Generates answers with a model.

    Args:
        model: The model.
        device: The model's input device.
        processes: The processes that share the work.
        extras: Returns a row's further arguments of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        processes: Processes,
        extras: Callable[[TokenRow], Extras],
    ) -> None:
        self._model, self._device = model, device
        self._processes, self._extras = processes, extras

    def one(self, row: TokenRow, arguments: Mapping[str, object], seed: int) -> Tensor:
        """The continuation of a row, ``(n_target,)``, on this process alone."""
        ids = torch.tensor([row.ids], device=self._device, dtype=torch.int64)
        given = {**self._extras(row), **arguments}
        is_compiled = _compat.is_compiled(self._model)
        how = reseeded(self._model, seed) if is_compiled else seeded(seed)
        with exclusive_use(self._model), how:
            return continued(self._model, ids, given).cpu()

    def each(
        self,
        rows: Sequence[TokenRow],
        generation: Generation,
        seeds: Sequence[int],
        *,
        together: bool,
        tell: Callable[[int], None],
    ) -> list[Tensor]:
        """The continuations of several rows, each as if generated alone.

        Args:
            rows: Prompts, equal on all processes.
            generation: The generation settings.
            seeds: Sampling seeds, one per row.
            together: Whether rows of a batch are independent.
            tell: Called with the number of further answers.
        """
        ends = generation.ends if together else None
        parts = _parts(rows, 1 if ends is None else _MOST_ROWS)
        found: dict[int, Tensor] = {}
        work = self._processes.work()
        failure: Exception | None = None

        def take_in(results: Sequence[tuple[Sequence[int], list[Tensor]]]) -> None:
            for part, answers in results:
                found.update(zip(part, answers, strict=True))
                tell(len(part))

        try:
            for number in work.take(len(parts)):
                part = parts[number]
                own = [(rows[i], seeds[i]) for i in part]
                work.send((part, self._generate_batch(own, generation, ends or frozenset())))
                take_in(work.received())
        except (RuntimeError, ValueError, TypeError) as error:
            failure = error.with_traceback(None)
        work.end(failure)
        take_in([*work.rest()])
        if work.failures:
            raise work.failures[0]
        return [found[i] for i in range(len(rows))]

    def _generate_batch(
        self, part: Sequence[tuple[TokenRow, int]], generation: Generation, ends: frozenset[int]
    ) -> list[Tensor]:
        if len(part) == 1:
            return [self.one(part[0][0], generation.arguments, part[0][1])]
        ids = torch.tensor([row.ids for row, _ in part], device=self._device, dtype=torch.int64)
        try:
            with exclusive_use(self._model), seeded_rows([seed for _, seed in part]):
                answers = continued_by_row(self._model, ids, generation.arguments, ends)
            return [answer.cpu() for answer in answers]
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
        half = len(part) // 2
        return [
            answer
            for own in (part[:half], part[half:])
            for answer in self._generate_batch(own, generation, ends)
        ]


def _parts(rows: Sequence[TokenRow], most: int) -> list[list[int]]:
    """Indices of rows of one length that are generated together."""
    by_length: dict[object, list[int]] = {}
    for i, row in enumerate(rows):
        # Further arguments of rows may not be batchable.
        by_length.setdefault(len(row.ids) if row.extras is None else (i,), []).append(i)
    parts: list[list[int]] = []
    for own in by_length.values():
        size = max(min(most, _MOST_TOKENS // max(len(rows[own[0]].ids), 1)), 1)
        parts += [own[i : i + size] for i in range(0, len(own), size)]
    return parts
