"""`FeatureInclusion`: what each feature does alone, the complement of captum's ablation."""

from typing import Any

from captum.attr._utils.attribution import PerturbationAttribution

from captum_llm_ext.coalitions import plan_only_one_in, solve_only_one_in
from captum_llm_ext.methods.tensor_game import TensorGame, Tensors


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
        """Inclusion of plain tensors' features.

        Args:
            inputs, baselines, target, additional_forward_args, feature_mask: As in captum's
                `FeatureAblation`; see `TensorGame`.
            perturbations_per_eval, show_progress: As there, over calls of the forward.

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
        plan = plan_only_one_in(len(game.features), common_draw=True)
        return game.attribute(lambda score, _: (plan, score(plan)), solve_only_one_in)
