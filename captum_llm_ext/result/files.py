"""Results as files: safetensors, with everything that is no tensor as JSON in its metadata.

A file of format 4 holds

* tensors, by the names of the result's fields: ``token_attr``, ``masks``, ``values`` …; those that
  are None are left out;
* in the metadata ``captum_llm_ext``: a JSON object with ``format``, ``input_tokens``,
  ``output_tokens``, ``output_features``, ``prompt_pieces`` and ``output_pieces`` (per piece
  ``[text, column]``, the column null for fixed text, or ``[text, column, role]`` where someone said
  it in a chat or a chat's template did), ``levels``, ``n_evaluations``, ``design`` and
  ``provenance``;
* in the metadata ``sha256``: a digest of both, so that a damaged file is told from a good one.

Any reader of safetensors reads it; nothing in it is ever executed. Format 3 was the same, but its
first readers know no roles: files with roles have had a number of their own since. Format 2 had no
digest and no roles, format 1 no ``design`` either, and at first no ``levels``. All are read, by
their own rules; a file of a format above this is refused as one of a later version.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

FORMAT = 4
_KEY, _DIGEST = "captum_llm_ext", "sha256"
_DIGEST_SINCE = 3
_ROLES_SINCE = 3  # some files of format 3 have them
_ADVICE = "give a file written by `GenerationAttributionResult.save`."
# What a file that is no result, or no longer one, makes its readers raise.
BROKEN = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RecursionError,
)


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor | None], rest: Mapping[str, Any]
) -> None:
    """Writes one file; tensors that are None are left out.

    The file is there whole or, if writing fails, as it was before.

    Raises:
        TypeError, ValueError: If JSON cannot hold the rest.
        OSError: If the file cannot be written.
    """
    from safetensors.torch import save  # transformers brings it

    copies = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in tensors.items()
        if value is not None
    }
    text = _as_json({"format": FORMAT, **rest})
    metadata = {_KEY: text, _DIGEST: _digest(copies, text)}
    _replace(os.path.realpath(path), save(copies, metadata=metadata))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the rest of a file that `write` made, of this version or an earlier one.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        ValueError: If the file is damaged, no result, or of a later format.
    """
    name = repr(os.fspath(path))
    tensors, metadata = _opened(path)
    return tensors, _checked(name, tensors, metadata)


def read_provenance(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What a result's file says of its origin; no tensor is read, and what they hold not checked.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        ValueError: If the file is torn, no result, or of a later format.
    """
    _, metadata = _opened(path, tensors=False)
    rest = _parsed(repr(os.fspath(path)), metadata[_KEY])
    return rest.get("provenance") or {}


def _opened(
    path: str | os.PathLike[str], *, tensors: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    name = repr(os.fspath(path))
    with open(path, "rb"):
        pass  # what the system says of files that cannot be read is clear enough
    try:
        with cast(Any, safe_open)(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if tensors else ()
            found = {key: file.get_tensor(key) for key in names}
    except (SafetensorError, OSError, *BROKEN) as error:
        raise ValueError(f"{name} is damaged or no saved result ({error}): {_ADVICE}") from error
    if _KEY not in metadata:
        raise ValueError(f"{name} is a safetensors file but no saved result: {_ADVICE}")
    return found, metadata


def broken(path: str | os.PathLike[str], error: Exception) -> ValueError:
    """The error to raise where what `read` gave makes no result."""
    return ValueError(f"{os.fspath(path)!r} is damaged ({error}): {_ADVICE}")


def check_shapes(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """What was read fits together.

    Raises:
        ValueError: If it does not.
    """
    n_target, n_prompt = len(rest["output_tokens"]), len(rest["input_tokens"])
    n_output = None if rest["output_features"] is None else len(rest["output_features"])
    n_coalitions, n_features = tensors["masks"].shape
    expected: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("token_attr", "token_attr_se"), (n_target, n_prompt)),
        **dict.fromkeys(
            "target full_values empty_values efficiency_gap output_probs".split(), (n_target,)
        ),
        "seq_attr": (n_prompt,),
        "values": (n_coalitions, n_target),
        "draws": (n_coalitions,),
    }
    if n_output is not None:
        expected |= dict.fromkeys(("output_attr", "output_attr_se"), (n_target, n_output))
    for name, shape in expected.items():
        found = tensors.get(name)
        if found is None and name != "output_probs":
            raise ValueError(f"it has no `{name}`")
        if found is not None and tuple(found.shape) != shape:
            raise ValueError(f"`{name}` has shape {tuple(found.shape)}, not {shape}")
    if rest["output_pieces"] and len(rest["output_pieces"]) != n_target:
        raise ValueError(f"it has {len(rest['output_pieces'])} pieces of {n_target} target tokens")
    design = rest.get("design")
    if design is not None and (
        design["n_features"] > n_features or len(design["n_visible"]) != n_target
    ):
        raise ValueError("`design` is about other coalitions")


def finite(content: Any) -> Any:
    """The same with None for NaN and infinities: JSON has none."""
    if isinstance(content, Mapping):
        items = cast(Mapping[Any, Any], content).items()
        return {key: finite(value) for key, value in items}
    if isinstance(content, list | tuple):
        return [finite(value) for value in cast(list[Any], content)]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _checked(
    name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """The rest, if it is what was written."""
    text, digest = metadata[_KEY], metadata.get(_DIGEST)
    rest = _parsed(name, text)
    version = rest.pop("format")
    if (digest is None and version >= _DIGEST_SINCE) or (
        digest is not None and digest != _digest(tensors, text)
    ):
        raise ValueError(f"{name} is damaged (what it holds is not what was written): {_ADVICE}")
    try:
        _check_pieces(rest, version)
    except BROKEN as error:
        raise ValueError(f"{name} is damaged ({error}): {_ADVICE}") from error
    return rest


def _parsed(name: str, text: str) -> dict[str, Any]:
    try:
        rest: Any = json.loads(text)
        version = rest["format"]
        if type(version) is not int or version < 1:
            raise ValueError(f"its format is {version!r}, not a number from 1")
    except BROKEN as error:
        raise ValueError(f"{name} is damaged or no saved result ({error}): {_ADVICE}") from error
    if version > FORMAT:
        raise ValueError(
            f"{name} was written by a later version (format {version}, this one reads up to "
            f"{FORMAT}): update captum-llm-ext."
        )
    return rest


def _check_pieces(rest: Mapping[str, Any], version: int) -> None:
    """Every piece is what pieces of that format are.

    Raises:
        ValueError, LookupError, TypeError: If one is not.
    """
    for name, columns in (("prompt_pieces", "input_tokens"), ("output_pieces", "output_features")):
        n_columns = None if rest[columns] is None else len(rest[columns])
        for piece in rest[name]:
            text, column, *role = piece
            is_column = column is None or (
                type(column) is int and column >= 0 and (n_columns is None or column < n_columns)
            )
            is_role = len(role) <= (version >= _ROLES_SINCE) and all(
                isinstance(part, str) for part in role
            )
            if not (isinstance(text, str) and is_column and is_role):
                raise ValueError(f"`{name}` of format {version} holds {piece!r}")


def _as_json(content: Mapping[str, Any]) -> str:
    try:
        return json.dumps(finite(content), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"the result cannot be saved: {error}. Give `provenance` numbers, text, lists and "
            "mappings only."
        ) from error


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        found.update(memoryview(content))
    return found.hexdigest()


def _replace(path: str, content: bytes) -> None:
    """Puts a file in the place of another at once: nobody finds half of it."""
    if os.path.exists(path) and not os.path.isfile(path):  # a device, a pipe
        with open(path, "wb") as file:
            file.write(content)
        return
    folder, name = os.path.split(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder or ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, _mode(path))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _mode(path: str) -> int:
    """The permissions of the file that is there, else those of any new file of this user."""
    if os.path.exists(path):
        return os.stat(path).st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
