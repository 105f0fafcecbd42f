"""Cost of attribution relative to captum and to the bare model, and its growth.

    python benchmarks/throughput.py [--threads 1] [--runs 5] [--part beside_captum …]
    python benchmarks/throughput.py --model FOLDER [--length 53 …] [--runs 1]

With ``--model``, the rows beside captum are measured on a checkpoint (`FOLDER`, such as
SmolLM2-135M-Instruct: 30 layers and a vocabulary of 49,152), at prompts of several lengths.

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
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
from environment import environment
from measured import Counting, counts, forget_peak, in_turn, kilobytes, llama, prompt_of, texts
from peers import beside_inseq, beside_shap
from transformers import AutoModelForCausalLM, AutoTokenizer

import captum_llm_ext.attribution.generation as attribution
from captum_llm_ext import GenerationAttribution
from captum_llm_ext.model import Scorer, TokenRow
from captum_llm_ext.model.forward.memory import Memory, overhead
from captum_llm_ext.model.forward.schedule import distinct_positions, plan, plan_packed

RESULTS = Path(__file__).parent / "results"
P, T = 128, 32
GROUPS = 2
CHECKPOINT_T, CHECKPOINT_F = 16, 32
PROSE = (
    "Lake Baikal in Siberia is the deepest lake in the world. It holds about a fifth of the fresh "
    "water of the earth, and was first measured in 1837 by a party of surveyors from Irkutsk. "
)
LADDERS = {
    "P": ({"T": 16, "F": 16}, (256, 1000, 4000)),
    "F": ({"P": 512, "T": 16}, (64, 180, 500)),
    "T": ({"P": 128, "F": 32}, (25, 70, 200)),
}


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

    bare = bare_forwards(model, [P + T - 1, *(P + T - 1 - i for i in range(P))])
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


def bare_forwards(model: Any, lengths: list[int]) -> Callable[[int], None]:
    """The model alone on as many positions: rows of these lengths, in batches of 16.

    Args:
        lengths: The whole row, then what each other row does not share with it.

    Returns:
        Runs it, with logits of so many last positions (0: of all).
    """
    batches = [
        (len(some), round(sum(some) / len(some)))
        for some in (lengths[i : i + 16] for i in range(1, len(lengths), 16))
    ]
    batches.append((1, max(1, sum(lengths) - sum(b * n for b, n in batches))))
    inputs = [torch.randint(4, model.config.vocab_size, size) for size in batches]

    @torch.no_grad()
    def bare(kept: int) -> None:
        for one in inputs:
            model(input_ids=one, use_cache=False, logits_to_keep=kept)

    return bare


def on_checkpoint(folder: str, n_prompt: int, runs: int) -> dict[str, Any]:
    """The rows beside captum on a checkpoint, for a prompt of so many ids in 32 groups."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(PROSE * (1 + (n_prompt + CHECKPOINT_T) // 40))
    ids, target = ids[:n_prompt], torch.tensor(ids[n_prompt : n_prompt + CHECKPOINT_T])
    inp = TextTokenInput(tokenizer.decode(ids), tokenizer, baselines=ids[0])
    captum = LLMAttribution(FeatureAblation(model), tokenizer)
    ours = GenerationAttribution(FeatureAblation(model), tokenizer)
    found: dict[str, torch.Tensor] = {}

    def groups(n: int) -> torch.Tensor:
        return (torch.arange(n_prompt) * n // n_prompt)[None]

    mask = groups(CHECKPOINT_F)
    firsts = [int((mask[0] == group).nonzero()[0]) for group in range(CHECKPOINT_F)]

    def ours_prompt() -> None:
        result = ours.attribute(inp, target, output_unit=None, feature_mask=mask)
        found["ours"] = result.token_attr

    def one_pass() -> None:
        result = captum.attribute(inp, target, feature_mask=mask, forward_in_tokens=False)
        found["captum"] = result.token_attr

    row = n_prompt + CHECKPOINT_T - 1
    bare = bare_forwards(model, [row, *(row - first for first in firsts)])
    ours_prompt()  # the first look at the model
    times = in_turn(
        {
            "ours, prompt": ours_prompt,
            "bare model": lambda: bare(0),
            "bare model, kept logits": lambda: bare(CHECKPOINT_T),
            "ours, prompt and output": lambda: ours.attribute(inp, target, feature_mask=mask),
            "captum, one pass": one_pass,
            "captum, token by token (3 of 33)": lambda: captum.attribute(
                inp, target, feature_mask=groups(GROUPS), use_cached_outputs=False
            ),
        },
        runs,
    )
    middle = {name: median(took) for name, took in times.items()}
    own = middle["ours, prompt"]
    scale = (CHECKPOINT_F + 1) / (GROUPS + 1)
    slow = scale * middle["captum, token by token (3 of 33)"]
    return {
        "model": {"layers": model.config.num_hidden_layers, "vocabulary": model.config.vocab_size},
        "sizes": {"P": n_prompt, "T": CHECKPOINT_T, "F": CHECKPOINT_F},
        "seconds": times,
        "largest_difference_from_captum": float((found["ours"] - found["captum"]).abs().max()),
        "largest_attribution": float(found["captum"].abs().max()),
        "ratios": {
            "captum, one pass per perturbation": middle["captum, one pass"] / own,
            "captum, token by token (extrapolated)": slow / own,
        },
        "limit": {
            "over bare forwards on what cannot be shared": own / middle["bare model"],
            "the same with logits of the target only": own / middle["bare model, kept logits"],
        },
    }


def permutations_of_groups() -> dict[str, Any]:
    """Positions of 25 orders of 32 groups, by counting."""
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
    """Exponents of the cost as one size grows and the others are constant."""
    model = llama(4, 256, 8000)
    tokenizer, ids = texts(5000)

    def run(sizes: dict[str, int]) -> Callable[[], object]:
        p, t, f = sizes["P"], sizes["T"], sizes["F"]
        inp, target = prompt_of(tokenizer, ids[:p]), torch.tensor(ids[p : p + t])
        ours = GenerationAttribution(FeatureAblation(model), tokenizer)
        mask = (torch.arange(p) * f // p)[None]
        return lambda: ours.attribute(inp, target, feature_mask=mask, output_unit=None)

    found: dict[str, Any] = {}
    for name, (others, ladder) in LADDERS.items():
        ways = {str(n): run({**others, name: n}) for n in ladder}
        ways[str(ladder[0])]()  # warms up
        times = in_turn(ways, runs)
        middle = [median(times[str(n)]) for n in ladder]
        found[name] = {
            "others": others,
            "seconds": times,
            "exponents": [
                math.log(middle[i + 1] / middle[i]) / math.log(ladder[i + 1] / ladder[i])
                for i in range(len(ladder) - 1)
            ],
        }
    return {"model": "Llama, 4 layers, d=256, V=8,000", **found}


def peak_memory() -> dict[str, Any]:
    """Memory above the model's, in a process of its own."""
    out = subprocess.run(
        [sys.executable, __file__, "--peak"], capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout.splitlines()[-1])


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
    before = forget_peak()
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
    parser.add_argument("--model", metavar="FOLDER")
    parser.add_argument("--length", type=int, action="append", help="ids of the prompt")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peak:
        peak()
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    attribution.Scorer = Counting
    path = RESULTS / "throughput.json"
    parts = {name: PARTS[name] for name in arguments.part or PARTS}
    if arguments.model:
        parts = {
            f"checkpoint, prompt of {n}": partial(on_checkpoint, arguments.model, n)
            for n in arguments.length or (53, 250, 1000)
        }
    for name, part in parts.items():
        print(name, flush=True)
        result = part(arguments.runs)
        if result is None:
            print("  left as it was: what it is measured beside is not installed")
            continue
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found = report.setdefault(f"threads_{arguments.threads}", {})
        about = {**environment(seed=0), "unit": "processor seconds"}
        if arguments.model:  # not the folder, which is this machine's
            about["command"] = "python benchmarks/throughput.py --model FOLDER"
        found[name] = {**about, "result": result}
        print(json.dumps({k: v for k, v in result.items() if k != "seconds"}, indent=1))
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
