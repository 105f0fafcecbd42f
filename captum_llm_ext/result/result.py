"""What an attribution found: numbers, names and where they came from."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from captum_llm_ext.base import terminal
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
            the attribution of its joint probability with the output held fixed. Where it is held
            fixed, a lasso (`Lime`) and subclasses of your own (of `LimeBase`) fit the summed
            values, as in captum: from a sum a lasso takes less than from each of its parts.
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

    def total(
        self,
        floor: float | None = None,
        *,
        level: str | None = None,
        n_resamples: int = 10,
        seed: int = 0,
    ) -> TotalAttribution:
        """What led to each token in the end: the prompt's shares, through all written before.

        No model is called. Chains of causes are followed back to where they begin (CAGE, arXiv
        2512.15663): see `TotalAttribution`.

        Args:
            floor: Tokens whose attributions sum to less, in the unit of the value, nothing in
                particular led to. By default 0.1 nats; of values in other units a fiftieth of the
                largest sum.
            level: What the prompt's parts are: as of `at_level`; None: its features.
            n_resamples: Groups of coalitions that are left out in turn, for standard errors; 0:
                none are told.
            seed: Seeds the groups.

        Raises:
            ValueError: If an argument is out of range, there is no such level, or words of several
                tokens are explained by their probability, which does not add up.
        """
        evidence = None if self.design is None else self._evidence
        source = Source(self._features, evidence, self._split, self._moved)
        return total(self, source, floor, level, n_resamples, seed)

    def route(self, token: int | str, k: int = 3) -> list[Route]:
        """The strongest chains of causes that lead to a token, from the prompt on.

        Args:
            token: Its position in the target, or its name in `output_tokens`.
            k: How many at most.

        Returns:
            By falling share of all that led to the token: see `TotalAttribution.route`.

        Raises:
            ValueError: If there is no such token, or several of that name.
        """
        t = self.position(token)
        return self.total(n_resamples=0).route(t, k)

    @property
    def additivity(self) -> Tensor:
        """How much of the values' variation attributions that add up explain, shape ``(T,)``.

        R², 1 where features do not interact: low, and single numbers per feature tell little. NaN
        where the coalitions do not tell, such as those of leave-one-out.
        """
        if self.design is None:
            return torch.full_like(self.full_values, torch.nan)
        return self._evidence().additivity().to(self.full_values)

    def _solved(
        self, evidence: Evidence, method: Method | None, attr_target: str
    ) -> "GenerationAttributionResult":
        """The result of solving the evidence; everything else is as it is here."""
        solution = evidence.solve()
        token_attr, output_attr = self._split(solution.attributions)
        token_attr_se, output_attr_se = self._split(solution.standard_errors)
        full, empty = solution.full_values, solution.empty_values
        joint, is_joint = token_attr.sum(0), attr_target == "prob"
        if is_joint or not evidence.design.is_additive:
            fixed = evidence.whole(is_joint=is_joint)
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
            "provenance": self.provenance
            | {"method": name, "estimator": evidence.design.solved, "attr_target": attr_target}
            | {"estimate": evidence.is_estimate, "converged": None}
            # In another unit rounding is another.
            | ({} if attr_target == self.provenance["attr_target"] else {"noise_floor": None})
            | {"refitted_from": [self.provenance["method"], self.provenance["attr_target"]]},
        }
        same: dict[str, Any] = {name: getattr(self, name) for name in _SAME}
        return GenerationAttributionResult(**same | other)

    def why(self, token: int | str, k: int = 5) -> list[Cause]:
        """What made the model write one token.

        Args:
            token: Its position in the target, or its name in `output_tokens`.
            k: How many causes at most in each block.

        Returns:
            The strongest causes in the prompt, then those in the output before the token, each by
            falling magnitude; zeros are no causes.

        Raises:
            ValueError: If there is no such token, there are several of that name, or `k` is below
                1.
        """
        t = self.position(token)
        return self._causes(self.full_attr[t], self.full_attr_se[t], k)

    def top(self, k: int = 3) -> list[list[Cause]]:
        """The strongest causes of every target token, as `why` gives them.

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
        """What led to a token, a span or the answer, how it was measured and how sure it is.

        In plain sentences, each built from the numbers of the result and from nothing else.

        Args:
            token: Its position or its name; ``(start, stop)`` of a span. None: the whole answer.
            level: By which parts of the prompt: as for `at_level`. None: the largest there are.

        Raises:
            ValueError: If there is no such token, span or level.
        """
        start, stop = self.span_of(token)
        return " ".join(sentences(self, start, stop, level))

    def span_of(self, token: int | str | tuple[int, int] | None) -> tuple[int, int]:
        """The target tokens that are meant, from the first to the one after the last.

        Raises:
            ValueError: If there are none.
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
            ``prompt`` and ``answer``, each by falling magnitude, with errors of the sums.

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result to one safetensors file: tensors as they are, the rest as JSON.

        The interpretable input is not a part of it. `captum_llm_ext.result.files` tells the layout.

        Raises:
            TypeError, ValueError: If `provenance` holds what JSON cannot.
            OSError: If the file cannot be written; one that was there is left as it was.
        """
        write(path, self)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, unverified: bool = False
    ) -> "GenerationAttributionResult":
        """Reads a result that `save` wrote; `inp` is None.

        Args:
            path: The file.
            unverified: Whether a file of an early version (format 1 or 2) is read, which has no
                digest. Shapes, types and what is written twice are checked then; damage that leaves
                them alone, such as to one value, a standard error or a name, cannot be told.

        Raises:
            OSError: If there is no such file, or it cannot be read.
            ValueError: If the file is damaged, no result, of a later format, or of one without a
                digest and `unverified` is false.

        Warns:
            UserWarning: If the file has no digest.
        """
        return read(path, cls, unverified=unverified)

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
        unit: str | None = None,
    ) -> str:
        """The strongest causes of every part of the answer, a line each.

        First what was measured and, by the largest parts of the prompt, where the whole answer
        comes from. In each line the causes in the prompt stand before those in the answer so far.
        What is not told from noise (`marked`), or lies below a hundredth of the largest
        attribution, is left out. Estimates of unknown error are marked ± ?, and painted as nothing
        certain. ``print(result)`` shows it in the colours and the width of the terminal;
        elsewhere, and in ``f"{result}"``, it is plain.

        Args:
            k: Causes per line in each block, at most.
            paint: From a text and its kind (``"token"``, ``"raises"``, ``"lowers"``,
                ``"nothing"``) to what is shown, such as the text in a terminal's colours.
            width: Columns that a line may take: weaker causes that do not fit give way to " …".
                None: as many as needed.
            unit: What has a line: ``"token"``, ``"word"``, ``"sentence"``… None: words where
                tokens are fragments of them, otherwise tokens.

        Raises:
            ValueError: If `k` is below 1, or the answer cannot be read by such units.
        """
        return table(self, k, paint, width, unit)
