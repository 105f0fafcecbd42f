"""Puts the measured tables into README.md, from the JSON files in `benchmarks/results`.

    python benchmarks/readme.py [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def ground_truth_words(report: dict[str, Any]) -> str:
    """Means over all languages, with words as features."""
    rows = report["rows"]
    told: list[str] = []
    most = max(sum(row["absence"] == one["absence"] for row in rows) for one in rows)
    for absence in dict.fromkeys(row["absence"] for row in rows):
        of = [row for row in rows if row["absence"] == absence]
        everything = mean(row["precision"] for row in of)
        content = mean(row["precision_content_words"] for row in of)
        fewer = f" on {len(of)} of them" * (len(of) < most)
        told.append(f"{absence} {everything:.2f} ({content:.2f}){fewer}")
    told_of = f"on {most} made-up languages, also where words of a phrase tell one another"
    return f"{told_of}: {'; '.join(told)}."


def exactness(report: dict[str, Any]) -> str:
    worst = max(max(row["replaced"], row["deleted"]) for row in report["rows"])
    n = len(report["rows"])
    return f"On {n} architectures (`tests/architectures.py`): at most {worst:.0e} nats."


def corpus_index(report: dict[str, Any]) -> str:
    row = next(row for row in report["rows"] if row["words"] == "mixed")
    build, look = row["building"], row["looking_up"]
    return (
        f"The index of {build['corpus_mb']:.0f} MB of text takes {build['build']['cpu_s']:.0f} "
        f"seconds of one core and {build['peak_mb'] / 1000:.1f} GB at most; loaded again from its "
        f"file, the first look at a feature takes {look['first_look_median']['cpu_s'] * 1000:.0f} "
        f"ms, a draw {look['later_draw_mean']['cpu_s'] * 1e6:.0f} µs."
    )


def throughput(report: dict[str, Any]) -> str:
    others = report["threads_1"]
    beside = others["beside_captum"]["result"]
    ratios = beside["ratios"]
    sizes = beside["sizes"]
    shap = sorted(m["ratio"] for m in others["beside_shap"]["result"]["models"])
    return (
        f"Leave-one-out over {sizes['F']} tokens for {sizes['T']} target tokens "
        f"({beside['model']}, one CPU thread): "
        f"{ratios['captum, one pass per perturbation']:.1f} times as fast as captum's one pass per "
        f"perturbation, {ratios['captum, token by token (extrapolated)']:.0f} times as fast as its "
        "token-by-token path; with earlier output as causes "
        f"{ratios['prompt and output: captum on the growing prompt (extrapolated)']:.0f} times as "
        "fast as captum on a growing prompt. On smaller models "
        f"{others['beside_inseq']['result']['ratio']:.0f} times as fast as inseq's occlusion with "
        f"earlier output, {shap[0]:.0f} to {shap[-1]:.0f} times as fast as shap's "
        "PartitionExplainer on as many evaluations."
    )


MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}


# What a reader has to know of who made what with which prompts.
SEEN = {"`ModelBaselines`": ", what it had missed looked at"}


# What is added to the name of an absence, of methods that the table shows.
LABELS = {"leave-one-out": "", "Shapley, kernel": ", by `KernelShap` at 8 evaluations a word"}


def real_causes(report: dict[str, Any]) -> str:
    """A column per model and value, with 95 % intervals."""
    columns: dict[str, dict[str, str]] = {}
    for model in report["models"]:
        rows = [
            row | {"absence": row["absence"] + LABELS[row["method"]]}
            for row in model["rows"]
            if row["method"] in LABELS
        ]
        for target in dict.fromkeys(row["attr_target"] for row in rows):
            of = {
                row["absence"]: row["all"] | {"few": row.get("n_foils") == [8]}
                for row in rows
                if row["attr_target"] == target
            }
            value = "" if target == "log_prob" else f", {target}"
            n = min(row["n"] for row in of.values())
            columns[f"{MODELS[model['model']]}{value} ({n} prompts)"] = {
                absence: f"{row['cause']:.2f} ({row['interval'][0]:.2f}–{row['interval'][1]:.2f})"
                + f" of {row['n']}" * (row["n"] != n)
                + " (8 foils)" * row["few"]
                for absence, row in of.items()
            }
    absences = dict.fromkeys(absence for cells in columns.values() for absence in cells)
    lines = [f"| absent means | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [
        f"| {absence}{SEEN.get(absence, '')} | "
        f"{' | '.join(cells.get(absence, '') for cells in columns.values())} |"
        for absence in absences
    ]
    return "\n".join(lines)


def faithfulness(report: dict[str, Any]) -> str:
    """What the truth, the choice of deletion and chance get, by kind of absence."""
    rows = [row for row in report["rows"] if row["metric"] == "comprehensiveness"]
    pairs = (
        f"{row['measured_by']} {row['scores']['the truth']:.1f} and "
        f"{row['scores']['leave-one-out, deletion']:.1f}"
        for row in rows
    )
    return (
        "Nats of log-probability that an answer of the demo loses when its true causes are absent, "
        f"and when those named by deletion are: {'; '.join(pairs)}."
    )


# Methods that look inside a model, as the README calls them; the others' rows stay in the JSON.
INSIDE = {
    "linear system, L2 of its slope": 'linear system, `norm="l2"`',
    "saliency, L2": "saliency",
    "linear system": "linear system",
    "rollout of projections": "rollout of projections",
    "attention weights": "attention weights",
    "ALTI": "ALTI",
    "rollout": "rollout",
    "integrated gradients": "integrated gradients from zero",
    "expected gradients, corpus": "GradientShap over a corpus",
}


def ground_truth_inside(report: dict[str, Any]) -> str:
    """Precision among content words of methods that look inside, with punctuation apart."""
    found = {
        (row["method"], row["grammar"]): row
        for row in report["rows"]
        if row["layers"] == 3 and row["unit"] == "mark" and "trained_from" not in row
    }
    told = (
        f"{name} {found[method, 'rigid']['precision_content_words']:.2f} and "
        f"{found[method, 'varied']['precision_content_words']:.2f} "
        f"({found[method, 'rigid']['evaluations']:.0f})"
        for method, name in INSIDE.items()
    )
    return (
        "True causes among the k strongest content words of two made-up languages, rigid and "
        f"varied (passes): {'; '.join(told)}."
    )


AND_OR = ("terms", "long terms", "scattered terms")
OURS = {"kernel": "**`KernelShap`** here", "permutations": "**`ShapleyValueSampling`** here"}


def estimators(report: dict[str, Any]) -> str:
    """Median errors on AND/OR games, and the span of coverage over all games."""
    found = {
        (r["estimator"], r["game"], r["n_features"], r["evaluations_per_feature"]): r
        for r in report["rows"]
    }
    sizes = sorted({key[2:] for key in found})
    head = " | ".join(f"n={n}, {multiple}n" for n, multiple in sizes)
    lines = [f"| | {head} |", "|---|" + "---|" * len(sizes)]
    for name in dict.fromkeys(key[0] for key in found if key[0] != "shapiq KernelSHAP"):
        cells = (
            " / ".join(f"{found[name, game, *size]['median_error']:.3f}" for game in AND_OR)
            for size in sizes
        )
        shown = OURS.get(name, name.replace("Captum", "captum"))
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "ground_truth_words": ground_truth_words,
    "ground_truth_inside": ground_truth_inside,
    "real_causes": real_causes,
    "faithfulness": faithfulness,
    "exactness": exactness,
    "corpus_index": corpus_index,
    "throughput": throughput,
    "estimators": estimators,
}


def filled(text: str) -> str:
    """The text with every marked table made anew."""

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        return f"<!-- table: {name} -->\n{TABLES[name](report)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        return 0 if filled(text) == text else 1
    path.write_text(filled(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
