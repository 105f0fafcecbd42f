"""SMILE beside Lime: accuracy if the model returns text only.

Prompts of the fact grammar, cut into six spans: the four facts that the answer depends on and two
that it does not. Of the four that a method ranks highest for the whole answer, how many are facts
(at random .67)? Once with absent spans deleted, once replaced by other text of their slots, with
the price: answers that were written, or rows that were scored.

With ``--model`` the same methods side by side on an answer of a checkpoint, feature by feature.

    python benchmarks/smile.py [--prompts 6] [--samples 96] [--model FOLDER]
"""

import argparse
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from captum.attr import FeatureAblation, Lime
from environment import environment
from fact_grammar import Document, Grammar, corpus, load
from fact_grammar.grammar import Segment

from captum_llm_ext import (
    ChatInput,
    CorpusBaselines,
    GenerationAttribution,
    ModelBaselines,
    Smile,
    TextSegmentInput,
)

FACTS = ("name", "city", "state", "occupation")
N_SPANS = 6
NEW = 26  # tokens, enough for D
METHODS: dict[str, Callable[[Any], Any]] = {
    "SMILE, tokens": Smile,
    "SMILE, words": lambda model: Smile(model, "words"),
    "SMILE, same or not": lambda model: Smile(model, lambda a, b: float(a != b)),
    "Lime": Lime,
    "leave-one-out": FeatureAblation,
}
ABSENCES = ("deletion", "by the model")
# The answer, "Dave, the capital of France is Paris.", is owed to the name and to the question.
QUESTION = (
    "I live in Ohio.",
    "My name is Dave.",
    "I have a cat.",
    "What is the capital of France?",
)


def prompts(n: int, seed: int) -> list[tuple[Document, list[Segment]]]:
    """Documents and six spans of each, the facts among them."""
    rng = random.Random(f"smile {seed}")
    found: list[tuple[Document, list[Segment]]] = []
    while len(found) < n:
        document = Grammar().sample(rng, "pronoun")
        segments = document.segments("prompt")
        facts = [segment for segment in segments if segment.slot in FACTS]
        beside = [segment for segment in segments if segment.slot and segment.slot not in FACTS]
        words = [segment for segment in segments if not segment.slot]
        spans = (facts + beside + words)[:N_SPANS]
        found.append((document, sorted(spans, key=lambda segment: segment.start)))
    return found


def strengths(result: Any) -> torch.Tensor:
    """Attribution of the whole answer to each feature of the prompt."""
    if len(result.token_attr) == 1:  # by answers
        return result.token_attr[0].double()
    return result.seq_attr.double()[: result.token_attr.shape[1]]


def explain(attribution: Any, inp: Any, n_samples: int, n_new: int) -> tuple[Any, float]:
    """A result and its processor seconds."""
    given: dict[str, Any] = {"gen_args": {"max_new_tokens": n_new}}
    if not isinstance(attribution.attr_method, FeatureAblation):
        given["n_samples"] = n_samples
    if not isinstance(attribution.attr_method, Smile):
        given["output_unit"] = None
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attribution.attribute(inp, **given), time.process_time() - begun


def on_the_grammar(n: int, n_samples: int, seed: int) -> list[dict[str, Any]]:
    """One row per method and absence."""
    model, tokenizer = load()
    rows: list[dict[str, Any]] = []
    for absence in ("deletion", "same slot"):
        baselines = "delete" if absence == "deletion" else CorpusBaselines(corpus())
        for name, method in METHODS.items():
            attribution = GenerationAttribution(method(model), tokenizer)
            hits, costs, spent = [], [], []
            for document, spans in prompts(n, seed):
                places = [(span.start, span.stop) for span in spans]
                inp = TextSegmentInput(document.prompt, tokenizer, places, baselines=baselines)
                result, seconds = explain(attribution, inp, n_samples, NEW)
                highest = strengths(result).argsort(descending=True)[: len(FACTS)].tolist()
                hits.append(mean(spans[i].slot in FACTS for i in highest))
                costs.append(result.n_evaluations)
                spent.append(seconds)
            row = {"method": name, "absence": absence, "precision": mean(hits)}
            row |= {"of_what": "answers" if "SMILE" in name else "rows", "cost": mean(costs)}
            rows.append(row | {"cpu_s": mean(spent), "prompts": n, "n_samples": n_samples})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def on_a_checkpoint(
    folder: str, names: Sequence[str], absences: Sequence[str], n_samples: int, n_new: int
) -> dict[str, Any]:
    """Attributions of each method to the sentences of a request."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = [{"role": "user", "content": " ".join(QUESTION)}]
    told: dict[str, Any] = {"model": Path(folder).name, "request": said[0]["content"], "rows": []}
    for absence in absences:
        baselines: Any = "delete" if absence == "deletion" else ModelBaselines()
        inp = ChatInput(said, tokenizer, "sentence", baselines=baselines)
        for name in names:
            attribution = GenerationAttribution(METHODS[name](model), tokenizer)
            result, seconds = explain(attribution, inp, n_samples, n_new)
            row = {
                "method": name,
                "absence": absence,
                "features": [label.strip() for label in result.input_tokens],
                "attributions": strengths(result).tolist(),
                "answer": tokenizer.decode(result.target) if "SMILE" not in name else None,
                "cost": result.n_evaluations,
                "cpu_s": seconds,
            }
            told["rows"].append(row)
            print(row, file=sys.stderr, flush=True)
    return told


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the JSON; entries that were not measured again stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=6, help="0: not of the grammar")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a checkpoint's folder")
    parser.add_argument("--method", action="append", choices=METHODS, help="of the checkpoint")
    parser.add_argument("--absence", action="append", choices=ABSENCES, help="of the checkpoint")
    parser.add_argument("--new", type=int, default=16, help="tokens of the checkpoint's answers")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/smile.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    report: dict[str, Any] = {**environment(seed=arguments.seed)}
    if arguments.model:
        report["command"] = report["command"].replace(arguments.model, Path(arguments.model).name)
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text(encoding="utf-8"))
        report |= {name: earlier[name] for name in ("grammar", "checkpoint") if name in earlier}
        report["commands"] = [*earlier.get("commands", [earlier["command"]]), report["command"]]
    commit = {"commit": report["commit"]}  # of each row: others are of earlier ones
    if arguments.prompts:
        rows = on_the_grammar(arguments.prompts, arguments.samples, arguments.seed)
        report["grammar"] = [row | commit for row in rows]
    if arguments.model:
        found = on_a_checkpoint(
            arguments.model,
            arguments.method or [*METHODS],
            arguments.absence or ABSENCES,
            arguments.samples,
            arguments.new,
        )
        new = {(row["method"], row["absence"]) for row in found["rows"]}
        earlier = report.get("checkpoint", {})
        is_same = earlier.get("request") == found["request"]
        earlier_rows = earlier.get("rows", []) if is_same else []
        kept = [row for row in earlier_rows if (row["method"], row["absence"]) not in new]
        report["checkpoint"] = found | {"rows": [*kept, *(row | commit for row in found["rows"])]}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
