"""How token ids and characters line up, on any tokenizer.

Fast tokenizers tell the offsets of their tokens; for others they are found by decoding token by
token. Only the methods of captum's ``TokenizerLike`` are relied upon.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from captum_llm_ext import encoding

_INCOMPLETE = "\ufffd"
# A UTF-8 character has at most four bytes; byte-level tokens may also split a mark off its base.
_LONGEST_FRAGMENT = 8
_WINDOW = 16
# How many characters to the left decide how a text is tokenised in place.
CONTEXT = 16
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Encoding:
    """Token ids of a text and the characters each came from.

    Attributes:
        ids: Token ids, ``n_tokens`` of them.
        anchors: Per token the character that decides whom it belongs to: its first that is not
            white space. None for special tokens other than an unknown word.
        starts: Per token its first character, the white space before it included.
    """

    ids: tuple[int, ...]
    anchors: tuple[int | None, ...]
    starts: tuple[int, ...]


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> Encoding:
    """Encodes a text with the place of every token in it.

    A text that already begins with BOS (a rendered chat template) gets no second one.
    """
    ids, offsets = _encode_with_offsets(tokenizer, text, add_special_tokens)
    bos, bos_id = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if bos and text.startswith(bos) and ids[:2] == [bos_id, bos_id]:
        ids, offsets = ids[1:], offsets[1:]
    special: frozenset[int] = frozenset(getattr(tokenizer, "all_special_ids", None) or ())
    # What the vocabulary does not know is a word of the text all the same.
    unknown = getattr(tokenizer, "unk_token_id", None)
    anchors: list[int | None] = []
    starts: list[int] = []
    covered = 0
    for token, (start, stop) in zip(ids, offsets, strict=True):
        starts.append(covered if not text[covered:start].strip() else start)
        if token in special and not (token == unknown and start < stop):
            anchors.append(None)
        else:
            space = len(text[start:stop]) - len(text[start:stop].lstrip())
            anchors.append(start if start + space == stop else start + space)
        covered = max(covered, stop)
    return Encoding(tuple(ids), tuple(anchors), tuple(starts))


def encode_in_place(tokenizer: Any, text: str, left: str) -> tuple[int, ...]:
    """Ids of `text` as they come out after `left`, without the ids of `left`.

    Tokenizers that mark the beginning of a text, or put a space before it, then treat `text` as
    the continuation it is.
    """
    tail = left[-CONTEXT:]
    if not text:
        return ()
    if not tail:
        return tuple(_encode_with_offsets(tokenizer, text, False)[0])
    ids, offsets = _encode_with_offsets(tokenizer, tail + text, False)
    for position, (start, stop) in enumerate(offsets):
        if start >= len(tail):
            return tuple(ids[position:])
        if stop > len(tail):
            break  # one token holds characters of both: the border is cut by force
    return tuple(_encode_with_offsets(tokenizer, text, False)[0])


def count_in_place(tokenizer: Any, text: str, left: str) -> int:
    """How many tokens `text` is after `left`."""
    return len(encode_in_place(tokenizer, text, left))


def pieces(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text of every token: put together, they are the decoded text.

    A token that holds only a part of a character has the empty text; the one that completes the
    character has all of it. Ids are decoded in short windows, never encoded again.

    Args:
        tokenizer: The tokenizer.
        ids: Token ids, ``n_tokens`` of them.
        before: Ids that precede them, so that a leading space is not taken for a beginning.
    """
    window = [*before[-1:]]
    known = decode(tokenizer, window) if window else ""
    texts: list[str] = []
    pending = 0
    for position, token in enumerate(ids):
        window.append(token)
        text = decode(tokenizer, window)
        pending = pending + 1 if text.endswith(_INCOMPLETE) else 0
        if 0 < pending < _LONGEST_FRAGMENT and position + 1 < len(ids):
            texts.append("")
            continue
        pending = 0
        texts.append(text[_common(text, known) :])
        known = text
        if len(window) > _WINDOW:
            window = window[-1:]
            known = decode(tokenizer, window)
    return texts


def labels(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """One printable name per token: stripped text, visible white space, parts of characters told.

    Names are for people. Two tokens may share one.
    """
    texts = pieces(tokenizer, ids, before)
    names: list[str] = []
    fragments = 0
    for position, text in enumerate(texts):
        if not text and position + 1 < len(texts):
            fragments += 1
            continue
        name = _printable(text) or str(tokenizer.convert_ids_to_tokens([ids[position]])[0])
        if fragments:
            total = fragments + 1
            names.extend(f"{name}[{part}/{total}]" for part in range(1, total + 1))
        else:
            names.append(name)
        fragments = 0
    return names


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens shown, white space as it stands."""
    tensor = torch.tensor(list(ids), dtype=torch.long, device="cpu")
    if hasattr(tokenizer, "clean_up_tokenization_spaces"):
        return cast(str, tokenizer.decode(tensor, clean_up_tokenization_spaces=False))
    return cast(str, tokenizer.decode(tensor))


def token_id(tokenizer: Any, token: str) -> int:
    """The id of a token of the vocabulary.

    Raises:
        ValueError: If the vocabulary has no such token.
    """
    found = tokenizer.convert_tokens_to_ids([token])[0]
    unknown = getattr(tokenizer, "unk_token_id", None)
    if found is None or (found == unknown and token != getattr(tokenizer, "unk_token", None)):
        raise ValueError(
            f"{token!r} is no token of this vocabulary: a text baseline names one token, as in "
            "captum (say '<pad>'). For replacement texts give a list with one entry per feature."
        )
    return int(found)


def start_id(tokenizer: Any) -> int | None:
    """What a row begins with when nothing else is left of it: BOS, else EOS, else padding."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    return None


def _common(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    if one.startswith(other):
        return len(other)
    return next(i for i, (a, b) in enumerate(zip(one + "\0", other + "\1", strict=False)) if a != b)


def _printable(text: str) -> str:
    shown = text.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")
    return shown.strip() or "␣" * len(shown)


def _encode_with_offsets(
    tokenizer: Any, text: str, add_special_tokens: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    if getattr(tokenizer, "is_fast", True):
        try:
            enc = encoding.call(
                tokenizer, text, add_special_tokens=add_special_tokens, return_offsets_mapping=True
            )
            return list(enc["input_ids"]), [tuple(pair) for pair in enc["offset_mapping"]]
        except (NotImplementedError, KeyError, TypeError):
            pass  # a tokenizer that cannot tell: found out below
    ids = encoding.ids(tokenizer, text, add_special_tokens=add_special_tokens)
    return ids, _find_offsets(tokenizer, text, ids)


def _find_offsets(tokenizer: Any, text: str, ids: list[int]) -> list[tuple[int, int]]:
    """Offsets for a tokenizer that knows none, by looking for each token's text in turn."""
    special: frozenset[int] = frozenset(getattr(tokenizer, "all_special_ids", None) or ())
    offsets: list[tuple[int, int]] = []
    position = 0
    pending: list[int] = []
    lowered = text.lower() if len(text.lower()) == len(text) else text
    for token in ids:
        pending.append(token)
        shown = decode(tokenizer, pending)
        # Some tokenizers show part of a character as U+FFFD, others as nothing.
        if (not shown or shown.endswith(_INCOMPLETE)) and len(pending) < _LONGEST_FRAGMENT:
            continue
        part = shown.strip().removeprefix("##")
        found = _find_next(text, lowered, part, position)
        is_special = token in special and found is None
        if found is None and not shown.strip() and not is_special:
            found = position + len(shown)  # white space alone
            span = (position, min(found, len(text)))
        elif found is None:
            span = (position, position)
        else:
            span = (found, found + len(part))
        offsets.extend([span] * len(pending))
        position = span[1]
        pending = []
    offsets.extend([(position, len(text))] * len(pending))
    return offsets


def _find_next(text: str, lowered: str, part: str, position: int) -> int | None:
    """Where `part` comes next, with nothing but white space before it."""
    space = _SPACE.match(text, position)
    at = space.end() if space else position
    if part and (text.startswith(part, at) or lowered.startswith(part.lower(), at)):
        return at
    return None
