"""Checks a model's values on this machine, and which shortcuts scoring takes."""

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
from torch import Tensor

from captum_llm_ext import _compat
from captum_llm_ext.model import Scorer, TokenRow
from captum_llm_ext.model.forward.draws import repeated_draws
from captum_llm_ext.model.forward.rounding import rounding
from captum_llm_ext.model.probe import Findings
from captum_llm_ext.text import tokens

_TEXT = (
    "Dave lives in Palm Coast, FL and is a lawyer. Ann, who came from Austin in 1998, teaches "
    "music at a small school near the river and plays chess with her neighbours on Sundays."
)
_ANSWER = " They meet at the harbour and talk about the weather."
# Tokens: checking a large model on a CPU takes seconds; chosen, not measured.
_LONGEST_PROMPT, _LONGEST_ANSWER = 48, 8
# For captum, which runs every row token by token; chosen, not measured.
_SHORT_PROMPT, _SHORT_ANSWER = 8, 4


@dataclass(frozen=True)
class Probe:
    """The findings of the check.

    Attributes:
        dtype: Dtype of the weights.
        n_rows: Number of distinct rows scored.
        rounding: Differences in nats that rounding explains for this dtype and model.
        found: Findings of `model.probe`, which determine how the model is run.
        noise_floor: Largest difference of a value due to batching, or to random draws; None if
            below float32 rounding.
        whole_error: Largest difference of the package's values to one plain uncached forward pass
            per row, if every row is computed completely.
        shared: Share of the rows' positions that were computed with prefix reuse; None without it.
        shared_error: Like `whole_error`, with prefix reuse; None without it.
        why_not_shared: Scoring's message on prefix reuse, if any.
        no_copy_error: Like `whole_error`, if rows attend to a shared prefix without copies; None
            otherwise.
        packed_error: Like `whole_error`, with packed rows; None without packing.
        logits: How logits of some positions are requested: ``"positions"``, ``"count"`` or None
            (all).
        captum_error: Largest difference of an attribution between captum's default and captum
            without its cache; None if captum fails.
        captum_failed: Its error, or why it was not tried.
    """

    dtype: str
    n_rows: int
    rounding: float
    found: Findings
    noise_floor: float | None
    whole_error: float
    shared: float | None
    shared_error: float | None
    why_not_shared: str | None
    no_copy_error: float | None
    packed_error: float | None
    logits: str | None
    captum_error: float | None
    captum_failed: str | None

    @property
    def is_right(self) -> bool:
        """Whether the package's values are those of plain forward passes, up to rounding."""
        others = (self.shared_is_exact, self.no_copy_is_exact, self.packed_is_exact)
        return self.whole_is_exact and False not in others

    @property
    def limit(self) -> float:
        """Allowed difference in nats from plain forward passes, which may draw differently."""
        if self.found.draws in (None, "seeded") or self.noise_floor is None:
            return self.rounding
        return max(self.rounding, self.noise_floor)

    @property
    def whole_is_exact(self) -> bool:
        """Whether rows computed completely have the values of plain forward passes."""
        return self.whole_error <= self.limit  # False for NaN

    @property
    def shared_is_exact(self) -> bool | None:
        """The same with prefix reuse; None without it."""
        return self._is_exact(self.shared_error)

    @property
    def no_copy_is_exact(self) -> bool | None:
        """The same for shared prefixes; None without them."""
        return self._is_exact(self.no_copy_error)

    @property
    def packed_is_exact(self) -> bool | None:
        """The same for packed rows; None without them."""
        return self._is_exact(self.packed_error)

    def _is_exact(self, error: float | None) -> bool | None:
        return None if error is None else error <= self.limit

    @property
    def captum_is_right(self) -> bool | None:
        """The same for captum's default; None if it fails."""
        if self.captum_error is None:
            return None
        return (
            self.captum_error <= 2 * self.rounding
        )  # an attribution is a difference of two values

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        ways = ("whole_is_exact", "shared_is_exact", "no_copy_is_exact", "packed_is_exact")
        names = ("is_right", *ways, "captum_is_right")
        found = {"found": self.found.provenance(), "batched": not self.found.apart}
        return asdict(self) | found | {name: getattr(self, name) for name in names}


def probe(model: Any, tokenizer: Any) -> Probe:
    """Runs a model on about sixty short rows.

    Raises:
        ValueError: If the tokenizer gives ids outside the model's vocabulary, or none at all.
    """
    prompt, target = _ids(model, tokenizer)
    rows = _rows(prompt, target)
    wanted = torch.tensor(target, dtype=torch.int64, device="cpu")
    plain = Scorer(model, reuse="off")
    whole = plain.values(rows, wanted)
    floor = plain.noise_floor(rows[0], wanted)
    found = plain.findings
    assert found is not None
    # Overhead 0: the question is not whether sharing pays on such short rows.
    sharing = Scorer(model, overhead=0, reuse="copy")
    with _warnings_of("captum_llm_ext.model") as logged:
        shared = sharing.values(rows, wanted)
    seed = 0 if found.seeds else None
    expected = _plain_values(model, rows, wanted, apart=found.step_by_step, seed=seed)
    sharing, packed = (
        Scorer(model, overhead=0, reuse="share"),
        Scorer(model, overhead=0, reuse="pack"),
    )
    with _warnings_of("captum_llm_ext.model"):  # the same ones
        by_sharing, by_pack = (scorer.values(rows, wanted) for scorer in (sharing, packed))

    def error(values: Tensor) -> float:
        return float((values - expected).abs().max())

    share = sharing.n_positions / sharing.n_row_positions
    captum_error, captum_failed = None, "not compared: the model draws at random"
    if found.draws is None:
        captum_error, captum_failed = _captum_error(model, tokenizer, target)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return Probe(
        dtype=str(dtype).removeprefix("torch."),
        n_rows=sharing.n_evaluations,
        rounding=max(rounding(dtype), found.moved.explained if found.moved else 0.0),
        found=found,
        noise_floor=None if floor is None else float(floor.max()),
        whole_error=error(whole),
        shared=share if share < 1 else None,
        shared_error=error(shared) if share < 1 else None,
        why_not_shared="; ".join(logged) or None,
        no_copy_error=error(by_sharing) if sharing.shares_cache else None,
        packed_error=error(by_pack) if packed.uses_packing else None,
        logits=_compat.kept_logits(model),
        captum_error=captum_error,
        captum_failed=captum_failed,
    )


def _ids(model: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    target = tokenizer.encode(_ANSWER, add_special_tokens=False)[:_LONGEST_ANSWER]
    most = _compat.longest_sequence(model) or _LONGEST_PROMPT
    prompt = list(tokens.encode(tokenizer, _TEXT).ids)[: min(_LONGEST_PROMPT, most - len(target))]
    if len(prompt) < 2 or not target:
        raise ValueError("the tokenizer makes no tokens of English text: nothing can be probed.")
    return prompt, target


def _rows(prompt: Sequence[int], target: Sequence[int]) -> list[TokenRow]:
    """The prompt, without each token, and without each span from its middle: of many lengths."""
    half = len(prompt) // 2
    prompts = [
        list(prompt),
        *([*prompt[:i], *prompt[i + 1 :]] for i in range(1, len(prompt))),
        *([*prompt[:half], *prompt[stop:]] for stop in range(half + 2, len(prompt))),
    ]
    return [
        TokenRow((*ids, *target[:-1]), range(len(ids) - 1, len(ids) - 1 + len(target)))
        for ids in prompts
    ]


@torch.no_grad()
def _plain_values(
    model: Any, rows: Sequence[TokenRow], target: Tensor, *, apart: bool, seed: int | None
) -> Tensor:
    """One uncached, unpadded forward pass per row, or per target token with nothing after it.

    If the model draws at random, the seeds of the run are used, if possible.
    """
    arguments = _compat.uncached(model)

    def logits(ids: Sequence[int]) -> Tensor:
        given = torch.tensor([ids], device=_compat.input_device(model), dtype=torch.int64)
        with repeated_draws(seed, given):
            found = _compat.sequence_logits(_compat.called(model, given, **arguments))[0]
        return found if apart else found[-len(ids) :]  # without the logits of a soft prompt

    found: list[Tensor] = []
    for row in rows:
        if apart:
            at_target = torch.stack([logits(row.ids[: place + 1])[-1] for place in row.positions])
        else:
            at_target = logits(row.ids)[list(row.positions)]
        found.append(at_target.double().log_softmax(-1).cpu().gather(1, target[:, None])[:, 0])
    return torch.stack(found)


def _captum_error(
    model: Any, tokenizer: Any, target: Sequence[int]
) -> tuple[float | None, str | None]:
    """Difference of captum's default from captum without its cache, or why it is unknown."""
    try:
        text = tokenizer.decode(tokenizer.encode(_TEXT, add_special_tokens=False)[:_SHORT_PROMPT])
        inp = TextTokenInput(text, tokenizer)
        attribution = LLMAttribution(FeatureAblation(model), tokenizer)
        ids = torch.tensor(target[:_SHORT_ANSWER], dtype=torch.int64, device="cpu")
        cached, right = (
            attribution.attribute(inp, ids, use_cached_outputs=cached).token_attr
            for cached in (True, False)
        )
        if cached is None or right is None:
            return None, "it gives no attribution per token"
        return float((cached - right).abs().max()), None
    except Exception as error:  # captum's default may raise anything
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def _warnings_of(name: str) -> Generator[list[str]]:
    """Collects the warnings of a logger instead of showing them."""
    logged: list[str] = []
    logger = logging.getLogger(name)
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield logged
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
