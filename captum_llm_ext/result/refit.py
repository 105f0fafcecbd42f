"""Solves the coalitions of an attribution by other methods, without calling the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import comb
from typing import Any, cast

import torch
from captum.attr import FeatureAblation, KernelShap, Lime, ShapleyValues, ShapleyValueSampling
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor

from captum_llm_ext import _compat, coalitions
from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.coalitions import DrawnTexts, Plan, Scope, Solution
from captum_llm_ext.coalitions.clustered_errors import normal_scale
from captum_llm_ext.coalitions.hierarchical_search import solve_search, unrefined
from captum_llm_ext.coalitions.kernel import EFFORT
from captum_llm_ext.coalitions.owen_orders import binary, solve_nested_orders
from captum_llm_ext.coalitions.owen_splits import Unresolved, solve_splits, unresolved
from captum_llm_ext.coalitions.two_levels import summed
from captum_llm_ext.methods import FeatureInclusion, PartitionShap, nesting
from captum_llm_ext.result.design import Design

Method = PerturbationAttribution | type[PerturbationAttribution]

_UNIFORM_SIZES = ("paired kernel regression", "antithetic permutations", "few pairs")
_SHAPLEY = (KernelShap, ShapleyValueSampling, ShapleyValues)
_SAMPLED = (
    *_UNIFORM_SIZES,
    "local linear model",
)  # estimators that also work with fewer coalitions
# Number of jackknife groups. The relative error of a standard error from that many is a sixth (1 /
# sqrt(2 * 19)); twice as many would give a ninth, for twice the solving time.
_REPLICATES = 20


@dataclass(frozen=True)
class Evidence:
    """Coalitions with their values, and how they were planned and solved.

    Attributes:
        design: How they were planned and solved.
        masks: bool, ``(n_coalitions, at least n_features)``.
        draws: ``(n_coalitions,)``.
        values: ``(n_coalitions, n_target)``.
        scope: Visible and required features, one entry per target.
    """

    design: Design
    masks: Tensor
    draws: Tensor
    values: Tensor
    scope: Scope

    def without_draw_effects(self, drawn: DrawnTexts | None) -> "Evidence":
        """The same with values that do not depend on which replacement texts were drawn.

        Args:
            drawn: The texts of the coalitions; None: unchanged.
        """
        if drawn is None:
            return self
        correction = self.design.correction
        n = len(self.masks) - (2 * correction.n if correction else 0)
        plan = replace(self.plan, masks=self.plan.masks[:n], draws=self.plan.draws[:n])
        values = self.values.double().cpu()
        adjusted = coalitions.without_draw_effects(
            plan, values[:n], self.scope, drawn.rows(slice(n))
        )
        return replace(self, values=torch.cat([adjusted, values[n:]]))

    def levels(self) -> list["Evidence"]:
        """Independent parts whose attributions are summed: all, or surrogate and difference."""
        correction = self.design.correction
        if correction is None:
            return [self]
        n = correction.n
        design = replace(self.design, correction=None)
        rest, last = slice(0, len(self.masks) - 2 * n), slice(len(self.masks) - n, None)
        missed = self.values[-n:] - self.values[-2 * n : -n]
        of_correction = replace(
            design,
            planned=correction.planned,
            solved=correction.solved,
            options=correction.options,
            n_anchors=correction.n_anchors,
        )
        return [
            replace(
                self,
                design=design,
                masks=self.masks[rest],
                draws=self.draws[rest],
                values=self.values[rest],
            ),
            replace(
                self,
                design=of_correction,
                masks=self.masks[last],
                draws=self.draws[last],
                values=missed,
            ),
        ]

    @property
    def plan(self) -> Plan:
        """The coalitions as planned."""
        design, draws = self.design, self.draws.cpu()
        if design.deterministic and design.solved in ("exact", "leave-one-out", "only one in"):
            draws = torch.zeros_like(
                draws
            )  # the draw makes no difference, so the solution is exact
        return Plan(self.masks[:, : design.n_features].cpu(), draws, design.n_anchors)

    def solve(self) -> Solution:
        """Attributions by the estimator named in the design.

        Raises:
            ValueError: If the coalitions cannot be solved again.
        """
        if self.design.correction is not None:
            return summed([level.solve() for level in self.levels()])
        solver = SOLVERS.get(self.design.solved)
        if solver is None:
            raise ValueError(
                f"what {self.design.solved} found cannot be solved again from its coalitions: it "
                "ran its own `attribute`."
            )
        return solver(self.plan, self.values.double().cpu(), self.scope, **self.design.options)

    def span_errors(self, spans: Sequence[range]) -> Tensor:
        """Standard errors of attributions summed over target tokens, ``(n_spans, n_features)``.

        The summed values are solved as a target of their own. Tokens within a generated word have
        values only where the word is present: words are then solved separately and their errors
        summed.
        """
        total = torch.zeros(len(spans), self.design.n_features, dtype=torch.float64, device="cpu")
        if self.design.solved not in SOLVERS:
            last = [self.scope.n_visible[list(span)].max() for span in spans]
            seen = (
                torch.arange(total.shape[1], device="cpu")
                < torch.tensor(last, dtype=torch.int64, device="cpu")[:, None]
            )
            return total.masked_fill(seen, torch.nan)
        for column in self.scope.required.unique().tolist():
            which, of_spans = self._summed(spans, column)
            if which:
                total[which] += of_spans.solve().standard_errors
        return total

    def part_errors(self, spans: Sequence[range], part_of: Sequence[int]) -> Tensor | None:
        """Standard errors of attributions summed over target tokens and over features.

        Args:
            spans: Spans of target tokens.
            part_of: Index of each feature's part, -1 for none.

        Returns:
            Shape ``(n_spans, n_parts)``, NaN if unknown; None if all are.
        """
        if not self.is_estimate:
            return torch.zeros(len(spans), 1 + max(part_of), dtype=torch.float64, device="cpu")
        is_walk = self.design.solved == "antithetic permutations"
        if not is_walk or bool((self.scope.required >= 0).any()):
            return None
        if self.design.correction is not None:
            return None
        _, of_spans = self._summed(spans, -1)
        values = of_spans.values.double().cpu()
        return coalitions.part_errors(
            of_spans.plan,
            values,
            of_spans.scope,
            torch.tensor(part_of, dtype=torch.int64, device="cpu"),
        )

    def replicates(self, span: range) -> Tensor | None:
        """Jackknife replicates of attributions summed over target tokens.

        They give the standard error of any function of the attributions, such as the difference of
        two (`jackknife_error`). Regressions omit interaction terms, which would reduce the errors.

        Returns:
            Shape ``(n_replicates, n_features)``; None if coalitions are not a sample, or too few.
        """
        if self.design.correction is not None:
            # Independent samples: leaving out a part of either changes the sum of both.
            parts = [level.replicates(span) for level in self.levels()]
            known = [part for part in parts if part is not None]
            return sum(known[1:], known[0]) if len(known) == len(parts) else None
        if self.design.solved not in _SAMPLED or not self.is_estimate or self.is_complete:
            return None
        n_anchors = self.design.n_anchors
        draws, by_chance = self.draws[n_anchors:].cpu(), self._by_chance()
        group = torch.full_like(draws, -1)
        group[by_chance] = draws[by_chance].unique(return_inverse=True)[1] % _REPLICATES
        if int(group.max()) + 1 < _REPLICATES:
            return None
        anchors = torch.ones(n_anchors, dtype=torch.bool, device="cpu")
        found: list[Tensor] = []
        for left_out in range(_REPLICATES):
            kept = torch.cat([anchors, group != left_out])
            part = replace(
                self, masks=self.masks[kept], draws=self.draws[kept], values=self.values[kept]
            )
            found.append(part._fast_sum(span))
        return torch.stack(found)

    def _by_chance(self) -> Tensor:
        """Which coalitions were drawn at random, bool.

        Sizes that are complete are not a sample if replacements do not vary.
        """
        n = self.design.n_features
        sizes = self.masks[self.design.n_anchors :, :n].sum(1).cpu()
        counts = sizes.bincount(minlength=n + 1).tolist()
        complete = [count >= comb(n, size) for size, count in enumerate(counts)]
        by_size = ~torch.tensor(complete, dtype=torch.bool, device="cpu")
        is_walk = self.design.solved == "antithetic permutations"
        return by_size[sizes] | (is_walk or not self.design.deterministic)

    def _fast_sum(self, span: range) -> Tensor:
        """Attributions summed over target tokens, without interaction terms, ``(n_features,)``."""
        total = torch.zeros(self.design.n_features, dtype=torch.float64, device="cpu")
        for column in self.scope.required.unique().tolist():
            which, of_span = self._summed([span], column)
            if which:
                options = dict(of_span.design.options)
                if self.design.solved == "paired kernel regression":
                    options["effort"] = 0.0
                design = replace(of_span.design, options=options)
                total += replace(of_span, design=design).solve().attributions[0]
        return total

    def n_regressions(self, spans: Sequence[range]) -> int:
        """Number of regressions that `span_errors` takes; each may take a tenth of a second."""
        if self.design.correction is not None:
            return sum(level.n_regressions(spans) for level in self.levels())
        if self.design.solved not in _UNIFORM_SIZES or self.is_complete:
            return 0
        is_walk = self.design.solved == "antithetic permutations"
        required = self.scope.required.tolist()
        found = [{required[t] for t in span} - ({-1} if is_walk else set()) for span in spans]
        return sum(map(len, found))

    def _summed(self, spans: Sequence[range], column: int) -> tuple[list[int], "Evidence"]:
        """Which spans have tokens that require a column (-1: none), and sums of these tokens."""
        required = self.scope.required.tolist()
        ours = [[t for t in span if required[t] == column] for span in spans]
        which = [i for i, tokens in enumerate(ours) if tokens]
        visible = [int(self.scope.n_visible[ours[i]].max()) for i in which]
        scope = self.scope.of(visible, [column] * len(which))
        values = [self.values[:, ours[i]].sum(1) for i in which]
        totals = torch.stack(values, 1) if values else self.values[:, :0]
        design = self.design
        if design.correction is None and design.solved == "paired kernel regression":
            # Each sum gets the effort of each token, otherwise the error would be another
            # estimator's.
            effort = EFFORT * len(which) / max(len(required), 1)
            design = replace(design, options={**design.options, "effort": effort})
        return which, replace(self, design=design, values=totals, scope=scope)

    def contextcite(self, tokens: range, alpha: float) -> Solution:
        """ContextCite's sparse fit of a statement, see `coalitions.solve_contextcite`.

        Raises:
            ValueError: If features are not present with probability 1/2 each, or the tokens see
                different features.
        """
        if self.design.correction is not None:
            raise ValueError(
                "ContextCite's fit is sparse, and what a surrogate misses cannot be added to it: "
                "attribute with Lime and without `surrogate`."
            )
        if self._law() != "half":
            raise ValueError(
                f"the coalitions of {self.design.planned} have all sizes alike, ContextCite needs "
                "each feature present with probability 1/2: attribute with Lime."
            )
        span = (tokens.start, tokens.stop)
        return coalitions.solve_contextcite(
            self.plan, self.values.double().cpu(), self.scope, spans=[span], alpha=alpha
        )

    def whole(self, *, is_joint: bool) -> "Evidence | None":
        """Evidence for the whole target: its values multiplied if joint, otherwise summed.

        None if generated features were players.
        """
        n_features = self.design.n_features
        if n_features > 1 + max(self.design.columns):
            return None
        scope = self.scope.of([n_features], [-1])
        values = self.values.prod(1, keepdim=True) if is_joint else self.values.sum(1, keepdim=True)
        return replace(self, values=values, scope=scope)

    def unresolved(self) -> list[Unresolved]:
        """Groups of features that were never split, see `owen_splits.unresolved`."""
        find = {solve_splits: unresolved, solve_search: unrefined}.get(
            SOLVERS.get(self.design.solved, solve_splits)
        )
        if find is None or self.design.solved not in SOLVERS:
            return []
        values = self.values.double().cpu()
        return find(self.plan, values, self.scope, tree=self.design.options["tree"])

    def additivity(self) -> Tensor:
        """R² of additive attributions per target; NaN if the coalitions are insufficient."""
        if self.design.correction is not None:  # the surrogate's own additivity
            return self.levels()[0].additivity()
        if self.design.planned not in (*_UNIFORM_SIZES, "exact"):
            return torch.full(
                (len(self.scope.n_visible),), torch.nan, dtype=torch.float64, device="cpu"
            )
        return coalitions.additive_fit(self.plan, self.values.double().cpu(), self.scope)

    def redundant_pairs(self, most: int) -> list[list[coalitions.RedundantPair]]:
        """Pairs of redundant features, per target.

        Raises:
            ValueError: If the coalitions are insufficient.
        """
        if self.design.correction is not None:
            return self.levels()[0].redundant_pairs(most)
        if self.design.planned not in (*_UNIFORM_SIZES, "exact"):
            raise ValueError(
                f"the coalitions of {self.design.planned} do not determine which features are "
                "redundant: attribute with KernelShap, ShapleyValueSampling or ShapleyValues."
            )
        values = self.values.double().cpu()
        return coalitions.redundant_pairs(self.plan, values, self.scope, most=most)

    @property
    def is_estimate(self) -> bool:
        """Whether the solution depends on sampled coalitions or draws."""
        exact = ("exact", "leave-one-out", "only one in", "exact Owen values")
        is_corrected = self.design.correction is not None
        return is_corrected or not (self.design.deterministic and self.design.solved in exact)

    def refitted(self, method: Method, levels: Sequence[Sequence[int]] = ()) -> "Evidence":
        """The same coalitions, to be solved by another method.

        Args:
            method: A captum class or an instance of it.
            levels: Hierarchy of the prompt's features, see `nesting`.

        Raises:
            ValueError: If the method is unknown, or the coalitions are insufficient for it.
        """
        kind = method if isinstance(method, type) else type(method)
        if (correction := self.design.correction) is not None:
            of_surrogate, missed = (one.refitted(method, levels).design for one in self.levels())
            correction = replace(correction, solved=missed.solved, options=missed.options)
            return replace(self, design=replace(of_surrogate, correction=correction))
        if kind is FeatureAblation:
            return self._each("leave-one-out", "each feature's absence alone", kind)
        if kind is FeatureInclusion:
            return self._each("only one in", "each feature's presence alone", kind)
        if kind in _SHAPLEY:
            return self._as(self._shapley(kind))
        if kind is Lime:
            settings = _compat.lime_settings(cast(Lime, _instance(method)))
            if settings is None:
                raise ValueError(
                    "a `Lime` with a kernel or model of your own cannot be solved from coalitions: "
                    "give captum's default, or one of its lasso, ridge and linear models."
                )
            return self._as("local linear model", **settings, law=self._law())
        if kind is PartitionShap:
            return self._partition(cast(PartitionShap, _instance(method)), levels)
        raise ValueError(
            f"{kind.__name__} cannot be solved from coalitions: give FeatureAblation, "
            "FeatureInclusion, KernelShap, Lime, PartitionShap, ShapleyValues or "
            "ShapleyValueSampling."
        )

    @property
    def is_complete(self) -> bool:
        """Whether every coalition was scored."""
        n = self.design.n_features
        if 2**n > len(self.masks):
            return False
        codes = (self.plan.masks.long() << torch.arange(n, device="cpu")).sum(1)
        return len(codes.unique()) == 2**n

    def _as(self, solved: str, **options: Any) -> "Evidence":
        return replace(self, design=replace(self.design, solved=solved, options=options))

    def _each(self, solved: str, what: str, kind: type[PerturbationAttribution]) -> "Evidence":
        found = self._as(solved)
        try:
            found.solve()
        except ValueError as error:
            raise ValueError(
                f"the coalitions of {self.design.planned} do not hold {what}: attribute again with "
                f"{kind.__name__}."
            ) from error
        return found

    def _shapley(self, kind: type[PerturbationAttribution]) -> str:
        planned = self.design.planned
        if self.is_complete:
            return "exact"
        if planned not in _UNIFORM_SIZES:
            raise ValueError(
                f"the coalitions of {planned} do not determine Shapley values, which need those of "
                f"every size: attribute again with {kind.__name__}."
            )
        is_walk = planned == "antithetic permutations" and kind is not KernelShap
        return planned if is_walk or planned == "few pairs" else "paired kernel regression"

    def _law(self) -> str:
        """The distribution of the coalitions' sizes, for weights that convert it to Lime's."""
        planned = self.design.planned
        if planned == "local linear model" or planned == "exact":
            return "half"
        if planned in _UNIFORM_SIZES:
            sampled = self.plan.masks[self.design.n_anchors :]
            complete = self.is_complete and len(sampled) == 2**self.design.n_features
            return "half" if complete else "uniform"
        raise ValueError(
            f"the coalitions of {planned} do not determine Lime's estimates: attribute again with "
            "Lime, or refit those of KernelShap or ShapleyValueSampling."
        )

    def _partition(self, method: PartitionShap, levels: Sequence[Sequence[int]]) -> "Evidence":
        planned, known = self.design.planned, self.design.options.get("tree")
        if planned == "hierarchical search":  # its hierarchy has the prompt's features only
            known = None
        tree = known
        if method.hierarchy is not None or tree is None:
            n_prompt, n_features = 1 + max(self.design.columns), self.design.n_features
            tree = nesting(method.hierarchy, n_prompt, n_features, levels=levels)
        if planned == "nested orders" and tree == known and method.scheme == "orders":
            return self._as("nested orders", tree=tree)
        if method.scheme == "splits":
            tree = binary(tree)
        found = self._as("best-first splits", tree=tree)
        if not found.unresolved():
            return self._as("exact Owen values", tree=tree)
        if method.scheme == "orders":
            raise ValueError(
                f"the coalitions of {planned} do not separate every group of this nesting: "
                'attribute again, or refit with `scheme="splits"`, which shares evenly where they '
                "do not."
            )
        return found


def _instance(method: Method) -> PerturbationAttribution:
    return method(_nothing) if isinstance(method, type) else method


def _nothing(*_: Any) -> None:
    """A placeholder for a forward function that is not called."""


def _solve_lime(
    plan: Plan,
    values: Tensor,
    scope: Scope,
    *,
    kernel_width: float,
    law: str = "half",
    warns: bool = True,
    **rest: Any,
) -> Solution:
    """Lime's fit, on coalitions of its own distribution or reweighted to it."""
    kernel = partial(coalitions.cosine_kernel, width=kernel_width)
    if law == "uniform":
        kernel = partial(_reweighted, kernel, warns)
    return coalitions.solve_lime(plan, values, scope, kernel=kernel, **rest)


def _reweighted(kernel: Callable[[Tensor], Tensor], warns: bool, masks: Tensor) -> Tensor:
    """LIME's kernel, reweighted from the sampled sizes to independent features at 1/2.

    Coalitions of one size are equally likely under every plan that samples all sizes.
    """
    sizes = masks.sum(1)
    n, size = torch.tensor(masks.shape[1], dtype=torch.int64, device="cpu").double(), sizes.double()
    frequency = sizes.bincount()[sizes].double()
    log_weight = (n + 1).lgamma() - (size + 1).lgamma() - (n - size + 1).lgamma() - frequency.log()
    weights = (log_weight - log_weight.max()).exp()
    effective = float(weights.sum().square() / weights.square().sum())
    if warns and effective < 2 * masks.shape[1]:
        warn_user(
            f"{len(masks)} coalitions of all sizes are worth about {effective:.0f} of Lime's, for "
            f"{masks.shape[1]} features: attribute with Lime itself for a reliable fit.",
        )
    return kernel(masks) * weights.clamp_min(torch.finfo(weights.dtype).tiny)


def _solve_nested(plan: Plan, values: Tensor, scope: Scope, **_: Any) -> Solution:
    return solve_nested_orders(plan, values, scope)


SOLVERS: dict[str, Callable[..., Solution]] = {
    "leave-one-out": coalitions.solve_leave_one_out,
    "only one in": coalitions.solve_only_one_in,
    "exact": coalitions.solve_exact,
    "paired kernel regression": coalitions.solve_kernel,
    "few pairs": coalitions.solve_few_pairs,
    "antithetic permutations": coalitions.solve_permutations,
    "local linear model": _solve_lime,
    "nested orders": _solve_nested,
    "exact Owen values": solve_splits,
    "best-first splits": solve_splits,
    "hierarchical search": solve_search,
}


def convert(values: Tensor, given: str, wanted: str, foil_values: Tensor | None = None) -> Tensor:
    """Values converted to another kind.

    Args:
        values: Any shape.
        given, wanted: ``"log_prob"``, ``"prob"``, ``"log_odds"`` or ``"contrast"``.
        foil_values: Log-probability of all foils together, of the same shape.

    Raises:
        ValueError: If they cannot be converted: that would take logits, and so the model.
    """
    if given == wanted:
        return values
    if "contrast" in (given, wanted):
        if foil_values is None:
            raise ValueError(
                'this result holds no values of foils: attribute with `attr_target="contrast"`, '
                "which also stores log-probabilities."
            )
        foils = foil_values.double()
        if wanted == "contrast":
            return convert(values, given, "log_prob").double() - foils
        return convert(values.double() + foils, "log_prob", wanted)
    known = ("log_prob", "prob", "log_odds")
    if given not in known or wanted not in known:
        raise ValueError(
            f"values of {given!r} do not determine {wanted!r}: without the model only "
            f"{', '.join(map(repr, known))} can be turned into one another. Attribute again."
        )
    values = values.double()
    log_prob = {
        "log_prob": values,
        "prob": values.clamp_min(torch.finfo(values.dtype).tiny).log(),
        "log_odds": torch.nn.functional.logsigmoid(values),
    }[given]
    if wanted == "log_prob":
        return log_prob
    if wanted == "prob":
        return log_prob.exp()
    # log(1 - p) without cancellation; a certain token still has finite log-odds in float64
    rest = torch.log(-torch.expm1(log_prob.clamp_max(-1e-16)))
    return log_prob - rest


def method_name(method: Method) -> str:
    """The name of a method's class."""
    return (method if isinstance(method, type) else type(method)).__name__


def jackknife_error(replicates: Tensor) -> Tensor:
    """Standard errors from `Evidence.replicates`, or from any linear function of them.

    Args:
        replicates: Shape ``(n_replicates, ...)``.

    Returns:
        Shape ``(...)``, widened so that 1.96 of them cover 95 % despite few replicates.
    """
    n = len(replicates)
    spread = (replicates - replicates.mean(0)).square().sum(0) * (n - 1) / n
    return spread.sqrt() * normal_scale(n - 1)
