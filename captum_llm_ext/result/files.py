"""Results as files: safetensors, with everything but the tensors as JSON in its metadata.

A file of format 7 holds

* tensors, by the names of the result's fields: ``token_attr``, ``masks``, ``values`` …; those that
  are None are left out;
* in the metadata ``captum_llm_ext``: a JSON object with ``format``, ``input_tokens``,
  ``output_tokens``, ``output_features``, ``prompt_pieces`` and ``output_pieces`` (per piece
  ``[text, column]``, the column null for fixed text, or ``[text, column, role]`` where someone said
  it in a chat or a chat's template did), ``levels``, ``n_evaluations``, ``design``,
  ``foil_tokens``, ``answer`` (what is known of the whole answer's attributions, the tensors
  ``answer_attr`` and ``answer_attr_se``) and ``provenance``;
* if replacement texts were drawn at random, ``drawn_texts``, ``text_probabilities`` and
  ``text_columns``: the fields of `DrawnTexts`, with which the values are solved;
* in the metadata ``sha256``: a digest of both, so that damage is detected.

Any safetensors reader can open it; nothing in it is ever executed. Format 6 had no drawn texts,
whose effects were not removed from the values then. Format 5 had no ``answer``,
format 4 no foils either. Format 3 equals format 4, whose number is new because the first readers of
format 3 reject roles. Format 2 had no digest and no roles, format 1 also no ``design``, and at
first no ``levels``. All are read by their own rules; a higher format raises an error. Without a
digest not all damage can be detected, since most numbers are stored once: formats 1 and 2 are only
read on request; redundant numbers are then compared, and a warning is raised.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from captum_llm_ext.base import tensor_file
from captum_llm_ext.base.finite import finite
from captum_llm_ext.base.tensor_file import BROKEN, Kind
from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.coalitions import DrawnTexts
from captum_llm_ext.result.answer import AnswerAttribution
from captum_llm_ext.result.design import Design
from captum_llm_ext.result.redundancy import check_redundancy
from captum_llm_ext.text.inputs import Level, Piece

if TYPE_CHECKING:
    from captum_llm_ext.result.numbers import ResultNumbers

T = TypeVar("T")

KIND = Kind(
    "saved result",
    "captum_llm_ext",
    format=7,
    advice="give a file written by `GenerationAttributionResult.save`.",
    digest_since=3,
    oldest=1,
)
_TENSORS = (
    "seq_attr",
    "token_attr",
    "output_probs",
    "token_attr_se",
    "output_attr",
    "output_attr_se",
    "full_values",
    "empty_values",
    "efficiency_gap",
    "masks",
    "values",
    "draws",
    "target",
    "foils",
    "foil_values",
)
_OF_TEXTS = {
    "drawn_texts": "texts",
    "text_probabilities": "probabilities",
    "text_columns": "columns",
}
_OF_ANSWER = {"answer_attr": "attributions", "answer_attr_se": "standard_errors"}
_NAMES = ("input_tokens", "output_tokens", "output_features")
_INTEGERS = (torch.int64, torch.int32)
_IDS = ("target", "draws", "foils", "drawn_texts", "text_columns")
_MOST = 2**63  # the range of int64
_ROLES_SINCE = 3  # some files of format 3 have them


def write(path: str | os.PathLike[str], result: "ResultNumbers") -> None:
    """Writes a result atomically.

    If writing fails, an existing file is unchanged.

    Raises:
        TypeError, ValueError: If JSON cannot hold its provenance.
        OSError: If the file cannot be written.
    """
    rest = {
        **{name: getattr(result, name) for name in _NAMES},
        "n_evaluations": result.n_evaluations,
        "prompt_pieces": [list(p.to_dict().values()) for p in result.prompt_pieces],
        "output_pieces": [list(p.to_dict().values()) for p in result.output_pieces],
        "levels": [[level.name, level.parts, level.part_of] for level in result.levels],
        "design": None if result.design is None else result.design.to_dict(),
        "foil_tokens": result.foil_tokens,
        "answer": None if result.own_answer is None else result.own_answer.to_dict(),
        "provenance": result.provenance,
    }
    plain = finite(rest)
    try:
        json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"the result cannot be saved: {error}. Give `provenance` numbers, text, lists and "
            "mappings only."
        ) from error
    tensors = {name: getattr(result, name) for name in _TENSORS}
    tensors |= {name: getattr(result.own_answer, field, None) for name, field in _OF_ANSWER.items()}
    tensors |= {name: getattr(result.drawn_texts, field, None) for name, field in _OF_TEXTS.items()}
    there = {name: value for name, value in tensors.items() if value is not None}
    tensor_file.write(path, KIND, there, plain)


def read(path: str | os.PathLike[str], make: Callable[..., T], *, unverified: bool = False) -> T:
    """Reads a result from a file of this or an earlier version.

    Args:
        path: The file.
        make: The result's class; called with the stored fields by name.
        unverified: Whether to read formats without a digest.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        ValueError: If the file is damaged, not a result, of a later format, or has no digest and
            `unverified` is false.

    Warns:
        UserWarning: If its format has no digest, so that not all damage is detected.
    """
    tensors, rest = tensor_file.read(path, KIND)
    version = rest.pop("format")
    try:
        _check_rest(rest, version)
        _check_tensors(tensors, rest)
        if version < KIND.digest_since:
            check_redundancy(tensors, rest)
        for name in ("prompt_pieces", "output_pieces"):
            rest[name] = [Piece(*piece) for piece in rest[name]]
        rest["levels"] = [Level(*level) for level in rest.get("levels", ())]
        if rest.get("design") is not None:
            rest["design"] = Design.from_dict(rest["design"])
        if rest.get("answer") is not None:
            numbers = (tensors.pop(name) for name in _OF_ANSWER)
            rest["answer"] = AnswerAttribution.from_dict(rest["answer"], *numbers)
        if _OF_TEXTS.keys() & tensors.keys():
            rest["drawn_texts"] = DrawnTexts(*(tensors.pop(name) for name in _OF_TEXTS))
        found = make(**tensors, **rest)
    except BROKEN as error:
        raise _broken(path, error) from error
    if version < KIND.digest_since and not unverified:
        raise ValueError(
            f"{os.fspath(path)!r} is of format {version}, which has no digest: damage to its "
            "numbers cannot be detected. To read it all the same, give `unverified=True` to "
            "`GenerationAttributionResult.load`, and `save` the result: the new file has one."
        )
    if version < KIND.digest_since:
        _warn_of_no_digest(path, version, rest.get("design") is not None)
    return found


def read_provenance(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The provenance in a result's file; tensors are neither read nor checked.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        ValueError: If the file is truncated, not a result, or of a later format.
    """
    found = tensor_file.read_rest(path, KIND).get("provenance") or {}
    if not isinstance(found, dict):
        raise _broken(path, TypeError("its provenance is no object"))
    return cast(dict[str, Any], found)


def _broken(path: str | os.PathLike[str], error: Exception) -> ValueError:
    """The error for a file whose parts do not form a result."""
    message = str(error) or type(error).__name__
    return ValueError(f"{os.fspath(path)!r} is damaged ({message}): {KIND.advice}")


def _warn_of_no_digest(path: str | os.PathLike[str], version: int, can_be_solved: bool) -> None:
    anew = " (`refit()` solves its coalitions anew)" if can_be_solved else ""
    warn_user(
        f"{os.fspath(path)!r} is of format {version}, which has no digest: damage that leaves its "
        f"numbers and names plausible cannot be detected. If they are those you know{anew}, `save` "
        "the result: the new file has one.",
    )


def _check_tensors(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Checks that the tensors fit together.

    Raises:
        ValueError, LookupError: If they do not.
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
        "masks": (n_coalitions, n_features),
    }
    if n_output is not None:
        expected |= dict.fromkeys(("output_attr", "output_attr_se"), (n_target, n_output))
    if rest.get("foil_tokens") is not None:
        expected |= {"foils": (n_target, _n_foils(tensors, rest))}
        expected |= {"foil_values": (n_coalitions, n_target)} if "foil_values" in tensors else {}
    if rest.get("answer") is not None:
        n_parts = 1 + max(_list_of(int, rest["answer"], "part_of"))
        expected |= dict.fromkeys(_OF_ANSWER, (n_parts,))
    if _OF_TEXTS.keys() & tensors.keys():
        n_units, n_texts = tensors["text_probabilities"].shape
        expected |= {"drawn_texts": (n_coalitions, n_units), "text_columns": (n_units,)}
        expected |= {"text_probabilities": (n_units, n_texts)}
        _check_texts(tensors, n_features)
    for name, shape in expected.items():
        found = tensors.get(name)
        if found is None and name != "output_probs":
            raise ValueError(f"it has no `{name}`")
        if found is not None and tuple(found.shape) != shape:
            raise ValueError(f"`{name}` has shape {tuple(found.shape)}, not {shape}")
    for name, found in tensors.items():
        wanted = {"masks": (torch.bool,), **dict.fromkeys(_IDS, _INTEGERS)}.get(name)
        is_right = found.is_floating_point() if wanted is None else found.dtype in wanted
        if name not in expected or not is_right:
            raise ValueError(f"it has a `{name}` of {found.dtype}")
    if rest["output_pieces"] and len(rest["output_pieces"]) != n_target:
        raise ValueError(f"it has {len(rest['output_pieces'])} pieces of {n_target} target tokens")
    design = rest.get("design")
    if design is not None and (
        design["n_features"] > n_features
        or len(design["n_visible"]) != n_target
        or len(design["columns"]) != n_prompt
    ):
        raise ValueError("`design` describes other coalitions")


def _check_texts(tensors: Mapping[str, Tensor], n_features: int) -> None:
    """Checks that drawn texts exist.

    Raises:
        ValueError, LookupError: If one does not.
    """
    texts, columns = tensors["drawn_texts"], tensors["text_columns"]
    n_texts = tensors["text_probabilities"].shape[1]
    is_text = (texts >= -1) & (texts < n_texts)
    if not bool(is_text.all()) or not bool(((columns >= 0) & (columns < n_features)).all()):
        raise ValueError("`drawn_texts` names texts or columns that do not exist")


def _n_foils(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> int:
    """The maximum number of foils of a token.

    Raises:
        ValueError, LookupError, TypeError: If the numbers of foils' names and ids differ.
    """
    names, ids = rest["foil_tokens"], tensors["foils"]
    each = [_list_of(str, {"foil_tokens": own}, "foil_tokens") for own in names]
    if [len(own) for own in each] != (ids >= 0).sum(1).tolist():
        raise ValueError("`foil_tokens` names other foils than `foils` has")
    return ids.shape[1]


def _check_rest(rest: Mapping[str, Any], version: int) -> None:
    """Checks the types of everything beside the tensors.

    Raises:
        ValueError, LookupError, TypeError: If a type is wrong.
    """
    n_columns = len(_list_of(str, rest, "input_tokens"))
    _list_of(str, rest, "output_tokens")
    if rest["output_features"] is not None:
        _list_of(str, rest, "output_features")
    if type(rest["n_evaluations"]) is not int or not isinstance(rest["provenance"], dict):
        raise ValueError("`n_evaluations` is not a number, or `provenance` not an object")
    _check_pieces(rest, version)
    for name, parts, part_of in rest.get("levels", ()):
        level = {"parts": parts, "part_of": part_of}
        n_parts = len(_list_of(str, level, "parts"))
        if not isinstance(name, str) or len(_list_of(int, level, "part_of")) != n_columns:
            raise ValueError(f"the level {name!r} is not one of {n_columns} features")
        if not all(0 <= part < n_parts for part in part_of):
            raise ValueError(f"the level {name!r} has no part {max(part_of)}")
    if rest["provenance"].get("noise_floor") is not None:
        floor = _list_of(float, rest["provenance"], "noise_floor")
        if len(floor) != len(rest["output_tokens"]):
            raise ValueError(f"`noise_floor` has {len(floor)} numbers")
    if rest.get("answer") is not None:
        _check_answer(rest["answer"], n_columns)
    if "columns" in rest["provenance"]:
        _list_of(int, rest["provenance"], "columns")
    design = rest.get("design")
    if design is not None:
        for name in ("n_visible", "required", "columns"):
            _list_of(int, design, name)
        kinds = {"planned": str, "solved": str, "options": dict, "deterministic": bool}
        for name, kind in {**kinds, "n_features": int, "n_anchors": int}.items():
            if type(design[name]) is not kind:
                raise ValueError(f"`{name}` of `design` is {design[name]!r}")


def _check_answer(answer: Mapping[str, Any], n_columns: int) -> None:
    """Checks what is said of the whole answer's attributions.

    Raises:
        ValueError, LookupError, TypeError: If a type is wrong.
    """
    kinds = {"level": str, "estimator": str, "n_evaluations": int, "full_value": float}
    told = [name for name in ("empty_value", "empty_error") if answer[name] is not None]
    for name, kind in (kinds | dict.fromkeys(told, float)).items():
        if type(answer[name]) is not kind:
            raise ValueError(f"`{name}` of `answer` is {answer[name]!r}")
    part_of = _list_of(int, answer, "part_of")
    if len(part_of) != n_columns or set(part_of) != set(range(1 + max(part_of))):
        raise ValueError(f"`answer` is not about {n_columns} columns")


def _list_of(kind: type, rest: Mapping[str, Any], name: str) -> Sequence[Any]:
    found = rest[name]
    if not isinstance(found, list) or not all(type(one) is kind for one in cast(list[Any], found)):
        raise ValueError(f"`{name}` is not a list of {kind.__name__}")
    if kind is int and not all(-_MOST < one < _MOST for one in cast(list[int], found)):
        raise ValueError(f"`{name}` holds a number of more than 64 bits")
    return cast(list[Any], found)


def _check_pieces(rest: Mapping[str, Any], version: int) -> None:
    """Checks the pieces of a text.

    Raises:
        ValueError, LookupError, TypeError: If one is invalid.
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
