"""What attribution costs beside captum, beside the bare model, and how that grows.

    python benchmarks/throughput.py [--threads 1] [--runs 5] [--part beside_captum …]

One process; the candidates run in turn, medians of all runs. Seconds are those of the process on
its processors (``time.process_time``): on a machine that others use as well, the clock on the wall
measures them. Captum's slow paths are run on two groups of tokens instead of 128 tokens: three
evaluations, which all cost the same, and the time for 129 is proportional; the JSON says where.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from captum.attr import FeatureAblation, LLMAttribution
from environment import environment
from measured import Counting, counts, in_turn, llama, prompt_of, texts
from peers import beside_inseq, beside_shap

import captum_llm_ext.attribution.generation as attribution
from captum_llm_ext import GenerationAttribution
from captum_llm_ext.model import Scorer, TokenRow
from captum_llm_ext.model.forward.memory import Memory, overhead
from captum_llm_ext.model.forward.schedule import distinct_positions, plan, plan_packed

RESULTS = Path(__file__).parent / "results"
P, T = 128, 32
GROUPS = 2


def beside_captum(runs: int) -> dict[str, Any]:
    model = llama()
    tokenizer, ids = texts(P + T)
    inp, target = prompt_of(tokenizer, ids[:P]), torch.tensor(ids[P:])
    captum = LLMAttribution(FeatureAblation(model), tokenizer)
    ours = GenerationAttribution(FeatureAblation(model), tokenizer)
    found: dict[str, torch.Tensor] = {}

    def groups(n: int) -> torch.Tensor:
        return (torch.arange(n) * GROUPS // n)[None]

    def ours_prompt() -> None:
        found["ours"] = ours.attribute(inp, target, output_unit=None).token_attr

    def one_pass() -> None:
        found["captum"] = captum.attribute(inp, target, forward_in_tokens=False).token_attr

    def grouped(**arguments: Any) -> None:
        captum.attribute(inp, target, feature_mask=groups(P), **arguments)

    def growing(n: int) -> None:
        longer = prompt_of(tokenizer, ids[:n])
        captum.attribute(
            longer, torch.tensor(ids[n : n + 1]), feature_mask=groups(n), forward_in_tokens=False
        )

    # Exactly the positions that cannot be shared, in batches of 16 rows.
    lengths = [P + T - 1, *(P + T - 1 - i for i in range(P))]
    batches = [(16, round(sum(lengths[i : i + 16]) / 16)) for i in range(1, P, 16)]
    batches.append((1, sum(lengths) - sum(b * n for b, n in batches)))
    inputs = [torch.randint(4, 32000, (b, n)) for b, n in batches]

    @torch.no_grad()
    def bare(kept: int) -> None:
        for one in inputs:
            model(input_ids=one, use_cache=False, logits_to_keep=kept)

    bare(0)  # warms up
    times = in_turn(
        {
            "ours, prompt": ours_prompt,
            "bare model": lambda: bare(0),
            "bare model, kept logits": lambda: bare(T),
            "captum, one pass": one_pass,
            "ours, prompt and output": lambda: ours.attribute(inp, target),
            "captum, token by token (3 of 129)": lambda: grouped(use_cached_outputs=False),
            "captum, default (3 of 129)": lambda: grouped(),
            f"captum, prompt of {P} (3 of 129)": lambda: growing(P),
            f"captum, prompt of {P + T - 1} (3 of 160)": lambda: growing(P + T - 1),
        },
        runs,
    )
    middle = {name: median(took) for name, took in times.items()}
    scale = (P + 1) / (GROUPS + 1)
    own, both = middle["ours, prompt"], middle["ours, prompt and output"]
    first, last = (
        middle[f"captum, prompt of {n} (3 of {n + 1})"] / (GROUPS + 1) for n in (P, P + T - 1)
    )
    rerun = sum((P + t + 1) * (first + (last - first) * t / (T - 1)) for t in range(T))
    ours_prompt()
    shared = counts()
    ours.attribute(inp, target)
    return {
        "model": "Llama, 8 layers, d=512, V=32,000",
        "sizes": {"P": P, "T": T, "F": P},
        "seconds": times,
        "largest_difference_from_captum": float((found["ours"] - found["captum"]).abs().max()),
        "ratios": {
            "captum, one pass per perturbation": middle["captum, one pass"] / own,
            "captum, token by token (extrapolated)": scale
            * middle["captum, token by token (3 of 129)"]
            / own,
            "captum, default, wrong numbers (extrapolated)": scale
            * middle["captum, default (3 of 129)"]
            / own,
            "prompt and output: captum on the growing prompt (extrapolated)": rerun / both,
        },
        "limit": {
            "over bare forwards on what cannot be shared": own / middle["bare model"],
            "the same with logits of the target only": own / middle["bare model, kept logits"],
        },
        "prompt": shared,
        "prompt_and_output": counts(),
    }


def permutations_of_groups() -> dict[str, Any]:
    """Positions that 25 orders of 32 groups take: a matter of counting."""
    draw = random.Random(0)
    per = P // 32
    ids = [draw.randrange(4, 32000) for _ in range(P + T - 1)]
    rows: dict[tuple[int, ...], None] = {}
    for _ in range(25):
        order = draw.sample(range(32), 32)
        for n in range(33):
            present = set(order[:n])
            prompt = [ids[i] if i // per in present else 3 for i in range(P)]
            rows[(*prompt, *ids[P:])] = None
    distinct = list(rows)
    lengths = [len(row) for row in distinct]
    model, device = llama(), torch.device("cpu")
    cost = overhead(model, device)
    memory = Memory(model, device, kept="positions", n_target=T, state_bytes=None)
    most_ids, most_rows = memory.most_packed(max(lengths), 0)
    ways = {
        "packed": plan_packed(
            distinct,
            overhead=cost,
            most_ids=most_ids,
            most_rows=most_rows,
            most_head=P - 1,
            chained=True,
        ),
        "padded": plan(
            distinct,
            [n - 2 for n in lengths],
            overhead=cost,
            most_padding=cost,
            most_rows=lambda longest, before: 4096 // (longest - before),
            most_head=P,
        ),
    }
    least = distinct_positions(distinct)
    computed = {name: root.positions(lengths) for name, root in ways.items()}
    return {
        "rows": len(rows),
        "overhead": cost,
        "positions_of_rows": sum(lengths),
        "positions_computed": computed["packed"],
        "positions_computed_padded": computed["padded"],
        "positions_of_a_perfect_tree": least,
        "ratio": computed["packed"] / least,
    }


def growth(runs: int) -> dict[str, Any]:
    """Exponents of the cost: log2 of what doubling does."""
    model = llama(4, 256, 8000)
    tokenizer, ids = texts(1024)

    def run(p: int, t: int, f: int) -> Callable[[], object]:
        inp, target = prompt_of(tokenizer, ids[:p]), torch.tensor(ids[p : p + t])
        ours = GenerationAttribution(FeatureAblation(model), tokenizer)
        mask = (torch.arange(p) * f // p)[None]
        return lambda: ours.attribute(inp, target, feature_mask=mask, output_unit=None)

    base = (128, 64, 64)
    doubled = {"T": (128, 128, 64), "F": (128, 64, 128), "P": (256, 64, 64)}
    times = in_turn(
        {"base": run(*base), **{name: run(*sizes) for name, sizes in doubled.items()}}, runs
    )
    start = median(times["base"])
    exponents = {name: math.log2(median(times[name]) / start) for name in doubled}
    return {
        "model": "Llama, 4 layers, d=256, V=8,000",
        "base": dict(zip("PTF", base, strict=True)),
        "seconds": times,
        "exponents": exponents,
    }


def peak_memory() -> dict[str, Any]:
    """Memory above the model's, in a process of its own."""
    out = subprocess.run(
        [sys.executable, __file__, "--peak"], capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def kilobytes(name: str) -> int:
    """What Linux says of this process's memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name + ":"))


def peak() -> None:
    torch.set_num_threads(1)
    model = llama(2, 256, 128000)
    draw = random.Random(0)
    p, t = 4096, 256
    ids = [draw.randrange(4, 128000) for _ in range(p + t)]
    prompts = [[*ids[: p - 1 - 512 * i], 3, *ids[p - 512 * i : p]] for i in range(8)]
    prompts += [ids[: 512 * i] + ids[512 * i + 64 : p] for i in range(8)]
    rows = [TokenRow((*q, *ids[p : p + t - 1]), range(len(q) - 1, len(q) - 1 + t)) for q in prompts]
    scorer = Scorer(model)
    # From here on: what making the model took is more than what is to be measured.
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    scorer.values(rows, torch.tensor(ids[p:]))
    most = kilobytes("VmHWM")
    print(
        json.dumps(
            {
                "sizes": {"P": p, "T": t, "V": 128000, "layers": 2, "rows": len(rows)},
                "GB_above_the_model": (most - before) * 1024 / 1e9,
                "positions_computed": scorer.n_positions,
                "positions_of_rows": scorer.n_row_positions,
            }
        )
    )


PARTS: dict[str, Callable[[int], Any]] = {
    "beside_captum": beside_captum,
    "permutations": lambda runs: permutations_of_groups(),
    "growth": growth,
    "peak_memory": lambda runs: peak_memory(),
    "beside_shap": beside_shap,
    "beside_inseq": beside_inseq,
}


def main(argv: list[str] | None = None) -> None:
    """Prints the ratios and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peak:
        peak()
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    attribution.Scorer = Counting
    path = RESULTS / "throughput.json"
    for name in arguments.part or PARTS:
        print(name, flush=True)
        result = PARTS[name](arguments.runs)
        if result is None:
            print("  left as it was: what it is measured beside is not installed")
            continue
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found = report.setdefault(f"threads_{arguments.threads}", {})
        found[name] = {**environment(seed=0), "unit": "processor seconds", "result": result}
        print(json.dumps({k: v for k, v in result.items() if k != "seconds"}, indent=1))
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
