"""Files of named tensors and JSON in the safetensors format, with a digest of all content.

A file has its JSON, an object with ``format``, in the metadata under the key of its kind, and in
the metadata ``sha256`` a digest of that text and of every tensor's name, dtype, shape and bytes, so
that any damage is detected. Any safetensors reader can open it; nothing in it is ever executed.
"""

import hashlib
import json
import math
import mmap
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar, cast

import torch
from torch import Tensor

from captum_llm_ext.base import files

T = TypeVar("T")

_DIGEST = "sha256"
_METADATA = "__metadata__"
_ALIGNED = 8  # alignment of the header's length in bytes, so that tensors are aligned
_CHUNK = 1 << 24  # bytes read at a time for a digest; chosen, not measured
# Within this many nanoseconds after a change, the file's times may not show another one. Chosen: a
# clock tick of 10 ms, with a margin of ten.
_TICK = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Errors that readers raise for unexpected content.
BROKEN = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RecursionError,
)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: A name for messages.
        key: Key of its JSON in the metadata.
        format: The current format number; higher ones raise an error.
        advice: What to do about an unusable file.
        digest_since: The first format with a digest.
        oldest: The oldest supported format.
        label: Further metadata, for earlier releases.
        earlier: Metadata of files of earlier releases without the key.
    """

    name: str
    key: str
    format: int
    advice: str
    digest_since: int
    oldest: int
    label: Mapping[str, str] = field(default_factory=dict[str, str])
    earlier: Mapping[str, str] | None = None


@dataclass(frozen=True)
class _Entry:
    """The byte range of a tensor in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def write(
    path: files.Path, kind: Kind, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Writes one file atomically (see `files.write`).

    Args:
        path: The file.
        kind: Its kind.
        tensors: Integers up to 64 bits, floats of 16 to 64 bits, or booleans.
        rest: Other content, as JSON values.

    Raises:
        TypeError, ValueError: If JSON cannot hold the rest, or the format a tensor.
        OSError: If the file cannot be written.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    for name, tensor in plain.items():
        if tensor.dtype not in _NAMES:
            raise TypeError(f"`{name}` is {tensor.dtype}, which these files do not hold.")
    text = json.dumps({"format": kind.format, **rest}, allow_nan=False)
    ordered = sorted(plain, key=lambda name: (-plain[name].element_size(), name))
    contents = ((name, t.dtype, t.shape, iter([_bytes(t)])) for name, t in plain.items())
    metadata = {**kind.label, kind.key: text, _DIGEST: _digest(text, contents)}
    header: dict[str, Any] = {_METADATA: metadata}
    at = 0
    for name in ordered:
        tensor = plain[name]
        end = at + tensor.numel() * tensor.element_size()
        dtype, shape = _NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % _ALIGNED)
    files.write(
        path, [len(raw).to_bytes(8, "little"), raw, *(_bytes(plain[name]) for name in ordered)]
    )


def read(path: files.Path, kind: Kind) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the other content of a file, independent of later changes to it.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        ValueError: If the file is damaged, of another kind, or of an unsupported format.
    """
    with open(path, "rb") as file:
        entries, text, digest, rest = _opened(file, path, kind)
        tensors = _checked(path, kind, lambda: {one.name: _tensor(file, one) for one in entries})
        if digest is not None:
            contents = (
                (e.name, e.dtype, e.shape, iter([_bytes(tensors[e.name])])) for e in entries
            )
            _compare(path, kind, digest, _digest(text, contents))
    return tensors, rest


def read_rest(path: files.Path, kind: Kind) -> dict[str, Any]:
    """The other content of a file; tensors are neither read nor checked for damage.

    Raises:
        OSError, ValueError: As for `read`.
    """
    with open(path, "rb") as file:
        return _opened(file, path, kind)[-1]


def read_mapped(
    path: files.Path, kind: Kind
) -> tuple[dict[str, Tensor], dict[str, Any], "MappedFile"]:
    """Like `read`, with memory-mapped tensors: shared, and read when used.

    Modifying the file later changes them, and if it is truncated, access kills the process. So use
    them between checks of the `MappedFile`.

    Raises:
        OSError, ValueError: As for `read`.
    """
    with open(path, "rb") as file:
        entries, text, digest, rest = _opened(file, path, kind)
        mapped = MappedFile(path, os.dup(file.fileno()), entries, text, digest, kind)
    mapped.check()
    return mapped.tensors(), rest, mapped


class MappedFile:
    """Detects changes of a memory-mapped file since it was opened.

    Replacing the file by another does not affect those who have it open.
    """

    def __init__(
        self,
        path: files.Path,
        descriptor: int,
        entries: Sequence[_Entry],
        text: str,
        digest: str | None,
        kind: Kind,
    ) -> None:
        self._path, self._kind = path, kind
        self._descriptor, self._entries = descriptor, entries
        self._text, self._digest = text, digest
        self._size = os.fstat(descriptor).st_size
        self._known: tuple[int, ...] = ()
        self._is_read = False
        weakref.finalize(self, os.close, descriptor)

    def check(self) -> None:
        """Checks the file's size and times and, if these have changed, its whole content.

        Raises:
            ValueError: If it was changed.
        """
        found = os.fstat(self._descriptor)
        times = found.st_size, found.st_mtime_ns, found.st_ctime_ns
        if times == self._known:
            return
        now = time.time_ns()
        if found.st_size != self._size or self._digest != self._read():
            why = (
                "was changed after it was opened (load it again)"
                if self._is_read
                else _NOT_AS_WRITTEN
            )
            raise ValueError(_refusal(self._path, why, self._kind))
        self._is_read = True
        # A change within the clock's resolution leaves no trace.
        self._known = () if 0 <= now - found.st_ctime_ns < _TICK else times

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, as views of the file."""
        # Changes in memory would go to a copy: the file cannot be modified.
        pages = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)
        return {one.name: _view(pages, one) for one in self._entries}

    def _read(self) -> str:
        contents = (
            (one.name, one.dtype, one.shape, _chunks(self._descriptor, one))
            for one in self._entries
        )
        return _digest(self._text, contents)


_NOT_AS_WRITTEN = "is damaged (what it holds is not what was written)"
_WITHOUT_DIGEST = "was written by an earlier version, without the digest that tells damage"


def _refusal(path: files.Path, why: str, kind: Kind) -> str:
    return f"{os.fspath(path)!r} {why}: {kind.advice}"


def _checked(path: files.Path, kind: Kind, read: Callable[[], T]) -> T:
    try:
        return read()
    except BROKEN as error:
        why = f"is damaged or not a {kind.name} ({str(error) or type(error).__name__})"
        raise ValueError(_refusal(path, why, kind)) from error


def _compare(path: files.Path, kind: Kind, then: str, now: str) -> None:
    if then != now:
        raise ValueError(_refusal(path, _NOT_AS_WRITTEN, kind))


def _opened(
    file: BinaryIO, path: files.Path, kind: Kind
) -> tuple[list[_Entry], str, str | None, dict[str, Any]]:
    """The header of a file: tensors, JSON, digest, and parsed JSON."""
    entries, metadata = _checked(path, kind, lambda: _header(file))
    text, digest = metadata.get(kind.key), metadata.get(_DIGEST)
    if text is None:
        is_earlier = kind.earlier is not None and kind.earlier.items() <= metadata.items()
        why = _WITHOUT_DIGEST if is_earlier else f"is a safetensors file but not a {kind.name}"
        raise ValueError(_refusal(path, why, kind))
    rest = _checked(path, kind, lambda: _parsed(text))
    version = rest["format"]
    if version > kind.format:
        raise ValueError(
            f"{os.fspath(path)!r} was written by a later version (format {version}, this one reads "
            f"up to {kind.format}): update captum-llm-ext."
        )
    if version < kind.oldest:
        raise ValueError(_refusal(path, _WITHOUT_DIGEST, kind))
    if digest is None and version >= kind.digest_since:
        raise ValueError(_refusal(path, _NOT_AS_WRITTEN, kind))
    return entries, text, digest, rest


def _parsed(text: str) -> dict[str, Any]:
    rest: Any = json.loads(text)
    version = rest["format"]
    if type(version) is not int or version < 1:
        raise ValueError(f"its format is {version!r}, not a number from 1")
    return rest


def _header(file: BinaryIO) -> tuple[list[_Entry], dict[str, str]]:
    """The tensors in file order, and the metadata."""
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    first = file.read(8)
    start = 8 + int.from_bytes(first, "little")
    if len(first) < 8 or start > found.st_size:
        raise ValueError("its header is cut off")
    content: Any = json.loads(file.read(start - 8).decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(content, dict):
        raise ValueError("its header is not a JSON object")
    header = cast(dict[str, Any], content)
    metadata: Any = header.pop(_METADATA, {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not strings")
    entries = sorted((_entry(name, header[name], start) for name in header), key=lambda e: e.start)
    at = start
    for one in entries:
        if one.start != at:
            raise ValueError(f"`{one.name}` does not begin where the previous tensor ends")
        at = one.stop
    if at != found.st_size:
        raise ValueError(f"it has {found.st_size} bytes, its header says {at}")
    return entries, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header holds a name twice")
    return found


def _entry(name: str, about: Mapping[str, Any], start: int) -> _Entry:
    dtype, shape = _DTYPES[about["dtype"]], about["shape"]
    begin, end = about["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"the shape of `{name}` or its place is not given by numbers from 0")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"`{name}` has shape {tuple(shape)} and {end - begin} bytes")
    return _Entry(name, dtype, tuple(shape), start + begin, start + end)


def _tensor(file: BinaryIO, entry: _Entry) -> Tensor:
    raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8, device="cpu")
    file.seek(entry.start)
    if cast(Any, file).readinto(_bytes(raw)) != len(raw):
        raise ValueError(f"`{entry.name}` is cut off")
    if entry.dtype == torch.bool and len(raw) and int(raw.max()) > 1:
        raise ValueError(f"`{entry.name}` holds values other than true and false")
    return raw.view(entry.dtype).view(entry.shape)


def _view(pages: mmap.mmap, entry: _Entry) -> Tensor:
    n = math.prod(entry.shape)
    if not n:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    found = torch.frombuffer(pages, dtype=entry.dtype, count=n, offset=entry.start)
    return found.view(entry.shape)


def _chunks(descriptor: int, entry: _Entry) -> Iterator[bytes]:
    for at in range(entry.start, entry.stop, _CHUNK):
        n = min(_CHUNK, entry.stop - at)
        if hasattr(os, "pread"):  # without a file position, which forked processes would share
            yield os.pread(descriptor, n, at)
        else:
            os.lseek(descriptor, at, os.SEEK_SET)
            yield os.read(descriptor, n)


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _digest(
    text: str,
    contents: Iterable[tuple[str, torch.dtype, Sequence[int], Iterator[bytes | memoryview]]],
) -> str:
    """The digest of a file's JSON and of its tensors: name, dtype, shape and bytes in parts."""
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name, dtype, shape, parts in sorted(contents, key=lambda one: one[0]):
        found.update(f"\n{name} {dtype} {tuple(shape)}\n".encode())
        for part in parts:
            found.update(part)
    return found.hexdigest()
