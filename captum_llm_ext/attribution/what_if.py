"""Counterfactual questions for which the model generates its answer again."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

from captum.attr import InterpretableInput
from torch import Tensor, nn

from captum_llm_ext.attribution.counterfactual import (
    BUDGET,
    CounterfactualSearch,
    Flips,
    counterfactuals,
)
from captum_llm_ext.attribution.game import Run
from captum_llm_ext.attribution.model_access import ModelAccess
from captum_llm_ext.attribution.total_effect import TotalEffect, total_effect
from captum_llm_ext.base.arguments import at_least_one, check_counts
from captum_llm_ext.model import Generation, Scorer
from captum_llm_ext.text.inputs import Prompt, as_prompt

_MORE = 8  # extra tokens that a regenerated answer may have; chosen, not measured
# The model's own distribution, not that of its generation settings.
_OWN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


class WhatIf(ModelAccess):
    """Counterfactual analyses with the model of an attribution; the method does not matter."""

    def counterfactuals(
        self,
        inp: InterpretableInput,
        target: str | Tensor | Sequence[int] | None = None,
        *,
        flips: Flips = "argmax",
        token: int | Sequence[int] | None = None,
        max_size: int = 2,
        n_draws: int = 4,
        budget: int = BUDGET,
        order: Sequence[float] | Literal["saliency"] | None = "saliency",
        gen_args: Mapping[str, Any] | None = None,
        seed: int = 0,
        perturbations_per_eval: int | None = None,
        feature_mask: Tensor | None = None,
    ) -> CounterfactualSearch:
        """What would have changed the answer: few features whose replacement changes a token.

        Features are replaced by the input's baselines; the answer is teacher-forced. A set is
        minimal if no proper subset changes the token with any of the same draws. Sizes are searched
        in turn: all sets of a size if the budget allows, otherwise the most promising by the
        effects of their single features. `attr_method` does not matter here.

        Args:
            inp: The prompt, as for `attribute`.
            target: The answer; None: the model generates it.
            flips: What counts as a change: ``"argmax"``: another token is likelier than the target
                token; a number: the target token loses at least this many nats; or a callable that
                takes a `Flip`.
            token: Position of the target token to change, or several; None: all.
            max_size: Features of the largest sets.
            n_draws: Baseline draws per set.
            budget: Maximum number of rows scored; `summary` of the iterator says what was not
                searched.
            order: Priority of features, one number each (larger first), such as
                ``result.token_attr.sum(0)``. ``"saliency"``: the size of the gradient, which takes
                one forward and backward pass; None: reading order.
            gen_args: As for `attribute`; also used to regenerate answers.
            seed: Seeds the draws.
            perturbations_per_eval: Maximum number of rows per batch.
            feature_mask: As for `attribute`.

        Returns:
            An iterator that yields each counterfactual as soon as it is found, confirmed by a
            separate forward pass, with the answer that the model generates after the changed
            prompt.

        Raises:
            ValueError: If an argument is out of range, or as for `attribute`.
        """
        check_counts(max_size=max_size, n_draws=n_draws, budget=budget)
        if isinstance(flips, int | float) and not flips > 0:
            raise ValueError(f"`flips` is {flips!r}: give a number of nats above 0, such as 2.0.")
        if isinstance(flips, str) and flips != "argmax":
            raise ValueError(f"`flips` is {flips!r}: give 'argmax', a number, or a callable.")
        if isinstance(order, str) and order != "saliency":
            raise ValueError(f"`order` is {order!r}: give 'saliency', numbers, or None.")
        with self.processes.session("`counterfactuals`"):
            run, ids, generation = self._prepared(inp, target, gen_args, seed, feature_mask)
        n = run.prompt.n_features
        if order is not None and not isinstance(order, str) and len(order) != n:
            raise ValueError(f"`order` has {len(order)} numbers for {n} features: give one each.")
        chosen = range(len(ids)) if token is None else [token] if isinstance(token, int) else token
        wrong = [t for t in chosen if not -len(ids) <= t < len(ids)]
        if wrong:
            raise ValueError(f"there is no token {wrong[0]}: the target has {len(ids)}.")
        return counterfactuals(
            self.model,
            run,
            run.context.generated(ids, None, None),
            generation,
            flips=flips,
            positions=[t % len(ids) for t in chosen],
            max_size=max_size,
            n_draws=n_draws,
            budget=budget,
            order=partial(self._promising, run.prompt, ids, order, list(chosen)),
            max_rows=perturbations_per_eval,
            processes=self._shared,
        )

    def _promising(
        self,
        prompt: Prompt,
        ids: Tensor,
        order: Sequence[float] | str | None,
        positions: Sequence[int],
    ) -> Sequence[float]:
        """One priority per feature: larger ones are tried first."""
        if order is not None and not isinstance(order, str):
            return [float(number) for number in order]
        reading = [-float(feature) for feature in range(prompt.n_features)]
        if order is None or not isinstance(prompt, InterpretableInput):
            return reading
        from captum_llm_ext.attribution.gradient import GenerationGradientAttribution
        from captum_llm_ext.methods import LayerSaliency

        by_gradient = GenerationGradientAttribution(LayerSaliency(self.model), self.tokenizer)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = by_gradient.attribute(prompt, ids, output_unit=None)
        except (TypeError, ValueError, RuntimeError):  # only an order is lost
            return reading
        size = cast(Tensor, found.token_attr).abs()
        share = size / size.sum(1, keepdim=True).clamp_min(1e-30)
        return share[positions].amax(0).tolist()

    def total_effect(
        self,
        inp: InterpretableInput,
        target: str | Tensor | Sequence[int] | None = None,
        *,
        feature: int | str | Sequence[int | str] | None = None,
        n_samples: int = 16,
        gen_args: Mapping[str, Any] | None = None,
        again: Mapping[str, Any] | None = None,
        seed: int = 0,
        perturbations_per_eval: int | None = None,
        feature_mask: Tensor | None = None,
    ) -> TotalEffect:
        """How far each target token falls, in nats, if the answer is regenerated without a feature.

        An attribution holds the answer before a token fixed and so measures the direct effect of a
        feature. Here the model regenerates the answer: `n_samples` times with the original prompt,
        and as often with the feature replaced, each time by another draw of the input's baselines.
        The effect is the mean log-probability of each target token at its aligned position,
        original minus replaced. Continuations with equal index share their seed. If a feature
        hardly changes what the model generates, the answers to the original prompt are reweighted
        by likelihood ratios instead of regenerated.

        If an answer differs from the target, positions are found by aligning the two: within a
        differing segment, the target's own tokens up to the explained one are teacher-forced.
        `attr_method` does not matter here.

        Args:
            inp: The prompt, as for `attribute`.
            target: The answer; None: the model generates it.
            feature: Index or name of the feature, or several; None: all.
            n_samples: Continuations per feature.
            gen_args: For generating the target, as for `attribute`.
            again: Arguments of ``generate`` for regenerated answers. By default they are sampled
                from the model's own distribution: at temperature 1, with no token excluded. With
                other arguments nothing is reweighted: every feature's answers are regenerated.
            seed: Seeds draws and continuations.
            perturbations_per_eval: Maximum number of rows per batch.
            feature_mask: As for `attribute`.

        Raises:
            ValueError: If there is no such feature, or as for `attribute`.
        """
        at_least_one("n_samples", n_samples)
        with self.processes.session("`total_effect`"):
            run, ids, _ = self._prepared(inp, target, gen_args, seed, feature_mask)
            given = {**(_OWN if again is None else again)}
            given.setdefault("max_new_tokens", len(ids) + max(_MORE, len(ids) // 4))
            return total_effect(
                run,
                run.context.generated(ids, None, None),
                self.generation(given),
                Scorer(self.model, max_rows=perturbations_per_eval, processes=self._shared),
                feature=feature,
                n_samples=n_samples,
                may_weight=again is None,
            )

    def _prepared(
        self,
        inp: InterpretableInput,
        target: str | Tensor | Sequence[int] | None,
        gen_args: Mapping[str, Any] | None,
        seed: int,
        feature_mask: Tensor | None,
    ) -> tuple[Run, Tensor, Generation]:
        """The prompt, the answer's ids, and the settings for generating others."""
        if not isinstance(self.model, nn.Module):  # captum's placeholder for an API's model
            raise TypeError(
                "an API cannot be forced to generate given tokens: give a model of "
                "this process (`GenerationAttribution`)."
            )
        scorer = self._scorer(None)
        run = self._run(as_prompt(inp, self.tokenizer, feature_mask), scorer, seed)
        generation = self.generation(gen_args)
        ids = self._target_ids(
            run, target, None if target is not None else gen_args, generation, None
        )
        if "max_new_tokens" not in (gen_args or {}):
            generation = self.generation({**(gen_args or {}), "max_new_tokens": len(ids) + _MORE})
        return run, ids, generation
