"""Savings and errors of reduced precision and of a surrogate on a real model.

    python benchmarks/precision.py --model FOLDER [--part bare …] [--threads 1]

`FOLDER` is any checkpoint that transformers loads, such as SmolLM2-135M-Instruct (30 layers). Each
row of the JSON has what was predicted, what was measured, and at what error. Seconds are those of
the process on its processors; candidates run in turn in one process. Parts:

* ``bare``: forwards of the model in float32 and in bfloat16, at several lengths.
* ``leave_one_out``: the product in both, which shares beginnings and packs rows.
* ``two_levels``: Shapley values by the model alone, and with ``surrogate="bf16"``, against all
  coalitions of a game of ten features.
* ``many_features``: the same of 36 features, where the errors that are told are compared.
* ``solver``: what solving takes beside the model.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from captum.attr import FeatureAblation, KernelShap, ShapleyValues
from environment import environment
from measured import in_turn
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_llm_ext import GenerationAttribution, TextSegmentInput
from captum_llm_ext.attribution import sampling, two_levels
from captum_llm_ext.coalitions import (
    Scope,
    join_plans,
    plan_anchors,
    plan_pairs,
    solve_few_pairs,
    solve_kernel,
)
from captum_llm_ext.coalitions.two_levels import summed

RESULTS = Path(__file__).parent / "results" / "precision.json"
TEXT = (
    "Lake Baikal in Siberia is the deepest lake in the world. It holds about a fifth of the fresh "
    "water of the earth. The lake was first measured in 1837 by a party of surveyors. "
)
QUESTION = "Where is the deepest lake in the world?"
ANSWER = (
    " The deepest lake in the world is Lake Baikal in Siberia, and it holds about a fifth of the "
    "fresh water of the earth, they say."
)
SHORT = "The deepest lake is Baikal in Siberia. Where is it?"
SEEDS = 40
WORDS = 36
SIZES = (8, 12, 16, 24, 32)
Row = dict[str, Any]


class Subject:
    """A model in both types, and its tokenizer."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.fine, self.coarse = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            for dtype in (torch.float32, torch.bfloat16)
        )

    def target(self, text: str = ANSWER) -> torch.Tensor:
        """Its ids."""
        return torch.tensor(self.tokenizer(text)["input_ids"])

    def prompt(self, n_ids: int) -> str:
        """Some text of about so many ids that ends with the question."""
        text = QUESTION
        while len(self.tokenizer(text)["input_ids"]) < n_ids:
            text = TEXT + text
        return text


def bare(subject: Subject, runs: int) -> list[Row]:
    rows: list[Row] = []
    for n in (53, 250, 1000):
        ids = torch.randint(10, 40000, (max(1, 2000 // n), n))

        @torch.no_grad()
        def forward(model: Any, ids: torch.Tensor = ids) -> None:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

        forward(subject.fine)
        forward(subject.coarse)
        times = in_turn(
            {
                "float32": lambda: forward(subject.fine),
                "bfloat16": lambda: forward(subject.coarse),
            },
            runs,
        )
        took = {name: median(own) for name, own in times.items()}
        rows.append(
            {
                "item": f"bare forward of {n} ids, bfloat16 over float32",
                "predicted": "3.4 to 3.7 times as fast",
                "measured": took["float32"] / took["bfloat16"],
                "seconds": times,
            }
        )
    return rows


def leave_one_out(subject: Subject, runs: int, most: int = 3) -> list[Row]:
    rows: list[Row] = []
    attributions = {
        name: GenerationAttribution(FeatureAblation(model), subject.tokenizer)
        for name, model in (("float32", subject.fine), ("bfloat16", subject.coarse))
    }
    target = subject.target()
    for n, unit in ((53, "word"), (250, "sentence"), (1000, "sentence"))[:most]:
        found: dict[str, Any] = {}

        def once(name: str, n: int = n, unit: str = unit, found: Any = found) -> None:
            inp = TextSegmentInput(
                subject.prompt(n), subject.tokenizer, unit=unit, baselines="delete"
            )
            output_unit = "token" if n < 250 else None
            found[name] = attributions[name].attribute(inp, target, output_unit=output_unit)

        for name in attributions:
            once(name)  # the first look at a model
        times = in_turn({name: partial(once, name) for name in attributions}, runs)
        took = {name: median(own) for name, own in times.items()}
        apart = (found["bfloat16"].values - found["float32"].values).abs()
        rows.append(
            {
                "item": f"leave-one-out, prompt of {n} ids",
                "predicted": "3 times as fast in bfloat16",
                "measured": took["float32"] / took["bfloat16"],
                "error": {
                    "mean difference of values": float(apart.nanmean()),
                    "largest": float(apart.nan_to_num().max()),
                },
                "evaluations": found["float32"].n_evaluations,
                "targets": len(target),
                "seconds": times,
            }
        )
    return rows


def two_levels_exact(subject: Subject, runs: int) -> list[Row]:
    """Ten features, all of whose coalitions are scored."""
    target = subject.target(" It is in Siberia.")

    def attribute(attribution: Any, seed: int = 0, **arguments: Any) -> tuple[Any, float]:
        inp = TextSegmentInput(SHORT, subject.tokenizer, unit="word", baselines="delete")
        began = time.process_time()
        found = attribution.attribute(inp, target, output_unit=None, seed=seed, **arguments)
        return found, time.process_time() - began

    def of(method: Any, surrogate: Any = None) -> Any:
        return GenerationAttribution(method, subject.tokenizer, surrogate=surrogate)

    truth, _ = attribute(of(ShapleyValues(subject.fine)))
    spread = float(truth.token_attr.square().sum())
    only, _ = attribute(of(ShapleyValues(subject.coarse)))
    attributions = {
        "float32": of(KernelShap(subject.fine)),
        "bfloat16 alone": of(KernelShap(subject.coarse)),
        "two levels": of(KernelShap(subject.fine), "bf16"),
    }
    ways = {
        name: partial(attribute, attribution, n_samples=160)
        for name, attribution in attributions.items()
    }
    attribute(attributions["two levels"], n_samples=40)  # makes the copy, and looks at it
    errors: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    corrected: list[int] = []
    for seed in range(runs):
        for name, way in ways.items():
            found, took = way(seed=seed)
            errors[name].append(
                float((found.token_attr - truth.token_attr).square().sum()) / spread
            )
            seconds[name].append(took)
            if name == "two levels":
                corrected.append(found.provenance["surrogate"]["corrected_by"])
    for name, own in played(truth, only).items():
        errors[name] = own
    mean = {name: sum(own) / len(own) for name, own in errors.items()}
    took = {name: median(own) for name, own in seconds.items()}
    return [
        {
            "item": "two levels, ten features, time at equal error",
            "predicted": "2.5 times less",
            # Squared errors fall with the number of evaluations.
            "measured": took["float32"]
            * mean["160 of float32"]
            / (took["two levels"] * mean[f"160 of bfloat16, {nearest(corrected)} of both"]),
            "error": mean,
            "error_of_all_coalitions_in_bfloat16": float(
                (only.token_attr - truth.token_attr).square().sum()
            )
            / spread,
            "corrected_by": corrected,
            "squared_errors": errors,
            "seconds": seconds,
        }
    ]


def played(truth: Any, only: Any) -> dict[str, list[float]]:
    """Relative squared errors over many samples of coalitions, from the values of all of them."""
    masks = truth.masks
    n = masks.shape[1] - (truth.output_attr.shape[1] if truth.output_attr is not None else 0)
    codes = 2 ** torch.arange(n)
    tables = []
    for one in (truth, only):
        table = torch.full((2**n, one.values.shape[1]), torch.nan, dtype=torch.float64)
        table[(one.masks[:, :n].long() * codes).sum(1)] = one.values.double()
        tables.append(table)
    fine, coarse = tables
    scope = Scope.of_all(fine.shape[1], n)
    exact = truth.token_attr.double()

    def sampled(size: int, seed: int) -> tuple[Any, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        plan = join_plans([plan_anchors(n), plan_pairs(n, size, generator=generator)])
        return plan, (plan.masks.long() * codes).sum(1)

    found: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        plan, rows = sampled(160, seed)
        answers = {
            "160 of float32": solve_kernel(plan, fine[rows], scope),
            "160 of bfloat16": solve_kernel(plan, coarse[rows], scope),
        }
        for size in SIZES:
            few, both = sampled(size, 1000 + seed)
            missed = solve_few_pairs(few, fine[both] - coarse[both], scope)
            name = f"160 of bfloat16, {size} of both"
            answers[name] = summed([answers["160 of bfloat16"], missed])
        for name, answer in answers.items():
            off = (answer.attributions - exact).square().sum() / exact.square().sum()
            found.setdefault(name, []).append(round(float(off), 6))
    return found


def nearest(corrected: list[int]) -> int:
    """The most frequent of the sizes that were used."""
    return min(SIZES, key=lambda size: abs(size - median(corrected)))


def many_features(subject: Subject, runs: int) -> list[Row]:
    """More features than can be enumerated: reported errors over the seeds."""
    text, target = subject.prompt(53), subject.target()
    attributions = {
        name: GenerationAttribution(
            KernelShap(subject.fine), subject.tokenizer, surrogate=surrogate
        )
        for name, surrogate in (("float32", None), ("two levels", "bf16"))
    }

    def once(name: str, seed: int, n_samples: int = 8 * WORDS) -> Any:
        inp = TextSegmentInput(text, subject.tokenizer, unit="word", baselines="delete")
        return attributions[name].attribute(
            inp, target, output_unit=None, n_samples=n_samples, seed=seed
        )

    found: dict[str, list[Any]] = {name: [] for name in attributions}
    seconds: dict[str, list[float]] = {name: [] for name in attributions}
    for name in attributions:
        once(name, 0, 2 * WORDS)  # the first look at both models, and the copy
    for seed in range(runs):
        for name in attributions:
            began = time.process_time()
            found[name].append(once(name, seed))
            seconds[name].append(time.process_time() - began)
    squares = {
        name: sum(float(one.token_attr_se.square().sum()) for one in own) / len(own)
        for name, own in found.items()
    }
    took = {name: median(own) for name, own in seconds.items()}
    apart = [
        float((two.token_attr - one.token_attr).norm())
        for one, two in zip(found["float32"], found["two levels"], strict=True)
    ]
    both = (squares["float32"] + squares["two levels"]) ** 0.5
    return [
        {
            "item": f"two levels, {found['float32'][0].token_attr.shape[1]} words, "
            f"{8 * WORDS} coalitions",
            "predicted": "2.5 times less time at equal error",
            "measured": took["float32"]
            * squares["float32"]
            / (took["two levels"] * squares["two levels"]),
            "times_less": took["float32"] / took["two levels"],
            "error": {
                "squared standard errors": squares,
                "difference over its standard error": median(apart) / both,
            },
            "surrogate": {
                key: value
                for key, value in found["two levels"][0].provenance["surrogate"].items()
                if isinstance(value, int | float)
            },
            "seconds": seconds,
        }
    ]


def solver(subject: Subject, runs: int) -> list[Row]:
    """Time of the solver relative to a whole attribution."""
    del runs
    taken = 0.0
    solved = sampling.solved

    def timed(*given: Any) -> Any:
        nonlocal taken
        began = time.process_time()
        found = solved(*given)
        taken += time.process_time() - began
        return found

    sampling.solved = two_levels.solved = timed
    rows: list[Row] = []
    try:
        for name, model in (("float32", subject.fine), ("bfloat16", subject.coarse)):
            taken = 0.0
            attribution = GenerationAttribution(KernelShap(model), subject.tokenizer)
            inp = TextSegmentInput(
                subject.prompt(53), subject.tokenizer, unit="word", baselines="delete"
            )
            began = time.process_time()
            attribution.attribute(inp, subject.target(), output_unit=None, n_samples=576)
            whole = time.process_time() - began
            rows.append(
                {
                    "item": f"solver, 576 coalitions, {name}",
                    "predicted": "at most 2 % of the model's time",
                    "measured": taken / (whole - taken),
                    "seconds": {"solver": taken, "whole": whole},
                }
            )
    finally:
        sampling.solved = two_levels.solved = solved
    return rows


PARTS: dict[str, Callable[[Subject, int], list[Row]]] = {
    "bare": bare,
    "leave_one_out": leave_one_out,
    "leave_one_out_short": partial(leave_one_out, most=1),
    "two_levels": two_levels_exact,
    "many_features": many_features,
    "solver": solver,
}


def main() -> None:
    """Runs the parts and writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, action="append")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    subject = Subject(arguments.model)
    about = {
        "layers": subject.fine.config.num_hidden_layers,
        "parameters": sum(p.numel() for p in subject.fine.parameters()),
    }
    for name in arguments.part or PARTS:
        rows = PARTS[name](subject, arguments.runs)
        report = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        # Not the folder, which is this machine's.
        report[name] = {
            **environment(seed=0),
            "command": f"python benchmarks/precision.py --model FOLDER --part {name}",
            "unit": "processor seconds",
            "model": about,
            "rows": rows,
        }
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        for row in rows:
            print(json.dumps({k: v for k, v in row.items() if k != "seconds"}), flush=True)


if __name__ == "__main__":
    main()
