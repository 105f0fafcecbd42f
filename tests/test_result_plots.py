"""Plots of results: convergence, text, flow, heat maps, bars; their labels, marks and errors."""

import copy
from dataclasses import replace
from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, KernelShap, Lime, ShapleyValues, ShapleyValueSampling
from matplotlib.collections import FillBetweenPolyCollection, LineCollection
from matplotlib.patches import PathPatch

from captum_llm_ext import (
    GenerationAttribution,
    GenerationAttributionResult,
    PartitionShap,
    TextSegmentInput,
)
from captum_llm_ext.coalitions import join_plans, plan_anchors, plan_pairs, plan_permutations
from captum_llm_ext.result import plot
from captum_llm_ext.result.convergence import earlier
from captum_llm_ext.result.design import Design
from captum_llm_ext.result.refit import Evidence
from captum_llm_ext.text.inputs import Piece

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def attributed(model, tokenizer, method=ShapleyValueSampling, text=" golf & chess\n.", **options):
    prompt = "Dave lives in Austin and is a nurse. Ann lives"
    inp = TextSegmentInput(prompt, tokenizer, ("sentence", "word"), baselines="delete")
    options = {"output_unit": "word"} | options
    return GenerationAttribution(method(model), tokenizer).attribute(inp, text, **options)


@pytest.fixture(scope="module")
def result(model, tokenizer):
    return attributed(model, tokenizer, n_samples=20)


# Convergence -------------------------------------------------------------------------------------


def game(mask):
    """Three features matter, two of them only together."""
    return 2.0 * mask[..., 0] + 3.0 * (mask[..., 1] & mask[..., 3]) - 1.0 * mask[..., 2]


def evidence(planned, plan, solved=None, deterministic=True):
    design = Design(
        planned=planned,
        solved=solved or planned,
        options={},
        n_features=plan.n_features,
        n_anchors=plan.n_anchors,
        n_visible=[plan.n_features] * 2,
        required=[-1] * 2,
        columns=list(range(plan.n_features)),
        deterministic=deterministic,
    )
    values = torch.stack([game(plan.masks).double(), -game(plan.masks).double()], 1)
    return Evidence(design, plan.masks, plan.draws, values, design.scope)


def walks(n_orders, n=5):
    generator = torch.Generator().manual_seed(0)
    plan = plan_permutations(n, n_orders, generator=generator)
    return evidence("antithetic permutations", join_plans([plan_anchors(n), plan]))


def test_earlier_estimates_equal_the_first_permutations():
    found = earlier(walks(64), [1, 0])
    counts = [count for count, _ in found]
    assert counts == sorted(set(counts))
    assert len(counts) > 4
    everything = walks(64)
    for count, solution in found:
        masks = everything.masks[2:count]
        assert len(masks) % (2 * 6) == 0  # an order and its reverse, six rows each
        gains = np.zeros(5)
        for walk in masks.view(-1, 6, 5):
            for before, after in pairwise(walk):
                gains[(after & ~before).nonzero()] += float(game(after) - game(before))
        want = gains / (len(masks) / 6)
        np.testing.assert_allclose(solution.attributions[1], want, atol=1e-9)
        np.testing.assert_allclose(solution.attributions[0], -want, atol=1e-9)


def test_convergence_points_are_spaced_geometrically():
    counts = [count - 2 for count, _ in earlier(walks(512), [0], 5)]
    ratios = np.array(counts[1:]) / counts[:-1]
    assert 3 <= len(counts) <= 5
    assert ratios.max() / ratios.min() < 1.5
    assert counts[-1] < 512 * 6


def test_convergence_adds_complement_pairs_together():
    plan = plan_pairs(8, 120, generator=torch.Generator().manual_seed(0))
    known = evidence("paired kernel regression", join_plans([plan_anchors(8), plan]))
    found = earlier(known, [0])
    assert all((count - 2) % 2 == 0 for count, _ in found)
    # The errors of an additive game with one interaction fall with their number.
    truth = torch.tensor([2.0, 1.5, -1.0, 1.5, 0, 0, 0, 0]).double()
    errors = [float((solution.attributions[0] - truth).abs().max()) for _, solution in found]
    assert errors[-1] < 0.1 < errors[0]


def test_convergence_adds_enumeration_repeats_in_turn(model, tokenizer):
    # Random words stand for absent ones, so that repetitions differ.
    prompt, words = (
        "Dave lives in Austin",
        [["Ann", "Bob"], ["is", "was"], ["at", "near"], ["X", "Y"]],
    )
    inp = TextSegmentInput(prompt, tokenizer, "word", baselines=words)
    for method, rows in ((FeatureAblation, 4), (ShapleyValues, 16)):
        attribution = GenerationAttribution(method(model), tokenizer)
        found = attribution.attribute(inp, " golf", output_unit=None, n_draws=6)
        counts = [count for count, _ in earlier(found._evidence(), [0])]
        assert len(counts) > 1
        assert all((count - found.design.n_anchors) % rows == 0 for count in counts)


def test_exact_methods_refuse_convergence_plots(model, tokenizer):
    exact = attributed(model, tokenizer, FeatureAblation)
    with pytest.raises(ValueError, match="leave-one-out found did not converge"):
        exact.plot_convergence()
    complete = replace(walks(64).design, solved="exact")
    with pytest.raises(ValueError, match="exact found did not converge"):
        earlier(replace(walks(64), design=complete), [0])


@pytest.mark.parametrize("method", [ShapleyValueSampling, KernelShap, Lime, PartitionShap])
def test_last_convergence_point_equals_the_result(model, tokenizer, method):
    found = attributed(model, tokenizer, method, n_samples=16 if "Sampling" in str(method) else 200)
    _, ax = found.plot_convergence(k=3)
    blocks = [(found.token_attr, 2), (found.output_attr, 1)]  # half of them in the prompt
    largest = torch.cat(
        [attr.abs().flatten().sort(descending=True).values[:n] for attr, n in blocks]
    )
    largest = largest.sort(descending=True).values
    drawn = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert [abs(line.get_ydata()[-1]) for line in drawn] == pytest.approx(largest.tolist())
    for line in drawn:
        assert line.get_xdata()[-1] == len(found.masks)
        assert (np.diff(line.get_xdata()) > 0).all()
        # Estimates from half of the coalitions are near, and no copies of, the last; splits that
        # are left to the end change nothing here.
        apart = abs(line.get_ydata()[-2] - line.get_ydata()[-1])
        assert apart < largest[0] / 2
        assert apart > 0 or method is PartitionShap


def test_convergence_labels_stand_at_the_last_estimate(result):
    _, ax = result.plot_convergence(k=4)
    want = []
    for token, causes in enumerate(result.top(9)):
        want += [(c.is_output, -abs(c.attribution), token, c.label) for c in causes]
    want = [sorted(of for of in want if of[0] is block)[:2] for block in (False, True)]
    names = {f"{result.names.tokens[t]} ← {name.strip()}" for _, _, t, name in [*want[0], *want[1]]}
    texts = {t.get_text(): t for t in ax.texts}
    assert {text[:20] for text in texts} == {plot.labels.label(name, 40)[:20] for name in names}
    heights = sorted(t.get_window_extent().y0 for t in texts.values())
    assert np.diff(heights).min() > 8  # pixels
    token = result.output_tokens[-1]
    _, ax = result.plot_convergence(len(result.output_tokens) - 1, k=2)
    assert {t.get_text() for t in ax.texts} == {
        plot.labels.label(next(c for c in causes if c.is_output is block).label, 40)
        for causes in [result.why(len(result.output_tokens) - 1, 2)]
        for block in (False, True)
    }, token


def test_convergence_bands_span_one_standard_error():
    fig, ax = plot.convergence(
        [10, 20, 40], [[1.0], [2.0], [3.0]], labels=["a"], errors=[[np.nan], [0.5], [0.25]]
    )
    fig.draw_without_rendering()
    (band,) = (c for c in ax.collections if isinstance(c, FillBetweenPolyCollection))
    vertices = np.concatenate([path.vertices for path in band.get_paths()])
    for x, low, high in ((20, 1.5, 2.5), (40, 2.75, 3.25)):
        ys = vertices[np.isclose(vertices[:, 0], x), 1]
        assert (ys.min(), ys.max()) == (low, high)
    assert not np.isclose(vertices[:, 0], 10).any()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["10", "40"]
    assert "±" in ax.get_ylabel()
    assert "±" not in plot.convergence([1, 2], [[1.0], [2.0]], labels=["a"])[1].get_ylabel()


def test_zero_attributions_refuse_convergence_plots(result):
    nothing = result.refit()
    nothing.token_attr, nothing.output_attr = nothing.token_attr * 0, nothing.output_attr * 0
    with pytest.raises(ValueError, match="no attribution differs from zero"):
        nothing.plot_convergence()


def test_overlapping_labels_move_minimally():
    ends = [5.0, 5.01, 5.02, -4.0]
    _, ax = plot.convergence([1, 2], [ends, ends], labels=list("abcd"))
    at = {t.get_text(): t.get_position()[1] for t in ax.texts}
    assert at["d"] == -4.0
    assert at["b"] == pytest.approx(5.01)
    assert at["c"] - at["b"] == pytest.approx(at["b"] - at["a"])
    assert at["c"] - at["b"] > 0.1


# Text, flow, bars --------------------------------------------------------------------------------


def written(ax):
    return [t.get_text() for t in ax.texts]


def test_text_plot_shows_prompt_and_answer(result):
    for token in (None, 2, -1):
        _, ax = result.plot_text(token)
        shown = "".join("".join(written(ax)).split()).translate({ord("␣"): "", ord("⏎"): ""})
        answer = "".join(piece.text for piece in result.output_pieces)
        prompt = "".join(piece.text for piece in result.prompt_pieces)
        want = "".join(f"prompt{prompt}generated{answer}".split())
        assert shown.startswith(want)


def shaded(ax):
    """Texts above a shade that is neither white nor within its error."""
    found = set()
    for collection in ax.collections:
        faces = getattr(collection, "get_facecolor", list)()
        for path, face in zip(collection.get_paths(), faces, strict=False):
            (x, y), (_, low) = path.vertices.min(0), path.vertices.max(0)
            found |= {
                t.get_text() for t in ax.texts
                if abs(t.get_position()[0] - x) < 1e-6 and y < t.get_position()[1] < low
            } if face[3] == 1 else set()  # fmt: skip
    return found


def test_text_plot_shades_causes_of_a_token(model, tokenizer, result):
    exact = attributed(model, tokenizer, FeatureAblation)
    token = len(exact.output_tokens) - 1
    _, ax = exact.plot_text(token)
    attr, last = exact.full_attr[token], exact.output_pieces[token].feature
    want = set()
    for pieces, first in ((exact.prompt_pieces, 0), (exact.output_pieces, len(exact.input_tokens))):
        for piece in pieces:
            is_cause = piece.feature is not None and (not first or piece.feature != last)
            if is_cause and attr[first + piece.feature] != 0:
                want.add(piece.text.strip() or "␣" * len(piece.text))
    assert len(want) > 4
    assert shaded(ax) == want


def test_text_plot_of_all_tokens_shows_their_sum(result):
    span = result.attribute_span(0, len(result.output_tokens))
    _, ax = result.plot_text()
    n = result.token_attr.shape[1]
    scales = {bar.get_xlabel(): bar.get_xlim() for bar in ax.figure.axes[1:]}
    for block, values in (("the prompt", span.values[:n]), ("the answer so far", span.values[n:])):
        strongest = float(values.abs().max())
        limits = scales.pop(f"Attribution to {block} (nats)")
        assert limits == pytest.approx((-strongest, strongest))
    assert not scales
    with pytest.raises(ValueError, match="probabilities of tokens do not add up"):
        result.refit(attr_target="prob").plot_text()
    assert result.refit(attr_target="prob").plot_text(0)


def test_older_results_are_drawn_without_missing_fields(result, tmp_path):
    result.save(tmp_path / "result")
    old = GenerationAttributionResult.load(tmp_path / "result")
    old.design = None
    key = "".join(written(old.plot_text()[1]))
    assert "within" not in key
    assert "error unknown" in key
    _, ax = old.plot_seq_attr()
    assert not [c for c in ax.collections if isinstance(c, LineCollection)]
    assert old.plot_flow()
    with pytest.raises(ValueError, match="earlier version"):
        old.plot_convergence()


def test_flow_plot_links_marked_attributions(result):
    _, ax = result.plot_flow(least=0.1, most=99)
    want = set()
    for side, attr, marked in (
        ("prompt", result.token_attr, result.marked[:, : len(result.input_tokens)]),
        ("output", result.output_attr, result.marked[:, len(result.input_tokens) :]),
    ):
        told = marked & (attr.abs() >= 0.1 * attr.abs().max())
        want |= {f"{side} {feature} {token}" for token, feature in told.nonzero().tolist()}
    assert {p.get_gid() for p in ax.patches if isinstance(p, PathPatch)} == want
    assert want
    last = result.plot_flow(-1, least=0.1)[1]
    assert {p.get_gid() for p in last.patches if isinstance(p, PathPatch)} < want


def test_heat_map_blanks_unmarked_cells(result):
    _, ax = result.plot_token_attr()
    n_prompt = len(result.input_tokens)
    noise = result.full_attr.abs() < result.marked_beyond * result.full_attr_se
    prompt, output = (np.asarray(image.get_array()) for image in ax.images)
    assert (prompt[noise[:, :n_prompt].numpy()] == 0).all()
    told = ~noise & (result.full_attr != 0)
    assert np.allclose(
        prompt[told[:, :n_prompt].numpy()], result.token_attr[told[:, :n_prompt]].numpy()
    )
    assert not np.nan_to_num(output)[noise[:, n_prompt:].numpy()].any()


def test_bar_errors_equal_errors_of_the_sum(result):
    _, ax = result.plot_seq_attr(cmap="PuOr")
    errors = result.attribute_span(0, len(result.output_tokens)).standard_errors
    (whiskers,) = (c for c in ax.collections if isinstance(c, LineCollection))
    spans = [np.ptp(segment[:, 1]) / 2 for segment in whiskers.get_segments()]
    assert spans == pytest.approx(errors[: len(result.input_tokens)].tolist(), rel=1e-4)
    heights = [patch.get_height() for patch in ax.patches]
    assert heights == pytest.approx(result.seq_attr.tolist())
    colours = plt.get_cmap("PuOr")
    faces = {tuple(np.round(p.get_facecolor()[:3], 3)) for p in ax.patches}
    assert faces <= {tuple(np.round(colours(end)[:3], 3)) for end in (0.1, 0.9)}


@pytest.mark.parametrize("name", ["token_attr", "seq_attr", "text", "flow", "convergence"])
def test_every_plot_accepts_ax_and_show(result, monkeypatch, name):
    fig, ax = plt.subplots()
    method = getattr(result, f"plot_{name}")
    assert method(ax=ax) == (fig, ax)
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    assert method(show=True) is None
    assert shown == [True]


@pytest.mark.parametrize(("value", "unit"), [("log_prob", "nats"), ("logit", "logits")])
def test_plots_label_the_unit_of_the_value(result, value, unit):
    found = copy.copy(result)
    found.provenance = result.provenance | {"attr_target": value}
    assert unit in found.plot_token_attr()[0].axes[1].get_ylabel()
    assert unit in found.plot_text(0)[0].axes[1].get_xlabel()
    for _, ax in (found.plot_seq_attr(), found.plot_convergence()):
        assert f"({unit})" in ax.get_ylabel()
    assert [t for t in found.plot_flow()[1].texts if t.get_text().split("    ")[0].endswith(unit)]


def test_hand_made_result_can_be_drawn():
    made = GenerationAttributionResult(
        input_tokens=["a", " b"],
        output_tokens=["c", "d"],
        seq_attr=torch.tensor([1.0, -2.0]),
        token_attr=torch.tensor([[1.0, 0.0], [0.0, -2.0]]),
        token_attr_se=torch.full((2, 2), torch.nan),
        full_values=torch.zeros(2),
        empty_values=torch.zeros(2),
        efficiency_gap=torch.zeros(2),
        n_evaluations=0,
        masks=torch.zeros(0, 2, dtype=torch.bool),
        values=torch.zeros(0, 2),
        draws=torch.zeros(0),
        target=torch.tensor([0, 1]),
        output_pieces=[Piece("c", 0), Piece("d", 1)],  # with columns that there are none of
    )
    for plotted in (made.plot_token_attr, made.plot_seq_attr, made.plot_text, made.plot_flow):
        fig, _ = plotted()
        fig.canvas.draw()
    assert [image.get_array().shape for image in made.plot_token_attr()[1].images] == [(2, 2)]
    assert "c" in made.to_html()


def test_feature_names_are_separated_in_text_plots(result):
    named = GenerationAttributionResult.__new__(GenerationAttributionResult)
    named.__dict__.update(result.__dict__)
    named.prompt_pieces = []
    named.input_tokens = [f"field{i}" for i in range(len(result.input_tokens))]
    _, ax = named.plot_text()
    assert set(named.input_tokens) <= set(written(ax))
    left = sorted(t.get_window_extent().x0 for t in ax.texts if t.get_text().startswith("field"))
    assert np.diff(left).min() > 20  # pixels
