"""Stopping rules: whether attributions are precise enough, by their standard errors."""

import re
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Solution

# One-sided 95 % quantile of the normal distribution. Of the sets accepted at a tolerance of .05, 4
# % miss a feature by more (`benchmarks/results/stopping.json`); with 1.3, twice as many would.
_Z = 1.645
# Minimum range, as a share of the largest range among the tokens: a token without causes has no
# three strongest ones. Chosen, not measured.
_LEAST_SPREAD = 0.05
_NAMED = re.compile(r"(answer[ :]*)?top[ _-]?([0-9]+)")


@runtime_checkable
class StoppingRule(Protocol):
    """Whether attributions are precise enough.

    Attributes:
        of: Target tokens, or (``"answer"``) the whole answer, whose attributions are the sums over
            its tokens.
    """

    @property
    def of(self) -> Literal["all", "token", "answer"]:
        """Target tokens, or the whole answer."""
        ...

    def excess(self, solution: Solution) -> Tensor:
        """The ratio of the errors of each target to the required ones, ``(n_target,)``.

        At most 1 if the rule is met. Standard errors fall with the square root of the evaluations,
        so its square forecasts the evaluations needed. NaN if errors are unknown.
        """
        ...


@dataclass(frozen=True)
class Precision:
    """Stops when standard errors are small relative to the range of the attributions.

    Args:
        tol: The largest standard error over the range (largest minus smallest attribution).
        of: ``"all"``: one range for all tokens together; ``"token"``: each token's own, so that
            tokens with small attributions are relatively as precise; ``"answer"``: that of the
            whole answer's attributions.

    Raises:
        ValueError: If `tol` is not above 0 or `of` is unknown.
    """

    tol: float
    of: Literal["all", "token", "answer"] = "all"

    def __post_init__(self) -> None:
        _one_of("of", self.of, ("all", "token", "answer"))
        if not self.tol > 0:
            raise ValueError(f"`tol` is {self.tol!r}: give a number above 0, such as 0.05.")

    def excess(self, solution: Solution) -> Tensor:
        """Largest standard error over the range, divided by `tol`, ``(n_target,)``."""
        errors, found = solution.standard_errors, solution.attributions
        if not found.numel():
            return torch.zeros(len(found), dtype=found.dtype, device=found.device)
        largest, spread = errors.amax(1), _spread(found)
        if self.of == "all":
            largest = largest.amax().expand(len(found))
            spread = (found.max() - found.min()).expand(len(found))
        return _times(largest, spread * self.tol)


@dataclass(frozen=True)
class TopCauses:
    """Stops when the strongest causes are significantly separated from all others.

    A set of k features is accepted if none of the others exceeds one of them in magnitude by more
    than a small share of the range, each comparison at one-sided 95 % confidence: SHAP@k (Kariyappa
    et al., arXiv 2307.04850) with the standard errors of the package's estimators. Ties between
    equally strong features remain open.

    Args:
        k: Number of causes.
        of: ``"token"``: the k strongest of every target token; ``"answer"``: those of the whole
            answer.
        within: Tolerance as a share of the range (of a token; of the answer), SHAP@k's epsilon:
            features that differ by less count as tied. A larger one ends runs earlier, and accepts
            sets that are further off.

    Raises:
        ValueError: If an argument is out of range.
    """

    k: int = 3
    of: Literal["token", "answer"] = "token"
    within: float = 0.05

    def __post_init__(self) -> None:
        _one_of("of", self.of, ("token", "answer"))
        if isinstance(self.k, bool) or self.k < 1:
            raise ValueError(f"`k` is {self.k!r}: give the number of causes, at least 1.")
        if not self.within > 0:
            raise ValueError(f"`within` is {self.within!r}: give a share above 0, such as 0.05.")

    def excess(self, solution: Solution) -> Tensor:
        """The ratio for the most difficult comparison of each target, ``(n_target,)``."""
        sizes, order = solution.attributions.abs().sort(dim=1, descending=True)
        errors = solution.standard_errors.gather(1, order)
        if sizes.shape[1] <= self.k:
            return torch.zeros(len(sizes), dtype=sizes.dtype, device=sizes.device)
        ahead = sizes[:, : self.k, None] - sizes[:, None, self.k :]
        squares = errors.square()
        uncertain = (squares[:, : self.k, None] + squares[:, None, self.k :]).sqrt()
        allowed = ahead + (self.within * _spread(solution.attributions))[:, None, None]
        return _times(_Z * uncertain, allowed).flatten(1).amax(1)


def as_rule(stop: "StoppingRule | str | None", tol: float | None) -> StoppingRule | None:
    """The rule of the arguments `stop` and `tol`.

    Raises:
        ValueError: If both are given, or `stop` is not the name of a rule.
        TypeError: If `stop` is not a rule.
    """
    if stop is None:
        return None if tol is None else Precision(tol)
    if tol is not None:
        raise ValueError(
            "`tol` and `stop` both say when to stop: give one of them "
            f"(`stop=Precision({tol!r})` is `tol={tol!r}`)."
        )
    if isinstance(stop, str):
        if not (found := _NAMED.fullmatch(stop)):
            raise ValueError(
                f"`stop` is {stop!r}: give 'top3' (the three strongest causes of every token), "
                "'answer top3' (of the whole answer), `TopCauses(…)` or `Precision(…)`."
            )
        return TopCauses(int(found[2]), "answer" if found[1] else "token")
    if not isinstance(stop, StoppingRule):  # type: ignore[unnecessary-isinstance]
        raise TypeError(
            f"`stop` is {type(stop).__name__}: give 'top3', `TopCauses(…)` or `Precision(…)`."
        )
    return stop


def _spread(attributions: Tensor) -> Tensor:
    """The range of each target's attributions, with a minimum for targets without causes."""
    own = attributions.amax(1) - attributions.amin(1)
    return own.clamp_min(_LEAST_SPREAD * float(own.max()))


def _times(errors: Tensor, allowed: Tensor) -> Tensor:
    """Errors over allowed errors; 0 if there are no errors."""
    tiny = torch.finfo(errors.dtype).tiny
    return torch.where(errors == 0, 0, errors / allowed.clamp_min(tiny))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` is {value!r}: give one of {', '.join(map(repr, known))}.")
