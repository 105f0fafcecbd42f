"""Attributions of single features, of spans of the answer, of groups and of redundant pairs."""

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
_MOST_NAMES = 3  # of the columns of one feature


def unit_of(result: Any) -> str | None:
    """Unit of a result's attributions; None if unknown."""
    value = str(result.provenance.get("attr_target"))
    # The slope of a value has another unit than the value.
    is_slope = result.provenance.get("unsigned") and value != "attention"
    return None if is_slope else _UNITS.get(value)


class Cause(NamedTuple):
    """One feature's share in a target token.

    Attributes:
        name: The feature.
        attribution: In the unit of the value (nats for log-probabilities).
        standard_error: 0 where the attribution is exact, NaN where it cannot be told.
        column: Of `full_attr`.
        is_output: Whether it is earlier output, not a part of the prompt.
        is_unsigned: Whether the attribution is a size, which neither raises nor lowers.
        label: What it is shown as, where that is not its name: ``"the #4"``, ``"·est"``.
        is_marked: Whether it is told from nothing (`GenerationAttributionResult.marked`).
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
            where: Said behind the name.
            most: Columns that the name may take at most.
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
    """The strongest causes in two blocks: `k` in the prompt, then `k` in the output before.

    Each by falling magnitude; zeros are no causes.

    Args:
        names: One per column.
        attributions, errors: Shape ``(n_columns,)``.
        n_prompt: Columns of the prompt, which come first.
        k: How many at most in each block.
        features: Per column its feature. Columns of one feature are one cause, by their names
            together: captum's groups have the group's score at each member.

    Raises:
        ValueError: If `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"`k` is {k}: give how many causes you want, at least 1.")
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
    """Attributions of the target tokens from `start` up to `stop`, summed.

    Attributes:
        start, stop: The span; `stop` is the token after it.
        tokens: Printable names of its tokens.
        names: One per column of the result's `full_attr`.
        values: Attributions ``(n_columns,)``, in the unit of the value, summed over the span.
        standard_errors: Same shape.
        n_prompt: Columns of the prompt, which come first.
        features: Per column its feature: columns of one feature are one cause.
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
        """The `k` strongest causes in the prompt, then those in the output before; no zeros."""
        found = self.values, self.standard_errors
        return strongest(self.names, *found, self.n_prompt, k, self.features)

    def __str__(self) -> str:
        causes = ", ".join(map(str, self.top(3))) or "nothing in particular"
        return f"{' '.join(self.tokens)}  ←  {causes}"


class UnresolvedGroup(NamedTuple):
    """Features whose group was not split everywhere, and the total that they share equally.

    Attributes:
        names: Of the features.
        columns: Of `full_attr`.
        attributions: Shape ``(n_target,)``: what was shared evenly among them; a part of what
            their columns hold.
    """

    names: list[str]
    columns: list[int]
    attributions: Tensor


class Redundancy(NamedTuple):
    """Two redundant features: removing either changes little, removing both changes much.

    Attributes:
        target: Position of the target token.
        names: Of the two features.
        columns: Of `full_attr`.
        alone: What is lost without the first, and without the second, in the unit of the value.
        together: What is lost without both.
        z_score: Of ``together`` less the sum of ``alone``, in standard errors; infinite where every
            coalition was scored.
    """

    target: int
    names: tuple[str, str]
    columns: tuple[int, int]
    alone: tuple[float, float]
    together: float
    z_score: float
