"""Every line that depends on a version of captum or transformers."""

import inspect
from importlib import metadata
from typing import Any, cast

import torch
from captum.attr import Lime
from torch import Tensor, nn


def kept_logits(model: nn.Module) -> str | None:
    """How the model's forward can be asked for the logits of some positions only.

    Returns:
        ``"positions"`` (one row of positions per sequence), ``"count"`` (the last so many), or
        None (all logits always).
    """
    if "logits_to_keep" not in forward_arguments(model):
        return None
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not type(inner).__module__.startswith("transformers."):
        return "count"
    # transformers 5.19 (2026-07): `slice_logits_to_keep` and with it 2-D `logits_to_keep`. Before,
    # a 2-D tensor indexes wrongly without an error. Drop when the lower bound passes it.
    from transformers import modeling_utils

    return "positions" if hasattr(modeling_utils, "slice_logits_to_keep") else "count"


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """Names that the model's forward takes explicitly."""
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    return frozenset(inspect.signature(inner.forward).parameters)


def sequence_logits(output: Any) -> Tensor:
    """The logits ``(batch, length, vocabulary)`` of a model's output.

    Raises:
        TypeError: If the output holds no such tensor.
    """
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.dim() == 4:
        # captum 0.9 (2026): some Llama 4 checkpoints return (1, 1, length, vocabulary).
        logits = logits[:, 0]
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise TypeError(
            f"the model returned {type(output).__name__} without `logits` of shape (batch, length, "
            "vocabulary): give a causal language model, such as one from `AutoModelForCausalLM`."
        )
    return logits


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's language part, or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary_size(model: nn.Module) -> int | None:
    """Number of token ids the model knows, or None where it does not tell."""
    size = getattr(text_config(model), "vocab_size", None)
    return size if isinstance(size, int) else None


def longest_sequence(model: nn.Module) -> int | None:
    """Number of positions the model was made for, or None where there is no limit."""
    config = text_config(model)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def check_causal(model: Any) -> None:
    """Refuses what is no causal language model.

    Raises:
        TypeError: If `model` is no module, is an encoder-decoder, or has no language head.
    """
    advice = "give a causal language model, such as one from `AutoModelForCausalLM`."
    if not isinstance(model, nn.Module):
        raise TypeError(
            "the attribution method was made over a "
            f"{type(model).__name__}, which is no `torch.nn.Module`: {advice}"
        )
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{type(model).__name__} is an encoder-decoder model, which is not supported: {advice}"
        )
    can_generate = getattr(model, "can_generate", None)
    if callable(can_generate) and not can_generate():
        raise TypeError(f"{type(model).__name__} generates no text: {advice}")


def input_device(model: nn.Module) -> torch.device:
    """Where the model wants its token ids."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        # accelerate 1.x: weights may be on "meta" (offloaded) while inputs go to the hook's device.
        return torch.device(device)
    device = getattr(model, "device", None)
    if isinstance(device, torch.device) and device.type != "meta":
        return device
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def end_token_ids(model: nn.Module) -> Any:
    """The model's end-of-text ids as its generation configuration has them, or None."""
    return getattr(getattr(model, "generation_config", None), "eos_token_id", None)


def padding_for_generate(model: nn.Module) -> dict[str, Any]:
    """What keeps ``generate`` from warning about a missing pad token."""
    config = getattr(model, "generation_config", None)
    if config is None or getattr(config, "pad_token_id", None) is not None:
        return {}
    end = end_token_ids(model)
    first = cast(Any, end[0] if isinstance(end, list) and end else end)
    return {} if first is None or isinstance(first, list) else {"pad_token_id": int(first)}


def lime_settings(method: Lime) -> dict[str, Any] | None:
    """Penalty, its weight and the kernel's width of a `Lime`, or None if it is no standard one.

    captum 0.9 (2026) keeps them in the construction arguments of its scikit-learn wrappers and in
    the closure of its kernel; none of scikit-learn is needed to read them.
    """
    standard = Lime(method.forward_func)
    penalties = {"SkLearnLasso": "l1", "SkLearnRidge": "l2", "SkLearnLinearRegression": None}
    model: Any = method.interpretable_model
    arguments = dict(getattr(model, "construct_kwargs", {}))
    alpha = arguments.pop("alpha", 1.0)
    name = type(model).__name__
    kernel: Any = method.similarity_func
    if (
        name not in penalties
        or arguments
        or getattr(kernel, "__qualname__", "") != standard.similarity_func.__qualname__
        or method.perturb_func is not standard.perturb_func
    ):
        return None
    settings = inspect.getclosurevars(kernel).nonlocals
    if settings.get("distance_mode") != "cosine":
        return None
    width = float(settings["kernel_width"])
    return {"penalty": penalties[name], "alpha": float(alpha), "kernel_width": width}


def versions() -> dict[str, str | None]:
    """Versions of the packages that numbers depend on; None for one that is run uninstalled."""
    found: dict[str, str | None] = {}
    for name in ("captum-llm-ext", "captum", "torch", "transformers", "accelerate"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
