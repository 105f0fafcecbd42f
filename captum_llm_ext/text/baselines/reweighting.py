"""Candidates weighed, or written, by the language model that is being explained."""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from captum_llm_ext.text.baselines.candidates import Candidates
from captum_llm_ext.text.baselines.slot import LanguageModel, Slot
from captum_llm_ext.text.baselines.surroundings import Surroundings

# Candidates of a slot that the model reads in place, drawn from all of them. A choice: a pass each,
# four times what 16 coalitions a feature cost; the number does not bias a draw, it only limits how
# many different texts there are.
MOST_WEIGHED = 64
_WINDOW = 2_000  # characters on each side of a feature that the model reads
_WRITTEN = 64  # texts that are sampled in place of one generated feature
_ENOUGH = 6  # tokens beyond the feature's own in which another ending may be found
_WORD = re.compile(r"\s*\S+")


def in_place(
    candidates: Candidates,
    slots: Sequence[Slot],
    places: Sequence[Surroundings],
    model: LanguageModel,
) -> Candidates:
    """Candidates by how probable the model finds the text with each of them in its places.

    Args:
        candidates: At most `MOST_WEIGHED`.
        slots: The places of one feature, in reading order, with a common context.
        places: The same as atoms.
        model: The model.

    Returns:
        The same choices, weighted by ``p(text before, choice, text after)``: of all that could
        stand there, a draw is then a sample from the model's own conditional distribution.
    """
    texts: list[str] = []
    for choice in candidates.choices:
        context = slots[0].context
        position = max(0, slots[0].start - _WINDOW)
        text = ""
        for slot, place, core in zip(slots, places, choice, strict=True):
            text += context[position : slot.start] + place.filled(core)
            position = slot.stop
        texts.append(text + context[position : slots[-1].stop + _WINDOW])
    return candidates.weighted(model.log_likelihoods(texts).tolist())


def next_tokens(slot: Slot, model: LanguageModel) -> tuple[list[int], Tensor]:
    """What the model might have said in place of one generated token: ids and probabilities.

    The token itself is none of them. Ids that together have less than a millionth are left out.
    """
    probabilities = model.next_token(slot.left).double().exp()
    probabilities[slot.ids[0]] = 0
    ordered, ids = probabilities.sort(descending=True)
    total = ordered.sum()
    enough = int((ordered.cumsum(0) < total * (1 - 1e-6)).sum()) + 1
    return ids[:enough].tolist(), ordered[:enough] / total


def continued(slot: Slot, place: Surroundings, model: LanguageModel, seed: int) -> Candidates:
    """What the model might have written in place of several generated tokens.

    Continuations are sampled after the text before the feature, and cut: before the punctuation
    that the feature ends with, or else to the feature's number of words.
    """
    n_words = len(_WORD.findall(slot.text))
    mark = place.tail.strip()[:1]
    generator = torch.Generator().manual_seed(seed)
    written = model.continuations(slot.left, _WRITTEN, len(slot.ids) + _ENOUGH, generator)
    counts: Counter[tuple[str, ...]] = Counter()
    for text in written:
        cut = text.split(mark)[0] if mark and mark in text else _first_words(text, n_words)
        if cut.strip():
            counts[(cut.strip(),)] += 1
    return Candidates.counted("model", "_", counts, (place.core,))


def _first_words(text: str, n: int) -> str:
    return "".join(_WORD.findall(text)[:n])
