"""Total attribution on documents whose last word depends on a fact through another word only.

In the fact grammar D, the last word, depends on A alone, which was written before it, and A on the
occupation. Two questions, on as many documents as are asked for, and a third on a real model:

* **Shares.** `result.total()` of several methods: which share of D the occupation has directly and
  in the end, and whether it is named first, before all other features and all words of the answer.
* **The causal number.** `total_effect` in nats, of the occupation and of the facts that lead to
  nothing of D, beside the exact one: every A is tried, with the model's own probability of it. The
  rest of the answer is held as it is there, on which D does not depend.
* **Copied words.** Of right answers of SmolLM2 to questions about four passages, as `first_view.py`
  keeps them: numbers and words of four letters or more that are in one passage alone, and not in
  the question, were copied from there. Where the strongest direct cause of such a word is a word of
  the answer, which passage has the largest direct, and which the largest total share, among
  passages and among all parts?

    python benchmarks/totals.py [--documents 20] [--samples 64] [--methods NAME ...]
    python benchmarks/totals.py --samples 0 --methods --retrieval FOLDER   # first_view.py --cache

What is not measured again keeps what the file says; each part names the commit it is of.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from captum.attr import FeatureAblation
from environment import environment
from fact_grammar import Document, Grammar, corpus, load
from first_view import MODEL, QUESTIONS
from ground_truth import (
    METHODS,
    Absence,
    absences,
    as_input,
    attribute,
    attribute_inside,
    by_hand,
)

from captum_llm_ext import GenerationAttribution, GenerationAttributionResult

SAME_SLOT = "same slot, `CorpusBaselines`"
ASKED = ("leave-one-out", "Shapley, permutations", "Shapley, kernel", "linear system", "ALTI")
NO_CAUSES = ("name", "city", "state")  # of D, by no way


def shares(given: Sequence[Document], method: str) -> dict[str, Any]:
    """Shares of D attributed to the occupation, direct and total."""
    model, tokenizer = load()
    known = absences(Grammar(), corpus())
    rows: list[dict[str, Any]] = []
    begun = time.process_time()
    for document in given:
        if method in METHODS:
            result = attribute(model, tokenizer, document, method, known[SAME_SLOT])
        else:
            result = attribute_inside(model, tokenizer, document, method, known)
        total = result.total()
        segments = document.segments("continuation")
        last = next(i for i, own in enumerate(segments) if own.slot == "D")
        at = [t for t, piece in enumerate(result.output_pieces) if piece.feature == last]
        job = [s.slot for s in document.segments("prompt")].index("occupation")
        weights = total.strength[at] / total.strength[at].sum()
        prompt, output = total.span(at[0], at[-1] + 1)
        rows.append(
            {
                "share": float(prompt[job]),
                "direct_share": float(weights @ total.direct[at, job]),
                "first": bool(prompt.argmax() == job and prompt[job] > output.max()),
                "evaluations": result.n_evaluations,
            }
        )
    row = {
        "method": method,
        "documents": len(rows),
        "share": mean(row["share"] for row in rows),
        "lowest_share": min(row["share"] for row in rows),
        "at_least_95": mean(row["share"] >= 0.95 for row in rows),
        "direct_share": mean(row["direct_share"] for row in rows),
        "named_first": mean(row["first"] for row in rows),
        "evaluations": mean(row["evaluations"] for row in rows),
        "cpu_s": time.process_time() - begun,
    }
    print(row, file=sys.stderr, flush=True)
    return row | {"shares": [row["share"] for row in rows]}


class Exactly:
    """Expected log-probability of D after a prompt, by enumerating every A.

    Args:
        document: A biography whose prompt ends before A.
    """

    def __init__(self, document: Document) -> None:
        self._model, self._tokenizer = load()
        self._model.double()
        self._document, self._words = document, Grammar().words
        ending = document.slot("D")
        self._ending = f" {ending.text}"
        self._between = document.text[document.slot("A").stop : ending.start - 1]

    def expected(self, prompt: str) -> float:
        """In nats."""
        stop = self._between.split()[0][:1]  # the comma after A ends it
        likely = self._log_probs([(prompt, f" {a}{stop}") for a in self._words.interests])
        texts = [f"{prompt} {a}{self._between}" for a in self._words.interests]
        said = self._log_probs([(text, self._ending) for text in texts])
        return float(likely.softmax(0) @ said)

    def effect(self, slot: str) -> float:
        """Mean effect of replacing a fact by each other one."""
        fact = self._document.slot(slot)
        others = [other for other in fact.alternatives if other != fact.text]
        prompts = [self._document.edited(slot, other).prompt for other in others]
        return self.expected(self._document.prompt) - mean(map(self.expected, prompts))

    def _log_probs(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        """Log-probabilities of texts after others, in one padded pass."""
        encode = self._tokenizer
        rows = [
            (encode(text)["input_ids"], encode(said, add_special_tokens=False)["input_ids"])
            for text, said in pairs
        ]
        longest = max(len(before) + len(ids) for before, ids in rows)
        padded = [[*b, *i, *[0] * (longest - len(b) - len(i))] for b, i in rows]
        with torch.no_grad():
            logits = self._model(torch.tensor(padded), use_cache=False).logits
        found = [
            own[len(b) - 1 : len(b) + len(i) - 1].log_softmax(-1)[range(len(i)), i].sum()
            for own, (b, i) in zip(logits, rows, strict=True)
        ]
        return torch.stack(found)


def causal(given: Sequence[Document], n_samples: int) -> dict[str, Any]:
    """`total_effect` beside the exact value."""
    model, tokenizer = load()
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    rows: list[dict[str, Any]] = []
    for seed, document in enumerate(given):
        absence = Absence(by_hand("prompt"), by_hand("continuation"))
        inp, _ = as_input(document, tokenizer, absence)
        slots = [segment.slot for segment in document.segments("prompt")]
        asked = ["occupation", *(slot for slot in NO_CAUSES if slot in slots)]
        begun = time.process_time()
        found = attribution.total_effect(
            inp,
            document.continuation,
            feature=[slots.index(slot) for slot in asked],
            n_samples=n_samples,
            seed=seed,
        )
        spent = time.process_time() - begun
        exactly = Exactly(document)
        encoded = tokenizer(
            document.continuation, add_special_tokens=False, return_offsets_mapping=True
        )
        ending = document.slot("D")
        span = ending.start - document.cut, ending.stop - document.cut
        at = [
            t
            for t, (start, stop) in enumerate(encoded["offset_mapping"])
            if start < span[1] and span[0] < stop
        ]
        value, error = found.span(at[0], at[-1] + 1)
        for i, slot in enumerate(asked):
            exact = exactly.effect(slot)
            rows.append(
                {
                    "document": seed,
                    "fact": slot,
                    "effect": float(value[i]),
                    "standard_error": float(error[i]),
                    "direct": float(found.direct[i, at].sum()),
                    "exact": exact,
                    "regenerated": found.is_regenerated[i],
                    "answers": found.n_generated,
                    "cpu_s": spent,
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return {"n_samples": n_samples, "documents": len(given), **_summary(rows), "rows": rows}


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    jobs = [row for row in rows if row["fact"] == "occupation"]
    rest = [row for row in rows if row["fact"] != "occupation"]
    off = [(row["effect"] - row["exact"]) / row["standard_error"] for row in jobs]
    bias = mean(row["effect"] - row["exact"] for row in jobs)
    spread = math.sqrt(mean(row["standard_error"] ** 2 for row in jobs) / len(jobs))
    return {
        "within_two_errors": mean(abs(z) <= 2 for z in off),
        "mean_effect": mean(row["effect"] for row in jobs),
        "mean_exact": mean(row["exact"] for row in jobs),
        "mean_difference": bias,
        "its_standard_error": spread,
        "mean_direct": mean(abs(row["direct"]) for row in jobs),
        "largest_other": max(abs(row["effect"]) for row in rest),
        "largest_other_exact": max(abs(row["exact"]) for row in rest),
        "named_first": mean(
            row["effect"] > max(o["effect"] for o in rest if o["document"] == row["document"])
            for row in jobs
        ),
    }


def _words(text: str) -> list[str]:
    """Numbers, and words long enough to be no "of" or "the", which stand everywhere."""
    return re.findall(r"\d+|\w{4,}", text.lower())


def copied(result: GenerationAttributionResult, number: int) -> list[dict[str, Any]]:
    """The copied words of an answer to question `number`, and which parts are named first."""
    passages, question, _, _ = QUESTIONS[number]
    total = result.total(level="paragraph")
    pieces = [piece.feature for piece in result.output_pieces]
    # Of the parts, then of the answer's words: attributions as they are, none left out.
    of_parts = result.at_level("paragraph")[1].double()
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(result.output_features or ()):
        words = _words(name)
        where = [n for n, text in enumerate(passages) if {*words} & {*_words(text)}]
        if not words or len(where) != 1 or {*words} & {*_words(question)}:
            continue
        at = [t for t, feature in enumerate(pieces) if feature == i]
        direct = of_parts[at].sum(0)
        assert result.output_attr is not None
        largest_word = float(result.output_attr[at].double().sum(0).max())
        share, begins = total.span(at[0], at[-1] + 1)
        n, own = len(passages), where[0]
        rows.append(
            {
                "question": question,
                "word": name.strip(),
                "passage": own,
                "answer_word_is_first": largest_word > float(direct.max()),
                "direct": direct.tolist(),
                "total": share.tolist(),
                "begins": float(begins.sum()),
                "direct_first_of_passages": bool(direct[:n].argmax() == own),
                "total_first_of_passages": bool(share[:n].argmax() == own),
                "total_first_of_parts": bool(share.argmax() == own),
            }
        )
    return rows


def retrieval(folder: Path) -> dict[str, Any]:
    """By absence: how often the passage that a word was copied from is named first."""
    told: dict[str, Any] = {}
    for path in sorted(folder.glob("*_*.safetensors")):
        number, absence = path.stem.split("_", 1)
        rows = copied(GenerationAttributionResult.load(path), int(number))
        own = told.setdefault(absence, {"answers": 0, "words": 0, "through_the_answer": 0})
        own["answers"] += 1
        own["words"] += len(rows)
        chained = [row for row in rows if row["answer_word_is_first"]]
        own["through_the_answer"] += len(chained)
        for name in ("direct_first_of_passages", "total_first_of_passages", "total_first_of_parts"):
            own[name] = own.get(name, 0) + sum(row[name] for row in chained)
        own["rows"] = [*own.get("rows", []), *rows]
    return told


def main(argv: Sequence[str] | None = None) -> None:
    """Writes both tables as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--samples", type=int, default=64, help="0: without the causal number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=ASKED)
    parser.add_argument("--retrieval", type=Path, help="what first_view.py kept: copied words")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/totals.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng = random.Random(f"totals {arguments.seed}")
    given = [Grammar().sample(rng, "A") for _ in range(arguments.documents)]
    earlier: dict[str, Any] = {}
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text(encoding="utf-8"))
    report = {**environment(seed=arguments.seed), "shares": earlier.get("shares", [])}
    report["causal"], report["retrieval"] = earlier.get("causal"), earlier.get("retrieval")
    report["commands"] = [*earlier.get("commands", []), report["command"]]

    def write() -> None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for method in arguments.methods:
        row = {"commit": report["commit"]} | shares(given, method)
        report["shares"] = [own for own in report["shares"] if own["method"] != method] + [row]
        write()
    if arguments.samples:
        report["causal"] = {"commit": report["commit"]} | causal(given, arguments.samples)
        print({k: v for k, v in report["causal"].items() if k != "rows"}, file=sys.stderr)
        write()
    if arguments.retrieval:
        report["retrieval"] = {"commit": report["commit"], "model": MODEL}
        report["retrieval"] |= retrieval(arguments.retrieval)
        write()


if __name__ == "__main__":
    main()
