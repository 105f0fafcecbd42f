"""The layer that makes logits, and memory for it to write them to.

Logits are by far the largest tensors of a pass. On a CPU the memory of one that is made anew is
mapped page by page while it is written, which costs a quarter of the product itself.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat


class Head:
    """Lets the last layer of a model write into the same memory in every pass.

    Args:
        model: Its last layer is left as found. Where that is not a plain linear one on a CPU,
            nothing changes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layer = _compat.output_layer(model)
        self._memory = torch.empty(0)

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Logits of the one pass within are good until the next one."""
        layer = self._layer
        if layer is None or torch.is_grad_enabled() or "forward" in vars(layer):
            yield
            return

        def forward(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            n = len(flat) * layer.out_features
            if self._memory.numel() < n or self._memory.dtype != x.dtype:
                self._memory = torch.empty(0)  # not both at a time
                self._memory = x.new_empty(n)
            out = self._memory[:n].view(len(flat), layer.out_features)
            if layer.bias is None:
                torch.mm(flat, layer.weight.t(), out=out)
            else:
                torch.addmm(layer.bias, flat, layer.weight.t(), out=out)
            return out.view(*x.shape[:-1], layer.out_features)

        layer.forward = forward
        try:
            yield
        finally:
            del layer.forward
