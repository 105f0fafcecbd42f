"""`ChatInput`: the turns of a chat, located in the output of the tokenizer's template."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.text import tokens
from captum_llm_ext.text.inputs.messages import (
    Found,
    Message,
    Template,
    check_messages,
    describe,
    has_text,
    locate_messages,
)
from captum_llm_ext.text.inputs.prompt import Piece
from captum_llm_ext.text.inputs.text import TextSegmentInput, as_units
from captum_llm_ext.text.plain_tokenizer import PlainTokenizer
from captum_llm_ext.text.segment import Span, Unit
from captum_llm_ext.text.segment.parts import Parts


class ChatInput(TextSegmentInput):
    """A chat whose turns, or the sentences, words or tokens in them, are features.

    Text that the tokenizer's chat template puts around messages is fixed, and so are messages of
    other roles; special tokens within a message belong to it. No BOS is added if the template
    writes one. Messages are located where the template renders them unchanged, also in JSON or
    repeatedly; a warning says what it omits (such as the reasoning of earlier turns).

    Args:
        messages: As for ``tokenizer.apply_chat_template``: mappings with ``"role"`` and
            ``"content"``; the content is a text, or a list of parts of which those with ``"text"``
            count. Reasoning (``"reasoning_content"`` and the like) and ``"tool_calls"`` are part of
            the turn if the template renders them.
        tokenizer: The model's tokenizer, with a chat template. None for a model behind an API that
            takes messages.
        unit: ``"turn"``: every message is one feature. Otherwise a unit of `TextSegmentInput`, or a
            tuple of them from coarse to fine, for the features inside the messages; turns are then
            the coarsest level, even if the tuple does not begin with ``"turn"``.
        roles: Roles whose messages are features.
        tools: Passed to the template; its text on them is fixed.
        add_generation_prompt: Whether the template begins the model's own turn.
        template_arguments: Further arguments of the template.
        **arguments: `baselines`, `groups`, `fixed` as for `TextSegmentInput`.

    Raises:
        ValueError: If there is no message of these roles, none of them has text, the template
            fails, none of them can be located in its output, or a message contains images or other
            media.
        TypeError: If the tokenizer has no chat template, or a message has the wrong type.
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
        self.messages = check_messages(messages)
        tokenizer = PlainTokenizer() if tokenizer is None else tokenizer
        self.roles = tuple(roles)
        chosen = _message_numbers(self.messages, self.roles)
        template = Template(
            tokenizer,
            {
                "add_generation_prompt": add_generation_prompt,
                **({} if tools is None else {"tools": list(tools)}),
                **(template_arguments or {}),
            },
        )
        text = template.render(self.messages)
        self._template_ids = template.ids(self.messages)
        found = locate_messages(template, self.messages, text)
        _warn_of_missing(self.messages, {i: found[i] for i in chosen})
        spoken = sorted((span, i) for i, message in enumerate(found) for span in message.spans)
        roles_of = [str(message["role"]) for message in self.messages]
        own = [(span, i) for span, i in spoken if i in chosen]
        messages_of = [i for _, i in own]
        turns = Parts(
            [
                ("" if i in messages_of[:n] else f"{roles_of[i]}: ") + text[slice(*span)]
                for n, (span, i) in enumerate(own)
            ],
            [span for span, _ in own],
            title="turn",
            wholes=messages_of,
        )
        inner = _units_within_turns(unit)
        if not inner:
            arguments = {"groups": _message_spans(messages_of) or None} | arguments
        super().__init__(
            text,
            tokenizer,
            (turns, *inner) if inner else turns,
            add_special_tokens=False,
            **arguments,
        )
        self.pieces = _pieces_with_roles(self.pieces, [(span, roles_of[i]) for span, i in spoken])

    def _encoded(self, text: str, tokenizer: Any, add_special_tokens: bool) -> tokens.Encoding:
        encoding = super()._encoded(text, tokenizer, add_special_tokens)
        # Some tokenizers tokenise the template's special tokens as plain text.
        ids = self._template_ids
        return encoding if ids in (None, encoding.ids) else tokens.find(tokenizer, text, ids)


def _message_numbers(messages: Sequence[Message], roles: Sequence[str]) -> list[int]:
    """Indices of the messages of these roles that have text.

    Raises:
        ValueError: If there is none.
    """
    of_role = [i for i, message in enumerate(messages) if message["role"] in roles]
    if not of_role:
        found = sorted({str(message["role"]) for message in messages})
        raise ValueError(
            f"no message has a role of {tuple(roles)}: the roles are {found}. Name some of them "
            "in `roles`."
        )
    chosen = [i for i in of_role if has_text(messages[i])]
    if not chosen:
        raise ValueError(
            f"a message of role {messages[of_role[0]]['role']!r} has no text: leave its role out "
            "of `roles`."
        )
    return chosen


def _warn_of_missing(messages: Sequence[Message], found: Mapping[int, Found]) -> None:
    """Warns of text of the selected messages that the template omits.

    Raises:
        ValueError: If none of the messages remains.
    """
    if not any(message.spans for message in found.values()):
        i = next(iter(found))
        raise ValueError(
            f"{describe(i, messages[i], found[i].missing)} cannot be found in what the "
            "chat template makes of it: the template changes, repeats or drops it. Leave its "
            "role out of `roles`, or give the rendered text to `TextSegmentInput`."
        )
    problems = [
        describe(i, messages[i], message.missing) for i, message in found.items() if message.missing
    ]
    if problems:
        warn_user(
            "what the chat template leaves out, changes or repeats is no part of a feature: "
            f"{'; '.join(problems)}.",
            UserWarning,
        )


def _units_within_turns(unit: Unit | tuple[Unit, ...]) -> tuple[Unit, ...]:
    """The units within turns, from coarse to fine.

    Raises:
        ValueError: If turns are given as a finer unit.
    """
    units = as_units(unit)
    inner = units[1:] if units[0] == "turn" else units
    if any(isinstance(one, str) and one == "turn" for one in inner):
        raise ValueError(f"`unit` is {unit!r}: turns are the coarsest parts of a chat.")
    return inner


def _message_spans(messages: Sequence[int]) -> list[list[str | int]]:
    """Spans of every message, which may occur in several places."""
    places: dict[int, list[str | int]] = {}
    for place, i in enumerate(messages):
        places.setdefault(i, []).append(place)
    return [own for own in places.values() if len(own) > 1]


def _pieces_with_roles(pieces: Sequence[Piece], spoken: Sequence[tuple[Span, str]]) -> list[Piece]:
    """The same text with the role of each piece; fixed text is split where a message ends."""
    marked: list[Piece] = []
    position = 0
    for piece in pieces:
        first, position = position, position + len(piece.text)
        # A feature may begin with the white space before its message, which its first token
        # contains, and a token may contain the special one after it.
        borders = {span.stop for span, _ in spoken}
        if piece.feature is None:
            borders |= {span.start for span, _ in spoken}
        inner = sorted(border for border in borders if first < border < position)
        for start, stop in pairwise([first, *inner, position]):
            owner = next((role for span, role in spoken if span.start < stop <= span.stop), None)
            feature = None if owner is None else piece.feature
            text = piece.text[start - first : stop - first]
            marked.append(Piece(text, feature, owner or "template"))
    return marked
