"""Effects of replacement texts, which values contain at random and attributions do not need.

A value depends on which features are present, and on the texts that were drawn for the others. Only
its mean over draws is attributed; the rest is noise. On real prompts, half to nine tenths of the
variance that a regression on masks leaves is what single texts do by themselves, whatever else is
absent. This part is estimated, and subtracted: mean squared errors of Shapley values are then 1.2
to 12 times smaller on four prompts of a real model, 1.3 on two of the demo
(`benchmarks/random_texts.py`).

Its mean is zero for every coalition, since the probabilities of the texts are known, and it is
estimated from other draws than the one that it is subtracted from. So attributions have the same
expectation as without, and their standard errors are valid: a control variate, fitted across folds
(Chernozhukov et al. 2018, "Double/debiased machine learning", section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Scope
from captum_llm_ext.coalitions.plans import Plan

# Parts of the draws, each of which is adjusted by effects estimated from the others.
_FOLDS = 8
# Below, effects are not estimated: some parts would hold a single draw.
_FEWEST_DRAWS = 2 * _FOLDS
# Penalties tried for the effects of texts, in observations, and the one of the features.
_PENALTIES = (1.0, 3.0, 10.0, 30.0)
_PENALTY_OF_FEATURES = 0.3
# Effects are removed if that leaves less than this share of the squared left-out errors, so that
# values that do not depend on the texts stay as they are. Chosen, not measured.
_LEAST_LEFT = 0.95
# Columns of the regression, beyond which it would take longer than the model.
_MOST_COLUMNS = 1024


@dataclass(frozen=True)
class DrawnTexts:
    """Which replacement text each coalition has for each unit: features that are drawn together.

    Attributes:
        texts: int32, ``(n_coalitions, n_units)``: the index of the text; -1 where the unit was not
            drawn.
        probabilities: float64, ``(n_units, n_texts)``: of each text; 0 beyond a unit's last one.
        columns: int64, ``(n_units,)``: the last feature of each unit. Targets that depend on this
            column depend on the unit.
    """

    texts: Tensor
    probabilities: Tensor
    columns: Tensor

    def rows(self, rows: Tensor | slice) -> "DrawnTexts":
        """The texts of some of the coalitions."""
        return DrawnTexts(self.texts[rows], self.probabilities, self.columns)

    def padded(self, n: int) -> "DrawnTexts":
        """The same, and `n` more coalitions of which no texts are known."""
        texts = torch.nn.functional.pad(self.texts, (0, 0, 0, n), value=-1)
        return DrawnTexts(texts, self.probabilities, self.columns)


def without_draw_effects(plan: Plan, values: Tensor, scope: Scope, drawn: DrawnTexts) -> Tensor:
    """Values without what the drawn texts do by themselves.

    Args:
        plan: The coalitions, with random replacement texts.
        values: Shape ``(n_coalitions, n_target)``; NaN where a target's required column is absent.
        scope: One entry per target.
        drawn: The texts of the coalitions.

    Returns:
        The same shape, float64; unchanged for targets whose values the texts do not predict.
    """
    found = values.double().clone()
    design = _Design.of(plan, drawn)
    if design is None:
        return found
    for column in scope.required.unique().tolist():
        targets = (scope.required == column).nonzero()[:, 0]
        rows = torch.arange(len(values), device="cpu")
        if column >= 0:
            rows = rows[plan.masks[:, column]]
        ours = found[rows[:, None], targets]
        effects = _effects(design.part(rows), ours, plan.draws[rows], scope.n_visible[targets])
        found[rows[:, None], targets] = ours - effects
    return found


@dataclass(frozen=True)
class _Design:
    """The columns of a regression of values on features and texts, in the order of the features.

    A target that depends on the first n features depends on the first so many columns.

    Attributes:
        x: ``(n_rows, n_columns)``: a constant, then per feature whether it is present, and for the
            units that end with it which text was drawn, minus its probability (0 if not drawn).
        features: int64, ``(n_columns,)``: the feature of each column; -1 for the constant.
        is_text: bool, ``(n_columns,)``.
    """

    x: Tensor
    features: Tensor
    is_text: Tensor

    @classmethod
    def of(cls, plan: Plan, drawn: DrawnTexts) -> "_Design | None":
        """The design of a plan; None if nothing was drawn at random, or it is too large."""
        constant = torch.ones(len(plan.masks), 1, dtype=torch.float64, device="cpu")
        parts, features, is_text = [constant], [-1], [False]
        for feature in range(plan.n_features):
            parts.append(plan.masks[:, feature, None].double())
            features.append(feature)
            is_text.append(False)
            for unit in (drawn.columns == feature).nonzero()[:, 0].tolist():
                columns = _columns_of(drawn.texts[:, unit], drawn.probabilities[unit])
                parts.append(columns)
                features += [feature] * columns.shape[1]
                is_text += [True] * columns.shape[1]
        if not any(is_text) or len(is_text) > _MOST_COLUMNS:
            return None
        return cls(
            torch.cat(parts, 1),
            torch.tensor(features, dtype=torch.int64, device="cpu"),
            torch.tensor(is_text, dtype=torch.bool, device="cpu"),
        )

    def part(self, rows: Tensor) -> "_Design":
        """The design of some of the rows."""
        return _Design(self.x[rows], self.features, self.is_text)


def _columns_of(texts: Tensor, probabilities: Tensor) -> Tensor:
    """Indicators of a unit's texts minus their probabilities, for the texts that were drawn."""
    is_drawn = texts >= 0
    seen = texts[is_drawn].long().unique()
    if len(seen) < 2:
        return torch.zeros(len(texts), 0, dtype=torch.float64, device="cpu")
    found = (texts[:, None] == seen).double() - probabilities[seen]
    return found * is_drawn[:, None]


def _effects(design: _Design, values: Tensor, draws: Tensor, n_visible: Tensor) -> Tensor:
    """What the texts do to each value, ``(n_rows, n_target)``, estimated from other draws."""
    numbers, draw = draws.unique(return_inverse=True)
    nothing = torch.zeros_like(values)
    if len(numbers) < _FEWEST_DRAWS:
        return nothing
    fold = draw % _FOLDS
    x, is_text = design.x, design.is_text
    widths = [int((design.features < n).sum()) for n in n_visible.tolist()]
    whole = x.T @ x, x.T @ values
    found = [torch.zeros_like(values) for _ in _PENALTIES]
    errors = torch.zeros(1 + len(_PENALTIES), values.shape[1], dtype=torch.float64, device="cpu")
    for number in range(_FOLDS):
        ours = fold == number
        x_out, y_out = x[ours], values[ours]
        gram, moments = whole[0] - x_out.T @ x_out, whole[1] - x_out.T @ y_out
        plain = _solved(gram, moments, _PENALTY_OF_FEATURES, torch.inf, is_text, widths)
        errors[0] += (y_out - x_out @ plain).square().sum(0)
        for i, penalty in enumerate(_PENALTIES):
            fit = _solved(gram, moments, _PENALTY_OF_FEATURES, penalty, is_text, widths)
            errors[1 + i] += (y_out - x_out @ fit).square().sum(0)
            found[i][ours] = x_out[:, is_text] @ fit[is_text]
    # Less is a gain by chance.
    errors[0] *= _LEAST_LEFT
    best = errors.argmin(0)
    every = torch.stack([nothing, *found])
    return every[best, :, torch.arange(values.shape[1], dtype=torch.int64, device="cpu")].T


def _solved(
    gram: Tensor,
    moments: Tensor,
    of_features: float,
    of_texts: float,
    is_text: Tensor,
    widths: Sequence[int],
) -> Tensor:
    """Coefficients of a ridge regression per target, on its first `widths` columns alone.

    The Cholesky factor of the leading columns is the leading part of that of all of them: one
    factorisation serves all targets.
    """
    kept = torch.ones_like(is_text) if of_texts < torch.inf else ~is_text
    columns = kept.nonzero()[:, 0]
    penalties = torch.full((len(columns),), of_features, dtype=torch.float64, device="cpu")
    penalties[is_text[columns]] = of_texts
    factor = torch.linalg.cholesky(gram[columns][:, columns] + penalties.diag())
    forward = torch.linalg.solve_triangular(factor, moments[columns], upper=False)
    found = torch.zeros_like(moments)
    ends = kept.cumsum(0)
    for width in sorted(set(widths)):
        n = int(ends[width - 1])
        targets = torch.tensor(
            [t for t, w in enumerate(widths) if w == width], dtype=torch.int64, device="cpu"
        )
        part = torch.linalg.solve_triangular(factor[:n, :n].T, forward[:n, targets], upper=True)
        found[columns[:n, None], targets] = part
    return found
