"""A result as text: the strongest causes of every part of the answer, and remarks."""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from captum_llm_ext.base.terminal import columns, one_line, shortened
from captum_llm_ext.result.about import header
from captum_llm_ext.result.causes import Cause, unit_of
from captum_llm_ext.result.foils import list_foils
from captum_llm_ext.result.reading import Reading, adds_up, finest_level
from captum_llm_ext.text.segment import shorten

if TYPE_CHECKING:
    from torch import Tensor

    from captum_llm_ext.result.numbers import ResultNumbers

    Paint = Callable[[str, str], str]

_MOST_REMARKS = 3
_LONGEST_NAME = 24
_ARROW = "  ←  "
_SO_FAR = "so far: "
_BETWEEN = " | "
_LEAST_ROOM = 20  # minimum width for causes, even if lines exceed the terminal; chosen
_ROOM_FOR_TWO = 50  # width below which a line shows only the stronger block; chosen
_LEAST_SHOWN = 0.005  # smaller attributions are shown as 0
_NOTHING = "nothing in particular"
_WHOLE, _DIRECT = "whole answer", "whole answer, direct effects"
_TELLING = 0.01  # attributions below this share of their block's largest are left out; chosen


def table(
    result: "ResultNumbers",
    k: int,
    paint: "Paint | None",
    width: int | None,
    unit: str | None = None,
) -> str:
    """See `GenerationAttributionResult.table`."""
    if k < 1:
        raise ValueError(f"`k` is {k}: give the number of causes, at least 1.")
    show = paint or _plain
    read = Reading(result, finest_level(result), unit)
    lines = _wrapped([" · ".join(header(result))], width)
    lines += _wrapped([summary_line(result, k, show if width is None else _plain)], width)
    if result.output_features and len(read.rows) > 1:
        heading = (
            f"{read.answer.level}{_ARROW}in the prompt{_BETWEEN}{_SO_FAR}in the answer before it"
        )
        lines += ["", *(show(line, "nothing") for line in _wrapped([heading], width))]
    else:
        lines.append("")
    names = [shortened(one_line(row.name), _LONGEST_NAME) for row in read.rows]
    longest = max(map(columns, names))
    room = None if width is None else max(width - longest - len(_ARROW), _LEAST_ROOM)
    least = [_TELLING * _largest(attr) for attr in (result.token_attr, result.output_attr)]
    for name, row in zip(names, read.rows, strict=True):
        blocks = [
            [cause for cause in block[:k] if _is_shown(cause) and abs(cause.attribution) >= floor]
            for block, floor in zip(read.causes(row.start, row.stop), least, strict=True)
        ]
        text, used = _row(blocks, room, show)
        foils = list_foils(result, row.start) if row.stop - row.start == 1 else ""
        text += _beside(foils, None if room is None else room - used, show)
        padding = " " * (longest - columns(name))
        lines.append(f"{padding}{show(name, 'token')}{_ARROW}{text}")
    return "\n".join([*lines, *_wrapped(_remarks(result), width)])


def summary_line(result: "ResultNumbers", k: int = 3, show: "Paint | None" = None) -> str:
    """``whole answer  ←  paragraph 4 “Lake Baikal…” +13.64 ± 0.42, …`` by the largest parts.

    If the whole answer was not attributed by itself, these are sums of direct effects on its
    tokens. Empty if values of tokens do not add up.
    """
    if not adds_up(result):
        return ""
    causes = _ARROW + _of_answer(result, k, show or _plain)
    if result.answer is None:
        return (_DIRECT if result.output_features else _WHOLE) + causes
    gain = result.answer.gain_in_words(unit_of(result))
    return _WHOLE + causes + (f"  ({gain})" if gain else "")


def _of_answer(result: "ResultNumbers", k: int, show: "Paint") -> str:
    read = Reading(result)
    causes = read.causes(0, len(result.output_tokens), precise=True).prompt
    told = [cause for cause in causes if abs(cause.attribution) >= _LEAST_SHOWN]
    shown = [cause for cause in told if _is_shown(cause)][:k]
    line = ", ".join(_painted(cause, cause.describe(), show) for cause in shown)
    return line or "nothing of the prompt in particular"


def _is_shown(cause: Cause) -> bool:
    """Whether the table lists a cause: if significant, or of unknown error."""
    return cause.is_marked or math.isnan(cause.standard_error)


def _largest(attr: "Tensor | None") -> float:
    return 0.0 if attr is None or not attr.numel() else float(attr.abs().max())


def _row(blocks: Sequence[Sequence[Cause]], room: int | None, show: "Paint") -> tuple[str, int]:
    """Causes in the prompt, then those in the answer so far; and their width."""
    prompt, answer = blocks
    if not prompt and not answer:
        return show(_NOTHING, "nothing"), columns(_NOTHING)
    if room is not None and room < _ROOM_FOR_TWO and prompt and answer:
        is_prompt = abs(prompt[0].attribution) >= abs(answer[0].attribution)
        text, used = _row((prompt, []) if is_prompt else ([], answer), room - 2, show)
        return f"{text.removesuffix(' …')} …", used + 2
    rest = columns(_causes_text(answer, None, _plain)) + len(_SO_FAR) if answer else 0
    between = len(_BETWEEN) if prompt and answer else 0
    if room is None:
        rooms = None, None
    else:
        first = room if not answer else max(room - rest - between, (room - between) // 2)
        used = columns(_causes_text(prompt, first, _plain)) + between if prompt else 0
        rooms = first, max(room - used - len(_SO_FAR), _LEAST_ROOM // 2)
    parts: list[tuple[str, str]] = []
    if prompt:
        parts.append((_causes_text(prompt, rooms[0], show), _causes_text(prompt, rooms[0], _plain)))
    if answer:
        texts = [_causes_text(answer, rooms[1], paint) for paint in (show, _plain)]
        parts.append((show(_SO_FAR, "nothing") + texts[0], _SO_FAR + texts[1]))
    text, plain = (_BETWEEN.join(part[i] for part in parts) for i in (0, 1))
    return text, columns(plain)


def _causes_text(causes: Sequence[Cause], room: int | None, show: "Paint") -> str:
    """As many causes as fit, but at least the first."""
    parts: list[str] = []
    for i, cause in enumerate(causes):
        name = shorten((cause.label or cause.name).strip()) or cause.name
        cause = cause._replace(label=name)
        text = cause.describe()
        if room is not None:
            room -= len(", ") if parts else 0
            # Omitted causes are marked by " …".
            most = room if i == len(causes) - 1 else room - len(" …")
            if columns(text) > most and parts:
                return f"{', '.join(parts)} …"
            if columns(text) > most:
                # The name is shortened in favour of its number.
                rest = columns(cause._replace(label="x").describe()) - 1
                text = cause.describe(most=max(most - rest, 2))
            room -= columns(text)
        parts.append(_painted(cause, text, show))
    return ", ".join(parts)


def _painted(cause: Cause, text: str, show: "Paint") -> str:
    kind = "raises" if cause.attribution > 0 else "lowers"
    kind = "size" if cause.is_unsigned else kind
    return show(text, "nothing" if math.isnan(cause.standard_error) else kind)


def _beside(foils: str, room: int | None, show: "Paint") -> str:
    """A token's foils, if they fit beside the causes."""
    text = f"  (rather than {foils})"
    if not foils or (room is not None and columns(text) > room):
        return ""
    return show(text, "nothing")


def _wrapped(lines: Sequence[str], width: int | None) -> list[str]:
    """Lines wrapped to the terminal's width; a Chinese character takes two columns."""
    if width is None:
        return list(lines)
    return [part for line in lines for part in _broken(line, max(width, _LEAST_ROOM))]


def _broken(line: str, width: int) -> list[str]:
    parts = [""]
    for word in re.findall(r"\S+\s*", line):
        if parts[-1].strip() and columns(parts[-1] + word.rstrip()) > width:
            parts.append("  ")
        parts[-1] += word
    return [part.rstrip() for part in parts if part.strip()]


def _remarks(result: "ResultNumbers") -> list[str]:
    """Remarks for readers of the numbers."""
    remarks: list[str] = []
    n_unknown, n = int(result.errors_unknown.sum()), int((result.full_attr != 0).sum())
    if n_unknown:
        which = "All of these" if n_unknown == n else f"{n_unknown} of {n} attributions, with ± ?,"
        message = "are estimates of unknown error: nothing tells them from noise"
        remarks.append(f"{which} {message}{_errors(result)}.")
    if groups := result.unresolved:
        total = sum(float(group.attributions.abs().sum()) for group in groups)
        share = total / float(result.full_attr.abs().sum() or 1)
        remarks.append(
            f"{len(groups)} groups were not told apart and share {share:.0%} of all "
            f"attributions evenly: see `unresolved`, or {_more(result)}."
        )
    # If every coalition was scored, this is free.
    if result.design is not None and result.design.planned == "exact":
        gained = (result.full_values - result.empty_values).tolist()
        message = {
            pair.names: result.output_tokens[pair.target]
            for pair in result.redundant_pairs(1)
            if pair.together > max(0.5 * gained[pair.target], 10 * max(map(abs, pair.alone)))
        }
        remarks += [
            f"{a.strip()!r} and {b.strip()!r} say the same ({token})."
            for (a, b), token in list(message.items())[:_MOST_REMARKS]
        ]
    if result.foils is not None and result.provenance.get("attr_target") == "contrast":
        remarks.append(
            "A contrast: log-probabilities less those of all foils of the token together "
            '(`foil_tokens`); `refit(attr_target="log_prob")` tells the former alone.'
        )
    if result.fixed_share is not None:
        remarks.append(
            f"Fixed text (BOS, a template) has {float(result.fixed_share.mean()):.0%} of what all "
            "tokens give, on average: see `fixed_share`."
        )
    hidden = result.below_noise & (result.full_attr != 0)
    floor = 0.0 if result.noise_floor is None else float(result.noise_floor.max())
    if floor >= _LEAST_SHOWN and bool(hidden.any()):
        remarks.append(
            f"{int(hidden.sum())} attributions are no larger than what rounding does to a value "
            f"(up to {floor:.2g}): see `below_noise`."
        )
    if result.rung is not None:
        labels = result.provenance.get("labels")
        pair = " of {!r} with {!r}".format(*labels) if labels else ""
        remarks.append(f"Found by {result.rung}{pair}: {result.provenance['cannot_see']}.")
    if result.converged is False:
        remarks.append(_unsettled(result))
    return remarks


def _unsettled(result: "ResultNumbers") -> str:
    rule, settled = result.provenance.get("stop") or "of='all'", result.settled or ()
    if "of='all'" in rule:  # a `Precision`, usually given as `tol`
        return "`tol` was not met: see the standard errors."
    if len(settled) < 2:
        return f"{rule} was not met: see the standard errors."
    return (
        f"{rule} was not met by {settled.count(False)} of {len(settled)} tokens: see `settled` and "
        "the standard errors."
    )


def _errors(result: "ResultNumbers") -> str:
    """What would give standard errors, if anything would."""
    orders = ("antithetic permutations", "nested orders")
    by = result.provenance.get("estimator")
    known = {"local linear model": " (a lasso has none; a ridge has)"}
    known |= dict.fromkeys(orders, ". Give more `n_samples`: two pairs of orders tell errors")
    known |= dict.fromkeys(
        ("leave-one-out", "only one in", "exact"), ". Give at least 2 `n_draws`, which tell errors"
    )
    return known.get(str(by), "")


def _more(result: "ResultNumbers") -> str:
    """What would split more groups."""
    is_search = result.design is not None and result.design.solved == "hierarchical search"
    return "give a smaller `share`" if is_search else "give more `n_samples`"


def _plain(text: str, _: str) -> str:
    return text
