"""Texts and chats of models without a tokenizer, as ids that spell them exactly."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters, which do not occur in texts
_PIECES = re.compile(rf"{_OPEN}[^{_CLOSE}]*{_CLOSE}| ?\w+| ?[^\w\s{_OPEN}]|\s|.", re.DOTALL)


class PlainTokenizer:
    """Words, punctuation and white space as tokens, each with the space before it.

    Replaces an unavailable tokenizer: features are whole words, and ids are unrelated to the
    model's tokens. The vocabulary grows with the texts encoded. A chat is rendered as its messages
    with a special token before each, from which `messages_of` restores them.
    """

    chat_template = "plain"
    is_fast = True

    def __init__(self) -> None:
        self._texts = [""]
        self._ids = {"": 0}
        self.bos_token_id, self.bos_token = 0, ""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the tokens before messages, and of the empty text."""
        return [i for i, text in enumerate(self._texts) if not text or text.startswith(_OPEN)]

    def token(self, text: str) -> int:
        """The id of any text as a single token."""
        if text not in self._ids:
            self._ids[text] = len(self._texts)
            self._texts.append(text)
        return self._ids[text]

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        """Ids of a text and the characters of each; options have no effect."""
        found = list(_PIECES.finditer(text))
        return {
            "input_ids": [self.token(one.group()) for one in found],
            "offset_mapping": [one.span() for one in found],
        }

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; none is added."""
        return self(text)["input_ids"]

    def decode(self, token_ids: Any, **options: Any) -> str:
        """The text of ids, special ones included."""
        ids: Any = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        return "".join(self._texts[i] for i in ([ids] if isinstance(ids, int) else ids))

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The texts of ids."""
        return self._texts[ids] if isinstance(ids, int) else [self._texts[int(i)] for i in ids]

    def convert_tokens_to_ids(self, names: Any) -> Any:
        """The ids of texts."""
        return self.token(names) if isinstance(names, str) else [self.token(n) for n in names]

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tokenize: bool = True, **options: Any
    ) -> Any:
        """A chat as text or ids, from which `messages_of` restores it."""
        parts = [f"{_OPEN}{message['role']}{_CLOSE}{_text_of(message)}" for message in messages]
        return self("".join(parts)) if tokenize else "".join(parts)


def messages_of(text: str) -> list[dict[str, str]]:
    """The messages of a text rendered by `PlainTokenizer`; otherwise a single user message."""
    first, *rest = text.split(_OPEN)
    found = [{"role": "user", "content": first}] if first or not rest else []
    for part in rest:
        role, _, content = part.partition(_CLOSE)
        found.append({"role": role, "content": content})
    return found


def _text_of(message: Mapping[str, Any]) -> str:
    content: Any = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part["text"]) for part in content if "text" in part)


class OpenVocabulary:
    """A tokenizer with additional tokens for arbitrary texts.

    Args:
        tokenizer: The model's tokenizer.
    """

    is_fast = False
    _FIRST = 2**40  # beyond every vocabulary

    def __init__(self, tokenizer: Any) -> None:
        self.base = tokenizer
        self._more = PlainTokenizer()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, getattr(tokenizer, name, None))

    @property
    def all_special_ids(self) -> list[int]:
        """The tokenizer's special ids."""
        return list(getattr(self.base, "all_special_ids", ()))

    def token(self, text: str) -> int:
        """The id of any text as a single token."""
        return self._FIRST + self._more.token(text)

    def encode(self, text: str, **options: Any) -> list[int]:
        """Ids of the tokenizer."""
        return list(self.base.encode(text, **options))

    def decode(self, token_ids: Any, **options: Any) -> str:
        """The text of ids of either kind."""
        held: Any = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids: list[int] = [held] if isinstance(held, int) else list(held)
        own = [i - self._FIRST for i in ids if i >= self._FIRST]
        base = [i for i in ids if i < self._FIRST]
        text = str(self.base.decode(base, **options)) if base else ""
        return text + self._more.decode(own)  # generated tokens come after those of the prompt

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The names of ids of either kind."""
        return [
            self._more.convert_ids_to_tokens(i - self._FIRST)
            if i >= self._FIRST
            else self.base.convert_ids_to_tokens([i])[0]
            for i in map(int, ids)
        ]
