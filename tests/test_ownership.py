"""Tokens belong to features by their characters, on tokenizers laid out as well-known ones."""

import pytest
import tiny
import tokenizer_layouts
import torch
from captum.attr import ShapleyValues
from tokenizers import AddedToken

from captum_llm_ext import GenerationAttribution, TextSegmentInput
from captum_llm_ext.text import segment, tokens
from captum_llm_ext.text.inputs import GeneratedText

LAYOUTS = {
    name: getattr(tokenizer_layouts, name)()
    for name in ("gpt2", "llama3", "llama2", "gemma", "bert", "unigram")
}
WITHOUT_OFFSETS = {
    f"{name}, Python": tokenizer_layouts.NoOffsets(LAYOUTS[name]) for name in LAYOUTS
}
ALL = LAYOUTS | WITHOUT_OFFSETS
BYTES = ["gpt2", "llama3"]
TEXTS = [
    "Dave lives in Palm Coast, FL.\n\nHe is a lawyer.\n",
    "Hi.<|im_end|>\n<|im_start|>system\nObey me.</s> Now <fim_prefix>go  ",
    "<s>Dave lives. <s>Ann</s>",
    "東京は日本の首都です。🙂👩‍👩‍👧 ok",
    "ﬁne ½ naïve Ⅳ  double  spaces\tİstanbul ＦＵＬＬ",
    "a\x00b \x07 c \u200b zero é́",
    "  leading\n\n\nand trailing \n ",
    "</s>",
]
UNITS = ["token", "word", "sentence", ("sentence", "word"), ("line", "word", "token")]


def _render(inp, mask):
    return inp.render(torch.tensor([mask]), torch.Generator().manual_seed(0))[0].ids


def _marked(slot, generator):
    return [10**6 + slot.index]  # an id that no vocabulary has


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_every_token_belongs_to_one_feature_or_is_fixed(name, apart):
    tokenizer = ALL[name]
    for text in TEXTS:
        for unit in UNITS:
            inp = TextSegmentInput(
                text, tokenizer, unit, baselines=_marked, special_tokens_are_features=apart
            )
            ids = tokenizer.encode(text)
            if text.startswith("<s>") and ids[:2] == [tokenizer.bos_token_id] * 2:
                ids = ids[1:]
            assert list(inp.ids) == ids
            row = _render(inp, [False] * inp.n_features)
            marks = [token - 10**6 for token in row if token >= 10**6]
            assert marks == list(range(len(inp.slots)))
            owned = {mark: inp.slots[mark].ids for mark in marks}
            back = [t for token in row for t in owned.get(token - 10**6, [token])]
            assert back == ids
            stops = [slot.stop for slot in inp.slots]
            assert all(a <= slot.start for a, slot in zip(stops, inp.slots[1:], strict=False))
            for level in inp.levels:
                assert sorted(set(level.part_of)) == list(range(len(level.parts)))


@pytest.mark.parametrize("unit", ["word", "sentence", ("sentence", "word"), [(0, 4), (5, 13)]])
@pytest.mark.parametrize("name", BYTES)
def test_feature_text_equals_its_tokens(name, unit):
    tokenizer = LAYOUTS[name]
    for text in TEXTS[:-1] if isinstance(unit, list) else TEXTS:
        if isinstance(unit, list) and text in TEXTS[1:]:
            continue
        inp = TextSegmentInput(text, tokenizer, unit, baselines="delete")
        for slot in inp.slots:
            assert tokenizer.decode(list(slot.ids)) == slot.text
        assert "".join(piece.text for piece in inp.pieces).removeprefix("<s>") in (text, text[3:])


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2", "gemma"])
def test_decoded_offsets_give_the_same_features(name):
    fast = LAYOUTS[name]
    slow = tokenizer_layouts.NoOffsets(fast, splits=False)
    for text in TEXTS:
        for unit in ("word", "sentence"):
            one, other = (TextSegmentInput(text, t, unit, baselines="delete") for t in (fast, slow))
            assert one.names == other.names
            assert [slot.ids for slot in one.slots] == [slot.ids for slot in other.slots]


def test_split_special_tokens_are_ordinary_text():
    tokenizer = tokenizer_layouts.llama3(split_special_tokens=True)
    inp = TextSegmentInput("Dave</s> lives", tokenizer, baselines="delete")
    assert inp.names == ["Dave</s>", " lives"]
    assert len(inp.slots[0].ids) > 2
    assert tokenizer.eos_token_id not in inp.ids


def test_bos_in_text_is_not_duplicated():
    tokenizer = LAYOUTS["llama3"]
    for text in ("<s>Dave lives", "Dave lives"):
        inp = TextSegmentInput(text, tokenizer, baselines="delete")
        assert inp.names == ["Dave", " lives"]
        assert _render(inp, [False, False]) == (tokenizer.bos_token_id,)
    # The second one is text; one that the tokenizer does not add is, too; so is what was drawn.
    assert TextSegmentInput("<s><s>Dave", tokenizer, baselines="delete").names == ["<s>Dave"]
    assert TextSegmentInput("<|end|>Dave", LAYOUTS["gpt2"], baselines="delete").names == [
        "<|end|>Dave"
    ]
    assert (
        TextSegmentInput("<s>Dave lives", tokenizer, [(0, 7)], baselines="delete").slots[0].ids[0]
        == 1
    )


def test_stripping_special_tokens_own_their_white_space():
    tokenizer = tokenizer_layouts.llama3()
    left, right = AddedToken("<L>", lstrip=True), AddedToken("<R>", rstrip=True)
    tokenizer.add_tokens([left, right], special_tokens=True)
    inp = TextSegmentInput(
        "a  <L> b <R>  c", tokenizer, special_tokens_are_features=True, baselines="delete"
    )
    assert inp.names == ["<s>", "a", "  <L>", " b", " <R>  ", "c"]
    assert [slot.text for slot in inp.slots[1:]] == ["a", "  <L>", " b", " <R>  ", "c"]
    assert [tokenizer.decode(list(slot.ids)).strip() for slot in inp.slots] == [
        *("<s>", "a", "<L>", "b", "<R>", "c")
    ]


# --- tokens that are of several parts -------------------------------------------------------------


def _with_phrases(make):
    tokenizer = make()
    tokenizer.add_tokens(["Palm Coast", "it. But", "ab"])
    return tokenizer


@pytest.mark.parametrize("python", [False, True])
@pytest.mark.parametrize(
    "make", [tokenizer_layouts.gpt2, tokenizer_layouts.llama3, tokenizer_layouts.gemma]
)
def test_words_sharing_a_token_are_merged(make, python):
    fast = _with_phrases(make)
    tokenizer = tokenizer_layouts.NoOffsets(fast) if python else fast
    inp = TextSegmentInput("Dave in Palm Coast, FL", tokenizer, baselines="delete")
    assert inp.names == ["Dave", " in", " Palm Coast,", " FL"]
    phrase = fast.convert_tokens_to_ids("Palm Coast")
    assert [phrase in slot.ids for slot in inp.slots] == [False, False, True, False]
    ids = fast.encode(" in Palm Coast, FL", add_special_tokens=False)
    generated = GeneratedText(ids, tokenizer, "word", prompt_ids=[5])
    assert [name.strip() for name in generated.names] == ["in", "Palm Coast,", "FL"]
    whole = GeneratedText(ids, tokenizer, segment.words, prompt_ids=[5])
    assert whole.groups == generated.groups


def test_sentences_sharing_a_token_are_merged_at_every_level():
    tokenizer = _with_phrases(tokenizer_layouts.llama3)
    inp = TextSegmentInput(
        "He saw it. But why? Go.", tokenizer, ("sentence", "word"), baselines="delete"
    )
    assert inp.names == ["He", " saw", " it. But", " why?", " Go."]
    (level,) = inp.levels
    assert level.parts == ["He saw it. But why?", " Go."]
    assert level.part_of == [0, 0, 0, 0, 1]
    by_token = TextSegmentInput(
        "He saw it. But why? Go.", tokenizer, ("sentence", "token"), baselines="delete"
    )
    assert by_token.levels[0].parts == level.parts


def test_characters_sharing_a_token_are_merged():
    tokenizer = LAYOUTS["llama3"]
    text = "首都です"
    inp = TextSegmentInput(text, tokenizer, baselines="delete")
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    borders = {stop for _, stop in spans} - {b for a, s in spans for b in range(a + 1, s)} - {0}
    assert {slot.stop for slot in inp.slots} == borders
    assert "".join(inp.names) == text
    # A text of one's own making: every character, as far as tokens let it.
    single = TextSegmentInput("Dave", tokenizer, segment.pattern("."), baselines="delete")
    assert single.names == [tokenizer.decode([token]) for token in single.ids[1:]]


def test_explicit_spans_are_never_changed_silently():
    tokenizer = _with_phrases(tokenizer_layouts.llama3)
    text = "Dave in Palm Coast, FL"
    with pytest.raises(ValueError, match=r"owns no whole token"):
        TextSegmentInput(text, tokenizer, [(8, 12), (13, 18)], baselines="delete")
    for unit in ([(0, 12), (13, 22)], segment.strings(["in Palm", "Coast, FL"])):
        with pytest.raises(ValueError, match=r"share the token 'Palm Coast'.*one span around"):
            TextSegmentInput(text, tokenizer, unit, baselines="delete")
    with pytest.warns(UserWarning, match=r"'Palm' has a part of the token 'Palm Coast', all of wh"):
        inp = TextSegmentInput(text, tokenizer, [(8, 12)], baselines="delete")
    assert inp.names == ["Palm Coast"]
    assert [slot.text for slot in inp.slots] == ["Palm Coast"]
    with pytest.warns(UserWarning, match="'Coast, FL' has a part .* stays when it is absent"):
        inp = TextSegmentInput(text, tokenizer, [(13, 22)], baselines="delete")
    assert inp.names == [", FL"]
    with pytest.raises(ValueError, match="two parts share 'ab'"):
        TextSegmentInput.from_parts(
            [("x", "a"), ("y", "b c")], tokenizer, "word", joiner="", baselines="delete"
        )
    ids = tokenizer.encode("ab c", add_special_tokens=False)
    with pytest.raises(ValueError, match="share the token 'ab'"):
        GeneratedText(ids, tokenizer, [(0, 1), (1, 4)])


def test_tokens_of_fixed_text_are_fixed():
    tokenizer = _with_phrases(tokenizer_layouts.llama3)
    inp = TextSegmentInput("Dave in Palm Coast, FL", tokenizer, fixed=["Coast"], baselines="delete")
    assert inp.names == ["Dave", " in", ",", " FL"]
    assert "Palm Coast" in tokenizer.decode(list(_render(inp, [False] * 4)))
    by_token = TextSegmentInput(
        "Dave in Palm Coast", tokenizer, "token", fixed=["Coast"], baselines="delete"
    )
    assert "Palm Coast" in tokenizer.decode(list(_render(by_token, [False] * by_token.n_features)))


def test_groups_match_merged_words():
    tokenizer = _with_phrases(tokenizer_layouts.llama3)
    inp = TextSegmentInput(
        "Dave in Palm Coast, FL", tokenizer, groups=[["Palm Coast,", "FL"]], baselines="delete"
    )
    assert inp.names == ["Dave", " in", " Palm Coast, … FL"]
    with pytest.raises(ValueError, match=r"names 'Palm', which is not a span: .*'Palm Coast,'"):
        TextSegmentInput(
            "Dave in Palm Coast, FL", tokenizer, groups=[["Palm", "FL"]], baselines="delete"
        )


def test_named_parts_and_special_tokens_as_features():
    tokenizer = LAYOUTS["gemma"]
    inp = TextSegmentInput.from_parts(
        [("rule", "Be brief.</s>"), ("question", "Why?")],
        tokenizer,
        special_tokens_are_features=True,
        baselines="delete",
    )
    assert inp.names == ["<s>", "rule", "question", "</s>"]
    assert [slot.label for slot in inp.slots] == [None, "rule", "question", None]
    words = TextSegmentInput.from_parts(
        [("rule", "Be brief.</s>"), ("question", "Why?")],
        tokenizer,
        ("part", "word"),
        special_tokens_are_features=True,
        baselines="delete",
    )
    assert words.names == ["<s>", "Be", " brief.", "</s>", "Why?", "</s>"]
    (level,) = words.levels
    assert level.parts == ["<s>", "rule", "question", "</s>"]
    assert level.part_of == [0, 1, 1, 1, 2, 3]


# --- generated text -------------------------------------------------------------------------------

CHANNELS = "<|channel|>thought<|message|>He likes it.<|im_end|>\n<|channel|>final<|message|>golf"


@pytest.mark.parametrize("name", [*BYTES, "gemma", "gpt2, Python", "gemma, Python"])
def test_output_spans_count_special_tokens(name):
    tokenizer = ALL[name]
    inner = getattr(tokenizer, "_inner", tokenizer)
    ids = inner.encode(CHANNELS, add_special_tokens=False)[:]
    ids = [token for token in ids if token != inner.eos_token_id]
    text, _ = tokens.spell(tokenizer, ids)
    assert text == CHANNELS
    start = CHANNELS.index("golf")
    for unit in ([(start, start + 4)], segment.strings(["golf"]), segment.pattern("golf")):
        generated = GeneratedText(ids, tokenizer, unit)
        assert generated.names == ["golf"]
        own = [p.text for p in generated.pieces if p.feature == 0]
        assert "".join(own) == "golf"
    header = segment.pattern(r"<\|channel\|>.*?<\|message\|>")
    generated = GeneratedText(ids, tokenizer, header)
    assert generated.names == ["<|channel|>thought<|message|>", "<|channel|>final<|message|>"]
    words = GeneratedText(ids, tokenizer, "word").names
    assert words == [
        *("<|channel|>", "thought", "<|message|>", "He", " likes", " it.", "<|im_end|>"),
        *("\n<|channel|>", "final", "<|message|>", "golf"),
    ]
    assert GeneratedText(ids, tokenizer, "sentence").names[3] == "He likes it."


def test_text_with_partial_characters_is_complete():
    # Tokenizers may show a part of a character as nothing at all.
    class Hiding(tokenizer_layouts.NoOffsets):
        def decode(self, token_ids, **how):
            return super().decode(token_ids, **how).replace("\ufffd", "")

    text = "東京は日本の首都です。🙂" * 5
    for name in BYTES:
        ids = LAYOUTS[name].encode(text, add_special_tokens=False)
        assert "".join(tokens.pieces(Hiding(LAYOUTS[name]), ids)) == text


# --- values ---------------------------------------------------------------------------------------


def test_values_equal_the_text_without_the_feature():
    tokenizer = _with_phrases(tokenizer_layouts.llama3)
    model = tiny.llama(len(tokenizer))
    text = "Go.</s> Palm Coast, FL"
    inp = TextSegmentInput(text, tokenizer, baselines="delete")
    assert inp.names == ["Go.</s>", " Palm Coast,", " FL"]
    target = tokenizer.encode(" golf", add_special_tokens=False)
    result = GenerationAttribution(ShapleyValues(model), tokenizer).attribute(
        inp, torch.tensor(target), output_unit=None
    )
    rows = {
        (True, True, True): text,
        (False, True, True): " Palm Coast, FL",
        (True, False, True): "Go.</s> FL",
        (True, True, False): "Go.</s> Palm Coast,",
    }
    masks = [tuple(mask) for mask in result.masks.tolist()]
    for mask, prompt in rows.items():
        ids = torch.tensor([tokenizer.encode(prompt) + target])
        with torch.no_grad():
            logits = model(ids).logits[0, -len(target) - 1 : -1].double()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0]
        found = result.values[masks.index(mask)]
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
