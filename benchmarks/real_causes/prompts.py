"""Natural prompts whose cause is known: one word decides what is written next."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt that is continued by an answer which one of its words decides.

    Attributes:
        kind: What has to be read: ``"binding"``, ``"retrieval"``…
        template: The prompt, ``{}`` where the cause stands.
        cause: The word that decides.
        answer: What is written because of it.
        other: Another word of the same kind.
        other_answer: What is written if that one stands there.
        selector: Words that select the cause (a name or a key that is asked for); naming one of
            them is half right.
    """

    kind: str
    template: str
    cause: str
    answer: str
    other: str
    other_answer: str
    selector: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The prompt."""
        return self.template.format(self.cause)

    @property
    def counterfactual(self) -> str:
        """The prompt with the other word in place of the cause."""
        return self.template.format(self.other)

    @property
    def span(self) -> tuple[int, int]:
        """Where the cause stands in `text`."""
        start = self.template.index("{}")
        return start, start + len(self.cause)


def _read(record: dict[str, Any]) -> Prompt:
    """A line of the file; without `answer`, the cause itself is copied."""
    return Prompt(
        record["kind"],
        record["template"],
        record["cause"],
        record.get("answer", record["cause"]),
        record["other"],
        record.get("other_answer", record["other"]),
        tuple(record.get("selector", ())),
    )


_LINES = Path(__file__).with_name("prompts.jsonl").read_text(encoding="utf-8").splitlines()
_RECORDS = [json.loads(line) for line in _LINES]
# Looked at while baselines were made, and not looked at.
HALVES = {
    half: [_read(record) for record in _RECORDS if record["half"] == half]
    for half in ("seen", "held out")
}
