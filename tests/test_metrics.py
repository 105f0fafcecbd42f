"""Faithfulness: against closed forms, loops over orders, scipy, plain forwards, known causes."""

import json
import random
from itertools import permutations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerIntegratedGradients,
    ShapleyValues,
    TextTemplateInput,
    TextTokenInput,
)
from reference import loop_log_probs, tokens_read
from scipy.stats import spearmanr

from captum_llm_ext import (
    CorpusBaselines,
    Deletion,
    FaithfulnessReport,
    GenerationAttribution,
    GenerationGradientAttribution,
    TextSegmentInput,
    load_demo,
    measure_faithfulness,
)
from captum_llm_ext.demo import PROMPT as DEMO_PROMPT
from captum_llm_ext.evaluation.faithfulness import (
    Estimate,
    comprehensiveness,
    linear_datamodeling_score,
    measure_attributions,
    perturbation_curve,
    sufficiency,
)
from captum_llm_ext.evaluation.faithfulness.estimate import average
from captum_llm_ext.evaluation.rank_correlation import spearman

matplotlib.use("Agg")
PROMPT = "Dave lives in Austin."
TARGET = " golf and."
CHOICES = [["Ann", "Bob", "Eve"], ["has", "won"], "in", ["Waco.", "Reno."]]
OFF = "ignore:Absent features:UserWarning"


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def linear(weights, base=0.0):
    weights = np.asarray(weights, dtype=np.float64)
    return lambda masks: base + masks @ weights


class Recorded:
    """A game that remembers what it was asked."""

    def __init__(self, game, n_players):
        self.n_players, self.calls, self._game = n_players, [], game

    def __call__(self, masks):
        assert isinstance(masks, np.ndarray)
        assert masks.dtype == bool
        self.calls.append(masks)
        return self._game(masks)


def tabled(n, seed=0):
    """A game whose coalitions are worth what a table says."""
    worth = np.random.default_rng(seed).normal(size=2**n)
    return lambda masks: worth[masks @ (1 << np.arange(n))]


def value_of(game, present, n):
    mask = np.zeros((1, n), dtype=bool)
    mask[0, list(present)] = True
    return float(game(mask)[0])


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=atol, rtol=0)


# Curves on any game ------------------------------------------------------------------------------


def test_curves_of_a_linear_game_are_sums_of_weights():
    weights = [0.5, 3.0, -1.0, 2.0, 0.0]
    down = [4.5 + 1.0, 2.5, 0.5, 0.0, 0.0, 1.0]  # base 1, from all: 3, 2, .5, 0, -1 are taken out
    game = linear(weights, base=1.0)
    removal = perturbation_curve(weights, game)
    close(removal.sizes, range(6))
    close(removal.values.value, down)
    close(removal.area.value.value, np.trapezoid(np.array(down) - 1.0, np.linspace(0, 1, 6)))
    close(removal.normalized_area.value.value, float(removal.area) / 4.5)
    assert not removal.area.higher_is_better
    insertion = perturbation_curve(weights, game, "insertion")
    close(insertion.values.value, [1.0, 4.0, 6.0, 6.5, 6.5, 5.5])
    assert insertion.area.higher_is_better
    # The other end first: the same coalitions the other way round.
    weakest = perturbation_curve(weights, game, first="weakest")
    close(weakest.values.value, insertion.values.value.flip(0))
    assert weakest.area.higher_is_better
    upwards = perturbation_curve(weights, game, "insertion", first="weakest")
    close(upwards.values.value, removal.values.value.flip(0))
    assert not upwards.area.higher_is_better


def test_curves_and_reference_equal_a_plain_loop():
    n, game = 4, tabled(4)
    attr = [0.3, -0.2, 0.9, 0.1]
    order = [2, 0, 3, 1]
    expected = [value_of(game, set(range(n)) - set(order[:k]), n) for k in range(n + 1)]
    removal = perturbation_curve(attr, game, n_orders=400)
    close(removal.values.value, expected)
    added = perturbation_curve(attr, game, "insertion", n_orders=400)
    close(added.values.value, [value_of(game, order[:k], n) for k in range(n + 1)])
    every = [[value_of(game, one[:k], n) for k in range(n + 1)] for one in permutations(range(n))]
    truth, error = np.mean(every, axis=0), added.reference.standard_error.numpy()
    assert (error[1:-1] > 0).all()
    # Four standard errors: one in 16,000.
    assert (np.abs(added.reference.value.numpy() - truth) <= 4 * error + 1e-12).all()
    close(removal.reference.value, added.reference.value.flip(0))
    # 400 draws of one of 24 orders: the error of their mean.
    close(error, np.std(every, axis=0) / 20, atol=0.1 * np.std(every, axis=0).max() / 20)


def test_scores_of_few_features():
    weights = [0.5, 3.0, -1.0, 2.0]
    game = linear(weights)
    lost = comprehensiveness(weights, game, 2)
    assert float(lost) == pytest.approx(5.0)
    assert lost.higher_is_better
    kept = sufficiency(weights, game, 2)
    assert float(kept) == pytest.approx(-0.5)  # full 4.5, the two strongest alone 5
    assert not kept.higher_is_better
    # A random pair is half of everything, within four errors of eight orders.
    for metric in (lost, kept):
        error = float(metric.reference.standard_error)
        assert abs(float(metric.reference) - 2.25) < 4 * error
        assert float(metric.gain) > 0
    assert float(comprehensiveness(weights, game, 4)) == pytest.approx(4.5)
    assert float(sufficiency(weights, game, 4)) == 0.0
    assert str(lost).startswith("comprehensiveness@2 5.00 (random order: ")


def test_curves_use_signed_attributions():
    # By magnitude the feature that lowers the value would go first, and the value rise.
    weights = [1.0, -5.0, 2.0]
    values = perturbation_curve(weights, linear(weights)).values.value
    close(values, [-2.0, -4.0, -5.0, 0.0])


def test_many_features_are_removed_in_steps():
    n = 101
    weights = np.random.default_rng(0).normal(size=n)
    recorded = Recorded(linear(weights), n)
    curve = perturbation_curve(weights, recorded, max_steps=10, n_orders=2)
    close(curve.sizes, [0, 10, 20, 30, 40, 50, 51, 61, 71, 81, 91, 101])
    assert len(recorded.calls) == 1
    assert len(recorded.calls[0]) <= 4 * 10 + 2
    down = weights.sum() - np.concatenate([[0], np.cumsum(-np.sort(-weights))])
    close(curve.values.value, down[curve.sizes], atol=1e-10)


def test_equal_coalitions_are_evaluated_once():
    recorded = Recorded(tabled(3), 3)
    perturbation_curve([3.0, 2.0, 1.0], recorded, n_orders=50)
    (masks,) = recorded.calls
    assert len(masks) == len(np.unique(masks, axis=0)) == 8


def test_normalised_area_is_undefined_without_total_effect():
    for weights in ([1.0, -1.0], [-1.0, -2.0]):
        curve = perturbation_curve(weights, linear(weights))
        assert np.isnan(float(curve.normalized_area))
        assert np.isfinite(float(curve.area))
    rounding = perturbation_curve([1.0, -1.0], linear([1.0, -1.0 + 1e-9], base=5.0))
    assert np.isnan(float(rounding.normalized_area))


def test_normalised_area_is_undefined_within_error():
    class Drawn(Recorded):
        def draw_values(self, masks):
            return np.stack([masks.sum(1) * slope for slope in slopes])

    slopes = [1.0, 3.0, -2.0, 0.5]  # full less empty is 1.25 ± 2.1
    unsure = perturbation_curve([2.0, 1.0], Drawn(None, 2)).normalized_area
    assert np.isnan(float(unsure))
    slopes = [1.0, 1.2, 0.8, 1.1]
    sure = perturbation_curve([2.0, 1.0], Drawn(None, 2)).normalized_area
    assert float(sure) == pytest.approx(0.5)  # whatever the slope
    assert float(sure.value.standard_error) == pytest.approx(0.0, abs=1e-12)


def test_tied_attributions_do_not_depend_on_position():
    # One feature of twelve matters; where no attribution says so, on average it goes in the middle.
    n, areas = 12, []
    game = linear(np.eye(n)[0])
    for seed in range(60):
        areas.append(float(perturbation_curve(np.zeros(n), game, n_orders=1, seed=seed).area))
    # Uniform between 0 and 1, so that the mean of 60 has a standard error of 0.037.
    assert abs(np.mean(areas) - 0.5) < 4 * 0.037


def test_random_attributions_score_as_the_reference():
    n, game = 8, tabled(8, seed=3)
    gains = {"removal": [], "comprehensiveness": [], "lds": []}
    for seed in range(40):
        attr = np.random.default_rng(seed).normal(size=n)
        gains["removal"].append(float(perturbation_curve(attr, game, seed=seed).area.gain))
        gains["comprehensiveness"].append(float(comprehensiveness(attr, game, 3, seed=seed).gain))
        gains["lds"].append(float(linear_datamodeling_score(attr, game, seed=seed).gain))
    for found in gains.values():
        assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found))


# Linear datamodeling score -----------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 30])
def test_lds_of_linear_game_weights_is_one(n):
    weights = np.random.default_rng(1).normal(size=n)
    weights[-2:] = 0.0  # so that sums of other features tie
    score = linear_datamodeling_score(weights, linear(weights, base=-3.0))
    assert float(score) == pytest.approx(1.0, abs=1e-12)
    assert float(score.value.standard_error) == pytest.approx(0.0, abs=1e-12)
    assert float(score.reference) < 0.9
    reverse = linear_datamodeling_score(-weights, linear(weights))
    assert float(reverse) == pytest.approx(-1.0, abs=1e-12)


def test_rank_correlation_equals_scipy():
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 5, size=(3, 40)), draw.normal(size=(3, 40)).round(1)
    found = spearman(torch.tensor(x).double(), torch.tensor(y))
    close(found, [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])
    assert spearman(torch.zeros(1, 4).double(), torch.rand(1, 4).double()).isnan().all()


def test_lds_equals_scipy_over_its_coalitions():
    n = 9
    recorded = Recorded(tabled(n, seed=2), n)
    attr = np.random.default_rng(4).normal(size=n)
    score = linear_datamodeling_score(attr, recorded, n_coalitions=512)
    (masks,) = recorded.calls
    assert len(masks) == 512  # all there are
    game = tabled(n, seed=2)
    assert float(score) == pytest.approx(spearmanr(masks @ attr, game(masks)).statistic)
    assert float(score.value.standard_error) == 0.0
    some = linear_datamodeling_score(attr, recorded, n_coalitions=500)
    assert abs(float(some) - float(score)) < 4 * float(some.value.standard_error)


def test_jackknife_error_equals_spread_over_coalition_samples():
    n, game = 12, tabled(12, seed=5)
    weights = np.random.default_rng(6).normal(size=n)

    def both(masks):
        return masks @ weights + game(masks)

    runs = [linear_datamodeling_score(weights, both, seed=seed) for seed in range(80)]
    spread = np.std([float(run) for run in runs])
    errors = np.mean([float(run.value.standard_error) for run in runs])
    assert errors == pytest.approx(spread, rel=0.25)  # a spread of 80 runs is known to 8 %
    few = [linear_datamodeling_score(weights, both, share=0.9, seed=s) for s in range(3)]
    assert all(float(run.value.standard_error) > 0 for run in few)


def test_attributions_of_other_packages_are_measured():
    weights = [3.0, 1.0, -2.0, 0.5]
    recorded = Recorded(linear(weights), 4)
    given = {"right": weights, "wrong": [-w for w in weights]}
    report = measure_attributions(given, recorded, k=2, unit="points")
    assert len(recorded.calls) == 1
    assert (report.names, report.features[-1]) == (["right", "wrong"], "player 3")
    assert float(report.metrics["right"]["lds"]) == pytest.approx(1.0)
    assert float(report.metrics["wrong"]["comprehensiveness@2"]) == pytest.approx(-1.5)
    # Each metric is what its own function gives.
    alone = comprehensiveness(weights, linear(weights), 2)
    assert float(report.metrics["right"][alone.name]) == float(alone)
    better = report.difference("right", "wrong")
    assert all(float(better[name]) > 0 for name in better)
    assert "comprehensiveness@2 (higher is better, points)" in str(report)
    with pytest.raises(TypeError, match="mapping from names to numbers"):
        measure_attributions(weights, recorded)
    with pytest.raises(ValueError, match=r"`attributions\['a'\]` has shape \(1,\): give \(4,\)"):
        measure_attributions({"a": [1.0]}, recorded)
    with pytest.raises(ValueError, match="'b' has 3 numbers, another has 4"):
        measure_attributions({"a": weights, "b": weights[:3]}, linear(weights))


# Standard errors ---------------------------------------------------------------------------------


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.tensor(np.random.default_rng(0).normal(size=(7, 3)))
    mean, left_out = average(values)
    found = Estimate(mean, {"draws": left_out})
    close(found.standard_error, values.std(0) / np.sqrt(7))
    assert Estimate(values[0]).standard_error.eq(0).all()
    assert Estimate(values[0], {"draws": values[:1]}).standard_error.isnan().all()
    assert str(found[0]) == f"{mean[0]:.2f} ± {float(found.standard_error[0]):.2f}"
    assert str(Estimate(torch.tensor(-1e-9))) == "0.00"


def test_paired_difference_cancels_common_noise():
    noise = torch.tensor(np.random.default_rng(0).normal(size=(9,)))
    first = Estimate(*(lambda m, o: (m, {"draws": o}))(*average(noise + 1.0)))
    second = Estimate(*(lambda m, o: (m, {"draws": o}))(*average(noise)))
    difference = first - second
    assert float(difference) == pytest.approx(1.0)
    assert float(difference.standard_error) == pytest.approx(0.0, abs=1e-12)
    assert float(first.standard_error) > 0.1
    exact = first - Estimate(torch.tensor(0.5).double())
    close(exact.standard_error, first.standard_error)


def test_game_draws_give_errors(model, tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=CHOICES)
    attribution = GenerationAttribution(ShapleyValues(model), tokenizer)
    game = attribution.to_game(inp, TARGET, n_draws=5)
    masks = np.array([[True] * 4, [False, True, True, True], [False] * 4])
    by_draw = game.draw_values(masks)
    assert (game.n_draws, game.deterministic) == (5, False)
    assert by_draw.shape == (5, 3)
    close(by_draw.mean(0), game(masks))
    assert len(np.unique(by_draw[:, 1].round(6))) > 1
    lost = comprehensiveness([9.0, 1.0, 0.0, 2.0], game, 1)
    each = by_draw[:, 0] - by_draw[:, 1]
    assert float(lost) == pytest.approx(each.mean())
    assert float(lost.value.standard_error) == pytest.approx(each.std(ddof=1) / np.sqrt(5))
    single = attribution.to_game(inp, TARGET, n_draws=1)
    assert np.isnan(float(comprehensiveness([9.0, 1.0, 0.0, 2.0], single, 1).value.standard_error))
    fixed = attribution.to_game(TextSegmentInput(PROMPT, tokenizer, baselines="delete"), TARGET)
    assert fixed.draw_values(masks).shape == (1, 3)
    assert float(comprehensiveness([9.0, 1, 0, 2], fixed, 1).value.standard_error) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: perturbation_curve([1.0, 2.0], g), r"shape \(2,\): give \(3,\)"),
        (lambda g: perturbation_curve([1.0, np.nan, 2.0], g), "holds nan"),
        (lambda g: perturbation_curve([1.0] * 3, g, "deletion"), "give 'removal' or 'insertion'"),
        (lambda g: perturbation_curve([1.0] * 3, g, first="best"), "'strongest' or 'weakest'"),
        (lambda g: perturbation_curve([1.0] * 3, g, n_orders=0), "`n_orders` is 0"),
        (lambda g: perturbation_curve([1.0] * 3, g, max_steps=0), "`max_steps` is 0"),
        (lambda g: comprehensiveness([1.0] * 3, g, 4), "numbers of features from 1 to 3"),
        (lambda g: sufficiency([1.0] * 3, g, 0), "numbers of features from 1 to 3"),
        (lambda g: linear_datamodeling_score([1.0] * 3, g, share=1.0), "`share` is 1.0"),
        (lambda g: linear_datamodeling_score([1.0] * 3, g, n_coalitions=2), "at least 3"),
        (lambda g: perturbation_curve([1.0] * 3, lambda m: m), r"values of shape \(\d, 3\)"),
        (lambda g: perturbation_curve([1.0] * 3, lambda m: m[:, 0] / 0.0), "not finite"),
        (lambda g: perturbation_curve([1.0] * 3, g).lost_at(7), r"give one of \[0, 1, 2, 3\]"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Recorded(linear([1.0, 2.0, 3.0]), 3))


# Results of models -------------------------------------------------------------------------------


@pytest.mark.filterwarnings(OFF)
def test_values_equal_plain_forwards(model, tokenizer):
    unknown = tokenizer.unk_token_id
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=unknown)
    attribution = GenerationAttribution(ShapleyValues(model), tokenizer)
    result = attribution.attribute(inp, TARGET)
    target = result.target.tolist()
    report = measure_faithfulness(attribution, inp, result, token=2, k=2)
    assert report.features == ["Dave", " lives", " in", " Austin.", *result.output_features[:2]]
    assert report.names == ["ShapleyValues"]
    assert report.absence == f"token {unknown}"
    assert (report.n_draws, report.unit) == (1, "nats")

    def loop(present):
        prompt = inp.to_model_input(torch.tensor([present[:4]]).float())[0].tolist()
        read = tokens_read(target, [*present[4:], True, True], unknown)
        return float(loop_log_probs(model, prompt, [read[2]], [target[2]])[0])

    order = result.full_attr[2, :6].argsort(descending=True).tolist()
    sets = [[p in order[:k] for p in range(6)] for k in range(7)]
    curves = report.curves["ShapleyValues"]
    close(curves["insertion"].values.value, [loop(s) for s in sets], atol=1e-4)
    without = [loop([not p for p in s]) for s in sets]
    close(curves["removal"].values.value, without, atol=1e-4)
    metrics = report.metrics["ShapleyValues"]
    assert float(metrics["comprehensiveness@2"]) == pytest.approx(without[0] - without[2], abs=2e-4)
    assert float(metrics["sufficiency@2"]) == pytest.approx(without[0] - loop(sets[2]), abs=2e-4)
    assert float(report.full) == pytest.approx(without[0], abs=1e-4)
    assert float(report.empty) == pytest.approx(without[-1], abs=1e-4)
    # All 64 coalitions, by the loop.
    masks = [[bool(i >> p & 1) for p in range(6)] for i in range(64)]
    sums = np.array(masks) @ result.full_attr[2, :6].double().numpy()
    expected = spearmanr(sums, [loop(mask) for mask in masks]).statistic
    # Values of float32 and of the loop may rank two coalitions of 64 the other way round.
    assert float(metrics["lds"]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.filterwarnings(OFF)
def test_whole_target_is_measured_on_prompt_features(model, tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=tokenizer.unk_token_id)
    for attr_target in ("log_prob", "prob"):
        attribution = GenerationAttribution(
            FeatureAblation(model), tokenizer, attr_target=attr_target
        )
        result = attribution.attribute(inp, TARGET, output_unit=None)
        report = measure_faithfulness(attribution, inp, result, k=1)
        assert report.target == "the whole target"
        assert report.features == ["Dave", " lives", " in", " Austin."]
        # Leave-one-out is what is lost without one feature.
        lost = report.metrics["FeatureAblation"]["comprehensiveness@1"]
        assert float(lost) == pytest.approx(float(result.seq_attr.max()), abs=1e-4)


@pytest.mark.filterwarnings(OFF)
def test_spans_and_words(model, tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=tokenizer.unk_token_id)
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    result = attribution.attribute(inp, TARGET, output_unit="word")
    assert len(result.output_features) == 2
    token = len(result.output_tokens) - 1
    start = next(i for i, p in enumerate(result.output_pieces) if p.feature == 1)
    span = (start, token + 1)
    report = measure_faithfulness(attribution, inp, result, token=span, k=1, output_unit="word")
    assert report.features[4:] == [" golf"]
    lost = report.metrics["FeatureAblation"]["comprehensiveness@1"]
    strongest = result.attribute_span(*span).values[:5].max()
    assert float(lost) == pytest.approx(float(strongest), abs=1e-4)
    # Within the first word none of the generated features is a player.
    within = measure_faithfulness(attribution, inp, result, token=1, output_unit="word")
    assert len(within.features) == 4
    with pytest.raises(ValueError, match="1 features of earlier output, measured are"):
        measure_faithfulness(attribution, inp, result, token=-1)
    with pytest.raises(ValueError, match="1 features of earlier output, measured are 0"):
        measure_faithfulness(attribution, inp, result, token=-1, output_unit=None)


@pytest.mark.filterwarnings(OFF)
def test_captum_inputs_and_gradient_results(model, tokenizer):
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    # Columns of one group show one score: it is one player.
    template = TextTemplateInput(
        "{} lives in {} {}.", ["Dave", "Palm", "Coast"], ["Ann", "New", "York"], mask=[0, 1, 1]
    )
    result = attribution.attribute(template, TARGET)
    report = measure_faithfulness(attribution, template, result, k=1)
    assert len(report.features) == 2
    lost = report.metrics["FeatureAblation"]["comprehensiveness@1"]
    assert float(lost) == pytest.approx(float(result.seq_attr.max()), abs=1e-4)
    assert report.absence == "texts"
    ids = TextTokenInput(PROMPT, tokenizer, baselines=3)
    first = GenerationGradientAttribution(LayerIntegratedGradients(model, None), tokenizer)
    gradients = first.attribute(ids, TARGET)
    ablation = attribution.attribute(ids, gradients.target)
    both = measure_faithfulness(attribution, ids, [gradients, ablation], token=1)
    assert both.names == ["LayerIntegratedGradients", "FeatureAblation"]
    assert both.absence == "token 3"
    merged = torch.tensor([[0, 0, 1, 1]])
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=3)
    tied = attribution.attribute(inp, TARGET, feature_mask=merged)
    assert measure_faithfulness(attribution, inp, tied, feature_mask=merged).features == list(
        tied.input_tokens
    )


def test_baselines_are_reported_and_deletion_warns(model, tokenizer):
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    for baselines, output, told in [
        (None, None, "deleted"),
        ("<unk>", None, f"token {tokenizer.unk_token_id}"),
        ([""] * 4, None, "deleted"),
        (CHOICES, None, "texts (prompt), deleted (output)"),
        (CHOICES, "<unk>", "texts (prompt), <unk> (output)"),
    ]:
        inp = TextSegmentInput(PROMPT, tokenizer, baselines=baselines)
        result = attribution.attribute(inp, TARGET, output_baselines=output)
        with pytest.warns(UserWarning, match="the model never saw") as warned:
            report = measure_faithfulness(
                attribution, inp, result, token=1, output_baselines=output
            )
        assert report.absence == told
        assert len(warned) == 1
        assert warned[0].filename == __file__
    # What does not speak of one token for all, or of nothing, is measured without a word.
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=CHOICES)
    assert measure_faithfulness(attribution, inp, result).absence == "texts"
    out = {"output_baselines": Deletion(), "output_unit": None}
    fixed = attribution.attribute(inp, TARGET, output_unit=None)
    assert measure_faithfulness(attribution, inp, fixed, token=2, **out).absence == "texts"


@pytest.mark.filterwarnings(OFF)
def test_mismatched_results_are_refused(model, tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=3)
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    result = attribution.attribute(inp, TARGET)

    def refused(message, error=ValueError, *, of=attribution, on=inp, results=result, **more):
        with pytest.raises(error, match=message):
            measure_faithfulness(of, on, results, **more)

    refused("`attribution` is a FeatureAblation", TypeError, of=FeatureAblation(model))
    refused("`results` is a dict_keys", TypeError, results={}.keys())
    refused("`results` is empty", results={})
    refused("names a result", TypeError, results={"": result})
    refused("'a' is a Tensor: give results", TypeError, results={"a": result.token_attr})
    other = attribution.attribute(inp, " chess.")
    refused("have different targets", results=[result, other])
    refused(
        "4 prompt features, the input has 1",
        on=TextSegmentInput(PROMPT, tokenizer, "line", baselines="delete"),
    )
    elsewhere = TextSegmentInput("Dave lives in Boston.", tokenizer, baselines=3)
    refused("' Austin.' and ' Boston.' are the first that differ", on=elsewhere)
    spans, more = [(0, 4), (5, 10)], "Dave lives at home."
    few = TextSegmentInput(PROMPT, tokenizer, spans, baselines=3)
    refused(
        "same names in another text",
        on=TextSegmentInput(more, tokenizer, spans, baselines=3),
        results=attribution.attribute(few, TARGET),
    )
    logits = GenerationAttribution(FeatureAblation(model), tokenizer, attr_target="logit")
    refused("'FeatureAblation' explains 'log_prob', `attribution` scores 'logit'", of=logits)
    refused("`output_unit` and `output_baselines` have no meaning", output_unit="word")
    refused("there is no target token 9", token=9)
    refused("0 target tokens are 'chess'", token="chess")
    refused("which is empty", token=(2, 2))
    refused("`token` is 1.5: give the position or the text", TypeError, token=1.5)
    refused("`token` is \\(1, None\\)", TypeError, token=(1, None))
    refused("`seed` is '0'", seed="0")
    refused("numbers of features from 1 to 4", k=5)
    refused("`n_draws` is 0", n_draws=0)
    refused("`n_orders` is 0", n_orders=0)
    probability = GenerationAttribution(FeatureAblation(model), tokenizer, attr_target="prob")
    refused(
        "do not add up to that of a span",
        of=probability,
        results=probability.attribute(inp, TARGET),
        token=(0, 2),
    )


@pytest.mark.filterwarnings(OFF)
def test_result_of_another_model_warns(model, tokenizer, smooth):
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=3)
    result = GenerationAttribution(FeatureAblation(smooth), tokenizer).attribute(inp, TARGET)
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    with pytest.warns(UserWarning, match="comes from another model"):
        measure_faithfulness(attribution, inp, result)


# The demo, whose causes are known ----------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    """Leave-one-out by the corpus and by deletion, measured by the corpus."""
    model, tokenizer, texts = load_demo()
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    inp = TextSegmentInput(DEMO_PROMPT, tokenizer, baselines=CorpusBaselines(texts))
    corpus = attribution.attribute(inp, gen_args={"max_new_tokens": 15})
    deleted = attribution.attribute(inp.with_baselines(None), corpus.target)
    results = {"corpus": corpus, "deleted": deleted}
    report = measure_faithfulness(attribution, inp, results, token="surfing", seed=1)
    return attribution, inp, results, report


def test_same_slot_attribution_is_more_faithful_than_deletion(demo):
    *_, report = demo
    assert isinstance(report, FaithfulnessReport)
    assert report.absence == "corpus"
    corpus = report.metrics["corpus"]
    # The city alone decides: without it all is lost, with it alone nothing.
    all_of_it = float(report.full) - float(report.empty)
    assert float(corpus["comprehensiveness@1"]) == pytest.approx(all_of_it, abs=1.0)
    assert float(corpus["sufficiency@1"]) == pytest.approx(0.0, abs=0.05)
    assert float(corpus["normalized_insertion_area"]) > 0.95
    assert float(corpus["normalized_removal_area"]) < 0.1
    better = report.difference("corpus", "deleted")
    for name in ("area_between", "comprehensiveness@1", "sufficiency@1", "lds"):
        assert float(better[name]) > 2 * float(better[name].standard_error), name
    assert report.difference("deleted", "deleted")["lds"].standard_error == 0
    with pytest.raises(ValueError, match="'none' was not measured: there are corpus, deleted"):
        report.difference("corpus", "none")


@pytest.mark.filterwarnings(OFF)
def test_deletion_metric_reverses_the_order(demo):
    attribution, inp, results, _ = demo
    report = measure_faithfulness(attribution, inp.with_baselines(None), results, token="surfing")
    assert float(report.difference("corpus", "deleted")["area_between"]) < 0


def test_reports_are_reproducible_with_independent_draws(demo):
    attribution, inp, results, report = demo
    again = measure_faithfulness(attribution, inp, results, token="surfing", seed=1)
    assert again.to_dict() == report.to_dict()
    game = attribution.to_game(inp, results["corpus"].target, token=2, seed=1, normalize=False)
    assert float(report.empty) != pytest.approx(game.empty_coalition_value)


def test_report_text_dict_and_plots(demo, monkeypatch):
    *_, report = demo
    lines = str(report).splitlines()
    assert lines[0] == repr(report)
    assert "'surfing', 16 features, absent: corpus," in lines[0]
    assert any(line.startswith("lds (higher is better)") for line in lines)
    assert "all features: 0.00 nats; none: -" in lines[-1]
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert set(data["metrics"]["corpus"]) == set(report.metrics["corpus"])
    frame = report.to_dataframe()
    assert len(frame) == 2 * len(report.metrics["corpus"])
    row = frame[(frame.attribution == "corpus") & (frame.metric == "lds")].iloc[0]
    assert row.value == float(report.metrics["corpus"]["lds"])
    fig, ax = report.plot()
    assert fig is ax.figure
    assert ax.get_xlabel() == "features removed"
    assert "nats" in ax.get_ylabel()
    shown = [text.get_text() for text in ax.get_legend().get_texts()]
    assert shown == ["random order", "corpus", "deleted", "smallest attribution first"]
    drawn = [line.get_ydata() for line in ax.lines if len(line.get_xdata()) > 1]
    close(drawn[1], report.curves["corpus"]["removal"].values.value)
    close(drawn[2], report.curves["corpus"]["insertion"].values.value.flip(0))
    _, own = plt.subplots()
    assert report.plot("insertion", ax=own)[1] is own
    assert own.get_xlabel() == "features present"
    monkeypatch.setattr(plt, "show", lambda: None)
    assert report.plot("removal", show=True) is None
    with pytest.raises(ValueError, match="give 'removal', 'insertion' or 'both'"):
        report.plot("deletion")


def test_areas_in_nats_are_shown_without_normalisation(model, tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=CHOICES)
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    shares = set()
    for target in (TARGET, " chess.", " tennis, music", " x"):
        report = measure_faithfulness(attribution, inp, attribution.attribute(inp, target))
        raises = float(report.full) > float(report.empty)
        assert ("insertion_area (higher is better, nats)" in str(report)) != raises
        shares.add(raises)
    assert shares == {True, False}


def test_callable_named_like_an_attr_target_is_measured(model, tokenizer):
    def log_prob(logits, target):
        return logits[:, range(len(target)), target]

    log_prob.__qualname__ = "log_prob"  # as at the top of a module
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=lambda *given: " Ann")
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer, attr_target=log_prob)
    known = GenerationAttribution(FeatureAblation(model), tokenizer, attr_target="logit")
    result = attribution.attribute(inp, TARGET)
    expected = measure_faithfulness(known, inp, known.attribute(inp, TARGET))
    found = measure_faithfulness(attribution, inp, result)
    assert float(found.full) == pytest.approx(float(expected.full), abs=1e-4)  # float32 sums
    plain = GenerationAttribution(FeatureAblation(model), tokenizer)
    with pytest.raises(ValueError, match=r"explains 'log_prob\(\)'"):
        measure_faithfulness(plain, inp, result)


def test_unrelated_corpus_warns_as_deletion():
    model, tokenizer, texts = load_demo()
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    rng = random.Random(0)
    words = "oil up by two banks as rates fell on news of a weak quarter in trade".split()
    news = [" ".join(rng.sample(words, 12)).capitalize() + "." for _ in range(300)]
    counts = {"n_draws": 1, "n_orders": 1, "n_coalitions": 3, "max_steps": 2, "k": 1}
    target = " His personal"
    related = TextSegmentInput(DEMO_PROMPT, tokenizer, baselines=CorpusBaselines(texts))
    result = attribution.attribute(related, target, n_draws=2)
    measure_faithfulness(attribution, related, result, **counts)  # warnings are errors here
    unrelated = related.with_baselines(CorpusBaselines(news))
    with (
        pytest.warns(UserWarning, match="have no similar context in this corpus"),
        pytest.warns(UserWarning, match="arbitrary text of an unrelated corpus") as warned,
    ):
        measure_faithfulness(attribution, unrelated, result, **counts)
    assert any(w.filename == __file__ for w in warned)
