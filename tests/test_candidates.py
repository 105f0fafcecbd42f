"""`Candidates`: a sample of many choices stands for all of them."""

import torch

from captum_llm_ext.text.baselines.candidates import Candidates, Match

MATCH = Match("words", "…", 100, 4, False, ())


def of(**weights):
    return Candidates.of(MATCH, {(name,): weight for name, weight in weights.items()})


def test_sample_holds_distinct_weighted_choices():
    candidates = of(a=4.0, b=3.0, c=2.0, d=1.0)
    for seed in range(20):
        found = candidates.sample(2, seed).weights()
        assert len(found) == 2
        total = sum(found.values())
        own = candidates.weights()
        scale = total / sum(own[texts] for texts in found)
        assert all(abs(found[texts] - scale * own[texts]) < 1e-12 for texts in found)
    assert candidates.sample(2, 1).weights() == candidates.sample(2, 1).weights()
    assert candidates.sample(4, 0) is candidates


def test_sample_is_weighted_without_replacement():
    """The first of two is `a` in 4 of 10 draws, or it is the second, as by brute force."""
    weights = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}
    candidates = of(**weights)
    n = 4000
    counts = dict.fromkeys(weights, 0)
    for seed in range(n):
        for (name,) in candidates.sample(2, seed).choices:
            counts[name] += 1
    whole = sum(weights.values())
    for name, own in weights.items():
        others = [w for other, w in weights.items() if other != name]
        chance = own / whole + sum(w / whole * own / (whole - w) for w in others)
        # Three standard errors of a rate.
        assert abs(counts[name] / n - chance) < 3 * (chance * (1 - chance) / n) ** 0.5


def test_draws_come_from_the_sample():
    sampled = of(a=4.0, b=3.0, c=2.0, d=1.0).sample(2, 3)
    generator = torch.Generator().manual_seed(0)
    assert {sampled.draw(generator) for _ in range(50)} == {*sampled.choices}
