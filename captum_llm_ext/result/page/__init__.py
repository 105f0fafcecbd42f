"""A result as one self-contained HTML page: running text, highlighted interactively.

Uses only the plain data of a result (see `page`), neither torch nor the model. The page contains
that data once, as JSON, and draws everything from it; it makes no network request, which its own
content security policy enforces.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import html
import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from typing import Any

from captum_llm_ext.base.amounts import plus_minus
from captum_llm_ext.base.terminal import shortened
from captum_llm_ext.result.page.changes import change_sentences
from captum_llm_ext.result.page.provenance import provenance_rows

__all__ = ["fragment", "page"]

_FORMAT = 1
_DIGITS = 5  # significant digits kept: more than standard errors justify, half the bytes
_MATRICES = ("token_attr", "token_attr_se", "output_attr", "output_attr_se")
_OTHER = "other"  # the same numbers for another value
_REQUIRED = (
    "prompt",
    "output",
    "input_tokens",
    "output_features",
    "output_tokens",
    "token_attr",
    "output_attr",
)
# Concatenated into one closure, in this order.
_SCRIPTS = ("model", "through", "words", "text", "links", "panel", "map", "page")
# Share of the largest attribution below which the summary omits one; chosen, not measured.
_LEAST = 0.01
_UNKNOWN = ", estimates of unknown error: nothing tells a cause from noise"
# Written as HTML, not kept as data.
_TOLD_IN_TEXT = ("causes", "summary", "labels", "errors_unknown", "column_features")
_USED = ("unit", "noise_floor")  # parts of the provenance that scripts use
_SINGLE = 1.96  # standard errors at which a single value is significant
_WHOLE = "whole answer"
_LONGEST_HEADING = 60  # characters; chosen, not measured
_PLAIN_ROWS = 500  # tokens listed if scripts are disabled; chosen, not measured


def page(data: Mapping[str, Any], *, title: str | None = None) -> str:
    """A complete HTML file that shows a result.

    Args:
        data: A result's plain data, as returned by its ``to_dict()``: the pieces of the prompt and
            of the output in reading order, the names of the features, and per explained token the
            attributions ``token_attr`` ``(n_target, n_prompt_features)`` and ``output_attr``
            ``(n_target, n_output_features)`` or ``None``, with standard errors where known.
            ``levels``, from coarse to fine, are larger parts of the prompt, and ``output_levels``
            the same for the output (``part_of`` per token). A piece's ``role`` is that of its chat
            message, or ``"template"``. ``sums`` are standard errors of sums, for a ``side`` and
            ``level``: per entry of ``spans`` (``[start, stop]`` of tokens) in ``se`` one per
            column; for other sums the page assumes independence, and says so. ``unresolved`` lists
            the columns of each group that was not split; values below ``noise_floor`` may be
            rounding. ``foils`` lists the foils of each token, for a contrast; ``other`` has
            attributions, errors, ``full_values``, ``empty_values`` and ``sums`` of another
            ``attr_target``, to which the page can be switched. ``is_unsigned`` says that
            attributions have no sign, ``fixed_share`` is the share of fixed text per token.
            ``about``, ``narrative``, ``summary``, ``causes`` and ``marked_beyond`` are the
            descriptions of ``to_dict()``; ``around`` has per column of a side (``prompt``,
            ``output``) the rest of the word that it is a fragment of, before and after;
            ``answer`` has the whole answer's attributions to the largest parts;
            ``answer_unit`` is the level at which the answer is shown first. ``total`` has, per
            level of the prompt, the edges of chains as from `TotalAttribution.links` and ``errors``
            of shares as from `share_errors`. ``counterfactuals`` are from `Counterfactual.to_dict`,
            ``column_features`` has the feature index of each prompt column, which they refer to.
            ``prompt_layout`` may say ``"text"`` (the pieces are running text) or ``"list"``
            (separate names); by default names that would run together are separated.
        title: Heading of the page; by default the generated text.

    Returns:
        The file's content, to be written as UTF-8; numbers are rounded to five significant digits.

    Raises:
        ValueError: If the data has an unknown format, is incomplete or inconsistent.
    """
    data = {**data, **_missing_pieces(data)}
    _check(data)
    shown = {"prompt_layout": _layout(data["prompt"]), **data, "noted": provenance_rows(data)}
    shown["counterfactuals"] = change_sentences(data)
    shown["provenance"] = {name: data.get("provenance", {}).get(name) for name in _USED}
    kept = {name: value for name, value in shown.items() if name not in _TOLD_IN_TEXT}
    style, script = _asset("page.css"), _script()
    heading = title if title is not None else _heading(data["output"], data["output_tokens"])
    return string.Template(_asset("page.html")).substitute(
        policy=f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; "
        "base-uri 'none'; form-action 'none'",
        title=_escaped(heading),
        heading=_escaped(heading),
        about=_escaped(" · ".join(data.get("about") or ())),
        summary=_summary(shown),
        plain=_plain(shown),
        style=style,
        script=script,
        data=_json(kept),
    )


def fragment(data: Mapping[str, Any], text: str = "") -> str:
    """The same page as one element of another page, such as a notebook.

    An ``<iframe>`` isolates styles, scripts and ids, so several can share a page.

    Args:
        data: As for `page`.
        text: Text shown beside the frame, for viewers that strip frames; its first lines are always
            visible.

    Returns:
        HTML of an ``<iframe>`` element and of one with the text.
    """
    details = ""
    if text:
        lines = _summary(data) or "<p>The attributions as text</p>"
        shown = re.sub(r"</?p[^>]*>", " ", lines.replace("</p>", "<br>", lines.count("</p>") - 1))
        details = f"<details><summary>{shown}</summary><pre>{_escaped(text)}</pre></details>"
    return (
        '<iframe title="Attribution of generated text" loading="lazy" '
        'style="width:100%;height:44rem;border:0;color-scheme:light dark" '
        f'srcdoc="{html.escape(page(data))}"></iframe>{details}'
    )


def _asset(name: str) -> str:
    assets = resources.files("captum_llm_ext.result.page") / "assets"
    return (assets / name).read_text(encoding="utf-8")


def _script() -> str:
    """The page's scripts as one, in their own scope."""
    parts = "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    return f'(() => {{\n"use strict";\n\n{parts}}})();'


def _source(content: str) -> str:
    """The hash by which a content security policy allows exactly this inline script or style."""
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _escaped(text: str) -> str:
    """Text as HTML; lone surrogates, which UTF-8 cannot encode, as character references."""
    return html.escape(text).encode("utf-8", "xmlcharrefreplace").decode("utf-8")


def _heading(output: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    texts = (piece["text"] for piece in output if piece.get("role") != "template")
    # If the answer has no text, such as a single end token, its tokens' names are shown.
    answer = " ".join("".join(texts).split()) or " ".join(" ".join(names).split())
    return f"What made the model write “{shortened(answer, _LONGEST_HEADING)}”"


def _summary(data: Mapping[str, Any]) -> str:
    """One line on the causes of the whole answer, by the largest parts of the prompt."""
    found = data.get("summary")
    if not found:
        return ""
    is_sized = bool(data.get("is_unsigned"))
    causes = [_cause(cause, is_sized) for cause in found["prompt"] if _is_marked(cause)]
    listed = ", ".join(causes) or "nothing of the prompt in particular"
    answer, name = data.get("answer"), _WHOLE
    if not answer and data["output_features"]:
        name += ", direct effects"
    gain = answer["gain_in_words"] if answer else ""
    of = f' <span class="of">({_escaped(gain)})</span>' if gain else ""
    return f'<p id="summary"><b>{name}</b> ← {listed}{of}</p>'


def _is_marked(cause: Mapping[str, Any]) -> bool:
    return cause["marked"] or cause["standard_error"] is None


def _cause(cause: Mapping[str, Any], is_unsigned: bool) -> str:
    """A cause as HTML, coloured if significant."""
    value, error = cause["attribution"], cause["standard_error"]
    number = f"{value:.2f}" if is_unsigned else f"{value:+.2f}".replace("-", "−")
    spread = _escaped(plus_minus(error))
    kind = "size" if is_unsigned else "raises" if value > 0 else "lowers"
    kind = kind if cause["marked"] else "unsure"
    name = _escaped(cause["name"])
    amount = f'<span class="amount"><b>{number}</b>{spread}</span>'
    return f'<span class="cause {kind}"><bdi>{name}</bdi> {amount}</span>'


def _plain(data: Mapping[str, Any]) -> str:
    """The content of the page as text, for disabled scripts."""
    texts = (_escaped("".join(p["text"] for p in data[name])) for name in ("prompt", "output"))
    prompt, output = texts
    rows = data.get("causes") or _strongest(data)
    lines: list[str] = []
    is_sized = bool(data.get("is_unsigned"))
    for row in rows[:_PLAIN_ROWS]:
        cells = [
            ", ".join(_cause(cause, is_sized) for cause in row[side] if _is_marked(cause))
            for side in ("prompt", "answer")
        ]
        name = f'<th scope="row"><bdi>{_escaped(row["name"])}</bdi></th>'
        lines.append(f"<tr>{name}" + "".join(f"<td>{cell or '–'}</td>" for cell in cells) + "</tr>")
    rest = len(rows) - len(lines)
    unknown = "" if not data.get("errors_unknown") else _UNKNOWN
    narrative = _escaped(" ".join(data.get("narrative") or ()))
    computed = "".join(
        f"<dt>{_escaped(name)}</dt><dd>{_escaped(text)}</dd>" for name, text in data["noted"]
    )
    changes = "".join(
        f"<li>{_escaped(one['said'])} The answer then: <q>{_escaped(one['answer'])}</q></li>"
        for one in data["counterfactuals"]
    )
    heads = "".join(
        f'<th scope="col">{head}</th>'
        for head in ("part of the answer", "in the prompt", "in the answer so far")
    )
    return (
        f"<p>{narrative}</p><h2>Prompt</h2><pre>{prompt}</pre><h2>Answer</h2><pre>{output}</pre>"
        f"<table><caption>Strongest causes{unknown}; ± is one standard error, and what could be "
        f"noise is left out</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
        + (f"<p>… and {rest} rows more.</p>" if rest else "")
        + (f"<h2>What would have changed it</h2><ul>{changes}</ul>" if changes else "")
        + (f"<h2>How this was computed</h2><dl>{computed}</dl>" if computed else "")
    )


def _strongest(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Causes of every token in two blocks, if the data has none."""
    beyond = data.get("marked_beyond") or _SINGLE
    sides = (
        ("prompt", data["input_tokens"], "token_attr"),
        ("answer", data["output_features"] or (), "output_attr"),
    )
    rows: list[dict[str, Any]] = [
        {"name": name, "prompt": [], "answer": []} for name in data["output_tokens"]
    ]
    for side, names, key in sides:
        attr, errors = data[key] or (), data.get(f"{key}_se")
        known = [[(x, i) for i, x in enumerate(row) if x is not None and x == x] for row in attr]
        least = _LEAST * max((abs(x) for row in known for x, _ in row), default=0.0)
        for t, row in enumerate(known):
            for x, i in heapq.nlargest(3, row, key=lambda cause: abs(cause[0])):
                own_error = errors[t][i] if errors and errors[t] else 0.0
                error = None if own_error is None or own_error != own_error else float(own_error)
                if abs(x) > least:
                    rows[t][side].append(
                        {
                            "name": names[i].strip() or names[i],
                            "attribution": x,
                            "standard_error": error,
                            "marked": error is not None and abs(x) >= beyond * error,
                        }
                    )
    return rows


def _missing_pieces(data: Mapping[str, Any]) -> dict[str, Any]:
    """The names of features and tokens, if a result does not know how they form the text."""
    names, tokens, columns = (
        data.get(name) or () for name in ("input_tokens", "output_tokens", "output_features")
    )
    per_token = len(columns) == len(tokens)
    made = {
        "prompt": [{"text": name, "feature": i} for i, name in enumerate(names)],
        "output": [{"text": t, "feature": i if per_token else None} for i, t in enumerate(tokens)],
    }
    return {name: pieces for name, pieces in made.items() if not data.get(name, True)}


def _layout(prompt: Sequence[Mapping[str, Any]]) -> str:
    """``"list"`` if the pieces are names that would run together as text."""
    texts = [piece["text"] for piece in prompt if piece["feature"] is not None]
    if len(texts) < 2 or len(texts) < len(prompt):
        return "text"
    edges = ((left[-1:], right[:1]) for left, right in pairwise(texts))
    # Scripts written without spaces are exempt.
    return (
        "list"
        if all((a + b).isascii() and a.isalnum() and b.isalnum() for a, b in edges)
        else "text"
    )


def _json(data: Mapping[str, Any]) -> str:
    """JSON that is safe inside a script element, whatever the strings contain."""
    text = _object(data)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _object(data: Mapping[str, Any]) -> str:
    def written(name: str, value: Any) -> str:
        if name == _OTHER and value is not None:
            return _object(value)
        return _matrix(value) if name in _MATRICES else _dumps(value)

    members = (f"{json.dumps(name)}:{written(name, value)}" for name, value in data.items())
    return "{" + ",".join(members) + "}"


def _dumps(value: Any) -> str:
    return json.dumps(_rounded(value), separators=(",", ":"), allow_nan=False, default=str)


def _matrix(rows: Sequence[Sequence[float | None]] | None) -> str:
    return "null" if rows is None else "[" + ",".join(map(_row, rows)) + "]"


def _row(numbers: Sequence[float | None]) -> str:
    """Like `_dumps`, ten times faster if all numbers are finite: a long answer has millions."""
    if numbers and None not in numbers:
        text = ",".join([f"{number:.{_DIGITS}g}" for number in numbers])
        if "n" not in text:  # neither nan nor inf
            return f"[{text}]"
    return _dumps(numbers)


def _rounded(value: Any) -> Any:
    """A copy with floats rounded, and NaN and infinities as null, as JSON needs."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value


# Checks ------------------------------------------------------------------------------------------


def _check(data: Mapping[str, Any]) -> None:
    if data.get("format") != _FORMAT:
        raise ValueError(
            f"The data has format {data.get('format')!r}, this version draws format {_FORMAT}: "
            "pass what `result.to_dict()` returns, or update captum-llm-ext."
        )
    missing = [name for name in _REQUIRED if name not in data]
    if missing:
        raise ValueError(
            f"The data lacks {', '.join(missing)}: pass what `result.to_dict()` returns."
        )
    n_target, n_prompt = len(data["output_tokens"]), len(data["input_tokens"])
    n_output = None if data["output_features"] is None else len(data["output_features"])
    _check_shape(data, "token_attr", n_target, n_prompt)
    _check_shape(data, "output_attr", n_target, n_output)
    _check_length(data, "output", n_target)
    for name in ("full_values", "empty_values"):
        if data.get(name) is not None:
            _check_length(data, name, n_target)
    _check_features(data, "prompt", n_prompt)
    _check_features(data, "output", n_output or 0)
    for level in data.get("levels") or ():
        _check_level(level, n_prompt)
    for level in data.get("output_levels") or ():
        _check_length({"output_levels": level["part_of"]}, "output_levels", n_target)
    widths = {("prompt", None): n_prompt, ("answer", None): n_output or 0}
    widths |= {("prompt", level["name"]): len(level["parts"]) for level in data.get("levels") or ()}
    for level in data.get("output_levels") or ():
        changes = (a != b for a, b in pairwise(level["part_of"]))
        widths["answer", level["name"]] = 1 + sum(changes)
    for entry in data.get("sums") or ():
        _check_sums(entry, widths.get((entry["side"], entry["level"])))
    if data.get("foils") is not None:
        _check_length(data, "foils", n_target)
    if data.get(_OTHER) is not None:
        _check({**data, "foils": None, **data[_OTHER], _OTHER: None})


def _check_shape(data: Mapping[str, Any], name: str, rows: int, columns: int | None) -> None:
    """Checks that the matrix and its standard errors, if any, have this many rows and columns."""
    if (data[name] is None) != (columns is None):
        raise ValueError(f"`{name}` and the names of its columns must be both given or both None.")
    for key in (name, f"{name}_se"):
        if data.get(key) is None:
            continue
        widths = {len(row) for row in data[key] if row is not None}
        if len(data[key]) != rows or widths - {columns}:
            raise ValueError(
                f"`{key}` has {len(data[key])} rows of {sorted(widths)} numbers, the names ask for "
                f"{rows} rows of {columns}."
            )


def _check_sums(entry: Mapping[str, Any], width: int | None) -> None:
    found = {len(row) for row in entry["se"]}
    if len(entry["se"]) != len(entry["spans"]) or found - {width}:
        raise ValueError(
            f"`sums` of the {entry['side']} by {entry['level'] or 'its finest parts'} has "
            f"{len(entry['se'])} rows of {sorted(found)} numbers for {len(entry['spans'])} spans "
            f"of {'no such level' if width is None else f'{width} parts'}."
        )


def _check_length(data: Mapping[str, Any], name: str, n_target: int) -> None:
    if len(data[name]) != n_target:
        raise ValueError(
            f"`{name}` has {len(data[name])} entries for {n_target} tokens: give one per token."
        )


def _check_features(data: Mapping[str, Any], name: str, count: int) -> None:
    for piece in data[name]:
        feature = piece["feature"]
        if feature is not None and not 0 <= feature < count:
            raise ValueError(
                f"A piece of `{name}` ({piece['text']!r}) belongs to feature {feature}, there are "
                f"{count}: number them from 0, or give None for fixed text."
            )


def _check_level(level: Mapping[str, Any], n_prompt: int) -> None:
    """Checks that every feature of the prompt is in one of the level's parts."""
    part_of, n_parts = level["part_of"], len(level["parts"])
    if len(part_of) != n_prompt or not all(0 <= part < n_parts for part in part_of):
        raise ValueError(
            f"The level {level['name']!r} must give each of the {n_prompt} features of the prompt "
            f"one of its {n_parts} parts: `part_of` is {part_of}."
        )
