"""The result of an attribution: numbers, names and provenance."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from captum_llm_ext.base import terminal
from captum_llm_ext.result.answer import kind_of
from captum_llm_ext.result.causes import (
    Cause,
    SpanAttribution,
    strongest,
)
from captum_llm_ext.result.export import ExportedResult
from captum_llm_ext.result.files import read, write
from captum_llm_ext.result.levels import prompt_level
from captum_llm_ext.result.narrative import sentences
from captum_llm_ext.result.reading import Blocks, Reading, adds_up
from captum_llm_ext.result.refit import Evidence, Method, convert, method_name
from captum_llm_ext.result.table import table
from captum_llm_ext.result.total import Route, Source, TotalAttribution, total

# Fields that a refit leaves unchanged.
_SAME = (
    "input_tokens output_tokens output_probs inp output_features n_evaluations masks draws target "
    "prompt_pieces output_pieces levels foils foil_tokens foil_values drawn_texts"
).split()


class GenerationAttributionResult(ExportedResult):
    """Attributions of every target token to the prompt and to earlier output.

    Captum's fields have captum's meaning and shape; the others are new. ``T`` is the number of
    target tokens, ``P`` of prompt columns, ``G`` of generated features and ``C`` of coalitions.

    Attributes:
        input_tokens: ``P`` names of prompt columns, in prompt order; including white space of the
            feature (``" lives"``).
        output_tokens: ``T`` printable names of the target tokens, stripped, as in captum.
        output_features: ``G`` names of generated features, or None if the output is held fixed.
        token_attr: Attributions to prompt features, ``(T, P)``, in the unit of the value (nats).
        output_attr: Attributions to earlier output, ``(T, G)``: exactly 0 if a feature contains the
            token or a later one. None if the output is held fixed.
        seq_attr: Attributions of the whole target, ``(P,)``: the sum over tokens, or for
            ``attr_target="prob"`` the attribution of its joint probability with the output held
            fixed. With the output held fixed, a lasso (`Lime`) and custom subclasses of `LimeBase`
            are fitted to the summed values, as in captum: a lasso shrinks a sum less than each of
            its parts.
        token_attr_se, output_attr_se: Standard errors of the same shapes: 0 if exact, NaN if
            unknown.
        output_probs: Probability of each target token, ``(T,)``, if the value determines it.
        full_values, empty_values: Value with everything present, and with every prompt feature and
            all earlier output absent (averaged over baseline draws), ``(T,)``.
        efficiency_gap: Full minus empty minus the sum of the attributions, ``(T,)``: 0 for
            Shapley-type methods, NaN for methods without completeness (`LayerSaliency`).
        n_evaluations: Number of distinct rows scored.
        masks: Bool ``(C, P' + G)``: coalitions, True = present; ``P'`` is the number of prompt
            features (a group of columns counts once).
        values: Value of every target token in each coalition, ``(C, T)``; NaN if undefined.
        draws: ``(C,)``: coalitions with equal numbers share one draw of replacements.
        target: Token ids of the target, ``(T,)``.
        prompt_pieces, output_pieces: The text in reading order, with the column of each piece.
        levels: Coarser units of the prompt's columns: see `at_level`.
        design: How the coalitions were planned, for `refit` and `attribute_span`; None for results
            of earlier versions.
        foils: Ids of each target token's foils, ``(T, n_foils)``, padded with -1; None without a
            `Contrast`.
        foil_tokens: Their printable names, a list per target token.
        foil_values: Log-probability of all foils of a token together in each coalition, ``(C, T)``
            (0 if it has none): contrast plus this is the token's log-probability.
        answer: Attributions of the whole answer, held as it is, to the largest parts of the prompt:
            see `AnswerAttribution`; None if there are none.
        drawn_texts: Which replacement texts the coalitions were scored with: their effects are
            removed from the values before these are solved (see `DrawnTexts`). None if texts do not
            vary, their probabilities are unknown, or the method uses each draw as it is.
        provenance: Versions, model, method, seed, budget: what is needed to reproduce it.
    """

    def contextcite(
        self, start: int = 0, stop: int | None = None, *, alpha: float = 0.01
    ) -> "SpanAttribution":
        """The few features that a statement of the answer rests on, by ContextCite's lasso.

        A lasso on the log-odds of the statement (Cohen-Wang et al. 2024, arXiv 2409.00729), over
        the coalitions of `Lime`, in which each feature is present with probability 1/2. The model
        is not called.

        Args:
            start: The statement's first target token.
            stop: One past its last; by default the end of the answer.
            alpha: Strength of the penalty.

        Returns:
            One attribution per column of `full_attr`, in log-odds; a lasso has no standard errors
            (NaN).

        Raises:
            ValueError: If the statement is empty, its tokens see different features (hold the
                output fixed by ``output_unit=None``), or the coalitions or values are unsuitable.
        """
        rows = self._rows(start, len(self.output_tokens) if stop is None else stop)
        # The fit is to logits, which values without the effects of texts may not have.
        evidence = self._evidence(self._converted("log_prob"), as_scored=True)
        found = evidence.contextcite(range(rows.start, rows.stop), alpha)
        values, errors = (
            torch.cat([part[0] for part in self._split(part)])
            for part in (found.attributions, found.standard_errors)
        )
        return self._span(rows, values, errors)

    def refit(
        self, method: Method | None = None, *, attr_target: str | None = None
    ) -> "GenerationAttributionResult":
        """Another method's attributions, or those of another value, from the same coalitions.

        Nothing is sampled and the model is not called.

        Args:
            method: A captum class, or an instance if its settings matter (``Lime``). None:
                unchanged.
            attr_target: ``"log_prob"``, ``"prob"`` or ``"log_odds"``, which can be converted into
                each other, or ``"contrast"``, which needs scored foils. None: unchanged.

        Returns:
            A new result. For ``attr_target="prob"`` its `seq_attr` is NaN if generated features
            were players as well: the joint probability with the output held fixed was not scored.

        Raises:
            ValueError: If the coalitions are insufficient, e.g. for Shapley values from
                leave-one-out, or logits from probabilities.
        """
        wanted = attr_target or str(self.provenance["attr_target"])
        evidence = self._evidence(self._converted(wanted))
        if method is not None:
            levels = [level.part_of for level in self.levels]
            evidence = evidence.refitted(method, levels)
        return self._solved(evidence, method, wanted)

    def _converted(self, attr_target: str) -> Tensor:
        """The coalitions' values, converted to another kind."""
        given = str(self.provenance["attr_target"])
        return convert(self.values, given, attr_target, self.foil_values)

    def total(
        self,
        floor: float | None = None,
        *,
        level: str | None = None,
        n_resamples: int = 10,
        seed: int = 0,
    ) -> TotalAttribution:
        """Total influence on each token: the prompt's shares, also through earlier output.

        The model is not called. Chains of causes are followed back to their origin (CAGE, arXiv
        2512.15663): see `TotalAttribution`.

        Args:
            floor: A token whose attributions sum to less, in the unit of the value, has no cause.
                Default: 0.1 nats; for other units a fiftieth of the largest sum.
            level: Level of the prompt, as for `at_level`; None: its features.
            n_resamples: Number of jackknife groups, for standard errors; 0: no standard errors.
            seed: Seeds the groups.

        Raises:
            ValueError: If an argument is out of range, there is no such level, or words of several
                tokens are explained by their probability, which is not additive.
        """
        evidence = None if self.design is None else self._evidence
        source = Source(self._features, evidence, self._split, self._moved)
        return total(self, source, floor, level, n_resamples, seed)

    def route(self, token: int | str, k: int = 3) -> list[Route]:
        """The strongest chains of causes that lead to a token, starting in the prompt.

        Args:
            token: Its position in the target, or its name in `output_tokens`.
            k: Maximum number of chains.

        Returns:
            By decreasing share of the token's total influence: see `TotalAttribution.route`.

        Raises:
            ValueError: If there is no such token, or several have this name.
        """
        t = self.position(token)
        return self.total(n_resamples=0).route(t, k)

    @property
    def additivity(self) -> Tensor:
        """How much of the values' variance additive attributions explain, shape ``(T,)``.

        R²: 1 if features do not interact; if it is low, one number per feature says little. NaN if
        the coalitions are insufficient, such as those of leave-one-out.
        """
        if self.design is None:
            return torch.full_like(self.full_values, torch.nan)
        return self._evidence().additivity().to(self.full_values)

    def _solved(
        self, evidence: Evidence, method: Method | None, attr_target: str
    ) -> "GenerationAttributionResult":
        """The result of solving the evidence; all other fields are unchanged."""
        solution = evidence.solve()
        token_attr, output_attr = self._split(solution.attributions)
        token_attr_se, output_attr_se = self._split(solution.standard_errors)
        full, empty = solution.full_values, solution.empty_values
        joint, is_joint = token_attr.sum(0), attr_target == "prob"
        if is_joint or not evidence.design.is_additive:
            # The effects of texts on a product are not the product of adjusted values.
            scored = replace(evidence, values=self._converted(attr_target))
            fixed = (scored if is_joint else evidence).whole(is_joint=is_joint)
            if fixed is not None:
                joint = self._split(fixed.solve().attributions)[0][0]
            elif is_joint:
                joint = joint * torch.nan
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
            "provenance": self._provenance_but_bounds(method, attr_target)
            | {"method": name, "estimator": evidence.design.solved, "attr_target": attr_target}
            | {"estimate": evidence.is_estimate, "converged": None}
            # The noise floor differs for another kind of value.
            | ({} if attr_target == self.provenance["attr_target"] else {"noise_floor": None})
            | {"refitted_from": [self.provenance["method"], self.provenance["attr_target"]]},
        }
        same: dict[str, Any] = {name: getattr(self, name) for name in _SAME}
        if self.own_answer is not None and attr_target == self.provenance["attr_target"]:
            is_same = kind_of(evidence.design.solved) in (None, self.own_answer.kind)
            same["answer"] = self.own_answer if is_same or method is None else None
        return GenerationAttributionResult(**same | other)

    def _provenance_but_bounds(self, method: Method | None, attr_target: str) -> dict[str, Any]:
        """The provenance without bounds that another estimator or kind of value does not have."""
        is_same = attr_target == self.provenance["attr_target"]
        stale = [] if is_same else ["value_interval"]
        stale += [] if is_same and method is None else ["token_attr_interval", "first_cause"]
        return self.provenance | {name: None for name in stale if name in self.provenance}

    def why(self, token: int | str, k: int = 5) -> list[Cause]:
        """The strongest causes of one target token.

        Args:
            token: Its position in the target, or its name in `output_tokens`.
            k: Maximum number of causes in each block.

        Returns:
            The strongest causes in the prompt, then those in earlier output, each by decreasing
            magnitude; zeros are left out.

        Raises:
            ValueError: If there is no such token, several have this name, or `k` is below 1.
        """
        t = self.position(token)
        return self._causes(self.full_attr[t], self.full_attr_se[t], k)

    def top(self, k: int = 3) -> list[list[Cause]]:
        """The strongest causes of every target token, as by `why`.

        For the whole answer, use ``attribute_span(0, T).top(k)``.

        Raises:
            ValueError: If `k` is below 1.
        """
        rows = zip(self.full_attr, self.full_attr_se, strict=True)
        return [self._causes(attributions, errors, k) for attributions, errors in rows]

    def _causes(self, attributions: Tensor, errors: Tensor, k: int) -> list[Cause]:
        features = None if self.design is None else self._features
        n_prompt = len(self.input_tokens)
        found = strongest(self._column_names, attributions, errors, n_prompt, k, features)
        shown, beyond = [*self.names.prompt, *self.names.output], self.marked_beyond
        return [
            cause._replace(
                is_unsigned=self.is_unsigned,
                label=shown[cause.column] if cause.name == self._column_names[cause.column] else "",
                is_marked=abs(cause.attribution) >= beyond * cause.standard_error,
            )
            for cause in found
        ]

    def narrative(
        self,
        token: int | str | tuple[int, int] | None = None,
        *,
        level: str | None = None,
    ) -> str:
        """Describes the causes of a token, a span or the answer in plain sentences.

        Also how they were measured and how certain they are. Each sentence is built only from the
        numbers of the result.

        Args:
            token: Position or name of a token, or ``(start, stop)`` of a span. None: the whole
                answer.
            level: Level of the prompt, as for `at_level`. None: the coarsest.

        Raises:
            ValueError: If there is no such token, span or level.
        """
        start, stop = self.span_of(token)
        return " ".join(sentences(self, start, stop, level))

    def span_of(self, token: int | str | tuple[int, int] | None) -> tuple[int, int]:
        """The selected target tokens, as (start, stop).

        Raises:
            ValueError: If there is no such token or span.
        """
        if token is None:
            return 0, len(self.output_tokens)
        if isinstance(token, tuple):
            rows = self._rows(*token)
            return rows.start, rows.stop
        place = self.position(token)
        return place, place + 1

    def causes(
        self,
        token: int | str | tuple[int, int] | None = None,
        *,
        level: str | None = None,
    ) -> Blocks:
        """Causes in two blocks: parts of the prompt, and of the answer so far.

        Args:
            token: As for `narrative`.
            level: As for `narrative`.

        Returns:
            ``prompt`` and ``answer``, each by decreasing magnitude, with standard errors of the
            sums.

        Raises:
            ValueError: If there is no such token, span or level, or values do not add up.
        """
        start, stop = self.span_of(token)
        if stop - start > 1 and not adds_up(self):
            raise ValueError(
                "probabilities of tokens do not add up to that of a span: take the causes of "
                '`result.refit(attr_target="log_prob")`.'
            )
        return Reading(self, level).causes(start, stop, precise=True)

    def at_level(self, name: str) -> tuple[list[str], Tensor]:
        """Prompt attributions summed over the parts of a coarser level.

        For additive methods (Shapley values) this is the part's contribution.

        Args:
            name: A name in `levels`, such as ``"sentence"`` or ``"turn"``; the unit of the features
                themselves; or any other unit in which the features nest.

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result to one safetensors file: tensors unchanged, the rest as JSON.

        The interpretable input is not stored. `captum_llm_ext.result.files` documents the format.

        Raises:
            TypeError, ValueError: If JSON cannot hold `provenance`.
            OSError: If the file cannot be written; an existing one is unchanged.
        """
        write(path, self)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, unverified: bool = False
    ) -> "GenerationAttributionResult":
        """Reads a result written by `save`; its `inp` is None.

        Args:
            path: The file.
            unverified: Whether to read a file of an early version (format 1 or 2), which has no
                digest. Shapes, types and redundant numbers are checked; other damage, such as to a
                single value, a standard error or a name, is not detected.

        Raises:
            OSError: If there is no such file, or it cannot be read.
            ValueError: If the file is damaged, not a result, of a later format, or has no digest
                and `unverified` is false.

        Warns:
            UserWarning: If the file has no digest.
        """
        return read(path, cls, unverified=unverified)

    @property
    def summary(self) -> str:
        """One line on what was attributed and how."""
        features = len(self.output_features or ())
        return (
            f"GenerationAttributionResult({len(self.output_tokens)} target tokens × "
            f"({len(self.input_tokens)} prompt + {features} output features), "
            f"{self.provenance.get('method', 'attribution')}, {self.n_evaluations} evaluations)"
        )

    def __repr__(self) -> str:
        if not self.output_features or len(self.output_tokens) < 2:
            return self.summary
        # Only this explains to captum users why numbers differ from captum's.
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
        unit: str | None = None,
    ) -> str:
        """The strongest causes of every part of the answer, one line each.

        First come the settings and the causes of the whole answer, by the largest parts of the
        prompt. Each line has the causes in the prompt, then those in the answer so far.
        Attributions that are not significant (`marked`), or below a hundredth of the largest, are
        left out. Estimates of unknown error are marked ± ? and not coloured. ``print(result)`` uses
        the colours and width of the terminal; elsewhere, and in ``f"{result}"``, it is plain.

        Args:
            k: Maximum number of causes per line in each block.
            paint: Maps a text and its kind (``"token"``, ``"raises"``, ``"lowers"``, ``"nothing"``)
                to the displayed text, such as with terminal colours.
            width: Maximum width of a line: weaker causes that do not fit become " …". None:
                unlimited.
            unit: Unit of the lines: ``"token"``, ``"word"``, ``"sentence"``… None: words if tokens
                are fragments of them, otherwise tokens.

        Raises:
            ValueError: If `k` is below 1, or the answer has no such units.
        """
        return table(self, k, paint, width, unit)
