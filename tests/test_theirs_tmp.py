"""What a page is told beside a result's numbers: larger parts, roles, errors of the whole."""

import pytest
import tiny
import torch
from captum.attr import ShapleyValueSampling

from captum_llm_ext import (
    ChatInput,
    GenerationAttribution,
    GenerationAttributionResult,
    TextSegmentInput,
)
from captum_llm_ext.inputs import Piece
from captum_llm_ext.result.reading import reading

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
    return attribution.attribute(inp, target=ids, n_samples=2, **arguments)


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
def test_a_chat_tells_who_said_what(chatter, unit, roles):
    chat = ChatInput(MESSAGES, chatter, unit, roles=roles)
    assert "".join(piece.text for piece in chat.pieces) == chat.text
    said = [told for told in by_role(chat.pieces) if told[0] != "template"]
    assert said == [[message["role"], message["content"]] for message in MESSAGES]
    owned = {piece.role for piece in chat.pieces if piece.feature is not None}
    assert owned == set(roles)


def test_roles_and_levels_of_a_chat_survive_a_file(model, chatter, tmp_path):
    result = attribute(model, chatter, ChatInput(MESSAGES, chatter, "word"), " Golf. Chess.</s>")
    result.save(tmp_path / "chat.safetensors")
    loaded = GenerationAttributionResult.load(tmp_path / "chat.safetensors")
    assert loaded.prompt_pieces == result.prompt_pieces
    assert loaded.output_pieces == result.output_pieces
    assert loaded.output_pieces[-1].role == "template"
    assert loaded.to_html() == result.to_html()
    levels = {level["name"]: level["parts"] for level in reading(loaded)["levels"]}
    assert list(levels) == ["turn", "paragraph", "sentence"]
    assert levels["sentence"] == ["Be brief.", "Dave lives here.", "Where?", "Why?", "Tell me."]


def test_the_finest_level_has_the_name_of_its_unit(model, tokenizer):
    words = TextSegmentInput("Dave lives here.", tokenizer, "word")
    assert attribute(model, tokenizer, words, " Golf").provenance["unit"] == "word"


def levels_of(model, tokenizer, text, unit, target=" Golf", **arguments):
    inp = TextSegmentInput(text, tokenizer, unit, **arguments)
    told = reading(attribute(model, tokenizer, inp, target))
    return {level["name"]: level["part_of"] for level in told["levels"]}


def test_a_prompt_is_read_by_the_sentences_its_words_nest_in(model, tokenizer):
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
def test_no_level_is_made_up(model, tokenizer, text, unit, arguments):
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
    return {level["name"]: level["part_of"] for level in reading(result)["output_levels"]}


def test_the_answer_is_read_by_words_and_sentences():
    assert output_levels([" Go", "lf", ".", " Al", "so", " tea", "."]) == {
        "sentence": [0, 0, 0, 1, 1, 1, 1],
        "word": [0, 0, 0, 1, 1, 2, 2],
    }


def test_a_special_token_is_no_part_of_a_sentence():
    texts, roles = [" A", " b", ".", " C", ".", "</s>"], [None] * 5 + ["template"]
    assert output_levels(texts, roles)["sentence"] == [0, 0, 0, 1, 1, 2]
    assert output_levels([" A", " b", "</s>"], [None, None, "template"]) == {}


def test_errors_of_the_whole_answer_know_of_shared_coalitions(model, tokenizer):
    inp = TextSegmentInput("Dave lives in Palm Coast, FL and is old today.", tokenizer, "word")
    attribution = GenerationAttribution(ShapleyValueSampling(model), tokenizer)
    target = tokenizer.encode(" Golf and", add_special_tokens=False)
    result = attribution.attribute(inp, target=target, n_samples=6)
    told = torch.tensor(reading(result)["whole_se"])
    assert torch.equal(told, result.attribute_span(0, len(target)).standard_errors)
    result.provenance["attr_target"] = "prob"  # the sum of which means nothing
    assert reading(result)["whole_se"] is None
