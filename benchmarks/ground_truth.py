"""Precision at k of attributions on a language with known causes.

A tiny model that has learnt the fact grammar continues biographies. For each content word that it
writes, the grammar knows the k words of the prompt or of the earlier output that decided it. The
k features with the largest attributions are held against them.

    python benchmarks/ground_truth.py [--unit word | --inside] [--documents 20] [--absence NAME]
    python benchmarks/ground_truth.py --inside --documents 10 --seeds 1 2 --grammar rigid

`--inside` has methods that look into the model, beside the strongest of those that do not, once
with punctuation in the feature of the word it stands beside, once apart. The place where a token is
written is that of the token before it: where that is the comma behind a word, the word is given
what belongs to the place. `--seeds` adds rows of models that were trained from other seeds, by the
methods that are quick: what is inside a model that has learnt the same language differs.

Two languages: a rigid one, whose model ships with the package, and a varied one with shuffled
sentences, two wordings of each and missing facts. With `--unit word` words are features, and there
are languages whose fillers are phrases that share words, too (`fact_grammar.vocabularies`): a slot
is as strong as the strongest of its words. Models that do not ship are trained on the first run
(about two minutes each) into `benchmarks/models`.
"""

import argparse
import json
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    ShapleyValueSampling,
)
from environment import environment
from fact_grammar import SHIPPED, Document, Grammar, corpus, load
from fact_grammar.grammar import Cut, Part
from fact_grammar.train import Recipe, train
from fact_grammar.vocabularies import VOCABULARIES
from torch import Tensor

from captum_llm_ext import (
    AttentionRollout,
    AttentionWeights,
    CorpusBaselines,
    EquivalentLinearSystem,
    GenerationAttentionAttribution,
    GenerationAttribution,
    GenerationGradientAttribution,
    LayerSaliency,
    ModelBaselines,
    TextSegmentInput,
)

METHODS = {
    "leave-one-out": (FeatureAblation, {}),
    "Shapley, permutations": (ShapleyValueSampling, {"n_samples": 50}),
    "Shapley, kernel": (KernelShap, {}),
    "LIME": (Lime, {}),
}
# Of those that look into the model: the method, what stands for absence, and arguments.
WHITE_BOX: dict[str, tuple[Callable[[Any], Any], str | None, dict[str, Any]]] = {
    "linear system": (EquivalentLinearSystem, None, {}),
    "linear system, against its kind": (EquivalentLinearSystem, None, {}),
    "saliency, L2": (LayerSaliency, None, {}),
    "saliency, L1": (lambda model: LayerSaliency(model, norm="l1"), None, {}),
    "gradient x activation": (lambda model: LayerGradientXActivation(model, None), None, {}),
    "integrated gradients": (
        lambda model: LayerIntegratedGradients(model, None),
        "zero embedding",
        {"absent": "zero", "n_steps": 50},
    ),
    "integrated gradients, `<unk>`": (
        lambda model: LayerIntegratedGradients(model, None),
        "`<unk>`",
        {"n_steps": 50},
    ),
    "integrated gradients, corpus": (
        lambda model: LayerIntegratedGradients(model, None),
        "same slot, `CorpusBaselines`",
        {"n_steps": 50},
    ),
    "expected gradients, corpus": (
        lambda model: LayerGradientShap(model, None),
        "same slot, `CorpusBaselines`",
        {},
    ),
    "linear system, L2 of its slope": (lambda m: EquivalentLinearSystem(m, norm="l2"), None, {}),
    "rollout of projections": (lambda model: AttentionRollout(model, "projection"), None, {}),
    "ALTI": (lambda model: AttentionRollout(model, "alti"), None, {}),
    "rollout": (AttentionRollout, None, {}),
    "rollout of values": (lambda model: AttentionRollout(model, "values"), None, {}),
    "attention weights": (AttentionWeights, None, {}),
}
# Of those that only ask the model; others of them are in the other tables.
BESIDE = (("leave-one-out", "deletion"), ("leave-one-out", "same slot, `CorpusBaselines`"))
# What a token's value is made of is easier to tell the fewer layers mix it: as many parameters.
# Of the varied language two layers learn no C (it stays at chance).
WIDTHS = {2: 80, 3: Recipe.width}
INSIDE_UNITS: tuple[Cut, ...] = ("slot", "mark")
NOT_OF_WORDS = ("corpus span of equal length", "… weighted by the model", "… with labels")


@dataclass(frozen=True)
class Absence:
    """Replacement of an absent feature of the prompt, and of the output.

    Attributes:
        prompt: From a document to the `baselines` of its prompt.
        output: From a document to the `output_baselines`.
    """

    prompt: Callable[[Document], Any]
    output: Callable[[Document], Any]


def by_hand(part: Part, unit: Cut = "slot") -> Callable[[Document], list[tuple[str, ...]]]:
    """Replacement lists from the grammar: other values of each slot, or of a word of it."""
    return lambda document: [segment.replacements for segment in document.segments(part, unit)]


def absences(grammar: Grammar, texts: Sequence[str], unit: Cut = "slot") -> dict[str, Absence]:
    """The kinds of absence that are compared."""
    found = {
        "any corpus span": CorpusBaselines(texts, match="any"),
        "corpus span of equal length": CorpusBaselines(texts, match="length"),
        "same slot, `CorpusBaselines`": CorpusBaselines(texts),
        "… weighted by the model": CorpusBaselines(texts, match="model"),
        "… with labels": CorpusBaselines(texts, labels=grammar.alternatives),
    }
    by_model = ModelBaselines()
    return {
        "deletion": Absence(lambda _: None, lambda _: None),
        "`<unk>`": Absence(lambda _: "<unk>", lambda _: "<unk>"),
        **{name: Absence(partial(_same, b), partial(_same, b)) for name, b in found.items()},
        "`ModelBaselines`": Absence(partial(_same, by_model), partial(_same, by_model)),
        "same slot, lists by hand": Absence(by_hand("prompt", unit), by_hand("continuation", unit)),
    }


def _same(baselines: Any, document: Document) -> Any:
    return baselines


def attribute(
    model: Any,
    tokenizer: Any,
    document: Document,
    method: str,
    absence: Absence,
    unit: Cut = "slot",
    seed: int = 0,
) -> Any:
    """Attributes the document's own continuation; features are its segments."""
    kind, arguments = METHODS[method]
    inp, output = as_input(document, tokenizer, absence, unit)
    return GenerationAttribution(kind(model), tokenizer).attribute(
        inp, document.continuation, seed=seed, **output, **arguments
    )


def attribute_inside(
    model: Any,
    tokenizer: Any,
    document: Document,
    name: str,
    known: dict[str, Absence],
    unit: Cut = "slot",
    seed: int = 0,
) -> Any:
    """Attributes the document's own continuation by a white-box method."""
    kind, absence, arguments = WHITE_BOX[name]
    method = kind(model)
    none = Absence(lambda _: None, lambda _: None)
    inp, output = as_input(document, tokenizer, known.get(absence or "", none), unit)
    if isinstance(method, AttentionRollout | AttentionWeights):
        del output["output_baselines"]
        attribution: Any = GenerationAttentionAttribution(method, tokenizer)
        return attribution.attribute(inp, document.continuation, **output)
    if output["output_baselines"] is None:
        del output["output_baselines"]
    value = against_its_kind(document, tokenizer) if "its kind" in name else None
    attribution = GenerationGradientAttribution(method, tokenizer, attr_target=value)
    return attribution.attribute(inp, document.continuation, seed=seed, **output, **arguments)


def against_its_kind(document: Document, tokenizer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The logit of each slot's first token less the mean of other words of its kind; else 0."""
    found = tokenizer(document.continuation, add_special_tokens=False, return_offsets_mapping=True)
    stops = [stop + document.cut for _, stop in found["offset_mapping"]]
    foils: dict[int, list[int]] = {}
    for segment in document.segments("continuation"):
        if segment.slot is not None:
            # A word's space belongs to its token, but not to the token's offsets everywhere.
            place = next(i for i, stop in enumerate(stops) if stop > segment.start + 1)
            others = {
                tokenizer.encode(text, add_special_tokens=False)[0] for text in segment.replacements
            }
            foils[place] = sorted(others - {found["input_ids"][place]})

    def value(logits: Tensor, target: Tensor) -> Tensor:
        own = logits.gather(2, target.expand(len(logits), -1)[..., None])[..., 0]
        each = [
            own[:, t] - logits[:, t, foils[t]].mean(-1) if foils.get(t) else 0 * own[:, t]
            for t in range(len(target))
        ]
        return torch.stack(each, 1)

    return value


def as_input(
    document: Document, tokenizer: Any, absence: Absence, unit: Cut = "slot"
) -> tuple[TextSegmentInput, dict[str, Any]]:
    """The document's prompt, and the arguments of `attribute` for its output."""
    spans = [(s.start, s.stop) for s in document.segments("prompt", unit)]
    output = [(s.start, s.stop) for s in document.segments("continuation", unit)]
    inp = TextSegmentInput(
        document.prompt,
        tokenizer,
        spans,
        labels=[s.slot for s in document.segments("prompt", unit)],
        baselines=absence.prompt(document),
    )
    cuts = [(start - document.cut, stop - document.cut) for start, stop in output]
    return inp, {"output_unit": cuts, "output_baselines": absence.output(document)}


def precision(
    document: Document, result: Any, *, unit: Cut = "slot", content_only: bool = False
) -> dict[str, float]:
    """Per generated content word the share of its k true causes among the k strongest.

    What is ranked are slots and connecting words. A slot of several features is as strong as the
    strongest of them.

    Args:
        document: Knows the causes.
        result: Its attribution, one feature per segment.
        unit: Of its segments.
        content_only: Whether connecting words are left out of the ranking.
    """
    features = [*document.segments("prompt", unit), *document.segments("continuation", unit)]
    n_prompt = len(document.segments("prompt", unit))
    groups = [piece.feature for piece in result.output_pieces]
    found: dict[str, float] = {}
    for word, causes in document.causes.items():
        if not causes:
            continue
        own = [i for i, f in enumerate(features) if f.slot == word and i >= n_prompt]
        rows = [
            t for t, group in enumerate(groups) if group is not None and group + n_prompt in own
        ]
        strength: dict[str | int, float] = {}
        for i, value in enumerate(result.full_attr[rows].sum(0).abs().tolist()[: own[0]]):
            if features[i].slot or not content_only:
                name = features[i].slot or i
                strength[name] = max(strength.get(name, 0.0), value)
        named = set(sorted(strength, key=lambda name: -strength[name])[: len(causes)])
        found[word] = len(named & set(causes)) / len(causes)
    return found


def by_chance(document: Document) -> list[float]:
    """Per generated word with causes, their share of the content words before it."""
    starts = {slot.name: slot.start for slot in document.slots}
    return [
        len(causes) / sum(start < starts[word] for start in starts.values())
        for word, causes in document.causes.items()
        if causes
    ]


def documents(n: int, seed: int, grammar: Grammar | None = None) -> list[Document]:
    """Biographies, half of them with the pronoun still to be written."""
    rng = random.Random(seed)
    grammar = grammar or Grammar()
    return [grammar.sample(rng, before=("pronoun", "A")[i % 2]) for i in range(n)]


def folder(
    varied: bool, words: str = "biographies", layers: int = Recipe.layers, seed: int = Recipe.seed
) -> Path:
    """The model folder of a grammar; a model that is not shipped is trained if missing."""
    recipe = Recipe(varied=varied, words=words, layers=layers, seed=seed)
    if recipe == Recipe():
        return SHIPPED
    name = "varied" if varied else "rigid"
    if words != Recipe.words:
        name = f"{words}-{name}"
        # Another seed of the varied towns finds no slope toward C (see `Recipe`).
        recipe = replace(
            recipe, vocabulary=900, seed=1 if (words, varied) == ("towns", True) else 0
        )
    if layers != Recipe.layers:
        name += f"-{layers}-layers"
        recipe = replace(recipe, width=WIDTHS[layers])
    if seed != Recipe.seed:
        name += f"-seed-{seed}"
    out = Path(__file__).parent / "models" / name
    if not (out / "corpus.txt").exists():  # written last
        train(recipe, out)
    return out


def table(
    n: int,
    seed: int,
    *,
    varied: bool,
    words: str = "biographies",
    unit: Cut = "slot",
    methods: Sequence[str] = tuple(METHODS),
    left_out: Sequence[str] = (),
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """One row per method and absence, or of some absences alone."""
    model, tokenizer = load(folder(varied, words))
    grammar = Grammar(varied, VOCABULARIES[words])
    given = documents(n, seed, grammar)
    rows: list[dict[str, Any]] = []
    for name, absence in absences(grammar, corpus(folder(varied, words)), unit).items():
        is_asked = name not in left_out and (not only or name in only)
        for method in methods if is_asked else ():
            results = [attribute(model, tokenizer, d, method, absence, unit) for d in given]
            rows.append(
                {
                    "grammar": "varied" if varied else "rigid",
                    "words": words,
                    "unit": unit,
                    "method": method,
                    "absence": name,
                    **_row(given, results, unit),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def table_inside(
    n: int,
    seed: int,
    *,
    varied: bool,
    unit: Cut,
    layers: int = Recipe.layers,
    trained_from: int = Recipe.seed,
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """One row per white-box method, and some others for comparison; or of selected ones."""
    where = folder(varied, layers=layers, seed=trained_from)
    model, tokenizer = load(where)
    grammar = Grammar(varied)
    given = documents(n, seed, grammar)
    known = absences(grammar, corpus(where), unit)
    inside = [(name, absence) for name, (_, absence, _) in WHITE_BOX.items()]
    if (layers, trained_from) != (Recipe.layers, Recipe.seed):  # those that are quick
        asked = [(name, absence) for name, absence in inside if absence is None]
    else:
        asked = [*inside, *BESIDE]
    rows: list[dict[str, Any]] = []
    for name, absence in asked:
        if only and name not in only:
            continue

        def result(document: Document, name: str = name, absence: str | None = absence) -> Any:
            if name in WHITE_BOX:
                return attribute_inside(model, tokenizer, document, name, known, unit)
            return attribute(model, tokenizer, document, name, known[absence or ""], unit)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*steps are too few")
            results = [result(document) for document in given]
        of = {"grammar": "varied" if varied else "rigid", "layers": layers, "unit": unit}
        of |= {"trained_from": trained_from} if trained_from != Recipe.seed else {}
        rows.append(of | {"method": name, "absence": absence} | _row(given, results, unit))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _row(given: Sequence[Document], results: Sequence[Any], unit: Cut) -> dict[str, Any]:
    """Precision of the results."""
    both = list(zip(given, results, strict=True))
    everything = [precision(d, r, unit=unit) for d, r in both]
    content = [precision(d, r, unit=unit, content_only=True) for d, r in both]
    drawn = [share for d in given for share in by_chance(d)]
    return {
        "precision": mean(v for found in everything for v in found.values()),
        "precision_content_words": mean(v for found in content for v in found.values()),
        "by_chance_content_words": mean(drawn),
        "per_word": {
            word: mean(found[word] for found in everything if word in found)
            for word in ("pronoun", "A", "B", "C", "D")
        },
        "evaluations": mean(r.n_evaluations for r in results),
    }


def renewed(before: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """A report with some rows replaced or added, in the previous order."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        by = ("grammar", "words", "layers", "trained_from", "unit", "method", "absence")
        return tuple(row.get(name) for name in by)

    new = {key(row): row for row in report["rows"]}
    rows = [new.pop(key(row), row) for row in before["rows"]] + list(new.values())
    about = {name: report[name] for name in ("command", "date", "commit")}
    return before | {"rows": rows, "again": [*before.get("again", []), about]}


def _models(varied: bool, seeds: Sequence[int]) -> list[dict[str, int]]:
    """The models of a grammar that `--inside` looks into, as arguments of `table_inside`."""
    if seeds:
        return [{"trained_from": seed} for seed in seeds]
    return [{"layers": n} for n in sorted(WIDTHS, reverse=True) if n == Recipe.layers or not varied]


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the tables as JSON; `readme.py` shows them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unit", choices=["slot", "word"], default="slot")
    parser.add_argument("--inside", action="store_true", help="methods that look into the model")
    parser.add_argument(
        "--again",
        action="append",
        default=[],
        choices=WHITE_BOX,
        help="only these methods of --inside; the other rows are kept as they are",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[],
        help="of --inside: only models trained from these; the other rows are kept as they are",
    )
    parser.add_argument("--grammar", choices=["rigid", "varied"], help="by default both")
    parser.add_argument(
        "--absence",
        action="append",
        default=[],
        help="only these, not of --inside; the other rows are kept as they are",
    )
    parser.add_argument("--words", action="append", choices=VOCABULARIES, help="of --unit word")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    n, seed, by_word = arguments.documents, arguments.seed, arguments.unit == "word"
    # With words as features in six languages there is time for some only.
    few = {"methods": ["leave-one-out"], "left_out": NOT_OF_WORDS} if by_word else {}
    rows = [
        row
        for words in (arguments.words or VOCABULARIES if by_word else [Recipe.words])
        for varied in (() if arguments.inside else (False, True))
        if arguments.grammar in (None, "varied" if varied else "rigid")
        for row in table(
            n,
            seed,
            varied=varied,
            words=words,
            unit=arguments.unit,
            only=arguments.absence,
            **few,
        )
    ]
    name = "ground_truth_words" if by_word else "ground_truth"
    if arguments.inside:
        name = "ground_truth_inside"
        rows = [
            row
            for varied in (False, True)
            if arguments.grammar in (None, "varied" if varied else "rigid")
            for own in _models(varied, arguments.seeds)
            for unit in INSIDE_UNITS
            for row in table_inside(n, seed, varied=varied, unit=unit, only=arguments.again, **own)
        ]
    out = arguments.out or Path(__file__).parent / "results" / f"{name}.json"
    report = {**environment(seed=seed), "documents": n, "rows": rows}
    if arguments.again or arguments.absence or arguments.seeds:
        report = renewed(json.loads(out.read_text(encoding="utf-8")), report)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
