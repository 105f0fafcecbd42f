"""Baselines: what replaces absent features."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from captum.attr import ProductBaselines

from captum_llm_ext.text.baselines.draws import draw_generator, uniform
from captum_llm_ext.text.baselines.infilling import Infilling
from captum_llm_ext.text.baselines.labels import Labels, as_choices
from captum_llm_ext.text.baselines.slot import (
    AnswerFit,
    AsksModel,
    Baseline,
    Bonds,
    KnowsDistribution,
    LanguageModel,
    Listed,
    Proposer,
    Slot,
    UsesAnswer,
    bonds_of,
    joined,
)
from captum_llm_ext.text.baselines.template import template_parts, template_slots, with_siblings
from captum_llm_ext.text.tokens import token_id

__all__ = [
    "AnswerFit",
    "Baseline",
    "Bonds",
    "Default",
    "Deletion",
    "FixedTexts",
    "Infilling",
    "KnowsDistribution",
    "LanguageModel",
    "Listed",
    "Proposer",
    "Slot",
    "TokenBaseline",
    "UsesAnswer",
    "as_baseline",
    "bonds_of",
    "draw_generator",
    "for_generated",
    "is_deterministic",
    "joined",
    "template_parts",
    "template_slots",
    "uniform",
    "with_model",
    "with_siblings",
]


class Deletion:
    """Deletes the tokens of absent features."""

    deterministic = True

    def __call__(self, slot: Slot, generator: torch.Generator) -> str:
        """The empty text."""
        return ""

    def __repr__(self) -> str:
        return "Deletion()"


class Default(Deletion):
    """The default absence if the user gives no baselines.

    `GenerationAttribution` replaces it by `ModelBaselines`. It is deletion for gradients, and for
    an API, where the search for replacements takes paid requests.
    """

    def __repr__(self) -> str:
        return "Default()"


class TokenBaseline:
    """Replaces each token of the feature by one token id, as captum's `TextTokenInput`.

    Args:
        token: The token id.
    """

    deterministic = True

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, slot: Slot, generator: torch.Generator) -> list[int]:
        """The id, repeated for each token of the feature."""
        return [self.token] * len(slot.ids)

    def __repr__(self) -> str:
        return f"TokenBaseline({self.token})"


class FixedTexts:
    """Replacement texts given by the user, one entry per feature.

    Args:
        entries: Per feature a text, or several texts from which each draw takes one at random.

    Raises:
        ValueError: If an entry is an empty list.
        TypeError: If an entry is neither a text nor a list of texts.
    """

    def __init__(self, entries: Sequence[str | Sequence[str]]) -> None:
        self.choices = [as_choices(f"`baselines[{i}]`", entry) for i, entry in enumerate(entries)]
        self.deterministic = all(len(choice) == 1 for choice in self.choices)

    def __call__(self, slot: Slot, generator: torch.Generator) -> str:
        """One of the feature's texts."""
        choices = self.choices[slot.index]
        return choices[int(uniform(generator) * len(choices))]

    def distribution(self, slot: Slot) -> dict[str, float]:
        """See `KnowsDistribution`."""
        choices = self.choices[slot.index]
        counts = Counter(str(text) for text in choices)
        return {text: count / len(choices) for text, count in counts.items()}

    def __repr__(self) -> str:
        return f"FixedTexts({len(self.choices)} features)"


def as_baseline(baselines: Any, tokenizer: Any, slots: Sequence[Slot]) -> Baseline:
    """Converts a `baselines` argument to a baseline.

    Args:
        baselines: None or ``"delete"`` (deletion), a token id, a token of the vocabulary, one text
            (or list of texts) per slot, a mapping from the label, index or text of every slot to
            these, captum's `ProductBaselines` over a list or a dict, or a callable ``(slot,
            generator) -> text or ids``.
        tokenizer: The tokenizer, for tokens given as text.
        slots: All slots that the baseline is for, in reading order.

    Raises:
        ValueError: If a list has the wrong length, a mapping lacks a slot, or a token is unknown.
        TypeError: If the argument is none of these.
    """
    if isinstance(baselines, ProductBaselines):
        baselines = _product(baselines, slots)
    if baselines is None or (isinstance(baselines, str) and baselines == "delete"):
        return Deletion()
    if isinstance(baselines, int) and not isinstance(baselines, bool):
        return TokenBaseline(baselines)
    if isinstance(baselines, str):
        return TokenBaseline(token_id(tokenizer, baselines))
    if callable(baselines):
        return cast(Callable[[Slot, torch.Generator], "str | Sequence[int]"], baselines)
    if isinstance(baselines, Mapping):
        return FixedTexts(_by_name(Labels(baselines), slots))
    if isinstance(baselines, Sequence):
        if len(baselines) != len(slots):
            raise ValueError(
                f"`baselines` has {len(baselines)} entries for {len(slots)} features: give one "
                "per feature, or a callable such as `CorpusBaselines(texts)`."
            )
        return FixedTexts(baselines)
    raise TypeError(
        f"`baselines` is a {type(baselines).__name__}: give None, a token id, a token, a list with "
        "one entry per feature, a mapping from features to texts, or a callable `(slot, generator) "
        "-> text or ids`."
    )


def with_model(baseline: Baseline, model: LanguageModel) -> Baseline:
    """The baseline with the model, if it uses one."""
    return baseline.with_model(model) if isinstance(baseline, AsksModel) else baseline


def for_generated(baseline: Baseline) -> Baseline:
    """The baseline of generated text that follows from the prompt's baseline.

    Texts given for prompt features do not apply to the output: there it is deletion.
    """
    return Deletion() if isinstance(baseline, FixedTexts) else baseline


def is_deterministic(baseline: Baseline) -> bool:
    """Whether all draws of the baseline are equal, so that one is enough."""
    return bool(getattr(baseline, "deterministic", False))


def _product(
    baselines: ProductBaselines, slots: Sequence[Slot]
) -> list[Any] | dict[str, list[str]]:
    """Captum's lists, one per slot or by name.

    Raises:
        ValueError: If captum draws names together that are not one feature here.
    """
    if not baselines.dict_keys:
        return baselines.baseline_values
    feature_of = {slot.label: slot.feature for slot in slots}
    lists: dict[str, list[str]] = {}
    for key, values in zip(baselines.dict_keys, baselines.baseline_values, strict=True):
        names = key if isinstance(key, tuple) else (key,)
        if len({feature_of.get(name) for name in names}) > 1:
            raise ValueError(
                f"`ProductBaselines` draws {names} together, here they are separate features: tie "
                "them into one (`groups`, or `mask` of a template)."
            )
        rows = values if isinstance(key, tuple) else [(value,) for value in values]
        lists |= {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return lists


def _by_name(labels: Labels, slots: Sequence[Slot]) -> list[tuple[str, ...]]:
    names = [labels.named(slot) for slot in slots]
    missing = [slot.text.strip() for slot, name in zip(slots, names, strict=True) if name is None]
    unused = [key for key in labels.texts if key not in names]
    if missing or unused:
        problem = (
            f"has nothing for {missing[:5]}" if missing else f"names {unused[:5]}, no features"
        )
        raise ValueError(
            f"the mapping `baselines` {problem}: name every feature by its label, number or text "
            "(`CorpusBaselines(texts, labels=…)` looks up those that are not named)."
        )
    return [labels.texts[name] for name in names if name is not None]
