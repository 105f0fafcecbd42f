"""Token text as labels, and the fonts that can render it."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable
from typing import Any

from captum_llm_ext.result.plot.style import LABEL_POINTS

# Used only when the text needs them and if installed; bitmap emoji fonts, which matplotlib cannot
# draw, are not among them.
_FALLBACK_FONTS = (
    "DejaVu Sans",  # comes with matplotlib; has the marks for white space
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Noto Sans SC",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Nirmala UI",
    "Arial Unicode MS",
    "Segoe UI Emoji",
    "Noto Emoji",
)


def label(text: str, width: int = 22) -> str:
    """A token's text on one line: white space visible where it matters, long text truncated.

    Args:
        text: The token's text.
        width: Maximum width in characters; Chinese, Japanese and Korean ones count twice.
    """
    inner = text.strip(" ")
    if len(inner) > width:  # line breaks around a passage carry no information
        inner = text.strip()
    if not inner:
        inner = "␣" * len(text) or "∅"
    inner = inner.replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥")
    shown = [drawable(char) for char in inner[: width + 1]]
    if sum(map(_width, shown)) <= width:
        return "".join(shown)
    # Escapes are six to ten characters long: what is truncated is the displayed text.
    while shown and sum(map(_width, shown)) > width - 1:
        shown.pop()
    return "".join(shown) + "…"


def _width(shown: str) -> int:
    """Width of a character or its escape."""
    return len(shown) + sum(unicodedata.east_asian_width(char) in "WF" for char in shown)


def drawable(char: str) -> str:
    """The character, or its escape if no font here can render it."""
    if " " <= char <= "~":  # in every font
        return char
    if char.isprintable() and any(ord(char) in _glyphs(name) for name in _fonts()):
        return char
    return char.encode("unicode_escape").decode("ascii")


def text_style(texts: Iterable[str]) -> dict[str, Any]:
    """Text properties that render token text literally, including ``$`` and ``_``."""
    needed = {ord(char) for text in texts for char in text}
    family: list[str] = []
    for name in _fonts():
        if not family or needed - _glyphs(family[0]) & _glyphs(name):
            family.append(name)
            needed -= _glyphs(name)
    return {"family": family, "size": LABEL_POINTS, "parse_math": False, "usetex": False}


def _fonts() -> list[str]:
    """The user's font, then installed fallback fonts."""
    from matplotlib import font_manager

    default = font_manager.FontProperties()  # follows rcParams at the time of drawing
    path = font_manager.findfont(default)
    own = font_manager.get_font(path).family_name
    installed = set(font_manager.fontManager.get_font_names())
    return [own, *(name for name in _FALLBACK_FONTS if name in installed and name != own)]


@functools.cache
def _glyphs(name: str) -> frozenset[int]:
    """The code points that a font can render."""
    from matplotlib import font_manager

    path = font_manager.findfont(name)
    return frozenset(font_manager.get_font(path).get_charmap())
