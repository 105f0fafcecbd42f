"""Speed-up by processes, their overhead, and recovery after kills.

Writes ``results/sharding.json``. On a quiet machine with two cores: about ten minutes, less with
``--only scaling --size small``. Speed-ups are told in seconds, which need a machine that does
nothing else, and in processor seconds, which do not.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from captum.attr import KernelShap
from environment import environment
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from captum_llm_ext import (
    GenerationAttribution,
    GenerationAttributionResult,
    TextSegmentInput,
    load_demo,
)

RESULTS = Path(__file__).parent / "results" / "sharding.json"
ROWS = 2040
WORDS = 60
# Hidden size and layers; and of so many batches one is run for the machine's own limit.
SIZES = {"small": (256, 4), "larger": (512, 6)}
BARE = {"small": 6, "larger": 24}
REPEATS = {"small": 5, "larger": 2}
DATASET = 1000
KILLS = 3


def made(size: str = "small") -> tuple[Any, Any]:
    """A Llama with random weights, of 3 or 19 million parameters, and the demo's tokenizer."""
    logging.disable_progress_bar()
    _, tokenizer, _ = load_demo()
    torch.manual_seed(0)
    hidden, layers = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def attribute(model: Any, tokenizer: Any, accelerator: Any, rows: int) -> Any:
    words = "Dave Ann lives in Palm Coast Austin FL TX and is a lawyer nurse".split()
    draw = random.Random(0)
    inp = TextSegmentInput(
        " ".join(draw.choices(words, k=WORDS)), tokenizer, "word", baselines="delete"
    )
    attribution = GenerationAttribution(KernelShap(model), tokenizer, accelerator=accelerator)
    target = tokenizer.encode(" poker, surfing and history.", add_special_tokens=False)
    return attribution.attribute(inp, target, n_samples=rows, output_unit=None)


def shapes_of(model: Any, attributes: Callable[[], Any]) -> list[torch.Size]:
    """The batches that a model is called with."""
    found: list[torch.Size] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: found.append(given["input_ids"].shape), with_kwargs=True
    )
    attributes()
    hook.remove()
    return found


@torch.no_grad()
def forwards(model: Any, shapes: list[torch.Size]) -> None:
    """Plain forwards of batches of these shapes."""
    for shape in shapes:
        ids = torch.zeros(shape, dtype=torch.long)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)


def worker(out: Path, rows: int, size: str, repeats: int) -> None:
    """One of two processes; each task is done by one alone and by both, alternately.

    While the first works alone the other waits at a collective, which takes no processor time.
    """
    from accelerate import Accelerator

    torch.set_num_threads(1)
    both = Accelerator(cpu=True)
    model, tokenizer = made(size)
    first = both.process_index == 0
    # What a script that was started on one process has.
    alone = SimpleNamespace(num_processes=1, process_index=0)
    warnings.filterwarnings("ignore", "the accelerator reports one process")
    shapes = shapes_of(model, lambda: attribute(model, tokenizer, alone, rows))[:: BARE[size]]
    result: dict[str, Any] = {}

    def shared(name: str, accelerator: Any) -> None:
        result[name] = attribute(model, tokenizer, accelerator, rows)

    ways: dict[str, tuple[bool, Callable[[], None]]] = {
        "forwards of one": (first, lambda: forwards(model, shapes)),
        "forwards of two, each all": (True, lambda: forwards(model, shapes)),
        "one process": (first, lambda: shared("one", alone)),
        "two processes": (True, lambda: shared("two", both)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (does, function) in ways.items():
            both.wait_for_everyone()
            wall, cpu = time.perf_counter(), time.process_time()
            if does:
                function()
                found = (time.perf_counter() - wall, time.process_time() - cpu)
                times[name].append(found)
    two = result["two"]
    report = {"times": times, "rows": two.provenance["rows_by_process"], "n": two.n_evaluations}
    (out / f"{both.process_index}.json").write_text(json.dumps(report))
    numbers = [[r.masks, r.values, r.full_attr] for r in result.values()]
    torch.save(numbers, out / f"{both.process_index}.pt")


def scaling(rows: int, size: str, repeats: int) -> dict[str, Any]:
    """Two processes beside one, a thread each, and the speed-up that the machine allows."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        command += [f"--master_port={port}", __file__, "--worker", folder, "--size", size]
        command += ["--rows", str(rows), "--repeats", str(repeats)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        reports = [json.loads((Path(folder) / f"{i}.json").read_text()) for i in range(2)]
        numbers = [n for i in range(2) for n in torch.load(Path(folder) / f"{i}.pt")]
    times = {
        name: [r["times"][name] for r in reports if r["times"][name]]
        for name in reports[0]["times"]
    }
    # Of two processes the later one counts; processor time is that of work alone, whoever else
    # has the machine, and shows what processes that run at the same time cost one another.
    found: dict[str, Any] = {}
    for kind, which in (("seconds", 0), ("processor seconds", 1)):
        slowest = {
            name: [max(t[which] for t in turn) for turn in zip(*own, strict=True)]
            for name, own in times.items()
        }
        one, two, alone, shared = slowest.values()
        found[kind] = {
            "all": slowest,
            "median": {name: statistics.median(own) for name, own in slowest.items()},
            "speed-up": statistics.median(a / b for a, b in zip(alone, shared, strict=True)),
            "two independent processes, no machinery": statistics.median(
                2 * a / b for a, b in zip(one, two, strict=True)
            ),
        }
    masks, values, attributions = numbers[0]
    return {
        "parameters": sum(p.numel() for p in made(size)[0].parameters()),
        "rows": reports[0]["n"],
        "share of rows": [count / reports[0]["n"] for count in reports[0]["rows"]],
        **found,
        "same coalitions": all(torch.equal(masks, other[0]) for other in numbers),
        "largest difference of values": max(
            float((values - other[1]).abs().max()) for other in numbers
        ),
        "largest difference of attributions": max(
            float((attributions - other[2]).abs().max()) for other in numbers
        ),
    }


def overhead(rows: int) -> dict[str, Any]:
    """An accelerator of one process beside none, alternately in one process."""
    from accelerate import Accelerator

    model, tokenizer = made()
    accelerator = Accelerator(cpu=True)
    times: dict[str, list[float]] = {"none": [], "one process": []}
    for given in (None, accelerator):
        attribute(model, tokenizer, given, 120)
    for turn in range(6):
        ways = [("none", None), ("one process", accelerator)]
        for name, given in ways if turn % 2 else reversed(ways):
            start = time.process_time()
            attribute(model, tokenizer, given, rows)
            times[name].append(time.process_time() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratios = [b / a for a, b in zip(times["none"], times["one process"], strict=True)]
    return {"processor seconds": medians, "all": times, "ratio": statistics.median(ratios)}


def kills() -> dict[str, Any]:
    """A file of prompts, killed at random and restarted until it is complete."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [
            json.dumps({"prompt": f"Dave {i} lives in Palm Coast, FL and is a lawyer. He", "id": i})
            for i in range(DATASET)
        ]
        (folder / "prompts.jsonl").write_text("\n".join(lines))
        out = folder / "results"
        command = [sys.executable, "-m", "captum_llm_ext", "attribute", "--model", "demo"]
        command += ["--input", str(folder / "prompts.jsonl"), "--out", str(out), "--quiet"]
        command += ["--method", "ablation", "--max-new-tokens", "4"]
        settings: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        draw = random.Random(0)
        after = []
        for _ in range(KILLS):
            before = len(list(out.glob("*.safetensors"))) if out.exists() else 0
            process = subprocess.Popen(command, **settings)
            while len(list(out.glob("*.safetensors"))) == before and process.poll() is None:
                time.sleep(0.02)
            time.sleep(draw.uniform(0.5, 4))
            process.kill()
            process.communicate()
            after.append(len(list(out.glob("*.safetensors"))))
        last = subprocess.run(command, check=False, **settings)
        files = sorted(out.glob("*.safetensors"))
        results = [GenerationAttributionResult.load(path) for path in files]
        numbers = [result.provenance["record"]["number"] for result in results]
        return {
            "records": DATASET,
            "results after each kill": after,
            "last run": last.stdout.strip(),
            "status": last.returncode,
            "files": len(files),
            "distinct records": len(set(numbers)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--size", choices=SIZES, default=None, help="of the model; default: both")
    parser.add_argument("--repeats", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("scaling", "overhead", "kills"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        worker(arguments.worker, arguments.rows, arguments.size, arguments.repeats)
        return
    found: dict[str, Any] = {}
    if arguments.only and arguments.out.exists():
        found = json.loads(arguments.out.read_text())
    found["environment"] = environment(seed=0)
    if arguments.only in (None, "scaling"):
        sizes = [arguments.size] if arguments.size else list(SIZES)
        found["scaling"] = {size: scaling(arguments.rows, size, REPEATS[size]) for size in sizes}
    if arguments.only in (None, "overhead"):
        found["overhead"] = overhead(arguments.rows // 4)
    if arguments.only in (None, "kills"):
        found["kills"] = kills()
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
