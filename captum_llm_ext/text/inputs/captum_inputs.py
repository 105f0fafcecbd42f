"""Adapters from captum's inputs to `Prompt`."""

import inspect
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, cast

import torch
from captum.attr import InterpretableInput, ProductBaselines, TextTemplateInput, TextTokenInput
from torch import Tensor

from captum_llm_ext.text import encoding, tokens
from captum_llm_ext.text.baselines import (
    Baseline,
    Deletion,
    LanguageModel,
    Slot,
    TokenBaseline,
    draw_generator,
    template_slots,
    uniform,
    with_model,
)
from captum_llm_ext.text.baselines.candidates import Match
from captum_llm_ext.text.baselines.corpus.baselines import CorpusBaselines
from captum_llm_ext.text.inputs.prompt import (
    AnswerLogProbs,
    Piece,
    Place,
    Prompt,
    RenderedPrompt,
    draw_seed,
    template_pieces,
)
from captum_llm_ext.text.inputs.text import TextSegmentInput


def as_prompt(inp: InterpretableInput, tokenizer: Any, feature_mask: Tensor | None) -> Prompt:
    """The prompt behind any interpretable input of captum or of this package.

    Args:
        inp: `TextSegmentInput`, or captum's `TextTokenInput`, `TextTemplateInput`,
            `ImageMaskInput`, or any other `InterpretableInput` whose model input is a text, ids
            ``(1, n_tokens)`` or a mapping with ``input_ids``.
        tokenizer: The model's tokenizer.
        feature_mask: As in captum: shape ``(1, n_features)``, equal numbers are one feature.

    Raises:
        TypeError: If `inp` is not an interpretable input.
        ValueError: If there is no feature, or `feature_mask` has the wrong shape.
    """
    if not isinstance(inp, InterpretableInput):
        raise TypeError(
            f"`inp` is a {type(inp).__name__}: give an interpretable input such as "
            "`TextSegmentInput(prompt, tokenizer)`."
        )
    if isinstance(inp, Prompt):
        prompt: Prompt = inp
    elif isinstance(inp, TextTokenInput) and _keeps_rendering_of(inp, TextTokenInput):
        prompt = _TokenPrompt(inp)
    elif isinstance(inp, TextTemplateInput) and _keeps_rendering_of(inp, TextTemplateInput):
        prompt = _TemplatePrompt(inp, tokenizer)
    else:
        prompt = _OpaquePrompt(inp, tokenizer)
    if prompt.n_features == 0:
        raise ValueError("the prompt is empty: it has no feature to attribute to.")
    return prompt if feature_mask is None else _MergedPrompt(prompt, feature_mask)


class _TokenPrompt(Prompt):
    """Captum's token input: absent tokens become one id."""

    unit_name = "token"

    def __init__(self, inp: TextTokenInput) -> None:
        self._ids = inp.inp_tensor[0].tolist()
        places = range(len(self._ids)) if inp.itp_mask is None else inp.itp_mask[0].nonzero()[:, 0]
        self._places = [int(place) for place in places]
        self._token = int(inp.baselines)
        self.n_features = len(self._places)
        self.names = list(inp.values)
        self.columns = list(range(self.n_features))
        texts = tokens.pieces(inp.tokenizer, self._ids)
        feature_of = {place: feature for feature, place in enumerate(self._places)}
        self.pieces = [Piece(text, feature_of.get(i)) for i, text in enumerate(texts)]
        self.text = "".join(texts)
        self.output_baseline = self.own_baseline = TokenBaseline(self._token)
        self.deterministic = True

    def render(
        self, masks: Tensor, generator: torch.Generator, draws: Tensor | None = None
    ) -> list[RenderedPrompt]:
        rows: list[RenderedPrompt] = []
        for mask in masks.tolist():
            ids = list(self._ids)
            for place, present in zip(self._places, mask, strict=True):
                if not present:
                    ids[place] = self._token
            rows.append(RenderedPrompt(tuple(ids)))
        return rows

    def places(self) -> list[Place]:
        return [Place((place,), feature) for feature, place in enumerate(self._places)]

    def replacement_ids(
        self, n_draws: int, generator: torch.Generator
    ) -> list[list[tuple[int, ...]]]:
        return [[(self._token,)] * self.n_features] * n_draws


class _TemplatePrompt(Prompt):
    """Captum's template input: absent values are replaced, and the text is tokenised again."""

    unit_name = "field"

    def __init__(self, inp: TextTemplateInput, tokenizer: Any) -> None:
        self._inp = inp
        self._tokenizer = tokenizer
        mask = list(range(inp.n_features)) if inp.mask is None else inp.formatted_mask
        # Captum numbers groups in hash order; numbered by first appearance they are reproducible.
        self.columns = _renumber(mask)
        self.n_features = len(set(self.columns))
        self.names = list(inp.values)
        self.text = self._format(inp.values)
        values = dict(zip(inp.dict_keys, inp.values, strict=True)) if inp.dict_keys else inp.values
        found = template_pieces(inp.format_fn, values)
        self.pieces = found or [Piece(name, i) for i, name in enumerate(self.names)]
        # A callable that takes a slot is a baseline of this package, which also covers output.
        baseline = inp.baselines if _accepts_slot(inp.baselines) else None
        self._slots = None if baseline is None else template_slots(inp)
        self.output_baseline = cast(Baseline, baseline or Deletion())
        is_nothing = isinstance(inp.baselines, list) and not any(inp.baselines)
        self.own_baseline = None if is_nothing else inp.baselines
        self.deterministic = not callable(inp.baselines)

    def render(
        self, masks: Tensor, generator: torch.Generator, draws: Tensor | None = None
    ) -> list[RenderedPrompt]:
        seed = draw_seed(generator)
        absent: dict[int, list[str]] = {}
        rows: list[RenderedPrompt] = []
        order = range(len(masks)) if draws is None else draws.tolist()
        for mask, draw in zip(masks.tolist(), order, strict=True):
            if draw not in absent:
                absent[draw] = self._draw(seed, draw)
            values = [
                value if mask[feature] else absent[draw][i]
                for i, (value, feature) in enumerate(
                    zip(self._inp.values, self.columns, strict=True)
                )
            ]
            rows.append(RenderedPrompt(_text_ids(self._tokenizer, self._format(values))))
        return rows

    def with_model(self, model: LanguageModel) -> Prompt:
        changed = copy(self)
        changed.output_baseline = with_model(self.output_baseline, model)
        return changed

    def matches(self) -> list[Match] | None:
        explain = getattr(self.output_baseline, "explain", None)
        slots = self._slots
        return None if explain is None or slots is None else [explain(slot) for slot in slots]

    def _draw(self, seed: int, draw: int) -> list[str]:
        baselines = self._inp.baselines
        if self._slots is not None:
            generators = [draw_generator(seed, draw, slot.feature) for slot in self._slots]
            pairs = zip(self._slots, generators, strict=True)
            return [
                _replacement_text(self.output_baseline(s, g), s) if s.text else "" for s, g in pairs
            ]
        if isinstance(baselines, ProductBaselines):
            drawn: Any = _draw_product(baselines, seed, draw)
        else:
            drawn = baselines() if callable(baselines) else baselines
        if isinstance(drawn, Mapping):
            drawn = [drawn[key] for key in self._inp.dict_keys]
        if len(drawn) != len(self._inp.values):
            raise ValueError(
                f"the template's baselines gave {len(drawn)} values for "
                f"{len(self._inp.values)}: give one per value."
            )
        return list(drawn)

    def _format(self, values: Sequence[str]) -> str:
        if self._inp.dict_keys:
            return self._inp.format_fn(**dict(zip(self._inp.dict_keys, values, strict=True)))
        return self._inp.format_fn(*values)


class _OpaquePrompt(Prompt):
    """Any other input, called for one coalition at a time: images, custom inputs."""

    def __init__(self, inp: InterpretableInput, tokenizer: Any) -> None:
        self._inp = inp
        self._tokenizer = tokenizer
        self.n_features = int(inp.n_itp_features)
        column_of = inp.format_attr(
            torch.arange(float(self.n_features), dtype=torch.float32, device="cpu").unsqueeze(0)
        )
        self.columns = [int(column) for column in column_of.reshape(-1).tolist()]
        self.names = [str(value) for value in inp.values]
        self.pieces = [Piece(name, i) for i, name in enumerate(self.names)]
        original = inp.to_model_input()
        self.text = original if isinstance(original, str) else ""
        self.output_baseline = Deletion()
        self.own_baseline = inp
        # Such an input may draw at random; captum's image input does not.
        self.deterministic = not callable(getattr(inp, "baselines", None))

    def render(
        self, masks: Tensor, generator: torch.Generator, draws: Tensor | None = None
    ) -> list[RenderedPrompt]:
        rows: list[RenderedPrompt] = []
        for number, mask in enumerate(masks.bool()):
            full = bool(mask.all())
            model_input = self._inp.to_model_input(None if full else mask.float().unsqueeze(0))
            key = tuple(mask.tolist()) if self.deterministic else number
            rows.append(self._row(model_input, key))
        return rows

    def _row(self, model_input: Any, key: object) -> RenderedPrompt:
        if isinstance(model_input, str):
            return RenderedPrompt(_text_ids(self._tokenizer, model_input))
        if isinstance(model_input, Tensor):
            return RenderedPrompt(tuple(model_input.reshape(-1).tolist()))
        if not isinstance(model_input, Mapping) or "input_ids" not in model_input:
            raise TypeError(
                f"the input renders to a {type(model_input).__name__}: expected a text, a tensor "
                "of token ids or a mapping with `input_ids`."
            )
        extras = dict(cast(Mapping[str, Any], model_input))
        ids = torch.as_tensor(extras.pop("input_ids"), device="cpu").reshape(-1).tolist()
        extras.pop("attention_mask", None)  # all ones for a single prompt, as captum uses it
        return RenderedPrompt(tuple(ids), extras or None, key if extras else None)


class _MergedPrompt(Prompt):
    """A prompt whose features are merged by captum's `feature_mask`."""

    def __init__(self, prompt: Prompt, feature_mask: Tensor) -> None:
        mask = torch.as_tensor(feature_mask, device="cpu").reshape(-1).tolist()
        if len(mask) != prompt.n_features:
            raise ValueError(
                f"`feature_mask` has shape {tuple(feature_mask.shape)} for {prompt.n_features} "
                f"features: give shape (1, {prompt.n_features})."
            )
        self._prompt = prompt
        groups = _renumber(mask)
        if isinstance(prompt, TextSegmentInput):
            prompt = self._prompt = prompt.drawn_together(groups)
        self._groups = torch.tensor(groups, dtype=torch.int64, device="cpu")
        self.n_features = max(groups) + 1
        self.text, self.output_baseline = prompt.text, prompt.output_baseline
        self.own_baseline = prompt.own_baseline
        self.unit_name = prompt.unit_name
        self.deterministic = prompt.deterministic
        if isinstance(prompt, TextSegmentInput):
            self.columns = list(range(self.n_features))
            self.names = [
                " …".join(name for name, g in zip(prompt.names, groups, strict=True) if g == group)
                for group in self.columns
            ]
            self.pieces = [
                piece if piece.feature is None else replace(piece, feature=groups[piece.feature])
                for piece in prompt.pieces
            ]
        else:
            self.columns = [groups[feature] for feature in prompt.columns]
            self.names, self.pieces = prompt.names, prompt.pieces

    def render(
        self, masks: Tensor, generator: torch.Generator, draws: Tensor | None = None
    ) -> list[RenderedPrompt]:
        return self._prompt.render(masks[:, self._groups], generator, draws)

    def places(self) -> list[Place]:
        groups = self._groups.tolist()
        return [replace(place, feature=groups[place.feature]) for place in self._prompt.places()]

    def replacement_ids(
        self, n_draws: int, generator: torch.Generator
    ) -> list[list[tuple[int, ...]]]:
        return self._prompt.replacement_ids(n_draws, generator)

    def with_default(self, baselines: Any) -> Prompt:
        return self._wrap(self._prompt.with_default(baselines))

    def with_model(self, model: LanguageModel) -> Prompt:
        return self._wrap(self._prompt.with_model(model))

    def with_answer(self, log_probs: AnswerLogProbs, text: str) -> Prompt:
        return self._wrap(self._prompt.with_answer(log_probs, text))

    def _wrap(self, prompt: Prompt) -> Prompt:
        changed = copy(self)
        changed._prompt = prompt
        changed.output_baseline, changed.own_baseline = prompt.output_baseline, prompt.own_baseline
        changed.deterministic = prompt.deterministic
        return changed

    def matches(self) -> list[Match] | None:
        return self._prompt.matches()


def _text_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    # As in captum: with the tokenizer's own special tokens, whatever the text contains.
    return tuple(encoding.ids(tokenizer, text))


def _accepts_slot(baselines: object) -> bool:
    """Whether a callable takes (slot, generator); captum's take no arguments."""
    if isinstance(baselines, CorpusBaselines):
        return True  # it accepts both
    if not callable(baselines) or isinstance(baselines, ProductBaselines):
        return False
    parameters = inspect.signature(baselines).parameters.values()
    return sum(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in parameters) >= 2


def _replacement_text(found: object, slot: Slot) -> str:
    if not isinstance(found, str):
        raise TypeError(
            f"the baseline returned {found!r} for {slot.text!r}: the value of a template is a text."
        )
    return found


def _keeps_rendering_of(inp: InterpretableInput, kind: type[InterpretableInput]) -> bool:
    """Whether the input renders coalitions like `kind`, without overriding it in a subclass."""
    return type(inp).to_model_input is kind.to_model_input


def _draw_product(baselines: ProductBaselines, seed: int, draw: int) -> Any:
    """`ProductBaselines.sample` with explicit generators instead of the global one."""
    drawn = [
        choices[int(uniform(draw_generator(seed, draw, number)) * len(choices))]
        for number, choices in enumerate(baselines.baseline_values)
    ]
    if not baselines.dict_keys:
        return drawn
    values: dict[str, Any] = {}
    for key, value in zip(baselines.dict_keys, drawn, strict=True):
        values.update(zip(key, value, strict=True) if isinstance(key, tuple) else [(key, value)])
    return values


def _renumber(groups: Sequence[Any]) -> list[int]:
    """Group labels as numbers by first appearance."""
    number = {label: i for i, label in enumerate(dict.fromkeys(groups))}
    return [number[label] for label in groups]
