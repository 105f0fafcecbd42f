"""Do replacements from a corpus come from the right slot, and attributions name the true causes,
in languages that the matcher was not made on?

    python benchmarks/unseen.py [--languages 30] [--models 7] [--documents 10] [--out FILE]

Each language is invented from a seed (`fact_grammar.invented`), once rigid and once varied. For all
of them: how many draws of `CorpusBaselines` come from the slot that was asked for. With `--models`
tiny models learn some of them (two to six minutes each, into `benchmarks/models`), in some of which
phrases share words, and precision at k is measured as in `ground_truth.py`. Where a model has not
learnt its language, the causes of what it writes are unknown: means are over those that have.
"""

import argparse
import itertools
import json
import math
import random
import re
import string
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from environment import environment
from fact_grammar import Document, load
from fact_grammar.card import loss, slot_scores
from fact_grammar.grammar import Cut
from fact_grammar.invented import GENERATED, Invented
from fact_grammar.train import Recipe, encode, fit, new_model, train_tokenizer
from ground_truth import Absence, attribute, by_hand, precision

from captum_llm_ext import CorpusBaselines, ModelBaselines, Slot

# Languages that models learn: seed, whether varied, whether phrases share words.
LEARNT = (
    (3, True, False),
    (2, False, True),
    (5, True, False),
    (7, False, False),
    (4, True, True),
    (4, False, False),
    (1, True, False),  # A is still at chance after three rounds
)
RECIPE = Recipe(documents=45_000, steps=700, vocabulary=900)
ROUNDS = 4  # of training, at most
ACCURATE = 0.95  # of every generated slot, in a language that is learnt
SIZES = (300, 1_000, 3_000)
TOLD = 2_000


@dataclass(frozen=True)
class Asked:
    """One feature of a document, and a test of replacements for it.

    Attributes:
        slot: Where it stands.
        role: ``"fact"``, ``"generated"`` or ``"connecting"``.
        fitting: Whether a replacement is one that the language allows.
    """

    slot: Slot
    role: str
    fitting: Callable[[str], bool]


def texts(language: Invented, n: int, purpose: str = "corpus") -> list[str]:
    """Documents of a language as texts, by the purpose they serve."""
    rng = random.Random(f"{purpose} {language.seed}")
    return [language.sample(rng).text for _ in range(n)]


def documents(language: Invented, n: int) -> list[Document]:
    """Documents to explain; half of them with the whole line still to be written."""
    rng = random.Random(f"test {language.seed}")
    return [language.sample(rng, ("slot", "line")[i % 2]) for i in range(n)]


def lessons(language: Invented, number: int) -> list[str]:
    """The training texts of a round.

    In the first steps of the first one, slots with the same fillers agree nine times in ten. Where
    a fact has the fillers of others beside it, a learner finds no slope toward it otherwise.
    """
    rng = random.Random(f"train {language.seed} {number}")
    n_agreeing = RECIPE.tuned * RECIPE.batch if number == 0 else 0
    return [
        language.sample(
            rng, stray=RECIPE.stray, agreeing=i < n_agreeing and rng.random() < 0.9
        ).text
        for i in range(RECIPE.documents)
    ]


def learn(language: Invented, out: Path) -> None:
    """Trains a tiny model on a language, round by round, until it has learnt it or `ROUNDS` are
    over, and writes it with its tokenizer."""
    texts_of_round = lessons(language, 0)
    tokenizer = train_tokenizer(texts_of_round[-10_000:], RECIPE.vocabulary)
    model = new_model(tokenizer, torch.Generator().manual_seed(RECIPE.seed))
    for number in range(ROUNDS):
        fit(model, encode(texts_of_round, tokenizer), RECIPE, tokenizer.pad_token_id)
        found = accuracy(language, model, tokenizer, "check")
        print(f"{language.name}, round {number}: {found}", file=sys.stderr, flush=True)
        if min(found.values()) >= ACCURATE:
            break
        texts_of_round = lessons(language, number + 1)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    model.save_pretrained(out)


def known(language: Invented) -> tuple[Any, Any]:
    """The model of a language and its tokenizer; trained if missing."""
    folder = Path(__file__).parent / "models" / f"invented-{language.name}"
    if not (folder / "model.safetensors").exists():  # written last
        learn(language, folder)
    return load(folder)


def accuracy(
    language: Invented, model: Any, tokenizer: Any, purpose: str = "held out", n: int = 200
) -> dict[str, float]:
    """How often the likeliest text of a generated slot is the one that its causes determine.

    For A, of which several are allowed: how often it has half of the probability it should have.
    """
    rng = random.Random(f"{purpose} {language.seed}")
    given = [language.sample(rng) for _ in range(n)]
    scores = slot_scores(model, tokenizer, given)
    found: dict[str, list[float]] = {name: [] for name in GENERATED}
    for document, score in zip(given, scores, strict=True):
        for name in GENERATED:
            if document.causes[name]:
                facts = {slot.name: slot.text for slot in document.slots}
                n = len(language.allowed(name, facts))
                likely = score[name].log_prob > math.log(0.5 / n) if n > 1 else score[name].expected
                found[name].append(float(likely))
    return {name: mean(values) for name, values in found.items()}


def how_well(language: Invented, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Whether a model has learnt its language, on texts that it was not trained on."""
    found = accuracy(language, model, tokenizer)
    rng = random.Random(f"loss {language.seed}")
    reached, least = loss(model, tokenizer, [language.sample(rng) for _ in range(200)])
    return {
        "learnt": min(found.values()) >= ACCURATE,
        "accuracy": found,
        "loss": reached,
        "least_loss": least,
    }


def asked(language: Invented, document: Document, unit: str) -> Iterator[Asked]:
    """The features of a document: its slots and connecting words, or (``"word"``) all its words."""
    spans = [
        (s.start, s.stop) for part in ("prompt", "continuation") for s in document.segments(part)
    ]
    if unit == "word":
        spans = [match.span() for match in re.finditer(r"\s*\S+", document.text)]
    for start, stop in spans:
        slot = Slot(document.text, start, stop, unit=unit, generated=start >= document.cut)
        own = next((s for s in document.slots if s.start < stop and start < s.stop), None)
        if own is None:
            alike = language.alike(_bare(slot.text)) | {_bare(slot.text)}
            yield Asked(slot, "connecting", partial(_paraphrases, slot.text, alike))
            continue
        inside = document.text[max(start, own.start) : min(stop, own.stop)].strip()
        before, after = slot.text.split(inside, 1)
        others = {part for text in own.alternatives for part in _parts(text, unit)} - {inside}
        fitting = {before + other + after for other in others}
        role = "generated" if own.name in GENERATED else "fact"
        yield Asked(slot, role, fitting.__contains__)


def _parts(text: str, unit: str) -> set[str]:
    """Possible replacements of a filler, or of a word of it: any words of another one."""
    words = text.split()
    if unit != "word":
        return {text}
    ends = range(1, len(words) + 1)
    return {" ".join(words[i:j]) for j in ends for i in range(j)}


def _paraphrases(original: str, alike: set[str], drawn: str) -> bool:
    return drawn == original or all(_bare(word) in alike for word in drawn.split())


def _bare(text: str) -> str:
    return text.strip().strip(string.punctuation)


def right_slot(
    language: Invented, baselines: CorpusBaselines, unit: str, n: int = 6, draws: int = 3
) -> dict[str, float]:
    """Per role the share of draws that the language allows in the place of the feature."""
    generator = torch.Generator().manual_seed(0)
    hits: Counter[tuple[str, bool]] = Counter()
    for document in documents(language, n):
        for feature in asked(language, document, unit):
            hits.update(
                (feature.role, feature.fitting(str(baselines(feature.slot, generator))))
                for _ in range(draws)
            )
    roles = ("fact", "generated", "connecting")
    return {role: hits[role, True] / (hits[role, True] + hits[role, False]) for role in roles}


def draw_rows(n_languages: int, sizes: Sequence[int], units: Sequence[str]) -> Iterator[dict]:
    """How many draws come from the right slot: a row per language, corpus size and unit."""
    for seed in range(n_languages):
        for varied in (False, True):
            language = Invented(seed, varied)
            for size in sizes:
                baselines = CorpusBaselines(texts(language, size), min_candidates=0)
                for unit in units:
                    yield {
                        "seed": seed,
                        "varied": varied,
                        "kind": language.kind,
                        "corpus": size,
                        "unit": unit,
                        **right_slot(language, baselines, unit),
                    }


def model_rows(
    n_models: int, n: int, methods: Sequence[str], units: Sequence[Cut]
) -> Iterator[dict]:
    """Precision at k with models: a row per language, unit, method and kind of absence."""
    for seed, varied, sharing in LEARNT[:n_models]:
        language = Invented(seed, varied, sharing)
        model, tokenizer = known(language)
        learnt = how_well(language, model, tokenizer)
        print(language.name, learnt, file=sys.stderr, flush=True)
        corpus = CorpusBaselines(texts(language, TOLD), min_candidates=0)
        given = documents(language, n)
        for unit, method in itertools.product(units, methods):
            for name, absence in _absences(corpus, unit).items():
                results = [attribute(model, tokenizer, d, method, absence, unit) for d in given]
                both = list(zip(given, results, strict=True))
                everything = [precision(d, r, unit=unit) for d, r in both]
                content = [precision(d, r, unit=unit, content_only=True) for d, r in both]
                yield {
                    "seed": seed,
                    "varied": varied,
                    "sharing": sharing,
                    "kind": language.kind,
                    **learnt,
                    "unit": unit,
                    "method": method,
                    "absence": name,
                    "precision": mean(v for found in everything for v in found.values()),
                    "precision_content_words": mean(v for found in content for v in found.values()),
                }


def _absences(corpus: CorpusBaselines, unit: Cut) -> dict[str, Absence]:
    by_model = ModelBaselines()
    return {
        "deletion": Absence(lambda _: None, lambda _: None),
        "same slot, `CorpusBaselines`": Absence(lambda _: corpus, lambda _: corpus),
        "`ModelBaselines`": Absence(lambda _: by_model, lambda _: by_model),
        "same slot, lists by hand": Absence(by_hand("prompt", unit), by_hand("continuation", unit)),
    }


def summary(rows: Sequence[dict], by: Sequence[str], values: Sequence[str]) -> list[dict]:
    """Means and minima over languages."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    return [
        {
            **dict(zip(by, key, strict=True)),
            "languages": len(own),
            **{value: mean(row[value] for row in own) for value in values},
            **{f"{value}, worst": min(row[value] for row in own) for value in values},
        }
        for key, own in groups.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the tables as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--languages", type=int, default=30)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--units", nargs="+", default=["slot", "word"])
    parser.add_argument(
        "--models", type=int, default=0, help=f"how many of {len(LEARNT)} languages"
    )
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--methods", nargs="+", default=["leave-one-out", "Shapley, permutations"])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "unseen.json"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, list[dict]] = {"draws": [], "precision": []}
    if arguments.out.exists():  # those that are not asked for stay
        report = json.loads(arguments.out.read_text(encoding="utf-8"))
        found["precision"] = [] if arguments.models else report["precision"]
        found["draws"] = [] if arguments.languages else report["draws"]
    rows = {
        "draws": draw_rows(arguments.languages, arguments.sizes, arguments.units),
        "precision": model_rows(
            arguments.models, arguments.documents, arguments.methods, arguments.units
        ),
    }
    for name, of_kind in rows.items():
        for row in of_kind:
            found[name].append(row)
            print(row, file=sys.stderr, flush=True)
            _write(found, arguments.documents, arguments.out)  # it takes hours: nothing is lost


def _write(found: dict[str, list[dict]], n_documents: int, out: Path) -> None:
    roles = ("fact", "generated", "connecting")
    precisions = ("precision", "precision_content_words")
    learnt = [row for row in found["precision"] if row["learnt"]]
    report = {
        **environment(seed=0),
        "documents": n_documents,
        "draws_mean": summary(found["draws"], ("varied", "corpus", "unit"), roles),
        "precision_mean": summary(learnt, ("unit", "method", "absence"), precisions),
        **found,
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
