"""Names of baselines, for comparisons and messages."""

from collections.abc import Iterable, Mapping, Sequence

from captum.attr import ProductBaselines

from captum_llm_ext.text.baselines import Deletion, FixedTexts, TokenBaseline
from captum_llm_ext.text.baselines.corpus.baselines import CorpusBaselines
from captum_llm_ext.text.baselines.model.baselines import ModelBaselines

UNSEEN = (
    "texts that the model never saw. On a language whose causes are known, most {what} like that "
    "put the true causes not far above random numbers"
)


def unseen(baselines: Iterable[object], made: str, what: str) -> str | None:
    """A message if absence makes texts that the model never saw; None otherwise.

    Args:
        baselines: The baselines.
        made: The use of these texts, such as "faithfulness is measured on".
        what: The outcome, such as "metrics".
    """
    for baseline in baselines:
        is_token = isinstance(baseline, TokenBaseline | str | int)
        if is_token or baseline_name(baseline) == "deleted":
            happens = "become one and the same token" if is_token else "are deleted"
            return f"Absent features {happens}: {made} {UNSEEN.format(what=what)}"
    return None


def baseline_name(baseline: object, nothing: str = "deleted") -> str:
    """The name of a baseline in a word or two.

    Args:
        baseline: A baseline, or a `baselines` argument.
        nothing: The name of deletion.
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
