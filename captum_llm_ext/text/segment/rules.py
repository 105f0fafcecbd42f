"""Rules for the ends of words, lines, paragraphs and sentences, in any script."""

import re
from collections.abc import Iterator

_IDEOGRAPHS = (
    "\u3040-\u312f\u3190-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d"
    "\U00020000-\U0003ffff"
)
# Thai, Lao, Burmese, Khmer: their letters, not their digits.
_CLUSTERED = "\u0e01-\u0e46\u0e81-\u0ec6\u1000-\u103f\u1050-\u108f\u1780-\u17d7"
# Scripts written without spaces.
_UNSPACED = _IDEOGRAPHS + _CLUSTERED
UNSPACED = re.compile(f"[{_UNSPACED}]")
_LEADING_VOWELS = "\u0e40-\u0e44\u0ec0-\u0ec4"
# Letters that only continue the previous one: vowels and signs of repetition, small kana.
_TRAILING = (
    "\u0e2f\u0e30\u0e32\u0e33\u0e45\u0e46\u0eaf\u0eb0\u0eb2\u0eb3\u0ebd\u0ec6\u17d7"
    "\u3005\u303bぁぃぅぇぉっゃゅょゎゕゖァィゥェォッャュョヮヵヶーゝゞヽヾ\uff67-\uff70"
)
_FINAL_BURMESE = r"[\u1000-\u1021](?=\u1037?\u103a)"
_OPENING = r"(\[{«‘“‹「『（【《〈〔〖〘〚［｛｟｢〝"
WORD = re.compile(
    rf"[{_OPENING}]{{0,4}}[{_LEADING_VOWELS}]*[{_UNSPACED}]"
    rf"(?:{_FINAL_BURMESE}|[{_TRAILING}]|[^\w\s{_OPENING}])*"
    # The limit on brackets keeps the look-ahead, and so the whole pattern, linear.
    rf"|(?:(?![{_OPENING}]{{1,4}}[{_UNSPACED}])[^\s{_UNSPACED}])+"
)

LINE_BREAK = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_BREAK = "(?>\r\n|[\n\r\x85\u2028])"
_EMPTY_LINE = rf"(?:{_BREAK}[^\S\n\r\x85\u2028\u2029]*{_BREAK}|\u2029)"
PARAGRAPH_END = re.compile(_EMPTY_LINE)

_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr rev hon gen col capt lt sgt gov sen rep pres messrs mt ft "
    "vs etc al cf e.g i.e a.m p.m no nos vol pp p fig figs eq sec ch ed eds dept univ approx "
    "inc ltd co corp bros u.s u.k u.n d.c ph.d b.a m.a jan feb mar apr jun jul aug sep sept "
    "oct nov dec mon tue wed thu fri sat sun".split()
)
# Abbreviations that often end sentences: decided by a following capital.
_MAY_END = frozenset("etc a.m p.m inc ltd co corp jr sr u.s u.k u.n d.c al ph.d b.a m.a".split())
_CLOSING = "\"'”’»）」』\\)\\]\u200e\u200f\u202c\u2069"
_STOP = re.compile(
    # Full-width, Indic, Arabic, Armenian, Ethiopic, Burmese, Khmer marks, which only end sentences.
    rf"(?P<sure>(?:[。！？｡؟۔।॥։።፧፨။។៕]|．(?!\d))+[{_CLOSING}]*)"
    # The look-behind makes a run of marks be tried once, not once per mark.
    rf"|(?P<mark>(?<![.!?…])[.!?…]++[{_CLOSING}]*+(?=\s))"
    rf"|(?P<gap>{_EMPTY_LINE})"
    r"|(?P<item>[\n\r](?=[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]))"
)
_WINDOW = 24  # characters before a full stop that can be its abbreviation; chosen, not measured
_ENUMERATOR = re.compile(r"[\n\r][\s>*#+•-]*\d{1,3}$")


def sentence_ends(text: str) -> Iterator[int]:
    """One past the last character of each sentence that is followed by another."""
    return (match.end() for match in _STOP.finditer(text) if _ends(match))


def _ends(match: re.Match[str]) -> bool:
    """Whether a sentence ends at a match of `_STOP`."""
    if not match["mark"]:
        return True
    text, mark, after = match.string, match.start(), match.end()
    if match["mark"].startswith("..") or not match["mark"].startswith("."):
        return not _next_character(text, after).islower()
    before = text[max(0, mark - _WINDOW) : mark]
    if _ENUMERATOR.search(before if mark > _WINDOW else "\n" + before):
        return False  # the number of a list item: "1. First"
    word = re.search(r"[\w.]*$", before)
    token = word.group().lower() if word else ""
    if token in _ABBREVIATIONS:
        return token in _MAY_END and _next_character(text, after).isupper()
    if len(token) == 1 and token.isalpha() and before[-1].isupper() and token != "i":
        return False  # an initial: "J. Smith"
    return not _next_character(text, after).islower()


_LETTER = re.compile(r"\w")


def _next_character(text: str, position: int) -> str:
    # Bounded: otherwise, in "! ! ! …", every mark would search to the end of the text.
    match = _LETTER.search(text, position, position + 40)
    return match.group() if match else ""
