"""A result in plain sentences, each built from its numbers alone."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from captum_llm_ext.base.amounts import plus_minus
from captum_llm_ext.result.about import absence, factor, is_in_nats
from captum_llm_ext.result.answer import LEFT_OUT, SHAPLEY
from captum_llm_ext.result.causes import Cause, unit_of
from captum_llm_ext.result.reading import TOKEN, WORD, Blocks, Reading, adds_up, leading, quoted

if TYPE_CHECKING:
    from captum_llm_ext.result.numbers import ResultNumbers

# Share of the positive attributions beyond which one cause is called most of them; chosen, not
# measured.
_MOSTLY = 0.5
# Share of full - empty that attributions may miss and still be called complete; chosen, not
# measured.
_ADDS_UP = 0.01
_MOST_FOILS = 3
_ANSWER = 60
_QUOTATION = re.compile("“([^”]*)”")
_MEASURED = {
    "deleted": "by leaving parts out of the text",
    "model": "by having the model itself rewrite parts of the text",
    "corpus": "by putting other texts in the place of parts",
    "texts": "by putting given texts in the place of parts",
}


_INSTEAD = {
    "deleted": "no prompt",
    "model": "what the model itself would have written in its place",
    "corpus": "other texts in its place",
    "texts": "the given texts in its place",
}


def sentences(
    result: "ResultNumbers",
    start: int,
    stop: int,
    level: str | None = None,
    reading: Reading | None = None,
) -> list[str]:
    """What led to a span of the answer, how it was measured, and how certain it is.

    Args:
        result: The result.
        start, stop: The span; `stop` is exclusive.
        level: Level of the prompt; None: the coarsest with at least two parts.
        reading: A `Reading` at this level, if the caller has one.
    """
    read = reading or Reading(result, level)
    if stop - start > 1 and not adds_up(result):
        return [
            "Probabilities of tokens do not add up to that of an answer: choose one token, or "
            'refit with `attr_target="log_prob"`.'
        ]
    blocks = read.causes(start, stop, precise=True)
    is_whole = (start, stop) == (0, len(result.output_tokens))
    parts = [
        *_in_the_prompt(result, read, blocks, start, stop),
        *(_of_the_whole(result, read) if is_whole else ()),
        *_in_the_answer(result, read, blocks, start, stop),
        *_without_the_first(result, read, blocks, start, stop),
        _measured(result),
        *_certainty(result, read, blocks.prompt, start, stop),
    ]
    sentences = _quoted_once([sentence for sentence in parts if sentence], read.prompt.level)
    return list(map(_isolated, sentences))


def _quoted_once(sentences: Sequence[str], level: str) -> list[str]:
    """Refers to a part by its number once it has been quoted."""
    known: set[str] = set()

    def shorter(match: re.Match[str]) -> str:
        number = match[1].lower()
        if number in known:
            return match[1]
        known.add(number)
        return match[0]

    pattern = re.compile(rf"\b({re.escape(level)} \d+) “[^”]*”", re.IGNORECASE)
    return [pattern.sub(shorter, sentence) for sentence in sentences]


def _isolated(sentence: str) -> str:
    """Quotations that run to the left isolated: they would turn the numbers behind them around."""
    return _QUOTATION.sub(
        lambda found: (
            f"“\u2068{found[1]}\u2069”"
            if any(unicodedata.bidirectional(char) in ("R", "AL") for char in found[1])
            else found[0]
        ),
        sentence,
    )


def part_text(cause: Cause, level: str) -> str:
    """``the word “Palm”`` or ``paragraph 4 “Lake Baikal…”``."""
    name = " ".join((cause.label or cause.name).split())
    if "“" in name:
        return name
    if level == "passage" and name == "question":  # what comes after the passages of --context
        return f"the {name}"
    return f"{'the ' * (level in (TOKEN, WORD))}{level} {quoted(name)}"


def amount(cause: Cause, unit: str | None, per: int = 1) -> str:
    """``+13.60 ± 0.42 nats``."""
    number = f"{cause.attribution:.2f}" if cause.is_unsigned else f"{cause.attribution:+.2f}"
    text = f"{number.replace('-', '−')}{plus_minus(cause.standard_error)}"
    text += f" {unit}" if unit else ""
    return text + (f" over {per} tokens" if per > 1 else "")


def _in_the_prompt(
    result: "ResultNumbers",
    read: Reading,
    blocks: Blocks,
    start: int,
    stop: int,
) -> list[str]:
    n_tokens, unit, level = stop - start, unit_of(result), read.prompt.level
    subject = subject_of(result, start, stop)
    if not blocks.prompt:
        return [f"No part of the prompt changed anything about {subject}."]
    first = blocks.prompt[0]
    if result.is_unsigned:
        where = part_text(first, level)
        return [
            f"Of the prompt, {where} has the largest size for {subject}: {amount(first, unit)}."
        ]
    marked = [cause for cause in blocks.prompt if cause.is_marked]
    if not marked:
        return [
            f"No part of the prompt is told from noise for {subject}; the largest estimate is that "
            f"of {part_text(first, level)} ({amount(first, unit, n_tokens)})."
        ]
    found: list[str] = []
    raising = [cause for cause in marked if cause.attribution > 0]
    lowering = [cause for cause in marked if cause.attribution < 0]
    if raising:
        total = sum(max(cause.attribution, 0.0) for cause in blocks.prompt)
        mostly = "mostly" if raising[0].attribution > _MOSTLY * total else "most"
        times = ""
        if n_tokens == 1 and is_in_nats(result):
            against = bool(result.foil_tokens and result.foil_tokens[start])
            is_contrast = result.provenance.get("attr_target") == "contrast" and against
            times = f", {factor(raising[0].attribution, of_odds=is_contrast)}"
        size = f"{amount(raising[0], unit, n_tokens)}{times}"
        text = f"Of the prompt, {subject} rests {mostly} on {part_text(raising[0], level)} ({size})"
        if len(raising) > 1:
            text += f", then on {part_text(raising[1], level)} ({amount(raising[1], None)})"
        found.append(text + ".")
    if lowering and (not raising or -lowering[0].attribution > 0.1 * raising[0].attribution):
        it = "it" if raising else subject
        found.append(
            f"{_capital(part_text(lowering[0], level))} speaks against {it} "
            f"({amount(lowering[0], None if raising else unit)})."
        )
    return found


def _of_the_whole(result: "ResultNumbers", read: Reading) -> list[str]:
    """What the amounts of the whole answer's causes are parts of."""
    whole, unit = read.whole, unit_of(result)
    if whole is None or not math.isfinite(whole.gain):
        return []
    amount = f"{abs(whole.gain):,.1f}{plus_minus(whole.empty_error, 1)} {unit or ''}".strip()
    gives = "gives the answer {}" if whole.gain > 0 else "takes {} from the answer"
    text = f"The prompt as a whole {gives.format(amount)}"
    if is_in_nats(result):
        text += f": {_times(result, whole.gain / len(result.output_tokens))} with "
        text += _INSTEAD.get(absence(result), "nothing in its place")
    if whole.kind == SHAPLEY:
        return [f"{text}. Its parts share this amount."]
    alone = "loses without that part alone" if whole.kind == LEFT_OUT else "gains by it alone"
    return [f"{text}. Each part’s number tells what it {alone}."]


def _times(result: "ResultNumbers", gain: float) -> str:
    """How many times as probable the answer's tokens are, by the mean of their gains."""
    is_one = len(result.output_tokens) == 1
    mean, than = "" if is_one else "on average ", "" if gain > 0 else " lower than"
    if result.provenance.get("attr_target") == "log_prob":
        who = "it" if is_one else "each token"
        return f"{who} is {mean}{factor(gain)} {'as' if gain > 0 else 'than'}"
    size = factor(abs(gain)).removesuffix(" as probable")
    return f"{'its' if is_one else 'each token’s'} odds are {mean}{size}{than} those"


def _in_the_answer(
    result: "ResultNumbers", read: Reading, blocks: Blocks, start: int, stop: int
) -> list[str]:
    if not blocks.answer or result.is_unsigned:
        return []
    unit = unit_of(result)
    if stop - start == 1:
        first = blocks.answer[0]
        if not first.is_marked:
            return []
        verb = "weighs most" if first.attribution > 0 else "speaks most against it"
        return [
            f"Of the answer so far, {part_text(first, read.answer.level)} {verb} "
            f"({amount(first, unit)})."
        ]
    if read.whole is not None and (start, stop) == (0, len(result.output_tokens)):
        return []
    rows = slice(start, stop)
    whole = float(result.full_attr[rows].sum())
    prompt = float(result.full_attr[rows, : len(result.input_tokens)].sum())
    gained = float((result.full_values - result.empty_values)[rows].sum())
    if abs(whole - gained) > _ADDS_UP * abs(gained):  # e.g. for leave-one-out
        return []
    gain = f"{gained:,.1f} {unit or ''}".strip()
    return [
        f"Between nothing given and everything given lie {gain}: the prompt gives {prompt:,.1f}, "
        f"what had already been written the other {whole - prompt:,.1f}.".replace("-", "−")
    ]


def _without_the_first(
    result: "ResultNumbers", read: Reading, blocks: Blocks, start: int, stop: int
) -> list[str]:
    """The measured value without the strongest cause, if this coalition was scored."""
    target = result.provenance.get("attr_target")
    marked = [cause for cause in blocks.prompt if cause.is_marked and cause.attribution > 0]
    if stop - start > 1 or not marked or target not in ("contrast", "log_prob", "prob"):
        return []
    foils = [quoted(name) for name in (result.foil_tokens or [[]] * stop)[start]]
    is_contrast = target == "contrast" and bool(foils)
    held = ", ".join(foils[:_MOST_FOILS]) + " and others" * (len(foils) > _MOST_FOILS)
    if len(foils) > 1:
        held = f"any of {held}"
    rows = _rows_without(result, read, marked[0], start)
    if rows is None:
        return [f"It was held against {held}."] if is_contrast else []
    value = float(result.values[rows, start].double().mean())
    alone = f"Without {part_text(marked[0], read.prompt.level)} alone"
    if is_contrast:
        if value < 0:
            one = held.replace("any of", "one of", 1)
            return [f"{alone} the model would probably have said {one}."]
        return [f"{alone} the model would still have preferred it to {held}."]
    full = float(result.full_values[start])
    if target != "prob":
        value, full = math.exp(value), math.exp(full)
    return [f"{alone} its probability is {_percent(value)} instead of {_percent(full)}."]


def _rows_without(
    result: "ResultNumbers", read: Reading, cause: Cause, token: int
) -> torch.Tensor | None:
    """Coalitions in which everything before a token is present except the cause."""
    if result.design is None or not len(result.masks):
        return None
    part = read.prompt.part_of[cause.column]
    owned = {
        feature
        for feature, own in zip(result.column_features, read.prompt.part_of, strict=True)
        if own == part
    }
    n_visible = result.design.n_visible[token]
    wanted = torch.ones(n_visible, dtype=torch.bool, device=result.masks.device)
    wanted[sorted(owned)] = False
    rows = (result.masks[:, :n_visible] == wanted).all(1).nonzero()[:, 0]
    rows = rows[result.values[rows, token].isfinite()]
    return rows if len(rows) else None


def _measured(result: "ResultNumbers") -> str:
    n, how = result.n_evaluations, absence(result)
    times = f"{n:,} version{'s' * (n != 1)} of it"
    if how in _MEASURED:
        return f"Measured {_MEASURED[how]}: {times} were scored."
    if how.startswith("token "):
        return f"Measured by putting the {how} in the place of parts: {times} were scored."
    return f"Measured by {n:,} evaluation{'s' * (n != 1)} of the model."


def _certainty(
    result: "ResultNumbers",
    read: Reading,
    causes: Sequence[Cause],
    start: int,
    stop: int,
) -> list[str]:
    if not causes:
        return []
    if all(math.isnan(cause.standard_error) for cause in causes[:3]):
        return ["The errors of these estimates are unknown: nothing tells a cause from noise."]
    n_bounds = result.provenance.get("share_censored") or 0.0
    if n_bounds:
        return [
            f"Nothing was sampled, and {n_bounds:.0%} of the values that these numbers are made of "
            "are not told but bounded: within the bounds they are guesses."
        ]
    if all(cause.standard_error == 0 for cause in causes):
        return ["These numbers are exact for this way of measuring: nothing was sampled."]
    marked = [cause for cause in causes if cause.is_marked]
    if not marked:
        return []
    found: list[str] = []
    if len(causes) > 1:
        one, other = leading(causes)
        apart = abs(one.attribution) - abs(other.attribution)
        error = read.difference_error(start, stop, one, other)
        comparison = f"in size they differ by {apart:.2f}{plus_minus(error)}".replace("-", "−")
        which = "the first two causes" if other.is_marked else "it and the next cause"
        if math.isnan(error):
            found.append(f"Which of {which} is the stronger cannot be told.")
        elif read.is_stronger(start, stop, one, other):
            found.append(f"The order of {which} is certain at 95 % ({comparison}).")
        else:
            found.append(f"The order of {which} is not certain ({comparison}).")
    n_noise = len(causes) - len(marked)
    if n_noise:
        what = "one other part" if n_noise == 1 else f"the {n_noise} other parts"
        found.append(f"What {what} of the prompt seem{'s' * (n_noise == 1)} to do may be noise.")
    return found


def subject_of(result: "ResultNumbers", start: int, stop: int) -> str:
    """``“Lisbon”``, or ``the answer “…”``."""
    pieces = [piece for piece in result.output_pieces[start:stop] if piece.role != "template"]
    text = "".join(piece.text for piece in pieces).strip() or " ".join(
        result.output_tokens[start:stop]
    )
    if stop - start == 1:
        return quoted(result.names.tokens[start], _ANSWER)
    is_whole = (start, stop) == (0, len(result.output_tokens))
    return f"{'the answer ' if is_whole else ''}{quoted(text, _ANSWER)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(share: float) -> str:
    return "less than 0.01 %" if share < 1e-4 else f"{float(f'{100 * share:.2g}'):g} %"
