"""`FeatureInclusion`: what each feature does alone, the complement of captum's ablation."""

from typing import Any

from captum.attr._utils.attribution import PerturbationAttribution

from captum_llm_ext.coalitions import (
    Scope,
    join_plans,
    plan_anchors,
    plan_only_one_in,
    solve_only_one_in,
)
from captum_llm_ext.methods.tensors import TensorGame, Tensors


class FeatureInclusion(PerturbationAttribution):
    """What the model gains when one feature alone is present: ``only - empty``.

    `FeatureAblation` finds what is necessary, and misses what two features both say; this finds
    what suffices. Attributions need not sum to anything.

    Args:
        forward_func: The model, or any forward that captum's methods take.
    """

    def attribute(  # captum's arguments in captum's order  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
        inputs: Tensors,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Tensors | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Tensors:
        """Inclusion of plain tensors' features, with the arguments of captum's `FeatureAblation`.

        Args:
            inputs: One tensor or a tuple, the batch first.
            baselines: What stands where a feature is absent. None: 0.
            target: Which output, as in captum.
            additional_forward_args: Passed to the forward.
            feature_mask: As in captum: elements with equal numbers are one feature.
            perturbations_per_eval: Coalitions per call of the forward.
            show_progress: Whether a bar over the forward's calls is shown.

        Returns:
            Attributions of the inputs' shape; where the forward returns one value for all rows,
            their first dimension is 1.
        """
        game = TensorGame(
            self.forward_func,
            inputs,
            baselines,
            target,
            additional_forward_args,
            feature_mask,
            perturbations_per_eval,
            show_progress,
        )
        n = len(game.features)
        plan = join_plans([plan_anchors(n), plan_only_one_in(n, common_draw=True)])
        values = game.values(plan)
        scope = Scope.of_all(values.shape[1], n)
        return game.attributions(solve_only_one_in(plan, values, scope).attributions)
