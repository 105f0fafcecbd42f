"""Attributions of single features, spans of the answer, groups and redundant pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from captum_llm_ext.base.amounts import plus_minus
from captum_llm_ext.base.terminal import one_line, shortened

_UNITS = {
    "log_prob": "nats",
    "log_odds": "nats of log-odds",
    "logit": "logits",
    "prob": "probability",
    "contrast": "nats against foils",
    "attention": "share",
}
_MOST_NAMES = 3  # names shown of a feature's columns; chosen, not measured


def unit_of(result: Any) -> str | None:
    """Unit of a result's attributions; None if unknown."""
    value = str(result.provenance.get("attr_target"))
    # A gradient has another unit than the value.
    is_slope = result.provenance.get("unsigned") and value != "attention"
    return None if is_slope else _UNITS.get(value)


class Cause(NamedTuple):
    """One feature's attribution for a target token or a span.

    Attributes:
        name: The feature.
        attribution: The attribution, in the unit of the value (nats for log-probabilities).
        standard_error: 0 if the attribution is exact, NaN if unknown.
        column: Column of `full_attr`.
        is_output: Whether it is earlier output, rather than part of the prompt.
        is_unsigned: Whether the attribution is a magnitude without a sign.
        label: Displayed name, if it differs from `name`: ``"the #4"``, ``"·est"``.
        is_marked: Whether it is significant (`GenerationAttributionResult.marked`).
    """

    name: str
    attribution: float
    standard_error: float
    column: int
    is_output: bool
    is_unsigned: bool = False
    label: str = ""
    is_marked: bool = False

    def __str__(self) -> str:
        return self.describe(" (output)" * self.is_output)

    def describe(self, where: str = "", most: int | None = None) -> str:
        """``"lawyer. +5.07 ± 0.05"``.

        Args:
            where: Text after the name.
            most: Maximum width of the name.
        """
        name = one_line((self.label or self.name).strip())
        name = name if any(map(str.isalnum, name)) else repr(self.label or self.name)
        name = name if most is None else shortened(name, most)
        number = f"{self.attribution:.2f}" if self.is_unsigned else f"{self.attribution:+.2f}"
        return f"{name}{where} {number}{plus_minus(self.standard_error)}"


def strongest(
    names: Sequence[str],
    attributions: Tensor,
    errors: Tensor,
    n_prompt: int,
    k: int,
    features: Sequence[int] | None = None,
) -> list[Cause]:
    """The strongest causes in two blocks: `k` in the prompt, then `k` in earlier output.

    Each by decreasing magnitude; zeros are left out.

    Args:
        names: One per column.
        attributions, errors: Shape ``(n_columns,)``.
        n_prompt: Columns of the prompt, which come first.
        k: Maximum number in each block.
        features: Feature of each column. Columns of one feature are one cause with joined names:
            captum's groups repeat the group's score at each member.

    Raises:
        ValueError: If `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"`k` is {k}: give the number of causes, at least 1.")
    columns: dict[int, list[int]] = {}
    for column, feature in enumerate(features or range(len(names))):
        columns.setdefault(feature, []).append(column)
    first = [members[0] for members in columns.values()]
    joined = {members[0]: joined_name([names[c] for c in members]) for members in columns.values()}
    order = [
        first[i] for i in attributions[first].abs().argsort(descending=True, stable=True).tolist()
    ]
    blocks = ([c for c in order if c < n_prompt], [c for c in order if c >= n_prompt])
    return [
        Cause(joined[c], float(attributions[c]), float(errors[c]), c, c >= n_prompt)
        for block in blocks
        for c in block[:k]
        if attributions[c] != 0
    ]


def joined_name(names: Sequence[str]) -> str:
    """Name of a feature from the names of its columns."""
    if len(names) == 1:
        return names[0]
    more = [f"… ({len(names)})"] if len(names) > _MOST_NAMES else []
    return " + ".join([*(name.strip() for name in names[:_MOST_NAMES]), *more])


@dataclass(frozen=True)
class SpanAttribution:
    """Attributions summed over the target tokens from `start` up to `stop`.

    Attributes:
        start, stop: The span; `stop` is exclusive.
        tokens: Printable names of its tokens.
        names: One per column of the result's `full_attr`.
        values: Attributions ``(n_columns,)``, in the unit of the value, summed over the span.
        standard_errors: Same shape.
        n_prompt: Number of prompt columns, which come first.
        features: Feature of each column; columns of one feature are one cause.
    """

    start: int
    stop: int
    tokens: list[str]
    names: list[str]
    values: Tensor
    standard_errors: Tensor
    n_prompt: int
    features: Sequence[int] | None = None

    def top(self, k: int = 5) -> list[Cause]:
        """The `k` strongest causes in the prompt, then those in earlier output; no zeros."""
        found = self.values, self.standard_errors
        return strongest(self.names, *found, self.n_prompt, k, self.features)

    def __str__(self) -> str:
        causes = ", ".join(map(str, self.top(3))) or "nothing in particular"
        return f"{' '.join(self.tokens)}  ←  {causes}"


class UnresolvedGroup(NamedTuple):
    """Features whose group was not split for every token, and the total that they share equally.

    Attributes:
        names: Names of the features.
        columns: Their columns of `full_attr`.
        attributions: The total shared equally among them, ``(n_target,)``; part of the values in
            their columns.
    """

    names: list[str]
    columns: list[int]
    attributions: Tensor


class Redundancy(NamedTuple):
    """Two redundant features: removing either changes little, removing both changes much.

    Attributes:
        target: Position of the target token.
        names: Names of the two features.
        columns: Their columns of `full_attr`.
        alone: Loss without the first, and without the second, in the unit of the value.
        together: Loss without both.
        z_score: ``together`` minus the sum of ``alone``, in standard errors; infinite if every
            coalition was scored.
    """

    target: int
    names: tuple[str, str]
    columns: tuple[int, int]
    alone: tuple[float, float]
    together: float
    z_score: float
