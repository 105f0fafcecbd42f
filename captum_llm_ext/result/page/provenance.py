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
# Names of entries within dictionaries, such as on generation and on the model.
_PARTS = {
    "eos_token_id": "ends at token",
    "max_new_tokens": "tokens at most",
    "do_sample": "drawn at random",
    "dtype": "computes in",
    "n_before": "positions before the text",
    "last_only": "last position only",
    "sees_ahead": "sees what follows",
    "couples_rows": "sees other rows of a batch",
    "mixes_lengths": "changes with the length of a batch",
    "reuses_beginnings": "reuses beginnings",
    "lends_beginnings": "shares beginnings",  # as older files have it
    "shares_beginnings": "shares beginnings",
    "packs_rows": "reads several rows as one",
}
_VALUES = {"log_prob": "log-probability", "prob": "probability", "True": "yes", "False": "no"}


def provenance_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """Pairs of a name and a value, in display order."""
    entries = {name: data[name] for name in _FIRST if name in data}
    entries |= {
        name: value for name, value in data.get("provenance", {}).items() if name not in _LONG
    }
    rows = [(name, _spelled(value)) for name, value in entries.items()]
    return [[_NAMES.get(name, name.replace("_", " ")), text] for name, text in rows if text]


def _spelled(value: Any) -> str:
    """A value as text; empty if it carries no information."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        named = ((str(key), _spelled(item)) for key, item in value.items())  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        pairs = ((_PARTS.get(name, name.replace("_", " ")), text) for name, text in named)
        return ", ".join(f"{name} {text}" for name, text in pairs if text)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _listed(list(value))  # pyright: ignore[reportUnknownArgumentType]
    return _VALUES.get(value, value) if isinstance(value, str) else str(value)


def _listed(values: list[Any]) -> str:
    """Many numbers as their range: one per token would be too long."""
    known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    if len(values) > 1 and len(known) == len(values):
        low, high = _spelled(float(min(known))), _spelled(float(max(known)))
        return low if low == high else f"{low} to {high}"
    return ", ".join(text for text in map(_spelled, values) if text)
