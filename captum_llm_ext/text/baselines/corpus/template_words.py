"""Which words of a corpus are its frame, and which are fillers that could as well be others.

"Dave lives in Palm Coast and is a lawyer." A *frame* word ("lives", "in") is what its two
neighbours lead one to expect, or what every document has ("City:" in forms whose lines come in any
order); a *filler* ("Dave", "lawyer") is neither. Surroundings are compared by
their frame words alone: what stands in the neighbouring slots must not decide what may stand in
this one, or the replacement would inherit the very facts whose influence is asked for.

The idea that words are kin if they stand between the same neighbours is that of frequent frames
(Mintz 2003, Cognition 90); that of telling slots from frames by it is distributional grammar
induction's (van Zaanen 2000, COLING).
"""

import torch
from torch import Tensor

# A frame word is at least this expected on average. Among four equally likely paraphrases each is.
EXPECTED = 0.2
# ... where at least so many of the gaps alike hold a word that is.
WORDED = 0.5
# Frame words whose neighbours agree this well (Bhattacharyya coefficient, 1 is equality) are kin.
KINSHIP = 0.75
# ... unless they occur together in more than this share of the passages where the rarer one occurs.
TOGETHER = 0.15
MIN_COUNT = 8
# A word is regular if its number per passage has at most this share of the variance of chance.
REGULAR = 0.6
MIN_PASSAGES = 50
_ROUNDS = 8
_MAX_FRAMES = 1_500
_MAX_PASSAGES = 4_000


def context_classes(words: Tensor, kinds: Tensor, marks: Tensor, passages: Tensor) -> Tensor:
    """The class under which each word of the vocabulary counts as context.

    A filler counts as its kind, a frame word as itself or as the set of its kin: other frame words
    between the same neighbours, never in the same passage ("His" and "Her"; "lives" and "resides").

    Args:
        words: The corpus as vocabulary numbers, shape ``(n_atoms,)``.
        kinds: The kind of each word of the vocabulary, from 0, shape ``(n_words,)``.
        marks: Which words are punctuation between clauses: always frame, each its own
            class. Shape ``(n_words,)``.
        passages: The passage each atom is of, ascending: a document, or a line if documents are
            long. Shape ``(n_atoms,)``.

    Returns:
        Shape ``(n_words,)``, int64. Kinds keep their numbers; all other classes lie above them.
    """
    words = words.long()
    n_kinds, n_words = int(kinds.max()) + 1, len(kinds)
    own = n_kinds + torch.arange(n_words, device="cpu")
    counts = torch.bincount(words, minlength=n_words)
    frame = marks | (_regular(words, passages, n_words) & (counts >= MIN_COUNT))
    # From coarse to fine: were "Palm" frame at first, "Coast" would be expected after it.
    for _ in range(_ROUNDS):
        grown = frame | ((_expectedness(words, frame, counts) >= EXPECTED) & (counts >= MIN_COUNT))
        if torch.equal(grown, frame):
            break
        frame = grown
    classes = torch.where(frame, own, kinds)
    return _merge_similar_classes(words, classes, frame & ~marks, counts, passages)


def _regular(words: Tensor, passages: Tensor, n_words: int) -> Tensor:
    """Which words occur as often in one passage as in the other.

    Those whose number per passage varies much less than by chance, where the variance would be the
    mean: the keys of forms, and words of sentences that may stand anywhere and have no neighbours
    of their own.
    """
    passages = passages.unique_consecutive(return_inverse=True)[1]
    n_passages = int(passages[-1]) + 1
    if n_passages < MIN_PASSAGES:
        return torch.zeros(n_words, dtype=torch.bool, device="cpu")
    cells, counts = (passages * n_words + words).unique(return_counts=True)
    moments = torch.zeros(2, n_words, dtype=torch.float64, device="cpu")
    moments.index_add_(1, cells % n_words, torch.stack([counts, counts**2]).double())
    mean, square = moments / n_passages
    return square - mean**2 <= REGULAR * mean


def _expectedness(words: Tensor, frame: Tensor, counts: Tensor) -> Tensor:
    """How probable each filler is in the gaps where it stands, on average.

    A gap is what stands between two frame words; gaps between the same two are alike. Every
    occurrence is judged by the others alone, so that a gap seen once expects nothing.

    Whichever of several wordings there is, it has expected words. Where most gaps alike have none,
    it is a slot, and an expected word one that several phrases share: "Salt Lake City", "Kansas
    City". That word is a filler like the others.
    """
    n_words = len(counts)
    fixed = frame[words]
    edges = words[fixed]
    alike = (edges[:-1] * n_words + edges[1:]).unique(return_inverse=True)[1]
    gap = fixed.cumsum(0) - 1
    inside = ~fixed & (gap >= 0) & (gap < len(alike))
    if not inside.any():
        return torch.zeros(n_words, dtype=torch.float64, device="cpu")
    n_gaps = torch.bincount(alike[gap[inside].unique()])
    # A word twice in one gap counts once.
    found = (gap[inside] * n_words + words[inside]).unique()
    place, word = alike[found // n_words], found % n_words
    pairs, n_pair = (place * n_words + word).unique(return_counts=True)
    others = (n_gaps[pairs // n_words] - 1).clamp(min=1)
    likely = (n_pair * (n_pair - 1)).double() / others
    some = (n_pair - 1 >= EXPECTED * others.double())[
        torch.searchsorted(pairs, place * n_words + word)
    ]
    worded = torch.bincount(alike[(found // n_words)[some].unique()], minlength=len(n_gaps))
    usual = (worded >= WORDED * n_gaps.double())[pairs // n_words]
    mass = torch.zeros(n_words, dtype=torch.float64, device="cpu")
    mass.index_add_(0, pairs % n_words, likely.where(usual, 0))
    return mass / counts.clamp(min=1)


def _merge_similar_classes(
    words: Tensor, classes: Tensor, frame: Tensor, counts: Tensor, passages: Tensor
) -> Tensor:
    order = counts.where(frame, -1).argsort(descending=True, stable=True)
    frames = order[: min(int(frame.sum()), _MAX_FRAMES)]
    left, right = _neighbours(words, classes, frames)
    alike = torch.minimum(left @ left.T, right @ right.T)
    together = _cooccurrence(words, frames, passages)
    kin = (alike >= KINSHIP) & (together <= TOGETHER)
    classes = classes.clone()
    families: list[list[int]] = []
    family_of: list[int] = []
    for i in range(len(frames)):
        near = set(kin[i, :i].nonzero()[:, 0].tolist())
        # Frequent words come first. A family is joined by who is kin of every member.
        fitting = [f for f in sorted({family_of[j] for j in near}) if near.issuperset(families[f])]
        if not fitting:
            family_of.append(len(families))
            families.append([i])
            continue
        heads = [families[f][0] for f in fitting]
        closest = fitting[int(alike[i, heads].argmax())]
        family_of.append(closest)
        families[closest].append(i)
        classes[frames[i]] = classes[frames[families[closest][0]]]
    return classes


def _neighbours(words: Tensor, classes: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Roots of the distributions of what stands before and after each frame word."""
    row_of = torch.full((len(classes),), -1, dtype=torch.int64, device="cpu").index_put(
        (frames,), torch.arange(len(frames), device="cpu")
    )
    found, around = classes[words].unique(return_inverse=True)
    sides: list[Tensor] = []
    for mid, near in ((words[1:], around[:-1]), (words[:-1], around[1:])):
        row = row_of[mid]
        cells = (row * len(found) + near)[row >= 0]
        table = torch.bincount(cells, minlength=len(frames) * len(found)).float()
        table = table.view(len(frames), len(found))
        sides.append((table / table.sum(1, keepdim=True).clamp(min=1)).sqrt())
    return sides[0], sides[1]


def _cooccurrence(words: Tensor, frames: Tensor, passages: Tensor) -> Tensor:
    """In which share of the passages with the rarer of two frame words the other occurs too."""
    row = passages.unique_consecutive(return_inverse=True)[1]
    rows, columns = row[row < _MAX_PASSAGES], words[row < _MAX_PASSAGES]
    table = torch.zeros(_MAX_PASSAGES, len(frames), dtype=torch.float32, device="cpu")
    for column, word in enumerate(frames.tolist()):
        table[rows[columns == word], column] = 1
    both = table.T @ table
    each = both.diagonal()
    return both / torch.minimum(each[:, None], each[None]).clamp(min=1)
