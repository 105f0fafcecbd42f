"""What a search through paragraphs, sentences and words costs, and what it misses.

    python benchmarks/hierarchical.py [--prompts 12] [--seed 0]

A prompt is a page of biographies, a paragraph each, the last of which the shipped model of the fact
grammar continues: few of its words matter, and it is not said which. `HierarchicalAblation` is held
against `FeatureAblation` over all words, which is the exact answer, and against the true causes.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from captum.attr import FeatureAblation
from environment import environment
from fact_grammar import Grammar, load
from measured import seconds

from captum_llm_ext import GenerationAttribution, HierarchicalAblation, TextSegmentInput

RESULTS = Path(__file__).parent / "results"
PARAGRAPHS = 4
SHARES = (0.2, 0.05, 0.01, 0.0)
# An attribution of so many nats is one that a reader would look at.
WORTH_A_LOOK = 0.5


def page(grammar: Grammar, draw: random.Random) -> tuple[str, str]:
    """A prompt and its continuation."""
    *before, last = (grammar.sample(draw, "pronoun") for _ in range(PARAGRAPHS))
    return "\n\n".join([*(one.text.strip() for one in before), last.prompt]), last.continuation


def one(model: Any, tokenizer: Any, prompt: str, target: str) -> dict[str, Any]:
    """Both methods on a prompt; nothing is drawn, so that they differ in what they open alone."""
    inp = TextSegmentInput(prompt, tokenizer, ("paragraph", "sentence", "word"), baselines="<unk>")
    found: dict[str, Any] = {}

    def run(name: str, method: Any) -> float:
        attribution = GenerationAttribution(method, tokenizer)
        return seconds(
            lambda: found.update({name: attribution.attribute(inp, target, output_unit=None)})
        )

    took = {"exact": run("exact", FeatureAblation(model))}
    took |= {str(s): run(str(s), HierarchicalAblation(model, share=s)) for s in SHARES}
    exact = found.pop("exact")
    strong = exact.token_attr.abs() > WORTH_A_LOOK
    told: dict[str, Any] = {
        "words": exact.token_attr.shape[1],
        "evaluations": exact.n_evaluations,
        "seconds": took["exact"],
        "attributions_worth_a_look": int(strong.sum()),
    }
    for name, result in found.items():
        alone = ~result.token_attr_se.isnan()
        top = exact.token_attr.abs().argmax(1)
        worth = [t for t in range(len(top)) if bool(strong[t].any())]
        told[name] = {
            "evaluations": result.n_evaluations,
            "seconds": took[name],
            "words_taken_out_alone": int(alone.all(0).sum()),
            "of_those_worth_a_look": float(alone[strong].float().mean()) if strong.any() else 1.0,
            "strongest_cause_is_the_exact_one": mean(
                float(result.token_attr[t].abs().argmax() == top[t]) for t in worth
            ),
        }
    return told


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load()
    grammar, draw = Grammar(), random.Random(arguments.seed)
    rows = []
    for _ in range(arguments.prompts):
        prompt, target = page(grammar, draw)
        rows.append(one(model, tokenizer, prompt, target))
    shares: dict[str, dict[str, float]] = {}
    for share in map(str, SHARES):
        shares[share] = {name: mean(row[share][name] for row in rows) for name in rows[0][share]}
        shares[share]["evaluations_of_exact"] = mean(
            row[share]["evaluations"] / row["evaluations"] for row in rows
        )
    report = {
        **environment(seed=arguments.seed),
        "prompts": arguments.prompts,
        "words": mean(row["words"] for row in rows),
        "exact_evaluations": mean(row["evaluations"] for row in rows),
        "exact_seconds": mean(row["seconds"] for row in rows),
        "shares": shares,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "hierarchical.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
