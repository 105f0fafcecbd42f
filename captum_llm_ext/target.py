"""The target: text or ids that are given, or what the model writes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext import _compat
from captum_llm_ext.inputs import RenderedPrompt
from captum_llm_ext.scoring import Scorer, TokenRow

_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
_NEW_TOKENS = {"max_new_tokens": 25}  # captum's


def target_ids(
    scorer: Scorer,
    tokenizer: Any,
    prompt: RenderedPrompt,
    target: str | Tensor | Sequence[int] | None,
    gen_args: Mapping[str, Any] | None,
    seed: int,
) -> Tensor:
    """The token ids to explain, shape ``(n_target,)``.

    Args:
        scorer: Of the model.
        tokenizer: The model's tokenizer.
        prompt: With every feature present.
        target: Text, which is encoded without special tokens, as in captum; ids ``(n_target,)``; or
            None: the model generates it.
        gen_args: Arguments of the model's ``generate``, without a target only.
        seed: Seeds sampling.

    Raises:
        ValueError: If there is nothing to explain, an id is outside the vocabulary, prompt and
            target are longer than the model's positions, or `gen_args` would be ignored.
        TypeError: If `target` is of another kind.
    """
    if target is None:
        ids = _generated(scorer, prompt, gen_args, seed)
    elif gen_args is not None:
        raise ValueError("`gen_args` would be ignored: with a `target` nothing is generated.")
    else:
        ids = as_ids(target, tokenizer)
    if len(ids) == 0:
        raise ValueError("the target is empty: give at least one token to explain.")
    size = _compat.vocabulary_size(scorer.model)
    wrong = [i for i in ids.tolist() if i < 0 or (size is not None and i >= size)]
    if wrong:
        raise ValueError(
            f"target token id {wrong[0]} is outside the model's vocabulary of {size} tokens: "
            "check that tokenizer and model belong together."
        )
    scorer.check_length(len(prompt.ids) + len(ids) - 1, "prompt and target")
    return ids


def as_ids(target: object, tokenizer: Any) -> Tensor:
    """The target's token ids; text is encoded without special tokens, as in captum.

    Raises:
        TypeError: If it is neither a text nor one row of ids.
    """
    if isinstance(target, str):
        ids = tokenizer.encode(target, add_special_tokens=False)
        return torch.tensor(ids, dtype=torch.long)
    if not isinstance(target, Tensor | Sequence):
        raise TypeError(
            f"`target` is a {type(target).__name__}: give a text, token ids (n_target,), or None "
            "to have the model generate."
        )
    ids = torch.as_tensor(target).detach().cpu()
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        if ids.numel():
            raise TypeError(
                f"`target` has shape {tuple(ids.shape)} and type {ids.dtype}: give token ids of "
                "shape (n_target,)."
            )
        ids = ids.reshape(-1)
    return ids.long()


def _generated(
    scorer: Scorer, prompt: RenderedPrompt, gen_args: Mapping[str, Any] | None, seed: int
) -> Tensor:
    if not callable(getattr(scorer.model, "generate", None)):
        raise ValueError(
            f"{type(scorer.model).__name__} has no `generate`: give the `target` to explain."
        )
    given = dict(gen_args or {})
    arguments = given if given.get("do_sample") else _GREEDY | given
    if not {"max_new_tokens", "max_length"} & set(given):
        arguments = arguments | _NEW_TOKENS
    n_new = arguments.get("max_new_tokens") or 1
    scorer.check_length(
        len(prompt.ids) + n_new - 1, f"the prompt and {n_new} new tokens (`max_new_tokens`)"
    )
    return scorer.generate(TokenRow(prompt.ids, (), prompt.extras), arguments, seed)
