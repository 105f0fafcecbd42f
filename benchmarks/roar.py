"""ROAR for generated text: loss after removing the features that a method ranks highest.

    python benchmarks/roar.py [--documents 24] [--methods NAME ...] [--retrain METHOD/KIND/K ...]

Methods and retrainings that are not asked for keep what the file says of the same documents.

Hooker et al. 2019 ("A Benchmark for Interpretability Methods in Deep Neural Networks") remove what
a method ranks highest from training *and* test data and train anew: if the retrained model is as
good as before, the features carried nothing that others do not. Here the `k` prompt features that a
method ranks highest for a biography of the fact grammar are removed, and what is measured is the
loss of its content words (pronoun, A, B, C and D together, in nats a document).

No retrained model is needed to say what the best possible one loses: in this language the least
loss is closed form, for any law of what is removed (`least_loss`). Removal is of two kinds:

* ``masked``: each feature becomes one ``<unk>``, so a reader sees what is missing;
* ``same slot``: another draw from the slot, of which no one can see that it is one. The best reader
  then weighs all that may have been removed by how often it is, and by the words before. What is
  removed from some documents only makes the same words doubtful in all of them: a method that
  wavers between two facts may lose more than the oracle, which always takes the same.

Some cells are confirmed by real retrainings, of the shipped model's recipe without its strays. What
a method removes from each training text is drawn from what it removes from the documents that were
attributed, among those with the same facts present. So what a mask's *place* tells of the value
behind it (the loss of a reader who knows the method could be lower by that) is in neither number;
`constant` says how often a method removes the same set, and where that is 1 there is nothing to be
told. Two methods are also held against themselves *text by text*: every text of training and test
is attributed, and what is ranked highest there is removed there (``…, each text``). After saliency
the retrained model is a nat better at A than one could be that reads no more than what is left: the
places of the masks tell it of the occupation behind them. After leave-one-out it is as good as one
that reads what is left, within two standard errors. With other draws from the slot in place of
masks it has 7.31 nats where the least is 7.16, ten standard errors away (7.46 after half as many
steps). From the one to the other C fell from 1.10 to .95 and the pronoun stayed at .57; whether
many more steps close the gap was not run.

A retrained model lies above the least loss where a method wavers: what is shown in a few texts of a
hundred only is too rare to be learnt, C above all, of which neither of its two causes alone tells
anything (`per_word` beside `least_per_word`).

What ROAR cannot see: a word that also stands, or is hinted at, in the output (an occupation is
known from the A that was written, so removing it costs A alone, though C depends on it as well);
masks that leak what they hide; order within what is lost or kept together; and what *this* model
does, for a retrained one is another.
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from environment import environment
from fact_grammar import Document, Grammar, corpus, load
from fact_grammar.card import slot_scores
from fact_grammar.train import Recipe, encode, fit, in_tune, new_model
from ground_truth import absences, attribute, attribute_inside

Kind = Literal["masked", "same slot"]
Law = Mapping[frozenset[str], float]  # which facts are removed together, and how often

KINDS: tuple[Kind, ...] = ("masked", "same slot")
CONTENT = ("pronoun", "A", "B", "C", "D")
MOST = 6  # features removed: as many as there are facts
SAME_SLOT = "same slot, `CorpusBaselines`"
SAMPLED = {
    "leave-one-out": ("leave-one-out", SAME_SLOT),
    "leave-one-out, deletion": ("leave-one-out", "deletion"),
    "Shapley, kernel": ("Shapley, kernel", SAME_SLOT),
}
INSIDE = (
    "linear system",
    "linear system, against its kind",
    "saliency, L2",
    "integrated gradients, corpus",
    "gradient x activation",
    "ALTI",
    "attention weights",
)
RETRAINED = (
    "leave-one-out/masked/3",
    "leave-one-out/same slot/3",
    "saliency, L2/masked/3",
    "saliency, L2, each text/masked/3",
    "leave-one-out, each text/masked/3",
)
_AT_ONCE = 256  # documents whose facts are replaced together
# Which word of the answer each fact decides, given what was written before.
DECIDED = {"name": "pronoun", "occupation": "A", "city": "B", "state": "C"}


@dataclass(frozen=True)
class Fact:
    """The words determined by a fact of the prompt, and the loss of guessing without it.

    Attributes:
        seen: Probability of the word that depends on it, where it is read and fits.
        unseen: Of every word that could stand there, where it is not read.
        fits: How often a random fact in its slot fits the word all the same.
    """

    seen: float
    unseen: float
    fits: float


def facts(grammar: Grammar) -> dict[str, Fact]:
    """The facts that later words depend on, given the words before.

    C depends on occupation and state, and the occupation is known from A, which was written: to C
    the state alone makes a difference. D depends on A.
    """
    words = grammar.words
    n_jobs, n_each = len(words.occupations), len(next(iter(words.occupations.values())))
    n_shared, n_cities = len(words.shared), len(words.cities)
    return {
        "name": Fact(1.0, 1 / len(words.pronouns), 1 / len(words.pronouns)),
        "occupation": Fact(1 / n_each, 1 / (n_jobs * n_each), 1 / n_jobs),
        "city": Fact(1.0, 1 / n_cities, 1 / n_cities),
        "state": Fact(1.0, 1 / n_shared, 1 / n_shared),
    }


def least_loss(law: Law, kind: Kind, known: Mapping[str, Fact]) -> float:
    """The least expected loss of a document's content words, in nats.

    Args:
        law: How often which facts are removed; independent of what they are.
        kind: How.
        known: What each fact decides.
    """
    if kind == "masked":
        return sum(
            share * -sum(math.log(f.unseen if n in gone else f.seen) for n, f in known.items())
            for gone, share in law.items()
        )
    # Whether each fact as it is read fits the words is all that they tell of what was removed.
    total = 0.0
    for fitting in itertools.product((True, False), repeat=len(known)):
        match = dict(zip(known, fitting, strict=True))
        happens = likelihood = 0.0
        for gone, share in law.items():
            often = said = share
            for name, fact in known.items():
                if name in gone:
                    often *= fact.fits if match[name] else 1 - fact.fits
                    said *= fact.unseen
                else:
                    often *= match[name]
                    said *= fact.seen * match[name]
            happens += often
            likelihood += said
        total -= happens * math.log(likelihood) if happens else 0.0
    return total


def removed(document: Document, which: Sequence[int], kind: Kind, rng: random.Random) -> Document:
    """The document without some segments of its prompt.

    Args:
        document: A biography.
        which: Numbers of segments.
        kind: How they are removed. In the same slot a connecting word stays as it is: nothing else
            ever stands there.
        rng: Draws what stands there instead.
    """
    text, cut, slots = document.text, document.cut, list(document.slots)
    segments = document.segments("prompt")
    for number in sorted(which, reverse=True):
        segment = segments[number]
        own = next((s for s in document.slots if s.name == segment.slot and s.start < cut), None)
        if kind == "same slot" and own is None:
            continue
        start, stop = (own.start, own.stop) if own else (segment.start, segment.stop)
        start += text[start] == " "
        new = "<unk>" if kind == "masked" else rng.choice(own.alternatives if own else ())
        more = len(new) - (stop - start)
        text, cut = text[:start] + new + text[stop:], cut + more
        slots = [
            replace(
                slot,
                start=slot.start + more * (slot.start > start),
                stop=slot.stop + more * (slot.stop >= stop),
                text=new if slot.start == start else slot.text,
            )
            for slot in slots
        ]
    return Document(text, cut, slots, document.causes, math.nan)


def layout(document: Document) -> tuple[str | None, ...]:
    """The facts present, in order; documents of one layout have the same segments."""
    return tuple(segment.slot for segment in document.segments("prompt"))


class Ranking:
    """A method's order of the prompt's segments, for some documents.

    Args:
        orders: Per document its segments, the highest first.
        given: The documents.
    """

    def __init__(self, orders: Sequence[Sequence[int]], given: Sequence[Document]) -> None:
        self._orders: dict[tuple[str | None, ...], list[Sequence[int]]] = defaultdict(list)
        for order, document in zip(orders, given, strict=True):
            self._orders[layout(document)].append(order)

    def of(self, given: Sequence[Document], rng: random.Random) -> list[Sequence[int]]:
        """The order in documents like these, drawn."""
        return [rng.choice(self._orders[layout(document)]) for document in given]

    def laws(self, k: int, known: Mapping[str, Fact]) -> list[tuple[float, Law]]:
        """Per layout its share, and how often each fact is removed."""
        total = sum(map(len, self._orders.values()))
        found: list[tuple[float, Law]] = []
        for slots, orders in self._orders.items():
            counts = Counter(
                frozenset(known.keys() & {slots[i] for i in order[:k]}) for order in orders
            )
            law = {gone: count / len(orders) for gone, count in counts.items()}
            found.append((len(orders) / total, law))
        return found

    def constant(self, k: int, known: Mapping[str, Fact]) -> float:
        """How often the facts that are removed are the most usual ones of a layout."""
        return sum(share * max(law.values()) for share, law in self.laws(k, known))


class BySaliency:
    """The order for each text by `LayerSaliency` with the L2 norm.

    In batches, which many thousand texts need; the test holds it against the package's own.
    """

    def __init__(self, batch: int = 64) -> None:
        self._model, self._tokenizer = load()
        self._model.requires_grad_(False)
        self._batch = batch

    def of(self, given: Sequence[Document], _: Any = None) -> list[Sequence[int]]:
        """The segments of each document's prompt, the highest first."""
        by_length = sorted(range(len(given)), key=lambda i: len(given[i].text))
        found: dict[int, Sequence[int]] = {}
        for start in range(0, len(given), self._batch):
            own = by_length[start : start + self._batch]
            found |= dict(zip(own, self._together([given[i] for i in own]), strict=True))
        return [found[i] for i in range(len(given))]

    def _together(self, given: Sequence[Document]) -> list[Sequence[int]]:
        rows = self._tokenizer(
            [document.text for document in given],
            padding=True,
            padding_side="right",
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        ids, offsets = rows["input_ids"], rows["offset_mapping"]
        starts, stops = offsets[..., 0], offsets[..., 1]
        embedded = self._model.get_input_embeddings()(ids).requires_grad_()
        logits = self._model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
        log_probs = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        parts = [document.segments("prompt") for document in given]
        # (batch, segments, length): the mean over a segment's tokens.
        means = torch.zeros(len(given), max(map(len, parts)), ids.shape[1])
        for own, segments, stop in zip(means, parts, stops, strict=True):
            for i, segment in enumerate(segments):
                inside = (segment.start < stop) & (stop <= segment.stop)
                own[i] = inside / inside.sum()
        strength = torch.zeros(means.shape[:2])
        for word in CONTENT:
            segments = [
                next(s for s in document.segments("continuation") if s.slot == word)
                for document in given
            ]
            first = torch.tensor([segment.start for segment in segments])[:, None]
            last = torch.tensor([segment.stop for segment in segments])[:, None]
            inside = (first < stops) & (stops <= last) & (stops > starts)
            for number in range(int(inside.sum(1).max())):
                # The number-th token of the word, where it has so many.
                at = inside & (inside.cumsum(1) == number + 1)
                value = (log_probs * at[:, 1:]).sum()
                (slope,) = torch.autograd.grad(value, embedded, retain_graph=True)
                strength += (means @ slope.norm(dim=2)[..., None])[..., 0]
        return [
            own[: len(segments)].argsort(descending=True, stable=True).tolist()
            for own, segments in zip(strength, parts, strict=True)
        ]


class ByLeaveOneOut:
    """The order for each text by the effect of replacing each fact by other values of its slot.

    One draw a fact. What it does to the content words is added up, whatever its sign, as in the
    rankings of the documents that were attributed. Words that never change do nothing.

    Args:
        seed: Of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self._model, self._tokenizer = load()
        self._rng = random.Random(f"leave-one-out {seed}")

    def of(self, given: Sequence[Document], _: Any = None) -> list[Sequence[int]]:
        """The segments of each document's prompt, the highest first."""
        return [
            order
            for start in range(0, len(given), _AT_ONCE)
            for order in self._together(given[start : start + _AT_ONCE])
        ]

    def _together(self, given: Sequence[Document]) -> list[Sequence[int]]:
        changed: list[tuple[int, int, Document]] = []
        parts = [document.segments("prompt") for document in given]
        for number, (document, segments) in enumerate(zip(given, parts, strict=True)):
            for i, segment in enumerate(segments):
                if segment.slot is not None:
                    fact = document.slot(segment.slot)
                    others = [text for text in fact.alternatives if text != fact.text]
                    edited = document.edited(segment.slot, self._rng.choice(others))
                    changed.append((number, i, edited))
        texts = [*given, *(edited for *_, edited in changed)]
        scores = slot_scores(self._model, self._tokenizer, texts)
        strength = [[0.0] * len(segments) for segments in parts]
        for (number, i, _), score in zip(changed, scores[len(given) :], strict=True):
            strength[number][i] = sum(
                abs(scores[number][word].log_prob - score[word].log_prob) for word in CONTENT
            )
        return [sorted(range(len(own)), key=lambda i, own=own: -own[i]) for own in strength]


# Of methods that rank every text of a retraining by itself.
EACH_TEXT: dict[str, Callable[[], BySaliency | ByLeaveOneOut]] = {
    "saliency, L2, each text": BySaliency,
    "leave-one-out, each text": ByLeaveOneOut,
}


def curve(ranking: Ranking, kind: Kind, known: Mapping[str, Fact]) -> list[float]:
    """The least loss after removing the first 0, 1, … features."""
    return [
        sum(share * least_loss(law, kind, known) for share, law in ranking.laws(k, known))
        for k in range(MOST + 1)
    ]


def per_word(ranking: Ranking, known: Mapping[str, Fact]) -> dict[str, list[float]]:
    """Each word's part of the least loss with masked facts, by number of features removed.

    Masked, a fact says nothing of another one: losses add up.
    """
    return {word: curve(ranking, "masked", {name: known[name]}) for name, word in DECIDED.items()}


def random_curve(given: Sequence[Document], kind: Kind, known: Mapping[str, Fact]) -> list[float]:
    """The expected curve of a random order."""
    losses: list[float] = []
    for k in range(MOST + 1):
        each: list[float] = []
        for document in given:
            n = len(layout(document))
            sets = (
                frozenset(gone)
                for size in range(len(known) + 1)
                for gone in itertools.combinations(known, size)
            )
            ways = {g: math.comb(n - len(known), k - len(g)) if len(g) <= k else 0 for g in sets}
            law = {gone: count / math.comb(n, k) for gone, count in ways.items() if count}
            each.append(least_loss(law, kind, known))
        losses.append(mean(each))
    return losses


def oracle(given: Sequence[Document], known: Mapping[str, Fact]) -> Ranking:
    """The facts by decreasing value, then everything else."""
    worth = {name: math.log(fact.seen / fact.unseen) for name, fact in known.items()}
    orders = [
        sorted(range(len(slots)), key=lambda i, slots=slots: -worth.get(slots[i] or "", 0.0))
        for slots in map(layout, given)
    ]
    return Ranking(orders, given)


def order(document: Document, result: Any) -> list[int]:
    """The prompt's segments by decreasing attribution summed over all content words."""
    n = len(layout(document))
    slots = [segment.slot for segment in document.segments("continuation")]
    strength = torch.zeros(n, dtype=torch.float64)
    for word in CONTENT:
        place = slots.index(word)
        rows = [t for t, piece in enumerate(result.output_pieces) if piece.feature == place]
        strength += result.token_attr[rows].double().sum(0).abs()[:n].cpu()
    return strength.argsort(descending=True, stable=True).tolist()


def rankings(given: Sequence[Document], names: Sequence[str]) -> dict[str, Ranking]:
    """Rankings of the given methods."""
    model, tokenizer = load()
    grammar = Grammar()
    known = absences(grammar, corpus())
    found: dict[str, Ranking] = {}
    for name in names:
        begun = time.process_time()
        orders: list[list[int]] = []
        for document in given:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if name in SAMPLED:
                    method, absence = SAMPLED[name]
                    result = attribute(model, tokenizer, document, method, known[absence])
                else:
                    result = attribute_inside(model, tokenizer, document, name, known)
            orders.append(order(document, result))
        found[name] = Ranking(orders, given)
        print(f"{name}: {time.process_time() - begun:.0f} s", file=sys.stderr, flush=True)
    return found


def retrained(
    ranking: Ranking | BySaliency | ByLeaveOneOut,
    k: int,
    kind: Kind,
    *,
    seed: int,
    steps: int,
    texts: int,
) -> dict[str, Any]:
    """Content loss of a model trained and tested without the features ranked highest.

    Args:
        ranking: Of a method.
        k: Features that are removed.
        kind: How.
        seed: Of documents and weights.
        steps: Of training.
        texts: Different ones to train on.

    Returns:
        Its mean over documents, the standard error, the least loss for what was removed from the
        very test texts, and the processor's seconds.
    """
    _, tokenizer = load()
    recipe, grammar, known = Recipe(), Grammar(), facts(Grammar())
    tuned = recipe.tuned * steps // recipe.steps
    recipe = replace(recipe, steps=steps, tuned=tuned)
    begun = time.process_time()
    rng = random.Random(f"roar {seed}")

    def without(given: Sequence[Document], orders: Sequence[Sequence[int]]) -> list[Document]:
        return [
            removed(document, order[:k], kind, rng)
            for document, order in zip(given, orders, strict=True)
        ]

    # The recipe's beginning: without it a learner finds no slope toward C.
    early = min(tuned * recipe.batch, texts * tuned // steps)
    lessons: list[Document] = []
    while len(lessons) < texts:
        document = grammar.sample(rng, "pronoun")
        if len(lessons) >= early or in_tune(document) or rng.random() < 0.1:
            lessons.append(document)
    rows = encode(
        [document.text for document in without(lessons, ranking.of(lessons, rng))], tokenizer
    )
    # Over and over where there are fewer than steps take, in tune and then not.
    again = [
        part[torch.randperm(len(part), generator=torch.Generator().manual_seed(epoch))]
        for part, n in (
            (rows[:early], tuned * recipe.batch),
            (rows[early:], (steps - tuned) * recipe.batch),
        )
        for epoch in range(-(-n // len(part)))
    ]
    model = new_model(tokenizer, torch.Generator().manual_seed(seed))
    fit(model, torch.cat(again), recipe, tokenizer.pad_token_id)
    test = random.Random(f"roar test {seed}")
    fresh = [grammar.sample(test, "pronoun") for _ in range(2_000)]
    orders = ranking.of(fresh, rng)
    scores = slot_scores(model, tokenizer, without(fresh, orders))
    losses = [-sum(own[word].log_prob for word in CONTENT) for own in scores]
    of_these = Ranking(orders, fresh)
    found = {
        "least_loss_of_these": curve(of_these, kind, known)[k],
        "loss": mean(losses),
        "loss_se": stdev(losses) / math.sqrt(len(losses)),
        "per_word": {word: mean(-own[word].log_prob for own in scores) for word in CONTENT},
    }
    if kind == "masked":
        told = per_word(of_these, known)
        found["least_per_word"] = {word: own[k] for word, own in told.items()}
    return found | {"texts": texts, "cpu_s": time.process_time() - begun}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the curves, their areas and the retrainings as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=(*SAMPLED, *INSIDE))
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="of each retraining")
    parser.add_argument("--texts", type=int, default=16_000, help="different ones of a retraining")
    parser.add_argument("--retrain", nargs="*", default=RETRAINED, help="METHOD/KIND/K")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/roar.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng = random.Random(f"roar documents {arguments.seed}")
    given = [Grammar().sample(rng, "pronoun") for _ in range(arguments.documents)]
    known = facts(Grammar())
    found = {"oracle": oracle(given, known), **rankings(given, arguments.methods)}
    report = {**environment(seed=arguments.seed), "documents": arguments.documents}
    report |= {"rows": [], "retrainings": []}
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text(encoding="utf-8"))
        if all(earlier[key] == report[key] for key in ("documents", "seed")):
            report["rows"] = [r for r in earlier["rows"] if r["method"] not in {*found, "random"}]
            earlier_commands = earlier.get("commands", [earlier["command"]])
            report["commands"] = [*earlier_commands, report["command"]]
            report["retrainings"] = [
                r
                for r in earlier["retrainings"]
                if f"{r['method']}/{r['removal']}/{r['k']}" not in arguments.retrain
            ]
    rows: list[dict[str, Any]] = report["rows"]
    for kind in KINDS:
        chance = random_curve(given, kind, known)
        best = curve(found["oracle"], kind, known)
        rows.append({"method": "random", "removal": kind, "least_loss": chance, "area": 0.0})
        for name, ranking in found.items():
            own = curve(ranking, kind, known)
            area = (sum(own) - sum(chance)) / (sum(best) - sum(chance))
            constant = [ranking.constant(k, known) for k in range(MOST + 1)]
            rows.append({"method": name, "removal": kind, "least_loss": own, "area": area})
            rows[-1]["constant"] = constant
            if kind == "masked":
                rows[-1]["least_per_word"] = per_word(ranking, known)
            print(f"{kind:9s} {name:32s} {area:5.2f}", file=sys.stderr, flush=True)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for cell in arguments.retrain:
        method, kind, k = cell.split("/")
        told = {"method": method, "removal": kind, "k": int(k), "steps": arguments.steps}
        ranking = EACH_TEXT[method]() if method in EACH_TEXT else found[method]
        told |= retrained(
            ranking,
            int(k),
            kind,
            seed=arguments.seed,
            steps=arguments.steps,
            texts=arguments.texts,
        )
        report["retrainings"].append(told)
        print(told, file=sys.stderr, flush=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
