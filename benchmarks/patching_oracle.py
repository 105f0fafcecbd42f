"""Activation patching beside nnsight on one model: effects of every layer and position, and gains.

    pip install nnsight
    python benchmarks/patching_oracle.py

A llama of two layers with random weights, in float64, so that what differs is no rounding. Prints
the largest differences for both directions, and for places that are patched together by features.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import architectures
import tiny

from captum_llm_ext import ActivationPatching, TextSegmentInput
from captum_llm_ext.attribution.patching.trace import Direction

PROMPT, TARGET, FEATURE, OTHER = "Dave lives in Palm and is a lawyer.", " golf and", "Palm", 9


def by_nnsight(
    model: Any, clean: Sequence[int], corrupted: Sequence[int], result: Any, direction: Direction
) -> tuple[torch.Tensor, torch.Tensor]:
    """Effects ``(n_target, n_layers + 1, n_groups)`` and gains ``(n_target,)``."""
    from nnsight import NNsight

    wrapped = NNsight(model)
    layers = wrapped.model.layers
    full, without = torch.tensor([clean]), torch.tensor([corrupted])

    def log_probs(logits: torch.Tensor) -> torch.Tensor:
        found = logits[0].log_softmax(-1)[result.said_at]
        return found.gather(1, result.target[:, None])[:, 0]

    def streams(ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        # nnsight runs the block by itself: only plain names come out of it.
        with wrapped.trace(input_ids=ids, use_cache=False):
            first = layers[0].input.save()
            second = layers[0].output.save()
            third = layers[1].output.save()
            logits = wrapped.lm_head.output.save()
        saved = [own[0] if isinstance(own, tuple) else own for own in (first, second, third)]
        return saved, log_probs(logits)

    (kept, best), (lost, worst) = streams(full), streams(without)
    taken, given = (kept, without) if direction == "denoise" else (lost, full)
    base = worst if direction == "denoise" else best
    effects = torch.zeros_like(result.effects)
    for layer in range(len(taken)):
        for group, places in enumerate(result.places):
            at, new = list(places), taken[layer]
            with wrapped.trace(input_ids=given, use_cache=False):
                if layer == 0:
                    layers[0].input[:, at, :] = new[:, at, :]
                else:
                    layers[layer - 1].output[:, at, :] = new[:, at, :]
                logits = wrapped.lm_head.output.save()
            change = log_probs(logits) - base
            effects[:, layer, group] = change if direction == "denoise" else -change
    return effects, best - worst


@torch.no_grad()
def main() -> None:
    """Prints one line per direction and grouping."""
    tokenizer = tiny.byte_level()
    model = architectures.build("llama", dtype=torch.float64)
    inp = TextSegmentInput(
        PROMPT, tokenizer, "word", baselines=lambda slot, generator: [OTHER] * len(slot.ids)
    )
    for direction in get_args(Direction):
        for places in ("token", "feature"):
            result = ActivationPatching(model).trace(
                inp, TARGET, feature=FEATURE, direction=direction, places=places
            )
            clean = [*inp.ids, *result.target.tolist()[:-1]]
            corrupted = [OTHER if i in result.replaced else own for i, own in enumerate(clean)]
            effects, gain = by_nnsight(model, clean, corrupted, result, direction)
            off = float((effects - result.effects).abs().max())
            print(
                f"{direction}, by {places}: effects differ by {off:.1e} of "
                f"{float(effects.abs().max()):.2f}, gains by "
                f"{float((gain - result.gain).abs().max()):.1e}"
            )


if __name__ == "__main__":
    main()
