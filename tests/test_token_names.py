"""Names of tokens: fragments are seen to be such, and no name stands for two things."""

import pytest

from captum_llm_ext.result.token_names import fragment_names, is_fragmented, numbered_where_alike


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
        ([], []),
    ],
)
def test_fragments_are_marked_where_their_word_goes_on(texts, expected):
    assert fragment_names([text.strip() or text for text in texts], texts) == expected
    assert is_fragmented(texts) == any("·" in name for name in expected)


def test_parts_of_a_character_have_names_of_their_own():
    texts, names = [" ", "", "🎉", "!"], ["␣", "🎉[1/2]", "🎉[2/2]", "!"]
    assert fragment_names(names, texts) == names
    assert is_fragmented(texts)


def test_a_word_goes_on_behind_a_part_of_a_character():
    assert fragment_names(["caf", "é[1/2]", "é[2/2]"], ["caf", "", "é"]) == [
        "caf·",
        "é[1/2]",
        "·é[2/2]",
    ]


def test_names_that_are_alike_have_their_place():
    assert numbered_where_alike(["The", " cat", "the", "The"]) == [
        "The #1",
        " cat",
        "the",
        "The #4",
    ]
    assert numbered_where_alike([]) == []
