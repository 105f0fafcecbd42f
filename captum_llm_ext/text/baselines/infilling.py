"""Replacements from the user's own generator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from captum_llm_ext.text.baselines.draws import uniform
from captum_llm_ext.text.baselines.slot import Slot

Generator = Callable[[str, str, int], "str | Sequence[str]"]


class Infilling:
    """Replaces a feature by what a generator writes between the texts before and after it.

    Any masked or infilling model can be used, or the same model with an instruction. It is called
    once per slot; each draw takes one of the returned texts.

    Args:
        generate: Called with the text left of the feature, the text right of it and the number of
            tokens that the feature has; returns one text or several.
        exclude_original: Whether the feature's own text is never drawn. If there is no other text,
            it remains.

    Raises:
        TypeError: If `generate` is not callable; on use, if it returns no texts.
        ValueError: On use, if it returns an empty list.
    """

    deterministic = False

    def __init__(self, generate: Generator, *, exclude_original: bool = True) -> None:
        if not callable(generate):
            raise TypeError(
                f"`generate` is a {type(generate).__name__}: give a callable "
                "`(left, right, n_tokens) -> texts`."
            )
        self._generate = generate
        self.exclude_original = exclude_original
        self._texts: dict[Slot, list[str]] = {}

    def __call__(self, slot: Slot, generator: torch.Generator) -> str:
        """One of the generator's texts for this slot."""
        if slot not in self._texts:
            self._texts[slot] = self._infilled(slot)
        texts = self._texts[slot]
        return texts[int(uniform(generator) * len(texts))]

    def __getstate__(self) -> dict[str, Any]:
        # The cache can be recomputed.
        return {**self.__dict__, "_texts": {}}

    def _infilled(self, slot: Slot) -> list[str]:
        given = self._generate(slot.left, slot.right, len(slot.ids))
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise TypeError(
                f"the generator returned {given!r} for {slot.text!r}: return a text, or a list of "
                "texts."
            )
        if not texts:
            raise ValueError(
                f"the generator returned no text for {slot.text!r}: return at least one ('' "
                "deletes the feature)."
            )
        own = slot.text.strip()
        others = [text for text in texts if text.strip() != own]
        return list(others if self.exclude_original and others else texts)

    def __repr__(self) -> str:
        name = getattr(self._generate, "__name__", type(self._generate).__name__)
        return f"Infilling({name})"
