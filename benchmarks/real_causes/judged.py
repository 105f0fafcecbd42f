"""What a model makes of a prompt, and whether an attribution names the cause."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext import TextSegmentInput
from real_causes.prompts import Prompt

_LONGEST_ANSWER = 6  # tokens in which the answer has to be written


@dataclass(frozen=True)
class Case:
    """A prompt that the model answers right, for the right reason.

    Attributes:
        prompt: The prompt.
        target: Token ids of the answer, up to its last letter.
    """

    prompt: Prompt
    target: Tensor


def case(model: Any, tokenizer: Any, prompt: Prompt) -> Case | None:
    """The prompt as a case; None if the model does not answer it right.

    Its greedy answer has to be right, and to be the other one where the cause is replaced.
    """
    target = _answer(model, tokenizer, prompt.text, prompt.answer)
    changed = _answer(model, tokenizer, prompt.counterfactual, prompt.other_answer)
    return None if target is None or changed is None else Case(prompt, target)


def _answer(model: Any, tokenizer: Any, text: str, wanted: str) -> Tensor | None:
    """The first tokens that the model writes, if they spell what is wanted."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_LONGEST_ANSWER,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )[0, ids.shape[1] :].cpu()
    for stop in range(1, len(written) + 1):
        if tokenizer.decode(written[:stop]).strip().startswith(wanted):
            return written[:stop]
    return None


@dataclass(frozen=True)
class Judgement:
    """What an attribution says is the strongest feature.

    Attributes:
        strongest: Its text.
        is_cause: Whether it is the word that decides.
        is_right: Whether it is that, or a word that selects it.
    """

    strongest: str
    is_cause: bool
    is_right: bool


def judge(prompt: Prompt, inp: TextSegmentInput, attributions: Tensor) -> Judgement:
    """Holds the feature of the largest attribution against the cause.

    Args:
        prompt: The prompt.
        inp: The prompt as words.
        attributions: Shape ``(n_features,)``.
    """
    strongest = inp.slots[int(attributions.argmax())]
    start, stop = prompt.span
    is_cause = strongest.start < stop and start < strongest.stop
    word = strongest.text.strip().strip(".,:;?'")
    selects = word in [own.strip(":'") for own in prompt.selector]
    return Judgement(strongest.text.strip(), is_cause, is_cause or selects)


def wilson(n_right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Where the true share most likely lies (Wilson 1927): with 95 % by default."""
    if n == 0:
        return 0.0, 1.0
    share, spread = n_right / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired(one: Sequence[bool], other: Sequence[bool]) -> float:
    """How likely two equally good ways differ as often as these on the same cases.

    The exact test of McNemar (1947), two-sided.
    """
    only_one = sum(a and not b for a, b in zip(one, other, strict=True))
    only_other = sum(b and not a for a, b in zip(one, other, strict=True))
    n = only_one + only_other
    tail = sum(math.comb(n, i) for i in range(min(only_one, only_other) + 1))
    return min(1.0, 2 * tail / 2**n)
