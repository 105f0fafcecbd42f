"""`ModelAccess`: what every attribution class needs of its model, independent of the method."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self, cast

from captum.attr import InterpretableInput
from torch import Tensor

from captum_llm_ext import _compat
from captum_llm_ext.attribution.game import Inspect, Run
from captum_llm_ext.attribution.target import Skipped, check_stored, generate_target, target_ids
from captum_llm_ext.base.digest import describe
from captum_llm_ext.contrast import AnswerKinds, Contrast, FoilContext, Foils, foils_of, scored
from captum_llm_ext.model import (
    Accelerator,
    Generation,
    Processes,
    RowScorer,
    Scorer,
    model_identity,
    planned_generation,
)
from captum_llm_ext.model.likelihood import Likelihood
from captum_llm_ext.model.scoring.progress import Shown
from captum_llm_ext.result.assembled import numbers_of
from captum_llm_ext.result.provenance import model_provenance, run_provenance, target_provenance
from captum_llm_ext.text.baselines import LanguageModel
from captum_llm_ext.text.inputs import GeneratedText, Prompt, as_prompt
from captum_llm_ext.text.segment import Unit

_TRIED = "candidates for absent words"


class ModelAccess:
    """Generates and scores with a local model.

    The attribution classes have captum's constructors, which differ; each calls `_access_model`
    after captum's has set `attr_method`, `model` and `tokenizer`. Subclasses override methods for a
    model behind an API, or for values that are not per token.
    """

    attr_method: Any
    model: Any
    tokenizer: Any
    attr_target: Any
    device: Any
    _processes: Processes
    # None: a single process scores, with batches of any size.
    _shared: Processes | None = None

    def _access_model(self, accelerator: Accelerator | None = None) -> None:
        self.device = _compat.input_device(self.model)
        self._processes = Processes.of(accelerator, self.model)

    @property
    def shared(self) -> Processes | None:
        """The processes that share batches; None if a single process scores."""
        return self._shared

    @property
    def processes(self) -> Processes:
        """The processes that work together on one attribution."""
        return self._processes

    def on(self, processes: Processes) -> Self:
        """A copy for other processes that work together on one attribution."""
        other = copy.copy(self)
        other._processes = processes
        return other

    def identity(self) -> dict[str, Any]:
        """What results depend on besides the arguments of `attribute`, as JSON values.

        If several processes hold the model together, all of them must call this.
        """
        return {
            **self._model_identity(),
            "method": type(self.attr_method).__name__,
            "method_settings": self._method_settings(),
            "attr_target": describe(self.attr_target),
        }

    def generation(self, gen_args: Mapping[str, Any] | None) -> Generation:
        """How a target is generated if none is given.

        Raises:
            ValueError, TypeError: If the model cannot generate, or an argument is invalid.
        """
        return planned_generation(self.model, self.tokenizer, gen_args)

    def check_stored(
        self,
        inp: InterpretableInput,
        target: Tensor,
        values: Tensor,
        foils: Tensor | None = None,
    ) -> None:
        """Compares a stored result's values of the whole text with those of the model now.

        Args:
            inp: The prompt, as for `attribute`.
            target: The target ids of the result, ``(n_target,)``.
            values: The `full_values` of the result, ``(n_target,)``.
            foils: The `foils` of the result.

        Raises:
            ValueError: If they differ by more than rounding, so the result is of another model.
        """
        with self._processes.session("`check_stored`"):
            run = self._run(as_prompt(inp, self.tokenizer, None), self._scorer(None), 0)
            generated = run.context.generated(target.cpu(), None, None)
            check_stored(run.scorer, run.full, generated, values, foils)

    def with_absence(self, prompt: Prompt) -> Prompt:
        """The prompt, with the class's default baselines if the user gave none."""
        return prompt

    def _method_settings(self) -> dict[str, Any]:
        """Settings of `attr_method` that results depend on, as JSON values."""
        raise NotImplementedError

    def _run(
        self, prompt: Prompt, scorer: RowScorer, seed: int, callback: Inspect | None = None
    ) -> Run:
        prompt = self.with_absence(prompt)
        model = self._language_model(scorer)
        return Run(self.attr_method, self.tokenizer, prompt, scorer, model, seed, callback)

    def _target_ids(
        self,
        run: Run,
        target: str | Tensor | Sequence[int] | None,
        gen_args: Mapping[str, Any] | None,
        generation: Generation | None,
        skip_tokens: Skipped | None,
    ) -> Tensor:
        """Token ids to explain, int64 ``(n_target,)``: given or generated."""
        return target_ids(
            target,
            self.tokenizer,
            gen_args,
            partial(self._generated_ids, run, cast(Generation, generation)),
            run.full,
            run.scorer,
            self._vocabulary_size(),
            skip_tokens,
        )

    def _generated(
        self, run: Run, ids: Tensor, output_unit: Unit | None, output_baselines: Any
    ) -> GeneratedText:
        """The target as features; baselines that condition on the answer are given it."""
        generated = run.context.generated(ids, output_unit, output_baselines)
        run.foil_context = FoilContext(run.prompt, run.full, generated, self.tokenizer, run.seed)
        self._condition_on_answer(run, run.foil_context)
        return generated

    def _foils(self, run: Run) -> Foils | None:
        """The foils of a contrast; None for other kinds of values."""
        if not isinstance(self.attr_target, Contrast):
            return None
        return foils_of(
            self.attr_target,
            run.foil_context.after(run.prompt),
            self._proposer(run.scorer),
            self._vocabulary_size(),
        )

    def _provenance(
        self, run: Run, generated: GeneratedText, generation: Generation | None
    ) -> dict[str, Any]:
        """Provenance common to results of all classes."""
        return {
            "method": type(self.attr_method).__name__,
            **target_provenance(self.attr_target, generation and generation.settings),
            "unit": run.prompt.unit_name,
            "output_unit": generated.unit_name,
            "seed": run.seed,
            **self._model_provenance(),
            **run_provenance(),
        }

    # Below: what calls the model itself.

    def _scorer(self, max_rows: int | None, show_progress: Shown = False) -> RowScorer:
        return Scorer(
            self.model,
            attr_target=scored(self.attr_target),
            max_rows=max_rows,
            show_progress=show_progress,
            processes=self._shared,
        )

    def _proposer(self, scorer: RowScorer) -> RowScorer:
        """A scorer for finding foils, whose rows do not count as coalitions."""
        del scorer
        return Scorer(self.model, processes=self._shared)

    def _condition_on_answer(self, run: Run, context: FoilContext) -> None:
        """Lets replacements be drawn conditionally on the kinds of words in the answer."""
        # Searching candidates can take as long as leave-one-out, so its progress is shown.
        answer_scorer = (
            run.scorer.auxiliary(_TRIED) if isinstance(run.scorer, Scorer) else Scorer(self.model)
        )
        answer_scorer.expect(run.full.ids)
        run.context.condition_on_answer(AnswerKinds(context, answer_scorer), context.target_text)

    def _language_model(self, scorer: RowScorer) -> LanguageModel:
        """The model as baselines use it."""
        del scorer
        return Likelihood(self.model, self.tokenizer)

    def _generated_ids(self, run: Run, generation: Generation) -> Tensor:
        return generate_target(cast(Scorer, run.scorer), run.full, generation, run.seed)

    def _vocabulary_size(self) -> int | None:
        return _compat.vocabulary_size(self.model)

    def _model_identity(self) -> dict[str, str]:
        return model_identity(self.model)

    def _model_provenance(self) -> dict[str, Any]:
        return model_provenance(self.model, self.device)

    def _numbers(self) -> Tensor:
        """An empty tensor with the dtype and device of results."""
        return numbers_of(self.model, self.device)
