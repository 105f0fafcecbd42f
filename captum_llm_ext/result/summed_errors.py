"""Standard errors of sums: over target tokens, and over the features of a part.

Tokens share coalitions, and features of one order share their sum, so their errors are correlated.
Computes what the coalitions determine, within the size limit of a page.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.result.refit import Evidence
from captum_llm_ext.text.inputs import Piece

_MOST_NUMBERS = (
    60_000  # maximum numbers on a page, of about five characters each; chosen, not measured
)
# Regressions for sums over parts of the answer, besides the whole answer's: .01 to .08 s each (12
# to 100 features, 16 rows per feature), so a third of a second at most. Smaller parts beyond them
# have no error of their own.
_MOST_REGRESSIONS = 4
_MOST_OF_ALL_SPANS = (
    20_000  # answer size up to which every span has its own errors; chosen, not measured
)
Span = tuple[int, int]


def summed_errors(
    evidence: Evidence,
    columns: Sequence[int],
    n_prompt: int,
    output_pieces: Sequence[Piece],
    levels: Sequence[Mapping[str, Any]],
    output_levels: Sequence[Mapping[str, Any]],
    token_errors: Tensor,
) -> list[dict[str, Any]]:
    """Standard errors of sums.

    Args:
        evidence: The coalitions.
        columns: Feature of each column of the result.
        n_prompt: Number of prompt columns, which come first.
        output_pieces: The target tokens.
        levels, output_levels: As returned by `page_levels`.
        token_errors: Standard errors per target token and column of the result.

    Returns:
        Per side (``"prompt"`` or ``"answer"``) and level (None: the finest) an object with
        ``side``, ``level``, ``spans`` (of target tokens, ``[start, stop]``) and ``se``: per span a
        number per column, or per part of the level. Spans that need a regression, which is slow,
        are limited to the whole answer and a few of the largest parts.
    """
    runs = {level["name"]: list(_runs(level["part_of"])) for level in output_levels}
    tokens = [(t, t + 1) for t in range(len(output_pieces))]
    spans = _spans(evidence, len(tokens), len(columns), runs)
    entries: list[dict[str, Any]] = []
    if spans:
        wide = _wide(evidence.span_errors([range(*span) for span in spans]), len(columns))
        each = torch.stack([token_errors[a:b].sum(0) for a, b in spans])
        found = capped(wide[:, list(columns)], each)
        entries.append(_entry("prompt", None, spans, found[:, :n_prompt]))
        if len(columns) > n_prompt:
            entries.append(_entry("answer", None, spans, found[:, n_prompt:]))
    room = _MOST_NUMBERS - len(spans) * len(columns)
    if len(set(columns)) < len(columns):  # captum's groups have a column per member
        return entries
    nestings = [
        *(("prompt", one["name"], list(one["part_of"]), len(one["parts"])) for one in levels),
        *(
            ("answer", name, [-1] * n_prompt + _owners(output_pieces, found), len(found))
            for name, found in runs.items()
            if len(columns) > n_prompt
        ),
    ]
    for side, name, part_of, n_parts in nestings:
        padded = [*part_of, *[-1] * evidence.design.n_features][: evidence.design.n_features]
        room -= (len(tokens) + len(spans)) * n_parts
        if room < 0 or max(padded) < 0:
            continue
        every = [*tokens, *spans]
        errors = evidence.part_errors([range(*span) for span in every], padded)
        if errors is not None:
            entries.append(_entry(side, name, every, _wide(errors, n_parts)))
    return entries


def summed_error_bounds(
    token_errors: Tensor, n_prompt: int, output_levels: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Upper bounds of standard errors of sums over tokens, where correlations are unknown.

    Args:
        token_errors: Standard errors per target token and column of the result.
        n_prompt: Number of prompt columns, which come first.
        output_levels: As returned by `page_levels`.

    Returns:
        As for `summed_errors`, at the finest level.
    """
    n_target, n_columns = token_errors.shape
    runs = {level["name"]: list(_runs(level["part_of"])) for level in output_levels}
    spans = _wanted(n_target, n_columns, runs)
    if not spans:
        return []
    found = torch.stack([token_errors[a:b].sum(0) for a, b in spans])
    entries = [_entry("prompt", None, spans, found[:, :n_prompt])]
    return entries + [_entry("answer", None, spans, found[:, n_prompt:])] * (n_columns > n_prompt)


def capped(errors: Tensor, summed: Tensor) -> Tensor:
    """Standard errors of sums, capped at the sum of those of the terms; NaN stays."""
    return errors.where(errors.isnan() | ~(summed < errors), summed.to(errors.dtype))


def _spans(
    evidence: Evidence, n_target: int, n_columns: int, runs: Mapping[str, list[Span]]
) -> list[Span]:
    """Spans of several tokens whose regressions are affordable, by priority."""
    wanted = _wanted(n_target, n_columns, runs)
    costs = [evidence.n_regressions([range(*span)]) for span in wanted]
    spent = [
        0,
        *accumulate(costs[1:]),
    ]  # the whole answer's regression is always done and not counted
    return [
        span
        for i, (span, cost) in enumerate(zip(wanted, costs, strict=True))
        if not i or not cost or spent[i] <= _MOST_REGRESSIONS
    ]


def _wanted(n_target: int, n_columns: int, runs: Mapping[str, list[Span]]) -> list[Span]:
    """Spans of several tokens by priority: the whole answer, then parts from large to small.

    A short answer has all spans.
    """
    named = [span for found in runs.values() for span in found]
    if n_target * (n_target - 1) // 2 * n_columns <= _MOST_OF_ALL_SPANS:
        named += [(a, b) for a in range(n_target) for b in range(a + 2, n_target + 1)]
    wanted = [span for span in [(0, n_target), *named] if span[1] - span[0] > 1]
    return list(dict.fromkeys(wanted))[: max(_MOST_NUMBERS // max(n_columns, 1), 1)]


def _runs(part_of: Sequence[int]) -> Iterator[Span]:
    """Runs of neighbouring tokens in one part."""
    start = 0
    for _, run in groupby(part_of):
        stop = start + len(list(run))
        yield start, stop
        start = stop


def _owners(pieces: Sequence[Piece], runs: Sequence[Span]) -> list[int]:
    """The run of each generated feature."""
    owners: dict[int, int] = {}
    for number, (start, stop) in enumerate(runs):
        for piece in pieces[start:stop]:
            if piece.feature is not None:
                owners[piece.feature] = number
    return [owners.get(feature, -1) for feature in range(1 + max(owners, default=-1))]


def _wide(errors: Tensor, width: int) -> Tensor:
    """Padded with zeros for columns that were not players."""
    return torch.nn.functional.pad(errors, (0, max(width - errors.shape[1], 0)))


def _entry(side: str, level: str | None, spans: Sequence[Span], errors: Tensor) -> dict[str, Any]:
    rounded = [
        [float(f"{error:.3g}") if error == error else None for error in row]  # NaN becomes None
        for row in errors.tolist()
    ]
    return {"side": side, "level": level, "spans": [list(span) for span in spans], "se": rounded}
