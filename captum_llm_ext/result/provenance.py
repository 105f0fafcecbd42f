"""Provenance: model, versions and command that numbers came from."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from captum_llm_ext import _compat
from captum_llm_ext.base.arguments import TARGETS
from captum_llm_ext.contrast import Contrast

_NOTEBOOKS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")


def model_provenance(model: nn.Module, device: torch.device | str) -> dict[str, Any]:
    """Provenance of a model in this process.

    Args:
        model: The model.
        device: Where it reads its ids.
    """
    parameter = next(model.parameters(), None)
    source, revision = _compat.model_source(model)
    return {
        "model": source,
        "revision": revision,
        "model_class": type(model).__name__,
        "dtype": str(parameter.dtype) if parameter is not None else None,
        "device": str(device),
    }


def target_provenance(attr_target: object, generation: Mapping[str, str] | None) -> dict[str, Any]:
    """Provenance of the target and of the explained value.

    Args:
        attr_target: What a value is: a name or a callable.
        generation: What the target was generated with; None where it was given.
    """
    return {
        "attr_target": value_name(attr_target),
        "generation": None if generation is None else dict(generation),
    }


def value_name(attr_target: object) -> str:
    """Name of the explained value: as given, or that of the callable."""
    if isinstance(attr_target, str):
        return attr_target
    if isinstance(attr_target, Contrast):
        return "contrast"
    named = str(getattr(attr_target, "__qualname__", type(attr_target).__name__))
    # A function may be called like one of the names, which say what the numbers are.
    return f"{named}()" if named in TARGETS else named


def run_provenance() -> dict[str, Any]:
    """Provenance of the program: versions, command, time."""
    return {
        "python": platform.python_version(),
        "versions": _compat.versions(),
        "command": command_line(),
    }


def command_line(program: str | None = None, arguments: Sequence[str] | None = None) -> str | None:
    """A command line with paths reduced to their last part, as results are shown to others.

    Args:
        program: What was run. None: the running script, with its own arguments.
        arguments: Its arguments.

    Returns:
        The line to type, quoted for a shell; None in a notebook or an interactive session, which no
        command describes.
    """
    if program is None:
        started, *rest = sys.argv or [""]
        name = os.path.basename(started)
        if not name or started.startswith("-") or name in _NOTEBOOKS:
            return None
    else:
        name, rest = program, list(arguments or ())
    line = shlex.join([name, *map(_without_folder, rest)])
    return line.encode("utf-8", "backslashreplace").decode()  # names of files may be no UTF-8


def _without_folder(argument: str) -> str:
    option = "".join(re.findall(r"\A(?:--[\w-]+=)?(?:\w+:)?", argument))
    value = argument.removeprefix(option)
    is_path = os.path.isabs(value) and os.path.isdir(os.path.dirname(value))
    return option + os.path.basename(value) if is_path else argument
