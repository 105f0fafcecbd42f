"""What stands where a feature is absent."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from captum.attr import ProductBaselines

from captum_llm_ext.baselines.slot import Baseline, Slot
from captum_llm_ext.tokens import token_id

__all__ = [
    "Baseline",
    "Deletion",
    "FixedTexts",
    "Slot",
    "TokenBaseline",
    "as_baseline",
    "draw_generator",
    "for_generated",
    "is_deterministic",
]


class Deletion:
    """Nothing stands there: the feature's tokens are left out."""

    deterministic = True

    def __call__(self, slot: Slot, generator: torch.Generator) -> str:
        """The empty text."""
        return ""

    def __repr__(self) -> str:
        return "Deletion()"


class TokenBaseline:
    """One token id stands in place of each token of the feature, as in captum's `TextTokenInput`.

    Args:
        token: The token id.
    """

    deterministic = True

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, slot: Slot, generator: torch.Generator) -> list[int]:
        """As many times the id as the feature has tokens."""
        return [self.token] * len(slot.ids)

    def __repr__(self) -> str:
        return f"TokenBaseline({self.token})"


class FixedTexts:
    """Texts given by hand, one entry per feature.

    Args:
        entries: Per feature a text, or several texts of which each draw takes one at random.

    Raises:
        ValueError: If an entry is an empty list.
        TypeError: If an entry is neither a text nor a list of texts.
    """

    def __init__(self, entries: Sequence[str | Sequence[str]]) -> None:
        self.choices = [_choices(index, entry) for index, entry in enumerate(entries)]
        self.deterministic = all(len(choice) == 1 for choice in self.choices)

    def __call__(self, slot: Slot, generator: torch.Generator) -> str:
        """One of the texts of the feature."""
        choices = self.choices[slot.index]
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def __repr__(self) -> str:
        return f"FixedTexts({len(self.choices)} features)"


def as_baseline(baselines: Any, tokenizer: Any, n_features: int) -> Baseline:
    """The baseline that a user's argument means.

    Args:
        baselines: None (deletion), a token id, a token of the vocabulary, one text (or list of
            texts) per feature, captum's `ProductBaselines` over a list, or a callable
            `(slot, generator) -> text or ids`.
        tokenizer: Looks up tokens given as text.
        n_features: How many entries a list must have.

    Raises:
        ValueError: If a list has the wrong length or a token is unknown.
        TypeError: If the argument is of none of these kinds.
    """
    if isinstance(baselines, ProductBaselines):
        if baselines.dict_keys:
            raise TypeError(
                "`ProductBaselines` over a dict names the values of a template: "
                "build it over a list with one entry per feature."
            )
        baselines = baselines.baseline_values
    if baselines is None:
        return Deletion()
    if isinstance(baselines, int) and not isinstance(baselines, bool):
        return TokenBaseline(baselines)
    if isinstance(baselines, str):
        return TokenBaseline(token_id(tokenizer, baselines))
    if callable(baselines):
        return cast(Callable[[Slot, torch.Generator], "str | Sequence[int]"], baselines)
    if isinstance(baselines, Sequence):
        if len(baselines) != n_features:
            raise ValueError(
                f"`baselines` has {len(baselines)} entries for {n_features} features: give one "
                "per feature, or a callable such as `CorpusBaselines(texts)`."
            )
        return FixedTexts(baselines)
    kind = "mapping" if isinstance(baselines, Mapping) else type(baselines).__name__
    raise TypeError(
        f"`baselines` is a {kind}: give None, a token id, a token, a list with one entry per "
        "feature, or a callable `(slot, generator) -> text or ids`."
    )


def for_generated(baseline: Baseline) -> Baseline:
    """What stands for absent generated text if the prompt's baseline is this one.

    Texts given by hand for the prompt say nothing about the output: there it is deletion.
    """
    return Deletion() if isinstance(baseline, FixedTexts) else baseline


def is_deterministic(baseline: Baseline) -> bool:
    """Whether every draw of the baseline is the same, so that one is enough."""
    return bool(getattr(baseline, "deterministic", False))


def draw_generator(seed: int, draw: int, feature: int = 0) -> torch.Generator:
    """The generator of one feature's draw: the same whatever else is drawn, and when."""
    # An odd multiplier (2^64 divided by the golden ratio) keeps neighbouring draws apart.
    mixed = (seed + (draw + 1) * 0x9E3779B97F4A7C15 + feature * 0xD1B54A32D192ED03) % 2**63
    return torch.Generator().manual_seed(mixed)


def _choices(index: int, entry: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(entry, str):
        return (entry,)
    if not isinstance(entry, Sequence) or not all(isinstance(text, str) for text in entry):
        raise TypeError(
            f"`baselines[{index}]` is {entry!r}: give a text, or a list of texts to draw from."
        )
    if not entry:
        raise ValueError(
            f"`baselines[{index}]` is an empty list: give at least one text "
            "('' deletes the feature)."
        )
    return tuple(entry)
