"""The blocks of a Markdown document."""

import re
from collections.abc import Iterator
from typing import Literal

from captum_llm_ext.text.segment.span import Span, tiles

Kind = Literal["text", "heading", "rule", "quote", "item", "code", "table", "fence"]

_LINE = re.compile(r"([^\r\n]*)(?:\r\n|\r|\n|\Z)")
_FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})")
_HEADING = re.compile(r"#{1,6}(?:\s|$)")
_RULE = re.compile(r"([-*_])[ \t]*(?:\1[ \t]*){2,}$")
_UNDERLINE = re.compile(r"(?:=+|-+)$")
_ITEM = re.compile(r"(?:[-*+]|(?P<number>\d{1,9})[.)])(?:[ \t]+|$)")
_CELL = re.compile(r"\s*:?-+:?\s*")


def markdown_blocks(text: str) -> list[Span]:
    r"""The blocks of a Markdown document, as defined by CommonMark and GitHub's tables.

    A block is a paragraph, a heading, a fenced or indented code block with its fences, a table, a
    quotation, a thematic break, or one list item at any depth, without the items and fences inside
    it, which are separate blocks. An unclosed fence extends to the end of the text. Reference:
    CommonMark 0.31, section 4; GFM 0.29, section 4.10.

    Example:
        >>> text = "# Title\nText\n- one\n- two"
        >>> [text[start:stop] for start, stop in markdown_blocks(text)]
        ['# Title', '\nText', '\n- one', '\n- two']
    """
    return tiles(text, _beginnings(text))


def _beginnings(text: str) -> Iterator[int]:
    lines = [(match.start(), match[1]) for match in _LINE.finditer(text)]
    scanner = _Scanner()
    following = [line for _, line in lines[1:]] + [""]
    for (start, line), after in zip(lines, following, strict=True):
        if scanner.begins(line, after):
            yield start


class _Scanner:
    """Reads line by line with the minimal state that the rules need."""

    def __init__(self) -> None:
        self._kind: Kind | None = None  # kind of the open block
        self._after_blank = False
        self._fence = ""  # opening fence of the open code block
        self._margins: list[int] = []  # columns at which the texts of the open list items begin

    def begins(self, line: str, following: str) -> bool:
        """Whether a block begins with `line`."""
        content = line.strip()
        if self._fence:
            if len(content) >= len(self._fence) and not content.strip(self._fence[0]):
                self._fence = ""
            return False
        if not content:
            self._after_blank = True
            return False
        indent = len(line[: len(line) - len(line.lstrip())].expandtabs(4))
        kind = self._classify(content, indent, following)
        begins = self._is_new(kind, indent)
        if begins:
            self._open(kind, indent, content)
        elif self._is_underline(content):
            self._kind = "heading"
        self._after_blank = False
        return begins

    def _classify(self, content: str, indent: int, following: str) -> Kind:
        if indent >= 4 and not self._margins:
            return "text" if self._interrupts_text else "code"
        if self._is_underline(content) or self._is_delimiter_row(content):
            return "text"
        if _FENCE.match(content):
            return "fence"
        if _HEADING.match(content):
            return "heading"
        if _RULE.match(content):
            return "rule"
        if content.startswith(">"):
            return "quote"
        if self._is_item(content):
            return "item"
        cells = _cells(following, delimiters=True)
        return "table" if cells is not None and cells == _cells(content) else "text"

    def _is_new(self, kind: Kind, indent: int) -> bool:
        if kind == "code":
            return self._kind != "code"
        if kind == "quote":
            return self._kind != "quote" or self._after_blank
        if kind != "text" or self._kind in (None, "heading", "rule", "fence", "code"):
            return True
        # Indented text continues its list item, also after an empty line.
        of_item = self._kind == "item" and indent >= self._margins[-1]
        return self._after_blank and not of_item

    def _open(self, kind: Kind, indent: int, content: str) -> None:
        self._kind = kind
        if fence := _FENCE.match(content) if kind == "fence" else None:
            self._fence = fence[1] or fence[2]
        while self._margins and indent < self._margins[-1]:
            self._margins.pop()
        if item := _ITEM.match(content) if kind == "item" else None:
            self._margins.append(indent + len(item[0].expandtabs(4)))

    @property
    def _interrupts_text(self) -> bool:
        return self._kind in ("text", "quote", "item") and not self._after_blank

    def _is_underline(self, content: str) -> bool:
        return (
            self._kind == "text" and not self._after_blank and bool(_UNDERLINE.fullmatch(content))
        )

    def _is_delimiter_row(self, content: str) -> bool:
        return (
            self._kind == "table"
            and not self._after_blank
            and _cells(content, delimiters=True) is not None
        )

    def _is_item(self, content: str) -> bool:
        item = _ITEM.match(content)
        if not item:
            return False
        # "…in\n1986. It was" is no list: only 1 interrupts a paragraph, and an empty item does not.
        starts_list = item["number"] in (None, "1") and item.end() < len(content)
        return starts_list or not (self._interrupts_text and self._kind == "text")


def _cells(line: str, *, delimiters: bool = False) -> int | None:
    """The number of cells of a table row, or None if it is not one (or not a row of delimiters)."""
    row = line.strip()
    if "|" not in row:
        return None
    cells = row.removeprefix("|").removesuffix("|").split("|")
    if delimiters and not all(_CELL.fullmatch(cell) for cell in cells):
        return None
    return len(cells)
