"""The documents of a corpus: from memory, a text file or a JSON Lines file."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def documents(corpus: Iterable[str] | str | os.PathLike[str], errors: str) -> Iterable[str]:
    """The texts of a corpus, read if a path is given.

    Args:
        corpus: Texts; or the path of a text file with one document per line, or of a ``.jsonl``
            file whose objects hold the document under ``"text"``.
        errors: ``"strict"`` or ``"replace"``, as for `bytes.decode`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is binary, not UTF-8, or not the JSON Lines wanted.
        TypeError: If the corpus is neither a path nor an iterable of texts.
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"`errors` is {errors!r}: give 'strict' or 'replace'.")
    if isinstance(corpus, (str, os.PathLike)):
        return _read(corpus, errors)
    if isinstance(corpus, (bytes, Mapping)) or not hasattr(corpus, "__iter__"):
        raise TypeError(
            f"`corpus` is a {type(corpus).__name__}: give an iterable of strings, or the path of "
            "a text or .jsonl file."
        )
    return corpus


def _read(corpus: str | os.PathLike[str], errors: str) -> list[str]:
    try:
        path = Path(corpus)
        content = path.read_bytes()
    # A long text is no valid file name: OSError; one that holds a NUL: ValueError.
    except (OSError, ValueError) as error:
        shown = str(corpus)
        shown = shown if len(shown) <= 80 else shown[:80] + "…"
        raise FileNotFoundError(
            f"`corpus` is the path {shown!r}, which cannot be read ({error}). "
            "Texts themselves go into a list: `CorpusBaselines([text, …])`."
        ) from error
    lines = _decode(content, path, errors).splitlines()
    return _fields(lines, path) if path.suffix == ".jsonl" else lines


def _decode(content: bytes, path: Path, errors: str) -> str:
    if errors == "strict" and b"\x00" in content:
        raise ValueError(
            f"{path} is binary: a zero byte at offset {content.index(0)}. Give a UTF-8 text file."
        )
    try:
        return content.decode("utf-8", errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}. "
            'Convert it, or pass errors="replace".'
        ) from error


def _fields(lines: list[str], path: Path) -> list[str]:
    found: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}.") from error
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f'{path}, line {number}, has no string under "text": give one object with '
                '{"text": …} per line.'
            )
        found.append(text)
    return found
