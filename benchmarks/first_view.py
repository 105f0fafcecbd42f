"""Which view names the passage that an answer came from: direct effects or total shares.

    PYTHONPATH=benchmarks python benchmarks/first_view.py [--model smollm2] [--cache FOLDER]

Four passages and a question, as people ask a retrieval model; one has the fact. Answers that do not
hold it are left out: the model is small, and writes nonsense to half of the questions. Three views:
the whole answer by itself (`answer` of a result, which its first line tells), direct effects added
up over its tokens, and total shares. Two references that are not this package's: the passage with
the fact, and what each passage does to the log-probability of the whole answer as it was written,
which by the chain rule is its total effect on it, through all that was written before: exact
Shapley values from a plain loop of forward passes in float32 over deleted passages. Of replaced
ones these are averages over other draws of the replacements, with their standard errors, and their
values are this package's own (`to_game`), again in float32.

`--cache` keeps each prompt's result: a run goes on where it was ended. `--whole` measures the first
view alone: a third of the time of a prompt.
"""

import argparse
import json
import math
import warnings
from collections.abc import Sequence
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
from captum_llm_ext.text.inputs import as_prompt

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
VIEWS = ("whole", "direct", "through")
# Of replacements, for the reference, which takes most of the time: with their standard errors, they
# tell a mean to a tenth of what the largest part has.
DRAWS = 4


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


def log_probability(model: Any, ids: Sequence[int], target: torch.Tensor) -> float:
    """Log-probability of an answer after a message of these parts."""
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *target.tolist()]])).logits[0, len(ids) - 1 : -1]
    told = logits.double().log_softmax(-1).gather(1, target[:, None])
    return float(told.sum())


def shapley(inp: ChatInput, model: Any, tokenizer: Any, target: torch.Tensor) -> list[list[float]]:
    """Exact Shapley values of the passages and the question, by all coalitions of them.

    In every draw of the replacements: one where passages are deleted.
    """
    sets = list(product((False, True), repeat=N_PASSAGES + 1))
    prompt = as_prompt(inp, tokenizer, None)
    if prompt.own_baseline is None:
        rows = prompt.render(torch.tensor(sets), torch.Generator().manual_seed(0))
        return [_shapley(sets, [log_probability(model, row.ids, target) for row in rows])]
    attribution = GenerationAttribution(KernelShap(model), tokenizer)
    games = (
        attribution.to_game(inp, target, output_unit=None, n_draws=1, seed=1000 + draw)
        for draw in range(DRAWS)
    )
    return [_shapley(sets, game(torch.tensor(sets).numpy()).tolist()) for game in games]


def _shapley(sets: Sequence[tuple[bool, ...]], told: Sequence[float]) -> list[float]:
    n, values = len(sets[0]), dict(zip(sets, told, strict=True))
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
    shares, begins = total.span()
    weights = total.strength / total.strength.sum()
    return {
        "direct": direct,
        "through": shares.tolist(),
        "begins": float(begins.sum()),
        "direct_share": float((weights @ total.direct).sum()),
    }


def rank(values: list[float], passage: int) -> int:
    """Rank of one passage among the passages, from 1."""
    return 1 + sum(value > values[passage] for value in values[:N_PASSAGES])


def agreement(one: list[float], other: list[float]) -> float:
    """Pearson's correlation."""
    pair = torch.tensor([one, other], dtype=torch.float64)
    return float(torch.corrcoef(pair)[0, 1])


def measured(
    exact: Any, quick: Any, tokenizer: Any, number: int, absence: str, path: Path, known: Any
) -> Any:
    """A row of the report; its result is kept beside it. What is `known` of it is not repeated."""
    passages, question, passage, holds = QUESTIONS[number]
    content = message(passages, question)
    target = answer_of(exact, tokenizer, content)
    text = tokenizer.decode(target)
    row: dict[str, Any] = {"question": question, "answer": text, "absence": absence, **known}
    if holds not in text:
        return row
    given = {} if ABSENCES[absence] is None else {"baselines": ABSENCES[absence]}
    inp = ChatInput(content, tokenizer, "paragraph", **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attribution = GenerationAttribution(KernelShap(quick), tokenizer)
        held = attribution.attribute(inp, target, seed=0, output_unit=None)
        if path.suffix:  # not with `--whole`
            result = attribution.attribute(inp, target, seed=0, output_unit="word")
            result.save(path.with_suffix(".safetensors"))
            row |= views(result) | {"evaluations": result.n_evaluations}
    told = held.answer
    assert told is not None
    row |= {"whole": told.attributions.tolist(), "whole_se": told.standard_errors.tolist()}
    if "reference_se" not in row:
        each = torch.tensor(shapley(inp, exact, tokenizer, target), dtype=torch.float64)
        row |= {"passage": passage, "reference": each.mean(0).tolist()}
        row |= {"reference_draws": len(each)}
        spread = each.std(0) / len(each) ** 0.5 if len(each) > 1 else torch.zeros(len(each[0]))
        row |= {"reference_se": spread.tolist(), "reference_rank": rank(row["reference"], passage)}
    return ranked(row)


def ranked(row: dict[str, Any]) -> dict[str, Any]:
    """With the rank of the passage and the agreement with the reference by each view."""
    for view in VIEWS:
        if view in row:
            row[f"{view}_rank"] = rank(row[view], row["passage"])
            row[f"{view}_correlation"] = agreement(row[view], row["reference"])
    return row


def reread(path: Path) -> dict[str, Any]:
    """A row of the report; its views are those of today's code on the result kept beside it."""
    row, kept = json.loads(path.read_text()), path.with_suffix(".safetensors")
    if "passage" in row and kept.exists():
        row |= views(GenerationAttributionResult.load(kept))
    return ranked(row)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the answers that hold the fact, per absence."""
    told: dict[str, Any] = {}
    for absence in dict.fromkeys(row["absence"] for row in rows):
        asked = [row for row in rows if row["absence"] == absence]
        right = [row for row in asked if "whole" in row]
        told[absence] = {"asked": len(asked), "right": len(right)}
        for view in VIEWS:
            seen = [row for row in right if view in row]
            if seen:
                first = mean(float(row[f"{view}_rank"] == 1) for row in seen)
                correlation = mean(row[f"{view}_correlation"] for row in seen)
                told[absence] |= {f"{view}: passage first": first}
                told[absence] |= {f"{view}: correlation": correlation}
            if seen and view != "through":  # shares are no amounts
                errors = [
                    abs(a - b)
                    for row in seen
                    for a, b in zip(row[view], row["reference"], strict=True)
                ]
                told[absence] |= {f"{view}: mean error, nats": mean(errors)}
                told[absence] |= {f"{view}: largest error, nats": max(errors)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cache", type=Path, required=True, help="a folder for results")
    parser.add_argument("--absence", choices=list(ABSENCES), action="append")
    parser.add_argument("--report", action="store_true", help="of what is in the cache, no more")
    parser.add_argument("--whole", action="store_true", help="the whole answer by itself alone")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    places = {
        (number, absence): arguments.cache / f"{number}_{absence.strip('`')}.json"
        for absence in arguments.absence or ABSENCES
        for number in range(len(QUESTIONS))
    }
    known = {k: json.loads(p.read_text()) for k, p in places.items() if p.exists()}
    wanted = {"whole"} if arguments.whole else {*VIEWS}
    missing = {
        k: p
        for k, p in places.items()
        if not arguments.report
        and (k not in known or ("passage" in known[k] and not wanted <= {*known[k]}))
    }
    if missing:
        where = folder(arguments.model)
        tokenizer = AutoTokenizer.from_pretrained(where)
        exact, quick = (
            AutoModelForCausalLM.from_pretrained(where, dtype=dtype).eval()
            for dtype in (torch.float32, torch.bfloat16)
        )
        for (number, absence), path in missing.items():
            beside = path.with_suffix("") if arguments.whole else path
            earlier = known.get((number, absence), {})
            row = measured(exact, quick, tokenizer, number, absence, beside, earlier)
            path.write_text(json.dumps(row))
            print(json.dumps(row), flush=True)
    rows = [reread(path) for path in places.values() if path.exists()]
    report = environment(seed=0, dtype="bfloat16") | {"model": MODEL, "summary": summary(rows)}
    RESULTS.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
