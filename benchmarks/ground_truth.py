"""Do attributions name the true causes? Precision at k on a language whose causes are known.

A tiny model that has learnt the fact grammar continues biographies. For each content word that it
writes, the grammar knows the k words of the prompt or of the earlier output that decided it. The
k features with the largest attributions are held against them.

    python benchmarks/ground_truth.py [--documents 20] [--seed 0] [--out FILE]

Two languages: a rigid one, whose model ships with the package, and a varied one with shuffled
sentences, two wordings of each and missing facts, whose model is trained on the first run (about
two minutes) into `benchmarks/models`.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from captum.attr import FeatureAblation, KernelShap, Lime, ShapleyValueSampling
from environment import environment
from fact_grammar import SHIPPED, Document, Grammar, corpus, load
from fact_grammar.train import Recipe, train

from captum_llm_ext import CorpusBaselines, GenerationAttribution, TextSegmentInput

METHODS = {
    "leave-one-out": (FeatureAblation, {}),
    "Shapley, permutations": (ShapleyValueSampling, {"n_samples": 50}),
    "Shapley, kernel": (KernelShap, {}),
    "LIME": (Lime, {}),
}


@dataclass(frozen=True)
class Absence:
    """What stands for an absent feature of the prompt, and of the output.

    Attributes:
        prompt: From a document to the `baselines` of its prompt.
        output: From a document to the `output_baselines`.
    """

    prompt: Callable[[Document], Any]
    output: Callable[[Document], Any]


def by_hand(part: str) -> Callable[[Document], list[tuple[str, ...]]]:
    """Replacement lists from the grammar: what else can stand in each slot."""
    return lambda document: [segment.replacements for segment in document.segments(part)]


def absences(grammar: Grammar, texts: Sequence[str]) -> dict[str, Absence]:
    """The kinds of absence that are compared."""
    found = {
        "any corpus span": CorpusBaselines(texts, match="any"),
        "corpus span of equal length": CorpusBaselines(texts, match="length"),
        "same slot, `CorpusBaselines`": CorpusBaselines(texts),
        "… weighted by the model": CorpusBaselines(texts, match="model"),
        "… with labels": CorpusBaselines(texts, labels=grammar.alternatives),
    }
    return {
        "deletion": Absence(lambda _: None, lambda _: None),
        "`<unk>`": Absence(lambda _: "<unk>", lambda _: "<unk>"),
        **{name: Absence(partial(_same, b), partial(_same, b)) for name, b in found.items()},
        "same slot, lists by hand": Absence(by_hand("prompt"), by_hand("continuation")),
    }


def _same(baselines: Any, document: Document) -> Any:
    return baselines


def attribute(
    model: Any, tokenizer: Any, document: Document, method: str, absence: Absence, seed: int = 0
) -> Any:
    """Attributes the document's own continuation; features are its slots and connecting words."""
    kind, arguments = METHODS[method]
    inp, output = as_input(document, tokenizer, absence)
    return GenerationAttribution(kind(model), tokenizer).attribute(
        inp, document.continuation, seed=seed, **output, **arguments
    )


def as_input(
    document: Document, tokenizer: Any, absence: Absence
) -> tuple[TextSegmentInput, dict[str, Any]]:
    """The document's prompt, and what `attribute` is told of its output."""
    spans = [(s.start, s.stop) for s in document.segments("prompt")]
    output = [(s.start, s.stop) for s in document.segments("continuation")]
    inp = TextSegmentInput(
        document.prompt,
        tokenizer,
        spans,
        labels=[s.slot for s in document.segments("prompt")],
        baselines=absence.prompt(document),
    )
    unit = [(start - document.cut, stop - document.cut) for start, stop in output]
    return inp, {"output_unit": unit, "output_baselines": absence.output(document)}


def precision(document: Document, result: Any, *, content_only: bool = False) -> dict[str, float]:
    """Per generated content word the share of its k true causes among the k strongest features.

    Args:
        document: Knows the causes.
        result: Its attribution, one feature per segment.
        content_only: Whether connecting words are left out of the ranking.
    """
    features = [*document.segments("prompt"), *document.segments("continuation")]
    n_prompt = len(document.segments("prompt"))
    groups = [piece.feature for piece in result.output_pieces]
    found: dict[str, float] = {}
    for word, causes in document.causes.items():
        if not causes:
            continue
        own = next(i for i, f in enumerate(features) if f.slot == word and i >= n_prompt) - n_prompt
        rows = [t for t, group in enumerate(groups) if group == own]
        strength = result.full_attr[rows].sum(0).abs().tolist()
        ranked = sorted(
            (i for i in range(n_prompt + own) if features[i].slot or not content_only),
            key=lambda i: -strength[i],
        )
        named = {features[i].slot for i in ranked[: len(causes)]}
        found[word] = len(named & set(causes)) / len(causes)
    return found


def documents(n: int, seed: int, grammar: Grammar | None = None) -> list[Document]:
    """Biographies, half of them with the pronoun still to be written."""
    rng = random.Random(seed)
    grammar = grammar or Grammar()
    return [grammar.sample(rng, before=("pronoun", "A")[i % 2]) for i in range(n)]


def folder(varied: bool) -> Path:
    """Where the model of a grammar is; that of the varied one is trained if it is not there."""
    if not varied:
        return SHIPPED
    out = Path(__file__).parent / "models" / "varied"
    if not (out / "corpus.txt").exists():  # written last
        train(Recipe(varied=True), out)
    return out


def table(n: int, seed: int, *, varied: bool) -> list[dict[str, Any]]:
    """One row per method and absence."""
    model, tokenizer = load(folder(varied))
    grammar = Grammar(varied)
    given = documents(n, seed, grammar)
    rows: list[dict[str, Any]] = []
    for name, absence in absences(grammar, corpus(folder(varied))).items():
        for method in METHODS:
            results = [attribute(model, tokenizer, d, method, absence) for d in given]
            both = list(zip(given, results, strict=True))
            everything = [precision(d, r) for d, r in both]
            content = [precision(d, r, content_only=True) for d, r in both]
            rows.append(
                {
                    "grammar": "varied" if varied else "rigid",
                    "method": method,
                    "absence": name,
                    "precision": mean(v for found in everything for v in found.values()),
                    "precision_content_words": mean(v for found in content for v in found.values()),
                    "per_word": {
                        word: mean(found[word] for found in everything if word in found)
                        for word in ("pronoun", "A", "B", "C", "D")
                    },
                    "evaluations": mean(r.n_evaluations for r in results),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the tables as JSON; `readme.py` shows them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "ground_truth.json"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [
        row
        for varied in (False, True)
        for row in table(arguments.documents, arguments.seed, varied=varied)
    ]
    report = {**environment(seed=arguments.seed), "documents": arguments.documents, "rows": rows}
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
