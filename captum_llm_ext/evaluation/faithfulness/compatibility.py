"""Checks that results fit the input they are measured on, and extracts their attributions."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from captum_llm_ext.attribution.generation import GenerationAttribution
from captum_llm_ext.base.arguments import numbered
from captum_llm_ext.result import GenerationAttributionResult
from captum_llm_ext.result.foils import foil_ids
from captum_llm_ext.result.provenance import value_name
from captum_llm_ext.text.inputs import Piece, Prompt

Token = int | str | tuple[int, int]


def by_name(results: object) -> dict[str, GenerationAttributionResult]:
    """Results by name; those of a list are named by their methods.

    Raises:
        TypeError: If it is not a result, mapping or list of results.
        ValueError: If there is none.
    """
    if isinstance(results, GenerationAttributionResult):
        results = [results]
    if isinstance(results, Mapping):
        named = cast(dict[Any, Any], dict(results))
    elif isinstance(results, Sequence) and not isinstance(results, str):
        named = _numbered(cast(Sequence[Any], results))
    else:
        raise TypeError(
            f"`results` is a {type(results).__name__}: give a result of `attribute`, several in a "
            "mapping from names to results, or a list."
        )
    if not named:
        raise ValueError("`results` is empty: give at least one result of `attribute`.")
    for name, result in named.items():
        if not isinstance(name, str) or not name.strip():
            raise TypeError(f"{name!r} names a result: give a text that is not empty.")
        if not isinstance(result, GenerationAttributionResult):
            raise TypeError(
                f"{name!r} is a {type(result).__name__}: give results of `attribute`. Other "
                "numbers are measured by the functions of `captum_llm_ext.metrics`, on "
                "`attribution.to_game(…)`."
            )
    return named


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _numbered(results: Sequence[Any]) -> dict[str, Any]:
    methods = [
        str(getattr(result, "provenance", {}).get("method") or type(result).__name__)
        for result in results
    ]
    return numbered(methods, results)


def check_fit(
    results: Mapping[str, GenerationAttributionResult],
    prompt: Prompt,
    attribution: GenerationAttribution,
) -> None:
    """Raises if a result explains something other than what is measured.

    Raises:
        ValueError: If target, prompt or values differ.
    """
    first_name, first = next(iter(results.items()))
    value = value_name(attribution.attr_target)
    for name, result in results.items():
        if result.target.tolist() != first.target.tolist():
            raise ValueError(
                f"{first_name!r} and {name!r} have different targets: measure each with those of "
                "its own target, which `attribute(inp, other.target)` explains again."
            )
        if foil_ids(result) != foil_ids(first):
            raise ValueError(
                f"{first_name!r} and {name!r} compare tokens with different foils: attribute with "
                f"`Contrast(foils={first_name}.foils)`."
            )
        if list(result.input_tokens) != list(prompt.names):
            raise ValueError(
                f"{name!r} has {len(result.input_tokens)} prompt features, the input has "
                f"{len(prompt.names)}{_first_other(result.input_tokens, prompt.names)}: give the "
                "input that was explained, or the same text and unit with other baselines."
            )
        if result.prompt_pieces and _text(result.prompt_pieces) != _text(prompt.pieces):
            raise ValueError(
                f"{name!r} has features of the same names in another text: give the input that "
                "was explained, or the same text with other baselines."
            )
        explained = result.provenance.get("attr_target", value)
        if explained != value:
            can_refit = {explained, value} <= {"log_prob", "prob"}
            can_refit |= result.foil_values is not None and value == "log_prob"
            raise ValueError(
                f"{name!r} explains {explained!r}, `attribution` scores {value!r}: give a "
                f"`GenerationAttribution` whose `attr_target` is {explained!r}"
                + (f", or `result.refit(attr_target={value!r})`." if can_refit else ".")
            )


def span_of(result: GenerationAttributionResult, token: Token) -> tuple[int, int]:
    """The target tokens that are measured.

    Raises:
        TypeError: If `token` has the wrong type.
        ValueError: If there are none.
    """
    n_target = len(result.output_tokens)
    if isinstance(token, int | str):
        start = result.position(token)
        return start, start + 1
    if not isinstance(token, Sequence) or [type(place) for place in token] != [int, int]:
        raise TypeError(
            f"`token` is {token!r}: give the position or the text of a target token, or a span of "
            "them, (start, stop)."
        )
    chosen = range(n_target)[token[0] : token[1]]
    if not chosen:
        raise ValueError(
            f"`token` is {token!r}, which is empty: give a span (start, stop) of {n_target} target "
            "tokens."
        )
    return chosen.start, chosen.stop


def attributions_of(
    name: str,
    result: GenerationAttributionResult,
    span: tuple[int, int] | None,
    prompt: Prompt,
    earlier: Sequence[str],
) -> Tensor:
    """One number per player, shape ``(n_players,)``.

    Args:
        name: Name of the result.
        result: The result.
        span: Target tokens; None: the whole target, by `seq_attr`.
        prompt: The prompt, which maps columns to features.
        earlier: Names of the players that are earlier output.

    Raises:
        ValueError: If the result has other output features.
    """
    # Captum's inputs repeat a group's score at each of its members.
    columns = [prompt.columns.index(feature) for feature in range(prompt.n_features)]
    if span is None:
        return result.seq_attr[columns]
    known = list(result.output_features or ())[: _n_before(result, span[0])]
    if known != list(earlier):
        raise ValueError(
            f"{name!r} has {len(known)} features of earlier output, measured are {len(earlier)}"
            f"{_first_other(known, earlier)}: give `output_unit` as it was given to `attribute` "
            "(None where the output was held fixed)."
        )
    n_prompt = len(prompt.names)
    columns += range(n_prompt, n_prompt + len(earlier))
    return result.attribute_span(*span).values[columns]


def _n_before(result: GenerationAttributionResult, token: int) -> int:
    """Number of generated features that lie wholly before a token."""
    owners = [piece.feature for piece in result.output_pieces]
    return len(set(owners[:token]) - set(owners[token:]) - {None})


def _first_other(names: Sequence[str], others: Sequence[str]) -> str:
    """The first difference of two lists of names, as the end of a sentence."""
    for name, other in zip(names, others, strict=False):
        if name != other:
            return f" ({name!r} and {other!r} are the first that differ)"
    return ""
