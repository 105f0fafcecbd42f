"""What a command leaves: a table on stdout, files where the options say."""

import argparse
import io
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, Literal

from captum_llm_ext.base import files
from captum_llm_ext.cli.command import UsageError, say
from captum_llm_ext.result.files import finite

Kind = Literal["html", "png", "json", "save"]
_HELP: dict[Kind, str] = {
    "html": "a page: the text, with causes on hover",
    "png": "a picture",
    "json": "the numbers as JSON; - is stdout, in place of the table",
    "save": "the whole result, for show and compare",
}


def add_outputs(parser: argparse.ArgumentParser, *kinds: Kind) -> None:
    """Adds options for files of these kinds."""
    group = parser.add_argument_group("what is written")
    for kind in kinds:
        group.add_argument(f"--{kind}", metavar="FILE", help=_HELP[kind])


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuses files that could not be written, before anything costly is done.

    Raises:
        UsageError: If two are the same file, or one that stdout does not take is to go there.
        ValueError: If there is no folder to write one in.
    """
    taken: dict[str, Kind] = {}
    for kind in _HELP:
        name = getattr(arguments, kind, None)
        if name is None or (kind == "json" and name == "-"):
            continue
        if name == "-":
            raise UsageError(f"--{kind} -: only --json goes to stdout, give a file.")
        same = taken.setdefault(os.path.realpath(name), kind)
        if same != kind:
            raise UsageError(f"--{same} and --{kind} are the same file {name!r}: give two.")
        try:
            files.check_place(name)
        except OSError as error:
            is_folder = isinstance(error, IsADirectoryError)
            why = "is a folder" if is_folder else f"cannot be written ({error.strerror})"
            raise ValueError(
                f"--{kind} {name} {why}: give a file in a folder that is there."
            ) from error


def write_outputs(arguments: argparse.Namespace, found: Any, text: str, figure: Any) -> None:
    """Prints the text, or JSON in its place, and writes the files.

    Args:
        arguments: Options of `add_outputs`.
        found: A result or a comparison.
        text: What is printed.
        figure: Called for ``(figure, axes)`` if a picture is wanted.
    """
    wanted = {kind: getattr(arguments, kind, None) for kind in _HELP}
    if wanted["json"] is not None:
        _write_json(wanted["json"], found.to_dict())
    if wanted["json"] != "-":
        print(text, flush=True)
    if wanted["save"] is not None:
        found.save(wanted["save"])
    if wanted["html"] is not None:
        found.to_html(wanted["html"])
    if wanted["png"] is not None:
        write_png(wanted["png"], figure()[0])
    for name in wanted.values():
        if name not in (None, "-"):
            say(f"written: {name}")


def write_png(path: files.Path, figure: Any) -> None:
    """Writes a picture of a figure of matplotlib.

    Raises:
        OSError: If it cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, bbox_inches="tight", format="png")
    files.write(path, picture.getbuffer())


def _write_json(name: str, content: Mapping[str, Any]) -> None:
    if name == "-":
        print(as_json(content), flush=True)
    else:
        text = json.dumps(finite(content), ensure_ascii=False, allow_nan=False)
        files.write(name, text + "\n")


def as_json(content: Mapping[str, Any]) -> str:
    """JSON for stdout, in whatever encoding that is."""
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    return json.dumps(finite(content), ensure_ascii=not is_utf8, allow_nan=False)
