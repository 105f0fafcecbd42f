"""Prompts as features: which ids belong to which feature, and how coalitions are rendered.

`TextSegmentInput` is the package's own input, `ChatInput` the same for the turns of a chat.
`as_prompt` adapts captum's inputs, so that the rest of the package knows one kind of prompt.
`GeneratedText` is the same for the generated text; a `Context` has both, and `render_text` renders
coalitions of both as token ids.
"""

from captum_llm_ext.text.inputs.captum_inputs import as_prompt
from captum_llm_ext.text.inputs.chat import ChatInput
from captum_llm_ext.text.inputs.context import Context
from captum_llm_ext.text.inputs.generated import GeneratedText
from captum_llm_ext.text.inputs.prompt import (
    DrawnUnit,
    Level,
    Piece,
    Place,
    Prompt,
    RenderedPrompt,
    RenderedText,
)
from captum_llm_ext.text.inputs.rendering import render_text
from captum_llm_ext.text.inputs.text import TextSegmentInput

__all__ = [
    "ChatInput",
    "Context",
    "DrawnUnit",
    "GeneratedText",
    "Level",
    "Piece",
    "Place",
    "Prompt",
    "RenderedPrompt",
    "RenderedText",
    "TextSegmentInput",
    "as_prompt",
    "render_text",
]
