"""Encodes texts without truncation or padding, even while other threads use the tokenizer.

Fast tokenizers store truncation and padding as state. A thread that requests them changes what
other threads get, even between their own request and the encoding.
"""

import time
from typing import Any, cast

# A fifth of a second in total: another thread's encoding takes far below a millisecond. More only
# delays the error for a tokenizer in constant use. Chosen, not measured.
_MAX_ATTEMPTS, _RETRY_SECONDS = 200, 1e-3


def call(tokenizer: Any, text: str, **options: Any) -> Any:
    """Calls the tokenizer on a text, without truncation or padding.

    Raises:
        RuntimeError: If other threads keep changing its state.
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
        "the tokenizer truncates or pads texts that must be encoded whole, because other threads "
        "keep setting `truncation=` or `padding=`. Give each thread its own tokenizer, such as "
        "`copy.deepcopy(tokenizer)`."
    )


def ids(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The token ids of a text, as from the tokenizer's ``encode``."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        found = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    else:
        found = call(tokenizer, text, add_special_tokens=add_special_tokens)["input_ids"]
    return [int(token) for token in cast("list[Any]", found)]


def _is_whole(encoding: Any) -> bool:
    """Whether the backend's encoding was neither truncated nor padded."""
    return not encoding.overflowing and 0 not in encoding.attention_mask
