"""The target: text or ids that are given, or what the model writes."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext import encoding, tokens
from captum_llm_ext.content import level_of_caller
from captum_llm_ext.inputs import RenderedPrompt
from captum_llm_ext.scoring import Scorer, TokenRow, Values

# Ids or tokens, several or one.
Skipped = Tensor | Sequence[int] | Sequence[str] | int

_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
_NEW_TOKENS = {"max_new_tokens": 25}  # captum's


def target_ids(
    target: str | Tensor | Sequence[int] | None,
    tokenizer: Any,
    gen_args: Mapping[str, Any] | None,
    generate: Callable[[], Tensor],
) -> Tensor:
    """The token ids to explain, int64 ``(n_target,)``.

    Args:
        target: Text, which is encoded without special tokens, as in captum; ids ``(n_target,)``; or
            None: the model generates it.
        tokenizer: The model's tokenizer.
        gen_args: What the model generates with, without a target only.
        generate: Has it do so.

    Raises:
        ValueError: If `gen_args` would be ignored.
        TypeError: If `target` is of another kind.
    """
    if target is None:
        return generate()
    if gen_args is not None:
        raise ValueError("`gen_args` would be ignored: with a `target` nothing is generated.")
    return as_ids(target, tokenizer)


def check_target(
    ids: Tensor, prompt: RenderedPrompt, scorer: Values, vocabulary_size: int | None
) -> None:
    """Refuses a target before anything is scored.

    Args:
        ids: Token ids ``(n_target,)``.
        prompt: With every feature present.
        scorer: Of the model.
        vocabulary_size: Of the model; None where it is not known.

    Raises:
        ValueError: If there is nothing to explain, an id is outside the vocabulary, or prompt and
            target are longer than the model's positions.
    """
    if len(ids) == 0:
        raise ValueError("the target is empty: give at least one token to explain.")
    wrong = [i for i in ids.tolist() if i < 0 or i >= (vocabulary_size or sys.maxsize)]
    if wrong:
        raise ValueError(
            f"target token id {wrong[0]} is outside the model's vocabulary of {vocabulary_size} "
            "tokens: check that tokenizer and model belong together."
        )
    scorer.check_length(len(prompt.ids) + len(ids) - 1, "prompt and target")


def without_skipped(ids: Tensor, skip_tokens: Skipped | None, tokenizer: Any) -> Tensor:
    """The target less some tokens, as captum had it up to 0.8.

    Args:
        ids: Token ids ``(n_target,)``.
        skip_tokens: Ids or tokens to leave out; None or empty: none.
        tokenizer: The model's tokenizer.

    Raises:
        ValueError: If a token is none of the vocabulary.

    Warns:
        DeprecationWarning: If there are any.
    """
    if isinstance(skip_tokens, Tensor):
        skip_tokens = skip_tokens.flatten().tolist()
    given: Sequence[Any] = (
        [skip_tokens] if isinstance(skip_tokens, str | int) else skip_tokens or ()
    )
    if not given:
        return ids
    warnings.warn(
        "`skip_tokens` is deprecated, as captum dropped it in 0.9: give the target as ids without "
        "them.",
        DeprecationWarning,
        stacklevel=level_of_caller(),
    )
    skipped = {tokens.token_id(tokenizer, t) if isinstance(t, str) else int(t) for t in given}
    return torch.tensor(
        [i for i in ids.tolist() if i not in skipped], dtype=torch.long, device="cpu"
    )


def as_ids(target: object, tokenizer: Any) -> Tensor:
    """The target's token ids; text is encoded without special tokens, as in captum.

    Raises:
        TypeError: If it is neither a text nor one row of ids.
    """
    if isinstance(target, str):
        ids = encoding.ids(tokenizer, target, add_special_tokens=False)
        return torch.tensor(ids, dtype=torch.long, device="cpu")
    if not isinstance(target, Tensor | Sequence):
        raise TypeError(
            f"`target` is a {type(target).__name__}: give a text, token ids (n_target,), or None "
            "to have the model generate."
        )
    if isinstance(target, Tensor) and target.device.type == "meta":
        raise ValueError(
            '`target` is on the device "meta", where tensors have no numbers: make it on another '
            "(`torch.set_default_device` decides where that does not name one), or give a list."
        )
    ids = torch.as_tensor(target, device="cpu").detach().cpu()
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        if ids.numel():
            raise TypeError(
                f"`target` has shape {tuple(ids.shape)} and type {ids.dtype}: give token ids of "
                "shape (n_target,)."
            )
        ids = ids.reshape(-1)
    return ids.long()


def generate_target(
    scorer: Scorer, prompt: RenderedPrompt, gen_args: Mapping[str, Any] | None, seed: int
) -> Tensor:
    """What a model of this process writes, int64 ``(n_target,)``.

    Args:
        scorer: Of the model.
        prompt: With every feature present.
        gen_args: Arguments of the model's ``generate``; greedy, 25 new tokens, where they do not
            say otherwise.
        seed: Seeds sampling.

    Raises:
        ValueError: If the model does not generate, or it does not fit into its positions.
    """
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
