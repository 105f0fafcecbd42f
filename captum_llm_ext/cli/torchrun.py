"""The processes of ``torchrun``, if it started the command."""

import argparse
import os
from typing import Any

from captum_llm_ext.cli.command import UsageError


def are_several() -> bool:
    """Whether there are other processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main() -> bool:
    """Whether this process prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0 or not are_several()


def accelerator() -> Any:
    """The `Accelerator` of several processes; None for a single one."""
    if not are_several():
        return None
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def check_readable(arguments: argparse.Namespace) -> None:
    """Checks that no input can be read by only one process.

    Raises:
        UsageError: If several processes would read stdin.
    """
    for name in ("prompt_file", "chat"):
        if are_several() and getattr(arguments, name) == "-":
            raise UsageError(
                f"--{name.replace('_', '-')} - is one stdin for several processes: give a file."
            )
