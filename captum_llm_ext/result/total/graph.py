"""Which attributions are edges of chains: how columns are merged, and what is noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_llm_ext.result.causes import joined_name
from captum_llm_ext.result.influence import Influence, influence, kept
from captum_llm_ext.result.levels import prompt_level

if TYPE_CHECKING:
    from captum_llm_ext.result.numbers import ResultNumbers


@dataclass(frozen=True)
class View:
    """How columns of a result are merged.

    Attributes:
        names: Names of the prompt's parts.
        level: Unit of the parts.
        columns: Per column of `full_attr` its part, or output feature after the parts; -1 for a
            copy of another column.
        feature_of: Per target token its output feature.
        n_output: Number of output features.
    """

    names: list[str]
    level: str
    columns: list[int]
    feature_of: list[int | None]
    n_output: int

    @classmethod
    def of(cls, result: "ResultNumbers", every: Sequence[int], level: str | None) -> "View":
        """The view of a result by parts of a level (None: by features).

        Args:
            result: The result.
            every: Feature of each column of `full_attr`.
            level: The level's name.

        Raises:
            ValueError: If there is no such level, or a word's tokens are explained by
                probabilities, which are not additive.
        """
        n_columns, n_output = len(result.input_tokens), len(result.output_features or ())
        features = every[:n_columns]
        unit = str(result.provenance.get("unit") or "feature")
        if level is not None and level != unit:
            names, part_of = prompt_level(result, level)
            columns = list(part_of)
        else:
            first = {feature: i for i, feature in reversed(list(enumerate(features)))}
            order = sorted(first, key=lambda feature: first[feature])
            place = {feature: i for i, feature in enumerate(order)}
            names = [
                joined_name([result.input_tokens[c] for c in range(n_columns) if features[c] == f])
                for f in order
            ]
            columns = [place[f] if first[f] == c else -1 for c, f in enumerate(features)]
        columns += range(len(names), len(names) + n_output)
        pieces = [piece.feature for piece in result.output_pieces] if n_output else []
        n_target = len(result.output_tokens)
        if n_output and not pieces:  # an early version: features are tokens
            pieces = [t if t < n_output else None for t in range(n_target)]
        owned: list[int | None] = list(pieces) if n_output else [None] * n_target
        counts = [owned.count(feature) for feature in range(n_output)]
        if max(counts, default=1) > 1 and result.provenance.get("attr_target") == "prob":
            raise ValueError(
                "probabilities of a word's tokens do not add up to that of the word: take "
                '`result.refit(attr_target="log_prob").total()`.'
            )
        return cls(names, level or unit, columns, owned, n_output)

    @property
    def n_prompt(self) -> int:
        """Number of parts of the prompt."""
        return len(self.names)

    def tokens(self, attributions: Tensor) -> Tensor:
        """Merged columns per token: ``(..., T, columns)`` to ``(..., T, n_prompt + n_output)``."""
        used = [c for c, part in enumerate(self.columns) if part >= 0]
        at = torch.tensor([self.columns[c] for c in used], dtype=torch.int64, device="cpu")
        wide = attributions.new_zeros(*attributions.shape[:-1], self.n_prompt + self.n_output)
        return wide.index_add_(-1, at, attributions[..., used])

    def features(self, attributions: Tensor) -> Tensor:
        """Sums over the tokens of each output feature."""
        tokens = self.tokens(attributions)
        summed = tokens.new_zeros(*tokens.shape[:-2], self.n_output, tokens.shape[-1])
        for t, feature in enumerate(self.feature_of):
            if feature is not None:
                summed[..., feature, :] += tokens[..., t, :]
        return summed

    def within(self, spans: Sequence[range], n_tokens: int) -> tuple[Tensor, Tensor]:
        """Which tokens are in each span, and which output features lie in it as a whole.

        Returns:
            float64 ``(n_spans, n_tokens)`` and bool ``(n_spans, n_output)``.
        """
        inside = torch.zeros(len(spans), n_tokens, dtype=torch.float64, device="cpu")
        for row, span in zip(inside, spans, strict=True):
            row[span.start : span.stop] = 1
        own = torch.ones(len(spans), self.n_output, dtype=torch.bool, device="cpu")
        for t, feature in enumerate(self.feature_of):
            if feature is not None:
                own[:, feature] &= inside[:, t] > 0
        return inside, own

    def noise(self, rounding: Tensor) -> Tensor:
        """Rounding error of the value of each output feature."""
        summed = rounding.new_zeros(self.n_output)
        for t, feature in enumerate(self.feature_of):
            if feature is not None:
                summed[feature] += rounding[t]
        return summed


@dataclass(frozen=True)
class Graph:
    """Converts attributions to influence.

    Attributes:
        view: How columns are merged.
        errors: Standard errors of tokens and of output features; sums assume independence.
        rounding: Rounding error of the value of each token, and of each feature.
        floor: See `kept`.
    """

    view: View
    errors: tuple[Tensor, Tensor]
    rounding: tuple[Tensor, Tensor]
    floor: float

    @classmethod
    def of(cls, result: "ResultNumbers", view: View, floor: float) -> "Graph":
        """The graph of a result, merged by `view`."""
        squares = result.full_attr_se.double().cpu().square()
        noise = result.noise_floor
        rounding = squares.new_zeros(len(squares)) if noise is None else noise.double().cpu()
        return cls(
            view,
            (view.tokens(squares).sqrt(), view.features(squares).sqrt()),
            (rounding[:, None], view.noise(rounding)[:, None]),
            floor,
        )

    def kept(self, attributions: Tensor, errors: float = 1.0) -> tuple[Tensor, Tensor]:
        """Which attributions of tokens and features count, with errors and floor scaled."""
        sums = self.view.tokens(attributions), self.view.features(attributions)
        first, second = (
            kept(found, errors * error, noise, errors * self.floor)
            for found, error, noise in zip(sums, self.errors, self.rounding, strict=True)
        )
        return first, second

    def influence(self, attributions: Tensor) -> tuple[Influence, Influence]:
        """Influence on tokens and on output features."""
        keep, keep_features = self.kept(attributions)
        n = self.view.n_prompt
        return (
            influence(self.view.tokens(attributions), keep, n),
            influence(self.view.features(attributions), keep_features, n),
        )
