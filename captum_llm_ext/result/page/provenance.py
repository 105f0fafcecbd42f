"""How a result was computed, in names and words that a reader knows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Entries of the provenance that are tables of candidates or numbers per token.
_LONG = ("matches", "fixed_attr", "fixed_share", "constant_attr")
_FIRST = ("method", "attr_target", "n_evaluations", "estimate")
_NAMES = {
    "attr_target": "value explained",
    "n_evaluations": "evaluations",
    "n_coalitions": "coalitions",
    "n_samples": "budget",
    "estimate": "is an estimate",
    "model_class": "class of the model",
    "dtype": "numbers of the model",
    "absence": "absent parts",
    "deterministic_baselines": "absent parts are always the same",
    "unit": "parts of the prompt",
    "output_unit": "parts of the answer",
    "noise_floor": "noise of the model's arithmetic",
    "generation": "how the answer was generated",
    "probe": "what the model was found to do",
}
# Names of entries within dictionaries, such as on generation.
_PARTS = {
    "eos_token_id": "until the token with number {}",
    "max_new_tokens": "at most {} tokens",
    "n_before": "positions before the text {}",
    "jumps": "values jump where numbers within move by {}",
}
_UNTOLD_ZERO = ("n_before", "jumps")
# Of yes and no: what each says; nothing where it goes without saying.
_CLAIMS = {
    "do_sample": ("drawn at random", "the likeliest token each time"),
    "last_only": ("gives the last position’s logits only", ""),
    "sees_ahead": (
        "what follows a token changes its value",
        "sees nothing of what follows a token",
    ),
    "couples_rows": ("rows of a batch change one another", "rows of a batch change nothing"),
    "mixes_lengths": ("padding changes values", "padding changes nothing"),
    "reuses_beginnings": ("goes on from a cache", "cannot go on from a cache"),
    "lends_beginnings": ("shares a cache", "cannot share a cache"),  # as files of before have it
    "shares_beginnings": ("shares a cache", "cannot share a cache"),
    "packs_rows": ("several texts in one row are exact", "no several texts in one row"),
}
_VALUES = {"log_prob": "log-probability", "prob": "probability", "True": "yes", "False": "no"}


def provenance_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """Pairs of a name and a value, in display order."""
    entries = {name: data[name] for name in _FIRST if name in data}
    if (answer := data.get("answer")) is not None:
        entries["whole_answer"] = _of_answer(answer)
    entries |= {
        name: value for name, value in data.get("provenance", {}).items() if name not in _LONG
    }
    rows = [(name, _spelled(value)) for name, value in entries.items()]
    return [[_NAMES.get(name, name.replace("_", " ")), text] for name, text in rows if text]


def _of_answer(answer: Mapping[str, Any]) -> str:
    """How the whole answer's attributions were computed."""
    n = answer["n_evaluations"]
    of = "these evaluations" if not n else f"{n:,} evaluation{'s' * (n != 1)} more, counted above"
    return f"held as it is; by {answer['level']}, {answer['estimator']}, from {of}"


def _spelled(value: Any) -> str:
    """A value as text; empty if it carries no information."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        named = (_part(str(key), item) for key, item in value.items())  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        return ", ".join(filter(None, named))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _listed(list(value))  # pyright: ignore[reportUnknownArgumentType]
    return _VALUES.get(value, value) if isinstance(value, str) else str(value)


def _part(name: str, value: Any) -> str:
    """One of what is noted together; empty where it says nothing."""
    if name in _CLAIMS and str(value) in ("True", "False"):
        return _CLAIMS[name][str(value) == "False"]
    text = "" if name in _UNTOLD_ZERO and not value else _spelled(value)
    known = _PARTS.get(name, f"{name.replace('_', ' ')} {{}}")
    return text and (text if name == "dtype" else known.format(text))


def _listed(values: list[Any]) -> str:
    """Many numbers as their range: one per token would be too long."""
    known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    if len(values) > 1 and len(known) == len(values):
        low, high = _spelled(float(min(known))), _spelled(float(max(known)))
        return low if low == high else f"{low} to {high}"
    return ", ".join(text for text in map(_spelled, values) if text)
