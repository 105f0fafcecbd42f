"""Words, sentences, lines and paragraphs of running text."""

import importlib
import re

from captum_llm_ext.segment.named import Named
from captum_llm_ext.segment.span import Segmenter, Span, tiles

_IDEOGRAPHS = (
    "\u3040-\u312f\u3190-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d"
    "\U00020000-\U0003ffff"
)
# Thai, Lao, Burmese, Khmer: their letters, not their digits.
_CLUSTERED = "\u0e01-\u0e46\u0e81-\u0ec6\u1000-\u103f\u1050-\u108f\u1780-\u17d7"
# Scripts written without spaces.
_UNSPACED = _IDEOGRAPHS + _CLUSTERED
_LEADING_VOWELS = "\u0e40-\u0e44\u0ec0-\u0ec4"
# Letters that only go on with what is before them: vowels and signs of repetition, small kana.
_TRAILING = (
    "\u0e2f\u0e30\u0e32\u0e33\u0e45\u0e46\u0eaf\u0eb0\u0eb2\u0eb3\u0ebd\u0ec6\u17d7"
    "\u3005\u303bぁぃぅぇぉっゃゅょゎゕゖァィゥェォッャュョヮヵヶーゝゞヽヾ\uff67-\uff70"
)
_FINAL_BURMESE = r"[\u1000-\u1021](?=\u1037?\u103a)"
_OPENING = r"(\[{«‘“‹「『（【《〈〔〖〘〚［｛｟｢〝"
_WORD = re.compile(
    rf"[{_OPENING}]{{0,4}}[{_LEADING_VOWELS}]*[{_UNSPACED}]"
    rf"(?:{_FINAL_BURMESE}|[{_TRAILING}]|[^\w\s{_OPENING}])*"
    # The bound on brackets keeps the look-ahead, and with it the whole, linear.
    rf"|(?:(?![{_OPENING}]{{1,4}}[{_UNSPACED}])[^\s{_UNSPACED}])+"
)

_LINE_BREAK = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_BREAK = "(?>\r\n|[\n\r\x85\u2028])"
_EMPTY_LINE = rf"(?:{_BREAK}[^\S\n\r\x85\u2028\u2029]*{_BREAK}|\u2029)"
_PARAGRAPH_END = re.compile(_EMPTY_LINE)

_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr rev hon gen col capt lt sgt gov sen rep pres messrs mt ft "
    "vs etc al cf e.g i.e a.m p.m no nos vol pp p fig figs eq sec ch ed eds dept univ approx "
    "inc ltd co corp bros u.s u.k u.n d.c ph.d b.a m.a jan feb mar apr jun jul aug sep sept "
    "oct nov dec mon tue wed thu fri sat sun".split()
)
# These do end sentences as often as not: a capital after them decides.
_MAY_END = frozenset("etc a.m p.m inc ltd co corp jr sr u.s u.k u.n d.c al ph.d b.a m.a".split())
_CLOSING = "\"'”’»）」』\\)\\]\u200e\u200f\u202c\u2069"
_STOP = re.compile(
    # Full-width, Indic, Arabic, Armenian, Ethiopic, Burmese, Khmer: they end sentences only.
    rf"(?P<sure>(?:[。！？｡؟۔।॥։።፧፨။។៕]|．(?!\d))+[{_CLOSING}]*)"
    # Looking behind, a run of marks is tried once and not once per mark.
    rf"|(?P<mark>(?<![.!?…])[.!?…]++[{_CLOSING}]*+(?=\s))"
    rf"|(?P<gap>{_EMPTY_LINE})"
    r"|(?P<item>[\n\r](?=[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]))"
)
_WINDOW = 24  # characters before a full stop that can be its abbreviation
_ENUMERATOR = re.compile(r"[\n\r][\s>*#+•-]*\d{1,3}$")


def words(text: str) -> list[Span]:
    """Words with the punctuation attached to them.

    White space separates them, also in Korean. Where a script has none, words are shorter than a
    reader's: one ideograph or kana each (small kana, and marks of length and repetition, stay with
    the one before); in Thai, Lao, Khmer and Burmese one consonant with its vowels and marks, since
    true words need a dictionary: give a callable that has one. No grapheme cluster is ever cut.
    """
    return tiles(text, (match.start() for match in _WORD.finditer(text)))


def sentences(text: str) -> list[Span]:
    """Sentences by rule: abbreviations, initials and decimals end none.

    An empty line and the beginning of a list item always do. The rules are for languages that end
    sentences with ``. ! ? …`` or with a mark that has no other use (``。 । ؟ ።`` …); Thai and Lao
    have none. Abbreviations are English: for other languages see `sentences_of`.
    """
    return tiles(text, (match.end() for match in _STOP.finditer(text) if _ends(match)))


def lines(text: str) -> list[Span]:
    """Lines that hold more than white space; the break belongs to the line after it."""
    return tiles(text, (match.end() for match in _LINE_BREAK.finditer(text)))


def paragraphs(text: str) -> list[Span]:
    """What empty lines (or Unicode's paragraph separator) separate."""
    return tiles(text, (match.end() for match in _PARAGRAPH_END.finditer(text)))


def sentences_of(language: str) -> Segmenter:
    """Sentences by the rules and abbreviations of a language, from the package `sentencex`.

    Args:
        language: ISO 639-1 code such as ``"de"``; `sentencex` knows some 300 and reads unknown
            ones by the rules of a related language or of English.

    Raises:
        ImportError: If `sentencex` is not installed.
    """
    try:
        boundaries = importlib.import_module("sentencex").get_sentence_boundaries
    except ImportError as error:
        raise ImportError(
            "`sentences_of` needs the package sentencex: pip install 'captum-llm-ext[sentences]' "
            "(or use the unit 'sentence', whose rules are built in)."
        ) from error
    return Named(
        f"sentences_of({language!r})",
        lambda text: tiles(text, (found["start_index"] for found in boundaries(language, text))),
    )


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
    # Bounded: in "! ! ! …" every mark would otherwise read to the end of the text.
    match = _LETTER.search(text, position, position + 40)
    return match.group() if match else ""
