"""What stdout is: whether a terminal, how wide, and whether it wants colours."""

import os
import shutil
import sys
import unicodedata

# Bright blue raises and bright red lowers, as in the pictures; the signs are there as well.
_COLOURS = {"token": "1", "raises": "94", "lowers": "91", "size": "95", "nothing": "2"}
_JOINERS = "\u200c\u200d"  # parts of how words and emoji are written, not tricks of layout


def is_terminal() -> bool:
    """Whether what is printed goes to a terminal, not to a file, a pipe or a notebook."""
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):  # none, something of the user's own, or closed
        return False


def width() -> int | None:
    """Columns of the terminal; None where lines may be as long as they like."""
    return shutil.get_terminal_size().columns if is_terminal() else None


def paint(text: str, kind: str) -> str:
    """Text in the colour of its kind, where stdout is a terminal that wants colours.

    ``NO_COLOR`` is respected (no-color.org).

    Args:
        text: What is shown.
        kind: ``"token"``, ``"raises"``, ``"lowers"``, ``"size"`` (without a sign) or ``"nothing"``.
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not is_terminal() else f"\x1b[{_COLOURS[kind]}m{text}\x1b[0m"


def columns(text: str) -> int:
    """How many columns of a terminal a line takes."""
    return sum(map(_columns_of, text))


def shortened(text: str, most: int) -> str:
    """The beginning of a line that takes `most` columns at most; a closing quotation mark stays."""
    if columns(text) <= most:
        return text
    missing = "…”" if text.endswith("”") and "“" in text[: most // 2] else "…"
    kept, taken = "", len(missing)
    for char in text:
        taken += _columns_of(char)
        if taken > most:
            break
        kept += char
    behind = kept.rpartition(" ")[0].rstrip()
    is_within = not text[len(kept)].isspace() and not kept.endswith(" ")
    kept = behind if is_within and columns(behind) >= most // 2 else kept
    return kept.rstrip() + missing


def one_line(text: str) -> str:
    """Text as one line that says what it holds: a terminal would obey control characters."""
    return "".join(
        char if char.isprintable() or char in _JOINERS else _shown(char) for char in text
    )


def spelled(text: str) -> str:
    """`one_line` of what stands between white space; white space alone is spelled: ``\\n``, ``␣``.

    Empty only where the text is.
    """
    return one_line(text.strip()) or one_line(text).replace(" ", "␣")


def _shown(char: str) -> str:
    if char.isspace() and char not in "\n\r\t\v\f":
        return " "
    return char.encode("unicode_escape").decode()


def _columns_of(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
