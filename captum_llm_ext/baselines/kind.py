"""What a baseline is called where it is one of several, or where it matters which it is."""

from collections.abc import Mapping, Sequence

from captum.attr import ProductBaselines

from captum_llm_ext.baselines import Deletion, FixedTexts, TokenBaseline
from captum_llm_ext.baselines.conditional import ModelBaselines
from captum_llm_ext.baselines.corpus import CorpusBaselines


def kind_of(baseline: object, nothing: str = "deleted") -> str:
    """In a word or two.

    Args:
        baseline: A baseline, or what a user may give as one.
        nothing: What it is called where there is no text.
    """
    match baseline:
        case None | Deletion():
            return nothing
        case str():
            return baseline
        case int():
            return f"token {baseline}"
        case TokenBaseline():
            return f"token {baseline.token}"
        case CorpusBaselines():
            return "corpus"
        case ModelBaselines():
            return "model"
        case FixedTexts() if not any(any(texts) for texts in baseline.choices):
            return nothing
        case FixedTexts() | ProductBaselines() | Sequence() | Mapping():
            return "texts"
        case _:
            name = getattr(baseline, "__name__", type(baseline).__name__)
            return "function" if name == "<lambda>" else str(name)
