"""What the page is told beside a result's own numbers: whose text is whose, and larger parts."""

from itertools import groupby

import pytest
import torch
from captum.attr import KernelShap
from test_chat import MESSAGES, TEMPLATES

from captum_llm_ext import (
    ChatInput,
    GenerationAttribution,
    GenerationAttributionResult,
    TextSegmentInput,
)
from captum_llm_ext.result.reading import reading


@pytest.mark.parametrize("unit", ["turn", "word"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_message_is_told_with_its_role_and_the_rest_is_template(tokenizer, name, unit):
    before = tokenizer.chat_template
    tokenizer.chat_template = TEMPLATES[name]
    try:
        pieces = ChatInput(MESSAGES, tokenizer, unit).pieces
        whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    finally:
        tokenizer.chat_template = before
    assert "".join(piece.text for piece in pieces) == whole
    said = [
        (role, "".join(piece.text for piece in run).strip())
        for role, run in groupby(pieces, key=lambda piece: piece.role)
        if role != "template"
    ]
    assert said == [(message["role"], message["content"].strip()) for message in MESSAGES]


def _result(model, tokenizer, target=" golf is\nfun. He goes."):
    inp = TextSegmentInput("Dave lives in Austin. He is kind.", tokenizer)
    return GenerationAttribution(KernelShap(model), tokenizer).attribute(inp, target)


def test_words_and_sentences_that_the_features_nest_in_are_levels(model, tokenizer):
    result = _result(model, tokenizer)
    told = reading(result)
    (level,) = told["levels"]
    assert level["name"] == "sentence"
    assert level["part_of"] == [0, 0, 0, 0, 1, 1, 1]
    assert level["parts"] == ["Dave lives in Austin.", "He is kind."]
    assert result.provenance["unit"] == "word"
    texts = [piece.text for piece in result.output_pieces]
    found = {
        level["name"]: [
            "".join(text for text, part in zip(texts, level["part_of"], strict=True) if part == k)
            for k in range(max(level["part_of"]) + 1)
        ]
        for level in told["output_levels"]
    }
    assert found["word"] == [" golf", " is", "\nfun.", " He", " goes."]
    assert [part.strip() for part in found["sentence"]] == ["golf is\nfun.", "He goes."]


def test_errors_of_the_whole_answer_are_those_of_its_span(model, tokenizer, tmp_path):
    result = _result(model, tokenizer)
    errors = torch.tensor(reading(result)["whole_se"])
    expected = result.attribute_span(0, len(result.output_tokens)).standard_errors
    torch.testing.assert_close(errors, expected.float())
    result.save(tmp_path / "result")
    loaded = GenerationAttributionResult.load(tmp_path / "result")
    assert reading(loaded) == reading(result)
    assert loaded.to_html() == result.to_html()
