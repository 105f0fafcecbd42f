"""What led to each token in the end: shares of the prompt, through all that was written before.

`total` is the whole interface; `attribution` has what it gives, `graph` the links that it follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_llm_ext.result.influence import passed_back
from captum_llm_ext.result.refit import Evidence
from captum_llm_ext.result.resampling import deviations, replicates
from captum_llm_ext.result.total.attribution import Route, Share, TotalAttribution
from captum_llm_ext.result.total.graph import Graph, View

if TYPE_CHECKING:
    from captum_llm_ext.result.numbers import ResultNumbers

__all__ = ["FLOOR", "Route", "Share", "Source", "TotalAttribution", "total"]

# Of values in nats: what changes a probability by less than a tenth has no cause worth following.
FLOOR = 0.1
_IN_NATS = ("log_prob", "log_odds", "contrast", "logit")
_RELATIVE_FLOOR = 0.02  # of the largest sum of a token, for values in other units
_N_DRAWS = 200  # of attributions, for the spread of shares


@dataclass(frozen=True)
class Source:
    """What totals ask of a result's coalitions.

    Attributes:
        features: Per column of `full_attr` its feature.
        evidence: The coalitions.
        split: What a solver says of features, at the columns of prompt and output.
    """

    features: Sequence[int]
    evidence: Callable[[], Evidence]
    split: Callable[[Tensor], tuple[Tensor, Tensor]]


def total(
    result: "ResultNumbers",
    source: Source,
    floor: float | None,
    level: str | None,
    n_resamples: int,
    seed: int,
) -> TotalAttribution:
    """See `GenerationAttributionResult.total`."""
    if n_resamples < 0 or n_resamples == 1:
        raise ValueError(f"`n_resamples` is {n_resamples}: give at least 2, or 0 for no errors.")
    if floor is not None and not floor >= 0:
        raise ValueError(f"`floor` is {floor!r}: give a number of at least 0.")
    view = View.of(result, source.features, level)
    attributions = result.full_attr.double().cpu()
    least = _floor(result, view.tokens(attributions)) if floor is None else floor
    graph = Graph.of(result, view, least)
    rows, nodes = graph.influence(attributions)
    prompt, output = passed_back(rows, nodes)
    return TotalAttribution(
        names=view.names,
        output_tokens=list(result.output_tokens),
        output_names=list(result.output_features or ()),
        shares=prompt,
        output_shares=output,
        direct=rows.prompt,
        direct_output=rows.output,
        strength=rows.strength,
        negative=rows.negative,
        uncertain=rows.uncertain,
        floor=least,
        level=view.level,
        method=str(result.provenance.get("method", "attribution")),
        _tokens=rows,
        _features=nodes,
        _feature_of=view.feature_of,
        _errors=partial(_errors, result, source, graph, n_resamples, seed),
    )


def _errors(
    result: "ResultNumbers",
    source: Source,
    graph: Graph,
    n_resamples: int,
    seed: int,
) -> Tensor:
    """Standard errors of shares: their spread where attributions vary as their coalitions say."""
    attributions = result.full_attr.double().cpu()
    rows, _ = graph.influence(attributions)
    shape = len(attributions), graph.view.n_prompt + graph.view.n_output
    if not bool((result.full_attr_se != 0).any()):
        return torch.zeros(shape, dtype=torch.float64, device="cpu")
    moved = _deviations(result, source, graph, attributions, n_resamples, seed)
    if moved is None:
        unknown = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
        return unknown.where(rows.has_cause[:, None], 0)
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(
        _N_DRAWS, len(moved), generator=generator, dtype=torch.float64, device="cpu"
    )
    each = [
        torch.cat(passed_back(*graph.influence(attributions + torch.tensordot(own, moved, 1))), 1)
        for own in steps
    ]
    return torch.stack(each).std(0)


def _deviations(
    result: "ResultNumbers",
    source: Source,
    graph: Graph,
    attributions: Tensor,
    n_resamples: int,
    seed: int,
) -> Tensor | None:
    """How far leaving out each group of coalitions moves attributions; None where none can be."""
    if result.design is None:
        return None
    # Other tokens have no causes, whatever the coalitions.
    keep, keep_features = graph.kept(attributions, 0.5)
    told = [
        t
        for t, feature in enumerate(graph.view.feature_of)
        if bool(keep[t].any()) or (feature is not None and bool(keep_features[feature].any()))
    ]
    found = replicates(source.evidence(), told, n_resamples, seed) if told else None
    if found is None:
        return None
    wide = torch.zeros(len(found), *attributions.shape, dtype=torch.float64, device="cpu")
    for own, solved in zip(wide, found, strict=True):
        own[told] = torch.cat(source.split(solved), 1).double().cpu()
    return deviations(wide)


def _floor(result: "ResultNumbers", tokens: Tensor) -> float:
    told = str(result.provenance.get("attr_target"))
    if told in _IN_NATS and not result.is_unsigned:
        return FLOOR
    return _RELATIVE_FLOOR * float(tokens.clamp_min(0).sum(1).max())
