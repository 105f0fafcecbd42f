"""Common to all commands: parser with examples, option types, messages on stderr."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from captum_llm_ext.cli.wording import in_options


class UsageError(ValueError):
    """Contradictory options: the command line must be changed."""


class Parser(argparse.ArgumentParser):
    """Reports misspelt options before those that are missing because of it."""

    _given: Sequence[str] = ()

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """As in argparse."""
        self._given = list(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends with status 2."""
        known = self._option_string_actions
        options = [one for one in self._given if re.match("--[a-z]", one)]
        unknown = [one for one in options if one.split("=")[0] not in known]
        if unknown and message.endswith("required"):
            refuse_unknown(self, unknown)
        super().error(message)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    *,
    summary: str,
    description: str,
    examples: Sequence[str],
    usage: str = "[options]",
) -> argparse.ArgumentParser:
    """Adds a command.

    Args:
        commands: The result of `argparse.ArgumentParser.add_subparsers`.
        name: Name of the command.
        run: Runs it; returns the exit status, None for 0.
        summary: One line, for the list of commands.
        description: For the command's own help.
        examples: Whole command lines, without the program's name.
        usage: Short usage after the command's name.

    Returns:
        Its parser, to add options to.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        usage=f"captum-llm-ext {name} {usage}",
        description=description,
        epilog=shown_examples(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--debug", action="store_true", help="show where an error came from, for bug reports"
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """Ends with status 2, and says which option may have been meant."""
    known = parser.format_help()
    options = sorted(set(re.findall(r"(?<!\S)--[a-z][a-z-]*", known)))
    meant = [
        close[0]
        for one in unknown
        if one.startswith("--") and (close := get_close_matches(one.split("=")[0], options, n=1))
    ]
    instead = f": did you mean {' '.join(meant)}?" if meant else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{instead}")


def shown_examples(examples: Sequence[str]) -> str:
    """Command lines at the end of a help text."""
    return "\n".join(["examples:", *(f"  captum-llm-ext {example}" for example in examples)])


def say(text: str) -> None:
    """Prints a message to stderr."""
    print(text, file=sys.stderr, flush=True)


def note(message: Warning | str, *_: object) -> None:
    """Prints a warning without its source line."""
    say(f"note: {in_options(str(message))}")


def whole(text: str) -> int:
    """Option type: an integer."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not an integer") from error


def positive(text: str) -> int:
    """Option type: an integer of at least 1."""
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def above_zero(text: str) -> float:
    """Option type: a number above 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def from_0_to_1(text: str) -> float:
    """Option type: a number from 0 to 1."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def share(text: str) -> float:
    """Option type: a number above 0 and at most 1."""
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from error
