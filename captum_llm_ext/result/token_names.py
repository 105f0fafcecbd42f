"""Readable names of tokens: fragments are marked, and equal names are numbered."""

import unicodedata
from collections import Counter
from collections.abc import Sequence

from captum_llm_ext.text.segment.graphemes import joints
from captum_llm_ext.text.segment.rules import UNSPACED

GOES_ON = "·"
_IN_NUMBERS = ".,"  # between two digits they are part of the number
_JOINERS = "\u200c\u200d"
_FAR = 4  # characters on each side that decide whether a reader sees one word or two; chosen
_WORD_PART = 12  # characters of its word shown on each side of a fragment; chosen


def fragment_names(names: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Names of tokens, with a dot on each side where the word continues: ``"est·"``, ``"·es"``.

    Args:
        names: A printable name of each token.
        texts: The text of each token, white space included; concatenated, they are the whole text.
            A token that is only part of a character has an empty text; its name shows this.

    Returns:
        One name per token.
    """
    return [
        f"{GOES_ON * left}{name}{GOES_ON * right}"
        for name, (left, right) in zip(names, going_on(texts), strict=True)
    ]


def going_on(texts: Sequence[str]) -> list[tuple[bool, bool]]:
    """Per text whether its first word began before it, and whether its last continues after it."""
    shown = [i for i, text in enumerate(texts) if text]
    found = [(False, False)] * len(texts)
    left = False
    for place, here in enumerate(shown):
        last = place + 1 == len(shown)
        right = not last and _is_inside_word(texts, here, shown[place + 1])
        found[here] = left, right
        left = right
    return found


def is_fragmented(texts: Sequence[str]) -> bool:
    """Whether some word consists of several tokens; texts as for `fragment_names`."""
    return any(not text for text in texts) or any(left for left, _ in going_on(texts))


def words_around(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Per text the rest of the word that it is a fragment of, before and after.

    For long words the nearest characters; both are empty if a text is not a fragment.
    """
    edges = going_on(texts)
    found: list[tuple[str, str]] = []
    for i, (left, right) in enumerate(edges):
        before, after = "", ""
        k = i
        while left and len(before) < _WORD_PART and k > 0:
            k -= 1
            before = texts[k] + before
            left = edges[k][0] or not texts[k]
        k = i
        while right and len(after) < _WORD_PART and k + 1 < len(texts):
            k += 1
            after += texts[k]
            right = edges[k][1] or not texts[k]
        before = before.rsplit(maxsplit=1)[-1] if before.strip() else ""
        found.append((before[-_WORD_PART:], after[:_WORD_PART].rstrip()))
    return found


def numbered_where_alike(names: Sequence[str]) -> list[str]:
    """The same names, numbered from 1 where several are equal: ``"the #4"``."""
    count = Counter(name.strip() for name in names)
    return [
        name if count[name.strip()] == 1 else f"{name} #{i}"
        for i, name in enumerate(names, start=1)
    ]


def _is_inside_word(texts: Sequence[str], here: int, after: int) -> bool:
    before, behind = texts[here][-_FAR:], texts[after][:_FAR]
    if len(before) in joints(before + behind) and not behind[0].isspace():
        return True
    last, first = before[-1], behind[0]
    if _is_spelled(last) and _is_spelled(first):
        return True
    # A point or a comma between digits, on either side of the border.
    if first in _IN_NUMBERS and last.isdigit():
        following = texts[after][1:2] or next((t for t in texts[after + 1 :] if t), "")[:1]
        return following.isdigit()
    if last in _IN_NUMBERS and first.isdigit():
        preceding = texts[here][-2:-1] or next((t for t in reversed(texts[:here]) if t), "")[-1:]
        return preceding.isdigit()
    return False


def _is_spelled(character: str) -> bool:
    """Whether a character is a letter, mark or digit of a script that separates words by spaces."""
    if character in _JOINERS:
        return True
    return unicodedata.category(character)[0] in "LMN" and not UNSPACED.match(character)
