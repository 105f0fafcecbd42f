"""Corrupted texts: a feature replaced by another text of as many tokens, or by noise."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from captum_llm_ext.base.digest import digest
from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import draw_generator
from captum_llm_ext.text.inputs import Context, GeneratedText, render_text

# A feature by its column in results, or by its name; or several.
Feature = int | str | Sequence[int | str]

# Draws of a baseline tried to find one of as many tokens: this many, plus this many per wanted
# draw. Of texts of up to three tokens, one in ten or more qualifies. Chosen, not measured.
_TRIES, _TRIES_EACH = 64, 8
_SHOWN = 4


@dataclass(frozen=True)
class Corruption:
    """The token ids that the model reads, and where they may differ from the original.

    Attributes:
        ids: Token ids of the prompt and of the target before its last token.
        positions: Per target token the position that predicts it; -1 if the replaced feature
            contains the token, so that this text does not predict it.
        places: Positions whose ids or embeddings may differ.
        text: The replacement, for display.
        noise: Added to the embeddings, ``(length, size)``, or None.
        key: Identifies the text among others.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    places: tuple[int, ...] = ()
    text: str = ""
    noise: Tensor | None = field(default=None, compare=False)
    key: str = ""


def original_text(context: Context, generated: GeneratedText) -> Corruption:
    """The original text."""
    text = generated.whole(context.full)
    return Corruption(text.ids, tuple(text.positions), key=digest(text.ids))


@dataclass(frozen=True)
class Selection:
    """The features that are replaced.

    Attributes:
        prompt: Indices of prompt features.
        output: Indices of target features.
        names: Their names.
    """

    prompt: frozenset[int]
    output: frozenset[int]
    names: tuple[str, ...]


def select_features(feature: Feature, context: Context, generated: GeneratedText) -> Selection:
    """The features that a user selects.

    Args:
        feature: One or several, each by its name or by its column: those of the prompt first, then
            those of the target.
        context: The prompt.
        generated: The target.

    Raises:
        ValueError: If there is no such feature, several have this name, or none was given.
        TypeError: If it is neither a name nor an integer.
    """
    prompt = context.prompt
    n_prompt = len(prompt.names)
    names = [*prompt.names, *generated.names]
    several = isinstance(feature, Sequence) and not isinstance(feature, str)
    given = cast("Sequence[int | str]", feature if several else [feature])
    if not given:
        raise ValueError("`feature` is empty: name at least one feature to replace.")
    columns = [_column(one, names) for one in given]
    own = frozenset(prompt.columns[c] for c in columns if c < n_prompt)
    output = frozenset(c - n_prompt for c in columns if c >= n_prompt)
    n_causes = generated.n_causes
    for late in sorted(output):
        if late >= n_causes:
            raise ValueError(
                f"no target token comes after {generated.names[late]!r}, so replacing it changes "
                "no value: name an earlier feature."
            )
    return Selection(own, output, tuple(names[c] for c in columns))


def _column(one: object, names: Sequence[str]) -> int:
    if isinstance(one, bool) or not isinstance(one, int | str):
        raise TypeError(
            f"`feature` is {one!r}: give a feature's name, its column (prompt first, then output), "
            "or a list of such."
        )
    if isinstance(one, int):
        if not -len(names) <= one < len(names):
            raise ValueError(f"`feature` is {one}, and there are {len(names)} features.")
        return one % len(names)
    wanted = one.strip()
    found = [i for i, name in enumerate(names) if one == name]
    found = found or [i for i, name in enumerate(names) if name.strip() == wanted]
    found = found or [i for i, name in enumerate(names) if name.strip(" .,;:!?\"'") == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"`feature` {one!r} is the name of {len(found)} features: give one of their columns "
            f"{found}."
        )
    shown = ", ".join(repr(name.strip()) for name in names[:12]) + ", …" * (len(names) > 12)
    raise ValueError(f"`feature` {one!r} names none of the {len(names)} features: {shown}")


def places_of(which: Selection, context: Context, generated: GeneratedText) -> frozenset[int]:
    """Positions whose ids may differ if these features are absent."""
    start = len(context.full.ids)
    own = context.prompt.places_without(which.prompt)
    later = (
        p for place in generated.places() if place.feature in which.output for p in place.positions
    )
    return own | {start + p for p in later}


def replacement_texts(
    which: Selection,
    context: Context,
    generated: GeneratedText,
    tokenizer: object,
    *,
    n_draws: int,
    seed: int,
) -> list[Corruption]:
    """Texts in which other tokens, equally many, replace these features; one per draw.

    Args:
        which: The features.
        context: The prompt, whose baselines provide the replacements.
        generated: The target, with baselines of its own.
        tokenizer: The model's tokenizer.
        n_draws: Number of texts.
        seed: Seeds all draws.

    Raises:
        ValueError: If the baselines give no text of as many tokens, or several texts are wanted and
            all draws are equal.

    Warns:
        UserWarning: If they give fewer than `n_draws` texts.
    """
    prompt, n_prompt = context.prompt, context.prompt.n_features
    n_tries = _n_tries(which, context, generated, n_draws)
    masks = torch.ones(n_tries, n_prompt + generated.n_causes, dtype=torch.bool, device="cpu")
    masks[:, sorted(which.prompt)] = False
    masks[:, [n_prompt + g for g in sorted(which.output)]] = False
    draws = torch.arange(n_tries, dtype=torch.int64, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    texts = render_text(prompt, generated, masks, generator, draws)
    may_change = places_of(which, context, generated)
    changed = tuple(sorted(may_change))
    full = original_text(context, generated).ids
    found: list[Corruption] = []
    lengths: Counter[int] = Counter()
    for replaced in texts:
        ids = replaced.ids
        lengths[len(may_change) + len(ids) - len(full)] += 1
        is_as_long = len(replaced.prompt.ids) == len(context.full.ids) and len(ids) == len(full)
        if not is_as_long or ids == full:
            continue
        differs = {i for i, (a, b) in enumerate(zip(ids, full, strict=True)) if a != b}
        if differs - may_change:
            continue  # equal total length, but not place by place
        text = tokens.decode(tokenizer, [ids[i] for i in changed])
        found.append(Corruption(ids, tuple(replaced.positions), changed, text, key=digest(ids)))
        if len(found) == n_draws:
            return found
    if found:
        warn_user(
            f"of {n_tries} draws only {len(found)} are other texts of {len(changed)} tokens, and "
            f"`n_draws` asks for {n_draws}: these are taken.",
        )
        return found
    raise ValueError(
        _none_found(
            which, tokens.decode(tokenizer, [full[i] for i in changed]), lengths, len(changed)
        )
    )


def _n_tries(which: Selection, context: Context, generated: GeneratedText, n_draws: int) -> int:
    """Maximum number of draws until `n_draws` texts have the right length; 1 if all are equal."""
    is_same = not which.prompt or context.prompt.deterministic
    is_same &= not which.output or generated.deterministic
    if is_same and n_draws > 1:
        raise ValueError(
            f"`n_draws` is {n_draws}, and every draw of these baselines is the same: leave it out."
        )
    return 1 if is_same else max(_TRIES, _TRIES_EACH * n_draws)


def _none_found(which: Selection, text: str, lengths: Counter[int], wanted: int) -> str:
    names = ", ".join(repr(name) for name in which.names)
    if set(lengths) == {wanted}:
        reason = "they give it itself, or move what stands between its places"
    else:
        shown = [f"{n} tokens" for n, _ in lengths.most_common(_SHOWN)]
        reason = f"of {lengths.total()} draws they give texts of {', '.join(shown)}"
    return (
        f"nothing of as many tokens stands in for {names} ({text!r}, {wanted} tokens): {reason}. "
        "Patching needs every other token where it was: give `baselines` with other texts of "
        f"{wanted} tokens (lists or a mapping of texts, a larger corpus, an id for each token), "
        'another feature, or `kind="noise"`.'
    )


def noisy_texts(
    which: Selection,
    context: Context,
    generated: GeneratedText,
    embedded: Tensor,
    *,
    n_draws: int,
    scale: float,
    seed: int,
) -> list[Corruption]:
    """The text with Gaussian noise on these features' embeddings (Meng et al. 2022, section 2).

    Args:
        which: The features.
        context: The prompt.
        generated: The target.
        embedded: Embeddings of the text, ``(1, length, size)``.
        n_draws: Number of texts.
        scale: Standard deviation of the noise, in units of that of the text's embeddings.
        seed: Seeds all draws.
    """
    clean = original_text(context, generated)
    start = len(context.full.ids)
    own = {
        p
        for place in context.prompt.places()
        if place.feature in which.prompt
        for p in place.positions
    }
    own |= {
        start + p
        for place in generated.places()
        if place.feature in which.output
        for p in place.positions
    }
    places = sorted(own)
    sigma = float(embedded.to(torch.promote_types(embedded.dtype, torch.float32)).std())
    found: list[Corruption] = []
    for draw in range(n_draws):
        generator = draw_generator(seed, draw)
        shape = (len(places), embedded.shape[-1])
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        noise = torch.zeros(embedded.shape[1:], dtype=torch.float32, device="cpu")
        noise[places] = scale * sigma * drawn
        found.append(
            Corruption(
                clean.ids,
                clean.positions,
                tuple(places),
                f"noise {draw}",
                noise.to(embedded.device),
                f"noise of {scale!r} times {sigma!r}, {seed}:{draw} on {places}",
            )
        )
    return found
