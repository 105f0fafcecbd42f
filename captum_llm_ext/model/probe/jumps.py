"""Whether a model's output is continuous in its internal numbers, or jumps.

With activations rounded to few bits, signs, or an argmax, a last digit decides on which side a
number falls, and other batches have other last digits. This is so rare that passes which agree
prove little. But if all internal numbers are perturbed at random (Monte Carlo arithmetic, see
`rounded_otherwise`), the output of a smooth model changes ten times as much for ten times the
perturbation, and that of a jumping one does not.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from captum_llm_ext.model.forward.rounding import LogProbDifference, rounded_otherwise
from captum_llm_ext.model.probe.differences import FINE

# Relative perturbations. In float32, the larger one changed log-probabilities 9.95 to 10.33 times
# as much as the smaller one in 180 small models of 30 kinds, 9.98 to 10.02 times in SmolLM2 and
# Gemma 3; with activations rounded to 4, 8 or 16 bits less than 5 times, or more than 20.
_MOVES = (1e-4, 1e-3)
_LINEAR = (9.0, 11.0)  # between these ratios values follow: see the measured ones above
# The perturbation at which values jump is searched from two last digits of float32 on.
_LEAST = 2 * torch.finfo(torch.float32).eps


def jumps_at(model: nn.Module, run: Callable[[], Tensor], plain: Tensor) -> float:
    """The relative perturbation of internal numbers at which a model's values jump.

    Args:
        model: The model.
        run: Returns its logits of some ids, ``(…, vocabulary)``.
        plain: The unperturbed logits.

    Returns:
        The smallest such perturbation, among powers of ten times two last digits; 0 if values are
        continuous.
    """

    def moved(much: float) -> LogProbDifference:
        with rounded_otherwise(model, singles=much):
            return LogProbDifference.between(run(), plain)

    small, large = (moved(much).usual for much in _MOVES)
    if not large or _LINEAR[0] <= large / max(small, 1e-30) <= _LINEAR[1]:
        return 0.0
    much = _LEAST
    while much < _MOVES[1] and moved(much).most <= FINE:
        much *= 10
    return much
