"""Absent features drawn from what an API reports of its model's distribution."""

from collections.abc import Sequence
from typing import Any

from captum_llm_ext.attribution.game import Run
from captum_llm_ext.contrast import FoilContext
from captum_llm_ext.contrast.kinds import AnswerKinds
from captum_llm_ext.remote.estimate import Counter
from captum_llm_ext.remote.likeliest import TopOfPrompts, TopScorer
from captum_llm_ext.remote.scorer import RemoteScorer
from captum_llm_ext.text.baselines.model.baselines import ModelBaselines


def asks_provider(baselines: object) -> bool:
    """Whether baselines draw from the explained model itself."""
    return isinstance(baselines, ModelBaselines) and not baselines.has_proposer


def condition_on_answer(run: Run, context: FoilContext, tokenizer: Any, most: int) -> None:
    """Conditions baselines that ask the provider on the answer, as far as it reports.

    By ids, on the kinds of its words, among the reported tokens; otherwise only on the words that
    it shares with the prompt, which are drawn in no other place.

    Args:
        run: The run.
        context: The prompt and the answer.
        tokenizer: The model's tokenizer.
        most: Number of likeliest tokens requested at every position.
    """
    if not asks_provider(run.prompt.own_baseline):
        return
    scorer = run.scorer
    if isinstance(scorer, Counter):
        run.context.condition_on_answer(scorer.count_trials, context.target_text)
    elif isinstance(scorer, RemoteScorer) and scorer.takes_ids:
        by = TopScorer(TopOfPrompts(scorer, tokenizer, most), scorer)
        kinds = AnswerKinds(context, by, by.known)
        run.context.condition_on_answer(kinds, context.target_text)
    else:
        run.context.condition_on_answer(_all_alike, context.target_text)


def _all_alike(prompts: Sequence[tuple[int, ...]]) -> list[float]:
    return [0.0] * len(prompts)
