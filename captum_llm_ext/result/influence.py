"""Total influence on a token: direct influence, propagated from token to token.

Attributions give the direct causes of a token. Causes within the answer have causes themselves:
followed back to the prompt, all influence is distributed over the prompt's features. As in CAGE
(arXiv 2512.15663): with ``G`` the non-negative influence of earlier output and ``A`` that of the
prompt, rows of both together summing to 1, the total is ``(I - G)^-1 A``. Pure functions of
tensors; those up to `passed_back` accept further leading axes, such as one of draws.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Probability that an answer has a false cause, under a normal distribution of all candidates'
# errors: the threshold is 1.64 standard errors for one candidate, 1.96 for two, 2.58 for ten, 3.29
# for a hundred, and at least two, which matters for one or two candidates only. A smaller
# probability drops weak links. The usual level, not measured.
_CHANCE, _LEAST_ERRORS = 0.05, 2.0


@dataclass(frozen=True)
class Influence:
    """Direct influence on each node (a token, or a feature of the output), as shares.

    Attributes:
        prompt: float64 ``(n_nodes, n_prompt)``.
        output: float64 ``(n_nodes, n_output)``. Rows of both together sum to 1, or to 0 if the node
            has no significant cause.
        strength: ``(n_nodes,)``: sum of the kept attributions, in their unit.
        negative: ``(n_nodes,)``: share of absolute attributions omitted because they are negative.
        uncertain: ``(n_nodes,)``: share omitted because it is within its error.
    """

    prompt: Tensor
    output: Tensor
    strength: Tensor
    negative: Tensor
    uncertain: Tensor

    @property
    def has_cause(self) -> Tensor:
        """Whether the node has a significant cause, bool ``(n_nodes,)``."""
        return self.strength > 0


def kept(attributions: Tensor, errors: Tensor, noise: Tensor, floor: float) -> Tensor:
    """Which attributions count as influence, bool, of their shape.

    Args:
        attributions: Shape ``(n_nodes, n_columns)``.
        errors: Their standard errors. An attribution must exceed two of them, or as many more as
            one column in twenty answers exceeds by chance: chains pass through all rows, so a false
            cause of one propagates to others. NaN (unknown) imposes no threshold.
        noise: Magnitude up to which an attribution may be rounding, ``(n_nodes, 1)`` or a number.
        floor: A node whose attributions sum to less has no cause.
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
        keep: As returned by `kept`. Negative attributions are omitted in any case.
        n_prompt: Number of prompt columns, which come first.
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
        Shares of the prompt's features ``(n_output, n_prompt)``, and of output features
        ``(n_output, n_output)`` without a cause, at which chains begin. Both together sum to 1 in
        every row.
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
    """Total influence on each node: direct, and through earlier output features.

    Args:
        nodes: Influence on tokens.
        features: Influence on the output features that they may depend on.

    Returns:
        Shares ``(n_nodes, n_prompt)`` and ``(n_nodes, n_output)`` as for `total_influence`. Rows
        sum to 1, or to 0 for a token without a cause.
    """
    of_prompt, of_output = total_influence(features)
    return nodes.prompt + nodes.output @ of_prompt, nodes.output @ of_output


def of_spans(
    inside: Tensor, own: Tensor, nodes: Influence, features: Influence
) -> tuple[Tensor, Tensor]:
    """Total influence on several spans of nodes, each as one node.

    What the span's own words did to one another is inside it and no cause of the span: otherwise a
    cause of its first word would count again for every word that follows from this one.

    Args:
        inside: 1 for the nodes of each span, ``(n_spans, n_nodes)``.
        own: Output features that lie within a span as a whole, bool ``(n_spans, n_output)``.
        nodes, features: As for `passed_back`.

    Returns:
        Shares ``(n_spans, n_prompt)`` and ``(n_spans, n_output)`` as for `passed_back`.
    """
    weights = inside * nodes.strength[..., None, :]
    prompt, output = weights @ nodes.prompt, (weights @ nodes.output).masked_fill(own, 0)
    whole = prompt.sum(-1, keepdim=True) + output.sum(-1, keepdim=True)
    of_prompt, of_output = total_influence(features)
    whole = whole.clamp_min(torch.finfo(whole.dtype).tiny)
    return (prompt + output @ of_prompt) / whole, output @ of_output / whole


class Chain(NamedTuple):
    """A path from a feature to a node.

    Attributes:
        share: Share in the node's total influence: the product of the shares along the path.
        begins_in_prompt: Whether it begins in the prompt; otherwise at an output feature without a
            cause.
        first: The feature that it begins with.
        through: The output features that it passes, in reading order, without the first one.
    """

    share: float
    begins_in_prompt: bool
    first: int
    through: tuple[int, ...]


def strongest_chains(row: Influence, node: int, features: Influence, k: int) -> list[Chain]:
    """The paths with the largest shares in the total influence on a node, strongest first.

    Args:
        row: Influence on nodes.
        node: Index of the node.
        features: Influence on the output's features.
        k: Maximum number of paths.
    """
    prompt, output = features.prompt.tolist(), features.output.tolist()
    has_cause = features.has_cause.tolist()
    # Strongest chains per feature: those of earlier features are known when a later one needs them.
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
        node: Index of the node.
        features: Influence on the output's features.

    Returns:
        The influence on the output's features, each edge multiplied by the share of the node's
        influence that passes through the feature it leads to. The last row is the node's own.
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
