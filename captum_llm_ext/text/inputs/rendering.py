"""`render_text`: token ids of coalitions of prompt and target features."""

import torch
from torch import Tensor

from captum_llm_ext.text.inputs.generated import GeneratedText
from captum_llm_ext.text.inputs.prompt import Prompt, RenderedText


def render_text(
    prompt: Prompt,
    generated: GeneratedText,
    masks: Tensor,
    generator: torch.Generator,
    draws: Tensor | None = None,
) -> list[RenderedText]:
    """The model's input for each of several coalitions.

    Args:
        prompt: The prompt.
        generated: The target after it.
        masks: Bool, shape ``(n_coalitions, n_columns)``, True = present: the features of the
            prompt, then those of the target. Features without a column are present.
        generator: Source of all random choices; advanced by two numbers.
        draws: Shape ``(n_coalitions,)``: coalitions with equal numbers share one draw of
            replacements. By default each has its own.

    Returns:
        One rendered text per coalition.
    """
    n_prompt = prompt.n_features
    n_missing = n_prompt + generated.n_features - masks.shape[1]
    masks = torch.nn.functional.pad(masks, (0, n_missing), value=True)
    prompts = prompt.render(masks[:, :n_prompt], generator, draws)
    return generated.render(prompts, masks[:, n_prompt:], generator, draws)
