"""Numerical precision of a model."""

import torch
from torch import Tensor, nn


def computes_roughly(model: nn.Module) -> bool:
    """Whether any part of a model is less precise than float32, so that rounding is measured."""
    fine = (torch.float32, torch.float64)
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    tensors = (*model.parameters(), *model.buffers())
    coarse = any(t.is_floating_point() and t.dtype not in fine for t in tensors)
    # torch 2.13 (2026): quantised modules keep packed weights that are neither parameters nor
    # buffers.
    packed = any("quantized" in type(module).__module__ for module in model.modules())
    # Other tensor classes may only look like float32; those of sharded tensors are.
    kinds = (type(t.data) for t in tensors if not hasattr(t, "placements"))
    return coarse or packed or settings is not None or any(kind is not Tensor for kind in kinds)


def half_precision(model: nn.Module) -> bool:
    """Whether a model has parameters of 16 bits."""
    half = (torch.bfloat16, torch.float16)
    return any(t.dtype in half for t in (*model.parameters(), *model.buffers()))
