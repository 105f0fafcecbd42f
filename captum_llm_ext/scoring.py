"""Token rows and a target in, values out: the only place where the model runs.

Each distinct row costs one teacher-forced pass that serves all target tokens. Rows are padded on
the right, without an attention mask: a causal model cannot see what comes after, and its positions
then need no telling. (A module of the user's own that does see it gets a pass for every target
token.) The model is left as it was found.
"""

import sys
from array import array
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat

AttrTarget = str | Callable[[Tensor, Tensor], Tensor]

# A CPU gains nothing from batches beyond its caches, a GPU goes on gaining for longer.
_TOKENS_PER_BATCH = {"cpu": 4096}
_TOKENS_ELSEWHERE = 65536
_CPU_BUDGET = 2**30
# A few ids tell whether a model sees ahead, and fit into any number of positions.
_PROBE = 8


@dataclass(frozen=True, slots=True)
class TokenRow:
    """What the model reads for one coalition, and where it says each target token.

    Attributes:
        ids: Token ids of the prompt and of the generated text before the last target token.
        positions: ``(n_target,)``: the place in `ids` whose logits predict the target token; -1
            where the coalition gives the token no value.
        extras: Other arguments of the model's forward, batch size 1.
        key: Tells rows apart whose extras differ.
    """

    ids: tuple[int, ...]
    positions: Sequence[int]
    extras: Mapping[str, Any] | None = None
    key: object = None


class Scorer:
    """Generates with a model and scores rows on it, each distinct row once.

    Args:
        model: A causal language model: a module that returns ``logits`` (batch, length, vocabulary)
            for ``input_ids``.
        attr_target: ``"log_prob"``, ``"prob"``, ``"logit"``, or a callable ``(logits (batch,
            n_target, vocabulary), target (n_target,)) -> (batch, n_target)``.
        max_rows: At most so many rows in a batch. By default as many as memory allows.
        show_progress: Whether `progress` draws a bar over the model's evaluations on stderr.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        attr_target: AttrTarget = "log_prob",
        max_rows: int | None = None,
        show_progress: bool = False,
    ) -> None:
        self.model = model
        self.attr_target = attr_target
        self.device = _compat.input_device(model)
        self.n_evaluations = 0
        self._max_rows = max_rows or sys.maxsize
        self._show_progress = show_progress
        self._arguments = _compat.forward_arguments(model)
        self._kept = _compat.kept_logits(model)
        self._known: dict[bytes, Tensor] = {}
        self._is_causal: bool | None = None
        self._bar: Any = None

    def generate(self, row: TokenRow, gen_args: Mapping[str, Any], seed: int) -> Tensor:
        """The token ids that the model continues a row with.

        Args:
            row: The prompt.
            gen_args: Arguments of the model's ``generate``.
            seed: Seeds sampling; the global random state is as before afterwards.

        Returns:
            Shape ``(n_target,)``, int64 on the CPU.
        """
        ids = torch.tensor([row.ids], device=self.device)
        arguments = {**self._extras(row, 0), "attention_mask": torch.ones_like(ids)}
        arguments |= _compat.padding_for_generate(self.model) | dict(gen_args)
        devices = [self.device] if self.device.type == "cuda" else []
        generate = cast(Callable[..., Any], self.model.generate)
        with self._as_found(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            output = generate(input_ids=ids, **arguments)
        sequences = cast(Tensor, getattr(output, "sequences", output))
        return sequences[0, ids.shape[1] :].cpu()

    def check_length(self, length: int, what: str) -> None:
        """Refuses rows that are longer than the model's positions.

        Raises:
            ValueError: If `length` tokens, which are `what`, do not fit.
        """
        most = _compat.longest_sequence(self.model)
        if most is not None and length > most:
            raise ValueError(
                f"{what} take {length} positions, the model has {most}: shorten the prompt or the "
                "target."
            )

    def values(self, rows: Sequence[TokenRow], target: Tensor) -> Tensor:
        """What the model gives each target token after each row.

        Args:
            rows: One token row per coalition.
            target: Token ids, shape ``(n_target,)``.

        Returns:
            Shape ``(n_rows, n_target)``, float64 on the CPU, in nats for log-probabilities; NaN
            where a row gives a token no value. Softmax and sums are taken in float32 at least.

        Raises:
            ValueError: If an id is outside the vocabulary, or the model gives NaN or an infinite
                value.
            TypeError: If the model returns no logits, or a callable target the wrong shape.
        """
        with self._as_found():
            if not self._causal(rows[0]):
                return self._values_step_by_step(rows, target)
            return self._values(rows, target)

    def _values(self, rows: Sequence[TokenRow], target: Tensor) -> Tensor:
        digests = [_digest(row, target) for row in rows]
        todo = {d: row for d, row in zip(digests, rows, strict=True) if d not in self._known}
        self._announce(len(todo))
        self._score(todo, target)
        return torch.stack([self._known[digest] for digest in digests])

    def _values_step_by_step(self, rows: Sequence[TokenRow], target: Tensor) -> Tensor:
        """One pass for every target token, with nothing after it to be seen."""
        values = torch.full((len(rows), len(target)), torch.nan, dtype=torch.float64)
        for t in range(len(target)):
            places = [row.positions[t] for row in rows]
            known = [i for i, place in enumerate(places) if place >= 0]
            ends = [
                TokenRow(rows[i].ids[: places[i] + 1], (places[i],), rows[i].extras, rows[i].key)
                for i in known
            ]
            values[known, t] = self._values(ends, target[t : t + 1])[:, 0]
        return values

    def _causal(self, row: TokenRow) -> bool:
        """Whether the model says the same of a token whatever follows it.

        Those of transformers that generate text do. A module of the user's own may not: two
        forwards tell.
        """
        if hasattr(self.model, "can_generate") or row.extras is not None:
            self._is_causal = True
        elif self._is_causal is None:
            head = row.ids[:_PROBE]
            other = int(head[0] == 0)  # without positions, repeated ids would change nothing
            ids = torch.tensor([[*head, *[other] * len(head)]], device=self.device)
            whole = _compat.sequence_logits(self.model(input_ids=ids))
            half = _compat.sequence_logits(self.model(input_ids=ids[:, : len(head)]))
            same = torch.isclose(whole[:, : len(head)], half, rtol=1e-3, atol=1e-4)
            self._is_causal = bool((same | half.isnan()).all())
        return self._is_causal

    def _score(self, todo: Mapping[bytes, TokenRow], target: Tensor) -> None:
        # Neighbours in length share a batch: little padding. The longest first: what does not fit
        # in memory fails at once.
        queue = sorted(todo, key=lambda digest: len(todo[digest].ids), reverse=True)
        while queue:
            batch = queue[: self._batch_size(todo[queue[0]], len(target))]
            if not self._is_causal:  # and so sees what a row is padded with
                lengths = [len(todo[digest].ids) for digest in batch]
                batch = batch[: lengths.count(lengths[0])]
            try:
                scored = self._forward([todo[digest] for digest in batch], target)
            except RuntimeError as error:
                if len(batch) == 1 or not _is_out_of_memory(error):
                    raise
                self._max_rows = len(batch) // 2  # decided once, kept for the rest of the run
                continue
            self._check(scored, [todo[digest] for digest in batch], target)
            self._known.update(zip(batch, scored, strict=True))
            self._advance(len(batch))
            queue = queue[len(batch) :]

    def _forward(self, rows: Sequence[TokenRow], target: Tensor) -> Tensor:
        length = max(len(row.ids) for row in rows)
        # What stands right of a row is never seen by it: its own first id is as good as any.
        ids = torch.tensor(
            [[*row.ids, *row.ids[:1] * (length - len(row.ids))] for row in rows], device=self.device
        )
        self._check_ids(ids)
        positions = torch.tensor([list(row.positions) for row in rows])
        at = positions.clamp(min=0).to(self.device)
        arguments = self._extras(rows[0], length - len(rows[0].ids))
        if "use_cache" in self._arguments:
            arguments["use_cache"] = False
        first = int(at.min())
        if self._kept == "positions":
            arguments["logits_to_keep"] = at
        elif self._kept == "count":
            arguments["logits_to_keep"] = length - first
        logits = _compat.sequence_logits(self.model(input_ids=ids, **arguments))
        if self._kept != "positions":
            at = at - (length - logits.shape[1])
            logits = logits.gather(
                1, at.to(logits.device)[..., None].expand(-1, -1, logits.shape[2])
            )
        return self._reduce(logits, target).masked_fill(positions < 0, torch.nan)

    def _check_ids(self, ids: Tensor) -> None:
        size = _compat.vocabulary_size(self.model)
        if size is not None and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise ValueError(
                f"a row holds token id {wrong}, outside the model's vocabulary of {size} tokens: "
                "check the baselines, and that tokenizer and model belong together."
            )

    def _reduce(self, logits: Tensor, target: Tensor) -> Tensor:
        """Values ``(batch, n_target)`` in float64 on the CPU from logits, row by row."""
        target = target.to(logits.device)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        rows: list[Tensor] = []
        for row in logits:  # a copy in float32 exists of one row at a time
            row = row.to(dtype).unsqueeze(0)
            if not isinstance(self.attr_target, str):
                found = self.attr_target(row, target)
                if not isinstance(found, Tensor) or found.shape != (1, len(target)):
                    raise TypeError(
                        f"`attr_target` returned {getattr(found, 'shape', type(found).__name__)} "
                        f"for logits of shape {tuple(row.shape)}: return (batch, n_target)."
                    )
            else:
                found = row.gather(2, target.view(1, -1, 1)).squeeze(2)
                if self.attr_target != "logit":
                    found = found - row.logsumexp(2)
                if self.attr_target == "prob":
                    found = found.exp()
            rows.append(found.detach())
        return torch.cat(rows).cpu().double()

    def _check(self, scored: Tensor, rows: Sequence[TokenRow], target: Tensor) -> None:
        wanted = torch.tensor([list(row.positions) for row in rows]) >= 0
        bad = (~scored.isfinite() & wanted).nonzero()
        if len(bad):
            row, token = bad[0].tolist()
            raise ValueError(
                f"the model gives {scored[row, token].item()} to target token {token} (id "
                f"{int(target[token])}) after a row of {len(rows[row].ids)} tokens. Values must be "
                "finite: load half-precision models in bfloat16 or float32, check the weights for "
                "NaN, and do not explain a token that the model rules out."
            )

    def _batch_size(self, row: TokenRow, n_target: int) -> int:
        if row.extras is not None:
            return 1  # pixel values and the like are made for one prompt each
        length = len(row.ids)
        config = _compat.text_config(self.model)
        itemsize = next((p.element_size() for p in self.model.parameters()), 4)
        hidden = int(getattr(config, "hidden_size", 0) or 1024)
        vocabulary = _compat.vocabulary_size(self.model) or 2**15
        kept = n_target if self._kept == "positions" else length
        # Logits, and a layer's activations: measured peaks lie below 24 vectors per token.
        per_row = kept * vocabulary * (itemsize + 6) + 24 * length * hidden * max(itemsize, 4)
        tokens = _TOKENS_PER_BATCH.get(self.device.type, _TOKENS_ELSEWHERE)
        return max(1, min(self._max_rows, self._budget() // per_row, tokens // length))

    def _budget(self) -> int:
        """Bytes a batch may take."""
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            cached = torch.cuda.memory_reserved(self.device)
            cached -= torch.cuda.memory_allocated(self.device)
            return (free + cached) // 2
        return _CPU_BUDGET

    def _extras(self, row: TokenRow, padding: int) -> dict[str, Any]:
        """The row's other arguments; those with one entry per token are made as long as its ids."""
        arguments: dict[str, Any] = {}
        for name, value in (row.extras or {}).items():
            if isinstance(value, Tensor):
                value = value.to(self.device)
                if name.endswith("token_type_ids"):
                    short = len(row.ids) + padding - value.shape[-1]
                    value = nn.functional.pad(value, (0, short))
            arguments[name] = value
        return arguments

    @contextmanager
    def _as_found(self) -> Generator[None]:
        """Evaluation mode without gradients; every module's own mode is put back, come what may."""
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def progress(self) -> Generator[None]:
        """Draws one bar over all evaluations within, whatever number of calls they come in."""
        if not self._show_progress:
            yield
            return
        from tqdm.auto import tqdm  # captum and transformers both bring it

        with tqdm(total=0, desc="model evaluations", unit="row") as self._bar:
            yield

    def _announce(self, n_rows: int) -> None:
        if self._bar is not None:
            self._bar.total += n_rows
            self._bar.refresh()

    def _advance(self, n_rows: int) -> None:
        self.n_evaluations += n_rows
        if self._bar is not None:
            self._bar.update(n_rows)


def _digest(row: TokenRow, target: Tensor) -> bytes:
    """Equal for rows that the model cannot tell apart."""
    parts = (array("q", row.ids), array("q", row.positions), array("q", target.tolist()))
    content = blake2b(digest_size=16)
    for part in parts:
        content.update(len(part).to_bytes(8) + part.tobytes())
    content.update(repr(row.key).encode())
    return content.digest()


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in text for words in ("out of memory", "not enough memory", "can't allocate memory")
    )
