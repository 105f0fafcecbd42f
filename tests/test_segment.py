import pytest
from hypothesis import given
from hypothesis import strategies as st

from captum_llm_ext.segment import Span, segment, sentences, words


def _cut(text, spans):
    return [text[start:stop] for start, stop in spans]


def test_white_space_belongs_to_the_following_word():
    text = "Dave  lives\nin FL. "
    assert _cut(text, words(text)) == ["Dave", "  lives", "\nin", " FL. "]


def test_words_of_scripts_without_spaces():
    text = "東京は、日本。 and more"
    assert _cut(text, words(text)) == ["東", "京", "は、", "日", "本。", " and", " more"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", " Two!", " Three?"]),
        ("Dr. No paid 3.5 million.", ["Dr. No paid 3.5 million."]),
        ("J. R. Smith left. He ran.", ["J. R. Smith left.", " He ran."]),
        ("Use e.g. this one. Then go.", ["Use e.g. this one.", " Then go."]),
        ("We met at 5 p.m. on May 3. It rained.", ["We met at 5 p.m. on May 3.", " It rained."]),
        ("We left at 5 p.m. She stayed.", ["We left at 5 p.m.", " She stayed."]),
        ('"Go!" he said. "Now."', ['"Go!" he said.', ' "Now."']),
        ("Wait... what? Yes.", ["Wait... what?", " Yes."]),
        ("It was I. You knew.", ["It was I.", " You knew."]),
        ("A heading\n\nA sentence.\r\nAnother.", ["A heading", "\n\nA sentence.", "\r\nAnother."]),
        ("東京は首都です。人が多い。", ["東京は首都です。", "人が多い。"]),
        ("no end", ["no end"]),
        ("end. ", ["end. "]),
    ],
)
def test_sentences(text, expected):
    assert _cut(text, sentences(text)) == expected


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_words_and_sentences_tile_the_text(text):
    for cut in (words, sentences):
        spans = cut(text)
        assert "".join(_cut(text, spans)) == (text if text.strip() else "")
        assert all(text[start:stop].strip() for start, stop in spans)


def test_spans_come_in_reading_order():
    assert segment("one two three", [(4, 7), (0, 3)]) == [Span(0, 3), Span(4, 7)]


@pytest.mark.parametrize(
    ("unit", "error", "message"),
    [
        ([(0, 3), (2, 5)], ValueError, r"\(0, 3\) and \(2, 5\) overlap"),
        ([(0, 99)], ValueError, "leaves the text of 13 characters"),
        ([(-1, 3)], ValueError, "leaves the text"),
        ([(3, 3)], ValueError, "is empty"),
        ([], ValueError, "finds no feature"),
        ([(0, 1, 2)], TypeError, r"no \(start, stop\)"),
        ([(0.0, 1.0)], TypeError, r"no \(start, stop\)"),
        ("phrase", ValueError, "unknown unit 'phrase'.*'word'"),
        (3, TypeError, "`unit` is a int"),
        (lambda text: [(0, 50)], ValueError, "leaves the text"),
    ],
)
def test_bad_units_say_what_to_do(unit, error, message):
    with pytest.raises(error, match=message):
        segment("one two three", unit)
