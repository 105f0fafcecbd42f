"""`LayerSaliency`: how much a value would move if a token's embedding did."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from captum.attr._utils.attribution import GradientAttribution, LayerAttribution
from torch import Tensor, nn

from captum_llm_ext.methods.at_a_layer import activation_and_output

Norm = Literal["l2", "l1"]


class LayerSaliency(LayerAttribution, GradientAttribution):
    """The norm of a value's gradient with respect to each token's activation.

    ``‖∂v/∂x_j‖`` (Simonyan et al. 2014, arXiv 1312.6034): a size without a sign, which sums to
    nothing. A feature of several tokens has their mean. Captum's `Saliency` is for inputs that are
    numbers, this for a layer, such as the embedding of token ids.

    Args:
        forward_func: The model, or any forward that captum's methods take.
        layer: A module whose activations are ``(batch, length, size)``. None: the embedding.
        norm: ``"l2"``, which does not depend on the basis of the embedding space, or ``"l1"``.

    Raises:
        ValueError: If the norm is unknown.
    """

    def __init__(
        self, forward_func: Callable[..., Any], layer: nn.Module | None = None, norm: Norm = "l2"
    ) -> None:
        LayerAttribution.__init__(self, forward_func, layer)  # pyright: ignore[reportArgumentType]
        if norm not in get_args(Norm):
            raise ValueError(f"`norm` is {norm!r}: give 'l2' or 'l1'.")
        self.norm: Norm = norm

    @property
    def multiplies_by_inputs(self) -> bool:
        """Captum's: it does not."""
        return False

    def attribute(  # captum's arguments in captum's order  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor:
        """Saliency of plain tensors.

        Args:
            inputs: Token ids ``(batch, length)``, or what else the forward takes; the batch first.
            target: Which output, as in captum: for logits ``(batch, length, vocabulary)`` a pair
                ``(place, token)``.
            additional_forward_args: Passed to the forward.
            attribute_to_layer_input: Whether the layer's input is meant, not its output.

        Returns:
            One number per token, of the shape of the layer's activations without their size.

        Raises:
            ValueError: If there is no layer, or it does not suit.
        """
        activation, output = activation_and_output(
            self.forward_func,
            self.layer,
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
        )
        (slope,) = torch.autograd.grad(output.sum(), activation)
        return slope.abs().sum(-1) if self.norm == "l1" else slope.square().sum(-1).sqrt()
