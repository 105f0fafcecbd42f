"""The largest difference from a plain loop, on every kind of model of the tests.

    python benchmarks/exactness.py

Random weights, float32, on the CPU. The loop is one uncached, unpadded forward of batch 1 for every
coalition and target token. For each way of not computing what rows share: its difference from the
loop, or null where a comparison on the model has refused it.
"""

import json
import sys
from pathlib import Path
from typing import get_args

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import test_architectures as tests
import test_prefix_reuse
import tiny
from architectures import CONFIGS, build
from captum.attr import ShapleyValueSampling, TextTokenInput
from environment import environment

from captum_llm_ext import TextSegmentInput
from captum_llm_ext.model import Reuse, Scorer

RESULTS = Path(__file__).parent / "results"


def reuse(model: torch.nn.Module) -> dict[str, float | None]:
    """Per kind of reuse the largest difference of values from a loop; None if it is not used."""
    tokens, target = test_prefix_reuse.make_rows()
    truth = test_prefix_reuse.loop(model, tokens, target)
    found: dict[str, float | None] = {}
    for way in get_args(Reuse)[2:]:
        scorer = Scorer(model, overhead=3, reuse=way)
        error = float((scorer.values(tokens, target) - truth).abs().max())
        taken = {"share": scorer.shares_cache, "pack": scorer.uses_packing}
        found[way] = error if taken.get(way, scorer.n_positions < scorer.n_row_positions) else None
    return found


def main() -> None:
    """Prints one line per architecture and writes the JSON."""
    torch.set_num_threads(1)
    tokenizer = tiny.byte_level()
    tokens = TextTokenInput(tests.PROMPT, tokenizer, baselines=tests.UNK)
    words = TextSegmentInput(tests.PROMPT, tokenizer, "word", baselines="delete")
    rows = []
    for name in CONFIGS:
        model = build(name)
        replaced = tests.largest_difference(model, tokenizer, tokens, tests.UNK)
        deleted = tests.largest_difference(
            model, tokenizer, words, None, method=ShapleyValueSampling, n_samples=2
        )
        ways = reuse(model)
        rows.append({"name": name, "replaced": replaced, "deleted": deleted, "reuse": ways})
        told = (f"{way} {'–' if e is None else format(e, '.0e')}" for way, e in ways.items())
        print(f"{name:40} {replaced:.1e} {deleted:.1e}  {', '.join(told)}", flush=True)
    report = {**environment(seed=0), "unit": "nats", "rows": rows}
    path = RESULTS / "exactness.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
