"""Joint replacements: texts of one document for all slots of a feature."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Documents that are examined; more add nothing to a sample of joint texts. Chosen, not measured.
_MOST_DOCUMENTS = 20_000


@dataclass(frozen=True)
class Occurrences:
    """Occurrences in a corpus for one slot of a feature.

    Attributes:
        documents: Document index of each occurrence, shape ``(n_occurrences,)``.
        positions: Its position in the corpus, shape ``(n_occurrences,)``.
        texts: The texts.
    """

    documents: Tensor
    positions: Tensor
    texts: list[str]


def joint_occurrences(
    members: Sequence[Occurrences], generator: torch.Generator
) -> Counter[tuple[str, ...]]:
    """Texts for all slots that occur together in one document, and their counts.

    If a document has several for a slot (it is about several people), those nearest to each other
    belong together.

    Args:
        members: Occurrences, one per slot.
        generator: Samples documents if there are very many.

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
        anchor = min(here, key=len)  # each of the rarest has a counterpart, but not vice versa
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
