"""`ValueSpec`: the target tokens that every row is scored for, and their foils."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from captum_llm_ext.model.forward.lm_head import HeadOutput
from captum_llm_ext.model.forward.logits import AttrTarget
from captum_llm_ext.model.forward.prefixes import distinct_pairs
from captum_llm_ext.model.forward.rows import TokenRow


@dataclass(frozen=True)
class ValueSpec:
    """What is computed at the positions that predict the target tokens.

    A row has a value for every target token. With foils it has a second one, the log-probability of
    all foils of that token together: a few more products at a position whose log-sum-exp is
    computed anyway. Alternatively, the likeliest tokens at each position are requested: their
    log-probabilities, then their ids.

    Attributes:
        target: Token ids, int64 ``(n_target,)``.
        foils: Token ids, int64 ``(n_target, n_foils)``; padded with -1. The log-probability is 0
            for a token without foils. None: no foils.
        n_likeliest: Number of likeliest tokens requested, the likeliest first; padded with -inf and
            -1 if the vocabulary has fewer. 0: values are requested.
    """

    target: Tensor
    foils: Tensor | None = None
    n_likeliest: int = 0

    @staticmethod
    def likeliest(n_target: int, n: int) -> "ValueSpec":
        """Requests the `n` likeliest tokens at `n_target` positions."""
        return ValueSpec(torch.zeros(n_target, dtype=torch.int64, device="cpu"), n_likeliest=n)

    def __len__(self) -> int:
        return len(self.target)

    @property
    def per_token(self) -> int:
        """Number of values per target token and row."""
        if self.n_likeliest:
            return 2 * self.n_likeliest
        return 1 if self.foils is None else 2

    def callable_of(self, attr_target: AttrTarget) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The user's callable that computes values from logits, if there is one."""
        return None if self.n_likeliest or isinstance(attr_target, str) else attr_target

    def only(self, tokens: Sequence[int]) -> "ValueSpec":
        """The same for some of the target tokens only."""
        some = list(tokens)
        foils = None if self.foils is None else self.foils[some]
        return ValueSpec(self.target[some], foils, self.n_likeliest)

    def blank(self, n_rows: int) -> Tensor:
        """NaN for every value of rows, float64 ``(n_rows, per_token, n_target)`` on the CPU."""
        shape = (n_rows, self.per_token, len(self))
        return torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")

    def values(
        self, output: HeadOutput, where: Tensor, tokens: Tensor, attr_target: object
    ) -> Tensor:
        """Values of target tokens at positions.

        Args:
            output: Output of the model.
            where: Indices of its positions, int64 ``(n,)``; may repeat.
            tokens: Indices of the target tokens, int64 ``(n,)``.
            attr_target: As for `Scorer`, but not a callable.

        Returns:
            Shape ``(n, per_token)``, float64 on the CPU.
        """
        if self.n_likeliest:
            distinct, back = where.unique(return_inverse=True)
            log_probs, ids = output.likeliest(distinct, self.n_likeliest)
            return torch.cat([log_probs, ids.double()], 1)[back]
        if self.foils is None:
            (where, ids), back = distinct_pairs(where, self.target[tokens])
            return output.values(where, ids, str(attr_target))[back][:, None]
        (where, tokens), back = distinct_pairs(where, tokens)
        ids = torch.cat([self.target[tokens, None], self.foils[tokens]], 1)
        is_token = ids >= 0
        found = torch.full(ids.shape, -torch.inf, dtype=torch.float64, device="cpu")
        places = where[:, None].expand_as(ids)
        found[is_token] = output.values(places[is_token], ids[is_token], "log_prob")
        single = torch.promote_types(output.vectors.dtype, torch.float32)
        foils = found[:, 1:].logsumexp(1).to(single).double()  # rounded like all values
        foils = foils.masked_fill(~is_token[:, 1:].any(1), 0.0)
        return torch.stack([found[:, 0], foils], 1)[back]

    def digest(self, row: TokenRow) -> bytes:
        """Equal for rows that the model cannot distinguish, with equal requests."""
        parts = [row.ids, row.positions, self.target.tolist()]
        parts += [] if self.foils is None else self.foils.tolist()
        parts += [[self.n_likeliest]] * bool(self.n_likeliest)
        content = blake2b(digest_size=16)
        for part in parts:
            content.update(len(part).to_bytes(8) + array("q", part).tobytes())
        content.update(repr(row.key).encode())
        return content.digest()


def explained(values: Tensor, spec: ValueSpec, attr_target: object) -> Tensor:
    """The explained values, from the values of a request.

    Args:
        values: Shape ``(n_rows, per_token * n_target)``, as returned by `Scorer.values`.
        spec: The request.
        attr_target: As for `Scorer`.

    Returns:
        Shape ``(n_rows, n_target)``: the contrast of token and foils, or the token's own value.
    """
    if spec.foils is None:
        return values
    own, foils = values.split(len(spec), dim=1)
    return own - foils if attr_target == "contrast" else own
