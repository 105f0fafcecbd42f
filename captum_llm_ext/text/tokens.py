"""Alignment of token ids with characters, for any tokenizer.

Fast tokenizers return the offsets of their tokens; for others, and if those fail, tokens are
decoded and searched in the text. Only the methods of captum's ``TokenizerLike`` are required.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch

from captum_llm_ext.text import encoding

_REPLACEMENT_CHARACTER = "\ufffd"
_BYTES = re.compile("(?:<0x[0-9A-Fa-f]{2}>)+")
_SPACE = "\u2581"  # SentencePiece's space mark, which some tokenizers leave in decoded text
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a part of a character, whatever the tokenizer marks it as
# A UTF-8 character has at most four bytes; byte-level tokens may also split a combining mark off
# its base.
_LONGEST_FRAGMENT = 8
# Number of tokens decoded together to see what the last of them adds. Two suffice for byte-level
# BPE; the others are for decoders that look at neighbours, and for characters in several tokens.
# Chosen, not measured.
_DECODE_WINDOW = 16
# Number of characters to the left that decide how a text is tokenised in place. In 400 splits of
# prose, code and Markdown one character gave the same as 300 (byte-level BPE of 49,152 tokens); the
# others are for vocabularies with tokens of several words.
CONTEXT = 16
# If decoded text and the text itself differ (a normaliser, an unknown word), they are realigned
# within this many characters, at this many equal ones. Chosen, not measured: the window is longer
# than words, and three equal characters in a row are rarely chance; the cost grows with the square
# of the window.
_RESYNC_WINDOW, _RESYNC_MATCH = 24, 3

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class Encoding:
    """Token ids of a text, each with its span of characters.

    Attributes:
        ids: Token ids, ``n_tokens`` of them.
        anchors: Per token the character that decides its owner: its first one that is not white
            space. None for special tokens added by the tokenizer.
        starts: Per token its first character, including leading white space.
        stops: Per token the end of its last character, which tokens of one character share.
        special: Per token whether it is special, in the text or added; unknown words are not.
        n_opening: Number of initial characters that spell the BOS that the tokenizer would add.
    """

    ids: tuple[int, ...]
    anchors: tuple[int | None, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    special: tuple[bool, ...]
    n_opening: int = 0


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> Encoding:
    """Encodes a text, with the character span of every token.

    A text that already begins with BOS (a rendered chat template) gets no second one.
    """
    ids, offsets = _encode_with_offsets(tokenizer, text, add_special_tokens)
    bos, bos_id = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    n_opening = 0
    if (
        bos
        and text.startswith(bos)
        and encoding.ids(tokenizer, bos, add_special_tokens=True)[:2] == [bos_id, bos_id]
    ):
        n_opening = len(bos)
        if ids[:2] == [bos_id, bos_id]:
            ids, offsets = ids[1:], offsets[1:]
    return _encoding(tokenizer, text, ids, offsets, n_opening)


def find(tokenizer: Any, text: str, ids: Sequence[int]) -> Encoding:
    """Aligns tokens with the text that they spell, up to normalisation."""
    return _encoding(tokenizer, text, ids, _find_offsets(tokenizer, text, ids))


def spell(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> tuple[str, Encoding]:
    """Decodes tokens, special ones included, with the character span of every token.

    Args:
        tokenizer: The tokenizer.
        ids: Token ids, ``n_tokens`` of them.
        before: Preceding ids, so that a leading space is recognised.
    """
    texts = pieces(tokenizer, ids, before)
    stops = list(accumulate(map(len, texts)))
    offsets = [(stop - len(text), stop) for stop, text in zip(stops, texts, strict=True)]
    # All parts of a character get the whole character.
    for i in range(len(texts) - 2, -1, -1):
        if not texts[i]:
            offsets[i] = offsets[i + 1]
    text = "".join(texts)
    return text, _encoding(tokenizer, text, ids, offsets)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of special tokens; the unknown-word id only if it also ends texts."""
    found = frozenset(int(token) for token in getattr(tokenizer, "all_special_ids", None) or ())
    ends = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    found = (found | _added_special_ids(tokenizer)) - (
        {getattr(tokenizer, "unk_token_id", None)} - ends
    )
    return frozenset(found)


_added: "WeakKeyDictionary[Any, tuple[int, frozenset[int]]]" = WeakKeyDictionary()


def _added_special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of added tokens marked as special that are not BOS, EOS or similar."""
    try:
        size, known = len(tokenizer), _added.get(tokenizer)
        if known is None or known[0] != size:  # computing the list is slow
            tokens = tokenizer.added_tokens_decoder.items()
            ids = {int(i) for i, t in tokens if t.special and not _BYTE.fullmatch(t.content)}
            known = _added[tokenizer] = size, frozenset(ids)
        return known[1]
    except Exception:  # tokenizers without such a list raise various errors
        return frozenset()


def _encoding(
    tokenizer: Any, text: str, ids: Sequence[int], offsets: Offsets, n_opening: int = 0
) -> Encoding:
    special = special_ids(tokenizer)
    anchors: list[int | None] = []
    starts: list[int] = []
    covered = 0
    for token, (start, stop) in zip(ids, offsets, strict=True):
        starts.append(covered if not text[covered:start].strip() else start)
        if token in special and start == stop:
            anchors.append(None)
        else:
            space = len(text[start:stop]) - len(text[start:stop].lstrip())
            # Offsets without white space leave some tokens empty.
            first = starts[-1] if start == stop else start
            anchors.append(first if start + space == stop else start + space)
        covered = max(covered, stop)
    return Encoding(
        tuple(ids),
        tuple(anchors),
        tuple(starts),
        tuple(stop for _, stop in offsets),
        tuple(token in special for token in ids),
        n_opening,
    )


def encode_in_place(tokenizer: Any, text: str, left: str) -> tuple[int, ...]:
    """Encodes `text` as the continuation of `left`, without the ids of `left`.

    Tokenizers that mark the beginning of a text, or prepend a space, then treat `text` as a
    continuation.
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
            break  # one token has characters of both: the border is forced
    return tuple(_encode_with_offsets(tokenizer, text, False)[0])


def count_in_place(tokenizer: Any, text: str, left: str) -> int:
    """Number of tokens of `text` as the continuation of `left`."""
    return len(encode_in_place(tokenizer, text, left))


def pieces(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text of each token; concatenated, they are the decoded text.

    A token that is only part of a character has an empty text; the one that completes it has the
    whole character. Ids are decoded in short windows, never encoded again.

    Args:
        tokenizer: The tokenizer.
        ids: Token ids, ``n_tokens`` of them.
        before: Preceding ids, so that a leading space is recognised.
    """
    window = [*before[-1:]]
    known = decode(tokenizer, window) if window else ""
    texts: list[str] = []
    pending = 0
    for position, token in enumerate(ids):
        window.append(token)
        text = decode(tokenizer, window)
        pending = pending + 1 if text.endswith(_REPLACEMENT_CHARACTER) else 0
        if 0 < pending < _LONGEST_FRAGMENT and position + 1 < len(ids):
            texts.append("")
            continue
        pending = 0
        texts.append(text[common_prefix_length(text, known) :])
        known = text
        # Some tokenizers decode parts of a character to nothing: no window begins inside one.
        if len(window) > _DECODE_WINDOW and (
            texts[-1] or len(window) > _DECODE_WINDOW + _LONGEST_FRAGMENT
        ):
            window = window[-1:]
            known = decode(tokenizer, window)
    return texts


def labels(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """One printable name per token: stripped text, visible white space, marked partial characters.

    Names are for display and not unique.
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
    """The text of `ids`, including special tokens, white space unchanged."""
    text = _decoded(tokenizer, ids)
    if (_SPACE in text or "<0x" in text) and _decodes_to_piece_names(tokenizer):
        # Incomplete characters are shown as by other tokenizers.
        spelled = _BYTES.sub(lambda found: _text_of_byte_names(found.group()), text)
        return spelled.replace(_SPACE, " ")
    return text


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    tensor = torch.tensor(list(ids), dtype=torch.long, device="cpu")
    if hasattr(tokenizer, "clean_up_tokenization_spaces"):
        return cast(str, tokenizer.decode(tensor, clean_up_tokenization_spaces=False))
    return cast(str, tokenizer.decode(tensor))


def _decodes_to_piece_names(tokenizer: Any) -> bool:
    """Whether `decode` returns SentencePiece's token names, as mistral-common's does."""
    try:
        return _SPACE in _decoded(tokenizer, tokenizer.encode("a a"))
    except Exception:  # custom tokenizers may raise anything
        return False


def _text_of_byte_names(names: str) -> str:
    return bytes.fromhex(names.replace("<0x", "").replace(">", "")).decode(errors="replace")


def token_id(tokenizer: Any, token: str) -> int:
    """The id of a token of the vocabulary.

    Raises:
        ValueError: If the vocabulary has no such token.
    """
    found = tokenizer.convert_tokens_to_ids([token])[0]
    unknown = getattr(tokenizer, "unk_token_id", None)
    if found is None or (found == unknown and token != getattr(tokenizer, "unk_token", None)):
        raise ValueError(
            f"{token!r} is not a token of this vocabulary: a text baseline names one token, as in "
            "captum (say '<pad>'). For replacement texts give a list with one entry per feature."
        )
    return int(found)


def start_id(tokenizer: Any) -> int | None:
    """The id that a row begins with if nothing else is left: BOS, else EOS, else padding."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    return None


def after_start(tokenizer: Any, ids: Sequence[int]) -> tuple[int, ...]:
    """Prefixes ids of a text, so that its first word has a probability.

    A token that the tokenizer adds itself suffices. To most models, a start token that the
    tokenizer does not add is no beginning of a document: after it alone, the first words of a text
    are unpredictable. After a line break they are not.
    """
    start = start_id(tokenizer)
    if start is None or tuple(ids[:1]) == (start,):
        return tuple(ids)
    line_break = encode(tokenizer, "\n").ids
    is_one = decode(tokenizer, line_break) == "\n"
    return (start, *(line_break if is_one else ()), *ids)


def common_prefix_length(one: str, other: str) -> int:
    """Length of the common prefix of two texts."""
    if one.startswith(other):  # the usual case of texts decoded token by token
        return len(other)
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _printable(text: str) -> str:
    shown = text.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")
    return shown.strip() or "␣" * len(shown)


def _encode_with_offsets(
    tokenizer: Any, text: str, add_special_tokens: bool
) -> tuple[list[int], Offsets]:
    if getattr(tokenizer, "is_fast", True):
        try:
            enc = encoding.call(
                tokenizer, text, add_special_tokens=add_special_tokens, return_offsets_mapping=True
            )
            ids = [int(token) for token in enc["input_ids"]]
            offsets = [(int(start), int(stop)) for start, stop in enc["offset_mapping"]]
            if len(ids) == len(offsets):
                return ids, offsets
        except Exception:  # tokenizers without offsets raise various errors
            pass
    ids = encoding.ids(tokenizer, text, add_special_tokens=add_special_tokens)
    if not add_special_tokens:
        return ids, _find_offsets(tokenizer, text, ids)
    bare = encoding.ids(tokenizer, text, add_special_tokens=False)
    for n_before in range(len(ids) - len(bare) + 1):
        n_after = len(ids) - len(bare) - n_before
        if ids[n_before : len(ids) - n_after] == bare:
            own = _find_offsets(tokenizer, text, bare)
            return ids, [(0, 0)] * n_before + own + [(len(text), len(text))] * n_after
    return ids, _find_offsets(tokenizer, text, ids)


def _find_offsets(tokenizer: Any, text: str, ids: Sequence[int]) -> Offsets:
    """Offsets of a text's tokens, found by decoding and searching each.

    Tokens that cannot be found (an unknown word, a special token that is not in the text) get the
    gap between their neighbours.
    """
    texts = pieces(tokenizer, ids)
    unknown = getattr(tokenizer, "unk_token_id", None)
    shown = ["" if token == unknown else piece for token, piece in zip(ids, texts, strict=True)]
    wanted = [(c, i) for i, piece in enumerate(shown) for char in piece for c in _case_folded(char)]
    given = [(c, place) for place, char in enumerate(text) for c in _case_folded(char)]
    offsets: list[tuple[int, int] | None] = [None] * len(ids)
    for i, j in _aligned_pairs([c for c, _ in wanted], [c for c, _ in given]):
        token, place = wanted[i][1], given[j][1]
        start, _ = offsets[token] or (place, place)
        offsets[token] = (start, place + 1)
    # A part of a character that decodes to nothing gets the offsets of the whole character.
    for i in range(len(ids) - 2, -1, -1):
        if offsets[i] is None and not texts[i]:
            offsets[i] = offsets[i + 1]
    return _with_gaps_filled(text, offsets, shown)


def _with_gaps_filled(
    text: str, offsets: Sequence[tuple[int, int] | None], shown: Sequence[str]
) -> Offsets:
    """Offsets with unknown ones filled from their neighbours."""
    after = [len(text)] * (len(offsets) + 1)
    for i in range(len(offsets) - 1, -1, -1):
        known = offsets[i]
        after[i] = after[i + 1] if known is None else known[0]
    found: Offsets = []
    position = 0
    for i, known in enumerate(offsets):
        if known is None:
            left = text[position : after[i]]
            space = len(left) - len(left.lstrip())
            if not left.strip():  # white space alone is as long as it is shown
                stop = min(position + len(shown[i]) * shown[i].isspace(), after[i])
                known = (position, stop)
            else:
                known = (position + space, position + len(left.rstrip()))
        else:
            lead, trail = (len(shown[i]) - len(x) for x in (shown[i].lstrip(), shown[i].rstrip()))
            start, stop = known
            while lead > 0 and start > position and text[start - 1].isspace():
                start, lead = start - 1, lead - 1
            while trail > 0 and stop < after[i + 1] and text[stop].isspace():
                stop, trail = stop + 1, trail - 1
            known = (start, stop)
        found.append(known)
        # Adjacent unknown words share the gap between known ones.
        if offsets[i] is not None or not text[known[0] : known[1]].strip():
            position = max(position, known[1])
    return found


def _aligned_pairs(one: Sequence[str], other: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of positions at which two texts agree, in ascending order."""
    i = j = 0
    while i < len(one) and j < len(other):
        if one[i] == other[j]:
            yield i, j
            i, j = i + 1, j + 1
            continue
        ahead = _resync(one[i : i + 2 * _RESYNC_WINDOW], other[j : j + 2 * _RESYNC_WINDOW])
        i, j = i + ahead[0], j + ahead[1]


def _resync(one: Sequence[str], other: Sequence[str]) -> tuple[int, int]:
    """Numbers of characters to skip in two texts until they agree; one each if they do not soon."""
    for total in range(1, 2 * _RESYNC_WINDOW):
        for a in range(max(0, total - _RESYNC_WINDOW), min(total, _RESYNC_WINDOW) + 1):
            b = total - a
            n = min(_RESYNC_MATCH, len(one) - a, len(other) - b)
            if n > 0 and one[a : a + n] == other[b : b + n]:
                return a, b
    return 1, 1


@functools.lru_cache(maxsize=4096)
def _case_folded(char: str) -> str:
    """A character case-folded and without accents; "" for white space."""
    if char == _SPACE:
        return ""
    decomposed = unicodedata.normalize("NFKD", char.casefold())
    return "".join(c for c in decomposed if not c.isspace() and not unicodedata.combining(c))
