"""Coarser levels of a result's text: words, sentences, paragraphs, turns."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from captum_llm_ext.text.inputs import Level, Piece
from captum_llm_ext.text.segment import segment, shorten

_TEMPLATE = "template"
_UNITS = ("paragraph", "sentence", "word")  # units that readers know, from coarse to fine


def page_levels(result: Any) -> dict[str, Any]:
    """Levels, and standard errors of their sums, as a page gets them beside ``to_dict()``.

    Returns:
        ``levels``: the result's, and words, sentences and paragraphs if features nest in them.
        ``output_levels``: the same for the target tokens. ``unresolved``: the columns of each group
        that was not split.
    """
    return {
        "levels": prompt_levels(result),
        "output_levels": answer_levels(result),
        "unresolved": [group.columns for group in result.unresolved],
    }


def prompt_level(result: Any, name: str) -> tuple[list[str], list[int]]:
    """One level of the prompt, by its name: the finest, or any that a page offers.

    Args:
        result: The result.
        name: The level's name: ``"word"``, ``"turn"``…

    Returns:
        The names of its parts, and the index of each column's part.

    Raises:
        ValueError: If there is no such level.
    """
    finest = str(result.provenance.get("unit") or "finest")
    levels = {level["name"]: (level["parts"], level["part_of"]) for level in prompt_levels(result)}
    levels[finest] = list(result.input_tokens), list(range(len(result.input_tokens)))
    if name not in levels:
        raise ValueError(
            f"there is no level {name!r}: the levels are {', '.join(map(repr, levels))}. A tuple "
            'of units, such as `unit=("sentence", "word")`, makes more.'
        )
    return levels[name]


def prompt_levels(result: Any) -> list[dict[str, Any]]:
    """Levels above the features themselves, from coarse to fine, as in `page_levels`."""
    n = len(result.input_tokens)
    # Results built from another package's numbers may have no coalitions.
    n_columns = result.masks.shape[1] if result.masks.ndim == 2 else n
    n_features = n_columns - len(result.output_features or ())
    unit = result.provenance.get("unit")
    return levels_of(result.levels, result.prompt_pieces, unit, n, n_features)


def levels_of(
    levels: Sequence[Level], pieces: Sequence[Piece], unit: str | None, n: int, n_features: int
) -> list[dict[str, Any]]:
    """Levels above the features of a prompt, from coarse to fine, as in `page_levels`.

    Args:
        levels: Those that the input has.
        pieces: The prompt's text, with the column of each piece.
        unit: Unit of the features.
        n: Number of columns.
        n_features: Number of features.
    """
    known = [
        {"name": level.name, "parts": level.parts, "part_of": level.part_of} for level in levels
    ]
    # If columns are copies of one feature's score, as in captum, sums would count it repeatedly.
    for name in () if 0 < n_features < n else _UNITS:
        if name == unit or any(level["name"] == name for level in known):
            continue
        found = _parts(pieces, name)
        part_of = _per_feature(pieces, found, n)
        if part_of is None or not _is_new(part_of, n, known):
            continue
        parts = [""] * (max(part_of) + 1)
        for piece, part in zip(pieces, found, strict=True):
            if piece.feature is not None and part is not None:
                parts[part_of[piece.feature]] += piece.text
        known.append(
            {"name": name, "parts": [shorten(part.strip()) for part in parts], "part_of": part_of}
        )
    return sorted(known, key=lambda level: len(level["parts"]))


def coarsest(levels: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The coarsest level with at least two parts, at which an answer is shown first.

    Args:
        levels: From coarse to fine, as in `page_levels`.

    Returns:
        One of them; None if that is the features themselves.
    """
    return next((level for level in levels if len(level["parts"]) > 1), None)


def answer_levels(result: Any) -> list[dict[str, Any]]:
    """Per level, from coarse to fine, the part of each target token: runs of tokens.

    The levels are words, sentences and paragraphs, and the unit of the output's features.
    """
    pieces = result.output_pieces
    known: list[dict[str, Any]] = []
    n_features = 1 + max((p.feature for p in pieces if p.feature is not None), default=-1)
    for name in _UNITS:
        part_of = _numbered(_parts(pieces, name))
        # A generated feature is a column of its own: one that spans two parts fits no level.
        if n_features and _per_feature(pieces, part_of, n_features) is None:
            continue
        roles = {
            part for piece, part in zip(pieces, part_of, strict=True) if not _is_template(piece)
        }
        same = [level for level in known if level["part_of"] == part_of]
        if same:  # a line of one sentence is called a sentence, and one of a single word a word
            same[0]["name"] = name
        elif len(roles) > 1 and _is_new(part_of, len(pieces), known):
            known.append({"name": name, "part_of": part_of})
    own = result.provenance.get("output_unit")
    part_of = _numbered([piece.feature for piece in pieces])
    if own and own not in _UNITS and _is_new(part_of, len(pieces), known):
        known.append({"name": own, "part_of": part_of})
    return sorted(known, key=lambda level: len(set(level["part_of"])))


def _is_template(piece: Piece) -> bool:
    return piece.role == _TEMPLATE


def _is_new(part_of: Sequence[int], n: int, known: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a level differs from the finest and from the known ones."""
    n_parts = len(set(part_of))
    return 1 < n_parts < n and all(level["part_of"] != part_of for level in known)


def _parts(pieces: Sequence[Piece], unit: str) -> list[int | None]:
    """The word, sentence, … of each piece; None if it spans several.

    Text of a template separates parts, each such piece by itself; a change of speaker also ends a
    part, even in templates without text between messages.
    """
    found: list[int | None] = []
    n = 0
    for role, run in groupby(pieces, key=lambda piece: piece.role):
        texts = [piece.text for piece in run]
        whole = "".join(texts)
        if role == _TEMPLATE or not whole.strip():
            found += range(n, n + len(texts))
            n += len(texts)
            continue
        spans = segment(whole, unit)
        starts = [start for start, _ in spans]
        position = 0
        for text in texts:
            # White space belongs to the following text, in spans as in pieces.
            first = position + (len(text) - len(text.lstrip()) if text.strip() else 0)
            last = position + max(len(text.rstrip()) - 1, 0)
            position += len(text)
            one, other = (max(bisect_right(starts, place) - 1, 0) for place in (first, last))
            found.append(n + one if one == other or not text.strip() else None)
        n += len(spans)
    return found


def _per_feature(pieces: Sequence[Piece], parts: Sequence[int | None], n: int) -> list[int] | None:
    """The part of each feature, from 0; None if a feature is in several, or in none."""
    part_of: dict[int, int] = {}
    for piece, part in zip(pieces, parts, strict=True):
        if piece.feature is None:
            continue
        if part is None or part_of.setdefault(piece.feature, part) != part:
            return None
    return _numbered([part_of[i] for i in range(n)]) if len(part_of) == n else None


def _numbered(parts: Sequence[int | None]) -> list[int]:
    """Parts renumbered from 0 in order of appearance; each None becomes a part of its own."""
    numbers: dict[object, int] = {}
    return [
        numbers.setdefault(("alone", i) if part is None else part, len(numbers))
        for i, part in enumerate(parts)
    ]
