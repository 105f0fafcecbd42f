"""The documents of a corpus: from memory, a data set's column, a text file or JSON Lines."""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast


def documents(
    corpus: Iterable[str] | str | os.PathLike[str], errors: str, field: str = "text"
) -> Iterable[str]:
    """The texts of a corpus. Files are read lazily, line by line.

    Args:
        corpus: Texts, also those of an iterator; a column of a Hugging Face data set; or the path
            of a text file with one document per line, or of a ``.jsonl`` file with one object per
            line. Files may be compressed: ``.txt.gz``, ``.jsonl.gz``.
        errors: ``"strict"`` or ``"replace"``, as for `bytes.decode`.
        field: Key of the document in the objects of a ``.jsonl`` file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is binary, not UTF-8, or not such JSON Lines.
        TypeError: If the corpus is neither a path nor an iterable of texts.
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"`errors` is {errors!r}: give 'strict' or 'replace'.")
    if isinstance(corpus, (str, os.PathLike)):
        file, path = _opened(corpus)
        return _texts(file, path, errors, field)
    _check_columns(corpus)
    if isinstance(corpus, (bytes, bytearray, Mapping)) or not hasattr(corpus, "__iter__"):
        raise TypeError(
            f"`corpus` is a {type(corpus).__name__}: give an iterable of strings, or the path of "
            "a text or .jsonl file."
        )
    return corpus


def _check_columns(corpus: Any) -> None:
    """Refuses tables: iterating over them gives rows or names, not texts."""
    names = getattr(corpus, "column_names", None)
    names = getattr(corpus, "columns", None) if names is None else names
    if names is None or callable(names):
        return
    column = '["text"]'
    if isinstance(names, Mapping):  # the splits of a data set, each with columns
        splits = cast(Mapping[str, list[str]], names)
        column = f"[{next(iter(splits), 'train')!r}]".replace("'", '"') + column
        names = dict.fromkeys(name for columns in splits.values() for name in columns or ())
    raise TypeError(
        f"`corpus` is a {type(corpus).__name__} with the columns {', '.join(map(str, names))}: "
        f"give the one that holds the text, as in `dataset{column}`."
    )


def _opened(corpus: str | os.PathLike[str]) -> tuple[BinaryIO, Path]:
    try:
        path = Path(corpus)
        return cast(BinaryIO, (gzip.open if path.suffix == ".gz" else open)(path, "rb")), path
    # A long text is an invalid file name (OSError), as is one with a NUL (ValueError).
    except (OSError, ValueError) as error:
        shown = str(corpus)
        shown = shown if len(shown) <= 80 else shown[:80] + "…"
        raise FileNotFoundError(
            f"`corpus` is the path {shown!r}, which cannot be read ({error}). "
            "Texts themselves go into a list: `CorpusBaselines([text, …])`."
        ) from error


def _texts(file: BinaryIO, path: Path, errors: str, field: str) -> Iterator[str]:
    is_json = (path.with_suffix("") if path.suffix == ".gz" else path).suffix == ".jsonl"
    with file:
        for number, line in enumerate(_lines(file, path, errors), start=1):
            if not is_json:
                yield from line.splitlines()
            elif line.strip():
                yield _field(line, field, f"{path}, line {number},")


def _lines(file: BinaryIO, path: Path, errors: str) -> Iterator[str]:
    """The lines of a file, split at line feeds only."""
    offset = 0
    try:
        for raw in file:
            line = _decoded(raw, path, offset, errors)
            yield line if offset else line.removeprefix("\ufeff")
            offset += len(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged, or not compressed by gzip ({error}).") from error


def _decoded(raw: bytes, path: Path, offset: int, errors: str) -> str:
    if errors == "strict" and b"\x00" in raw:
        raise ValueError(
            f"{path} is binary: a zero byte at offset {offset + raw.index(0)}. "
            "Give a UTF-8 text file."
        )
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}. "
            'Convert it, or pass errors="replace".'
        ) from error


def _field(line: str, field: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    text = cast(dict[str, Any], entry).get(field) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        found = ", ".join(map(str, cast(dict[str, Any], entry))) if isinstance(entry, dict) else ""
        raise ValueError(
            f'{where} has no string under "{field}": give one object with {{"{field}": …}} per '
            f"line, or name another `field`{f' (there are {found})' if found else ''}."
        )
    return text
