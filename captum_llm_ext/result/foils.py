"""What a result says of foils: those of a token in words, and the value beside its own."""

from typing import TYPE_CHECKING

from captum_llm_ext.result.refit import SOLVERS
from captum_llm_ext.result.terminal import one_line

if TYPE_CHECKING:
    from captum_llm_ext.result.result import GenerationAttributionResult

_OTHER = {"contrast": "log_prob", "log_prob": "contrast"}


def rather_than(result: "GenerationAttributionResult", token: int, k: int = 3) -> str:
    """``"rather than Oslo, Rome, Madrid"``; empty where a token is held against nothing.

    Args:
        result: The result.
        token: Position of the target token.
        k: How many foils are told at most.
    """
    if result.foil_tokens is None or result.provenance.get("attr_target") != "contrast":
        return ""
    foils = [one_line(name) for name in result.foil_tokens[token]]
    told = ", ".join(foils[:k]) + ", …" * (len(foils) > k)
    return f"rather than {told}" if foils else ""


def other_value(result: "GenerationAttributionResult") -> "GenerationAttributionResult | None":
    """The same by log-probability where a contrast is told, and the other way round.

    None where the coalitions do not tell it.
    """
    other = _OTHER.get(str(result.provenance.get("attr_target")))
    design = result.design
    if other is None or result.foil_values is None or design is None:
        return None
    return result.refit(attr_target=other) if design.solved in SOLVERS else None
