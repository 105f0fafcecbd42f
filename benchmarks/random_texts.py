"""What removing the effects of randomly drawn texts saves, from the same coalitions.

Each attribution is solved twice: from its values as they are, and without what single replacement
texts do to them (`coalitions.draw_effects`). Both are held against the mean of long runs. Reported
are the ratio of mean squared errors (of all cells), and the share of cells that 95 % intervals
cover; cells with an error below a thousandth of the largest are left out. Walks, whose steps share
their texts, are beside it as they are.

    python benchmarks/random_texts.py [--model FOLDER] [--prompts 3]
"""

import argparse
import json
from typing import Any

import torch
from captum.attr import KernelShap, ShapleyValueSampling
from environment import ROOT, environment
from torch import Tensor

from captum_llm_ext import (
    CorpusBaselines,
    GenerationAttribution,
    GenerationAttributionResult,
    ModelBaselines,
    TextSegmentInput,
    load_demo,
)

PROMPTS = (
    "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include",
    "Mary lives in Dover, DE and is a nurse. Her personal interests include",
)
METHODS = {"KernelShap": KernelShap, "ShapleyValueSampling": ShapleyValueSampling}
PER_FEATURE = 16


def without(result: GenerationAttributionResult) -> GenerationAttributionResult:
    """The same coalitions, solved from their values as they are."""
    drawn, result.drawn_texts = result.drawn_texts, None
    found = result.refit()
    result.drawn_texts = drawn
    return found


def compared(truth: Tensor, results: list[GenerationAttributionResult]) -> dict[str, float]:
    """Mean squared error and coverage of several runs."""
    missed = torch.stack([r.full_attr.double() for r in results]) - truth
    errors = torch.stack([r.full_attr_se.double() for r in results])
    live = errors > errors.max() / 1000
    covered = (missed.abs() <= 1.96 * errors)[live].double().mean()
    return {"mean_squared_error": float(missed.square().mean()), "covered": float(covered)}


def on_text(
    model: Any, tokenizer: Any, prompts: Any, baselines: Any, n_new: int, n_truth: int, seeds: int
) -> dict[str, Any]:
    """Both solutions of several runs of each method, per prompt."""
    found: dict[str, Any] = {name: [] for name in METHODS}
    for prompt in prompts:
        inp = TextSegmentInput(prompt, tokenizer, "word", baselines=baselines)
        long = GenerationAttribution(KernelShap(model), tokenizer)
        first = long.attribute(
            inp, gen_args={"max_new_tokens": n_new}, n_samples=n_truth, seed=1000
        )
        # Effects of texts matter less the longer a run is; both solutions of the reference agree.
        truth, plain = first.full_attr.double(), without(first).full_attr.double()
        n = first.full_attr.shape[1]
        for name, method in METHODS.items():
            n_samples = PER_FEATURE * n if method is KernelShap else PER_FEATURE
            attribution = GenerationAttribution(method(model), tokenizer)
            runs = [
                attribution.attribute(inp, first.target, n_samples=n_samples, seed=seed)
                for seed in range(seeds)
            ]
            one, other = compared(truth, runs), compared(plain, [*map(without, runs)])
            row = {
                "prompt": prompt,
                "n_features": n,
                "n_evaluations": sum(run.n_evaluations for run in runs) / seeds,
                "removed": one,
                "as_they_are": other,
                "ratio": other["mean_squared_error"] / one["mean_squared_error"],
            }
            found[name].append(row)
            print(name, json.dumps(row), flush=True)
    return found


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint's folder, beside the demo")
    parser.add_argument("--prompts", type=int, default=3, help="of the checkpoint")
    arguments = parser.parse_args()
    model, tokenizer, texts = load_demo()
    content: dict[str, Any] = {"environment": environment(seed=0)}
    baselines = CorpusBaselines(texts)
    content["demo"] = on_text(model, tokenizer, PROMPTS, baselines, 12, 12000, 10)
    if arguments.model:
        from real_causes.measured import PROMPTS as REAL
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        prompts = [prompt for prompt in REAL if 8 <= len(prompt.split()) <= 24]
        prompts = prompts[:: max(1, len(prompts) // arguments.prompts)][: arguments.prompts]
        content["checkpoint"] = on_text(model, tokenizer, prompts, ModelBaselines(), 4, 4000, 3)
    path = ROOT / "benchmarks" / "results" / "random_texts.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
