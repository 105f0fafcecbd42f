"""Which rows may share a batch, and free memory."""

from typing import Any, cast

from torch import nn

from captum_llm_ext._compat.model import text_config


def why_not_batched(model: nn.Module) -> str | None:
    """The reason why rows must not share a batch; None if none is known.

    transformers 5.23 (2026): LLM.int8 searches outliers in all rows of a batch, which a short
    comparison may not contain.
    """
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(settings, dict):
        is_int8 = cast(dict[str, Any], settings).get("load_in_8bit")
    else:
        is_int8 = getattr(settings, "load_in_8bit", False)
    return "LLM.int8 couples the rows of a batch" if is_int8 else None


def fixed_positions(model: nn.Module) -> int | None:
    """The length beyond which rows of unequal length must not share a batch, or None.

    transformers 5.23 (2026): the rope types "dynamic" and "longrope" choose frequencies by the
    longest row of a batch, for all rows.
    """
    config = text_config(model)
    rope: Any = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    most = getattr(config, "max_position_embeddings", None)
    limits = [
        cast(dict[str, Any], part).get("original_max_position_embeddings") or most
        for part in parts
        if cast(dict[str, Any], part).get("rope_type") in ("dynamic", "longrope")
    ]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def used_memory() -> int | None:
    """Bytes of main memory used by this process; None if unknown."""
    try:
        import psutil  # a dependency of accelerate 1.x
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def free_memory() -> int | None:
    """Free bytes of main memory; None if unknown."""
    try:
        import psutil  # a dependency of accelerate 1.x
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)
