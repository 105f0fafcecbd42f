"""Tokenizer, provider and attribution of a model behind an API, from options."""

import argparse
from collections.abc import Iterator
from typing import Any, cast

from captum.attr import FeatureAblation, RemoteLLMAttribution

from captum_llm_ext.attribution.remote import RemoteGenerationAttribution
from captum_llm_ext.cli.api import LOG_PROBS
from captum_llm_ext.cli.command import say
from captum_llm_ext.cli.loading import Place, load_tokenizer, location
from captum_llm_ext.cli.methods import method
from captum_llm_ext.cli.outputs import as_json
from captum_llm_ext.cli.wording import in_options
from captum_llm_ext.remote import AnthropicProvider, ApiError, ChatProvider, CompletionsProvider
from captum_llm_ext.remote.chat_endpoint import ChatEndpoint, ChatRequest
from captum_llm_ext.remote.chat_providers import chat_endpoint
from captum_llm_ext.remote.estimate import N_CHECKS
from captum_llm_ext.remote.transport import UNKNOWN_ARGUMENT

_CALLED = {
    "forced": "log-probabilities of prompts",
    "stepwise": "log-probabilities of any next token",
    "top-k": "likeliest tokens at each step",
    "label": "likeliest first tokens",
}
_ANTHROPIC = "https://api.anthropic.com/v1"


def tokenizers_of(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model's tokenizer (None if there is none), and the one for inputs."""
    name = arguments.tokenizer
    own = None if name is None else load_tokenizer(Place(name, location(name)))
    # Chats are sent as messages, to which the server applies its own template.
    return own, own if arguments.provider == "completions" else None


def provider_of(arguments: argparse.Namespace, model: str) -> Any:
    """The provider selected by the options."""
    if arguments.provider == "anthropic":
        return AnthropicProvider(model, api_url=arguments.api or _ANTHROPIC)
    if arguments.provider == "completions":
        return CompletionsProvider(arguments.api, model)
    return ChatProvider(model, api_url=arguments.api)


def attribution_of(
    arguments: argparse.Namespace, tokenizer: Any, explained: Any
) -> RemoteGenerationAttribution:
    """The attribution object.

    Args:
        arguments: The options.
        tokenizer: The model's tokenizer, if it is known.
        explained: The value to explain of tokens.
    """
    settings = {name: getattr(arguments, name) for name in ("share", "scheme")}
    rung = arguments.rung or "auto"
    of_tokens = "log_prob" if arguments.attr_target is None else explained
    if rung == "auto" and arguments.attr_target in (None, "log_prob"):
        of_tokens = "auto"
    return RemoteGenerationAttribution(
        method(arguments.method, cast(Any, RemoteLLMAttribution.placeholder_model), **settings),
        tokenizer,
        provider_of(arguments, arguments.model),
        of_tokens if rung in ("auto", "log_prob", *LOG_PROBS) else rung,
        rung=rung if rung in LOG_PROBS else None,
        labels=tuple(arguments.labels) if arguments.labels else None,
        n_answers=arguments.answers,
        max_requests=arguments.max_requests,
        top_logprobs=arguments.top_logprobs or 20,
        cache=arguments.cache,
    )


def show_estimate(
    attribution: RemoteGenerationAttribution, inp: Any, options: dict[str, Any]
) -> None:
    """Prints the estimated requests, tokens and costs of an attribution."""
    kept = {k: v for k, v in options.items() if k not in ("output_unit", "show_progress")}
    found = attribution.estimate(inp, **kept)
    say(f"nothing was sent; at most, beside up to {N_CHECKS} requests that check the server:")
    print(found)
    if len(found.rungs) > 1:
        say("the first of these that works is used; --rung chooses one")


def check_api(arguments: argparse.Namespace) -> int:
    """Prints which rungs a server supports; returns 1 if none."""
    provider, (tokenizer, _) = provider_of(arguments, arguments.model), tokenizers_of(arguments)
    found = dict(_checked_rungs(provider, tokenizer))
    if arguments.json:
        print(as_json(found))
    for name, about in {} if arguments.json else found.items():
        print(f"{'works' if about['works'] else 'off':<6} {name}: {about['what']}")
        for check, how in about.get("checks", {}).items():
            print(f"         {check}: {how}")
    return 0 if any(about["works"] for about in found.values()) else 1


def _checked_rungs(provider: Any, tokenizer: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    ablation = FeatureAblation(RemoteLLMAttribution.placeholder_model)
    kinds: list[tuple[str, Any]] = [("top-k", None), ("label", None)]
    if tokenizer is not None:
        reports = isinstance(provider, CompletionsProvider)
        kinds = [*([("forced", tokenizer)] if reports else []), ("stepwise", tokenizer), *kinds]
    for rung, own in kinds:
        target = "label" if rung == "label" else "log_prob"
        ours = RemoteGenerationAttribution(
            ablation, own, provider, target, rung=cast(Any, None if rung == "label" else rung)
        )
        try:
            findings = ours.handshake()
        except ApiError as error:
            if error.status not in UNKNOWN_ARGUMENT:
                raise
            yield _CALLED[rung], {"works": False, "what": in_options(str(error))}
        else:
            yield _CALLED[rung], {"works": True, "what": f"--rung {rung}", **findings}
    endpoint = cast(ChatEndpoint, chat_endpoint(provider))
    messages = [{"role": "user", "content": "Say hello."}]
    answer = endpoint.chat(ChatRequest(messages, n_tokens=8, temperature=1.0))[0]
    shown = "it wrote nothing" if not answer.text else "--rung frequency, --rung similarity"
    yield "text alone", {"works": bool(answer.text), "what": shown}
