"""Attributions of a whole answer to the largest parts of the prompt.

The direct effects of a part on every token, summed, are no amount of the whole answer if earlier
output takes part as a cause: most coalitions lack some of it. Here the answer is held as it is, and
what is attributed is its log-probability, the sum over its tokens. By the chain rule this is the
whole effect of a part on the answer, also through the words in between.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.base.amounts import plus_minus
from captum_llm_ext.coalitions import Plan, Scope, solve_exact
from captum_llm_ext.result.design import Design
from captum_llm_ext.result.levels import coarsest, prompt_levels

SHAPLEY, LEFT_OUT, ALONE = "Shapley values", "leave-one-out", "only one in"
_KINDS = {
    **dict.fromkeys(("exact", "paired kernel regression"), SHAPLEY),
    **dict.fromkeys(("antithetic permutations", "nested orders"), SHAPLEY),
    **{name: name for name in (LEFT_OUT, ALONE)},
}


@dataclass(frozen=True)
class AnswerAttribution:
    """Attributions of the whole answer, held as it is, to the largest parts of the prompt.

    Attributes:
        level: Level of the parts: the coarsest with at least two.
        part_of: Index of the part of each column of `token_attr`.
        attributions: Shape ``(n_parts,)``, in the unit of the value (nats).
        standard_errors: Same shape: 0 if exact, NaN if unknown.
        full_value: Value of the answer after the whole prompt: its log-probability.
        empty_value: Value with every part of the prompt absent, averaged over draws; NaN if it was
            not scored.
        empty_error: Its standard error: 0 if exact, NaN if unknown.
        estimator: How the coalitions of parts were solved: ``"exact"``, ``"leave-one-out"``…
        n_evaluations: Number of rows scored for this alone.
    """

    level: str
    part_of: list[int]
    attributions: Tensor
    standard_errors: Tensor
    full_value: float
    empty_value: float
    empty_error: float
    estimator: str
    n_evaluations: int

    @property
    def gain(self) -> float:
        """What the whole prompt gives the answer: full minus empty value."""
        return self.full_value - self.empty_value

    @property
    def kind(self) -> str | None:
        """`SHAPLEY`, whose attributions sum to `gain`, `LEFT_OUT` or `ALONE`."""
        return kind_of(self.estimator)

    def gain_in_words(self, unit: str | None) -> str:
        """``of the 41.2 nats that the prompt gives the answer``; empty if that is unknown.

        Args:
            unit: Unit of the value, if known.
        """
        if not math.isfinite(self.gain):
            return ""
        error = plus_minus(self.empty_error, 1)
        amount = f"{self.gain:,.1f}{error} {unit or ''}".strip().replace("-", "−")
        if self.kind == SHAPLEY:
            return f"of the {amount} that the prompt gives the answer"
        return f"the whole prompt gives the answer {amount}"

    def to(self, like: Tensor) -> "AnswerAttribution":
        """A copy whose tensors have the device and dtype of another one."""
        numbers = (part.to(like, copy=True) for part in (self.attributions, self.standard_errors))
        attributions, errors = numbers
        return replace(self, attributions=attributions, standard_errors=errors)

    def to_dict(self) -> dict[str, Any]:
        """The fields without the tensors, as JSON values."""
        return {
            "level": self.level,
            "part_of": self.part_of,
            "full_value": self.full_value,
            "empty_value": self.empty_value,
            "empty_error": self.empty_error,
            "estimator": self.estimator,
            "n_evaluations": self.n_evaluations,
        }

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], attributions: Tensor, standard_errors: Tensor
    ) -> "AnswerAttribution":
        """The inverse of `to_dict`."""
        # JSON has no NaN.
        known: dict[str, Any] = {n: math.nan if held is None else held for n, held in data.items()}
        return cls(attributions=attributions, standard_errors=standard_errors, **known)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of values from independent draws, and its standard error; NaN if there is one."""
    n = len(values)
    error = float(values.double().std() / n**0.5) if n > 1 else math.nan
    return float(values.double().mean()), error


def kind_of(estimator: str) -> str | None:
    """What an estimator estimates: `SHAPLEY`, `LEFT_OUT` or `ALONE`; None for others."""
    return _KINDS.get(estimator)


def is_at_hand(estimator: str, *, are_features: bool, has_output: bool) -> bool:
    """Whether the coalitions of an attribution hold the whole answer's.

    Args:
        estimator: Name of the estimator that solved them.
        are_features: Whether the largest parts are the features themselves.
        has_output: Whether earlier output was a cause of some token.
    """
    if estimator == "exact":  # all coalitions, those of the parts with all of the answer among them
        return True
    is_held = estimator == LEFT_OUT or not has_output
    return are_features and is_held and kind_of(estimator) is not None


def answer_at_hand(result: Any) -> AnswerAttribution | None:
    """The same from the result's own coalitions, if these hold the answer: see `is_at_hand`."""
    design, n_target = result.design, len(result.output_tokens)
    level = coarsest(prompt_levels(result))
    adds_up = n_target == 1 or result.provenance.get("attr_target") != "prob"
    if design is None or design.correction is not None or not adds_up:
        return None
    part_of: list[int] = design.columns if level is None else level["part_of"]
    has_output = design.n_features > 1 + max(design.columns, default=-1)
    n_parts, are_features = 1 + max(part_of, default=-1), level is None
    is_there = is_at_hand(design.solved, are_features=are_features, has_output=has_output)
    # Errors of an API's answers are known of features alone.
    if n_parts < 2 or not is_there or (result.rung is not None and not are_features):
        return None
    unit = result.provenance.get("unit") or "finest"
    name = str(unit if level is None else level["name"])
    if design.solved == "exact" and (has_output or not are_features):
        return _of_all_coalitions(result, design, name, part_of)
    first = [part_of.index(part) for part in range(n_parts)]
    if n_target == 1:  # of an API they include those of its answers
        errors = result.full_attr_se[0]
    else:
        errors = result.attribute_span(0, n_target).standard_errors
    empty, spread = math.nan, math.nan
    if not has_output:
        rows = result.values[~result.masks.any(1)].sum(1)
        empty = float(result.empty_values.sum())
        spread = 0.0 if design.deterministic else mean_and_error(rows)[1]
    return AnswerAttribution(
        name,
        list(part_of),
        result.full_attr.sum(0)[first],
        errors[first],
        float(result.full_values.sum()),
        empty,
        spread,
        design.solved,
        0,
    )


def _of_all_coalitions(
    result: Any, design: Design, level: str, part_of: Sequence[int]
) -> AnswerAttribution:
    """From every coalition of the features: those in which each part is present as a whole."""
    n_parts, n_features = 1 + max(part_of), 1 + max(design.columns)
    of = dict(zip(design.columns, part_of, strict=True))
    unions = torch.tensor([of[i] for i in range(n_features)], dtype=torch.int64, device="cpu")
    masks = result.masks.cpu()
    masks, answer = masks[:, :n_features], masks[:, n_features:]
    first = [unions.tolist().index(part) for part in range(n_parts)]
    is_whole = (masks == masks[:, first][:, unions]).all(1) & answer.all(1)
    values = result.values.cpu().double()[is_whole].sum(1, keepdim=True)
    n_anchors = int(is_whole[: design.n_anchors].sum())
    plan = Plan(masks[is_whole][:, first], result.draws.cpu()[is_whole], n_anchors)
    found = solve_exact(plan, values, Scope.of_all(1, n_parts))
    empty, spread = mean_and_error(values[~plan.masks.any(1), 0])
    like = result.full_values
    return AnswerAttribution(
        level,
        list(part_of),
        found.attributions[0].to(like),
        found.standard_errors[0].to(like),
        float(found.full_values[0]),
        empty,
        0.0 if design.deterministic else spread,
        design.solved,
        0,
    )
