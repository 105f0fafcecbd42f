"""Named tensors and a few strings in one file, mapped into memory when it is read."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

_FORMAT = "captum-llm-ext corpus index"
_VERSION = 1


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], extra: Mapping[str, str]
) -> None:
    """Writes one safetensors file; what stood at `path` stays whole until the new one is.

    Args:
        path: The file.
        tensors: Contiguous tensors on the CPU.
        extra: What else to keep.
    """
    from safetensors.torch import save_file  # transformers brings it

    path = Path(path)
    metadata = {"format": _FORMAT, "version": str(_VERSION), "extra": json.dumps(dict(extra))}
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        save_file(dict(tensors), unfinished, metadata=metadata)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save` wrote. The tensors are read from the disk when they are used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind, damaged, or of a later version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with cast(Any, safe_open)(os.fspath(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(_refusal(path, "is a safetensors file of another kind"))
            version = int(metadata["version"])
            if version > _VERSION:
                raise ValueError(
                    f"{os.fspath(path)!r} has version {version} of the format, this release reads "
                    f"up to {_VERSION}: update captum-llm-ext, or build the index anew."
                )
            extra = json.loads(metadata["extra"])
            return {name: file.get_tensor(name) for name in file.keys()}, extra  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(_refusal(path, f"is damaged or of another kind ({error})")) from error


def _refusal(path: str | os.PathLike[str], why: str) -> str:
    return f"{os.fspath(path)!r} {why}: give a file written by `save`."
