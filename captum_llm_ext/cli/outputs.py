"""What a command leaves: a table on stdout, files where the options say."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

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
        parent = Path(name).parent
        if Path(name).is_dir() or not os.access(parent, os.W_OK):
            why = "is a folder" if Path(name).is_dir() else f"cannot be written in {str(parent)!r}"
            raise ValueError(f"--{kind} {name} {why}: give a file in a folder that is there.")


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
        figure()[0].savefig(wanted["png"], dpi=150, bbox_inches="tight", format="png")
    for name in wanted.values():
        if name not in (None, "-"):
            say(f"written: {name}")


def _write_json(name: str, content: Mapping[str, Any]) -> None:
    if name == "-":
        print(as_json(content), flush=True)
    else:
        text = json.dumps(finite(content), ensure_ascii=False, allow_nan=False)
        Path(name).write_text(text + "\n", encoding="utf-8")


def as_json(content: Mapping[str, Any]) -> str:
    """JSON for stdout, in whatever encoding that is."""
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    return json.dumps(finite(content), ensure_ascii=not is_utf8, allow_nan=False)
