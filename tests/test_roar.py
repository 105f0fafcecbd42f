"""ROAR on the fact grammar: the least loss against documents drawn, and what removal leaves."""

import math
import random
from statistics import mean, stdev

import pytest
from fact_grammar import Grammar, load
from ground_truth import attribute_inside
from roar import (
    MOST,
    ByLeaveOneOut,
    BySaliency,
    Ranking,
    curve,
    facts,
    layout,
    least_loss,
    oracle,
    order,
    random_curve,
    removed,
)

GRAMMAR = Grammar()
KNOWN = facts(GRAMMAR)
LAWS = [
    {frozenset(): 1.0},
    {frozenset(KNOWN): 1.0},
    {frozenset({"city", "name"}): 0.5, frozenset({"state", "occupation"}): 0.3, frozenset(): 0.2},
]


def probabilities(shown, said, gone):
    """Of each content word as it is said, by the grammar's own tables; D is certain."""
    read = {name: text for name, text in shown.items() if name not in gone}
    # An occupation is known from what was written because of it.
    job = next(o for o, each in GRAMMAR.words.occupations.items() if said["A"] in each)
    for word in ("pronoun", "A", "B", "C"):
        given = {**read, "occupation": job} if word == "C" else read
        options = GRAMMAR.allowed(word, given)
        yield (said[word] in options) / len(options)


def a_loss(law, kind, rng):
    """Of a reader who weighs all that may have been removed, on one document."""
    said = {slot.name: slot.text for slot in GRAMMAR.sample(rng, "pronoun").slots}
    gone = rng.choices([*law], [*law.values()])[0]
    shown = {
        name: rng.choice(GRAMMAR.alternatives[name]) if name in gone else said[name]
        for name in KNOWN
    }
    seen = {gone: 1.0} if kind == "masked" else law
    return -math.log(
        sum(share * math.prod(probabilities(shown, said, other)) for other, share in seen.items())
    )


@pytest.mark.parametrize("kind", ["masked", "same slot"])
@pytest.mark.parametrize("law", LAWS)
def test_least_loss_equals_the_grammars_entropy(law, kind):
    rng = random.Random(0)
    losses = [a_loss(law, kind, rng) for _ in range(3_000)]
    error = stdev(losses) / math.sqrt(len(losses)) + 1e-9
    assert abs(mean(losses) - least_loss(law, kind, KNOWN)) < 4 * error


def test_removal_changes_only_removed_slots():
    rng = random.Random(1)
    for _ in range(20):
        document = GRAMMAR.sample(rng, "pronoun")
        slots = layout(document)
        which = rng.sample(range(len(slots)), 4)
        masked = removed(document, which, "masked", rng)
        assert masked.prompt.count("<unk>") == 4
        assert masked.continuation == document.continuation
        other = removed(document, which, "same slot", rng)
        assert other.continuation == document.continuation
        gone = {slots[i] for i in which}
        for changed in (masked, other):
            for slot, before in zip(changed.slots, document.slots, strict=True):
                assert changed.text[slot.start : slot.stop] == slot.text
                assert slot.text == before.text or slot.name in gone
        for slot in other.slots:
            assert slot.text in slot.alternatives


def test_batched_ranking_equals_the_package():
    rng = random.Random(3)
    given = [GRAMMAR.sample(rng, "pronoun") for _ in range(3)]
    model, tokenizer = load()
    found = BySaliency(batch=2).of(given)
    for document, own in zip(given, found, strict=True):
        result = attribute_inside(model, tokenizer, document, "saliency, L2", {})
        assert own == order(document, result)


def test_leave_one_out_ranks_causes_before_irrelevant_slots():
    rng = random.Random(4)
    given = [GRAMMAR.sample(rng, "pronoun") for _ in range(4)]
    for document, found in zip(given, ByLeaveOneOut().of(given), strict=True):
        slots = layout(document)
        assert sorted(found) == list(range(len(slots)))
        causes = {slot for own in document.causes.values() for slot in own} - {"A"}
        assert {slots[i] for i in found[: len(causes)]} == causes


def test_curves_lie_between_random_and_oracle():
    rng = random.Random(2)
    given = [GRAMMAR.sample(rng, "pronoun") for _ in range(12)]
    best = oracle(given, KNOWN)
    # The worth of a word is the logarithm of how many could stand there; A is one of three anyway.
    worth = [math.log(3), math.log(12), math.log(9), math.log(3), math.log(2), 0, 0]
    expected = [sum(worth[: k + 1]) for k in range(MOST + 1)]
    assert curve(best, "masked", KNOWN) == pytest.approx(expected)
    n = len(layout(given[0]))
    alone = [d for d in given if len(layout(d)) == n]
    chance = random_curve(alone, "masked", KNOWN)
    assert chance == pytest.approx([worth[0] + k / n * sum(worth[1:]) for k in range(MOST + 1)])
    for kind in ("masked", "same slot"):
        chance = random_curve(given, kind, KNOWN)
        drawn = [rng.sample(range(len(layout(d))), len(layout(d))) for d in given]
        own = curve(Ranking(drawn, given), kind, KNOWN)
        for k in range(1, MOST + 1):
            assert chance[k] < curve(best, kind, KNOWN)[k]
            assert own[k] <= curve(best, kind, KNOWN)[k] + 1e-9
        assert own[0] == pytest.approx(math.log(3))
        assert best.constant(2, KNOWN) == pytest.approx(1)
