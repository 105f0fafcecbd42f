"""`BaselineComparison`: results under several baselines, and where they disagree."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from captum_llm_ext.base.amounts import plus_minus
from captum_llm_ext.base.arguments import at_least_one
from captum_llm_ext.evaluation.sensitivity.views import Verdict, View
from captum_llm_ext.result import Cause, GenerationAttributionResult
from captum_llm_ext.result.causes import unit_of
from captum_llm_ext.result.foils import foil_ids

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_TOKENS_SHOWN = 20  # tokens listed per verdict; chosen, not measured
_MAX_EXAMPLES = 2  # features listed per pair of baselines; chosen, not measured
Kind = Literal["sign", "rank", "presence"]
_CHANGED: dict[Kind, str] = {
    "sign": "another sign",
    "rank": "another rank",
    "presence": "nothing under one",
}
_VERDICTS: dict[Verdict, str] = {
    "robust": "the same under every baseline",
    "depends": "another one under another baseline",
    "open": "not the same, but within the errors",
    "none": "nothing in particular under any",
}


@dataclass(frozen=True)
class Change:
    """A feature whose attribution differs significantly between two baselines.

    Attributes:
        kind: ``"sign"``: positive under one and negative under the other, beyond its error under
            both. ``"rank"``: it is stronger than some other feature under one and weaker under the
            other, with intervals that do not overlap under either. ``"presence"``: nonzero under
            one and zero under the other, with intervals that do not overlap.
        token: Position of the target token; None for the whole answer.
        feature: Name of the feature.
        column: Column of `full_attr`.
        between: The two baselines.
        attributions: Attributions under the two, in the unit of the value.
        standard_errors: Their standard errors: 0 if exact, NaN if unknown.
        ranks: Ranks by magnitude under the two, 1 = strongest.
        swapped_with: For ``"rank"`` the columns of the features it changes rank with, the largest
            disagreement first.
        importance: Difference of the two attributions, from 0 to 1: relative to twice the largest
            attribution under any baseline.
    """

    kind: Kind
    token: int | None
    feature: str
    column: int
    between: tuple[str, str]
    attributions: tuple[float, float]
    standard_errors: tuple[float, float]
    ranks: tuple[int, int]
    swapped_with: tuple[int, ...]
    importance: float

    def __str__(self) -> str:
        parts = [
            f"{value:+.2f}{plus_minus(error)} ({baseline})"
            for value, error, baseline in zip(
                self.attributions, self.standard_errors, self.between, strict=True
            )
        ]
        ranks = "rank {} and {}".format(*self.ranks)
        return f"{_shown(self.feature)} {' and '.join(parts)}, {ranks}"


@dataclass(frozen=True)
class Agreement:
    """Agreement of two baselines on one target token.

    Attributes:
        token: Position of the target token; None for the whole answer.
        between: The two baselines.
        n_features: Number of features that precede the token.
        n_sign, n_rank, n_presence: How many of them change like this, see `Change`.
        rank_correlation: Spearman's, of magnitudes; insignificant ones are tied at zero. NaN if all
            values of one side are tied.
        top_overlap: Share of the k strongest features that both have in common. NaN if neither has
            any.
    """

    token: int | None
    between: tuple[str, str]
    n_features: int
    n_sign: int
    n_rank: int
    n_presence: int
    rank_correlation: float
    top_overlap: float


@dataclass(frozen=True)
class Conclusion:
    """The strongest cause of one target token under every baseline.

    Attributes:
        token: Position of the target token; None for the whole answer.
        name: The token's text.
        causes: Per baseline the strongest cause, or None.
        verdict: ``"robust"``: the same feature with the same sign under all. ``"depends"``: two
            baselines contradict each other beyond their errors. ``"open"``: they differ, but within
            their errors. ``"none"``: no baseline has a cause.
    """

    token: int | None
    name: str
    causes: dict[str, Cause | None]
    verdict: Verdict

    def __str__(self) -> str:
        under: dict[str, list[str]] = {}
        for baseline, cause in self.causes.items():
            under.setdefault(_cause_without_numbers(cause), []).append(baseline)
        if self.verdict == "robust":
            return f"{_shown(self.name)}  ←  {next(iter(under))}"
        listed = "; ".join(f"{', '.join(by)}: {cause}" for cause, by in under.items())
        return f"{_shown(self.name)}  ←  {listed}"


class _Row(NamedTuple):
    """A target token, or the whole answer (None), and its possible causes."""

    token: int | None
    name: str
    features: list[str]
    view: View


class BaselineComparison:
    """Attributions of one target under several baselines, side by side.

    An attribution counts as zero if it lies within `z` standard errors, or within `least` of the
    largest one under its baseline. If a method gives no standard errors, all differences count, and
    the summary says so.

    The whole answer is explained by `seq_attr`. Its errors are those of `attribute_span` over all
    tokens; for results without a design, the sum of the tokens' errors, an upper bound.

    Args:
        results: At least two, by the name of their baseline; of one target and the same features.
        z: Half the width of intervals, in standard errors.
        k: Number of strongest features compared in `Agreement.top_overlap`.
        least: Attributions up to this share of the largest one count as zero.

    Attributes:
        results: The results by name.
        names: Names of the baselines.

    Raises:
        ValueError: If there are fewer than two results, they explain different texts or values, or
            a number is out of range.
    """

    def __init__(
        self,
        results: Mapping[str, GenerationAttributionResult],
        *,
        z: float = 1.96,
        k: int = 3,
        least: float = 0.01,
    ) -> None:
        check_numbers(z, k, least)
        self.results = dict(results)
        self.names = list(self.results)
        if len(self.names) < 2:
            raise ValueError(f"{len(self.names)} result came: give at least two to compare.")
        self.z, self.k, self.least = z, k, least
        self._first = self.results[self.names[0]]
        for name in self.names[1:]:
            _check_alike(self.names[0], self._first, name, self.results[name])
        self._pairs = list(combinations(range(len(self.names)), 2))

    @property
    def without_errors(self) -> list[str]:
        """Baselines whose attributions have no standard errors."""
        return [n for n, r in self.results.items() if bool(r.full_attr_se.isnan().any())]

    def conclusions(self) -> list[Conclusion]:
        """The strongest cause of every target token, then of the whole answer."""
        return [
            Conclusion(row.token, row.name, self._causes(row), row.view.verdict())
            for row in self._rows
        ]

    def changes(
        self,
        target_token: int | str | None = None,
        kind: Kind | None = None,
    ) -> list[Change]:
        """Features whose attribution differs significantly between baselines.

        Args:
            target_token: Only for this token, by position or text. By default for all tokens and
                the whole answer.
            kind: Only of this kind.

        Returns:
            By decreasing importance.

        Raises:
            ValueError: If there is no such token, or several have this text.
        """
        token = None if target_token is None else self._first.position(target_token)
        return [
            change
            for change in self._changes
            if target_token is None or change.token == token
            if kind is None or change.kind == kind
        ]

    def agreement(self) -> list[Agreement]:
        """Agreement of every two baselines on every target token and on the whole answer."""
        counts = Counter((c.token, c.between, c.kind) for c in self._changes)
        found: list[Agreement] = []
        for row in self._rows:
            for a, b in self._pairs:
                between = self._between(a, b)
                found.append(
                    Agreement(
                        token=row.token,
                        between=between,
                        n_features=len(row.features),
                        n_sign=counts[row.token, between, "sign"],
                        n_rank=counts[row.token, between, "rank"],
                        n_presence=counts[row.token, between, "presence"],
                        rank_correlation=row.view.rank_correlation(a, b),
                        top_overlap=row.view.overlap(a, b, self.k),
                    )
                )
        return found

    def summary(self) -> str:
        """Summary: what holds under every baseline, what does not, and how much changes."""
        lines = [repr(self), "The strongest cause is"]
        conclusions = self.conclusions()
        for verdict, words in _VERDICTS.items():
            those = [c for c in conclusions if c.verdict == verdict]
            if those:
                n_tokens = sum(c.token is not None for c in those)
                lines.append(f"  {words}: {n_tokens} of {len(conclusions) - 1} tokens")
            if verdict != "none":
                lines += [f"    {conclusion}" for conclusion in those[:_MAX_TOKENS_SHOWN]]
                if len(those) > _MAX_TOKENS_SHOWN:
                    lines.append(
                        f"    … and {len(those) - _MAX_TOKENS_SHOWN} more: see `conclusions()`"
                    )
        agreement = self.agreement()
        for a, b in self._pairs:
            lines += self._pair_lines(self._between(a, b), agreement)
        if self.without_errors:
            names = ", ".join(self.without_errors)
            lines.append(f"No standard errors under {names}: differences count as they are.")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        first = self._first
        return (
            f"BaselineComparison({', '.join(self.names)}: {len(first.output_tokens)} target tokens "
            f"× ({len(first.input_tokens)} prompt + {len(first.output_features or ())} output "
            "features))"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        return {
            "names": self.names,
            "z": self.z,
            "k": self.k,
            "least": self.least,
            "without_errors": self.without_errors,
            "results": {name: result.to_dict() for name, result in self.results.items()},
            "conclusions": [_conclusion_dict(conclusion) for conclusion in self.conclusions()],
            "agreement": [_finite(asdict(agreement)) for agreement in self.agreement()],
            "changes": [_finite(asdict(change)) for change in self.changes()],
        }

    def plot(
        self,
        target_token: int | str | None = None,
        show: bool = False,
        *,
        ax: "Axes | None" = None,
        cmap: str | None = None,
    ) -> "tuple[Figure, Axes] | None":
        """Draws one row per baseline and one column per feature, all on one scale.

        Insignificant values are pale, the strongest cause under each baseline is framed, and
        features that change sign or rank between any two baselines are marked below.

        Args:
            target_token: The explained token: its position in the target, or its name in
                `output_tokens`. None: the whole answer.
            show: Show the figure, and return None.
            ax: Axes to draw in; by default a new figure of suitable size.
            cmap: A diverging colour map, centred at zero; by default ``"RdBu"``.

        Returns:
            ``(figure, axes)``, or None if shown.

        Raises:
            ValueError: If there is no such token, or several have this text.
        """
        from captum_llm_ext.result import plot

        token = None if target_token is None else self._first.position(target_token)
        row = next(row for row in self._rows if row.token == token)
        changes = [change for change in self._changes if change.token == token]
        title = "the whole answer" if token is None else repr(row.name.strip() or row.name)
        return plot.baseline_map(
            row.view.attr,
            labels=row.features,
            row_labels=self.names,
            n_prompt=len(self._first.input_tokens),
            pale=row.view.low < 0,
            strongest=row.view.tops,
            changes_sign={change.column for change in changes if change.kind == "sign"},
            changes_rank={change.column for change in changes if change.kind == "rank"},
            ax=ax,
            cmap=cmap,
            show=show,
            title=f"Causes of {title}",
            unit=unit_of(self._first),
        )

    @cached_property
    def _rows(self) -> list[_Row]:
        """Every target token, and finally the whole answer."""
        first, results = self._first, self.results.values()
        attr, se = _stack(r.full_attr for r in results), _stack(r.full_attr_se for r in results)
        scale = attr.abs().amax((1, 2))
        names = [*first.input_tokens, *(first.output_features or ())]
        rows: list[_Row] = []
        for token, name in enumerate(first.output_tokens):
            n = len(first.input_tokens) + _n_before(first, token)
            view = self._view(attr[:, token, :n], se[:, token, :n], scale)
            rows.append(_Row(token, name, names[:n], view))
        whole = _stack(r.seq_attr for r in results)
        view = self._view(whole, _stack(map(_seq_attr_se, results)), whole.abs().amax(1))
        return [*rows, _Row(None, "(the whole answer)", names[: whole.shape[1]], view)]

    def _view(self, attr: Tensor, se: Tensor, scale: Tensor) -> View:
        return View(attr, se, scale, z=self.z, least=self.least)

    @cached_property
    def _changes(self) -> list[Change]:
        """All changes, by decreasing importance."""
        found = [
            change
            for row in self._rows
            for pair in self._pairs
            for change in self._changed(row, *pair)
        ]
        return sorted(found, key=lambda change: -change.importance)

    def _changed(self, row: _Row, a: int, b: int) -> list[Change]:
        view, pair = row.view, [a, b]
        moves = view.moves(a, b).tolist()

        def change(kind: Kind, column: int, others: tuple[int, ...]) -> Change:
            attributions, errors, ranks = (
                tensor[pair, column].tolist() for tensor in (view.attr, view.se, view.ranks)
            )
            return Change(
                kind,
                row.token,
                row.features[column],
                column,
                self._between(a, b),
                tuple(attributions),
                tuple(errors),
                tuple(ranks),
                others,
                moves[column],
            )

        return [
            *(change("sign", column, ()) for column in view.sign_changes(a, b)),
            *(change("rank", c, others) for c, others in view.rank_changes(a, b).items()),
            *(change("presence", column, ()) for column in view.presence_changes(a, b)),
        ]

    def _causes(self, row: _Row) -> dict[str, Cause | None]:
        n_prompt = len(self._first.input_tokens)
        causes: dict[str, Cause | None] = dict.fromkeys(self.names)
        for i, (name, top) in enumerate(zip(self.names, row.view.tops, strict=True)):
            if top is not None:
                attr, se = float(row.view.attr[i, top]), float(row.view.se[i, top])
                causes[name] = Cause(row.features[top], attr, se, top, top >= n_prompt)
        return causes

    def _pair_lines(self, between: tuple[str, str], agreement: Sequence[Agreement]) -> list[str]:
        changes = [c for c in self._changes if c.between == between and c.token is not None]
        n_of = {kind: len({c.column for c in changes if c.kind == kind}) for kind in get_args(Kind)}
        n_features = len(self._first.input_tokens) + len(self._first.output_features or ())
        rows = [r for r in agreement if r.between == between and r.token is not None]
        lines = [
            f"{between[0]} – {between[1]}: of {n_features} features {n_of['sign']} change sign, "
            f"{n_of['rank']} rank, and {n_of['presence']} are nothing under one, for some token; "
            f"mean rank correlation {_nan_mean(r.rank_correlation for r in rows):.2f}, "
            f"{_nan_mean(r.top_overlap for r in rows):.0%} of the top {self.k} shared"
        ]
        kinds: dict[tuple[int | None, int], list[Kind]] = {}
        for change in changes:
            kinds.setdefault((change.token, change.column), []).append(change.kind)
        for change in _examples(changes):
            name = _shown(self._first.output_tokens[change.token or 0])
            changed = ", ".join(_CHANGED[kind] for kind in kinds[change.token, change.column])
            lines.append(f"    {name}  ←  {change}: {changed}")
        return lines

    def _between(self, a: int, b: int) -> tuple[str, str]:
        return self.names[a], self.names[b]


def _examples(changes: Sequence[Change]) -> list[Change]:
    """The largest change of each of the features that change most, including a change of sign.

    Args:
        changes: Changes by decreasing importance.
    """
    of_feature: dict[int, Change] = {}
    for change in changes:
        of_feature.setdefault(change.column, change)
    shown = list(of_feature.values())[:_MAX_EXAMPLES]
    at = {(change.token, change.column) for change in shown}
    sign = [change for change in changes if change.kind == "sign"]
    if sign and not any((change.token, change.column) in at for change in sign):
        shown.append(sign[0])
    return shown


def check_numbers(z: float, k: int, least: float) -> None:
    """Checks the settings of a comparison.

    Raises:
        ValueError: If a number is out of range.
    """
    if not 0 <= z < math.inf:
        raise ValueError(f"`z` is {z!r}: give a number of standard errors, such as 1.96.")
    at_least_one("k", k)
    if not 0 <= least < 1:
        raise ValueError(f"`least` is {least!r}: give a share from 0 to below 1, such as 0.01.")


def _check_alike(
    name: str,
    result: GenerationAttributionResult,
    other_name: str,
    other: GenerationAttributionResult,
) -> None:
    others = _explained(other)
    for what, ours in _explained(result).items():
        if ours != others[what]:
            raise ValueError(
                f"{name!r} and {other_name!r} have different {what}: compare results that differ "
                "in their baselines only, as `compare_baselines` makes them."
            )


def _explained(result: GenerationAttributionResult) -> dict[str, Any]:
    return {
        "targets": result.target.tolist(),
        "prompt features": result.input_tokens,
        "output features": result.output_features,
        "methods": result.provenance.get("method"),
        "values (`attr_target`)": result.provenance.get("attr_target"),
        "foils": foil_ids(result),
    }


def _n_before(result: GenerationAttributionResult, token: int) -> int:
    """Number of generated features that lie wholly before a token."""
    owners = [piece.feature for piece in result.output_pieces]
    return len(set(owners[:token]) - set(owners[token:]) - {None})


def _seq_attr_se(result: GenerationAttributionResult) -> Tensor:
    """Standard errors of `seq_attr`, or upper bounds, shape ``(n_prompt_features,)``."""
    se = result.token_attr_se
    if result.provenance.get("attr_target") == "prob":
        # The joint probability is no sum over tokens: errors of an estimate are unknown.
        unknown = bool(result.provenance.get("estimate"))
        return torch.full_like(se[0], torch.nan) if unknown else se.sum(0)
    if result.design is None:
        return se.sum(0)
    return result.attribute_span(0, len(se)).standard_errors[: se.shape[1]]


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().cpu().double() for tensor in tensors])


def _nan_mean(values: Iterable[float]) -> float:
    """The mean of known values; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _shown(name: str) -> str:
    stripped = name.strip()
    name = stripped if any(map(str.isalnum, stripped)) else repr(name)
    return name if len(name) <= 40 else name[:39] + "…"


def _cause_without_numbers(cause: Cause | None) -> str:
    """A cause and its direction, without numbers, which differ between baselines."""
    if cause is None:
        return "nothing in particular"
    what = " (output)" if cause.is_output else ""
    return f"{_shown(cause.name)}{what}{', lowering it' if cause.attribution < 0 else ''}"


def _conclusion_dict(conclusion: Conclusion) -> Any:
    causes = {n: cause and cause._asdict() for n, cause in conclusion.causes.items()}
    return _finite({**vars(conclusion), "causes": causes})


def _finite(value: Any) -> Any:
    """A value with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
