"""Generation settings of models."""

from typing import Any, cast

from torch import nn

from captum_llm_ext._compat.model import is_compiled
from captum_llm_ext._compat.processes import model_ranks


def is_generation_config(thing: object) -> bool:
    """Whether something is a `transformers.GenerationConfig`."""
    return any(base.__name__ == "GenerationConfig" for base in type(thing).__mro__)


def generation_settings(config: Any) -> dict[str, Any]:
    """The given settings of a generation configuration, without None.

    transformers 5.0 (2025): fields that were not given are None. Before, they had defaults.
    """
    if config is None:
        return {}
    hidden = ("transformers_version",)
    items = config.to_dict().items()
    return {k: v for k, v in items if v is not None and not k.startswith("_") and k not in hidden}


def defaults_for_sampling() -> dict[str, Any]:
    """Values of sampling settings if nothing is given.

    transformers 5.23 (2026) has no public name for them.
    """
    from transformers import GenerationConfig

    defaults: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    return {k: v for k, v in defaults.items() if k in ("temperature", "top_k", "top_p")}


def arguments_for_generate(model: nn.Module) -> dict[str, Any]:
    """Arguments that keep ``generate`` from warnings, and from waiting for other processes."""
    arguments = _padding_for_generate(model)
    if model_ranks(model):
        # transformers 5.23 (2026) synchronises with all processes if copies of a model are sharded.
        # Those of one copy draw the same, and end together.
        arguments["synced_gpus"] = False
    return arguments


def generates_by_row(model: nn.Module) -> bool:
    """Whether ``generate`` is transformers' own, which pads rows of a batch that end early."""
    own = getattr(type(model), "generate", None)
    return getattr(own, "__module__", "").startswith("transformers.") and not is_compiled(model)


def _padding_for_generate(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "generation_config", None)
    if config is None or getattr(config, "pad_token_id", None) is not None:
        return {}
    end = getattr(config, "eos_token_id", None)
    first = cast(Any, end[0] if isinstance(end, list) and end else end)
    return {} if first is None or isinstance(first, list) else {"pad_token_id": int(first)}


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The end tokens of a model, from it or its tokenizer."""
    for owner in (getattr(model, "generation_config", None), tokenizer):
        ends = getattr(owner, "eos_token_id", None)
        if ends is not None:
            return frozenset(ends if isinstance(ends, list | tuple) else [ends])
    return frozenset()
