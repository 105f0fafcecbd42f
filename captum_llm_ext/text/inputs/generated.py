"""`GeneratedText`: the target as features, and the positions that predict its tokens."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import LanguageModel, as_baseline, with_model
from captum_llm_ext.text.baselines.candidates import Match
from captum_llm_ext.text.inputs.ownership import Ownership, assign_tokens, owned_slots
from captum_llm_ext.text.inputs.prompt import (
    Piece,
    Place,
    RenderedPrompt,
    RenderedText,
    Replacements,
    RowDraw,
)
from captum_llm_ext.text.segment import Span, Unit, unit_name


class GeneratedText:
    """The target tokens, grouped into features that may cause later tokens.

    An absent feature changes the input ids, never the target ids. Later tokens of a feature are
    predicted with the feature present: a coalition without it defines a value only for its first
    token.

    Args:
        ids: Target token ids, ``n_target`` of them. They are never decoded and encoded again.
        tokenizer: The model's tokenizer.
        unit: As for `TextSegmentInput`, over the decoded text with its special tokens, which end
            words, sentences and other named units and are features of their own; spans and
            segmenters include those within their characters. ``"token"`` makes column j token j.
            None: the text is held fixed, without features.
        baselines: Replacements of absent features, as for `TextSegmentInput`.
        prompt_text: The text before, as context for baselines.
        prompt_ids: Its ids, to recognise a leading space of the first token.
        model: The model, for baselines that use one.

    Attributes:
        n_features: Number of features, ``G``.
        unit_name: Name of the unit; None if the text is held fixed.
        names: The features' texts.
        groups: Per target token its feature, or None for fixed text.
        labels: Per target token a printable name.
        baseline: Replaces absent features.
        deterministic: Whether a coalition is always rendered the same.
        pieces: Per target token its text and its feature; special tokens have the role
            ``"template"``.
    """

    def __init__(
        self,
        ids: Sequence[int],
        tokenizer: Any,
        unit: Unit | None,
        *,
        baselines: Any = None,
        prompt_text: str = "",
        prompt_ids: Sequence[int] = (),
        model: LanguageModel | None = None,
    ) -> None:
        self.ids = tuple(ids)
        self._start = tokens.start_id(tokenizer)
        texts = tokens.pieces(tokenizer, ids, prompt_ids)
        self.labels = tokens.labels(tokenizer, ids, prompt_ids)
        text, encoding = tokens.spell(tokenizer, ids, prompt_ids)
        owned = _owned(text, texts, encoding, unit)
        self.groups = owned.owners
        self.n_features = len(owned.spans)
        self.pieces = [
            Piece(piece, group, "template" if is_special else None)
            for piece, group, is_special in zip(texts, self.groups, encoding.special, strict=True)
        ]
        counter = partial(tokens.count_in_place, tokenizer)
        self.unit_name = None if unit is None else unit_name(unit)
        name = unit if isinstance(unit, str) else None
        context, offset = prompt_text + text, len(prompt_text)
        slots = [
            replace(slot, n_tokens=counter)
            for slot in owned_slots(owned, self.ids, context, name, offset=offset, generated=True)
        ]
        baseline = as_baseline(baselines, tokenizer, slots)
        if model is not None:
            baseline = with_model(baseline, model)
        self.names = list(self.labels) if unit == "token" else [text[a:b] for a, b in owned.named]
        self.baseline = baseline
        self._replacements = Replacements(baseline, slots, tokenizer)
        self.deterministic = self._replacements.deterministic
        self._runs = [
            (group, tuple(place for place, _ in run))
            for group, run in groupby(enumerate(self.groups), key=lambda pair: pair[1])
        ]

    @property
    def target(self) -> Tensor:
        """Token ids, int64 ``(n_target,)`` on the CPU."""
        return torch.tensor(self.ids, dtype=torch.int64, device="cpu")

    @property
    def n_visible(self) -> list[int]:
        """Per target token the number of features strictly before it."""
        counts: list[int] = []
        before = 0
        for group in self.groups:
            counts.append(before if group is None else group)
            before = before if group is None else group + 1
        return counts

    @property
    def n_causes(self) -> int:
        """Number of features that precede some target token: only these can change a value."""
        return max(self.n_visible)

    @property
    def required(self) -> list[int | None]:
        """Per target token its own feature if that began earlier, which must then be present."""
        return [
            group if before == group else None for before, group in pairwise([None, *self.groups])
        ]

    def matches(self, n: int) -> list[Match] | None:
        """How the baseline found candidates for the first `n` features; None if unknown."""
        return self._replacements.matches(n)

    def unchanging(self, n: int) -> list[int]:
        """Those of the first `n` features that remain unchanged when absent."""
        return sorted(self._replacements.unchanging(n))

    def places(self) -> list[Place]:
        """Positions of the features among the target ids, the last feature included."""
        return [Place(places, group) for group, places in self._runs if group is not None]

    def replacement_ids(
        self, n_draws: int, generator: torch.Generator
    ) -> list[list[tuple[int, ...]]]:
        """See `Prompt.replacement_ids`; none for features that precede no target token."""
        draws = self._replacements.draws(n_draws, generator, None)
        n_causes, groups = self.n_causes, [place.feature for place in self.places()]
        return [[absent(g) if g < n_causes else () for g in groups] for absent in draws]

    def whole(self, prompt: RenderedPrompt) -> RenderedText:
        """The text after a prompt, with every feature of the target present.

        Raises:
            ValueError: As for `render`.
        """
        ids = prompt.ids or self._beginning()
        last = len(ids) - 1
        return RenderedText(prompt, ids + self.ids[:-1], range(last, last + len(self.ids)))

    def render(
        self,
        prompts: Sequence[RenderedPrompt],
        masks: Tensor,
        generator: torch.Generator,
        draws: Tensor | None = None,
    ) -> list[RenderedText]:
        """The model's input for each coalition of the target's features.

        Args:
            prompts: The prompt, one per coalition.
            masks: Bool, shape ``(n_coalitions, n_features)``, True = present.
            generator: Source of all random choices; advanced by one number.
            draws: Coalitions with equal numbers share one draw of replacements.

        Returns:
            One rendered text per coalition.

        Raises:
            ValueError: If no token is left before the target and the tokenizer has no start token.
        """
        replacements = self._replacements.draws(len(masks), generator, draws)
        return [
            self.whole(prompt) if all(mask) else self._with_absent(prompt, mask, absent)
            for prompt, mask, absent in zip(prompts, masks.tolist(), replacements, strict=True)
        ]

    def _with_absent(
        self,
        prompt: RenderedPrompt,
        mask: Sequence[bool],
        absent: RowDraw,
    ) -> RenderedText:
        ids = list(prompt.ids or self._beginning())
        positions = [-1] * len(self.ids)
        for group, places in self._runs:
            if group is None or mask[group]:
                for place in places:
                    positions[place] = len(ids) - 1
                    ids.append(self.ids[place])
            else:
                positions[places[0]] = len(ids) - 1
                ids += absent(group)
        return RenderedText(prompt, tuple(ids[: max(positions) + 1]), positions, absent.drawn)

    def _beginning(self) -> tuple[int, ...]:
        if self._start is None:
            raise ValueError(
                "with every prompt feature absent nothing is left before the target, and the "
                "tokenizer has no BOS, EOS or pad token to begin with: set one, or give baselines "
                "other than deletion."
            )
        return (self._start,)


def _owned(
    text: str, texts: Sequence[str], encoding: tokens.Encoding, unit: Unit | None
) -> Ownership:
    """The spans that own the tokens, in reading order."""
    stops = [0, *accumulate(map(len, texts))]
    if unit == "token":  # every token has a column, including special ones and parts of characters
        each = [Span(start, stop) for start, stop in pairwise(stops)]
        return Ownership(each, list(range(len(texts))), each)
    # White space alone is not a word, but no reason to refuse an answer.
    if unit is None or (isinstance(unit, str) and not text.strip()):
        return Ownership([], [None] * len(texts), [])
    return assign_tokens(text, (unit,), encoding, special_apart=isinstance(unit, str))
