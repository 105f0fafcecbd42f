"""Alternative ids for the probe, such as the run itself contains."""

from collections.abc import Sequence

from captum_llm_ext.model.forward.rows import TokenRow


class OtherIds:
    """Ids that differ from those of a row, position by position.

    Args:
        row: The row. Alternatives come from its text after the prompt, since special ids, such as
            an image's, have a meaning.
        of_target: Whether only these may be used, since the prompt may contain special ids.
    """

    def __init__(self, row: TokenRow, *, of_target: bool) -> None:
        self._row, self._of_target = row.ids, of_target
        first = min((p for p in row.positions if p >= 0), default=0)
        pool = sorted({*row.ids[first:]})
        self._pool = pool if len(pool) > 1 else [*pool, int(pool[0] == 0)]

    def ids(self, ids: Sequence[int], start: int = 0, *, first: Sequence[int] = ()) -> list[int]:
        """Equally many ids, each different at its position; another start gives others.

        Args:
            ids: Token ids.
            start: Index of the first candidate.
            first: Ids to choose from before all others.
        """
        return [
            next(x for x in (*_from(first, i), *_from(self._pool, i)) if x != one)
            for i, one in enumerate(ids, start)
        ]

    def after(self, place: int) -> list[int]:
        """The row with other ids after a position, all of them different as far as possible."""
        begun, followed = self._row[: place + 1], self._row[place + 1 :]
        later = {*followed}
        # If all ids of the target come later, one of the prompt.
        others = () if self._of_target else sorted({*self._row})
        fresh = [one for one in self._pool if one not in later] or [
            one for one in others if one not in later
        ]
        fresh = fresh or self._pool[place % len(self._pool) :][:1]
        return [*begun, *self.ids(followed, first=fresh)]


def _from(pool: Sequence[int], start: int) -> list[int]:
    start %= max(1, len(pool))
    return [*pool[start:], *pool[:start]]
