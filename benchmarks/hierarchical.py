"""Cost and recall of a search through paragraphs, sentences and words.

    python benchmarks/hierarchical.py [--prompts 12] [--seed 0]
    python benchmarks/hierarchical.py --model FOLDER --passages 12 [--prompts 3] [--planted]

A prompt is a page of biographies, a paragraph each, the last of which the shipped model of the fact
grammar continues: few of its words matter, and it is not said which. `HierarchicalAblation` is held
against `FeatureAblation` over all words, which is the exact answer, and against the true causes.

With a checkpoint (`FOLDER`, such as SmolLM2-135M-Instruct, in bfloat16), a prompt is so many
passages, one of which answers its question, and the three strongest words are looked for. With
``--planted`` words are not all taken out, which takes an hour a prompt of 2,000 ids: what is known
is the passage, and its word that is the answer.
"""

import argparse
import json
import random
import time
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch
from captum.attr import FeatureAblation
from environment import environment
from fact_grammar import Grammar, load
from measured import seconds
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_llm_ext import GenerationAttribution, HierarchicalAblation, TextSegmentInput
from captum_llm_ext.attribution import model_access
from captum_llm_ext.model import Scorer

RESULTS = Path(__file__).parent / "results"
PARAGRAPHS = 4
SHARES = (0.2, 0.05, 0.01, 0.0)
TOP = 3
STRONGEST = f"top {TOP}"  # of the usual share
# An attribution of so many nats is one that a reader would look at.
WORTH_A_LOOK = 0.5


def page(grammar: Grammar, draw: random.Random) -> tuple[str, str]:
    """A prompt and its continuation."""
    *before, last = (grammar.sample(draw, "pronoun") for _ in range(PARAGRAPHS))
    return "\n\n".join([*(one.text.strip() for one in before), last.prompt]), last.continuation


def one(model: Any, tokenizer: Any, prompt: str, target: str) -> dict[str, Any]:
    """Both methods on a prompt; without random draws they differ only in the splits."""
    inp = TextSegmentInput(prompt, tokenizer, ("paragraph", "sentence", "word"), baselines="<unk>")
    found: dict[str, Any] = {}

    def run(name: str, method: Any) -> float:
        attribution = GenerationAttribution(method, tokenizer)
        return seconds(
            lambda: found.update({name: attribution.attribute(inp, target, output_unit=None)})
        )

    took = {"exact": run("exact", FeatureAblation(model))}
    took |= {str(s): run(str(s), HierarchicalAblation(model, share=s)) for s in SHARES}
    took[STRONGEST] = run(STRONGEST, HierarchicalAblation(model, top_k=TOP))
    exact = found.pop("exact")
    strong = exact.token_attr.abs() > WORTH_A_LOOK
    told: dict[str, Any] = {
        "words": exact.token_attr.shape[1],
        "evaluations": exact.n_evaluations,
        "seconds": took["exact"],
        "attributions_worth_a_look": int(strong.sum()),
    }
    for name, result in found.items():
        alone = ~result.token_attr_se.isnan()
        top = exact.token_attr.abs().argmax(1)
        worth = [t for t in range(len(top)) if bool(strong[t].any())]
        told[name] = {
            "evaluations": result.n_evaluations,
            "seconds": took[name],
            "words_taken_out_alone": int(alone.all(0).sum()),
            "of_those_worth_a_look": float(alone[strong].float().mean()) if strong.any() else 1.0,
            "strongest_cause_is_the_exact_one": mean(
                float(result.token_attr[t].abs().argmax() == top[t]) for t in worth
            ),
        }
    return told


FIRST = "Anna Boris Clara David Elena Felix Greta Henrik Ida Jonas Karin Lukas Maria Nils Olga Paul"
LAST = "Keller Novak Lindqvist Moreau Rossi Berg Takeda Silva Haas Petrov Okafor Duarte Weiss Kim"
WORK = "nurse baker lawyer pilot carpenter teacher dentist farmer painter sailor tailor librarian"
CITIES = "Lisbon Oslo Vienna Madrid Geneva Prague Dublin Athens Warsaw Helsinki Turin Bergen Porto"
REST = (
    "The house near the old harbour was bought ten years ago and has a small garden.",
    "Most evenings end with a long walk by the river and a good book.",
    "Two cats and an elderly dog share the kitchen with a parrot that says little.",
    "Every summer the family rents the same cottage in the mountains for three weeks.",
    "On Sundays there is choir practice, and afterwards coffee and cake for everyone.",
    "A brother runs a bicycle shop on the other side of the town hall square.",
)
VARIANTS = {
    "share 0.2": {"share": 0.2},
    "share 0.05": {"share": 0.05},
    "top 3": {"share": 0.05, "top_k": 3},
    "top 3, share 0.2": {"share": 0.2, "top_k": 3},
}


def retrieval(n_passages: int, draw: random.Random) -> tuple[str, str, str]:
    """A prompt, its answer, and the passage that contains it."""
    people = draw.sample([f"{a} {b}" for a in FIRST.split() for b in LAST.split()], n_passages)
    passages = [
        f"{who} is a {draw.choice(WORK.split())} in {draw.choice(CITIES.split())}. "
        + " ".join(draw.sample(REST, 2))
        for who in people
    ]
    place = draw.randrange(n_passages)
    answer = passages[place].split(". ")[0].split()[-1]
    question = (
        f"Question: In which city does {people[place]} live? Answer: {people[place]} lives in"
    )
    return "\n\n".join([*passages, question]), " " + answer, passages[place]


class Remembering(Scorer):
    """Caches rows across methods, to save the benchmark's time; counts are unaffected."""

    known: ClassVar[dict[tuple[int, ...], torch.Tensor]] = {}

    def values(self, rows: Any, target: Any, foils: Any = None) -> torch.Tensor:
        """As the scorer's."""
        new = [row for row in rows if row.ids not in self.known]
        if new:
            self.known.update(zip([r.ids for r in new], super().values(new, target), strict=True))
        return torch.stack([self.known[row.ids] for row in rows])


def on_checkpoint(folder: str, n_passages: int, prompts: int, seed: int, planted: bool) -> Any:
    """Evaluations, and how many of the strongest words were found, of each variant."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    model_access.Scorer = Remembering
    for _ in range(prompts):
        Remembering.known.clear()
        prompt, target, passage = retrieval(n_passages, draw)
        inp = TextSegmentInput(
            prompt, tokenizer, ("paragraph", "sentence", "word"), baselines="delete"
        )

        def run(method: Any, inp: Any = inp, target: str = target) -> Any:
            attribution = GenerationAttribution(method, tokenizer)
            return attribution.attribute(inp, target, output_unit=None)

        row: dict[str, Any] = {"ids": len(tokenizer(prompt)["input_ids"])}
        exact = None if planted else run(FeatureAblation(model))
        start = prompt.index(passage)
        inside = range(start, start + len(passage))
        for name, given in VARIANTS.items():
            if planted and name == "share 0.05":
                continue
            began = time.process_time()
            found = run(HierarchicalAblation(model, **given))
            attr, alone = found.token_attr.sum(0), ~found.token_attr_se[0].isnan()
            best = attr.abs().where(alone, 0.0).topk(TOP).indices.tolist()
            own = {
                "words": len(attr),
                "evaluations": n_asked(found),
                "of leave-one-out": n_asked(found) / (len(attr) + 1),
                "seconds": time.process_time() - began,
                "best": [found.input_tokens[i] for i in best],
                "answer_is_found": any(
                    target.strip() in found.input_tokens[i] and inp.slots[i].start in inside
                    for i in best
                ),
            }
            if exact is not None:
                each = exact.token_attr.abs()
                tops = each.topk(TOP, dim=1).indices
                own["top_3_found"] = float(alone[tops].float().mean())
                own["top_3_of_answer_found"] = float(
                    alone[each.sum(0).topk(TOP).indices].float().mean()
                )
                first = tops[:, 0]
                own["strongest_found"] = float(alone[first].float().mean())
            row[name] = own
            print(name, own, flush=True)
        rows.append(row)
    return rows


def n_asked(result: Any) -> int:
    """Number of rows of a plan, including cached ones."""
    return len(result.masks.unique(dim=0))


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", metavar="FOLDER")
    parser.add_argument("--passages", type=int, default=12)
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "hierarchical.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.model:
        report = json.loads(arguments.out.read_text(encoding="utf-8"))
        kind = f"{arguments.passages} passages" + (", planted" if arguments.planted else "")
        report.setdefault("checkpoint", {})[kind] = {
            **environment(seed=arguments.seed),
            # Not the folder, which is this machine's.
            "command": "python benchmarks/hierarchical.py --model FOLDER",
            "dtype": "bfloat16",
            "prompts": on_checkpoint(
                arguments.model,
                arguments.passages,
                arguments.prompts,
                arguments.seed,
                arguments.planted,
            ),
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        return
    model, tokenizer = load()
    grammar, draw = Grammar(), random.Random(arguments.seed)
    rows = []
    for _ in range(arguments.prompts):
        prompt, target = page(grammar, draw)
        rows.append(one(model, tokenizer, prompt, target))
    shares: dict[str, dict[str, float]] = {}
    for share in [*map(str, SHARES), STRONGEST]:
        shares[share] = {name: mean(row[share][name] for row in rows) for name in rows[0][share]}
        shares[share]["evaluations_of_exact"] = mean(
            row[share]["evaluations"] / row["evaluations"] for row in rows
        )
    report = {
        **environment(seed=arguments.seed),
        "prompts": arguments.prompts,
        "words": mean(row["words"] for row in rows),
        "exact_evaluations": mean(row["evaluations"] for row in rows),
        "exact_seconds": mean(row["seconds"] for row in rows),
        "shares": shares,
    }
    RESULTS.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
