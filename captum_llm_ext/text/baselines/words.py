"""Text as atoms: words and punctuation marks, in any script."""

import functools
import re
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

BREAK = "\n"
"""The atom of every line break, and of the start and end of a document."""

SENTENCE_ENDS = frozenset(".!?…。！？।")

CLAUSE_MARKS = SENTENCE_ENDS | frozenset(',;:、，；：؛،()[]{}"“”„«»—–')
"""Punctuation that separates parts of a text; other signs (&, %, +) join them."""

# The form of a word; every other atom (a punctuation mark) is its own kind.
KINDS = ("number", "upper", "capital", "lower", "letters", "symbol")

# Strength of an atom as a border: a replacement contains none that is stronger than those within
# the text it replaces.
WORD, MARK, SENTENCE_END, LINE_BREAK = range(4)

_LONG = 10_000  # texts longer than this are not cached as atoms; chosen, not measured

_JOINING = "'’‐-"  # between letters, these are a part of their word

# Scripts written without spaces: every character, with its combining marks, is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_FLAG = "\U0001f1e6-\U0001f1ff"
_SKIN = "\U0001f3fb-\U0001f3ff"
_LINE_BREAK = re.compile("[\n-\r\x1c-\x1e\x85\u2028\u2029]")  # where `str.splitlines` splits


@dataclass(frozen=True, slots=True)
class Atom:
    """One atom of a text: ``text`` stands at ``[start, stop)``."""

    text: str
    start: int
    stop: int


@functools.cache
def _pattern() -> re.Pattern[str]:
    # `\w` excludes combining marks and vowel signs, and would split words of most Indic scripts.
    marks = "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c)[0] == "M")
    extend = f"[{re.escape(marks)}\U000e0100-\U000e01ef{_SKIN}]"
    letters = f"[^\\W{_UNSPACED}]+(?:{extend}+[^\\W{_UNSPACED}]*)*"
    symbol = rf"[^\s]{extend}*"
    atom = "|".join(
        (
            r"\d+(?:[.,:]\d+)+(?!\w)",
            rf"{letters}(?:[{_JOINING}]{letters})*",
            f"[{_FLAG}]{{2}}",
            rf"{symbol}(?:\u200d{symbol})*",
        )
    )
    return re.compile(rf"\s*(?:{atom})")


def chunks(piece: str) -> Iterable[str]:
    """The atoms of a text without white space."""
    if len(piece) <= _LONG:
        return _pattern().findall(piece)
    return (match.group() for match in _pattern().finditer(piece))


def atoms(text: str) -> list[Atom]:
    """The atoms of a text, with a `BREAK` wherever white space contains a line break."""
    found: list[Atom] = []
    for match in _pattern().finditer(text):
        word = match.group().lstrip()
        start = match.end() - len(word)
        if _LINE_BREAK.search(text, match.start(), start):
            found.append(Atom(BREAK, start, start))
        found.append(Atom(word, start, match.end()))
    return found


def kind(word: str) -> str:
    """One of `KINDS`, or the mark itself for punctuation and `BREAK`."""
    first = word[0]
    if first.isdigit():
        return "number"
    if first.isalpha() or first == "_":
        if len(word) > 1 and word.isupper():
            return "upper"
        if first.isupper() or first.istitle():
            return "capital"
        return "lower" if first.islower() else "letters"
    # Emoji and pictographs carry meaning as words do.
    return "symbol" if unicodedata.category(first) == "So" else sys.intern(word)


@functools.lru_cache(2**14)
def _script(character: str) -> str | None:
    """The script of a letter or digit; None for those shared by several scripts."""
    # Modifier letters ("ー", "ʰ") are used in several scripts.
    has_one = unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lo", "Nd")
    # A letter's name begins with its script's: "KATAKANA LETTER A", "CJK UNIFIED IDEOGRAPH-4E00".
    return unicodedata.name(character, "").partition(" ")[0] if has_one else None


def _scripts(text: str) -> list[str]:
    return [script for script in map(_script, text) if script is not None]


def is_one_word(text: str) -> bool:
    """Whether a text consists only of letters and digits, their marks, hyphens and apostrophes."""
    return all(c.isalnum() or c in "-'’" or unicodedata.category(c)[0] == "M" for c in text)


def may_go_on(text: str) -> bool:
    """Whether a text ends with a word and a mark that may join it with further letters."""
    return text[-1:] in (*_JOINING,) and text[-2:-1].isalnum()


def keeps_script(text: str, own: str) -> bool:
    """Whether a text begins in the script of another one, and has no letter of other scripts.

    Kanji and kana count as two, since they are not interchangeable within a text. A text of letters
    shared by several scripts cannot replace one that has a script.
    """
    found, wanted = _scripts(text), _scripts(own)
    return found[:1] == wanted[:1] and {*found} <= {*wanted, "DIGIT"}


def is_mark(word: str) -> bool:
    """Whether an atom is punctuation or `BREAK`, not a word."""
    return kind(word) not in KINDS


def kind_number(word: str) -> int:
    """Index in `KINDS` of a word's kind; punctuation counts as a symbol."""
    found = kind(word)
    return KINDS.index(found if found in KINDS else "symbol")


def border(word: str) -> int:
    """Strength of an atom as a border, from `WORD` (none) to `LINE_BREAK`."""
    if word == BREAK:
        return LINE_BREAK
    if word in SENTENCE_ENDS:
        return SENTENCE_END
    return MARK if word in CLAUSE_MARKS else WORD
