"""Chooses the rung of an attribution: how to score, by what the provider reports."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from captum.attr import InterpretableInput
from torch import Tensor

from captum_llm_ext.contrast import Contrast
from captum_llm_ext.remote.chat_endpoint import ChatEndpoint, ChatRequest
from captum_llm_ext.remote.chat_providers import chat_endpoint, other_endpoint
from captum_llm_ext.remote.completions import CompletionsProvider
from captum_llm_ext.remote.estimate import (
    Counter,
    Estimate,
    n_new,
    rendered,
)
from captum_llm_ext.remote.handshake import handshake, is_verified
from captum_llm_ext.remote.label import Label
from captum_llm_ext.remote.ladder import LadderScorer, as_messages
from captum_llm_ext.remote.likelihood import RemoteLikelihood
from captum_llm_ext.remote.metered import (
    CHARACTERS_PER_TOKEN,
    BudgetError,
    Cache,
    Limits,
    MeteredEndpoint,
)
from captum_llm_ext.remote.providers import ProviderAdapter, TokenProvider
from captum_llm_ext.remote.rung import Rung
from captum_llm_ext.remote.sampled import Frequency, Similarity
from captum_llm_ext.remote.search import Search
from captum_llm_ext.remote.similarities import SIMILAR, Similar
from captum_llm_ext.remote.step_proposals import StepProposer
from captum_llm_ext.remote.stepwise import N_TRIES, Forced, TopK, reports_any_token
from captum_llm_ext.remote.transport import UNKNOWN_ARGUMENT, ApiError, GarbageError
from captum_llm_ext.text import tokens
from captum_llm_ext.text.inputs import ChatInput, Prompt, as_prompt
from captum_llm_ext.text.plain_tokenizer import OpenVocabulary, PlainTokenizer

PROMPT, TARGET = "One, two, three, four, five, six,", " seven, eight"
RungName = Literal["forced", "stepwise", "top-k", "label", "frequency", "similarity"]
_LOG_PROBS: tuple[RungName, ...] = ("forced", "stepwise", "top-k")
# Answers per coalition: at first, and at most while the first cause is not separated from the
# others. Chosen, not measured.
_N_ANSWERS = {"frequency": (50, 200), "similarity": (16, 64)}
# Tokens generated per request of a search for replacements: to the end of a word, or one. Chosen,
# not measured.
_WRITTEN_IN_SEARCH = 2
# Refusals that no other kind of request would avoid: of the model, or of the prompt.
_HOLDS_FOR_ALL = re.compile(
    r"\bmodel\b.{0,80}\b(?:does not exist|not found)|\bno such model|model_not_found"
    r"|invalid model name|deployment.{0,80}does not exist"
    r"|context (?:length|size|window)|maximum model length|too long",
    re.IGNORECASE | re.DOTALL,
)
# Arguments by which users request a rung.
ARGUMENT_FOR: Mapping[str, str] = {
    "forced": 'attr_target="log_prob"',
    "stepwise": 'rung="stepwise"',
    "top-k": 'rung="top-k"',
    "label": 'attr_target="label"',
    "frequency": 'attr_target="frequency"',
    "similarity": 'attr_target="similarity"',
}


@dataclass(frozen=True, kw_only=True)
class RungSettings:
    """Settings of requests below the first rung: see `RemoteGenerationAttribution`."""

    cache: Cache
    limits: Limits
    top_logprobs: int
    n_answers: int | None
    predicate: Callable[[str], bool] | None
    similarity: str | Similar
    labels: tuple[str | None, str | None]
    max_concurrency: int | None


@dataclass(frozen=True)
class ChosenRung:
    """The rung of an attribution, below the first.

    Attributes:
        rung: The rung.
        scorer: Scores rows on this rung.
        tokenizer: Spells the rows.
        full, empty: The prompt with all and with no features present, as messages.
        proposer: The model as a proposer of texts for absent features.
        refused: Higher rungs, and why they do not work.
    """

    rung: Rung
    scorer: LadderScorer
    tokenizer: Any
    full: list[dict[str, str]]
    empty: list[dict[str, str]]
    proposer: StepProposer
    refused: Mapping[str, str]


@dataclass(frozen=True)
class RungChoice:
    """The rungs that one provider may offer.

    Attributes:
        provider: The provider.
        tokenizer: The model's tokenizer; None if unavailable.
        attr_target: The value that the user asks for.
        rung: The rung that the user asks for; None: the highest that works.
        source: The provider as a source of log-probabilities of prompts.
        settings: Settings of lower rungs.
    """

    provider: Any
    tokenizer: Any
    attr_target: Any
    rung: RungName | None
    source: Callable[[], ProviderAdapter]
    settings: RungSettings

    def handshake(self, prompt: str, target: str) -> dict[str, Any]:
        """See `RemoteGenerationAttribution.handshake`."""
        own = self.names[0]
        endpoint = chat_endpoint(self.provider)
        if own != "forced" and endpoint is not None:
            messages = [{"role": "user", "content": prompt}]
            rung = self._rung(
                own, self._endpoint(endpoint), self.tokenizer, n_tokens=1, gen_args=None
            )
            rung.handshake(messages)
            about: Any = rung.details.get("handshake", {})
            return {"way": own, "checks": dict(about)}
        ids = tokens.encode(self.tokenizer, prompt).ids
        after = tokens.encode_in_place(self.tokenizer, target, prompt[-tokens.CONTEXT :])
        found = handshake(self.source(), ids, after)
        return {} if found is None else found.to_dict()

    @property
    def names(self) -> list[RungName]:
        """The rungs to try, highest first."""
        if self.rung is not None:
            return [self.rung]
        if self.attr_target in ("frequency", "similarity", "label"):
            return [self.attr_target]
        own: list[RungName] = []
        if self._has_tokenizer(self.tokenizer):
            has_logprobs = callable(getattr(self.provider, "get_logprobs", None))
            if has_logprobs or isinstance(self.provider, TokenProvider):
                own.append("forced")
            if reports_any_token(chat_endpoint(self.provider)):
                own.append("stepwise")
        own.append("top-k")
        if self.attr_target == "auto":
            return [*own, "frequency", "similarity"]
        return ["forced"] if "forced" in own else own

    def choose(
        self,
        inp: InterpretableInput,
        feature_mask: Tensor | None,
        target: object,
        gen_args: Mapping[str, Any] | None,
        cache: Callable[[], Cache],
    ) -> ChosenRung | None:
        """The rung to use; None for log-probabilities of prompts.

        Args:
            inp, feature_mask, target, gen_args: As for `RemoteGenerationAttribution.attribute`.
            cache: Where answers are cached, if a rung needs them.

        Raises:
            ApiError: If none works; the message says which other one would.
        """
        names = self.names
        if names == ["forced"]:
            return None
        tokenizer = getattr(inp, "tokenizer", None) or self.tokenizer
        if tokenizer is None:
            raise TypeError(
                "the input has no tokenizer: give `TextSegmentInput(text, None)` or "
                "`ChatInput(messages, None)`."
            )
        is_chat = isinstance(inp, ChatInput) and not isinstance(tokenizer, PlainTokenizer)
        if is_chat and not isinstance(self.provider, CompletionsProvider):
            raise TypeError(
                "the chat was put into a template already, and the server has its own: give "
                "`ChatInput(messages, None)`, which is sent as messages."
            )
        prompt = as_prompt(inp, tokenizer, feature_mask)
        refused: dict[str, str] = {}
        writes = False
        for name in names:
            try:
                if name == "forced":
                    ids = rendered(prompt, True)
                    handshake(self.source(), ids[:-1] or ids, ids[-1:])
                    return None
                return self._set_up(name, prompt, tokenizer, target, gen_args, cache, refused)
            except ApiError as error:
                # A bad response to one kind of request may not recur with the next.
                if _HOLDS_FOR_ALL.search(str(error)):
                    raise
                if isinstance(error, GarbageError) and not writes:
                    writes = self._writes_text(chat_endpoint(self.provider), prompt, tokenizer)
                    if not writes:
                        raise
                if error.status not in UNKNOWN_ARGUMENT or name == names[-1]:
                    hint = self.instead(error, inp, feature_mask)
                    error.args = (f"{error.args[0]}{hint}", *error.args[1:])
                    raise
                refused[name] = str(error)
        return None

    def _set_up(
        self,
        name: RungName,
        prompt: Prompt,
        tokenizer: Any,
        target: object,
        gen_args: Mapping[str, Any] | None,
        cache: Callable[[], Cache],
        refused: Mapping[str, str],
    ) -> ChosenRung:
        if isinstance(self.attr_target, Contrast):
            raise ValueError(
                "a contrast needs log-probabilities of prompts, and the provider returns none: "
                '`attr_target="label"` would compare one label with another.'
            )
        chat = chat_endpoint(self.provider)
        if chat is None:
            raise TypeError(
                f"{type(self.provider).__name__} cannot be sent messages: give a `ChatProvider`, "
                "`AnthropicProvider`, `CallableProvider` or `CompletionsProvider`"
                + "".join(f". {reason}" for reason in refused.values())
            )
        is_plain = isinstance(tokenizer, PlainTokenizer)
        vocabulary = tokenizer if is_plain else OpenVocabulary(tokenizer)
        endpoint = self._endpoint(chat, cache())
        n_tokens = n_new(gen_args, target if isinstance(target, str) else None)
        own = self.tokenizer if self._has_tokenizer(self.tokenizer) else tokenizer
        rung = self._rung(name, endpoint, own, n_tokens=n_tokens, gen_args=gen_args)
        scorer = LadderScorer(
            rung,
            endpoint,
            vocabulary,
            n_threads=endpoint.n_threads,
            show_progress=False,
            as_probability=self.attr_target == "prob",
        )
        full = as_messages(vocabulary, rendered(prompt, True))
        rung.handshake(full)
        top_k = rung if isinstance(rung, TopK) else self._top_k(endpoint)
        proposer = StepProposer(top_k, scorer.search)
        # What is absent may be drawn from what the provider reports.
        prompt = prompt.with_model(RemoteLikelihood(scorer, tokenizer, proposer))
        empty = as_messages(vocabulary, rendered(prompt, False))
        return ChosenRung(rung, scorer, vocabulary, full, empty, proposer, dict(refused))

    def step_proposer(self, search: Search) -> StepProposer | None:
        """The model as a proposer by text; None if it cannot be sent texts to continue."""
        chat = chat_endpoint(self.provider)
        return None if chat is None else StepProposer(self._top_k(self._endpoint(chat)), search)

    def _top_k(self, endpoint: MeteredEndpoint) -> TopK:
        return TopK(endpoint, self.settings.top_logprobs, 1)

    def instead(self, error: ApiError, inp: InterpretableInput, feature_mask: Tensor | None) -> str:
        """What would work with a provider that has refused, found by trying.

        Returns:
            A sentence to append to the error; empty if nothing works, or if the refusal is not
            about the kind of request.
        """
        tokenizer = getattr(inp, "tokenizer", None) or self.tokenizer
        if error.status not in UNKNOWN_ARGUMENT or tokenizer is None:
            return ""
        if error.status is None and is_verified(self.provider):  # what it has reported, it supports
            return ""
        if isinstance(error, GarbageError) or _HOLDS_FOR_ALL.search(str(error)):
            return ""
        full = as_messages(tokenizer, rendered(as_prompt(inp, tokenizer, feature_mask), True))
        names: tuple[RungName, ...] = get_args(RungName)
        below = names[names.index(self.names[-1]) + 1 :]
        other, called = other_endpoint(self.provider)
        # The other endpoint renders the prompt differently, so it comes last.
        for endpoint, how, own in (
            (chat_endpoint(self.provider), "", below),
            (other, called, names[2:]),
        ):
            name = None if endpoint is None else self._first_that_works(endpoint, full, own)
            if name is not None:
                by = f" of a `{how}`" if how else ""
                return f" With this server `{ARGUMENT_FOR[name]}`{by} would work."
        return ""

    def _writes_text(self, endpoint: ChatEndpoint | None, prompt: Prompt, tokenizer: Any) -> bool:
        """Whether a provider returns any text for the whole prompt."""
        if endpoint is None:
            return False
        is_plain = isinstance(tokenizer, PlainTokenizer)
        vocabulary = tokenizer if is_plain else OpenVocabulary(tokenizer)
        full = as_messages(vocabulary, rendered(prompt, True))
        return self._answers_at_all(self._endpoint(endpoint), full)

    def _answers_at_all(self, endpoint: MeteredEndpoint, full: Sequence[Mapping[str, str]]) -> bool:
        try:
            return bool(endpoint.answer(ChatRequest(full, n_tokens=8, temperature=1.0)).text)
        except (ApiError, ConnectionError, BudgetError):
            return False

    def _first_that_works(
        self, chat: ChatEndpoint, full: Sequence[Mapping[str, str]], names: Sequence[RungName]
    ) -> str | None:
        endpoint = self._endpoint(chat)
        # A provider that returns no text for this prompt supports nothing else with it.
        if not names or not self._answers_at_all(endpoint, full):
            return None
        for name in names:
            if name == "stepwise":
                continue
            try:
                with warnings.catch_warnings():  # about something the user did not ask for
                    warnings.simplefilter("ignore")
                    self._rung(name, endpoint, None, n_tokens=1, gen_args=None).handshake(full)
            except (ApiError, ConnectionError, BudgetError):
                continue
            return name
        return None

    def estimate(
        self, counter: Counter, tokenizer: Any, target: str | None, n_most: int
    ) -> Estimate:
        """An upper limit of an attribution's cost, on the most expensive rung that may be chosen.

        Args:
            counter: Counts of its coalitions, and of the tokens of their prompts.
            tokenizer: The input's tokenizer.
            target: The explained text, if given.
            n_most: Maximum number of generated tokens, if not.
        """
        own = [self._estimate(name, counter, tokenizer, target, n_most) for name in self.names]
        most = max(own, key=lambda one: (one.usd or 0.0, one.tokens_in, one.n_requests))
        return replace(most, rungs=tuple(own))

    def _estimate(
        self, name: RungName, counter: Counter, tokenizer: Any, target: str | None, n_most: int
    ) -> Estimate:
        # Tokens per word; chosen, not measured.
        per_token = 1.0 if not isinstance(tokenizer, PlainTokenizer) else 1.3
        read = counter.n_read * per_token
        n_target = n_most if target is None else max(1, round(len(target) / CHARACTERS_PER_TOKEN))
        n = counter.n_evaluations
        if name == "forced":
            n_calls, n_in, n_out = n, read + n * n_target, n
        elif name in ("top-k", "stepwise", "label"):
            n_target = 1 if name == "label" else n_target
            # By a bias, each of two labels takes requests of its own.
            is_given = self._has_tokenizer(self.tokenizer) and reports_any_token(
                chat_endpoint(self.provider)
            )
            n_biased = {"stepwise": 1, "label": 2 if is_given else 0}.get(name, 0)
            tries = 1 + n_biased * N_TRIES
            n_calls = n * n_target * tries
            n_in = (read * n_target + n * n_target * (n_target - 1) / 2) * tries
            n_out = n_calls
        else:
            n_answers = self.settings.n_answers or _N_ANSWERS[name][1]
            n_calls, n_in, n_out = n * n_answers, read * n_answers, n * n_answers * n_most
        n_calls, n_in = n_calls + counter.n_search, n_in + counter.n_read_in_search
        n_out += counter.n_search * _WRITTEN_IN_SEARCH
        usd = self.settings.limits.usd(n_in, n_out)
        return Estimate(n, n_calls, round(n_in), round(n_out), usd, name, n_search=counter.n_search)

    def _endpoint(self, chat: ChatEndpoint, cache: Cache | None = None) -> MeteredEndpoint:
        own = self.settings
        n_threads = own.max_concurrency or chat.max_concurrency
        return MeteredEndpoint(chat, cache or own.cache, own.limits, n_threads=n_threads)

    def _has_tokenizer(self, tokenizer: Any) -> bool:
        return tokenizer is not None and not isinstance(tokenizer, PlainTokenizer)

    def _rung(
        self,
        name: RungName,
        endpoint: MeteredEndpoint,
        tokenizer: Any,
        *,
        n_tokens: int,
        gen_args: Mapping[str, Any] | None,
    ) -> Rung:
        top = self.settings.top_logprobs
        if name == "stepwise":
            if not self._has_tokenizer(tokenizer):
                raise ValueError(
                    'the rung "stepwise" biases token ids: give the model\'s `tokenizer`, or '
                    '`rung="top-k"`.'
                )
            return Forced(endpoint, top, n_tokens, tokenizer)
        if name == "top-k":
            return TopK(endpoint, top, n_tokens)
        if name == "label":
            by = TopK(endpoint, top, 1)
            if self._has_tokenizer(tokenizer) and reports_any_token(endpoint.provider):
                by = Forced(endpoint, top, 1, tokenizer, is_required=False)
            return Label(by, self.settings.labels)
        given = self.settings.n_answers
        n = _N_ANSWERS[name] if given is None else (given, given)
        temperature = (gen_args or {}).get("temperature")
        temperature = 1.0 if temperature is None else float(temperature)
        if temperature == 0 and (name == "frequency" or given is not None):
            raise ValueError(
                "`temperature` is 0, at which there is one answer alone: leave it out, or give "
                '`attr_target="similarity"` without `n_answers`.'
            )
        if name == "frequency":
            return Frequency(endpoint, n, n_tokens, temperature, self.settings.predicate)
        kind = self.settings.similarity
        similar = kind if callable(kind) else SIMILAR[kind]
        called = str(getattr(kind, "__name__", type(kind).__name__)) if callable(kind) else kind
        return Similarity(endpoint, n, n_tokens, temperature, similar, called)
