"""Surrogates, which replace the model on most coalitions: a coarser copy, another model, or a
scorer.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from captum_llm_ext import _compat
from captum_llm_ext.base.digest import describe
from captum_llm_ext.model import AttrTarget, Processes, RowScorer, Scorer, model_identity
from captum_llm_ext.model.probe.state import State, differences, state_of
from captum_llm_ext.model.scoring.progress import Shown

# Model cost over that of a scorer of unknown cost. Chosen, not measured: between one as large as
# the model and one that costs nothing.
_UNKNOWN_WORK = 8.0
_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Surrogate:
    """A cheaper approximation of the model.

    Args:
        of: The model.
        given: ``"bf16"`` or ``"float16"``: a copy of it in that dtype, made on first use and kept
            while the model is unchanged; another model over the same vocabulary; or a scorer.

    Raises:
        TypeError: If `given` is none of these.
        ValueError: If it is the model itself, the model has no higher precision than the copy, or
            the vocabularies differ.
    """

    of: nn.Module
    given: "str | nn.Module | RowScorer"
    _model: nn.Module | None = field(default=None, init=False, repr=False)
    _copied: State | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        given = self.given
        if isinstance(given, str):
            _check_named(self.of, given)
        elif isinstance(given, nn.Module):
            _compat.check_causal(given)
            if given is self.of:
                raise ValueError(
                    '`surrogate` is the model itself: give a faster one, or "bf16" for a copy.'
                )
            own, other = (_compat.vocabulary_size(model) for model in (self.of, given))
            if own is not None and other is not None and own != other:
                raise ValueError(
                    f"`surrogate` has a vocabulary of {other} tokens, the model one of {own}: give "
                    "one that reads the same ids."
                )
            self._model = given
        elif not callable(getattr(given, "values", None)):
            raise TypeError(
                f'`surrogate` is a {type(given).__name__}: give "bf16", a model or a scorer.'
            )

    def scorer(
        self,
        attr_target: AttrTarget,
        max_rows: int | None,
        show_progress: Shown,
        processes: Processes | None,
    ) -> RowScorer:
        """A scorer of the surrogate's values.

        Raises:
            ValueError: If a given scorer has another kind of values.
        """
        model = self._own()
        if model is not None:
            return Scorer(
                model,
                attr_target=attr_target,
                max_rows=max_rows,
                show_progress=show_progress,
                processes=processes,
            )
        given: Any = self.given
        if given.attr_target != attr_target:
            raise ValueError(
                f"the surrogate scores {given.attr_target!r}, and {attr_target!r} is explained: "
                "give one with the same `attr_target`."
            )
        return given

    @property
    def work_of_model(self) -> float:
        """The model's cost per token over the surrogate's, by bytes of weights read.

        Counted rather than timed, so that equal seeds score the same coalitions on any machine.
        """
        model = self._own() or getattr(self.given, "model", None)
        own = _weights_read(model) if isinstance(model, nn.Module) else 0
        return _weights_read(self.of) / own if own else _UNKNOWN_WORK

    def identity(self) -> dict[str, Any]:
        """What the surrogate's values depend on, as JSON values."""
        if isinstance(self.given, str):
            return {"copy": str(_DTYPES[self.given]).removeprefix("torch.")}
        if self._model is not None:
            return dict(model_identity(self._model))
        return {"scorer": type(self.given).__name__, "settings": describe(self.given)}

    @property
    def name(self) -> str:
        """A name for messages."""
        if isinstance(self.given, str):
            return self.identity()["copy"]
        return type(self.given).__name__

    def _own(self) -> nn.Module | None:
        if not isinstance(self.given, str):
            return self._model
        now = state_of(self.of)
        if self._copied is None or differences(self._copied, now):
            self._model = None  # freed before another copy is made
            try:
                copied = copy.deepcopy(self.of)
            except Exception as error:
                raise ValueError(
                    f"the model cannot be copied ({type(error).__name__}: {error}): load it once "
                    "more in a coarser type, and give that as `surrogate`."
                ) from error
            self._model = copied.to(_DTYPES[self.given]).eval()
            self._copied = now
        return self._model


def _weights_read(model: nn.Module) -> int:
    """Bytes of weights that every token reads: all but an embedding table."""
    table = _compat.embeddings(model, "get_input_embeddings")
    head = _compat.embeddings(model, "get_output_embeddings")
    left_out: set[int] = set()
    if isinstance(table, nn.Module):
        left_out = {id(weight) for weight in table.parameters()}
    if isinstance(head, nn.Module):  # which may be tied to the embedding
        left_out -= {id(weight) for weight in head.parameters()}
    weights = (weight for weight in model.parameters() if id(weight) not in left_out)
    return sum(weight.numel() * weight.itemsize for weight in weights)


def _check_named(model: nn.Module, name: str) -> None:
    if name not in _DTYPES:
        known = ", ".join(map(repr, _DTYPES))
        raise ValueError(f"`surrogate` is {name!r}: give one of {known}, a model or a scorer.")
    sizes = {p.dtype.itemsize for p in model.parameters() if p.is_floating_point()}
    if not sizes or min(sizes) <= _DTYPES[name].itemsize:
        raise ValueError(
            f"`surrogate` is {name!r}, and the model is no finer than that: leave it out, or give "
            "another model or a scorer."
        )
