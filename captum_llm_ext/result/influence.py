"""Total influence on a token: direct influence, passed on from token to token.

Attributions say what led to a token directly. What of it stands in the answer was itself led to by
something: followed back to the prompt, all of it is shared out among the prompt's features.
As in CAGE (arXiv 2512.15663): with ``G`` the non-negative influence of earlier
output and ``A`` that of the prompt, rows of both together summing to 1, the total is
``(I - G)^-1 A``. Pure functions of tensors; those up to `passed_back` take further axes in front,
such as one of draws.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Chance that an answer has a cause that is none, by the normal law of all candidates' errors: one
# candidate has to exceed 1.64 of them, two 1.96, ten 2.58, a hundred 3.29. Two are asked for at
# least, which decides for one or two candidates only. A smaller chance drops weak links.
_CHANCE, _LEAST_ERRORS = 0.05, 2.0


@dataclass(frozen=True)
class Influence:
    """Direct influence on each node (a token, or a feature of the output), as shares.

    Attributes:
        prompt: float64 ``(n_nodes, n_prompt)``.
        output: float64 ``(n_nodes, n_output)``. Rows of both together sum to 1, or to 0 where
            nothing in particular led to the node.
        strength: ``(n_nodes,)``: what was kept of the node's attributions, in their unit.
        negative: ``(n_nodes,)``: share of the attributions' sizes that was left out for its sign.
        uncertain: ``(n_nodes,)``: share that was left out as within its error.
    """

    prompt: Tensor
    output: Tensor
    strength: Tensor
    negative: Tensor
    uncertain: Tensor

    @property
    def has_cause(self) -> Tensor:
        """Whether something in particular led to the node, bool ``(n_nodes,)``."""
        return self.strength > 0


def kept(attributions: Tensor, errors: Tensor, noise: Tensor, floor: float) -> Tensor:
    """Which attributions count as influence, bool, of their shape.

    Args:
        attributions: Shape ``(n_nodes, n_columns)``.
        errors: Their standard errors: what lies within two of them counts as nothing, or within as
            many more as one column in twenty answers would exceed by chance: chains pass through
            all rows, so that a false cause of one is one of others. NaN, where errors are unknown,
            tells nothing.
        noise: Size up to which an attribution may be rounding, ``(n_nodes, 1)`` or a number.
        floor: Below this sum nothing in particular led to a node.
    """
    candidates = (attributions != 0).sum((-2, -1), keepdim=True).clamp_min(1)
    beyond = torch.special.ndtri(1 - _CHANCE / candidates.double()).clamp_min(_LEAST_ERRORS)
    sure = ~(attributions <= beyond * errors) & (attributions > noise) & (attributions > 0)
    sums = attributions.where(sure, 0).sum(-1, keepdim=True)
    return sure & (sums >= floor)


def influence(attributions: Tensor, keep: Tensor, n_prompt: int) -> Influence:
    """Converts attributions into shares.

    Args:
        attributions: Shape ``(n_nodes, n_prompt + n_output)``.
        keep: As of `kept`. What is negative counts as nothing all the same.
        n_prompt: Columns of the prompt, which come first.
    """
    attributions = attributions.double()
    sizes = attributions.abs()
    positive = attributions.clamp_min(0).where(keep, 0)
    strength = positive.sum(-1)
    whole = sizes.sum(-1).clamp_min(torch.finfo(sizes.dtype).tiny)
    left_out = sizes.where(~keep & (attributions > 0), 0).sum(-1)
    shares = positive / strength.clamp_min(torch.finfo(sizes.dtype).tiny)[..., None]
    return Influence(
        shares[..., :n_prompt],
        shares[..., n_prompt:],
        strength,
        (sizes.sum(-1) - attributions.clamp_min(0).sum(-1)) / whole,
        left_out / whole,
    )


def total_influence(features: Influence) -> tuple[Tensor, Tensor]:
    """Total influence on each feature of the output.

    Args:
        features: Influence on the output's features, whose ``output`` is strictly lower triangular.

    Returns:
        Shares of the prompt's features ``(n_output, n_prompt)``, and of the output's own
        ``(n_output, n_output)``: those that nothing in particular led to, where chains begin. Both
        together sum to 1 in every row.
    """
    n, n_prompt = features.strength.shape[-1], features.prompt.shape[-1]
    unit = torch.eye(n, dtype=features.prompt.dtype, device=features.prompt.device)
    begins = unit.where(~features.has_cause[..., None], 0)
    sources = torch.cat([features.prompt, begins], dim=-1)
    solved = torch.linalg.solve_triangular(
        unit - features.output, sources, upper=False, unitriangular=True
    )
    return solved[..., :n_prompt], solved[..., n_prompt:]


def passed_back(nodes: Influence, features: Influence) -> tuple[Tensor, Tensor]:
    """Total influence on each node: direct, and through earlier features of the output.

    Args:
        nodes: Influence on tokens.
        features: Influence on the features of the output that they may depend on.

    Returns:
        Shares ``(n_nodes, n_prompt)`` and ``(n_nodes, n_output)`` as of `total_influence`. Rows
        sum to 1 where something in particular led to the token, and to 0 elsewhere.
    """
    of_prompt, of_output = total_influence(features)
    return nodes.prompt + nodes.output @ of_prompt, nodes.output @ of_output


class Chain(NamedTuple):
    """A path from a feature to a node.

    Attributes:
        share: Of all that led to the node: the product of the shares along the way.
        begins_in_prompt: Whether it begins in the prompt; else at a feature of the output that
            nothing in particular led to.
        first: The feature that it begins with.
        through: The features of the output that it goes through, in reading order, the first one
            not included.
    """

    share: float
    begins_in_prompt: bool
    first: int
    through: tuple[int, ...]


def strongest_chains(row: Influence, node: int, features: Influence, k: int) -> list[Chain]:
    """The paths with the largest shares in the total influence on a node, the strongest first.

    Args:
        row: Influence on nodes.
        node: The one whose chains are wanted.
        features: Influence on the output's features.
        k: How many at most.
    """
    prompt, output = features.prompt.tolist(), features.output.tolist()
    has_cause = features.has_cause.tolist()
    # Per feature its strongest chains: those of earlier ones are known when a later one asks.
    found: list[list[Chain]] = []
    for feature, caused in enumerate(has_cause):
        if caused:
            found.append(_best(prompt[feature], output[feature], found, k))
        else:
            found.append([Chain(1.0, False, feature, ())])
    return _best(row.prompt[node].tolist(), row.output[node].tolist(), found, k)


def _best(
    prompt: Sequence[float], output: Sequence[float], found: Sequence[Sequence[Chain]], k: int
) -> list[Chain]:
    direct = [Chain(share, True, p, ()) for p, share in enumerate(prompt) if share > 0]
    through = [
        chain._replace(
            share=chain.share * share,
            through=(*chain.through, j) if chain.begins_in_prompt or chain.first != j else (),
        )
        for j, share in enumerate(output[: len(found)])
        if share > 0
        for chain in found[j]
    ]
    return heapq.nlargest(k, [*direct, *through], key=lambda chain: chain.share)


def flow_towards(row: Influence, node: int, features: Influence) -> Influence:
    """The part of the total influence on a node that passes along each edge.

    Args:
        row: Influence on nodes.
        node: The node.
        features: Influence on the output's features.

    Returns:
        The influence on the output's features, each edge times what of the node passes through the
        feature it leads to. Its last row is that of the node itself.
    """
    n = len(features.strength)
    passes = torch.zeros(n, dtype=row.output.dtype, device=row.output.device)
    passes[: row.output.shape[1]] = row.output[node]
    for feature in reversed(range(n)):
        passes += passes[feature] * features.output[feature]
    joined = [
        torch.cat([whole * passes[:, None], own[node : node + 1]])
        for whole, own in ((features.prompt, row.prompt), (features.output, row.output))
    ]
    strength = torch.cat([passes, row.strength[node : node + 1].sign()])
    return Influence(joined[0], joined[1], strength, strength * 0, strength * 0)
