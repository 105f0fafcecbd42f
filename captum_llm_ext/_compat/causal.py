"""Whether a model is a causal language model, as far as its class shows."""

from typing import Any

from torch import nn

from captum_llm_ext._compat.model import is_transformers_object, uncompiled

ADVICE = "give a causal language model, such as one from `AutoModelForCausalLM`."


def check_causal(model: Any) -> None:
    """Raises if a model is known not to be a causal language model; others are probed when run.

    Raises:
        TypeError: If `model` is not a module, is wrapped for training or without weights, or is an
            encoder-decoder, a masked language model, or one without a language head.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        inner = getattr(model, "model", None)
        advice = f"give its `.model`, a {type(inner).__name__}."
        raise TypeError(
            f"the attribution method was made over a {name}, which is not a `torch.nn.Module`: "
            f"{advice if isinstance(inner, nn.Module) else ADVICE}"
        )
    if name in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise TypeError(
            f"the model is wrapped in {name}, which is made for training: give "
            "`accelerator.unwrap_model(model)`, or the model as it was before `prepare`."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(f"{name} is an encoder-decoder model, which is not supported: {ADVICE}")
    _check_head(model)
    # accelerate 1.x: offloaded weights are on "meta" as well, until its hook loads them.
    is_empty = any(p.device.type == "meta" for p in model.parameters())
    if is_empty and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise TypeError(
            f"weights of {name} are on the `meta` device, where there are no numbers: load them, "
            "with `from_pretrained` or `model.to_empty(...)` and `load_state_dict`."
        )


def _check_head(model: nn.Module) -> None:
    """Raises for models of transformers without a next-token head."""
    inner = uncompiled(model)
    # peft's wrappers, and others with a single module.
    while not is_transformers_object(inner) and len(held := [*inner.children()]) == 1:
        inner = held[0]
    if not is_transformers_object(inner):
        return
    # transformers 5.23 (2026): plain dicts from a model type to names of classes.
    from transformers.models.auto import modeling_auto

    auto: Any = modeling_auto
    causal: Any = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name, kind = type(inner).__name__, getattr(getattr(inner, "config", None), "model_type", None)
    if name in causal.values():
        return
    own = causal.get(kind) or next(
        (f"{stem}ForCausalLM" for stem in [name.removesuffix("Model")] if name != stem), None
    )
    own = own if own in causal.values() else None
    advice = f"load it as `{own}`, which `AutoModelForCausalLM` gives." if own else ADVICE
    if is_masked(inner):
        raise TypeError(
            f"{name} generates no text, it predicts tokens at their own positions, not the next "
            f"token: {advice}"
        )
    bare = {x for names in auto.MODEL_MAPPING_NAMES.values() for x in _tuple(names)}
    if name in bare and name.endswith("Model") and inner is uncompiled(model):
        raise TypeError(f"{name} generates no text, it has no language head: {advice}")


def is_masked(model: nn.Module) -> bool:
    """Whether it is a masked language model of transformers."""
    inner = uncompiled(model)
    if not is_transformers_object(inner):
        return False
    from transformers.models.auto import modeling_auto

    names: Any = modeling_auto
    name = type(inner).__name__
    is_listed = name in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    # Some of those are also listed as causal models, and are so by their configuration.
    return name.endswith("ForMaskedLM") or (
        is_listed and name not in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )


def _tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def language_part(model: nn.Module) -> str | None:
    """The attribute of a model with its text-generating part; None if there is none."""
    parts = (n for n, child in model.named_children() if callable(getattr(child, "generate", None)))
    return next((f"model.{name}" for name in parts), None)
