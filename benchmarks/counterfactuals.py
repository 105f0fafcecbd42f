"""Precision, minimality and cost of counterfactuals on documents with known causes.

* **Causes.** Documents of the fact grammar, features replaced by other words of their slots: of all
  pairs (generated content word, fact of the prompt that it depends on), which are told by
  counterfactuals of one feature, and of what is told, which are such pairs. A word that is not the
  likeliest as it is cannot become another: with ``argmax`` it is not asked about.
* **Order.** How many features are tried up to the first that changes a word, in the order of
  saliency and on average over all orders.
* **Minimality.** Of up to 8 features with one replacement each, all sets up to three, held against
  plain forward passes of all 2^n sets in float64.

    python benchmarks/counterfactuals.py [--documents 20] [--small 6]
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from captum.attr import FeatureAblation
from environment import environment
from fact_grammar import Document, Grammar, load
from ground_truth import Absence, as_input, by_hand

from captum_llm_ext import (
    GenerationAttribution,
    GenerationGradientAttribution,
    LayerSaliency,
    TextSegmentInput,
)

DROP = 2.0  # nats: A, one of three, falls by more without its occupation
MOST = 8  # features where all sets are tried


def slot_of(document: Document, tokenizer: Any) -> list[str | None]:
    """The slot of each target token."""
    encoded = tokenizer(
        document.continuation, add_special_tokens=False, return_offsets_mapping=True
    )
    segments = document.segments("continuation")
    return [
        next(s.slot for s in segments if s.start < stop + document.cut <= s.stop)
        for _, stop in encoded["offset_mapping"]
    ]


def causes(given: Sequence[Document], flips: Any, n_draws: int) -> dict[str, Any]:
    """Precision and recall of counterfactuals of one feature."""
    model, tokenizer = load()
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    by_gradient = GenerationGradientAttribution(LayerSaliency(model), tokenizer)
    counts = {"right": 0, "told": 0, "true": 0}
    rows, ranks, chance, begun = [], [], [], time.process_time()
    for seed, document in enumerate(given):
        absence = Absence(by_hand("prompt"), by_hand("continuation"))
        inp, _ = as_input(document, tokenizer, absence)
        search = attribution.counterfactuals(
            inp, document.continuation, max_size=1, flips=flips, n_draws=n_draws, seed=seed
        )
        slots, prompt = slot_of(document, tokenizer), document.segments("prompt")
        told = {(one.token, one.features[0]) for one in search}
        named = {(slots[t], prompt[feature].slot) for t, feature in told}
        other = {slots[t] for t in search.already_other}
        given_slots = {segment.slot for segment in prompt}
        expected = {
            (word, cause)
            for word, known in document.causes.items()
            for cause in known
            if cause in given_slots and word not in other
        }
        counts["right"] += len(named & expected)
        counts["told"] += len(named)
        counts["true"] += len(expected)
        rows.append(search.n_evaluations)
        size = by_gradient.attribute(inp, document.continuation, output_unit=None).token_attr
        for t in {t for t, _ in told}:
            hits = {feature for token, feature in told if token == t}
            order = size[t].argsort(descending=True).tolist()
            ranks.append(1 + min(order.index(feature) for feature in hits))
            chance.append((len(prompt) + 1) / (len(hits) + 1))
    row = {
        "flips": flips,
        "n_draws": n_draws,
        "documents": len(given),
        "precision": counts["right"] / counts["told"],
        "recall": counts["right"] / counts["true"],
        **counts,
        "rows_a_document": mean(rows),
        "tried_to_the_first_flip": mean(ranks),
        "in_random_order": mean(chance),
        "cpu_s": time.process_time() - begun,
    }
    print(row, file=sys.stderr, flush=True)
    return row


def few_features(
    document: Document, tokenizer: Any, rng: random.Random
) -> tuple[TextSegmentInput, int]:
    """At most `MOST` features of a document, the facts among them, with one replacement each."""
    segments = document.segments("prompt")
    facts = [segment for segment in segments if segment.slot]
    rest = [segment for segment in segments if not segment.slot]
    chosen = [*facts, *rng.sample(rest, max(min(MOST - len(facts), len(rest)), 0))][:MOST]
    chosen.sort(key=lambda segment: segment.start)
    # A connecting word gives way to another one, so that every set is another text.
    words = [segment.replacements[0] for segment in rest]
    lists = [
        rng.choice(s.replacements if s.slot else [w for w in words if w != s.replacements[0]])
        for s in chosen
    ]
    spans = [(segment.start, segment.stop) for segment in chosen]
    return TextSegmentInput(document.prompt, tokenizer, spans, baselines=lists), len(chosen)


def by_brute_force(
    model: Any, inp: TextSegmentInput, n: int, target: Sequence[int], flips: Any, most: int
) -> set[tuple[int, frozenset[int]]]:
    """Minimal sets of every target token, from all subsets of the features."""

    def log_probs(chosen: Sequence[int]) -> torch.Tensor:
        mask = torch.ones(1, n, dtype=torch.bool)
        mask[0, list(chosen)] = False
        ids = inp.render(mask, torch.Generator())[0].ids
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *target[:-1]]]), use_cache=False).logits[0]
        return logits[len(ids) - 1 :].log_softmax(-1)

    own = torch.tensor(target)
    before = log_probs(())

    def flipped(chosen: Sequence[int]) -> Iterator[int]:
        found = log_probs(chosen)
        for t in range(len(target)):
            if flips == "argmax":
                if before[t].argmax() == own[t] and found[t].argmax() != own[t]:
                    yield t
            elif before[t, own[t]] - found[t, own[t]] >= flips:
                yield t

    changes: dict[int, list[frozenset[int]]] = {t: [] for t in range(len(target))}
    for size in range(1, n + 1):
        for chosen in combinations(range(n), size):
            for t in flipped(chosen):
                if not any(known <= set(chosen) for known in changes[t]):
                    changes[t].append(frozenset(chosen))
    return {(t, s) for t, sets in changes.items() for s in sets if len(s) <= most}


def minimality(given: Sequence[Document], flips: Any, seed: int, most: int = 3) -> dict[str, Any]:
    """Minimal sets found, beside those of brute force."""
    model, tokenizer = load()
    exact, _ = load()
    exact.double()
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    rng = random.Random(f"few {seed}")
    equal, sizes, begun = 0, {1: 0, 2: 0, 3: 0}, time.process_time()
    missing = beyond = 0
    for document in given:
        inp, n = few_features(document, tokenizer, rng)
        target = tokenizer.encode(document.continuation, add_special_tokens=False)
        search = attribution.counterfactuals(inp, target, flips=flips, max_size=most)
        found = {(one.token, frozenset(one.features)) for one in search}
        expected = by_brute_force(exact, inp, n, target, flips, most)
        equal += found == expected
        missing, beyond = missing + len(expected - found), beyond + len(found - expected)
        for _, features in expected:
            sizes[len(features)] += 1
    row = {
        "flips": flips,
        "documents": len(given),
        "equal": equal,
        "missing": missing,
        "not_minimal": beyond,
        "sets_of_size": sizes,
        "cpu_s": time.process_time() - begun,
    }
    print(row, file=sys.stderr, flush=True)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Writes both tables as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--small", type=int, default=6, help="documents where all sets are tried")
    parser.add_argument("--seed", type=int, default=0)
    out = Path(__file__).parent / "results/counterfactuals.json"
    parser.add_argument("--out", type=Path, default=out)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng = random.Random(f"counterfactuals {arguments.seed}")
    given = [Grammar().sample(rng, ("pronoun", "A")[i % 2]) for i in range(arguments.documents)]
    report: dict[str, Any] = {**environment(seed=arguments.seed), "causes": [], "minimality": []}

    def write() -> None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for flips in ("argmax", DROP):
        report["causes"].append(causes(given, flips, n_draws=4))
        write()
    for flips in ("argmax", DROP):
        few = given[: arguments.small]
        report["minimality"].append(minimality(few, flips, arguments.seed))
        write()


if __name__ == "__main__":
    main()
