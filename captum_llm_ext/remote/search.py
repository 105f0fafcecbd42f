"""`Search`: what was requested to find replacements of absent features, and what it told."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from captum_llm_ext.remote.handshake import HandshakeError

# Rounding of reported values, in sums of probabilities: see `handshake`.
_MASS = 1e-3
OTHERWISE = (
    "give texts of the same kind (`CorpusBaselines(texts)`), lists (`baselines=[[...], ...]`), a "
    "model of this process that proposes texts (`ModelBaselines((model, tokenizer))`), or delete "
    '(`baselines="delete"`)'
)


@dataclass
class Search:
    """Requests for replacements of absent features, and what they told.

    Attributes:
        n_requests: Number of requests, those that score trials included.
        masses: Per place the probability mass of the reported tokens.
        least: Smallest number of tokens reported for a place; None before the first.
    """

    n_requests: int = 0
    masses: list[float] = field(default_factory=list[float])
    least: int | None = None

    def note(self, log_probs: Sequence[float]) -> None:
        """Records the log-probabilities reported for a place.

        Raises:
            HandshakeError: If they are no natural log-probabilities.
        """
        mass = sum(map(math.exp, log_probs))
        if mass > 1 + _MASS:
            raise HandshakeError(
                f"the {len(log_probs)} tokens reported for a place have probabilities of "
                f"{mass:.3g} in sum, which natural log-probabilities cannot have: replacements "
                "cannot be drawn by them."
            )
        self.masses.append(min(mass, 1.0))
        self.least = len(log_probs) if self.least is None else min(self.least, len(log_probs))

    def provenance(self) -> dict[str, Any] | None:
        """For results; None if nothing was searched."""
        if not self.n_requests and not self.masses:
            return None
        n = len(self.masses)
        return {
            "n_requests": self.n_requests,
            "n_places": n,
            "least_told": self.least,
            "mean_mass_told": sum(self.masses) / n if n else None,
            "least_mass_told": min(self.masses, default=None),
        }
