"""`PartitionShap`: Owen values, which are Shapley values that respect a hierarchy of features."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor

from captum_llm_ext.base.arguments import check_counts
from captum_llm_ext.base.warning import warn_user
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
_EVALUATIONS_PER_FEATURE = 16  # as for all sampling estimators
_MIN_ORDERS_HELD = 4  # two orders and their reverses: the fewest that give standard errors
# Draws of random baselines: if all splits are made, as for other enumerated coalitions. If values
# choose the splits, half as many, since each further draw costs splits: chosen, not measured.
_MAX_DRAWS, _SPLIT_DRAWS = 8, 4


class PartitionShap(PerturbationAttribution):
    """Owen values: Shapley values over orders that complete each group before the next begins.

    Words of one sentence join together, sentences of one paragraph together. A group's attributions
    sum to the value of the whole group among its neighbours (Owen 1977, "Values of games with a
    priori unions"), and coalitions remain meaningful as text.

    Args:
        forward_func: The model, or any forward function that captum's methods accept.
        hierarchy: Nested lists of feature indices, such as ``[[0, 1], [2, [3, 4]]]``. Default: the
            levels of the input (``unit=("paragraph", "sentence", "word")``, turns, parts), with
            prompt and generated text separate; for plain tensors repeated halving.
        scheme: ``"orders"``: nested orders and their reverses, or exact values if there are few;
            unbiased, with standard errors. ``"splits"``: the group of the largest value is split
            first, large groups into halves. Suitable far below one evaluation per feature, if few
            of many features matter; features of unsplit groups share equally (`result.unresolved`).

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
        """Owen values for plain tensors, as by other captum methods.

        Args:
            inputs, baselines, target, additional_forward_args, feature_mask: As in captum's
                `ShapleyValueSampling`; see `TensorGame`.
            hierarchy: Nested lists of the indices in `feature_mask`; by default the object's.
            n_samples: Number of evaluations, by default 16 per feature.
            perturbations_per_eval, show_progress: As in captum, for calls of the forward function.
            seed: Seeds the orders. The global random state is neither read nor changed.

        Returns:
            Attributions of the inputs' shape; if the forward function returns one value for all
            rows, the first dimension is 1.

        Raises:
            ValueError: If the hierarchy does not contain every feature exactly once, or an argument
                is out of range.
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
        name: A name for messages and provenance.
        tree: The hierarchy.
        plan: One round of coalitions from a generator.
        solve: Attributions from the coalitions and their values.
        adaptive: Replaces `plan` if the values decide what is scored next: maps a scoring function
            and a scope to a plan and its values.
        is_complete: Whether nothing is sampled or omitted.
        n_orders: Orders per round, if orders are sampled.
        has_budget: Whether the budget allows as many.
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
        tree: The hierarchy of all features.
        n_features: Number of features.
        scheme: See `PartitionShap`.
        n_samples: Number of evaluations. None: 16 per feature.
        held: Columns that some target requires, each kept present in separate walks or splits.
        deterministic: Whether a coalition has the same value every time.
        n_draws: Draws of random baselines in which splits are repeated.

    Raises:
        ValueError: If `n_samples` is not an integer of at least 1.

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
    """Maximum number of distinct coalitions of these orders, which share the first and the last."""
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
        hierarchy: Nested indices of the prompt's features, or of all, possibly including the last
            generated feature, which can cause nothing. None: the hierarchy of `levels`.
        n_prompt: Number of prompt features, which are the first columns.
        n_features: Number of features that can be a cause.
        levels: From coarse to fine, the part to which each prompt feature belongs.
        beyond: Whether the hierarchy may contain further features after these.

    Raises:
        ValueError: If it does not contain every feature exactly once.
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
    """All indices in nested lists."""
    if isinstance(nested, list | tuple):
        for part in cast(Sequence[object], nested):
            yield from _flattened(part)
    elif isinstance(nested, int):
        yield nested


def _tree(nested: Sequence[Any], features: Sequence[int]) -> Tree:
    """The hierarchy of feature indices as a tree of columns."""
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
    # The held columns share as many further orders.
    each = min(n_orders, max(_MIN_ORDERS_HELD, n_orders // max(len(held), 1)))
    plans += [
        plan_nested_orders(tree, n_features, each, generator=generator, held=column)
        for column in held
    ]
    return join_plans(plans)


def _concatenated(plans: Sequence[Plan]) -> Plan:
    """Plans one after another; equal draw numbers remain the same draw."""
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
    """Number of orders within the budget: even, and at least two."""
    pair = _n_rows(2, n_features, with_held)
    if budget < pair:
        warn_user(
            f"{budget} evaluations are less than an order of {n_features} features and its "
            f'reverse, which take {pair} and are run: `scheme="splits"` keeps to less, or give '
            f"at most {max(1, budget // 2 - 1)} features.",
        )
    # Two pairs are the fewest that give errors.
    least = 4 if budget >= evaluations_of_orders(4, n_features, with_held) else 2
    return max(least, budget // _n_rows(1, n_features, with_held) // 2 * 2)


def _n_rows(n_orders: int, n_features: int, with_held: bool) -> int:
    return n_orders * (n_features + 1) * (2 if with_held else 1)
