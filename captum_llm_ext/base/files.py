"""Writes files atomically."""

import errno
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

CHECKPOINT_ENDING = ".safetensors"
_TOKEN = 8  # random bytes in the name of a temporary file; chosen
_ABANDONED = 60.0  # seconds: younger files may belong to a running process; chosen, not measured
_LINKS = 40  # maximum number of links followed, as in Linux
# Errors of folders that allow no new file, and of files that are mounted or belong to others in
# /tmp.
_KEPT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)
_NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)

Path = str | os.PathLike[str]
Content = str | bytes | bytearray | memoryview


def write(path: Path, content: Content | Sequence[Content]) -> None:
    """Writes a file atomically: on any error it remains as it was.

    The content is written to a temporary file in the same folder and flushed to disk, which then
    replaces the file. An existing file keeps its permissions, a new one follows the umask; for a
    link, the target is written. Devices, pipes and descriptors (``/dev/stdout``) are written
    directly, as is a writable file in a read-only folder: if that fails, its previous content is
    restored.

    Args:
        path: The file.
        content: Text, which is written as UTF-8, or bytes; or several parts of either.

    Raises:
        OSError: If it cannot be written; it names `path`.
    """
    is_one = isinstance(content, str | bytes | bytearray | memoryview)
    parts = cast(Sequence[Content], [content] if is_one else content)
    with _named(path):
        own = _descriptor(os.fspath(path))
        if own is not None:
            _write_open(own, parts)
            return
        target = os.path.realpath(path)
        found = _status(target)
        if found is not None and not stat.S_ISREG(found.st_mode):
            with open(path, "wb", buffering=0) as file:  # the error for a folder arises here
                _put(file, parts)
            return
        if found is not None and not os.access(target, os.W_OK):
            raise _error(errno.EACCES)
        try:
            _replace(target, found, parts)
        except OSError as error:
            if found is None or error.errno not in _KEPT:
                raise
            _overwrite(target, parts)


def check_checkpoint(path: Path) -> None:
    """Checks that a path can hold a checkpoint.

    Raises:
        ValueError: If it is neither a folder, nor a file that ends in ``.safetensors`` in a folder.
    """
    base, ending = os.path.splitext(os.fspath(path))
    # A folder, or one to be created.
    if os.path.isdir(path) or not (ending or os.path.exists(path)):
        return
    if ending != CHECKPOINT_ENDING:
        raise ValueError(
            f"`checkpoint` is {os.fspath(path)!r}: give a file that ends in {CHECKPOINT_ENDING}, "
            "or a folder."
        )
    folder = os.path.dirname(base) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"`checkpoint` lies in {folder!r}, which does not exist.")


def check_place(path: Path) -> None:
    """Checks, without modifying anything, that `write` can write to a path.

    Raises:
        OSError: If it is a folder, its folder is missing, or permissions are missing.
    """
    with _named(path):
        if _descriptor(os.fspath(path)) is not None:
            return
        target = os.path.realpath(path)
        if os.path.isdir(target):
            raise _error(errno.EISDIR)
        if os.path.exists(target):
            may = os.access(target, os.W_OK)
        else:
            folder = os.path.dirname(target)
            if not os.path.isdir(folder):
                raise _error(errno.ENOENT)
            may = os.access(folder, os.W_OK | os.X_OK)
        if not may:
            raise _error(errno.EACCES)


def sweep(folder: Path, name: str) -> None:
    """Removes temporary files that a killed process has left, older than a minute.

    Args:
        folder: The folder.
        name: Pattern of the names of the final files.
    """
    left = re.compile(rf"\.(?:{name})\.[0-9a-z_]+(?:\.tmp)?", re.DOTALL)
    with suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            with suppress(OSError):
                if left.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > _ABANDONED:
                    os.unlink(entry.path)


@contextmanager
def _named(path: Path) -> Generator[None]:
    """Makes errors name the requested file rather than the temporary one."""
    try:
        yield
    except OSError as error:
        message = error.strerror or str(error)
        raise OSError(error.errno or 0, message, os.fspath(path)) from error


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _replace(target: str, found: os.stat_result | None, parts: Sequence[Content]) -> None:
    folder, name = os.path.split(target)
    short = name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")
    temporary = os.path.join(folder, f".{short}.{secrets.token_hex(_TOKEN)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        # The system applies the umask, which can only be read by changing it for all threads.
        with os.fdopen(os.open(temporary, flags, 0o666), "wb", buffering=0) as file:
            if found is not None:
                _keep_owner(file.fileno(), found)
            _put(file, parts)
            _to_disk(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # including Ctrl-C
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _keep_owner(descriptor: int, found: os.stat_result) -> None:
    """Gives a new file the owner and the permissions of another."""
    if not hasattr(os, "fchmod"):
        return
    mode, own = stat.S_IMODE(found.st_mode), os.fstat(descriptor)
    with suppress(OSError):
        if (own.st_uid, own.st_gid) != (found.st_uid, found.st_gid):
            os.fchown(descriptor, found.st_uid, found.st_gid)
    with suppress(OSError):
        os.fchmod(descriptor, mode)


def _overwrite(target: str, parts: Sequence[Content]) -> None:
    with open(target, "r+b", buffering=0) as file:
        before = file.read()
        try:
            file.seek(0)
            _put(file, parts)
            file.truncate()
            _to_disk(file.fileno())
        except BaseException:
            file.seek(0)
            _put(file, [before])  # it did fit before
            file.truncate()
            raise


def _write_open(descriptor: int, parts: Sequence[Content]) -> None:
    """Writes to an open descriptor, at its position."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            if stream.fileno() == descriptor:
                stream.flush()  # earlier output comes first
    with os.fdopen(os.dup(descriptor), "wb", buffering=0) as file:
        _put(file, parts)


def _put(file: IO[Any], parts: Sequence[Content]) -> None:
    for part in parts:
        rest = memoryview(part.encode("utf-8") if isinstance(part, str) else part)
        rest = rest.cast("B") if rest.nbytes else rest[:0]
        while rest:
            rest = rest[file.write(rest) :]


def _to_disk(descriptor: int) -> None:
    """Flushes to disk: some systems only report a full disk here."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def _descriptor(path: str) -> int | None:
    """The open descriptor of a name such as ``/dev/stdout`` or ``/dev/fd/3``.

    It may be a regular file (``> table.txt``), which must not be replaced.
    """
    folders = {"/dev/fd", os.path.realpath("/dev/fd"), f"/proc/{os.getpid()}/fd"}
    for _ in range(_LINKS):
        folder, name = os.path.split(path)
        if name.isdecimal() and os.path.realpath(folder) in folders:
            return int(name)
        if not os.path.islink(path):
            return None
        path = os.path.join(folder, os.readlink(path))
    return None
