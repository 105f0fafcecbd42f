"""The target: text or ids that are given, or what the model writes."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from captum_llm_ext import _compat
from captum_llm_ext.base.digest import stacklevel_of_caller
from captum_llm_ext.model import Generation, RowScorer, Scorer, TokenRow, check_same
from captum_llm_ext.model.scoring.progress import Listener
from captum_llm_ext.text import encoding, tokens
from captum_llm_ext.text.inputs import GeneratedText, RenderedPrompt

# Ids or tokens, several or one.
Skipped = Tensor | Sequence[int] | Sequence[str] | int

_INT64_LIMIT = 1 << 63
# So many ids that a text begins with are no accident.
_MIN_SHARED_IDS = 4
# A floor is what a few batches show: others may differ by more.
_NOISE_FLOORS = 2.0


def target_ids(
    target: object,
    tokenizer: Any,
    gen_args: Mapping[str, Any] | None,
    generate: Callable[[], Tensor],
    prompt: RenderedPrompt,
    scorer: RowScorer,
    vocabulary_size: int | None,
    skip_tokens: Skipped | None = None,
) -> Tensor:
    """The token ids to explain, int64 ``(n_target,)``, checked before anything is scored.

    Args:
        target: As of `as_ids`; None: the model generates it.
        tokenizer: The model's tokenizer.
        gen_args: What the model generates with, without a target only.
        generate: Has it do so.
        prompt: With every feature present.
        scorer: Of the model.
        vocabulary_size: Of the model; None where it is not known.
        skip_tokens: As of `without_skipped`.

    Raises:
        ValueError: If `gen_args` would be ignored, `target` is empty or no single text, an id is
            outside the vocabulary, or prompt and target are longer than the model's positions.
        TypeError: If `target` is of another kind.

    Warns:
        UserWarning: If `target` begins with the prompt, as the output of ``generate`` does, or with
            a token that a tokenizer puts before every text.
    """
    if target is None:
        ids = without_skipped(generate(), skip_tokens, tokenizer)
    else:
        ids = _given_ids(target, tokenizer, gen_args, prompt, skip_tokens)
    _check_ids(ids, prompt, scorer, vocabulary_size)
    return ids


def _given_ids(
    target: object,
    tokenizer: Any,
    gen_args: Mapping[str, Any] | None,
    prompt: RenderedPrompt,
    skip_tokens: Skipped | None,
) -> Tensor:
    """Token ids of a target that the user gave."""
    if gen_args is not None:
        raise ValueError("`gen_args` would be ignored: with a `target` nothing is generated.")
    ids = as_ids(target, tokenizer)
    ids = ids if len(ids) == 0 else _continuation(target, ids, prompt, tokenizer)
    ids = without_skipped(ids, skip_tokens, tokenizer)
    first = getattr(tokenizer, "bos_token_id", None)
    is_left = skip_tokens is None and not isinstance(target, str)
    if prompt.ids and is_left and ids[:1].tolist() == [first]:
        _warn(
            "`target` begins with the token that texts begin with, which is explained as well: "
            "encode it with `add_special_tokens=False`, or leave the first id out."
        )
    return ids


def _check_ids(
    ids: Tensor, prompt: RenderedPrompt, scorer: RowScorer, vocabulary_size: int | None
) -> None:
    if len(ids) == 0:
        raise ValueError("the target is empty: give at least one token to explain.")
    wrong = [i for i in ids.tolist() if i < 0 or i >= (vocabulary_size or sys.maxsize)]
    if wrong:
        raise ValueError(
            f"target token id {wrong[0]} is outside the model's vocabulary of {vocabulary_size} "
            "tokens: check that tokenizer and model belong together."
        )
    scorer.check_length(len(prompt.ids) + len(ids) - 1, "prompt and target")


def without_skipped(ids: Tensor, skip_tokens: Skipped | None, tokenizer: Any) -> Tensor:
    """The target less some tokens, as captum had it up to 0.8.

    Args:
        ids: Token ids ``(n_target,)``.
        skip_tokens: Ids or tokens to leave out; None or empty: none.
        tokenizer: The model's tokenizer.

    Raises:
        ValueError: If a token is none of the vocabulary.

    Warns:
        DeprecationWarning: If there are any.
    """
    if isinstance(skip_tokens, Tensor):
        skip_tokens = skip_tokens.flatten().tolist()
    given: Sequence[Any] = (
        [skip_tokens] if isinstance(skip_tokens, str | int) else skip_tokens or ()
    )
    if not given:
        return ids
    warnings.warn(
        "`skip_tokens` is deprecated, as captum dropped it in 0.9: give the target as ids without "
        "them.",
        DeprecationWarning,
        stacklevel=stacklevel_of_caller(),
    )
    skipped = {tokens.token_id(tokenizer, t) if isinstance(t, str) else int(t) for t in given}
    return torch.tensor(
        [i for i in ids.tolist() if i not in skipped], dtype=torch.long, device="cpu"
    )


def as_ids(target: object, tokenizer: Any) -> Tensor:
    """The target's token ids; text is encoded without special tokens, as in captum.

    Args:
        target: A text, or a list of one; one row of token ids: a tensor, an array, a sequence of
            integers, or what holds one (what a tokenizer returns, or ``generate``).
        tokenizer: The model's tokenizer.

    Raises:
        ValueError: If there are several texts.
        TypeError: If it is neither a text nor one row of ids.
    """
    plain = plain_target(target)
    is_text = isinstance(plain, str)
    ids = encoding.ids(tokenizer, plain, add_special_tokens=False) if is_text else plain
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def plain_target(target: object) -> str | list[int]:
    """A target as JSON has it: its text, or its token ids.

    Raises:
        ValueError, TypeError: As `as_ids`.
    """
    held = _unwrapped(target)
    if isinstance(held, str):
        return str(held)
    entries = held.tolist() if hasattr(held, "tolist") else held
    if not isinstance(entries, Sequence) or isinstance(entries, bytes | bytearray):
        raise TypeError(
            f"`target` is a {type(target).__name__}: give a text, token ids (n_target,), or None "
            "to have the model generate."
        )
    row = _only_row([_scalar(entry) for entry in cast(Sequence[Any], entries)], held)
    if len(row) == 1 and isinstance(row[0], str):
        return row[0]
    if any(isinstance(entry, str) for entry in row):
        raise ValueError(
            f"`target` is a list of {len(row)} entries with texts among them: give one text, or "
            "token ids (`tokenizer.convert_tokens_to_ids(tokens)`). Of several answers, attribute "
            "each by itself."
        )
    for wrong in (entry for entry in row if type(entry) is not int):
        kind = f" of type {held.dtype}" if hasattr(held, "dtype") else ""
        raise TypeError(
            f"`target`{kind} holds {wrong!r}, a {type(wrong).__name__}, which is no token id: give "
            "integers of shape (n_target,), or a text."
        )
    beyond = next((entry for entry in row if not -_INT64_LIMIT <= entry < _INT64_LIMIT), None)
    if beyond is not None:
        raise ValueError(f"target token id {beyond} is outside of every vocabulary.")
    return row


def _unwrapped(target: object) -> Any:
    """The ids within what tokenizers and ``generate`` return; anything else as it is."""
    if isinstance(target, Mapping):
        mapping = cast(Mapping[str, Any], target)
        name = next((name for name in ("sequences", "input_ids") if name in mapping), None)
        if name is None:
            raise TypeError(
                f"`target` is a {type(target).__name__} without `input_ids` or `sequences`: give a "
                "text or token ids (n_target,)."
            )
        found, mask = mapping[name], mapping.get("attention_mask")
        return found if mask is None else _without_padding(found, mask)
    if isinstance(target, Tensor):
        if target.device.type == "meta":
            raise TypeError("`target` is a tensor without numbers, on the device meta: give ids.")
        return target.detach().cpu()
    return getattr(target, "ids", target)  # of the package tokenizers


def _without_padding(ids: Any, mask: Any) -> list[Any]:
    """One row of ids without those that a mask says are padding."""
    row, kept = (
        _only_row(list(part.tolist() if hasattr(part, "tolist") else part), part)
        for part in (ids, mask)
    )
    return [i for i, keep in zip(row, kept, strict=True) if keep]


def _only_row(entries: list[Any], held: Any) -> list[Any]:
    """The entries of a row, also where it is the only one of several.

    Raises:
        TypeError: If there are more.
    """
    rows = [entry for entry in entries if isinstance(entry, list | tuple)]
    if not rows:
        return entries
    inner = [_scalar(entry) for entry in rows[0]]
    if len(entries) == 1 and not any(isinstance(entry, list | tuple) for entry in inner):
        return inner
    shape = f"shape {tuple(held.shape)}" if hasattr(held, "shape") else f"{len(entries)} rows"
    raise TypeError(
        f"`target` has {shape}: give the token ids of one answer, (n_target,), and attribute each "
        "by itself."
    )


def _scalar(entry: Any) -> Any:
    """A number of numpy or torch as Python has it."""
    return entry.tolist() if hasattr(entry, "tolist") else entry


def _continuation(target: object, ids: Tensor, prompt: RenderedPrompt, tokenizer: Any) -> Tensor:
    """The target without the prompt, where it is what ``generate`` gave, prompt and all."""
    special = {*getattr(tokenizer, "all_special_ids", ())}
    begins = next((i for i, token in enumerate(prompt.ids) if token not in special), 0)
    if isinstance(target, str):
        said = tokens.decode(tokenizer, prompt.ids[begins:]).strip()
        if len(prompt.ids) - begins >= _MIN_SHARED_IDS and target.lstrip().startswith(said):
            _warn(
                "`target` begins with the text of the prompt: where it is the whole output, give "
                "what comes after the prompt alone."
            )
        return ids
    given = ids.tolist()
    pad = getattr(tokenizer, "pad_token_id", None)
    n_pad = next((i for i, token in enumerate(given) if token != pad), 0)
    for before in dict.fromkeys((prompt.ids, prompt.ids[begins:])):
        n = n_pad + len(before)
        if not before or tuple(given[n_pad:n]) != before:
            continue
        said = f"`target` begins with the {len(before)} token ids of the prompt"
        if before[0] not in special and len(before) < _MIN_SHARED_IDS:
            _warn(f"{said}: where it is the whole output, give `target[{n}:]`.")
            return ids
        if n == len(given):
            raise ValueError(f"{said}, and nothing comes after them: there is nothing to explain.")
        _warn(
            f"{said}, as the output of `generate` does: what comes after them is explained. Give "
            f"`target[{n}:]` to say so."
        )
        return ids[n:]
    return ids


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=stacklevel_of_caller())


def generate_target(
    scorer: Scorer, prompt: RenderedPrompt, generation: Generation, seed: int
) -> Tensor:
    """What a model of this process writes, int64 ``(n_target,)``.

    Args:
        scorer: Of the model.
        prompt: With every feature present.
        generation: How.
        seed: Seeds sampling.

    Raises:
        ValueError: If it does not fit into the model's positions, or is not one answer.
    """
    n_prompt, longest = len(prompt.ids), generation.max_length
    if longest is not None and longest <= n_prompt:
        raise ValueError(
            f"`max_length` is {longest}, and the prompt alone has {n_prompt} tokens: give "
            "`max_new_tokens`."
        )
    n_new = generation.max_new_tokens or (longest or n_prompt + 1) - n_prompt
    scorer.check_length(
        n_prompt + n_new - 1, f"the prompt and {n_new} new tokens (`max_new_tokens`)"
    )
    both = {*(prompt.extras or ())} & {*generation.arguments}
    if both:
        raise ValueError(f"`gen_args` has {sorted(both)[0]!r}, which `inp` gives: leave it out.")
    return scorer.generate(TokenRow(prompt.ids, (), prompt.extras), generation.arguments, seed)


def announce_answer(
    listener: object,
    attribution: Any,
    prompt: RenderedPrompt,
    ids: Tensor,
    generation: Generation,
) -> None:
    """Tells who listens what was generated, before anything is made of it.

    Args:
        listener: Who may hear of a run; one that is no `Listener` does not.
        attribution: Whose model wrote it.
        prompt: What it answers.
        ids: The answer, ``(n_target,)``.
        generation: How it was generated.
    """
    if isinstance(listener, Listener):
        ends = _compat.end_ids(getattr(attribution, "model", None), attribution.tokenizer)
        text = tokens.decode(attribution.tokenizer, ids.tolist())
        listener.answered(text, len(ids), generation.cuts(ids, len(prompt.ids), ends))


def whole_row(prompt: RenderedPrompt, generated: GeneratedText) -> TokenRow:
    """What the model reads where everything is present.

    Args:
        prompt: With every feature present.
        generated: The target.
    """
    every = torch.ones(1, generated.n_features, dtype=torch.bool, device="cpu")
    generator = torch.Generator().manual_seed(0)  # nothing is absent, nothing is drawn
    draws = torch.zeros(1, dtype=torch.int64, device="cpu")
    (text,) = generated.render([prompt.ids], every, generator, draws)
    return TokenRow(*text, prompt.extras, prompt.key)


def check_stored(
    scorer: RowScorer,
    prompt: RenderedPrompt,
    generated: GeneratedText,
    stored: Tensor,
    foils: Tensor | None = None,
) -> None:
    """Refuses a stored result that another model gave.

    Args:
        scorer: Of the model as it is now.
        prompt: With every feature present.
        generated: The result's target.
        stored: The result's `full_values`.
        foils: The result's `foils`.

    Raises:
        ValueError: If one of its values is another.
    """
    target = generated.target
    row = whole_row(prompt, generated)
    foils = None if foils is None else foils.cpu()
    now = scorer.values([row], target, foils)[0]
    if foils is not None:
        now = now[: len(target)] - now[len(target) :]
    tolerance = scorer.tolerance(now)
    if bool(((now - stored.cpu()).abs() > tolerance).any()):
        # Rows of other batches may move it further, which takes some passes to find out.
        floor = scorer.noise_floor(row, target, foils)
        tolerance = tolerance if floor is None else tolerance + _NOISE_FLOORS * floor
    check_same(
        now,
        stored,
        tolerance,
        whose="the folder holds results",
        advice="Give the same model, or another folder. Nothing was overwritten.",
    )
