"""Prompts as features: which ids belong to which feature, and what a coalition looks like.

`TextSegmentInput` is the package's own input, `ChatInput` the same for the turns of a chat.
`as_prompt` gives captum's inputs the same shape, so that the rest of the package knows one kind of
prompt only. `GeneratedText` is the same for what the model wrote; a `Context`
has both.
"""

from captum_llm_ext.text.inputs.captum_inputs import as_prompt
from captum_llm_ext.text.inputs.chat import ChatInput
from captum_llm_ext.text.inputs.context import Context
from captum_llm_ext.text.inputs.generated import GeneratedText
from captum_llm_ext.text.inputs.prompt import Level, Piece, Place, Prompt, RenderedPrompt
from captum_llm_ext.text.inputs.text import TextSegmentInput

__all__ = [
    "ChatInput",
    "Context",
    "GeneratedText",
    "Level",
    "Piece",
    "Place",
    "Prompt",
    "RenderedPrompt",
    "TextSegmentInput",
    "as_prompt",
]
