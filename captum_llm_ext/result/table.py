"""A result as text: the strongest causes of every target token, and what a reader should know."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from captum_llm_ext.result.causes import Cause
from captum_llm_ext.segment import shorten

if TYPE_CHECKING:
    from captum_llm_ext.result.result import GenerationAttributionResult

_MOST_REMARKS = 3


def table(
    result: "GenerationAttributionResult", k: int, paint: Callable[[str, str], str] | None
) -> str:
    """See `GenerationAttributionResult.table`."""
    show = paint or _plain
    least = float(result.full_attr.abs().max()) / 100
    width = max(len(name) for name in result.output_tokens)
    lines = [repr(result)]
    for name, causes in zip(result.output_tokens, result.top(k), strict=True):
        shown = [
            show(_short(cause), "raises" if cause.attribution > 0 else "lowers")
            for cause in causes
            if abs(cause.attribution) >= least
            and not abs(cause.attribution) < 1.96 * cause.standard_error
        ]
        told = ", ".join(shown) or show("nothing in particular", "nothing")
        lines.append(f"{show(f'{name:>{width}}', 'token')}  ←  {told}")
    return "\n".join([*lines, *_remarks(result)])


def _remarks(result: "GenerationAttributionResult") -> list[str]:
    """What a reader of the numbers should know."""
    remarks: list[str] = []
    if groups := result.unresolved:
        total = sum(float(group.attributions.abs().sum()) for group in groups)
        share = total / float(result.full_attr.abs().sum() or 1)
        remarks.append(
            f"{len(groups)} groups were not told apart and share {share:.0%} of all "
            "attributions evenly: see `unresolved`, or give more `n_samples`."
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
    if result.converged is False:
        remarks.append("`tol` was not met: see the standard errors.")
    return remarks


def _short(cause: Cause) -> str:
    return str(cause._replace(name=shorten(cause.name.strip()) or cause.name))


def _plain(text: str, _: str) -> str:
    return text
