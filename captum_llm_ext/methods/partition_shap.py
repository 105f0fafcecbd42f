"""`PartitionShap`: Owen values, Shapley values that respect a nesting of the features."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor

from captum_llm_ext.base.arguments import check_counts
from captum_llm_ext.base.digest import stacklevel_of_caller
from captum_llm_ext.coalitions import Plan, Scope, Solution, join_plans
from captum_llm_ext.coalitions.owen_orders import (
    Tree,
    as_tree,
    balanced,
    binary,
    plan_nested_orders,
    pruned,
    solve_nested_orders,
    tree_of_levels,
)
from captum_llm_ext.coalitions.owen_splits import (
    n_splits,
    plan_splits,
    solve_splits,
    split_best_first,
)
from captum_llm_ext.methods.tensor_game import Score, TensorGame, Tensors

Scheme = Literal["orders", "splits"]
Adaptive = Callable[[Score, Scope], tuple[Plan, Tensor]]
_EVALUATIONS_PER_FEATURE = 16  # as all estimators that sample
_MIN_ORDERS_HELD = 4  # two orders and their reverses: fewer tell no standard error
# Draws of random baselines: as of other enumerated coalitions where all splits are made; where
# values choose them half as many, a guess: each draw of a coalition is one split less.
_MAX_DRAWS, _SPLIT_DRAWS = 8, 4


class PartitionShap(PerturbationAttribution):
    """Owen values: Shapley values of orders that finish each group before they begin the next.

    Words of one sentence join together, sentences of one paragraph together. A group's
    attributions sum to what the group as a whole is worth among its neighbours (Owen 1977, "Values
    of games with a priori unions"), and a budget goes to coalitions that make sense as text.

    Args:
        forward_func: The model, or any forward that captum's methods take.
        hierarchy: Nested lists of feature numbers, such as ``[[0, 1], [2, [3, 4]]]``. By default
            the nesting of the input (``unit=("paragraph", "sentence", "word")``, turns, parts),
            prompt and generated text apart; for plain tensors features halved again and again.
        scheme: ``"orders"``: nested orders and their reverses, all values where these are few;
            unbiased, with standard errors. ``"splits"``: the group that adds most is split first,
            larger groups in halves. Good far below one evaluation per feature, where few of many
            features matter; groups that were not split share evenly (`result.unresolved`).

    Raises:
        ValueError: If the scheme is unknown.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        hierarchy: Sequence[Any] | None = None,
        scheme: Scheme = "orders",
    ) -> None:
        super().__init__(forward_func)
        if scheme not in get_args(Scheme):
            raise ValueError(f'`scheme` is {scheme!r}: give "orders" or "splits".')
        self.hierarchy = hierarchy
        self.scheme: Scheme = scheme

    def attribute(  # captum's arguments in captum's order  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
        inputs: Tensors,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Tensors | None = None,
        hierarchy: Sequence[Any] | None = None,
        n_samples: int | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        *,
        seed: int = 0,
    ) -> Tensors:
        """Owen values of plain tensors, as other captum methods give theirs.

        Args:
            inputs, baselines, target, additional_forward_args, feature_mask: As in captum's
                `ShapleyValueSampling`; see `TensorGame`.
            hierarchy: Nested lists of the numbers in `feature_mask`; by default the object's.
            n_samples: Evaluations, by default 16 per feature.
            perturbations_per_eval, show_progress: As in captum, over calls of the forward.
            seed: Seeds the orders. The global random state is neither read nor changed.

        Returns:
            Attributions of the inputs' shape; where the forward returns one value for all rows,
            their first dimension is 1.

        Raises:
            ValueError: If the hierarchy does not hold every feature once, or an argument is out of
                range.
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
        nested = self.hierarchy if hierarchy is None else hierarchy
        n_features = len(game.features)
        tree = balanced(range(n_features)) if nested is None else _tree(nested, game.features)
        chosen = partition(tree, n_features, self.scheme, n_samples)
        generator = torch.Generator().manual_seed(seed)
        return game.attribute(partial(chosen.run, generator), chosen.solve)


@dataclass(frozen=True)
class Partition:
    """A plan and a solver for the Owen values of one game.

    Attributes:
        name: For people and provenance.
        tree: The nesting that is solved for.
        plan: One round of coalitions from a generator.
        solve: Attributions from the coalitions and their values.
        adaptive: In place of `plan` where the values decide what is scored next: from a score and a
            scope to a plan and its values.
        is_complete: Whether nothing is sampled or left out.
        n_orders: Of a round, where orders are sampled.
        has_budget: Whether the budget holds as many.
    """

    name: str
    tree: Tree
    plan: Callable[[torch.Generator], Plan]
    solve: Callable[[Plan, Tensor, Scope], Solution]
    adaptive: Adaptive | None = None
    is_complete: bool = False
    n_orders: int = 0
    has_budget: bool = True

    def run(self, generator: torch.Generator, score: Score, scope: Scope) -> tuple[Plan, Tensor]:
        """One round of coalitions and their values."""
        if self.adaptive is not None:
            return self.adaptive(score, scope)
        plan = self.plan(generator)
        return plan, score(plan)


def partition(
    tree: Tree,
    n_features: int,
    scheme: Scheme,
    n_samples: int | None = None,
    *,
    held: Sequence[int] = (),
    deterministic: bool = True,
    n_draws: int | None = None,
) -> Partition:
    """Chooses plan and solver for Owen values within a budget.

    Args:
        tree: The nesting of all features.
        n_features: Number of features.
        scheme: See `PartitionShap`.
        n_samples: Evaluations. None: 16 per feature.
        held: Columns that some target requires, and that walks or splits of their own hold.
        deterministic: Whether a coalition is worth the same every time.
        n_draws: Draws of random baselines that splits are repeated in.

    Raises:
        ValueError: If `n_samples` is no number of at least 1.

    Warns:
        UserWarning: If the budget is below one order and its reverse.
    """
    check_counts(n_samples=n_samples)
    budget = n_samples or _EVALUATIONS_PER_FEATURE * n_features
    if scheme == "splits":
        tree = binary(tree)
    trees = [tree, *(pruned(tree, column) for column in held)]
    complete = sum(2 + n_splits(part) for part in trees)
    repeats = 1 if deterministic else n_draws or max(2, min(_MAX_DRAWS, budget // complete))
    solve = partial(solve_splits, tree=tree)
    every = partial(_plan_complete, tree, n_features, held, repeats)
    if repeats * complete <= budget:
        return Partition("exact Owen values", tree, every, solve, is_complete=True)
    if scheme == "splits":
        draws = 1 if deterministic else n_draws or _SPLIT_DRAWS
        grow = partial(_split_best_first, tree, n_features, budget, draws)
        return Partition("best-first splits", tree, every, solve, adaptive=grow)
    n_orders = _n_orders(budget, n_features, bool(held))
    plan = partial(_plan_orders, tree, n_features, held, n_orders)
    return Partition(
        "nested orders",
        tree,
        plan,
        solve_nested_orders,
        n_orders=n_orders,
        has_budget=budget >= _n_rows(2, n_features, bool(held)),
    )


def evaluations_of_orders(n_orders: int, n_features: int, with_held: bool) -> int:
    """The most distinct coalitions that so many orders have; all share the first and the last."""
    return (n_orders * (n_features - 1) + 2) * (2 if with_held else 1)


def nesting(
    hierarchy: Sequence[Any] | None,
    n_prompt: int,
    n_features: int,
    *,
    levels: Sequence[Sequence[int]] = (),
    beyond: bool = False,
) -> Tree:
    """The tree of prompt features and, beside them, generated ones.

    Args:
        hierarchy: Nested numbers of the prompt's features, or of all; then the last generated
            feature, which can cause nothing, may be among them. None: that of `levels`.
        n_prompt: Features of the prompt; the first columns.
        n_features: All that can be a cause.
        levels: From coarse to fine, the part that each prompt feature is in.
        beyond: Whether the hierarchy may hold other features after these.

    Raises:
        ValueError: If it does not hold every feature once.
    """
    generated = tuple(range(n_prompt, n_features))
    if hierarchy is None:
        return as_tree([tree_of_levels(n_prompt, levels), generated], n_features)
    numbers = list(_flattened(hierarchy))
    if sorted(numbers) == list(range(n_prompt)):
        return as_tree([hierarchy, generated], n_features)
    n_listed = len(numbers) if beyond or len(numbers) == n_features + 1 else n_features
    return pruned(as_tree(hierarchy, n_listed), n_features)


def _flattened(nested: object) -> Iterator[int]:
    """All numbers in nested lists."""
    if isinstance(nested, list | tuple):
        for part in cast(Sequence[object], nested):
            yield from _flattened(part)
    elif isinstance(nested, int):
        yield nested


def _tree(nested: Sequence[Any], features: Sequence[int]) -> Tree:
    """The hierarchy of feature numbers as a tree of columns."""
    column = {feature: j for j, feature in enumerate(features)}

    def renumbered(part: Any) -> Any:
        if isinstance(part, list | tuple):
            return [renumbered(child) for child in part]
        return column.get(part, part if isinstance(part, str) else -1 - int(part))

    return as_tree(renumbered(nested), len(features))


def _plan_complete(
    tree: Tree, n_features: int, held: Sequence[int], n_draws: int, _: torch.Generator
) -> Plan:
    columns = (-1, *held)
    return _concatenated(
        [plan_splits(tree, n_features, n_draws=n_draws, held=column) for column in columns]
    )


def _plan_orders(
    tree: Tree, n_features: int, held: Sequence[int], n_orders: int, generator: torch.Generator
) -> Plan:
    plans = [plan_nested_orders(tree, n_features, n_orders, generator=generator)]
    # As many orders again are shared by the columns that are held.
    each = min(n_orders, max(_MIN_ORDERS_HELD, n_orders // max(len(held), 1)))
    plans += [
        plan_nested_orders(tree, n_features, each, generator=generator, held=column)
        for column in held
    ]
    return join_plans(plans)


def _concatenated(plans: Sequence[Plan]) -> Plan:
    """Plans one after the other; equal numbers of draws stay the same draw."""
    return Plan(torch.cat([p.masks for p in plans]), torch.cat([p.draws for p in plans]))


def _split_best_first(
    tree: Tree,
    n_features: int,
    budget: int,
    n_draws: int,
    score: Score,
    scope: Scope,
) -> tuple[Plan, Tensor]:
    return split_best_first(score, tree, n_features, scope, n_evaluations=budget, n_draws=n_draws)


def _n_orders(budget: int, n_features: int, with_held: bool) -> int:
    """How many orders the budget allows: an even number, two at least."""
    pair = _n_rows(2, n_features, with_held)
    if budget < pair:
        warnings.warn(
            f"{budget} evaluations are less than an order of {n_features} features and its "
            f'reverse, which take {pair} and are run: `scheme="splits"` keeps to less, or give '
            f"at most {max(1, budget // 2 - 1)} features.",
            stacklevel=stacklevel_of_caller(),
        )
    # Errors are told by two pairs at least.
    least = 4 if budget >= evaluations_of_orders(4, n_features, with_held) else 2
    return max(least, budget // _n_rows(1, n_features, with_held) // 2 * 2)


def _n_rows(n_orders: int, n_features: int, with_held: bool) -> int:
    return n_orders * (n_features + 1) * (2 if with_held else 1)
