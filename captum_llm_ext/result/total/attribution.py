"""`TotalAttribution`: shares of the prompt in every token, and their causal chains."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from captum_llm_ext.base.amounts import percent
from captum_llm_ext.base.arguments import position_of
from captum_llm_ext.base.terminal import columns, one_line, shortened
from captum_llm_ext.result.influence import (
    Influence,
    flow_towards,
    of_spans,
    strongest_chains,
)
from captum_llm_ext.result.total.spread import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from captum_llm_ext.result.plot.axes import Drawing

_LONGEST_NAME = 24
_LEAST_SHOWN = 0.005
_MOST_CHIPS, _LONGEST_CHIP = 3, 120
_DIGITS = 5  # significant digits in a page's data
_NBSP = "\u00a0"
_ARROW = "  ⇐  "
Paint = Callable[[str, str], str]


class Share(NamedTuple):
    """One feature's share of the total influence on a token.

    Attributes:
        name: The feature.
        share: From 0 to 1.
        standard_error: 0 if exact, NaN if unknown.
        column: Column of `TotalAttribution.shares`, or of its `output_shares`.
        is_output: Whether it is a word of the answer without a cause.
    """

    name: str
    share: float
    standard_error: float
    column: int
    is_output: bool = False

    def __str__(self) -> str:
        name = one_line(self.name.strip())
        name = name if any(map(str.isalnum, name)) else repr(self.name)
        begins = " (begins there)" if self.is_output else ""
        return f"{name}{begins} {percent(self.share, self.standard_error)}"


class Route(NamedTuple):
    """A chain of causes that leads to a token.

    Attributes:
        share: Share of the token's total influence; the shares of all routes sum to 1.
        names: Names from its beginning up to the token itself.
        begins_in_prompt: Whether it begins in the prompt. Otherwise it begins with a word of the
            answer without a cause.
        column: Column of its beginning in `TotalAttribution.shares` or `output_shares`.
        through: The output features that it passes, in reading order.
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
        return f"{' → '.join(names)}  {percent(self.share)}"


@dataclass(frozen=True, repr=False)
class TotalAttribution:
    """Shares of the prompt's features in every target token, also through earlier output.

    A word of the answer that causes a token has causes itself. Followed back, with ``G`` the
    non-negative influence of earlier output and ``A`` that of the prompt, as shares of each token's
    causes, the total is ``(I - G)^-1 A`` (arXiv 2512.15663). These are shares of all positive
    attributions, not nats. How far a token would fall if the answer were regenerated without a
    feature is measured by `GenerationAttribution.total_effect`.

    Attributions within their error (two standard errors, or more to correct for many features) or
    negative ones are left out, and counted in `uncertain` and `negative`. Tokens whose attributions
    then sum to less than `floor` have no cause: their rows are 0, and chains begin with them
    (`output_shares`).

    ``T`` is the number of target tokens, ``P`` of prompt features or parts, ``G`` of output
    features.

    Attributes:
        names: Names of the prompt's features or parts, ``P``.
        output_tokens: Names of the target tokens, ``T``.
        output_names: Names of output features, ``G``.
        shares: ``(T, P)``, from 0 to 1.
        output_shares: ``(T, G)``: shares that begin in the answer itself, at words without a cause.
            Rows of both together sum to 1, or to 0.
        direct: ``(T, P)``: direct shares of the prompt, not through earlier output.
        direct_output: ``(T, G)``: direct shares of earlier output.
        strength: ``(T,)``: sum of a token's kept attributions, in their unit.
        negative, uncertain: ``(T,)``: shares of absolute attributions that were left out.
        floor: Tokens of lower `strength` have no cause.
        level: Unit of the prompt's parts: ``"word"``, ``"paragraph"``…
        method: The attribution method.
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
    _within: Callable[[Sequence[range]], tuple[Tensor, Tensor]] = field(repr=False)
    _spread: Callable[[], Spread] = field(repr=False)

    @cached_property
    def spread(self) -> Spread:
        """Computes standard errors of shares; takes about a second on first use."""
        return self._spread()

    @cached_property
    def _full_errors(self) -> Tensor:
        return self.spread.tokens()

    @property
    def shares_se(self) -> Tensor:
        """Jackknife standard errors of `shares`: 0 if exact, NaN if unknown."""
        return self._full_errors[:, : len(self.names)]

    @property
    def output_shares_se(self) -> Tensor:
        """Standard errors of `output_shares`."""
        return self._full_errors[:, len(self.names) :]

    @property
    def full_shares(self) -> Tensor:
        """`shares` and `output_shares` side by side, ``(T, P + G)``."""
        return torch.cat([self.shares, self.output_shares], 1)

    def why(self, token: int | str | tuple[int, int] | None, k: int = 5) -> list[Share]:
        """The largest total shares of a token, a span or the whole answer.

        Args:
            token: Its position in the target, or its name in `output_tokens`; ``(start, stop)`` of
                a span; None: the whole answer.
            k: Maximum number.

        Returns:
            The largest shares, in decreasing order; zeros are left out.

        Raises:
            ValueError: If there is no such token, or several have this name.
        """
        n = len(self.names)
        if token is None or isinstance(token, tuple):
            start, stop = token or (0, len(self.output_tokens))
            row, errors = torch.cat(self.span(start, stop)), torch.cat(self.span_se(start, stop))
        else:
            t = position_of(token, self.output_tokens, "target token")
            row, errors = self.full_shares[t], self._full_errors[t]
        order = row.argsort(descending=True, stable=True)[:k].tolist()
        named = [*self.names, *self.output_names]
        return [
            Share(named[c], float(row[c]), float(errors[c]), c if c < n else c - n, c >= n)
            for c in order
            if row[c] > 0
        ]

    def top(self, k: int = 3) -> list[list[Share]]:
        """The `k` largest shares of every target token, as by `why`."""
        return [self.why(t, k) for t in range(len(self.output_tokens))]

    def route(self, token: int | str, k: int = 3) -> list[Route]:
        """The strongest chains that lead to a token.

        Args:
            token: Its position in the target, or its name in `output_tokens`.
            k: Maximum number.

        Raises:
            ValueError: If there is no such token, or several have this name.
        """
        t = position_of(token, self.output_tokens, "target token")
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
        """Shares in several target tokens together, as one node.

        What words of the span did to one another is inside it: of the whole answer, the shares are
        those of what the prompt led to directly.

        Args:
            start, stop: The span, as in a slice; by default the whole answer.

        Returns:
            Shares of the prompt ``(P,)`` and of the output ``(G,)``.
        """
        span = range(*slice(start, stop).indices(len(self.output_tokens)))
        inside, own = self._within([span])
        prompt, output = of_spans(inside, own, self._tokens, self._features)
        return prompt[0], output[0]

    def span_se(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Standard errors of `span`: 0 if exact, NaN if unknown."""
        span = range(*slice(start, stop).indices(len(self.output_tokens)))
        errors = self.spread.spans([span])[0]
        return errors[: len(self.names)], errors[len(self.names) :]

    def flow(self, token: int | str | None = None) -> tuple[Tensor, Tensor]:
        """Shares along each edge, from the prompt or earlier output to a token.

        Args:
            token: Relative to the total influence on this token; None: direct shares of each token.

        Returns:
            Shares ``(T, P)`` and ``(T, G)``.
        """
        if token is None:
            return self.direct, self.direct_output
        t = position_of(token, self.output_tokens, "target token")
        edges = flow_towards(self._tokens, t, self._features)
        prompt, output = torch.zeros_like(self.direct), torch.zeros_like(self.direct_output)
        for row, feature in enumerate(self._feature_of[:t]):
            # A word's causes are those of all its tokens: drawn at its first.
            if feature is not None and feature not in self._feature_of[:row]:
                prompt[row], output[row] = edges.prompt[feature], edges.output[feature]
        prompt[t], output[t] = edges.prompt[-1], edges.output[-1]
        return prompt, output

    def links(self) -> dict[str, Any]:
        """The edges of all chains as plain data, for a page.

        Returns:
            ``tokens``: per target token its causes among the prompt's parts, their shares, its
            causes among output features, and theirs. ``features``: the same per output feature,
            None if each is one token. ``strength`` per token; ``negative`` and ``uncertain``:
            shares of absolute attributions that were left out of the whole answer.
        """
        tokens, features = _sparse(self._tokens), _sparse(self._features)
        rows = [
            row
            for row, feature in zip(tokens, self._feature_of, strict=True)
            if feature is not None
        ]
        owned = [feature for feature in self._feature_of if feature is not None]
        is_per_token = owned == list(range(len(features))) and rows == features
        sizes = self.strength.clamp_min(0)
        return {
            "tokens": tokens,
            "features": None if is_per_token else features,
            "strength": [_short(x) for x in self.strength.tolist()],
            "negative": _mean(self.negative, sizes),
            "uncertain": _mean(self.uncertain, sizes),
        }

    def plot(
        self, show: bool = False, *, ax: "Axes | None" = None, cmap: str | None = None
    ) -> "Drawing":
        """Draws a heat map of the shares: a row per target token, prompt left, answer right.

        Args:
            show: Show the figure, and return None.
            ax: Axes to draw in; by default a new figure of suitable size.
            cmap: A sequential colour map; by default ``"Purples"``.

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
            has_common_scale=True,
            cmap=cmap,
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
        most: int = 3,
        ax: "Axes | None" = None,
    ) -> "Drawing":
        """Draws the chains that lead to a token, each link as wide as its share.

        Args:
            target_token: The token: its position in the target, or its name in `output_tokens`.
                None: every token with its direct causes, as shares.
            show: Show the figure, and return None.
            least: Leave out links below this share of the widest one.
            most: Maximum number of links into a token.
            ax: Axes to draw in; by default a new figure of suitable size.

        Returns:
            ``(figure, axes)``, or None if shown.

        Raises:
            ValueError: If there is no such token, or several have this name.
        """
        from captum_llm_ext.result import plot

        towards = (
            None
            if target_token is None
            else position_of(target_token, self.output_tokens, "target token")
        )
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
            most=most,
            is_unsigned=True,
            ax=ax,
            show=show,
            title=None,
            unit="of all that led to it",
        )

    def table(self, k: int = 3, *, paint: Paint | None = None) -> str:
        """The largest shares of every target token, one line each.

        Args:
            k: Maximum number of shares per token.
            paint: As for `GenerationAttributionResult.table`.
        """
        show = paint or _plain
        names = [shortened(one_line(name), _LONGEST_NAME) for name in self.output_tokens]
        longest = max(map(columns, names))
        lines = [self.summary]
        for name, found in zip(names, self.top(k), strict=True):
            listed = [show(str(share), "size") for share in found if share.share >= _LEAST_SHOWN]
            text = ", ".join(listed) or show("nothing in particular", "nothing")
            padding = " " * (longest - columns(name))
            lines.append(f"{padding}{show(name, 'token')}{_ARROW}{text}")
        return "\n".join([*lines, *self._remarks()])

    @property
    def summary(self) -> str:
        """One line on what the shares are."""
        return (
            f"Total shares of {len(self.names)} features of the prompt in "
            f"{len(self.output_tokens)} target tokens, through earlier output, from {self.method}"
        )

    def _remarks(self) -> list[str]:
        remarks = self._left_out()
        if bool(self.shares_se.isnan().any()):
            remarks.append("Nothing tells how far these shares are from chance.")
        return remarks

    def _left_out(self) -> list[str]:
        sizes = self.strength.clamp_min(0)
        listed = [
            f"{percent(share)} {why}"
            for share, why in (
                (_mean(self.negative, sizes), "for their sign"),
                (_mean(self.uncertain, sizes), "as within their errors"),
            )
            if share >= _LEAST_SHOWN
        ]
        return [f"Left out of the attributions: {', '.join(listed)}."] if listed else []

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        plain = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        plain |= {"shares_se": self.shares_se, "output_shares_se": self.output_shares_se}
        return {n: _lists(v) if isinstance(v, Tensor) else v for n, v in plain.items()}

    def __repr__(self) -> str:
        return f"TotalAttribution({self.summary})"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """A table for notebooks: the largest shares of each token, shaded by size.

        Without standard errors, which take a second.
        """
        named = [*self.names, *(f"{name} (begins there)" for name in self.output_names)]
        rows = [
            f"<tr><th style='text-align:right'>{_html(token)}</th><td style='text-align:left'>"
            f"{_chips(named, shares) or 'nothing in particular'}</td></tr>"
            for token, shares in zip(self.output_tokens, self.full_shares, strict=True)
        ]
        remarks = "".join(f"<p>{_html(remark)}</p>" for remark in self._left_out())
        return (
            f"<p>{_html(self.summary)}</p><table><thead><tr><th>token</th>"
            "<th style='text-align:left'>led to in the end by</th></tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>{remarks}"
        )


def _chips(names: list[str], shares: Tensor) -> str:
    """The largest shares as shaded names, readable in the notebook's own text colour."""
    found = shares.argsort(descending=True, stable=True)[:_MOST_CHIPS].tolist()
    return ", ".join(
        f"<span style='background:rgba(140,110,200,{0.1 + 0.4 * float(shares[i]):.2f});"
        f"border-radius:3px;padding:0 .3em'>{_html(names[i])} "
        f"<b>{html.escape(percent(float(shares[i]), space=_NBSP))}</b></span>"
        for i in found
        if float(shares[i]) >= _LEAST_SHOWN
    )


def _html(text: str) -> str:
    shown = shortened(one_line(" ".join(text.split())) or repr(text), _LONGEST_CHIP)
    return html.escape(shown)


def _sparse(influence: Influence) -> list[list[list[Any]]]:
    """Per row the columns and values of its nonzero shares, for the prompt and for the output."""
    found: list[list[list[Any]]] = []
    for row in zip(influence.prompt, influence.output, strict=True):
        kept = [own.nonzero()[:, 0] for own in row]
        listed = [
            (at.tolist(), [_short(x) for x in own[at].tolist()])
            for own, at in zip(row, kept, strict=True)
        ]
        found.append([held for pair in listed for held in pair])
    return found


def _short(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


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
