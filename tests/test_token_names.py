"""Names of tokens: fragments are seen to be such, and no name stands for two things."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from captum_llm_ext.result.token_names import (
    fragment_names,
    is_fragmented,
    numbered_where_alike,
    words_around,
)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([" How", " est", "es", "?"], ["How", "est·", "·es", "?"]),
        (["c", "om", "o", " o"], ["c·", "·om·", "·o", "o"]),
        ([" 1", "6", "42", "."], ["1·", "·6·", "·42", "."]),
        (["東京", "は", "日本"], ["東京", "は", "日本"]),  # words are not parted by spaces
        (["สวัส", "ดี"], ["สวัส", "ดี"]),
        (["كت", "اب", " جديد"], ["كت·", "·اب", "جديد"]),
        (["한국", "어", " 책"], ["한국·", "·어", "책"]),
        (["get", "_", "name", "("], ["get", "_", "name", "("]),
        (["don", "'t"], ["don", "'t"]),
        (["नम", "स्", "ते"], ["नम·", "·स्·", "·ते"]),
        ([" a", "\n", "b"], ["a", "\n", "b"]),
        ([" 3", ".", "14", "."], ["3·", "·.·", "·14", "."]),
        ([" 1", ",", "642"], ["1·", "·,·", "·642"]),
        (["می\u200c", "خواهم"], ["می\u200c·", "·خواهم"]),
        (["👩", "\u200d💻", "!"], ["👩·", "·\u200d💻", "!"]),  # one picture
        (["ﾊﾝ", "ｶｸ"], ["ﾊﾝ", "ｶｸ"]),
        (["人", "々"], ["人", "々"]),
        ([], []),
    ],
)
def test_word_fragments_are_marked(texts, expected):
    assert fragment_names([text.strip() or text for text in texts], texts) == expected
    assert is_fragmented(texts) == any("·" in name for name in expected)


def test_partial_characters_have_names():
    texts, names = [" ", "", "🎉", "!"], ["␣", "🎉[1/2]", "🎉[2/2]", "!"]
    assert fragment_names(names, texts) == names
    assert is_fragmented(texts)


def test_word_continues_after_a_partial_character():
    assert fragment_names(["caf", "é[1/2]", "é[2/2]"], ["caf", "", "é"]) == [
        "caf·",
        "é[1/2]",
        "·é[2/2]",
    ]


def test_equal_names_get_their_position():
    assert numbered_where_alike(["The", " cat", "the", "The"]) == [
        "The #1",
        " cat",
        "the",
        "The #4",
    ]
    assert numbered_where_alike([]) == []


TEXTS = (
    "comprehensibility is questionable, unquestionably incomprehensible",
    "日本語の文章です。東京は日本の首都です。",
    "اللغة العربية جميلة والكتاب الجديد",
    "def get_name(self, index):\n    return self.names[index]  # 3.14",
    "🎉🎊 party 👩‍💻!",
)


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE tokenizer as language models have them, with few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_names_spell_the_text(byte_level, text):
    """Dots are exactly where a word of letters or a number goes on."""
    tokens = byte_level.encode(text)
    shown, before = [], ""
    for i in range(1, len(tokens.ids) + 1):  # as the package has them: by decoding
        so_far = byte_level.decode(tokens.ids[:i])
        so_far = before if so_far.endswith("\ufffd") else so_far
        shown.append(so_far[len(before) :])
        before = so_far
    assert "".join(shown) == text
    names = fragment_names(shown, shown)
    assert any("·" in name for name in names) or not any(c.isascii() for c in text[:3])
    place = 0
    for name, own in zip(names, shown, strict=True):
        if not own:
            assert name == ""
            continue
        place += len(own)
        inside = text[place - 1 : place + 1]
        if inside.isascii() and inside.isalnum() and len(inside) == 2:
            assert name.endswith("·")
        if text[place - 1].isspace() or text[place : place + 1].isspace():
            assert not name.endswith("·")
    labels = numbered_where_alike(names)
    own = [label for label, part in zip(labels, shown, strict=True) if part]
    assert len(set(own)) == len(own)


def test_cut_word_shows_its_remainder():
    assert words_around([" How", " est", "im", "ates", "?"]) == [
        ("", ""),
        ("", "imates"),
        ("est", "ates"),
        ("estim", ""),
        ("", ""),
    ]
    assert words_around(["a" * 30, "b"])[1] == ("a" * 12, "")
