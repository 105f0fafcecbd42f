"""What a result says of values that an API did not report."""

import warnings

import torch
from torch import Tensor

from captum_llm_ext.attribution.sampling import Outcome
from captum_llm_ext.base.digest import stacklevel_of_caller
from captum_llm_ext.remote.bounds import Bounds, weights
from captum_llm_ext.remote.estimate import finite
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
        warnings.warn(within_bounds(result), stacklevel=stacklevel_of_caller())


def within_bounds(result: GenerationAttributionResult) -> str:
    """A warning that within the bounds of values another cause may be the strongest."""
    first, second = first_two(result)
    return (
        f"not distinguishable: {result.provenance['share_censored']:.0%} of the values are bounds, "
        f"and within these {second} may be as strong a cause as {first}."
    )


def first_two(result: GenerationAttributionResult) -> tuple[str, str]:
    """Names of the two strongest causes."""
    apart = result.provenance["first_cause"]
    first, second = (repr(result.input_tokens[apart[which]]) for which in ("first", "second"))
    return first, second
