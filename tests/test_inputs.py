"""Features own whole tokens, and coalitions touch nothing but what is absent."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_llm_ext import TextSegmentInput
from captum_llm_ext.text.baselines.candidates import BLANK
from captum_llm_ext.text.baselines.slot import Bonds
from captum_llm_ext.text.inputs import GeneratedText, RenderedPrompt

TOKENIZERS = {
    "byte-level": tiny.byte_level(),
    "metaspace": tiny.metaspace(),
    "word piece": tiny.word_piece(),
    "no offsets": tiny.NoOffsets(tiny.byte_level()),
}
TEXTS = st.text(
    st.one_of(st.sampled_from("Dave lives. FL,\n\t 東京🙂é"), st.characters(codec="utf-8")),
    min_size=1,
    max_size=40,
).filter(lambda text: text.strip() and not any(token in text for token in tiny.SPECIAL))


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _render(inp, mask, seed=0):
    return inp.render(torch.tensor([mask]), _generator(seed))[0].ids


def _special(tokenizer):
    """Special tokens but for the one of unknown words, which are words of the text."""
    return set(tokenizer.all_special_ids) - {getattr(tokenizer, "unk_token_id", None)}


def _input_or_skip(text, tokenizer, unit, **arguments):
    special = _special(tokenizer)
    if all(token in special for token in tokenizer.encode(text)):
        # A text of nothing but characters that the tokenizer drops has no feature.
        with pytest.raises(ValueError, match="no token of its own"):
            TextSegmentInput(text, tokenizer, unit, **arguments)
        return None
    return TextSegmentInput(text, tokenizer, unit, **arguments)


@pytest.mark.parametrize("unit", ["token", "word", "sentence"])
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=170, deadline=None)  # 12 combinations: more than 2,000 cases
@given(TEXTS, st.randoms(use_true_random=False))
def test_rendering_changes_only_absent_features(name, unit, text, rng):
    tokenizer = TOKENIZERS[name]
    # Ids that no vocabulary has mark what stands where.
    inp = _input_or_skip(text, tokenizer, unit, baselines=lambda slot, _: [10**6 + slot.index])
    if inp is None:
        return
    assert list(_render(inp, [True] * inp.n_features)) == list(tokenizer.encode(text))
    # Every id belongs to one feature or to the fixed part.
    owned = [token for slot in inp.slots for token in slot.ids]
    special = [token for token in inp.ids if token in _special(tokenizer)]
    assert sorted(owned + special) == sorted(inp.ids)
    mask = [rng.random() < 0.5 for _ in range(inp.n_features)]
    row = _render(inp, mask)
    marks = [token - 10**6 for token in row if token >= 10**6]
    assert marks == [slot.index for slot in inp.slots if not mask[slot.feature]]
    # With the features' own ids in their place again, the prompt is as it was.
    back = [
        t for token in row for t in (inp.slots[token - 10**6].ids if token >= 10**6 else [token])
    ]
    assert back == list(inp.ids)


@pytest.mark.parametrize("unit", ["word", "sentence"])
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("Dave lives. FL,\n\té🙂ñ!"), min_size=1).filter(str.strip))
def test_feature_ids_decode_to_feature_text(unit, text):
    # In scripts without spaces a byte-level token may hold the end of one character and the
    # beginning of the next: it then belongs to the first.
    tokenizer = TOKENIZERS["byte-level"]
    for slot in TextSegmentInput(text, tokenizer, unit, baselines="delete").slots:
        assert tokenizer.decode(slot.ids) == slot.text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_names_spell_the_features(name):
    text = "Dave lives in Palm Coast, FL."
    inp = TextSegmentInput(text, TOKENIZERS[name], baselines="delete")
    assert inp.names == ["Dave", " lives", " in", " Palm", " Coast,", " FL."]
    assert inp.values == inp.names
    assert "".join(piece.text for piece in inp.pieces).removeprefix("<s>") == text


def test_special_tokens_are_features_on_request(tokenizer):
    assert TextSegmentInput("Dave lives", tokenizer, baselines="delete").names == ["Dave", " lives"]
    inp = TextSegmentInput(
        "Dave lives", tokenizer, special_tokens_are_features=True, baselines="delete"
    )
    assert inp.names == ["<s>", "Dave", " lives"]
    assert _render(inp, [False, True, True]) == inp.ids[1:]
    marked = TextSegmentInput(
        "Dave</s> lives", tokenizer, special_tokens_are_features=True, baselines="delete"
    )
    assert marked.names == ["<s>", "Dave", "</s>", " lives"]


def test_special_tokens_in_text_belong_to_their_feature(tokenizer):
    text = "Dave</s> lives.<s>\n Go</s>"
    for unit in ("token", "word", "sentence", [(0, 8), (8, len(text))], [(4, 8), (15, 18)]):
        inp = TextSegmentInput(text, tokenizer, unit, baselines="delete")
        assert list(inp.ids) == tokenizer.encode(text)
        for slot in inp.slots:
            assert tokenizer.decode(slot.ids) == slot.text
        owned = [token for slot in inp.slots for token in slot.ids]
        n = 2 if unit == [(4, 8), (15, 18)] else len(inp.ids) - 1  # all but the BOS that is added
        assert len(owned) == n
        assert "".join(piece.text for piece in inp.pieces) == "<s>" + text


def test_unknown_words_are_features():
    tokenizer = TOKENIZERS["word piece"]
    inp = TextSegmentInput("Dave ☃ lives", tokenizer, baselines="delete")
    assert inp.names == ["Dave", " ☃", " lives"]
    assert inp.slots[1].ids == (tokenizer.unk_token_id,)


def test_sentence_is_absent_with_its_special_tokens(tokenizer):
    inp = TextSegmentInput(
        "Dave</s> lives. Go.", tokenizer, "sentence", baselines=lambda s, g: [7, 8]
    )
    assert inp.names == ["Dave</s> lives.", " Go."]
    assert _render(inp, [False, True]) == (1, 7, 8, *inp.slots[1].ids)


def test_explicit_spans_leave_the_rest_fixed(tokenizer):
    text = "Dave lives in Palm Coast, FL."
    inp = TextSegmentInput(text, tokenizer, [(14, 24), (26, 28)], baselines="delete")
    assert inp.names == ["Palm Coast", "FL"]
    assert tokenizer.decode(_render(inp, [False, True])) == "<s>Dave lives in, FL."
    assert [piece.text for piece in inp.pieces if piece.feature is None] == [
        "<s>",
        "Dave lives in",
        ",",
        ".",
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_replacement_text_is_tokenised_in_place(name):
    tokenizer = TOKENIZERS[name]
    inp = TextSegmentInput(
        "Dave lives in Austin",
        tokenizer,
        baselines=["Ann", "golf", "  and", "Palm Coast"],
    )
    whole = tokenizer.encode("Ann golf and Palm Coast")
    assert list(_render(inp, [False] * 4)) == list(whole)
    assert list(_render(inp, [False, True, True, True])) == list(
        tokenizer.encode("Ann lives in Austin")
    )


def test_draws_follow_generator_and_draw_number(tokenizer):
    inp = TextSegmentInput("Dave lives in", tokenizer, baselines=[["Ann", "Bob", "Eve"], "x", "y"])
    masks = torch.tensor([[False, True, True]] * 40)
    rows = [row.ids for row in inp.render(masks, _generator())]
    assert len(set(rows)) == 3
    assert [row.ids for row in inp.render(masks, _generator())] == rows
    assert [row.ids for row in inp.render(masks, _generator(1))] != rows
    # Rows of one draw agree, also where they lack other features as well.
    masks[1::2] = torch.tensor([False, False, True])
    pairs = inp.render(masks, _generator(), torch.arange(40) // 2)
    names = [tokenizer.decode(row.ids).split()[0] for row in pairs]
    assert names[::2] == names[1::2]
    assert set(names) == {"<s>Ann", "<s>Bob", "<s>Eve"}
    # A draw does not depend on how many others there are.
    few = inp.render(masks[:4], _generator(), torch.arange(4) // 2)
    assert few == pairs[:4]


@pytest.mark.parametrize("unit", ["token", ("paragraph", "sentence", "word")])
def test_long_prompt_takes_no_quadratic_time(tokenizer, unit):
    # 100,000 characters and 22,000 words: a quadratic step would run for minutes.
    text = "Dave lives in Palm Coast, FL and is a lawyer. " * 2200
    inp = TextSegmentInput(
        text, tokenizer, unit, fixed=[(47 * i, 47 * i + 4) for i in range(2000)], baselines="delete"
    )
    assert inp.n_features > 19_500
    assert _render(inp, [True] * inp.n_features) == inp.ids


def test_input_is_a_captum_interpretable_input(tokenizer):
    inp = TextSegmentInput("Dave lives in", tokenizer, baselines="delete")
    assert torch.equal(inp.to_tensor(), torch.ones(1, 3))
    assert inp.to_model_input().tolist() == [tokenizer.encode("Dave lives in")]
    assert inp.to_model_input(torch.tensor([[1.0, 0.0, 1.0]])).tolist() == [
        tokenizer.encode("Dave in")
    ]
    attr = torch.rand(2, 3)
    assert inp.format_attr(attr) is attr


def test_words_sharing_a_token_form_one_feature(tokenizer):
    class Crossing(tiny.NoOffsets):
        is_fast = True

        def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
            return {"input_ids": [9, 10], "offset_mapping": [(0, 8), (8, 13)]}

    inp = TextSegmentInput("New York City", Crossing(tokenizer), baselines="delete")
    assert inp.names == ["New York", " City"]
    with pytest.raises(ValueError, match="owns no whole token"):
        TextSegmentInput("New York City", Crossing(tokenizer), [(0, 3), (4, 8)], baselines="delete")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": ""}, ValueError, "the prompt is empty"),
        ({"text": " \n"}, ValueError, "the prompt is empty"),
        ({"text": 3}, TypeError, "`text` is a int"),
        ({"unit": "phrase"}, ValueError, "unknown unit"),
        ({"unit": [(0, 3), (2, 4)]}, ValueError, "overlap"),
        ({"unit": [(0, 99)]}, ValueError, "leaves the text"),
        ({"baselines": ["a"]}, ValueError, "has 1 entries for 3 features"),
        ({"baselines": ["a", "b", []]}, ValueError, r"baselines\[2\]` is an empty list"),
        ({"baselines": ["a", "b", 3]}, TypeError, r"baselines\[2\]` is 3"),
        ({"baselines": "nonsense"}, ValueError, "not a token of this vocabulary"),
        ({"baselines": {"Dave": "Ann"}}, ValueError, "has nothing for"),
        ({"baselines": 1.5}, TypeError, "`baselines` is a float"),
    ],
)
def test_bad_inputs_are_refused(tokenizer, arguments, error, message):
    settings = {"text": "Dave lives in", "tokenizer": tokenizer} | arguments
    with pytest.raises(error, match=message):
        TextSegmentInput(**settings)


def test_bad_baseline_output_is_refused_by_name(tokenizer):
    inp = TextSegmentInput("Dave lives", tokenizer, baselines=lambda slot, generator: None)
    with pytest.raises(TypeError, match="the baseline returned None for 'Dave'"):
        _render(inp, [False, True])


# --- generated text -------------------------------------------------------------------------------


def _generated(tokenizer, text, unit):
    ids = tokenizer.encode(text, add_special_tokens=False)
    return GeneratedText(ids, tokenizer, unit), ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_output_words_are_whole_tokens(name):
    generated, ids = _generated(TOKENIZERS[name], " golf, chess and golf.", "word")
    texts = ["".join(p.text for p in generated.pieces if p.feature == g) for g in range(4)]
    assert [text.strip().replace(" ,", ",").replace(" .", ".") for text in texts] == [
        "golf,",
        "chess",
        "and",
        "golf.",
    ]
    assert generated.n_features == 4
    assert len(generated.groups) == len(ids)
    firsts = [generated.groups.index(g) for g in range(4)]
    for t, (group, visible, own) in enumerate(
        zip(generated.groups, generated.n_visible, generated.required, strict=True)
    ):
        assert visible == group
        assert own == (None if t in firsts else group)


def test_output_special_tokens_are_separate_words(tokenizer):
    ids = [*tokenizer.encode(" golf.", add_special_tokens=False), 2]
    generated = GeneratedText(ids, tokenizer, "word")
    assert generated.names == [" golf.", "</s>"]


def test_fixed_text_between_output_spans(tokenizer):
    generated, ids = _generated(tokenizer, " golf and chess", [(10, 15)])
    assert generated.names == [" chess"] or generated.names == ["chess"]
    assert generated.groups.count(None) + generated.groups.count(0) == len(ids)
    rows = generated.render([RenderedPrompt((1,))], torch.tensor([[False]]), _generator())
    kept = [i for i, g in zip(ids, generated.groups, strict=True) if g is None]
    assert rows[0].ids == (1, *kept)
    assert rows[0].positions[: len(kept) + 1] == list(range(len(kept) + 1))


def test_empty_row_begins_with_bos(tokenizer):
    generated, ids = _generated(tokenizer, " golf", "token")
    rows = generated.render(
        [RenderedPrompt(())], torch.ones(1, generated.n_features, dtype=torch.bool), _generator()
    )
    assert rows[0].ids == (tokenizer.bos_token_id, *ids[:-1])


class Staying:
    """Says that all slots stay, and that some are drawn anew where their neighbours go, too."""

    deterministic = True

    def __init__(self, bonds):
        self.bonds = bonds

    def __call__(self, slot, generator):
        return slot.text

    def read(self, slots):
        return self.bonds

    def explain(self, slot):
        return BLANK


@pytest.mark.parametrize(
    ("bonds", "expected"),
    [
        (Bonds(), [0, 1, 2, 3, 4]),
        (Bonds(ties=[[1, 2]]), [0, 3, 4]),
        (Bonds(phrases=[[2, 3]]), [0, 1, 2, 3, 4]),
        (Bonds(phrases=[[2, 3]], ties=[[1, 2]]), [0, 4]),
    ],
)
def test_unchanging_features_follow_phrases(bonds, expected, tokenizer):
    inp = TextSegmentInput("Dave lives in Palm Coast", tokenizer, baselines=Staying(bonds))
    assert inp.n_features == 5
    assert inp.unchanging() == expected
    assert inp.with_baselines("delete").unchanging() == []
