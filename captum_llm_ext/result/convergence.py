"""Estimates from the first coalitions only, to show convergence."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from captum_llm_ext.coalitions import Solution
from captum_llm_ext.result.refit import Evidence

# Share of the coalitions in the first estimate, if that exceeds one coalition per feature (not at
# the default 16 per feature): five doublings before the last, with errors six times as large.
# Earlier ones would flatten the rest of the plot. Chosen, not measured.
_SMALLEST_SHARE = 1 / 32


def earlier(
    evidence: Evidence, tokens: Sequence[int], n_estimates: int = 8
) -> list[tuple[int, Solution]]:
    """Solutions from the first coalitions only; the model is not called.

    Coalitions that belong together (an order and its reverse, a coalition and its complement, one
    repetition of an enumeration) are added together. The full and empty coalitions are included
    from the start.

    Args:
        evidence: All coalitions.
        tokens: The target tokens to solve.
        n_estimates: Maximum number of estimates; numbers of coalitions grow geometrically.

    Returns:
        Pairs of a number of coalitions and a solution with one row per entry of `tokens`. The
        solution from all coalitions is not included.

    Raises:
        ValueError: If no part of the coalitions can be solved.
    """
    if evidence.design.correction is not None:
        raise ValueError(
            "values of a surrogate and their correction converge separately: attribute without "
            "`surrogate` to see it."
        )
    chosen = torch.tensor(list(tokens), dtype=torch.int64, device="cpu")
    scope = replace(evidence.scope.part(chosen), n_sharing=0)
    values = evidence.values[:, chosen.to(evidence.values.device)]
    if evidence.design.options.get("law") == "uniform":  # few coalitions are intended here
        options = {**evidence.design.options, "warns": False}
        evidence = replace(evidence, design=replace(evidence.design, options=options))
    found: list[tuple[int, Solution]] = []
    for n in _counts(_cuts(evidence), evidence, n_estimates):
        part = replace(
            evidence,
            masks=evidence.masks[:n],
            draws=evidence.draws[:n],
            values=values[:n],
            scope=scope,
        )
        found.append((n, part.solve()))
    return found


def _cuts(evidence: Evidence) -> list[int]:
    """Numbers of leading rows that can be solved, except that of all rows."""
    design, draws = evidence.design, evidence.draws[evidence.design.n_anchors :].cpu()
    enumerates = design.solved in ("exact", "leave-one-out", "exact Owen values")
    steps = draws.diff()
    if enumerates and design.planned != design.solved:
        ends = torch.zeros(0, dtype=torch.long, device="cpu")
    elif design.solved == "exact":
        ends = torch.arange(2**design.n_features, len(draws), 2**design.n_features, device="cpu")
    elif design.solved == "best-first splits":
        # Every repetition scores the same coalitions, batch by batch.
        whole = steps < 0 if bool(steps.any()) else torch.ones_like(steps, dtype=torch.bool)
        ends = whole.nonzero()[:, 0] + 1
    else:
        ends = steps.nonzero()[:, 0] + 1
    if not len(ends):
        raise ValueError(
            f"what {design.solved} found did not converge step by step: it uses all of its "
            "coalitions at once. Plot a result of `KernelShap` or `ShapleyValueSampling`."
        )
    return (ends + design.n_anchors).tolist()


def _counts(cuts: Sequence[int], evidence: Evidence, n_estimates: int) -> list[int]:
    """Some of the cuts, evenly spaced on a logarithmic scale."""
    n_anchors, n_features = evidence.design.n_anchors, evidence.design.n_features
    n_rows = len(evidence.masks) - n_anchors
    # With fewer rows than features, estimates and their standard errors mean little.
    first = min(max(n_features, round(_SMALLEST_SHARE * n_rows)), n_rows)
    wanted = [n_anchors + first * (n_rows / first) ** (i / n_estimates) for i in range(n_estimates)]
    return sorted({min(cuts, key=lambda cut: abs(cut - count)) for count in wanted})
