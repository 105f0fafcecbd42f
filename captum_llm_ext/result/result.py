"""What an attribution found: numbers, names and where they came from."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from captum.attr import InterpretableInput
from torch import Tensor

from captum_llm_ext.base import terminal
from captum_llm_ext.result.causes import (
    Cause,
    Redundancy,
    SpanAttribution,
    UnresolvedGroup,
    strongest,
)
from captum_llm_ext.result.export import ExportedResult
from captum_llm_ext.result.files import read, write
from captum_llm_ext.result.levels import prompt_level
from captum_llm_ext.result.refit import Design, Evidence, Method, convert, method_name
from captum_llm_ext.result.summed_errors import capped
from captum_llm_ext.result.table import table
from captum_llm_ext.text.inputs import Level, Piece

# What a refit leaves as it is.
_SAME = (
    "input_tokens output_tokens output_probs inp output_features n_evaluations masks draws target "
    "prompt_pieces output_pieces levels foils foil_tokens foil_values"
).split()


class GenerationAttributionResult(ExportedResult):
    """Attributions of every target token to the prompt and to the output before it.

    Captum's fields have captum's meaning and shape; the others are new. There are ``T`` target
    tokens, ``P`` columns of prompt features, ``G`` features made of the generated text and ``C``
    coalitions.

    Attributes:
        input_tokens: ``P`` names of prompt columns, in prompt order; white space included where
            the feature has it (``" lives"``).
        output_tokens: ``T`` printable names of the target tokens, stripped, as in captum.
        output_features: ``G`` names of generated features, or None where the output is held fixed.
        token_attr: ``(T, P)``, to the prompt features, in the unit of the value (nats).
        output_attr: ``(T, G)``, to earlier output: exactly 0 where a feature holds the token or a
            later one. None where the output is held fixed.
        seq_attr: ``(P,)``, of the whole target: the sum over tokens, or for ``attr_target="prob"``
            the attribution of its joint probability with the output held fixed.
        token_attr_se, output_attr_se: Standard errors of the same shapes: 0 where the answer is
            exact, NaN where it cannot be told.
        output_probs: ``(T,)``, probability of each target token, where the value tells it.
        full_values, empty_values: ``(T,)``, the value with everything present, and with every
            prompt feature and all earlier output absent (averaged over the baseline's draws).
        efficiency_gap: ``(T,)``, full minus empty minus the sum of the attributions: 0 for
            Shapley-type methods, what is left unexplained for others, NaN for those that sum to
            nothing (`LayerSaliency`).
        n_evaluations: Distinct rows that the model was run on.
        masks: Bool ``(C, P' + G)``: coalitions, True = present; ``P'`` prompt features (a group of
            columns counts once).
        values: ``(C, T)``, the value of every target token in each; NaN where a coalition gives it
            none.
        draws: ``(C,)``: coalitions with equal number share one draw of replacements.
        target: ``(T,)``, the target's token ids.
        prompt_pieces, output_pieces: The text in reading order, with the column that each piece
            shows.
        levels: Coarser readings of the prompt's columns: see `at_level`.
        design: How the coalitions were planned, for `refit` and `attribute_span`; None for results
            of earlier versions.
        foils: ``(T, n_foils)``, ids of the tokens that each target token is held against, -1 where
            it has fewer; None if it is not about a `Contrast`.
        foil_tokens: Their printable names, a list per target token.
        foil_values: ``(C, T)``, the log-probability of all foils of a token together in each
            coalition (0 where it has none): added to its contrast it is that of the token.
        provenance: Versions, model, method, seed, budget: what is needed to run it again.
    """

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
        # Where the output was held fixed no piece of it has a column.
        fixed = output_attr is None
        self.output_pieces = [replace(p, feature=None) if fixed else p for p in output_pieces]
        self.levels = list(levels)
        self.design = design
        self.foils, self.foil_tokens, self.foil_values = foils, foil_tokens, foil_values
        self.provenance = dict(provenance or {})

    @property
    def full_attr(self) -> Tensor:
        """Prompt and output side by side, shape ``(T, P + G)``."""
        attr = cast(Tensor, self.token_attr)
        return attr if self.output_attr is None else torch.cat([attr, self.output_attr], dim=1)

    @property
    def full_attr_se(self) -> Tensor:
        """Standard errors of `full_attr`."""
        se = self.token_attr_se
        return se if self.output_attr_se is None else torch.cat([se, self.output_attr_se], dim=1)

    @property
    def fixed_attr(self) -> Tensor | None:
        """What fixed text, such as BOS and a chat template, adds to each value, shape ``(T,)``.

        In the unit of the attributions, for methods that give every token a share: part of
        `empty_values`. None for others.
        """
        return self._per_token("fixed_attr")

    @property
    def fixed_share(self) -> Tensor | None:
        """The part of fixed text in what all tokens add, by absolute value, shape ``(T,)``."""
        return self._per_token("fixed_share")

    def _per_token(self, name: str) -> Tensor | None:
        """Numbers of provenance, one per target token."""
        known = self.provenance.get(name)
        if known is None:
            return None
        return torch.tensor(known, dtype=torch.float64, device="cpu").to(self.full_values)

    @property
    def converged(self) -> bool | None:
        """Whether `tol` was met; None if none was given."""
        return self.provenance.get("converged")

    @property
    def rung(self) -> str | None:
        """How values were found behind an API that tells less than log-probabilities of prompts."""
        return self.provenance.get("rung")

    @property
    def value_interval(self) -> Tensor | None:
        """Between what `values` lie, shape ``(2, n_coalitions, T)``: lower and upper ends.

        Surely, where tokens are censored; at two standard errors, where answers are sampled.
        Infinite where there is no bound. None where values are simply known.
        """
        return self._interval("value_interval")

    @property
    def token_attr_interval(self) -> Tensor | None:
        """Between what `token_attr` surely lies, shape ``(2, T, P)``.

        None where values are known, or where the estimator is not linear in them.
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
        """How far rounding alone moves the value of each target token, shape ``(T,)``.

        Measured on rows of the run, computed in other batches and alone, for models in half
        precision, quantised ones, and others whose values depend on the batch. None where float32
        rounds no more than it should, which is far below any attribution.
        """
        return self._per_token("noise_floor")

    @property
    def below_noise(self) -> Tensor:
        """Which attributions of `full_attr` may be rounding, bool ``(T, P + G)``."""
        floor = self.noise_floor
        if floor is None:
            return torch.zeros_like(self.full_attr, dtype=torch.bool)
        return self.full_attr.abs() <= floor[:, None]

    @property
    def errors_unknown(self) -> Tensor:
        """Which attributions of `full_attr` are estimates of unknown error, bool ``(T, P + G)``.

        A single pair of orders tells none, nor does a lasso, a single draw of a random baseline, or
        a method that is run through its own ``attribute``: nothing tells these from noise.
        """
        return self.full_attr_se.isnan() & (self.full_attr != 0)

    def attribute_span(self, start: int, stop: int | None = None) -> "SpanAttribution":
        """What made the model write several target tokens: no model call is needed.

        The attributions of the span's tokens are added up, each to what came before that token.
        For log-probabilities that explains the probability of the span as a whole.

        Args:
            start: The first target token.
            stop: The one after the last; by default a span of one token. Negative numbers count
                from the end, as in a slice.

        Returns:
            One attribution per column of `full_attr`. The standard errors take into account that
            the tokens share their coalitions; where the span's tokens stand in several generated
            words, those of the words' parts are added up, which is an upper bound, and so are
            those of gradients. None is larger than the errors of the tokens together.

        Raises:
            ValueError: If the span is empty, or the values are probabilities, whose sum means
                nothing.
        """
        rows = self._rows(start, stop)
        n_tokens = rows.stop - rows.start
        if n_tokens > 1 and self.provenance.get("attr_target") == "prob":
            raise ValueError(
                "probabilities of tokens do not add up to that of a span: take the span of "
                '`result.refit(attr_target="log_prob")`.'
            )
        errors = self.full_attr_se[rows].sum(0)
        if not self._is_of_gradients:  # whose draws are not kept: their sum is what it can be
            exact = self._evidence().span_errors([range(rows.start, rows.stop)])
            errors = capped(torch.cat([part[0] for part in self._split(exact)]), errors)
        return self._span(rows, self.full_attr[rows].sum(0), errors)

    def contextcite(
        self, start: int = 0, stop: int | None = None, *, alpha: float = 0.01
    ) -> "SpanAttribution":
        """The few features that a statement of the answer rests on: no model call is needed.

        A lasso on the log-odds of the statement (Cohen-Wang et al. 2024, arXiv 2409.00729), over
        the coalitions of `Lime`, in which each feature is present with probability 1/2.

        Args:
            start: The statement's first target token.
            stop: The one after its last; by default the end of the answer.
            alpha: Strength of the penalty.

        Returns:
            One attribution per column of `full_attr`, in log-odds; a lasso tells no errors (NaN).

        Raises:
            ValueError: If the statement is empty, its tokens see different features (hold the
                output fixed by ``output_unit=None``), or the coalitions or values do not serve.
        """
        rows = self._rows(start, len(self.output_tokens) if stop is None else stop)
        evidence = replace(self._evidence(), values=self._converted("log_prob"))
        found = evidence.contextcite(range(rows.start, rows.stop), alpha)
        values, errors = (
            torch.cat([part[0] for part in self._split(part)])
            for part in (found.attributions, found.standard_errors)
        )
        return self._span(rows, values, errors)

    def refit(
        self, method: Method | None = None, *, attr_target: str | None = None
    ) -> "GenerationAttributionResult":
        """Another method's answer, or that to another question, from the same coalitions.

        Nothing is sampled and no model is called.

        Args:
            method: A captum class, or an object of it if its settings matter (``Lime``). None: the
                method as it was.
            attr_target: ``"log_prob"``, ``"prob"`` or ``"log_odds"``, of which each tells the
                others, or ``"contrast"``, which tells these and is told where foils were scored.
                None: as it was.

        Returns:
            A new result. For ``attr_target="prob"`` its `seq_attr` is NaN where generated features
            were switched as well: the joint probability with the output held fixed was not scored.

        Raises:
            ValueError: If the coalitions do not tell what is asked for, such as Shapley values
                from leave-one-out, or logits from probabilities.
        """
        evidence = self._evidence()
        wanted = attr_target or str(self.provenance["attr_target"])
        evidence = replace(evidence, values=self._converted(wanted))
        if method is not None:
            levels = [level.part_of for level in self.levels]
            evidence = evidence.refitted(method, levels)
        return self._solved(evidence, method, wanted)

    def _converted(self, attr_target: str) -> Tensor:
        """The coalitions' values in another unit."""
        given = str(self.provenance["attr_target"])
        return convert(self.values, given, attr_target, self.foil_values)

    @property
    def unresolved(self) -> "list[UnresolvedGroup]":
        """Groups that were not told apart, the largest first: by `PartitionShap` within its budget,
        or because `HierarchicalAblation` did not open them. Their features share evenly."""
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

    @property
    def additivity(self) -> Tensor:
        """How much of the values' variation attributions that add up explain, shape ``(T,)``.

        R², 1 where features do not interact: low, and single numbers per feature tell little. NaN
        where the coalitions do not tell, such as those of leave-one-out.
        """
        if self.design is None:
            return torch.full_like(self.full_values, torch.nan)
        return self._evidence().additivity().to(self.full_values)

    def redundant_pairs(self, k: int = 5) -> list[Redundancy]:
        """Pairs of features that say the same, which leave-one-out gives next to nothing.

        Args:
            k: How many at most for each target token.

        Returns:
            By target token, the pair with most in common first.

        Raises:
            ValueError: If the coalitions do not tell, such as those of leave-one-out.
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
    def _column_names(self) -> list[str]:
        return [*self.input_tokens, *(self.output_features or ())]

    @property
    def _features(self) -> list[int]:
        """Per column of `full_attr` its feature: a column of `masks`."""
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
            ValueError: If there is none.
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

    def _split(self, solved: Tensor) -> tuple[Tensor, Tensor]:
        """What a solver says of features, at the columns of prompt and output."""
        n_prompt = len(self.input_tokens)
        # The last generated feature has no token after it: it was no player.
        known = torch.nn.functional.pad(solved, (0, self.masks.shape[1] - solved.shape[1]))
        wide = known[:, self._features].to(self.full_attr)
        return wide[:, :n_prompt], wide[:, n_prompt:]

    def _solved(
        self, evidence: Evidence, method: Method | None, attr_target: str
    ) -> "GenerationAttributionResult":
        """The result of solving the evidence; everything else is as it is here."""
        solution = evidence.solve()
        token_attr, output_attr = self._split(solution.attributions)
        token_attr_se, output_attr_se = self._split(solution.standard_errors)
        full, empty = solution.full_values, solution.empty_values
        joint = token_attr.sum(0)
        if attr_target == "prob":
            fixed = evidence.joint()
            joint = joint * torch.nan
            if fixed is not None:
                joint = self._split(fixed.solve().attributions)[0][0]
        name = self.provenance["method"] if method is None else method_name(method)
        other: dict[str, Any] = {
            "token_attr": token_attr,
            "token_attr_se": token_attr_se,
            "output_attr": None if self.output_attr is None else output_attr,
            "output_attr_se": None if self.output_attr is None else output_attr_se,
            "seq_attr": joint,
            "full_values": full.to(token_attr),
            "empty_values": empty.to(token_attr),
            "efficiency_gap": solution.efficiency_gap.to(token_attr),
            "values": evidence.values.to(self.values),
            "design": evidence.design,
            "provenance": self.provenance
            | {"method": name, "estimator": evidence.design.solved, "attr_target": attr_target}
            | {"estimate": evidence.is_estimate, "converged": None}
            # In another unit rounding is another.
            | ({} if attr_target == self.provenance["attr_target"] else {"noise_floor": None})
            | {"refitted_from": [self.provenance["method"], self.provenance["attr_target"]]},
        }
        same: dict[str, Any] = {name: getattr(self, name) for name in _SAME}
        return GenerationAttributionResult(**same | other)

    def _evidence(self) -> Evidence:
        if self._is_of_gradients:
            raise ValueError(
                "gradients come from no coalitions that could tell: attribute with "
                "`GenerationAttribution`."
            )
        if self.design is None:
            raise ValueError(
                "this result was written by an earlier version, which did not note how its "
                "coalitions were planned: attribute again."
            )
        return Evidence(self.design, self.masks, self.draws, self.values, self.design.scope)

    def why(self, token: int | str, k: int = 5) -> list[Cause]:
        """What made the model write one token.

        Args:
            token: Its position in the target, or its name in `output_tokens`.
            k: How many causes at most.

        Returns:
            The strongest causes, by falling magnitude; zeros are no causes.

        Raises:
            ValueError: If there is no such token, there are several of that name, or `k` is below
                1.
        """
        t = self.position(token)
        return self._causes(self.full_attr[t], self.full_attr_se[t], k)

    def top(self, k: int = 3) -> list[list[Cause]]:
        """The `k` strongest causes of every target token, as `why` gives them.

        Those of the whole answer are ``attribute_span(0, T).top(k)``.

        Raises:
            ValueError: If `k` is below 1.
        """
        rows = zip(self.full_attr, self.full_attr_se, strict=True)
        return [self._causes(attributions, errors, k) for attributions, errors in rows]

    def _causes(self, attributions: Tensor, errors: Tensor, k: int) -> list[Cause]:
        features = None if self.design is None else self._features
        n_prompt = len(self.input_tokens)
        found = strongest(self._column_names, attributions, errors, n_prompt, k, features)
        return [cause._replace(is_unsigned=self.is_unsigned) for cause in found]

    def at_level(self, name: str) -> tuple[list[str], Tensor]:
        """Prompt attributions summed over the parts of a coarser level.

        For additive methods (Shapley values) that is what the part contributes.

        Args:
            name: A name of `levels`, such as ``"sentence"`` or ``"turn"``; the unit of the
                features themselves; or any other that the page offers, whose parts the features
                nest in.

        Returns:
            The names of the parts, and their attributions ``(T, n_parts)``.

        Raises:
            ValueError: If there is no such level.
        """
        parts, part_of = prompt_level(self, name)
        attr = cast(Tensor, self.token_attr)
        sums = attr.new_zeros(len(attr), len(parts))
        at = torch.tensor(part_of, device=attr.device, dtype=torch.int64)
        return parts, sums.index_add(1, at, attr)

    def position(self, token: int | str) -> int:
        """The place of a target token, from 0.

        Args:
            token: Its position, negative ones from the end; or its name in `output_tokens`.

        Raises:
            ValueError: If there is no such token, or there are several of that name.
        """
        n_target = len(self.output_tokens)
        if isinstance(token, int):
            if not -n_target <= token < n_target:
                raise ValueError(f"there is no token {token}: the target has {n_target}.")
            return token % n_target
        found = [i for i, name in enumerate(self.output_tokens) if name == token.strip()]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} target tokens are {token!r}: give the position"
                + (f", one of {found}." if found else f" of one of {self.output_tokens}.")
            )
        return found[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result to one safetensors file: tensors as they are, the rest as JSON.

        The interpretable input is not a part of it. `captum_llm_ext.result.files` tells the layout.

        Raises:
            TypeError, ValueError: If `provenance` holds what JSON cannot.
            OSError: If the file cannot be written; one that was there is left as it was.
        """
        write(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "GenerationAttributionResult":
        """Reads a result that `save` wrote; `inp` is None.

        Raises:
            OSError: If there is no such file, or it cannot be read.
            ValueError: If the file is damaged, no result, or of a later format.

        Warns:
            UserWarning: If the file is of an early version, without the digest that tells damage.
        """
        return read(path, cls)

    @property
    def summary(self) -> str:
        """How much of what was attributed, by what, in a line."""
        features = len(self.output_features or ())
        return (
            f"GenerationAttributionResult({len(self.output_tokens)} target tokens × "
            f"({len(self.input_tokens)} prompt + {features} output features), "
            f"{self.provenance.get('method', 'attribution')}, {self.n_evaluations} evaluations)"
        )

    def __repr__(self) -> str:
        if not self.output_features or len(self.output_tokens) < 2:
            return self.summary
        # Nothing else tells who comes from captum why these numbers are not those of captum.
        return (
            f"{self.summary}: earlier output takes part as a cause; `output_unit=None` holds it "
            "fixed and gives captum's own quantity"
        )

    def __str__(self) -> str:
        return self.table(paint=terminal.paint, width=terminal.width())

    def __format__(self, spec: str) -> str:
        return format(self.table(), spec)

    def table(
        self,
        k: int = 3,
        *,
        paint: Callable[[str, str], str] | None = None,
        width: int | None = None,
    ) -> str:
        """The strongest causes of every target token, a line each.

        What lies within 1.96 standard errors, or below a hundredth of the largest attribution, is
        left out. Estimates of unknown error are marked ± ?, and painted as nothing
        certain. ``print(result)`` shows it in the colours and the width of the terminal;
        elsewhere, and in ``f"{result}"``, it is plain.

        Args:
            k: Causes per token, at most.
            paint: From a text and its kind (``"token"``, ``"raises"``, ``"lowers"``,
                ``"nothing"``) to what is shown, such as the text in a terminal's colours.
            width: Columns that a line may take: weaker causes that do not fit give way to " …".
                None: as many as needed.

        Raises:
            ValueError: If `k` is below 1.
        """
        return table(self, k, paint, width)
