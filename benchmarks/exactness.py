"""The largest difference from a plain loop, on every kind of model that the tests know.

    python benchmarks/exactness.py

Random weights, float32, on the CPU. The loop is one uncached, unpadded forward of batch 1 for every
coalition and target token.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import test_architectures as tests
import tiny
from architectures import CONFIGS, build
from captum.attr import ShapleyValueSampling, TextTokenInput
from environment import environment

from captum_llm_ext import TextSegmentInput

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Prints one line per architecture and writes the JSON."""
    torch.set_num_threads(1)
    tokenizer = tiny.byte_level()
    tokens = TextTokenInput(tests.PROMPT, tokenizer, baselines=tests.UNK)
    words = TextSegmentInput(tests.PROMPT, tokenizer, "word")
    rows = []
    for name in CONFIGS:
        model = build(name)
        replaced = tests.largest_difference(model, tokenizer, tokens, tests.UNK)
        deleted = tests.largest_difference(
            model, tokenizer, words, None, method=ShapleyValueSampling, n_samples=2
        )
        rows.append({"name": name, "replaced": replaced, "deleted": deleted})
        print(f"{name:40} {replaced:.1e} {deleted:.1e}")
    report = {**environment(seed=0), "unit": "nats", "rows": rows}
    path = RESULTS / "exactness.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
