"""Share of natural prompts whose strongest word is the true cause, per absence and method.

    PYTHONPATH=benchmarks python -m real_causes --model smollm2 --model gemma3

`--model` names one of `checkpoints.PACKAGES`, or any causal language model of transformers (a
folder or a name). Each prompt is verified on the model first; those that it answers wrong say
nothing and are left out. What was measured is kept in `--cache`: a run goes on where it was ended,
and measures anew only what `--again` names.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from environment import environment

from real_causes.measured import ABSENCES, INSIDE, METHODS, NOTHING, Measured, makes_sense
from real_causes.prompts import HALVES
from real_causes.table import pairs, row

RESULTS = Path(__file__).parent.parent / "results" / "real_causes.json"
CACHE = Path.home() / ".cache" / "captum_llm_ext" / "real_causes"


def of_model(
    measured: Measured,
    absences: Sequence[str],
    methods: Sequence[str],
    targets: Sequence[str],
    at_most: int | None = None,
) -> dict[str, Any]:
    """The prompts that a model answers correctly.

    Args:
        measured: The model.
        absences: Names of absences.
        methods: Names of methods.
        targets: Of `attr_target`.
        at_most: So many prompts of each half, of all kinds alike.
    """
    name = Path(measured.name).name
    verified = {
        half: [(p, answer) for p in prompts if (answer := measured.answer(p)) is not None]
        for half, prompts in HALVES.items()
    }
    answered = {half: of[:at_most] for half, of in verified.items()}
    rows: list[dict[str, Any]] = []
    for method in methods:
        for absence in absences:
            if not makes_sense(method, absence):
                continue
            found = {
                half: [(p, measured.attribution(p, ids, absence, method, targets)) for p, ids in of]
                for half, of in answered.items()
            }
            for target in targets:
                named = {"absence": absence, "method": method, "attr_target": target}
                rows.append(named | row(found, target))
                shares = ", ".join(f"{h} {rows[-1][h]['cause']:.2f}" for h in ("all", *HALVES))
                print(f"{name}: {target}, {method}, {absence}: {shares}", file=sys.stderr)
    return {
        "model": name,
        "asked": {half: len(prompts) for half, prompts in HALVES.items()},
        "verified": {half: len(of) for half, of in verified.items()},
        "prompts": {half: [prompt.text for prompt, _ in of] for half, of in answered.items()},
        "rows": rows,
        "paired": pairs(rows),
    }


def show(measured: Measured, n: int, absence: str, targets: Sequence[str]) -> None:
    """Prints replacements of words of some prompts, and attributions of the words."""
    for prompt in [prompt for half in HALVES.values() for prompt in half[:n]]:
        answer = measured.answer(prompt)
        if answer is None:
            continue
        run = measured.attribution(prompt, answer, absence, METHODS[0], targets)
        print(f"\n{prompt.text!r} -> {prompt.answer!r}, because of {prompt.cause!r}")
        for i, (start, stop) in enumerate(run["spans"]):
            values = " ".join(f"{run['attributions'][target][i]:+6.2f}" for target in targets)
            word = prompt.text[start:stop].strip()
            print(f"  {word:12} {values}  {(run['replacements'] or [''] * (i + 1))[i]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the tables as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--absence", action="append", choices=ABSENCES, help="only these")
    parser.add_argument("--method", action="append", choices=METHODS, help="only these")
    parser.add_argument(
        "--inside",
        action="store_true",
        help="methods that look into the model at the text as it is",
    )
    parser.add_argument("--attr-target", action="append", help="by default log_prob")
    parser.add_argument("--again", action="append", default=[], choices=ABSENCES)
    parser.add_argument("--at-most", type=int, help="prompts of each half")
    parser.add_argument("--show", type=int, metavar="N", help="print N prompts of each half")
    parser.add_argument("--dtype", default="bfloat16", help="enough for ranking")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if options.inside and (options.method or options.absence):
        parser.error("--inside has methods and an absence of its own")
    out = options.out or (RESULTS.with_stem("real_causes_inside") if options.inside else RESULTS)
    torch.set_num_threads(options.threads)
    report = environment(seed=0, dtype=options.dtype)
    report["models"] = []
    for name in options.model:
        measured = Measured(name, options.dtype, options.cache, tuple(options.again))
        absences, targets = options.absence or ABSENCES, options.attr_target or ["log_prob"]
        if options.show:
            for absence in absences:
                show(measured, options.show, absence, targets)
            continue
        methods = options.method or METHODS
        if options.inside:
            absences, methods = [NOTHING], [*INSIDE]
        found = of_model(measured, absences, methods, targets, options.at_most)
        report["models"].append(found)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
