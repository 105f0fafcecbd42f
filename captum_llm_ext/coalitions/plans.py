"""Plans: which coalitions to score (masks and draws), before any model is called."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from torch import Tensor

# 65,536 coalitions: for 36 tokens an hour and a half with SmolLM2 on one core, and a matrix of 8 MB
# for the solver. One feature more doubles the first and more than doubles the second.
MOST_EXACT_FEATURES = 16


@dataclass(frozen=True)
class Plan:
    """Coalitions to score, in order.

    Attributes:
        masks: bool, shape ``(n_coalitions, n_features)``, True = present.
        draws: int64, shape ``(n_coalitions,)``. Rows with equal numbers share one draw of
            replacement texts, by which standard errors are clustered.
        n_anchors: Number of leading rows from `plan_anchors`: the full and empty coalitions, which
            are not sampled.
    """

    masks: Tensor
    draws: Tensor
    n_anchors: int = 0

    @property
    def n_features(self) -> int:
        """Columns of `masks`."""
        return self.masks.shape[1]


def plan_anchors(n_features: int, *, required: Sequence[int] = (), n_empty: int = 1) -> Plan:
    """The full coalition, and the empty one once per draw.

    Args:
        n_features: Number of columns.
        required: Columns that some target requires (`Scope.required`; -1 is skipped). Each adds
            `n_empty` rows in which only that column is present.
        n_empty: Draws of the empty coalition; one is enough for deterministic baselines.

    Returns:
        One full row, then the empty ones, each with a draw of its own.

    Raises:
        ValueError: If a count is too small or a required column does not exist.
    """
    n_features = _count("n_features", n_features, at_least=0)
    n_empty = _count("n_empty", n_empty, at_least=1)
    columns = _columns(required, n_features)
    masks = torch.zeros(
        1 + n_empty * (1 + len(columns)), n_features, dtype=torch.bool, device="cpu"
    )
    masks[0] = True
    for block, column in enumerate(columns, start=1):
        masks[1 + block * n_empty : 1 + (block + 1) * n_empty, column] = True
    return Plan(masks, torch.arange(len(masks), device="cpu"), n_anchors=len(masks))


def plan_leave_one_out(n_features: int, *, n_draws: int = 1, common_draw: bool = False) -> Plan:
    """Each feature absent once per draw.

    Args:
        n_features: Number of columns.
        n_draws: Repetitions; two are the fewest that give a standard error.
        common_draw: Whether all rows of a repetition share one draw (right for deterministic
            baselines: one repetition then counts as exact). Otherwise each row has its own.

    Returns:
        ``n_draws * n_features`` rows.
    """
    n_features = _count("n_features", n_features, at_least=0)
    masks = ~torch.eye(n_features, dtype=torch.bool, device="cpu")
    return _repeated(masks, _count("n_draws", n_draws, at_least=1), common_draw)


def plan_only_one_in(
    n_features: int,
    *,
    required: Sequence[int] = (),
    n_draws: int = 1,
    common_draw: bool = False,
) -> Plan:
    """Each feature present alone, once per draw.

    Args:
        n_features: Number of columns.
        required: Columns that some target requires, as in `plan_anchors`: each adds the same rows
            with that column present.
        n_draws: As in `plan_leave_one_out`.
        common_draw: As in `plan_leave_one_out`.

    Returns:
        ``n_draws * n_features`` rows, and for each required column one more for it and for every
        column before it.

    Raises:
        ValueError: If a count is too small or a required column does not exist.
    """
    n_features = _count("n_features", n_features, at_least=0)
    alone = torch.eye(n_features, dtype=torch.bool, device="cpu")
    columns = _columns(required, n_features)
    masks = [alone, *((alone | alone[column])[: column + 1] for column in columns)]
    return _repeated(torch.cat(masks), _count("n_draws", n_draws, at_least=1), common_draw)


def plan_exact(n_features: int, *, n_draws: int = 1, common_draw: bool = False) -> Plan:
    """Every coalition once per draw.

    Args:
        n_features: Number of columns, at most 16.
        n_draws: Repetitions; two are the fewest that give a standard error.
        common_draw: As in `plan_leave_one_out`. Own draws average the replacement texts better.

    Returns:
        ``n_draws * 2**n_features`` rows.

    Raises:
        ValueError: If there are too many features to enumerate.
    """
    n_features = _count("n_features", n_features, at_least=0)
    if n_features > MOST_EXACT_FEATURES:
        raise ValueError(
            f"{n_features} features have 2**{n_features} coalitions; enumeration stops at "
            f"{MOST_EXACT_FEATURES}: sample (`plan_pairs`, `plan_permutations`), or make fewer "
            "features by a coarser unit or a feature mask."
        )
    return _repeated(_enumerated(n_features), _count("n_draws", n_draws, at_least=1), common_draw)


def plan_permutations(n_features: int, n_orders: int, *, generator: torch.Generator) -> Plan:
    """Antithetic walks from the empty to the full coalition.

    An order and its reverse share a draw; an odd last order is single. (Mitchell et al. 2022,
    "Sampling permutations for Shapley value estimation", section 4.)

    Args:
        n_features: Number of columns.
        n_orders: Single orders; an order and its reverse count as two.
        generator: Source of the orders.

    Returns:
        ``n_orders * (n_features + 1)`` rows, each walk in consecutive ones.
    """
    n_features = _count("n_features", n_features, at_least=0)
    n_orders = _count("n_orders", n_orders, at_least=1)
    rank = (
        torch.rand(
            (n_orders + 1) // 2, n_features, generator=generator, dtype=torch.float32, device="cpu"
        )
        .argsort(1)
        .argsort(1)
    )
    ranks = torch.stack([rank, n_features - 1 - rank], 1).flatten(0, 1)[:n_orders]
    steps = torch.arange(n_features + 1, device="cpu")[:, None]
    masks = (ranks[:, None, :] < steps).flatten(0, 1)
    return Plan(
        masks, (torch.arange(n_orders, device="cpu") // 2).repeat_interleave(n_features + 1)
    )


def plan_pairs(n_features: int, n_evaluations: int, *, generator: torch.Generator) -> Plan:
    """Distinct coalitions with uniformly distributed sizes, each followed by its complement.

    Sizes from 1 to ``n_features - 1`` are equally frequent, hence also on every prefix of the
    columns; very small and large sizes with fewer coalitions are enumerated, and the other sizes
    are more frequent instead. (Leverage SHAP, arXiv 2410.01917, sections 3 and 4: pairs, without
    replacement.)

    Args:
        n_features: Number of columns.
        n_evaluations: Number of rows; an odd last one has no complement. From ``2**n_features - 2``
            on, all coalitions other than empty and full occur exactly once, and the solution is
            exact; from ``2**n_features`` on, these two are included, and there are no more rows.
        generator: Source of sizes and members.

    Returns:
        A coalition and its complement in consecutive rows with a common draw.
    """
    n_features = _count("n_features", n_features, at_least=0)
    n_evaluations = _count("n_evaluations", n_evaluations, at_least=1)
    if (n_features < 63 and n_evaluations >= 2**n_features) or n_features < 2:
        half = _enumerated(n_features)[: (2**n_features + 1) // 2]
    else:
        half = _different(n_features, (n_evaluations + 1) // 2, generator)
        # Which of the two is first is random, so that an odd last row does not exclude some
        # coalitions.
        flipped = (
            torch.rand(len(half), 1, generator=generator, dtype=torch.float32, device="cpu") < 0.5
        )
        half = (half ^ flipped)[torch.randperm(len(half), generator=generator, device="cpu")]
    masks = torch.stack([half, ~half], 1).flatten(0, 1)[:n_evaluations]
    return Plan(masks, torch.arange(len(masks), device="cpu") // 2)


def plan_lime(n_features: int, n_evaluations: int, *, generator: torch.Generator) -> Plan:
    """Coalitions in which each feature is present with probability 1/2, as in Captum's `Lime`.

    Args:
        n_features: Number of columns.
        n_evaluations: Rows, each with a draw of its own.
        generator: Source of the members.
    """
    n_features = _count("n_features", n_features, at_least=0)
    n_evaluations = _count("n_evaluations", n_evaluations, at_least=1)
    masks = (
        torch.rand(
            n_evaluations, n_features, generator=generator, dtype=torch.float32, device="cpu"
        )
        < 0.5
    )
    return Plan(masks, torch.arange(n_evaluations, device="cpu"))


def join_plans(plans: Sequence[Plan]) -> Plan:
    """Plans concatenated; draws of different plans stay distinct.

    Args:
        plans: Only the first may begin with anchors.

    Raises:
        ValueError: If nothing is given, the numbers of features differ, or another plan has
            anchors.
    """
    if not plans:
        raise ValueError("`plans` is empty: give at least one plan.")
    if len({plan.n_features for plan in plans}) > 1:
        raise ValueError(
            f"`plans` have {[plan.n_features for plan in plans]} features: they must all agree."
        )
    if any(plan.n_anchors for plan in plans[1:]):
        raise ValueError("Anchors must come first: put the result of `plan_anchors` at index 0.")
    draws: list[Tensor] = []
    n_draws = 0
    for plan in plans:
        draws.append(plan.draws + n_draws)
        n_draws += int(plan.draws.max()) + 1 if len(plan.draws) else 0
    masks = torch.cat([plan.masks for plan in plans])
    return Plan(masks, torch.cat(draws), n_anchors=plans[0].n_anchors)


def _repeated(masks: Tensor, n_draws: int, common_draw: bool) -> Plan:
    rows, repetition = masks.repeat(n_draws, 1), torch.arange(n_draws, device="cpu")
    if common_draw:
        return Plan(rows, repetition.repeat_interleave(len(masks)))
    # Draw numbers of one coalition are consecutive, so that its draws are stratified.
    own = torch.arange(len(masks), device="cpu") * n_draws
    return Plan(rows, (repetition[:, None] + own).flatten())


def _enumerated(n_features: int) -> Tensor:
    codes = torch.arange(2**n_features, device="cpu")
    return (codes[:, None] >> torch.arange(n_features, device="cpu") & 1).bool()


def _different(n_features: int, n_pairs: int, generator: torch.Generator) -> Tensor:
    """Distinct coalitions without complements of each other: the smaller of each pair.

    Returns:
        Shape ``(n_pairs, n_features)``, fewer if there are not as many.
    """
    counts = _quotas(n_features, n_pairs, generator)
    listed, drawn = (
        [torch.zeros(0, n_features, dtype=torch.bool, device="cpu")],
        torch.zeros_like(counts),
    )
    for size, count in enumerate(counts.tolist(), start=1):
        if 2 * count > _pairs_of_size(n_features, size):  # too dense for rejection sampling
            every = _of_size(n_features, size)
            listed.append(
                every[torch.randperm(len(every), generator=generator, device="cpu")[:count]]
            )
        else:
            drawn[size - 1] = count
    sizes = torch.arange(1, len(counts) + 1, device="cpu").repeat_interleave(drawn)
    masks = _drawn(n_features, sizes, generator)
    hashes = torch.randint(-(2**62), 2**62, (n_features,), generator=generator, device="cpu")
    while len(again := _repetitions(masks, hashes)):
        masks[again] = _drawn(n_features, sizes[again], generator)
    return torch.cat([*listed, masks])


def _quotas(n_features: int, n_pairs: int, generator: torch.Generator) -> Tensor:
    """Numbers of pairs per size 1, 2, … up to half of the features, as equal as possible."""
    sizes = range(1, n_features // 2 + 1)
    most = torch.tensor(
        [float(min(_pairs_of_size(n_features, s), n_pairs)) for s in sizes],
        dtype=torch.float32,
        device="cpu",
    )
    share = torch.full_like(most, 2.0)
    if n_features % 2 == 0:
        share[-1] = 1  # its complements have this size, too
    quotas = torch.zeros_like(most)
    full = torch.zeros_like(most, dtype=torch.bool)
    for _ in range(len(most)):
        left = n_pairs - float(most[full].sum())
        quotas = torch.where(full, most, left * share / share[~full].sum().clamp_min(1))
        if not bool((quotas > most).any()):
            break
        full |= quotas >= most
    # Systematic rounding: partial sums differ from those of the quotas by less than one.
    ends = (
        quotas.minimum(most).cumsum(0)
        + torch.rand((), generator=generator, dtype=torch.float32, device="cpu")
    ).floor()
    return ends.diff(prepend=torch.zeros(1, dtype=torch.float32, device="cpu")).long()


def _pairs_of_size(n_features: int, size: int) -> int:
    """Number of coalitions of a size; complements of the same size count once."""
    return comb(n_features, size) // (2 if 2 * size == n_features else 1)


def _of_size(n_features: int, size: int) -> Tensor:
    # Of two complementary halves, the one with the first feature.
    always = [0] if 2 * size == n_features else []
    members = combinations(range(len(always), n_features), size - len(always))
    rows = torch.tensor([[*always, *chosen] for chosen in members], dtype=torch.int64, device="cpu")
    return torch.zeros(len(rows), n_features, dtype=torch.bool, device="cpu").scatter_(
        1, rows, True
    )


def _drawn(n_features: int, sizes: Tensor, generator: torch.Generator) -> Tensor:
    rank = (
        torch.rand(len(sizes), n_features, generator=generator, dtype=torch.float32, device="cpu")
        .argsort(1)
        .argsort(1)
    )
    return rank < sizes[:, None]


def _repetitions(masks: Tensor, hashes: Tensor) -> Tensor:
    """Rows that equal an earlier one, or the complement of one."""
    codes = ((masks ^ masks[:, :1]).long() * hashes).sum(1)
    ordered, order = codes.sort(stable=True)
    return order[1:][ordered[1:] == ordered[:-1]]


def _columns(required: Sequence[int], n_features: int) -> list[int]:
    columns = sorted({int(column) for column in required} - {-1})
    if columns and not 0 <= columns[0] <= columns[-1] < n_features:
        raise ValueError(
            f"`required` names columns {columns}, but there are {n_features} features: "
            "give column numbers, or -1 for none."
        )
    return columns


def _count(name: str, value: int, *, at_least: int) -> int:
    number = operator.index(value)
    if number < at_least:
        raise ValueError(f"`{name}` is {number}: give an integer of at least {at_least}.")
    return number
