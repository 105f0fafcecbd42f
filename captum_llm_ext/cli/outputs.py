"""Output of commands: text or JSON on stdout, and files."""

import argparse
import io
import json
import os
import sys
import tempfile
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from captum_llm_ext.base import files
from captum_llm_ext.base.finite import finite
from captum_llm_ext.cli.command import UsageError, say

Kind = Literal["html", "png", "svg", "pdf", "json", "save"]
_HELP: dict[Kind, str] = {
    "html": "a page: the text, with causes on hover",
    "png": "a picture",
    "svg": "the same picture, to be scaled",
    "pdf": "the same picture, to be printed",
    "json": "the numbers as one line of JSON; - is stdout, in place of the table",
    "save": "the whole result, for show and compare",
}
PICTURES: tuple[Kind, ...] = ("png", "svg", "pdf")
# File name endings by which other programs open them.
_ENDINGS: dict[Kind, str] = {
    kind: ".safetensors" if kind == "save" else f".{kind}" for kind in _HELP
}


def add_outputs(parser: argparse.ArgumentParser, *kinds: Kind) -> None:
    """Adds the options for files of these kinds."""
    group = parser.add_argument_group("what is written")
    for kind in kinds:
        group.add_argument(f"--{kind}", metavar="FILE", help=_HELP[kind])
    if "html" in kinds:
        group.add_argument(
            "--open",
            action="store_true",
            help="show the page in a browser (without --html, from a folder for passing files)",
        )


def check_outputs(arguments: argparse.Namespace) -> None:
    """Checks that files can be written, before anything expensive.

    Raises:
        UsageError: If two are the same file, one cannot be written to stdout, a name has the wrong
            ending, or the folder of one does not exist.
    """
    taken: dict[str, Kind] = {}
    for kind in _HELP:
        name = getattr(arguments, kind, None)
        if name is None or (kind == "json" and name == "-"):
            continue
        if name == "-":
            raise UsageError(f"--{kind} -: only --json goes to stdout, give a file.")
        ending, given = _ENDINGS[kind], Path(name).suffix.lower()
        others = [other for other, its in _ENDINGS.items() if other != kind and given == its]
        if others or (kind in PICTURES and given != ending):
            may = any(hasattr(arguments, other) for other in others)
            instead = f", or say --{others[0]} {name}" if may else ""
            raise UsageError(f"--{kind} {name}: give a file that ends in {ending}{instead}.")
        same = taken.setdefault(os.path.realpath(name), kind)
        if same != kind:
            raise UsageError(f"--{same} and --{kind} are the same file {name!r}: give two.")
        try:
            files.check_place(name)
        except OSError as error:
            is_folder = isinstance(error, IsADirectoryError)
            why = "is a folder" if is_folder else f"cannot be written ({error.strerror})"
            raise UsageError(
                f"--{kind} {name} {why}: give a file in a folder that is there."
            ) from error


def write_outputs(
    arguments: argparse.Namespace,
    found: Any,
    text: str,
    figure: Any,
    counterfactuals: Sequence[Any] = (),
) -> None:
    """Prints the text, or JSON instead, and writes the files.

    Args:
        arguments: Options of `add_outputs`.
        found: A result or a comparison.
        text: The printed text.
        figure: Returns ``(figure, axes)``; called if a picture is requested.
        counterfactuals: Counterfactuals of a result, for its page and JSON.
    """
    more = {"counterfactuals": counterfactuals} if counterfactuals else {}
    wanted = {kind: getattr(arguments, kind, None) for kind in _HELP}
    if wanted["json"] is not None:
        changes = [one.to_dict() for one in counterfactuals]
        extra = {"counterfactuals": changes} if changes else {}
        _write_json(wanted["json"], found.to_dict() | extra)
    if wanted["json"] != "-":
        print(text, flush=True)
    if wanted["save"] is not None:
        found.save(wanted["save"])
    if wanted["html"] is not None:
        found.to_html(wanted["html"], **more)
    drawn = figure()[0] if any(wanted[kind] is not None for kind in PICTURES) else None
    for kind in PICTURES:
        name = wanted[kind]
        if name is not None:
            write_picture(name, drawn, kind)
    for name in wanted.values():
        if name not in (None, "-"):
            say(f"written: {name}")
    if getattr(arguments, "open", False):
        _open(found, wanted["html"], more)


def write_picture(path: files.Path, figure: Any, kind: Kind = "png") -> None:
    """Writes a matplotlib figure to a file and closes it.

    Raises:
        OSError: If it cannot be written.
    """
    from matplotlib import pyplot

    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=150, bbox_inches="tight", format=kind)
    finally:
        pyplot.close(figure)  # left open: it can be written again in another format
    files.write(path, picture.getbuffer())


def _open(found: Any, name: str | None, more: Mapping[str, Any]) -> None:
    """Opens the page in a browser, or prints its location."""
    if name is None:
        name = os.path.join(tempfile.mkdtemp(prefix="captum-llm-ext-"), "answer.html")
        found.to_html(name, **more)
    place = Path(name).resolve()
    if not webbrowser.open(place.as_uri()):
        say(f"there is no browser to open it with: {place}")


def _write_json(name: str, content: Mapping[str, Any]) -> None:
    if name == "-":
        print(as_json(content), flush=True)
    else:
        text = json.dumps(finite(content), ensure_ascii=False, allow_nan=False)
        files.write(name, text + "\n")


def as_json(content: Mapping[str, Any]) -> str:
    """JSON for stdout, escaped where its encoding requires it."""
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    return json.dumps(finite(content), ensure_ascii=not is_utf8, allow_nan=False)
