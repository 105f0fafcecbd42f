"""The command that a program was run with, for provenance."""

import os
import re
import shlex
import sys
from collections.abc import Sequence

_NOTEBOOKS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")


def command_line(program: str | None = None, arguments: Sequence[str] | None = None) -> str | None:
    """A command line with paths reduced to their last part, since results are shared.

    Args:
        program: The program. None: the running script, with its own arguments.
        arguments: Its arguments.

    Returns:
        The line to type, quoted for a shell; None in a notebook or an interactive session.
    """
    if program is None:
        started, *rest = sys.argv or [""]
        name = os.path.basename(started)
        if not name or started.startswith("-") or name in _NOTEBOOKS:
            return None
    else:
        name, rest = program, list(arguments or ())
    line = shlex.join([name, *map(_without_folder, rest)])
    return line.encode("utf-8", "backslashreplace").decode()  # file names may be invalid UTF-8


def _without_folder(argument: str) -> str:
    option = "".join(re.findall(r"\A(?:--[\w-]+=)?(?:\w+:)?", argument))
    value = argument.removeprefix(option)
    is_path = os.path.isabs(value) and os.path.isdir(os.path.dirname(value))
    return option + os.path.basename(value) if is_path else argument
