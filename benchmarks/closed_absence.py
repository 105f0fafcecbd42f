"""Absent words drawn over an API, against the same model's own: causes named, and requests.

    PYTHONPATH=benchmarks python benchmarks/closed_absence.py MODEL_FOLDER [n_prompts] [--resume]

A local model is asked over HTTP as a served one is, about prompts of `real_causes` that it answers
right, of all kinds alike, leave-one-out of words. In the process itself `ModelBaselines` use the
whole distribution; over the API what is told of it: log-probabilities of prompts as ids with the
20 or 5 likeliest tokens, or those of the next token alone, by text. Each prompt is kept as it is
measured, and `--resume` goes on after those.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from captum.attr import FeatureAblation, RemoteLLMAttribution
from environment import environment
from real_causes.judged import answer_of, judge, wilson
from real_causes.prompts import HALVES, Prompt
from served import Served
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_llm_ext import (
    CompletionsProvider,
    GenerationAttribution,
    ModelBaselines,
    RemoteGenerationAttribution,
    TextSegmentInput,
)

PATH = Path(__file__).parent / "results" / "closed_absence.json"
PLACEHOLDER = RemoteLLMAttribution.placeholder_model
_COMMAND = "PYTHONPATH=benchmarks python benchmarks/closed_absence.py MODEL_FOLDER 12"
LOCAL = "local"


def by_ids(served: Served, tokenizer: Any, top: int) -> Any:
    """An attribution by log-probabilities of prompts as ids."""
    provider = CompletionsProvider(served.url, "local", logprobs="prompt_logprobs")
    return RemoteGenerationAttribution(
        FeatureAblation(PLACEHOLDER), tokenizer, provider, top_logprobs=top
    )


def by_text(served: Served, tokenizer: Any, top: int) -> Any:
    """By the likeliest next tokens of texts; no tokenizer."""
    provider = CompletionsProvider(served.url, "local")
    return RemoteGenerationAttribution(
        FeatureAblation(PLACEHOLDER), None, provider, top_logprobs=top
    )


WAYS: dict[str, tuple[Callable[..., Any], int]] = {
    "prompts, 20 told": (by_ids, 20),
    "prompts, 5 told": (by_ids, 5),
    "next token of texts, 20 told": (by_text, 20),
    "next token of texts, 5 told": (by_text, 5),
}
# Deletion in its place, for comparison.
DELETED = "prompts, deletion"


def measure(
    make: Callable[[], Any], tokenizer: Any, prompt: Prompt, answer: list[int], absence: Any
) -> dict[str, Any]:
    """What one way names on one prompt, and what it takes."""
    attribution = make()
    is_text = attribution.tokenizer is None
    inp = TextSegmentInput(
        prompt.text, None if is_text else tokenizer, unit="word", baselines=absence
    )
    target: Any = tokenizer.decode(answer) if is_text else torch.tensor(answer)
    found: dict[str, Any] = {}
    if isinstance(attribution, RemoteGenerationAttribution):
        estimate = attribution.estimate(inp, tokenizer.decode(answer))
        found = {"estimated_requests": estimate.n_requests, "estimated_search": estimate.n_search}
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of deletion, and of what is not told apart
        result = attribution.attribute(inp, target, output_unit=None)
    spans = [(slot.start, slot.stop) for slot in inp.slots]
    judged = judge(prompt, spans, result.seq_attr.double().tolist())
    told = result.provenance
    return found | {
        "strongest": judged.strongest,
        "is_cause": judged.is_cause,
        "is_selector": judged.is_selector,
        "attributions": [round(float(value), 5) for value in result.seq_attr],
        "n_requests": told.get("n_requests"),
        "search": told.get("search"),
        "processor_seconds": time.process_time() - began,
    }


def summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of prompts, with Wilson intervals."""
    found: dict[str, Any] = {}
    n = len(measured)
    for way in measured[0]["ways"]:
        own = [one["ways"][way] for one in measured]
        local = [one["ways"][LOCAL] for one in measured]
        n_right = sum(one["is_cause"] for one in own)
        n_either = sum(one["is_cause"] or one["is_selector"] for one in own)
        n_same = sum(a["strongest"] == b["strongest"] for a, b in zip(own, local, strict=True))
        found[way] = {
            "cause": [n_right / n, *wilson(n_right, n)],
            "cause_or_selector": n_either / n,
            "same_as_local": [n_same / n, *wilson(n_same, n)],
        }
        for name in ("n_requests", "estimated_requests"):
            if own[0].get(name) is not None:
                found[way][name] = sum(one[name] for one in own) / n
        if own[0].get("search"):
            found[way]["search_requests"] = sum(one["search"]["n_requests"] for one in own) / n
            found[way]["mass_told"] = sum(one["search"]["mean_mass_told"] for one in own) / n
    return found


def main() -> None:
    """Measures, and writes the JSON."""
    folder, *rest = [given for given in sys.argv[1:] if not given.startswith("--")]
    n = int(rest[0]) if rest else 12
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    measured: list[dict[str, Any]] = []
    if "--resume" in sys.argv:
        measured = json.loads(PATH.read_text())["prompts"]
    # Both halves in turn, each in turn of its kinds.
    in_turn = [prompt for pair in zip(*HALVES.values(), strict=False) for prompt in pair]
    known = {one["prompt"] for one in measured}
    # Of the code that is loaded: a run takes long.
    about = environment(seed=0, dtype="bfloat16") | {"command": _COMMAND}
    with Served(model, tokenizer) as served:
        for prompt in in_turn:
            if len(measured) >= n:
                break
            if prompt.text in known or (answer := answer_of(model, tokenizer, prompt)) is None:
                continue
            here = partial(GenerationAttribution, FeatureAblation(model), tokenizer)
            ways = {LOCAL: measure(here, tokenizer, prompt, answer, ModelBaselines())}
            for way, (make, top) in WAYS.items():
                own = partial(make, served, tokenizer, top)
                ways[way] = measure(own, tokenizer, prompt, answer, ModelBaselines())
            own = partial(by_ids, served, tokenizer, 5)
            ways[DELETED] = measure(own, tokenizer, prompt, answer, "delete")
            one = {"prompt": prompt.text, "cause": prompt.cause, "kind": prompt.kind, "ways": ways}
            measured.append(one)
            shown = {way: (own["strongest"], own["n_requests"]) for way, own in ways.items()}
            print(prompt.cause, json.dumps(shown), flush=True)
            content = {
                "environment": about,
                "model": Path(folder).name,
                "summary": summary(measured),
                "prompts": measured,
            }
            PATH.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(summary(measured), indent=1))


if __name__ == "__main__":
    main()
