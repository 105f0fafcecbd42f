"""Files that options name: read or looked at, with errors that speak of the option."""

import sys
from difflib import get_close_matches
from pathlib import Path

from captum_llm_ext.cli.command import UsageError

_NEAR = 0.8  # how alike names are for one to be meant by the other
_LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it


def read_text(option: str, name: str) -> str:
    """The text of a file, ``-`` is stdin.

    Raises:
        UsageError: If there is none.
    """
    if name == "-":
        return sys.stdin.read()
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{option} {name} is not UTF-8 text ({error}): save it as UTF-8."
        ) from error
    except FileNotFoundError:
        check_there(option, name)
        raise
    except OSError as error:
        raise UsageError(f"{option} {name}: {_trouble(error)}") from error


def check_there(option: str, name: str, *, shown: str | None = None) -> None:
    """Checks that a file or a folder can be there to be read.

    Args:
        option: What names it.
        name: The path.
        shown: What was given, where that is more than the path.

    Raises:
        UsageError: If there is nothing.
    """
    if not Path(name).expanduser().exists():
        near = Path(name).parent
        names = [path.name for path in near.iterdir()] if near.is_dir() else []
        close = get_close_matches(Path(name).name, names, n=1, cutoff=_NEAR)
        instead = f" Did you mean {near / close[0]}?" if close else ""
        raise UsageError(f"{option} {shown or name}: there is no such file.{instead}")


def check_saved(name: str) -> None:
    """Checks that a file begins as saved results do, which says at once what else is given.

    Raises:
        UsageError: If it is none.
    """
    check_there("RESULT", name)
    try:
        with open(name, "rb") as file:
            begin = file.read(9)
    except OSError as error:
        raise UsageError(f"RESULT {name}: {_trouble(error)}") from error
    is_header = begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= _LARGEST_HEADER
    if not is_header:
        raise UsageError(
            f"RESULT {name!r} is damaged or not a saved result: give a file written by --save or "
            "`GenerationAttributionResult.save`."
        )


def _trouble(error: OSError) -> str:
    if isinstance(error, IsADirectoryError):
        return "that is a folder: give a file."
    return f"it cannot be read ({error.strerror})."
