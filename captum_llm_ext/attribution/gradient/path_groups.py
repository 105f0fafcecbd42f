"""Groups of target tokens that share an integration path, and the embeddings at its start."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.text.inputs import GeneratedText, Place, Prompt

Absent = Literal["baseline", "zero"]
Apart = Literal["never", "cheapest", "always"]


@dataclass(frozen=True)
class PathGroup:
    """Target tokens that are explained by one path.

    Attributes:
        targets: Their numbers.
        held: Places of the target that stand all along: fixed text, and what the model has already
            written of the very word that it goes on with.
    """

    targets: tuple[int, ...]
    held: frozenset[int]

    @property
    def n_read(self) -> int:
        """Number of target tokens that the model reads before it predicts the last of these."""
        return self.targets[-1]


def path_groups(
    generated: GeneratedText,
    *,
    n_before: int,
    apart: Apart,
    chosen: Sequence[int],
    ways: Callable[[list[int]], float] = len,
) -> list[PathGroup]:
    """The paths that explain every target token by what may be absent before it, longest first.

    A generated word that has begun stands while its other tokens are explained: these need a path
    of their own. Where every feature is one token, or none, one path would do.

    Args:
        generated: The target as features.
        n_before: Token ids before it.
        apart: Whether tokens of one path share a pass: ``"never"`` apart, ``"always"`` (for models
            that see ahead), or what is ``"cheapest"``: early tokens need not be read, and gone
            back through, with all that comes after them.
        chosen: The target tokens that are explained.
        ways: How many passes these target tokens take together beside the one forth: by default a
            way back each.
    """
    fixed = {place for place, group in enumerate(generated.groups) if group is None}
    required = {t: -1 if own is None else own for t, own in enumerate(generated.required)}
    found: list[PathGroup] = []
    for own in sorted({required[t] for t in chosen}):
        held = {place for place, group in enumerate(generated.groups) if group == own} | fixed
        members = [t for t in chosen if required[t] == own]
        if apart == "always":
            blocks = [[t] for t in members]
        else:
            blocks = _blocks(members, n_before, ways) if apart == "cheapest" else [members]
        found += [PathGroup(tuple(block), frozenset(held)) for block in blocks]
    return sorted(found, key=lambda group: -group.n_read)


def _blocks(
    targets: list[int], n_before: int, ways: Callable[[list[int]], float]
) -> list[list[int]]:
    """Cuts targets into blocks at the least cost: a pass forth each, and what is beside it."""

    def cost(blocks: list[list[int]]) -> float:
        return sum((n_before + block[-1]) * (1 + ways(block)) for block in blocks)

    sizes = {-(-len(targets) // n) for n in range(1, len(targets) + 1)}
    cuts = [[targets[i : i + n] for i in range(0, len(targets), n)] for n in sorted(sizes)]
    return min(cuts, key=lambda blocks: (cost(blocks), len(blocks)))


@dataclass(frozen=True)
class Features:
    """The features of prompt and target in one row of token ids.

    Attributes:
        places: Where they stand; those of the target are numbered after the prompt's.
        draws: Per draw and place the ids that stand there instead; none: the zero vector.
        n_prompt: Features of the prompt.
        n_features: Features of both.
        start: Token ids before the target.
    """

    places: list[Place]
    draws: list[list[tuple[int, ...]]]
    n_prompt: int
    n_features: int
    start: int

    def owners(self, length: int) -> Tensor:
        """The feature of every position, int64 ``(length,)``; ``n_features`` for fixed text."""
        owners = torch.full((length,), self.n_features, dtype=torch.int64, device="cpu")
        for place in self.places:
            owners[[p for p in place.positions if p < length]] = place.feature
        return owners


def features(
    prompt: Prompt,
    n_ids: int,
    generated: GeneratedText,
    *,
    n_draws: int,
    absent: Absent,
    seed: int,
) -> Features:
    """Positions of all features, with replacement ids for each draw.

    Args:
        prompt: The prompt, of `n_ids` token ids.
        n_ids: Number of them.
        generated: The target.
        n_draws: Draws of random baselines.
        absent: ``"zero"``: the zero vector in place of what the baselines say.
        seed: Of all draws.

    Raises:
        TypeError: If the prompt does not tell which tokens its features own.
    """
    places = prompt.places()
    later = [
        Place(tuple(n_ids + p for p in place.positions), prompt.n_features + place.feature)
        for place in generated.places()
    ]
    draws: list[list[tuple[int, ...]]] = [[()] * (len(places) + len(later))] * n_draws
    if absent == "baseline":
        generator = torch.Generator().manual_seed(seed)
        both = prompt.stand_ins(n_draws, generator), generated.stand_ins(n_draws, generator)
        draws = [[*before, *after] for before, after in zip(*both, strict=True)]
    n_features = prompt.n_features + generated.n_features
    return Features([*places, *later], draws, prompt.n_features, n_features, n_ids)


def absent_embeddings(
    embedding: nn.Module, present: Tensor, features: Features, model: nn.Module
) -> Tensor:
    """Embeddings of the row with every feature absent.

    A stand-in of as many tokens as the feature has stands for it token by token; of one of another
    length the mean stands in each of the feature's places, and of none the zero vector.

    Args:
        embedding: Turns ids into vectors.
        present: What it gives the row with everything present, ``(1, length, size)``.
        features: Of that row.
        model: Tells how many ids there are.

    Returns:
        Shape ``(n_draws, length, size)``; what is fixed is as it is in `present`.

    Raises:
        ValueError: If a stand-in has an id outside the vocabulary.
    """
    wanted = {token for draw in features.draws for ids in draw for token in ids}
    order = sorted(wanted)
    size = _compat.vocabulary_size(model)
    if order and size is not None and not 0 <= order[0] <= order[-1] < size:
        raise ValueError(
            f"a baseline gives token id {order[0] if order[0] < 0 else order[-1]}, outside the "
            f"model's vocabulary of {size} tokens: check the baselines, and that tokenizer and "
            "model belong together."
        )
    vectors = present[0, :0]
    if order:
        ids = torch.tensor([order], device=_compat.input_device(model), dtype=torch.int64)
        vectors = embedding(ids).detach()[0].to(present.device)
    number = {token: i for i, token in enumerate(order)}
    length = present.shape[1]
    rows: list[Tensor] = []
    for draw in features.draws:
        row = present[0].clone()
        for place, ids in zip(features.places, draw, strict=True):
            positions = [p for p in place.positions if p < length]
            row[positions] = _fitted(vectors[[number[token] for token in ids]], place, length)
        rows.append(row)
    return torch.stack(rows)


def _fitted(vectors: Tensor, place: Place, length: int) -> Tensor:
    """Vectors for the tokens of a place; those at `length` or later are not read."""
    read = sum(position < length for position in place.positions)
    if len(vectors) == len(place.positions):
        return vectors[:read]
    if not len(vectors):
        return vectors.new_zeros(read, vectors.shape[1])
    wide = torch.promote_types(vectors.dtype, torch.float32)
    return vectors.to(wide).mean(0).to(vectors.dtype).expand(read, -1)


def held_positions(group: PathGroup, features: Features, kept: Tensor, length: int) -> Tensor:
    """Positions that are present along the whole path, bool ``(n, length)``.

    Args:
        group: The path's target tokens.
        features: Of the row.
        kept: Bool ``(n, n_prompt)``: features of the prompt that the user holds.
        length: Of the row.
    """
    owners = features.owners(length)
    every = torch.ones(len(kept), 1, dtype=torch.bool, device="cpu")
    output = torch.zeros(
        len(kept), features.n_features - features.n_prompt, dtype=torch.bool, device="cpu"
    )
    held = torch.cat([kept, output, every], dim=1)[:, owners]
    held[:, [p for place in group.held if (p := features.start + place) < length]] = True
    return held
