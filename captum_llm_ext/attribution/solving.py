"""Solves a game: by a fixed plan, by an adaptive one, or through a method's own ``attribute``."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor

from captum_llm_ext.attribution.game import Game
from captum_llm_ext.attribution.sampling import Effort, Outcome, anchors_of, sample
from captum_llm_ext.attribution.two_levels import NOT_LINEAR, sample_twice
from captum_llm_ext.coalitions import Plan, Solution, join_plans, plan_anchors
from captum_llm_ext.coalitions.owen_orders import Tree
from captum_llm_ext.methods import (
    Adaptive,
    HierarchicalAblation,
    PartitionShap,
    Smile,
    tree_of_prompt,
)
from captum_llm_ext.methods.estimators import Estimator, estimator, is_known
from captum_llm_ext.methods.foreign import attribute_foreign, fits_one_number


def solve(game: Game, effort: Effort, arguments: Mapping[str, Any]) -> Outcome:
    """Attributes the game with the method of its run.

    Args:
        game: The game.
        effort: Limits of the sampling.
        arguments: Passed to the ``attribute`` of methods that the package does not implement.

    Raises:
        ValueError: If a limit would have no effect on the method.
    """
    method = game.run.method
    if game.run.surrogate is not None and (not is_known(method) or isinstance(method, Smile)):
        raise ValueError(NOT_LINEAR.format(type(method).__name__))
    if not is_known(method):
        return _solve_foreign(game, method, effort, arguments)
    chosen = estimator(
        method,
        game.n_features,
        effort.budget,
        deterministic=game.deterministic,
        tree=_tree(game, method),
        held=game.held,
        num_trials=effort.num_trials,
    )
    if game.run.surrogate is not None:
        return sample_twice(game, chosen, effort, game.run.surrogate)
    if chosen.adaptive is not None:
        return _solve_adaptive(game, chosen, chosen.adaptive, effort)
    return sample(game, chosen, effort)


def _tree(game: Game, method: PerturbationAttribution) -> Tree:
    if isinstance(method, PartitionShap):
        return game.tree(method.hierarchy)
    if isinstance(method, HierarchicalAblation):
        prompt = game.run.prompt
        return tree_of_prompt(prompt.n_features, [level.part_of for level in prompt.levels])
    return ()


def _solve_adaptive(game: Game, method: Estimator, adaptive: Adaptive, effort: Effort) -> Outcome:
    """Chooses further coalitions by the values found so far, and scores them."""
    if effort.stop is not None or effort.num_trials > 1:
        raise ValueError(
            f"`tol`, `stop` and `num_trials` have no meaning for {method.name}, where the values "
            "decide what is scored next: leave them out, or give more `n_samples` or `n_draws`."
        )
    anchors = anchors_of(game)
    seed = int(torch.randint(2**62, (), generator=game.run.generator, device="cpu"))
    ends = game.values(anchors)
    plan, values = adaptive(partial(game.values, seed=seed), game.scope)
    plan, values = join_plans([anchors, plan]), torch.cat([ends, values])
    solution = method.solve(plan, values, game.scope)
    return Outcome(method.name, plan, values, solution, method.estimate, options=method.options)


def _check_foreign(name: str, game: Game, effort: Effort) -> None:
    """Raises if a method's own ``attribute`` ignores an argument, or cannot explain the game."""
    if effort.stop is not None or effort.budget.n_draws is not None:
        raise ValueError(
            f"`tol`, `stop` and `n_draws` would be ignored: {name} runs through its own "
            "`attribute`."
        )
    if (game.scope.required >= 0).any():
        raise ValueError(
            f"{name} runs through its own `attribute`, which cannot hold a generated word while "
            'its later tokens are explained: use `output_unit="token"` or None.'
        )


def _solve_foreign(
    game: Game,
    method: PerturbationAttribution,
    effort: Effort,
    arguments: Mapping[str, Any],
) -> Outcome:
    """Runs a method that the package does not implement through its own ``attribute``."""
    name = type(method).__name__
    _check_foreign(name, game, effort)
    if effort.budget.n_samples is not None:
        arguments = {**arguments, "n_samples": effort.budget.n_samples}
    anchors = plan_anchors(game.n_features)
    ends, n_target = game.values(anchors), len(game.scope.n_visible)
    # Its fit to a sum need not be the sum of its fits to the parts.
    solves_sum = fits_one_number(method) and n_target > 1 and not game.generated.n_causes

    def values(plan: Plan) -> Tensor:
        own = game.values(plan)
        return torch.cat([own, own.sum(1, keepdim=True)], 1) if solves_sum else own

    found = attribute_foreign(
        method,
        values,
        game.n_features,
        n_target=n_target + solves_sum,
        num_trials=effort.num_trials,
        seed=game.run.seed,
        arguments=arguments,
    )
    later = torch.arange(game.n_features, device="cpu") >= game.scope.n_visible[:, None]
    attributions = found.attributions[:n_target].masked_fill(later, 0.0)
    solution = Solution(
        attributions=attributions,
        standard_errors=torch.full_like(attributions, torch.nan).masked_fill(later, 0.0),
        full_values=ends[0],
        empty_values=ends[1],
    )
    plan = join_plans([anchors, found.plan])
    return Outcome(
        name,
        plan,
        torch.cat([ends, found.values[:, :n_target]]),
        solution,
        estimate=True,
        whole=found.attributions[n_target] if solves_sum else None,
    )
