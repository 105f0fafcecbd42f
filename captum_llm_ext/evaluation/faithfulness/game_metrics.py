"""Faithfulness metrics of any attributions on any game, also of other packages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from captum_llm_ext.evaluation.faithfulness.queries import Game, evaluate_coalitions
from captum_llm_ext.evaluation.faithfulness.report import FaithfulnessReport
from captum_llm_ext.evaluation.faithfulness.scores import (
    Kind,
    Metric,
    PerturbationCurve,
    PerturbationPaths,
    RandomCoalitions,
)

# Few features, as readers use them; ERASER (DeYoung et al. 2020) uses shares of the text instead.
_DEFAULT_K = (1, 3, 5)


@dataclass(frozen=True)
class MetricSettings:
    """Settings of the metrics.

    Attributes:
        k: Numbers of features for comprehensiveness and sufficiency; None: 1, 3 and 5, as far as
            there are as many features.
        n_orders: Number of random orders as reference of curves.
        n_coalitions: Number of random coalitions of the linear datamodeling score.
        share: Probability that a feature is present in these.
        max_steps: Maximum number of steps of a curve, besides those at `k`.
        seed: Seeds orders, coalitions, and the order of equal attributions.

    Raises:
        ValueError: If a number is out of range.
    """

    k: int | Sequence[int] | None = None
    n_orders: int = 8
    n_coalitions: int = 128
    share: float = 0.5
    max_steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"n_orders": 1, "n_coalitions": 3, "max_steps": 1}
        for name, least_value in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least_value:
                raise ValueError(
                    f"`{name}` is {value!r}: give an integer of at least {least_value}."
                )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"`seed` is {self.seed!r}: give an integer.")
        if not 0 < self.share < 1:
            raise ValueError(f"`share` is {self.share!r}: give a number between 0 and 1.")

    def sizes(self, n: int) -> list[int]:
        """Numbers of features for comprehensiveness and sufficiency, of `n`.

        Raises:
            ValueError: If one of them is not an integer from 1 to n.
        """
        if self.k is None:
            return [k for k in _DEFAULT_K if k <= n]
        wanted = [self.k] if isinstance(self.k, int) else list(self.k)
        for k in wanted:
            if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n:
                raise ValueError(f"`k` has {k!r}: give numbers of features from 1 to {n}.")
        return sorted(set(wanted))


def measure(
    attributions: Mapping[str, Tensor],
    game: Game,
    settings: MetricSettings,
    *,
    features: list[str],
    unit: str | None,
    target: str = "a game",
    absence: str = "as the game has it",
) -> FaithfulnessReport:
    """Every metric of every attribution, from one call of the game.

    Args:
        attributions: By name, float64 ``(n,)``.
        game: A function of coalitions, see `evaluate_coalitions`.
        settings: Settings of the metrics.
        features: Names of the players.
        unit: Unit of its values.
        target: The explained text.
        absence: What replaces absent features.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    n = len(next(iter(attributions.values())))
    k = settings.sizes(n)
    paths = PerturbationPaths(
        attributions,
        k=k,
        max_steps=settings.max_steps,
        n_orders=settings.n_orders,
        generator=generator,
    )
    coalitions = RandomCoalitions(n, settings.n_coalitions, settings.share, generator)
    masks = torch.cat([paths.masks, coalitions.masks])
    coalition_values = evaluate_coalitions(game, masks)
    n_along = len(paths.masks)
    curves = paths.read(coalition_values[:n_along], unit, "strongest")
    scores = coalitions.read(coalition_values[n_along:], attributions)
    metrics = {
        name: _curve_metrics(curves[name], k) | {"lds": scores[name]} for name in attributions
    }
    path = next(iter(curves.values()))["insertion"].values
    return FaithfulnessReport(
        names=list(attributions),
        target=target,
        features=features,
        absence=absence,
        unit=unit,
        full=path[-1],
        empty=path[0],
        metrics=metrics,
        curves=curves,
        n_draws=getattr(game, "n_draws", 1),
        n_coalitions=len(masks.unique(dim=0)),
        seed=settings.seed,
    )


def _curve_metrics(curves: Mapping[Kind, PerturbationCurve], k: Sequence[int]) -> dict[str, Metric]:
    added, removed = curves["insertion"], curves["removal"]
    found = [
        added.area,
        removed.area,
        _between("area_between", added.area, removed.area),
        added.normalized_area,
        removed.normalized_area,
        _between("normalized_area_between", added.normalized_area, removed.normalized_area),
        *(removed.lost_at(size) for size in k),
        *(added.lost_at(size) for size in k),
    ]
    return {metric.name: metric for metric in found}


def _between(name: str, upper: Metric, lower: Metric) -> Metric:
    """Area between the curves of weakest-first and strongest-first removal."""
    value, reference = upper.value - lower.value, upper.reference - lower.reference
    return Metric(name, value, reference, upper.unit, True)


def measure_attributions(
    attributions: Mapping[str, Any],
    game: Game,
    *,
    k: int | Sequence[int] | None = None,
    n_orders: int = 8,
    n_coalitions: int = 128,
    max_steps: int = 20,
    seed: int = 0,
    unit: str | None = None,
) -> FaithfulnessReport:
    """All metrics of attributions of any package on one game, as by `measure_faithfulness`.

    Args:
        attributions: By name, shape ``(n_players,)`` each.
        game: As for `perturbation_curve`.
        k: For comprehensiveness and sufficiency: numbers of features. None: 1, 3 and 5, as far as
            there are as many features.
        n_orders: Number of random orders as reference of curves.
        n_coalitions: Number of random coalitions of the linear datamodeling score.
        max_steps: Maximum number of steps of a curve, besides those at `k`.
        seed: Seeds all random choices.
        unit: Unit of the game's values.

    Raises:
        ValueError: As for `perturbation_curve`.
        TypeError: If `attributions` is not a mapping.
    """
    if not isinstance(attributions, Mapping) or not attributions:
        raise TypeError(
            "`attributions` must be a mapping from names to numbers, such as "
            "`{'mine': attributions}`, and hold at least one."
        )
    settings = MetricSettings(k, n_orders, n_coalitions, max_steps=max_steps, seed=seed)
    numbers = {
        name: as_attributions(f"attributions[{name!r}]", given, game)
        for name, given in attributions.items()
    }
    n = len(next(iter(numbers.values())))
    for name, attr in numbers.items():
        if len(attr) != n:
            raise ValueError(f"{name!r} has {len(attr)} numbers, another has {n}: give one each.")
    names = getattr(game, "player_names", None) or [f"player {i}" for i in range(n)]
    return measure(numbers, game, settings, features=list(names), unit=unit)


# One metric at a time ----------------------------------------------------------------------------


def perturbation_curve(
    attributions: Any,
    game: Game,
    kind: Kind = "removal",
    *,
    first: Literal["strongest", "weakest"] = "strongest",
    max_steps: int = 20,
    n_orders: int = 8,
    seed: int = 0,
) -> PerturbationCurve:
    """Values while features are removed, or added, in the order of their attributions.

    Removing the strongest first gives the deletion curve, or MoRF (Samek et al. 2017, arXiv
    1509.06321; Petsiuk et al. 2018, arXiv 1806.07421): lower is better. Removing the weakest first
    gives LeRF: higher is better. Insertion begins with no features.

    Features are ordered by signed attribution; ties are in random order.

    Args:
        attributions: Shape ``(n_players,)``.
        game: Maps a numpy array of booleans ``(n_coalitions, n_players)``, True = present, to
            ``(n_coalitions,)``: a `CoalitionGame`, whose draws give standard errors, or any
            function.
        kind: ``"removal"`` or ``"insertion"``.
        first: ``"strongest"`` or ``"weakest"``.
        max_steps: Maximum number of steps; with more features, several are removed at a time.
        n_orders: Number of random orders of the reference.
        seed: Seeds random orders.

    Returns:
        Values at each number of features removed, or added, in the unit of the game.

    Raises:
        ValueError: If an argument is out of range, or the game does not fit the attributions.

    Example:
        >>> def game(masks):  # numpy booleans (n_coalitions, 3)
        ...     return masks @ [2.0, -1.0, 0.5]
        >>> curve = perturbation_curve([2.0, -1.0, 0.5], game)
        >>> curve.values.value.tolist()
        [1.5, -0.5, -1.0, 0.0]
    """
    if kind not in ("removal", "insertion"):
        raise ValueError(f"`kind` is {kind!r}: give 'removal' or 'insertion'.")
    if first not in ("strongest", "weakest"):
        raise ValueError(f"`first` is {first!r}: give 'strongest' or 'weakest'.")
    settings = MetricSettings(max_steps=max_steps, n_orders=n_orders, seed=seed)
    return _curves(attributions, game, settings, (), first)[kind]


def comprehensiveness(
    attributions: Any, game: Game, k: int, *, n_orders: int = 8, seed: int = 0
) -> Metric:
    """The loss when the k features of largest attribution are absent: higher is better.

    DeYoung et al. 2020 (ERASER, arXiv 1911.03429), in the unit of the game.

    Args:
        attributions, game, n_orders, seed: As for `perturbation_curve`.
        k: Number of features.

    Returns:
        Value of all features minus that without the k, in the unit of the game.

    Raises:
        ValueError: As for `perturbation_curve`.

    Example:
        >>> print(comprehensiveness([2.0, -1.0], lambda masks: masks @ [2.0, -1.0], k=1).value)
        2.00
    """
    return _lost(attributions, game, "removal", k, n_orders, seed)


def sufficiency(
    attributions: Any, game: Game, k: int, *, n_orders: int = 8, seed: int = 0
) -> Metric:
    """The loss when only the k features of largest attribution are present: lower is better.

    DeYoung et al. 2020 (ERASER, arXiv 1911.03429), in the unit of the game. Below 0 if the others
    lower the value.

    Args:
        attributions, game, n_orders, seed: As for `perturbation_curve`.
        k: Number of features.

    Returns:
        Value of all features minus that of the k alone, in the unit of the game.

    Raises:
        ValueError: As for `perturbation_curve`.

    Example:
        >>> print(sufficiency([2.0, -1.0], lambda masks: masks @ [2.0, -1.0], k=1).value)
        -1.00
    """
    return _lost(attributions, game, "insertion", k, n_orders, seed)


def linear_datamodeling_score(
    attributions: Any,
    game: Game,
    *,
    n_coalitions: int = 128,
    share: float = 0.5,
    seed: int = 0,
) -> Metric:
    """Spearman's correlation of predicted and actual values of random coalitions.

    The prediction is the sum of the attributions of the present features (Park et al. 2023, TRAK,
    arXiv 2303.14186, sec. 2; Cohen-Wang et al. 2024, ContextCite, arXiv 2409.00729).

    Args:
        attributions, game, seed: As for `perturbation_curve`.
        n_coalitions: Number of coalitions; all of them if there are no more.
        share: Probability that a feature is present.

    Returns:
        The score. Its standard error combines jackknife variances over coalitions and over the
        game's draws. If values have few distinct levels, whose order depends on the draws, the
        latter is conservative, since ranks change in jumps. The reference is the score of the same
        attributions randomly permuted: it is above 0 if predictions and values increase with the
        number of features alone. Noise of few draws lowers the score of every attribution.

    Raises:
        ValueError: As for `perturbation_curve`.
    """
    attr = {"": as_attributions("attributions", attributions, game)}
    settings = MetricSettings(n_coalitions=n_coalitions, share=share, seed=seed)
    generator = torch.Generator().manual_seed(settings.seed)
    coalitions = RandomCoalitions(len(attr[""]), n_coalitions, share, generator)
    return coalitions.read(evaluate_coalitions(game, coalitions.masks), attr)[""]


def as_attributions(name: str, attributions: Any, game: Game) -> Tensor:
    """Attributions as float64 on the CPU.

    Raises:
        ValueError: If they are not finite, or not one per player.
    """
    attr = torch.as_tensor(attributions, dtype=torch.float64, device="cpu").detach()
    n_players = getattr(game, "n_players", None)
    if attr.dim() != 1 or not len(attr) or len(attr) != (n_players or len(attr)):
        wanted = "(n_players,)" if n_players is None else f"({n_players},)"
        raise ValueError(f"`{name}` has shape {tuple(attr.shape)}: give {wanted}, one per player.")
    if not bool(attr.isfinite().all()):
        raise ValueError(
            f"`{name}` holds {next(v for v in attr.tolist() if not math.isfinite(v))}: features "
            "without a finite number have no place in an order."
        )
    return attr


def _lost(attributions: Any, game: Game, kind: Kind, k: int, n_orders: int, seed: int) -> Metric:
    settings = MetricSettings(k, max_steps=1, n_orders=n_orders, seed=seed)
    attr = as_attributions("attributions", attributions, game)
    curves = _curves(attr, game, settings, settings.sizes(len(attr)), "strongest")
    return curves[kind].lost_at(k)


def _curves(
    attributions: Any,
    game: Game,
    settings: MetricSettings,
    k: Sequence[int],
    first: Literal["strongest", "weakest"],
) -> dict[Kind, PerturbationCurve]:
    attr = {"": as_attributions("attributions", attributions, game)}
    paths = PerturbationPaths(
        attr,
        k=k,
        max_steps=settings.max_steps,
        n_orders=settings.n_orders,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    return paths.read(evaluate_coalitions(game, paths.masks), None, first)[""]
