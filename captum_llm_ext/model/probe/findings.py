"""Findings of a probe, and how the model can be run accordingly."""

from dataclasses import dataclass
from typing import Any

from captum_llm_ext.model.forward.draws import Drawing
from captum_llm_ext.model.forward.rounding import LogProbDifference


@dataclass(frozen=True)
class Packing:
    """Findings of a comparison of a row in a pack with the same row alone.

    Attributes:
        longest: Number of ids of the row.
        reason: Why the model cannot read packs; None if it can.
        chains: Whether packs can continue from the cache after another.
        spares_ends: Whether tokens can be skipped at its first and its last layer.
        differs: Whether values differed from those of the row alone, perhaps due to what follows.
    """

    longest: int
    reason: str | None
    chains: bool
    spares_ends: bool
    differs: bool

    def joined(self, other: "Packing") -> "Packing":
        """The findings of both."""
        return Packing(
            max(self.longest, other.longest),
            self.reason or other.reason,
            self.chains and other.chains,
            self.spares_ends and other.spares_ends,
            self.differs or other.differs,
        )


@dataclass(frozen=True)
class Findings:
    """Findings on a model. Differences are between log-probabilities, in nats.

    Attributes:
        shortest: Number of ids of the shortest row probed in batches.
        longest: Number of ids of the longest one; 0: none was probed.
        dtype: Dtype of its logits.
        vocabulary: Number of logits per position.
        kept: How logits of some positions can be requested, see `_compat.kept_logits`.
        last_digit: Spacing of its logits.
        n_before: Number of logits before those of the first id (of a soft prompt).
        last_only: Whether it returns the logits of the last position only.
        sees_ahead: Whether the output at a token depends on what follows it.
        couples_rows: Whether the output of a row depends on the other rows of its batch.
        mixes_lengths: Whether the output of shorter rows depends on the length of the batch.
        ahead: The largest difference due to what follows; None: not probed.
        coupling: The largest difference due to other rows.
        rounding: The largest difference without either: of a row alone, and in a batch.
        draws: How the model draws at random; None: not at all.
        repeats: Whether many equal passes were compared, and had equal values.
        moved: How far perturbed last digits change the output, for 16 bits; None: unknown.
        jumps: Relative perturbation of internal numbers at which values jump; 0: never, or unknown.
        is_rough: Whether values have a relevant noise floor.
        packing: Findings on packs; None: not probed.
        packed: Number of ids up to which rows that are only read in packs need no probe of batches.
        reasons: Further findings, in words.
    """

    shortest: int
    longest: int
    dtype: str
    vocabulary: int
    kept: str | None = None
    last_digit: float = 0.0
    n_before: int = 0
    last_only: bool = False
    sees_ahead: bool = False
    couples_rows: bool = False
    mixes_lengths: bool = False
    ahead: float | None = None
    coupling: float | None = None
    rounding: float = 0.0
    draws: Drawing | None = None
    repeats: bool = False
    moved: LogProbDifference | None = None
    jumps: float = 0.0
    is_rough: bool = False
    packing: Packing | None = None
    packed: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def batches_known(self) -> bool:
        """Whether it was probed with several rows in a batch."""
        return self.longest > 0

    @property
    def step_by_step(self) -> bool:
        """Whether every target token needs its own pass, with nothing after it."""
        return self.sees_ahead or self.last_only

    @property
    def even(self) -> bool:
        """Whether only rows of equal length may share a batch."""
        return self.step_by_step or self.mixes_lengths

    @property
    def apart(self) -> bool:
        """Whether rows may share nothing: no batch, no prefix, no pack.

        Random draws would be common to all of them.
        """
        return self.couples_rows or self.draws is not None

    @property
    def seeds(self) -> bool:
        """Whether all random draws can be repeated from a seed."""
        return self.draws == "seeded"

    def covers(self, shortest: int, longest: int, *, packs: object = None) -> bool:
        """Whether rows of these lengths need no further probe, nor packs if used."""
        in_batches = self.shortest <= shortest and longest <= self.longest
        if packs is None:
            return in_batches
        return self.packs_known(longest) and (in_batches or longest <= self.packed)

    def packs_known(self, longest: int) -> bool:
        """Whether packs of rows up to this length have been probed, or are not used.

        A model that needs a pass per row, or per token, is given none.
        """
        if self.even or self.apart or self.n_before:
            return True
        found = self.packing
        return found is not None and (found.reason is not None or longest <= found.longest)

    def provenance(self) -> dict[str, Any]:
        """As provenance: equal for equal runs, whatever happened before.

        Differences are included where they decide something.
        """
        names = ("dtype", "n_before", "last_only", "sees_ahead", "couples_rows", "mixes_lengths")
        names += ("draws",)
        return {
            **{name: getattr(self, name) for name in names},
            "jumps": self.jumps > 0,
            "ahead": _rounded(self.ahead) if self.sees_ahead else None,
            "coupling": _rounded(self.coupling) if self.couples_rows else None,
            "reasons": list(self.reasons),
        }

    @property
    def batching(self) -> str | None:
        """How the model is run and why, if not as usual."""
        texts = [*self.reasons]
        if self.draws is not None:
            how = ", its draws seeded" if self.seeds else ""
            why = "draws at random" if self.draws != "unseen" else "gives equal rows other values"
            texts.append(f"one row at a time{how}: the model {why}")
        if self.couples_rows:
            much = "" if self.coupling is None else f" (by {self.coupling:.2g} nats)"
            texts.append(f"one row at a time: rows of a batch change one another{much}")
        if self.sees_ahead:
            much = "" if self.ahead is None else f" (by {self.ahead:.2g} nats)"
            texts.append(f"step by step: what follows a token changes what is said at it{much}")
        if self.last_only:
            texts.append("step by step: the model gives logits of the last place alone")
        if self.mixes_lengths:
            texts.append("rows of one length together: the longest row changes the others")
        return "; ".join(texts) or None


def _rounded(difference: float | None) -> float | None:
    return None if difference is None else float(f"{difference:.2g}")
