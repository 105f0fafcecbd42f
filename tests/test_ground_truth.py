"""Attributions name the true causes of a language whose causes are known; metrics know them."""

from statistics import mean

import pytest
import torch
from captum.attr import FeatureAblation
from fact_grammar import Grammar, corpus, load
from faithfulness import candidates, words
from ground_truth import absences, as_input, attribute, documents, precision

from captum_llm_ext import GenerationAttribution
from captum_llm_ext.evaluation.faithfulness import measure_attributions

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
def test_same_slot_replacement_finds_every_true_cause(known, absent, method, absence):
    # Other documents than those of the benchmark.
    for document in documents(3, seed=7):
        result = attribute(*known, document, method, absent[absence])
        found = precision(document, result)
        assert found == dict.fromkeys(found, 1.0)
        assert {"B", "C", "D"} <= found.keys()


@pytest.mark.parametrize("absence", SAME_SLOT[:2])
def test_same_slot_replacement_with_word_features(known, absence):
    absent = absences(Grammar(), corpus(), "word")[absence]
    for document in documents(2, seed=8):
        result = attribute(*known, document, "leave-one-out", absent, "word")
        found = precision(document, result, unit="word")
        assert found == dict.fromkeys(found, 1.0)
        assert result.token_attr.shape[1] == len(document.prompt.split())


def test_last_word_is_attributed_to_earlier_output(known, absent):
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
def test_deletion_finds_far_fewer_causes(known, absent, method):
    found = [
        value
        for document in documents(4, seed=7)
        for value in precision(
            document, attribute(*known, document, method, absent["deletion"])
        ).values()
    ]
    assert mean(found) < 0.5


def test_same_slot_faithfulness_ranks_the_truth_first(known, absent):
    same_slot = "same slot, `CorpusBaselines`"
    document = documents(1, seed=3)[0]
    results = {
        name: attribute(*known, document, "leave-one-out", absent[name])
        for name in ("deletion", same_slot)
    }
    attribution = GenerationAttribution(FeatureAblation(known[0]), known[1])
    behind: dict[str, list[float]] = {"deletion": [], same_slot: []}
    ahead: list[float] = []
    draw = torch.Generator().manual_seed(0)
    for word, place in words(document).items():
        given = candidates(document, word, place, results, draw)
        pieces = results["deletion"].output_pieces
        rows = [t for t, piece in enumerate(pieces) if piece.feature == place]
        for name, found in behind.items():
            inp, output = as_input(document, known[1], absent[name])
            span = (rows[0], rows[-1] + 1)
            game = attribution.to_game(
                inp, document.continuation, token=span, n_draws=2, seed=9, **output
            )
            report = measure_attributions(
                given, game, k=len(document.causes[word]), n_coalitions=3, n_orders=1
            )
            area = {one: float(report.metrics[one]["area_between"]) for one in given}
            found.append(max(area.values()) - area["the truth"])
            if name == same_slot:
                lost = report.metrics["the truth"][f"sufficiency@{len(document.causes[word])}"]
                assert float(lost) == pytest.approx(0.0, abs=0.1)  # the causes say it all
                ahead.append(area["the truth"] - area["random"])
    assert mean(behind[same_slot]) < 0.3  # nats, as the design notes have it
    assert mean(ahead) > 3
    assert mean(behind["deletion"]) > 3
