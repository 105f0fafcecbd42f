"""`Foils`: the tokens with which every target token is contrasted."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.contrast.automatic import find_foils
from captum_llm_ext.contrast.context import FoilContext
from captum_llm_ext.contrast.contrast import Contrast, Foil
from captum_llm_ext.model import RowScorer
from captum_llm_ext.text import tokens

_SHOWN = 3


@dataclass(frozen=True)
class Foils:
    """The foils of every target token.

    Attributes:
        ids: Per target token the ids, the likeliest first if they were found; may be empty.
        names: Their printable names.
        about: How they were determined, as JSON values.
    """

    ids: list[tuple[int, ...]]
    names: list[list[str]]
    about: dict[str, Any]

    @property
    def tensor(self) -> Tensor:
        """Ids, int64 ``(n_target, n_foils)``, padded with -1."""
        most = max(1, *map(len, self.ids))
        rows = [[*own, *[-1] * (most - len(own))] for own in self.ids]
        return torch.tensor(rows, dtype=torch.int64, device="cpu")


def foils_of(
    contrast: Contrast, context: FoilContext, model: RowScorer, vocabulary_size: int | None
) -> Foils:
    """The foils of a contrast.

    Args:
        contrast: The user's specification.
        context: Prompt and target.
        model: The model, used only if foils are to be found.
        vocabulary_size: The model's vocabulary size; None if unknown.

    Raises:
        ValueError: If the number of lists differs from that of target tokens, a foil is not in the
            vocabulary, equals the target token, or is repeated; or there is no such feature.

    Warns:
        UserWarning: If a foil's text has several tokens.
    """
    target = context.target
    per_token = contrast.per_token or [
        _of_all_tokens(contrast, t, context) for t in range(len(target))
    ]
    if len(per_token) != len(target):
        raise ValueError(
            f"`foils` has {len(per_token)} lists for {len(target)} target tokens "
            f"({_listed(context.names)}): give one for each, None where they are to be found."
        )
    long: set[str] = set()
    given = {
        t: _given(own, t, context, vocabulary_size, long)
        for t, own in enumerate(per_token)
        if own is not None
    }
    if long:
        warn_user(
            "foils of several tokens are represented by their first one: "
            f"{_listed(sorted(long))}. The comparison is with texts that begin with it (see "
            "`foil_tokens`).",
        )
    wanted = [t for t in range(len(target)) if t not in given]
    about: dict[str, Any] = {"foils": "given"}
    if wanted:
        own, about = find_foils(wanted, contrast, context, model)
        given |= own
    ids = [given[t] for t in range(len(target))]
    names = [
        [tokens.labels(context.tokenizer, [i], context.before(t))[0] for i in own]
        for t, own in enumerate(ids)
    ]
    return Foils(ids, names, about)


def _of_all_tokens(contrast: Contrast, t: int, context: FoilContext) -> list[Foil] | None:
    """The foils of one target token among those for all: texts are words, and begin as such."""
    given = contrast.for_all
    if given is None or not context.goes_on(t):
        return given
    return [foil for foil in given if isinstance(foil, int)]


def _given(
    foils: Sequence[Foil], t: int, context: FoilContext, vocabulary_size: int | None, long: set[str]
) -> tuple[int, ...]:
    """Ids of the user's foils of a target token; texts of several tokens are recorded in `long`."""
    ids: dict[int, Foil] = {}
    where = f"of target token {t} ({context.names[t]!r})"
    for foil in foils:
        whole = (foil,) if isinstance(foil, int) else context.ids_of(foil, t)
        token = whole[0]
        long |= {str(foil)} if len(whole) > 1 else set()
        if not 0 <= token < (vocabulary_size or sys.maxsize):
            raise ValueError(
                f"the foil {foil!r} {where} is outside the model's vocabulary of "
                f"{vocabulary_size or 'unknown size'} tokens."
            )
        if token == context.target[t]:
            what = "is" if isinstance(foil, int) else "begins with"
            raise ValueError(
                f"the foil {foil!r} {where} {what} that very token: they cannot be distinguished "
                "there. Give another one, or a list for each target token, with None where foils "
                "are to be found."
            )
        if token in ids:
            raise ValueError(
                f"the foils {ids[token]!r} and {foil!r} {where} begin with the same token: give "
                "one of them, for it would count twice."
            )
        ids[token] = foil
    return tuple(ids)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown + ", …" * (len(names) > _SHOWN)
