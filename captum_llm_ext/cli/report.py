"""A result as the command line prints it."""

import argparse
import textwrap
from typing import TYPE_CHECKING

from captum_llm_ext.base.amounts import plus_minus
from captum_llm_ext.base.terminal import paint, shortened, width
from captum_llm_ext.cli.command import UsageError, note
from captum_llm_ext.cli.wording import in_options
from captum_llm_ext.text.segment import NAMED_UNITS

if TYPE_CHECKING:
    from captum_llm_ext.result import GenerationAttributionResult

_LEVELS = ("turn", "passage", "part", "example", *NAMED_UNITS)


def add_level(parser: argparse.ArgumentParser) -> None:
    """Adds ``--level``: the parts of the prompt over which causes are summed."""
    parser.add_argument(
        "--level",
        metavar="UNIT",
        help="sum the causes in the prompt over its words, sentences, paragraphs, passages or "
        "turns, where what was switched is smaller",
    )


def check_level(arguments: argparse.Namespace) -> None:
    """Checks the name of ``--level``.

    Raises:
        UsageError: If there is no such level, or the prompt has no such parts.
    """
    level = arguments.level
    if level is not None and level not in _LEVELS:
        raise UsageError(f"--level {level}: give one of {', '.join(_LEVELS)}.")
    # For a saved result, the file says which levels it has.
    if level == "passage" and not getattr(arguments, "context", True):
        raise UsageError("--level passage: passages are those of --context FILE…")
    of_chat = ("chat", "as_chat", "system", "context")
    if level == "turn" and not any(getattr(arguments, name, True) for name in of_chat):
        raise UsageError("--level turn: turns are those of a --chat, or of --as-chat.")


def report(result: "GenerationAttributionResult", k: int, level: str | None = None) -> str:
    """The printed text of a result: causes at the requested level, the table, sentences.

    Args:
        result: The result.
        k: Maximum number of causes per token.
        level: As for `add_level`.
    """
    columns = width()
    blocks = [result.table(k, paint=paint, width=columns)]
    if level is not None:
        try:
            blocks.insert(0, _by_level(result, level, columns))
        except ValueError as error:  # no reason to lose the computed result
            note(str(error))
            level = None
    sentences = in_options(result.narrative(level=level))
    blocks.append(sentences if columns is None else textwrap.fill(sentences, columns))
    return "\n\n".join(blocks)


def _by_level(result: "GenerationAttributionResult", level: str, columns: int | None) -> str:
    """One line per part of the prompt: its attribution for the whole answer."""
    from captum_llm_ext.result.causes import unit_of

    answer = result.answer if result.answer and result.answer.level == level else None
    of = "whole answer, by" if answer or not result.output_features else "direct effects, by"
    gain = answer.gain_in_words(unit_of(result)) if answer else ""
    lines = [f"{of} {level}{f' ({gain})' * bool(gain)}:"]
    for cause in result.causes(level=level).prompt:
        error = plus_minus(cause.standard_error)
        name = " ".join((cause.label or cause.name).split())
        line = f"{cause.attribution:+8.2f}{error:<8} {name}"
        line = line if columns is None else shortened(line, columns)
        kind = "raises" if cause.attribution > 0 else "lowers"
        lines.append(paint(line, kind if cause.is_marked else "nothing"))
    return "\n".join(lines)
