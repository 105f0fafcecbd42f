"""Names that a person can read: fragments shown as such, and no two things called the same."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

_GOES_ON = "·"
# Scripts written without spaces: there a token that borders on letters is no fragment of a word.
_UNSPACED = (
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TIBETAN",
    "BOPOMOFO",
)


def fragment_names(names: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Names of tokens, with a dot on each side where the word goes on: ``"est·"``, ``"·es"``.

    Args:
        names: A printable name of each token.
        texts: What each token shows, white space included; put together they are the text. A token
            that holds only a part of a character shows nothing; its name tells already.

    Returns:
        One name per token.
    """
    found: list[str] = []
    for i, (name, text) in enumerate(zip(names, texts, strict=True)):
        before = next((other for other in reversed(texts[:i]) if other), "")
        after = next((other for other in texts[i + 1 :] if other), "")
        left = _GOES_ON if text and _goes_on(before[-1:], text[:1]) else ""
        right = _GOES_ON if text and _goes_on(text[-1:], after[:1]) else ""
        found.append(f"{left}{name}{right}")
    return found


def is_fragmented(texts: Sequence[str]) -> bool:
    """Whether some word of the text is made of several tokens; as `fragment_names`."""
    shown = [text for text in texts if text]
    return len(shown) < len(texts) or any(
        _goes_on(one[-1:], other[:1]) for one, other in pairwise(shown)
    )


def numbered_where_alike(names: Sequence[str]) -> list[str]:
    """The same names, with their place (from 1) where several are alike: ``"the #4"``."""
    count = Counter(name.strip() for name in names)
    return [
        name if count[name.strip()] == 1 else f"{name} #{i}"
        for i, name in enumerate(names, start=1)
    ]


def _goes_on(last: str, first: str) -> bool:
    """Whether a word goes on from one character to the next."""
    return all(map(_is_spelled, (last, first)))


def _is_spelled(character: str) -> bool:
    """Whether it is a letter, a mark on one, or a digit, of a script that parts words by spaces."""
    if not character or unicodedata.category(character)[0] not in "LMN":
        return False
    return not unicodedata.name(character, "").startswith(_UNSPACED)
