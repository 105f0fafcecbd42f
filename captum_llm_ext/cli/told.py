"""What is printed of a result."""

import argparse
from typing import Any

from captum_llm_ext.base.terminal import paint, width
from captum_llm_ext.cli.command import UsageError, note
from captum_llm_ext.cli.wording import in_options
from captum_llm_ext.result import GenerationAttributionResult

_LEVELS = ("turn", "passage", "part", "example", "block", "paragraph", "line", "sentence", "word")


def add_level(parser: argparse.ArgumentParser) -> None:
    """Adds the option that says how coarsely the prompt is read."""
    parser.add_argument(
        "--level",
        metavar="UNIT",
        help="sum the causes in the prompt over its words, sentences, paragraphs, passages or "
        "turns, where what was switched is smaller",
    )


def check_level(arguments: argparse.Namespace) -> None:
    """Refuses a level that no text has.

    Raises:
        UsageError: If it has no such name.
    """
    if arguments.level is not None and arguments.level not in _LEVELS:
        raise UsageError(f"--level {arguments.level}: give one of {', '.join(_LEVELS)}.")


def told(result: GenerationAttributionResult, arguments: argparse.Namespace) -> str:
    """The table of a result, under what its answer as a whole came from."""
    table = result.table(arguments.top, paint=paint, width=width())
    if arguments.level is None:
        return table
    try:
        names, attributions = result.at_level(arguments.level)
    except ValueError as error:  # which is no reason to lose what was computed
        note(in_options(str(error)))
        return table
    return "\n".join([*_by_level(names, attributions, arguments), table])


def _by_level(names: list[str], attributions: Any, arguments: argparse.Namespace) -> list[str]:
    sums = attributions.sum(0)
    lines = [f"whole answer, by {arguments.level}:"]
    for i in sums.abs().argsort(descending=True).tolist():
        kind = "raises" if sums[i] > 0 else "lowers"
        lines.append(f"  {paint(f'{float(sums[i]):+8.2f}', kind)}  {' '.join(names[i].split())}")
    return lines
