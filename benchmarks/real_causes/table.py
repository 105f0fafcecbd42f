"""Shares with intervals, and comparisons on the same prompts."""

from collections.abc import Sequence
from typing import Any

from real_causes.judged import judge, paired, wilson
from real_causes.prompts import Prompt

BESIDE = "`ModelBaselines`"
_SUMS = ("positions", "seconds", "search_positions", "search_seconds")
Found = dict[str, list[tuple[Prompt, dict[str, Any]]]]


def row(found: Found) -> dict[str, Any]:
    """What one way of attributing makes of all prompts.

    Args:
        found: Per half the prompts and what was measured of each.

    Returns:
        Per half and of all: the number of prompts; the share whose strongest word is the cause,
        with its interval; with the word that selects the cause; among content words only. Then
        what each prompt's strongest word is, with ``C`` for a cause, ``s`` for a selector; the same
        of content words; and means per prompt of what it costs.
    """
    halves = {name: _shares(of) for name, of in found.items()}
    everything = [one for of in found.values() for one in of]
    runs = [run for _, run in everything]
    n = max(len(runs), 1)
    costs = {key: sum(run["cost"][key] for run in runs) / n for key in _SUMS}
    return {
        "all": _shares(everything),
        **halves,
        "strongest": {name: _strongest(of) for name, of in found.items()},
        "verdicts": {name: _verdicts(of) for name, of in found.items()},
        "verdicts_content": {name: _verdicts(of, True) for name, of in found.items()},
        "mean_cost": {"evaluations": sum(run["evaluations"] for run in runs) / n, **costs},
        "commits": sorted({run["commit"] for run in runs if run["commit"]}),
    }


def pairs(rows: Sequence[dict[str, Any]], beside: str = BESIDE) -> list[dict[str, Any]]:
    """Each absence beside one of them, by the same method and value on the same prompts."""
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


def _shares(of: list[tuple[Prompt, dict[str, Any]]]) -> dict[str, Any]:
    letters, content = _verdicts(of), _verdicts(of, content_only=True)
    n = len(letters)
    return {
        "n": n,
        "cause": letters.count("C") / max(n, 1),
        "interval": wilson(letters.count("C"), n),
        "cause_or_selector": (n - letters.count("-")) / max(n, 1),
        "cause_among_content_words": content.count("C") / max(n, 1),
    }


def _verdicts(of: list[tuple[Prompt, dict[str, Any]]], content_only: bool = False) -> str:
    """A letter per prompt: ``C`` cause, ``s`` selector, ``-`` another word."""
    found = (
        judge(prompt, run["spans"], run["attributions"], content_only=content_only)
        for prompt, run in of
    )
    return "".join("C" if j.is_cause else "s" if j.is_selector else "-" for j in found)


def _strongest(of: list[tuple[Prompt, dict[str, Any]]]) -> str:
    """The strongest word of each prompt; no word holds white space."""
    return " ".join(judge(p, run["spans"], run["attributions"]).strongest for p, run in of)
