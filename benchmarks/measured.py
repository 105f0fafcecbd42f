"""Models, texts, times and counts shared by the benchmarks of speed."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from captum.attr import TextTokenInput
from fact_grammar import corpus, load
from transformers import LlamaConfig, LlamaForCausalLM

from captum_llm_ext.model import Scorer
from captum_llm_ext.model.forward.schedule import distinct_positions


def seconds(function: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    function()
    return time.process_time() - start


def in_turn(candidates: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Times of all candidates, run alternately."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(runs):
        for name, function in candidates.items():
            times[name].append(seconds(function))
            print(f"  {name:34} {times[name][-1]:8.2f} s", flush=True)
    return times


def kilobytes(name: str) -> int:
    """Memory of this process as reported by Linux."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name + ":"))


def forget_peak() -> int:
    """The memory of this process in kB; `VmHWM` is the peak from here on, without making models."""
    Path("/proc/self/clear_refs").write_text("5")
    return kilobytes("VmRSS")


def llama(layers: int = 8, hidden: int = 512, vocabulary: int = 32000) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=8192,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).eval()


class Counting(Scorer):
    """Stores the latest scorer and all rows passed to it."""

    latest: "Counting"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: dict[tuple[int, ...], None] = {}
        Counting.latest = self

    def values(self, rows: Any, target: Any) -> Any:
        """As the scorer's."""
        self.rows.update(dict.fromkeys(row.ids for row in rows))
        return super().values(rows, target)


def counts() -> dict[str, float]:
    scorer = Counting.latest
    least = distinct_positions(list(scorer.rows))
    return {
        "rows": scorer.n_evaluations,
        "positions_of_rows": scorer.n_row_positions,
        "positions_computed": scorer.n_positions,
        "positions_of_a_perfect_tree": least,
        "ratio": scorer.n_positions / least,
    }


def texts(n: int) -> tuple[Any, list[int]]:
    """A tokenizer and text of `n` tokens."""
    _, tokenizer = load()
    return tokenizer, tokenizer.encode(" ".join(corpus()))[:n]


def prompt_of(tokenizer: Any, ids: list[int]) -> TextTokenInput:
    inp = TextTokenInput(tokenizer.decode(ids[1:]), tokenizer, baselines=3)
    if inp.inp_tensor.shape[1] != len(ids):
        raise RuntimeError("the text does not come back to the same tokens")
    return inp
