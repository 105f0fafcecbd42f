"""Where a text must not be split: inside a grapheme cluster.

Implements Unicode Standard Annex #29, section 3.1 (extended grapheme clusters), with the tables of
the running Python. If those lack a property, positions are joined rather than split: every joint of
the Annex is one here, and a few more are.
"""

import re
import unicodedata
from itertools import pairwise

_ZWJ = "\u200d"
_MARKS = frozenset({"Mn", "Mc", "Me"})
_CONTROLS = frozenset({"Cc", "Zl", "Zp"})
# They extend the previous character without being marks: non-joiner, half-width voiced marks, skin
# tones, tags (flags of regions), and the Thai and Lao AM.
_EXTENDING = frozenset(
    [_ZWJ, "\u200c", "\uff9e", "\uff9f", "\u0e33", "\u0eb3"]
    + [chr(code) for code in (*range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080))]
)
_PREPENDED = frozenset(
    chr(code)
    for code in (
        *range(0x0600, 0x0606),
        *(0x06DD, 0x070F, 0x0890, 0x0891, 0x08E2, 0x0D4E, 0x110BD, 0x110CD, 0x111C2, 0x111C3),
        *(0x113D1, 0x1193F, 0x11941, 0x11A3A, *range(0x11A84, 0x11A8A), 0x11D46, 0x11F02),
    )
)
_HANGUL_LEAD = re.compile("[\u1100-\u115f\ua960-\ua97c]")
_HANGUL_TAIL = re.compile("[\u1160-\u11ff\ud7b0-\ud7ff]")
_HANGUL = re.compile("[\u1100-\u11ff\ua960-\ua97c\uac00-\ud7ff]")
_FLAG = re.compile("[\U0001f1e6-\U0001f1ff]{2}")
_VIRAMA = 9  # canonical combining class
# Characters of that class that end a syllable and stack nothing: Thai phinthu, Burmese asat.
_KILLERS = frozenset("\u0e3a\u103a")


def joints(text: str) -> set[int]:
    """The positions in `text` inside a grapheme cluster, which must not be split."""
    found = {match.start() + 1 for match in re.finditer("\r\n", text)}
    if text.isascii():
        return found
    found.update(match.start() + 1 for match in _FLAG.finditer(text))
    stacking = False
    for position, (before, after) in enumerate(pairwise(text), start=1):
        # A virama joins the next letter, whatever marks are in between (GB9c).
        if unicodedata.category(before) in _MARKS:
            stacking |= unicodedata.combining(before) == _VIRAMA and before not in _KILLERS
        elif before != _ZWJ:
            stacking = False
        if (stacking and after.isalpha()) or _joined(before, after):
            found.add(position)
    return found


def _joined(before: str, after: str) -> bool:
    if after < "\u0300" and before not in _PREPENDED:
        return before == _ZWJ and not after.isspace()
    kind, next_kind = unicodedata.category(before), unicodedata.category(after)
    if kind in _CONTROLS or next_kind in _CONTROLS:
        return False
    return (
        next_kind in _MARKS
        or after in _EXTENDING
        or before in _PREPENDED
        or (before == _ZWJ and not after.isspace())
        or bool(_HANGUL.match(before) and _HANGUL_TAIL.match(after))
        or bool(_HANGUL_LEAD.match(before) and _HANGUL.match(after))
    )
