"""Candidates weighted, or generated, by the explained model."""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from captum_llm_ext.text.baselines.candidates import Candidates
from captum_llm_ext.text.baselines.slot import LanguageModel, Slot
from captum_llm_ext.text.baselines.surroundings import Surroundings

# Maximum number of candidates per slot that the model scores in place, drawn from all of them.
# Chosen, not measured: a pass each, four times the cost of 16 coalitions per feature; the number
# does not bias draws, it only limits the number of different texts.
MOST_WEIGHED = 64
_WINDOW = 2_000  # characters of context on each side of a feature; chosen, not measured
_WRITTEN = 64  # continuations sampled per generated feature; chosen, not measured
_ENOUGH = 6  # additional tokens in which a matching end may occur; chosen, not measured
_WORD = re.compile(r"\s*\S+")


def in_place(
    candidates: Candidates,
    slots: Sequence[Slot],
    places: Sequence[Surroundings],
    model: LanguageModel,
) -> Candidates:
    """Weights candidates by the model's probability of the text with each in place.

    Args:
        candidates: At most `MOST_WEIGHED`.
        slots: The places of one feature, in reading order, with a common context.
        places: The same places as atoms.
        model: The model.

    Returns:
        The same choices, weighted by ``p(text before, choice, text after)``: a draw is then a
        sample from the model's own conditional distribution over the candidates.
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
    """The model's alternatives to one generated token: ids and probabilities.

    The token itself is excluded, as are ids that together have less than a millionth.
    """
    probabilities = model.next_token(slot.left).double().exp()
    probabilities[slot.ids[0]] = 0
    ordered, ids = probabilities.sort(descending=True)
    total = ordered.sum()
    enough = int((ordered.cumsum(0) < total * (1 - 1e-6)).sum()) + 1
    return ids[:enough].tolist(), ordered[:enough] / total


def continued(slot: Slot, place: Surroundings, model: LanguageModel, seed: int) -> Candidates:
    """The model's alternatives to several generated tokens.

    Continuations are sampled after the text before the feature, and truncated before the
    punctuation that the feature ends with, or to the feature's number of words.
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
