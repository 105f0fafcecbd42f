"""Sensitivity of conclusions to the meaning of absence.

Explains one target under several baselines: which features change sign or rank, and which causes
are the same under all.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from captum.attr import (
    InterpretableInput,
    LayerGradientXActivation,
    TextTemplateInput,
    TextTokenInput,
)
from torch import Tensor

from captum_llm_ext.attribution.generation import GenerationAttribution
from captum_llm_ext.attribution.gradient import GenerationGradientAttribution
from captum_llm_ext.base.arguments import numbered
from captum_llm_ext.evaluation.sensitivity.comparison import (
    Agreement,
    BaselineComparison,
    Change,
    Conclusion,
    check_numbers,
)
from captum_llm_ext.methods import Smile
from captum_llm_ext.result import GenerationAttributionResult
from captum_llm_ext.result.foils import against_same
from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import TokenBaseline
from captum_llm_ext.text.baselines.naming import baseline_name
from captum_llm_ext.text.baselines.slot import AsksModel
from captum_llm_ext.text.inputs import TextSegmentInput, as_prompt

__all__ = ["Agreement", "BaselineComparison", "Change", "Conclusion", "compare_baselines"]


def compare_baselines(
    attribution: GenerationAttribution | GenerationGradientAttribution,
    inp: InterpretableInput,
    baselines: Mapping[str, Any] | Sequence[Any],
    *,
    target: str | Tensor | Sequence[int] | None = None,
    gen_args: Mapping[str, Any] | None = None,
    z: float = 1.96,
    k: int = 3,
    least: float = 0.01,
    **arguments: Any,
) -> BaselineComparison:
    """Explains one target under several baselines.

    The target is generated at most once, and the foils of a contrast are found once. Absent
    generated text follows each baseline, as in ``attribute``, unless `output_baselines` is given
    for all.

    Args:
        attribution: An attribution by coalitions, or by gradients with a baseline.
        inp: The prompt: `TextSegmentInput`, `ChatInput`, or captum's `TextTokenInput` (whose
            baselines are single tokens) or `TextTemplateInput`. Its own baselines are not used, and
            it is not modified.
        baselines: At least two, by name, or in a list, which is named automatically. Each is a
            ``baselines=`` argument of the input; None is deletion.
        target: The text to explain, as text or token ids ``(n_target,)``. None: the model generates
            it.
        gen_args: As for ``attribute``.
        z: Half the width of intervals, in standard errors.
        k: Number of strongest features compared for their overlap.
        least: Attributions up to this share of the largest one under a baseline count as zero.
        **arguments: Other arguments of ``attribute``, the same for every baseline.

    Returns:
        The results and their differences.

    Raises:
        ValueError: If there are fewer than two baselines, or one does not fit the input; before the
            model runs. And whatever ``attribute`` raises.
        TypeError: If an argument has the wrong type, or the input's baselines cannot be exchanged.
    """
    if not isinstance(attribution, GenerationAttribution | GenerationGradientAttribution):
        raise TypeError(
            f"`attribution` is a {type(attribution).__name__}: give a `GenerationAttribution`, "
            "such as `GenerationAttribution(ShapleyValueSampling(model), tokenizer)`, or a "
            "`GenerationGradientAttribution`."
        )
    is_from_zero = isinstance(attribution.attr_method, LayerGradientXActivation)
    if is_from_zero or arguments.get("absent") == "zero":
        raise ValueError(
            "`baselines` would be ignored: what is absent is the zero vector under all of them. "
            "Give `LayerIntegratedGradients(model, None)`, without `absent`."
        )
    check_numbers(z, k, least)
    # A path cannot delete: it begins at the zero vector.
    nothing = "deleted" if isinstance(attribution, GenerationAttribution) else "zero vector"
    prompts = {
        name: _changed(inp, name, entry, attribution.tokenizer, arguments.get("feature_mask"))
        for name, entry in _named(baselines, nothing).items()
    }
    results: dict[str, GenerationAttributionResult] = {}
    for name, prompt in prompts.items():
        results[name] = attribution.attribute(prompt, target, gen_args=gen_args, **arguments)
        # It generates an answer for every coalition.
        if not isinstance(attribution.attr_method, Smile):
            target, gen_args = results[name].target, None
        attribution = against_same(attribution, results[name])
    return BaselineComparison(results, z=z, k=k, least=least)


# Names -------------------------------------------------------------------------------------------


def _named(baselines: object, nothing: str) -> dict[str, Any]:
    """Baselines by name; those of a list are named automatically."""
    if isinstance(baselines, Mapping):
        named = dict(baselines)
    elif isinstance(baselines, Sequence) and not isinstance(baselines, str):
        entries = list(baselines)
        named = numbered([baseline_name(entry, nothing) for entry in entries], entries)
    else:
        raise TypeError(
            f"`baselines` is a {type(baselines).__name__}: give a mapping from names to baselines, "
            "or a list of baselines, such as `[None, '<unk>', CorpusBaselines(texts)]`."
        )
    for name in named:
        if not isinstance(name, str) or not name.strip():
            raise TypeError(f"{name!r} names a baseline: give a text that is not empty.")
    if len(named) < 2:
        raise ValueError(f"`baselines` has {len(named)} entries: give at least two to compare.")
    return named


# Inputs ------------------------------------------------------------------------------------------


def _changed(
    inp: InterpretableInput, name: str, baselines: Any, tokenizer: Any, feature_mask: Tensor | None
) -> InterpretableInput:
    """The input with other baselines, rendered once to check that they fit."""
    try:
        changed = _with_baselines(inp, baselines, tokenizer)
        prompt = as_prompt(changed, tokenizer, feature_mask)
        if not isinstance(prompt.own_baseline, AsksModel):  # those need the model
            nothing = torch.zeros(1, prompt.n_features, dtype=torch.bool, device="cpu")
            prompt.render(nothing, torch.Generator().manual_seed(0))
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"baseline {name!r}: {error}") from error
    return changed


def _with_baselines(inp: InterpretableInput, baselines: Any, tokenizer: Any) -> InterpretableInput:
    if isinstance(inp, TextSegmentInput):
        return inp.with_baselines(baselines)
    if not isinstance(inp, TextTokenInput | TextTemplateInput):
        raise TypeError(
            f"`inp` is a {type(inp).__name__}, whose baselines cannot be exchanged: give a "
            "`TextSegmentInput`, `ChatInput`, `TextTokenInput` or `TextTemplateInput`."
        )
    changed = copy(inp)
    if isinstance(changed, TextTokenInput):
        changed.baselines = _one_token(baselines, tokenizer)
    else:
        changed.baselines = _template_values(changed, baselines)
    return changed


def _one_token(baselines: Any, tokenizer: Any) -> int:
    if isinstance(baselines, str):
        return tokens.token_id(tokenizer, baselines)
    if isinstance(baselines, TokenBaseline):
        return baselines.token
    if isinstance(baselines, int) and not isinstance(baselines, bool):
        return baselines
    raise TypeError(
        f"{baselines!r} cannot be used in captum's `TextTokenInput`, which replaces every absent "
        "token by one id: give a token or its id, or explain `TextSegmentInput(text, tokenizer, "
        "'token')`."
    )


def _template_values(inp: TextTemplateInput, baselines: Any) -> Any:
    """Captum's own processing of the `baselines` argument."""
    if callable(baselines):
        return baselines
    keys = inp.dict_keys or list(range(len(inp.values)))
    if baselines is None:
        return [""] * len(keys)
    kind = Mapping if inp.dict_keys else list
    if not isinstance(baselines, kind) or set(_keys(baselines)) != set(keys):
        raise ValueError(
            f"{baselines!r} does not fit the template: give a text for each of its values "
            f"({', '.join(map(str, keys))}), or a callable such as `CorpusBaselines(texts)`."
        )
    values = [baselines[key] for key in keys]  # pyright: ignore[reportArgumentType, reportCallIssue]
    if not all(isinstance(value, str) for value in values):
        raise TypeError(
            f"{values!r} does not fit the template: give one text per value; to draw from several "
            "texts, captum's `ProductBaselines`."
        )
    return values


def _keys(values: Any) -> Any:
    return values if isinstance(values, Mapping) else range(len(values))
