"""What if the prompt had been another: questions that take the model to write its answer anew."""

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

_MORE = 8  # tokens that an answer written anew may have beyond those of the answer
# The distribution that the model tells, not that which its settings would sample from.
_OWN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


class WhatIf(ModelAccess):
    """Questions to the model of an attribution, for which its method does not matter."""

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
        """What would have changed the answer: few features whose replacement makes a token another.

        Features are replaced by what the input's baselines put in their place, the rest of the
        answer is as it was (teacher forced). A set is minimal where no proper subset of it changes
        the token with any of the same draws. Sizes are searched one after the other, all sets of a
        size where the budget allows, else the most promising by what their features do alone.
        `attr_method` does not matter here.

        Args:
            inp: The prompt, as for `attribute`.
            target: The answer; None: the model generates it.
            flips: What counts as changed: ``"argmax"``: another token is likelier than the
                target token; a number: the target token loses at least so many nats; or a callable
                that is given a `Flip`.
            token: The target token, or several, that are asked about; None: all.
            max_size: Features of the largest sets.
            n_draws: Replacements that each set is tried with.
            budget: At most so many rows are scored; what was not searched for want of them the
                iterator's `summary` tells.
            order: Which features are tried first, as one number each (the larger, the sooner), such
                as ``result.token_attr.sum(0)``. ``"saliency"``: by the size of the gradient, which
                takes one pass forth and back; None: in reading order.
            gen_args: As for `attribute`; answers are generated anew with it.
            seed: Of the draws.
            perturbations_per_eval: At most so many rows in a batch.
            feature_mask: As for `attribute`.

        Returns:
            An iterator over what is found, as soon as it is found: each one confirmed by a forward
            pass of its own, with the answer that the model writes after the changed prompt.

        Raises:
            ValueError: If an argument is out of range, or as `attribute` does.
        """
        check_counts(max_size=max_size, n_draws=n_draws, budget=budget)
        if isinstance(flips, int | float) and not flips > 0:
            raise ValueError(f"`flips` is {flips!r}: give a number of nats above 0, such as 2.0.")
        if isinstance(flips, str) and flips != "argmax":
            raise ValueError(f"`flips` is {flips!r}: give 'argmax', a number, or a callable.")
        if isinstance(order, str) and order != "saliency":
            raise ValueError(f"`order` is {order!r}: give 'saliency', numbers, or None.")
        with self.processes.session("`counterfactuals`"):
            run, ids, generation = self._asked(inp, target, gen_args, seed, feature_mask)
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
        """Per feature a number, the larger for what is sooner tried."""
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
        except (TypeError, ValueError, RuntimeError):  # it is but an order
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
        """How far each target token falls if the answer is written anew without a feature, in nats.

        An attribution holds the answer before a token fixed, and so tells what a feature does
        directly. Here the model writes the answer again: `n_samples` times as it is, and as often
        with the feature replaced, each time by another draw of the input's baselines. The effect is
        the mean of the log-probability that each target token has in its place after what was
        written, as it is less as replaced. Continuations of equal number share their seed. Where a
        feature hardly moves what the model writes, the answers to the prompt as it is are weighted
        by how much likelier they became, and none is written.

        Where an answer differs from the target, a token's place is found by aligning the two: in a
        stretch that is another, the target's own tokens are taken as written up to the token.
        `attr_method` does not matter here.

        Args:
            inp: The prompt, as for `attribute`.
            target: The answer; None: the model generates it.
            feature: Number or name of the feature, or several; None: all of them.
            n_samples: Continuations per feature.
            gen_args: Of the target's generation, as for `attribute`.
            again: Arguments of ``generate`` for answers that are written anew. By default they are
                drawn from what the model itself tells: at temperature 1, with no token ruled out.
                Drawn otherwise, they are written anew for every feature.
            seed: Of draws and continuations.
            perturbations_per_eval: At most so many rows in a batch.
            feature_mask: As for `attribute`.

        Raises:
            ValueError: If there is no such feature, or as `attribute` does.
        """
        at_least_one("n_samples", n_samples)
        with self.processes.session("`total_effect`"):
            run, ids, _ = self._asked(inp, target, gen_args, seed, feature_mask)
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

    def _asked(
        self,
        inp: InterpretableInput,
        target: str | Tensor | Sequence[int] | None,
        gen_args: Mapping[str, Any] | None,
        seed: int,
        feature_mask: Tensor | None,
    ) -> tuple[Run, Tensor, Generation]:
        """What is asked about: the prompt, the answer's ids, and how another one is written."""
        if not isinstance(self.model, nn.Module):  # captum's placeholder of an API's
            raise TypeError(
                "an API does not write an answer token by token as it is told to: give a model of "
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
