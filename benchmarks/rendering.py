"""Cost of rendering and bookkeeping relative to the model.

    python benchmarks/rendering.py

1,000 random coalitions of a 4,096-token prompt with 256 features and 32 target tokens: the time to
plan, render and prepare the rows (everything but the model's forward), against the time of the bare
forward on the same rows, which is measured on a sample of them. One process, one thread, the two in
turn; medians.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from captum.attr import KernelShap
from environment import environment
from fact_grammar import corpus, load
from transformers import LlamaConfig, LlamaForCausalLM

from captum_llm_ext import CorpusBaselines, GenerationAttribution, TextSegmentInput
from captum_llm_ext.text.segment import Span

RESULTS = Path(__file__).parent / "results"
N_TOKENS, N_FEATURES, N_TARGET = 4096, 256, 32


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Silent(torch.nn.Module):
    """A model that returns logits of the right shape at once, to time everything else."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0) -> object:
        """Zeros for the last positions."""
        shape = (*input_ids[:, -logits_to_keep:].shape, self.vocabulary)
        return argparse.Namespace(logits=torch.zeros(1).expand(shape))


def cut(text: str, n: int) -> list[Span]:
    """`n` spans of about equal length that begin at white space."""
    borders = [0]
    for part in range(1, n):
        borders.append(text.index(" ", max(borders[-1] + 1, part * len(text) // n)))
    return [Span(a, b) for a, b in zip(borders, [*borders[1:], len(text)], strict=True)]


def main(argv: list[str] | None = None) -> None:
    """Prints the ratio and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coalitions", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    _, tokenizer = load()
    ids = tokenizer.encode(" ".join(corpus()))[:N_TOKENS]
    text = tokenizer.decode(ids[1:])
    target = tokenizer.encode(" " + corpus()[0], add_special_tokens=False)[:N_TARGET]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=6,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    n_parameters = sum(p.numel() for p in model.parameters())
    spans = cut(text, N_FEATURES)
    report = {**environment(seed=0), "parameters": n_parameters, "rows": []}
    for name, baselines in (("deletion", None), ("corpus", CorpusBaselines(corpus()))):
        silent = GenerationAttribution(KernelShap(Silent(len(tokenizer))), tokenizer)

        def bookkeeping(silent=silent, baselines=baselines) -> None:
            inp = TextSegmentInput(text, tokenizer, spans, baselines=baselines)
            silent.attribute(inp, target, output_unit=None, n_samples=arguments.coalitions)

        row = torch.tensor([[*ids, *target[:-1]]])

        # Random coalitions have half of the features: half of the tokens under deletion.
        length = row.shape[1] // (2 if name == "deletion" else 1)

        @torch.no_grad()
        def forward(row=row, length=length) -> None:
            model(input_ids=row[:, :length], use_cache=False, logits_to_keep=N_TARGET)

        bookkeeping()
        forward()
        own, bare = [], []
        for _ in range(arguments.runs):
            own.append(timed(bookkeeping))
            bare.append(timed(forward) * arguments.coalitions)
        share = median(own) / median(bare)
        report["rows"].append(
            {"baseline": name, "own_s": own, "model_s": bare, "share_of_model_time": share}
        )
        print(
            f"{name:10} {median(own):.1f} s beside {median(bare):.0f} s of the model: {share:.2%}"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rendering.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
