"""Positions of a row at which the probe compares outputs."""

from collections.abc import Sequence

from captum_llm_ext.model.forward.rows import TokenRow

# Number of further rows, with as many target tokens, that show whether the model sees ahead, up to
# a quarter of the run; in a large run, one per this many rows. Chosen, not measured.
_CUTS = 8
_ROWS_PER_CUT = 32


def n_cuts(n_rows: int) -> int:
    """Number of later positions after which ids are replaced, by the number of rows."""
    return max(2, min(_CUTS, n_rows // 4), n_rows // _ROWS_PER_CUT)


def n_cuts_of_rounding(n_rows: int) -> int:
    """The same where only the effect of rounding is measured: fewer."""
    return max(2, min(_CUTS, n_rows // _ROWS_PER_CUT))


def cut_places(row: TokenRow, n_later: int) -> list[int]:
    """Positions of the first target token and of at most `n_later` others before the last."""
    last = len(row.ids) - 1
    places = sorted({p for p in row.positions if p >= 0} or {last})
    return [places[0], *spaced([place for place in places[1:] if place < last], n_later)]


def spaced(places: Sequence[int], n: int) -> list[int]:
    """At most `n` of some positions, including the last."""
    n = min(len(places), n)
    return sorted({places[-1 - i * len(places) // n] for i in range(n)} if n else ())
