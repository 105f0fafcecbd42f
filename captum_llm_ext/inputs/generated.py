"""Generated text as features, and the place where the model says each of its tokens."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext import tokens
from captum_llm_ext.baselines import LanguageModel, Slot, as_baseline, with_model
from captum_llm_ext.baselines.candidates import Match
from captum_llm_ext.inputs.prompt import Piece, Place, Replacements
from captum_llm_ext.segment import Unit, segment


class GeneratedText:
    """The target tokens, grouped into features that later tokens may depend on.

    An absent feature changes what the model reads, never what it is asked for. The tokens inside
    one feature are said while the feature itself stands: a coalition without it gives a value to
    its first token only.

    Args:
        ids: Target token ids, ``n_target`` of them. They are never decoded and encoded again.
        tokenizer: The model's tokenizer.
        unit: As for `TextSegmentInput`, over the decoded text; ``"token"`` makes column j token
            j. None: the text is held fixed, there are no features.
        baselines: What stands where a feature is absent, as for `TextSegmentInput`.
        prompt_text: The text before, as context for baselines.
        prompt_ids: Its ids, so that a leading space of the first token is seen.
        model: For baselines that ask one.

    Attributes:
        n_features: Number of features, ``G``.
        names: Their texts.
        groups: Per target token its feature, or None for fixed text.
        labels: Per target token a printable name.
        deterministic: Whether two renderings of one coalition are always equal.
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
        self.groups = _groups(self.ids, texts, tokenizer, unit)
        self.n_features = 1 + max((g for g in self.groups if g is not None), default=-1)
        special = _special(tokenizer)
        self.pieces = [
            Piece(text, group, "template" if token in special else None)
            for token, text, group in zip(self.ids, texts, self.groups, strict=True)
        ]
        counter = partial(tokens.count_in_place, tokenizer)
        slots = [
            replace(slot, n_tokens=counter)
            for slot in _slots(self.ids, texts, self.groups, prompt_text, unit)
        ]
        baseline = as_baseline(baselines, tokenizer, slots)
        if model is not None:
            baseline = with_model(baseline, model)
        self.names = list(self.labels) if unit == "token" else [slot.text for slot in slots]
        self._replacements = Replacements(baseline, slots, tokenizer)
        self.deterministic = self._replacements.deterministic
        self._runs = [
            (group, tuple(place for place, _ in run))
            for group, run in groupby(enumerate(self.groups), key=lambda pair: pair[1])
        ]

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
    def required(self) -> list[int | None]:
        """Per target token its own feature if that began before it, which then must stand."""
        return [
            group if before == group else None for before, group in pairwise([None, *self.groups])
        ]

    def matches(self, n: int) -> list[Match] | None:
        """How the baseline found candidates for the first `n` features, if it is one that tells."""
        return self._replacements.matches(n)

    def places(self) -> list[Place]:
        """Where the features stand among the target's ids; what has no token after it too."""
        return [Place(places, group) for group, places in self._runs if group is not None]

    def stand_ins(self, n_draws: int, generator: torch.Generator) -> list[list[tuple[int, ...]]]:
        """See `Prompt.stand_ins`; nothing for what no target token comes after."""
        draws = self._replacements.draws(n_draws, generator, None)
        n_seen, groups = max(self.n_visible), [place.feature for place in self.places()]
        return [[absent(g) if g < n_seen else () for g in groups] for absent in draws]

    def render(
        self,
        prompts: Sequence[tuple[int, ...]],
        masks: Tensor,
        generator: torch.Generator,
        draws: Tensor | None = None,
    ) -> list[tuple[tuple[int, ...], Sequence[int]]]:
        """What the model reads after each prompt, and where it says each target token.

        Args:
            prompts: Token ids of the prompt, one per coalition.
            masks: Bool, shape ``(n_coalitions, n_features)``, True = present.
            generator: Source of every random choice; one number is taken from it.
            draws: Coalitions with equal number share one draw of replacements.

        Returns:
            Per coalition the ids and, for each target token, the index of the id that is read last
            before it; -1 where the coalition gives the token no value.

        Raises:
            ValueError: If nothing is left before the target and the tokenizer has no token that
                a text begins with.
        """
        replacements = self._replacements.draws(len(masks), generator, draws)
        rows: list[tuple[tuple[int, ...], Sequence[int]]] = []
        for prompt, mask, absent in zip(prompts, masks.tolist(), replacements, strict=True):
            prompt = prompt or self._beginning()
            if all(mask):
                last = len(prompt) - 1
                rows.append((prompt + self.ids[:-1], range(last, last + len(self.ids))))
            else:
                rows.append(self._row(prompt, mask, absent))
        return rows

    def _row(
        self,
        prompt: tuple[int, ...],
        mask: Sequence[bool],
        absent: Callable[[int], tuple[int, ...]],
    ) -> tuple[tuple[int, ...], list[int]]:
        ids = list(prompt)
        positions = [-1] * len(self.ids)
        for group, places in self._runs:
            if group is None or mask[group]:
                for place in places:
                    positions[place] = len(ids) - 1
                    ids.append(self.ids[place])
            else:
                positions[places[0]] = len(ids) - 1
                ids += absent(group)
        return tuple(ids[: max(positions) + 1]), positions

    def _beginning(self) -> tuple[int, ...]:
        if self._start is None:
            raise ValueError(
                "with every prompt feature absent nothing is left before the target, and the "
                "tokenizer has no BOS, EOS or pad token to begin with: set one, or give baselines "
                "other than deletion."
            )
        return (self._start,)


def _special(tokenizer: Any) -> set[int]:
    """Ids that are no text; an unknown word is a word like any other."""
    special: set[int] = set(getattr(tokenizer, "all_special_ids", None) or ())
    return special - {getattr(tokenizer, "unk_token_id", None)}


def _groups(
    ids: Sequence[int], texts: Sequence[str], tokenizer: Any, unit: Unit | None
) -> list[int | None]:
    """Per token the number of its feature, counted in reading order."""
    if unit is None:
        return [None] * len(ids)
    if isinstance(unit, str) and unit == "token":
        return list(range(len(ids)))
    special = _special(tokenizer)
    shown = ["" if token in special else text for token, text in zip(ids, texts, strict=True)]
    text = "".join(shown)
    spans = segment(text, unit) if text.strip() or not isinstance(unit, str) else []
    starts = [span.start for span in spans]
    groups: list[int | None] = []
    position, number = 0, -1
    previous: object = None
    for place, part in enumerate(shown):
        space = len(part) - len(part.lstrip())
        anchor = position if space == len(part) else position + space
        position += len(part)
        at = bisect_right(starts, anchor) - 1
        owner: object = at if at >= 0 and anchor < spans[at].stop else None
        if ids[place] in special:
            owner = ("special", place)
        number += owner is not None and owner != previous
        groups.append(None if owner is None else number)
        previous = owner
    return groups


def _slots(
    ids: Sequence[int],
    texts: Sequence[str],
    groups: Sequence[int | None],
    prompt_text: str,
    unit: Unit | None,
) -> list[Slot]:
    context = prompt_text + "".join(texts)
    name = unit if isinstance(unit, str) else None
    slots: list[Slot] = []
    start = len(prompt_text)
    for group, run in groupby(zip(ids, texts, groups, strict=True), key=lambda item: item[2]):
        members = list(run)
        stop = start + sum(len(text) for _, text, _ in members)
        if group is not None:
            own = tuple(token for token, _, _ in members)
            slots.append(Slot(context, start, stop, own, group, group, name, generated=True))
        start = stop
    return slots
