"""Replacements come from the right slot in languages that the matcher was not made on."""

import random

import pytest
from fact_grammar.invented import GENERATED, Invented
from unseen import right_slot, texts

from captum_llm_ext import CorpusBaselines

# A form whose lines come in any order, shuffled prose with slots side by side, and rigid prose.
LANGUAGES = ((1, True), (5, True), (7, False))


@pytest.mark.parametrize(("seed", "varied"), LANGUAGES)
def test_draws_come_from_the_right_slot(seed, varied):
    language = Invented(seed, varied)
    baselines = CorpusBaselines(texts(language, 500), min_candidates=0)
    share = right_slot(language, baselines, "slot", n=3, draws=2)
    assert share["fact"] >= 0.95
    assert share["generated"] >= 0.95
    # The keys of two entries of a form that share a list of values may change places.
    assert share["connecting"] >= 0.85


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("varied", [False, True])
def test_document_holds_slots_and_causes(seed, varied):
    language = Invented(seed, varied)
    rng = random.Random(seed)
    for before in ("slot", "line"):
        document = language.sample(rng, before)
        facts = {slot.name: slot.text for slot in document.slots}
        assert all(document.text[s.start : s.stop] == s.text for s in document.slots)
        assert all(s.text in s.alternatives for s in document.slots)
        generated = [slot.name for slot in document.slots if slot.start >= document.cut]
        assert sorted(generated) == list(GENERATED)
        for name in GENERATED:
            assert facts[name] in language.allowed(name, facts)
            assert set(document.causes[name]) <= facts.keys()


def test_language_depends_on_its_seed():
    one, two = (Invented(4, varied=True) for _ in range(2))
    other = Invented(5, varied=True)
    assert texts(one, 5) == texts(two, 5) != texts(other, 5)


@pytest.mark.parametrize("seed", range(10))
def test_causes_are_not_inferable_from_other_facts(seed):
    language = Invented(seed)
    # D differs between the A of one fact, so that the fact does not tell it; C needs both facts.
    a_of = {x: language.allowed("A", {language.causes["A"][0]: x}) for x in _list(language, "A")}
    for options in a_of.values():
        assert len({language.allowed("D", {"A": a}) for a in options}) == len(options)
    assert len({a for options in a_of.values() for a in options}) == sum(map(len, a_of.values()))
    left, right = language.causes["C"]
    for x in language.alternatives[left]:
        told = {language.allowed("C", {left: x, right: y}) for y in language.alternatives[right]}
        assert len(told) == 3


def _list(language, name):
    return language.alternatives[language.causes[name][0]]
