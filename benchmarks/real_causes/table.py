"""Shares with intervals, and comparisons on the same prompts."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from real_causes.judged import Judgement, judge, paired, wilson
from real_causes.prompts import Prompt

BESIDE = "`ModelBaselines`"
_COSTS = ("positions", "seconds", "search_positions", "search_seconds")
Found = dict[str, list[tuple[Prompt, dict[str, Any]]]]


def row(found: Found, target: str) -> dict[str, Any]:
    """Statistics of one method over all prompts.

    Args:
        found: Per half the prompts and what was measured of each.
        target: The `attr_target` that is asked for.

    Returns:
        Per half and of all: the number of prompts; the share whose strongest word is the cause,
        with its interval; with the word that selects the cause; among content words only. Then
        what each prompt's strongest word is, with ``C`` for a cause, ``s`` for a selector; the same
        of content words; means per prompt of what it costs; and how many foils a contrast had.
    """
    everything = [one for of in found.values() for one in of]
    runs = [run for _, run in everything]
    n = max(len(runs), 1)
    costs = {key: sum(run["cost"][key] for run in runs) / n for key in _COSTS}
    named = {half: _named(of, target) for half, of in found.items()}
    content = {half: _named(of, target, content_only=True) for half, of in found.items()}
    both = [list(chain.from_iterable(judged.values())) for judged in (named, content)]
    return {
        "all": _shares(*both),
        **{half: _shares(named[half], content[half]) for half in found},
        "strongest": {half: " ".join(j.strongest for j in of) for half, of in named.items()},
        "verdicts": {half: _letters(of) for half, of in named.items()},
        "verdicts_content": {half: _letters(of) for half, of in content.items()},
        "mean_cost": {"evaluations": sum(run["evaluations"] for run in runs) / n, **costs},
        # Of runs before that was told, eight.
        "n_foils": sorted({run.get("n_foils", 8) for run in runs}) if target == "contrast" else [],
        "commits": sorted({run["commit"] for run in runs if run["commit"]}),
    }


def pairs(rows: Sequence[dict[str, Any]], beside: str = BESIDE) -> list[dict[str, Any]]:
    """Each kind of absence compared with one of them, for the same method, value and prompts."""
    causes = {
        (r["absence"], r["method"], r["attr_target"]): [
            letter == "C" for letters in r["verdicts"].values() for letter in letters
        ]
        for r in rows
    }
    told: list[dict[str, Any]] = []
    for (absence, method, target), own in causes.items():
        other = causes.get((beside, method, target))
        if other is None or absence == beside:
            continue
        told.append(
            {
                "absence": absence,
                "beside": beside,
                "method": method,
                "attr_target": target,
                "only_this": sum(a and not b for a, b in zip(own, other, strict=True)),
                "only_other": sum(b and not a for a, b in zip(own, other, strict=True)),
                "p": paired(own, other),
            }
        )
    return told


def _named(
    of: Sequence[tuple[Prompt, dict[str, Any]]], target: str, *, content_only: bool = False
) -> list[Judgement]:
    return [
        judge(prompt, run["spans"], run["attributions"][target], content_only=content_only)
        for prompt, run in of
    ]


def _shares(named: Sequence[Judgement], content: Sequence[Judgement]) -> dict[str, Any]:
    n, n_cause = len(named), sum(j.is_cause for j in named)
    return {
        "n": n,
        "cause": n_cause / max(n, 1),
        "interval": wilson(n_cause, n),
        "cause_or_selector": sum(j.is_cause or j.is_selector for j in named) / max(n, 1),
        "cause_among_content_words": sum(j.is_cause for j in content) / max(n, 1),
    }


def _letters(named: Sequence[Judgement]) -> str:
    """A letter per prompt: ``C`` cause, ``s`` selector, ``-`` another word."""
    return "".join("C" if j.is_cause else "s" if j.is_selector else "-" for j in named)
