"""Arguments and outputs of a model's forward."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_llm_ext._compat.causal import ADVICE
from captum_llm_ext._compat.layers import embeddings
from captum_llm_ext._compat.model import is_transformers, uncompiled


def kept_logits(model: nn.Module) -> str | None:
    """How the forward computes logits of some positions only (`logits_to_keep`).

    Returns:
        ``"positions"`` (one row of positions per sequence), ``"count"`` (a number of last ones), or
        None (always all logits).
    """
    if "logits_to_keep" not in forward_arguments(model):
        return None
    if not is_transformers(model):
        return "count"
    # transformers 5.19 (2026-07): `slice_logits_to_keep` and with it 2-D `logits_to_keep`. Before,
    # a 2-D tensor indexes wrongly without an error. Drop when the lower bound passes it.
    from transformers import modeling_utils

    return "positions" if hasattr(modeling_utils, "slice_logits_to_keep") else "count"


def input_device(model: nn.Module) -> torch.device:
    """The device of the token ids."""
    embedding = embeddings(model, "get_input_embeddings")
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        # accelerate 1.x: weights may be on "meta" (offloaded) while inputs go to the hook's device.
        return torch.device(device)
    device = getattr(model, "device", None)
    if isinstance(device, torch.device) and device.type != "meta":
        return device
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """Names of the forward's explicit arguments."""
    return frozenset(_signature(model))


def uncached(model: nn.Module) -> dict[str, Any]:
    """Arguments that disable the model's cache."""
    return {"use_cache": False} if "use_cache" in forward_arguments(model) else {}


def keeping_logits(kept: str | None, at: Tensor, ids: Tensor) -> dict[str, Any]:
    """Arguments with which a forward computes logits of some positions only.

    Args:
        kept: As returned by `kept_logits`.
        at: The positions, ``(batch, n)``. With ``"count"``, logits of all positions from the first
            one on are returned.
        ids: Its token ids ``(batch, length)``.
    """
    if kept == "positions":
        return {"logits_to_keep": at.to(ids.device)}
    return {"logits_to_keep": ids.shape[1] - int(at.min())} if kept == "count" else {}


def _signature(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    inner = uncompiled(model)
    inner = inner.module if isinstance(inner, nn.DataParallel) else inner
    return inspect.signature(inner.forward).parameters


def called(model: nn.Module, ids: Tensor, **arguments: Any) -> Any:
    """The model's output for ids ``(batch, length)``, whatever its first argument is named."""
    parameters = _signature(model)
    kinds = {parameter.kind for parameter in parameters.values()}
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if "input_ids" not in parameters and kinds & {*positional}:
        return model(ids, **arguments)
    return model(input_ids=ids, **arguments)


def sequence_logits(output: Any) -> Tensor:
    """The logits ``(batch, length, vocabulary)`` in a model's output.

    These are its ``logits``, the output itself if it is a tensor, or the first of a tuple.

    Raises:
        TypeError: If the output contains no such tensor.
    """
    logits = output
    if not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
        if logits is None and isinstance(output, dict):
            logits = cast(dict[str, Any], output).get("logits")
        elif logits is None and isinstance(output, tuple | list):
            logits = next(iter(cast("tuple[Any, ...]", output)), None)
    if isinstance(logits, Tensor) and logits.dim() == 4:
        # captum 0.9 (2026): some Llama 4 checkpoints return (1, 1, length, vocabulary).
        logits = logits[:, 0]
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise TypeError(
            f"the model returned {type(output).__name__}{shape} without `logits` of shape (batch, "
            f"length, vocabulary): {ADVICE}"
        )
    return logits
