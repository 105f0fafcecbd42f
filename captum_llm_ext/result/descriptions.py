"""Descriptions of a result as plain data: names, causes in two blocks, sentences."""

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from captum_llm_ext.result.about import header
from captum_llm_ext.result.causes import Cause, unit_of
from captum_llm_ext.result.levels import answer_levels
from captum_llm_ext.result.narrative import sentences
from captum_llm_ext.result.reading import (
    Blocks,
    Reading,
    adds_up,
    finest_level,
    page_parts,
    row_unit,
)
from captum_llm_ext.result.token_names import words_around
from captum_llm_ext.text.inputs import Piece

if TYPE_CHECKING:
    from captum_llm_ext.result.numbers import ResultNumbers

_MOST = 3  # causes per block; chosen, not measured
# Sentences of the answer with exact errors of sums, each of which takes tenths of a second; chosen,
# not measured.
_MOST_SENTENCES = 3


def descriptions(result: "ResultNumbers") -> dict[str, Any]:
    """The descriptive part of ``to_dict()``.

    Returns:
        ``about``: model, method, unit, absence, evaluations. ``labels``: unique names of columns
        and tokens. ``marked_beyond``: as the attribute of results. ``causes``: per part of the
        answer its ``name``, the tokens from ``start`` up to ``stop``, and its strongest causes in
        the ``prompt`` and in the ``answer`` before it. ``summary``: the same for the whole answer,
        by the largest parts of the prompt, and their ``level``; None if values do not add up.
        ``narrative``: sentences. ``answer``: see `answer_as_data`.
    """
    read, n_target = Reading(result, finest_level(result)), len(result.output_tokens)
    rows = [
        {"name": row.name, "start": row.start, "stop": row.stop}
        | _blocks(read.causes(row.start, row.stop))
        for row in read.rows
    ]
    coarse = Reading(result)
    whole = coarse.causes(0, n_target, precise=True) if adds_up(result) else None
    return {
        "about": header(result),
        "labels": result.names._asdict(),
        "marked_beyond": result.marked_beyond,
        "causes": rows,
        "summary": None if whole is None else {"level": coarse.prompt.level} | _blocks(whole),
        "narrative": sentences(result, 0, n_target, reading=coarse),
        "answer": answer_as_data(result),
    }


def answer_as_data(result: "ResultNumbers") -> dict[str, Any] | None:
    """Attributions of the whole answer (`AnswerAttribution`) as plain data; None without them.

    Returns:
        ``level``, ``full_value``, ``empty_value``, ``empty_error``, ``estimator``,
        ``n_evaluations``; ``parts``, in the order of the text: ``part``, ``attribution``,
        ``standard_error``, whether it is ``marked``, and its ``columns``; and ``gain_in_words``:
        what they are parts of.
    """
    found = result.answer
    if found is None:
        return None
    read = Reading(result, found.level)
    causes = {read.prompt.part_of[c.column]: c for c in read.causes(0, len(result.target)).prompt}
    columns: dict[int, list[int]] = {}
    for column, part in enumerate(found.part_of):
        columns.setdefault(part, []).append(column)
    parts: list[dict[str, Any]] = []
    for i, name in enumerate(read.prompt.names):
        of = found.part_of[read.prompt.part_of.index(i)]
        error = float(found.standard_errors[of])
        parts.append(
            {
                "part": name,
                "attribution": float(found.attributions[of]),
                "standard_error": None if math.isnan(error) else error,
                "marked": i in causes and causes[i].is_marked,
                "columns": columns[of],
            }
        )
    about = found.to_dict()
    del about["part_of"]
    return about | {"parts": parts, "gain_in_words": found.gain_in_words(unit_of(result))}


def reading_aids(result: "ResultNumbers") -> dict[str, Any]:
    """Further display data of a page: ``answer_unit``, and ``around`` of word fragments."""
    prompt, output = (
        _around(pieces, n)
        for pieces, n in (
            (result.prompt_pieces, len(result.input_tokens)),
            (result.output_pieces, len(result.output_features or ())),
        )
    )
    return {"answer_unit": row_unit(result), "around": {"prompt": prompt, "output": output}}


def part_sums(result: "ResultNumbers") -> list[dict[str, Any]]:
    """Standard errors of sums for the whole answer and its first sentences, as ``sums`` of a page.

    By a jackknife over sampled coalitions.
    """
    if not adds_up(result) or bool(result.full_attr_se.isnan().any()):
        return []
    levels = {level["name"]: level for level in answer_levels(result)}
    runs = [[0, len(result.output_tokens)]]
    if "sentence" in levels:
        part_of = levels["sentence"]["part_of"]
        cuts = [t for t in range(len(part_of)) if not t or part_of[t] != part_of[t - 1]]
        runs += [list(run) for run in pairwise([*cuts, len(part_of)])][:_MOST_SENTENCES]
    spans = [run for i, run in enumerate(runs) if run not in runs[:i]]
    replicated = [(span, result.replicates(*span)) for span in spans]
    found: list[dict[str, Any]] = []
    for side, level, parts in page_parts(result):
        errors = [
            (span, parts.errors(replicates, result.full_attr_se[slice(*span)]).tolist())
            for span, replicates in replicated
            if replicates is not None
        ]
        if errors:
            found.append(
                {
                    "side": side,
                    "level": level,
                    "spans": [span for span, _ in errors],
                    "se": [[float(f"{x:.3g}") if x == x else None for x in se] for _, se in errors],
                }
            )
    return found


def _around(pieces: Sequence[Piece], n: int) -> list[list[str]]:
    """Per column the rest of the word that it is a fragment of, before and after."""
    found = [["", ""] for _ in range(n)]
    for _, run in groupby(pieces, key=lambda piece: piece.role):
        own = list(run)
        around = words_around([piece.text for piece in own])
        for piece, (before, after) in zip(own, around, strict=True):
            if piece.feature is not None and piece.text.strip():
                first = found[piece.feature][0] or before
                found[piece.feature] = [first, after]
    return found


def _blocks(blocks: Blocks) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [_cause(cause) for cause in block[:_MOST]] for name, block in blocks._asdict().items()
    }


def _cause(cause: Cause) -> dict[str, Any]:
    error = cause.standard_error
    return {
        "name": (cause.label or cause.name).strip() or cause.name,
        "text": cause.name,
        "attribution": cause.attribution,
        "standard_error": None if math.isnan(error) else error,
        "marked": cause.is_marked,
    }
