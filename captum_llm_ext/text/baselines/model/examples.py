"""Labels of solved examples in a prompt: a set of texts of which an absent label is one."""

from collections import Counter
from collections.abc import Iterator, Sequence

from captum_llm_ext.text.baselines.words import BREAK, SENTENCE_END, Atom, atoms, border, is_mark

Span = tuple[int, int]
_LONGEST = 3  # words of a label; chosen, not measured


def labels_of_examples(text: str) -> dict[Span, tuple[str, ...]]:
    """Places of labels in solved examples, with the labels that may stand there.

    Examples are lines with one cue ("->", "Sentiment:") before their last words, the labels;
    another line ends with the cue. It is the longest end of that line that several others have.
    Labels are a closed set if one of them recurs. A set without recurrence is open (capitals of
    countries), and so is one of a single label.
    """
    lines = [*_lines(atoms(text))]
    for asked in reversed(lines):
        labels = _labels(lines, asked)
        if labels:
            counts = Counter(text[slice(*span)] for span in labels)
            is_closed = 1 < len(counts) < len(labels)
            return dict.fromkeys(labels, tuple(counts)) if is_closed else {}
    return {}


def _lines(found: Sequence[Atom]) -> Iterator[list[Atom]]:
    line: list[Atom] = []
    for atom in found:
        if atom.text == BREAK:
            yield line
            line = []
        else:
            line.append(atom)
    yield line


def _labels(lines: Sequence[Sequence[Atom]], asked: Sequence[Atom]) -> list[Span]:
    """The labels of other lines, after the longest end of this one that at least two have."""
    if not asked or not is_mark(asked[-1].text) or border(asked[-1].text) >= SENTENCE_END:
        return []
    for n in range(len(asked), 0, -1):
        cue = [atom.text for atom in asked[-n:]]
        found = [span for line in lines if (span := _label(line, cue)) is not None]
        if len(found) > 1:
            return found
    return []


def _label(line: Sequence[Atom], cue: Sequence[str]) -> Span | None:
    """The words between the cue and the end of a line, without the end of a sentence."""
    stop = len(line)
    while stop and border(line[stop - 1].text) >= SENTENCE_END:
        stop -= 1
    start = stop
    while start and not is_mark(line[start - 1].text):
        start -= 1
    has_cue = [atom.text for atom in line[max(start - len(cue), 0) : start]] == list(cue)
    return (
        (line[start].start, line[stop - 1].stop)
        if 0 < stop - start <= _LONGEST and has_cue
        else None
    )
