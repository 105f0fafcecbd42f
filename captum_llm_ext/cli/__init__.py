"""The command line: ``captum-llm-ext``, also ``python -m captum_llm_ext``.

Results go to stdout, everything else to stderr. The exit status is 0, 1 if the command failed, 2
for wrong usage, 130 after Ctrl-C.

Options are parsed and checked without torch and captum, which take seconds to import: functions
import these where they need them, after all checks.
"""

import argparse
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

import captum_llm_ext
from captum_llm_ext.base.command_line import command_line
from captum_llm_ext.cli import attribute, compare, counterfactual, demo, doctor, show
from captum_llm_ext.cli.command import Parser, UsageError, note, refuse_unknown, say, shown_examples
from captum_llm_ext.cli.wording import in_options

__all__ = ["main"]

_COMMANDS = (demo, attribute, counterfactual, show, compare, doctor)
_EXPECTED = (ValueError, TypeError, OSError, ImportError)  # their messages say what to do
_BROKEN_PIPE = 141  # as of any program ended by SIGPIPE
_STATUS = """

Results go to stdout, progress and notes to stderr. Exit status: 0; 1 where the command could not be
carried out, or doctor finds wrong values; 2 where it was written wrongly; 130 after Ctrl-C.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        Exit status.

    Raises:
        SystemExit: With 2 if there is no such command or option, with 0 after ``--help``.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        refuse_unknown(arguments.parser if arguments.command else parser, unknown)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal's encoding may lack arrows
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments.command_line = command_line("captum-llm-ext", given)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        say("captum-llm-ext: interrupted" + _goes_on(arguments))
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:
        return _failed(error, arguments)


def _run(arguments: argparse.Namespace) -> int:
    run: Callable[[argparse.Namespace], int | None] = arguments.run
    with warnings.catch_warnings():
        warnings.simplefilter("once", UserWarning)
        warnings.showwarning = note
        status = run(arguments) or 0
    sys.stdout.flush()  # flushed here, so that a broken pipe is recognised
    return status


def _goes_on(arguments: argparse.Namespace) -> str:
    kept = getattr(arguments, "checkpoint", None) or getattr(arguments, "out", None)
    if kept is None or arguments.command == "demo" or not os.path.exists(kept):
        return ""
    return f" (the same command goes on from what is in {kept})"


def _failed(error: Exception, arguments: argparse.Namespace) -> int:
    if arguments.debug:
        traceback.print_exception(error)
    message = str(error) if isinstance(error, _EXPECTED) else f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename!r}: {error.strerror}"
    say(f"captum-llm-ext: error: {in_options(message)}")
    if not isinstance(error, UsageError):
        return 1
    say(f"See: captum-llm-ext {arguments.command} --help")
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="captum-llm-ext",
        description="Why did the language model write that?",
        epilog=shown_examples([command.EXAMPLES[0] for command in _COMMANDS]) + _STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"captum-llm-ext {captum_llm_ext.__version__}"
    parser.add_argument("-V", "--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", parser_class=Parser)
    for command in _COMMANDS:
        command.add(commands)
    return parser
