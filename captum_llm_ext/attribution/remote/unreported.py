"""What a result says of values that an API did not report, or that vary from answer to answer."""

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.attribution.remote.rung_choice import ChosenRung
from captum_llm_ext.attribution.sampling import Outcome
from captum_llm_ext.base.warning import stacklevel_of_caller
from captum_llm_ext.remote.bounds import Bounds, weights
from captum_llm_ext.remote.estimate import finite
from captum_llm_ext.remote.label import Label
from captum_llm_ext.remote.stepwise import TopK, reports_any_token
from captum_llm_ext.result import GenerationAttributionResult


def note_bounds(
    result: GenerationAttributionResult,
    bounds: Bounds | None,
    outcome: Outcome,
    joint: Tensor | None,
) -> None:
    """Adds bounds of values and attributions to a result's provenance.

    Warns if another cause may be the strongest within them.

    Args:
        result: The result.
        bounds: Bounds of the values; None if all of them were reported.
        outcome: What was made of the values.
        joint: Attributions of the target's joint probability ``(n_features,)``, if that is
            explained.
    """
    if bounds is None:
        return
    lower, upper = bounds.lower, bounds.upper
    result.provenance |= {
        "value_interval": finite(torch.stack([lower, upper])),
        "share_censored": float((lower < upper).double().mean()),
    }
    weight = weights(outcome.name, outcome.plan)
    # Generated features have coalitions of their own for each target token.
    if weight is None or result.output_attr is not None:
        return
    whole = outcome.solution.attributions.sum(0) if joint is None else joint
    first = bounds.first_cause(weight, whole.double(), is_product=joint is not None)
    result.provenance |= {
        "token_attr_interval": finite(torch.stack(bounds.of_attributions(weight))),
        "first_cause": first,
    }
    if first is not None and not first["is_told_apart"]:
        warnings.warn(_within_bounds(result), stacklevel=stacklevel_of_caller())


def of_rung(
    chosen: ChosenRung, outcome: Outcome, joint: Tensor | None
) -> tuple[Outcome, dict[str, Any]]:
    """What a rung below whole prompts knows of its values.

    Args:
        chosen: The rung and its scorer, which has scored the coalitions.
        outcome: What was made of the values.
        joint: As for `note_bounds`.

    Returns:
        The outcome, with the noise of sampled answers in its standard errors; and entries of the
        provenance.
    """
    scorer = chosen.scorer
    known, weight = scorer.known(), weights(outcome.name, outcome.plan)
    reported: dict[str, Any] = {
        "value_interval": finite(torch.stack([known["lower"], known["upper"]])),
        "token_attr_interval": None,
        "rungs_refused": dict(chosen.refused),
        "first_cause": None,
    }
    if weight is None:
        return outcome, reported
    whole = outcome.solution.attributions.sum(0) if joint is None else joint
    reported["first_cause"] = scorer.separates_causes(weight, whole.double())
    errors, ends = scorer.uncertainty(weight)
    if errors is not None:
        own = outcome.solution.standard_errors.nan_to_num()
        solution = replace(outcome.solution, standard_errors=torch.maximum(own, errors))
        outcome = replace(outcome, solution=solution)
    if ends is not None:
        reported["token_attr_interval"] = finite(torch.stack(ends))
    return outcome, reported


def not_told_apart(result: GenerationAttributionResult, chosen: ChosenRung) -> str:
    """A warning that on a rung another cause may be the strongest, and what would help."""
    rung = chosen.rung
    if rung.is_sampled:
        first, second = _first_two(result)
        more = result.provenance["first_cause"]["times_as_many_answers"]
        message = (
            f"not distinguishable: of {rung.n_answers} answers each, {first} is the strongest "
            f"cause, less than two standard errors apart from {second}."
        )
        if more is not None:
            message += f" About {math.ceil(more * rung.n_answers)} answers each would do."
        return message
    message = _within_bounds(result)
    if chosen.scorer.attr_target == "log_prob":
        message += ' `attr_target="prob"` hardly depends on what is only bounded.'
    about: Any = rung.details.get("handshake", {})
    if isinstance(rung, TopK | Label) and "likeliest tokens" not in about:
        message += " A larger `top_logprobs` leaves fewer of them, if the server allows it."
    if reports_any_token(chosen.scorer.endpoint.provider):
        if rung.name == TopK.name:
            message += ' With the model\'s `tokenizer`, `rung="stepwise"` may tell them.'
        if isinstance(rung, Label) and not rung.takes_ids:
            message += " With the model's `tokenizer` the server may tell them."
    return message


def _within_bounds(result: GenerationAttributionResult) -> str:
    """A warning that within the bounds of values another cause may be the strongest."""
    first, second = _first_two(result)
    return (
        f"not distinguishable: {result.provenance['share_censored']:.0%} of the values are bounds, "
        f"and within these {second} may be as strong a cause as {first}."
    )


def _first_two(result: GenerationAttributionResult) -> tuple[str, str]:
    """Names of the two strongest causes."""
    apart = result.provenance["first_cause"]
    first, second = (repr(result.input_tokens[apart[which]]) for which in ("first", "second"))
    return first, second
