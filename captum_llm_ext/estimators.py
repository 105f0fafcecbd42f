"""Which plan and which solver a captum method names.

Captum's classes name the estimand. How it is best estimated is decided here: enumeration where the
coalitions are few, paired or antithetic sampling elsewhere.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from captum.attr import FeatureAblation, KernelShap, Lime, ShapleyValues, ShapleyValueSampling
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor

from captum_llm_ext import _compat, coalitions
from captum_llm_ext.arguments import check_counts
from captum_llm_ext.coalitions import Plan, Scope, Solution
from captum_llm_ext.coalitions.hierarchy import Tree
from captum_llm_ext.coalitions.plans import MOST_EXACT_FEATURES
from captum_llm_ext.coalitions.search import solve_search
from captum_llm_ext.content import level_of_caller
from captum_llm_ext.methods import (
    FeatureInclusion,
    HierarchicalAblation,
    PartitionShap,
    Unfold,
    evaluations_of_orders,
    partition,
    searching,
)

_MAX_DRAWS = 8
_ROWS_WORTH_REPEATING = 1024
_EVALUATIONS_PER_FEATURE = 16
_CAPTUM_ORDERS = 25
_TWO_DRAWS = "2 `n_draws`"


@dataclass(frozen=True)
class Estimator:
    """How the coalitions of one attribution are planned and solved.

    Attributes:
        name: For people and provenance.
        plan: One round of coalitions from a generator.
        solve: Attributions from the coalitions of all rounds and their values.
        estimate: Whether the answer is sampled, so that more rounds make it better.
        tells_error: Whether standard errors come with it.
        unfold: In place of `plan` where the values decide what is scored next.
        options: What `solve` was given beside, as numbers and text.
        needs: What would tell errors, where there are none for want of it.
    """

    name: str
    plan: Callable[[torch.Generator], Plan]
    solve: Callable[[Plan, Tensor, Scope], Solution]
    estimate: bool
    tells_error: bool = True
    unfold: Unfold | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    needs: str | None = None


@dataclass(frozen=True)
class Budget:
    """What the user allows an estimator to spend.

    Attributes:
        n_samples: As in captum: evaluations for `KernelShap` and `Lime`, orders for
            `ShapleyValueSampling`. None: the estimator's own choice.
        n_draws: Draws of the baseline for methods that do not sample coalitions.
        max_exact_features: Up to how many features all coalitions are enumerated.
    """

    n_samples: int | None = None
    n_draws: int | None = None
    max_exact_features: int = 12

    def __post_init__(self) -> None:
        check_counts(n_samples=self.n_samples, n_draws=self.n_draws)
        if not 1 <= self.max_exact_features <= MOST_EXACT_FEATURES:
            raise ValueError(
                f"`max_exact_features` is {self.max_exact_features}: enumeration takes 2^n "
                f"evaluations; give 1 to {MOST_EXACT_FEATURES}."
            )


def is_known(method: PerturbationAttribution) -> bool:
    """Whether the package plans and solves the method itself.

    Subclasses of captum's five classes, and a `Lime` with a kernel or model of the user's own, mean
    something else and are driven through their own ``attribute``.
    """
    if type(method) is Lime:
        return _compat.lime_settings(method) is not None
    ours = (FeatureInclusion, HierarchicalAblation, PartitionShap)
    return type(method) in (FeatureAblation, KernelShap, ShapleyValues, ShapleyValueSampling, *ours)


def estimator(
    method: PerturbationAttribution,
    n_features: int,
    budget: Budget,
    *,
    deterministic: bool,
    tree: Tree = (),
    held: Sequence[int] = (),
    num_trials: int = 1,
) -> Estimator:
    """The estimator for a captum method over `n_features` features.

    Args:
        method: One that `is_known`.
        n_features: Features that are switched.
        budget: What may be spent.
        deterministic: Whether a coalition renders the same every time. If not, methods that
            enumerate repeat with fresh draws while that is cheap (at most 8 times).
        tree: The nesting of all features for `PartitionShap`, of the prompt's for
            `HierarchicalAblation`.
        held: Columns that some target requires.
        num_trials: How often its coalitions are planned anew.

    Raises:
        ValueError: If the budget names something that the method would ignore.

    Warns:
        UserWarning: If the budget is below two evaluations per feature, or tells no standard
            errors, or exact values were asked for and can only be estimated.
    """
    found = _estimator(method, n_features, budget, deterministic, tree, held, num_trials)
    if found.needs is not None:
        warnings.warn(
            f"no standard errors come of {found.name} with this budget, and without them nothing "
            f"tells a cause from noise: give at least {found.needs}.",
            stacklevel=level_of_caller(),
        )
    return found


def _estimator(
    method: PerturbationAttribution,
    n_features: int,
    budget: Budget,
    deterministic: bool,
    tree: Tree,
    held: Sequence[int],
    num_trials: int,
) -> Estimator:
    if type(method) is FeatureAblation:
        if budget.n_samples is not None:  # captum takes it, and goes by nothing
            warnings.warn(
                "`n_samples` has no meaning for FeatureAblation and is ignored (`n_draws` is what "
                "repeats it).",
                stacklevel=level_of_caller(),
            )
        return _leave_one_out(n_features, budget, deterministic)
    if type(method) is FeatureInclusion:
        _refuse(budget.n_samples is not None, "n_samples", "FeatureInclusion", "n_draws")
        return _only_one_in(n_features, budget, deterministic, held)
    if type(method) is HierarchicalAblation:
        return _hierarchical(method, n_features, budget, deterministic, tree)
    if type(method) is PartitionShap:
        return _partition(method, n_features, budget, deterministic, tree, held, num_trials)
    if type(method) is ShapleyValues:
        if n_features <= budget.max_exact_features:
            _refuse(budget.n_samples is not None, "n_samples", "exact ShapleyValues", "n_draws")
            return _exact(n_features, budget, deterministic)
        _warn_estimate(n_features, budget)
    _refuse(budget.n_draws is not None, "n_draws", type(method).__name__, "n_samples")
    if type(method) is Lime:
        return _lime(method, n_features, budget)
    if type(method) is ShapleyValueSampling:
        return _permutations(n_features, budget, deterministic, num_trials)
    return _pairs(n_features, budget, deterministic)


def _leave_one_out(n_features: int, budget: Budget, deterministic: bool) -> Estimator:
    n_draws = _n_draws(n_features, budget, deterministic)
    # Rows of one draw differ in nothing but the feature left out; a single draw of a random
    # baseline, though, is no exact answer, which the solver is told by unequal draws.
    common = deterministic or n_draws > 1
    plan = coalitions.plan_leave_one_out(n_features, n_draws=n_draws, common_draw=common)
    return Estimator(
        "leave-one-out",
        lambda _: plan,
        coalitions.solve_leave_one_out,
        not deterministic,
        tells_error=common,
        needs=None if common else _TWO_DRAWS,
    )


def _only_one_in(
    n_features: int, budget: Budget, deterministic: bool, held: Sequence[int]
) -> Estimator:
    n_draws = _n_draws(n_features, budget, deterministic)
    common = deterministic or n_draws > 1
    plan = coalitions.plan_only_one_in(
        n_features, required=held, n_draws=n_draws, common_draw=common
    )
    return Estimator(
        "only one in",
        lambda _: plan,
        coalitions.solve_only_one_in,
        not deterministic,
        tells_error=common,
        needs=None if common else _TWO_DRAWS,
    )


def _hierarchical(
    method: HierarchicalAblation,
    n_features: int,
    budget: Budget,
    deterministic: bool,
    tree: Tree,
) -> Estimator:
    n_draws = _n_draws(n_features, budget, deterministic)
    return Estimator(
        "hierarchical search",
        lambda _: coalitions.plan_leave_one_out(n_features),
        partial(solve_search, tree=tree),
        estimate=True,
        unfold=searching(tree, n_features, method.share, budget.n_samples, n_draws),
        options={"tree": tree},
    )


def _exact(n_features: int, budget: Budget, deterministic: bool) -> Estimator:
    n_draws = _n_draws(2**n_features, budget, deterministic)
    plan = coalitions.plan_exact(n_features, n_draws=n_draws, common_draw=deterministic)
    tells_error = deterministic or n_draws > 1
    return Estimator(
        "exact",
        lambda _: plan,
        coalitions.solve_exact,
        not deterministic,
        tells_error=tells_error,
        needs=None if tells_error else _TWO_DRAWS,
    )


def _pairs(n_features: int, budget: Budget, deterministic: bool) -> Estimator:
    wanted = budget.n_samples or _EVALUATIONS_PER_FEATURE * n_features
    if _enumerable(n_features, wanted, deterministic):
        draws = Budget(n_draws=1 if deterministic else wanted // 2**n_features)
        return _exact(n_features, draws, deterministic)
    _warn_budget(wanted, n_features)
    plan = partial(_plan_sampled, coalitions.plan_pairs, n_features, wanted)
    return Estimator("paired kernel regression", plan, coalitions.solve_kernel, True)


def _permutations(
    n_features: int, budget: Budget, deterministic: bool, num_trials: int
) -> Estimator:
    orders = budget.n_samples or _CAPTUM_ORDERS
    if _enumerable(n_features, orders * n_features, deterministic):
        draws = Budget(n_draws=1 if deterministic else orders * n_features // 2**n_features)
        return _exact(n_features, draws, deterministic)
    is_warned = _warn_budget(orders * n_features, n_features)
    plan = partial(_plan_sampled, coalitions.plan_permutations, n_features, orders)
    # An order and its reverse are one draw.
    tells_error = -(-orders // 2) * num_trials > 1
    return Estimator(
        "antithetic permutations",
        plan,
        coalitions.solve_permutations,
        estimate=True,
        tells_error=tells_error,
        needs=None if tells_error or is_warned else "`n_samples=4`: two orders and their reverses",
    )


def _lime(method: Lime, n_features: int, budget: Budget) -> Estimator:
    wanted = budget.n_samples or _EVALUATIONS_PER_FEATURE * n_features
    _warn_budget(wanted, n_features)
    plan = partial(_plan_sampled, coalitions.plan_lime, n_features, wanted)
    settings = _compat.lime_settings(method) or {}
    options = dict(settings)
    kernel = partial(coalitions.cosine_kernel, width=settings.pop("kernel_width"))
    solve = partial(coalitions.solve_lime, kernel=kernel, **settings)
    tells_error = settings["penalty"] != "l1"
    return Estimator("local linear model", plan, solve, True, tells_error, options=options)


def _partition(
    method: PartitionShap,
    n_features: int,
    budget: Budget,
    deterministic: bool,
    tree: Tree,
    held: Sequence[int],
    num_trials: int,
) -> Estimator:
    found = partition(
        tree,
        n_features,
        method.scheme,
        budget.n_samples,
        held=held,
        deterministic=deterministic,
        n_draws=budget.n_draws,
    )
    ignored = budget.n_draws is not None and found.name == "nested orders"
    _refuse(ignored, "n_draws", "nested orders of PartitionShap", "n_samples")
    few = found.name == "nested orders" and found.n_orders * num_trials < 4
    one_draw = found.is_complete and not deterministic and budget.n_draws == 1
    needs = None
    if few and found.has_budget:
        needs = f"`n_samples={evaluations_of_orders(4, n_features, bool(held))}`, which four take"
    return Estimator(
        found.name,
        found.plan,
        found.solve,
        estimate=not (found.is_complete and deterministic),
        tells_error=not (few or one_draw),
        needs=_TWO_DRAWS if one_draw else needs,
        unfold=found.unfold,
        options={"tree": found.tree},
    )


def _plan_sampled(
    planner: Callable[..., Plan], n_features: int, size: int, generator: torch.Generator
) -> Plan:
    return planner(n_features, size, generator=generator)


def _n_draws(n_coalitions: int, budget: Budget, deterministic: bool) -> int:
    if deterministic:
        return 1
    most = _ROWS_WORTH_REPEATING // max(1, n_coalitions)
    return budget.n_draws or max(2, min(_MAX_DRAWS, most))


def _enumerable(n_features: int, wanted: int, deterministic: bool) -> bool:
    # A single draw of a random baseline would tell no errors.
    n_draws = 1 if deterministic else 2
    return n_features <= MOST_EXACT_FEATURES and n_draws * 2**n_features <= wanted


def _refuse(given: bool, name: str, method: str, instead: str) -> None:
    if given:
        raise ValueError(
            f"`{name}` has no meaning for {method} and would be ignored: leave it out"
            f" (`{instead}` is what repeats it)."
        )


def _warn_budget(evaluations: int, n_features: int) -> bool:
    """Warns of too few evaluations; whether there was reason to."""
    if evaluations < 2 * n_features:
        warnings.warn(
            f"{evaluations} evaluations for {n_features} features are too few for a sound "
            f"estimate: give at least {2 * n_features}, or at most {max(1, evaluations // 2)} "
            "features (a coarser unit, `output_unit`, or `feature_mask`).",
            stacklevel=level_of_caller(),
        )
    return evaluations < 2 * n_features


def _warn_estimate(n_features: int, budget: Budget) -> None:
    wanted = budget.n_samples or _EVALUATIONS_PER_FEATURE * n_features
    warnings.warn(
        f"exact Shapley values of {n_features} features need 2^{n_features} evaluations: they are "
        f"estimated from {wanted}, with standard errors in `token_attr_se`. Fewer features "
        f"(at most {budget.max_exact_features}) are solved exactly.",
        stacklevel=level_of_caller(),
    )
