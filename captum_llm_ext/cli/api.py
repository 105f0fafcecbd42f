"""Options of models behind an API: the provider, what is asked for, and limits."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, cast

from captum.attr import FeatureAblation, RemoteLLMAttribution

from captum_llm_ext.attribution.remote import RemoteGenerationAttribution
from captum_llm_ext.cli.command import UsageError, positive, say
from captum_llm_ext.cli.loading import Place, load_tokenizer, location
from captum_llm_ext.cli.methods import is_of_answers, looks_inside, method
from captum_llm_ext.cli.outputs import as_json
from captum_llm_ext.remote import AnthropicProvider, ApiError, ChatProvider, CompletionsProvider
from captum_llm_ext.remote.chat_providers import speaker
from captum_llm_ext.remote.speaker import Question, Speaker
from captum_llm_ext.remote.transport import UNKNOWN_ARGUMENT

# Of the answer's log-probabilities, by how much they are told; others are values of their own.
_LOG_PROBS = ("forced", "stepwise", "top-k")
_RUNGS = ("auto", "log_prob", *_LOG_PROBS, "label", "frequency", "similarity")
_CALLED = {
    "forced": "log-probabilities of prompts",
    "stepwise": "log-probabilities of any next token",
    "top-k": "likeliest tokens at each step",
    "label": "likeliest first tokens",
}
_ANTHROPIC = "https://api.anthropic.com/v1"


def add_provider(group: Any) -> None:
    """Adds the options that name the provider."""
    add = group.add_argument
    add(
        "--api",
        metavar="URL",
        help="the model is behind this API (up to /v1); --model is its name there",
    )
    add(
        "--provider",
        choices=("openai", "completions", "anthropic"),
        help="of --api: chat completions, completions, or Anthropic's messages (default: openai)",
    )
    add(
        "--tokenizer",
        metavar="NAME",
        help="the model's tokenizer: with --provider completions log-probabilities of whole "
        "prompts can be asked for, and of openai those of any next token (--rung stepwise)",
    )


def add_api(parser: argparse.ArgumentParser) -> None:
    """Adds the options of an attribution over an API."""
    group = parser.add_argument_group("a model behind an API")
    add_provider(group)
    add = group.add_argument
    add(
        "--rung",
        choices=_RUNGS,
        help="log_prob: of the answer's tokens, by what the server tells: forced (of whole "
        "prompts), stepwise (of any next token, by logit_bias) or top-k (of the likeliest); "
        "label: how much likelier one first token is than another; frequency: how often the answer "
        "is given; similarity: how similar to it what is written is; auto: the first that the "
        "server proves able to (default)",
    )
    add(
        "--labels",
        nargs=2,
        metavar=("LABEL", "OTHER"),
        help="of --rung label (default: the two likeliest first tokens)",
    )
    add("--answers", type=positive, metavar="N", help="of frequency and similarity: per coalition")
    add("--max-requests", type=positive, metavar="N", help="stop there; what came is kept")
    add("--cache", metavar="FILE", help="keep answers in FILE (SQLite): other runs take them")


def is_remote(arguments: argparse.Namespace) -> bool:
    """Whether the options name a model behind an API.

    Raises:
        UsageError: If options of one are given without it, or others that it has no use for.
    """
    is_one = arguments.api is not None or arguments.provider == "anthropic"
    for name in ("provider", "tokenizer", "rung", "labels", "answers", "max_requests", "cache"):
        if not is_one and getattr(arguments, name, None) is not None:
            raise UsageError(f"--{name.replace('_', '-')} would be ignored without --api URL.")
    if is_one and arguments.tokenizer is not None and arguments.provider == "anthropic":
        raise UsageError("--tokenizer would be ignored: Anthropic's messages tell text alone.")
    if is_one and getattr(arguments, "labels", None) and arguments.rung != "label":
        raise UsageError("--labels would be ignored without --rung label.")
    return is_one


def check(arguments: argparse.Namespace) -> None:
    """Checks that no option is given that an API would ignore.

    Raises:
        UsageError: If there is one.
    """
    if looks_inside(arguments.method):
        raise UsageError(f"--method {arguments.method} needs the model itself, not an API.")
    if is_of_answers(arguments.method):
        raise UsageError(
            f"--method {arguments.method} measures by the model's embeddings, which no API tells: "
            "--method lime --rung similarity compares the texts of answers."
        )
    for option in ("dtype", "device_map", "revision", "gguf", "quantize", "input", "surrogate"):
        given = getattr(arguments, option, None)
        if given not in (None, "auto"):
            raise UsageError(f"--{option.replace('_', '-')} would be ignored with --api.")
    if arguments.attr_target not in (None, "log_prob"):
        raise UsageError(
            "--attr-target would be ignored with --api: --rung says what is explained."
        )


def tokenizers_of(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model's tokenizer (None if there is none), and the one that inputs are made with."""
    name = arguments.tokenizer
    own = None if name is None else load_tokenizer(Place(name, location(name)))
    # Chats are sent as messages, to which the server's own template is put.
    return own, own if arguments.provider == "completions" else None


def provider_of(arguments: argparse.Namespace, model: str) -> Any:
    """The provider that the options name."""
    if arguments.provider == "anthropic":
        return AnthropicProvider(model, api_url=arguments.api or _ANTHROPIC)
    if arguments.provider == "completions":
        return CompletionsProvider(arguments.api, model)
    return ChatProvider(model, api_url=arguments.api)


def attribution_of(arguments: argparse.Namespace, tokenizer: Any) -> RemoteGenerationAttribution:
    """The attribution object."""
    settings = {name: getattr(arguments, name) for name in ("share", "scheme")}
    rung = arguments.rung or "auto"
    return RemoteGenerationAttribution(
        method(arguments.method, cast(Any, RemoteLLMAttribution.placeholder_model), **settings),
        tokenizer,
        provider_of(arguments, arguments.model),
        "log_prob" if rung in _LOG_PROBS else rung,
        rung=rung if rung in _LOG_PROBS else None,
        labels=tuple(arguments.labels) if arguments.labels else None,
        n_answers=arguments.answers,
        max_requests=arguments.max_requests,
        cache=arguments.cache,
    )


def show_estimate(
    attribution: RemoteGenerationAttribution, inp: Any, options: dict[str, Any]
) -> None:
    """Prints the estimated requests, tokens and costs of an attribution."""
    kept = {k: v for k, v in options.items() if k not in ("output_unit", "show_progress")}
    found = attribution.estimate(inp, **kept)
    say("nothing was sent; at most, without the few requests that look at the server:")
    for name, value in asdict(found).items():
        if value is not None:
            print(f"{name:<13} {value}")


def look_at(arguments: argparse.Namespace) -> int:
    """Prints which rungs a server supports; returns 1 if none."""
    provider, (tokenizer, _) = provider_of(arguments, arguments.model), tokenizers_of(arguments)
    found = dict(_looked_at(provider, tokenizer))
    if arguments.json:
        print(as_json(found))
    for name, about in {} if arguments.json else found.items():
        print(f"{'works' if about['works'] else 'off':<6} {name}: {about['what']}")
        for check, how in about.get("checks", {}).items():
            print(f"         {check}: {how}")
    return 0 if any(about["works"] for about in found.values()) else 1


def _looked_at(provider: Any, tokenizer: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    ablation = FeatureAblation(RemoteLLMAttribution.placeholder_model)
    kinds: list[tuple[str, Any]] = [("top-k", None), ("label", None)]
    if tokenizer is not None:
        told = isinstance(provider, CompletionsProvider)
        kinds = [*([("forced", tokenizer)] if told else []), ("stepwise", tokenizer), *kinds]
    for rung, own in kinds:
        target = "label" if rung == "label" else "log_prob"
        ours = RemoteGenerationAttribution(
            ablation, own, provider, target, rung=cast(Any, None if rung == "label" else rung)
        )
        try:
            met = ours.handshake()
        except ApiError as error:
            if error.status not in UNKNOWN_ARGUMENT:
                raise
            yield _CALLED[rung], {"works": False, "what": str(error)}
        else:
            yield _CALLED[rung], {"works": True, "what": f"--rung {rung}", **met}
    who = cast(Speaker, speaker(provider))
    messages = [{"role": "user", "content": "Say hello."}]
    said = who.say(Question(messages, n_tokens=8, temperature=1.0))[0]
    shown = "it wrote nothing" if not said.text else "--rung frequency, --rung similarity"
    yield "text alone", {"works": bool(said.text), "what": shown}
