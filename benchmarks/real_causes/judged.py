"""Answers of a model to a prompt, and whether an attribution names the cause."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from real_causes.lists import is_function_word
from real_causes.prompts import Prompt

_LONGEST_ANSWER = 6  # tokens in which the answer has to be written


def answer_of(model: Any, tokenizer: Any, prompt: Prompt) -> list[int] | None:
    """The token ids of the answer, up to its last letter; None if it is wrong.

    The greedy answer has to be right, and to be the other one where the cause is replaced by
    another word of its kind: by the first one or, if that is not answered right, by the next.
    """
    right = _written(model, tokenizer, prompt.text, prompt.answer)
    if right is None:
        return None
    changed = (
        _written(model, tokenizer, prompt.template.format(other), answer)
        for other, answer in prompt.others.items()
    )
    return right if any(other is not None for other in changed) else None


def _written(model: Any, tokenizer: Any, text: str, wanted: str) -> list[int] | None:
    """The first generated tokens, if they spell the expected text."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_LONGEST_ANSWER,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )[0, ids.shape[1] :].tolist()
    for stop in range(1, len(written) + 1):
        if tokenizer.decode(written[:stop]).strip().startswith(wanted):
            return written[:stop]
    return None


@dataclass(frozen=True)
class Judgement:
    """The strongest feature of an attribution, compared with the cause.

    Attributes:
        strongest: Its text.
        is_cause: Whether it is the word that decides.
        is_selector: Whether it is a word that selects that one.
    """

    strongest: str
    is_cause: bool
    is_selector: bool


def judge(
    prompt: Prompt,
    spans: Sequence[tuple[int, int]],
    attributions: Sequence[float],
    *,
    content_only: bool = False,
) -> Judgement:
    """Compares the word with the largest attribution with the cause.

    Args:
        prompt: The prompt.
        spans: Of its words.
        attributions: One each.
        content_only: Function words and marks are left out.
    """
    words = [prompt.text[start:stop].strip() for start, stop in spans]
    asked = [i for i, word in enumerate(words) if not content_only or not is_function_word(word)]
    top = max(asked, key=lambda i: attributions[i])
    (start, stop), (first, last) = spans[top], prompt.span
    is_cause = start < last and first < stop
    selects = words[top].strip(".,:;?\"'") in [own.strip(":'") for own in prompt.selector]
    return Judgement(words[top], is_cause, selects and not is_cause)


def wilson(n_right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927), 95 % by default."""
    if n == 0:
        return 0.0, 1.0
    share, spread = n_right / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Probability of so large a difference on the same cases between equally good alternatives.

    The exact test of McNemar (1947), two-sided.
    """
    only_one = sum(a and not b for a, b in zip(one, other, strict=True))
    only_other = sum(b and not a for a, b in zip(one, other, strict=True))
    n = only_one + only_other
    tail = sum(math.comb(n, i) for i in range(min(only_one, only_other) + 1))
    return min(1.0, 2 * tail / 2**n)
