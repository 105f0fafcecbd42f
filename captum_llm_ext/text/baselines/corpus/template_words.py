"""Separates the template words of a corpus from fillers, which could be replaced by others.

"Dave lives in Palm Coast and is a lawyer." A *template* word ("lives", "in") is predictable from
its two neighbours, or occurs in every document ("City:" in forms whose lines come in any order); a
*filler* ("Dave", "lawyer") does neither. Surroundings are compared by their template words only:
the content of neighbouring slots must not affect the candidates of this one, otherwise the
replacement would inherit the very facts whose influence is to be measured.

Grouping words by common neighbours is the idea of frequent frames (Mintz 2003, Cognition 90);
separating slots from frames by it comes from distributional grammar induction (van Zaanen 2000,
COLING).
"""

import torch
from torch import Tensor

# Minimum average predictability of a template word. With four equally likely paraphrases each has
# it. With .1, shares of right draws in three invented languages (300 texts) are the same; with .4,
# those of generated words fall from 1 to .938 and of connecting words from .867 to .833 in one. The
# other limits are not varied one by one (half or twice MIN_COUNT changes nothing there); what they
# do together is in benchmarks/results/unseen.json and corpus_index.json.
EXPECTED = 0.2
# ... if at least this share of gaps between the same neighbours contains a predictable word.
WORDED = 0.5
# Template words whose neighbours agree this well (Bhattacharyya coefficient, 1 is equality) are
# interchangeable.
KINSHIP = 0.75
# ... unless they occur together in more than this share of the passages of the rarer one.
TOGETHER = 0.15
MIN_COUNT = 8  # occurrences that a template word has at least
# A word is regular if the variance of its count per passage is at most this share of the Poisson
# variance.
REGULAR = 0.6
MIN_PASSAGES = 50  # passages from which on regularity is judged
_ROUNDS = 8  # of a fixed point that few reach later
_MAX_TEMPLATE_WORDS = 1_500  # template words compared pairwise, for memory
_MAX_PASSAGES = 4_000  # passages in which they are counted together, for memory


def context_classes(words: Tensor, kinds: Tensor, marks: Tensor, passages: Tensor) -> Tensor:
    """The context class of each word of the vocabulary.

    A filler's class is its kind; a template word's is itself or its family: template words between
    the same neighbours, but not in the same passage ("His" and "Her"; "lives" and "resides").

    Args:
        words: The corpus as vocabulary indices, shape ``(n_atoms,)``.
        kinds: The kind of each word of the vocabulary, from 0, shape ``(n_words,)``.
        marks: Which words are punctuation between clauses: always template words, each its own
            class. Shape ``(n_words,)``.
        passages: Passage of each atom, ascending: a document, or a line if documents are long.
            Shape ``(n_atoms,)``.

    Returns:
        Shape ``(n_words,)``, int64. Kinds keep their indices; all other classes lie above them.
    """
    words = words.long()
    n_kinds, n_words = int(kinds.max()) + 1, len(kinds)
    own = n_kinds + torch.arange(n_words, device="cpu")
    counts = torch.bincount(words, minlength=n_words)
    is_template = marks | (_regular(words, passages, n_words) & (counts >= MIN_COUNT))
    # From coarse to fine: if "Palm" were a template word at first, "Coast" would be predictable
    # after it.
    for _ in range(_ROUNDS):
        grown = is_template | (
            (_expectedness(words, is_template, counts) >= EXPECTED) & (counts >= MIN_COUNT)
        )
        if torch.equal(grown, is_template):
            break
        is_template = grown
    classes = torch.where(is_template, own, kinds)
    return _merge_similar_classes(words, classes, is_template & ~marks, counts, passages)


def _regular(words: Tensor, passages: Tensor, n_words: int) -> Tensor:
    """Which words occur equally often in all passages.

    Those whose count per passage varies much less than by chance (variance equal to the mean): the
    keys of forms, and words of sentences in any order, which have no fixed neighbours.
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


def _expectedness(words: Tensor, is_template: Tensor, counts: Tensor) -> Tensor:
    """The average probability of each filler in the gaps where it occurs.

    A gap is the text between two template words; gaps between the same two are compared. Every
    occurrence is judged by the other ones only, so a gap seen once predicts nothing.

    Each of several paraphrases contains predictable words. If most comparable gaps contain none,
    the gap is a slot, and a predictable word is one that several phrases share ("Salt Lake City",
    "Kansas City"): it is a filler like the others.
    """
    n_words = len(counts)
    fixed = is_template[words]
    edges = words[fixed]
    alike = (edges[:-1] * n_words + edges[1:]).unique(return_inverse=True)[1]
    gap = fixed.cumsum(0) - 1
    inside = ~fixed & (gap >= 0) & (gap < len(alike))
    if not inside.any():
        return torch.zeros(n_words, dtype=torch.float64, device="cpu")
    n_gaps = torch.bincount(alike[gap[inside].unique()])
    # A word repeated in one gap counts once.
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
    words: Tensor, classes: Tensor, is_template: Tensor, counts: Tensor, passages: Tensor
) -> Tensor:
    order = counts.where(is_template, -1).argsort(descending=True, stable=True)
    template_words = order[: min(int(is_template.sum()), _MAX_TEMPLATE_WORDS)]
    left, right = _neighbours(words, classes, template_words)
    alike = torch.minimum(left @ left.T, right @ right.T)
    together = _cooccurrence(words, template_words, passages)
    interchangeable = (alike >= KINSHIP) & (together <= TOGETHER)
    classes = classes.clone()
    families: list[list[int]] = []
    family_of: list[int] = []
    for i in range(len(template_words)):
        near = set(interchangeable[i, :i].nonzero()[:, 0].tolist())
        # Frequent words come first. A word joins a family if it is interchangeable with every
        # member.
        fitting = [f for f in sorted({family_of[j] for j in near}) if near.issuperset(families[f])]
        if not fitting:
            family_of.append(len(families))
            families.append([i])
            continue
        heads = [families[f][0] for f in fitting]
        closest = fitting[int(alike[i, heads].argmax())]
        family_of.append(closest)
        families[closest].append(i)
        classes[template_words[i]] = classes[template_words[families[closest][0]]]
    return classes


def _neighbours(words: Tensor, classes: Tensor, template_words: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of the distributions of what precedes and follows each template word."""
    row_of = torch.full((len(classes),), -1, dtype=torch.int64, device="cpu").index_put(
        (template_words,), torch.arange(len(template_words), device="cpu")
    )
    found, around = classes[words].unique(return_inverse=True)
    sides: list[Tensor] = []
    for mid, near in ((words[1:], around[:-1]), (words[:-1], around[1:])):
        row = row_of[mid]
        cells = (row * len(found) + near)[row >= 0]
        table = torch.bincount(cells, minlength=len(template_words) * len(found)).float()
        table = table.view(len(template_words), len(found))
        sides.append((table / table.sum(1, keepdim=True).clamp(min=1)).sqrt())
    return sides[0], sides[1]


def _cooccurrence(words: Tensor, template_words: Tensor, passages: Tensor) -> Tensor:
    """In which share of the passages of the rarer of two template words the other occurs too."""
    row = passages.unique_consecutive(return_inverse=True)[1]
    rows, columns = row[row < _MAX_PASSAGES], words[row < _MAX_PASSAGES]
    table = torch.zeros(_MAX_PASSAGES, len(template_words), dtype=torch.float32, device="cpu")
    for column, word in enumerate(template_words.tolist()):
        table[rows[columns == word], column] = 1
    both = table.T @ table
    each = both.diagonal()
    return both / torch.minimum(each[:, None], each[None]).clamp(min=1)
