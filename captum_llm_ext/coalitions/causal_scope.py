"""Which features each target token can depend on, and which coalitions inform about it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from captum_llm_ext.coalitions.clustered_errors import mean_over_draws
from captum_llm_ext.coalitions.plans import Plan


@dataclass(frozen=True)
class Scope:
    """Per target token the features it can depend on, and the one its value requires.

    Attributes:
        n_visible: int64, shape ``(n_target,)``. Target t depends on the first ``n_visible[t]``
            columns only (prompt columns first, then columns of earlier generated text).
        required: int64, shape ``(n_target,)``. A column beyond the visible ones that must be
            present for a value of target t to exist (the word that t continues), or -1.
        n_sharing: Number of targets that share a solver's computing effort; 0: these.
        unchanging: Columns whose replacement is their own text: their attributions are 0 and need
            no estimation.
    """

    n_visible: Tensor
    required: Tensor
    n_sharing: int = 0
    unchanging: tuple[int, ...] = ()

    @classmethod
    def of_all(cls, n_target: int, n_features: int) -> "Scope":
        """All targets depend on all features; none is required."""
        visible = torch.full((n_target,), n_features, dtype=torch.int64, device="cpu")
        return cls(visible, torch.full_like(visible, -1))

    def share(self, effort: float) -> float:
        """The share of a computing effort for all targets that each of them may use."""
        return effort / max(self.n_sharing or len(self.n_visible), 1)

    def part(self, targets: slice | Tensor) -> "Scope":
        """The scope of some targets; each keeps its share of the effort."""
        n_sharing = self.n_sharing or len(self.n_visible)
        return replace(
            self,
            n_visible=self.n_visible[targets],
            required=self.required[targets],
            n_sharing=n_sharing,
        )

    def of(self, n_visible: Sequence[int], required: Sequence[int]) -> "Scope":
        """Other targets in the same game."""
        return Scope(
            torch.tensor(n_visible, dtype=torch.int64, device="cpu"),
            torch.tensor(required, dtype=torch.int64, device="cpu"),
            unchanging=self.unchanging,
        )


@dataclass(frozen=True)
class Solution:
    """Attributions of every target token.

    Attributes:
        attributions: float64, shape ``(n_target, n_features)``, in the unit of the values; exactly
            0 in columns that are not visible.
        standard_errors: Same shape. 0 if exact, NaN if the plan gives none. Plus and minus 1.96 of
            them cover 95 %, however few the draws.
        full_values: Shape ``(n_target,)``: value with all visible features present.
        empty_values: Shape ``(n_target,)``: value with all visible features absent, averaged over
            draws.
    """

    attributions: Tensor
    standard_errors: Tensor
    full_values: Tensor
    empty_values: Tensor

    @property
    def efficiency_gap(self) -> Tensor:
        """Full minus empty value minus the sum of the attributions, ``(n_target,)``."""
        return self.full_values - self.empty_values - self.attributions.sum(1)

    @classmethod
    def blank(cls, n_target: int, n_features: int) -> "Solution":
        """All zeros, for a solver to fill in."""
        wide = torch.zeros(2, n_target, n_features, dtype=torch.float64, device="cpu")
        narrow = torch.zeros(2, n_target, dtype=torch.float64, device="cpu")
        return cls(wide[0], wide[1], narrow[0], narrow[1])

    @classmethod
    def joined(cls, parts: Sequence["Solution"]) -> "Solution":
        """Solutions of disjoint targets, concatenated in order."""
        names = [field.name for field in fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def fill(self, view: "View", attributions: Tensor, variances: Tensor) -> None:
        """Stores the solution for the targets of `view`; both shapes ``(n_visible, n_group)``."""
        self.attributions[view.targets, : view.n_visible] = attributions.T
        self.standard_errors[view.targets, : view.n_visible] = variances.T.sqrt()
        self.full_values[view.targets] = view.full_values
        self.empty_values[view.targets] = view.empty_values


@dataclass(frozen=True)
class View:
    """Targets with the same scope, and the rows in which their values exist.

    Attributes:
        targets: Which targets, shape ``(n_group,)``.
        n_visible: Number of leading columns they depend on.
        required: The column they require, or -1.
        rows: Indices of the plan's rows in which `required` is present, ascending.
        masks: bool, shape ``(n_rows, n_visible)``.
        sizes: int64, shape ``(n_rows,)``: visible features present.
        draws: Shape ``(n_rows,)``.
        sampled: bool, shape ``(n_rows,)``: False for anchors.
        paired: bool, shape ``(n_rows,)``: the next row is the complement, of the same draw.
        weights: Shape ``(n_rows,)``: expected over actual frequency of a sampled row's size, over
            all columns of the plan, for uniform sizes.
        complete: bool, shape ``(n_rows,)``: all coalitions of that size were sampled, so that only
            replacement texts are random.
        values: float64, shape ``(n_rows, n_group)``.
        full_values: Shape ``(n_group,)``.
        empty_values: Shape ``(n_group,)``.
        empty_variances: Variance of `empty_values` over draws; 0 for a single draw.
    """

    targets: Tensor
    n_visible: int
    required: int
    rows: Tensor
    masks: Tensor
    sizes: Tensor
    draws: Tensor
    sampled: Tensor
    paired: Tensor
    weights: Tensor
    complete: Tensor
    values: Tensor
    full_values: Tensor
    empty_values: Tensor
    empty_variances: Tensor

    @property
    def informative(self) -> Tensor:
        """bool, shape ``(n_rows,)``: sampled, and neither empty nor full on the visible columns."""
        return self.sampled & (self.sizes > 0) & (self.sizes < self.n_visible)


def views(plan: Plan, values: Tensor, scope: Scope) -> Iterator[View]:
    """Groups targets by scope, so that each group is factorised once.

    Args:
        plan: Joined from anchors and plans of one kind.
        values: Shape ``(n_coalitions, n_target)``; NaN where a target's required column is absent.
        scope: One entry per target.

    Raises:
        ValueError: If shapes or columns disagree, a needed value is not finite, or a target has no
            full or no empty row.
    """
    _check(plan, values, scope)
    sizes = torch.nn.functional.pad(plan.masks.cumsum(1, dtype=torch.int32), (1, 0)).long()
    paired = _paired(plan)
    weights, complete = _sizes(sizes[:, -1], plan)
    kinds, kind_of_target = torch.stack([scope.n_visible, scope.required], 1).unique(
        dim=0, return_inverse=True
    )
    for kind, (n_visible, required) in enumerate(kinds.tolist()):
        targets = (kind_of_target == kind).nonzero()[:, 0]
        yield _view(
            plan,
            values,
            sizes[:, n_visible],
            (paired, weights, complete),
            targets,
            n_visible,
            required,
        )


def solve_views(
    plan: Plan,
    values: Tensor,
    scope: Scope,
    solve: Callable[[View], tuple[Tensor, Tensor]],
) -> Solution:
    """Solves each group of targets with the same scope.

    Args:
        plan, values, scope: As for `views`.
        solve: Returns attributions of a view and their variances, both ``(n_visible, n_group)``.
    """
    solution = Solution.blank(len(scope.n_visible), plan.n_features)
    for view in views(plan, values, scope):
        solution.fill(view, *solve(view))
    return solution


def solve_changing_views(
    plan: Plan,
    values: Tensor,
    scope: Scope,
    solve: Callable[[View], tuple[Tensor, Tensor]],
) -> Solution:
    """Like `solve_views`, with attributions of exactly 0 if absence changes nothing.

    The other columns are solved by themselves: sizes that are uniform on all columns are uniform on
    a subset of them.
    """
    required = set(scope.required.tolist())
    # A column that a target requires is kept, since it determines in which rows there is a value.
    taken_out = [column for column in scope.unchanging if column not in required]
    if not taken_out:
        return solve_views(plan, values, scope, solve)
    is_kept = torch.ones(plan.n_features, dtype=torch.bool, device="cpu")
    is_kept[taken_out] = False
    before = torch.nn.functional.pad(is_kept.cumsum(0), (1, 0))
    fewer = replace(
        scope,
        n_visible=before[scope.n_visible],
        required=torch.where(scope.required >= 0, before[scope.required.clamp_min(0)], -1),
        unchanging=(),
    )
    found = solve_views(replace(plan, masks=plan.masks[:, is_kept]), values, fewer, solve)
    whole = Solution.blank(len(scope.n_visible), plan.n_features)
    whole.attributions[:, is_kept] = found.attributions
    whole.standard_errors[:, is_kept] = found.standard_errors
    return replace(whole, full_values=found.full_values, empty_values=found.empty_values)


def _paired(plan: Plan) -> Tensor:
    """Whether the next row is the complement, with the same draw; for all columns of the plan."""
    paired = torch.zeros(len(plan.masks), dtype=torch.bool, device="cpu")
    opposite = (plan.masks[1:] ^ plan.masks[:-1]).sum(1) == plan.n_features
    paired[:-1] = opposite & (plan.draws[1:] == plan.draws[:-1])
    return paired


def _sizes(sizes: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Weights under which all sizes but 0 and n are equally frequent, and which sizes are complete.

    Only a size of which all coalitions were scored is known to be rarer than the others: elsewhere
    counts differ by chance.
    """
    n, sampled = plan.n_features, plan.masks[plan.n_anchors :]
    counts = sizes[plan.n_anchors :].bincount(minlength=n + 1).double()
    size = torch.arange(n + 1, dtype=torch.float64, device="cpu")
    every = (size + 1).lgamma() + (n - size + 1).lgamma()
    every = (every[0] - every).exp().round()
    rest = (size > 0) & (size < n)
    complete = rest & (counts >= every)
    for k in complete.nonzero()[:, 0].tolist():
        members = sampled[sizes[plan.n_anchors :] == k]
        complete[k] = len(members.unique(dim=0)) >= every[k]
    rest &= ~complete
    usual = counts[rest].mean() if bool(counts[rest].any()) else counts.max()
    weights = torch.where(complete, usual / counts.clamp_min(1), 1)
    return weights[sizes], complete[sizes]


def _view(
    plan: Plan,
    values: Tensor,
    sizes: Tensor,
    of_rows: tuple[Tensor, Tensor, Tensor],
    targets: Tensor,
    n_visible: int,
    required: int,
) -> View:
    defined = (
        plan.masks[:, required]
        if required >= 0
        else torch.ones(len(sizes), dtype=torch.bool, device="cpu")
    )
    rows = defined.nonzero()[:, 0]
    sizes, draws = sizes[rows], plan.draws[rows]
    paired, weights, complete = (column[rows] for column in of_rows)
    ours = values[rows[:, None], targets].double()
    if not bool(ours.isfinite().all()):
        raise ValueError(
            f"`values` holds NaN or infinity for targets {targets.tolist()} in rows where all they "
            "require is present: score these rows again, in float32 if half precision overflows."
        )
    full, empty = sizes == n_visible, sizes == 0
    if not (bool(full.any()) and bool(empty.any())):
        raise ValueError(
            f"The plan has no full or no empty row for targets {targets.tolist()}: join "
            f"`plan_anchors({plan.n_features}, required=[{required}])` in front of it."
        )
    empty_values, empty_variances = mean_over_draws(ours[empty], draws[empty])
    return View(
        targets=targets,
        n_visible=n_visible,
        required=required,
        rows=rows,
        masks=plan.masks[rows, :n_visible],
        sizes=sizes,
        draws=draws,
        sampled=rows >= plan.n_anchors,
        # The required column is absent from one of the two.
        paired=paired & (required < 0),
        weights=weights,
        complete=complete,
        values=ours,
        full_values=mean_over_draws(ours[full], draws[full])[0],
        empty_values=empty_values,
        empty_variances=empty_variances,
    )


def _check(plan: Plan, values: Tensor, scope: Scope) -> None:
    n_target = len(scope.n_visible)
    if values.shape != (len(plan.masks), n_target) or scope.required.shape != (n_target,):
        raise ValueError(
            f"`values` has shape {tuple(values.shape)} and `scope.required` "
            f"{tuple(scope.required.shape)} for {len(plan.masks)} coalitions and {n_target} "
            "targets: give values of shape (n_coalitions, n_target) and a scope of n_target."
        )
    in_range = (scope.n_visible >= 0) & (scope.n_visible <= plan.n_features)
    beyond = (scope.required >= scope.n_visible) & (scope.required < plan.n_features)
    if not bool((in_range & (beyond | (scope.required == -1))).all()):
        raise ValueError(
            f"`scope` does not fit {plan.n_features} features: `n_visible` must lie in "
            f"0..{plan.n_features}, and `required` be -1 or a column that is not visible."
        )
