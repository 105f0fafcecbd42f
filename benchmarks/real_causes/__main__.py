"""Share of natural prompts whose strongest word is the true cause, per absence and method.

    PYTHONPATH=benchmarks python -m real_causes --model smollm2 --model gemma3

`--model` names one of `checkpoints.PACKAGES`, or any causal language model of transformers. Each
prompt is verified on the model first; those that it answers wrong say nothing and are left out.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from captum.attr import FeatureAblation, KernelShap
from environment import environment

from captum_llm_ext import CorpusBaselines, GenerationAttribution, ModelBaselines, TextSegmentInput
from real_causes import checkpoints
from real_causes.judged import Case, case, judge, paired, wilson
from real_causes.prompts import HALVES

EVALUATIONS_PER_WORD = 8
METHODS: dict[str, tuple[Callable[[Any], Any], Callable[[int], dict[str, int]]]] = {
    "leave-one-out": (FeatureAblation, lambda _: {}),
    "Shapley, kernel": (KernelShap, lambda n: {"n_samples": EVALUATIONS_PER_WORD * n}),
}


def absences(tokenizer: Any) -> dict[str, Any]:
    """What stands for an absent word."""
    return {
        "deletion": None,
        "end of text": tokenizer.eos_token_id,
        "`ModelBaselines`": ModelBaselines(),
        "`CorpusBaselines`, unrelated news": CorpusBaselines(
            checkpoints.unrelated_news(), min_candidates=0
        ),
    }


def strongest(model: Any, tokenizer: Any, one: Case, baselines: Any, method: str) -> dict[str, Any]:
    """What one way of attributing makes of one prompt."""
    kind, arguments = METHODS[method]
    inp = TextSegmentInput(one.prompt.text, tokenizer, "word", baselines=baselines)
    result = GenerationAttribution(kind(model), tokenizer).attribute(
        inp, one.target, output_unit=None, **arguments(inp.n_features)
    )
    found = judge(one.prompt, inp, result.seq_attr)
    return asdict(found) | {"evaluations": result.n_evaluations, "words": inp.n_features}


def of_model(
    name: str, dtype: torch.dtype, chosen: Sequence[str], methods: Sequence[str]
) -> dict[str, Any]:
    """All prompts that a model answers right.

    Args:
        name: Of the model.
        dtype: What it computes in.
        chosen: Names of absences; none: all.
        methods: Names of methods; none: all.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = checkpoints.folder(name)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(where)
    cases = {half: _cases(model, tokenizer, prompts) for half, prompts in HALVES.items()}
    rows: list[dict[str, Any]] = []
    for absence, baselines in absences(tokenizer).items():
        if chosen and absence not in chosen:
            continue
        for method in methods or METHODS:
            attribute = partial(strongest, model, tokenizer, baselines=baselines, method=method)
            found = {half: [attribute(one) for one in of] for half, of in cases.items()}
            rows.append({"absence": absence, "method": method} | _summary(found))
            print(_line(name, rows[-1]), file=sys.stderr, flush=True)
    return {
        "model": name,
        "asked": {half: len(prompts) for half, prompts in HALVES.items()},
        "prompts": {half: [one.prompt.text for one in of] for half, of in cases.items()},
        "kinds": {half: [one.prompt.kind for one in of] for half, of in cases.items()},
        "rows": rows,
        "paired": _pairs(rows),
    }


def _cases(model: Any, tokenizer: Any, prompts: Sequence[Any]) -> list[Case]:
    found = (case(model, tokenizer, prompt) for prompt in prompts)
    return [one for one in found if one is not None]


def _summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Shares with their intervals, of both halves and of each."""
    told: dict[str, Any] = {"judgements": found}
    everything = [one for of in found.values() for one in of]
    for name, of in {"all": everything, **found}.items():
        n, n_cause = len(of), sum(one["is_cause"] for one in of)
        n_right = sum(one["is_right"] for one in of)
        told[name] = {
            "n": n,
            "cause": n_cause / max(n, 1),
            "interval": wilson(n_cause, n),
            "cause_or_selector": n_right / max(n, 1),
        }
    return told


def _pairs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each absence beside deletion, by the same method on the same prompts."""
    of = {(row["absence"], row["method"]): _causes(row) for row in rows}
    return [
        {"absence": absence, "method": method, "p_beside_deletion": paired(own, deleted)}
        for (absence, method), own in of.items()
        if absence != "deletion" and (deleted := of.get(("deletion", method)))
    ]


def _causes(row: dict[str, Any]) -> list[bool]:
    return [one["is_cause"] for of in row["judgements"].values() for one in of]


def _line(model: str, row: dict[str, Any]) -> str:
    shares = ", ".join(f"{half} {row[half]['cause']:.2f}" for half in ("all", *HALVES))
    return f"{model}: {row['absence']}, {row['method']}: {shares}"


def main() -> None:
    """Writes the tables as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--absence", action="append", default=[], help="only these")
    parser.add_argument("--method", action="append", default=[], choices=METHODS, help="only these")
    parser.add_argument("--dtype", default="bfloat16", help="enough for ranking")
    parser.add_argument("--threads", type=int, default=1)
    default = Path(__file__).parent.parent / "results" / "real_causes.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    report = environment(seed=0, dtype=options.dtype)
    report["models"] = [
        of_model(name, dtype, options.absence, options.method) for name in options.model
    ]
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
