import pytest
import tiny
import tokenizer_layouts
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from captum_llm_ext.text import tokens

TOKENIZERS = {
    "byte-level": tiny.byte_level(),
    "metaspace": tiny.metaspace(),
    "word piece": tiny.word_piece(),
}
TOKENIZERS["no offsets, byte-level"] = tiny.NoOffsets(TOKENIZERS["byte-level"])
TOKENIZERS["no offsets, metaspace"] = tiny.NoOffsets(TOKENIZERS["metaspace"])
TOKENIZERS["no offsets, word piece"] = tiny.NoOffsets(TOKENIZERS["word piece"])
EXACT = [name for name in TOKENIZERS if "byte" in name]
WORDS = st.lists(st.sampled_from("Dave lives golf, 東京 🙂 naïve FL. x chess!".split()), min_size=1)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_token_has_offsets_in_its_own_word(name):
    text = "Dave lives in Palm Coast, FL. golf"
    encoding = tokens.encode(TOKENIZERS[name], text)
    assert list(encoding.ids) == TOKENIZERS[name].encode(text)
    assert encoding.anchors[0] is None  # BOS
    for token, anchor in zip(encoding.ids[1:], encoding.anchors[1:], strict=True):
        shown = tokens.decode(TOKENIZERS[name], [token]).strip().removeprefix("##")
        assert text[anchor:].lower().startswith(shown.lower())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_decoded_offsets_equal_fast_tokenizer_offsets(name):
    if not name.startswith("no offsets"):
        pytest.skip("the reference itself")
    text = "Dave lives in Palm Coast, FL and is a lawyer. His golf 🙂 ends."
    if "word piece" in name or "metaspace" in name:
        text = text.replace("🙂", "chess")
    found = tokens.encode(TOKENIZERS[name], text)
    fast = tokens.encode(TOKENIZERS[name.removeprefix("no offsets, ")], text)
    assert found.ids == fast.ids

    def visible(anchor):
        # A token of white space alone belongs to what follows it.
        return None if anchor is None else anchor + len(text[anchor:]) - len(text[anchor:].lstrip())

    assert list(map(visible, found.anchors)) == list(map(visible, fast.anchors))


def test_byte_tokenizer_with_replacement_characters():
    tokenizer = transformers.ByT5Tokenizer()
    text = "Dave lives, 東京 🙂 ok"
    encoding = tokens.encode(tokenizer, text)
    n_bytes = [len(character.encode()) for character in text]
    expected = [place for place, n in enumerate(n_bytes) for _ in range(n)]
    assert list(encoding.anchors) == [*expected, None]  # and the end of the text


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_pieces_concatenate_to_the_decoded_text(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = tokens.pieces(tokenizer, ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == text


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=50, deadline=None)
@given(WORDS, st.integers(0, 40))
def test_labels_of_a_target_cut_inside_a_character(name, words, cut):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(" ".join(words), add_special_tokens=False)[cut:]
    names = tokens.labels(tokenizer, ids)
    assert len(names) == len(ids)
    assert all(names)


def test_partial_characters_are_labelled(tokenizer):
    ids = tokenizer.encode(" 🙂", add_special_tokens=False)
    names = tokens.labels(tokenizer, ids)
    assert names[-1] == f"🙂[{len(ids) - names.count('␣')}/{len(ids) - names.count('␣')}]"
    assert tokens.labels(tokenizer, tokenizer.encode("\n", add_special_tokens=False)) == ["\\n"]


@pytest.mark.parametrize("name", ["byte-level", "metaspace", "word piece"])
@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS)
def test_in_place_tokenisation_equals_the_whole_text(name, left, right):
    tokenizer = TOKENIZERS[name]
    before, after = " ".join(left), " " + " ".join(right)
    whole = tokenizer.encode(before + after, add_special_tokens=False)
    own = tokenizer.encode(before, add_special_tokens=False)
    assert [*own, *tokens.encode_in_place(tokenizer, after, before)] == whole


def test_bos_in_text_is_not_duplicated(tokenizer):
    assert tokens.encode(tokenizer, "<s>Dave").ids == tokens.encode(tokenizer, "Dave").ids


def test_long_text_takes_no_quadratic_time(tokenizer):
    # 100,000 characters: a quadratic pass would run for minutes.
    text = "Dave lives in Palm Coast, FL and is a lawyer. " * 2200
    slow = tokens.encode(tiny.NoOffsets(tokenizer), text)
    assert slow.anchors == tokens.encode(tokenizer, text).anchors


def test_token_names_equal_captum(tokenizer):
    assert tokens.token_id(tokenizer, "<pad>") == 0
    assert tokens.token_id(tokenizer, "<unk>") == 3
    with pytest.raises(ValueError, match="not a token of this vocabulary"):
        tokens.token_id(tokenizer, "no such token")


class Pieces(tokenizer_layouts.NoOffsets):
    """It decodes to the names of its tokens, as mistral-common does of SentencePiece's."""

    def decode(self, token_ids, skip_special_tokens=False, **unknown):
        return "".join(self.convert_ids_to_tokens([int(i) for i in token_ids]))


@pytest.mark.parametrize(
    "text", ["Dave lives in Palm Coast.", "Grüße 🎉!\n\nNew  line", "▁ <0x41>"]
)
def test_tokenizers_that_decode_to_token_names(text):
    inner = tokenizer_layouts.llama2()
    shown = Pieces(inner)
    ids = inner.encode(text, add_special_tokens=False)
    assert tokens.decode(shown, ids).removeprefix(" ") == tokens.decode(inner, ids)
    names = tokens.labels(shown, ids)
    assert not any("▁" in name or "<0x" in name for name in names)
    start = inner.encode("a", add_special_tokens=False)
    assert tokens.labels(shown, ids, start) == tokens.labels(inner, ids, start)


def test_text_without_bos_follows_a_newline():
    own = tiny.byte_level()
    ids = own.encode("Dave lives")
    assert list(tokens.after_start(own, ids)) == ids
    other = tiny.byte_level()
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    ids = other.encode("Dave lives")
    start, *rest = tokens.after_start(other, ids)
    assert start == other.bos_token_id
    assert own.decode(rest) == "\nDave lives"
