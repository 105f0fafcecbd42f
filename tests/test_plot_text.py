"""Running text and flow: what is drawn where."""

import re
from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.patches import PathPatch

from captum_llm_ext.result import plot

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


# Running text ------------------------------------------------------------------------------------


def text(parts, values, **options):
    """Pieces numbered in order; those of None have no value."""
    numbers = iter(range(len(values)))
    pieces = [(part, next(numbers)) if isinstance(part, str) else (part[0], None) for part in parts]
    return plot.running_text(pieces, values, **options)


def lines(ax):
    """The written words by line, from the top; without the key."""
    found = {}
    for t in ax.texts:
        if t.get_transform() == ax.transData:
            found.setdefault(t.get_position()[1], []).append((t.get_position()[0], t.get_text()))
    return [[word for _, word in sorted(found[y])] for y in sorted(found)]


def left(ax, word):
    (t,) = (t for t in ax.texts if t.get_text() == word)
    return t.get_position()[0]


def boxes(ax, framed=False):
    """Colour by left end of each shaded box; or the left ends of frames."""
    found = {}
    for collection in ax.collections:
        if isinstance(collection, PolyCollection) and framed == (
            not len(collection.get_facecolor())
        ):
            faces = collection.get_facecolor() if not framed else [None] * 99
            for path, face in zip(collection.get_paths(), faces, strict=False):
                found[path.vertices[:, 0].min()] = face
    return found


def underlines(ax):
    """Left ends of solid and of dashed lines."""
    found = {"solid": [], "dashed": []}
    for collection in ax.collections:
        if isinstance(collection, LineCollection):
            ((_, dashes),) = collection.get_linestyle()
            ends = [segment[0][0] for segment in collection.get_segments()]
            found["dashed" if dashes else "solid"] += ends
    return found


def test_boxes_are_blue_red_or_absent_by_sign():
    _, ax = text(["up", " down", " none"], [2.0, -2.0, 0.0])
    assert lines(ax) == [["up", "down", "none"]]
    found = boxes(ax)
    assert set(found) == {left(ax, "up"), left(ax, "down")}
    up, down = found[left(ax, "up")], found[left(ax, "down")]
    assert up[2] > up[0]
    assert down[0] > down[2]
    assert underlines(ax) == {"solid": [left(ax, "up")], "dashed": [left(ax, "down")]}


def test_attributions_within_their_error_are_pale_without_sign():
    _, ax = text(["sure", " not", " unknown"], [1.0, -1.0, -1.0], errors=[0.5, 0.52, np.nan])
    alpha = {x: face[3] for x, face in boxes(ax).items()}
    assert alpha[left(ax, "sure")] == 1.0
    assert alpha[left(ax, "not")] == alpha[left(ax, "unknown")] < 0.5
    assert underlines(ax) == {"solid": [left(ax, "sure")], "dashed": []}
    assert any("pale: within its error" in t.get_text() for t in ax.texts)


def test_weak_parts_are_not_underlined():
    _, ax = text(["a", " b", " c"], [1.0, 0.05, -0.05])
    assert underlines(ax) == {"solid": [left(ax, "a")], "dashed": []}


def test_newlines_and_indentation_are_kept():
    _, ax = text(["one", "\n  two", ("\n\n",), "three"], [1.0, 1.0, 1.0])
    assert lines(ax) == [["one"], ["two"], ["three"]]
    ys = sorted({t.get_position()[1] for t in ax.texts if t.get_text() in ("one", "two", "three")})
    assert np.diff(ys)[1] == pytest.approx(2 * np.diff(ys)[0])  # an empty line
    assert left(ax, "one") == left(ax, "three") == 0
    assert left(ax, "two") > 0


def test_white_space_features_are_marked():
    _, ax = text(["a", "\n", "b", "  ", "c", ""], [1.0] * 6)
    assert lines(ax) == [["a", "⏎"], ["b", "␣␣", "c", "∅"]]
    assert sum(len(c.get_paths()) for c in ax.collections if isinstance(c, PolyCollection)) == 6


def test_part_is_shaded_from_first_to_last_word():
    _, ax = text([" a sentence here.", " x"], [1.0, -1.0])
    assert lines(ax) == [["a sentence here.", "x"]]
    (polygon,) = (
        path.vertices
        for c in ax.collections if isinstance(c, PolyCollection)
        for path, face in zip(c.get_paths(), c.get_facecolor(), strict=True)
        if face[2] > face[0]
    )  # fmt: skip
    (words,) = (t for t in ax.texts if t.get_text() == "a sentence here.")
    extent = words.get_window_extent().transformed(ax.transData.inverted())
    assert polygon[:, 0].min() == pytest.approx(extent.x0, abs=2)  # points
    assert polygon[:, 0].max() == pytest.approx(extent.x1, abs=2)


@pytest.mark.parametrize("n", [5, 60, 500])
def test_long_text_is_wrapped_between_words(n):
    words = [f"w{'o' * (i % 9)}rd{i}" for i in range(n)]
    parts = [piece for word in words for piece in (f" {word[:2]}", word[2:])]  # two tokens a word
    fig, ax = text(parts, np.linspace(-1, 1, 2 * n))
    fig.draw_without_rendering()
    assert fig.get_size_inches()[1] <= 14
    assert "".join(map("".join, lines(ax))) == "".join(words)
    # No word is torn apart: every line ends where a word does.
    ends = set(np.cumsum([len(word) for word in words]).tolist())
    assert set(np.cumsum([len("".join(line)) for line in lines(ax)]).tolist()) <= ends
    right = [t.get_window_extent().x1 for t in ax.texts]
    assert max(right) <= ax.get_window_extent().x1 + 3
    assert min(t.get_fontsize() for t in ax.texts) >= 6


@pytest.mark.parametrize("long", ["x" * 400, "東京は日本の首都です" * 12])
def test_words_longer_than_a_line_are_broken(long):
    fig, ax = text(["before ", long, " after"], [1.0, 2.0, -3.0])
    fig.draw_without_rendering()
    written = "".join(map("".join, lines(ax)))
    shown = "".join(plot.labels.drawable(char) for char in long)
    assert written == f"before{shown}after"
    assert len(lines(ax)) > 1
    assert max(t.get_window_extent().x1 for t in ax.texts) <= ax.get_window_extent().x1 + 3


def gaps(ax):
    """Pixels between the words of each line: (end of one, start of the next)."""
    by_line = {}
    for t in ax.texts:
        if t.get_transform() == ax.transData and t.get_text() != "…":
            by_line.setdefault(t.get_position()[1], []).append(t)
    for line in by_line.values():
        line.sort(key=lambda t: t.get_position()[0])
        for one, other in pairwise(line):
            yield other.get_window_extent().x0 - one.get_window_extent().x1


WORDS = [f" {word}" for word in "Ann lives in Austin and likes to sing in the choir".split()]


def test_words_stay_apart_in_shrunken_axes():
    fig, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    ax = axes[0, 0]
    text(WORDS * 2, np.linspace(-1, 1, 22), ax=ax, headings={0: "prompt"})
    before = lines(ax)
    for other in axes.flat[1:]:
        other.set_ylabel("tall\n" * 8)
    fig.canvas.draw()
    assert len(lines(ax)) > len(before)
    assert " ".join(map(" ".join, lines(ax)[1:])) == "".join(WORDS * 2).strip()
    assert min(gaps(ax)) > 0
    right = ax.get_window_extent().x1
    assert max(t.get_window_extent().x1 for t in ax.texts) <= right + 3
    shaded = [c for c in ax.collections if isinstance(c, PolyCollection)]
    assert sum(len(c.get_paths()) for c in shaded) == 22  # each once


@pytest.mark.parametrize("dpi", [50, 70, 100, 220])
def test_word_spacing_is_even_at_any_resolution(dpi):
    """Letters are set to whole pixels: a word is not the same part of an inch everywhere."""
    fig, ax = text(WORDS * 2, np.linspace(-1, 1, 22))
    fig.set_dpi(dpi)
    fig.canvas.draw()
    found = list(gaps(ax))
    assert len(found) > 15
    assert min(found) > 0
    assert max(found) - min(found) <= 3  # pixels: bearings of letters


def test_saved_files_hold_each_word_once(tmp_path):
    fig, _ = text(WORDS, np.linspace(-1, 1, 11))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        fig.savefig(tmp_path / "text.svg", bbox_inches="tight")
    written = re.findall(r">([^<>]+)</text>", (tmp_path / "text.svg").read_text(encoding="utf-8"))
    assert [word for word in written if f" {word}" in WORDS] == "".join(WORDS).split()
    fig.savefig(tmp_path / "text.pdf")


def test_text_without_room_is_cut_at_the_end():
    fig, ax = plt.subplots(figsize=(3, 2), layout="constrained")
    text(WORDS * 20, np.linspace(-1, 1, 220), ax=ax, unit="nats")
    fig.canvas.draw()
    written = lines(ax)
    assert written[-1] == ["…"]
    assert (" ".join(WORDS * 20).split()[:5]) == " ".join(map(" ".join, written)).split()[:5]
    (key,) = (t for t in ax.texts if "raises" in t.get_text())
    lowest = min(t.get_window_extent().y0 for t in ax.texts if t is not key)
    assert key.get_window_extent().y1 < lowest
    assert key.get_window_extent().x1 <= ax.get_window_extent().x1 + 2


def test_explained_part_is_framed_and_later_text_grey():
    _, ax = text(
        ["a", ("b",), ("c",)], [1.0], headings={0: "prompt", 1: "generated"},
        explained=[1], later=[2],
    )  # fmt: skip
    assert lines(ax) == [["prompt"], ["a"], ["generated"], ["b", "c"]]
    assert set(boxes(ax, framed=True)) == {left(ax, "b")}
    ink = {t.get_text(): t.get_color() for t in ax.texts}
    assert ink["c"] != ink["b"]


def test_token_text_is_not_parsed_as_math():
    fig, ax = text(["$x_1$", " \\frac{", " bell\x07"], [1.0, 2.0, 3.0])
    fig.canvas.draw()  # warnings of mathtext, or of missing glyphs, would fail here
    assert lines(ax) == [["$x_1$", "\\frac{", "bell\\x07"]]


def test_text_plot_accepts_ax():
    fig, (first, second) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    assert plot.running_text([("a", 0)], [1.0], ax=second, title="mine") == (fig, second)
    assert not first.texts
    assert fig.get_size_inches().tolist() == [9, 3]
    assert second.get_title(loc="left") == "mine"


@pytest.mark.parametrize("values", [[0.0, 0.0], [np.nan, np.nan]])
def test_all_nan_can_be_drawn(values):
    fig, ax = text(["a", " b"], values)
    fig.draw_without_rendering()
    assert lines(ax) == [["a", "b"]]
    assert underlines(ax) == {"solid": [], "dashed": []}


def test_mismatched_errors_are_refused():
    with pytest.raises(ValueError, match=r"`errors` has shape \(1,\)"):
        text(["a", " b"], [1.0, 2.0], errors=[1.0])


# Flow --------------------------------------------------------------------------------------------


def attributions(n_target, n_prompt, seed=0):
    random = np.random.default_rng(seed)
    prompt = random.normal(size=(n_target, n_prompt)) ** 3
    return prompt, np.tril(random.normal(size=(n_target, n_target)) ** 3, -1)


def flow(prompt, output=None, **options):
    n_target, n_prompt = np.shape(prompt)
    names = None if output is None else [f"g{i}" for i in range(np.shape(output)[1])]
    labels = {
        "input_labels": [f"p{i}" for i in range(n_prompt)],
        "output_feature_labels": names,
        "output_labels": [f"t{i}" for i in range(n_target)],
    }
    return plot.flow(prompt, output, **(labels | options))


def curves(ax):
    """The curves by what they join: ("prompt" or "output", feature, token)."""
    found = {}
    for patch in ax.patches:
        if isinstance(patch, PathPatch):
            side, feature, token = patch.get_gid().split()
            found[side, int(feature), int(token)] = patch
    return found


def names(ax):
    return {t.get_text(): t for t in ax.texts}


def test_flow_links_attributions_beyond_their_error():
    prompt, output = attributions(9, 5)
    errors = np.abs(attributions(9, 5, seed=1)[0]), np.full((9, 9), 0.2)
    spread = {"prompt_errors": errors[0], "output_errors": errors[1]}
    _, ax = flow(prompt, output, **spread, least=0.1, most=99)
    want = set()
    for side, values, error in (("prompt", prompt, errors[0]), ("output", output, errors[1])):
        for (token, feature), value in np.ndenumerate(values):
            # Each side has its own scale.
            if (
                abs(value) >= 0.1 * np.abs(values).max()
                and abs(value) >= 1.96 * error[token, feature]
            ):
                want.add((side, feature, token))
    assert len(want) > 4
    assert set(curves(ax)) == want
    _, ax = flow(prompt, output, **spread, least=0.1, most=99, sure=9.0)
    assert set(curves(ax)) < want


def test_flow_shows_three_strongest_causes_per_token():
    prompt, output = attributions(9, 5)
    output *= 100  # far larger, as earlier output is in real answers: the prompt is still seen
    _, ax = flow(prompt, output, least=0.0)
    by_token = {}
    for side, feature, token in curves(ax):
        by_token.setdefault(token, set()).add((side, feature))
    for token in range(9):
        sizes = {
            (side, i): abs(x) / np.abs(values).max()
            for side, values in (("prompt", prompt), ("output", output))
            for i, x in enumerate(values[token])
            if x
        }
        assert by_token[token] == set(sorted(sizes, key=sizes.get)[-3:])
    assert any(side == "prompt" for side, _, _ in curves(ax))
    (key,) = (name for name in names(ax) if "widest" in name)
    assert f"prompt {np.abs(prompt).max():.3g} and generated {np.abs(output).max():.3g}" in key


def test_flow_omits_unknown_attributions():
    _, ax = flow([[1.0, np.nan, 1.0, 1.0]], prompt_errors=[[np.nan, 0.1, 9.0, 0.1]])
    assert set(curves(ax)) == {("prompt", 3, 0)}


def test_flow_line_style_follows_size_and_sign():
    _, ax = flow([[4.0, -2.0, 1.0]])
    found = {feature: patch for (_, feature, _), patch in curves(ax).items()}
    widths = [found[i].get_linewidth() for i in range(3)]
    assert widths == pytest.approx([widths[0], widths[0] / 2, widths[0] / 4])
    assert found[0].get_linestyle() == "-"
    assert found[1].get_linestyle() != "-"
    assert found[0].get_edgecolor()[2] > found[0].get_edgecolor()[0]
    assert found[1].get_edgecolor()[0] > found[1].get_edgecolor()[2]


def ends(patch):
    return patch.get_path().vertices[[0, -1]]


def test_flow_curves_end_at_their_words():
    _, ax = flow([[0, 0], [1.0, 0], [0, 0]], [[0, 0, 0], [0, 0, 0], [0, 2.0, 0]])
    at = {name: t.get_position() for name, t in names(ax).items()}
    found = curves(ax)
    start, end = ends(found["prompt", 0, 1])
    assert start[1] == at["p0"][1]
    assert end[1] == pytest.approx(at["t1"][1], abs=0.2)
    assert at["p0"][0] < start[0] < end[0] < at["t1"][0]
    start, end = ends(found["output", 1, 2])
    assert [start[1], end[1]] == pytest.approx([at["t1"][1], at["t2"][1]], abs=0.2)
    assert min(start[0], end[0]) > at["t2"][0]
    assert found["output", 1, 2].get_path().vertices[:, 0].max() <= ax.get_xlim()[1] * 1.35


def leads(links, target, owners):
    """All that leads to a token, by following every chain of causes."""
    found = set()
    for side, feature, token in links:
        if token == target:
            found.add((side, feature, token))
            if side == "output":
                for t, owner in enumerate(owners):
                    found |= leads(links, t, owners) if owner == feature else set()
    return found


@pytest.mark.parametrize("target", [0, 3, 7])
def test_flow_of_one_token(target):
    prompt, output = attributions(8, 4, seed=3)
    everything = set(curves(flow(prompt, output, least=0.2)[1]))
    _, ax = flow(prompt, output, least=0.2, towards=target)
    assert set(curves(ax)) == leads(everything, target, range(8))
    assert names(ax)[f"t{target}"].get_bbox_patch() is not None


def test_flow_of_a_word_joins_links_of_its_tokens():
    owners = [0, 0, 1, None]
    prompt = [[1.0], [0], [0], [0]]
    output = np.array([[0, 0], [0, 0], [2.0, 0], [0, 1.5]])
    _, ax = flow(prompt, output, output_features=owners, towards=3)
    found = curves(ax)
    assert set(found) == {("prompt", 0, 0), ("output", 0, 2), ("output", 1, 3)}
    at = {name: t.get_position()[1] for name, t in names(ax).items()}
    (_, start), _ = ends(found["output", 0, 2])
    assert start == pytest.approx((at["t0"] + at["t1"]) / 2, abs=0.2)
    with pytest.raises(ValueError, match="2 output features for 4 tokens: give `output_features`"):
        flow(prompt, output)


def test_flow_of_a_long_prompt_shows_causes_only():
    prompt = np.zeros((4, 300))
    prompt[2, [7, 250]] = 1.0
    _, ax = flow(prompt)
    assert {name for name in names(ax) if name[0] == "p" and name != "prompt"} == {"p7", "p250"}
    assert {"t0", "t1", "t2", "t3"} <= set(names(ax))
    short = names(flow(prompt[:, :20])[1])
    assert {f"p{i}" for i in range(20)} <= set(short)
    assert short["p7"].get_color() != short["p8"].get_color()


def test_flow_of_a_long_answer_shows_linked_tokens_only():
    prompt, output = np.zeros((200, 4)), np.zeros((200, 200))
    prompt[120, 1], output[170, 120] = 2.0, -1.0
    fig, ax = flow(prompt, output, unit="nats", towards=170)
    assert {name for name in names(ax) if name[0] == "t"} == {"t120", "t170"}
    key = next(name for name in names(ax) if "widest" in name)
    assert "widest: prompt 2 nats and generated 1 nats" in key
    assert "2 of 200 tokens: those with links" in key
    assert fig.get_size_inches()[1] < 5
    found = curves(ax)
    at = {name: t.get_position()[1] for name, t in names(ax).items()}
    assert ends(found["prompt", 1, 120])[1][1] == at["t120"]


def test_flow_draws_the_strongest_of_many_links():
    prompt, _ = attributions(30, 30)
    _, ax = flow(prompt, least=0.0, most=30)
    found = {(feature, token) for _, feature, token in curves(ax)}
    order = np.abs(prompt).ravel().argsort()[::-1][:200]
    assert found == {(i % 30, i // 30) for i in order.tolist()}
    assert any("the 200 strongest of 900" in name for name in names(ax))


def test_flow_curves_follow_words_in_shrunken_axes():
    fig, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    flow([[0, 1.0, 0]], ax=axes[1])
    for other in axes[::2]:
        other.set_ylabel("wide\n" * 8)
    fig.canvas.draw()
    (curve,) = curves(axes[1]).values()
    written = names(axes[1])
    start, end = axes[1].transData.transform(ends(curve))
    assert 0 < start[0] - written["p1"].get_window_extent().x1 < 12
    assert 0 < written["t0"].get_window_extent().x0 - end[0] < 12


@pytest.mark.parametrize(("n_target", "n_prompt"), [(1, 1), (15, 14), (60, 100), (200, 500)])
def test_figure_size_is_bounded_and_labels_do_not_overlap(n_target, n_prompt):
    fig, ax = flow(*attributions(n_target, n_prompt), least=0.3)
    fig.draw_without_rendering()
    assert max(fig.get_size_inches()) <= 16
    for first in "pt":
        written = [t for name, t in names(ax).items() if name[1:].isdigit() and name[0] == first]
        heights = sorted(t.get_window_extent().y0 for t in written)
        assert len(written) > 0
        assert len(heights) == 1 or np.diff(heights).min() >= 0.9 * 8 * fig.dpi / 72  # points


def test_flow_without_links_can_be_drawn():
    for values in (np.zeros((3, 2)), np.full((3, 2), np.nan), np.zeros((2, 0))):
        fig, ax = flow(values)
        fig.draw_without_rendering()
        assert curves(ax) == {}


def test_flow_accepts_ax():
    fig, ax = plt.subplots(figsize=(7, 3))
    assert flow([[1.0]], ax=ax, title="mine") == (fig, ax)
    assert ax.get_title(loc="left") == "mine"
