"""`LayerMethod`: captum methods over one layer's activations, and their forward pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from captum.attr._utils.attribution import GradientAttribution, LayerAttribution
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import in_this_thread_only


class LayerMethod(LayerAttribution, GradientAttribution, ABC):
    """One number per token, from the gradient at a layer's activations.

    Args:
        forward_func: The model, or any forward function that captum's methods accept.
        layer: A module whose activations have shape ``(batch, length, size)``. None: the embedding.
    """

    def __init__(self, forward_func: Callable[..., Any], layer: nn.Module | None = None) -> None:
        # None means the embedding, which captum's annotation does not allow.
        super().__init__(forward_func, layer)  # pyright: ignore[reportArgumentType]

    def attribute(  # captum's arguments in captum's order  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor:
        """Attributions of the tokens of plain tensors.

        Args:
            inputs: Token ids ``(batch, length)``, or other inputs of the forward function, batch
                first.
            target: The output to explain, as in captum: for logits ``(batch, length, vocabulary)``
                a pair ``(position, token)``.
            additional_forward_args: Passed to the forward function.
            attribute_to_layer_input: Whether to attribute to the layer's input instead of its
                output.

        Returns:
            One attribution per token: the shape of the layer's activations without the last
            dimension.

        Raises:
            ValueError: If there is no layer, it is unsuitable, or attributions that should sum to
                the output do not.
        """

        def forward() -> tuple[Tensor, Tensor]:
            return _activation_and_output(
                self.forward_func,
                self.layer,
                _tuple(inputs),
                target,
                _tuple(additional_forward_args),
                attribute_to_layer_input,
            )

        return self._attributions(forward, _tuple(inputs)[0].device)

    @abstractmethod
    def _attributions(
        self, forward: Callable[[], tuple[Tensor, Tensor]], device: torch.device
    ) -> Tensor:
        """Attributions ``(batch, length)``.

        Args:
            forward: Runs the model; returns the layer's activation and the outputs selected by the
                target.
            device: The inputs' device.
        """


def _activation_and_output(
    forward_func: Callable[..., Any],
    layer: nn.Module | None,
    given: tuple[Any, ...],
    target: Any,
    arguments: tuple[Any, ...],
    of_input: bool,
) -> tuple[Tensor, Tensor]:
    """A layer's activation and the selected outputs, with the graph between them.

    Without a layer: the embedding's activation, or the input if it is floating point.

    Raises:
        ValueError: If there is no layer, it is not called, or its activation has no gradients.
    """
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
        # Models may modify it in place, which a leaf does not allow.
        new = found[0] * 1
        return (new, *parts[1:]) if isinstance(activation, tuple) else new

    if layer is None and given[0].is_floating_point():
        found.append(given[0].detach().requires_grad_())
        given, context = (found[0] * 1, *given[1:]), nullcontext()
    else:
        layer = layer or _compat.embeddings(cast(nn.Module, forward_func), "get_input_embeddings")
        if layer is None:
            raise ValueError(
                "no layer was given, and the model does not expose which one embeds token ids: "
                "give the module to attribute to."
            )
        context = _hooked(layer, leaf, of_input)
    with torch.enable_grad(), context:
        output: Any = forward_func(*given, *arguments)
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
