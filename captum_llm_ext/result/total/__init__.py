"""Total influence on each token: shares of the prompt, also through earlier output.

`total` is the whole interface; `attribution` has its result class, `graph` the edges of chains.
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
from captum_llm_ext.result.total.spread import Spread

if TYPE_CHECKING:
    from captum_llm_ext.result.numbers import ResultNumbers

__all__ = ["FLOOR", "Route", "Share", "Source", "TotalAttribution", "total"]

# In nats: a change of a probability by less than a tenth has no cause worth following. Chosen, not
# measured.
FLOOR = 0.1
_IN_NATS = ("log_prob", "log_odds", "contrast", "logit")
# Relative to the largest sum of a token, for values in other units; chosen, not measured.
_RELATIVE_FLOOR = 0.02


@dataclass(frozen=True)
class Source:
    """What `total` needs of a result's coalitions.

    Attributes:
        features: Feature of each column of `full_attr`.
        evidence: The coalitions, or None.
        split: Maps a solver's numbers per feature to columns of prompt and output.
        known: Cache of `moved`, by its arguments.
    """

    features: Sequence[int]
    evidence: Callable[[], Evidence] | None
    split: Callable[[Tensor], tuple[Tensor, Tensor]]
    known: dict[tuple[int, int], Tensor | None]

    def moved(self, n_resamples: int, seed: int) -> Tensor | None:
        """Changes of attributions when each group of coalitions is left out, for all levels.

        Returns:
            Shape ``(n_groups, T, columns)``; None if no group can be left out.
        """
        key = n_resamples, seed
        if key not in self.known:
            self.known[key] = self._moved(*key)
        return self.known[key]

    def _moved(self, n_resamples: int, seed: int) -> Tensor | None:
        if self.evidence is None:
            return None
        try:
            found = replicates(self.evidence(), n_resamples, seed)
            if found is None:
                return None
            found = torch.stack([torch.cat(self.split(solved), 1) for solved in found])
        except (ValueError, IndexError):
            # From a file of another program, whose design does not match its coalitions.
            return None
        return deviations(found.double().cpu())


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
        _within=partial(view.within, n_tokens=len(result.output_tokens)),
        _spread=partial(_spread, result, source, graph, n_resamples, seed),
    )


def _spread(
    result: "ResultNumbers", source: Source, graph: Graph, n_resamples: int, seed: int
) -> Spread:
    errors = result.full_attr_se.double().cpu()
    moved = source.moved(n_resamples, seed) if bool((errors != 0).any()) else None
    return Spread(graph, result.full_attr.double().cpu(), errors, moved, seed)


def _floor(result: "ResultNumbers", tokens: Tensor) -> float:
    target = str(result.provenance.get("attr_target"))
    if target in _IN_NATS and not result.is_unsigned:
        return FLOOR
    return _RELATIVE_FLOOR * float(tokens.clamp_min(0).sum(1).max())
