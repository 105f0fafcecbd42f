"""One pass of a model, with what a layer gave in it as the beginning of all gradients."""

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import in_this_thread_only


def activation_and_output(
    forward_func: Callable[..., Any],
    layer: nn.Module | None,
    inputs: Any,
    target: Any,
    additional_forward_args: Any,
    attribute_to_layer_input: bool,
) -> tuple[Tensor, Tensor]:
    """What a layer gives, and the outputs that a target names, with a graph from one to the other.

    Args:
        forward_func: Gives a tensor, or something whose ``logits`` are one.
        layer: A module of it. None: its embedding of token ids, or the input where that is made of
            numbers that have gradients.
        inputs: A tensor or a tuple of them, the batch first.
        target: Which output, as in captum.
        additional_forward_args: Passed to the forward.
        attribute_to_layer_input: Whether the layer's input is meant.

    Raises:
        ValueError: If there is no layer, it does not run, or gives no tensor of numbers.
    """
    given = _tuple(inputs)
    found: list[Tensor] = []

    def leaf(activation: Any) -> Any:
        parts = (
            cast(tuple[Any, ...], activation) if isinstance(activation, tuple) else (activation,)
        )
        if found:
            raise ValueError(f"layer {type(layer).__name__} runs more than once in one pass.")
        if not isinstance(parts[0], Tensor) or not parts[0].is_floating_point():
            raise ValueError(
                f"layer {type(layer).__name__} gives no numbers that have gradients: give the "
                "embedding, or a layer further up."
            )
        found.append(parts[0].detach().requires_grad_())
        # Models may write into it, which no leaf allows.
        new = found[0] * 1
        return (new, *parts[1:]) if isinstance(activation, tuple) else new

    if layer is None and given[0].is_floating_point():
        found.append(given[0].detach().requires_grad_())
        given, context = (found[0] * 1, *given[1:]), nullcontext()
    else:
        layer = layer or _compat.embeddings(cast(nn.Module, forward_func), "get_input_embeddings")
        if layer is None:
            raise ValueError(
                "no layer was given, and the model does not tell which one embeds token ids: give "
                "the module whose activations are meant."
            )
        context = _hooked(layer, leaf, attribute_to_layer_input)
    with torch.enable_grad(), context:
        output: Any = forward_func(*given, *_tuple(additional_forward_args))
        output = getattr(output, "logits", output)
    if not found:
        raise ValueError(f"layer {type(layer).__name__} does not run in the model's forward.")
    return found[0], _compat.selected(output, target)


@contextmanager
def _hooked(layer: nn.Module, function: Callable[[Any], Any], of_input: bool) -> Generator[None]:
    def before(_: nn.Module, arguments: tuple[Any, ...]) -> Any:
        return (function(arguments[0]), *arguments[1:])

    def after(_: nn.Module, arguments: Any, output: Any) -> Any:
        return function(output)

    if of_input:
        hook = layer.register_forward_pre_hook(in_this_thread_only(before))
    else:
        hook = layer.register_forward_hook(in_this_thread_only(after))
    try:
        yield
    finally:
        hook.remove()


def _tuple(given: Any) -> tuple[Any, ...]:
    return () if given is None else given if isinstance(given, tuple) else (given,)
