"""A run's values on disk, saved as they are found, so that a killed run can resume."""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from captum_llm_ext.base import files, tensor_file
from captum_llm_ext.base.digest import differences

_KIND = tensor_file.Kind(
    "checkpoint",
    "captum_llm_ext_checkpoint",
    format=2,
    advice="give another name, or delete it to begin again.",
    digest_since=2,
    oldest=2,
)
_ENDING = files.CHECKPOINT_ENDING
_DIGEST = 16  # bytes of a row's key: among a billion rows two are equal with probability 1e-21
# Seconds between two saves, and at most one part in this many of the run's time. Chosen, not
# measured.
_SHORTEST_WAIT = 1.0
_SHARE_OF_TIME = 50


class Journal:
    """Values of rows in one safetensors file, written atomically.

    The file is rewritten with a digest of its content and replaces the old one: every second, or
    less often if that takes long. A kill loses the values since then. A damaged file, or one of a
    release without digests, raises an error.

    Args:
        path: A file that ends in ``.safetensors``, or a folder, in which the file's name follows
            from `about`, so that several runs may share it.
        about: What the values depend on, as JSON values.

    Raises:
        ValueError: If the file belongs to another run, is not such a file, or is damaged.
        OSError: If it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        self._about = cast(dict[str, Any], json.loads(json.dumps(about)))
        self.path = _file(Path(path), self._about)
        self._known: dict[bytes, Tensor] = {}
        self._budget: int | None = None
        self._target: Tensor | None = None
        files.sweep(self.path.parent, re.escape(self.path.name))
        if self.path.exists():
            self._read()
        self._written_at = -float("inf")
        self._took = 0.0
        self._is_new = False
        self._write()  # write errors show before anything expensive

    @classmethod
    def of_surrogate(cls, path: str | os.PathLike[str], about: Mapping[str, Any]) -> "Journal":
        """The journal of a model's surrogate, in a file beside the model's."""
        path = Path(path)
        files.check_checkpoint(path)
        if path.suffix == _ENDING and not path.is_dir():
            path = path.with_suffix(f".surrogate{_ENDING}")
        return cls(path, {**about, "values_of": "surrogate"})

    @property
    def target(self) -> Tensor | None:
        """The generated target, ``(n_target,)``."""
        return self._target

    def keep_target(self, ids: Tensor) -> None:
        """Stores the generated target."""
        self._target = ids.clone()
        self._write()

    def budget(self, here: int) -> int:
        """The memory budget of batches in bytes, since equal batches have equal values.

        Args:
            here: The budget if none is stored yet.
        """
        if self._budget is None:
            self._budget = here
            self._write()
        return self._budget

    def found(self, keys: Sequence[bytes]) -> dict[int, Tensor]:
        """Known values ``(n_target,)``, by index in `keys`."""
        return {i: self._known[key] for i, key in enumerate(keys) if key in self._known}

    def add(self, keys: Sequence[bytes], values: Tensor) -> None:
        """Stores values.

        Args:
            keys: One digest of 16 bytes per row.
            values: Shape ``(n_rows, n_target)``.
        """
        self._known.update(zip(keys, values.clone(), strict=True))
        self._is_new = True
        waited = time.monotonic() - self._written_at
        if waited > max(_SHORTEST_WAIT, _SHARE_OF_TIME * self._took):
            self._write()

    def close(self) -> None:
        """Saves new values."""
        if self._is_new:
            self._write()

    def _write(self) -> None:
        began = time.monotonic()
        tensors: dict[str, Tensor] = {}
        for n_target in sorted({len(values) for values in self._known.values()}):
            own = {k: v for k, v in self._known.items() if len(v) == n_target}
            digests = torch.frombuffer(bytearray(b"".join(own)), dtype=torch.uint8)
            tensors[f"rows.{n_target}"] = digests.view(-1, _DIGEST)
            tensors[f"values.{n_target}"] = torch.stack(list(own.values()))
        if self._target is not None:
            tensors["target"] = self._target
        rest: dict[str, Any] = {"about": self._about, "budget": self._budget}
        tensor_file.write(self.path, _KIND, tensors, rest)
        self._is_new = False
        self._written_at = time.monotonic()
        self._took = self._written_at - began

    def _read(self) -> None:
        tensors, rest = tensor_file.read(self.path, _KIND)
        name = repr(str(self.path))
        try:
            known, target, budget = _content(tensors, rest)
            changes = differences(rest["about"], self._about)
        except tensor_file.BROKEN as error:
            why = str(error) or type(error).__name__
            raise ValueError(f"{name} is damaged ({why}): {_KIND.advice}") from error
        if changes:
            raise ValueError(
                f"the checkpoint {name} belongs to another run ({changes}): give the same "
                "arguments, another file, or delete it to begin again."
            )
        self._known, self._target, self._budget = known, target, budget


def _content(
    tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> tuple[dict[bytes, Tensor], Tensor | None, int | None]:
    """Values by row, the target and the budget in a file.

    Raises:
        ValueError, LookupError, TypeError: If the content is invalid.
    """
    rest, tensors = dict(rest), dict(tensors)
    about, budget, target = rest["about"], rest["budget"], tensors.pop("target", None)
    if not isinstance(about, dict) or not (budget is None or type(budget) is int):
        raise ValueError("`about` is not an object, or `budget` not a number")
    if target is not None and (target.dtype != torch.int64 or target.dim() != 1):
        raise ValueError(f"its target is {target.dtype} of shape {tuple(target.shape)}")
    known: dict[bytes, Tensor] = {}
    for name in [name for name in tensors if name.startswith("rows.")]:
        digests, values = tensors.pop(name), tensors.pop(name.replace("rows.", "values."))
        n_target = int(name.removeprefix("rows."))
        is_right = digests.dtype == torch.uint8 and values.is_floating_point()
        if digests.shape != (len(values), _DIGEST) or values.shape[1:] != (n_target,):
            is_right = False
        if not is_right:
            raise ValueError(f"`{name}` has shape {tuple(digests.shape)}")
        raw = digests.numpy().tobytes()
        keys = (raw[i : i + _DIGEST] for i in range(0, len(raw), _DIGEST))
        known.update(zip(keys, values, strict=True))
    if tensors:
        raise ValueError(f"it has a tensor {min(tensors)!r}")
    return known, target, budget


def _file(path: Path, about: Mapping[str, Any]) -> Path:
    files.check_checkpoint(path)
    if path.suffix == _ENDING and not path.is_dir():
        return path
    path.mkdir(parents=True, exist_ok=True)
    content = json.dumps(about, sort_keys=True).encode()
    return path / f"{blake2b(content, digest_size=8).hexdigest()}{_ENDING}"
