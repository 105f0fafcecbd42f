"""`Scorer`: scores every distinct row once, in batches that fit, with prefix reuse."""

import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import exclusive_use
from captum_llm_ext.model.forward import memory
from captum_llm_ext.model.forward.logits import AttrTarget
from captum_llm_ext.model.forward.passes import Around, Passes
from captum_llm_ext.model.forward.prefixes import sort_by_prefix
from captum_llm_ext.model.forward.rounding import rounding
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.forward.value_spec import ValueSpec, explained
from captum_llm_ext.model.generation import Generation
from captum_llm_ext.model.identity import check_same
from captum_llm_ext.model.probe import FINE, Findings, findings, record_findings
from captum_llm_ext.model.probe.noise import NoiseFloor
from captum_llm_ext.model.processes.group import Processes
from captum_llm_ext.model.scoring.answers import AnswerWriter
from captum_llm_ext.model.scoring.batching import Batching, Reuse
from captum_llm_ext.model.scoring.checkpoint import Journal
from captum_llm_ext.model.scoring.progress import ProgressBar, Shown
from captum_llm_ext.model.scoring.shards import shards, without

# Values whose rounding error does not depend on their magnitude.
_IN_NATS = ("log_prob", "contrast")


class _BatchesUnknownError(Exception):
    """Rows need batches, but the model has only been probed with packs."""


class Scorer:
    """Generates with a model and scores rows on it, each distinct row once.

    Args:
        model: A causal language model: a module that returns ``logits`` (batch, length, vocabulary)
            for ``input_ids``.
        attr_target: ``"log_prob"``, ``"prob"``, ``"logit"``, ``"contrast"`` (log-probabilities;
            rounding errors are those of the difference to foils), or a callable ``(logits (batch,
            n_target, vocabulary), target (n_target,)) -> (batch, n_target)``.
        max_rows: Maximum number of rows per batch. By default as memory allows.
        show_progress: Whether `progress` shows a bar over the model's evaluations on stderr; or a
            listener.
        counted: Name of rows in the bar.
        reuse: ``"auto"``: common prefixes are computed once if that pays and a first comparison on
            the model shows equal values, in the cheapest way. ``"off"``: never. ``"copy"``,
            ``"share"``, ``"pack"``: always by copies of the prefix cache; without copies; or by
            rows packed in one sequence; the latter two if they show equal values too.
        overhead: Fixed cost of a pass, or of a row of a pack, in positions, which reuse must save
            to pay. By default estimated from the model's size and device.
        processes: The processes that share the work, with the same rows in the same order. By
            default this one alone.
        around: A context for every pass, called with its rows, which are then read completely,
            without prefix reuse. Rows of equal ids with a different effect must have different
            keys.

    Attributes:
        n_evaluations: Number of distinct rows scored, by all processes.
        n_row_positions: Number of token positions of these rows.
        n_scored: Number of rows that each replica of the model scored.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        attr_target: AttrTarget = "log_prob",
        max_rows: int | None = None,
        show_progress: Shown = False,
        counted: str = "model evaluations",
        reuse: Reuse = "auto",
        overhead: int | None = None,
        processes: Processes | None = None,
        around: Around | None = None,
    ) -> None:
        self.model = model
        self.attr_target = attr_target
        self.device = _compat.input_device(model)
        self.n_evaluations = 0
        self.n_row_positions = 0
        sharing = reuse if reuse in ("copy", "share") else "auto"
        self._passes = Passes(model, attr_target, self.device, sharing, around)
        self._answers = AnswerWriter(
            model,
            self.device,
            processes or Processes(),
            lambda row: self._passes.extras(row, 0),
        )
        self._batching = Batching(
            self._passes,
            max_rows=max_rows,
            reuse=reuse if around is None else "off",
            overhead=overhead,
            shares_work=processes is not None,
        )
        self._processes = processes or Processes()
        self._journal: Journal | None = None
        self._generated: Tensor | None = None
        self._trusted = 0  # length of the longest stored row that has been verified
        self.n_scored = [0] * self._processes.n_replicas
        self._is_shown = self._processes.is_main and show_progress
        self._bar = ProgressBar(counted, "row", is_shown=self._is_shown)
        self._known: dict[bytes, Tensor] = {}
        self._findings: Findings | None = None
        self._shown: Findings | None = None  # and the findings from its values
        self._noise = NoiseFloor(self._passes)

    def auxiliary(self, counted: str) -> "Scorer":
        """Another scorer of the same model in this process, for rows other than coalitions.

        Args:
            counted: Name of its rows in the bar.
        """
        return Scorer(self.model, show_progress=self._is_shown, counted=counted)

    @property
    def scores_continuations(self) -> bool:
        """Whether foils may be weighted by the likelihood of the text after them."""
        return True

    @property
    def processes(self) -> Processes:
        """The processes that share the work."""
        return self._processes

    @property
    def n_positions(self) -> int:
        """Token positions computed so far, including padding and comparisons."""
        return self._passes.n_positions

    @property
    def shares_cache(self) -> bool:
        """Whether rows attend to a shared prefix without copies.

        Known after the first worthwhile comparison.
        """
        return bool(self._passes.shares_cache)

    @property
    def uses_packing(self) -> bool:
        """Whether rows are packed in one sequence; known after the first comparison."""
        return self._batching.uses_packing

    def generate(self, row: TokenRow, gen_args: Mapping[str, Any], seed: int) -> Tensor:
        """The token ids that the model generates after a row; equal on all processes.

        Args:
            row: The prompt.
            gen_args: Arguments of the model's ``generate``, from `planned_generation`.
            seed: Seeds sampling; the global random state is unchanged.

        Returns:
            Shape ``(n_target,)``, int64 on the CPU.

        Raises:
            ValueError: If there are several answers, or they do not begin with the prompt.
        """
        if self._generated is not None:  # by the run that is resumed
            return self._generated
        ids = self._processes.decide(lambda: self._answers.one(row, gen_args, seed))
        if self._journal is not None:
            self._journal.keep_target(ids)
        return ids

    def generate_each(
        self,
        rows: Sequence[TokenRow],
        generation: Generation,
        seeds: Sequence[int],
        tell: Callable[[int], None] = lambda _: None,
    ) -> list[Tensor]:
        """The token ids that the model generates after each of several rows, as if alone.

        Rows of equal length are batched if that changes nothing: not if rows of a batch are
        coupled, nor, without sampling, for models with rough values.

        Args:
            rows: The prompts.
            generation: The generation settings.
            seeds: Sampling seeds, one per row.
            tell: Called with the number of further answers.

        Returns:
            Each ``(n_target,)``, int64 on the CPU; equal on all processes.

        Raises:
            ValueError: As for `generate`.
        """
        together = False
        if generation.ends is not None and len(rows) > 1:
            with exclusive_use(self.model):
                ends = [TokenRow(r.ids, (len(r.ids) - 1,), r.extras) for r in rows]
                found = self._probe(ends, batches=True)
            is_sampled = generation.settings.get("do_sample") == "True"
            together = not found.apart and (is_sampled or not found.is_rough)
        return self._answers.each(rows, generation, seeds, together=together, tell=tell)

    def expect(self, ids: Sequence[int]) -> None:
        """Announces that many rows, of several calls, will begin like a text, some with all of it.

        It is then read once, if the model can continue from any position of its cache. The cache is
        kept as long as this scorer, or until the next text.

        Args:
            ids: Token ids of the text.
        """
        self._batching.expect(ids)

    def check_length(self, length: int, what: str) -> None:
        """Checks that rows do not exceed the model's maximum length.

        Raises:
            ValueError: If `length` tokens, described by `what`, do not fit.
        """
        most = _compat.longest_sequence(self.model)
        if most is not None and length > most:
            raise ValueError(
                f"{what} take {length} positions, the model has {most}: shorten the prompt or the "
                "target."
            )

    def values(
        self, rows: Sequence[TokenRow], target: Tensor, foils: Tensor | None = None
    ) -> Tensor:
        """Values of the target tokens after each row.

        Args:
            rows: One token row per coalition.
            target: Token ids, shape ``(n_target,)``.
            foils: Foils of each target token, shape ``(n_target, n_foils)``, padded with -1.

        Returns:
            Shape ``(n_rows, n_target)``, float64 on the CPU, in nats for log-probabilities; NaN if
            a row defines no value for a token. Softmax and sums are computed in float32 at least.
            With
            foils ``(n_rows, 2 * n_target)``: log-probabilities of the target tokens, then those of
            the foils of each together.

        Raises:
            ValueError: If an id is outside the vocabulary, or the model returns NaN or an infinite
                value.
            TypeError: If the model returns no logits, or a callable target the wrong shape.
        """
        spec = ValueSpec(target, foils)
        with exclusive_use(self.model):
            values = self._found(self._probe(rows), rows, spec)
        self._noise.note(rows, explained(values, spec, self.attr_target))
        return values

    def probe(self, rows: Sequence[TokenRow]) -> Findings:
        """What the model does with such rows; looked at where these are news."""
        with exclusive_use(self.model):
            return self._probe(rows)

    def likeliest(self, rows: Sequence[TokenRow], n: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens at the positions that predict the target tokens, likeliest first.

        Args:
            rows: Token rows.
            n: Number of tokens.

        Returns:
            Log-probabilities, float64 on the CPU, and token ids, each ``(n_rows, n_target, n)``;
            padded with -inf and -1 if the vocabulary has fewer; undefined where a row has no such
            position.
        """
        spec = ValueSpec.likeliest(len(rows[0].positions), n)
        with exclusive_use(self.model):
            found = self._found(self._probe(rows), rows, spec)
        found = found.view(len(rows), 2, n, len(spec)).transpose(2, 3)
        return found[:, 0], found[:, 1].nan_to_num(nan=-1.0).long()

    def noise_floor(
        self, row: TokenRow, target: Tensor, foils: Tensor | None = None
    ) -> Tensor | None:
        """How far values differ that were computed in different ways.

        Some of the scored rows, short and long ones, are recomputed in other batches: a run with
        other batches shows no larger differences, as far as these rows tell. This takes a sixteenth
        of the run's cost, and a batch of at least four rows. If the probe saw nothing beyond
        float32 rounding, some values from separate short passes confirm it.

        Args:
            row: The row of the whole text.
            target, foils: As for `values`.

        Returns:
            Shape ``(n_target,)``, float64, in the unit of the values; None for models with ordinary
            float32 rounding, which is negligible.

        Warns:
            UserWarning: If it is more than the model's dtype explains.
        """
        spec = ValueSpec(target, foils)
        with exclusive_use(self.model):
            found = self._probe([row])
            values = self._found(found, [row], spec)
            self._noise.note([row], explained(values, spec, self.attr_target))

            mixes = self._batching.mixes_positions(found.longest)
            apart = mixes or row.extras is not None or self._batching.max_rows == 1
            cuts = found.step_by_step or not mixes
            floor, self._shown = self._noise.floor(found, spec, together=not apart, cuts=cuts)
            if self._shown != found:
                record_findings(self.model, self._shown)
            return floor

    @property
    def findings(self) -> Findings | None:
        """What the probe found of the model; None before the first values."""
        return self._findings

    def provenance(self) -> dict[str, Any]:
        """The provenance of values."""
        found = self._findings
        if found is None:
            return {}
        seen = self._shown or found
        return {
            "probe": seen.provenance() | self._batching.provenance(),
            "batching": found.batching,
        }

    def _probe(self, rows: Sequence[TokenRow], *, batches: bool = False) -> Findings:
        """Probes the model for such rows, unless already known.

        Args:
            rows: Token rows.
            batches: Whether they may be run in batches, even if packs work.
        """
        lengths = [len(row.ids) for row in rows]
        found, compare_packed = self._findings, None if batches else self._batching.compare_packed
        if found is not None and found.covers(min(lengths), max(lengths), packs=compare_packed):
            return found
        self._passes.check_ids(
            torch.tensor([i for row in rows for i in row.ids], dtype=torch.int64, device="cpu")
        )
        extras = self._passes.extras(rows[0], 0) if rows[0].extras is not None else None
        looked_at = rows[:1] if extras else rows
        found = self._processes.decide(
            lambda: findings(self.model, looked_at, extras, None if extras else compare_packed)
        )
        if extras:  # rows are run one by one, whatever their lengths
            found = replace(found, shortest=0, longest=sys.maxsize)
        self._batching.apply_findings(found)
        self._passes.kept, self._passes.moved = found.kept, found.moved
        self._passes.seed = 0 if found.seeds else None
        self._findings = found
        return found

    def _found(self, found: Findings, rows: Sequence[TokenRow], spec: ValueSpec) -> Tensor:
        if not found.step_by_step:
            try:
                values = self._values(rows, spec)
            except _BatchesUnknownError:
                found = self._probe(rows, batches=True)
            else:
                found = self._confirm(found, rows, spec, values)
        return self._stepping(rows, spec) if found.step_by_step else self._values(rows, spec)

    def _confirm(
        self, found: Findings, rows: Sequence[TokenRow], spec: ValueSpec, values: Tensor
    ) -> Findings:
        """Compares values of rows with a common prefix.

        These differ only in what follows, after every absent token: the whole run can show what a
        few passes of the probe missed.
        """
        if found.is_rough or spec.per_token > 1 or not isinstance(self.attr_target, str):
            return found
        if (ahead := _apart_where_alike(rows, values)) <= FINE:
            return found
        found = replace(found, sees_ahead=True, mixes_lengths=False, ahead=ahead)
        record_findings(self.model, found)
        self._batching.apply_findings(found)
        self._findings = found
        return found

    def tolerance(self, values: Tensor) -> Tensor:
        """How far rounding may change each of these values between two runs of the same model.

        Args:
            values: Shape ``(n_target,)``.
        """
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        sizes = values.double().abs().nan_to_num()
        if self.attr_target == "prob":  # an additive error of its logarithm
            return rounding(dtype) * sizes
        largest = sizes.max().clamp_min(1.0) if self.attr_target not in _IN_NATS else 1.0
        return torch.full_like(sizes, rounding(dtype)) * largest

    def _values(self, rows: Sequence[TokenRow], spec: ValueSpec) -> Tensor:
        digests = [spec.digest(row) for row in rows]
        todo = {d: row for d, row in zip(digests, rows, strict=True) if d not in self._known}
        self._bar.announce(len(todo))
        try:
            while todo:
                self._score(todo, spec)
                todo = {d: row for d, row in todo.items() if d not in self._known}
        except _BatchesUnknownError:
            self._bar.announce(-len(todo))  # they are announced again
            raise
        return torch.stack([self._known[digest] for digest in digests])

    def _stepping(self, rows: Sequence[TokenRow], spec: ValueSpec) -> Tensor:
        """One pass per target token, with nothing after it."""
        values = spec.blank(len(rows))
        for t in range(len(spec)):
            ends = {i: end for i, row in enumerate(rows) if (end := row.up_to(t)) is not None}
            if ends:
                values[[*ends], :, t] = self._values([*ends.values()], spec.only([t]))
        return values.flatten(1)

    def _score(self, todo: Mapping[bytes, TokenRow], spec: ValueSpec) -> None:
        """Scores rows, or some of them and backs off if memory runs out."""
        keys, rows = list(todo), list(todo.values())
        content = _digest_of(keys)
        if self._batching.budget is None and self._batching.repeats:
            self._batching.budget = self._agreed_budget()
        root, planned, (places, known) = self._processes.decide(
            lambda: (self._batching.plan(rows, spec), content, self._stored(keys))
        )
        stored = dict(zip(places, known, strict=True))
        if planned != content:
            raise ValueError(
                "this process has other rows to score than the main one: give every process the "
                "same prompt, target, baselines, method and seed."
            )
        is_known = root.is_each_alone or self._knows_batches(rows)
        if root.own is None and not is_known:
            raise _BatchesUnknownError
        self._check_stored(stored, rows, spec)
        root, state = self._batching.read_common_prefix(root, rows, spec)
        if stored:
            for i, values in stored.items():
                self._keep([(keys[i], rows[i], values)])
            root = without(root, {*stored})
        lengths = [len(row.ids) for row in rows]
        parts = shards(root, lengths, self._processes.n_replicas, overhead=self._batching.overhead)
        work = self._processes.work()
        failure: tuple[int, RuntimeError] | None = None
        try:
            for number in work.take(len(parts)):
                for batch, values in self._passes.run(parts[number], rows, spec, state):
                    _check(values, [rows[i] for i in batch], spec)
                    work.send((self._processes.number, batch, values))
                    self._take_in(work.received(), keys, rows)
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            failure = (self._passes.n_rows, error.with_traceback(None))
        work.end(failure)
        self._take_in(work.rest(), keys, rows)
        if work.failures:
            n_rows, error = min(work.failures, key=lambda pair: pair[0])
            if not self._batching.back_off(n_rows):
                raise error

    def _knows_batches(self, rows: Sequence[TokenRow]) -> bool:
        """Whether the model has been probed with such rows in batches, or runs them separately."""
        found, lengths = self._findings, [len(row.ids) for row in rows]
        if found is None or found.step_by_step:
            return True
        return found.covers(min(lengths), max(lengths))

    def _agreed_budget(self) -> int:
        """Bytes a batch may take: equal on all processes, and as when the journal was begun."""
        here = self._processes.minimum(memory.batch_budget(self.device))
        journal = self._journal
        return self._processes.decide(lambda: here if journal is None else journal.budget(here))

    def _stored(self, keys: Sequence[bytes]) -> tuple[list[int], Tensor]:
        """Which of the rows are stored from an earlier run, and their values as one tensor.

        Returns:
            Indices in `keys`; values ``(n_stored, per_token * n_target)``.
        """
        found = {} if self._journal is None else self._journal.found(keys)
        if not found:
            return [], torch.empty(0, 0, dtype=torch.float64, device="cpu")
        return [*found], torch.stack([*found.values()])

    def _check_stored(
        self, stored: Mapping[int, Tensor], rows: Sequence[TokenRow], spec: ValueSpec
    ) -> None:
        """Compares the longest stored row with the model now.

        In a short one, such as the empty coalition, attention has little or no effect.
        """
        i = max(stored, key=lambda i: len(rows[i].ids), default=None)
        if i is None or len(rows[i].ids) <= self._trusted:
            return
        [values] = self._passes.in_one_batch([rows[i]], spec)
        check_same(
            values,
            stored[i],
            self.tolerance(values),
            whose="the checkpoint holds values",
            advice="Give another file, or delete this one to begin anew.",
        )
        self._trusted = len(rows[i].ids)

    def _take_in(
        self,
        results: Iterable[tuple[int, Sequence[int], Tensor]],
        keys: Sequence[bytes],
        rows: Sequence[TokenRow],
    ) -> None:
        for replica, batch, values in results:
            self.n_scored[replica] += len(batch)
            scored = [(keys[i], rows[i], own) for i, own in zip(batch, values, strict=True)]
            self._keep(scored)
            if self._journal is not None:
                self._journal.add([key for key, _, _ in scored], values)

    def _keep(self, scored: Sequence[tuple[bytes, TokenRow, Tensor]]) -> None:
        self._known.update((key, values) for key, _, values in scored)
        self.n_row_positions += sum(len(row.ids) for _, row, _ in scored)
        self.n_evaluations += len(scored)
        self._bar.advance(len(scored))

    def progress(self) -> AbstractContextManager[None]:
        """Shows one bar over all evaluations within, over any number of calls."""
        return self._bar.shown()

    @contextmanager
    def keeping(self, open_journal: Callable[[], Journal] | None) -> Generator[None]:
        """Saves values within as they are found, and reuses those of an earlier run.

        Args:
            open_journal: Opens the journal, on the main process only. None: no journal.
        """
        if open_journal is None:
            yield
            return
        self._batching.repeats = True
        try:
            if self._processes.is_main:
                self._journal = open_journal()
            self._generated = self._processes.decide(lambda: self._journal and self._journal.target)
            yield
        finally:
            if self._journal is not None:
                self._journal.close()

    def forecast(self, n_rows: int) -> None:
        """Shows in the bar how many evaluations are probably still needed; 0 removes it."""
        self._bar.note(f"about {n_rows} more" if n_rows > 0 else "")


def _apart_where_alike(rows: Sequence[TokenRow], values: Tensor) -> float:
    """Largest difference between values of a token after the same ids, in rows that continue."""
    # Among rows with a common prefix, neighbours share the longest one.
    order, shared = sort_by_prefix([row.ids for row in rows], [len(row.ids) for row in rows])
    largest = 0.0
    for (i, j), n_alike in zip(pairwise(order), shared[1:], strict=True):
        one, other = rows[i], rows[j]
        if one.key != other.key or one.extras is not None:
            continue
        places = enumerate(zip(one.positions, other.positions, strict=True))
        alike = [t for t, (p, q) in places if 0 <= p == q < n_alike]
        if alike:
            apart = (values[i, alike] - values[j, alike]).abs().nan_to_num(nan=0.0)
            largest = max(largest, float(apart.max()))
    return largest


def _digest_of(keys: Sequence[bytes]) -> bytes:
    return blake2b(b"".join(keys), digest_size=16).digest()


def _check(values: Tensor, rows: Sequence[TokenRow], spec: ValueSpec) -> None:
    wanted = (
        torch.tensor([list(row.positions) for row in rows], dtype=torch.int64, device="cpu") >= 0
    )
    is_bad = values.isnan() if spec.n_likeliest else ~values.isfinite()
    bad = (is_bad & wanted.repeat(1, spec.per_token)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        kind, token = divmod(column, len(spec))
        what = "all foils of " * kind + f"target token {token} (id {int(spec.target[token])})"
        what = "tokens" if spec.n_likeliest else what
        raise ValueError(
            f"the model gives {values[row, column].item()} to {what} after a row of "
            f"{len(rows[row].ids)} tokens. Values must be finite: load half-precision models "
            "in bfloat16 or float32, check the weights for NaN, and do not explain a token that "
            "the model rules out, or against such a one."
        )
