"""Texts encoded whole, whatever another thread has the same tokenizer do meanwhile.

Fast tokenizers keep in themselves whether they cut and pad texts. A thread that asks for it changes
what others are given, between their saying that they want none of it and the encoding.
"""

import time
from typing import Any, cast

_MAX_ATTEMPTS = 200
_RETRY_SECONDS = 1e-3  # seconds


def call(tokenizer: Any, text: str, **options: Any) -> Any:
    """What a tokenizer returns for a text, neither cut nor padded.

    Raises:
        RuntimeError: If other threads do not leave it alone for long enough.
    """
    for _ in range(_MAX_ATTEMPTS):
        try:
            found = tokenizer(text, **options)
        except RuntimeError as error:
            if "borrowed" not in str(error).lower():  # tokenizers: it is being changed right now
                raise
        else:
            if all(_is_whole(one) for one in getattr(found, "encodings", None) or ()):
                return found
        time.sleep(_RETRY_SECONDS)
    raise RuntimeError(
        "the tokenizer cuts or pads texts that it was to encode whole: other threads ask it to "
        "(`truncation=`, `padding=`) all the time. Give each thread a tokenizer of its own, such "
        "as `copy.deepcopy(tokenizer)`."
    )


def ids(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The token ids of a text, as the tokenizer's ``encode`` gives them."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        found = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    else:
        found = call(tokenizer, text, add_special_tokens=add_special_tokens)["input_ids"]
    return [int(token) for token in cast("list[Any]", found)]


def _is_whole(encoding: Any) -> bool:
    """Whether the backend's own record tells of no cut and no padding."""
    return not encoding.overflowing and 0 not in encoding.attention_mask
