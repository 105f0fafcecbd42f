"""Causes by parts of the answer and parts of the text, as a reader needs them.

Causes come in two blocks, those in the prompt and those in the answer so far. The tokens of an
answer are caused mostly by the ones before them: in a single list, the prompt would not appear.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from captum_llm_ext.base.terminal import one_line
from captum_llm_ext.result.causes import Cause, joined_name
from captum_llm_ext.result.levels import answer_levels, coarsest, prompt_level, prompt_levels
from captum_llm_ext.result.refit import jackknife_error
from captum_llm_ext.result.token_names import is_fragmented, numbered_where_alike
from captum_llm_ext.text.segment import shorten

if TYPE_CHECKING:
    from captum_llm_ext.result.numbers import ResultNumbers

_QUOTED = 40  # characters of a part's text in its name; chosen, not measured
_NAMED = ("passage", "part", "example")  # levels whose parts have names of their own
_NAME = 24  # characters up to which a text serves as a name; chosen, not measured
TOKEN, WORD = "token", "word"
CERTAIN = 1.96  # standard errors of a difference: 95 %


@dataclass(frozen=True)
class Parts:
    """The parts of one block.

    Attributes:
        level: ``"paragraph"``, ``"word"``…
        names: Unique names of the parts.
        texts: Texts of the parts.
        part_of: Index of the part of each column of `full_attr`, -1 for none.
    """

    level: str
    names: list[str]
    texts: list[str]
    part_of: list[int]

    def errors(self, replicates: Tensor | None, token_errors: Tensor) -> Tensor:
        """Standard errors of the parts, summed over tokens, ``(n_parts,)``; NaN where unknown.

        Args:
            replicates: ``(n_replicates, P + G)``, as returned by
                `GenerationAttributionResult.replicates`; without them, errors of tokens are summed,
                which is an upper bound, and columns of a part count as independent.
            token_errors: ``(n_tokens, P + G)``.
        """
        bound = _by_part(token_errors.sum(0).square(), self).sqrt()
        if replicates is None:
            return bound
        # Replicates omit interactions, which makes their errors larger.
        return torch.minimum(jackknife_error(_by_part(replicates, self)).to(bound), bound)


class Row(NamedTuple):
    """A part of the answer, from token `start` up to `stop`, and its causes."""

    name: str
    start: int
    stop: int


class Blocks(NamedTuple):
    """Causes in the prompt and in the answer so far, each by decreasing magnitude without zeros."""

    prompt: list[Cause]
    answer: list[Cause]


class Reading:
    """A result, read by parts of the prompt and of the answer.

    Args:
        result: The result.
        level: Level of the prompt; None: the coarsest with at least two parts.
        unit: Unit of the answer: ``"token"``, ``"word"``, ``"sentence"``…; None: words if tokens
            are fragments of them, otherwise tokens.

    Attributes:
        prompt, answer: Parts of each side.
        rows: The parts of the answer, in order.
        whole: Attributions of the whole answer at the prompt's level, if there are any.

    Raises:
        ValueError: If there is no such level or unit.
    """

    def __init__(
        self,
        result: "ResultNumbers",
        level: str | None = None,
        unit: str | None = None,
    ) -> None:
        self._result = result
        self.prompt = _prompt_parts(result, level or first_level(result))
        self.rows = _rows(result, unit or row_unit(result))
        self.answer = _answer_parts(result, unit or row_unit(result), self.rows)
        found = result.answer
        self.whole = None if found is None or found.level != self.prompt.level else found

    def causes(self, start: int, stop: int, *, precise: bool = False) -> Blocks:
        """The causes of some target tokens.

        Args:
            start, stop: The span; `stop` is exclusive.
            precise: Whether standard errors of sums are computed by a jackknife, which takes tenths
                of a second. Otherwise errors of tokens are summed, which is an upper bound, and
                columns of a part count as independent.

        Returns:
            Of the whole answer, the prompt's attributions are those of `whole` where known; all
            others are sums over tokens of what led to each directly.
        """
        prompt, answer = (
            self._block(parts, start, stop, precise) for parts in (self.prompt, self.answer)
        )
        return Blocks(prompt, answer)

    def _block(self, parts: Parts, start: int, stop: int, precise: bool) -> list[Cause]:
        result = self._result
        whole = self.whole if parts is self.prompt and self._is_whole(start, stop) else None
        if whole is None:
            values = _by_part(result.full_attr[start:stop].sum(0), parts)
            errors = self._errors(parts, start, stop, precise)
        else:
            of = [whole.part_of[parts.part_of.index(i)] for i in range(len(parts.names))]
            values, errors = whole.attributions[of], whole.standard_errors[of]
        own = self._own_parts(parts, start, stop)
        order = values.abs().argsort(descending=True, stable=True).tolist()
        floor = result.noise_floor
        noise = 0.0 if floor is None else float(floor[start:stop].square().sum().sqrt())
        n_prompt = len(result.input_tokens)
        bar = result.marked_beyond
        found: list[Cause] = []
        for i in order:
            value, error = float(values[i]), float(errors[i])
            if value == 0 or i in own:
                continue
            column = parts.part_of.index(i)
            is_significant = abs(value) >= bar * error and abs(value) > noise  # false for NaN
            cause = Cause(
                parts.texts[i], value, error, column, column >= n_prompt, result.is_unsigned
            )
            found.append(cause._replace(label=parts.names[i], is_marked=is_significant))
        return found

    def _own_parts(self, parts: Parts, start: int, stop: int) -> set[int]:
        """Indices of the answer's parts within the span itself."""
        if parts is not self.answer or self._is_whole(start, stop):
            return set()
        return {i for i, row in enumerate(self.rows) if start <= row.start and row.stop <= stop}

    def _is_whole(self, start: int, stop: int) -> bool:
        return (start, stop) == (0, len(self._result.output_tokens))

    def _errors(self, parts: Parts, start: int, stop: int, precise: bool) -> Tensor:
        errors = self._result.full_attr_se[start:stop]
        columns = sum(part >= 0 for part in parts.part_of)
        if not precise or (len(errors) == 1 and columns == len(parts.names)):
            return parts.errors(None, errors)
        replicates = self.replicates(start, stop)
        if replicates is not None and columns == len(parts.names):
            # Parts of one column each have the errors of a span, as everywhere else.
            return _by_part(self._result.attribute_span(start, stop).standard_errors, parts)
        return parts.errors(replicates, errors)

    def difference_error(self, start: int, stop: int, one: Cause, other: Cause) -> float:
        """The standard error of the difference in magnitude of two causes.

        0 if both are exact, NaN if unknown; if the covariance is unknown, the sum of both, an upper
        bound.
        """
        if not one.standard_error + other.standard_error > 0:
            return one.standard_error + other.standard_error
        is_apart = self.whole is not None and self._is_whole(start, stop)
        replicates = None if is_apart else self.replicates(start, stop)
        if replicates is None:
            return one.standard_error + other.standard_error
        values: list[Tensor] = []
        for cause in (one, other):
            parts = self.answer if cause.is_output else self.prompt
            sign = 1 if cause.attribution > 0 else -1
            values.append(sign * _by_part(replicates, parts)[:, parts.part_of[cause.column]])
        found = float(jackknife_error(values[0] - values[1]))
        return min(found, one.standard_error + other.standard_error)

    def is_stronger(self, start: int, stop: int, one: Cause, other: Cause) -> bool:
        """Whether one cause is larger in magnitude, at 95 % confidence."""
        apart = abs(one.attribution) - abs(other.attribution)
        return apart > CERTAIN * self.difference_error(start, stop, one, other)  # false for NaN

    def replicates(self, start: int, stop: int) -> Tensor | None:
        """Jackknife replicates of a span's attributions, ``(n_replicates, n_columns)``."""
        return self._result.replicates(start, stop)


def page_parts(result: "ResultNumbers") -> list[tuple[str, str, Parts]]:
    """Side, level and parts of all levels above the finest at which a page can be read."""
    prompt = [
        ("prompt", level["name"], _prompt_parts(result, level["name"]))
        for level in prompt_levels(result)
    ]
    if not result.output_features:
        return prompt
    names = [level["name"] for level in answer_levels(result)]
    return prompt + [
        ("answer", name, _answer_parts(result, name, _rows(result, name))) for name in names
    ]


def leading(causes: Sequence[Cause]) -> list[Cause]:
    """The two causes to mention first: significant ones, then the strongest."""
    return sorted(causes, key=lambda cause: not cause.is_marked)[:2]


def first_level(result: "ResultNumbers") -> str:
    """The coarsest level with at least two parts, at which an answer is shown first."""
    level = coarsest(prompt_levels(result))
    return finest_level(result) if level is None else level["name"]


def finest_level(result: "ResultNumbers") -> str:
    """The name of the features' own level."""
    return str(result.provenance.get("unit") or "finest")


def row_unit(result: "ResultNumbers") -> str:
    """Words, if some consist of several tokens and values add up; otherwise tokens."""
    if result.provenance.get("attr_target") == "prob":
        return TOKEN
    names = [level["name"] for level in answer_levels(result)]
    texts = [piece.text for piece in result.output_pieces]
    return WORD if WORD in names and is_fragmented(texts) else TOKEN


def adds_up(result: "ResultNumbers") -> bool:
    """Whether sums of attributions over several tokens have a meaning."""
    return len(result.output_tokens) == 1 or result.provenance.get("attr_target") != "prob"


def quoted(text: str, most: int = _QUOTED) -> str:
    """The beginning of a text, on one line, in quotation marks."""
    line = " ".join(text.split())
    return f"“{one_line(shorten(line, most))}”"


def part_names(level: str, texts: Sequence[str], within: Sequence[str] | None = None) -> list[str]:
    """Names of a level's parts: their texts if short, otherwise ``paragraph 4 “Lake …”``.

    Args:
        level: The level.
        texts: The texts of its parts.
        within: Names of the larger parts that contain them: ``lakes.txt: sentence 4 “Lake …”``.
    """
    lines = [one_line(" ".join(text.split())) for text in texts]
    if level in (TOKEN, WORD) or all(len(text) <= _NAME for text in lines):
        return numbered_where_alike(
            [text or repr(raw) for text, raw in zip(lines, texts, strict=True)]
        )
    names = [f"{level} {i} {quoted(text)}" for i, text in enumerate(texts, start=1)]
    return names if within is None else [f"{w}: {n}" for w, n in zip(within, names, strict=True)]


def _prompt_parts(result: "ResultNumbers", level: str) -> Parts:
    n_output = len(result.output_features or ())
    texts, part_of = prompt_level(result, level)
    if level != finest_level(result):
        firsts = [part_of.index(part) for part in range(len(texts))]
        names = part_names(level, texts, _wholes(result, level, firsts))
        return Parts(level, names, texts, [*part_of, *[-1] * n_output])
    # Columns of one feature, such as captum's groups, are one cause.
    columns: dict[int, list[int]] = {}
    for column, feature in enumerate(result.column_features[: len(texts)]):
        columns.setdefault(feature, []).append(column)
    owners = [-1] * (len(texts) + n_output)
    for part, members in enumerate(columns.values()):
        owners[members[0]] = part
    names = [joined_name([result.names.prompt[c] for c in own]) for own in columns.values()]
    joined = [joined_name([texts[c] for c in own]) for own in columns.values()]
    if not all(len(name.strip()) <= _NAME for name in names):
        names = part_names(
            level, joined, _wholes(result, level, [own[0] for own in columns.values()])
        )
    return Parts(level, names, joined, owners)


def _wholes(result: "ResultNumbers", level: str, columns: Sequence[int]) -> list[str] | None:
    """The named passages or parts of the prompt that contain some columns; None if it has none."""
    for coarse in prompt_levels(result):
        names = [one_line(name.strip()) for name in coarse["parts"]]
        if coarse["name"] == level:
            break
        if coarse["name"] in _NAMED and all(len(name) <= _NAME for name in names):
            return [names[coarse["part_of"][column]] for column in columns]
    return None


def _rows(result: "ResultNumbers", unit: str) -> list[Row]:
    names = result.names.tokens
    if unit == TOKEN:
        return [Row(name, t, t + 1) for t, name in enumerate(names)]
    levels = {level["name"]: level["part_of"] for level in answer_levels(result)}
    if unit not in levels:
        known = ", ".join(map(repr, [TOKEN, *levels]))
        raise ValueError(f"the answer has no {unit!r}: it can be read by {known}.")
    runs: list[list[int]] = []
    for t, part in enumerate(levels[unit]):
        if t and part == levels[unit][t - 1]:
            runs[-1][1] = t + 1
        else:
            runs.append([t, t + 1])
    texts = ["".join(p.text for p in result.output_pieces[a:b]).strip() for a, b in runs]
    texts = [
        text or " ".join(result.output_tokens[a:b])
        for text, (a, b) in zip(texts, runs, strict=True)
    ]
    return [Row(name, a, b) for name, (a, b) in zip(part_names(unit, texts), runs, strict=True)]


def _answer_parts(result: "ResultNumbers", unit: str, rows: Sequence[Row]) -> Parts:
    n_prompt, n_output = len(result.input_tokens), len(result.output_features or ())
    owners = [-1] * n_output
    pieces = [piece.feature for piece in result.output_pieces] or list(range(n_output))
    for i, row in enumerate(rows):
        for feature in pieces[row.start : row.stop]:
            if feature is not None and n_output:
                owners[feature] = i
    if len(set(owners)) < len(owners) or unit != TOKEN:
        names, texts = [row.name for row in rows], [row.name for row in rows]
    else:  # features of more than one token have unique names
        owners = list(range(n_output))
        names, texts = result.names.output, result.output_features or []
    return Parts(unit, names, list(texts), [*[-1] * n_prompt, *owners])


def _by_part(columns: Tensor, parts: Parts) -> Tensor:
    """Numbers per column summed by part, ``(..., n_parts)``."""
    kept = [column for column, part in enumerate(parts.part_of) if part >= 0]
    at = torch.tensor([parts.part_of[c] for c in kept], device=columns.device, dtype=torch.int64)
    sums = columns.new_zeros(*columns.shape[:-1], len(parts.names))
    return sums.index_add(-1, at, columns[..., kept])
