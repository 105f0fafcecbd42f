"""Removing what drawn texts do to values, against games whose mean over draws is known."""

from collections import Counter

import pytest
import torch
from captum.attr import KernelShap, Lime
from tiny import llama, word_piece

from captum_llm_ext import CorpusBaselines, GenerationAttribution, TextSegmentInput
from captum_llm_ext.coalitions import (
    DrawnTexts,
    Plan,
    Scope,
    join_plans,
    plan_anchors,
    plan_pairs,
    solve_exact,
    solve_kernel,
    without_draw_effects,
)
from captum_llm_ext.coalitions.plans import plan_exact

N, N_TEXTS, N_TARGET = 8, 3, 2


class RandomTexts:
    """A game in which every absent feature has one of three texts.

    A value is a sum of features' effects, of effects of their texts, and of products of neighbours'
    effects.
    """

    def __init__(self, seed: int, spread: float) -> None:
        g = torch.Generator().manual_seed(seed)
        self.own = torch.randn(N, N_TARGET, generator=g, dtype=torch.float64)
        self.texts = spread * torch.randn(N, N_TEXTS, N_TARGET, generator=g, dtype=torch.float64)
        share = torch.rand(N, N_TEXTS, generator=g, dtype=torch.float64) + 0.2
        self.share = share / share.sum(1, keepdim=True)

    def values(self, masks: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Values where `texts` says the text of each feature that is absent."""
        drawn = self.texts[torch.arange(N), texts.clamp_min(0)]
        each = torch.where(masks[:, :, None], self.own, drawn)
        return each.sum(1) + 0.3 * (each[:, 1:] * each[:, :-1]).sum(1)

    def mean_values(self, masks: torch.Tensor) -> torch.Tensor:
        """Values averaged over the texts, which are independent."""
        drawn = (self.share[:, :, None] * self.texts).sum(1)
        each = torch.where(masks[:, :, None], self.own, drawn)
        return each.sum(1) + 0.3 * (each[:, 1:] * each[:, :-1]).sum(1)

    def truth(self) -> torch.Tensor:
        """The Shapley values of the mean over texts, by all coalitions."""
        plan = join_plans([plan_anchors(N), plan_exact(N)])
        plan = Plan(plan.masks, torch.zeros_like(plan.draws), plan.n_anchors)
        return solve_exact(plan, self.mean_values(plan.masks), SCOPE).attributions

    def sample(self, planner, seed: int) -> tuple[Plan, torch.Tensor, DrawnTexts]:
        """A plan, its values, and the texts: one draw for all rows of a number."""
        g = torch.Generator().manual_seed(seed)
        plan = join_plans([plan_anchors(N, n_empty=32), planner(g)])
        n_draws = int(plan.draws.max()) + 1
        of_draw = torch.stack(
            [torch.multinomial(own, n_draws, replacement=True, generator=g) for own in self.share],
            1,
        )
        texts = torch.where(plan.masks, -1, of_draw[plan.draws]).int()
        values = self.values(plan.masks, texts)
        return plan, values, DrawnTexts(texts, self.share, torch.arange(N))


SCOPE = Scope.of_all(N_TARGET, N)


def planned(generator: torch.Generator) -> Plan:
    return plan_pairs(N, 16 * N, generator=generator)


@pytest.mark.parametrize("number", range(3))
def test_attributions_stay_unbiased_and_their_errors_true_at_half_the_variance(number) -> None:
    """Random texts without stratification: 60 samples of one game, against all its coalitions."""
    game = RandomTexts(number, spread=1.0)
    truth = game.truth()
    plain, found, errors = [], [], []
    for seed in range(60):
        plan, values, drawn = game.sample(planned, seed)
        plain.append(solve_kernel(plan, values, SCOPE).attributions)
        adjusted = without_draw_effects(plan, values, SCOPE, drawn)
        solution = solve_kernel(plan, adjusted, SCOPE)
        found.append(solution.attributions)
        errors.append(solution.standard_errors)
    missed = torch.stack(found) - truth
    # The mean of 60 lies within four of its standard errors of the truth.
    spread = missed.std(0) / 60**0.5
    assert float((missed.mean(0).abs() / spread).max()) < 4
    assert float(missed.square().mean()) < 0.5 * float((torch.stack(plain) - truth).square().mean())
    covered = (missed.abs() <= 1.96 * torch.stack(errors)).double().mean()
    assert 0.9 < float(covered) < 0.99


def test_every_coalition_keeps_its_mean() -> None:
    """Effects average to zero over the texts, for each single coalition."""
    game = RandomTexts(1, spread=2.0)
    masks = torch.tensor([[True] * 4 + [False] * 4, [False, True] * 4])
    # Two coalitions, 2,000 draws each, beside which others tell the effects of texts.
    plan = Plan(
        torch.cat([torch.ones(1, N), torch.zeros(1, N), masks.repeat(2000, 1)]).bool(),
        torch.arange(4002),
        2,
    )
    g = torch.Generator().manual_seed(0)
    of_draw = torch.stack(
        [torch.multinomial(own, 4002, replacement=True, generator=g) for own in game.share], 1
    )
    texts = torch.where(plan.masks, -1, of_draw).int()
    values = game.values(plan.masks, texts)
    drawn = DrawnTexts(texts, game.share, torch.arange(N))
    adjusted = without_draw_effects(plan, values, SCOPE, drawn)
    for i in range(2):
        found = adjusted[2 + i :: 2]
        assert float(found.var(0).mean()) < 0.5 * float(values[2 + i :: 2].var(0).mean())
        off = found.mean(0) - game.mean_values(masks[i : i + 1])[0]
        assert float((off.abs() / (found.std(0) / 2000**0.5)).max()) < 4


def test_values_without_effects_of_texts_are_unchanged() -> None:
    game = RandomTexts(2, spread=1.0)
    plan, _, drawn = game.sample(planned, 0)
    noise = torch.randn(len(plan.masks), 1, generator=torch.Generator().manual_seed(3)).double()
    values = plan.masks.double() @ torch.arange(N).double()[:, None] + noise
    scope = Scope.of_all(1, N)
    assert torch.equal(without_draw_effects(plan, values, scope, drawn), values)


def test_texts_after_a_target_have_no_effect_on_it() -> None:
    """The second target sees three features: only their texts are removed from its values."""
    game = RandomTexts(3, spread=1.0)
    plan, values, drawn = game.sample(planned, 0)
    scope = Scope(torch.tensor([N, 3]), torch.tensor([-1, -1]))
    early = game.values(plan.masks[:, :], drawn.texts)[:, :1] * 0
    early += torch.where(
        plan.masks[:, :3, None],
        game.own[:3],
        game.texts[torch.arange(3), drawn.texts[:, :3].long().clamp_min(0)],
    ).sum(1)[:, :1]
    both = torch.cat([values[:, :1], early], 1)
    found = without_draw_effects(plan, both, scope, drawn)
    other = drawn.texts.clone()
    other[:, 3:] = torch.where(other[:, 3:] >= 0, (other[:, 3:] + 1) % N_TEXTS, -1)
    again = without_draw_effects(
        plan, both, scope, DrawnTexts(other, drawn.probabilities, drawn.columns)
    )
    assert torch.allclose(found[:, 1], again[:, 1], rtol=0, atol=1e-12)
    assert not torch.equal(found[:, 1], both[:, 1])


def test_targets_with_a_required_feature_use_only_rows_that_have_it() -> None:
    game = RandomTexts(4, spread=1.0)
    g = torch.Generator().manual_seed(0)
    plan = join_plans(
        [plan_anchors(N, required=[N - 1], n_empty=8), plan_pairs(N, 160, generator=g)]
    )
    of_draw = torch.randint(0, N_TEXTS, (len(plan.masks), N), generator=g)
    texts = torch.where(plan.masks, -1, of_draw).int()
    share = torch.full((N, N_TEXTS), 1 / N_TEXTS, dtype=torch.float64)
    values = game.values(plan.masks, texts)[:, :1]
    values[~plan.masks[:, N - 1]] = torch.nan
    scope = Scope(torch.tensor([N - 1]), torch.tensor([N - 1]))
    found = without_draw_effects(plan, values, scope, DrawnTexts(texts, share, torch.arange(N)))
    assert torch.equal(found.isnan(), values.isnan())
    assert not torch.equal(found[plan.masks[:, N - 1]], values[plan.masks[:, N - 1]])


TEXTS = [
    f"the {a} is {b} and the {c} is {d}"
    for a in ("cat", "dog", "cow")
    for b in ("red", "blue")
    for c in ("cat", "dog", "cow")
    for d in ("red", "blue")
]


def test_announced_probabilities_are_those_of_the_draws() -> None:
    tokenizer = word_piece()
    for baselines in (
        CorpusBaselines(TEXTS),
        [["the", "a"], ["cow", "dog", "dog"], "is", ["blue"]],
    ):
        inp = TextSegmentInput("the cat is red", tokenizer, "word", baselines=baselines)
        own = inp._replacements._baseline
        for slot in inp.slots:
            announced = own.distribution(slot)
            g = torch.Generator().manual_seed(0)
            counts = Counter(own(slot, g) for _ in range(3000))
            assert sum(announced.values()) == pytest.approx(1)
            assert counts.keys() <= announced.keys()
            for text, share in announced.items():
                assert counts[text] / 3000 == pytest.approx(share, abs=4 * 0.5 / 3000**0.5)


@pytest.mark.parametrize("method", [KernelShap, Lime])
def test_a_result_is_solved_again_from_what_it_holds(method, tmp_path) -> None:
    tokenizer = word_piece()
    model = llama(len(tokenizer))
    inp = TextSegmentInput(
        "the cat is red and the dog is blue and the cow is",
        tokenizer,
        "word",
        baselines=CorpusBaselines(TEXTS),
    )
    found = GenerationAttribution(method(model), tokenizer).attribute(
        inp, " red and", n_samples=128
    )
    assert found.drawn_texts is not None
    assert found.drawn_texts.texts.shape[0] == len(found.masks)
    path = tmp_path / "run.safetensors"
    found.save(path)
    for result in (found, type(found).load(path)):
        again = result.refit()
        assert torch.allclose(again.token_attr, found.token_attr, rtol=0, atol=1e-5)
        errors = (again.token_attr_se, found.token_attr_se)
        assert torch.allclose(*errors, rtol=0, atol=1e-5, equal_nan=True)
