"""The settings of an attribution in words: model, method, unit, baselines, evaluations."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from captum_llm_ext.result.causes import unit_of

if TYPE_CHECKING:
    from captum_llm_ext.result.numbers import ResultNumbers

_SHAPLEY = "Shapley values"
_METHODS = {
    "FeatureAblation": "leave-one-out",
    "FeatureInclusion": "only one in",
    "KernelShap": _SHAPLEY,
    "ShapleyValues": _SHAPLEY,
    "ShapleyValueSampling": _SHAPLEY,
    "PartitionShap": "Owen values",
    "Lime": "local linear model",
}
_VALUES = {
    "log_prob": "log-probability",
    "log_odds": "log-odds",
    "prob": "probability",
    "contrast": "log-probability against foils",
    "attention": "attention",
}
_ABSENT = {
    "deleted": "absent parts deleted",
    "model": "absent parts rewritten by the model itself",
    "corpus": "absent parts taken from other texts",
    "texts": "absent parts replaced by given texts",
    "function": "absent parts replaced by a function of the user's",
    "zero": "absent parts are zero vectors",
    "zero activation": "absent activations are zero",
}
_MOST_FACTOR = 1e9
_NATS = ("log_prob", "contrast", "log_odds")


def header(result: "ResultNumbers") -> list[str]:
    """Model, method, value and unit, absence, evaluations, whether the answer was cut: in words."""
    parts = (
        describe_model,
        describe_method,
        describe_value,
        describe_absence,
        describe_evaluations,
        describe_cut,
    )
    return [text for text in (part(result) for part in parts) if text]


def describe_model(result: "ResultNumbers") -> str:
    """The model's name; empty if unknown."""
    provenance = result.provenance
    return str(provenance.get("model") or provenance.get("model_class") or "")


def describe_method(result: "ResultNumbers") -> str:
    """``"Shapley values (KernelShap)"``."""
    name = str(result.provenance.get("method", ""))
    return f"{_METHODS[name]} ({name})" if name in _METHODS else name


def describe_value(result: "ResultNumbers") -> str:
    """``"log-probability in nats"``."""
    name = str(result.provenance.get("attr_target", ""))
    value = _VALUES.get(name, name)
    unit = "nats" if name in _NATS else None
    if unit is not None and unit_of(result) is None:
        return f"size of the slope of {value}"
    return f"{value} in {unit}" if unit else value


def describe_absence(result: "ResultNumbers") -> str:
    """What replaced absent parts; empty if unknown."""
    name = absence(result)
    if not name:
        return ""
    if name.startswith("token "):
        return f"absent parts replaced by {name}"
    return _ABSENT.get(name, f"absent parts replaced by {name}")


def absence(result: "ResultNumbers") -> str:
    """The name of the prompt's baselines; empty if unknown."""
    both: Any = result.provenance.get("absence")
    if isinstance(both, Mapping):
        return str(cast(Mapping[str, Any], both).get("prompt") or "")
    name = result.provenance.get("absent")  # gradients
    if name == "baseline":
        name = result.provenance.get("baselines")
    return name if isinstance(name, str) and name != "nothing" else ""


def describe_evaluations(result: "ResultNumbers") -> str:
    """``"estimate from 1,024 evaluations"``."""
    estimate = "estimate from " if result.provenance.get("estimate") else ""
    n = result.n_evaluations
    return f"{estimate}{n:,} evaluation{'s' * (n != 1)}"


def describe_cut(result: "ResultNumbers") -> str:
    """``"answer cut after 40 tokens"``: no more were allowed; empty if it came to its end."""
    settings: Any = result.provenance.get("generation")
    n = len(result.output_tokens)
    if not isinstance(settings, Mapping) or n < 2:
        return ""
    generation = cast(Mapping[str, Any], settings)
    ends = re.findall(r"\d+", str(generation.get("eos_token_id", "")))
    is_over = str(int(result.target[-1])) in ends
    is_full = str(generation.get("max_new_tokens")) == str(n)
    return f"answer cut after {n} tokens" if is_full and not is_over else ""


def factor(nats: float, *, of_odds: bool = False) -> str:
    """``"119 times as probable"``, or of a contrast ``"119 times the odds"``.

    Args:
        nats: A difference of log-probabilities or log-odds.
        of_odds: Whether it is a difference of log-odds against foils.
    """
    times = math.exp(min(abs(nats), 50.0))
    shown = f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
    if times >= _MOST_FACTOR:
        shown = "over a billion"
    if of_odds:
        return f"{shown} times the odds" if nats > 0 else f"the odds divided by {shown}"
    return f"{shown} times {'as' if nats > 0 else 'less'} probable"


def is_in_nats(result: "ResultNumbers") -> bool:
    """Whether a difference of values is the logarithm of a ratio."""
    return result.provenance.get("attr_target") in _NATS and unit_of(result) is not None
