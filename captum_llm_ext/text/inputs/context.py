"""`Context`: the whole prompt as token ids, and the generated text as features after it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.text.baselines import LanguageModel
from captum_llm_ext.text.baselines.candidates import Match
from captum_llm_ext.text.baselines.corpus.mismatch import warn_of_mismatch
from captum_llm_ext.text.baselines.naming import baseline_name
from captum_llm_ext.text.inputs.generated import GeneratedText
from captum_llm_ext.text.inputs.prompt import AnswerLogProbs, Prompt
from captum_llm_ext.text.segment import Unit


class Context:
    """The prompt before a target, with the model that its baselines use.

    Args:
        prompt: The prompt.
        tokenizer: The model's tokenizer.
        model: The model as baselines use it.

    Attributes:
        prompt: The prompt, whose baselines have the model.
        full: The prompt with every feature present.

    Raises:
        ValueError: If there is no token before the target.

    Warns:
        UserWarning: If the prompt's features are replaced from a corpus of another kind of text.
    """

    def __init__(self, prompt: Prompt, tokenizer: Any, model: LanguageModel) -> None:
        self._tokenizer, self._model = tokenizer, model
        self.prompt = prompt = prompt.with_model(model)
        everything = torch.ones(1, prompt.n_features, dtype=torch.bool, device="cpu")
        self.full = prompt.render(everything, torch.Generator().manual_seed(0))[0]
        if not self.full.ids:
            raise ValueError("the prompt is empty: it has no token before the target.")
        warn_of_mismatch(prompt.own_baseline, prompt.matches)

    def condition_on_answer(self, log_probs: AnswerLogProbs, text: str) -> None:
        """Conditions the baselines on an answer, if they support it."""
        self.prompt = self.prompt.with_answer(log_probs, text)

    def generated(self, ids: Tensor, unit: Unit | None, baselines: Any) -> GeneratedText:
        """The target as features; `baselines=None` uses those of the prompt."""
        return GeneratedText(
            ids.tolist(),
            self._tokenizer,
            unit,
            baselines=self.prompt.output_baseline if baselines is None else baselines,
            prompt_text=self.prompt.text,
            prompt_ids=self.full.ids,
            model=self._model,
        )

    def absence(self, generated: GeneratedText) -> dict[str, str | None]:
        """Names of the baselines of prompt and output; None for an output that is held fixed."""
        output = baseline_name(generated.baseline) if generated.n_features else None
        return {"prompt": baseline_name(self.prompt.own_baseline), "output": output}

    def matches(self, generated: GeneratedText) -> dict[str, list[dict[str, Any]] | None]:
        """How replacements were found, per slot of prompt and output; None for fixed baselines.

        Warns:
            UserWarning: If a model proposes no other text for any feature of the prompt.
        """
        # The last generated feature precedes no token: it is never replaced.
        output, prompt = generated.matches(generated.n_causes), self.prompt.matches()
        _warn_of_nothing(prompt or [])
        return {
            part: None if found is None else [asdict(match) for match in found]
            for part, found in {"prompt": prompt, "output": output}.items()
        }


def _warn_of_nothing(matches: Sequence[Match]) -> None:
    """Warns if every feature remains unchanged, since the model proposes no other text."""
    known = [match for match in matches if match.level != "blank"]
    if known and all(match.level == "model" and not match.n_candidates for match in known):
        warn_user(
            f"the model proposes no alternative for any of the {len(known)} features of the "
            "prompt: none is ever absent, and all attributions are 0. Give alternative texts "
            "(`baselines=[[...], ...]`), a corpus (`CorpusBaselines`), or a model that knows "
            "this kind of text (`ModelBaselines(proposer)`).",
        )
