"""Counterfactuals in words: what was replaced in the prompt, and what the model then generates."""

from collections.abc import Mapping, Sequence
from typing import Any

from captum_llm_ext.base.amounts import probability
from captum_llm_ext.base.terminal import spelled

_LONGEST = 80  # displayed characters of a changed text; chosen, not measured
_LONGEST_ANSWER = 200


def change_sentences(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The content of a page on ``counterfactuals``.

    Returns:
        For each its ``token``, the changed ``columns`` of the prompt, a sentence under ``said``,
        and the model's new ``answer``.

    Raises:
        ValueError: If one belongs to another answer.
    """
    return [_entry(one, data) for one in data.get("counterfactuals") or ()]


def _entry(one: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    answer = "".join(piece["text"] for piece in data["output"])
    t, n = int(one["token"]), len(data["output_tokens"])
    if not 0 <= t < n or _plain(one["old_answer"]) not in ("", _plain(answer)):
        raise ValueError(
            f"a counterfactual is about token {t} ({one['name']!r}) of the answer "
            f"{_short(one['old_answer'], 60)!r}, the result about {_short(answer, 60)!r}: search "
            "with the target that was attributed, such as `result.target`."
        )
    owners: Sequence[int] = data.get("column_features") or range(len(data["input_tokens"]))
    changed = set(one["features"])
    return {
        "token": t,
        "columns": [column for column, feature in enumerate(owners) if feature in changed],
        "said": _sentence(one),
        "answer": _short(one["answer"], _LONGEST_ANSWER),
    }


def _sentence(one: Mapping[str, Any]) -> str:
    changes = " and ".join(
        f"{_quoted(new)} in place of {_quoted(old)}" for old, new in one["replacements"]
    )
    before, now, new = (probability(value) for value in one["values"])
    share = float(one["share_of_draws"])
    often = "" if share >= 1 else f" ({100 * share:.0f} % of the texts tried there do it)"
    many = len(one["features"]) > 1
    least = ""
    if many:
        least = "; neither alone does it" if len(one["features"]) == 2 else "; fewer do not do it"
        least = least if one["proven_minimal"] else "; fewer might do it"
    return (
        f"With {changes or 'other text'}{often}, {_quoted(one['new_token'])} ({new}) is likelier "
        f"than {_quoted(one['name'])} ({now}, was {before}){least}."
    )


def _quoted(text: str) -> str:
    shown = _short(text, _LONGEST) or spelled(text)
    return f"“{shown}”" if shown else "nothing"


def _short(text: str, most: int) -> str:
    plain = _plain(text)
    return plain if len(plain) <= most else plain[: most - 1].rstrip() + "…"


def _plain(text: str) -> str:
    return " ".join(text.split())
