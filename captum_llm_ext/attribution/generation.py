"""`GenerationAttribution`: captum's LLM attribution for the prompt and the generated text."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Self, cast

import torch
from captum.attr import InterpretableInput, Lime, LLMAttribution
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.attribution.answers import AnswerAccess
from captum_llm_ext.attribution.coalition_game import CoalitionGame
from captum_llm_ext.attribution.game import Game, Inspect, Run
from captum_llm_ext.attribution.quotient import attribute_answer
from captum_llm_ext.attribution.sampling import Effort, Outcome
from captum_llm_ext.attribution.solving import solve
from captum_llm_ext.attribution.surrogate import Surrogate
from captum_llm_ext.attribution.target import (
    Skipped,
    announce_answer,
    as_ids,
)
from captum_llm_ext.attribution.what_if import WhatIf
from captum_llm_ext.base.arguments import at_least_one, check_counts, check_passed_on
from captum_llm_ext.base.digest import describe, digest
from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.coalitions.stopping import StoppingRule, as_rule
from captum_llm_ext.contrast import Contrast, as_value, scored
from captum_llm_ext.methods import Smile
from captum_llm_ext.methods.estimators import Budget, is_known
from captum_llm_ext.model import (
    Accelerator,
    AttrTarget,
    Generation,
    Journal,
    Processes,
    RowScorer,
    Scorer,
)
from captum_llm_ext.model.scoring.progress import Shown
from captum_llm_ext.result import Design, GenerationAttributionResult
from captum_llm_ext.result.answer import AnswerAttribution
from captum_llm_ext.result.assembled import assembled
from captum_llm_ext.text.baselines.model.baselines import ModelBaselines
from captum_llm_ext.text.baselines.naming import unseen
from captum_llm_ext.text.inputs import Prompt, as_prompt
from captum_llm_ext.text.segment import Unit


class GenerationAttribution(WhatIf, LLMAttribution):
    """Attributes every token of a generated text to the prompt and to the tokens before it.

    Takes what captum's `LLMAttribution` takes. Captum's `FeatureAblation`, `ShapleyValues`,
    `ShapleyValueSampling`, `KernelShap` and `Lime` name what is estimated; the coalitions are
    planned, scored in batches (one teacher-forced pass each, for all target tokens) and solved by
    this package. Any other perturbation method runs through its own ``attribute``. All methods give
    per-token attributions: `token_attr` is never None, unlike captum's for `KernelShap` and `Lime`.

    Args:
        attr_method: A captum `PerturbationAttribution` over the model.
        tokenizer: The model's tokenizer.
        attr_target: What is explained for a target token: its ``"log_prob"`` in nats, its
            ``"prob"``, its ``"logit"``, its ``"contrast"`` against other tokens that would fit (a
            `Contrast` says which), or a callable ``(logits (batch, n_target, vocabulary), target
            (n_target,)) -> (batch, n_target)``.
        accelerator: An `accelerate.Accelerator` (or its `PartialState`), in a script that was
            started with several processes, on one machine or many: they share the model's
            evaluations, and each returns the whole result. All must make the same calls with the
            same arguments. Each process may hold the whole model, or transformers may shard it
            (``distributed_config=``) over some or all of them. An error on one process is raised on
            all. The exception: processes that hold a model together and wait for one another within
            a forward pass. Such a process gets the error when the failed one ends (with NCCL: when
            ``torchrun`` ends it), and exits with a message and status 1 if the failed one continues
            (after 30 seconds) or is silent (60 seconds).
        surrogate: Replaces the model on most coalitions: ``"bf16"`` (a copy of it in that dtype),
            another model over the same vocabulary, or a scorer. The estimand stays the model's
            attribution: ``phi(surrogate) + phi(model - surrogate)``. The second term is estimated
            from fewer coalitions, whose number follows from the observed variances and the cost of
            each (bytes of weights; for a scorer without a model an eighth of the model's). Standard
            errors are those of the sum. `n_samples` is then the number of the surrogate's
            coalitions. From few coalitions the second term is shrunk towards equal parts, and the
            standard errors allow for what that leaves out: a poor surrogate increases them.
            `n_evaluations` of the result counts the model's rows, ``provenance["surrogate"]`` the
            surrogate's. Only for methods whose attributions are linear in the values; others raise
            an error.

    Thread safety: several threads may attribute on one model while others use it. Forward passes of
    attributions (also by gradients) on one model, or on models that share modules or weights, take
    turns; other threads' own forwards and generations are unaffected. A model in training mode is
    in evaluation mode during each pass, for all threads: do not train it meanwhile.

    Raises:
        TypeError: If the method is not a perturbation method, or its model not a causal language
            model.
        ValueError: If `attr_target` is unknown, or `surrogate` is the model itself.

    Warns:
        UserWarning: If the accelerator reports one process and the environment asks for more.
    """

    SUPPORTED_METHODS = (PerturbationAttribution,)
    SUPPORTED_INPUTS = (InterpretableInput,)
    surrogate: Surrogate | None = None

    def __init__(
        self,
        attr_method: PerturbationAttribution,
        tokenizer: Any,
        attr_target: AttrTarget | Contrast = "log_prob",
        *,
        accelerator: Accelerator | None = None,
        surrogate: str | nn.Module | RowScorer | None = None,
    ) -> None:
        if not isinstance(attr_method, PerturbationAttribution):
            raise TypeError(
                f"`attr_method` is a {type(attr_method).__name__}: give one of captum's "
                "perturbation methods over the model, such as `ShapleyValueSampling(model)`."
            )
        _compat.check_causal(attr_method.forward_func)
        explained = as_value(attr_target)
        super().__init__(attr_method, tokenizer)
        self.attr_target = explained
        self.include_per_token_attr = True
        self._access_model(accelerator)
        if surrogate is not None:
            self.surrogate = Surrogate(self.model, surrogate)
        is_shared = accelerator is not None or self._processes.are_several
        self._shared = self._processes if is_shared else None

    def on(self, processes: Processes) -> Self:
        """A copy for other processes that work together on one attribution."""
        other = super().on(processes)
        other._shared = processes if processes.are_several else None
        return other

    def identity(self) -> dict[str, Any]:
        """Like `ModelAccess.identity`, including the surrogate's if there is one."""
        own = super().identity()
        return own if self.surrogate is None else {**own, "surrogate": self.surrogate.identity()}

    def _method_settings(self) -> dict[str, Any]:
        method = self.attr_method
        settings = {
            name: type(value).__name__ if isinstance(value, nn.Module) else describe(value)
            for name, value in sorted(vars(method).items())
            if not name.startswith("_") and name != "forward_func"
        }
        if isinstance(method, Lime):  # kept where `vars` does not list it
            settings |= _compat.lime_settings(method) or {}
        return settings

    def attribute(  # captum's arguments in captum's order, then keyword-only ones
        self,
        inp: InterpretableInput,
        target: str | Tensor | Sequence[int] | None = None,
        num_trials: int = 1,
        gen_args: Mapping[str, Any] | None = None,
        use_cached_outputs: bool = True,
        _inspect_forward: Inspect | None = None,
        forward_in_tokens: bool = True,
        *,
        output_unit: Unit | None = "token",
        output_baselines: Any = None,
        seed: int = 0,
        tol: float | None = None,
        stop: StoppingRule | str | None = None,
        max_evaluations: int | None = None,
        n_samples: int | None = None,
        n_draws: int | None = None,
        max_exact_features: int = 12,
        perturbations_per_eval: int | None = None,
        feature_mask: Tensor | None = None,
        show_progress: Shown = False,
        skip_tokens: Skipped | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        whole_answer: bool = True,
        **kwargs: Any,
    ) -> GenerationAttributionResult:
        """Attributes the target, or what the model generates, to prompt and generated features.

        Args:
            inp: The prompt: `TextSegmentInput`, or captum's `TextTokenInput`, `TextTemplateInput`,
                `ImageMaskInput`.
            target: The text to explain, as text or as token ids ``(n_target,)``: a tensor, an
                array, a list, or the output of a tokenizer or of ``generate`` for one text, of
                which the part after the prompt is taken. None: the model generates it.
            num_trials: Repetitions with fresh draws of baselines and coalitions, averaged.
            gen_args: Arguments of the model's ``generate``, including ``generation_config``; only
                without a target. Default: greedy, 25 new tokens; everything else follows the
                model's own generation configuration, and ``provenance["generation"]`` records what
                was used. One answer is explained. Sampling is seeded by `seed`.
            use_cached_outputs, forward_in_tokens: Accepted for compatibility, without effect. They
                choose between captum's scoring paths; here there is one, whose numbers equal those
                of an uncached forward pass.
            _inspect_forward: Called with (prompt, target, [joint, *per token] probabilities or
                values) of every distinct row, after it is scored.
            output_unit: Features made of the target: ``"token"``, ``"word"``, ``"sentence"``…, each
                special token a feature; or spans or a segmenter over its text including special
                tokens, as in ``"<|channel|>final<|message|>golf"`` (concatenated `output_pieces` of
                the result). None holds the target fixed, as captum does.
            output_baselines: Replacements of absent generated features, as for `TextSegmentInput`;
                a list has one entry per feature of the target. Default: as the prompt's baseline
                defines, or deletion if it does not define any for generated text.
            seed: Seeds all random choices. The global random state is neither read nor changed.
            tol: Sample until the largest standard error, divided by the range of the attributions,
                is below this: ``stop=Precision(tol)``.
            stop: Stopping rule: ``"top3"`` samples until the three strongest causes of every target
                token are significantly separated from all others, ``"answer top3"`` those of the
                whole answer; `TopCauses`, `Precision` or a custom rule for more. Without
                `n_samples` and `n_draws`, sampling starts with the fewest evaluations that give
                standard errors and ends at the default budget at the latest. `settled` of the
                result says for which tokens the rule was met.
            max_evaluations: Upper limit with `tol` or `stop`. Default with `tol`: 64 rounds.
            n_samples: As in captum: evaluations for `KernelShap` and `Lime` (default 16 a feature),
                single orders for `ShapleyValueSampling` (default 25; an order and its reverse count
                as two).
            n_draws: Draws of a random baseline for methods that enumerate their coalitions.
                Default: up to 8, limited to about a thousand evaluations.
            max_exact_features: With more features `ShapleyValues` are estimated, with a warning. At
                most 16.
            perturbations_per_eval: Maximum number of rows per batch; by default as memory allows.
            feature_mask: As in captum: shape ``(1, n_features)``, equal numbers are one feature.
            show_progress: Whether to show a bar over the model's evaluations (as lines if stderr is
                not a terminal); or a `Listener`, which is called with the progress and with the
                answer as soon as it is generated.
            skip_tokens: Deprecated, from captum up to 0.8: tokens left out of the target.
            checkpoint: A file that ends in ``.safetensors``, or a folder for the files of several
                runs. Values are saved there about every second; the same call after a kill or
                Ctrl-C resumes from it, on any number of processes, with the same result. `tol`,
                `max_evaluations` and the number of processes may change; another
                `perturbations_per_eval` changes batches and thereby last digits.
            whole_answer: For methods that estimate Shapley values or leave features out: attribute
                the whole answer to the few largest parts of the prompt as well, if that takes at
                most an eighth more evaluations, or eight (`answer` of the result, which is shown
                first). False scores no rows for it.
            **kwargs: Passed to the ``attribute`` of methods that this package does not implement.
                For the others, only arguments that repeat the default
                (``return_input_shape=True``).

        Returns:
            The result; its tensors are on the model's device, in float32 (float64 for float64
            models).

        Raises:
            ValueError: If an argument is out of range or would have no effect, the target is empty
                or outside the vocabulary, a row exceeds the model's maximum length, or the model's
                values are not finite.
            TypeError: If an argument has the wrong type.
        """
        if isinstance(self.attr_method, Smile) and self.attr_target != "similarity":
            if output_unit not in (None, "token"):  # the default
                raise ValueError(
                    "`output_unit` would be ignored: `Smile` compares answers as wholes."
                )
            return _AnswerAttribution.of(self, self.generation(gen_args)).attribute(
                inp,
                target,
                num_trials=num_trials,
                _inspect_forward=_inspect_forward,
                output_unit=None,
                seed=seed,
                tol=tol,
                max_evaluations=max_evaluations,
                n_samples=n_samples,
                n_draws=n_draws,
                feature_mask=feature_mask,
                show_progress=show_progress,
                checkpoint=checkpoint,
                **kwargs,
            )
        with self._processes.session("`attribute`"):
            at_least_one("num_trials", num_trials)
            check_counts(
                max_evaluations=max_evaluations, perturbations_per_eval=perturbations_per_eval
            )
            rule = as_rule(stop, tol)
            if max_evaluations is not None and rule is None:
                raise ValueError(
                    "`max_evaluations` has no meaning without `tol` or `stop`: give one of them."
                )
            if is_known(self.attr_method):
                check_passed_on(kwargs, self.attr_method, GenerationAttribution.attribute)
            generation = None if target is not None else self.generation(gen_args)
            grows = stop is not None and n_samples is None and n_draws is None
            budget = Budget(n_samples, n_draws, max_exact_features, grows)
            effort = Effort(budget, num_trials, rule, max_evaluations)
            scorer = self._scorer(perturbations_per_eval, show_progress)
            prompt = as_prompt(inp, self.tokenizer, feature_mask)
            callback = _inspect_forward if self._processes.is_main else None
            run = self._run(prompt, scorer, seed, callback)
            if self.surrogate is not None:
                run.surrogate = self.surrogate.scorer(
                    scored(self.attr_target), perturbations_per_eval, show_progress, self._shared
                )
                run.work_of_model = self.surrogate.work_of_model
            _warn_of_absence(
                inp, run.prompt, output_unit, output_baselines, self._what_else_may_be_absent
            )
            open_journal = None
            if checkpoint is not None:
                key = self._checkpoint_key(run, effort, output_unit, target, generation)
                open_journal = partial(Journal, checkpoint, key)
            with scorer.keeping(open_journal), _keeping(run.surrogate, open_journal):
                ids = self._target_ids(run, target, gen_args, generation, skip_tokens)
                if generation is not None and self._processes.is_main:
                    announce_answer(show_progress, self, run.full, ids, generation)
                game = self._game(run, ids, output_unit, output_baselines)
                with scorer.progress():
                    outcome = solve(game, effort, kwargs)
                    joint = outcome.whole
                    if self.attr_target == "prob":
                        joint = solve(game.joint(), effort, kwargs).solution.attributions[0]
                    answer = None
                    if whole_answer:
                        answer = self._answer(game, outcome, max_evaluations)
            return self._result(inp, game, outcome, joint, generation, answer)

    def _answer(
        self, game: Game, outcome: Outcome, max_evaluations: int | None
    ) -> AnswerAttribution | None:
        """The whole answer's attributions to the largest parts of the prompt."""
        run = game.run
        cost = float(run.scorer.n_evaluations)
        if run.surrogate is not None:
            cost += run.surrogate.n_evaluations / run.work_of_model
        return attribute_answer(game, outcome.name, cost, max_evaluations)

    def to_game(
        self,
        inp: InterpretableInput,
        target: str | Tensor | Sequence[int] | None = None,
        *,
        token: int | tuple[int, int] | None = None,
        gen_args: Mapping[str, Any] | None = None,
        output_unit: Unit | None = "token",
        output_baselines: Any = None,
        n_draws: int = 8,
        normalize: bool = True,
        seed: int = 0,
        perturbations_per_eval: int | None = None,
        feature_mask: Tensor | None = None,
    ) -> CoalitionGame:
        """The cooperative game of an attribution, for packages such as shapiq.

        ``shapiq.KernelSHAPIQ(game.n_players, max_order=2).approximate(500, game)`` finds
        interactions; `attr_method` does not matter here.

        Args:
            inp: The prompt, as for `attribute`.
            target: The text to explain; None: the model generates it.
            token: One target token, or a span ``(start, stop)``. None: the whole target, whose
                players are the prompt's features alone.
            gen_args, output_unit, output_baselines, seed, feature_mask: As for `attribute`.
            n_draws: Draws of random baselines averaged in the value of every coalition.
            normalize: Whether the empty coalition's value is subtracted.
            perturbations_per_eval: Maximum number of rows per batch.

        Returns:
            A callable from booleans ``(n_coalitions, n_players)`` to values ``(n_coalitions,)``.

        Raises:
            ValueError: If `token` is out of range, or as for `attribute`.
        """
        at_least_one("n_draws", n_draws)
        check_counts(perturbations_per_eval=perturbations_per_eval)
        prompt = as_prompt(inp, self.tokenizer, feature_mask)
        run = self._run(prompt, self._scorer(perturbations_per_eval), seed)
        generation = None if target is not None else self.generation(gen_args)
        ids = self._target_ids(run, target, gen_args, generation, None)
        game = self._game(run, ids, output_unit, output_baselines)
        start, stop = _span(token, len(ids))
        return CoalitionGame(game, start, stop, n_draws=n_draws, normalize=normalize)

    _what_else_may_be_absent = (
        "Leave `baselines` out of a `TextSegmentInput`, and what is absent is what the model "
        "itself would have written (`ModelBaselines`), or give `CorpusBaselines(texts)`."
    )

    def with_absence(self, prompt: Prompt) -> Prompt:
        """The prompt, with `ModelBaselines` if the user gave no baselines."""
        return prompt.with_default(ModelBaselines())

    def _game(self, run: Run, ids: Tensor, output_unit: Unit | None, output_baselines: Any) -> Game:
        generated = self._generated(run, ids, output_unit, output_baselines)
        return Game(run, generated, self._foils(run))

    def _checkpoint_key(
        self,
        run: Run,
        effort: Effort,
        output_unit: Unit | None,
        target: str | Tensor | Sequence[int] | None,
        generation: Generation | None,
    ) -> dict[str, Any]:
        """What a run's values depend on, to recognise checkpoints of a different run."""
        if generation is not None:
            wanted = dict(generation.settings)
        else:
            wanted = digest(as_ids(target, self.tokenizer).tolist())
        settings = {"n_samples": effort.budget.n_samples, "n_draws": effort.budget.n_draws}
        return {
            **self.identity(),
            "prompt": digest([run.full.ids, run.prompt.columns, run.full.extras]),
            "baselines": self._baselines_key(run),
            "target": wanted,
            "seed": run.seed,
            "num_trials": effort.num_trials,
            "max_exact_features": effort.budget.max_exact_features,
            "output_unit": describe(output_unit),
            **settings,
            # Older checkpoints have no such entry.
            **({"grows": True} if effort.budget.grows else {}),
        }

    def _baselines_key(self, run: Run) -> str:
        """Distinguishes the baselines of a run: a digest of one draw."""
        nothing = torch.zeros(1, run.prompt.n_features, dtype=torch.bool, device="cpu")
        absent = run.prompt.render(nothing, torch.Generator().manual_seed(0))[0]
        return digest(absent.ids)

    def _result(
        self,
        inp: InterpretableInput,
        game: Game,
        outcome: Outcome,
        joint: Tensor | None,
        generation: Generation | None,
        answer: AnswerAttribution | None,
    ) -> GenerationAttributionResult:
        return assembled(
            inp,
            game.run.prompt,
            game.generated,
            outcome.solution,
            joint,
            masks=game.masks_of_all_features(outcome.plan),
            values=outcome.values,
            foils=game.foils,
            foil_values=game.foil_values,
            draws=outcome.plan.draws,
            n_evaluations=game.run.scorer.n_evaluations,
            like=self._numbers(),
            provenance=self._game_provenance(game, outcome, generation)
            | self._scoring_provenance(game),
            design=_design(game, outcome),
            answer=answer,
            drawn_texts=outcome.drawn,
        )

    def _game_provenance(
        self, game: Game, outcome: Outcome, generation: Generation | None
    ) -> dict[str, Any]:
        run = game.run
        return {
            **self._provenance(run, game.generated, generation),
            "estimator": outcome.name,
            "estimate": outcome.estimate,
            **outcome.stopping,
            "surrogate": self._about_surrogate(game, outcome),
            "contrast": game.foils and game.foils.about,
            "rule": getattr(self.attr_method, "rule", None),
            "n_coalitions": len(outcome.plan.masks),
            "n_evaluations": run.scorer.n_evaluations,
            "deterministic_baselines": game.deterministic,
            "absence": run.context.absence(game.generated),
            "matches": run.context.matches(game.generated),
            "rows_by_process": run.scorer.n_scored if self._shared else None,
        }

    def _about_surrogate(self, game: Game, outcome: Outcome) -> dict[str, Any] | None:
        if self.surrogate is None or game.run.surrogate is None:
            return None
        return {
            "name": self.surrogate.name,
            **self.surrogate.identity(),
            **(outcome.about_surrogate or {}),
            "n_evaluations": game.run.surrogate.n_evaluations,
        }

    def _scoring_provenance(self, game: Game) -> dict[str, Any]:
        """Noise floor and batching, for provenance."""
        scorer = game.run.scorer
        floor = scorer.noise_floor(game.full_row, game.target, game.foil_ids)
        about = cast(Scorer, scorer).provenance()
        return {"noise_floor": None if floor is None else floor.tolist(), **about}


class _AnswerAttribution(AnswerAccess, GenerationAttribution):
    """`GenerationAttribution` with `Smile`: the answer is one target token."""


def _warn_of_absence(
    inp: InterpretableInput,
    prompt: Prompt,
    output_unit: Unit | None,
    output_baselines: Any,
    instead: str,
) -> None:
    """Warns if absence makes texts unlike any that the model was trained on."""
    if output_unit is None and not isinstance(inp, Prompt):  # as captum computes it
        return
    absent = [prompt.own_baseline]
    if output_unit is not None:
        absent.append(prompt.output_baseline if output_baselines is None else output_baselines)
    message = unseen(absent, "attributions are made from", "attributions")
    if message is not None:
        warn_user(
            f"{message}, and of a natural prompt they attribute to the words before the answer. "
            f"{instead}",
        )


def _design(game: Game, outcome: Outcome) -> Design:
    return Design(
        planned=outcome.name,
        solved=outcome.name,
        options=outcome.options,
        n_features=game.n_features,
        n_anchors=outcome.plan.n_anchors,
        n_visible=game.scope.n_visible.tolist(),
        required=game.scope.required.tolist(),
        columns=list(game.run.prompt.columns),
        deterministic=game.deterministic,
        correction=outcome.correction,
        unchanging=list(game.solved_scope.unchanging),
    )


def _keeping(
    surrogate: RowScorer | None, open_journal: "partial[Journal] | None"
) -> AbstractContextManager[None]:
    """Saves a surrogate's values in a journal beside the model's."""
    if surrogate is None:
        return nullcontext()
    if open_journal is None:
        return surrogate.keeping(None)
    return surrogate.keeping(partial(Journal.of_surrogate, *open_journal.args))


def _span(token: int | tuple[int, int] | None, n_target: int) -> tuple[int, int]:
    if token is None:
        return 0, n_target
    start, stop = (token, token + 1 or n_target) if isinstance(token, int) else token
    chosen = range(n_target)[start:stop]
    if not chosen or (isinstance(token, int) and not -n_target <= token < n_target):
        raise ValueError(
            f"`token` is {token!r}: give the position of one of {n_target} target tokens, or a "
            "span (start, stop)."
        )
    return chosen.start, chosen.stop
