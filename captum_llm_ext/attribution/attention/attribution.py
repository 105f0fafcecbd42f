"""`GenerationAttentionAttribution`: attention maps as attributions of generated tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from captum.attr import InterpretableInput
from torch import Tensor

from captum_llm_ext import _compat
from captum_llm_ext.attribution.attention.heads import AttentionByHead
from captum_llm_ext.attribution.attention.maps import each_row
from captum_llm_ext.attribution.attention.methods import (
    AttentionRollout,
    AttentionWeights,
    on_device,
)
from captum_llm_ext.attribution.game import Run
from captum_llm_ext.attribution.gradient.path_groups import features
from captum_llm_ext.attribution.model_access import ModelAccess
from captum_llm_ext.attribution.target import announce_answer
from captum_llm_ext.coalitions import Solution
from captum_llm_ext.model import (
    Scorer,
)
from captum_llm_ext.model.scoring.progress import ProgressBar, Shown
from captum_llm_ext.result import GenerationAttributionResult
from captum_llm_ext.result.assembled import assembled_without_coalitions
from captum_llm_ext.text.inputs import Context, GeneratedText, as_prompt
from captum_llm_ext.text.segment import Unit


class GenerationAttentionAttribution(ModelAccess):
    """Attributes every token of a generated text by attention, to the prompt and to earlier output.

    The row of a target token is that of the position that predicts it. Attributions are shares:
    those of a token's features and of fixed text (`fixed_attr`: BOS, a chat template, attention
    sinks) sum to 1. They have no sign, do not depend on which token was generated, and involve no
    baseline: `full_values` is 1 and `empty_values` the share of fixed text.

    How informative they are depends on the model, and on whether punctuation is a feature of its
    own, since the comma after a word is the position that predicts the next one. On two grammars
    with known causes and small models (``benchmarks/ground_truth.py --inside``) precision among
    content words was 1.0 and .95 for ``AttentionRollout(model, "projection")``, .88 and .82 for
    ``"alti"``, .97 and .86 for weights, .64 and .77 for plain rollout (chance: .17), and .67 / .74,
    .63 / .73, .89 / .85 and .42 / .38 with punctuation merged into words. No variant of ALTI came
    near the projection (L2; scaled by the next norm's weights; the gated part passed through, or
    counted as the position's own; heads or the residual separate; rows shifted by their largest
    distance): .71 to .93. The gradient of its rule, ``⟨part, sign(sum)⟩``, gave 1.0 and .94.
    Attention maps are for inspection: the effect of removing a feature is what
    `GenerationAttribution` measures. `by_head` returns the weights of every head for one token, for
    plotting.

    Args:
        attr_method: `AttentionWeights` or `AttentionRollout` over a transformers model.
        tokenizer: The model's tokenizer.

    Raises:
        TypeError: If the method is not one of these, or its model not a causal language model.
    """

    def __init__(self, attr_method: AttentionWeights | AttentionRollout, tokenizer: Any) -> None:
        if type(attr_method) not in (AttentionWeights, AttentionRollout):
            raise TypeError(
                f"`attr_method` is a {type(attr_method).__name__}: give `AttentionWeights(model)` "
                'or `AttentionRollout(model, contributions="projection")`.'
            )
        _compat.check_causal(attr_method.model)
        self.attr_method, self.model, self.tokenizer = attr_method, attr_method.model, tokenizer
        self.attr_target = "attention"
        self._access_model()

    def attribute(
        self,
        inp: InterpretableInput,
        target: str | Tensor | Sequence[int] | None = None,
        gen_args: Mapping[str, Any] | None = None,
        *,
        output_unit: Unit | None = "token",
        seed: int = 0,
        feature_mask: Tensor | None = None,
        show_progress: Shown = False,
    ) -> GenerationAttributionResult:
        """Attributes the target, or what the model generates, by attention maps.

        Args:
            inp: The prompt: captum's `TextTokenInput`, `TextSegmentInput` or `ChatInput`. Its
                baselines are not used.
            target: The text to explain, as for `GenerationAttribution`. None: the model generates
                it.
            gen_args: Arguments of the model's ``generate``; only without a target.
            output_unit: Features made of the target, as for `GenerationAttribution`. None holds the
                target fixed.
            seed: Seeds sampling, if `gen_args` asks for it.
            feature_mask: As for `GenerationAttribution`.
            show_progress: Whether to show a bar over the single forward pass; or a `Listener`.

        Returns:
            The result; a feature's attribution is the sum over its tokens.

        Raises:
            ValueError: If the target is empty or outside the vocabulary, or some layer has no
                attention, or one of a kind that has no map.
        """
        generation = None if target is not None else self.generation(gen_args)
        run = self._read_run(inp, feature_mask, seed)
        ids = self._target_ids(run, target, gen_args, generation, None)
        context, generated = run.context, run.context.generated(ids, output_unit, None)
        if generation is not None:
            announce_answer(show_progress, self, context.full, ids, generation)
        bar = ProgressBar("passes", "row", is_shown=show_progress)
        with bar.shown():
            bar.announce(1)
            maps = self.attr_method.map(_read_ids(context, generated))
            bar.advance(1)
        rows = maps[len(context.full.ids) - 1 :]
        solution = _shares(context, generated, rows, range(len(rows)))
        provenance = {
            **self._provenance(run, generated, generation),
            **self._method_settings(),
            "estimator": "attention",
            # There are neither coalitions nor random draws.
            "gradients": True,
            "unsigned": True,
            "estimate": False,
            "columns": list(context.prompt.columns),
            "n_evaluations": 1,
            "fixed_attr": solution.empty_values.tolist(),
            "fixed_share": solution.empty_values.tolist(),
        }
        return assembled_without_coalitions(
            inp,
            context.prompt,
            generated,
            solution,
            None,
            n_evaluations=1,
            like=self._numbers(),
            provenance=provenance,
        )

    def by_head(
        self,
        inp: InterpretableInput,
        target: str | Tensor | Sequence[int],
        target_token: int,
        *,
        output_unit: Unit | None = "token",
        feature_mask: Tensor | None = None,
    ) -> AttentionByHead:
        """Attention weights of every head of every layer at the position that predicts one token.

        These are plain attention weights, whatever the method: neither averaged nor composed over
        layers.

        Args:
            inp: The prompt, as for `attribute`.
            target: The text, such as a result's `target`.
            target_token: Index of the target token; negative ones count from the end.
            output_unit: As for `attribute`.
            feature_mask: As for `attribute`.

        Returns:
            Weights ``(n_layers, n_heads, n_columns)``, summed over the tokens of a feature.

        Raises:
            ValueError: As for `attribute`; or if `target_token` is out of range.
        """
        run = self._read_run(inp, feature_mask, 0)
        ids = self._target_ids(run, target, None, None, None)
        context, generated = run.context, run.context.generated(ids, output_unit, None)
        n_target = len(generated.ids)
        if not -n_target <= target_token < n_target:
            raise ValueError(
                f"`target_token` is {target_token}: the target has {n_target} tokens, give the "
                "position of one."
            )
        t = target_token % n_target
        # Nothing after the token has an influence.
        read_ids = _read_ids(context, generated)[: len(context.full.ids) + t]
        layers: list[Tensor] = []

        def take(_: int, weights: Tensor) -> None:
            layers.append(weights.double().cpu())

        each_row(self.model, on_device(read_ids, self.model), len(read_ids) - 1, take)
        n_heads = max(map(len, layers))
        rows = torch.stack([_filled(layer, n_heads) for layer in layers])
        solution = _shares(context, generated, rows.flatten(0, 1), [t] * (len(layers) * n_heads))
        n_prompt, n_visible = context.prompt.n_features, generated.n_visible[t]
        columns = [*context.prompt.columns, *range(n_prompt, n_prompt + n_visible)]
        return AttentionByHead(
            solution.attributions[:, columns].float().unflatten(0, rows.shape[:2]),
            solution.empty_values.float().unflatten(0, rows.shape[:2]),
            generated.labels[t],
            [*context.prompt.names, *generated.names[:n_visible]],
            len(context.prompt.columns),
        )

    def check_stored(
        self,
        inp: InterpretableInput,
        target: Tensor,
        values: Tensor,
        foils: Tensor | None = None,
    ) -> None:
        """Does nothing: attention shares cannot be compared with values of a forward pass."""

    def _read_run(self, inp: InterpretableInput, feature_mask: Tensor | None, seed: int) -> Run:
        prompt = as_prompt(inp, self.tokenizer, feature_mask)
        prompt.places()  # raises if the input knows none, before the costly part
        return self._run(prompt, Scorer(self.model, attr_target="logit"), seed)

    def _method_settings(self) -> dict[str, Any]:
        method = self.attr_method
        if isinstance(method, AttentionRollout):
            return {"contributions": method.contributions}
        return {"layers": method.layers, "heads": method.heads}


def _read_ids(context: Context, generated: GeneratedText) -> Tensor:
    """All ids that the model reads, int64 ``(length,)``: all but the last target token."""
    ids = [*context.full.ids, *generated.ids[:-1]]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _shares(
    context: Context, generated: GeneratedText, rows: Tensor, targets: Sequence[int]
) -> Solution:
    """Shares of features, from the map's rows ``(n, length)`` of `n` target tokens."""
    n_before = len(context.full.ids)
    own = features(context.prompt, n_before, generated, n_draws=1, absent="zero", seed=0)
    summed = torch.zeros(len(rows), own.n_features + 1, dtype=torch.float64, device="cpu")
    summed.index_add_(1, own.owners(rows.shape[1]), rows)
    # A word in progress does not cause its own remaining tokens: it counts as fixed text.
    visible = [own.n_prompt + generated.n_visible[t] for t in targets]
    n_visible = torch.tensor(visible, dtype=torch.int64, device="cpu")
    later = torch.arange(own.n_features, dtype=torch.int64, device="cpu") >= n_visible[:, None]
    attributions = summed[:, :-1].masked_fill(later, 0.0)
    # The share of attention sinks belongs to no feature either.
    full = torch.ones(len(rows), dtype=torch.float64, device="cpu")
    return Solution(attributions, torch.zeros_like(attributions), full, full - attributions.sum(1))


def _filled(weights: Tensor, n_heads: int) -> Tensor:
    """Weights ``(heads, length)``, padded with NaN to `n_heads` rows."""
    missing = weights.new_full((n_heads - len(weights), weights.shape[1]), torch.nan)
    return torch.cat([weights, missing])
