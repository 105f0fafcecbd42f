"""`FeatureInclusion`: the effect of each feature alone, the complement of captum's ablation."""

from typing import Any

from captum.attr._utils.attribution import PerturbationAttribution

from captum_llm_ext.coalitions import plan_only_one_in, solve_only_one_in
from captum_llm_ext.methods.tensor_game import TensorGame, Tensors


class FeatureInclusion(PerturbationAttribution):
    """The gain in value when one feature alone is present: ``only - empty``.

    `FeatureAblation` finds what is necessary, and misses what two features both provide; this finds
    what is sufficient. Attributions are not complete.

    Args:
        forward_func: The model, or any forward function that captum's methods accept.
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
        """Feature inclusion for plain tensors.

        Args:
            inputs, baselines, target, additional_forward_args, feature_mask: As in captum's
                `FeatureAblation`; see `TensorGame`.
            perturbations_per_eval, show_progress: As in captum, for calls of the forward function.

        Returns:
            Attributions of the inputs' shape; if the forward function returns one value for all
            rows, the first dimension is 1.
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
        plan = plan_only_one_in(len(game.features), common_draw=True)
        return game.attribute(lambda score, _: (plan, score(plan)), solve_only_one_in)
