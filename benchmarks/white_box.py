"""Cost of white-box methods on a real model: passes, time and memory.

    python benchmarks/white_box.py [--model smollm2] [--prompt 50 --prompt 1000] [--target 30]
    python benchmarks/white_box.py --reconstruction

Times are processor seconds of one thread, also told as a multiple of a plain forward pass of the
same text, without what is found out once of every model. Memory is what the process held at most
beyond what it held before. Beside it stands what all attention maps of the model would take at
once. `--reconstruction` tells how far the shares of the linear system are from the logit that they
sum to, on every architecture that the tests know (random weights, biases that are not zero).

What is not measured again keeps what the file says.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import test_white_box as tests
import tiny
from captum.attr import FeatureAblation, LayerGradientXActivation
from environment import environment
from real_causes.checkpoints import folder

from captum_llm_ext import (
    AttentionRollout,
    AttentionWeights,
    EquivalentLinearSystem,
    GenerationAttentionAttribution,
    GenerationAttribution,
    GenerationGradientAttribution,
    LayerSaliency,
    TextSegmentInput,
)
from captum_llm_ext.model import TokenRow
from captum_llm_ext.model.probe import findings

RESULTS = Path(__file__).parent / "results"
TEXTS = Path(__file__).parent / "real_causes" / "related.txt"
# Leave-one-out of so many tokens is what white-box methods are beside; of more it takes hours.
MOST_REMOVED = 100
METHODS: dict[str, Callable[[Any, Any], Any]] = {
    "linear system": lambda model, tokenizer: GenerationGradientAttribution(
        EquivalentLinearSystem(model), tokenizer
    ),
    "saliency": lambda model, tokenizer: GenerationGradientAttribution(
        LayerSaliency(model), tokenizer
    ),
    "gradient x activation": lambda model, tokenizer: GenerationGradientAttribution(
        LayerGradientXActivation(model, None), tokenizer
    ),
    "attention weights": lambda model, tokenizer: GenerationAttentionAttribution(
        AttentionWeights(model), tokenizer
    ),
    "rollout": lambda model, tokenizer: GenerationAttentionAttribution(
        AttentionRollout(model), tokenizer
    ),
    "rollout of values": lambda model, tokenizer: GenerationAttentionAttribution(
        AttentionRollout(model, "values"), tokenizer
    ),
    "ALTI": lambda model, tokenizer: GenerationAttentionAttribution(
        AttentionRollout(model, "alti"), tokenizer
    ),
    "rollout of projections": lambda model, tokenizer: GenerationAttentionAttribution(
        AttentionRollout(model, "projection"), tokenizer
    ),
    "leave-one-out": lambda model, tokenizer: GenerationAttribution(
        FeatureAblation(model), tokenizer
    ),
}

WITH_A_PROBE = ("linear system", "saliency", "gradient x activation", "leave-one-out")


def memory(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def measured(run: Callable[[], object]) -> dict[str, float]:
    """Processor seconds, and peak memory beyond that held before."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before, start = memory("VmRSS"), time.process_time()
    run()
    return {"seconds": time.process_time() - start, "peak_mb": memory("VmHWM") - before}


class Counted:
    """Number of positions that a model computes."""

    def __init__(self, model: Any) -> None:
        self._layer = model.get_input_embeddings()
        self.read = 0

    def __enter__(self) -> "Counted":
        self._hook = self._layer.register_forward_hook(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _note(self, _: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.read += given[0].numel()


def table(
    model: Any, tokenizer: Any, n_prompt: int, n_target: int, methods: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One row per method."""
    ids = tokenizer.encode(" ".join(TEXTS.read_text(encoding="utf-8").split()))
    while len(ids) < n_prompt + n_target:
        ids = ids + ids
    text, target = tokenizer.decode(ids[:n_prompt]), ids[n_prompt : n_prompt + n_target]
    # No baseline plays a part but for leave-one-out, for which one id is as good as another.
    inp = TextSegmentInput(text, tokenizer, "token", baselines=tokenizer.eos_token_id)
    whole = torch.tensor([[*inp.ids, *target[:-1]]])

    @torch.no_grad()
    def plain() -> None:
        model(whole, use_cache=False, logits_to_keep=n_target)

    plain()
    forward = measured(plain)
    config = model.config
    maps = config.num_hidden_layers * config.num_attention_heads * whole.numel() ** 2 * 4 / 2**20
    shared = {"prompt": len(inp.ids), "target": n_target, "all_maps_mb": maps}
    yield shared | {"method": "plain forward"} | forward
    if set(methods) & {*WITH_A_PROBE}:
        # What a model does with texts of this length is found out once, by the first attribution.
        row = TokenRow((*inp.ids, *target[:-1]), range(len(inp.ids) - 1, whole.numel()))
        with Counted(model) as counted, torch.no_grad():
            found_out = measured(lambda: findings(model, [row]))
        yield shared | {
            "method": "probe, once",
            **found_out,
            "forwards_worth_of_time": found_out["seconds"] / forward["seconds"],
            "passes": counted.read / whole.numel(),
        }
    for name in methods:
        if name == "leave-one-out" and n_prompt > MOST_REMOVED:
            continue
        found: list[Any] = []
        attribution = METHODS[name](model, tokenizer)

        def run(attribution: Any = attribution, found: list[Any] = found) -> None:
            found.append(attribution.attribute(inp, torch.tensor(target)))

        with Counted(model) as counted:
            row = shared | {"method": name} | measured(run)
        about = found[0].provenance
        row |= {
            "forwards_worth_of_time": row["seconds"] / forward["seconds"],
            "passes": counted.read / whole.numel(),
            "reconstruction_error": about.get("reconstruction_error"),
            "fixed_share": None
            if found[0].fixed_share is None
            else float(found[0].fixed_share.mean()),
        }
        yield row


def reconstruction(dtypes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """How far the shares are from the logit, relative to the size of logits; one row per model."""
    tokenizer = tiny.byte_level()
    for name in sorted(set(tests.EXACT)):
        for dtype in dtypes:
            model = tests.built(name, getattr(torch, dtype))
            found = tests.attributed(model, tokenizer, EquivalentLinearSystem(model))
            error = found.provenance["reconstruction_error"]
            yield {"architecture": name, "dtype": dtype, "reconstruction_error": error}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the rows as JSON."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="see `real_causes.checkpoints`")
    parser.add_argument("--prompt", type=int, action="append", help="tokens; by default 50, 1000")
    parser.add_argument("--target", type=int, default=30)
    parser.add_argument("--method", action="append", choices=METHODS, help="only these")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--reconstruction", action="store_true", help="this alone")
    parser.add_argument("--out", type=Path, default=RESULTS / "white_box.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    report: dict[str, Any] = {**environment(seed=0, dtype=options.dtype)}
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    report["commands"] = [*before.get("commands", []), report["command"]]
    rows = {_key(row): row for row in before.get("rows", [])}

    def keep(row: dict[str, Any]) -> None:
        print(row, flush=True)
        row["commit"] = report["commit"]
        rows[_key(row)] = row
        report["rows"] = [*rows.values()]
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    if options.reconstruction:
        for row in reconstruction(("float32", "float64", "bfloat16")):
            keep(row)
        return
    where = folder(options.model)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, options.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(where)
    for n_prompt in options.prompt or (50, 1000):
        methods = options.method or [*METHODS]
        for row in table(model, tokenizer, n_prompt, options.target, methods):
            keep({"model": Path(where).name, "dtype": options.dtype, **row})


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The key of a measurement."""
    by = ("architecture", "model", "dtype", "prompt", "target", "method")
    return tuple(row.get(name) for name in by)


if __name__ == "__main__":
    main()
