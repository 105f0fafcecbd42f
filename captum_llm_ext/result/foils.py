"""Foils of a result: their names, and conversions between contrasts and log-probabilities."""

from copy import copy
from typing import TYPE_CHECKING, Any, TypeVar

from captum_llm_ext.base.terminal import one_line
from captum_llm_ext.contrast import Contrast
from captum_llm_ext.result.refit import SOLVERS

if TYPE_CHECKING:
    from captum_llm_ext.result.numbers import ResultNumbers

A = TypeVar("A", bound=Any)

_OTHER = {"contrast": "log_prob", "log_prob": "contrast"}


def list_foils(result: "ResultNumbers", token: int, k: int = 3) -> str:
    """``"Oslo, Rome, Madrid, …"``; empty if the token has no foils.

    Args:
        result: The result.
        token: Position of the target token.
        k: Maximum number of foils listed.
    """
    if result.foil_tokens is None or result.provenance.get("attr_target") != "contrast":
        return ""
    names = [one_line(name) for name in result.foil_tokens[token]]
    foils = [name if any(map(str.isalnum, name)) else repr(name) for name in names]
    return ", ".join(foils[:k]) + ", …" * (len(foils) > k > 1)


def against_same(attribution: A, result: "ResultNumbers") -> A:
    """The attribution, if it explains a contrast with the result's foils."""
    if result.foils is None or not isinstance(attribution.attr_target, Contrast):
        return attribution
    other = copy(attribution)
    other.attr_target = Contrast(foils=result.foils)
    return other


def foil_ids(result: "ResultNumbers") -> list[list[int]] | None:
    """Ids of the foils, if values are contrasts with them."""
    is_contrast = result.provenance.get("attr_target") == "contrast"
    return result.foils.tolist() if is_contrast and result.foils is not None else None


def other_value(result: A) -> A | None:
    """The attribution of the log-probability for a contrast, and vice versa.

    None if the coalitions do not determine it.
    """
    other = _OTHER.get(str(result.provenance.get("attr_target")))
    design = result.design
    if other is None or result.foil_values is None or design is None:
        return None
    return result.refit(attr_target=other) if design.solved in SOLVERS else None
