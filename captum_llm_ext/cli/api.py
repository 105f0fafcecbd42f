"""Options of models behind an API: provider, rung, and limits."""

import argparse
import re
from typing import Any

from captum_llm_ext.cli.command import UsageError, positive
from captum_llm_ext.cli.methods import is_of_answers, is_white_box

# Rungs of log-probabilities, by how much is reported; the others are values of their own.
LOG_PROBS = ("forced", "stepwise", "top-k")
_RUNGS = ("auto", "log_prob", *LOG_PROBS, "label", "frequency", "similarity")


def add_provider(group: Any) -> None:
    """Adds the options that select the provider."""
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
        "prompts can be requested, and of openai those of any next token (--rung stepwise)",
    )


def add_api(parser: argparse.ArgumentParser) -> None:
    """Adds the options of an attribution over an API."""
    group = parser.add_argument_group("a model behind an API")
    add_provider(group)
    add = group.add_argument
    add(
        "--rung",
        choices=_RUNGS,
        help="log_prob: log-probabilities of the answer's tokens, by what the server reports: "
        "forced (of whole prompts), stepwise (of any next token, by its id) or top-k (of "
        "the likeliest); label: how much likelier one first token is than another; "
        "frequency: how often the answer is given; similarity: how similar to it what is "
        "written is; auto: the first that the server proves able to (default)",
    )
    add(
        "--labels",
        nargs=2,
        metavar=("LABEL", "OTHER"),
        help="of --rung label (default: the two likeliest first tokens)",
    )
    add("--answers", type=positive, metavar="N", help="of frequency and similarity: per coalition")
    add(
        "--max-requests",
        type=positive,
        metavar="N",
        help="stop at this limit; received answers are kept",
    )
    add(
        "--top-logprobs",
        type=positive,
        metavar="K",
        help="likeliest tokens requested at each step (default: 20); more leave fewer values "
        "unknown, if the server allows them",
    )
    add("--cache", metavar="FILE", help="cache answers in FILE (SQLite) for other runs")


def is_remote(arguments: argparse.Namespace) -> bool:
    """Whether the options select a model behind an API.

    Raises:
        UsageError: If API options are given without a provider, or options that do not apply to an
            API.
    """
    is_one = arguments.api is not None or arguments.provider == "anthropic"
    own = "provider tokenizer rung labels answers max_requests top_logprobs cache"
    for name in own.split():
        if not is_one and getattr(arguments, name, None) is not None:
            raise UsageError(f"--{name.replace('_', '-')} would be ignored without --api URL.")
    if is_one and arguments.tokenizer is not None and arguments.provider == "anthropic":
        raise UsageError("--tokenizer would be ignored: Anthropic's messages return only text.")
    if arguments.api is not None and not re.match(r"https?://[^/]", arguments.api):
        raise UsageError(f"--api {arguments.api}: give a URL such as http://localhost:8000/v1.")
    if is_one and getattr(arguments, "labels", None) and arguments.rung != "label":
        raise UsageError("--labels would be ignored without --rung label.")
    return is_one


def check(arguments: argparse.Namespace) -> None:
    """Checks that no option is given that has no effect with an API.

    Raises:
        UsageError: If there is one.
    """
    if is_white_box(arguments.method):
        raise UsageError(f"--method {arguments.method} needs the model itself, not an API.")
    if is_of_answers(arguments.method):
        raise UsageError(
            f"--method {arguments.method} measures by the model's embeddings, which no API "
            "returns: --method lime --rung similarity compares the texts of answers."
        )
    for option in ("dtype", "device_map", "revision", "gguf", "quantize", "input", "surrogate"):
        given = getattr(arguments, option, None)
        if given not in (None, "auto"):
            raise UsageError(f"--{option.replace('_', '-')} would be ignored with --api.")
    rung = arguments.rung or "auto"
    if arguments.attr_target == "logit":
        raise UsageError("--attr-target logit needs the model itself: no API returns logits.")
    if arguments.attr_target is not None and rung not in ("auto", "log_prob", *LOG_PROBS):
        raise UsageError(f"--attr-target would be ignored: --rung {rung} sets what is explained.")
    if arguments.attr_target == "contrast":
        if arguments.provider != "completions" or arguments.tokenizer is None:
            raise UsageError(
                "--attr-target contrast needs log-probabilities of whole prompts: --provider "
                "completions with --tokenizer NAME. --rung label compares two first tokens."
            )
        if rung in ("stepwise", "top-k"):
            raise UsageError(f"--rung {rung} has no contrasts: leave it out.")
