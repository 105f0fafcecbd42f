"""What led to each token in the end: shares of the prompt, through all that was written before."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from captum_llm_ext.base.terminal import columns, one_line, shortened
from captum_llm_ext.result.causes import joined_name
from captum_llm_ext.result.influence import (
    Influence,
    flow_towards,
    influence,
    kept,
    passed_back,
    strongest_chains,
)
from captum_llm_ext.result.levels import prompt_level
from captum_llm_ext.result.refit import Evidence
from captum_llm_ext.result.resampling import deviations, replicates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from captum_llm_ext.result.plot.axes import Drawing
    from captum_llm_ext.result.result import GenerationAttributionResult

# Of values in nats: what changes a probability by less than a tenth has no cause worth following.
FLOOR = 0.1
_IN_NATS = ("log_prob", "log_odds", "contrast", "logit")
_RELATIVE_FLOOR = 0.02  # of the largest sum of a token, for values in other units
_LONGEST_NAME = 24
_LEAST_SHOWN = 0.005
_N_DRAWS = 200  # of attributions, for the spread of shares
_ARROW = "  ⇐  "
Paint = Callable[[str, str], str]


class Share(NamedTuple):
    """One feature's share in what led to a token in the end.

    Attributes:
        name: The feature.
        share: From 0 to 1.
        standard_error: 0 where it is exact, NaN where it cannot be told.
        column: Of `TotalAttribution.shares`, or of its `output_shares`.
        is_output: Whether it is a word of the answer that nothing in particular led to.
    """

    name: str
    share: float
    standard_error: float
    column: int
    is_output: bool = False

    def __str__(self) -> str:
        name = one_line(self.name.strip())
        name = name if any(map(str.isalnum, name)) else repr(self.name)
        error = f" ± {100 * self.standard_error:.0f}" if self.standard_error >= 0.005 else ""
        error = " ± ?" if self.standard_error != self.standard_error else error
        begins = " (begins there)" if self.is_output else ""
        return f"{name}{begins} {100 * self.share:.0f}{error} %"


class Route(NamedTuple):
    """A chain of causes that leads to a token.

    Attributes:
        share: Of all that led to the token; the shares of all routes sum to 1.
        names: From where it begins up to the token itself.
        begins_in_prompt: Whether it begins in the prompt. Otherwise it begins with a word of the
            answer that nothing in particular led to.
        column: Where it begins: of `TotalAttribution.shares` or of `output_shares`.
        through: The features of the output that it goes through, in reading order.
        token: Position of the target token that it leads to.
    """

    share: float
    names: tuple[str, ...]
    begins_in_prompt: bool
    column: int
    through: tuple[int, ...]
    token: int

    def __str__(self) -> str:
        names = [one_line(name.strip()) or repr(name) for name in self.names]
        return f"{' → '.join(names)}  {100 * self.share:.0f} %"


@dataclass(frozen=True, repr=False)
class TotalAttribution:
    """Shares of the prompt's features in every target token, through all that was written before.

    A word of the answer that led to a token was itself led to by something. Followed back, with
    ``G`` the non-negative influence of earlier output and ``A`` that of the prompt as shares of
    what led to each token, the total is ``(I - G)^-1 A`` (arXiv 2512.15663). Shares, not nats: of
    all that raised the token. How far a token would move if the answer were written anew without a
    feature, `GenerationAttribution.total_effect` measures.

    What lies within its error (two standard errors, or more where so many features could be
    mistaken for causes), or is negative, is left out, and told in `uncertain` and `negative`.
    Tokens whose attributions then sum to less than `floor` nothing in particular led to: their
    rows are 0, and what they led to begins with them (`output_shares`).

    There are ``T`` target tokens, ``P`` features or parts of the prompt, ``G`` of the output.

    Attributes:
        names: ``P`` names.
        output_tokens: ``T`` names.
        output_names: ``G`` names.
        shares: ``(T, P)``, from 0 to 1.
        output_shares: ``(T, G)``: what begins in the answer itself, at words that nothing in
            particular led to. Rows of both together sum to 1, or to 0.
        direct: ``(T, P)``, shares that did not go through earlier output.
        direct_output: ``(T, G)``, what earlier output has of a token directly.
        strength: ``(T,)``: what led to a token, in the unit of the attributions.
        negative, uncertain: ``(T,)``: shares of the attributions' sizes that were left out.
        floor: Below this `strength` nothing in particular led to a token.
        level: What the prompt's parts are: ``"word"``, ``"paragraph"``…
        method: Of the attributions.
    """

    names: list[str]
    output_tokens: list[str]
    output_names: list[str]
    shares: Tensor
    output_shares: Tensor
    direct: Tensor
    direct_output: Tensor
    strength: Tensor
    negative: Tensor
    uncertain: Tensor
    floor: float
    level: str
    method: str
    _tokens: Influence = field(repr=False)
    _features: Influence = field(repr=False)
    _feature_of: list[int | None] = field(repr=False)
    _errors: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def _full_errors(self) -> Tensor:
        return self._errors()

    @property
    def shares_se(self) -> Tensor:
        """Standard errors of `shares`, by leaving out groups of coalitions in turn.

        0 where attributions are exact, NaN where they cannot be told. They take some seconds when
        they are first asked for.
        """
        return self._full_errors[:, : len(self.names)]

    @property
    def output_shares_se(self) -> Tensor:
        """Those of `output_shares`."""
        return self._full_errors[:, len(self.names) :]

    @property
    def full_shares(self) -> Tensor:
        """`shares` and `output_shares` side by side, ``(T, P + G)``."""
        return torch.cat([self.shares, self.output_shares], 1)

    def why(self, token: int | str, k: int = 5) -> list[Share]:
        """What a token is owed to in the end.

        Args:
            token: Its position in the target, or its name in `output_tokens`.
            k: How many at most.

        Returns:
            The largest shares, by size; zeros are none.

        Raises:
            ValueError: If there is no such token, or several of that name.
        """
        t, n = self._position(token), len(self.names)
        errors = self._full_errors[t]
        row = self.full_shares[t]
        order = row.argsort(descending=True, stable=True)[:k].tolist()
        named = [*self.names, *self.output_names]
        return [
            Share(named[c], float(row[c]), float(errors[c]), c if c < n else c - n, c >= n)
            for c in order
            if row[c] > 0
        ]

    def top(self, k: int = 3) -> list[list[Share]]:
        """The `k` largest shares of every target token, as `why` gives them."""
        return [self.why(t, k) for t in range(len(self.output_tokens))]

    def route(self, token: int | str, k: int = 3) -> list[Route]:
        """The strongest chains that lead to a token.

        Args:
            token: Its position in the target, or its name in `output_tokens`.
            k: How many at most.

        Raises:
            ValueError: If there is no such token, or several of that name.
        """
        t = self._position(token)
        found = strongest_chains(self._tokens, t, self._features, k)
        return [
            Route(
                chain.share,
                (
                    (self.names if chain.begins_in_prompt else self.output_names)[chain.first],
                    *(self.output_names[j] for j in chain.through),
                    self.output_tokens[t],
                ),
                chain.begins_in_prompt,
                chain.first,
                chain.through,
                t,
            )
            for chain in found
        ]

    def span(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Shares in several target tokens together, each with the weight of its `strength`.

        Args:
            start, stop: The span, as in a slice; by default the whole answer.

        Returns:
            Shares of the prompt ``(P,)`` and of the output ``(G,)``.
        """
        weights = self.strength[start:stop]
        weights = weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
        return weights @ self.shares[start:stop], weights @ self.output_shares[start:stop]

    def flow(self, token: int | str | None = None) -> tuple[Tensor, Tensor]:
        """What passes along each edge, from the prompt or earlier output to a token.

        Args:
            token: Of all that led to this token; None: of what led to each token directly.

        Returns:
            Shares ``(T, P)`` and ``(T, G)``.
        """
        if token is None:
            return self.direct, self.direct_output
        t = self._position(token)
        edges = flow_towards(self._tokens, t, self._features)
        prompt, output = torch.zeros_like(self.direct), torch.zeros_like(self.direct_output)
        for row, feature in enumerate(self._feature_of[:t]):
            # A word's causes are those of all its tokens: drawn at its first.
            if feature is not None and feature not in self._feature_of[:row]:
                prompt[row], output[row] = edges.prompt[feature], edges.output[feature]
        prompt[t], output[t] = edges.prompt[-1], edges.output[-1]
        return prompt, output

    def plot(self, show: bool = False, *, ax: "Axes | None" = None) -> "Drawing":
        """A heat map of the shares: a row per target token, the prompt left, the answer right.

        Args:
            show: Show it, and return None.
            ax: Axes to draw in; by default a new figure of fitting size.

        Returns:
            ``(figure, axes)``, or None if shown.
        """
        from captum_llm_ext.result import plot

        return plot.heat_map(
            self.shares,
            self.output_shares if self.output_names else None,
            input_labels=self.names,
            output_feature_labels=self.output_names or None,
            output_labels=self.output_tokens,
            output_features=self._feature_of if self.output_names else None,
            is_unsigned=True,
            ax=ax,
            show=show,
            title=None,
            unit="share in the end",
        )

    def plot_flow(
        self,
        target_token: int | str | None = None,
        show: bool = False,
        *,
        least: float = 0.05,
        ax: "Axes | None" = None,
    ) -> "Drawing":
        """The chains that lead to a token, each link as wide as what passes through it.

        Args:
            target_token: The token: its position in the target, or its name in `output_tokens`.
                None: every token with what led to it directly, as shares.
            show: Show it, and return None.
            least: Share of the widest link below which one is left out.
            ax: Axes to draw in; by default a new figure of fitting size.

        Returns:
            ``(figure, axes)``, or None if shown.

        Raises:
            ValueError: If there is no such token, or several of that name.
        """
        from captum_llm_ext.result import plot

        towards = None if target_token is None else self._position(target_token)
        prompt, output = self.flow(towards)
        return plot.flow(
            prompt,
            output if self.output_names else None,
            input_labels=self.names,
            output_feature_labels=self.output_names or None,
            output_labels=self.output_tokens,
            output_features=self._feature_of if self.output_names else None,
            towards=towards,
            least=least,
            is_unsigned=True,
            ax=ax,
            show=show,
            title=None,
            unit="of all that led to it",
        )

    def table(self, k: int = 3, *, paint: Paint | None = None) -> str:
        """The largest shares of every target token, a line each.

        Args:
            k: Shares per token, at most.
            paint: As of `GenerationAttributionResult.table`.
        """
        show = paint or _plain
        names = [shortened(one_line(name), _LONGEST_NAME) for name in self.output_tokens]
        longest = max(map(columns, names))
        lines = [self.summary]
        for name, found in zip(names, self.top(k), strict=True):
            told = [show(str(share), "size") for share in found if share.share >= _LEAST_SHOWN]
            said = ", ".join(told) or show("nothing in particular", "nothing")
            padding = " " * (longest - columns(name))
            lines.append(f"{padding}{show(name, 'token')}{_ARROW}{said}")
        return "\n".join([*lines, *self._remarks()])

    @property
    def summary(self) -> str:
        """What these are, in a line."""
        return (
            f"Total shares of {len(self.names)} features of the prompt in "
            f"{len(self.output_tokens)} target tokens, through earlier output, from {self.method}"
        )

    def _remarks(self) -> list[str]:
        sizes = self.strength.clamp_min(0)
        told = [
            f"{100 * share:.0f} % {why}"
            for share, why in (
                (_mean(self.negative, sizes), "for their sign"),
                (_mean(self.uncertain, sizes), "as within their errors"),
            )
            if share >= _LEAST_SHOWN
        ]
        remarks = [f"Left out of the attributions: {', '.join(told)}."] if told else []
        if bool(self.shares_se.isnan().any()):
            remarks.append("Nothing tells how far these shares are from chance.")
        return remarks

    def to_dict(self) -> dict[str, Any]:
        """Everything as lists, numbers and text that JSON can hold."""
        plain = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        plain |= {"shares_se": self.shares_se, "output_shares_se": self.output_shares_se}
        return {n: _lists(v) if isinstance(v, Tensor) else v for n, v in plain.items()}

    def __repr__(self) -> str:
        return f"TotalAttribution({self.summary})"

    def __str__(self) -> str:
        return self.table()

    def _position(self, token: int | str) -> int:
        n = len(self.output_tokens)
        if isinstance(token, int):
            if not -n <= token < n:
                raise ValueError(f"there is no token {token}: the target has {n}.")
            return token % n
        found = [i for i, name in enumerate(self.output_tokens) if name == token.strip()]
        if len(found) != 1:
            raise ValueError(f"{len(found)} target tokens are {token!r}: give the position.")
        return found[0]


@dataclass(frozen=True)
class Source:
    """What totals ask of a result's coalitions.

    Attributes:
        features: Per column of `full_attr` its feature.
        evidence: The coalitions.
        split: What a solver says of features, at the columns of prompt and output.
    """

    features: Sequence[int]
    evidence: Callable[[], Evidence]
    split: Callable[[Tensor], tuple[Tensor, Tensor]]


def total(
    result: "GenerationAttributionResult",
    source: Source,
    floor: float | None,
    level: str | None,
    n_resamples: int,
    seed: int,
) -> TotalAttribution:
    """See `GenerationAttributionResult.total`."""
    if n_resamples < 0 or n_resamples == 1:
        raise ValueError(f"`n_resamples` is {n_resamples}: give at least 2, or 0 for no errors.")
    if floor is not None and not floor >= 0:
        raise ValueError(f"`floor` is {floor!r}: give a number of at least 0.")
    view = _View.of(result, source.features, level)
    attributions = result.full_attr.double().cpu()
    least = _floor(result, view.tokens(attributions)) if floor is None else floor
    graph = _Graph.of(result, view, least)
    rows, nodes = graph.influence(attributions)
    prompt, output = passed_back(rows, nodes)
    return TotalAttribution(
        names=view.names,
        output_tokens=list(result.output_tokens),
        output_names=list(result.output_features or ()),
        shares=prompt,
        output_shares=output,
        direct=rows.prompt,
        direct_output=rows.output,
        strength=rows.strength,
        negative=rows.negative,
        uncertain=rows.uncertain,
        floor=least,
        level=view.level,
        method=str(result.provenance.get("method", "attribution")),
        _tokens=rows,
        _features=nodes,
        _feature_of=view.feature_of,
        _errors=partial(_errors, result, source, graph, n_resamples, seed),
    )


@dataclass(frozen=True)
class _Graph:
    """How attributions become influence.

    Attributes:
        view: How their columns are put together.
        errors: Standard errors of tokens and of features of the output. What is added up is taken
            as independent.
        rounding: What rounding may do to the value of each token, and of each feature.
        floor: See `kept`.
    """

    view: "_View"
    errors: tuple[Tensor, Tensor]
    rounding: tuple[Tensor, Tensor]
    floor: float

    @classmethod
    def of(cls, result: "GenerationAttributionResult", view: "_View", floor: float) -> "_Graph":
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
        """Which attributions of tokens and of features count; with `errors` and floor as many times
        as large."""
        sums = self.view.tokens(attributions), self.view.features(attributions)
        first, second = (
            kept(found, errors * told, noise, errors * self.floor)
            for found, told, noise in zip(sums, self.errors, self.rounding, strict=True)
        )
        return first, second

    def influence(self, attributions: Tensor) -> tuple[Influence, Influence]:
        """Influence on tokens and on features of the output."""
        keep, keep_features = self.kept(attributions)
        n = self.view.n_prompt
        return (
            influence(self.view.tokens(attributions), keep, n),
            influence(self.view.features(attributions), keep_features, n),
        )


def _errors(
    result: "GenerationAttributionResult",
    source: Source,
    graph: _Graph,
    n_resamples: int,
    seed: int,
) -> Tensor:
    """Standard errors of shares: their spread where attributions vary as their coalitions say."""
    attributions = result.full_attr.double().cpu()
    rows, _ = graph.influence(attributions)
    shape = len(attributions), graph.view.n_prompt + graph.view.n_output
    if not bool((result.full_attr_se != 0).any()):
        return torch.zeros(shape, dtype=torch.float64, device="cpu")
    moved = _deviations(result, source, graph, attributions, n_resamples, seed)
    if moved is None:
        unknown = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
        return unknown.where(rows.has_cause[:, None], 0)
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(
        _N_DRAWS, len(moved), generator=generator, dtype=torch.float64, device="cpu"
    )
    each = [
        torch.cat(passed_back(*graph.influence(attributions + torch.tensordot(own, moved, 1))), 1)
        for own in steps
    ]
    return torch.stack(each).std(0)


def _deviations(
    result: "GenerationAttributionResult",
    source: Source,
    graph: _Graph,
    attributions: Tensor,
    n_resamples: int,
    seed: int,
) -> Tensor | None:
    """How far leaving out each group of coalitions moves attributions; None where none can be."""
    if result.design is None:
        return None
    # Other tokens have no causes, whatever the coalitions.
    keep, keep_features = graph.kept(attributions, 0.5)
    told = [
        t
        for t, feature in enumerate(graph.view.feature_of)
        if bool(keep[t].any()) or (feature is not None and bool(keep_features[feature].any()))
    ]
    found = replicates(source.evidence(), told, n_resamples, seed) if told else None
    if found is None:
        return None
    wide = torch.zeros(len(found), *attributions.shape, dtype=torch.float64, device="cpu")
    for own, solved in zip(wide, found, strict=True):
        own[told] = torch.cat(source.split(solved), 1).double().cpu()
    return deviations(wide)


@dataclass(frozen=True)
class _View:
    """How columns of a result are put together.

    Attributes:
        names: Of the prompt's parts.
        level: What these are.
        columns: Per column of `full_attr` the one of the parts, or of the output behind them; -1
            for a copy of another column.
        feature_of: Per target token the feature of the output that it is in.
        n_output: Features of the output.
    """

    names: list[str]
    level: str
    columns: list[int]
    feature_of: list[int | None]
    n_output: int

    @classmethod
    def of(
        cls, result: "GenerationAttributionResult", every: Sequence[int], level: str | None
    ) -> "_View":
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
        if n_output and not pieces:  # of an early version: tokens
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
        """Parts of the prompt."""
        return len(self.names)

    def tokens(self, attributions: Tensor) -> Tensor:
        """Per token, ``(..., T, columns)`` to ``(..., T, n_prompt + n_output)``."""
        used = [c for c, part in enumerate(self.columns) if part >= 0]
        at = torch.tensor([self.columns[c] for c in used], dtype=torch.int64, device="cpu")
        wide = attributions.new_zeros(*attributions.shape[:-1], self.n_prompt + self.n_output)
        return wide.index_add_(-1, at, attributions[..., used])

    def features(self, attributions: Tensor) -> Tensor:
        """Per feature of the output, that of all its tokens."""
        tokens = self.tokens(attributions)
        summed = tokens.new_zeros(*tokens.shape[:-2], self.n_output, tokens.shape[-1])
        for t, feature in enumerate(self.feature_of):
            if feature is not None:
                summed[..., feature, :] += tokens[..., t, :]
        return summed

    def noise(self, rounding: Tensor) -> Tensor:
        """What rounding may do to the value of each feature of the output."""
        summed = rounding.new_zeros(self.n_output)
        for t, feature in enumerate(self.feature_of):
            if feature is not None:
                summed[feature] += rounding[t]
        return summed


def _floor(result: "GenerationAttributionResult", tokens: Tensor) -> float:
    told = str(result.provenance.get("attr_target"))
    if told in _IN_NATS and not result.is_unsigned:
        return FLOOR
    return _RELATIVE_FLOOR * float(tokens.clamp_min(0).sum(1).max())


def _mean(shares: Tensor, weights: Tensor) -> float:
    return float((shares * weights).sum() / weights.sum().clamp_min(1e-300))


def _lists(tensor: Tensor) -> Any:
    return tensor.tolist() if bool(tensor.isfinite().all()) else _finite(tensor.tolist())


def _finite(held: Any) -> Any:
    if isinstance(held, list):
        return [_finite(one) for one in held]
    return held if held == held else None


def _plain(text: str, _: str) -> str:
    return text
