"""Arguments of attribution by gradients: an argument without effect is an error."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from captum.attr import (
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from captum.attr._utils.attribution import GradientAttribution
from torch import Tensor

from captum_llm_ext.attribution.gradient.path_groups import Absent
from captum_llm_ext.base.arguments import check_counts
from captum_llm_ext.methods import EquivalentLinearSystem, LayerSaliency
from captum_llm_ext.methods.path_methods import Points, points_of
from captum_llm_ext.text.segment import Unit

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
# Draws of random baselines whose mean embedding replaces an absent feature: 8 same-slot texts named
# .99 of the known causes, one of them .93 (benchmarks/results/gradients.json).
_N_DRAWS = 8
# Arguments of `torch.autograd.grad` that the package decides.
_DECIDED = ("outputs", "inputs", "grad_outputs", "retain_graph", "create_graph", "is_grads_batched")


@dataclass(frozen=True, kw_only=True)
class GradientArguments:
    """Arguments of `GenerationGradientAttribution.attribute` on method, path and absence."""

    output_unit: Unit | None
    output_baselines: Any
    seed: int
    n_draws: int | None
    absent: Absent
    baselines: Any
    n_steps: int | None
    method: str | None
    internal_batch_size: int | None
    n_samples: int | None
    stdevs: float | tuple[float, ...] | None
    attribute_to_layer_input: bool
    grad_kwargs: Mapping[str, Any] | None
    return_convergence_delta: bool

    def points(self, attr_method: GradientAttribution) -> Points:
        """The points of the method's path, after a check that every argument has an effect.

        Args:
            attr_method: A supported method.

        Raises:
            ValueError: If an argument belongs to another method, is set by the package itself, is
                out of range, or is overridden by another one.
        """
        self._check_own(attr_method)
        self._check_range()
        points = points_of(
            attr_method,
            n_steps=self.n_steps,
            rule=self.method,
            n_samples=self.n_samples,
            stdevs=self.stdevs,
            seed=self.seed,
        )
        self._check_used(points)
        return points

    def is_zero(self, points: Points) -> bool:
        """Whether the zero vector replaces all absent features."""
        return points.from_zero or self.absent == "zero"

    def n_draws_of(self, points: Points, *, deterministic: bool) -> int:
        """Number of draws of the baselines.

        Args:
            points: The method's points.
            deterministic: Whether every draw is the same.

        Raises:
            ValueError: If several draws are wanted that are all the same.
        """
        if deterministic and self.n_draws is not None:
            raise ValueError(
                "`n_draws` would be ignored: every draw of these baselines is the same. Random "
                "ones are lists of several texts, or `CorpusBaselines(texts)`."
            )
        return 1 if deterministic or self.is_zero(points) else self.n_draws or _N_DRAWS

    def _check_own(self, attr_method: GradientAttribution) -> None:
        """Raises for arguments of another method, or that the package sets itself."""
        takes = _OWN[type(attr_method)]
        for name in dict.fromkeys(taken for each in _OWN.values() for taken in each):
            if getattr(self, name) is not None and name not in takes:
                known = ", ".join(f"`{taken}`" for taken in takes)
                raise ValueError(
                    f"`{name}` has no meaning for {type(attr_method).__name__} and would be "
                    f"ignored: its own arguments are {known}."
                )
        wrong = sorted(set(self.grad_kwargs or ()) & set(_DECIDED))
        if wrong:
            raise ValueError(
                f"`grad_kwargs` holds {wrong[0]!r}, which is set internally: only `allow_unused` "
                "and `materialize_grads` can be given."
            )

    def _check_range(self) -> None:
        """Raises for arguments out of range."""
        if self.return_convergence_delta:
            raise ValueError(
                "`return_convergence_delta` would be ignored: `efficiency_gap` of the result is it."
            )
        if self.absent not in ("baseline", "zero"):
            raise ValueError(f"`absent` is {self.absent!r}: give 'baseline' or 'zero'.")
        check_counts(n_draws=self.n_draws, internal_batch_size=self.internal_batch_size)

    def _check_used(self, points: Points) -> None:
        """Raises for arguments about absent features that another argument overrides."""
        is_zero, is_held = self.is_zero(points), self.output_unit is None
        if self.n_draws is not None and (points.is_sampled or is_zero):
            why = "nothing is drawn" if is_zero else "every one of `n_samples` is a draw"
            raise ValueError(f"`n_draws` would be ignored: {why}.")
        if self.output_baselines is not None and (is_held or is_zero):
            why = (
                "`output_unit=None` holds it fixed"
                if is_held
                else "what is absent is the zero vector"
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
