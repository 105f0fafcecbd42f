"""Which rung of the ladder an attribution stands on: how much of a model its provider tells."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from captum.attr import InterpretableInput
from torch import Tensor

from captum_llm_ext.contrast import Contrast
from captum_llm_ext.remote.chat_providers import speaker
from captum_llm_ext.remote.handshake import handshake
from captum_llm_ext.remote.ladder import LadderScorer
from captum_llm_ext.remote.metered import Asker, Cache, Limits
from captum_llm_ext.remote.providers import ProviderAdapter, TokenProvider
from captum_llm_ext.remote.rung_choice import (
    CHARACTERS_PER_TOKEN,
    Climbed,
    Counter,
    Estimate,
    n_new,
    rendered,
)
from captum_llm_ext.remote.rungs import (
    Frequency,
    Rung,
    Similar,
    Similarity,
    TopK,
    lexical,
    token_f1,
)
from captum_llm_ext.remote.transport import ApiError
from captum_llm_ext.text import tokens
from captum_llm_ext.text.inputs import Prompt, as_prompt
from captum_llm_ext.text.plain_tokenizer import OpenVocabulary, PlainTokenizer

PROMPT, TARGET = "One, two, three, four, five, six,", " seven, eight"
SIMILAR: Mapping[str, Similar] = {"lexical": lexical, "f1": token_f1}
_N_ANSWERS = {"frequency": 50, "similarity": 16}


@dataclass(frozen=True, kw_only=True)
class RungSettings:
    """How a provider is asked below the first rung: see `RemoteGenerationAttribution`."""

    cache: Cache
    limits: Limits
    top_logprobs: int
    n_answers: int | None
    predicate: Callable[[str], bool] | None
    similarity: str | Similar
    max_concurrency: int | None


@dataclass(frozen=True)
class Rungs:
    """What one provider may be asked for.

    Attributes:
        provider: Whom to ask.
        tokenizer: The model's; None where nobody has it.
        attr_target: What the user wants to be told.
        source: The provider as one that tells log-probabilities of prompts.
        settings: How it is asked for less.
    """

    provider: Any
    tokenizer: Any
    attr_target: Any
    source: Callable[[], ProviderAdapter]
    settings: RungSettings

    def handshake(self, prompt: str, target: str) -> dict[str, Any]:
        """See `RemoteGenerationAttribution.handshake`."""
        who = speaker(self.provider)
        if self.wanted(probe=False) == "top-k" and who is not None:
            rung = TopK(
                Asker(who, self.settings.cache, self.settings.limits), self.settings.top_logprobs
            )
            rung.meet([{"role": "user", "content": prompt}])
            return {"way": "top-k", "checks": dict(rung.checks)}
        ids = tokens.encode(self.tokenizer, prompt).ids
        after = tokens.encode_in_place(self.tokenizer, target, prompt[-tokens.CONTEXT :])
        found = handshake(self.source(), ids, after)
        return {} if found is None else found.to_dict()

    def wanted(self, *, probe: bool, prompt: Sequence[int] = ()) -> str:
        """The rung by its name; with `probe`, ``"auto"`` asks the provider for the first."""
        own: Any = self.tokenizer  # None for models that nobody has the tokenizer of
        is_forced = own is not None and not isinstance(own, PlainTokenizer)
        is_forced &= callable(getattr(self.provider, "get_logprobs", None)) or isinstance(
            self.provider, TokenProvider
        )
        if self.attr_target in ("frequency", "similarity"):
            return cast(str, self.attr_target)
        if self.attr_target != "auto":
            return "forced" if is_forced else "top-k"
        if is_forced and probe:
            handshake(self.source(), prompt[:-1] or prompt, prompt[-1:])
        if is_forced:
            return "forced"
        return "top-k" if probe else "frequency"

    def climb(
        self,
        inp: InterpretableInput,
        feature_mask: Tensor | None,
        target: object,
        gen_args: Mapping[str, Any] | None,
    ) -> Climbed | None:
        """The rung to stand on; None for log-probabilities of prompts."""
        refused: dict[str, str] = {}
        tokenizer = getattr(inp, "tokenizer", None) or self.tokenizer
        prompt: Prompt | None = None
        try:
            if self.attr_target == "auto":
                prompt = as_prompt(inp, tokenizer, feature_mask)
                name = self.wanted(probe=True, prompt=rendered(prompt, True))
            else:
                name = self.wanted(probe=False)
        except ApiError as error:
            if error.status not in (None, 400, 404, 422, 501):
                raise
            refused["forced"], name = str(error), "top-k"
        if name == "forced":
            return None
        if isinstance(self.attr_target, Contrast):
            raise ValueError(
                "a contrast needs log-probabilities of prompts, and the server tells none"
                + (f": {refused['forced']}" if refused else ".")
            )
        if self.attr_target == "prob":
            raise ValueError(
                'probabilities need log-probabilities of prompts: give `attr_target="log_prob"`, '
                "of which some are bounds, or 'frequency'."
            )
        who = speaker(self.provider)
        if who is None:
            raise TypeError(
                f"{type(self.provider).__name__} cannot be sent messages: give a `ChatProvider`, "
                "`AnthropicProvider`, `CallableProvider` or `CompletionsProvider`"
                + (f". {refused['forced']}" if refused else ".")
            )
        if tokenizer is None:
            raise TypeError(
                "the input has no tokenizer: give `TextSegmentInput(text, None)` or "
                "`ChatInput(messages, None)`."
            )
        prompt = prompt or as_prompt(inp, tokenizer, feature_mask)
        vocabulary = (
            tokenizer if isinstance(tokenizer, PlainTokenizer) else OpenVocabulary(tokenizer)
        )
        asker = Asker(who, self.settings.cache, self.settings.limits)
        n_tokens = n_new(gen_args, target if isinstance(target, str) else None)
        rung: Rung = self._rung(name, asker, n_tokens, gen_args)
        n_threads = self.settings.max_concurrency or who.max_concurrency
        scorer = LadderScorer(
            rung,
            asker,
            vocabulary,
            attr_target="log_prob" if name == "top-k" else name,
            n_threads=n_threads,
            show_progress=False,
        )
        full, empty = (scorer.messages(rendered(prompt, on)) for on in (True, False))
        if isinstance(rung, TopK):
            try:
                rung.meet(full)
            except ApiError as error:
                is_able = error.status in (None, 400, 404, 422, 501)
                if self.attr_target != "auto" or not is_able:
                    raise
                refused["top-k"] = str(error)
                rung = self._rung("frequency", asker, n_tokens, gen_args)
                scorer.rung, scorer.attr_target = rung, "frequency"
        return Climbed(rung, scorer, vocabulary, full, empty, n_tokens, refused)

    def reckoned(
        self, name: str, counter: Counter, tokenizer: Any, target: str | None, n_most: int
    ) -> Estimate:
        """What an attribution takes on a rung.

        Args:
            name: The rung's.
            counter: Has counted its coalitions, and the tokens of their prompts.
            tokenizer: Of the input.
            target: What is explained, if it is given.
            n_most: Tokens of what the model writes, if it is not.
        """
        per_token = 1.0 if not isinstance(tokenizer, PlainTokenizer) else 1.3  # words to tokens
        read = counter.n_read * per_token
        n_target = n_most if target is None else max(1, round(len(target) / CHARACTERS_PER_TOKEN))
        n = counter.n_evaluations
        if name == "forced":
            n_calls, n_in, n_out = n, read + n * n_target, n
        elif name == "top-k":
            n_calls = n * n_target
            n_in, n_out = read * n_target + n * n_target * (n_target - 1) / 2, n_calls
        else:
            n_answers = self.settings.n_answers or _N_ANSWERS[name]
            n_calls, n_in, n_out = n * n_answers, read * n_answers, n * n_answers * n_most
        return Estimate(
            n, n_calls, round(n_in), round(n_out), self.settings.limits.usd(n_in, n_out)
        )

    def _rung(
        self, name: str, asker: Asker, n_tokens: int, gen_args: Mapping[str, Any] | None
    ) -> Rung:
        if name == "top-k":
            return TopK(asker, self.settings.top_logprobs)
        n = self.settings.n_answers or _N_ANSWERS[name]
        temperature = float((gen_args or {}).get("temperature") or 1.0)
        if name == "frequency":
            return Frequency(asker, n, n_tokens, temperature, self.settings.predicate)
        kind = self.settings.similarity
        similar = kind if callable(kind) else SIMILAR[kind]
        called = str(getattr(kind, "__name__", type(kind).__name__)) if callable(kind) else kind
        return Similarity(asker, n, n_tokens, temperature, similar, called)
