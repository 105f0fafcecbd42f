"""Locates the messages of a chat in the text that its chat template renders."""

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

from captum_llm_ext.text.segment import Span, shorten
from captum_llm_ext.text.tokens import common_prefix_length

Message = Mapping[str, Any]
# Plain letters and digits, which no template treats differently from other text.
_PLACEHOLDER = "captumllmextmark7351"
# What templates search for in a message: tags and control tokens.
_TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Za-z_]{1,40}\]")
# Other texts of a message that templates render besides its content.
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Ways in which templates render a text: unchanged, in JSON (two variants), in HTML (two).
_ESCAPES: tuple[Callable[[str], str], ...] = (
    str,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    html.escape,
    lambda text: html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;"),
)


@dataclass(frozen=True)
class Found:
    """Spans of a message in the rendered chat.

    Attributes:
        spans: Its spans, in reading order; empty if it does not occur.
        missing: Parts that the template omits or changes.
    """

    spans: list[Span]
    missing: list[str] = field(default_factory=list[str])


class Template:
    """The tokenizer's chat template with its arguments.

    Args:
        tokenizer: The model's tokenizer.
        arguments: Arguments of ``apply_chat_template``.

    Raises:
        TypeError: If the tokenizer has no ``apply_chat_template``.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any]) -> None:
        if not hasattr(tokenizer, "apply_chat_template"):
            raise TypeError(
                f"{type(tokenizer).__name__} has no `apply_chat_template`: give a tokenizer of "
                "transformers, or the rendered text to `TextSegmentInput`."
            )
        self._tokenizer = tokenizer
        self._arguments = dict(arguments)

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as text.

        Raises:
            ValueError: If the template rejects the messages.
        """
        return cast(str, self._apply(messages, tokenize=False))

    def ids(self, messages: Sequence[Message]) -> tuple[int, ...] | None:
        """The chat as token ids; None for tokenizers that only render text."""
        try:
            found = self._apply(messages, tokenize=True, return_dict=True)
            return tuple(int(token) for token in found["input_ids"])
        except (ValueError, TypeError, KeyError, IndexError):
            return None

    def _apply(self, messages: Sequence[Message], **how: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [deepcopy(dict(message)) for message in messages], **how, **self._arguments
            )
        except Exception as error:  # jinja2's own errors, and anything a template raises
            raise ValueError(
                f"the tokenizer's chat template cannot render these messages: {error}"
            ) from error

    def locate(self, messages: Sequence[Message], text: str, i: int) -> Found:
        """Spans of message `i` in the rendered text.

        A text is located by rendering the chat again with a placeholder: its surroundings are those
        of the text, whatever its content. Parts without text (tool calls, content that is an
        object) are located as what the chat lacks without them.
        """
        spans: list[Span] = []
        missing: list[str] = []
        for path, content in _texts(messages[i]):
            found = self._find(messages, text, i, path, content)
            spans += found.spans
            missing += found.missing
        for what, lacking in _reduced_messages(messages[i]):
            span = self._find_by_difference(messages, text, i, lacking)
            if span is not None:
                spans.append(span)
            else:
                missing.append(what)
        return Found(_merge_adjacent(text, spans), missing)

    def _find(
        self, messages: Sequence[Message], text: str, i: int, path: "_Path", content: str
    ) -> Found:
        marked = self._marked(messages, i, path, _PLACEHOLDER)
        if marked == text:
            return Found([], [content])  # it does not occur, whatever its text
        pieces = marked.split(_PLACEHOLDER)
        if len(pieces) == 2:
            before, after = pieces
            start, stop = len(before), len(text) - len(after)
            if text.startswith(before) and text.endswith(after) and start <= stop:
                return _with_missing(text, Span(start, stop), content)
        elif len(pieces) > 2:
            return Found([], [content])
        return (
            self._find_between_tags(messages, text, i, path, content)
            or self._find_rest(messages, text, i, path, content)
            or _find_literally(text, content)
        )

    def _find_rest(
        self, messages: Sequence[Message], text: str, i: int, path: "_Path", content: str
    ) -> Found | None:
        """For templates that shorten a message: the difference when it is left out."""
        span = self._find_by_difference(messages, text, i, _with_text(messages, i, path, "")[i])
        if span is None or text[slice(*span)].strip() not in content:
            return None
        return _with_missing(text, span, content)

    def _find_between_tags(
        self, messages: Sequence[Message], text: str, i: int, path: "_Path", content: str
    ) -> Found | None:
        """For templates that parse a message: puts a placeholder between its tags."""
        stretches = _between_tags(content)
        if not stretches or stretches == [_inner(content, 0, len(content))]:
            return None
        marks = [f"{_PLACEHOLDER}x{number}x" for number in range(len(stretches))]
        changed, position = "", 0
        for mark, (start, stop) in zip(marks, stretches, strict=True):
            changed += content[position:start] + mark
            position = stop
        rendered = self._marked(messages, i, path, changed + content[position:])
        kept = [n for n, mark in enumerate(marks) if rendered.count(mark) == 1]
        if [n for n, mark in enumerate(marks) if mark in rendered] != kept or not kept:
            return None
        start, first = 0, None
        rest = rendered
        for number in kept:
            before, _, rest = rest.partition(marks[number])
            own = content[slice(*stretches[number])]
            here = start + len(before)
            written = next((w(own) for w in _ESCAPES if text.startswith(w(own), here)), None)
            if text[start:here] != before or written is None:
                return None
            first = here if first is None else first
            start = here + len(written)
        if text[start:] != rest or first is None:
            return None
        # Tags at the ends of the message belong to it if they occur at these positions.
        head, tail = (
            content[: stretches[kept[0]].start].lstrip(),
            content[stretches[kept[-1]].stop :],
        )
        first -= len(head) if text[:first].endswith(head) else 0
        tail = tail.rstrip()
        start += len(tail) if text.startswith(tail, start) else 0
        return _with_missing(text, Span(first, start), content)

    def _marked(self, messages: Sequence[Message], i: int, path: "_Path", content: str) -> str:
        try:
            return self.render(_with_text(messages, i, path, content))
        except ValueError:  # a template that parses the message may reject other text
            return ""

    def _find_by_difference(
        self, messages: Sequence[Message], text: str, i: int, without: Message
    ) -> Span | None:
        changed = [dict(message) for message in messages]
        changed[i] = dict(without)
        try:
            lacking = self.render(changed)
        except ValueError:
            return None
        start = common_prefix_length(text, lacking)
        stop = len(text) - common_prefix_length(text[start:][::-1], lacking[start:][::-1])
        # Characters common to both sides (the "<" of two tags) are taken from the left.
        while start > 0 and text[start - 1] == text[stop - 1] and not text[start - 1].isspace():
            start, stop = start - 1, stop - 1
        return Span(start, stop) if text[start:stop].strip() else None


_Path = tuple[str | int, ...]


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages as a list, checked.

    Raises:
        TypeError: If they are not a list of mappings with a role, or a part is not a mapping.
        ValueError: If a message contains images or other media.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(
            f"`messages` is a {type(messages).__name__}: give a list of mappings with 'role' and "
            "'content'."
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise TypeError(
                f"message {i} is {message!r}: give a mapping with 'role' and 'content'."
            )
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if not isinstance(part, Mapping):
                raise TypeError(
                    f"message {i} has the part {part!r}: give mappings such as "
                    '{"type": "text", "text": "…"}.'
                )
            if "text" not in part and set(part) - {"type"}:
                raise ValueError(
                    f"message {i} has a part of type {part.get('type')!r}, with data that a chat "
                    "as text leaves out: give its text alone, or an input of your own that renders "
                    "to what the model takes (captum's `InterpretableInput`)."
                )
    return [dict(message) for message in messages]


def locate_messages(template: Template, messages: Sequence[Message], text: str) -> list[Found]:
    """Spans of every message in the rendered text, without overlap."""
    taken: list[Span] = []
    found: list[Found] = []
    for i in range(len(messages)):
        one = template.locate(messages, text, i)
        clash = [s for s in one.spans for t in taken if s.start < t.stop and t.start < s.stop]
        if clash:  # found by its text, which another message contains too
            one = Found(
                [span for span in one.spans if span not in clash],
                [*one.missing, *(text[slice(*span)] for span in clash)],
            )
        taken += one.spans
        found.append(one)
    return found


def has_text(message: Message) -> bool:
    """Whether a message has text that can be a feature."""
    return bool(_texts(message) or _reduced_messages(message))


def _texts(message: Message) -> list[tuple[_Path, str]]:
    """The texts of a message, each with its path of keys."""
    content = message.get("content")
    found: list[tuple[_Path, str]] = [
        ((key,), message[key]) for key in _REASONING_KEYS if isinstance(message.get(key), str)
    ]
    if isinstance(content, str):
        found.append((("content",), content))
    elif isinstance(content, list | tuple):
        for place, part in enumerate(cast(Sequence[Mapping[str, Any]], content)):
            if isinstance(part.get("text"), str):
                found.append((("content", place, "text"), part["text"]))
    return [(path, content) for path, content in found if content.strip()]


def _reduced_messages(message: Message) -> list[tuple[str, Message]]:
    """Copies of the message, each without one part that has no text, and that part."""
    found: list[tuple[str, Message]] = []
    if message.get("tool_calls"):
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        found.append(("its tool calls", rest | {"content": message.get("content") or ""}))
    content = message.get("content")
    if isinstance(content, Mapping) and content:
        found.append((str(content), {**message, "content": {}}))
    return found


def _with_text(messages: Sequence[Message], i: int, path: _Path, text: str) -> list[Message]:
    """The messages with another text in one place."""
    changed: list[Any] = [dict(message) for message in messages]
    changed[i] = place = deepcopy(changed[i])
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = text
    return changed


def _with_missing(text: str, span: Span, content: str) -> Found:
    """A span, with the parts of the message's text that are missing in it."""
    shown, wanted = text[slice(*span)].strip(), content.strip()
    if not shown:
        return Found([], [content])
    same = (_squeezed(write(one)) for write in _ESCAPES for one in (wanted, content))
    if _squeezed(shown) in same:
        return Found([span])
    start = common_prefix_length(wanted, shown)
    n_after = common_prefix_length(wanted[start:][::-1], shown[start:][::-1])
    if shown in wanted:  # chance agreement at both ends is not part of what is left out
        start, n_after = wanted.rindex(shown), 0
        left = [wanted[:start], wanted[start + len(shown) :]]
    else:
        left = [wanted[start : len(wanted) - n_after]]
    return Found([span], [part for part in left if part.strip()])


def _squeezed(text: str) -> str:
    """The text independent of case and white space."""
    return " ".join(text.split()).casefold()


def _find_literally(text: str, content: str) -> Found:
    """Locates a message by its text, if that occurs once."""
    # A template that renders everything in capitals changes placeholders as well.
    for change in (str, str.lower):
        where = change(text)
        for write in _ESCAPES:
            wanted = change(write(content.strip()))
            if where.count(wanted) == 1 and len(where) == len(text):
                return Found([Span(where.index(wanted), where.index(wanted) + len(wanted))])
    spans: list[Span] = []
    missing: list[str] = []
    position = 0
    for start, stop in _between_tags(content):
        part = content[start:stop]
        if text.count(part) == 1 and text.index(part) >= position:
            position = text.index(part) + len(part)
            spans.append(Span(position - len(part), position))
        else:
            missing.append(part)
    return Found(spans, missing if spans else [content])


def _between_tags(content: str) -> list[Span]:
    """The text between tags and control tokens, without white space at the ends."""
    borders = [
        0,
        *(place for match in _TAG.finditer(content) for place in match.span()),
        len(content),
    ]
    found = [_inner(content, a, b) for a, b in zip(borders[::2], borders[1::2], strict=True)]
    return [span for span in found if span.start < span.stop]


def _inner(text: str, start: int, stop: int) -> Span:
    shown = text[start:stop]
    start += len(shown) - len(shown.lstrip())
    return Span(start, start + len(shown.strip()))


def _merge_adjacent(text: str, spans: Sequence[Span]) -> list[Span]:
    """Spans in reading order; those separated by white space only are merged."""
    united: list[Span] = []
    for span in sorted(spans):
        if united and not text[united[-1].stop : span.start].strip():
            united[-1] = Span(united[-1].start, max(united[-1].stop, span.stop))
        else:
            united.append(span)
    return united


def describe(i: int, message: Message, missing: Sequence[str]) -> str:
    """Describes which message a template changed, and how."""
    what = " and ".join(repr(shorten(" ".join(part.split()))) for part in missing[:3])
    return f"message {i} ({message['role']}): {what}"
