"""Foreign methods: the user's own captum methods, run through their own ``attribute``."""

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from captum.attr import LimeBase
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor

from captum_llm_ext.base.seeded import seeded
from captum_llm_ext.coalitions import Plan

# Rows per call of a foreign method; the scorer splits them if memory is short. Chosen, not
# measured.
_DEFAULT_BATCH = 32


@dataclass(frozen=True)
class ForeignAttribution:
    """Attributions of a foreign method, with the coalitions that it scored.

    Attributes:
        attributions: ``(n_target, n_features)``, float64.
        plan: The coalitions it scored.
        values: ``(n_coalitions, n_target)``.
    """

    attributions: Tensor
    plan: Plan
    values: Tensor


def attribute_foreign(
    method: PerturbationAttribution,
    values: Callable[[Plan], Tensor],
    n_features: int,
    *,
    n_target: int,
    num_trials: int,
    seed: int,
    arguments: Mapping[str, Any],
) -> ForeignAttribution:
    """Runs a captum method with the values of coalitions as its forward function.

    Args:
        method: The method; the user's object is not modified.
        values: Scores the coalitions of a plan, ``(n_coalitions, n_target)``.
        n_features: Columns of a coalition.
        n_target: Values per coalition.
        num_trials: Repetitions, averaged.
        seed: Seeds what the method draws from torch's global generator, whose state is restored.
        arguments: Passed to the method's ``attribute``.

    Returns:
        The mean attributions over the trials, and every coalition that was scored.

    Raises:
        ValueError: If the method returns attributions of a shape other than ``(n_outputs,
            n_features)``.
    """
    record = _RecordingScorer(values)
    method = copy(method)
    arguments = dict(arguments)
    if "perturbations_per_eval" in inspect.signature(cast(Any, method).attribute).parameters:
        arguments.setdefault("perturbations_per_eval", _DEFAULT_BATCH)
    total = torch.zeros(n_target, n_features, dtype=torch.float64, device="cpu")
    for trial in range(num_trials):
        total += _one_trial(method, record, n_features, n_target, seed + trial, arguments)
    masks, scored = torch.cat(record.masks), torch.cat(record.values)
    plan = Plan(masks, torch.arange(len(masks), device="cpu"))
    return ForeignAttribution(total / num_trials, plan, scored)


def fits_one_number(method: PerturbationAttribution) -> bool:
    """Whether a method fits its own model to one number per coalition."""
    return isinstance(method, LimeBase)


class _RecordingScorer:
    """Scores perturbed tensors and records them as coalitions."""

    def __init__(self, values: Callable[[Plan], Tensor]) -> None:
        self._score, self._default_device = values, torch.get_default_device()
        self.masks: list[Tensor] = []
        self.values: list[Tensor] = []

    def column(self, column: int | slice, perturbed: Tensor) -> Tensor:
        """Values of one target, or of all, for rows of ones (present) and zeros."""
        masks = (perturbed > 0.5).cpu()
        with torch.device(self._default_device):
            values = self._score(Plan(masks, torch.arange(len(masks), device="cpu")))
        self.masks.append(masks)
        self.values.append(values)
        return values[:, column]


def _one_trial(
    method: Any,
    record: _RecordingScorer,
    n_features: int,
    n_target: int,
    seed: int,
    arguments: Mapping[str, Any],
) -> Tensor:
    """Attributions of all targets; methods that fit one number run once per target."""
    inputs = torch.ones(1, n_features, dtype=torch.float32, device="cpu")
    # One target at a time, but with the same coalitions, which are scored once.
    columns = list(range(n_target)) if fits_one_number(method) else [slice(None)]
    found: list[Tensor] = []
    for column in columns:
        method.forward_func = partial(record.column, column)
        # New tensors belong on the inputs' device, whatever the user's default device is.
        with torch.device(inputs.device), seeded(seed):
            attributed = method.attribute(inputs, **arguments)
        if attributed.shape[-1:] != (n_features,):
            raise ValueError(
                f"{type(method).__name__}.attribute returned shape {tuple(attributed.shape)} for "
                f"{n_features} features: captum's methods give (n_outputs, n_features)."
            )
        found.append(attributed.detach().double().cpu().flatten())
    result = torch.cat(found)
    if result.numel() != n_target * n_features:
        raise ValueError(
            f"{type(method).__name__}.attribute returned {result.numel()} numbers for {n_target} "
            f"target tokens and {n_features} features: give one for each pair."
        )
    return result.reshape(n_target, n_features)
