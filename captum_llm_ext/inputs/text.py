"""`TextSegmentInput`: a text cut into features that own whole tokens."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby, takewhile
from typing import Any

import torch
from captum.attr import InterpretableInput
from torch import Tensor

from captum_llm_ext import tokens
from captum_llm_ext.baselines import Slot, as_baseline, for_generated
from captum_llm_ext.inputs.prompt import Piece, Prompt, RenderedPrompt, Replacements
from captum_llm_ext.segment import Span, Unit, segment, shorten


class TextSegmentInput(InterpretableInput, Prompt):
    """A text whose words, sentences or other spans are switched on and off together.

    Features own whole tokens: a token belongs to the span that holds its first character other
    than white space. Tokens outside all spans, special tokens and BOS are fixed text. With every
    feature present the rendered ids are those of the tokenizer, unchanged.

    Args:
        text: The prompt.
        tokenizer: The model's tokenizer.
        unit: ``"token"``, ``"word"``, ``"sentence"``, a list of ``(start, stop)`` character spans,
            or a callable ``text -> list of (start, stop)``. What lies between spans is fixed text.
        baselines: What stands where a feature is absent: None (nothing: the tokens are deleted), a
            token id, a token of the vocabulary, a list with one text (or list of texts to draw
            from) per feature, captum's `ProductBaselines` over such a list, or a callable
            ``(slot, generator) -> text or ids``. Text takes the leading white space of the feature
            it replaces and is tokenised in place.
        add_special_tokens: Whether the tokenizer adds its BOS and the like. Text that already
            begins with BOS gets no second one.
        special_tokens_are_features: Whether BOS and other special tokens are features too.

    Raises:
        ValueError: If the text is empty, the unit unknown, spans overlap or leave the text, a span
            of the user's owns no whole token, or `baselines` has the wrong number of entries.
        TypeError: If an argument is of the wrong kind.
    """

    def __init__(
        self,
        text: str,
        tokenizer: Any,
        unit: Unit = "word",
        *,
        baselines: Any = None,
        add_special_tokens: bool = True,
        special_tokens_are_features: bool = False,
    ) -> None:
        if not isinstance(text, str):
            raise TypeError(f"`text` is a {type(text).__name__}: give the prompt as a string.")
        if not text.strip():
            raise ValueError("the prompt is empty: give a text with at least one word.")
        self.text = text
        self.tokenizer = tokenizer
        self.unit = unit
        encoding = tokens.encode(tokenizer, text, add_special_tokens=add_special_tokens)
        self.ids = encoding.ids
        self.spans, owners = _owners(text, unit, encoding)
        if special_tokens_are_features:
            self.spans, owners = _with_specials(self.spans, owners, encoding)
        self._chunks = _chunks(owners, self.ids)
        self._slots = _slots(self, owners, encoding)
        self.n_features = self.n_itp_features = len(self.spans)
        self.columns = list(range(self.n_features))
        self.names = self.values = _names(self._slots, owners, encoding, tokenizer)
        self.pieces = _pieces(text, self._slots, self.names, owners, encoding, tokenizer)
        replacement = as_baseline(baselines, tokenizer, self.n_features)
        self.baseline = for_generated(replacement)
        self._replacements = Replacements(replacement, self._slots, tokenizer)
        self.deterministic = self._replacements.deterministic

    @property
    def slots(self) -> list[Slot]:
        """Per feature the place it leaves when absent, as its baseline is asked about it."""
        return list(self._slots)

    def to_tensor(self) -> Tensor:
        """All features present: ones, shape ``(1, n_features)``."""
        return torch.ones(1, self.n_features)

    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> Tensor:
        """Token ids ``(1, n_tokens)`` of the prompt, or of the coalition in `perturbed_tensor`."""
        if perturbed_tensor is None:
            return torch.tensor([self.ids])
        mask = perturbed_tensor[:1] == 1
        row = self.render(mask, torch.Generator().manual_seed(0))[0]
        return torch.tensor([row.ids], device=perturbed_tensor.device, dtype=torch.long)

    def render(
        self, masks: Tensor, generator: torch.Generator, draws: Tensor | None = None
    ) -> list[RenderedPrompt]:
        """See `Prompt.render`."""
        replacements = self._replacements.draws(len(masks), generator, draws)
        rows: list[RenderedPrompt] = []
        for mask, absent in zip(masks.tolist(), replacements, strict=True):
            ids: list[int] = []
            for feature, chunk in self._chunks:
                ids += chunk if feature is None or mask[feature] else absent(feature)
            rows.append(RenderedPrompt(tuple(ids)))
        return rows

    def __repr__(self) -> str:
        unit = self.unit if isinstance(self.unit, str) else "spans"
        return (
            f"TextSegmentInput({shorten(self.text)!r}, unit={unit!r}, {self.n_features} features)"
        )


def _owners(
    text: str, unit: Unit, encoding: tokens.Encoding
) -> tuple[list[Span], list[int | None]]:
    """The spans that own tokens, and per token the span it belongs to."""
    if isinstance(unit, str) and unit == "token":
        return _token_spans(text, encoding)
    spans = segment(text, unit)
    starts = [span.start for span in spans]
    owners: list[int | None] = []
    for anchor in encoding.anchors:
        at = -1 if anchor is None else bisect_right(starts, anchor) - 1
        owners.append(at if at >= 0 and anchor is not None and anchor < spans[at].stop else None)
    owning = {owner for owner in owners if owner is not None}
    homeless = [span for i, span in enumerate(spans) if i not in owning]
    if homeless and not isinstance(unit, str):
        start, stop = homeless[0]
        raise ValueError(
            f"span ({start}, {stop}) {text[start:stop]!r} owns no whole token (its first one "
            "begins before it): widen it to the border of a token."
        )
    if not owning:
        raise ValueError(f"the prompt {shorten(text)!r} has no token of its own to attribute to.")
    # A tokenizer whose tokens run across words: such words are one feature.
    kept = sorted(owning)
    number = {old: new for new, old in enumerate(kept)}
    ends = [spans[after - 1].stop for after in [*kept[1:], len(spans)]]
    merged = [Span(spans[old].start, end) for old, end in zip(kept, ends, strict=True)]
    return merged, [None if owner is None else number[owner] for owner in owners]


def _token_spans(text: str, encoding: tokens.Encoding) -> tuple[list[Span], list[int | None]]:
    places = [i for i, anchor in enumerate(encoding.anchors) if anchor is not None]
    if not places:
        raise ValueError(f"the prompt {shorten(text)!r} has no token of its own to attribute to.")
    borders = [encoding.starts[place] for place in places[1:]] + [len(text)]
    spans = [
        Span(min(encoding.starts[place], border), border)
        for place, border in zip(places, borders, strict=True)
    ]
    owners: list[int | None] = [None] * len(encoding.ids)
    for feature, place in enumerate(places):
        owners[place] = feature
    return spans, owners


def _with_specials(
    spans: list[Span], owners: list[int | None], encoding: tokens.Encoding
) -> tuple[list[Span], list[int | None]]:
    """Every special token as a feature of its own, numbered in reading order."""
    keys: list[int | tuple[int, int] | None] = [
        (place, -1) if anchor is None else owner
        for place, (owner, anchor) in enumerate(zip(owners, encoding.anchors, strict=True))
    ]
    order = list(dict.fromkeys(key for key in keys if key is not None))
    number = {key: i for i, key in enumerate(order)}
    found = [
        spans[key]
        if isinstance(key, int)
        else Span(encoding.starts[key[0]], encoding.starts[key[0]])
        for key in order
    ]
    return found, [None if key is None else number[key] for key in keys]


def _chunks(
    owners: Sequence[int | None], ids: Sequence[int]
) -> list[tuple[int | None, tuple[int, ...]]]:
    """Runs of tokens with one owner, in order."""
    pairs = zip(owners, ids, strict=True)
    return [
        (owner, tuple(token for _, token in run))
        for owner, run in groupby(pairs, key=lambda pair: pair[0])
    ]


def _slots(
    inp: TextSegmentInput, owners: Sequence[int | None], encoding: tokens.Encoding
) -> list[Slot]:
    first: dict[int, int] = {}
    ids: dict[int, list[int]] = {}
    for place, owner in enumerate(owners):
        if owner is not None:
            first.setdefault(owner, place)
            ids.setdefault(owner, []).append(encoding.ids[place])
    slots: list[Slot] = []
    for feature, span in enumerate(inp.spans):
        # White space that the first token carries goes with it, also when the span leaves it out.
        start = encoding.starts[first[feature]]
        if start > span.start or inp.text[start : span.start].strip():
            start = span.start
        unit = inp.unit if isinstance(inp.unit, str) else None
        slots.append(Slot(inp.text, start, span.stop, tuple(ids[feature]), feature, unit))
    return slots


def _names(
    slots: Sequence[Slot],
    owners: Sequence[int | None],
    encoding: tokens.Encoding,
    tokenizer: Any,
) -> list[str]:
    """The features' texts; special tokens and parts of characters, which have none, by name."""
    if all(slot.text for slot in slots):
        return [slot.text for slot in slots]
    labels = tokens.labels(tokenizer, encoding.ids)
    return [slot.text or labels[owners.index(i)] for i, slot in enumerate(slots)]


def _pieces(
    text: str,
    slots: Sequence[Slot],
    names: Sequence[str],
    owners: Sequence[int | None],
    encoding: tokens.Encoding,
    tokenizer: Any,
) -> list[Piece]:
    """The text cut at the features; special tokens, which have no text of their own, decoded."""
    leading = [i for i, _ in takewhile(lambda pair: pair[1] is None, enumerate(encoding.anchors))]
    shown = tokens.decode(tokenizer, [encoding.ids[i] for i in leading]) if leading else ""
    special = {
        t for t, anchor in zip(encoding.ids, encoding.anchors, strict=True) if anchor is None
    }
    pieces: list[Piece] = []
    if shown and owners[0] is None and not text.startswith(shown):
        pieces.append(Piece(shown, None))
    position = 0
    for feature, slot in enumerate(slots):
        pieces.append(Piece(text[position : slot.start], None))
        pieces.append(Piece(slot.text or names[feature] * (slot.ids[0] in special), feature))
        position = slot.stop
    pieces.append(Piece(text[position:], None))
    return [piece for piece in pieces if piece.text]
