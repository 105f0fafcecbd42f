"""`TextSegmentInput`: a text segmented into features that own whole tokens."""

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import groupby, takewhile
from typing import Any, Self, cast

import torch
from captum.attr import InterpretableInput
from torch import Tensor

from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import (
    Default,
    LanguageModel,
    Slot,
    as_baseline,
    for_generated,
    with_model,
    with_siblings,
)
from captum_llm_ext.text.baselines.candidates import Match
from captum_llm_ext.text.inputs.groups import Groups, label_spans, tie
from captum_llm_ext.text.inputs.ownership import Ownership, assign_tokens, owned_slots
from captum_llm_ext.text.inputs.prompt import (
    AnswerLogProbs,
    Level,
    Piece,
    Place,
    Prompt,
    RenderedPrompt,
    Replacements,
    template_pieces,
)
from captum_llm_ext.text.plain_tokenizer import PlainTokenizer
from captum_llm_ext.text.segment import Span, Unit, shorten, unit_name
from captum_llm_ext.text.segment.parts import Parts

Part = tuple[str, str] | tuple[str, str, bool]
_DEFAULT = Default()
_PARTS = ("part", "example", "passage")


class TextSegmentInput(InterpretableInput, Prompt):
    """A text whose words, sentences or other spans are features.

    Features own whole tokens: a token, including special tokens in the text (``</s>`` in a
    passage), belongs to the span that contains its first character other than white space. Words or
    other units that share a token are merged into one feature; for spans given by the user this is
    an error. Tokens outside all spans are fixed text, and so are BOS and other tokens that the
    tokenizer adds. With every feature present the rendered ids are exactly those of the tokenizer.

    Args:
        text: The prompt.
        tokenizer: The model's tokenizer. None for a model behind an API whose tokenizer is
            unavailable: features are then whole words at least.
        unit: ``"token"``, ``"word"``, ``"sentence"``, ``"line"``, ``"paragraph"``, ``"block"`` (of
            Markdown), a list of ``(start, stop)`` character spans, or a callable ``text -> list of
            (start, stop)`` such as those of `captum_llm_ext.segment`. Text between spans is fixed.
            A tuple of units, from coarse to fine, makes features of the finest and levels of all:
            ``("paragraph", "sentence", "word")``.
        baselines: Replacements of absent features. Default: draws from the model's own conditional
            distribution (`ModelBaselines`) for `GenerationAttribution` with a local model; deletion
            otherwise. ``"delete"`` or None (the tokens are deleted), a token id, a token of the
            vocabulary, a list with one text (or list of texts to draw from) per span, a mapping
            from every span's label, index or text to these, captum's `ProductBaselines`, or a
            callable ``(slot, generator) -> text or ids``. Text keeps the white space around the
            text it replaces and is tokenised in place.
        groups: Spans that form one feature, however far apart: lists of their texts or their
            indices in reading order, or a mapping from the feature's name to such a list. A group
            is placed at its first span. Lists of replacement texts of equal length are drawn at the
            same index for all spans of a group.
        fixed: Text that is never a feature: ``(start, stop)`` spans, or texts, searched in order. A
            token with a visible character of it is fixed as a whole.
        names: One name per span, for results. By default its text.
        labels: The kind of each span, for baselines that use it (`CorpusBaselines(...,
            labels={"city": [...]})`, a mapping, captum's `ProductBaselines` over a dict): one label
            (or None) per span, or a mapping from a span's text or index to its label.
        add_special_tokens: Whether the tokenizer adds its special tokens such as BOS. Text that
            already begins with BOS gets no second one.
        special_tokens_are_features: Whether BOS and other special tokens are features of their own;
            those within a user's span remain part of it.

    Attributes:
        n_features: Number of features.
        names: One name per feature.
        slots: One slot per span; ``slot.feature`` is the index of its feature.
        levels: From coarse to fine, the names of a level's parts and the part of each feature.

    Raises:
        ValueError: If the text is empty, the unit unknown, spans overlap or exceed the text, a
            user's span owns no whole token or shares one with another, a group or label refers to
            no span, or `baselines`, `names` or `labels` has the wrong number of entries.
        TypeError: If an argument has the wrong type.
    """

    def __init__(
        self,
        text: str,
        tokenizer: Any,
        unit: Unit | tuple[Unit, ...] = "word",
        *,
        baselines: Any = _DEFAULT,
        groups: Groups | None = None,
        fixed: Sequence[tuple[int, int]] | Sequence[str] = (),
        names: Sequence[str] | None = None,
        labels: Sequence[str | None] | Mapping[str | int, str] | None = None,
        add_special_tokens: bool = True,
        special_tokens_are_features: bool = False,
    ) -> None:
        if not isinstance(text, str):
            raise TypeError(f"`text` is a {type(text).__name__}: give the prompt as a string.")
        if not text.strip():
            raise ValueError("the prompt is empty: give a text with at least one word.")
        self.text = text
        tokenizer = PlainTokenizer() if tokenizer is None else tokenizer
        self.tokenizer = tokenizer
        self.unit = unit
        encoding = self._encoded(text, tokenizer, add_special_tokens)
        self.ids = encoding.ids
        units = as_units(unit)
        ownership = assign_tokens(
            text, units, encoding, fixed=fixed, special_apart=special_tokens_are_features
        )
        if not ownership.spans:
            raise ValueError(
                f"the prompt {shorten(text)!r} has no token of its own to attribute to."
            )
        self.spans = ownership.spans
        if names is None and isinstance(units[-1], Parts):
            names = units[-1].names
        span_names = _span_names(text, ownership, encoding, tokenizer, names)
        feature_of, self.names = tie(span_names, groups)
        self.values = self.names
        self.n_features = self.n_itp_features = len(self.names)
        self.columns = list(range(self.n_features))
        finest_unit = units[-1] if isinstance(units[-1], str) else None
        counter = partial(tokens.count_in_place, tokenizer)
        self.slots = with_siblings(
            [
                replace(slot, label=label, feature=feature, n_tokens=counter)
                for slot, label, feature in zip(
                    owned_slots(ownership, encoding.ids, text, finest_unit),
                    label_spans(span_names, _labels_of_explicit_spans(labels, ownership)),
                    feature_of,
                    strict=True,
                )
            ]
        )
        self.levels = _levels(text, units, ownership, feature_of, span_names)
        self.unit_name = unit_name(units[-1])
        self.pieces = _pieces(text, self.slots, ownership, encoding, tokenizer)
        self._token_runs = _token_runs(self.slots, ownership.owners, self.ids)
        self._drawn = self.slots
        self._replace_by(baselines)

    def _encoded(self, text: str, tokenizer: Any, add_special_tokens: bool) -> tokens.Encoding:
        return tokens.encode(tokenizer, text, add_special_tokens=add_special_tokens)

    def _replace_by(self, baselines: Any) -> None:
        replacement = as_baseline(baselines, self.tokenizer, self.slots)
        self.own_baseline, self.output_baseline = replacement, for_generated(replacement)
        self._replacements = Replacements(replacement, self._drawn, self.tokenizer, by_phrase=True)
        self.deterministic = self._replacements.deterministic

    def with_baselines(self, baselines: Any) -> Self:
        """The same input with other baselines.

        Args:
            baselines: As for `TextSegmentInput`.

        Returns:
            A copy; this one is unchanged.

        Raises:
            ValueError, TypeError: As for the constructor.
        """
        changed = copy(self)
        changed._replace_by(baselines)
        return changed

    def with_default(self, baselines: Any) -> Self:
        """See `Prompt.with_default`."""
        is_given = not isinstance(self.own_baseline, Default)
        return self if is_given else self.with_baselines(baselines)

    def with_model(self, model: LanguageModel) -> Self:
        """See `Prompt.with_model`."""
        changed = copy(self)
        changed._replacements = self._replacements.with_model(model)
        changed.output_baseline = with_model(self.output_baseline, model)
        return changed

    def with_answer(self, log_probs: AnswerLogProbs, text: str) -> Self:
        """See `Prompt.with_answer`."""
        if not self._replacements.uses_answer:
            return self
        changed = copy(self)
        changed._replacements = self._replacements.with_answer(
            lambda tries: log_probs([self._with_texts(texts) for texts in tries]), text
        )
        return changed

    def drawn_together(self, groups: Sequence[int]) -> Self:
        """A copy in which features of one group (one number per feature) share their draws."""
        changed = copy(self)
        tied = [replace(slot, feature=groups[slot.feature]) for slot in self.slots]
        changed._drawn = with_siblings(tied)
        changed._replacements = self._replacements.over(changed._drawn)
        return changed

    def matches(self) -> list[Match] | None:
        """See `Prompt.matches`."""
        return self._replacements.matches()

    def unchanging(self) -> list[int]:
        """See `Prompt.unchanging`."""
        same = self._replacements.unchanging()
        changing = {slot.feature for slot in self.slots if slot.index not in same}
        return [feature for feature in range(self.n_features) if feature not in changing]

    @staticmethod
    def from_parts(
        parts: Sequence[Part],
        tokenizer: Any,
        unit: Unit | tuple[Unit, ...] = "part",
        *,
        joiner: str = "\n\n",
        **arguments: Any,
    ) -> "TextSegmentInput":
        """A prompt composed of named parts: an instruction, examples, passages, a question.

        Args:
            parts: ``(name, text)``, or ``(name, text, fixed)`` where `fixed` means that the part is
                never a feature.
            tokenizer: The model's tokenizer.
            unit: ``"part"``, ``"example"`` or ``"passage"``, which only differ in name: every part
                is one feature with its name. Otherwise the unit of the features inside the parts,
                which are then the coarsest level; ``("passage", "sentence")`` names that level.
            joiner: Fixed text between two parts.
            **arguments: As for `TextSegmentInput`.

        Raises:
            ValueError: If all parts are fixed, or a part is empty.
        """
        spans, text = _join_parts(parts, joiner)
        switched = [i for i, part in enumerate(parts) if not (len(part) > 2 and part[2])]
        if not switched:
            raise ValueError("every part is fixed: leave one to attribute to.")
        units = as_units(unit)
        named = units[0] in _PARTS
        chosen = Parts(
            [parts[i][0] for i in switched],
            [spans[i] for i in switched],
            title=str(units[0]) if named else "part",
        )
        inner = units[1:] if named else units
        if not inner:
            arguments = {"labels": chosen.names} | arguments
            return TextSegmentInput(text, tokenizer, chosen, **arguments)
        return TextSegmentInput(text, tokenizer, (chosen, *inner), **arguments)

    @staticmethod
    def from_template(
        template: str | Callable[..., str],
        values: Sequence[str] | Mapping[str, str],
        tokenizer: Any,
        *,
        mask: Sequence[Any] | Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> "TextSegmentInput":
        """Like captum's `TextTemplateInput`, but on token ids: other tokens never change.

        Args:
            template: A format string, or a function from the values to the text.
            values: The values, in a list or by name.
            tokenizer: The model's tokenizer.
            mask: As in captum: values with equal numbers are one feature.
            **arguments: As for `TextSegmentInput`; `baselines` as a list has one entry per value,
                in the order of the values in the text. Names of values are labels.

        Raises:
            ValueError: If the values cannot be located in the template's text.
        """
        keys = list(values) if isinstance(values, Mapping) else list(range(len(values)))
        given = [values[key] for key in keys]  # pyright: ignore[reportArgumentType, reportCallIssue]
        pieces = template_pieces(template, values)
        if pieces is None:
            raise ValueError(
                "the values cannot be found in the text that the template makes of them (it may "
                "change or drop some): use captum's `TextTemplateInput`, or give the text itself."
            )
        order = [piece.feature for piece in pieces if piece.feature is not None]
        spans: list[Span] = []
        position = 0
        for piece in pieces:
            if piece.feature is not None:
                spans.append(Span(position, position + len(piece.text)))
            position += len(piece.text)
        text = "".join(piece.text for piece in pieces)
        if mask is not None:
            labels = [mask[keys[i]] for i in order]  # pyright: ignore[reportArgumentType, reportCallIssue]
            arguments["groups"] = [
                [place for place, own in enumerate(labels) if own == label]
                for label in dict.fromkeys(labels)
            ]
        arguments.setdefault("names", [given[i] for i in order])
        if isinstance(values, Mapping):
            arguments.setdefault("labels", [str(keys[i]) for i in order])
        return TextSegmentInput(text, tokenizer, spans, **arguments)

    def to_tensor(self) -> Tensor:
        """All features present: ones, shape ``(1, n_features)``."""
        return torch.ones(1, self.n_features, dtype=torch.float32, device="cpu")

    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> Tensor:
        """Token ids ``(1, n_tokens)`` of the prompt, or of the coalition in `perturbed_tensor`."""
        if perturbed_tensor is None:
            return torch.tensor([self.ids], dtype=torch.int64, device="cpu")
        mask = perturbed_tensor[:1] == 1
        row = self.render(mask, torch.Generator().manual_seed(0))[0]
        return torch.tensor([row.ids], device=perturbed_tensor.device, dtype=torch.long)

    def render(
        self, masks: Tensor, generator: torch.Generator, draws: Tensor | None = None
    ) -> list[RenderedPrompt]:
        """See `Prompt.render`."""
        replacements = self._replacements.draws(len(masks), generator, draws)
        rows: list[RenderedPrompt] = []
        for mask, substitute in zip(masks.tolist(), replacements, strict=True):
            units = self._replacements.units(
                {slot.index for slot in self.slots if not mask[slot.feature]}
            )
            ids = self._assembled(units, substitute)
            rows.append(RenderedPrompt(ids, drawn=substitute.drawn))
        return rows

    def _assembled(
        self, units: Mapping[int, tuple[int, ...]], substitute: Callable[..., tuple[int, ...]]
    ) -> tuple[int, ...]:
        """The ids of the prompt with replacements in some slots.

        Args:
            units: Maps the index of a slot to the slots that are replaced together with it.
            substitute: Returns the ids for such slots.
        """
        ids: list[int] = []
        for slot, chunk, is_first in self._token_runs:
            if slot is None or (unit := units.get(slot.index)) is None:
                ids += chunk
            elif is_first and slot.index == unit[0]:  # it has the replacement of all of them
                ids += substitute(*unit)
        return tuple(ids)

    def _with_texts(self, texts: Mapping[Slot, str]) -> tuple[int, ...]:
        """The ids of the prompt with texts in slots, or in several neighbouring ones together."""
        units: dict[int, tuple[int, ...]] = {}
        ids: dict[tuple[int, ...], tuple[int, ...]] = {}
        for place, text in texts.items():
            stop = bisect_right(self.slots, place.stop, key=lambda slot: slot.stop)
            unit = tuple(range(place.index, stop))
            units |= dict.fromkeys(unit, unit)
            ids[unit] = self._replacements.in_place(place, text)
        return self._assembled(units, lambda *unit: ids[unit])

    def places(self) -> list[Place]:
        """See `Prompt.places`."""
        positions: dict[int, list[int]] = {}
        start = 0
        for slot, chunk, _ in self._token_runs:
            if slot is not None:
                positions.setdefault(slot.index, []).extend(range(start, start + len(chunk)))
            start += len(chunk)
        return [Place(tuple(positions[slot.index]), slot.feature) for slot in self.slots]

    def places_without(self, features: Collection[int]) -> frozenset[int]:
        """See `Prompt.places_without`."""
        absent = {slot.index for slot in self.slots if slot.feature in features}
        together = self._replacements.units(absent)
        every = zip(self.slots, self.places(), strict=True)
        return frozenset(
            p for slot, place in every if slot.index in together for p in place.positions
        )

    def replacement_ids(
        self, n_draws: int, generator: torch.Generator
    ) -> list[list[tuple[int, ...]]]:
        """See `Prompt.replacement_ids`."""
        draws = self._replacements.draws(n_draws, generator, None)
        return [[absent(slot.index) for slot in self.slots] for absent in draws]

    def __repr__(self) -> str:
        unit = self.unit if isinstance(self.unit, str) else "spans"
        return (
            f"TextSegmentInput({shorten(self.text)!r}, unit={unit!r}, {self.n_features} features)"
        )


def as_units(unit: Unit | tuple[Unit, ...]) -> tuple[Unit, ...]:
    """One or several units, from coarse to fine. A tuple of pairs of numbers is one unit: spans."""
    if isinstance(unit, tuple) and any(isinstance(u, str) or callable(u) for u in unit):
        return cast(tuple[Unit, ...], unit)
    return (cast(Unit, unit),)


def _join_parts(parts: Sequence[Part], joiner: str) -> tuple[list[Span], str]:
    spans: list[Span] = []
    text = ""
    for part in parts:
        name, content = part[0], part[1]
        if not content.strip():
            raise ValueError(f"part {name!r} is empty: leave it out.")
        text += joiner if text else ""
        spans.append(Span(len(text), len(text) + len(content)))
        text += content
    return spans, text


def _token_runs(
    slots: Sequence[Slot], owners: Sequence[int | None], ids: Sequence[int]
) -> list[tuple[Slot | None, tuple[int, ...], bool]]:
    """Runs of tokens with one owner: the slot, its ids, and whether they are its first.

    A special token within a span splits it in two; the replacement is inserted once.
    """
    seen: set[int | None] = set()
    chunks: list[tuple[Slot | None, tuple[int, ...], bool]] = []
    for owner, run in groupby(zip(owners, ids, strict=True), key=lambda pair: pair[0]):
        slot = None if owner is None else slots[owner]
        chunks.append((slot, tuple(token for _, token in run), owner not in seen))
        seen.add(owner)
    return chunks


def _levels(
    text: str,
    units: Sequence[Unit],
    owned: Ownership,
    feature_of: Sequence[int],
    shown: Sequence[str],
) -> list[Level]:
    """The coarser levels: their parts, and the part of each feature."""
    levels: list[Level] = []
    for unit, coarse in zip(units, owned.coarse, strict=False):
        names: dict[tuple[bool, int], str] = {}
        for part, (number, span) in enumerate(zip(coarse.numbers, coarse.spans, strict=True)):
            if number is None:
                names[True, part] = shown[coarse.part_of.index(part)]
            elif isinstance(unit, Parts):
                key = False, unit.wholes[number]
                known = f"{names[key]} …" if key in names else ""
                names[key] = known + unit.names[number]
            else:
                names[False, number] = text[slice(*span)]
        place = {key: i for i, key in enumerate(names)}
        part_of: dict[int, int] = {}
        for feature, part in zip(feature_of, coarse.part_of, strict=True):
            number = coarse.numbers[part]
            if number is None:
                whole = place[True, part]
            else:
                whole = place[False, unit.wholes[number] if isinstance(unit, Parts) else number]
            if part_of.setdefault(feature, whole) != whole:
                raise ValueError(
                    f"a group ties spans of different parts of level {unit_name(unit)!r}: tie "
                    "spans within one part, or use a single unit."
                )
        ordered = [part_of[feature] for feature in range(len(part_of))]
        levels.append(Level(unit_name(unit), list(names.values()), ordered))
    return levels


def _span_names(
    text: str,
    owned: Ownership,
    encoding: tokens.Encoding,
    tokenizer: Any,
    given: Sequence[str] | None,
) -> list[str]:
    """The spans' texts or given names; spans without text, such as BOS, by their token."""
    names = [text[start:stop] for start, stop in owned.named]
    if given is not None:
        drawn = [i for i, alone in enumerate(owned.alone) if not alone]
        if len(given) != len(drawn):
            raise ValueError(
                f"`names` has {len(given)} entries for {len(drawn)} spans: give one each."
            )
        for i, name in zip(drawn, given, strict=True):
            names[i] = name
    if all(names):
        return names
    labels = tokens.labels(tokenizer, encoding.ids)
    return [name or labels[owned.owners.index(i)] for i, name in enumerate(names)]


def _labels_of_explicit_spans(
    labels: Sequence[str | None] | Mapping[str | int, str] | None, owned: Ownership
) -> Sequence[str | None] | Mapping[str | int, str] | None:
    """Labels as given for the spans, with None for additional special tokens."""
    n_alone = sum(owned.alone)
    if not n_alone or labels is None or isinstance(labels, Mapping | str):
        return labels
    if len(labels) != len(owned.spans) - n_alone:
        return labels
    rest = iter(labels)
    return [None if alone else next(rest) for alone in owned.alone]


def _pieces(
    text: str,
    slots: Sequence[Slot],
    owned: Ownership,
    encoding: tokens.Encoding,
    tokenizer: Any,
) -> list[Piece]:
    """The text split at the spans; special tokens without text of their own are decoded."""
    leading = [i for i, _ in takewhile(lambda pair: pair[1] is None, enumerate(encoding.anchors))]
    shown = tokens.decode(tokenizer, [encoding.ids[i] for i in leading]) if leading else ""
    special = {
        t for t, anchor in zip(encoding.ids, encoding.anchors, strict=True) if anchor is None
    }
    pieces: list[Piece] = []
    if shown and owned.owners[0] is None and not text.startswith(shown):
        pieces.append(Piece(shown, None))
    position = 0
    for slot in slots:
        pieces.append(Piece(text[position : slot.start], None))
        own_text = slot.text
        if not own_text and slot.ids[0] in special:
            own_text = tokens.decode(tokenizer, slot.ids)
        pieces.append(Piece(own_text, slot.feature))
        position = slot.stop
    pieces.append(Piece(text[position:], None))
    return [piece for piece in pieces if piece.text]
