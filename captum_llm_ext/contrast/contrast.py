"""`Contrast`: the user's specification of foils."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from captum_llm_ext.base.arguments import at_least_one, check_attr_target

# On 40 natural prompts whose cause is known, 12 to 24 name four or five more causes than 8.
N_FOILS = 16
Foil = int | str
_NONE = -1  # padding of a result's foils


@dataclass(frozen=True)
class Contrast:
    """``attr_target=``: why a token rather than its foils, ``log p(token) - log sum p(foils)``.

    In nats: log-odds against some other tokens instead of all. ``attr_target="contrast"`` is
    ``Contrast()``. Log-probabilities are kept as well, so that
    ``result.refit(attr_target="log_prob")`` needs no model; ``result.foil_tokens`` lists the foils.

    Args:
        foils: Texts or token ids, or one of them, as foils of every target token (texts: of every
            token that does not continue a word); or a list of them for each target token, with None
            for a token whose foils are to be found; or the `foils` of another result of the same
            target. A text counts by its first token at that position; without leading white space
            it gets that of the target token, or a space if it would otherwise continue the previous
            word. By default all foils are found: the likeliest other tokens of the same kind
            (leading white space, case, word, number or mark), twice `n_foils` of them, of which the
            best by ``p(foil) * p(next two tokens | foil)`` are kept. After the target's end, the
            next tokens are those that the model would generate. A token that continues a word has
            no foils and its value is its log-probability: the foils of a word's first token
            represent other words, and the sum over the word's tokens contrasts the whole word with
            these. Foils of special tokens are the likeliest others of any kind.
        n_foils: Maximum number of foils found per token.
        without: Name or index of a feature (prompt features first, then earlier output). Foils are
            then found with it absent, as the input's baselines define, averaged over eight draws if
            these are random.

    Raises:
        ValueError: If foils are empty or repeated, or an argument would have no effect.
        TypeError: If a foil is neither a text nor a token id.
    """

    foils: Any = None
    n_foils: int = N_FOILS
    without: int | str | None = None

    def __post_init__(self) -> None:
        at_least_one("n_foils", self.n_foils)
        object.__setattr__(self, "foils", _plain(self.foils))
        if isinstance(self.without, bool) or not isinstance(self.without, int | str | None):
            raise TypeError(
                f"`without` is {self.without!r}: give the name or the number of a feature."
            )
        if not self.is_found:
            ignored = "without" if self.without is not None else None
            ignored = "n_foils" if self.n_foils != N_FOILS else ignored
            if ignored is not None:
                raise ValueError(
                    f"`{ignored}` would be ignored: all foils are given. Leave it out, or say None "
                    "for target tokens whose foils are to be found."
                )

    @property
    def per_token(self) -> list[list[Foil] | None] | None:
        """Foils for each target token, None for those to be found; None if not given per token."""
        given = self.foils
        are_lists = given is not None and not isinstance(given[0], int | str)
        return given if are_lists else None

    @property
    def for_all(self) -> list[Foil] | None:
        """Foils of all target tokens; None if `foils` is per token or not given."""
        return None if self.foils is None or self.per_token is not None else self.foils

    @property
    def is_found(self) -> bool:
        """Whether any foils are to be found."""
        return self.foils is None or None in (self.per_token or ())


def as_value(attr_target: Any) -> Any:
    """The explained value as attributions store it: ``"contrast"`` becomes a `Contrast`.

    Raises:
        ValueError: If it is not a known value of a target token.
    """
    if isinstance(attr_target, Contrast):
        return attr_target
    check_attr_target(attr_target)
    return Contrast() if attr_target == "contrast" else attr_target


def scored(attr_target: Any) -> Any:
    """The value that a scorer computes, which knows foils only as ids."""
    return "contrast" if isinstance(attr_target, Contrast) else attr_target


def _plain(foils: Any) -> Any:
    """Foils as lists of texts and integers, one list or one per target token."""
    if foils is None:
        return None
    if getattr(foils, "ndim", 1) == 2:
        return [[i for i in row if i != _NONE] for row in foils.tolist()]
    given = foils.tolist() if hasattr(foils, "tolist") else foils
    if isinstance(given, int | str) and not isinstance(given, bool):
        given = [given]
    entries = _listed(given, "`foils`")
    are_lists = [entry is None or isinstance(entry, list | tuple) for entry in entries]
    if not any(are_lists):
        return [_foil(entry) for entry in entries]
    if not all(are_lists):
        raise TypeError(
            "`foils` holds both foils and lists of them: give foils for all target tokens, or for "
            "each target token a list of its own, None where they are to be found."
        )
    if all(entry is None for entry in entries):
        raise ValueError("`foils` is None for every target token: leave it out.")
    return [
        None if one is None else [_foil(e) for e in _listed(one, f"`foils[{i}]`")]
        for i, one in enumerate(entries)
    ]


def _listed(given: Any, name: str) -> list[Any]:
    if not isinstance(given, Sequence) or isinstance(given, bytes | str):
        raise TypeError(f"{name} is a {type(given).__name__}: give texts or token ids.")
    entries = [e.tolist() if hasattr(e, "tolist") else e for e in cast(Sequence[Any], given)]
    if not entries:
        raise ValueError(f"{name} is empty: give at least one foil, or None to have them found.")
    plain = [entry for entry in entries if isinstance(entry, int | str)]
    twice = next((entry for i, entry in enumerate(plain) if entry in plain[:i]), None)
    if twice is not None:
        raise ValueError(f"{name} holds {twice!r} twice: give every foil once.")
    return entries


def _foil(entry: Any) -> Foil:
    if isinstance(entry, bool) or not isinstance(entry, int | str):
        raise TypeError(f"{entry!r} is not a foil: give a text or a token id.")
    if entry == "":
        raise ValueError("a foil is the empty text: give at least one token of it.")
    return entry
