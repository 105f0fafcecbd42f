"""Explanations through APIs that report less than log-probabilities of prompts, against exact
values.

    python benchmarks/closed_models.py MODEL_FOLDER [n_prompts] [--chats] [--resume]

A local model is asked over HTTP as closed ones are; the truth is a plain forward of the same model
for every coalition, in float64 log-softmax, which this package has no part in. Prompts have four
sentences, which are the features. Texts are gone on with: two sentences aside, the facts, and the
one to be continued, without which the answer is improbable beyond what 20 tokens tell. Chats
(`--chats`; the likeliest tokens alone) are questions and requests, put into the chat template.
Each prompt is kept as it is measured, and `--resume` goes on after those.
"""

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from captum.attr import FeatureAblation, RemoteLLMAttribution, ShapleyValues
from environment import environment
from served import Served
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_llm_ext import ChatProvider, RemoteGenerationAttribution, TextSegmentInput
from captum_llm_ext.remote.similarities import SIMILAR
from captum_llm_ext.text.plain_tokenizer import messages_of

KNOWN: dict[tuple[str, ...], list[float]] = {}
RESULTS = Path(__file__).parent / "results"
PLACEHOLDER = RemoteLLMAttribution.placeholder_model
TOP, MORE, N_SENTENCES = 20, 100, 4
N_TOKENS = {"texts": 2, "chats": 4}
N_FREQUENCY = 50
_COMMAND = "python benchmarks/closed_models.py MODEL_FOLDER 20; the same with --chats"
ASIDES = [
    "It rained a little in the morning.",
    "Nobody had expected so many guests.",
    "The old bridge was closed for repairs.",
    "A small dog barked behind the fence.",
    "Two boats waited in the harbor.",
]
CHATS = (Path(__file__).parent / "chats.txt").read_text().splitlines()


def prompts(n: int) -> list[str]:
    """Prompts whose cause is known, of `real_causes`, with asides before to make four sentences."""
    lines = (Path(__file__).parent / "real_causes" / "prompts.jsonl").read_text().splitlines()
    held = [json.loads(line) for line in lines]
    texts = [one["template"].format(one["cause"]) for one in held if ". " in one["template"]]
    found: list[str] = []
    for text in texts:
        n_asides = N_SENTENCES - len(TextSegmentInput(text, None, unit="sentence").values)
        if n_asides >= 0:
            i = len(found)
            before = [ASIDES[(i + 2 * k) % len(ASIDES)] for k in range(n_asides)]
            found.append(" ".join([*before, text]))
    return found[:n]


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def exact(served: Served, inp: Any, masks: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of tokens after each coalition, ``(n_coalitions, n_target)``."""
    rows = inp.render(masks.bool(), torch.Generator().manual_seed(0))
    values: list[list[float]] = []
    for row in rows:
        text = inp.tokenizer.decode(row.ids)
        key = (text, str(tokens))
        said = [m for m in messages_of(text) if m["content"].strip()]
        if key not in KNOWN:
            ids = served.ids(said or [{"role": "user", "content": " "}])
            with torch.no_grad():
                logits = served._model(input_ids=torch.tensor([ids + tokens])).logits[0]
            told = logits[len(ids) - 1 : -1].double().log_softmax(-1)
            KNOWN[key] = [float(told[t, token]) for t, token in enumerate(tokens)]
        values.append(KNOWN[key])
    return torch.tensor(values, dtype=torch.float64)


def measure(served: Served, tokenizer: Any, prompt: str, n_tokens: int) -> dict[str, Any]:
    """The likeliest tokens of each step, on one prompt."""
    inp = TextSegmentInput(prompt, None, unit="sentence")
    found: dict[str, Any] = {"prompt": prompt}
    settings = {"max_new_tokens": n_tokens}
    with torch.no_grad():
        ids = served.ids([{"role": "user", "content": prompt}])
        tokens: list[int] = []
        for _ in range(n_tokens):
            tokens.append(int(served.log_probs(ids + tokens).argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
    found["answer"] = tokenizer.decode(tokens, skip_special_tokens=True)
    cache = Path(tempfile.mkdtemp()) / "answers.sqlite"
    # A probability hardly depends on what is only bounded, which is all but nothing.
    of = [(m, t, TOP) for m in (FeatureAblation, ShapleyValues) for t in ("log_prob", "prob")]
    # Some servers report more, such as llama.cpp's.
    for method, attr_target, top in [*of, (ShapleyValues, "log_prob", MORE)]:
        name = method.__name__ + (" prob" if attr_target == "prob" else "")
        provider = ChatProvider("local", api_url=served.url, max_concurrency=1)
        remote = RemoteGenerationAttribution(
            method(PLACEHOLDER), None, provider, attr_target, cache=cache, top_logprobs=top
        )
        began = time.monotonic()
        estimate = remote.estimate(inp, gen_args=settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what is told apart is in provenance
            result = remote.attribute(inp, gen_args=settings)
        values = exact(served, inp, result.masks, tokens)
        whole = values.sum(1)
        if attr_target == "prob":
            values, whole = values.exp(), whole.exp()
        lower, upper = result.value_interval
        inside = (lower - 1e-3 <= values) & (values <= upper + 1e-3)  # the cache in float32
        known = lower.isfinite()
        truth = attributions(method, result.masks, whole)
        own = result.seq_attr.double()
        found[f"top-{'k' if top == TOP else top} {name}"] = {
            "spearman": spearman(own, truth),
            "top_is_top": int(own.argmax()) == int(truth.argmax()),
            "is_told_apart": result.provenance["first_cause"]["is_told_apart"],
            "largest_error": float((own - truth).abs().max()),
            "inside": float(inside.double().mean()),
            "largest_error_of_known": float((result.values.double() - values)[known].abs().max()),
            "share_censored": result.provenance["share_censored"],
            "n_requests": result.provenance["n_requests"] + result.provenance["n_cached_answers"],
            "estimated_requests": estimate.n_requests,
            "seconds": time.monotonic() - began,
        }
    return found


def sampled(served: Served, prompt: str) -> dict[str, Any]:
    """Rungs of servers that return text only: the first word, whose probability is exact."""
    found: dict[str, Any] = {}
    inp = TextSegmentInput(prompt, None, unit="sentence")
    with torch.no_grad():
        likeliest = served.log_probs(served.ids([{"role": "user", "content": prompt}])).argmax()
    tokens = [int(likeliest)]
    settings = {"max_new_tokens": len(tokens)}
    # A frequency of a fixed number of answers, as is held against the field's; a similarity until
    # the first cause stands out.
    for name, rung, n in (
        ("frequency N=50", "frequency", N_FREQUENCY),
        ("similarity", "similarity", None),
    ):
        provider = ChatProvider("local", api_url=served.url, max_concurrency=1)
        remote = RemoteGenerationAttribution(
            FeatureAblation(PLACEHOLDER), None, provider, rung, n_answers=n
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # what is told apart is in provenance
                result = remote.attribute(inp, gen_args=settings)
        except ValueError as error:
            found[name] = {"refused": str(error)}
            continue
        joint = exact(served, inp, result.masks, tokens).sum(1)
        own = result.token_attr[0].double()
        told = result.provenance
        about: dict[str, Any] = {"n_answers": told["n_answers"]}
        about["is_told_apart"] = told["first_cause"]["is_told_apart"]
        truth = attributions(FeatureAblation, result.masks, joint)
        about["top_is_top"] = int(own.argmax()) == int(truth.argmax())
        if rung == "frequency":
            p = joint.exp()
            lower, upper = (end[:, 0].sigmoid() for end in result.value_interval)
            about["covered"] = [bool(c) for c in (lower <= p) & (p <= upper)]
            odds = joint - (-p).log1p()
            truth = attributions(FeatureAblation, result.masks, odds)
            sure = own.abs() > 2 * result.token_attr_se[0].double()
            about["significant"] = int(sure.sum())
            about["significant_and_right"] = int((sure & (own.sign() == truth.sign())).sum())
        about["spearman"] = spearman(own, truth)
        if rung == "similarity":
            # Of what the rung explains; the log-probability of the answer is another thing.
            texts = "".join(piece.text for piece in result.output_pieces)
            expected = expected_similarity(served, inp, result.masks, texts)
            truth = attributions(FeatureAblation, result.masks, expected)
            about["top_is_top_by_similarity"] = int(own.argmax()) == int(truth.argmax())
            about["spearman_by_similarity"] = spearman(own, truth)
        found[name] = about
    return found


def expected_similarity(served: Served, inp: Any, masks: torch.Tensor, answer: str) -> torch.Tensor:
    """Mean similarity to an answer of one token over all of them, after each coalition."""
    tokenizer = served._tokenizer
    numbers = range(len(tokenizer))
    texts = [tokenizer.decode([i], skip_special_tokens=True) for i in numbers]
    similar = torch.tensor([SIMILAR["lexical"](text, answer) for text in texts]).double()
    values: list[float] = []
    for row in inp.render(masks.bool(), torch.Generator().manual_seed(0)):
        said = [m for m in messages_of(inp.tokenizer.decode(row.ids)) if m["content"].strip()]
        with torch.no_grad():
            told = served.log_probs(served.ids(said or [{"role": "user", "content": " "}]))
        values.append(float(told.exp()[: len(similar)] @ similar))
    return torch.tensor(values, dtype=torch.float64)


def attributions(method: Any, masks: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Leave-one-out, or Shapley values by their definition, ``(n_features,)``."""
    by_mask = {tuple(mask): float(v) for mask, v in zip(masks.bool().tolist(), values, strict=True)}
    n = masks.shape[1]
    full = (True,) * n
    if method is FeatureAblation:
        return torch.tensor(
            [by_mask[full] - by_mask[(*full[:j], False, *full[j + 1 :])] for j in range(n)]
        ).double()
    from math import factorial

    found = torch.zeros(n, dtype=torch.float64)
    for mask, value in by_mask.items():
        size = sum(mask)
        for j in range(n):
            if mask[j]:
                weight = factorial(size - 1) * factorial(n - size) / factorial(n)
                found[j] += weight * (value - by_mask[(*mask[:j], False, *mask[j + 1 :])])
    return found


def summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over prompts that were not refused."""
    found: dict[str, Any] = {}
    for name in [key for key in measured[0] if key not in ("prompt", "answer")]:
        own = [one[name] for one in measured if "refused" not in one[name]]
        found[name] = {"n": len(own), "n_refused": len(measured) - len(own)}
        for key in ("spearman", "top_is_top", "inside", "share_censored", "largest_error"):
            numbers = [float(one[key]) for one in own if key in one]
            if numbers:
                found[name][key] = sum(numbers) / len(numbers)
        apart = [one for one in own if one.get("is_told_apart")]
        if any("is_told_apart" in one for one in own):
            n_right = sum(one["top_is_top"] for one in apart)
            found[name]["n_told_apart"] = len(apart)
            found[name]["top_is_top_where_told_apart"] = n_right / len(apart) if apart else None
        by = [f"{key}_by_similarity" for key in ("spearman", "top_is_top")]
        if own and by[0] in own[0]:
            found[name] |= {key: sum(float(one[key]) for one in own) / len(own) for key in by}
            n_right = sum(one[by[1]] for one in apart)
            found[name][f"{by[1]}_where_told_apart"] = n_right / len(apart) if apart else None
        covered = [c for one in own for c in one.get("covered", [])]
        if covered:
            found[name]["covered"] = sum(covered) / len(covered)
            n = sum(one["significant"] for one in own)
            found[name]["significant"] = n
            right = sum(one["significant_and_right"] for one in own)
            found[name]["significant_and_right"] = right / n if n else None
    return found


def main() -> None:
    """Measures, and writes the JSON."""
    kind = "chats" if "--chats" in sys.argv else "texts"
    folder, *rest = [given for given in sys.argv[1:] if not given.startswith("--")]
    n = int(rest[0]) if rest else 20
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    path = RESULTS / "closed_models.json"
    held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found = {name: list(held.get("prompts", {}).get(name, [])) for name in N_TOKENS}
    if "--resume" not in sys.argv:
        found[kind] = []
    measured = found[kind]
    with Served(model, tokenizer, is_chat=kind == "chats") as served:
        for prompt in (CHATS if kind == "chats" else prompts(n))[len(measured) : n]:
            one = measure(served, tokenizer, prompt, N_TOKENS[kind])
            measured.append(one if kind == "chats" else one | sampled(served, prompt))
            print(json.dumps(measured[-1]), flush=True)
            content = {
                "environment": environment(seed=0) | {"command": _COMMAND},
                "model": Path(folder).name,
                "settings": {
                    "top_logprobs": [TOP, MORE],
                    "n_tokens": N_TOKENS,
                    "n_sentences": N_SENTENCES,
                },
                "summary": {name: summary(own) for name, own in found.items() if own},
                "prompts": found,
            }
            path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content["summary"], indent=1))


if __name__ == "__main__":
    main()
