"""The environment of a measurement, for its JSON."""

import datetime
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("captum", "torch", "transformers", "accelerate", "numpy")


def environment(*, seed: int, device: str = "cpu", dtype: str = "float32") -> dict[str, Any]:
    """Command, date, commit, versions, device, dtype, seed and threads."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "command": " ".join(["python", _script(sys.argv[0]), *map(_shown, sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": device if device != "cpu" else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "seed": seed,
    }


def _script(path: str) -> str:
    """The script's path relative to the repository."""
    script = Path(path).resolve()
    return str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name


def _shown(argument: str) -> str:
    """A path without the folders of this machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _version(name: str) -> str | None:
    """The version of a package; None if it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
