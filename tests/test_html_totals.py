"""What led to an answer in the end, and what would have changed it, as a page shows them."""

import re
from itertools import groupby
from pathlib import Path

import pytest
from test_html import Parsed, answer, axe, example, prompt, tab, view, violations  # noqa: F401

from captum_llm_ext import GenerationAttributionResult
from captum_llm_ext.result import page as html

DATA = Path(__file__).parent / "data"
THROUGH = "#effect input[value=through]"


def load(name):
    return GenerationAttributionResult.load(DATA / f"{name}.safetensors")


@pytest.fixture(scope="module")
def rag():
    return load("rag")


def choose(page, level, unit):
    """Reads prompt and answer by these parts, and shares through the answer."""
    for side, name in (("prompt", level), ("answer", unit)):
        label = page.locator(f"#{side}-levels label").filter(has_text=name)
        if label.count():
            label.locator("input").check(force=True)
    page.check(THROUGH, force=True)


def cells(page, table):
    """Name and share of each line of a table."""
    rows = page.locator(f"#{table} tbody tr:not(.rest)").evaluate_all(
        "all => all.map(row => [row.querySelector('button').title, row.lastChild.textContent])"
    )
    return [(name, share.replace("\u00a0", " ")) for name, share in rows]


def percent(share, error=0.0):
    def shown(x):
        return "<1" if 0 < x < 0.005 else round(100 * x)

    return f"{shown(share)} ± {shown(error)} %" if error > 0 else f"{shown(share)} %"


def chains(page):
    lines = page.locator(".ways li").evaluate_all("all => all.map(line => line.textContent)")
    return [line.replace("\u00a0", " ").rsplit("\u2002", 1) for line in lines]


@pytest.mark.parametrize("level", ["paragraph", "sentence"])
def test_shares_equal_the_total_attribution(view, rag, level):  # noqa: F811
    page = view.text(rag.to_html())
    choose(page, level, "token")
    found = rag.total(level=level)
    for t in (0, 8, 11, 27):
        answer(page, t).hover()
        told = [percent(*one) for one in by_size(found.shares[t], found.shares_se[t])]
        shown = cells(page, "top-prompt")
        assert shown
        assert [share for _, share in shown] == told[: len(shown)]
        assert told[0] in page.inner_text("#details").replace("\u00a0", " ")
    page.keyboard.press("Escape")
    page.mouse.move(1, 1)
    (whole, _), (errors, _) = found.span(), found.span_se()
    told = [percent(*one) for one in by_size(whole, errors)]
    assert [share for _, share in cells(page, "top-prompt")] == told[:7]


def by_size(shares, errors):
    """Shares with their errors, the largest first, without those that are none."""
    both = zip(shares.tolist(), errors.tolist(), strict=True)
    return sorted((one for one in both if one[0] > 0), reverse=True)


def test_share_errors_follow_words_and_their_effects(view, rag):  # noqa: F811
    page = view.text(rag.to_html())
    choose(page, "paragraph", "word")
    total, seen = rag.total(level="paragraph"), []
    words = [*((t, t + 1) for t in range(5)), (5, 7), (7, 12)]  # "is:" and "1642"
    for word, (start, stop) in enumerate(words):
        answer(page, word).hover()
        (shares, _), (errors, _) = total.span(start, stop), total.span_se(start, stop)
        told = [percent(*one) for one in by_size(shares, errors)]
        shown = cells(page, "top-prompt")
        assert [share for _, share in shown] == told[: len(shown)]
        seen += told
    prompt(page, 3).click()
    led = {name.strip(): share for name, share in cells(page, "top-answer")}
    for start, stop in words:
        (shares, _), (errors, _) = total.span(start, stop), total.span_se(start, stop)
        name = "".join(piece.text for piece in rag.output_pieces[start:stop]).strip()
        if name in led and name != "The":  # which comes twice
            assert led[name] == percent(float(shares[3]), float(errors[3]))
    assert any("±" in share for share in seen)


def test_spans_with_special_tokens_have_no_error(view, rag):  # noqa: F811
    page = view.text(rag.to_html())
    choose(page, "paragraph", "token")
    assert "± is one standard error" in page.inner_text("#note")
    answer(page, 8).click()
    answer(page, 13).click(modifiers=["Shift"])
    assert "±" not in page.inner_text("#top-prompt")
    assert "no error is told" in page.inner_text("#note")


def test_chains_equal_the_result(view, rag):  # noqa: F811
    page = view.text(rag.to_html())
    choose(page, "sentence", "token")
    for t in (8, 10, 11, 17, 23):
        answer(page, t).hover()
        expected = [percent(route.share) for route in rag.route(t, 3)]
        assert [share for _, share in chains(page)] == expected
        lengths = [way.count(" → ") for way, _ in chains(page)]
        assert lengths == [len(route.names) - 1 for route in rag.route(t, 3)]


def all_chains(total, t):
    """Every chain to a token, by trying all: ``{(column, features): share}``."""
    rows = total.links()
    nodes = rows["features"] or rows["tokens"]

    def to(row):
        columns, shares, features, others = row
        found = {(c, ()): s for c, s in zip(columns, shares, strict=True)}
        for feature, share in zip(features, others, strict=True):
            before = to(nodes[feature])
            for (column, way), own in before.items():
                key = column, (*way, feature)
                found[key] = found.get(key, 0.0) + own * share
            if not before:
                found[None, (feature,)] = share
        return found

    return to(rows["tokens"][t])


def test_word_path_share_sums_its_token_chains(view):  # noqa: F811
    result = load("chat")  # "Bruno" is three tokens
    page = view.text(result.to_html())
    choose(page, "turn", "word")
    total = result.total(level="turn", n_resamples=0)
    words = [0, 0, 0, 0, 1, 1]
    named = ["“Bruno!”", "“He's”"]
    for word, tokens in groupby(range(6), key=lambda t: words[t]):
        own = list(tokens)
        weights = total.strength[own] / total.strength[own].sum()
        ways = {}
        for t, weight in zip(own, weights.tolist(), strict=True):
            for (column, features), share in all_chains(total, t).items():
                if features and words[features[-1]] == word:  # within the word itself
                    continue
                key = column, tuple(dict.fromkeys(words[f] for f in features))
                ways[key] = ways.get(key, 0.0) + weight * share
        ways = {way: share / sum(ways.values()) for way, share in ways.items()}
        best = sorted(ways.items(), key=lambda way: -way[1])
        answer(page, word).hover()
        shown = chains(page)
        assert [share for _, share in shown] == [percent(share) for _, share in best[: len(shown)]]
        for (way, _), ((_, parts), _) in zip(shown, best, strict=False):
            assert way.split(" → ")[1:] == [named[part] for part in (*parts, word)]


def test_hover_focus_and_tap_show_the_strongest_chain(view, rag):  # noqa: F811
    page = view.text(rag.to_html())
    assert page.locator("#route").is_hidden()  # of the whole answer there is no one chain
    said = page.locator("#route")
    answer(page, 6).hover()  # with direct effects as well
    assert "led to “1642”" in said.inner_text()
    told = said.inner_text()
    page.mouse.move(1, 1)
    assert said.is_hidden()
    answer(page, 5).focus()
    page.keyboard.press("ArrowRight")
    assert said.inner_text() == told
    page.evaluate("document.activeElement.blur()")
    answer(page, 6).click()
    page.mouse.move(1, 1)
    assert said.inner_text() == told
    page.check(THROUGH, force=True)
    assert said.inner_text() == told
    assert page.locator("#links path").count() == 1  # the one chain, here of one link


def test_chain_is_drawn_link_by_link(view, rag):  # noqa: F811
    page = view.text(rag.to_html())
    choose(page, "sentence", "token")
    routes = [rag.route(t, 1) for t in range(28)]
    t = next(t for t, found in enumerate(routes) if found and len(found[0].through) > 1)
    way = routes[t][0]
    answer(page, t).click()
    assert page.locator("#links path").count() == len(way.through) + 1
    ends = page.locator("#links path").evaluate_all("all => all.map(p => p.dataset.link)")
    assert ends[0].startswith(f"prompt {way.column} ")
    assert ends[-1].split()[-1] == str(t)


def test_shares_have_errors_and_no_signs(view, rag):  # noqa: F811
    page = view.text(rag.to_html())
    page.check(THROUGH, force=True)
    assert page.locator(".ink.down").count() == 0
    assert "±" in page.inner_text("#top-prompt")
    assert page.locator(".step").count() == 0
    assert "share in the end" in page.inner_text("#legend")
    prompt(page, 3).click()
    assert "In the end" not in page.inner_text("#top-answer caption")
    page.check("#effect input[value=direct]", force=True)
    assert "±" in page.inner_text("#panel")


def test_share_within_its_error_is_pale(view):  # noqa: F811
    result = load("summary")
    page = view.text(result.to_html())
    choose(page, "paragraph", "token")
    total = result.total(level="paragraph")
    shares, errors = total.span()[0].tolist(), total.span_se()[0].tolist()
    unsure = [i for i, (x, se) in enumerate(zip(shares, errors, strict=True)) if 0 < x < 1.96 * se]
    lines = page.locator("#top-prompt tbody tr:not(.rest)")
    pale = lines.evaluate_all("all => all.filter(x => x.className === 'unsure').length")
    assert pale == len(unsure) == 1


@pytest.mark.parametrize("name", ["rag", "summary", "chat"])
def test_shares_are_shown_on_request_only(view, name):  # noqa: F811
    """They answer another question, and lean to what the first words rest on."""
    result = load(name)
    page = view.text(result.to_html())
    assert page.is_checked("#effect input[value=direct]")
    assert "%" not in page.inner_text("#summary")
    assert "⇐" not in str(result)
    page.check(THROUGH, force=True)
    assert "Colours are shares in the end" in page.inner_text("#hint")


def test_effect_switch_is_absent_without_chains(view):  # noqa: F811
    page = view(example())
    assert page.locator("#effect").is_hidden()
    answer(page, 2).hover()
    assert page.locator("#route").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_share_view_passes_accessibility_audit(view, axe, scheme):  # noqa: F811
    page = view.text(load("chat").to_html())
    page.check(THROUGH, force=True)
    page.emulate_media(color_scheme=scheme)
    assert violations(page, axe) == []
    answer(page, 1).click()
    assert violations(page, axe) == []


@pytest.mark.parametrize(
    ("name", "level", "exact"),
    [
        ("rag", "paragraph", [4.7441, 10.4166, 1.4354, 24.6128, 16.4576]),
        ("chat", "turn", [-0.2144, 12.2274, 5.5904]),
    ],
)
def test_first_line_gives_the_effect_on_the_whole_answer(view, name, level, exact):  # noqa: F811
    """Exact Shapley values of deleted parts, in plain float64 passes over the answers."""
    result = load(name)
    line = str(result).splitlines()[1]
    found = re.findall(rf"{level} (\d)[^+−]*?([+-]\d+\.\d+)", line)
    assert [int(i) for i, _ in found] == sorted(
        range(1, 1 + len(exact)), key=lambda i: -exact[i - 1]
    )[:3]
    for i, amount in found:
        assert float(amount) == pytest.approx(exact[int(i) - 1], abs=0.01)
    assert f"of the {sum(exact):.1f} nats that the prompt gives the answer" in line
    page = view.text(result.to_html())
    assert f"{sum(exact):.1f} nats" in page.inner_text("#summary")
    assert f"{sum(exact):.1f} nats" in page.inner_text("#top-prompt caption")
    shown = page.locator("#top-prompt td.value").all_inner_texts()
    expected = sorted((round(x, 1) for x in exact), key=abs, reverse=True)
    assert [float(x.replace("−", "-")) for x in shown] == pytest.approx(expected, abs=0.11)
    steps = page.locator(".step").all_inner_texts()
    assert [step.split("\n")[0] for step in steps] == ["no prompt", "prompt", "whole prompt"]
    prompt(page, 0).click()
    own = f"{exact[0]:+.1f}".replace("-", "−")
    assert page.inner_text("#bridge").startswith(own)


# What would have changed it ----------------------------------------------------------------------


def change(**changes):
    return {
        "token": 2,
        "name": " t2",
        "features": [1, 4],
        "names": [" p1", " p4"],
        "replacements": [["p1", "q1"], ["p4", ""]],
        "new_token": " t9",
        "values": [-0.1, -3.0, -0.2],
        "prompt_text": "<s> p0 q1 p2 p3 p5",
        "answer": " t0 t1 t9",
        "old_answer": " t0 t1 t2 t3 t4",
        "share_of_draws": 0.5,
        "proven_minimal": True,
        "n_evaluations": 7,
    } | changes


def test_counterfactuals_are_shown_for_token_and_answer(view):  # noqa: F811
    page = view(example(counterfactuals=[change()]))
    box = page.locator("#counterfactuals")
    text = box.inner_text().replace("\u00a0", " ")
    assert "With “q1” in place of “p1” and nothing in place of “p4”" in text
    assert "(50 % of the texts tried there do it)" in text
    assert "“t9” (82 %) is likelier than “t2” (5 %, was 90 %); neither alone does it" in text
    assert "The answer then: " in text
    assert "t0 t1 t9" in text
    box.locator("li").hover()
    assert page.locator("#prompt .found").all_inner_texts() == ["p1", "p4"]
    answer(page, 2).click()
    assert "“q1”" in box.inner_text()
    answer(page, 3).click()
    assert box.inner_text().endswith("None that was found is about it.")
    prompt(page, 4).click()
    assert "“q1”" in box.inner_text()
    prompt(page, 0).click()
    assert "“q1”" not in box.inner_text()


def test_shares_near_one_are_formatted():
    text = html.page(example(counterfactuals=[change(values=[-1e-4, -3.0, -2e-3])]))
    assert "“t9” (100 %) is likelier than “t2” (5 %, was 100 %)" in text


def test_counterfactual_section_is_hidden_if_empty(view):  # noqa: F811
    page = view(example())
    assert page.locator("#counterfactuals").is_hidden()


@pytest.mark.parametrize("wrong", [{"token": 5}, {"old_answer": " something else"}])
def test_counterfactuals_of_another_answer_are_refused(wrong):
    with pytest.raises(ValueError, match="search with the target that was attributed"):
        html.page(example(counterfactuals=[change(**wrong)]))


def test_counterfactuals_are_text_without_javascript():
    text = html.page(example(counterfactuals=[change(proven_minimal=False)]))
    plain = text.split("<noscript>")[1].split("</noscript>")[0]
    assert "fewer might do it" in plain
    assert "<q>t0 t1 t9</q>" in plain
