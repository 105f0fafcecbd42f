"""The file of a corpus index: named tensors and a few strings, memory-mapped when read."""

import os
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from captum_llm_ext.base import tensor_file
from captum_llm_ext.base.tensor_file import BROKEN, MappedFile

_KIND = tensor_file.Kind(
    "saved corpus index",
    "captum_llm_ext_index",
    format=2,
    advice="give a file written by `save` of this release, or have the corpus indexed anew.",
    digest_since=2,
    oldest=2,
    # for readers of earlier releases
    label={"format": "captum-llm-ext corpus index", "version": "2"},
    earlier={"format": "captum-llm-ext corpus index", "version": "1"},
)


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], extra: Mapping[str, str]
) -> None:
    """Writes one safetensors file atomically.

    Args:
        path: The file.
        tensors: Tensors on the CPU.
        extra: Further content.

    Raises:
        OSError: If it cannot be written.
    """
    tensor_file.write(path, _KIND, tensors, {"extra": dict(extra)})


def load(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, str], MappedFile]:
    """Tensors of a saved index as the file's own pages, and a check that these are unchanged.

    The file is read once to verify its digest.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        ValueError: If the file is of another kind, damaged, or of another version.
    """
    tensors, rest, mapped = tensor_file.read_mapped(path, _KIND)
    extra: Any = rest.get("extra")
    if not isinstance(extra, dict) or not all(isinstance(v, str) for v in extra.values()):
        raise broken(path, TypeError("`extra` holds what is no text"))
    return tensors, cast(dict[str, str], extra), mapped


def broken(path: str | os.PathLike[str], error: Exception) -> ValueError:
    """The error for a file whose content is not a valid index."""
    why = str(error) or type(error).__name__
    return ValueError(f"{os.fspath(path)!r} is damaged ({why}): {_KIND.advice}")


__all__ = ["BROKEN", "MappedFile", "broken", "load", "save"]
