"""Draws of absent features: uniform, spread evenly, independent of one another."""

import pytest
import torch
from captum.attr import FeatureAblation

from captum_llm_ext import GenerationAttribution, TextSegmentInput, load_demo
from captum_llm_ext.text.baselines import FixedTexts, draw_generator, uniform
from captum_llm_ext.text.baselines.candidates import Candidates, Match

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
JOBS = ["lawyer", "nurse", "doctor", "teacher", "farmer"]


def places(seed, feature=0, n=64, first=0):
    numbers = range(first, first + n)
    return torch.tensor([uniform(draw_generator(seed, k, feature)) for k in numbers])


def test_draw_is_uniform_over_seeds():
    found = torch.tensor([uniform(draw_generator(seed * 7919, 5, 3)) for seed in range(4000)])
    shares = torch.histc(found, 20, 0, 1) / len(found)
    assert float((shares - 0.05).abs().max()) < 4 * (0.05 * 0.95 / len(found)) ** 0.5


@pytest.mark.parametrize("block", [0, 3, 1001])
@pytest.mark.parametrize("n", [2, 8, 32])
def test_consecutive_draws_are_stratified(block, n):
    parts = (places(seed=11, feature=4, n=n, first=block * n) * n).long()
    assert sorted(parts.tolist()) == list(range(n))


def test_features_are_drawn_independently():
    """Pairs of places fill the square, also for one seed: a mean of their product is a quarter."""
    one, other = places(5, 0, 2048), places(5, 1, 2048)
    pairs = torch.histogramdd(torch.stack([one, other], 1), [4, 4], range=[0, 1, 0, 1])[0]
    assert float((pairs / 2048 - 1 / 16).abs().max()) < 0.02  # 4 standard deviations
    few = torch.stack([torch.stack([places(seed, f, 4) for f in (0, 1)]) for seed in range(400)])
    above = (few > 0.5).double()  # in the first four draws too, over seeds
    assert abs(float((above[:, 0] * above[:, 1]).mean()) - 0.25) < 0.03
    assert float((places(5) - places(6)).abs().max()) > 0.1


def test_texts_are_drawn_by_weight():
    match = Match("any", "_", 0, 3, False, ())
    weights = {("a",): 0.5, ("b",): 0.3, ("c",): 0.2}
    candidates = Candidates.of(match, weights)
    for seed in range(50):
        drawn = [candidates.draw(draw_generator(seed, k, 2)) for k in range(8)]
        for texts, weight in weights.items():
            assert abs(drawn.count(texts) - 8 * weight) < 2
    lists = FixedTexts([JOBS])
    slot = TextSegmentInput("lawyer", load_demo()[1], baselines="delete").slots[0]
    drawn = [lists(slot, draw_generator(0, k)) for k in range(40)]
    assert all(6 <= drawn.count(job) <= 10 for job in JOBS)


def test_mean_of_eight_draws_is_near_the_expectation():
    """Held against each candidate scored once; rows that coincide are scored once."""
    model, tokenizer, _ = load_demo()
    start, stop = PROMPT.index("lawyer"), PROMPT.index("lawyer") + len("lawyer")

    def attribute(texts, **options):
        inp = TextSegmentInput(PROMPT, tokenizer, [(start, stop)], baselines=[texts])
        method = GenerationAttribution(FeatureAblation(model), tokenizer)
        return method.attribute(inp, "poker", output_unit=None, **options)

    each = torch.tensor([float(attribute([job]).token_attr[0, 0]) for job in JOBS])
    exact, spread = float(each.mean()), float(each.std(correction=0))
    errors, covered = [], 0
    for seed in range(40):
        result = attribute(JOBS, seed=seed, n_draws=8)
        assert result.n_evaluations == len(JOBS)  # "lawyer" is the full row
        error = float(result.token_attr[0, 0]) - exact
        errors.append(error)
        covered += abs(error) <= 1.96 * float(result.token_attr_se[0, 0])
    assert abs(sum(errors) / 40) < spread / 8**0.5 / 2
    independent = spread / 8**0.5
    assert torch.tensor(errors).square().mean().sqrt() < 0.6 * independent
    assert covered >= 38
