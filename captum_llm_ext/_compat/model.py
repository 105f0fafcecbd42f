"""Class, wrappers and configuration of a model."""

import inspect
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """The model without the wrapper of torch.compile.

    torch 2.13 (2026): compiled code ignores hooks added later.
    """
    return getattr(model, "_orig_mod", model)


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it is compiled."""
    if uncompiled(model) is not model:
        return True
    modules = model.modules()
    return any(hasattr(m, "_orig_mod") or vars(m).get("_compiled_call_impl") for m in modules)


_lock = threading.Lock()
# torch's previous stance, and the number of passes in which nothing is compiled.
_eager: list[Any] = []
_n_eager = 0


@contextmanager
def uncompiled_passes(model: nn.Module) -> Generator[None]:
    """Runs a compiled model's original code meanwhile, also in passes of other threads.

    torch 2.13 (2026): the stance is global to all threads.
    """
    global _n_eager
    if not is_compiled(model):
        yield
        return
    with _lock:
        if not _n_eager:
            _eager.append(torch.compiler.set_stance("force_eager"))
        _n_eager += 1
    try:
        yield
    finally:
        with _lock:
            _n_eager -= 1
            if not _n_eager:
                _eager.pop().__exit__(None, None, None)


def runs_past_modes(model: nn.Module) -> bool:
    """Whether torch runs some of the model where no torch dispatch mode sees it.

    torch 2.13 (2026): under a mode, flex attention is not compiled, materialises all scores, and
    warns.
    """
    config: Any = getattr(model, "config", None)
    return is_compiled(model) or getattr(config, "_attn_implementation", "") == "flex_attention"


def is_transformers(model: nn.Module) -> bool:
    """Whether the model's forward is one of transformers."""
    # Traced or scripted models have no module's forward, or a class without one.
    forward = inspect.getattr_static(type(uncompiled(model)), "forward", None)
    return (getattr(forward, "__module__", None) or "").startswith("transformers.")


def is_transformers_object(thing: object) -> bool:
    """Whether something is of a class of transformers."""
    return type(thing).__module__.startswith("transformers.")


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's language part, or None."""
    config: Any = getattr(model, "config", None)
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # transformers 5.23 (2026): several candidates
        return config


def number_of_layers(model: nn.Module) -> int | None:
    """Number of layers by the model's configuration."""
    return getattr(text_config(model), "num_hidden_layers", None)


def vocabulary_size(model: nn.Module) -> int | None:
    """Vocabulary size of the model; None if unknown."""
    size = getattr(text_config(model), "vocab_size", None)
    return size if isinstance(size, int) else None


def longest_sequence(model: nn.Module) -> int | None:
    """Maximum number of positions of the model; None if unlimited."""
    config = text_config(model)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None
