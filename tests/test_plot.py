import ast
import inspect
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.patches import Polygon

from captum_llm_ext import (
    BaselineComparison,
    FaithfulnessReport,
    GenerationAttributionResult,
    PatchingResult,
    TotalAttribution,
)
from captum_llm_ext.attribution.attention.heads import AttentionByHead
from captum_llm_ext.result import plot

matplotlib.use("Agg")

NUMBER = re.compile(r"[+−]?\d+(\.\d+)?|\?")


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def words(n, start=0):
    return [f" w{i + start}" for i in range(n)]


def draw(prompt_attr, output_attr=None, **options):
    """A heat map with plain labels."""
    n_target, n_prompt = np.shape(prompt_attr)
    names = None if output_attr is None else words(np.shape(output_attr)[1], 100)
    labels = {
        "input_labels": words(n_prompt),
        "output_feature_labels": names,
        "output_labels": words(n_target, 100),
    }
    return plot.heat_map(prompt_attr, output_attr, **(labels | options))


def attributions(n_target, n_prompt, seed=0):
    random = np.random.default_rng(seed)
    prompt = random.normal(size=(n_target, n_prompt))
    return prompt, np.tril(random.normal(size=(n_target, n_target)), -1)


def cell_texts(ax):
    return [text for text in ax.texts if NUMBER.fullmatch(text.get_text())]


def minus_signs(ax):
    """Places (column, row) of the signs."""
    found = [c for c in ax.collections if isinstance(c, PathCollection)]
    return {tuple(place) for c in found for place in np.asarray(c.get_offsets()).tolist()}


def column_labels(ax):
    return [label.get_text() for label in ax.get_xticklabels()]


# The heat map ------------------------------------------------------------------------------------


def test_cells_hold_attributions_and_hatch_later_output():
    prompt, output = attributions(6, 4)
    _, ax = draw(prompt, output)
    left, right = (image.get_array() for image in ax.images)
    np.testing.assert_array_equal(left, prompt)
    later = np.triu(np.ones((6, 6), dtype=bool))
    np.testing.assert_array_equal(np.ma.getmaskarray(right), later)
    np.testing.assert_array_equal(right[~later], output[~later])


def test_colour_map_is_red_blue_centred_at_zero():
    _, ax = draw([[1.0, -3.0, 0.0]])
    (image,) = ax.images
    assert image.get_clim() == (-3.0, 3.0)
    raises, lowers, zero = image.to_rgba(np.array([3.0, -3.0, 0.0]))[:, :3]
    assert raises[2] > 2 * raises[0]
    assert lowers[0] > 2 * lowers[2]
    assert np.ptp(zero) < 0.01
    assert zero.min() > 0.95


def test_prompt_and_output_have_labelled_scales():
    prompt, output = attributions(5, 3)
    output[4, 0] = -50.0
    fig, ax = draw(prompt, output)
    most = float(np.abs(prompt).max())
    by_side = {image.get_extent()[0]: image.get_clim() for image in ax.images}
    left, right = sorted(by_side)
    assert by_side[left] == pytest.approx((-most, most))
    assert by_side[right] == (-50.0, 50.0)
    said = {bar.get_ylabel().replace("\n", " "): bar.get_ylim()[1] for bar in fig.axes[1:]}
    (prompt_most,) = [most for label, most in said.items() if "to the prompt" in label]
    (output_most,) = [most for label, most in said.items() if "to the answer so far" in label]
    assert (prompt_most, output_most) == (pytest.approx(most), 50.0)


def test_shares_of_one_whole_have_one_scale():
    prompt, output = np.abs(attributions(5, 3)[0]), np.abs(attributions(5, 3)[1])
    fig, ax = draw(prompt, output, is_unsigned=True, has_common_scale=True)
    assert len({image.get_clim() for image in ax.images}) == 1
    assert len(fig.axes) == 2


def test_generated_part_has_its_own_heading():
    prompt, output = attributions(5, 3)
    _, ax = draw(prompt, output)
    left, right = (image.get_extent() for image in ax.images)
    assert right[0] - left[1] > 0.5
    headings = {t.get_text(): t.get_position()[0] for t in ax.texts if t not in cell_texts(ax)}
    assert headings == {
        "prompt": pytest.approx((left[0] + left[1]) / 2),
        "generated before": pytest.approx((right[0] + right[1]) / 2),
    }
    assert not [t for t in draw(prompt)[1].texts if t.get_text() in headings]


def hatched(ax, n_target, n_output):
    """Which output cells the hatching covers, by their centres."""
    (patch,) = (p for p in ax.patches if isinstance(p, Polygon))
    assert patch.get_hatch()
    left, right, *_ = ax.images[1].get_extent()
    columns = np.linspace(left, right, 2 * n_output + 1)[1::2]
    centres = [(column, row) for row in range(n_target) for column in columns]
    return patch.get_path().contains_points(centres).reshape(n_target, n_output)


def test_hatching_covers_later_output():
    prompt, output = attributions(7, 3)
    _, ax = draw(prompt, output)
    np.testing.assert_array_equal(hatched(ax, 7, 7), np.triu(np.ones((7, 7), dtype=bool)))


@pytest.mark.parametrize("features", [[0, 0, 1, 2, 2], None])
def test_output_word_is_hatched_until_its_last_token(features):
    prompt, _ = attributions(5, 3)
    output = np.zeros((5, 3))
    output[2, 0] = output[3, 1] = output[4, 0] = 1.0
    _, ax = draw(prompt, output, output_features=features)
    closed = [[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]
    np.testing.assert_array_equal(hatched(ax, 5, 3), np.array(closed, dtype=bool))


def visible(values):
    """How many do not round to zero with one decimal."""
    return int((np.abs(values) >= 0.05).sum())


def test_few_cells_show_signed_numbers():
    _, ax = draw([[1.25, -0.5, 0.0], [-2.0, 0.01, np.nan]])
    texts = {t.get_position(): t.get_text() for t in cell_texts(ax)}
    assert texts == {
        (0, 0): "+1.2", (1, 0): "−0.5",
        (0, 1): "−2.0", (2, 1): "?",
    }  # fmt: skip
    assert minus_signs(ax) == set()


def test_hatched_cells_show_no_numbers():
    prompt, output = attributions(5, 4)
    _, ax = draw(prompt, output)
    earlier = np.tril(output, -1)[np.tril_indices(5, -1)]
    assert len(cell_texts(ax)) == visible(prompt) + visible(earlier)


@pytest.mark.parametrize("shape", [(60, 100), (40, 300)])
def test_many_cells_show_signs_only(shape):
    values = np.random.default_rng(0).normal(size=shape)
    _, ax = draw(values)
    assert list(ax.texts) == []
    rows, columns = np.nonzero(values < -0.1 * np.abs(values).max())
    assert minus_signs(ax) == set(zip(columns.tolist(), rows.tolist(), strict=True))
    assert "−" in ax.figure.axes[1].get_ylabel()


def test_numbers_fit_their_cells():
    prompt, output = attributions(20, 13)
    fig, ax = draw(prompt, output)
    fig.draw_without_rendering()
    texts = cell_texts(ax)
    assert len(texts) == visible(prompt) + visible(output[np.tril_indices(20, -1)])
    (x0, _), (x1, _) = ax.transData.transform([[0, 0], [1, 0]])
    width = x1 - x0
    renderer = fig.canvas.get_renderer()
    assert max(text.get_window_extent(renderer).width for text in texts) < width


@pytest.mark.parametrize("shape", [(1, 1), (13, 20), (500, 300)])
def test_figure_size_is_bounded_and_labels_do_not_overlap(shape):
    fig, ax = draw(np.random.default_rng(0).normal(size=shape))
    fig.draw_without_rendering()
    width, height = fig.get_size_inches()
    assert 4 <= width <= 16
    assert 3 <= height <= 14
    for axis, labels in [(0, ax.get_xticklabels()), (1, ax.get_yticklabels())]:
        assert 1 <= len(labels) <= shape[1 - axis]
        boxes = [label.get_window_extent() for label in labels]
        starts = sorted((b.x0, b.y0)[axis] for b in boxes)
        thickness = labels[0].get_fontsize() * fig.dpi / 72 * 0.8
        assert len(starts) == 1 or np.diff(starts).min() >= thickness


def test_labels_stay_with_their_columns_when_thinned():
    _, ax = draw(np.random.default_rng(0).normal(size=(3, 400)))
    ticks = ax.get_xticks()
    assert len(ticks) < 400
    assert column_labels(ax) == [f"w{int(tick)}" for tick in ticks]


def test_crowded_axes_label_the_strongest_columns():
    values = np.random.default_rng(0).uniform(-0.1, 0.1, size=(3, 400))
    values[1, [37, 203, 398]] = [-2.0, 5.0, 3.0]
    _, ax = draw(values)
    assert {"w37", "w203", "w398"} <= set(column_labels(ax))
    assert {37.0, 203.0, 398.0} <= set(ax.get_xticks())
    _, ax = plot.bars(values[1], labels=words(400))
    assert {"w37", "w203", "w398"} <= set(column_labels(ax))


def test_all_zero_or_nan_can_be_drawn():
    for values in ([[0.0, 0.0]], [[np.nan, np.nan]], np.zeros((0, 2)), np.zeros((2, 0))):
        fig, ax = draw(values)
        fig.draw_without_rendering()
        assert all(np.isfinite(image.get_clim()).all() for image in ax.images)
    assert draw([[0.0, 0.0]])[1].images[0].get_clim() == (-1.0, 1.0)


def test_tensors_of_any_dtype_can_be_drawn():
    values = torch.tensor([[0.5, -1.5]], dtype=torch.bfloat16, requires_grad=True)
    _, ax = draw(values)
    np.testing.assert_array_equal(ax.images[0].get_array(), [[0.5, -1.5]])


def test_wide_characters_count_twice(monkeypatch):
    monkeypatch.setattr(plot.labels, "drawable", lambda char: char)  # as with a font that has them
    assert plot.labels.label("東京は日本の首都", 16) == "東京は日本の首都"
    assert plot.labels.label("東京は日本の首都", 15) == "東京は日本の首…"
    assert plot.labels.label("Tokyo", 5) == "Tokyo"
    assert plot.labels.label("Tokyo", 4) == "Tok…"


def test_fixed_output_has_no_columns():
    fig, ax = draw(np.ones((3, 2)), output_features=[0, 1, 2])
    fig.draw_without_rendering()
    assert len(ax.images) == 1
    with pytest.raises(ValueError, match="column 2 of token 2, `output_attr` has 2 columns"):
        draw(np.ones((3, 2)), np.ones((3, 2)), output_features=[0, 1, 2])


@pytest.mark.parametrize("shape", [(1, 5), (1, 500), (8, 10), (20, 500)])
def test_colour_bar_shows_the_unit_uncut(shape):
    fig, ax = draw(*attributions(*shape), unit="nats")
    fig.canvas.draw()
    labels = [bar.yaxis.label for bar in fig.axes[1:]]
    assert len(labels) == (1 if shape[0] == 1 else 2)
    assert all("(nats)" in label.get_text() for label in labels)
    room = fig.bbox
    for text in (*labels, *ax.get_xticklabels(), *ax.get_yticklabels()):
        extent = text.get_window_extent()
        assert extent.y0 >= room.y0 - 2
        assert extent.y1 <= room.y1 + 2
    assert ax.get_window_extent().height > 0.25 * room.height


def test_labels_leave_room_in_small_axes():
    fig, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
    prompt, output = attributions(12, 20)
    for ax in axes.flat:
        draw(prompt, output, ax=ax, input_labels=["a-very-long-label-of-a-word"] * 20)
    fig.canvas.draw()
    for ax in axes.flat:
        assert ax.get_window_extent().height > 0.15 * fig.bbox.height


@pytest.mark.parametrize(("n_prompt", "n_target"), [(1, 1), (30, 1), (2, 30)])
def test_headings_do_not_overlap(n_prompt, n_target):
    fig, ax = plt.subplots(figsize=(4, 3), layout="constrained")
    draw(*attributions(n_target, n_prompt), ax=ax)
    fig.canvas.draw()
    prompt, before = (
        t.get_window_extent() for t in ax.texts if t.get_text()[:6] in ("prompt", "genera")
    )
    assert prompt.x1 < before.x0


def test_heat_map_accepts_ax():
    fig, (first, second) = plt.subplots(1, 2, figsize=(9, 3))
    drawn = plot.heat_map(
        [[1.0, -1.0]],
        None,
        input_labels=["a", "b"],
        output_feature_labels=None,
        output_labels=["c"],
        ax=second,
        cmap=plt.get_cmap("PuOr"),
        title="mine",
    )
    assert drawn == (fig, second)
    assert not first.images
    assert fig.get_size_inches().tolist() == [9, 3]
    assert second.images[0].get_cmap().name == "PuOr"
    assert second.get_title(loc="left") == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_labels": ["a"]}, r"`prompt_attr` has shape \(5, 3\), the labels ask for \(5, 1\)"),
        ({"output_feature_labels": None}, "give both, or neither"),
        ({"output_feature_labels": ["a"]}, r"`output_attr` has shape \(5, 5\)"),
        ({"output_features": [0]}, "`output_features` has 1 entries for 5 rows"),
    ],
)
def test_mismatched_labels_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        draw(*attributions(5, 3), **change)


# Bars --------------------------------------------------------------------------------------------


def test_bars_have_height_and_colour_of_their_values():
    _, ax = plot.bars([1.5, -2.0, 0.5], labels=["a", "b", "c"])
    bars = ax.patches
    assert [bar.get_height() for bar in bars] == [1.5, -2.0, 0.5]
    red, _, blue, _ = bars[0].get_facecolor()
    assert blue > red
    red, _, blue, _ = bars[1].get_facecolor()
    assert red > blue
    assert column_labels(ax) == ["a", "b", "c"]
    assert not [c for c in ax.collections if isinstance(c, LineCollection)]


def test_error_bars_span_one_standard_error():
    values, errors = [1.0, -2.0, 0.2, 3.0], [0.25, 0.5, 0.4, np.nan]
    _, ax = plot.bars(values, labels=words(4), errors=errors)
    (whiskers,) = (c for c in ax.collections if isinstance(c, LineCollection))
    spans = [sorted(segment[:, 1]) for segment in whiskers.get_segments()]
    assert spans == [pytest.approx(span) for span in ([0.75, 1.25], [-2.5, -1.5], [-0.2, 0.6])]
    alphas = [bar.get_alpha() for bar in ax.patches]
    assert max(alphas[2:]) < 0.5  # the last one's error is unknown
    assert {alphas[0], alphas[1]} == {1.0}


@pytest.mark.parametrize("height", [1.5, 6.0])
def test_bar_axis_label_wraps_to_fit(height):
    fig, ax = plt.subplots(figsize=(4, height), layout="constrained")
    plot.bars([1.0, -2.0], labels=["a", "b"], errors=[0.1, 0.2], unit="nats", ax=ax)
    fig.canvas.draw()
    told = ax.get_ylabel().split("\n")
    assert " ".join(told) == "Sequence attribution ± standard error (nats)"
    assert len(told) == (2 if height < 2 else 1)


def test_nan_bar_is_a_question_mark():
    fig, ax = plot.bars([1.0, np.nan], labels=["a", "b"], errors=[0.1, 0.1])
    fig.canvas.draw()
    assert [(t.get_text(), t.get_position()) for t in ax.texts] == [("?", (1.0, 0.0))]


@pytest.mark.parametrize("n", [0, 1, 40, 500])
def test_any_number_of_bars_fits_a_bounded_figure(n):
    fig, ax = plot.bars(np.linspace(-1, 1, n), labels=words(n))
    assert fig.get_size_inches()[0] <= 16
    assert len(ax.patches) == n
    assert len(ax.get_xticklabels()) <= min(n, 120)


def test_bars_refuse_mismatched_arguments():
    with pytest.raises(ValueError, match=r"`errors` has shape \(1,\)"):
        plot.bars([1.0, 2.0], labels=["a", "b"], errors=[1.0])
    with pytest.raises(ValueError, match="holds -1: standard errors cannot be negative"):
        plot.bars([1.0, 2.0], labels=["a", "b"], errors=[-1.0, 1.0])


# Both --------------------------------------------------------------------------------------------


def test_show_displays_and_returns_none(monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    assert plot.bars([1.0], labels=["a"], show=True) is None
    labels = {"input_labels": ["a"], "output_feature_labels": None, "output_labels": ["b"]}
    assert plot.heat_map([[1.0]], None, **labels, show=True) is None
    assert len(shown) == 2


def test_matplotlib_settings_are_unchanged():
    before = dict(matplotlib.rcParams)
    draw(*attributions(5, 3))
    plot.bars([1.0], labels=["北京"])
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.family": "DejaVu Serif"}):
        _, ax = draw([[1.0]])
    assert ax.get_xticklabels()[0].get_fontfamily()[0] == "DejaVu Serif"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" golf", "golf"),
        ("\n", "⏎"),
        ("a\n\tb", "a⏎⇥b"),
        ("   ", "␣␣␣"),
        ("", "∅"),
        ("$x_1$ and $", "$x_1$ and $"),
        ("$\\no macro$", "$\\no macro$"),  # mathtext would refuse it
        ("\\frac{%}&#", "\\frac{%}&#"),
        ("x" * 50, "x" * 21 + "…"),
        ("bell\x07", "bell\\x07"),
        ("half \ud83d", "half \\ud83d"),
    ],
)
def test_labels_show_token_text(text, label):
    fig, ax = plot.bars([1.0], labels=[text])
    fig.canvas.draw()  # warnings of missing glyphs, or of mathtext, would fail here
    assert column_labels(ax) == [label]


@pytest.mark.parametrize("text", ["北京", "서울", "🫠😀", "नमस्ते", "\U0010ffff", "مرحبا"])
def test_missing_glyphs_are_spelled_out(text, monkeypatch):
    labels = [text, "plain"]
    draw([[1.0, -1.0]], input_labels=labels)[0].canvas.draw()  # with the fonts of this machine
    monkeypatch.setattr(plot.labels, "_FALLBACK_FONTS", ())
    fig, ax = draw([[1.0, -1.0]], input_labels=labels)
    fig.canvas.draw()
    glyphs = matplotlib.font_manager.get_font(matplotlib.font_manager.findfont("DejaVu Sans"))
    missing = [c for c in text if ord(c) not in glyphs.get_charmap() or not c.isprintable()]
    shown = column_labels(ax)[0]
    whole = "".join(ascii(c)[1:-1] if c in missing else c for c in text)
    assert shown == whole if len(whole) <= 22 else whole.startswith(shown.removesuffix("…"))
    assert 0 < len(shown) <= 22  # escapes are long: it is what is shown that is cut
    assert column_labels(ax)[1] == "plain"


FITTED = "responsive.py"  # holds an artist, which matplotlib has to be there for


@pytest.mark.parametrize(
    "path",
    sorted({*Path(plot.__file__).parent.glob("*.py")} - {Path(plot.__file__).with_name(FITTED)}),
    ids=lambda p: p.name,
)
def test_matplotlib_is_imported_lazily(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    named = {alias.name for node in at_import for alias in node.names}
    named |= {node.module for node in at_import if isinstance(node, ast.ImportFrom)}
    without = ("matplotlib", "torch", "captum_llm_ext.result.plot.responsive")
    assert not [name for name in named if name.startswith(without)]


def test_unknown_plot_arguments_are_refused():
    with pytest.raises(TypeError, match="axes"):
        plot.bars([1.0], labels=["a"], axes=None)
    # Its colours are those of signs.
    labels = {"input_labels": ["a"], "output_feature_labels": None, "output_labels": ["b"]}
    with pytest.raises(TypeError, match="cmap"):
        plot.flow([[1.0]], None, **labels, cmap="RdBu")


# The methods that draw


@pytest.mark.parametrize(
    "draw",
    [
        getattr(kind, name)
        for kind in (
            GenerationAttributionResult,
            TotalAttribution,
            PatchingResult,
            BaselineComparison,
            FaithfulnessReport,
            AttentionByHead,
        )
        for name in dir(kind)
        if name.split("_")[0] == "plot" and getattr(kind, name).__module__.startswith("captum_llm")
    ],
    ids=lambda draw: draw.__qualname__,
)
def test_plot_functions_share_argument_names_and_order(draw):
    parameters = list(inspect.signature(draw).parameters.values())[1:]
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    in_order = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert in_order in (["show"], ["target_token", "show"], ["kind", "show"])
    named = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    own = {"least", "most", "total", "k", "n_estimates", "every_place"}
    last = [p.name for p in named if p.name not in own]
    assert last in (["ax"], ["ax", "cmap"])
    assert [p.name for p in named][-len(last) :] == last
    assert all(p.default is None for p in named[-len(last) :])
