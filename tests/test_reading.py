"""What a page is told beside a result's numbers: larger parts, roles, errors of the whole."""

import copy
import json
import re

import pytest
import tiny
import torch
from captum.attr import (
    KernelShap,
    ShapleyValues,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)

from captum_llm_ext import (
    ChatInput,
    GenerationAttribution,
    GenerationAttributionResult,
    TextSegmentInput,
)
from captum_llm_ext.coalitions import (
    Scope,
    join_plans,
    part_errors,
    plan_anchors,
    plan_permutations,
    solve_permutations,
)
from captum_llm_ext.coalitions.clustered_errors import normal_scale
from captum_llm_ext.result.levels import page_levels
from captum_llm_ext.text.inputs import Piece

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Dave lives here. Where?"},
    {"role": "assistant", "content": "In Reno."},
    {"role": "user", "content": "Why?\n\nTell me."},
]


def attribute(model, tokenizer, inp, target, **arguments):
    attribution = GenerationAttribution(ShapleyValueSampling(model), tokenizer)
    ids = tokenizer.encode(target, add_special_tokens=False)
    return attribution.attribute(inp, target=ids, n_samples=3, **arguments)


@pytest.fixture(scope="module")
def chatter():
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def by_role(pieces):
    """Texts of runs of pieces with one role."""
    told = []
    for piece in pieces:
        if not told or told[-1][0] != piece.role:
            told.append([piece.role, ""])
        told[-1][1] += piece.text
    return told


@pytest.mark.parametrize("unit", ["turn", "word", "token"])
@pytest.mark.parametrize("roles", [("user",), ("user", "system", "assistant")])
def test_chat_pieces_have_roles(chatter, unit, roles):
    chat = ChatInput(MESSAGES, chatter, unit, roles=roles, baselines="delete")
    assert "".join(piece.text for piece in chat.pieces) == chat.text
    said = [told for told in by_role(chat.pieces) if told[0] != "template"]
    assert said == [[message["role"], message["content"]] for message in MESSAGES]
    owned = {piece.role for piece in chat.pieces if piece.feature is not None}
    assert owned == set(roles)


def test_chat_roles_and_levels_round_trip(model, chatter, tmp_path):
    result = attribute(
        model,
        chatter,
        ChatInput(MESSAGES, chatter, "word", baselines="delete"),
        " Golf. Chess.</s>",
    )
    result.save(tmp_path / "chat.safetensors")
    loaded = GenerationAttributionResult.load(tmp_path / "chat.safetensors")
    assert loaded.prompt_pieces == result.prompt_pieces
    assert loaded.output_pieces == result.output_pieces
    assert loaded.output_pieces[-1].role == "template"
    assert loaded.to_html() == result.to_html()
    levels = {level["name"]: level["parts"] for level in page_levels(loaded)["levels"]}
    assert list(levels) == ["turn", "paragraph", "sentence"]
    assert levels["sentence"] == ["Be brief.", "Dave lives here.", "Where?", "Why?", "Tell me."]


def test_parts_do_not_span_turns(model, chatter):
    """In a template that puts nothing between messages."""
    tokenizer = copy.deepcopy(chatter)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    messages = [{"role": role, "content": f"{role} says so"} for role in ("system", "user")]
    chat = ChatInput(messages, tokenizer, "word", roles=("system", "user"), baselines="delete")
    result = attribute(model, tokenizer, chat, " Golf")
    for level in page_levels(result)["levels"]:
        assert level["part_of"] == [0, 0, 0, 1, 1, 1], level["name"]


def test_finest_level_is_named_by_its_unit(model, tokenizer):
    words = TextSegmentInput("Dave lives here.", tokenizer, "word", baselines="delete")
    assert attribute(model, tokenizer, words, " Golf").provenance["unit"] == "word"


def levels_of(model, tokenizer, text, unit, target=" Golf", **arguments):
    inp = TextSegmentInput(text, tokenizer, unit, **arguments)
    told = page_levels(attribute(model, tokenizer, inp, target))
    return {level["name"]: level["part_of"] for level in told["levels"]}


def test_prompt_levels_include_enclosing_sentences(model, tokenizer):
    text = "Dave lives here. He is old.\n\nAnn is not."
    assert levels_of(model, tokenizer, text, "word") == {
        "paragraph": [0] * 6 + [1] * 3,
        "sentence": [0] * 3 + [1] * 3 + [2] * 3,
    }


@pytest.mark.parametrize(
    ("text", "unit", "arguments"),
    [
        ("Dave lives here", "word", {}),  # one sentence
        ("Dave is. Ann is.", "sentence", {}),  # nothing coarser
        ("Dave is. Ann is.", "word", {"groups": [["Dave", "Ann"]]}),  # a feature in both
        ("Dave is. Ann is.", [(0, 11), (12, 16)], {}),  # a span across the border
    ],
)
def test_levels_are_absent_where_units_do_not_nest(model, tokenizer, text, unit, arguments):
    assert levels_of(model, tokenizer, text, unit, **arguments) == {}


def output_levels(texts, roles=None):
    result = GenerationAttributionResult(
        input_tokens=["x"],
        output_tokens=list(texts),
        seq_attr=torch.zeros(1),
        token_attr=torch.zeros(len(texts), 1),
        token_attr_se=torch.zeros(len(texts), 1),
        full_values=torch.zeros(len(texts)),
        empty_values=torch.zeros(len(texts)),
        efficiency_gap=torch.zeros(len(texts)),
        n_evaluations=1,
        masks=torch.ones(1, 1, dtype=torch.bool),
        values=torch.zeros(1, len(texts)),
        draws=torch.zeros(1),
        target=torch.zeros(len(texts)),
        output_pieces=[
            Piece(text, None, role)
            for text, role in zip(texts, roles or [None] * len(texts), strict=True)
        ],
    )
    return {level["name"]: level["part_of"] for level in page_levels(result)["output_levels"]}


def test_answer_levels_are_words_and_sentences():
    assert output_levels([" Go", "lf", ".", " Al", "so", " tea", "."]) == {
        "sentence": [0, 0, 0, 1, 1, 1, 1],
        "word": [0, 0, 0, 1, 1, 2, 2],
    }


def test_special_tokens_belong_to_no_sentence():
    texts, roles = [" A", " b", ".", " C", ".", "</s>"], [None] * 5 + ["template"]
    assert output_levels(texts, roles)["sentence"] == [0, 0, 0, 1, 1, 2]
    assert output_levels([" A", " b", "</s>"], [None, None, "template"]) == {}


def test_whole_answer_errors_account_for_shared_coalitions(model, tokenizer):
    inp = TextSegmentInput(
        "Dave lives in Palm Coast, FL and is old today.", tokenizer, "word", baselines="delete"
    )
    attribution = GenerationAttribution(ShapleyValueSampling(model), tokenizer)
    target = tokenizer.encode(" Golf and", add_special_tokens=False)
    result = attribution.attribute(inp, target=target, n_samples=6)
    assert sums(result)["prompt", None][0, len(target)] == pytest.approx(
        result.attribute_span(0, len(target)).standard_errors[:10].tolist(), rel=5e-3
    )
    result.provenance["attr_target"] = "prob"  # the sum of which means nothing
    assert sums(result) == {}


def sums(result):
    """By side and level: per span its errors, as the page holds them."""
    page = result.to_html()
    (held,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    return {
        (entry["side"], entry["level"]): dict(
            zip(map(tuple, entry["spans"]), entry["se"], strict=True)
        )
        for entry in json.loads(held)["sums"]
    }


def example(model, tokenizer, method=ShapleyValueSampling, **options):
    inp = TextSegmentInput(
        "Dave lives here. Ann sings. Bob is old.", tokenizer, "word", baselines="delete"
    )
    target = tokenizer.encode(" Golf. She sings and", add_special_tokens=False)
    return GenerationAttribution(method(model), tokenizer).attribute(inp, target=target, **options)


@pytest.mark.parametrize("method", [ShapleyValueSampling, KernelShap, ShapleyValues])
def test_page_span_errors_equal_the_library(model, tokenizer, method):
    options = {} if method is ShapleyValues else {"n_samples": 60}
    options |= {"output_unit": None} if method is ShapleyValues else {}
    result = example(model, tokenizer, method, **options)
    n_target, n_prompt = len(result.output_tokens), len(result.input_tokens)
    told = sums(result)
    spans = {(a, b) for a in range(n_target) for b in range(a + 2, n_target + 1)}
    if method is KernelShap:  # which takes a regression for each: a few, the largest first
        assert len(told["prompt", None]) == 5
        assert (0, n_target) in told["prompt", None]
    else:
        assert set(told["prompt", None]) == spans
    for span, errors in told["prompt", None].items():
        whole = result.attribute_span(*span).standard_errors
        assert errors == pytest.approx(whole[:n_prompt].tolist(), rel=5e-3)
        if ("answer", None) in told:
            assert told["answer", None][span] == pytest.approx(whole[n_prompt:].tolist(), rel=5e-3)


def test_part_errors_equal_those_of_sums_over_permutation_pairs(model, tokenizer):
    """Walk by walk, in loops."""
    result = example(model, tokenizer, n_samples=8)
    told = sums(result)
    levels = {level["name"]: level["part_of"] for level in page_levels(result)["levels"]}
    assert set(levels) == {"sentence"}
    n, sentences = result.design.n_features, levels["sentence"]
    masks, values = result.masks[2:, :n], result.values[2:].double()
    assert len(masks) == 8 * (n + 1)
    for (start, stop), errors in told["prompt", "sentence"].items():
        pairs = torch.zeros(4, 3).double()
        each = torch.zeros(4, len(result.full_attr[0])).double()
        for walk in range(8):
            for row in range(walk * (n + 1) + 1, (walk + 1) * (n + 1)):
                joined = int((masks[row] & ~masks[row - 1]).nonzero())
                gain = float((values[row] - values[row - 1])[start:stop].sum()) / 2
                each[walk // 2, joined] += gain
                if joined < len(sentences):
                    pairs[walk // 2, sentences[joined]] += gain
        n_visible = len(sentences) + stop - 1
        variance = pairs.var(0) / 4
        features = each[:, :n_visible].var(0).mean() / 4
        sizes = torch.tensor(sentences).bincount()
        wanted = ((3 * variance + sizes * features) / 4).sqrt() * normal_scale(4)
        assert errors == pytest.approx(wanted.tolist(), rel=5e-3, abs=1e-9)


def test_answer_words_have_errors_as_causes(model, tokenizer):
    result = example(model, tokenizer, n_samples=8)
    told = sums(result)
    runs = {level["name"]: level["part_of"] for level in page_levels(result)["output_levels"]}
    n_target = len(result.output_tokens)
    for name, part_of in runs.items():
        every = told["answer", name]
        assert {(t, t + 1) for t in range(n_target)} <= set(every)
        assert {len(errors) for errors in every.values()} == {1 + max(part_of)}
        for t in range(n_target):  # a part that begins later is no cause
            later = [part for part in range(1 + max(part_of)) if part_of.index(part) >= t]
            assert [every[t, t + 1][part] for part in later] == [0] * len(later)
        alone = [part for part in range(max(part_of)) if part_of.count(part) == 1]
        for part in alone:
            single = result.output_attr_se[:, part_of.index(part)].tolist()
            assert [every[t, t + 1][part] for t in range(n_target)] == pytest.approx(
                single, rel=5e-3
            )


def test_part_errors_equal_the_spread_of_sums():
    """Over 400 samples of a game whose features make up for one another within each part."""
    n, part_of = 9, torch.arange(9) // 3
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(n, n, generator=draw).double().triu(1)
    found, told, single = [], [], []
    for seed in range(400):
        plan = plan_permutations(n, 12, generator=torch.Generator().manual_seed(seed))
        plan = join_plans([plan_anchors(n), plan])
        x = plan.masks.double()
        values = (((x @ weights) * x).sum(1) ** 2)[:, None]
        scope = Scope(torch.tensor([n]), torch.tensor([-1]))
        solution = solve_permutations(plan, values, scope)
        found.append(solution.attributions[0].view(3, 3).sum(1))
        told.append(part_errors(plan, values, scope, part_of)[0])
        single.append(solution.standard_errors[0].square().view(3, 3).sum(1).sqrt())
    spread = torch.stack(found).std(0)
    coverage = (torch.stack(found) - torch.stack(found).mean(0)).abs() < 1.96 * torch.stack(told)
    # 400 samples tell a coverage to about 0.01.
    assert coverage.double().mean(0).tolist() == pytest.approx([0.95] * 3, abs=0.035)
    # As if independent they would be too large: a walk's gains add up to the same.
    assert bool((torch.stack(single).mean(0) > 1.1 * spread).all())


@pytest.mark.parametrize("kind", ["words", "parts", "template", "captum's tokens"])
def test_page_levels_are_accepted_by_at_level(model, tokenizer, kind):
    text = "Dave lives here. Where?\n\nIn Reno. Or Austin."
    make = {
        "words": lambda: TextSegmentInput(
            text, tokenizer, ("sentence", "word"), baselines="delete"
        ),
        "parts": lambda: TextSegmentInput.from_parts(
            [("rule", "Be brief. Now."), ("question", "Why? Tell me.")],
            tokenizer,
            ("passage", "word"),
            baselines="delete",
        ),
        "template": lambda: TextSegmentInput.from_template(
            "{} lives in {}. {} lives in {}.",
            ["Dave", "Reno", "Ann", "Austin"],
            tokenizer,
            baselines="delete",
        ),
        "captum's tokens": lambda: TextTokenInput(text, tokenizer),
    }
    result = attribute(model, tokenizer, make[kind](), " golf", output_unit=None)
    page = json.loads(json.dumps(page_levels(result)))
    asked = [result.provenance["unit"], *(level["name"] for level in page["levels"])]
    expected = {
        "words": ["word", "paragraph", "sentence"],
        "parts": ["word", "passage", "sentence"],
        "template": ["span", "sentence"],
        "captum's tokens": ["token", "paragraph", "sentence", "word"],
    }
    assert sorted(asked) == sorted(expected[kind])
    for name in asked:
        parts, attr = result.at_level(name)
        assert len(parts) == attr.shape[1]
        torch.testing.assert_close(attr.sum(1), result.token_attr.sum(1))
    finest, attr = result.at_level(result.provenance["unit"])
    assert finest == result.input_tokens
    assert torch.equal(attr, result.token_attr)


def test_copied_group_scores_are_not_summed(model, tokenizer):
    inp = TextTemplateInput("{} lives. {} too.", ["Dave", "Ann"], ["x", "y"], mask=[0, 0])
    result = attribute(model, tokenizer, inp, " golf", output_unit=None)
    assert result.token_attr.shape[1] == 2
    assert page_levels(result)["levels"] == []
    with pytest.raises(ValueError, match=r"no level 'sentence': the levels are 'field'\."):
        result.at_level("sentence")
