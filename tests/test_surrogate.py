"""Two levels: many coalitions of a surrogate, few of what it misses; the answer is the model's."""

import copy
import itertools
import random
import time
from math import sqrt

import pytest
import tiny
import torch
from captum.attr import FeatureAblation, KernelShap, Lime, ShapleyValues, ShapleyValueSampling

from captum_llm_ext import (
    GenerationAttribution,
    GenerationAttributionResult,
    PartitionShap,
    TextSegmentInput,
)
from captum_llm_ext.attribution.surrogate import Surrogate
from captum_llm_ext.coalitions import (
    Scope,
    join_plans,
    plan_anchors,
    plan_exact,
    plan_pairs,
    solve_exact,
    solve_few_pairs,
    solve_kernel,
)
from captum_llm_ext.coalitions.two_levels import Level, split, summed
from captum_llm_ext.model import Scorer

# A surrogate as large as the model, such as most here, saves nothing.
pytestmark = pytest.mark.filterwarnings("ignore:the surrogate saves nothing")

PROMPT = "Dave lives in Palm Coast and golfs."
TARGET = " golf and chess"


def perturbed(model, size, seed=0):
    """A model close to another one."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += size * parameter.std() * noise.to(parameter)
    return other


def attribute(method, surrogate, *, unit="word", attr_target="log_prob", **arguments):
    tokenizer = tiny.byte_level()
    inp = TextSegmentInput(PROMPT, tokenizer, unit, baselines="delete")
    attribution = GenerationAttribution(method, tokenizer, attr_target, surrogate=surrogate)
    return attribution.attribute(inp, TARGET, **arguments)


def errors_of(result):
    """Standard errors of all features."""
    own = [result.token_attr_se, result.output_attr_se]
    return torch.cat([part for part in own if part is not None], 1)


def game(n, n_target, seed, order=3):
    """Values of random interactions, and of others nearby."""
    generator = torch.Generator().manual_seed(seed)
    terms = torch.rand(40, n, generator=generator) < order / n
    sizes = torch.randn(40, n_target, generator=generator).double()
    off = sizes + 0.1 * torch.randn(40, n_target, generator=generator).double()

    def play(masks, sizes):
        return (masks[:, None] | ~terms).all(2).double() @ sizes

    return lambda masks: play(masks, sizes), lambda masks: play(masks, off)


def test_sum_of_both_levels_is_unbiased_with_valid_errors():
    """Against all coalitions of the game: 95 % intervals hold it as often as they say."""
    n, n_target, within, count, squares, errors = 10, 3, 0, 0, 0.0, 0.0
    for seed in range(40):
        exact, near = game(n, n_target, seed % 6)
        scope = Scope.of_all(n_target, n)
        whole = join_plans([plan_anchors(n), plan_exact(n, n_draws=1, common_draw=True)])
        truth = solve_exact(whole, exact(whole.masks), scope).attributions
        generator = torch.Generator().manual_seed(1000 + seed)
        many, few = (
            join_plans([plan_anchors(n), plan_pairs(n, size, generator=generator)])
            for size in (160, 14)
        )
        found = summed(
            [
                solve_kernel(many, near(many.masks), scope),
                solve_few_pairs(few, exact(few.masks) - near(few.masks), scope),
            ]
        )
        off = found.attributions - truth
        within += int((off.abs() <= 1.96 * found.standard_errors).sum())
        squares += float(off.square().sum())
        errors += float(found.standard_errors.square().sum())
        count += off.numel()
        torch.testing.assert_close(found.full_values, exact(whole.masks[:1])[0])
        assert float(found.efficiency_gap.abs().max()) < 1e-9
    assert 0.92 < within / count < 0.99
    assert 0.7 < sqrt(errors / squares) < 1.5


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.1])
def test_split_minimises_cost_at_equal_variance(ratio):
    """Against a search over all splits."""
    n, cost = 500, 4.5
    first, second = Level(n, 1.0, 1.0), Level(50, cost, ratio * n / 50)
    found = split(first, second, cost - 1, n, 1.0)
    best = min(
        (a + cost * b, a, b)
        for b in range(1, n)
        for a in [n / (1 - ratio * n / b) if ratio * n < b else float("inf")]
    )
    assert found.surrogate + cost * found.difference == pytest.approx(best[0], rel=0.03)
    assert found.pays == (best[0] < n * (cost - 1))


METHODS = {
    "KernelShap": lambda model: KernelShap(model),
    "ShapleyValueSampling": lambda model: ShapleyValueSampling(model),
    "ShapleyValues": lambda model: ShapleyValues(model),
    "PartitionShap": lambda model: PartitionShap(model, scheme="orders"),
}


@pytest.mark.parametrize(
    ("name", "output_unit"),
    [
        ("KernelShap", None),
        ("KernelShap", "token"),
        ("ShapleyValueSampling", None),
        ("ShapleyValues", None),
    ],
)
def test_attributions_converge_to_the_model_for_any_surrogate(name, output_unit):
    """Against all coalitions of the model, with a surrogate that is far off."""
    model = tiny.llama()
    surrogate = perturbed(model, 0.2)
    truth = attribute(ShapleyValues(model), None, output_unit=output_unit, max_exact_features=16)
    samples = {} if name == "ShapleyValues" else {"n_samples": 100 if name == "KernelShap" else 10}
    given = {"output_unit": output_unit, "max_exact_features": 16, **samples}
    found = attribute(METHODS[name](model), surrogate, **given)
    off = (found.full_attr - truth.full_attr).abs()
    errors = (
        torch.cat([found.token_attr_se, found.output_attr_se], 1)
        if output_unit
        else found.token_attr_se
    )
    assert bool((off <= 5 * errors + 1e-5).all())
    torch.testing.assert_close(found.full_values, truth.full_values, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.empty_values, truth.empty_values, atol=1e-5, rtol=0)
    assert float(found.efficiency_gap.abs().max()) < 1e-4


class Remembers:
    """A scorer of the user's own: another's values, and no model to count the weights of."""

    def __init__(self, scorer):
        self._scorer, self.n_rows = scorer, 0

    def __getattr__(self, name):
        if name == "model":
            raise AttributeError(name)
        return getattr(self._scorer, name)

    def values(self, rows, target, foils=None):
        self.n_rows += len(rows)
        return self._scorer.values(rows, target, foils)


def near_truth(found, truth):
    off = (found.full_attr - truth.full_attr).abs()
    return bool((off <= 5 * errors_of(found) + 1e-5).all())


def test_surrogate_may_be_a_scorer():
    model = tiny.llama()
    scorer = Remembers(Scorer(perturbed(model, 0.1)))
    found = attribute(KernelShap(model), scorer, n_samples=120, output_unit=None)
    truth = attribute(ShapleyValues(model), None, output_unit=None, max_exact_features=16)
    assert near_truth(found, truth)
    about = found.provenance["surrogate"]
    assert about["scorer"] == "Remembers"
    assert about["cost"] == pytest.approx(1 / 8)  # nothing is known of it
    assert scorer.n_rows > about["corrected_by"]
    with pytest.raises(ValueError, match="with the same `attr_target`"):
        attribute(KernelShap(model), scorer, attr_target="prob")


def test_owen_values_with_a_surrogate_converge_to_the_model():
    """Against the model alone with a hundred times as many orders."""
    model = tiny.llama()
    given = {"unit": ("sentence", "word"), "output_unit": None}
    method = PartitionShap(model, scheme="orders")
    truth = attribute(method, None, n_samples=400, **given)
    found = attribute(method, perturbed(model, 0.1), n_samples=40, **given)
    off = (found.token_attr - truth.token_attr).abs()
    errors = (found.token_attr_se.square() + truth.token_attr_se.square()).sqrt()
    assert bool((off <= 5 * errors + 1e-5).all())
    assert float(found.efficiency_gap.abs().max()) < 1e-4


def test_ridge_fits_of_both_levels_add_up():
    """A ridge is linear in the values: against the model alone on many coalitions."""
    model = tiny.llama()
    method = Lime(model, interpretable_model=_ridge())
    truth = attribute(method, None, n_samples=2000, output_unit=None)
    found = attribute(method, perturbed(model, 0.1), n_samples=400, output_unit=None)
    off = (found.token_attr - truth.token_attr).abs()
    errors = (found.token_attr_se.square() + truth.token_attr_se.square()).sqrt()
    assert bool((off <= 5 * errors + 1e-5).all())


def test_both_levels_share_baseline_draws():
    """Against every draw of the two texts, and all coalitions."""
    model, tokenizer = tiny.llama(), tiny.byte_level()
    inp = TextSegmentInput("Dave golfs in Palm", tokenizer, "word", baselines=[["he", "chess"]] * 4)

    def found(method, surrogate=None, **given):
        attribution = GenerationAttribution(method, tokenizer, surrogate=surrogate)
        return attribution.attribute(inp, TARGET, output_unit=None, **given)

    truth = found(ShapleyValues(model), n_draws=256)
    near = perturbed(model, 0.05)
    runs = [found(KernelShap(model), near, n_samples=400, seed=seed) for seed in range(6)]
    off = torch.stack([run.token_attr - truth.token_attr for run in runs])
    errors = torch.stack([run.token_attr_se for run in runs])
    assert float((off.abs() < 1.96 * errors).float().mean()) > 0.8  # of 16 pairs: .90 in 30 runs
    # No bias: the mean of six, whose error is a sixth of their squares' sum.
    mean_error = errors.square().sum(0).sqrt() / 6
    assert bool((off.mean(0).abs() < 5 * mean_error).all())


@pytest.mark.parametrize("surrogate", ["bf16", "float16"])
def test_equal_seeds_score_equal_rows_despite_timing(surrogate, monkeypatch):
    model = tiny.llama()
    found = []
    for seed in range(2):  # a machine that is busy with something else
        draw = random.Random(seed)
        ticks = itertools.accumulate(draw.expovariate(1.0) for _ in itertools.count())
        monkeypatch.setattr(time, "perf_counter", ticks.__next__)
        found.append(attribute(KernelShap(model), surrogate, n_samples=200, output_unit=None))
        monkeypatch.undo()
    assert torch.equal(found[0].masks, found[1].masks)
    assert found[0].provenance["surrogate"] == found[1].provenance["surrogate"]
    assert found[0].provenance["surrogate"]["cost"] == 0.5  # of the bytes


def test_relative_cost_counts_weights_used_per_token():
    model = tiny.llama()
    apart = model.lm_head.weight is not model.model.embed_tokens.weight
    assert apart  # the table is looked up, not multiplied with
    shorter = copy.deepcopy(model)
    shorter.model.layers = shorter.model.layers[:1]
    own, other = (
        sum(p.numel() for n, p in m.named_parameters() if "embed_tokens" not in n)
        for m in (model, shorter)
    )
    assert Surrogate(model, shorter).work_of_model == pytest.approx(own / other)
    assert Surrogate(model, shorter.bfloat16()).work_of_model == pytest.approx(2 * own / other)


def test_bfloat16_copy_is_made_once_and_the_model_unchanged():
    model = tiny.llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    attribution = GenerationAttribution(KernelShap(model), tiny.byte_level(), surrogate="bf16")
    inp = TextSegmentInput(PROMPT, tiny.byte_level(), "word", baselines="delete")
    found = [attribution.attribute(inp, TARGET, n_samples=300) for _ in range(2)]
    assert found[0].provenance["surrogate"]["copy"] == "bfloat16"
    assert attribution.surrogate._own() is attribution.surrogate._own()
    assert next(attribution.surrogate._own().parameters()).dtype == torch.bfloat16
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    truth = attribute(ShapleyValues(model), None, max_exact_features=16)
    for one in found:
        errors = errors_of(one)
        assert bool(((one.full_attr - truth.full_attr).abs() <= 5 * errors + 1e-5).all())
    about = found[0].provenance["surrogate"]
    assert found[0].n_evaluations < about["n_evaluations"] <= 300 + about["corrected_by"] + 2
    assert 0 < about["share_of_variance"] <= 1


@pytest.mark.parametrize("attr_target", ["prob", "contrast"])
def test_other_attr_targets(attr_target):
    # Probabilities that are not next to 0 but for a few coalitions, which errors could not tell.
    model = tiny.llama(initializer_range=0.05)
    surrogate = perturbed(model, 0.1)
    arguments = {"attr_target": attr_target, "max_exact_features": 16}
    truth = attribute(ShapleyValues(model), None, **arguments)
    found = attribute(KernelShap(model), surrogate, n_samples=400, **arguments)
    errors = errors_of(found)
    assert bool(((found.full_attr - truth.full_attr).abs() <= 5 * errors + 1e-6).all())
    torch.testing.assert_close(found.full_values, truth.full_values, atol=1e-5, rtol=0)
    if attr_target == "contrast":
        assert found.foil_values.shape == found.values.shape
        torch.testing.assert_close(found.output_probs, truth.output_probs, atol=1e-5, rtol=0)


def test_refit_uses_both_levels(tmp_path):
    model = tiny.llama()
    surrogate = perturbed(model, 0.1)
    found = attribute(KernelShap(model), surrogate, n_samples=400, output_unit=None)
    found.save(tmp_path / "result.safetensors")
    loaded = GenerationAttributionResult.load(tmp_path / "result.safetensors")
    for again in (found.refit(), loaded.refit()):
        torch.testing.assert_close(again.token_attr, found.token_attr, atol=1e-5, rtol=0)
        torch.testing.assert_close(again.token_attr_se, found.token_attr_se, atol=1e-5, rtol=0)
    truth = attribute(
        ShapleyValues(model), None, attr_target="prob", output_unit=None, max_exact_features=16
    )
    prob = found.refit(attr_target="prob")
    assert bool(((prob.token_attr - truth.token_attr).abs() <= 5 * prob.token_attr_se + 1e-6).all())
    assert found.refit(PartitionShap(model, scheme="splits")).token_attr.isfinite().all()
    lime = found.refit(Lime(model, interpretable_model=_ridge()))
    assert lime.token_attr.isfinite().all()
    assert "paragraph" in found.narrative() or found.narrative()
    assert str(found)


def _ridge():
    from captum._utils.models.linear_model import SkLearnRidge

    return SkLearnRidge(alpha=1.0)


@pytest.mark.parametrize(
    "method",
    [
        lambda model: Lime(model),
        lambda model: FeatureAblation(model),
        lambda model: PartitionShap(model, scheme="splits"),
    ],
)
def test_non_linear_and_exact_methods_are_refused(method):
    model = tiny.llama()
    with pytest.raises(ValueError, match="Leave `surrogate` out"):
        attribute(method(model), "bf16")


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        ("fp8", "give one of"),
        (lambda model: model, "the model itself"),
        (lambda model: 3, "a model or a scorer"),
    ],
)
def test_invalid_surrogates_are_refused(surrogate, message):
    model = tiny.llama()
    given = surrogate if isinstance(surrogate, str) else surrogate(model)
    with pytest.raises((TypeError, ValueError), match=message):
        GenerationAttribution(KernelShap(model), tiny.byte_level(), surrogate=given)
    with pytest.raises(ValueError, match="no finer"):
        GenerationAttribution(KernelShap(model.bfloat16()), tiny.byte_level(), surrogate="bf16")


@pytest.mark.parametrize("stop", ["top1", "answer top1", None])
def test_stopping_rules_use_errors_of_both_levels(stop):
    model = tiny.llama()
    surrogate = perturbed(model, 0.05)
    tol = None if stop else 0.1
    found = attribute(KernelShap(model), surrogate, stop=stop, tol=tol, output_unit=None)
    truth = attribute(ShapleyValues(model), None, output_unit=None, max_exact_features=16)
    assert found.settled is not None
    if tol is not None and all(found.settled):
        off = (found.token_attr - truth.token_attr).abs()
        assert bool((off <= 5 * found.token_attr_se + 1e-5).all())


def test_interrupted_run_resumes(tmp_path):
    model = tiny.llama()
    surrogate = perturbed(model, 0.05)
    path = tmp_path / "run.safetensors"
    arguments = {"n_samples": 200, "output_unit": None, "checkpoint": path}
    first = attribute(KernelShap(model), surrogate, **arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "run.safetensors",
        "run.surrogate.safetensors",
    ]
    again = attribute(KernelShap(model), surrogate, **arguments)
    torch.testing.assert_close(again.token_attr, first.token_attr, atol=1e-6, rtol=0)
    assert again.provenance["surrogate"] == first.provenance["surrogate"]
    with pytest.raises(ValueError, match="belongs to another run"):
        attribute(KernelShap(model), perturbed(model, 0.05, seed=1), **arguments)


def test_bfloat16_copy_follows_changed_weights():
    model = tiny.llama()
    surrogate = Surrogate(model, "bf16")
    first = surrogate.scorer("log_prob", None, False, None).model
    assert surrogate.scorer("log_prob", None, False, None).model is first
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    again = surrogate.scorer("log_prob", None, False, None).model
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())
