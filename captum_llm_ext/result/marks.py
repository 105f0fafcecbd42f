"""Which attributions differ significantly from zero, corrected for multiple testing."""

import torch
from torch import Tensor

_FALSE_DISCOVERIES = 0.05  # the usual false discovery rate


def marked_beyond(values: Tensor, errors: Tensor) -> float:
    """Number of standard errors beyond which a value differs significantly from zero.

    Of a thousand true zeros, fifty exceed 1.96 standard errors. This threshold keeps the expected
    share of true zeros among all values beyond it below 5 % (Benjamini and Hochberg 1995, section
    3.1, with normal tails).

    Args:
        values, errors: Of the same shape. Values whose error is 0 or NaN are not tested.

    Returns:
        At least 1.96, the threshold for a single value.
    """
    tested = (errors > 0) & values.isfinite()
    sizes = (values[tested].abs().double() / errors[tested].double()).cpu()
    n = max(len(sizes), 1)
    ranks = torch.arange(1, len(sizes) + 1, dtype=torch.float64, device="cpu")
    tails = torch.special.erfc(sizes.sort(descending=True).values / 2**0.5)
    kept = (tails <= _FALSE_DISCOVERIES * ranks / n).nonzero()
    count = 1 + int(kept.max()) if len(kept) else 1
    tail = torch.tensor(1 - _FALSE_DISCOVERIES * count / n / 2, dtype=torch.float64, device="cpu")
    return float(torch.special.ndtri(tail))
