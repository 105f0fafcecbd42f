"""Provenance: model, versions and command behind the numbers."""

import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from captum_llm_ext import _compat
from captum_llm_ext.base.arguments import TARGETS
from captum_llm_ext.base.command_line import command_line
from captum_llm_ext.contrast import Contrast


def model_provenance(model: nn.Module, device: torch.device | str) -> dict[str, Any]:
    """Provenance of a local model.

    Args:
        model: The model.
        device: The model's input device.
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
        attr_target: The kind of value: a name or a callable.
        generation: Settings of the target's generation; None if it was given.
    """
    return {
        "attr_target": value_name(attr_target),
        "generation": None if generation is None else dict(generation),
    }


def value_name(attr_target: object) -> str:
    """Name of the explained value: as given, or the callable's."""
    if isinstance(attr_target, str):
        return attr_target
    if isinstance(attr_target, Contrast):
        return "contrast"
    named = str(getattr(attr_target, "__qualname__", type(attr_target).__name__))
    # A function may have one of the reserved names, which define what the numbers are.
    return f"{named}()" if named in TARGETS else named


def run_provenance() -> dict[str, Any]:
    """Provenance of the program: versions, command, time."""
    return {
        "python": platform.python_version(),
        "versions": _compat.versions(),
        "command": command_line(),
    }
