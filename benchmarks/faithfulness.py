"""Whether faithfulness metrics rank the true causes first, on a language with known causes.

    python benchmarks/faithfulness.py [--documents 6] [--seed 0] [--out FILE]

The shipped model of the fact grammar writes biographies, for each of whose content words the causes
are known. The truth (1 for a cause, 0 for all else), random numbers, and attributions by leave-one-
out and Shapley values under several kinds of absence are measured under each kind of absence in
turn: where features are deleted, where they become ``<unk>``, where text of the same slot or what
the model itself would have written takes their place. A metric can be trusted under an absence
where nothing comes out better than the truth, beyond its error.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from captum.attr import FeatureAblation
from environment import environment
from fact_grammar import Document, Grammar, corpus, load
from ground_truth import Absence, absences, as_input, attribute, documents

from captum_llm_ext import GenerationAttribution, ModelBaselines
from captum_llm_ext.evaluation.faithfulness import FaithfulnessReport, measure_attributions

ABSENCES = ("deletion", "`<unk>`", "same slot, `CorpusBaselines`", "`ModelBaselines`")
METHODS = ("leave-one-out", "Shapley, kernel")
METRICS = ("area_between", "comprehensiveness", "sufficiency", "lds")
N_DRAWS = 4
MEASURED = {"n_orders": 4, "n_coalitions": 64}


def words(document: Document) -> dict[str, int]:
    """The content words with causes, and where each stands among the segments of the output."""
    slots = [segment.slot for segment in document.segments("continuation")]
    return {word: slots.index(word) for word, causes in document.causes.items() if causes}


def candidates(
    document: Document, word: str, place: int, results: dict[str, Any], draw: torch.Generator
) -> dict[str, list[float]]:
    """Attributions of one word to all earlier segments, by name."""
    before = [*document.segments("prompt"), *document.segments("continuation")[:place]]
    n = len(before)
    found = {
        "the truth": [float(segment.slot in document.causes[word]) for segment in before],
        "random": torch.randn(n, generator=draw).tolist(),
    }
    for name, result in results.items():
        rows = [t for t, piece in enumerate(result.output_pieces) if piece.feature == place]
        found[name] = result.full_attr[rows].sum(0)[:n].tolist()
    return found


def measured(
    document: Document, given: dict[str, Any], seed: int
) -> list[tuple[str, str, FaithfulnessReport]]:
    """Per content word and kind of absence: the report of all attributions.

    Args:
        document: What was written.
        given: Model, tokenizer and kinds of absence.
        seed: Of random attributions; the draws of metrics are others than those of attributions.
    """
    model, tokenizer, kinds = given["model"], given["tokenizer"], given["absences"]
    results = {
        f"{method}, {name}": attribute(model, tokenizer, document, method, kinds[name])
        for name in ABSENCES
        for method in METHODS
    }
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    draw = torch.Generator().manual_seed(seed)
    pieces = next(iter(results.values())).output_pieces
    reports: list[tuple[str, str, FaithfulnessReport]] = []
    for word, place in words(document).items():
        attributions = candidates(document, word, place, results, draw)
        rows = [t for t, piece in enumerate(pieces) if piece.feature == place]
        k = len(document.causes[word])
        for name in ABSENCES:
            inp, output = as_input(document, tokenizer, kinds[name])
            game = attribution.to_game(
                inp,
                document.continuation,
                token=(rows[0], rows[-1] + 1),
                n_draws=N_DRAWS,
                normalize=False,
                seed=1000 + seed,
                **output,
            )
            report = measure_attributions(attributions, game, k=k, **MEASURED)
            reports.append((word, name, report))
    return reports


def scores(report: FaithfulnessReport, name: str) -> dict[str, float]:
    """Scores of an attribution relative to chance: above 0 is better, for every metric."""
    found = {key.partition("@")[0]: metric for key, metric in report.metrics[name].items()}
    return {
        metric: float(found[metric].value) * (1 if found[metric].higher_is_better else -1)
        for metric in METRICS
    }


def table(reports: Sequence[tuple[str, str, FaithfulnessReport]]) -> list[dict[str, Any]]:
    """Per kind of absence and metric the score of each attribution, and the rank of the truth."""
    rows: list[dict[str, Any]] = []
    for absence in ABSENCES:
        own = [report for _, kind, report in reports if kind == absence]
        names = own[0].names
        each = {name: [scores(report, name) for report in own] for name in names}
        for metric in METRICS:
            means = {name: mean(one[metric] for one in each[name]) for name in names}
            best = max((n for n in names if n != "the truth"), key=lambda name: means[name])
            behind = [
                b[metric] - t[metric] for b, t in zip(each[best], each["the truth"], strict=True)
            ]
            rows.append(
                {
                    "measured_by": absence,
                    "metric": metric,
                    "scores": means,
                    "rank_of_truth": 1
                    + sum(means[n] > means["the truth"] + 1e-6 for n in names if n != "the truth"),
                    "of": len(names),
                    "best_other": best,
                    "best_other_less_truth": mean(behind),
                    "standard_error": stdev(behind) / len(behind) ** 0.5,
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "faithfulness.json"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, tokenizer = load()
    baselines = ModelBaselines()
    own = Absence(lambda _: baselines, lambda _: baselines)
    given = {
        "model": model,
        "tokenizer": tokenizer,
        "absences": absences(Grammar(), corpus()) | {"`ModelBaselines`": own},
    }
    started = time.process_time()
    reports: list[tuple[str, str, FaithfulnessReport]] = []
    for number, document in enumerate(documents(arguments.documents, arguments.seed)):
        reports += measured(document, given, arguments.seed + number)
        print(f"{number + 1} documents, {time.process_time() - started:.0f} s", file=sys.stderr)
    report = {
        **environment(seed=arguments.seed),
        "documents": arguments.documents,
        "words": len(reports) // len(ABSENCES),
        "draws": N_DRAWS,
        "cpu_seconds": time.process_time() - started,
        "rows": table(reports),
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in report["rows"]:
        print(
            f"{row['measured_by']:28} {row['metric']:18} truth {row['scores']['the truth']:7.2f} "
            f"rank {row['rank_of_truth']:2} of {row['of']}, random {row['scores']['random']:7.2f}, "
            f"best other {row['best_other_less_truth']:+.2f} ± {row['standard_error']:.2f} "
            f"({row['best_other']})"
        )


if __name__ == "__main__":
    main()
