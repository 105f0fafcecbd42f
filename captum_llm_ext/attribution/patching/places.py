"""Groups of positions that are patched together."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from captum_llm_ext.text import tokens
from captum_llm_ext.text.inputs import Context, GeneratedText

Grouping = Literal["token", "feature"] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Places:
    """Groups of positions in reading order.

    Attributes:
        groups: Per group its positions in the token row.
        names: The text at each group.
    """

    groups: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]


def grouped(
    grouping: Grouping, context: Context, generated: GeneratedText, tokenizer: Any
) -> Places:
    """The groups for a `places` argument.

    Args:
        grouping: ``"token"``: each position by itself. ``"feature"``: the positions of a feature
            together, as well as contiguous fixed text. Or lists of positions.
        context: The prompt.
        generated: The target; its last token is not read.
        tokenizer: The model's tokenizer, for the text at each group.

    Raises:
        ValueError: If a position is outside the text, or occurs twice.
        TypeError: If features own no tokens.
    """
    before = context.full.ids
    ids = (*before, *generated.ids[:-1])
    labels = [*tokens.labels(tokenizer, before), *generated.labels[:-1]]
    if isinstance(grouping, str):
        if grouping == "token":
            return Places(tuple((i,) for i in range(len(ids))), tuple(labels))
        if grouping == "feature":
            return _by_feature(context, generated, tokens.pieces(tokenizer, before))
        raise ValueError(
            f"`places` is {grouping!r}: give 'token', 'feature', or lists of places (0 is the "
            "first token id)."
        )
    texts = [*tokens.pieces(tokenizer, before), *(piece.text for piece in generated.pieces)]
    groups = tuple(tuple(int(p) for p in group) for group in grouping)
    flat = [p for group in groups for p in group]
    if not flat or any(not group for group in groups) or len({*flat}) != len(flat):
        raise ValueError("`places` has an empty list, or a place that comes twice.")
    if not (min(flat) >= 0 and max(flat) < len(ids)):
        wrong = min(flat) if min(flat) < 0 else max(flat)
        raise ValueError(
            f"`places` names place {wrong}: prompt and target before its last token have "
            f"{len(ids)}, from 0 to {len(ids) - 1}."
        )
    return Places(groups, tuple("".join(texts[p] for p in group).strip() for group in groups))


def _by_feature(context: Context, generated: GeneratedText, texts: list[str]) -> Places:
    start, prompt = len(context.full.ids), context.prompt
    texts = [*texts, *(piece.text for piece in generated.pieces[:-1])]
    names = dict(enumerate(prompt.feature_names(" …")))
    owner: dict[int, int] = {p: own.feature for own in prompt.places() for p in own.positions}
    for own in generated.places():
        owner |= {start + p: prompt.n_features + own.feature for p in own.positions}
        names[prompt.n_features + own.feature] = generated.names[own.feature]
    groups: dict[object, list[int]] = {}
    runs = groupby(range(len(texts)), key=owner.get)
    for number, (feature, run) in enumerate(runs):
        groups.setdefault(("fixed", number) if feature is None else feature, []).extend(run)
    labels = [
        (names[key] if isinstance(key, int) else "".join(texts[p] for p in group)).strip()
        for key, group in groups.items()
    ]
    return Places(tuple(tuple(group) for group in groups.values()), tuple(labels))
