"""`RemoteGenerationAttribution`: captum's remote attribution, by what the provider reports."""

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from captum.attr import InterpretableInput, RemoteLLMAttribution, RemoteLLMProvider
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor

from captum_llm_ext.attribution.game import Game, Inspect, Run
from captum_llm_ext.attribution.generation import GenerationAttribution
from captum_llm_ext.attribution.remote.absence import asks_provider, condition_on_answer
from captum_llm_ext.attribution.remote.arguments import (
    RemoteTarget,
    check_method,
    check_provider,
    check_rung,
    check_settings,
)
from captum_llm_ext.attribution.remote.rung_choice import (
    PROMPT,
    TARGET,
    ChosenRung,
    RungChoice,
    RungName,
    RungSettings,
)
from captum_llm_ext.attribution.remote.unreported import not_told_apart, note_bounds, of_rung
from captum_llm_ext.attribution.sampling import Outcome
from captum_llm_ext.attribution.target import Skipped
from captum_llm_ext.base.warning import stacklevel_of_caller
from captum_llm_ext.contrast import Contrast, FoilContext, scored
from captum_llm_ext.methods import Smile
from captum_llm_ext.model import Generation, Processes, RowScorer, TokenRow
from captum_llm_ext.model.scoring.progress import Shown
from captum_llm_ext.remote.chat_endpoint import ChatEndpoint
from captum_llm_ext.remote.estimate import LENGTHS, Counter, CountingProposer, Estimate, n_new
from captum_llm_ext.remote.ladder import LadderScorer
from captum_llm_ext.remote.likelihood import RemoteLikelihood
from captum_llm_ext.remote.metered import Cache, as_limits
from captum_llm_ext.remote.proposals import PromptProposer
from captum_llm_ext.remote.providers import (
    OnMismatch,
    ProviderAdapter,
    TokenProvider,
    adapt_provider,
    describe_provider,
)
from captum_llm_ext.remote.scorer import RemoteScorer
from captum_llm_ext.remote.similarities import Similar
from captum_llm_ext.remote.transport import ApiError
from captum_llm_ext.result import GenerationAttributionResult
from captum_llm_ext.result.answer import AnswerAttribution
from captum_llm_ext.text.baselines import LanguageModel
from captum_llm_ext.text.inputs import Prompt
from captum_llm_ext.text.plain_tokenizer import OpenVocabulary, PlainTokenizer
from captum_llm_ext.text.segment import Unit

_SEVERAL = ("n", "num_return_sequences")


class RemoteGenerationAttribution(GenerationAttribution, RemoteLLMAttribution):
    """`GenerationAttribution` of a model behind an API, even one that returns nothing but text.

    Takes what captum's `RemoteLLMAttribution` takes, and any of its providers. Estimators, inputs,
    baselines, standard errors, checkpoints and results are those of `GenerationAttribution`;
    forward passes are replaced by requests::

        provider = CompletionsProvider("http://localhost:8000/v1")
        method = ShapleyValueSampling(RemoteLLMAttribution.placeholder_model)
        result = RemoteGenerationAttribution(method, tokenizer, provider).attribute(inp)

    *What the server reports decides what can be explained.* Log-probabilities of prompts:
    everything, as below. Top log-probabilities of each step (`ChatProvider`, `CallableProvider`,
    and any `CompletionsProvider` without a tokenizer): the log-probability of each token of the
    answer, one request per token, with a bound if it is not among the top. Text alone
    (`AnthropicProvider` too): how often the answer is given (``attr_target="frequency"``, in
    log-odds), or how similar the generated texts are to it (``"similarity"``). A bound is tight for
    a ``"prob"`` and loose for a log-probability; a warning says if causes are not distinguished. If
    answers never vary, there is no frequency, and one answer per coalition is compared. ``"auto"``
    takes the first of these that the provider supports. They need no tokenizer
    (``TextSegmentInput(prompt, None)``), treat a sampled answer as one target token, and list their
    blind spots in ``provenance["cannot_see"]``. Their results have a `value_interval` and, if the
    estimator is linear, a `token_attr_interval`; sampling errors are in `token_attr_se`.

    *By ids or by text.* A provider that takes token ids (`CompletionsProvider`, or any
    `TokenProvider`) is sent exactly the ids of each coalition and of the target. Captum's own
    interface takes texts, whose tokenisation is predicted with `tokenizer`. A row after which the
    target's text is not tokenised to the target is an error; a prompt that is tokenised differently
    from its rendered ids is sent, with a warning, and counted in ``provenance``.

    *What is verified.* Before the first number is used, a few short prompts check the
    log-probabilities (`handshake`): that they are not shifted by one, in base 10, at another
    temperature or of other prompts. The findings are in ``provenance["handshake"]``. Problems
    noticed later (truncated prompts, a change of model) raise warnings and are in
    ``provenance["doubts"]``.

    *What it costs.* With the generated text held fixed, which is the default here, a coalition
    takes one request. With generated features (`output_unit`), a target token whose own feature is
    absent is not in the prompt and needs a request of its own: one more per absent generated
    feature, half of them on average in sampled coalitions. It is saved if another coalition has the
    same prefix followed by that token (always in `FeatureAblation`, except for the empty coalition,
    and when all coalitions are enumerated), and if the provider reports the token among the
    likeliest. If more than `most_requests` are needed, a warning says so before any is sent.
    ``provenance["n_requests"]`` counts prompts sent; one call may hold several. Absent words can be
    drawn from the served model's own distribution (``baselines=ModelBaselines()``), if likeliest
    tokens are reported; the default is deletion, since the search takes requests of its own.

    Args:
        attr_method: As for `GenerationAttribution`, over captum's placeholder model:
            ``ShapleyValueSampling(RemoteLLMAttribution.placeholder_model)``.
        tokenizer: The model's tokenizer.
        provider: The API.
        attr_target: ``"log_prob"`` in nats, ``"prob"``, ``"label"`` (log-odds of one label against
            another as the answer's first token, in nats), ``"frequency"`` in log-odds,
            ``"similarity"`` from 0 to 1, or ``"auto"``. Or ``"contrast"`` against foils, for
            providers that take ids: a foil that is not among the reported likeliest tokens takes a
            request of its own. Foils are found (from the left context alone) if the provider
            reports likeliest tokens.
        accelerator: Not supported: one process sends requests from threads.
        max_concurrency: Number of threads. Default: the provider's own `max_concurrency`, or one
            for providers without, such as captum's.
        missing: Assumed value of a log-probability that the provider does not report, of a token or
            of a foil, in nats, such as -20.0. None: an error. It is a bound, no number: see
            `value_interval` and `token_attr_interval` of the result. ``provenance["n_missing"]``
            counts them; if more than a fifth is missing, an error is raised.
        on_mismatch: With texts, if the target's text is not tokenised to the target: ``"error"``,
            or ``"warn"`` for providers that join tokens, not texts.
        most_requests: Warn beforehand if more requests than this, and than coalitions, are needed.
        top_logprobs: Number of likeliest tokens requested at each step.
        n_answers: Answers sampled per coalition. Default: 50 for a frequency and 16 for a
            similarity, and up to four times as many until the strongest cause is separated from the
            next; a warning says if it is not.
        predicate: For a frequency: whether a text counts as the answer; by default equality.
        similarity: ``"lexical"`` (common words and character n-grams), ``"f1"`` (words),
            ``"difflib"`` (characters, in order), or a callable ``(text, answer) -> float`` from 0
            to 1, such as by embeddings or a judge.
        labels: For ``"label"``: the explained label, and the one it is compared with. Default (or
            None for either): `target` or what the model generates, and the likeliest other first
            token. With the model's `tokenizer`, first tokens that are not among the likeliest are
            exact as well, where the server reports given tokens as for ``rung="stepwise"``.
        rung: Instead of the highest that works: ``"forced"`` (log-probabilities of prompts),
            ``"stepwise"`` (of any given next token, by ``logprob_token_ids`` or ``logit_bias``;
            needs `tokenizer`),
            ``"top-k"``, ``"label"``, ``"frequency"``, ``"similarity"``.
        max_requests, max_usd: Limits below the first rung; beyond them a `RuntimeError` is raised,
            and the same call with higher limits resumes.
        prices: US dollars per million input and output tokens.
        cache: An SQLite file of answers, which several runs may share.

    Raises:
        TypeError: If the method is not a perturbation method, the provider not a provider, or an
            argument is not supported for APIs.
        ValueError: If `attr_target` is none of these, or a contrast that the provider cannot score.
    """

    def __init__(
        self,
        attr_method: PerturbationAttribution,
        tokenizer: Any,
        provider: RemoteLLMProvider | TokenProvider | ChatEndpoint,
        attr_target: RemoteTarget | Contrast = "log_prob",
        *,
        accelerator: None = None,
        max_concurrency: int | None = None,
        missing: float | None = None,
        on_mismatch: OnMismatch = "error",
        most_requests: int = 1000,
        top_logprobs: int = 20,
        n_answers: int | None = None,
        predicate: Callable[[str], bool] | None = None,
        similarity: Literal["lexical", "f1", "difflib"] | Similar = "lexical",
        labels: tuple[str | None, str | None] | None = None,
        rung: RungName | None = None,
        max_requests: int | None = None,
        max_usd: float | None = None,
        prices: Sequence[float] | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        check_method(attr_method, accelerator)
        check_settings(
            attr_target, max_concurrency, missing, on_mismatch, similarity, n_answers, top_logprobs
        )
        check_rung(rung, attr_target, predicate, labels)
        explained = Contrast() if attr_target == "contrast" else attr_target
        check_provider(provider, tokenizer, explained, max_concurrency, on_mismatch)
        RemoteLLMAttribution.__init__(
            self, attr_method, tokenizer, cast(RemoteLLMProvider, provider), "log_prob"
        )
        self.attr_target = cast(Any, explained)  # of which captum knows two
        self.include_per_token_attr = True
        self.device = torch.device("cpu")
        self._processes, self._shared = Processes(), None
        self._max_concurrency = max_concurrency
        self._on_mismatch: OnMismatch = on_mismatch
        self._missing, self._most_requests = missing, most_requests
        self._rung_settings = RungSettings(
            cache=Cache(cache),
            limits=as_limits(max_requests, max_usd, prices),
            top_logprobs=top_logprobs,
            n_answers=n_answers,
            predicate=predicate,
            similarity=similarity,
            labels=labels or (None, None),
            max_concurrency=max_concurrency,
        )
        self._rung: RungName | None = rung
        self._chosen: ChosenRung | None = None
        self._counter: Counter | None = None
        self._may_be_forced = True

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
        output_unit: Unit | None = None,
        **arguments: Any,
    ) -> GenerationAttributionResult:
        """Attributes the target, or what the model generates, to prompt and generated features.

        Args:
            inp: The prompt, as for `GenerationAttribution.attribute`; no images.
            target: The text to explain, as text or as token ids ``(n_target,)``: a tensor, an
                array, a list, or the output of a tokenizer or of ``generate`` for one text, of
                which the part after the prompt is taken. None: the model generates it.
            num_trials: Repetitions with fresh draws of baselines and coalitions, averaged.
            gen_args: Arguments of the provider's ``generate``; only without a target. Default:
                greedy, 25 new tokens. With ``do_sample``, a provider that takes ids is also given
                `seed`.
            use_cached_outputs, forward_in_tokens: Accepted for compatibility, without effect.
            _inspect_forward: As for `GenerationAttribution.attribute`.
            output_unit: Features made of the target: ``"token"``, ``"word"``, ``"sentence"``, spans
                or a segmenter. Default: none, since each costs requests, see above.
            **arguments: All other arguments of `GenerationAttribution.attribute`;
                ``perturbations_per_eval`` is the maximum number of prompts per call.

        Returns:
            The result, in float32 on the CPU. ``provenance`` names provider and model.

        Raises:
            ValueError: As for `GenerationAttribution.attribute`; if a log-probability is missing or
                belongs to another token; or if `output_unit` is given for a provider that takes
                texts.
            ConnectionError, RuntimeError: If the provider gives up. With `checkpoint` the same call
                resumes.
        """
        method = self.attr_method
        if isinstance(method, Smile) and self.attr_target != "similarity":
            return self._by_answers(method).attribute(
                inp, target, num_trials, gen_args, _inspect_forward=_inspect_forward, **arguments
            )
        feature_mask: Tensor | None = arguments.get("feature_mask")
        choice = self._choice
        chosen = choice.choose(
            inp, feature_mask, target, gen_args, lambda: self._cache(arguments.get("checkpoint"))
        )
        if chosen is not None:
            if output_unit is not None:
                raise ValueError(
                    "`output_unit` needs log-probabilities of prompts, and this provider returns "
                    f"less: {chosen.rung.name} holds the answer fixed. Leave it out."
                )
            rest = {k: v for k, v in arguments.items() if k != "checkpoint"}
            return self._attributed(
                chosen, (inp, target, num_trials, gen_args, True, _inspect_forward), rest
            )
        if self.attr_target == "auto":
            own = copy.copy(self)
            own.attr_target = cast(Any, "log_prob")
            return own.attribute(
                inp, target, num_trials, gen_args, output_unit=output_unit, **arguments
            )
        if output_unit is not None and not self._source().takes_ids:
            raise ValueError(
                "`output_unit` needs a provider that takes ids, such as `CompletionsProvider`: "
                f"{type(self.provider).__name__} takes texts. Leave it out to hold the generated "
                "text fixed."
            )
        try:
            return super().attribute(
                inp,
                target,
                num_trials,
                gen_args,
                use_cached_outputs,
                _inspect_forward,
                forward_in_tokens,
                output_unit=output_unit,
                **arguments,
            )
        except ApiError as error:
            hint = choice.instead(error, inp, feature_mask)
            error.args = (f"{error.args[0]}{hint}", *error.args[1:])
            raise

    def _attributed(
        self, chosen: ChosenRung, given: tuple[Any, ...], arguments: Mapping[str, Any]
    ) -> GenerationAttributionResult:
        """Attributes on a rung, with more answers while the first cause is not significant."""
        on, rung = self._on(chosen), chosen.rung
        while True:
            result = GenerationAttribution.attribute(on, *given, output_unit=None, **arguments)
            apart = result.provenance["first_cause"]
            if apart is None or apart["is_told_apart"]:
                return result
            if not rung.is_sampled or not rung.draw_more():
                break
            chosen.scorer.forget()  # the rung now has more answers for every coalition
        warnings.warn(not_told_apart(result, chosen), stacklevel=stacklevel_of_caller())
        return result

    def _cache(self, checkpoint: str | os.PathLike[str] | None) -> Cache:
        """Where answers are cached as they arrive: a checkpoint is such a file as well."""
        if checkpoint is None:
            return self._rung_settings.cache
        if self._rung_settings.cache.is_file:
            raise ValueError(
                "`checkpoint` and `cache` are both files of answers here: give one of them."
            )
        return Cache(checkpoint)

    def _by_answers(self, method: Smile) -> "RemoteGenerationAttribution":
        """A copy for `Smile`, whose distance defines the similarity of answers."""
        distance = method.distance_function(None, None)

        def nearness(text: str, answer: str) -> float:
            return -float(distance(answer, text))

        own = copy.copy(self)
        own.attr_target = cast(Any, "similarity")
        own._rung_settings = replace(self._rung_settings, similarity=nearness)
        return own

    def estimate(
        self,
        inp: InterpretableInput,
        target: str | None = None,
        gen_args: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Estimate:
        """Estimates the cost of `attribute` without sending anything.

        Args:
            inp, target, gen_args, **arguments: As for `attribute`. Without a target, an answer of
                the maximum length is assumed.

        Returns:
            Coalitions, requests and tokens, and the cost if `prices` were given. With ``"auto"``
            the rung is not known yet: the most expensive one is assumed, and ``rungs`` has all.

        Raises:
            ValueError, TypeError: As for `attribute` before any request.
        """
        tokenizer = getattr(inp, "tokenizer", None) or self.tokenizer
        n_most = n_new(gen_args, target)
        vocabulary = tokenizer if isinstance(tokenizer, PlainTokenizer) else None
        vocabulary = vocabulary or OpenVocabulary(tokenizer)
        counting = copy.copy(self)
        names = self._choice.names
        counter = Counter(by_ids=names == ["forced"] and self._source().takes_ids)
        counting.tokenizer, counting._counter = cast(Any, vocabulary), counter
        counting.attr_target = cast(Any, "frequency")
        counting._may_be_forced = "forced" in names
        ids = [vocabulary.token(target or "answer")]
        arguments = {k: v for k, v in arguments.items() if k not in ("checkpoint", "tol", "stop")}
        super(RemoteGenerationAttribution, counting).attribute(
            inp, torch.tensor(ids, dtype=torch.int64, device="cpu"), output_unit=None, **arguments
        )
        return self._choice.estimate(counter, tokenizer, target, n_most)

    def handshake(self, prompt: str = PROMPT, target: str = TARGET) -> dict[str, Any]:
        """Checks the provider's log-probabilities, of prompts or (without a tokenizer) of steps.

        This happens automatically before the first is used, once per provider, with the explained
        prompt.

        Args:
            prompt, target: Texts used for the checks.

        Returns:
            The checks and their outcomes, as in ``provenance["handshake"]``.

        Raises:
            ValueError: If a check fails; the message says which. (`HandshakeError`, which is also
                an `ApiError`.)
            ConnectionError, RuntimeError: If the provider gives up.
        """
        return self._choice.handshake(prompt, target)

    @property
    def _choice(self) -> RungChoice:
        """The rungs that the provider may offer; depends on `attr_target` and tokenizer."""
        return RungChoice(
            self.provider,
            self.tokenizer,
            self.attr_target,
            self._rung,
            self._source,
            self._rung_settings,
        )

    def _on(self, chosen: ChosenRung) -> "RemoteGenerationAttribution":
        """A copy that scores on a rung."""
        own = copy.copy(self)
        own._chosen, own.tokenizer = chosen, chosen.tokenizer
        own.attr_target = chosen.scorer.attr_target
        return own

    def _target_ids(
        self,
        run: Run,
        target: Any,
        gen_args: Mapping[str, Any] | None,
        generation: Generation | None,
        skip_tokens: Skipped | None,
    ) -> Tensor:
        if self._counter is not None:
            return cast(Tensor, target)
        chosen = self._chosen
        if chosen is None:
            return super()._target_ids(run, target, gen_args, generation, skip_tokens)
        if target is not None and not isinstance(target, str):
            raise TypeError(
                f"`target` is a {type(target).__name__}: this provider is sent text, so give one."
            )
        if target is not None and not target.strip():
            raise ValueError("the target is empty: give a text.")
        rung = chosen.rung
        texts = rung.target(chosen.full, target)
        if not any(text.strip() for text in texts):
            raise ValueError(
                "the model wrote nothing within `max_new_tokens` (reasoning counts as well): "
                "give more, or a `target`."
            )
        rung.begin(chosen.full, chosen.empty, texts)
        ids = [chosen.tokenizer.token(text) for text in texts]
        return torch.tensor(ids, dtype=torch.int64, device="cpu")

    def _answer(
        self, game: Game, outcome: Outcome, max_evaluations: int | None
    ) -> AnswerAttribution | None:
        # Other rungs pay several requests for a coalition, and know errors of features alone.
        if self._chosen is not None or not self._may_be_forced:
            return None
        found = super()._answer(game, outcome, max_evaluations)
        # Where log-probabilities are missing, sums over the answer are bounds, not numbers.
        scorer = game.run.scorer
        is_known = self._counter is not None or not cast(RemoteScorer, scorer).n_missing
        return found if is_known else None

    def _result(
        self,
        inp: InterpretableInput,
        game: Game,
        outcome: Outcome,
        joint: Tensor | None,
        generation: Generation | None,
        answer: AnswerAttribution | None,
    ) -> GenerationAttributionResult:
        if self._chosen is None:
            scorer = cast(RemoteScorer, game.run.scorer)
            doubts = self._warned(scorer.drift() if self._counter is None else [])
            result = super()._result(inp, game, outcome, joint, generation, answer)
            result.provenance["doubts"] = doubts
            if self._counter is None:
                note_bounds(result, scorer.bounds(len(outcome.plan.masks)), outcome, joint)
            return result
        chosen = self._chosen
        chosen.scorer.only_first(len(outcome.plan.masks))
        # Drift between the interval's bounds is the provider's noise.
        doubts = self._warned(chosen.scorer.drift(chosen.full))
        outcome, reported = of_rung(chosen, outcome, joint)
        result = super()._result(inp, game, outcome, joint, generation, answer)
        result.provenance.update(reported, doubts=doubts)
        return result

    @staticmethod
    def _warned(doubts: list[str]) -> list[str]:
        for doubt in doubts:
            warnings.warn(f"do not rely on this: {doubt}.", stacklevel=stacklevel_of_caller())
        return doubts

    def _source(self) -> ProviderAdapter:
        return adapt_provider(
            self.provider, self.tokenizer, self._max_concurrency, self._on_mismatch
        )

    def _scorer(self, max_rows: int | None, show_progress: Shown = False) -> RowScorer:
        if self._counter is not None:
            return self._counter
        if self._chosen is not None:
            self._chosen.scorer.shows(show_progress)
            return self._chosen.scorer
        return RemoteScorer(
            self._source(),
            self.tokenizer,
            attr_target=scored(self.attr_target),
            max_rows=max_rows,
            show_progress=show_progress,
            missing=self._missing,
            most_requests=self._most_requests,
        )

    def _proposer(self, scorer: RowScorer) -> RowScorer:
        return scorer

    def _condition_on_answer(self, run: Run, context: FoilContext) -> None:
        condition_on_answer(run, context, self.tokenizer, self._rung_settings.top_logprobs)

    _what_else_may_be_absent = (
        "Give `baselines=CorpusBaselines(texts)`, of the same kind of text, or `ModelBaselines()`, "
        "drawn from what the provider reports, for some requests per word."
    )

    def with_absence(self, prompt: Prompt) -> Prompt:
        """The prompt, by default with deletion: searching other texts takes paid requests."""
        return prompt

    def _language_model(self, scorer: RowScorer) -> LanguageModel:
        if isinstance(scorer, Counter):
            return RemoteLikelihood(scorer, self.tokenizer, CountingProposer(scorer))
        if self._chosen is not None:
            return RemoteLikelihood(self._chosen.scorer, self.tokenizer, self._chosen.proposer)
        served = cast(RemoteScorer, scorer)
        if served.takes_ids:
            most = self._rung_settings.top_logprobs
            proposer = PromptProposer(served, self.tokenizer, most)
        else:
            proposer = self._choice.step_proposer(served.search)
        return RemoteLikelihood(served, self.tokenizer, proposer)

    def _baselines_key(self, run: Run) -> str:
        # A draw would be searched before the checkpoint is open, and be paid for again on resuming.
        own = run.prompt.own_baseline
        return repr(own) if asks_provider(own) else super()._baselines_key(run)

    def generation(self, gen_args: Mapping[str, Any] | None) -> Generation:
        """See `GenerationAttribution.generation`; the provider's defaults are unknown."""
        given = dict(gen_args or {})
        several = next((n for n in _SEVERAL if (given.get(n) or 1) != 1), None)
        if several is not None:
            raise ValueError(
                f"`{several}` is {given[several]!r}, and one answer is explained at a time: leave "
                "it out, or give each answer as `target`."
            )
        if "generation_config" in given:
            raise ValueError(
                "`generation_config` cannot be sent to an API: give its fields as `gen_args`."
            )
        if not LENGTHS & set(given):
            given["max_new_tokens"] = 25
        if "temperature" not in given and not given.get("do_sample"):
            # Captum's None means the server's default, which samples.
            given |= {"do_sample": False, "temperature": 0.0}
        settings = {name: repr(value) for name, value in given.items()}
        return Generation(given, settings, given.get("max_new_tokens"))

    def _generated_ids(self, run: Run, generation: Generation) -> Tensor:
        given = dict(generation.arguments)
        if given.get("do_sample") and self._source().takes_ids:
            given.setdefault("seed", run.seed)
        return run.scorer.generate(TokenRow(run.full.ids, (), run.full.extras), given, run.seed)

    def _vocabulary_size(self) -> int | None:
        if self._chosen is not None or self._counter is not None:
            return None
        tokenizer: Any = self.tokenizer  # captum's protocol defines no length
        return len(tokenizer) if hasattr(tokenizer, "__len__") else None

    def _model_identity(self) -> dict[str, str]:
        about = describe_provider(self.provider)
        return {name: about[name] for name in ("provider", "model") if about[name] is not None}

    def _model_provenance(self) -> dict[str, Any]:
        unknown = dict.fromkeys(("revision", "model_class", "dtype", "device"))
        return describe_provider(self.provider) | unknown

    def _scoring_provenance(self, game: Game) -> dict[str, Any]:
        if self._counter is not None:
            return {"noise_floor": None}
        scorer = cast(RemoteScorer | LadderScorer, game.run.scorer)
        return {"noise_floor": None, **scorer.provenance()}

    def _numbers(self) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device="cpu")
