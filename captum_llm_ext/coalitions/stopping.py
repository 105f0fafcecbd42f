"""Stopping rules: whether attributions are known well enough, judged by their standard errors."""

import re
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from captum_llm_ext.coalitions.causal_scope import Solution

# One-sided 95 % point of the normal law. Of the sets that it lets pass at a tolerance of .05, 4 %
# leave out a feature by more (`benchmarks/results/stopping.json`); with 1.3 it were twice as many.
_Z = 1.645
# Of the largest range among the tokens. What is nothing in particular has no three causes.
_LEAST_SPREAD = 0.05
_NAMED = re.compile(r"(answer[ :]*)?top[ _-]?([0-9]+)")


@runtime_checkable
class StoppingRule(Protocol):
    """Whether attributions are known well enough.

    Attributes:
        of: What is judged: target tokens, or (``"answer"``) the whole answer, whose attributions
            are the sums over its tokens.
    """

    @property
    def of(self) -> Literal["all", "token", "answer"]:
        """Target tokens, or the whole answer."""
        ...

    def excess(self, solution: Solution) -> Tensor:
        """How many times too large the errors of each target are, ``(n_target,)``.

        At most 1 where the target is known well enough. Standard errors shrink with the square
        root of the evaluations, so that its square forecasts how many more it takes. NaN where
        errors are unknown.
        """
        ...


@dataclass(frozen=True)
class Precision:
    """Stops when standard errors are small beside the range of the attributions.

    Args:
        tol: The largest standard error over the range (largest less smallest attribution).
        of: ``"all"``: one range, that of all tokens together; ``"token"``: each token's own, so
            that tokens with small attributions are known as well as the others; ``"answer"``: that
            of the whole answer's attributions.

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
        """Largest standard error over the range, over `tol`, ``(n_target,)``."""
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
    """Stops when the strongest causes are told from all others.

    A set of k features is let pass when none of the others exceeds one of them in size by more
    than a small share of the range, each comparison with one-sided 95 % confidence: SHAP@k
    (Kariyappa et al., arXiv 2307.04850) with the errors of the package's own estimators. Which of
    equally strong features are in the set is left open.

    Args:
        k: How many causes.
        of: ``"token"``: the k strongest of every target token; ``"answer"``: those of the whole
            answer.
        within: The share of the range (of a token; of the answer) that does not matter.

    Raises:
        ValueError: If an argument is out of range.
    """

    k: int = 3
    of: Literal["token", "answer"] = "token"
    within: float = 0.05

    def __post_init__(self) -> None:
        _one_of("of", self.of, ("token", "answer"))
        if isinstance(self.k, bool) or self.k < 1:
            raise ValueError(f"`k` is {self.k!r}: give how many causes are wanted, 1 or more.")
        if not self.within > 0:
            raise ValueError(f"`within` is {self.within!r}: give a share above 0, such as 0.05.")

    def excess(self, solution: Solution) -> Tensor:
        """Of each target the hardest of all comparisons, ``(n_target,)``."""
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
    """What the arguments `stop` and `tol` ask for.

    Raises:
        ValueError: If both are given, or `stop` names no rule.
        TypeError: If `stop` is none.
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
    """The range of each target's attributions; of one with next to nothing to explain, more."""
    own = attributions.amax(1) - attributions.amin(1)
    return own.clamp_min(_LEAST_SPREAD * float(own.max()))


def _times(errors: Tensor, allowed: Tensor) -> Tensor:
    """Errors over what is allowed; 0 where there are none."""
    tiny = torch.finfo(errors.dtype).tiny
    return torch.where(errors == 0, 0, errors / allowed.clamp_min(tiny))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` is {value!r}: give one of {', '.join(map(repr, known))}.")
