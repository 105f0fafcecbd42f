"""Finds foils: plausible alternatives by the model, after which the text continues well."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.contrast.context import FoilContext
from captum_llm_ext.contrast.contrast import Contrast
from captum_llm_ext.model import RowScorer, TokenRow

# Candidates per foil, and tokens after the position by which they are weighted: on 35 natural
# prompts whose cause is known, more of either name no more causes.
_CANDIDATES = 2
_AHEAD = 2
# Number of likeliest tokens examined per foil. Chosen, not measured.
_LOOKED_AT = 64
# Target tokens whose candidates are weighted at a time, since each of their rows has a value for
# each. Chosen, not measured.
_AT_ONCE = 32

Guesses = dict[int, float]  # log-probabilities by token


def find_foils(
    wanted: Sequence[int], contrast: Contrast, context: FoilContext, model: RowScorer
) -> tuple[dict[int, tuple[int, ...]], dict[str, Any]]:
    """Foils of target tokens.

    Args:
        wanted: Indices of the target tokens.
        contrast: The user's specification.
        context: Prompt and target.
        model: The model.

    Returns:
        Ids by target token, the likeliest first; and how they were found.
    """
    own = [t for t in wanted if not context.goes_on(t)]
    n_looked = _LOOKED_AT * contrast.n_foils
    rows = [context.whole] if contrast.without is None else context.without(contrast.without)
    guesses: dict[int, Guesses] = {}
    if own:
        is_whole = contrast.without is None
        proposals = (
            context.likeliest(model, n_looked) if is_whole else model.likeliest(rows, n_looked)
        )
        guesses = _averaged(_guesses(rows, own, *proposals))
    candidates = {t: _of_kind(guesses.get(t, {}), t, contrast.n_foils, context) for t in own}
    weighed = [
        t
        for t in own
        if len(candidates[t]) > contrast.n_foils and not context.is_special(context.target[t])
    ]
    n_rows = 0
    # Inputs other than text are read again with every row.
    if weighed and model.scores_continuations and context.full.extras is None:
        written = context.continuation(model, _AHEAD)
        for start in range(0, len(weighed), _AT_ONCE):
            n_rows += _weigh(weighed[start : start + _AT_ONCE], candidates, context, written, model)
    ids = {t: tuple(_best(candidates[t])[: contrast.n_foils]) for t in own}
    about = {
        "foils": "found",
        "by": "before and after" if n_rows else "before",
        "n_foils": contrast.n_foils,
        "without": contrast.without,
        "n_rows": n_rows + len(rows),
    }
    return {t: ids.get(t, ()) for t in wanted}, about


def _guesses(
    rows: Sequence[TokenRow], wanted: Sequence[int], log_probs: Tensor, ids: Tensor
) -> list[dict[int, Guesses]]:
    """Per row the likeliest tokens at the positions of target tokens, if it predicts them."""
    return [
        {
            t: {
                token: value
                for token, value in zip(ids[i, t].tolist(), log_probs[i, t].tolist(), strict=True)
                if token >= 0 and value > -torch.inf
            }
            for t in wanted
            if row.positions[t] >= 0
        }
        for i, row in enumerate(rows)
    ]


def _averaged(each: Sequence[dict[int, Guesses]]) -> dict[int, Guesses]:
    """Mean probabilities; a token missing among the likeliest of one row counts as 0 there."""
    sums: dict[int, Guesses] = {}
    for guesses in each:
        for t, own in guesses.items():
            total = sums.setdefault(t, {})
            for token, value in own.items():
                total[token] = total.get(token, 0.0) + math.exp(value) / len(each)
    return {
        t: {token: math.log(sum_) for token, sum_ in own.items() if sum_ > 0}
        for t, own in sums.items()
    }


def _of_kind(guesses: Guesses, t: int, n_foils: int, context: FoilContext) -> Guesses:
    """The likeliest candidates of a target token: of its kind, or of any if there is none."""
    order = _best(guesses)
    is_special = context.is_special(context.target[t])
    for fits in (context.fits,) * (not is_special) + (context.is_other,):
        chosen: list[int] = []
        for token in order:
            if fits(token, t):
                chosen.append(token)
            if len(chosen) == _CANDIDATES * n_foils:
                break
        if chosen:
            return {token: guesses[token] for token in chosen}
    return {}


def _weigh(
    wanted: Sequence[int],
    candidates: dict[int, Guesses],
    context: FoilContext,
    written: Sequence[int],
    model: RowScorer,
) -> int:
    """Adds the likelihood of the next tokens to candidates; returns the number of rows scored."""
    text = (*context.target, *written)
    first, last = wanted[0] + 1, min(wanted[-1] + 1 + _AHEAD, len(text))
    rows: dict[tuple[int, int], TokenRow] = {}
    for t in wanted:
        before = context.full.ids + context.target[:t]
        follows = text[t + 1 : t + 1 + _AHEAD]
        for token in candidates[t] if follows else ():
            positions = [-1] * (last - first)
            for i in range(len(follows)):
                positions[t + 1 + i - first] = len(before) + i
            rows[t, token] = TokenRow((*before, token, *follows[:-1]), positions)
    if not rows:
        return 0
    target = torch.tensor(text[first:last], dtype=torch.int64, device="cpu")
    values = model.values(list(rows.values()), target).nan_to_num(nan=0.0).sum(1)
    for (t, token), value in zip(rows, values.tolist(), strict=True):
        candidates[t][token] += value
    return len(rows)


def _best(guesses: Mapping[int, float]) -> list[int]:
    return sorted(guesses, key=lambda token: (-guesses[token], token))
