"""Attributions name the true causes of a language whose causes are known."""

from statistics import mean

import pytest
from fact_grammar import Grammar, corpus, load
from ground_truth import absences, attribute, documents, precision

SAME_SLOT = [
    "same slot, lists by hand",
    "same slot, `CorpusBaselines`",
    "… with labels",
    "… weighted by the model",
]


@pytest.fixture(scope="module")
def known():
    return load()


@pytest.fixture(scope="module")
def absent():
    return absences(Grammar(), corpus())


@pytest.mark.parametrize("absence", SAME_SLOT)
@pytest.mark.parametrize("method", ["leave-one-out", "Shapley, permutations", "Shapley, kernel"])
def test_same_slot_replacement_names_every_true_cause(known, absent, method, absence):
    # Other documents than those of the benchmark.
    for document in documents(3, seed=7):
        result = attribute(*known, document, method, absent[absence])
        found = precision(document, result)
        assert found == dict.fromkeys(found, 1.0)
        assert {"B", "C", "D"} <= found.keys()


def test_the_last_word_is_caused_by_earlier_output(known, absent):
    document = documents(1, seed=3)[0]
    result = attribute(*known, document, "leave-one-out", absent[SAME_SLOT[0]])
    segments = document.segments("continuation")
    cause = next(i for i, s in enumerate(segments) if s.slot == "A")
    effect = next(i for i, s in enumerate(segments) if s.slot == "D")
    rows = [t for t, piece in enumerate(result.output_pieces) if piece.feature == effect]
    strength = result.full_attr[rows].sum(0)
    assert strength.argmax() == result.token_attr.shape[1] + cause
    assert strength.max() > 3


@pytest.mark.parametrize("method", ["leave-one-out", "Shapley, kernel"])
def test_deletion_names_far_fewer(known, absent, method):
    found = [
        value
        for document in documents(4, seed=7)
        for value in precision(
            document, attribute(*known, document, method, absent["deletion"])
        ).values()
    ]
    assert mean(found) < 0.5
