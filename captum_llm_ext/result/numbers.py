"""The numbers of a result: attributions of each token and feature, and what follows from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from captum.attr import InterpretableInput, LLMAttributionResult
from torch import Tensor

from captum_llm_ext.base.arguments import position_of
from captum_llm_ext.coalitions import DrawnTexts
from captum_llm_ext.result.answer import AnswerAttribution, answer_at_hand
from captum_llm_ext.result.causes import Redundancy, SpanAttribution, UnresolvedGroup
from captum_llm_ext.result.design import Design
from captum_llm_ext.result.marks import marked_beyond
from captum_llm_ext.result.refit import Evidence
from captum_llm_ext.result.summed_errors import capped
from captum_llm_ext.result.token_names import (
    GOES_ON,
    fragment_names,
    going_on,
    numbered_where_alike,
)
from captum_llm_ext.text.inputs import Level, Piece


class Names(NamedTuple):
    """Unique display names: word fragments are marked, and equal names are numbered.

    Attributes:
        prompt: Names of the columns of `token_attr`.
        output: Names of the columns of `output_attr`.
        tokens: Names of the target tokens.
    """

    prompt: list[str]
    output: list[str]
    tokens: list[str]


class ResultNumbers(LLMAttributionResult):
    """The data of `GenerationAttributionResult`, whose docstring describes each attribute."""

    def __init__(
        self,
        *,
        input_tokens: list[str],
        output_tokens: list[str],
        seq_attr: Tensor,
        token_attr: Tensor,
        output_probs: Tensor | None = None,
        inp: InterpretableInput | None = None,
        output_features: list[str] | None = None,
        output_attr: Tensor | None = None,
        token_attr_se: Tensor,
        output_attr_se: Tensor | None = None,
        full_values: Tensor,
        empty_values: Tensor,
        efficiency_gap: Tensor,
        n_evaluations: int,
        masks: Tensor,
        values: Tensor,
        draws: Tensor,
        target: Tensor,
        prompt_pieces: Sequence[Piece] = (),
        output_pieces: Sequence[Piece] = (),
        levels: Sequence[Level] = (),
        design: Design | None = None,
        foils: Tensor | None = None,
        foil_tokens: list[list[str]] | None = None,
        foil_values: Tensor | None = None,
        answer: AnswerAttribution | None = None,
        drawn_texts: DrawnTexts | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            seq_attr=cast(Any, seq_attr),
            token_attr=cast(Any, token_attr),
            output_probs=cast(Any, output_probs),
            inp=inp,
        )
        self.output_features = output_features
        self.output_attr = output_attr
        self.token_attr_se = token_attr_se
        self.output_attr_se = output_attr_se
        self.full_values = full_values
        self.empty_values = empty_values
        self.efficiency_gap = efficiency_gap
        self.n_evaluations = n_evaluations
        self.masks = masks
        self.values = values
        self.draws = draws
        self.target = target
        self.prompt_pieces = list(prompt_pieces)
        # If the output was held fixed, its pieces have no columns.
        fixed = output_attr is None
        self.output_pieces = [replace(p, feature=None) if fixed else p for p in output_pieces]
        self.levels = list(levels)
        self.design = design
        self.foils, self.foil_tokens, self.foil_values = foils, foil_tokens, foil_values
        self.provenance = dict(provenance or {})
        self.own_answer = answer
        self.drawn_texts = drawn_texts
        # Cached, since it can take seconds.
        self._replicates: dict[tuple[int, int], Tensor | None] = {}
        self._moved: dict[tuple[int, int], Tensor | None] = {}

    @property
    def full_attr(self) -> Tensor:
        """Prompt and output attributions side by side, shape ``(T, P + G)``."""
        attr = cast(Tensor, self.token_attr)
        return attr if self.output_attr is None else torch.cat([attr, self.output_attr], dim=1)

    @property
    def full_attr_se(self) -> Tensor:
        """Standard errors of `full_attr`."""
        se = self.token_attr_se
        return se if self.output_attr_se is None else torch.cat([se, self.output_attr_se], dim=1)

    @cached_property
    def answer(self) -> AnswerAttribution | None:
        """Attributions of the whole answer to the largest parts of the prompt.

        None if there are too many parts for the evaluations, if values of tokens do not add up, or
        for methods other than Shapley values and leave-one-out.
        """
        return self.own_answer or answer_at_hand(self)

    @property
    def fixed_attr(self) -> Tensor | None:
        """The contribution of fixed text, such as BOS and a chat template, shape ``(T,)``.

        In the unit of the attributions, for methods that attribute to every token; part of
        `empty_values`. None for other methods.
        """
        return self._per_token("fixed_attr")

    @property
    def fixed_share(self) -> Tensor | None:
        """The share of fixed text in all contributions, by absolute value, shape ``(T,)``."""
        return self._per_token("fixed_share")

    def _per_token(self, name: str) -> Tensor | None:
        """Numbers from the provenance, one per target token."""
        known = self.provenance.get(name)
        if known is None:
            return None
        return torch.tensor(known, dtype=torch.float64, device="cpu").to(self.full_values)

    @property
    def converged(self) -> bool | None:
        """Whether the rule of `tol` or `stop` was met; None without a rule."""
        return self.provenance.get("converged")

    @property
    def settled(self) -> tuple[bool, ...] | None:
        """For which target tokens (or for the whole answer) `stop` was met; None without it."""
        found = self.provenance.get("settled")
        return None if found is None else tuple(found)

    @property
    def rung(self) -> str | None:
        """How an API scored, if it did not report log-probabilities of prompts."""
        return self.provenance.get("rung")

    @property
    def value_interval(self) -> Tensor | None:
        """Lower and upper bounds of `values`, shape ``(2, n_coalitions, T)``.

        Guaranteed bounds if tokens are censored; two standard errors if answers are sampled.
        Infinite if there is no bound. None if values are known, and after a refit to another kind
        of value.
        """
        return self._interval("value_interval")

    @property
    def token_attr_interval(self) -> Tensor | None:
        """Guaranteed bounds of `token_attr`, shape ``(2, T, P)``.

        None if values are known, if the estimator is not linear in them, and after a refit.
        """
        return self._interval("token_attr_interval")

    def _interval(self, name: str) -> Tensor | None:
        held: Any = self.provenance.get(name)
        if held is None:
            return None
        ends = [
            [[end if v is None else v for v in row] for row in rows]
            for rows, end in zip(held, (-math.inf, math.inf), strict=True)
        ]
        return torch.tensor(ends, dtype=torch.float64, device="cpu")

    @property
    def noise_floor(self) -> Tensor | None:
        """How far rounding alone changes the value of each target token, shape ``(T,)``.

        Measured on rows of the run, recomputed in other batches and alone, for models in half
        precision, quantised models, and others whose values depend on the batch. None for ordinary
        float32 rounding, which is far below any attribution.
        """
        return self._per_token("noise_floor")

    @property
    def below_noise(self) -> Tensor:
        """Which attributions of `full_attr` may be rounding error, bool ``(T, P + G)``."""
        floor = self.noise_floor
        if floor is None:
            return torch.zeros_like(self.full_attr, dtype=torch.bool)
        return self.full_attr.abs() <= floor[:, None]

    @property
    def marked_beyond(self) -> float:
        """Number of standard errors that an attribution must exceed to be significant.

        More than 1.96, to correct for many tests: at most 5 % of what is marked is expected to be
        zero (Benjamini and Hochberg 1995).
        """
        return marked_beyond(self.full_attr, self.full_attr_se)

    @property
    def marked(self) -> Tensor:
        """Which attributions of `full_attr` differ significantly from zero, bool ``(T, P + G)``.

        False for unknown errors, and for what may be rounding error.
        """
        size, errors = self.full_attr.abs(), self.full_attr_se
        # Comparisons with NaN are false.
        return (size > 0) & (size >= self.marked_beyond * errors) & ~self.below_noise

    @property
    def names(self) -> Names:
        """Display names: ``"·est #4"`` is the fourth of its name, and continues a word."""
        n_prompt, n_output = len(self.input_tokens), len(self.output_features or ())
        tokens = [piece.text for piece in self.output_pieces] or [""] * len(self.output_tokens)
        output = self.output_features or []
        # A token that is a feature by itself has the same name in both places.
        own = [piece.feature for piece in self.output_pieces] == list(range(n_output))
        shown = numbered_where_alike(fragment_names(self.output_tokens, tokens))
        return Names(
            numbered_where_alike(_column_names(self.input_tokens, self.prompt_pieces, n_prompt)),
            shown
            if own
            else numbered_where_alike(_column_names(output, self.output_pieces, n_output)),
            shown,
        )

    @property
    def errors_unknown(self) -> Tensor:
        """Which attributions of `full_attr` are estimates of unknown error, bool ``(T, P + G)``.

        A single pair of orders gives no error, nor does a lasso, a single draw of a random
        baseline, or a method that runs through its own ``attribute``.
        """
        return self.full_attr_se.isnan() & (self.full_attr != 0)

    def attribute_span(self, start: int, stop: int | None = None) -> "SpanAttribution":
        """Attributions of several target tokens together; the model is not called.

        The attributions of the span's tokens are summed, each to the features before that token.
        For log-probabilities this explains the probability of the whole span.

        Args:
            start: The first target token.
            stop: One past the last; by default a span of one token. Negative numbers count from the
                end, as in a slice.

        Returns:
            One attribution per column of `full_attr`. Standard errors include the covariance of
            tokens that share coalitions. If the span covers several generated words, the errors of
            the words' parts are summed, which is an upper bound; likewise for gradients. No error
            exceeds the sum of the tokens' errors.

        Raises:
            ValueError: If the span is empty, or the values are probabilities, whose sum has no
                meaning.
        """
        rows = self._rows(start, stop)
        n_tokens = rows.stop - rows.start
        if n_tokens > 1 and self.provenance.get("attr_target") == "prob":
            raise ValueError(
                "probabilities of tokens do not add up to that of a span: take the span of "
                '`result.refit(attr_target="log_prob")`.'
            )
        errors = self.full_attr_se[rows].sum(0)
        if not self._is_of_gradients:  # its draws are not kept, so the sum is the upper bound
            exact = self._evidence().span_errors([range(rows.start, rows.stop)])
            errors = capped(torch.cat([part[0] for part in self._split(exact)]), errors)
        return self._span(rows, self.full_attr[rows].sum(0), errors)

    def position(self, token: int | str) -> int:
        """The position of a target token, from 0.

        Args:
            token: Its position, negative ones from the end; or its name, as in `output_tokens` or
                as displayed (`names`).

        Raises:
            ValueError: If there is no such token, or several have this name.
        """
        names = self.output_tokens
        return position_of(token, names, "target token", displayed=self.names.tokens)

    def replicates(self, start: int, stop: int) -> Tensor | None:
        """Jackknife replicates of a span's attributions: each leaves out a part of the draws.

        Returns:
            Shape ``(n_replicates, P + G)``, columns as in `full_attr`; None if nothing was sampled,
            or if coalitions cannot be left out.
        """
        if self._is_of_gradients or self.design is None:
            return None
        if (start, stop) not in self._replicates:
            found = self._evidence().replicates(range(start, stop))
            wide = None if found is None else torch.cat(self._split(found, found), dim=1)
            self._replicates[start, stop] = wide
        return self._replicates[start, stop]

    @property
    def column_features(self) -> list[int]:
        """Feature of each column of `full_attr`; captum's groups have a column per member."""
        return self._features

    @property
    def _column_names(self) -> list[str]:
        return [*self.input_tokens, *(self.output_features or ())]

    @property
    def _features(self) -> list[int]:
        """Feature of each column of `full_attr`, as a column of `masks`."""
        if self.design is None:
            n_columns = len(self._column_names)
            own = self.provenance.get("columns", range(len(self.input_tokens)))
            return [*own, *range(max(own) + 1, max(own) + 1 + n_columns - len(own))]
        n_prompt = 1 + max(self.design.columns)
        generated = range(n_prompt, n_prompt + len(self.output_features or ()))
        return [*self.design.columns, *generated]

    def _rows(self, start: int, stop: int | None) -> slice:
        """The target tokens of a span.

        Raises:
            ValueError: If the span is empty.
        """
        n_target = len(self.output_tokens)
        end = (start + 1 or None) if stop is None else stop
        rows = slice(*slice(start, end).indices(n_target)[:2])
        if rows.start >= rows.stop:
            raise ValueError(
                f"there is no target token from {start} to {end}: there are {n_target}."
            )
        return rows

    def _span(self, rows: slice, values: Tensor, errors: Tensor) -> SpanAttribution:
        return SpanAttribution(
            start=rows.start,
            stop=rows.stop,
            tokens=self.output_tokens[rows],
            names=self._column_names,
            values=values,
            standard_errors=errors,
            n_prompt=len(self.input_tokens),
            features=None if self.design is None else self._features,
        )

    def _split(self, solved: Tensor, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A solver's numbers per feature, as those of prompt and output columns."""
        n_prompt = len(self.input_tokens)
        # The last generated feature precedes no token and was not a player.
        known = torch.nn.functional.pad(solved, (0, self.masks.shape[1] - solved.shape[1]))
        wide = known[:, self._features].to(self.full_attr if like is None else like)
        return wide[:, :n_prompt], wide[:, n_prompt:]

    @property
    def is_unsigned(self) -> bool:
        """Whether attributions are magnitudes without a sign."""
        return bool(self.provenance.get("unsigned"))

    @property
    def unresolved(self) -> list[UnresolvedGroup]:
        """Groups that were not split, largest first; their features share the attribution equally.

        By `PartitionShap` for lack of budget, or by `HierarchicalAblation` as unimportant.
        """
        if self.design is None:
            return []
        found: list[UnresolvedGroup] = []
        for group in self._evidence().unresolved():
            columns = [
                column for column, feature in enumerate(self._features) if feature in group.columns
            ]
            names = [self._column_names[column] for column in columns]
            found.append(UnresolvedGroup(names, columns, group.totals.to(self.full_attr)))
        return found

    def redundant_pairs(self, k: int = 5) -> list[Redundancy]:
        """Pairs of redundant features, to which leave-one-out attributes next to nothing.

        Args:
            k: Maximum number per target token.

        Returns:
            Per target token, the most redundant pair first.

        Raises:
            ValueError: If the coalitions are insufficient, such as those of leave-one-out.
        """
        found = self._evidence().redundant_pairs(k)
        first_column = {f: c for c, f in reversed(list(enumerate(self._features)))}
        pairs: list[Redundancy] = []
        for target, own in enumerate(found):
            for pair in own:
                columns = first_column[pair.first], first_column[pair.second]
                names = self._column_names[columns[0]], self._column_names[columns[1]]
                pairs.append(
                    Redundancy(target, names, columns, pair.alone, pair.together, pair.z_score)
                )
        return pairs

    @property
    def _is_of_gradients(self) -> bool:
        """Whether the numbers come from gradients rather than coalitions."""
        return bool(self.provenance.get("gradients"))

    def _evidence(self, values: Tensor | None = None, *, as_scored: bool = False) -> Evidence:
        """The coalitions with these values, by default those of the result.

        Effects of drawn texts are removed, unless the values are needed `as_scored`.
        """
        if self._is_of_gradients:
            raise ValueError(
                "gradients use no coalitions to estimate this from: attribute with "
                "`GenerationAttribution`."
            )
        if self.design is None:
            raise ValueError(
                "this result was written by an earlier version, which did not note how its "
                "coalitions were planned: attribute again."
            )
        values = self.values if values is None else values
        found = Evidence(self.design, self.masks, self.draws, values, self.design.scope)
        return found if as_scored else found.without_draw_effects(self.drawn_texts)


def _column_names(names: Sequence[str], pieces: Sequence[Piece], n: int) -> list[str]:
    """Names of columns, with dots if the word of the first or last piece continues."""
    edges: dict[int, tuple[bool, bool]] = {}
    for _, run in groupby(pieces, key=lambda piece: piece.role):
        tokens = list(run)
        for piece, (left, right) in zip(tokens, going_on([p.text for p in tokens]), strict=True):
            if piece.feature is not None:
                first, _ = edges.get(piece.feature, (left, right))
                edges[piece.feature] = first, right
    dots = (edges.get(i, (False, False)) for i in range(n))
    return [
        f"{GOES_ON * left}{name.strip() if left or right else name}{GOES_ON * right}"
        for name, (left, right) in zip(names, dots, strict=True)
    ]
