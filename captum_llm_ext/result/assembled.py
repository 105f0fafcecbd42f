"""Builds a result from attributions to features."""

from collections.abc import Mapping
from typing import Any

import torch
from captum.attr import InterpretableInput
from torch import Tensor, nn

from captum_llm_ext.coalitions import DrawnTexts, Solution
from captum_llm_ext.contrast import Foils
from captum_llm_ext.result.answer import AnswerAttribution
from captum_llm_ext.result.design import Design
from captum_llm_ext.result.result import GenerationAttributionResult
from captum_llm_ext.text.inputs import GeneratedText, Prompt


@torch.inference_mode(False)  # users get ordinary tensors, copies of those computed within
def assembled(
    inp: InterpretableInput,
    prompt: Prompt,
    generated: GeneratedText,
    solution: Solution,
    joint: Tensor | None,
    *,
    masks: Tensor,
    values: Tensor,
    draws: Tensor,
    n_evaluations: int,
    like: Tensor,
    provenance: Mapping[str, Any],
    design: Design | None = None,
    foils: Foils | None = None,
    foil_values: Tensor | None = None,
    answer: AnswerAttribution | None = None,
    drawn_texts: DrawnTexts | None = None,
) -> GenerationAttributionResult:
    """A result with one column per prompt feature; captum's inputs have one per group member.

    Args:
        inp: The user's input.
        prompt, generated: The prompt and the target as features. The prompt's come first; the last
            generated feature may be missing, since no token follows it.
        solution: Attributions of all features.
        joint: Attributions of the target's joint probability ``(n_features,)``, if `seq_attr`
            explains it. None: `seq_attr` is the sum over target tokens.
        masks: Bool ``(n_coalitions, n_prompt_features + n_output_features)``.
        values: ``(n_coalitions, n_target)``.
        draws: ``(n_coalitions,)``.
        n_evaluations: Number of distinct rows scored.
        like: A tensor with the device and dtype of all numbers.
        provenance: Its ``"attr_target"`` names the kind of value.
        design: How the coalitions were planned.
        foils: The foils of a contrast.
        foil_values: Log-probability of all foils of each target token together, ``(n_coalitions,
            n_target)``; the first coalition is the full one.
        answer: The whole answer's attributions, from coalitions of their own.
        drawn_texts: The texts of the coalitions, if their effects were removed before solving.
    """
    n_prompt, n_features = prompt.n_features, prompt.n_features + generated.n_features
    columns = torch.tensor(prompt.columns, dtype=torch.int64, device="cpu")
    full = solution.full_values
    probabilities = {"log_prob": full.exp, "prob": full.clone}.get(provenance["attr_target"])
    if foil_values is not None:
        # With a surrogate, the model's own coalitions come last.
        correction = None if design is None else design.correction
        probabilities = (full + foil_values[-correction.n if correction else 0]).exp

    def split(found: Tensor) -> tuple[Tensor, Tensor | None]:
        wide = nn.functional.pad(found, (0, n_features - found.shape[1])).to(like, copy=True)
        return wide[:, :n_prompt][:, columns], wide[:, n_prompt:] if generated.n_features else None

    token_attr, output_attr = split(solution.attributions)
    token_attr_se, output_attr_se = split(solution.standard_errors)
    return GenerationAttributionResult(
        input_tokens=list(prompt.names),
        output_tokens=list(generated.labels),
        seq_attr=token_attr.sum(0) if joint is None else joint[columns].to(like, copy=True),
        token_attr=token_attr,
        output_probs=None if probabilities is None else probabilities().to(like, copy=True),
        inp=inp,
        output_features=generated.names if generated.n_features else None,
        output_attr=output_attr,
        token_attr_se=token_attr_se,
        output_attr_se=output_attr_se,
        full_values=full.to(like, copy=True),
        empty_values=solution.empty_values.to(like, copy=True),
        efficiency_gap=solution.efficiency_gap.to(like, copy=True),
        n_evaluations=n_evaluations,
        masks=masks.to(like.device, copy=True),
        values=values.to(like, copy=True),
        draws=draws.to(like.device, copy=True),
        target=generated.target.to(like.device),
        prompt_pieces=prompt.pieces,
        levels=prompt.levels,
        output_pieces=generated.pieces,
        design=design,
        foils=None if foils is None else foils.tensor.to(like.device),
        foil_tokens=None if foils is None else [list(own) for own in foils.names],
        foil_values=None if foil_values is None else foil_values.to(like, copy=True),
        answer=None if answer is None else answer.to(like),
        drawn_texts=drawn_texts,
        provenance=provenance,
    )


def assembled_without_coalitions(
    inp: InterpretableInput,
    prompt: Prompt,
    generated: GeneratedText,
    solution: Solution,
    joint: Tensor | None,
    *,
    n_evaluations: int,
    like: Tensor,
    provenance: Mapping[str, Any],
    foils: Foils | None = None,
) -> GenerationAttributionResult:
    """The result of a method without coalitions: `masks` and `values` hold only full and empty.

    Args:
        inp, prompt, generated, solution, joint, n_evaluations, like, provenance, foils: As for
            `assembled`.
    """
    n_features = prompt.n_features + generated.n_features
    ends = torch.tensor([[True], [False]], dtype=torch.bool, device="cpu")
    return assembled(
        inp,
        prompt,
        generated,
        solution,
        joint,
        masks=ends.expand(-1, n_features),
        values=torch.stack([solution.full_values, solution.empty_values]),
        draws=torch.zeros(2, dtype=torch.int64, device="cpu"),
        n_evaluations=n_evaluations,
        like=like,
        provenance=provenance,
        foils=foils,
    )


def numbers_of(model: nn.Module, device: torch.device | str) -> Tensor:
    """An empty tensor with the dtype of results: float64 for float64 models, otherwise float32.

    Args:
        model: The model.
        device: The model's input device.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    is_double = parameter is not None and parameter.dtype == torch.float64
    return torch.empty(0, dtype=torch.float64 if is_double else torch.float32, device=device)
