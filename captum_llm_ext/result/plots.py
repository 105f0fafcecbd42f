"""The plots of a result: captum's two and three more."""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch import Tensor

from captum_llm_ext.result.causes import unit_of
from captum_llm_ext.result.convergence import earlier
from captum_llm_ext.result.foils import list_foils
from captum_llm_ext.result.numbers import ResultNumbers
from captum_llm_ext.text.inputs import Piece

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from captum_llm_ext.result.plot.axes import CanvasArguments, Drawing


class _Labels(TypedDict):
    """Names of rows and columns, as arguments of the heat maps."""

    input_labels: list[str]
    output_feature_labels: list[str] | None
    output_labels: list[str]
    output_features: list[int | None] | None


_MOST_FOILS = 2


class DrawnResult(ResultNumbers):
    """The plots of a result."""

    def plot_token_attr(
        self, show: bool = False, *, ax: "Axes | None" = None, cmap: str | None = None
    ) -> "Drawing":
        """Draws a heat map: one row per target token, prompt features left, earlier output right.

        Attributions that are not significant (`marked`) are blank.

        Args:
            show: Show the figure, and return None.
            ax: Axes to draw in; by default a new figure of suitable size. Your own figure should
                have ``layout="constrained"``, which leaves room for labels.
            cmap: A diverging colour map, centred at zero; by default ``"RdBu"``. For unsigned
                attributions a sequential one, ``"Purples"``.

        Returns:
            ``(figure, axes)``, or None if shown.
        """
        from captum_llm_ext.result import plot

        return plot.heat_map(
            cast(Tensor, self.token_attr),
            self.output_attr,
            **self._labels(named=True),
            prompt_errors=self.token_attr_se,
            output_errors=self.output_attr_se,
            sure=self.marked_beyond,
            cmap=cmap,
            is_unsigned=self.is_unsigned,
            **self._canvas(ax, show),
        )

    def plot_seq_attr(
        self, show: bool = False, *, ax: "Axes | None" = None, cmap: str | None = None
    ) -> "Drawing":
        """Draws a bar per prompt feature: its attribution for the whole target, with its error.

        Args:
            show: Show the figure, and return None.
            ax: Axes to draw in; by default a new figure of suitable size. Your own figure should
                have ``layout="constrained"``, which leaves room for labels.
            cmap: A colour map whose ends colour the bars; by default ``"RdBu"``, or ``"Purples"``
                for unsigned attributions.

        Returns:
            ``(figure, axes)``, or None if shown.
        """
        from captum_llm_ext.result import plot

        errors = None
        known = self.design is not None or self._is_of_gradients
        if known and self.provenance.get("attr_target") != "prob":
            errors = self._total(None)[1][: len(self.input_tokens)]
        attr = self.seq_attr
        return plot.bars(
            attr,
            labels=self.names.prompt,
            errors=errors,
            sure=self.marked_beyond,
            cmap=cmap,
            is_unsigned=self.is_unsigned,
            **self._canvas(ax, show),
        )

    def plot_text(
        self,
        target_token: int | str | None = None,
        show: bool = False,
        *,
        ax: "Axes | None" = None,
        cmap: str | None = None,
    ) -> "Drawing":
        """Draws prompt and answer as running text, shaded by the attributions of a token.

        Args:
            target_token: The explained token: its position in the target, or its name in
                `output_tokens`. None: the sum over all.
            show: Show the figure, and return None.
            ax: Axes to draw in; by default a new figure as high as the text needs.
            cmap: A diverging colour map, centred at zero; by default ``"RdBu"``. For unsigned
                attributions a sequential one, ``"Purples"``.

        Returns:
            ``(figure, axes)``, or None if shown.

        Raises:
            ValueError: If there is no such token, or the sum is that of probabilities.
        """
        from captum_llm_ext.result import plot

        token = None if target_token is None else self.position(target_token)
        values, errors = self._total(token)
        prompt, output = list(self._prompt_text()), list(self._output_text(token))
        first = len(prompt)
        return plot.running_text(
            [*prompt, *output],
            values,
            errors=errors,
            n_first=len(self.input_tokens),
            sure=self.marked_beyond,
            headings={0: "prompt", first: "generated"},
            explained=() if token is None else (first + token,),
            later=() if token is None else range(first + token + 1, first + len(output)),
            cmap=cmap,
            is_unsigned=self.is_unsigned,
            **self._canvas(ax, show, token),
        )

    def plot_flow(
        self,
        target_token: int | str | None = None,
        show: bool = False,
        *,
        least: float = 0.05,
        most: int = 3,
        total: bool = False,
        ax: "Axes | None" = None,
    ) -> "Drawing":
        """Draws which prompt features led to which tokens, and which tokens to later ones.

        Draws only significant attributions, and only the few strongest causes of every token;
        prompt and earlier output have separate scales.

        Args:
            target_token: Draw only what led to this token, directly or through earlier ones: its
                position in the target, or its name in `output_tokens`. None: everything.
            show: Show the figure, and return None.
            least: Omit attributions below this share of the largest one to the prompt, or to
                earlier output.
            most: Maximum number of causes per token.
            total: Draw total influence, as computed by `total`: with a token, edges are as wide as
                the share of its influence that passes through them; without one, as wide as their
                direct share.
            ax: Axes to draw in; by default a new figure of suitable size.

        Returns:
            ``(figure, axes)``, or None if shown.

        Raises:
            ValueError: If there is no such token.
        """
        from captum_llm_ext.result import plot

        if total:
            in_the_end = cast(Any, self).total(n_resamples=0)
            return in_the_end.plot_flow(target_token, show, least=least, most=most, ax=ax)
        towards = None if target_token is None else self.position(target_token)
        return plot.flow(
            cast(Tensor, self.token_attr),
            self.output_attr,
            **self._labels(),
            prompt_errors=self.token_attr_se,
            output_errors=self.output_attr_se,
            towards=towards,
            least=least,
            most=most,
            sure=self.marked_beyond,
            is_unsigned=self.is_unsigned,
            **self._canvas(ax, show, towards),
        )

    def plot_convergence(
        self,
        target_token: int | str | None = None,
        show: bool = False,
        *,
        k: int = 5,
        n_estimates: int = 8,
        ax: "Axes | None" = None,
    ) -> "Drawing":
        """Draws how the estimates of the strongest causes converged as coalitions were added.

        The solver runs again on the first coalitions only; the model is not called.

        Args:
            target_token: The explained token: its position in the target, or its name in
                `output_tokens`. None: the strongest causes of any token.
            show: Show the figure, and return None.
            k: Number of causes, half in the prompt and half in earlier output.
            n_estimates: Number of estimates before the last one.
            ax: Axes to draw in; by default a new figure.

        Returns:
            ``(figure, axes)``, or None if shown.

        Raises:
            ValueError: If there is no such token, nothing has an effect, or the estimator needs all
                of its coalitions at once.
        """
        from captum_llm_ext.result import plot

        evidence = self._evidence()
        cells = self._strongest(None if target_token is None else self.position(target_token), k)
        if not cells:
            raise ValueError("no attribution differs from zero: there is nothing to converge.")
        tokens = sorted({token for token, _ in cells})
        found = earlier(evidence, tokens, n_estimates)

        def picked(attributions: Tensor) -> list[float]:
            wide = torch.cat(self._split(attributions), dim=1)
            return [float(wide[tokens.index(token), column]) for token, column in cells]

        attributions = [picked(solution.attributions) for _, solution in found]
        errors = [picked(solution.standard_errors) for _, solution in found]
        attributions.append([float(self.full_attr[cell]) for cell in cells])
        errors.append([float(self.full_attr_se[cell]) for cell in cells])
        names = [*self.names.prompt, *self.names.output]
        return plot.convergence(
            [*(n for n, _ in found), len(self.masks)],
            attributions,
            labels=[
                names[column]
                if target_token is not None
                else f"{self.names.tokens[token]} ← {names[column].strip()}"
                for token, column in cells
            ],
            errors=errors,
            **self._canvas(ax, show),
        )

    def _labels(self, *, named: bool = False) -> _Labels:
        """Names of rows and columns, with foils beside the tokens if `named`."""
        n_target, names = range(len(self.output_tokens)), self.names
        return {
            "input_labels": names.prompt,
            "output_feature_labels": None if self.output_features is None else names.output,
            "output_labels": [self._named(t, " ≠ ", 1) for t in n_target]
            if named
            else names.tokens,
            "output_features": [piece.feature for piece in self.output_pieces] or None,
        }

    def _canvas(self, ax: "Axes | None", show: bool, token: int | None = None) -> "CanvasArguments":
        """Arguments common to all plots; the title names the token, if given."""
        return {"ax": ax, "show": show, "title": self._title(token), "unit": unit_of(self)}

    def _named(self, token: int, between: str = " rather than ", k: int = _MOST_FOILS) -> str:
        """Name of a target token, with its foils if a contrast was explained."""
        foils = list_foils(self, token, k)
        return self.names.tokens[token] + (between + foils if foils else "")

    def _title(self, token: int | None) -> str | None:
        """The title of a plot for one token."""
        named = None if token is None else self._named(token)
        has_foils = named is not None and named != self.names.tokens[token or 0]
        return "\n".join(filter(None, [named if has_foils else None, self._doubt])) or None

    @property
    def _doubt(self) -> str | None:
        """A note above plots of estimates without known errors."""
        n = int(self.errors_unknown.sum())
        if not n:
            return None
        some = "" if n == int((self.full_attr != 0).sum()) else "in part "
        return f"Estimates {some}of unknown error: nothing tells them from noise"

    def _total(self, token: int | None) -> tuple[Tensor, Tensor]:
        """Attributions of one token, or summed over all, and their errors."""
        if token is not None:
            return self.full_attr[token], self.full_attr_se[token]
        # An earlier version did not record what determines errors.
        if self.design is None and not self._is_of_gradients:
            total = self.full_attr.sum(0)
            unknown = torch.nan if self.provenance.get("estimate") else 0.0
            return total, torch.full_like(total, unknown)
        span = self.attribute_span(0, len(self.output_tokens))
        return span.values, span.standard_errors

    def _prompt_text(self) -> Iterator[tuple[str, int | None]]:
        pieces = self.prompt_pieces or [Piece(n, i) for i, n in enumerate(self.input_tokens)]
        edges = [(one.text[-1:], other.text[:1]) for one, other in pairwise(pieces)]
        # Names of fields rather than text, which would run together.
        apart = bool(edges) and all(
            (a + b).isascii() and a.isalnum() and b.isalnum() for a, b in edges
        )
        for piece in pieces:
            yield piece.text + "   " * apart, piece.feature

    def _output_text(self, token: int | None) -> Iterator[tuple[str, int | None]]:
        """The answer; the explained token and those after it have no attributions."""
        pieces = self.output_pieces or [Piece(f"{name} ", None) for name in self.output_tokens]
        last = {piece.feature: t for t, piece in enumerate(pieces)}
        for piece in pieces:
            feature = piece.feature
            if feature is None or (token is not None and last[feature] >= token):
                yield piece.text, None
            else:
                yield piece.text, len(self.input_tokens) + feature

    def _strongest(self, token: int | None, k: int) -> list[tuple[int, int]]:
        """Token and column of the largest attributions, half of them in the prompt.

        In one list, the answer's own words would leave no room for the prompt. Columns of one
        feature count once.
        """
        size = self.full_attr.abs()
        if token is not None:
            size = size * (torch.arange(len(size), device=size.device) == token)[:, None]
        n_prompt, width = len(self.input_tokens), size.shape[1]
        blocks: tuple[dict[tuple[int, int], tuple[int, int]], ...] = ({}, {})
        for flat in size.flatten().argsort(descending=True, stable=True).tolist():
            cell = divmod(flat, width)
            if min(map(len, blocks)) >= k or not size[cell] > 0:
                break
            own = blocks[cell[1] >= n_prompt]
            own.setdefault((cell[0], self._features[cell[1]]), cell)
        prompt, answer = (list(block.values()) for block in blocks)
        n_answer = max(min(len(answer), k // 2), k - len(prompt))
        chosen = [*prompt[: max(k - n_answer, 0)], *answer[:n_answer]]
        return sorted(chosen, key=lambda cell: -float(size[cell]))
