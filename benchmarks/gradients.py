"""Gradients of a generated text: what they cost beside captum, and whether they name the causes.

    python benchmarks/gradients.py [--documents 12] [--runs 3] [--out FILE]

Two parts. Costs: processor seconds of integrated gradients, here and in captum's
`LLMGradientAttribution` over the same model, layer, baseline and steps, in turn within one process,
with the largest difference of their numbers. Causes: precision at k on the fact grammar (see
`ground_truth`), by what stands for an absent feature.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from captum.attr import (
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMGradientAttribution,
)
from environment import environment
from fact_grammar import SHIPPED, Document, Grammar, corpus, load
from ground_truth import documents, precision
from measured import in_turn, llama, prompt_of, texts

from captum_llm_ext import CorpusBaselines, GenerationGradientAttribution, TextSegmentInput

Absence = tuple[Any, dict[str, Any]]

METHODS = {
    "integrated gradients": (LayerIntegratedGradients, {}),
    "expected gradients": (LayerGradientShap, {"n_samples": 50}),
    "gradient x activation": (LayerGradientXActivation, {}),
}
# (layers, hidden size, vocabulary, prompt, target, steps)
SHAPES = [
    (4, 256, 2000, 32, 16, 20),
    (4, 256, 2000, 64, 64, 10),
    (4, 256, 32000, 64, 32, 10),
]


def absences(grammar: Grammar, texts: Sequence[str]) -> dict[str, Absence]:
    """What stands for absent features: the input's baselines, and arguments of `attribute`."""
    same_slot = CorpusBaselines(texts)
    return {
        "zero vector": (None, {}),
        "`<unk>`": ("<unk>", {}),
        "one same-slot text": (same_slot, {"n_draws": 1}),
        "mean of 8 same-slot texts": (same_slot, {}),
        "mean of 8 texts of any slot": (CorpusBaselines(texts, match="any"), {}),
    }


def attribute(
    model: Any,
    tokenizer: Any,
    document: Document,
    absence: Absence,
    method: str = "integrated gradients",
    seed: int = 0,
) -> Any:
    """Attributes the document's own continuation; features are its slots and connecting words."""
    kind, arguments = METHODS[method]
    baselines, more = absence
    output = [
        (s.start - document.cut, s.stop - document.cut) for s in document.segments("continuation")
    ]
    spans = [(s.start, s.stop) for s in document.segments("prompt")]
    inp = TextSegmentInput(document.prompt, tokenizer, spans, baselines=baselines)
    attribution = GenerationGradientAttribution(kind(model, None), tokenizer)
    return attribution.attribute(
        inp, document.continuation, output_unit=output, seed=seed, **arguments, **more
    )


def causes(n: int, seed: int) -> list[dict[str, Any]]:
    """One row per method and absence."""
    model, tokenizer = load(SHIPPED)
    given = documents(n, seed)
    rows: list[dict[str, Any]] = []
    for name, absence in absences(Grammar(), corpus(SHIPPED)).items():
        for method in METHODS:
            baselines, more = absence
            if method == "gradient x activation" and baselines is not None:
                continue  # it knows no other baseline than zero
            if more and method == "expected gradients":
                continue  # each of its samples is a draw of its own
            told = name
            if method == "expected gradients":
                told = name.replace("mean of 8 same-slot texts", "a same-slot text per sample")
                told = told.replace("mean of 8 texts of any slot", "a text of any slot per sample")
            results = [attribute(model, tokenizer, d, absence, method) for d in given]
            both = list(zip(given, results, strict=True))
            rows.append(
                {
                    "method": method,
                    "absence": told,
                    "precision": mean(v for d, r in both for v in precision(d, r).values()),
                    "precision_content_words": mean(
                        v for d, r in both for v in precision(d, r, content_only=True).values()
                    ),
                    "largest_gap": max(float(r.efficiency_gap.abs().max()) for r in results),
                    "points": mean(r.n_evaluations for r in results),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def costs(shape: tuple[int, ...], runs: int) -> dict[str, Any]:
    """Processor seconds here and in captum, and how far apart the numbers are."""
    layers, hidden, vocabulary, n_prompt, n_target, n_steps = shape
    model = llama(layers, hidden, vocabulary)
    tokenizer, ids = texts(n_prompt + n_target)
    inp = prompt_of(tokenizer, ids[:n_prompt])
    target = torch.tensor(ids[n_prompt:])
    embedding = model.get_input_embeddings()
    kept: dict[str, Any] = {}

    def captums() -> None:
        method = LLMGradientAttribution(LayerIntegratedGradients(model, embedding), tokenizer)
        kept["captum"] = method.attribute(inp, target, n_steps=n_steps)

    def ours(name: str, **given: Any) -> Callable[[], None]:
        def run() -> None:
            method = LayerIntegratedGradients(model, embedding)
            attribution = GenerationGradientAttribution(method, tokenizer)
            kept[name] = attribution.attribute(inp, target, n_steps=n_steps, **given)

        return run

    seconds = in_turn(
        {
            "captum (output held fixed)": captums,
            "here, output held fixed": ours("fixed", output_unit=None),
            "here, earlier output too": ours("output"),
        },
        runs,
    )
    middle = {name: median(times) for name, times in seconds.items()}
    apart = (kept["fixed"].token_attr - kept["captum"].token_attr).abs().max()
    return {
        "layers": layers,
        "hidden": hidden,
        "vocabulary": vocabulary,
        "prompt": n_prompt,
        "target": n_target,
        "steps": n_steps,
        "seconds": seconds,
        "captum_over_ours": {
            name: middle["captum (output held fixed)"] / time for name, time in middle.items()
        },
        "largest_difference": float(apart),
        "largest_attribution": float(kept["captum"].token_attr.abs().max()),
        "largest_output_attribution": float(kept["output"].output_attr.abs().max()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Writes both parts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    out = Path(__file__).parent / "results" / "gradients.json"
    parser.add_argument("--out", type=Path, default=out)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    # Paths from zero are not smooth; how far off they are is a column of the table.
    warnings.filterwarnings("ignore", ".*steps are too few", UserWarning)
    report = {
        **environment(seed=arguments.seed),
        "documents": arguments.documents,
        "causes": causes(arguments.documents, arguments.seed),
        "costs": [costs(shape, arguments.runs) for shape in SHAPES],
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
