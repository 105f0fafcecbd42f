"""Numerical precision of a model."""

import torch
from torch import Tensor, nn


def computes_roughly(model: nn.Module) -> bool:
    """Whether any part of a model is coarser than float32, so that its rounding is measured."""
    fine = (torch.float32, torch.float64)
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    tensors = (*model.parameters(), *model.buffers())
    coarse = any(t.is_floating_point() and t.dtype not in fine for t in tensors)
    # torch 2.13 (2026): what is quantised keeps its weights packed, neither parameters nor buffers.
    packed = any("quantized" in type(module).__module__ for module in model.modules())
    # Others look like float32 and are not; what is only held by several processes is.
    kinds = (type(t.data) for t in tensors if not hasattr(t, "placements"))
    return coarse or packed or settings is not None or any(kind is not Tensor for kind in kinds)


def half_precision(model: nn.Module) -> bool:
    """Whether a model has parameters of 16 bits."""
    half = (torch.bfloat16, torch.float16)
    return any(t.dtype in half for t in (*model.parameters(), *model.buffers()))
