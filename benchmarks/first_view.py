"""Which view names the passage that an answer came from: direct effects or total shares.

    PYTHONPATH=benchmarks python benchmarks/first_view.py [--model smollm2] [--cache FOLDER]

Four passages and a question, as people ask a retrieval model; one has the fact. Answers that do not
hold it are left out: the model is small, and writes nonsense to half of the questions. Two
references that are not this package's: the passage with the fact, and what each passage does to the
log-probability of the whole answer as it was written, which by the chain rule is its total effect
on it, through all that was written before: exact Shapley values of deleted passages from a plain
loop of forward passes in float32.

`--cache` keeps each prompt's result: a run goes on where it was ended.
"""

import argparse
import json
import math
import warnings
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from captum.attr import KernelShap
from environment import environment
from real_causes.checkpoints import folder
from real_results import LAKES as LAKE_PASSAGES
from real_results import MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_llm_ext import ChatInput, GenerationAttribution, GenerationAttributionResult
from captum_llm_ext.result.reading import Reading
from captum_llm_ext.result.whole_answer import whole_answer_shares

RESULTS = Path(__file__).parent / "results" / "first_view.json"
# What a language model draws has its error; what a set of deleted passages does has none.
ABSENCES: dict[str, Any] = {"deletion": "delete", "`ModelBaselines`": None}

LAKES = (
    "Lake Superior holds ten percent of the world's surface fresh water.",
    "The Caspian Sea is bounded by Kazakhstan and Russia.",
    "Lake Titicaca lies 3812 metres above sea level.",
    "Lake Baikal is 1642 metres deep.",
)
PEOPLE = (
    "Anna is a nurse in Lisbon and keeps two cats.",
    "Bob is a farmer near Oslo and sells potatoes.",
    "Carla is a judge in Madrid and plays the violin.",
    "David is a pilot from Dublin and collects stamps.",
)
ORDERS = (
    "Order 417 was sent to Hamburg on Monday.",
    "Order 582 was sent to Geneva on Friday.",
    "Order 633 is still waiting for paint.",
    "Order 719 was cancelled because of the price.",
)
HOTEL = (
    "Breakfast is served from seven to ten in the garden room.",
    "The swimming pool is on the roof and closes at nine.",
    "Parking costs twelve euros a day and is behind the church.",
    "Dogs are welcome, but they must not enter the restaurant.",
)
# Passages, a question, which passage has the answer, and what an answer must hold.
QUESTIONS = (
    (LAKES, "How deep is Lake Baikal?", 3, "1642"),
    (LAKES, "How high does Lake Titicaca lie?", 2, "3812"),
    (LAKES, "Which countries is the Caspian Sea bounded by?", 1, "Kazakhstan"),
    (LAKES, "How much of the world's surface fresh water does Lake Superior hold?", 0, "ten"),
    (PEOPLE, "Who is a nurse, and where?", 0, "Lisbon"),
    (PEOPLE, "What does the farmer sell?", 1, "potatoes"),
    (PEOPLE, "Which instrument does the judge play?", 2, "violin"),
    (PEOPLE, "What does David collect?", 3, "stamps"),
    (ORDERS, "Where was order 417 sent?", 0, "Hamburg"),
    (ORDERS, "Where was order 582 sent?", 1, "Geneva"),
    (ORDERS, "What is order 633 waiting for?", 2, "paint"),
    (ORDERS, "Why was order 719 cancelled?", 3, "price"),
    (HOTEL, "When and where is breakfast served?", 0, "garden"),
    (HOTEL, "Where is the swimming pool?", 1, "roof"),
    (HOTEL, "How much does parking cost?", 2, "twelve"),
    (HOTEL, "Where must dogs not go?", 3, "the restaurant."),
    # That of the fixture, whose answer goes on about another passage.
    (tuple(LAKE_PASSAGES.split("\n\n")[:4]), LAKE_PASSAGES.split("\n\n")[4], 3, "1642"),
)
N_PASSAGES = 4


def message(passages: tuple[str, ...], question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "\n\n".join([*passages, question])}]


def answer_of(model: Any, tokenizer: Any, content: list[dict[str, str]]) -> torch.Tensor:
    """The greedy answer, as ids."""
    ids = tokenizer.apply_chat_template(
        content, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    new = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
    ends = [i for i, token in enumerate(new.tolist()) if token == tokenizer.eos_token_id]
    return new[: ends[0]] if ends else new


def log_probability(model: Any, tokenizer: Any, parts: list[str], target: torch.Tensor) -> float:
    """Log-probability of an answer after a message of these parts."""
    content = [{"role": "user", "content": "\n\n".join(parts)}]
    ids = tokenizer.apply_chat_template(
        content, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"][0]
    with torch.no_grad():
        logits = model(torch.cat([ids, target])[None]).logits[0, len(ids) - 1 : -1]
    told = logits.double().log_softmax(-1).gather(1, target[:, None])
    return float(told.sum())


def shapley(model: Any, tokenizer: Any, parts: list[str], target: torch.Tensor) -> list[float]:
    """Exact Shapley values of the passages and the question, by all coalitions of them."""
    n = len(parts)
    values = {
        kept: log_probability(
            model, tokenizer, [p for p, k in zip(parts, kept, strict=True) if k], target
        )
        for kept in product((False, True), repeat=n)
    }
    found = [0.0] * n
    for kept, value in values.items():
        for i in range(n):
            if not kept[i]:
                with_it = (*kept[:i], True, *kept[i + 1 :])
                weight = math.factorial(sum(kept)) * math.factorial(n - 1 - sum(kept))
                found[i] += weight / math.factorial(n) * (values[with_it] - value)
    return found


def views(result: GenerationAttributionResult) -> dict[str, Any]:
    """Attributions of each view to the passages and the question."""
    n = len(result.output_tokens)
    direct = [0.0] * (N_PASSAGES + 1)
    read = Reading(result, "paragraph")
    for cause in read.causes(0, n).prompt:
        direct[read.prompt.part_of[cause.column]] = cause.attribution
    total = result.total(level="paragraph")
    end = whole_answer_shares(result, "paragraph")
    shares, begins = total.span()
    weights = total.strength / total.strength.sum()
    return {
        "direct": direct,
        "through": shares.tolist(),
        "begins": float(begins.sum()),
        "first": "through" if end is not None and end.is_first else "direct",
        "direct_share": float((weights @ total.direct).sum()),
    }


def rank(values: list[float], passage: int) -> int:
    """Rank of one passage among the passages, from 1."""
    return 1 + sum(value > values[passage] for value in values[:N_PASSAGES])


def agreement(one: list[float], other: list[float]) -> float:
    """Pearson's correlation."""
    pair = torch.tensor([one, other], dtype=torch.float64)
    return float(torch.corrcoef(pair)[0, 1])


def measured(exact: Any, quick: Any, tokenizer: Any, number: int, absence: str, path: Path) -> Any:
    """A row of the report; its result is kept beside it."""
    passages, question, passage, holds = QUESTIONS[number]
    content = message(passages, question)
    target = answer_of(exact, tokenizer, content)
    text = tokenizer.decode(target)
    row: dict[str, Any] = {"question": question, "answer": text, "absence": absence}
    if holds not in text:
        return row
    given = {} if ABSENCES[absence] is None else {"baselines": ABSENCES[absence]}
    inp = ChatInput(content, tokenizer, "paragraph", **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = GenerationAttribution(KernelShap(quick), tokenizer).attribute(
            inp, target, seed=0, output_unit="word"
        )
    result.save(path.with_suffix(".safetensors"))
    told = views(result)
    reference = shapley(exact, tokenizer, [*passages, question], target)
    row |= told | {"passage": passage, "reference": reference}
    row |= {"evaluations": result.n_evaluations, "reference_rank": rank(reference, passage)}
    for view in ("direct", "through"):
        row[f"{view}_rank"] = rank(told[view], passage)
        row[f"{view}_correlation"] = agreement(told[view], reference)
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the answers that hold the fact, per absence."""
    told: dict[str, Any] = {}
    for absence in dict.fromkeys(row["absence"] for row in rows):
        asked = [row for row in rows if row["absence"] == absence]
        right = [row for row in asked if "direct" in row]
        told[absence] = {"asked": len(asked), "right": len(right)} | {
            name: mean(float(of(row)) for row in right)
            for view in ("direct", "through")
            for name, of in (
                (f"{view}: passage first", lambda row, v=view: row[f"{v}_rank"] == 1),
                (f"{view}: correlation", lambda row, v=view: row[f"{v}_correlation"]),
            )
            if right
        }
        if right:
            told[absence]["first line: passage first"] = mean(
                row[f"{row['first']}_rank"] == 1 for row in right
            )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cache", type=Path, required=True, help="a folder for results")
    parser.add_argument("--absence", choices=list(ABSENCES), action="append")
    parser.add_argument("--report", action="store_true", help="of what is in the cache, no more")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    places = {
        (number, absence): arguments.cache / f"{number}_{absence.strip('`')}.json"
        for absence in arguments.absence or ABSENCES
        for number in range(len(QUESTIONS))
    }
    missing = {} if arguments.report else {k: p for k, p in places.items() if not p.exists()}
    if missing:
        where = folder(arguments.model)
        tokenizer = AutoTokenizer.from_pretrained(where)
        exact, quick = (
            AutoModelForCausalLM.from_pretrained(where, dtype=dtype).eval()
            for dtype in (torch.float32, torch.bfloat16)
        )
        for (number, absence), path in missing.items():
            row = measured(exact, quick, tokenizer, number, absence, path)
            path.write_text(json.dumps(row))
            print(json.dumps(row), flush=True)
    rows = [json.loads(path.read_text()) for path in places.values() if path.exists()]
    report = environment(seed=0, dtype="bfloat16") | {"model": MODEL, "summary": summary(rows)}
    RESULTS.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
