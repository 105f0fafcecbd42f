"""Properties of stdout: whether it is a terminal, its width and colours."""

import os
import shutil
import sys
import unicodedata

# Bright blue raises and bright red lowers, as in plots; signs are shown as well.
_COLOURS = {"token": "1", "raises": "94", "lowers": "91", "size": "95", "nothing": "2"}
_JOINERS = "\u200c\u200d"  # parts of the spelling of words and emoji, harmless for layout


def is_terminal() -> bool:
    """Whether stdout is a terminal, rather than a file, a pipe or a notebook."""
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):  # none, a custom object, or closed
        return False


def width() -> int | None:
    """Columns of the terminal; None if lines may have any length."""
    return shutil.get_terminal_size().columns if is_terminal() else None


def paint(text: str, kind: str) -> str:
    """Text in the colour of its kind, where stdout is a terminal that wants colours.

    ``NO_COLOR`` is respected (no-color.org).

    Args:
        text: The text.
        kind: ``"token"``, ``"raises"``, ``"lowers"``, ``"size"`` (without a sign) or ``"nothing"``.
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not is_terminal() else f"\x1b[{_COLOURS[kind]}m{text}\x1b[0m"


def columns(text: str) -> int:
    """The width of a line in terminal columns."""
    return sum(map(_columns_of, text))


def shortened(text: str, most: int) -> str:
    """The beginning of a line, limited to `most` columns; a closing quotation mark is kept."""
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
    """Text as one line, with control characters escaped."""
    return "".join(
        char if char.isprintable() or char in _JOINERS else _shown(char) for char in text
    )


def spelled(text: str) -> str:
    """`one_line` of stripped text; white space alone is made visible: ``\\n``, ``␣``.

    Empty only for an empty text.
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
