"""Checks arguments of attribution by gradients: an argument without effect is an error."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from captum.attr import (
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from torch import Tensor

from captum_llm_ext.base.arguments import check_counts
from captum_llm_ext.methods import EquivalentLinearSystem, LayerSaliency
from captum_llm_ext.methods.path_methods import Points

# Arguments of captum's `attribute` methods that have a meaning here; `internal_batch_size` has one
# for every method with several points.
_OWN: dict[type, tuple[str, ...]] = {
    LayerIntegratedGradients: (
        "n_steps",
        "method",
        "internal_batch_size",
        "baselines",
        "grad_kwargs",
    ),
    LayerGradientXActivation: ("grad_kwargs",),
    LayerSaliency: ("grad_kwargs",),
    EquivalentLinearSystem: ("grad_kwargs",),
    LayerGradientShap: ("n_samples", "stdevs", "baselines", "internal_batch_size"),
}
_DECIDED = ("outputs", "inputs", "grad_outputs", "retain_graph", "create_graph", "is_grads_batched")


def check_own(method: object, given: Mapping[str, Any]) -> None:
    """Raises for arguments of another method, or that the package sets itself.

    Args:
        method: A supported method.
        given: Arguments by name; None for those not given.

    Raises:
        ValueError: If there is such an argument.
    """
    takes = _OWN[type(method)]
    for name, value in given.items():
        if value is not None and name not in takes:
            known = ", ".join(f"`{taken}`" for taken in takes)
            raise ValueError(
                f"`{name}` has no meaning for {type(method).__name__} and would be ignored: its "
                f"own arguments are {known}."
            )
    wrong = sorted(set(given.get("grad_kwargs") or ()) & set(_DECIDED))
    if wrong:
        raise ValueError(
            f"`grad_kwargs` holds {wrong[0]!r}, which is set internally: only `allow_unused` "
            "and `materialize_grads` can be given."
        )


def check_common(
    *,
    absent: str,
    n_draws: int | None,
    internal_batch_size: int | None,
    return_convergence_delta: bool,
) -> None:
    """Raises for arguments out of range.

    Raises:
        ValueError: If an argument is out of range.
    """
    if return_convergence_delta:
        raise ValueError(
            "`return_convergence_delta` would be ignored: `efficiency_gap` of the result is it."
        )
    if absent not in ("baseline", "zero"):
        raise ValueError(f"`absent` is {absent!r}: give 'baseline' or 'zero'.")
    check_counts(n_draws=n_draws, internal_batch_size=internal_batch_size)


def check_used(
    points: Points, *, is_zero: bool, n_draws: int | None, output_baselines: Any, is_held: bool
) -> None:
    """Raises for arguments about absent features that another argument overrides.

    Args:
        points: The method's points.
        is_zero: Whether the zero vector replaces all absent features.
        n_draws, output_baselines: As the user gave them.
        is_held: Whether the output is held fixed.

    Raises:
        ValueError: If an argument would have no effect.
    """
    if n_draws is not None and (points.is_sampled or is_zero):
        why = "nothing is drawn" if is_zero else "every one of `n_samples` is a draw"
        raise ValueError(f"`n_draws` would be ignored: {why}.")
    if output_baselines is not None and (is_held or is_zero):
        why = (
            "`output_unit=None` holds it fixed" if is_held else "what is absent is the zero vector"
        )
        raise ValueError(f"`output_baselines` would be ignored: {why}.")


def present_features(baselines: Any, n_features: int, *, is_drawn: bool) -> Tensor:
    """Prompt features that are present at the start of the path, bool ``(n, n_features)``.

    Args:
        baselines: As captum takes them: None, a number or a tensor of numbers, 1 = present; if one
            is drawn per sample, several rows, or a callable that returns them.
        n_features: Number of prompt features.
        is_drawn: Whether a row is drawn per sample.

    Raises:
        ValueError: If they are something else.
    """
    if callable(baselines):
        if not is_drawn:
            raise ValueError("a callable `baselines` is for LayerGradientShap: give a tensor.")
        takes = len(inspect.signature(baselines).parameters)
        baselines = (
            baselines(torch.ones(1, n_features, dtype=torch.float32, device="cpu"))
            if takes
            else baselines()
        )
    if isinstance(baselines, tuple) and len(cast(tuple[Any, ...], baselines)) == 1:
        baselines = cast(Any, baselines)[0]
    if baselines is None or isinstance(baselines, int | float):
        return torch.full((1, n_features), baselines == 1, dtype=torch.bool, device="cpu")
    if isinstance(baselines, Tensor) and baselines.dim() == 2:
        n, width = baselines.shape
        if width == n_features and (n == 1 or (is_drawn and n > 0)):
            return (baselines == 1).cpu()
    shape = tuple(baselines.shape) if isinstance(baselines, Tensor) else type(baselines).__name__
    rows = "n" if is_drawn else "1"
    raise ValueError(
        f"`baselines` is {shape} for {n_features} features: as in captum it gives which of them "
        f"are present at the beginning, as numbers ({rows}, {n_features}). What replaces absent "
        "ones is set by the input: `TextSegmentInput(…, baselines=CorpusBaselines(texts))`."
    )
