"""The variability of attributions with their coalitions: solved again without some of them."""

from dataclasses import replace

import torch
from torch import Tensor

from captum_llm_ext.coalitions.clustered_errors import normal_scale
from captum_llm_ext.result.refit import SOLVERS, Evidence

# Solvers of repeated enumerations, for which no coalition may be missing from all repetitions.
_ENUMERATES = (
    "leave-one-out",
    "only one in",
    "exact",
    "exact Owen values",
    "best-first splits",
    "hierarchical search",
)
_REGRESSIONS = ("paired kernel regression", "antithetic permutations")


def replicates(evidence: Evidence, n_groups: int, seed: int) -> Tensor | None:
    """Attributions from all coalitions but one group, for every group in turn.

    The delete-a-group jackknife (Kott 2001): coalitions that share a draw belong to one group, as
    does each repetition of an enumeration. Groups are drawn at random. Regressions omit interaction
    terms, which would take seconds: they give the correlation of errors, and errors larger than
    those of the answer itself.

    Args:
        evidence: The coalitions.
        n_groups: Maximum number of groups.
        seed: Seeds the groups.

    Returns:
        Shape ``(n_groups, n_target, n_features)``; None if coalitions cannot be left out.
    """
    if evidence.design.correction is not None:
        parts = [replicates(level, n_groups, seed) for level in evidence.levels()]
        known = [part for part in parts if part is not None]
        alike = len({len(part) for part in known}) == 1 and len(known) == len(parts)
        return sum(known[1:], known[0]) if alike else None
    if evidence.design.solved not in SOLVERS or n_groups < 2:
        return None
    groups = _groups(evidence, n_groups, seed)
    if groups is None:
        return None
    options = dict(evidence.design.options)
    n = int(groups.max()) + 1
    if evidence.design.solved in _REGRESSIONS:
        options["effort"] = 0.0
    if options.get("law") == "uniform":  # few coalitions are intended here
        options["warns"] = False
    evidence = replace(evidence, design=replace(evidence.design, options=options))
    found: list[Tensor] = []
    for group in range(n):
        rest = groups != group
        at = rest.to(evidence.masks.device)
        part = replace(
            evidence, masks=evidence.masks[at], draws=evidence.draws[at], values=evidence.values[at]
        )
        n_anchors = int(rest[: evidence.design.n_anchors].sum())
        part = replace(part, design=replace(evidence.design, n_anchors=n_anchors))
        found.append(part.solve().attributions)
    return torch.stack(found)


def deviations(found: Tensor) -> Tensor:
    """Deviations of `replicates`; their sum of squares is the variance.

    Args:
        found: Shape ``(n_groups, …)``.

    Returns:
        The same shape. Plus and minus 1.96 square roots of the sum of squares cover 95 %, however
        few the groups.
    """
    n = len(found)
    return (found - found.mean(0)) * ((n - 1) / n) ** 0.5 * normal_scale(n - 1)


def _groups(evidence: Evidence, n_groups: int, seed: int) -> Tensor | None:
    """Group of each coalition, -1 if it is never left out; None if none can be."""
    masks, draws = evidence.masks.cpu(), evidence.draws.cpu()
    n_anchors = evidence.design.n_anchors
    # Anchors and other coalitions are two enumerations: each keeps one repetition.
    groups = torch.cat(
        [_repetitions(part, n_groups) for part in (masks[:n_anchors], masks[n_anchors:])]
    )
    if evidence.design.solved not in _ENUMERATES:
        generator = torch.Generator().manual_seed(seed)
        _, cluster = draws[n_anchors:].unique(return_inverse=True)
        n_clusters = int(cluster.max()) + 1 if len(cluster) else 0
        order = torch.randperm(n_clusters, generator=generator, device="cpu")
        groups[n_anchors:] = (order % min(n_groups, max(n_clusters, 1)))[cluster]
    return groups if len(groups[n_anchors:].unique()) > 1 else None


def _repetitions(masks: Tensor, n_groups: int) -> Tensor:
    """Index of a row's repetition of its coalition, modulo the groups; -1 if not repeated."""
    if not len(masks):
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    _, which, counts = masks.unique(dim=0, return_inverse=True, return_counts=True)
    rank = torch.zeros(len(masks), dtype=torch.int64, device="cpu")
    order = which.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rank[order] = torch.arange(len(masks), device="cpu") - starts[which[order]]
    n = min(n_groups, int(counts.max()))
    return (rank % n).where(counts[which] > 1, -1)
