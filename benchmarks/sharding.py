"""How well processes share the work, what that costs one alone, and what kills leave behind.

Writes ``results/sharding.json``. On a quiet machine with two cores: about five minutes.
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
from pathlib import Path
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
DATASET = 1000
KILLS = 3


def made() -> tuple[Any, Any]:
    """A Llama of 3 million parameters with random weights, and the demo's tokenizer."""
    logging.disable_progress_bar()
    _, tokenizer, _ = load_demo()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def attribute(model: Any, tokenizer: Any, accelerator: Any, rows: int) -> Any:
    words = "Dave Ann lives in Palm Coast Austin FL TX and is a lawyer nurse".split()
    draw = random.Random(0)
    inp = TextSegmentInput(" ".join(draw.choices(words, k=WORDS)), tokenizer, "word")
    attribution = GenerationAttribution(KernelShap(model), tokenizer, accelerator=accelerator)
    target = tokenizer.encode(" poker, surfing and history.", add_special_tokens=False)
    return attribution.attribute(inp, target, n_samples=rows, output_unit=None)


def worker(out: Path, rows: int) -> None:
    """One of the processes: the time that all take from a common start."""
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model, tokenizer = made()
    attribute(model, tokenizer, accelerator, 120)
    found = []
    for _ in range(3):
        accelerator.wait_for_everyone()
        wall, cpu = time.perf_counter(), time.process_time()
        result = attribute(model, tokenizer, accelerator, rows)
        found.append([time.perf_counter() - wall, time.process_time() - cpu])
    report = {
        "seconds": found,
        "rows": result.provenance["rows_by_process"],
        "n": result.n_evaluations,
    }
    torch.save([result.masks, result.values], out / f"{accelerator.process_index}.pt")
    (out / f"{accelerator.process_index}.json").write_text(json.dumps(report))


def started(n: int, rows: int) -> tuple[list[Any], list[Any]]:
    """Runs the workers; their reports and their numbers."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}"]
        command += [f"--master_port={port}", __file__, "--worker", folder, "--rows", str(rows)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        reports = [json.loads((Path(folder) / f"{i}.json").read_text()) for i in range(n)]
        numbers = [torch.load(Path(folder) / f"{i}.pt") for i in range(n)]
    return reports, numbers


def scaling(rows: int) -> dict[str, Any]:
    """Two processes beside one, with a thread each."""
    found: dict[str, Any] = {}
    numbers = {}
    for n in (1, 2):
        reports, numbers[n] = started(n, rows)
        walls = [
            max(times)
            for times in zip(*([t[0] for t in r["seconds"]] for r in reports), strict=True)
        ]
        found[f"{n} processes"] = {
            "rows": reports[0]["n"],
            "seconds": statistics.median(walls),
            "all seconds": walls,
            "processor seconds": [[t[1] for t in r["seconds"]] for r in reports],
            "share of rows": [count / reports[0]["n"] for count in reports[0]["rows"]],
        }
    one, two = (found[f"{n} processes"]["seconds"] for n in (1, 2))
    found["speed-up"] = one / two
    masks, values = numbers[1][0]
    found["same coalitions"] = all(torch.equal(masks, other[0]) for other in numbers[2])
    found["largest difference of values"] = max(
        float((values - other[1]).abs().max()) for other in numbers[2]
    )
    return found


def overhead(rows: int) -> dict[str, Any]:
    """An accelerator of one process beside none, in turn, in one process."""
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
    """A file of prompts, killed at random and started again until it is through."""
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
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        worker(arguments.worker, arguments.rows)
        return
    found = {"environment": environment(seed=0), "scaling": scaling(arguments.rows)}
    found["overhead"] = overhead(arguments.rows // 4)
    found["kills"] = kills()
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
