"""Whether what a model says follows the numbers within it, or jumps where they hardly move.

Activations that are rounded to few bits, signs, what is the largest of many: a last digit decides
to which side a number falls, and another batch has other last digits. That happens so seldom that
passes which agree show little. But where all numbers within are moved at random (Monte Carlo
arithmetic, as `rounded_otherwise` does), a model that is smooth moves ten times as far for ten
times as large a change, and one that jumps does not.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from captum_llm_ext.model.forward.rounding import Apart, rounded_otherwise
from captum_llm_ext.model.probe.differences import FINE

# Numbers are moved by so much of themselves. In float32, the larger change moved log-probabilities
# 9.95 to 10.33 times as far as the smaller one in 180 small models of 30 kinds, 9.98 to 10.02 times
# in SmolLM2 and Gemma 3; where activations are rounded to 4, 8 or 16 bits less than 5 times, or
# more than 20.
_MOVES = (1e-4, 1e-3)
_LINEAR = (9.0, 11.0)
# The change that makes values jump is looked for from two last digits of float32 on.
_LEAST = 2 * torch.finfo(torch.float32).eps


def jumps_at(model: nn.Module, run: Callable[[], Tensor], plain: Tensor) -> float:
    """By how much of themselves numbers within a model are moved until its values jump.

    Args:
        model: The model.
        run: Gives its logits of some ids, ``(…, vocabulary)``.
        plain: The logits that it gave.

    Returns:
        The smallest such change, of powers of ten of two last digits; 0 where values only follow.
    """

    def moved(much: float) -> Apart:
        with rounded_otherwise(model, singles=much):
            return Apart.between(run(), plain)

    small, large = (moved(much).usual for much in _MOVES)
    if not large or _LINEAR[0] <= large / max(small, 1e-30) <= _LINEAR[1]:
        return 0.0
    much = _LEAST
    while much < _MOVES[1] and moved(much).most <= FINE:
        much *= 10
    return much
