"""`ChatInput`: the turns of a chat, found in what the tokenizer's own template makes of them."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, cast

from captum_llm_ext.inputs.prompt import Piece
from captum_llm_ext.inputs.text import Parts, TextSegmentInput, as_units
from captum_llm_ext.segment import Span, Unit, shorten

Message = Mapping[str, Any]
# Plain letters and digits: no template has a reason to treat it otherwise than other text.
_MARK = "captumllmextmark7351"


class ChatInput(TextSegmentInput):
    """A chat whose turns, or the sentences, words or tokens in them, are switched on and off.

    The tokenizer's chat template is applied once. What it puts around the messages is fixed text,
    and so are messages of other roles. No BOS is added to the one that the template writes.

    Args:
        messages: As for ``tokenizer.apply_chat_template``: mappings with ``"role"`` and
            ``"content"``; the content is a text, or a list of parts of which those with
            ``"text"`` count.
        tokenizer: The model's tokenizer, with a chat template.
        unit: ``"turn"``: every message is one feature. Otherwise a unit of `TextSegmentInput`, or a
            tuple of them from coarse to fine, for the features inside the messages; turns are
            then the coarsest level.
        roles: Whose messages are switched.
        tools: Passed to the template; what it writes of them is fixed text.
        add_generation_prompt: Whether the template opens the model's own turn.
        template_arguments: Other arguments of the template.
        **arguments: `baselines`, `groups`, `fixed` as of `TextSegmentInput`.

    Raises:
        ValueError: If there is no message of these roles, one of them is empty, the template
            fails, or a message cannot be found again in what it made.
        TypeError: If the tokenizer has no chat template, or a message is of the wrong kind.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        tokenizer: Any,
        unit: Unit | tuple[Unit, ...] = "turn",
        roles: Sequence[str] = ("user", "system"),
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        self.messages = _checked(messages)
        chosen = [i for i, message in enumerate(self.messages) if message["role"] in roles]
        if not chosen:
            found = sorted({str(message["role"]) for message in self.messages})
            raise ValueError(
                f"no message has a role of {tuple(roles)}: the roles are {found}. Name some of "
                "them in `roles`."
            )
        self.roles = tuple(roles)
        template = _Template(
            tokenizer,
            {
                "add_generation_prompt": add_generation_prompt,
                **({} if tools is None else {"tools": list(tools)}),
                **(template_arguments or {}),
            },
        )
        text = template.render(self.messages)
        turns = Parts(*template.locate(self.messages, text, chosen), title="turn")
        super().__init__(
            text,
            tokenizer,
            turns if unit == "turn" else (turns, *as_units(unit)),
            names=turns.names if unit == "turn" else None,
            add_special_tokens=False,
            **arguments,
        )
        self.pieces = _with_roles(self.pieces, template.said(self.messages, text))


class _Template:
    """The tokenizer's chat template with its arguments."""

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
            ValueError: If the template refuses the messages.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, **self._arguments
            )
        except Exception as error:  # jinja2's own errors, and whatever a template raises
            raise ValueError(
                f"the tokenizer's chat template cannot render these messages: {error}"
            ) from error
        return cast(str, text)

    def locate(
        self, messages: Sequence[Message], text: str, chosen: Sequence[int]
    ) -> tuple[list[str], list[Span]]:
        """Names and spans of the chosen messages' content in the rendered text.

        Each is found by rendering the chat once more with a mark in its place: what is left and
        right of the mark is left and right of the content, whatever the content says.
        """
        names: list[str] = []
        spans: list[Span] = []
        for i in chosen:
            contents = _texts(messages[i])
            for part, content in enumerate(contents):
                start = self._find(messages, text, i, part, content)
                spans.append(start)
                shown = text[start.start : start.stop]
                names.append(f"{messages[i]['role']}: {shown}")
        return names, spans

    def said(self, messages: Sequence[Message], text: str) -> list[tuple[Span, str]]:
        """Where messages stand in the rendered text, and whose they are, in reading order.

        What cannot be found, such as a message that the template changes, is left out.
        """
        found: list[tuple[Span, str]] = []
        for i, message in enumerate(messages):
            try:
                _, spans = self.locate(messages, text, [i])
            except ValueError:
                continue
            found += [(span, str(message["role"])) for span in spans]
        return sorted(found)

    def _find(
        self, messages: Sequence[Message], text: str, i: int, part: int, content: str
    ) -> Span:
        rendered = self.render(_with_text(messages, i, part, _MARK))
        pieces = rendered.split(_MARK)
        if len(pieces) == 2:
            before, after = pieces
            start, stop = len(before), len(text) - len(after)
            same = text.startswith(before) and text.endswith(after) and start <= stop
            # Templates strip white space; what else they do to a text nobody can know.
            if same and text[start:stop].strip() == content.strip():
                return Span(start, stop)
        start = text.find(content.strip())
        if start >= 0 and text.count(content.strip()) == 1:
            return Span(start, start + len(content.strip()))
        raise ValueError(
            f"message {i} ({messages[i]['role']}: {shorten(content)!r}) cannot be found in what "
            "the chat template makes of it: the template changes, repeats or drops it. Leave its "
            "role out of `roles`, or give the rendered text to `TextSegmentInput`."
        )


def _with_roles(pieces: Sequence[Piece], said: Sequence[tuple[Span, str]]) -> list[Piece]:
    """The same text, with whose message each piece is in; fixed text is cut where one ends."""
    marked: list[Piece] = []
    position = 0
    for piece in pieces:
        first, position = position, position + len(piece.text)
        # A feature may begin with the white space before its message, which its first token
        # carries, and a token with the special one after it.
        borders = {span.stop for span, _ in said}
        if piece.feature is None:
            borders |= {span.start for span, _ in said}
        inner = sorted(border for border in borders if first < border < position)
        for start, stop in pairwise([first, *inner, position]):
            owner = next((role for span, role in said if span.start < stop <= span.stop), None)
            feature = None if owner is None else piece.feature
            text = piece.text[start - first : stop - first]
            marked.append(Piece(text, feature, owner or "template"))
    return marked


def _checked(messages: Sequence[Message]) -> list[Message]:
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
    return [dict(message) for message in messages]


def _texts(message: Message) -> list[str]:
    """The texts of a message: its content, or those of its parts that are text."""
    content = message.get("content")
    if isinstance(content, str):
        texts = [content]
    else:
        texts = [
            part["text"] for part in content or () if isinstance(part, Mapping) and "text" in part
        ]
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(
            f"a message of role {message['role']!r} has no text: leave its role out of `roles`."
        )
    return texts


def _with_text(messages: Sequence[Message], i: int, part: int, text: str) -> list[Message]:
    """The messages with another text in one place."""
    changed: list[dict[str, Any]] = [deepcopy(dict(message)) for message in messages]
    if isinstance(changed[i]["content"], str):
        changed[i]["content"] = text
    else:
        parts = [p for p in changed[i]["content"] if isinstance(p, dict) and "text" in p]
        parts[part]["text"] = text
    return list(changed)
