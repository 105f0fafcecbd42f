"""`LayerSaliency`: the norm of a value's gradient at each token's activation."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from captum_llm_ext.methods.layer_method import LayerMethod

Norm = Literal["l2", "l1"]


class LayerSaliency(LayerMethod):
    """The norm of a value's gradient with respect to each token's activation.

    ``‖∂v/∂x_j‖`` (Simonyan et al. 2014, arXiv 1312.6034): a magnitude without a sign or
    completeness. A feature of several tokens has their mean. Captum's `Saliency` is for numeric
    inputs, this for a layer such as the token embedding.

    Args:
        forward_func: The model, or any forward function that captum's methods accept.
        layer: A module whose activations have shape ``(batch, length, size)``. None: the embedding.
        norm: ``"l2"``, which is independent of the basis of the embedding space, or ``"l1"``.

    Raises:
        ValueError: If the norm is unknown.
    """

    def __init__(
        self, forward_func: Callable[..., Any], layer: nn.Module | None = None, norm: Norm = "l2"
    ) -> None:
        super().__init__(forward_func, layer)
        if norm not in get_args(Norm):
            raise ValueError(f"`norm` is {norm!r}: give 'l2' or 'l1'.")
        self.norm: Norm = norm

    @property
    def multiplies_by_inputs(self) -> bool:
        """As in captum: False."""
        return False

    def _attributions(
        self, forward: Callable[[], tuple[Tensor, Tensor]], device: torch.device
    ) -> Tensor:
        del device
        activation, output = forward()
        (gradient,) = torch.autograd.grad(output.sum(), activation)
        return norm_of(gradient, self.norm)


def norm_of(gradient: Tensor, norm: Norm) -> Tensor:
    """The norm of each token's gradient, ``(batch, length, size)`` to ``(batch, length)``."""
    return gradient.abs().sum(-1) if norm == "l1" else gradient.square().sum(-1).sqrt()
