"""A result in words: every number and every claim is held against the numbers themselves.

On results of a real model with byte-level tokens (`benchmarks/real_results.py` makes them).
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from captum_llm_ext.base.terminal import shortened
from captum_llm_ext.coalitions import Scope, join_plans, plan_anchors, plan_pairs
from captum_llm_ext.result import GenerationAttributionResult
from captum_llm_ext.result.about import factor, header
from captum_llm_ext.result.design import Design
from captum_llm_ext.result.marks import marked_beyond
from captum_llm_ext.result.narrative import sentences
from captum_llm_ext.result.reading import Reading, finest_level, first_level, quoted
from captum_llm_ext.result.refit import Evidence, jackknife_error
from captum_llm_ext.text.segment import shorten

DATA = Path(__file__).parent / "data"
NAMES = ("rag", "chat", "few_shot", "summary")


@pytest.fixture(scope="module", params=NAMES)
def result(request):
    return GenerationAttributionResult.load(DATA / f"{request.param}.safetensors")


@pytest.fixture(scope="module")
def summary():
    return GenerationAttributionResult.load(DATA / "summary.safetensors")


@pytest.fixture(scope="module")
def few_shot():
    return GenerationAttributionResult.load(DATA / "few_shot.safetensors")


def _sums(result, level):
    """Attributions of the whole answer by parts of the prompt.

    As scored for it; otherwise added up from the raw tensors.
    """
    names, attr = result.at_level(level)
    if result.answer is not None:
        return names, result.answer.attributions.tolist()
    return names, attr.double().sum(0).tolist()


def test_stored_results_are_small_with_provenance(result):
    told = header(result)
    assert told[0] == "SmolLM2-135M-Instruct"
    assert "(KernelShap)" in told[1]
    assert " in nats" in told[2]
    assert told[3].startswith("absent parts ")
    assert re.fullmatch(r"estimate from [\d,]+ evaluations", told[4])


def test_first_level_is_the_coarsest_with_two_parts(result):
    level = first_level(result)
    assert level in ("paragraph", "turn")
    assert len(result.at_level(level)[0]) > 1


def test_narrative_amounts_equal_the_result(result):
    level = first_level(result)
    names, sums = _sums(result, level)
    said = result.narrative()
    amounts = re.findall(rf"{level} (\d+)(?: “[^”]*”)?[^(“]*\(([+−][\d.]+)", said, re.IGNORECASE)
    assert amounts or "is told from noise" in said
    for number, amount in amounts:
        assert float(amount.replace("−", "-")) == pytest.approx(sums[int(number) - 1], abs=0.006)
    for number, quote in re.findall(rf"{level} (\d+) “([^”]*?)…?”", said):
        assert " ".join(names[int(number) - 1].split()).startswith(quote.rstrip())
        assert said.lower().count(f"{level} {number} “") == 1  # and goes by its number afterwards


def test_first_named_part_is_the_strongest_marked(summary):
    level = first_level(summary)
    _, sums = _sums(summary, level)
    blocks = summary.causes()
    marked = [cause for cause in blocks.prompt if cause.is_marked and cause.attribution > 0]
    said = re.findall(rf"rests most(?:ly)? on {level} (\d+)", summary.narrative())
    best = max(range(len(sums)), key=lambda i: sums[i])
    assert marked[0].attribution == pytest.approx(sums[best], rel=1e-5)
    assert said == [str(best + 1)]
    assert not any(cause.is_output for cause in blocks.prompt)
    assert all(cause.is_output for cause in blocks.answer)


def test_prompt_and_answer_shares_follow_the_values(summary):
    part = slice(0, 63)
    found = re.search(
        r"lie ([\d,.]+) nats: the prompt gives ([\d,.]+), what .* other ([\d,.]+)\.",
        summary.narrative((part.start, part.stop)),
    )
    gained, prompt, answer = (float(x.replace(",", "")) for x in found.groups())
    assert gained == pytest.approx(
        float((summary.full_values - summary.empty_values)[part].double().sum()), abs=0.06
    )
    assert prompt == pytest.approx(float(summary.token_attr[part].double().sum()), abs=0.06)
    assert answer == pytest.approx(gained - prompt, abs=0.11)


def test_gain_of_the_whole_answer_follows_its_values(summary, few_shot):
    said = summary.narrative()
    gained = float(re.search(r"as a whole gives the answer ([\d,.]+) nats: ", said)[1])
    assert gained == pytest.approx(summary.answer.full_value - summary.answer.empty_value, abs=0.06)
    assert gained == pytest.approx(float(summary.answer.attributions.double().sum()), abs=0.06)
    assert summary.answer.full_value == pytest.approx(float(summary.full_values.sum()), abs=1e-2)
    times = re.search(
        r"each token is on average ([\d.]+) times as probable as with no prompt", said
    )
    assert float(times[1]) == pytest.approx(math.exp(gained / len(summary.target)), rel=0.02)
    times = re.search(r"its odds are ([\d.]+) times those with what the", few_shot.narrative())
    assert float(times[1]) == pytest.approx(math.exp(few_shot.answer.gain), rel=0.02)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("log_prob", "it is 2 times less probable than with"),
        ("contrast", "its odds are 2 times lower"),
    ],
)
def test_a_prompt_that_speaks_against_its_answer_says_so(value, told):
    result = GenerationAttributionResult.load(DATA / "few_shot.safetensors")
    result.provenance["attr_target"] = value
    result.own_answer = replace(
        result.own_answer,
        empty_value=math.log(2) + result.own_answer.full_value,
        empty_error=0.0,
    )
    said = result.narrative()
    assert "The prompt as a whole takes 0.7 nats" in said
    assert told in said


def test_foils_and_baselines_are_named_if_recorded(few_shot):
    said = few_shot.narrative()
    foils = re.search(r"held against any of (.*?) and others", said)[1]
    assert re.findall("“(.*?)”", foils) == few_shot.foil_tokens[0][:3]
    assert few_shot.foil_tokens[0][0] == "positive"
    assert "by having the model itself rewrite parts of the text" in said
    assert f"{few_shot.n_evaluations:,} versions" in said
    assert "times the odds" in said


def test_order_certainty_follows_the_difference(result):
    if result.answer is not None:
        is_exact = bool((result.answer.standard_errors == 0).all())
        said = "These numbers are exact for this way of measuring" in result.narrative()
        assert said == is_exact
    level = finest_level(result)
    read = Reading(result, level)
    n = len(result.output_tokens)
    causes = read.causes(0, n, precise=True).prompt
    marked = [cause for cause in causes if cause.is_marked]
    said = result.narrative(level=level)
    if not marked:
        assert "order" not in said
        return
    one, other = (marked + [cause for cause in causes if not cause.is_marked])[:2]
    apart = abs(one.attribution) - abs(other.attribution)
    error = read.difference_error(0, n, one, other)
    assert 0 < error <= one.standard_error + other.standard_error
    assert ("is certain at 95 %" in said) == (apart > 1.96 * error)
    assert ("is not certain" in said) == (apart <= 1.96 * error)
    assert ("may be noise" in said) == (len(marked) < len(causes))


def _few_shot_with_errors(error):
    result = GenerationAttributionResult.load(DATA / "few_shot.safetensors")
    for name in ("token_attr_se", "output_attr_se"):
        setattr(result, name, torch.full_like(getattr(result, name), error))
    errors = torch.full_like(result.own_answer.standard_errors, error)
    result.own_answer = replace(result.own_answer, standard_errors=errors, empty_error=error)
    return result


def test_exact_results_and_unknown_errors_say_so():
    exact = _few_shot_with_errors(0.0)
    assert "These numbers are exact" in exact.narrative()
    assert "±" not in exact.narrative()
    unknown = _few_shot_with_errors(math.nan)
    said = unknown.narrative()
    assert "No part of the prompt is told from noise" in said
    assert "errors of these estimates are unknown" in said
    assert "certain at" not in said


def test_measured_value_without_the_first_cause(few_shot):
    """A coalition in which just the named part is absent, as leave-one-out has them."""
    whole = GenerationAttributionResult.load(DATA / "few_shot.safetensors")
    part_of = torch.tensor(
        next(level.part_of for level in whole.levels if level.name == "paragraph")
    )
    masks = torch.ones(1, whole.masks.shape[1], dtype=torch.bool)
    masks[0, : len(part_of)] = part_of != 3  # the review that is judged, which is named
    for value, expected in (
        (-0.5, "without paragraph 4 .* would probably have said one of “positive”"),
        (0.5, "would still have preferred it to any of “positive”"),
    ):
        whole.masks = torch.cat([few_shot.masks, masks])
        whole.draws = torch.cat([few_shot.draws, few_shot.draws.max()[None] + 1])
        whole.values = torch.cat([few_shot.values, torch.tensor([[value]])])
        whole._replicates = {(0, 1): few_shot.replicates(0, 1)}
        assert re.search(expected, whole.narrative(), re.IGNORECASE)


def test_spans_tokens_and_levels_are_selectable(summary):
    assert summary.narrative((0, 5), level="sentence").startswith("Of the prompt, “The town")
    token = summary.names.tokens[3]
    assert summary.narrative(token) == summary.narrative(3)
    with pytest.raises(ValueError, match="no level 'verse'"):
        summary.narrative(level="verse")


# What it stands on -------------------------------------------------------------------------------


@pytest.mark.parametrize("n_true", [0, 1, 40])
def test_marks_equal_benjamini_hochberg(n_true):
    draw = np.random.default_rng(n_true)
    values = draw.normal(size=1000)
    values[:n_true] += 4.5
    errors = np.full(1000, 1.0)
    known = stats.false_discovery_control(2 * stats.norm.sf(np.abs(values))) <= 0.05
    beyond = marked_beyond(torch.tensor(values), torch.tensor(errors))
    assert ((np.abs(values) >= beyond) == known).all()
    assert beyond >= 1.959
    assert known.sum() >= n_true * 0.7


def test_single_value_threshold_is_1_96():
    one = torch.tensor([3.0])
    assert marked_beyond(one, torch.tensor([1.0])) == pytest.approx(1.96, abs=1e-3)
    assert marked_beyond(one, torch.tensor([0.0])) == pytest.approx(1.96, abs=1e-3)
    assert marked_beyond(one, torch.tensor([math.nan])) == pytest.approx(1.96, abs=1e-3)


def _evidence(seed):
    """A game of twelve features with interactions, sampled in pairs."""
    n = 12
    generator = torch.Generator().manual_seed(seed)
    plan = join_plans([plan_anchors(n), plan_pairs(n, 200, generator=generator)])
    z = plan.masks.double()
    values = z @ torch.arange(1.0, n + 1, dtype=torch.float64) / 4
    values = values + 2 * z[:, 0] * z[:, 3] * z[:, 5] - 3 * z[:, 1] * z[:, 2] * z[:, 6]
    design = Design(
        *("paired kernel regression",) * 2,
        options={},
        n_features=n,
        n_anchors=plan.n_anchors,
        n_visible=[n],
        required=[-1],
        columns=list(range(n)),
        deterministic=True,
    )
    return Evidence(design, plan.masks, plan.draws, values[:, None], Scope.of_all(1, n))


def test_replicates_give_errors_of_differences():
    found, told = [], []
    for seed in range(20):
        evidence = _evidence(seed)
        found.append(evidence._fast_sum(range(1)))
        replicates = evidence.replicates(range(1))
        told.append(jackknife_error(replicates[:, 7] - replicates[:, 5]))
    spread = torch.stack([one[7] - one[5] for one in found]).std()
    # The spread of 20 is known to a sixth; errors are a little too large, never much too small.
    assert float(torch.stack(told).mean() / spread) == pytest.approx(1.25, abs=0.4)


@pytest.mark.parametrize(
    ("nats", "said"),
    [
        (4.78, "119 times as probable"),
        (-0.7, "2 times less probable"),
        (99.0, "over a billion times as probable"),
    ],
)
def test_nats_are_shown_as_factors(nats, said):
    assert factor(nats) == said


# Tables and plain data ---------------------------------------------------------------------------


def test_fragmented_tokens_are_shown_as_words(result):
    rows = Reading(result, unit=None).rows
    text = "".join(piece.text for piece in result.output_pieces)
    if result.names.tokens == result.output_tokens and len(result.output_tokens) == 1:
        return
    assert len(rows) < len(result.output_tokens)
    assert [row.start for row in rows[1:]] == [row.stop for row in rows[:-1]]
    bare = [re.sub(r" #\d+$", "", row.name) for row in rows]
    assert "".join("".join(bare).split()) == "".join(text.split())
    if "1642" in text:
        assert "1642" in bare  # four tokens, one number


def test_table_begins_with_the_coarsest_level(summary):
    lines = summary.table().splitlines()
    level = first_level(summary)
    _, sums = _sums(summary, level)
    shown = re.findall(rf"{level} (\d+) “.*?” ([+-][\d.]+)", lines[1])
    assert len(shown) >= 2  # as many as are told from noise
    for number, amount in shown:
        assert float(amount) == pytest.approx(sums[int(number) - 1], abs=0.006)
    assert lines[0].startswith("SmolLM2-135M-Instruct · Shapley values (KernelShap)")


def test_json_separates_prompt_and_output_causes(summary):
    data = summary.to_dict()
    n_prompt = len(summary.input_tokens)
    assert data["labels"]["tokens"] == summary.names.tokens
    assert len(set(data["labels"]["tokens"])) == len(data["labels"]["tokens"])
    for row in data["causes"]:
        rows = slice(row["start"], row["stop"])
        best = float(summary.token_attr[rows].sum(0).abs().max())
        assert abs(row["prompt"][0]["attribution"]) == pytest.approx(best, rel=1e-5)
    assert data["summary"]["level"] == "paragraph"
    assert data["narrative"]
    frame = pytest.importorskip("pandas") and summary.to_dataframe()
    assert frame.token_name.nunique() == len(summary.output_tokens)
    own = frame[frame.source == "prompt"]
    assert own.feature_name.nunique() == n_prompt
    assert frame.marked.sum() == int(summary.marked.sum())


def test_shares_near_one_are_formatted():
    from captum_llm_ext.result.narrative import _percent

    assert [_percent(share) for share in (0.9996, 0.996, 0.123, 5e-5)] == [
        "100 %",
        "100 %",
        "12 %",
        "less than 0.01 %",
    ]


@pytest.mark.parametrize(
    ("text", "most", "said"),
    [
        (
            "Lake Baikal lies in Siberia. It is 1,642 metres deep.",
            40,
            "“Lake Baikal lies in Siberia. It is…”",
        ),
        ("one two", 40, "“one two”"),
        ("Donaudampfschifffahrtsgesellschaft", 12, "“Donaudampfs…”"),
        ("ab 👩‍👩‍👧 and others", 6, "“ab…”"),  # a family is one character of five
        ("鈴木さんは大阪に住んでいて", 8, "“鈴木さんは大阪…”"),
    ],
)
def test_names_are_cut_at_words_and_never_inside_numbers(text, most, said):
    assert quoted(text, most) == said


def test_shortened_quoted_name_stays_quoted():
    name = "sentence 9 “Question: How deep is Lake Baikal?”"
    assert shortened(name, 30) == "sentence 9 “Question: How…”"
    assert shorten(name) == "sentence 9 “Question: How deep is Lake…”"
    assert shortened("no quotation marks in it", 14) == "no quotation…"


def test_right_to_left_names_are_isolated():
    result = GenerationAttributionResult.load(DATA / "summary.safetensors")
    result.output_pieces[:] = [replace(piece, text="قال ") for piece in result.output_pieces]
    first = sentences(result, 0, len(result.output_tokens))[0]
    # Unicode's bidirectional algorithm gives a number the direction of Arabic before it.
    assert re.search("“\u2068قال [^”]*\u2069” rests", first)
    assert "\u2068" not in first.partition("rests")[2]


@pytest.mark.parametrize("name", NAMES)
def test_truncated_answer_says_so(name):
    result = GenerationAttributionResult.load(DATA / f"{name}.safetensors")
    settings, n = result.provenance["generation"], len(result.output_tokens)
    assert int(settings["max_new_tokens"]) == n
    assert (header(result)[-1] == f"answer cut after {n} tokens") == (n > 1)
    result.target[-1] = int(settings["eos_token_id"])
    assert "cut" not in header(result)[-1]


def test_single_feature_errors_agree_everywhere():
    result = GenerationAttributionResult.load(DATA / "chat.safetensors")
    n = len(result.output_tokens)
    told = result.attribute_span(0, n).standard_errors
    for cause in Reading(result, "word").causes(0, n, precise=True).prompt:
        assert cause.standard_error == pytest.approx(float(told[cause.column]))
