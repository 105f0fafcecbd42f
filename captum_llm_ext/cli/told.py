"""A result as the command line prints it."""

import argparse
import math
import textwrap
from collections.abc import Sequence

from captum_llm_ext.base.terminal import paint, shortened, width
from captum_llm_ext.cli.command import UsageError, note
from captum_llm_ext.cli.wording import in_options
from captum_llm_ext.result import Cause, GenerationAttributionResult
from captum_llm_ext.text.segment import NAMED_UNITS

_LEVELS = ("turn", "passage", "part", "example", *NAMED_UNITS)


def add_level(parser: argparse.ArgumentParser) -> None:
    """Adds ``--level``: the parts of the prompt that causes are summed over."""
    parser.add_argument(
        "--level",
        metavar="UNIT",
        help="sum the causes in the prompt over its words, sentences, paragraphs, passages or "
        "turns, where what was switched is smaller",
    )


def check_level(arguments: argparse.Namespace) -> None:
    """Checks the name of ``--level``.

    Raises:
        UsageError: If it has no such name, or the prompt has no such parts.
    """
    level = arguments.level
    if level is not None and level not in _LEVELS:
        raise UsageError(f"--level {level}: give one of {', '.join(_LEVELS)}.")
    # What a saved result has, its file tells.
    if level == "passage" and not getattr(arguments, "context", True):
        raise UsageError("--level passage: passages are those of --context FILE…")
    of_chat = ("chat", "as_chat", "system", "context")
    if level == "turn" and not any(getattr(arguments, name, True) for name in of_chat):
        raise UsageError("--level turn: turns are those of a --chat, or of --as-chat.")


def told(result: GenerationAttributionResult, k: int, level: str | None = None) -> str:
    """The printed text of a result: causes at the level asked for, the table, sentences.

    Args:
        result: The result.
        k: Causes per token, at most.
        level: As of `add_level`.
    """
    columns = width()
    blocks = [result.table(k, paint=paint, width=columns)]
    if level is not None:
        try:
            blocks.insert(0, _by_level(result.causes(level=level).prompt, level, columns))
        except ValueError as error:  # which is no reason to lose what was computed
            note(str(error))
            level = None
    sentences = in_options(result.narrative(level=level))
    blocks.append(sentences if columns is None else textwrap.fill(sentences, columns))
    return "\n\n".join(blocks)


def _by_level(causes: Sequence[Cause], level: str, columns: int | None) -> str:
    """Attributions of the parts of the prompt for the whole answer, a line each."""
    lines = [f"whole answer, by {level}:"]
    for cause in causes:
        error = "?" if math.isnan(cause.standard_error) else f"{cause.standard_error:.2f}"
        numbers = f"{cause.attribution:+8.2f} ± {error:<5}"
        name = " ".join((cause.label or cause.name).split())
        line = f"{numbers} {name}"
        line = line if columns is None else shortened(line, columns)
        kind = "raises" if cause.attribution > 0 else "lowers"
        lines.append(paint(line, kind if cause.is_marked else "nothing"))
    return "\n".join(lines)
