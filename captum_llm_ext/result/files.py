"""Results as files: tensors as safetensors, the rest as JSON in the same file."""

import json
import os
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

FORMAT = 2  # 1 had no design
_KEY = "captum_llm_ext"


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor | None], rest: Mapping[str, Any]
) -> None:
    """Writes one file; tensors that are None are left out."""
    from safetensors.torch import save_file  # transformers brings it

    copies = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in tensors.items()
        if value is not None
    }
    save_file(copies, path, metadata={_KEY: json.dumps({"format": FORMAT, **rest})})


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the rest of a file that `write` made, of this version or an earlier one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, no result, or of a later format.
    """
    from safetensors import SafetensorError, safe_open

    name = repr(os.fspath(path))
    advice = "give a file written by `GenerationAttributionResult.save`."
    try:
        with cast(Any, safe_open)(path, framework="pt") as file:
            rest = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is damaged or no saved result ({error}): {advice}") from error
    if rest is None:
        raise ValueError(f"{name} is a safetensors file but no saved result: {advice}")
    if rest.pop("format") > FORMAT:
        raise ValueError(f"{name} was written by a later version: update captum-llm-ext.")
    return tensors, rest
