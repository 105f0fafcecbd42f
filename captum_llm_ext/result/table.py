"""A result as text: the strongest causes of every target token, and what a reader should know."""

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from captum_llm_ext.base.terminal import columns, one_line, shortened
from captum_llm_ext.result.causes import Cause
from captum_llm_ext.result.foils import foils_told
from captum_llm_ext.text.segment import shorten

if TYPE_CHECKING:
    from captum_llm_ext.result.result import GenerationAttributionResult

    Paint = Callable[[str, str], str]

_MOST_REMARKS = 3
_LONGEST_NAME = 24
_ARROW = "  ←  "
_LEAST_ROOM = 20  # for causes: below that, lines are longer than the terminal is wide
_LEAST_SHOWN = 0.005  # what is smaller is 0 in the table
_NOTHING = "nothing in particular"


def table(
    result: "GenerationAttributionResult", k: int, paint: "Paint | None", width: int | None
) -> str:
    """See `GenerationAttributionResult.table`."""
    show = paint or _plain
    least = float(result.full_attr.abs().max()) / 100
    names = [shortened(one_line(name), _LONGEST_NAME) for name in result.output_tokens]
    longest = max(map(columns, names))
    room = None if width is None else max(width - longest - len(_ARROW), _LEAST_ROOM)
    lines = _wrapped([result.summary], width)
    floor = result.noise_floor
    floors = [0.0] * len(names) if floor is None else floor.tolist()
    rows = zip(names, floors, result.top(k), strict=True)
    for token, (name, floor, causes) in enumerate(rows):
        telling = [
            cause
            for cause in causes
            if abs(cause.attribution) >= least
            and abs(cause.attribution) > floor
            and not abs(cause.attribution) < 1.96 * cause.standard_error
        ]
        told = _told(telling, room, show) or show(_NOTHING, "nothing")
        used = columns(_told(telling, room, _plain) or _NOTHING)
        told += _beside(foils_told(result, token), None if room is None else room - used, show)
        padding = " " * (longest - columns(name))
        lines.append(f"{padding}{show(name, 'token')}{_ARROW}{told}")
    return "\n".join([*lines, *_wrapped(_remarks(result), width)])


def _told(causes: Sequence[Cause], room: int | None, show: "Paint") -> str:
    """As many of the causes as there is room for, the first in any case."""
    parts: list[str] = []
    for i, cause in enumerate(causes):
        text = str(cause._replace(name=shorten(cause.name.strip()) or cause.name))
        if room is not None:
            room -= len(", ") if parts else 0
            # What is left out is told by " …".
            most = room if i == len(causes) - 1 else room - len(" …")
            if columns(text) > most and parts:
                return f"{', '.join(parts)} …"
            text = text if columns(text) <= most else _fitting(cause, most)
            room -= columns(text)
        kind = "raises" if cause.attribution > 0 else "lowers"
        kind = "size" if cause.is_unsigned else kind
        parts.append(show(text, "nothing" if math.isnan(cause.standard_error) else kind))
    return ", ".join(parts)


def _beside(foils: str, room: int | None, show: "Paint") -> str:
    """What a token was held against, where there is room for it behind the causes."""
    said = f"  (rather than {foils})"
    if not foils or (room is not None and columns(said) > room):
        return ""
    return show(said, "nothing")


def _fitting(cause: Cause, most: int) -> str:
    """A cause whose name gives way to its number."""
    name = one_line(cause.name.strip())
    rest = columns(str(cause._replace(name="x"))) - 1
    return str(cause._replace(name=shortened(name, max(most - rest, 2))))


def _wrapped(lines: Sequence[str], width: int | None) -> list[str]:
    if width is None:
        return list(lines)
    return [
        part
        for line in lines
        for part in textwrap.wrap(line, max(width, _LEAST_ROOM), subsequent_indent="  ")
    ]


def _remarks(result: "GenerationAttributionResult") -> list[str]:
    """What a reader of the numbers should know."""
    remarks: list[str] = []
    n_unknown, n = int(result.errors_unknown.sum()), int((result.full_attr != 0).sum())
    if n_unknown:
        which = "All of these" if n_unknown == n else f"{n_unknown} of {n} attributions, with ± ?,"
        said = "are estimates of unknown error: nothing tells them from noise"
        remarks.append(f"{which} {said}{_errors(result)}.")
    if groups := result.unresolved:
        total = sum(float(group.attributions.abs().sum()) for group in groups)
        share = total / float(result.full_attr.abs().sum() or 1)
        remarks.append(
            f"{len(groups)} groups were not told apart and share {share:.0%} of all "
            f"attributions evenly: see `unresolved`, or {_more(result)}."
        )
    # Where every coalition was scored, it costs nothing to look.
    if result.design is not None and result.design.planned == "exact":
        gained = (result.full_values - result.empty_values).tolist()
        said = {
            pair.names: result.output_tokens[pair.target]
            for pair in result.redundant_pairs(1)
            if pair.together > max(0.5 * gained[pair.target], 10 * max(map(abs, pair.alone)))
        }
        remarks += [
            f"{a.strip()!r} and {b.strip()!r} say the same ({token})."
            for (a, b), token in list(said.items())[:_MOST_REMARKS]
        ]
    if result.foils is not None and result.provenance.get("attr_target") == "contrast":
        remarks.append(
            "A contrast: log-probabilities less those of all foils of the token together "
            '(`foil_tokens`); `refit(attr_target="log_prob")` tells the former alone.'
        )
    if result.fixed_share is not None:
        remarks.append(
            f"Fixed text (BOS, a template) has {float(result.fixed_share.mean()):.0%} of what all "
            "tokens give, in the mean: see `fixed_share`."
        )
    hidden = result.below_noise & (result.full_attr != 0)
    floor = 0.0 if result.noise_floor is None else float(result.noise_floor.max())
    if floor >= _LEAST_SHOWN and bool(hidden.any()):
        remarks.append(
            f"{int(hidden.sum())} attributions are no larger than what rounding does to a value "
            f"(up to {floor:.2g}): see `below_noise`."
        )
    if result.rung is not None:
        remarks.append(f"Found by {result.rung}: {result.provenance['cannot_see']}.")
    if result.converged is False:
        remarks.append(_unsettled(result))
    return remarks


def _unsettled(result: "GenerationAttributionResult") -> str:
    rule, settled = result.provenance.get("stop") or "of='all'", result.settled or ()
    if "of='all'" in rule:  # a `Precision`, most often given as `tol`
        return "`tol` was not met: see the standard errors."
    if len(settled) < 2:
        return f"{rule} was not met: see the standard errors."
    return (
        f"{rule} was not met by {settled.count(False)} of {len(settled)} tokens: see `settled` and "
        "the standard errors."
    )


def _errors(result: "GenerationAttributionResult") -> str:
    """What would tell errors, where something would."""
    orders = ("antithetic permutations", "nested orders")
    by = result.provenance.get("estimator")
    known = {"local linear model": " (a lasso has none; a ridge has)"}
    known |= dict.fromkeys(orders, ". Give more `n_samples`: two pairs of orders tell errors")
    known |= dict.fromkeys(
        ("leave-one-out", "only one in", "exact"), ". Give at least 2 `n_draws`, which tell errors"
    )
    return known.get(str(by), "")


def _more(result: "GenerationAttributionResult") -> str:
    """What would tell more groups apart."""
    is_search = result.design is not None and result.design.solved == "hierarchical search"
    return "give a smaller `share`" if is_search else "give more `n_samples`"


def _plain(text: str, _: str) -> str:
    return text
