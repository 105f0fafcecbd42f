"""The prompt from the options: a text, a chat, or passages with a question."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from captum_llm_ext.cli.command import UsageError, note
from captum_llm_ext.cli.input_files import read_text
from captum_llm_ext.cli.loading import DEMO
from captum_llm_ext.text.segment import Span, segmenter
from captum_llm_ext.text.segment.parts import Parts

if TYPE_CHECKING:
    from captum_llm_ext.text.inputs import TextSegmentInput

NESTED = ("paragraph", "sentence", "word")  # units of a search by default
_QUESTION, _SYSTEM = "question", "system"
_ROLES = "user,system"


def add_prompt(group: Any, *, is_required: bool, has_many: bool) -> None:
    """Adds the options of the prompt.

    Args:
        group: A parser or a group of its options.
        is_required: Whether a prompt is required.
        has_many: Whether a file of many prompts is accepted.
    """
    prompt = group.add_mutually_exclusive_group(required=is_required)
    prompt.add_argument("--prompt", metavar="TEXT", help="what the model continues")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same in a file; - is stdin")
    prompt.add_argument(
        "--chat",
        metavar="JSON",
        help='a chat, [{"role": "user", "content": "…"}, …] or {"messages": […], "tools": […]}: '
        "JSON, a file with it, or - for stdin",
    )
    if has_many:
        prompt.add_argument(
            "--input",
            metavar="JSONL",
            help='many prompts: a line for each, {"prompt": "…"} or {"messages": […]}, with '
            '"target" and "id" as wanted; needs --out',
        )
    group.add_argument(
        "--as-chat",
        action="store_true",
        help="ask the prompt as a user's message, in the model's chat template",
    )
    group.add_argument(
        "--system",
        metavar="TEXT",
        help="a chat's first message, of the system; of a prompt, it implies --as-chat",
    )
    group.add_argument(
        "--context",
        nargs="+",
        metavar="FILE",
        help="passages to put before the prompt, which is then the question about them; they are "
        "named by their files",
    )


class Passages(Parts):
    """A segmenter of a message into passages and the question after them."""

    positional = False

    def __init__(self, names: Sequence[str], texts: Sequence[str]) -> None:
        super().__init__(names, [Span(0, 0)] * len(names), title="passage")
        self._texts = list(texts)

    def __call__(self, text: str) -> list[Span]:
        """The passages and the text after them; a message without passages is one part."""
        spans: list[Span] = []
        at = 0
        for passage in self._texts:
            found = text.find(passage, at)
            if found >= 0:
                at = found + len(passage)
                spans.append(Span(found, at))
        rest = text[at:].lstrip()
        return [*spans, Span(len(text) - len(rest), len(text))] if rest else spans


@dataclass(frozen=True)
class PromptOptions:
    """The prompt given by the options.

    Attributes:
        text: The prompt, or the last message of a chat made of it.
        messages: Messages of a chat; None if the text is continued directly.
        tools: Tools of a chat.
        roles: Roles whose messages are features.
        passages: Names and texts of the passages before the question.
        is_many: Whether there are many prompts, each a text or a chat.
    """

    text: str = ""
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Any = None
    roles: Sequence[str] = ()
    passages: Mapping[str, str] = field(default_factory=dict[str, str])
    is_many: bool = False

    @property
    def n_turns(self) -> int:
        """Number of messages that are features; 0 for a text."""
        messages = self.messages or ()
        return sum(
            isinstance(one, Mapping) and one.get("role") in self.roles
            for one in cast(Sequence[Any], messages)
        )

    def input(self, tokenizer: Any, units: tuple[str, ...], baselines: Any) -> "TextSegmentInput":
        """The prompt as features of these units, from coarse to fine."""
        from captum_llm_ext.text.inputs import ChatInput, TextSegmentInput

        parts: Any = units
        if self.passages:
            names = [*self.passages, _QUESTION]
            if self.messages is not None and self.messages[0]["role"] == _SYSTEM:
                names = [_SYSTEM, *names] if _SYSTEM in self.roles else names
            passages = Passages(names, list(self.passages.values()))
            parts = (passages, *(unit for unit in units if unit != "passage"))
        parts = parts[0] if len(parts) == 1 else parts
        if self.messages is None:
            return TextSegmentInput(self._whole, tokenizer, parts, baselines=baselines)
        return ChatInput(
            [*self.messages[:-1], {**self.messages[-1], "content": self._whole}]
            if self.passages
            else self.messages,
            tokenizer,
            parts,
            self.roles,
            tools=self.tools,
            baselines=baselines,
        )

    @property
    def _whole(self) -> str:
        return "\n\n".join([*self.passages.values(), self.text])

    def note_template(self, tokenizer: Any, name: str) -> None:
        """Prints a note if a chat model is to continue a plain text."""
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if has_template and self.messages is None and not self.is_many and name != DEMO:
            note(
                "the model has a chat template, and continues the prompt as it is: --as-chat asks "
                "it as a user's message."
            )


def prompt_of(arguments: argparse.Namespace) -> PromptOptions:
    """The prompt from the options of `add_prompt`.

    Raises:
        UsageError: If they contradict one another, there is no prompt, or a file cannot be read or
            contains no chat.
    """
    roles = [role.strip() for role in (arguments.roles or _ROLES).split(",")]
    is_many = getattr(arguments, "input", None) is not None
    if is_many or arguments.chat is not None:
        other = "--input, whose lines say it" if is_many else "--chat, whose messages say it"
        for option in ("as_chat", "context", *(("system",) if is_many else ())):
            if getattr(arguments, option):
                name = f"--{option.replace('_', '-')}"
                raise UsageError(f"{name} would be ignored with {other}.")
    if is_many:  # each record determines its own kind
        return PromptOptions(is_many=True, roles=roles)
    system = arguments.system
    if system is not None and not system.strip():
        raise UsageError("--system is empty: leave it out (--as-chat asks without one).")
    begin: list[Mapping[str, Any]] = []
    if system is not None:
        begin.append({"role": _SYSTEM, "content": system})
    if arguments.chat is not None:
        chat = _chat(arguments.chat)
        messages = list(chat["messages"])
        _check_messages(messages, roles)
        if begin and any(isinstance(m, Mapping) and m.get("role") == _SYSTEM for m in messages):
            raise UsageError("--system: the --chat has a message of the system already.")
        return PromptOptions(messages=[*begin, *messages], tools=chat.get("tools"), roles=roles)
    text = _prompt(arguments)
    passages = _passages(arguments.context or ())
    if not begin and not arguments.as_chat:
        if arguments.roles:
            raise UsageError("--roles would be ignored: it selects turns of a --chat.")
        return PromptOptions(text, passages=passages)
    messages = [*begin, {"role": "user", "content": text}]
    return PromptOptions(text, messages, roles=roles, passages=passages)


def units(
    given: str | None, *, n_turns: int = 0, has_passages: bool = False, is_nested: bool = False
) -> tuple[str, ...]:
    """The units of ``--unit``, from coarse to fine.

    Args:
        given: The option; None if not given.
        n_turns: Number of turns of a chat that are features; 0 for a text.
        has_passages: Whether passages are the coarsest parts.
        is_nested: Whether the method needs nested units.

    Raises:
        UsageError: If they do not apply.
    """
    if is_nested:
        default = NESTED
    elif has_passages:
        default = ("passage", "sentence")
    else:
        default = ("turn",) if n_turns > 1 else ("word",)
    chosen: tuple[str, ...] = (
        default if given is None else tuple(unit.strip() for unit in given.split(","))
    )
    first = next(iter(chosen))
    has_wholes = has_passages or n_turns > 0
    if is_nested and len(chosen) < 2 and (not has_wholes or first in ("turn", "passage")):
        raise UsageError(
            f"--unit {given}: --method hierarchical splits larger parts into smaller ones: give "
            f"several, such as {','.join(NESTED)}."
        )
    for unit in chosen:
        if unit == "turn" and not n_turns:
            raise UsageError("--unit turn needs a --chat.")
        if unit == "passage" and not has_passages:
            raise UsageError("--unit passage needs --context.")
        if unit not in ("token", "turn", "passage"):
            try:
                segmenter(unit)
            except ValueError as error:
                raise UsageError(str(error)) from error
    for whole in ("turn", "passage"):
        if whole in chosen[1:]:
            raise UsageError(f"--unit {given}: a {whole} is the largest part, and comes first.")
    if has_passages and first == "paragraph":
        chosen = chosen[1:] or ("passage",)  # passages are paragraphs themselves
    # Turns are always the coarsest level of a chat.
    return chosen[1:] if len(chosen) > 1 and first == "turn" else chosen


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt_file is None:
        text = cast(str, arguments.prompt)
        if not text.strip():
            raise UsageError("the prompt is empty: give --prompt a text with at least one word.")
        return text
    # The line break at the end of a file is the editor's.
    name = arguments.prompt_file
    text = read_text("--prompt-file", name).removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise UsageError(f"--prompt-file {name} is empty: give a text with at least one word.")
    return text


def _passages(names: Sequence[str]) -> dict[str, str]:
    """Texts of files by name, including folders if names are ambiguous."""
    if len({*names}) < len(names):
        raise UsageError("--context: a file is given twice.")
    short = [Path(name).name for name in names]
    shown = short if len({*short}) == len(short) else list(names)
    passages = {
        name: read_text("--context", path).strip() for name, path in zip(shown, names, strict=True)
    }
    for name, text in passages.items():
        if not text:
            raise UsageError(f"--context {name}: the file is empty.")
    return passages


def _chat(given: str) -> Mapping[str, Any]:
    is_json = given.lstrip().startswith(("[", "{"))
    where = "--chat" if is_json else f"--chat {given}"
    try:
        found: Any = json.loads(given if is_json else read_text("--chat", given))
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{where} is not JSON ({error}): give a list of messages with 'role' and 'content'."
        ) from error
    chat = cast(Any, found if isinstance(found, dict) else {"messages": found})
    if not isinstance(chat.get("messages"), Sequence) or isinstance(chat["messages"], str):
        raise UsageError(
            f"{where} has no list of messages: give a list of objects with 'role' and 'content', "
            'or an object that holds it as "messages".'
        )
    return chat


def _check_messages(messages: Sequence[Any], roles: Sequence[str]) -> None:
    """Checks that there is something to switch; templates know what else a message may hold.

    Raises:
        UsageError: If a message is none, or no message has one of the roles.
    """
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(
                f"--chat: message {number} has no role: give objects with 'role' and 'content'."
            )
        if not {"content", "tool_calls"} & {*message}:
            raise UsageError(f"--chat: message {number} ({message['role']}) has no 'content'.")
    found = list(dict.fromkeys(message["role"] for message in messages))
    if not {*found} & {*roles}:
        known = f"its roles are {', '.join(found)}" if found else "it has no message"
        raise UsageError(
            f"--chat: no message is of {' or '.join(roles)}, whose turns are features; {known}. "
            "--roles names others."
        )
