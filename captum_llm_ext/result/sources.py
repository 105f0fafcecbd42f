"""What a result tells beside its numbers, as plain data: names, causes in two blocks, sentences."""

import math
from typing import TYPE_CHECKING, Any

from captum_llm_ext.result.about import header
from captum_llm_ext.result.causes import Cause
from captum_llm_ext.result.narrative import sentences
from captum_llm_ext.result.reading import Blocks, Reading, adds_up, finest_level

if TYPE_CHECKING:
    from captum_llm_ext.result.result import GenerationAttributionResult

_MOST = 3  # causes per block


def told(result: "GenerationAttributionResult") -> dict[str, Any]:
    """What ``to_dict()`` has in words.

    Returns:
        ``about``: model, method, unit, absence, evaluations. ``labels``: names that tell columns
        and tokens apart. ``marked_beyond``: see there. ``causes``: per part of the answer its
        ``name``, the tokens from ``start`` up to ``stop``, and its strongest causes in the
        ``prompt`` and in the ``answer`` before it. ``summary``: the same of the whole answer by
        the largest parts of the prompt, and their ``level``; None where values do not add up.
        ``narrative``: sentences.
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
    }


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
