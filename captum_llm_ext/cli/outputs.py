"""What a command leaves: a table on stdout, files where the options say."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from captum_llm_ext.cli.command import say

Kind = Literal["html", "png", "json", "save"]
_HELP: dict[Kind, str] = {
    "html": "a page: the text, with causes on hover",
    "png": "a picture",
    "json": "the numbers as JSON; - is stdout, in place of the table",
    "save": "the whole result, for show and compare",
}
# Blue raises and red lowers, as in the pictures; the signs are there as well.
_COLOURS = {"token": "1", "raises": "34", "lowers": "31", "nothing": "2"}


def add_outputs(parser: argparse.ArgumentParser, *kinds: Kind) -> None:
    """Adds options for files of these kinds."""
    group = parser.add_argument_group("what is written")
    for kind in kinds:
        group.add_argument(f"--{kind}", metavar="FILE", help=_HELP[kind])


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuses files that could not be written, before anything costly is done.

    Raises:
        ValueError: If there is no folder to write one in.
    """
    for kind in _HELP:
        name = getattr(arguments, kind, None)
        if name is None or (kind == "json" and name == "-"):
            continue
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
    text = json.dumps(content, ensure_ascii=False) + "\n"
    if name == "-":
        sys.stdout.write(text)
    else:
        Path(name).write_text(text, encoding="utf-8")


def paint(text: str, kind: str) -> str:
    """Text in the colour of its kind, where stdout is a terminal that wants colours.

    ``NO_COLOR`` is respected (no-color.org).
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if plain or not sys.stdout.isatty():
        return text
    return f"\x1b[{_COLOURS[kind]}m{text}\x1b[0m"
