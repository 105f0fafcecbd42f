"""Maps a captum method to a plan and a solver.

Captum's classes name the estimand. How to estimate it is decided here: by enumeration if coalitions
are few, otherwise by paired or antithetic sampling.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from captum.attr import FeatureAblation, KernelShap, Lime, ShapleyValues, ShapleyValueSampling
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor

from captum_llm_ext import _compat, coalitions
from captum_llm_ext.base.arguments import check_counts
from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.coalitions import Plan, Scope, Solution
from captum_llm_ext.coalitions.hierarchical_search import solve_search
from captum_llm_ext.coalitions.owen_orders import Tree
from captum_llm_ext.coalitions.plans import MOST_EXACT_FEATURES
from captum_llm_ext.methods import (
    Adaptive,
    FeatureInclusion,
    HierarchicalAblation,
    PartitionShap,
    Smile,
    adaptive_search,
    evaluations_of_orders,
    partition,
)
from captum_llm_ext.methods.partition_shap import Partition

# Enumerated coalitions of random baselines are repeated in up to 8 draws, which leaves .35 of the
# error of one, within this number of rows. Chosen by the waiting time, not measured.
_MAX_DRAWS, _ROWS_WORTH_REPEATING = 8, 1024
# For all sampling estimators; errors at 8 and 16: benchmarks/results/estimators.json.
_EVALUATIONS_PER_FEATURE = 16
# First round under a stopping rule: with fewer samples, regressions are no more than guesses.
# Chosen, not measured.
_FEWEST_PER_FEATURE, _FEWEST_ORDERS = 2, 4
# For few features beside an attribution: draws, which leave a quarter of the error of one, and half
# of the default evaluations per feature. Chosen, not measured.
_MOST_DRAWS_OF_FEW, _FEWEST_OF_FEW = 16, 8
_CAPTUM_ORDERS = 25  # the default of captum's `ShapleyValueSampling`
_TWO_DRAWS = "2 `n_draws`"

Solver = Callable[[Plan, Tensor, Scope], Solution]


@dataclass(frozen=True)
class Estimator:
    """How the coalitions of one attribution are planned and solved.

    Attributes:
        name: A name for messages and provenance.
        plan: One round of coalitions from a generator.
        solve: Attributions from the coalitions of all rounds and their values.
        estimate: Whether the answer is sampled, so that more rounds improve it.
        gives_errors: Whether it gives standard errors.
        adaptive: Replaces `plan` if the values decide what is scored next.
        options: Further settings of `solve`, as JSON values.
        needs: What would make standard errors available, if they are not.
        usual: Default number of coalitions without a stopping rule.
        few: Maps a number of coalitions to an estimator of the same estimand with about that many,
            for games of low variance. None if attributions are not linear in the values, or need
            all coalitions.
        samples_draws: Whether coalitions with different draws are compared, so that what single
            texts do to the values is noise (`coalitions.draw_effects`). Not in walks: their steps
            share a draw.
        is_additive: Whether attributions of a sum of values are the sum of their attributions, up
            to sampling error.
    """

    name: str
    plan: Callable[[torch.Generator], Plan]
    solve: Solver
    estimate: bool
    gives_errors: bool = True
    adaptive: Adaptive | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    needs: str | None = None
    usual: int = 0
    few: "Callable[[int], Estimator] | None" = None
    samples_draws: bool = False
    is_additive: bool = True


@dataclass(frozen=True)
class Budget:
    """Limits that the user sets for an estimator.

    Attributes:
        n_samples: As in captum: evaluations for `KernelShap` and `Lime`, orders for
            `ShapleyValueSampling`. None: the estimator's own choice.
        n_draws: Draws of the baseline for methods that do not sample coalitions.
        max_exact_features: Maximum number of features for which all coalitions are enumerated.
        grows: Whether a stopping rule decides how much is scored: defaults are then the fewest
            samples that give standard errors.
    """

    n_samples: int | None = None
    n_draws: int | None = None
    max_exact_features: int = 12
    grows: bool = False

    def __post_init__(self) -> None:
        check_counts(n_samples=self.n_samples, n_draws=self.n_draws)
        if not 1 <= self.max_exact_features <= MOST_EXACT_FEATURES:
            raise ValueError(
                f"`max_exact_features` is {self.max_exact_features}: enumeration takes 2^n "
                f"evaluations; give 1 to {MOST_EXACT_FEATURES}."
            )


def is_known(method: PerturbationAttribution) -> bool:
    """Whether the package plans and solves the method itself.

    Subclasses of the known classes, and a `Lime` with a custom kernel or model, have another
    estimand and run through their own ``attribute``.
    """
    if type(method) is Lime and _compat.lime_settings(method) is None:
        return False
    return type(method) in _ESTIMATORS


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
        n_features: Number of players.
        budget: The user's limits.
        deterministic: Whether a coalition renders the same every time. If not, enumerating methods
            are repeated with fresh draws, at most 8 times, while that is cheap.
        tree: The hierarchy of all features for `PartitionShap`, of the prompt's for
            `HierarchicalAblation`.
        held: Columns that some target requires.
        num_trials: Number of independent plans.

    Raises:
        ValueError: If a limit would have no effect on the method.

    Warns:
        UserWarning: If the budget is below two evaluations per feature, or gives no standard
            errors, or exact values were requested but can only be estimated.
    """
    task = _Task(method, n_features, budget, deterministic, tree, held, num_trials)
    found = _ESTIMATORS[type(method)](task)
    if found.needs is not None:
        warn_user(
            f"{found.name} gives no standard errors with this budget, and without them effects "
            f"cannot be separated from noise: give at least {found.needs}.",
        )
    return found


def estimator_of_few(
    method: PerturbationAttribution, n_features: int, n_most: int, *, deterministic: bool
) -> tuple[Estimator, int] | None:
    """An estimator of the method's kind over few features, within a number of evaluations.

    Args:
        method: The method.
        n_features: Number of players.
        n_most: Maximum number of evaluations, besides that of the full coalition.
        deterministic: As for `estimator`.

    Returns:
        Shapley values for methods that estimate these or Owen values, from all coalitions if they
        fit, otherwise from pairs; leave-one-out or only-one-in for theirs. And the number of draws
        of the empty coalition to score beside its own. None for other methods, and if too few
        evaluations are left.
    """
    one_at_a_time = _ONE_AT_A_TIME.get(type(method))
    if one_at_a_time is None and type(method) not in _SHAPLEY:
        return None
    task = _Task(method, n_features, Budget(), deterministic, (), (), 1)
    if n_features <= MOST_EXACT_FEATURES or one_at_a_time is not None:
        n_each = n_features + 1 if one_at_a_time is not None else 2**n_features - 1
        n_draws = min(n_most // n_each, 1 if deterministic else _MOST_DRAWS_OF_FEW)
        # A single draw of a random baseline gives no errors.
        if n_draws >= (1 if deterministic else 2):
            task = replace(task, budget=Budget(n_draws=n_draws))
            return (_exact(task), 1) if one_at_a_time is None else (one_at_a_time(task), n_draws)
    n_empty = 1 if deterministic else _MAX_DRAWS
    n_pairs = min(_EVALUATIONS_PER_FEATURE * n_features, n_most - n_empty)
    if one_at_a_time is not None or n_pairs < _FEWEST_OF_FEW * n_features:
        return None
    return _pairs(replace(task, budget=Budget(n_samples=n_pairs))), n_empty


@dataclass(frozen=True)
class _Task:
    """The arguments of `estimator`."""

    method: Any
    n_features: int
    budget: Budget
    deterministic: bool
    tree: Tree
    held: Sequence[int]
    num_trials: int

    @property
    def usual(self) -> int:
        """Evaluations requested, or the default."""
        return self.budget.n_samples or _EVALUATIONS_PER_FEATURE * self.n_features

    @property
    def evaluations(self) -> int:
        """Evaluations of one round."""
        return min(_FEWEST_PER_FEATURE * self.n_features, self.usual) if self.grows else self.usual

    @property
    def grows(self) -> bool:
        """Whether rounds are as small as possible."""
        return self.budget.grows and self.budget.n_samples is None and self.budget.n_draws is None

    def usual_draws(self, n_coalitions: int) -> int:
        """Default number of draws for `n_coalitions` coalitions."""
        if self.deterministic:
            return 1
        most = _ROWS_WORTH_REPEATING // max(1, n_coalitions)
        return self.budget.n_draws or max(2, min(_MAX_DRAWS, most))

    def n_draws(self, n_coalitions: int) -> int:
        """Number of draws per round for `n_coalitions` coalitions."""
        usual = self.usual_draws(n_coalitions)
        return min(2, usual) if self.grows else usual

    def refuse_n_samples(self, method: str) -> None:
        """Raises a ValueError if `n_samples` was given to a method without it."""
        _refuse(self.budget.n_samples is not None, "n_samples", method, "n_draws")

    def refuse_n_draws(self, method: str) -> None:
        """Raises a ValueError if `n_draws` was given to a method without it."""
        _refuse(self.budget.n_draws is not None, "n_draws", method, "n_samples")


def _leave_one_out(task: _Task) -> Estimator:
    if task.budget.n_samples is not None:  # accepted by captum, without effect
        warn_user(
            "`n_samples` has no meaning for FeatureAblation and is ignored (`n_draws` is what "
            "repeats it).",
        )
    planner, solve = coalitions.plan_leave_one_out, coalitions.solve_leave_one_out
    return _one_at_a_time("leave-one-out", planner, solve, task)


def _only_one_in(task: _Task) -> Estimator:
    task.refuse_n_samples("FeatureInclusion")
    planner = partial(coalitions.plan_only_one_in, required=task.held)
    return _one_at_a_time("only one in", planner, coalitions.solve_only_one_in, task)


def _one_at_a_time(
    name: str, planner: Callable[..., Plan], solve: Solver, task: _Task
) -> Estimator:
    n_draws = task.n_draws(task.n_features)
    # Rows of one draw differ only in the feature left out or in. A single draw of a random baseline
    # is not exact, though: unequal draw numbers mark it as random.
    common = task.deterministic or n_draws > 1
    plan = planner(task.n_features, n_draws=n_draws, common_draw=common)
    usual = task.usual_draws(task.n_features) * task.n_features
    found = _enumerated(name, plan, solve, task, common, usual)
    if task.deterministic:
        return found
    twice = planner(task.n_features, n_draws=2, common_draw=True)

    def few(n: int) -> Estimator:
        del n  # two draws are the fewest that give errors
        return replace(found, plan=partial(_planned, twice))

    return replace(found, few=few)


def _planned(plan: Plan, generator: torch.Generator) -> Plan:
    del generator
    return plan


def _exact(task: _Task) -> Estimator:
    n_coalitions = 2**task.n_features
    n_draws, usual = task.n_draws(n_coalitions), task.usual_draws(n_coalitions) * n_coalitions
    plan = coalitions.plan_exact(task.n_features, n_draws=n_draws, common_draw=task.deterministic)
    gives_errors = task.deterministic or n_draws > 1
    found = _enumerated("exact", plan, coalitions.solve_exact, task, gives_errors, usual)
    return replace(found, few=partial(_few_pairs, task.n_features))


def _few_pairs(n_features: int, n: int) -> Estimator:
    plan = partial(_plan_sampled, coalitions.plan_pairs, n_features, n + n % 2)
    return Estimator("few pairs", plan, coalitions.solve_few_pairs, True)


def _enumerated(
    name: str, plan: Plan, solve: Solver, task: _Task, gives_errors: bool, usual: int
) -> Estimator:
    """An estimator with fixed coalitions; only baselines are random."""
    return Estimator(
        name,
        lambda _: plan,
        solve,
        estimate=not task.deterministic,
        gives_errors=gives_errors,
        needs=None if gives_errors else _TWO_DRAWS,
        usual=usual,
    )


def _hierarchical(task: _Task) -> Estimator:
    n, share = task.n_features, task.method.share
    return Estimator(
        "hierarchical search",
        lambda _: coalitions.plan_leave_one_out(n),
        partial(solve_search, tree=task.tree),
        estimate=True,
        adaptive=adaptive_search(
            task.tree,
            n,
            share=share,
            top_k=task.method.top_k,
            n_evaluations=task.budget.n_samples,
            n_draws=task.n_draws(n),
        ),
        options={"tree": task.tree},
    )


def _shapley_values(task: _Task) -> Estimator:
    if task.n_features <= task.budget.max_exact_features:
        task.refuse_n_samples("exact ShapleyValues")
        return _exact(task)
    warn_user(
        f"exact Shapley values of {task.n_features} features need 2^{task.n_features} evaluations: "
        f"they are estimated from {task.usual}, with standard errors in `token_attr_se`. "
        f"Fewer features (at most {task.budget.max_exact_features}) are solved exactly.",
    )
    return _pairs(task)


def _pairs(task: _Task) -> Estimator:
    task.refuse_n_draws(type(task.method).__name__)
    if (exact := _exact_within(task.usual, task)) is not None:
        return exact
    wanted = task.evaluations
    _warn_budget(wanted, task.n_features)
    plan = partial(_plan_sampled, coalitions.plan_pairs, task.n_features, wanted)
    return Estimator(
        "paired kernel regression",
        plan,
        coalitions.solve_kernel,
        estimate=True,
        usual=task.usual,
        few=partial(_few_pairs, task.n_features),
        samples_draws=True,
    )


def _permutations(task: _Task) -> Estimator:
    task.refuse_n_draws("ShapleyValueSampling")
    orders = task.budget.n_samples or _CAPTUM_ORDERS
    if (exact := _exact_within(orders * task.n_features, task)) is not None:
        return exact
    usual = orders * (task.n_features + 1)  # all walks share their first and last coalition
    orders = _FEWEST_ORDERS if task.grows else orders
    evaluations = orders * task.n_features
    is_warned = _warn_budget(evaluations, task.n_features)
    # An order and its reverse form one draw.
    gives_errors = -(-orders // 2) * task.num_trials > 1
    return Estimator(
        "antithetic permutations",
        partial(_plan_sampled, coalitions.plan_permutations, task.n_features, orders),
        coalitions.solve_permutations,
        estimate=True,
        gives_errors=gives_errors,
        needs=None if gives_errors or is_warned else "`n_samples=4`: two orders and their reverses",
        usual=usual,
        few=partial(_few_pairs, task.n_features),
    )


def _exact_within(evaluations: int, task: _Task) -> Estimator | None:
    """Enumeration, if it takes no more evaluations than sampling."""
    n_draws = evaluations // 2**task.n_features
    # A single draw of a random baseline gives no errors.
    least = 1 if task.deterministic else 2
    if task.n_features > MOST_EXACT_FEATURES or n_draws < least:
        return None
    if task.grows:
        n_draws = min(2, n_draws)
    exact = _exact(replace(task, budget=Budget(n_draws=n_draws)))
    return replace(exact, usual=evaluations)


def _lime(task: _Task) -> Estimator:
    task.refuse_n_draws("Lime")
    wanted = task.evaluations
    _warn_budget(wanted, task.n_features)
    plan = partial(_plan_sampled, coalitions.plan_lime, task.n_features, wanted)
    settings = _compat.lime_settings(task.method) or {}
    options = dict(settings)
    kernel = partial(coalitions.cosine_kernel, width=settings.pop("kernel_width"))
    solve = partial(coalitions.solve_lime, kernel=kernel, **settings)
    # A lasso is not additive: it shrinks every sum like a single value. It has no standard errors.
    is_sparse = settings["penalty"] == "l1"
    found = Estimator(
        "local linear model",
        plan,
        solve,
        True,
        not is_sparse,
        options=options,
        usual=task.usual,
        samples_draws=True,
        is_additive=not is_sparse,
    )

    def few(n: int) -> Estimator:
        n = max(n, 2 * task.n_features)  # fewer do not determine a fit
        plan = partial(_plan_sampled, coalitions.plan_lime, task.n_features, n)
        return replace(found, plan=plan)

    return replace(found, few=None if is_sparse else few)


def _smile(task: _Task) -> Estimator:
    task.refuse_n_draws("Smile")
    wanted = task.evaluations
    _warn_budget(wanted, task.n_features)
    plan = partial(_plan_sampled, coalitions.plan_lime, task.n_features, wanted)
    alpha = float(task.method.alpha)
    settings: dict[str, Any] = {"alpha": alpha, "penalty": "l2" if alpha else None}
    options = {"kernel_width": float(task.method.sigma), **settings}
    kernel = partial(coalitions.cosine_kernel, width=options["kernel_width"])
    solve = partial(coalitions.solve_lime, kernel=kernel, **settings)
    return Estimator("local linear model", plan, solve, True, options=options, usual=task.usual)


def _partition(task: _Task) -> Estimator:
    found = _partitioned(task, task.budget.n_samples)
    usual = found.n_orders * (task.n_features + 1) * (2 if task.held else 1)
    if task.grows and found.n_orders:
        n_samples = evaluations_of_orders(_FEWEST_ORDERS, task.n_features, bool(task.held))
        found = _partitioned(task, min(n_samples, task.usual))
    has_orders = found.name == "nested orders"
    if has_orders:
        task.refuse_n_draws("nested orders of PartitionShap")
    few_orders = has_orders and found.n_orders * task.num_trials < 4
    one_draw = found.is_complete and not task.deterministic and task.budget.n_draws == 1
    needs = None
    if few_orders and found.has_budget:
        enough = evaluations_of_orders(4, task.n_features, bool(task.held))
        needs = f"`n_samples={enough}`, which four take"
    least = evaluations_of_orders(_FEWEST_ORDERS, task.n_features, bool(task.held))

    def few(n: int) -> Estimator:
        plan = _partitioned(task, max(n, least)).plan
        return Estimator(found.name, plan, found.solve, True, options={"tree": found.tree})

    return Estimator(
        found.name,
        found.plan,
        found.solve,
        estimate=not (found.is_complete and task.deterministic),
        gives_errors=not (few_orders or one_draw),
        needs=_TWO_DRAWS if one_draw else needs,
        adaptive=found.adaptive,
        options={"tree": found.tree},
        usual=usual or task.usual,
        few=few if has_orders and not few_orders else None,
    )


def _partitioned(task: _Task, n_samples: int | None) -> Partition:
    return partition(
        task.tree,
        task.n_features,
        task.method.scheme,
        n_samples,
        held=task.held,
        deterministic=task.deterministic,
        n_draws=2 if task.grows and not task.deterministic else task.budget.n_draws,
    )


# Exactly these classes: a subclass has another estimand.
_ESTIMATORS: Mapping[type[PerturbationAttribution], Callable[[_Task], Estimator]] = {
    FeatureAblation: _leave_one_out,
    FeatureInclusion: _only_one_in,
    HierarchicalAblation: _hierarchical,
    PartitionShap: _partition,
    ShapleyValues: _shapley_values,
    ShapleyValueSampling: _permutations,
    KernelShap: _pairs,
    Lime: _lime,
    Smile: _smile,
}


# Of parts of the prompt: which methods estimate Shapley values, and which what one part does.
_SHAPLEY = (KernelShap, ShapleyValues, ShapleyValueSampling, PartitionShap)
_ONE_AT_A_TIME: Mapping[type[PerturbationAttribution], Callable[[_Task], Estimator]] = {
    FeatureAblation: _leave_one_out,
    HierarchicalAblation: _leave_one_out,
    FeatureInclusion: _only_one_in,
}


def _plan_sampled(
    planner: Callable[..., Plan], n_features: int, size: int, generator: torch.Generator
) -> Plan:
    return planner(n_features, size, generator=generator)


def _refuse(given: bool, name: str, method: str, instead: str) -> None:
    if given:
        raise ValueError(
            f"`{name}` has no meaning for {method} and would be ignored: leave it out"
            f" (`{instead}` is what repeats it)."
        )


def _warn_budget(evaluations: int, n_features: int) -> bool:
    """Warns of too few evaluations; returns whether it did."""
    if evaluations < 2 * n_features:
        warn_user(
            f"{evaluations} evaluations for {n_features} features are too few for a reliable "
            f"estimate: give at least {2 * n_features}, or at most {max(1, evaluations // 2)} "
            "features (a coarser unit, `output_unit`, or `feature_mask`).",
        )
    return evaluations < 2 * n_features
