"""Joint replacements: what one document of a corpus has for all places of a feature."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Documents that are looked at; more of them add nothing to a sample of what goes together.
_MOST_DOCUMENTS = 20_000


@dataclass(frozen=True)
class Occurrences:
    """Where a corpus has something for one place of a feature.

    Attributes:
        documents: The document each occurrence is in, shape ``(n_occurrences,)``.
        positions: Where it stands in the corpus, shape ``(n_occurrences,)``.
        texts: What stands there.
    """

    documents: Tensor
    positions: Tensor
    texts: list[str]


def joint_occurrences(
    members: Sequence[Occurrences], generator: torch.Generator
) -> Counter[tuple[str, ...]]:
    """Texts for all places that stand together in one document, and how often they do.

    Where a document has several for a place (it tells of several people), those nearest to one
    another belong together.

    Args:
        members: One per place.
        generator: Chooses the documents if there are very many.

    Returns:
        Tuples with one text per member.
    """
    shared = members[0].documents.unique()
    for member in members[1:]:
        shared = shared[torch.isin(shared, member.documents)]
    if len(shared) > _MOST_DOCUMENTS:
        shared = shared[
            torch.randperm(len(shared), generator=generator, device="cpu")[:_MOST_DOCUMENTS]
        ]
    per_document = [_by_document(member, shared) for member in members]
    found: Counter[tuple[str, ...]] = Counter()
    for document in shared.tolist():
        here = [places[document] for places in per_document]
        anchor = min(here, key=len)  # each of the rarest has a counterpart; not the other way round
        for position, _ in anchor:
            nearest = [min(own, key=lambda place: abs(place[0] - position)) for own in here]
            found[tuple(text for _, text in nearest)] += 1
    return found


def _by_document(member: Occurrences, shared: Tensor) -> dict[int, list[tuple[int, str]]]:
    """Per document the position and text of every occurrence."""
    inside = torch.isin(member.documents, shared).nonzero()[:, 0]
    places: dict[int, list[tuple[int, str]]] = {}
    for number, document, position in zip(
        inside.tolist(),
        member.documents[inside].tolist(),
        member.positions[inside].tolist(),
        strict=True,
    ):
        places.setdefault(document, []).append((position, member.texts[number]))
    return places
