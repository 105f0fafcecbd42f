"""`RemoteGenerationAttribution`: the same attribution of a model that an API serves."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from captum.attr import InterpretableInput, RemoteLLMAttribution, RemoteLLMProvider
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor

from captum_llm_ext import tokens
from captum_llm_ext.attribution import GenerationAttribution
from captum_llm_ext.baselines import LanguageModel
from captum_llm_ext.game import Game, Inspect, Run
from captum_llm_ext.remote.handshake import handshake
from captum_llm_ext.remote.likelihood import RemoteLikelihood
from captum_llm_ext.remote.providers import (
    OnMismatch,
    Source,
    TokenProvider,
    described,
    source,
)
from captum_llm_ext.remote.scorer import RemoteScorer
from captum_llm_ext.result import GenerationAttributionResult
from captum_llm_ext.scoring import Generation, Processes, TokenRow, Values
from captum_llm_ext.segment import Unit

_PROMPT, _TARGET = "One, two, three, four, five, six,", " seven, eight"
_SEVERAL = ("n", "num_return_sequences")
_LENGTHS = {"max_new_tokens", "max_tokens", "max_completion_tokens", "max_length"}


class RemoteGenerationAttribution(GenerationAttribution, RemoteLLMAttribution):
    """`GenerationAttribution` of a model behind an API that tells log-probabilities.

    Takes what captum's `RemoteLLMAttribution` takes, and any of its providers. Estimators, inputs,
    baselines, error bars, checkpoints and results are those of `GenerationAttribution`; the model's
    forward passes are requests instead::

        provider = CompletionsProvider("http://localhost:8000/v1")
        method = ShapleyValueSampling(RemoteLLMAttribution.placeholder_model)
        result = RemoteGenerationAttribution(method, tokenizer, provider).attribute(inp)

    *By ids or by text.* A provider that takes token ids (`CompletionsProvider`, or any
    `TokenProvider`) is sent the very ids of each coalition and of the target. Captum's own
    interface takes texts: what they are tokenised to is foreseen with `tokenizer`. A row after
    which the target's text is not the target's tokens is an error; a prompt that is read as other
    tokens than it was rendered to is sent, with a warning, and counted in ``provenance``.

    *What is believed.* Before the first number is used, a few short prompts find out whether they
    are what they should be (`handshake`): no log-probabilities that are shifted by one, of base 10,
    of another temperature or of other prompts. What was found is in ``provenance["handshake"]``.

    *What it costs.* With the generated text held fixed, which is the default here, a coalition
    takes one request. With generated text among the causes (`output_unit`) the target token at a
    place where generated text is absent is asked for by itself, for it is not what is read there:
    one more request for each absent feature of the output, half of them on average in sampled
    coalitions. It is saved where another coalition begins alike and has that token (always so in
    `FeatureAblation`, but for the empty coalition, and where all coalitions are enumerated), and
    where the provider tells it among the likeliest. A warning tells the number before any of them
    is sent where it is above `most_requests`. ``provenance["n_requests"]`` counts prompts sent, of
    which a call may hold several.

    Args:
        attr_method: As of `GenerationAttribution`, over captum's placeholder:
            ``ShapleyValueSampling(RemoteLLMAttribution.placeholder_model)``.
        tokenizer: The model's tokenizer.
        provider: Whom to ask.
        attr_target: ``"log_prob"`` in nats, or ``"prob"``.
        accelerator: Not to be given: one process asks, in threads.
        max_concurrency: In how many threads the provider is asked. By default what it says itself,
            and one where it says nothing, as captum's do.
        missing: What a log-probability is taken for that the provider does not tell, in nats, such
            as -20.0. None: an error. ``provenance["n_missing"]`` counts them; where more than a
            fifth is missing, the result is refused.
        on_mismatch: With texts, where the target's text is not read as the target's tokens:
            ``"error"``, or ``"warn"`` for providers that join tokens, not texts.
        most_requests: A warning tells beforehand if more are to be sent at a time than this, and
            than coalitions.

    Raises:
        TypeError: If the method is no perturbation method, the provider none, or something is given
            that an API has no use for.
        ValueError: If `attr_target` is neither.
    """

    def __init__(
        self,
        attr_method: PerturbationAttribution,
        tokenizer: Any,
        provider: RemoteLLMProvider | TokenProvider,
        attr_target: Literal["log_prob", "prob"] = "log_prob",
        *,
        accelerator: None = None,
        max_concurrency: int | None = None,
        missing: float | None = None,
        on_mismatch: OnMismatch = "error",
        most_requests: int = 1000,
    ) -> None:
        if not isinstance(attr_method, PerturbationAttribution):
            raise TypeError(
                f"`attr_method` is a {type(attr_method).__name__}: give one of captum's "
                "perturbation methods, such as "
                "`ShapleyValueSampling(RemoteLLMAttribution.placeholder_model)`."
            )
        if accelerator is not None:
            raise TypeError(
                "`accelerator` has no use here: one process asks the API, in as many threads as "
                "`max_concurrency` says."
            )
        if attr_target not in ("log_prob", "prob"):
            raise ValueError(
                f"`attr_target` is {attr_target!r}: an API tells log-probabilities, so give "
                "'log_prob' or 'prob'. Logits, contrasts and callables need the model itself: "
                "`GenerationAttribution`."
            )
        if max_concurrency is not None and not (
            isinstance(max_concurrency, int) and max_concurrency > 0
        ):
            raise ValueError(f"`max_concurrency` is {max_concurrency!r}: give at least 1.")
        if missing is not None and not (isinstance(missing, int | float) and -9999 < missing <= 0):
            raise ValueError(f"`missing` is {missing!r}: give nats between -9999 and 0.")
        if on_mismatch not in ("error", "warn"):
            raise ValueError(f"`on_mismatch` is {on_mismatch!r}: give 'error' or 'warn'.")
        # This refuses what is no provider.
        if (
            source(provider, tokenizer, max_concurrency, on_mismatch).takes_ids
            and on_mismatch != "error"
        ):
            raise ValueError(
                f"`on_mismatch` would be ignored: {type(provider).__name__} takes ids, which are "
                "read as they are."
            )
        RemoteLLMAttribution.__init__(
            self, attr_method, tokenizer, cast(RemoteLLMProvider, provider), attr_target
        )
        self.include_per_token_attr = True
        self.device = torch.device("cpu")
        self._processes, self._shared = Processes(), None
        self._max_concurrency = max_concurrency
        self._on_mismatch: OnMismatch = on_mismatch
        self._missing, self._most_requests = missing, most_requests

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
        """Attributes the target, or what the model generates, to its causes.

        Args:
            inp: The prompt, as for `GenerationAttribution.attribute`; no images.
            target: The text to explain, as text or as token ids ``(n_target,)``: a tensor, an
                array, a list, or what a tokenizer or ``generate`` returned, of one text; then
                what comes after the prompt is meant. None: the model generates it.
            num_trials: Repetitions with fresh draws of baselines and coalitions, averaged.
            gen_args: Arguments of the provider's ``generate``, without a target only. Greedy, 25
                new tokens, where they do not say otherwise. With ``do_sample`` a provider that
                takes ids is given `seed` as well.
            use_cached_outputs, forward_in_tokens: Accepted for captum's sake, without effect.
            _inspect_forward: As for `GenerationAttribution.attribute`.
            output_unit: Features made of the target: ``"token"``, ``"word"``, ``"sentence"``, spans
                or a segmenter. By default none, for each costs requests: see above.
            **arguments: All others of `GenerationAttribution.attribute`;
                ``perturbations_per_eval`` is the most prompts in one call.

        Returns:
            The result, in float32 on the CPU. ``provenance`` names provider and model.

        Raises:
            ValueError: As `GenerationAttribution.attribute`; if a log-probability is missing or
                belongs to another token; or if `output_unit` is given for a provider that takes
                texts.
            ConnectionError, RuntimeError: If the provider gives up. With `checkpoint` the same call
                goes on from there.
        """
        if output_unit is not None and not self._source().takes_ids:
            raise ValueError(
                "`output_unit` needs a provider that takes ids, such as `CompletionsProvider`: "
                f"{type(self.provider).__name__} takes texts. Leave it out to hold the generated "
                "text fixed."
            )
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

    def handshake(self, prompt: str = _PROMPT, target: str = _TARGET) -> dict[str, Any]:
        """Finds out whether the provider's log-probabilities can be believed.

        It is done by itself before the first is used, once per provider, with the prompt that is
        explained.

        Args:
            prompt, target: Texts that the provider is asked about.

        Returns:
            What was looked at and how it came out, as in ``provenance["handshake"]``.

        Raises:
            ValueError: If they cannot be believed; it names what is wrong. (`HandshakeError`, an
                `ApiError` as well.)
            ConnectionError, RuntimeError: If the provider gives up.
        """
        ids = tokens.encode(self.tokenizer, prompt).ids
        after = tokens.encode_in_place(self.tokenizer, target, prompt[-tokens.CONTEXT :])
        found = handshake(self._source(), ids, after)
        return {} if found is None else found.to_dict()

    def _source(self) -> Source:
        return source(self.provider, self.tokenizer, self._max_concurrency, self._on_mismatch)

    def _scorer(self, max_rows: int | None, show_progress: bool = False) -> Values:
        return RemoteScorer(
            self._source(),
            self.tokenizer,
            attr_target=cast(Literal["log_prob", "prob"], self.attr_target),
            max_rows=max_rows,
            show_progress=show_progress,
            missing=self._missing,
            most_requests=self._most_requests,
        )

    def _language_model(self, scorer: Values) -> LanguageModel:
        return RemoteLikelihood(cast(RemoteScorer, scorer), self.tokenizer)

    def generation(self, gen_args: Mapping[str, Any] | None) -> Generation:
        """See `GenerationAttribution.generation`; the provider's own defaults are not known."""
        given = dict(gen_args or {})
        several = next((n for n in _SEVERAL if (given.get(n) or 1) != 1), None)
        if several is not None:
            raise ValueError(
                f"`{several}` is {given[several]!r}, and one answer is explained at a time: leave "
                "it out, or give each answer as `target`."
            )
        if "generation_config" in given:
            raise ValueError(
                "`generation_config` is nothing that an API takes: give its fields as `gen_args`."
            )
        if not _LENGTHS & set(given):
            given["max_new_tokens"] = 25
        if "temperature" not in given and not given.get("do_sample"):
            # Captum's None is the server's default, which samples.
            given |= {"do_sample": False, "temperature": 0.0}
        return Generation(given, {name: repr(value) for name, value in given.items()})

    def _generated_ids(self, run: Run, generation: Generation) -> Tensor:
        given = dict(generation.arguments)
        if given.get("do_sample") and self._source().takes_ids:
            given.setdefault("seed", run.seed)
        return run.scorer.generate(TokenRow(run.full.ids, (), run.full.extras), given, run.seed)

    def _vocabulary_size(self) -> int | None:
        tokenizer: Any = self.tokenizer  # captum's protocol knows no length
        return len(tokenizer) if hasattr(tokenizer, "__len__") else None

    def _model_identity(self) -> dict[str, str]:
        told = described(self.provider)
        return {name: told[name] for name in ("provider", "model") if told[name] is not None}

    def _model_provenance(self) -> dict[str, Any]:
        unknown = dict.fromkeys(("revision", "model_class", "dtype", "device"))
        return described(self.provider) | unknown

    def _arithmetic(self, game: Game) -> dict[str, Any]:
        scorer = cast(RemoteScorer, game.run.scorer)
        return {"noise_floor": None, **scorer.told()}

    def _numbers(self) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device="cpu")
