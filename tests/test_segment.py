import builtins
import re
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from captum_llm_ext.text.segment import (
    Span,
    between,
    blocks,
    lines,
    markdown_blocks,
    nest,
    paragraphs,
    parents,
    pattern,
    segment,
    segmenter,
    sentences,
    sentences_of,
    spans,
    strings,
    words,
)

TILING = [words, sentences, lines, paragraphs, markdown_blocks]
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
WAVE = "\U0001f44b\U0001f3fd"  # with a skin tone
KEYCAP = "1\ufe0f\u20e3"
SCOTLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
FRANCE, GERMANY = "\U0001f1eb\U0001f1f7", "\U0001f1e9\U0001f1ea"

# What goes wrong lives next to what else goes wrong: fragments, not characters, are drawn.
FRAGMENTS = [
    *("a", "B", "3.5", ". ", "! ", "? ", "Dr. ", "e.g. ", "… ", '"', "(", "[", "-", "*", "|"),
    *(" ", "  ", "\t", "\n", "\r", "\r\n", "\n\n", "\u2029", "\u3000", "\u200b", "\ufeff"),
    *("# ", "- ", "1. ", "12) ", "> ", "```", "~~~", "    ", "---", "===", "| - |", "\n|-|-|\n"),
    *("e\u0301", "\u0308", FAMILY, WAVE, KEYCAP, SCOTLAND, FRANCE, GERMANY[0], "\u200d", "\u200c"),
    *("東", "京。", "「", "」", "か\u3099", "ー", "々", "ｶﾞ", "한국", "\u1112\u1161\u11ab", "ㅋ"),
    *("เชียง", "ที่", "น้ำ", "ລາ", "ខ្មែ", "កោះ", "မြန်", "ကောင်း", "က္က", "क्षि", "नि।", "র্", "ர"),
    *("שלום", "\u05e9\u05c1", "سلام؟ ", "\u0600", "۔", "\u200f", "\U000110bd", "𝒳", "\u0e33"),
]
# Only characters that this Python's tables know: joints are theirs.
TEXTS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join),
    st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=40),
)


def _cut(text, found):
    return [text[start:stop] for start, stop in found]


def _clusters(text):
    """Positions where Unicode lets a text be cut, by another implementation."""
    regex = pytest.importorskip("regex")
    return {match.start() for match in regex.finditer(r"\X", text)} | {len(text)}


# Words


def test_white_space_belongs_to_the_following_word():
    text = "Dave  lives\nin FL. "
    assert _cut(text, words(text)) == ["Dave", "  lives", "\nin", " FL. "]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("東京は、日本。 and more", ["東", "京", "は、", "日", "本。", " and", " more"]),
        ("人々は「東京」へ。", ["人々", "は", "「東", "京」", "へ。"]),
        ("ＧＰＴ4は２０２４年", ["ＧＰＴ4", "は", "２０２４", "年"]),
        ("コーヒーをちょっと", ["コー", "ヒー", "を", "ちょっ", "と"]),
        ("か\u3099ｶﾞ", ["か\u3099", "ｶﾞ"]),
        ("see「東京」(now)", ["see", "「東", "京」", "(now)"]),
        ("안녕하세요, 세계!", ["안녕하세요,", " 세계!"]),
        ("हिन्दी में क्षत्रिय।", ["हिन्दी", " में", " क्षत्रिय।"]),
        ("ที่น้ำ แล้ว ๒๕๖๗", ["ที่", "น้ำ", " แล้", "ว", " ๒๕๖๗"]),
        ("เชียงใหม่", ["เชี", "ย", "ง", "ให", "ม่"]),
        ("ພາສາລາວ", ["ພາ", "ສາ", "ລາ", "ວ"]),
        ("ភាសាខ្មែរ", ["ភា", "សា", "ខ្មែ", "រ"]),
        ("မြန်မာကောင်း", ["မြန်", "မာ", "ကောင်း"]),
        ("السلام عليكم، كيف؟", ["السلام", " عليكم،", " كيف؟"]),
        ("שָׁלוֹם עולם", ["שָׁלוֹם", " עולם"]),
        (f"{FAMILY} {WAVE}\n{FRANCE}{GERMANY}", [FAMILY, f" {WAVE}", f"\n{FRANCE}{GERMANY}"]),
        ("cafe\u0301 noir", ["cafe\u0301", " noir"]),
        ("one\r\ntwo\r\n", ["one", "\r\ntwo\r\n"]),
        ("x \u0600 12", ["x", " \u0600 12"]),  # the Arabic number sign holds on to what follows
    ],
)
def test_words(text, expected):
    assert _cut(text, words(text)) == expected


# Sentences


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
        ("A heading\r\n\r\nText", ["A heading", "\r\n\r\nText"]),
        ("Wrapped\r\nline. End.", ["Wrapped\r\nline.", " End."]),
        ("東京は首都です。人が多い。", ["東京は首都です。", "人が多い。"]),
        ("他说：“你好。”然后走了。", ["他说：“你好。”", "然后走了。"]),
        ("価格は３．５円である．次に", ["価格は３．５円である．", "次に"]),
        ("यह एक है। यह दूसरा है॥ और", ["यह एक है।", " यह दूसरा है॥", " और"]),
        ("هل أنت بخير؟ نعم، بخير. شكرا", ["هل أنت بخير؟", " نعم، بخير.", " شكرا"]),
        ("یہ ہے۔ وہ ہے۔", ["یہ ہے۔", " وہ ہے۔"]),
        ("הוא חזר!\u200f נכון?", ["הוא חזר!\u200f", " נכון?"]),
        ("그는 갔다. 왜?", ["그는 갔다.", " 왜?"]),
        ("To do:\n1. Buy it\n2. Eat. Now", ["To do:", "\n1. Buy it", "\n2. Eat.", " Now"]),
        ("See:\n- one\n  * two", ["See:", "\n- one", "\n  * two"]),
        ("no end", ["no end"]),
        ("end. ", ["end. "]),
    ],
)
def test_sentences(text, expected):
    assert _cut(text, sentences(text)) == expected


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("de", "Am 3. Mai kam er z. B. nach Bonn. Er blieb.", 2),
        ("es", "El Sr. Pérez llegó. ¿Sabe Ud. algo?", 2),
        ("en", f"{FAMILY} came.\r\n\r\nIt was e.g. he. 👋 Bye.", 3),
    ],
)
def test_sentences_by_language(language, text, expected):
    pytest.importorskip("sentencex")
    found = segment(text, sentences_of(language))
    assert len(found) == expected
    assert "".join(_cut(text, found)) == text
    assert not any(piece[-1].isspace() for piece in _cut(text, found))


def test_missing_sentencex_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(ImportError, match=r"pip install 'captum-llm-ext\[sentences\]'"):
        sentences_of("de")


def test_sentencex_is_imported_lazily():
    code = "import sys, captum_llm_ext.segment; sys.exit('sentencex' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Lines, paragraphs, Markdown


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028"])
def test_lines_and_paragraphs_accept_every_line_break(end):
    text = end.join(["one", "  two", "", " \t", "three", ""])
    gap = end + end + " \t" + end
    assert _cut(text, lines(text)) == ["one", end + "  two", gap + "three" + end]
    assert _cut(text, paragraphs(text)) == ["one" + end + "  two", gap + "three" + end]


MARKDOWN = [
    ("headings", ["# Title", "\nIntro\ngoes on.", "\n\n## Part", "\t\n\nSetext\n---", "\ntext"]),
    (
        "fence",
        ["Run:", "\n```py\nx = 1\n\n- no item\n# no heading\n```", "\nthen", "\n~~~\n```\n~~~"],
    ),
    ("longer fence", ["````\n```\n```\n````", "\nend"]),
    ("unclosed fence", ["a", "\n\n```\n# x\n\n- y\n"]),
    (
        "nested list",
        [
            "- one\n  goes on",
            "\n  - a",
            "\n    1. deep",
            "\n  - b\n\n    still b",
            "\n- two",
            "\n\nend",
        ],
    ),
    ("loose list", ["1) a", "\n\n2) b", "\n\n\n10) c"]),
    ("fence in a list", ["- a", "\n  ```\n  - x\n  ```", "\n  after", "\n- b"]),
    ("no list", ["It was in\n1986. A good year\n*\nand so on"]),
    ("table", ["Look:", "\n| a | b |\n|---|:-:|\n| 1 | - |\n| 2 | `c` |", "\n\nend"]),
    ("table without pipes outside", ["a | b\n--- | ---\n1 | 2", "\n\n3 | 4"]),
    ("no table", ["a | b\n| - |\nc"]),
    ("quotation", ["> one\n> - two\nlazy", "\n\n> another", "\n\ntext"]),
    ("indented code", ["text\n    goes on", "\n\n    code\n\n    code", "\ntext", "\n\n\tcode"]),
    ("breaks", ["a", "\n\n---", "\n* * *", "\nb"]),
]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("expected", [p for _, p in MARKDOWN], ids=[name for name, _ in MARKDOWN])
def test_markdown_blocks(expected, end):
    expected = [piece.replace("\n", end) for piece in expected]
    text = "".join(expected)
    assert _cut(text, markdown_blocks(text)) == expected


MARKDOWN_LINES = [
    *(
        "text",
        "more words",
        "# head",
        "---",
        "===",
        "* * *",
        "> q",
        "",
        "  goes on",
        "    code",
        "    ",
    ),
    *("- a", "  - b", "    - c", "1. one", "7. seven", "```", "~~~py"),
]


def _blocks_by_markdown_it(text):
    """First lines of blocks by another implementation, quotations and items taken as here."""
    tokens = pytest.importorskip("markdown_it").MarkdownIt("commonmark").parse(text)
    kinds = {"heading_open", "fence", "code_block", "hr", "list_item_open", "paragraph_open"}
    starts, quotes = set(), 0
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "blockquote_open" and not quotes:
            starts.add(token.map[0])
        quotes += token.type.startswith("blockquote") * token.nesting
        # A later paragraph of a list item belongs to the item.
        later = token.level and before.type == "paragraph_close"
        if token.type in kinds and not quotes and not (token.type == "paragraph_open" and later):
            starts.add(token.map[0])
    return starts


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(MARKDOWN_LINES), max_size=8))
def test_markdown_blocks_begin_where_commonmark_says(pieces):
    text = "\n".join(pieces)
    found = markdown_blocks(text)
    contents = [
        start + len(text[start:stop]) - len(text[start:stop].lstrip()) for start, stop in found
    ]
    assert {text.count("\n", 0, start) for start in contents} == _blocks_by_markdown_it(text)


# Chosen parts


def test_pattern_selects_its_matches():
    text = "Born 1907 in Rome, died 1990."
    assert _cut(text, pattern(r"\d+")(text)) == ["1907", "1990"]
    assert _cut(text, pattern(r"in (\w+)", 1)(text)) == ["Rome"]
    assert _cut(text, pattern(re.compile("(?P<verb>BORN|died) ", re.I), "verb")(text)) == [
        "Born",
        "died",
    ]
    # Groups without part in a match, and empty matches, are no features.
    assert pattern(r"(Born)|(died)", 2)(text) == [Span(19, 23)]
    assert pattern(r"x*|\d*")(text) == [Span(5, 9), Span(24, 28)]


def test_matches_extend_to_grapheme_clusters():
    text = f"e\u0301{FAMILY}{FRANCE}{GERMANY}क्षि\r\n"
    every = ["e\u0301", FAMILY, FRANCE, GERMANY, "क्षि", "\r\n"]
    assert _cut(text, pattern("(?s).")(text)) == every
    assert _cut(text, pattern("\U0001f467")(text)) == [FAMILY]


def test_passages_between_markers():
    text = "Read.\n<doc> one </doc>\n<doc>two\n</doc><doc> </doc>\nAnswer."
    assert _cut(text, between("<doc>", "</doc>")(text)) == [" one", "two"]
    tags = between(re.compile(r"<\w+>"), re.compile(r"</\w+>"))
    assert tags(text) == between("<doc>", "</doc>")(text)
    assert _cut('a """b""" c """d"""', between('"""', '"""')('a """b""" c """d"""')) == ["b", "d"]
    # Empty matches mark nothing.
    assert _cut("a<b>c<d>", between(re.compile("<?"), re.compile(">?"))("a<b>c<d>")) == ["b", "d"]


def test_delimiter_separates_blocks():
    text = "Do it.\n###\nQ: 1\nA: 2\n###\n\n###\nQ: 3\nA: "
    assert _cut(text, blocks("###")(text)) == ["Do it.", "\nQ: 1\nA: 2", "\nQ: 3\nA: "]
    rule = blocks(re.compile(r"^#+$", re.M))
    assert rule(text) == blocks("###")(text)


def test_delimiter_begins_blocks():
    text = "Do it.\n\nQ: 1\nA: 2\n\nQ: 3\nA: "
    found = blocks("Q:", delimiter_is="following")(text)
    assert _cut(text, found) == ["Do it.", "\n\nQ: 1\nA: 2", "\n\nQ: 3\nA: "]
    assert _cut("Q: 1", blocks("Q:", delimiter_is="following")("Q: 1")) == ["Q: 1"]


def test_strings_are_found_in_order():
    text = "the cat saw the other cat"
    assert strings(["the", "cat", "the", "cat"])(text) == [
        Span(0, 3),
        Span(4, 7),
        Span(12, 15),
        Span(22, 25),
    ]
    assert _cut(text, segment(text, strings(["saw", "other"]))) == ["saw", "other"]


def test_explicit_spans_are_unchanged():
    assert segment("one two three", spans([(4, 7), (0, 3)])) == [Span(0, 3), Span(4, 7)]


def test_explicit_spans_are_sorted():
    assert segment("one two three", [(4, 7), (0, 3)]) == [Span(0, 3), Span(4, 7)]


@pytest.mark.parametrize(
    "made",
    [
        pattern(r"\d+"),
        pattern(r"(\d)", 1),
        between("<a>", "</a>"),
        between(re.compile("<.>"), "</a>"),
        blocks("##", delimiter_is="following"),
        strings(["a", "b"]),
        spans([(0, 1)]),
    ],
    ids=repr,
)
def test_segmenter_repr_is_its_call(made):
    names = {f.__name__: f for f in (pattern, between, blocks, strings, spans)}
    again = eval(repr(made), {"__builtins__": builtins, "re": re, **names})
    assert repr(again) == repr(made)
    text = "a <a>1 b</a> ## 2"
    assert again(text) == made(text)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pattern("("), ValueError, "not a regular expression"),
        (lambda: pattern("(a)", 2), ValueError, r"no group 2: give one of \[0, 1\]"),
        (lambda: pattern("(?P<x>a)", "y"), ValueError, r"no group 'y'.*'x'"),
        (lambda: between("", "b"), ValueError, "empty marker"),
        (lambda: blocks(""), ValueError, "empty marker"),
        (lambda: blocks("a", delimiter_is="leading"), ValueError, "'fixed', 'following'"),
        (lambda: strings("abc"), TypeError, "list of strings"),
        (lambda: strings(["a", 3]), TypeError, "list of strings"),
        (lambda: strings([]), ValueError, "at least one"),
        (lambda: strings(["a", ""]), ValueError, "none that is empty"),
        (lambda: spans([(0, 1, 2)]), TypeError, r"not a \(start, stop\)"),
    ],
)
def test_bad_segmenter_arguments_fail_early(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        (pattern(r"\d"), r"pattern\('\\\\d'\) finds nothing in the text 'one two three'"),
        (between("one", "four"), "character 0 .* is never closed"),
        (between("four", "five"), "finds nothing"),
        (between("one", "two"), "finds nothing"),
        (blocks("###"), "finds nothing"),
        (blocks("three two", delimiter_is="following"), "finds nothing"),
        (strings(["two", "one"]), "string 1 'one'.*from character 7 on .*at character 0 only"),
        (strings(["one", "four"]), "string 1 'four'.*nowhere"),
    ],
)
def test_segmenter_without_matches_is_refused(unit, message):
    with pytest.raises(ValueError, match=message):
        segment("one two three", unit)


# Units


@pytest.mark.parametrize(
    ("name", "function"),
    list(zip(["word", "sentence", "line", "paragraph", "block"], TILING, strict=True)),
)
def test_units_have_names(name, function):
    assert segmenter(name) is function


@pytest.mark.parametrize("unit", ["word", "sentence", "line", "paragraph", "block"])
@pytest.mark.parametrize("text", ["", " \r\n\t\n "])
def test_white_space_text_has_no_feature(unit, text):
    with pytest.raises(ValueError, match="finds no feature"):
        segment(text, unit)


def no_clause(text):
    """A unit of a user's, which finds none of its parts."""
    return []


@pytest.mark.parametrize(
    ("unit", "error", "message"),
    [
        ([(0, 3), (2, 5)], ValueError, r"\(0, 3\) and \(2, 5\) overlap"),
        ([(0, 99)], ValueError, "leaves the text of 13 characters"),
        ([(-1, 3)], ValueError, "leaves the text"),
        ([(3, 3)], ValueError, "is empty"),
        ([], ValueError, "finds no feature"),
        ([(0, 1, 2)], TypeError, r"not a \(start, stop\)"),
        ([(0.0, 1.0)], TypeError, r"not a \(start, stop\)"),
        (pattern("four"), ValueError, "pattern.*finds nothing"),
        (no_clause, ValueError, "unit no_clause finds no feature"),
        ("phrase", ValueError, "unknown unit 'phrase'.*'word'"),
        ("token", ValueError, "needs a tokenizer"),
        (3, TypeError, "`unit` is a int"),
        (lambda text: [(0, 50)], ValueError, "leaves the text"),
    ],
)
def test_bad_units_are_refused(unit, error, message):
    with pytest.raises(error, match=message):
        segment("one two three", unit)


# What always holds


@settings(max_examples=1000, deadline=None)
@given(TEXTS)
@example("\u0600 a")
@example(" \u0308a \u0308b")
@example("\u200d a\u200db")
def test_segmenters_tile_the_text_and_cut_no_grapheme_cluster(text):
    allowed = _clusters(text)
    for cut in TILING:
        found = cut(text)
        assert "".join(_cut(text, found)) == (text if text.strip() else "")
        for position, (start, stop) in enumerate(found):
            assert text[start:stop].strip()
            assert {start, stop} <= allowed
            if position < len(found) - 1:
                assert not text[stop - 1].isspace()


def _found(choose, text):
    try:
        return choose(text)
    except ValueError:  # what it says is tested above
        return []


@settings(max_examples=1000, deadline=None)
@given(TEXTS, st.sampled_from(["(?s).", r"\w", r"\S", "\u0301", "a|-|\u200d", r"[^\w\s]+"]))
def test_chosen_spans_are_disjoint_and_cut_no_grapheme_cluster(text, regex):
    allowed = _clusters(text)
    choices = [pattern(regex), blocks(re.compile(regex)), between("a", re.compile(regex))]
    for choose in [*choices, blocks(re.compile(regex), delimiter_is="following")]:
        found = _found(choose, text)
        flat = [position for span in found for position in span]
        assert flat == sorted(flat)
        assert all(start < stop for start, stop in found)
        assert set(flat) <= allowed
    matched = {i for match in re.finditer(regex, text) for i in range(*match.span())}
    assert matched <= {i for span in _found(choices[0], text) for i in range(*span)}


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from("ab \n."), min_size=1, max_size=40).map("".join), st.data())
def test_strings_find_any_words_in_order(text, data):
    pieces = text.split()
    wanted = [piece for piece in pieces if data.draw(st.booleans())]
    if wanted:
        found = segment(text, strings(wanted))
        assert _cut(text, found) == wanted


# Nesting


def test_nested_units_and_their_parents():
    text = "A b. C d.\n\nE f.\n"
    coarse, middle, fine = nest(text, ["paragraph", "sentence", "word"])
    assert _cut(text, coarse) == ["A b. C d.", "\n\nE f.\n"]
    assert _cut(text, middle) == ["A b.", " C d.", "\n\nE f.\n"]
    assert _cut(text, fine) == ["A", " b.", " C", " d.", "\n\nE", " f.\n"]
    assert parents(coarse, middle) == [0, 0, 1]
    assert parents(middle, fine) == [0, 0, 1, 1, 2, 2]
    assert parents(coarse, fine) == [0, 0, 0, 0, 1, 1]


def test_overlapping_units_are_split_to_nest():
    text = "One\n\ntwo. Three\nfour."
    assert _cut(text, sentences(text)) == ["One", "\n\ntwo.", " Three\nfour."]
    by_line = nest(text, ["line", "sentence"])[1]
    assert _cut(text, by_line) == ["One", "\n\ntwo.", " Three", "\nfour."]


def test_explicit_spans_nest_in_explicit_spans():
    text = "x <d>a 1 b 22</d> 3 <d>4</d>"
    passages, numbers = nest(text, [between("<d>", "</d>"), pattern(r"\d+")])
    assert _cut(text, numbers) == ["1", "22", "4"]
    assert parents(passages, numbers) == [0, 0, 1]


def test_nested_positions_and_strings_refer_to_the_whole_text():
    text = "A b. C d."
    for unit in ([(0, 1), (4, 6)], spans([(0, 1), (4, 6)]), strings(["A", " C"])):
        coarse, fine = nest(text, ["sentence", unit])
        assert _cut(text, fine) == ["A", " C"]
        assert parents(coarse, fine) == [0, 1]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "at least one"),
        ("word", "at least one"),
        (["sentence", pattern("C")], r"span \(0, 4\) 'A b\.'.*finds nothing"),
        (["sentence", [(0, 1)]], r"span \(4, 9\) ' C d\.'"),
        (["sentence", [(0, 6)]], r"span \(0, 6\) lies within none of the 2"),
        (["sentence", "token"], "needs a tokenizer"),
        ([[(0, 1)], [(2, 3)]], "lies within none"),
    ],
)
def test_nesting_error_names_the_position(units, message):
    with pytest.raises(ValueError, match=message):
        nest("A b. C d.", units)


@settings(max_examples=400, deadline=None)
@given(
    TEXTS.filter(str.strip),
    st.permutations(["word", "sentence", "line", "paragraph", "block"]),
)
def test_any_order_of_units_nests(text, units):
    levels = nest(text, units)
    for coarse, fine in pairwise(levels):
        held = parents(coarse, fine)
        assert held == sorted(held)
        assert set(held) == set(range(len(coarse)))
        for index, outer in enumerate(coarse):
            inside = [span for span, parent in zip(fine, held, strict=True) if parent == index]
            assert "".join(_cut(text, inside)) == text[outer.start : outer.stop]


# Long texts

LONG = 200_000
HOSTILE = [
    *("a", " ", "\n", "\r\n", ". ", "! ", "x. ", "(", "「", "東", "เ", "\u0301", "e\u0301"),
    *(
        FRANCE,
        "\u200d",
        "क्",
        "\u0600",
        "- ",
        "1. x\n",
        "> ",
        "`",
        "|",
        "|-",
        "\t\n",
        "。",
        "\u2029",
    ),
]


def _joined(text, found):
    # A bare truth value: pytest would take hours to explain how two such texts differ.
    return "".join(_cut(text, found)) == text


@pytest.mark.parametrize("part", HOSTILE, ids=ascii)
def test_long_uniform_texts_are_tiled(part):
    # Quadratic work on these would be 2e10 steps: an hour where linear work takes a second.
    text = part * (LONG // len(part)) + "x"
    for cut in TILING:
        assert _joined(text, cut(text))


@pytest.mark.parametrize("part", [".", "\n", " ", "e\u0301", FRANCE, "\u0600"], ids=ascii)
def test_long_uniform_texts_are_searched(part):
    text = part * (LONG // len(part)) + "x"
    assert _joined(text, pattern("(?s).")(text))
    assert _joined(text, blocks(part, delimiter_is="following")(text))
    assert segment(text, strings([part, "x"]))[-1] == Span(len(text) - 1, len(text))


def test_long_text_nests():
    text = "Dr. No paid 3.5 million. He ran!\n\n" * (LONG // 34)
    coarse, middle, fine = nest(text, ["paragraph", "sentence", "word"])
    assert len(middle) == 2 * len(coarse)
    assert len(fine) == 7 * len(coarse)
    assert parents(coarse, middle) == [index // 2 for index in range(len(middle))]
