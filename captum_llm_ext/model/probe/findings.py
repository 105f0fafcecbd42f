"""What a probe has found of a model, and how the model may then be asked."""

from dataclasses import dataclass
from typing import Any

from captum_llm_ext.model.forward.draws import Drawing
from captum_llm_ext.model.forward.rounding import Apart


@dataclass(frozen=True)
class Packing:
    """What a comparison of a row in a pack with the same row alone has shown of a model.

    Attributes:
        longest: Number of ids of the row.
        reason: Why it is not given packs; None where it may be.
        chains: Whether packs can go on from the state after another.
        spares_ends: Whether tokens can be left out at its first and its last layer.
        differs: Whether it was read otherwise than alone, which something that follows may explain.
    """

    longest: int
    reason: str | None
    chains: bool
    spares_ends: bool
    differs: bool

    def joined(self, other: "Packing") -> "Packing":
        """What both have shown."""
        return Packing(
            max(self.longest, other.longest),
            self.reason or other.reason,
            self.chains and other.chains,
            self.spares_ends and other.spares_ends,
            self.differs or other.differs,
        )


@dataclass(frozen=True)
class Findings:
    """What a model was seen to do. Differences are between log-probabilities, in nats.

    Attributes:
        shortest: Number of ids of the shortest row it was seen with in batches.
        longest: Of the longest one; 0: it was not.
        dtype: Of its logits.
        vocabulary: Number of logits at a place.
        kept: How it can be asked for the logits of some places only, as `_compat.kept_logits` says.
        last_digit: What the last digit of its logits is worth.
        n_before: Number of logits in front of those of the first id (a soft prompt's).
        last_only: Whether it gives the logits of the last place alone.
        sees_ahead: Whether what follows a token changes what is said at it.
        couples_rows: Whether the other rows of a batch change what is said in one.
        mixes_lengths: Whether the length of a batch changes what is said in its shorter rows.
        ahead: The largest difference seen that what follows makes; None: not looked for.
        coupling: The same of other rows.
        rounding: The largest difference seen that is left where neither of these is at work: of a
            row alone, and in a batch.
        draws: How the model draws at random, so that a value is that of one pass; None: not.
        moved: How far other last digits move what it says, where these are of 16 bits; None: not
            known.
        jumps: By how much of themselves numbers within are moved until values jump; 0: they only
            follow, or it is not known.
        is_rough: Whether values have a noise floor worth telling.
        packing: How it reads packs; None: not looked for.
        packed: Up to so many ids a row that is read in packs alone, which are one row each, needs
            no look at batches.
        reasons: What else is known of the model, in words.
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
    moved: Apart | None = None
    jumps: float = 0.0
    is_rough: bool = False
    packing: Packing | None = None
    packed: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def batches_known(self) -> bool:
        """Whether it was seen with several rows in a batch."""
        return self.longest > 0

    @property
    def step_by_step(self) -> bool:
        """Whether every target token needs a pass of its own, with nothing after it."""
        return self.sees_ahead or self.last_only

    @property
    def even(self) -> bool:
        """Whether only rows of one length may be asked together."""
        return self.step_by_step or self.mixes_lengths

    @property
    def apart(self) -> bool:
        """Whether rows may share nothing at all: no batch, no beginning, no pack.

        What is drawn at random would be drawn for all of them at once.
        """
        return self.couples_rows or self.draws is not None

    @property
    def seeds(self) -> bool:
        """Whether all that it draws can be drawn again from a seed."""
        return self.draws == "seeded"

    def covers(self, shortest: int, longest: int, *, packs: object = None) -> bool:
        """Whether rows of these lengths are no news, nor in packs if such are made."""
        in_batches = self.shortest <= shortest and longest <= self.longest
        if packs is None:
            return in_batches
        return self.packs_known(longest) and (in_batches or longest <= self.packed)

    def packs_known(self, longest: int) -> bool:
        """Whether it is known how rows up to this length are read in packs, or that they are not.

        A model that asks for a pass of each row, or token, is given none.
        """
        if self.even or self.apart or self.n_before:
            return True
        found = self.packing
        return found is not None and (found.reason is not None or longest <= found.longest)

    def provenance(self) -> dict[str, Any]:
        """As results keep it in their provenance: the same for the same run, whatever came before.

        Differences are told where they decide something.
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
        """How the model is asked, and why, where that is not the usual way."""
        said = [*self.reasons]
        if self.draws is not None:
            how = ", its draws seeded" if self.seeds else ""
            why = "draws at random" if self.draws != "unseen" else "gives equal rows other values"
            said.append(f"one row at a time{how}: the model {why}")
        if self.couples_rows:
            much = "" if self.coupling is None else f" (by {self.coupling:.2g} nats)"
            said.append(f"one row at a time: rows of a batch change one another{much}")
        if self.sees_ahead:
            much = "" if self.ahead is None else f" (by {self.ahead:.2g} nats)"
            said.append(f"step by step: what follows a token changes what is said at it{much}")
        if self.last_only:
            said.append("step by step: the model gives logits of the last place alone")
        if self.mixes_lengths:
            said.append("rows of one length together: the longest row changes the others")
        return "; ".join(said) or None


def _rounded(difference: float | None) -> float | None:
    return None if difference is None else float(f"{difference:.2g}")
