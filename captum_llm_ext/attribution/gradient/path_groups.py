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
    """Target tokens that are explained along one path.

    Attributes:
        targets: Indices of the target tokens.
        held: Target positions that are present along the whole path: fixed text, and the tokens
            already generated of the current word.
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
    n_backward: Callable[[list[int]], float] = len,
) -> list[PathGroup]:
    """The paths that explain every target token by the features before it, longest first.

    The tokens already generated of a word stay present while its remaining tokens are explained,
    which therefore need a path of their own. If features are single tokens, or there are none, one
    path suffices.

    Args:
        generated: The target as features.
        n_before: Token ids before it.
        apart: Whether tokens of one path get separate passes: ``"never"``, ``"always"`` (for models
            that see ahead), or ``"cheapest"``: early tokens then need no forward and backward pass
            over all later ones.
        chosen: Indices of the explained target tokens.
        n_backward: Number of backward passes for these target tokens: by default one each.
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
            blocks = _blocks(members, n_before, n_backward) if apart == "cheapest" else [members]
        found += [PathGroup(tuple(block), frozenset(held)) for block in blocks]
    return sorted(found, key=lambda group: -group.n_read)


def _blocks(
    targets: list[int], n_before: int, n_backward: Callable[[list[int]], float]
) -> list[list[int]]:
    """Splits targets into blocks of the lowest total cost, counted in passes."""

    def cost(blocks: list[list[int]]) -> float:
        return sum((n_before + block[-1]) * (1 + n_backward(block)) for block in blocks)

    sizes = {-(-len(targets) // n) for n in range(1, len(targets) + 1)}
    cuts = [[targets[i : i + n] for i in range(0, len(targets), n)] for n in sorted(sizes)]
    return min(cuts, key=lambda blocks: (cost(blocks), len(blocks)))


@dataclass(frozen=True)
class Features:
    """The features of prompt and target in one row of token ids.

    Attributes:
        places: Their positions; target features are numbered after the prompt's.
        draws: Replacement ids per draw and place; an empty one stands for the zero vector.
        n_prompt: Number of prompt features.
        n_features: Number of all features.
        start: Number of token ids before the target.
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
        prompt: The prompt.
        n_ids: Number of its token ids.
        generated: The target.
        n_draws: Draws of random baselines.
        absent: ``"zero"``: use the zero vector instead of the baselines.
        seed: Seeds all draws.

    Raises:
        TypeError: If the prompt does not define which tokens belong to its features.
    """
    places = prompt.places()
    later = [
        Place(tuple(n_ids + p for p in place.positions), prompt.n_features + place.feature)
        for place in generated.places()
    ]
    draws: list[list[tuple[int, ...]]] = [[()] * (len(places) + len(later))] * n_draws
    if absent == "baseline":
        generator = torch.Generator().manual_seed(seed)
        both = (
            prompt.replacement_ids(n_draws, generator),
            generated.replacement_ids(n_draws, generator),
        )
        draws = [[*before, *after] for before, after in zip(*both, strict=True)]
    n_features = prompt.n_features + generated.n_features
    return Features([*places, *later], draws, prompt.n_features, n_features, n_ids)


def absent_embeddings(
    embedding: nn.Module, present: Tensor, features: Features, model: nn.Module
) -> Tensor:
    """Embeddings of the row with every feature absent.

    A replacement with as many tokens as the feature is used token by token; of another length, its
    mean is used at each of the feature's positions; if empty, the zero vector.

    Args:
        embedding: Maps ids to vectors.
        present: Embeddings of the row with everything present, ``(1, length, size)``.
        features: The features of that row.
        model: The model, for the size of its vocabulary.

    Returns:
        Shape ``(n_draws, length, size)``; fixed text as in `present`.

    Raises:
        ValueError: If a replacement has an id outside the vocabulary.
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
    """Vectors fitted to the tokens of a place; tokens at `length` or later are not read."""
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
        group: The target tokens of the path.
        features: The features of the row.
        kept: Prompt features that the user keeps present, bool ``(n, n_prompt)``.
        length: Length of the row.
    """
    owners = features.owners(length)
    every = torch.ones(len(kept), 1, dtype=torch.bool, device="cpu")
    output = torch.zeros(
        len(kept), features.n_features - features.n_prompt, dtype=torch.bool, device="cpu"
    )
    held = torch.cat([kept, output, every], dim=1)[:, owners]
    held[:, [p for place in group.held if (p := features.start + place) < length]] = True
    return held
