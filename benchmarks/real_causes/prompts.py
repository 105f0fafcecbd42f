"""Natural prompts whose cause is known: one word determines the next."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt whose answer one of its words determines.

    Attributes:
        kind: What has to be read: ``"binding"``, ``"retrieval"``…
        template: The prompt, ``{}`` where the cause stands.
        cause: The word that decides.
        answer: What is written because of it.
        others: Other words of its kind, and what is written if one of them stands there.
        selector: Words that select the cause (a name or a key that is asked for); naming one of
            them is half right.
    """

    kind: str
    template: str
    cause: str
    answer: str
    others: Mapping[str, str]
    selector: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The prompt."""
        return self.template.format(self.cause)

    @property
    def span(self) -> tuple[int, int]:
        """The position of the cause in `text`."""
        start = self.template.index("{}")
        return start, start + len(self.cause)


def _read(record: dict[str, Any]) -> Prompt:
    """A line of the file; without `answer`, the answer is a copy of the cause."""
    others = record["others"]
    return Prompt(
        record["kind"],
        record["template"],
        record["cause"],
        record.get("answer", record["cause"]),
        others if isinstance(others, dict) else {other: other for other in others},
        tuple(record.get("selector", ())),
    )


def _taking_turns(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts in rotation over kinds, so that the first n are of all kinds."""
    seen: Counter[str] = Counter()
    turns: list[tuple[int, Prompt]] = []
    for prompt in prompts:
        turns.append((seen[prompt.kind], prompt))
        seen[prompt.kind] += 1
    return [prompt for _, prompt in sorted(turns, key=lambda turn: turn[0])]


_LINES = Path(__file__).with_name("prompts.jsonl").read_text(encoding="utf-8").splitlines()
_RECORDS = [json.loads(line) for line in _LINES]
# Looked at while baselines were made, and not: of those only the ones that `ModelBaselines` of
# 2026-11-29 missed were, for what absent words just before an answer are drawn by.
HALVES = {
    half: _taking_turns([_read(record) for record in _RECORDS if record["half"] == half])
    for half in ("looked at", "not looked at")
}
