"""`HierarchicalAblation`: leave-one-out that is refined only where it matters."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from captum.attr import FeatureAblation
from torch import Tensor

from captum_llm_ext.base.arguments import check_counts
from captum_llm_ext.coalitions import Plan, Scope
from captum_llm_ext.coalitions.hierarchical_search import search
from captum_llm_ext.coalitions.owen_orders import Tree, tree_of_levels


class HierarchicalAblation(FeatureAblation):
    """`FeatureAblation` for long contexts: words are removed only in the parts that matter.

    The parts of the input's coarsest level are removed first, one at a time (``unit=("paragraph",
    "sentence", "word")``); then the next finer parts of those whose removal changes the value of
    some target token by at least `share` of the largest change found, and so on, largest change
    first. With `top_k`, a part is not refined either if it matters no more than the `top_k`
    strongest words found so far for each target token. Earlier output is always removed feature by
    feature. Parts that were not refined are in `result.unresolved`; their features share the part's
    change equally. Features removed alone have the values of `FeatureAblation`, which remains the
    exact answer: a part in which two features cancel, or for which other parts compensate, is not
    refined.

    It is a separate method, like `PartitionShap`, so that the method's name in a result says that
    not everything was examined.

    Args:
        forward_func: The model, or any forward function that captum's methods accept. For plain
            tensors, which have no hierarchy, this is `FeatureAblation`.
        share: From 0, where everything is refined, to 1. At 0.2, three prompts of five passages
            missed three of their nine strongest words, at 0.05 none (`benchmarks/hierarchical.py`).
        top_k: Number of strongest causes wanted per target token. None: all.

    Raises:
        ValueError: If `share` or `top_k` is out of range.
    """

    def __init__(
        self, forward_func: Callable[..., Any], share: float = 0.05, top_k: int | None = None
    ) -> None:
        super().__init__(forward_func)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(
                f"`share` is {share!r}: give the part of the largest change that is worth a closer "
                "look, from 0 (everything) to 1, such as 0.05."
            )
        check_counts(top_k=top_k)
        self.share, self.top_k = float(share), top_k

    @property
    def rule(self) -> str:
        """The refinement rule in words."""
        wanted = "" if self.top_k is None else f", and more than its {self.top_k} strongest known"
        return (
            "a part is opened where taking it out changes a target token's value by at least "
            f"{self.share:.3g} of the largest change found{wanted}"
        )


def tree_of_prompt(n_prompt: int, levels: Sequence[Sequence[int]]) -> Tree:
    """The hierarchy of the prompt's features.

    Raises:
        ValueError: If the prompt has no levels.
    """
    if not levels:
        raise ValueError(
            "the features of this input lie in no coarser parts, and there is nothing to search: "
            'give a nesting, such as `unit=("paragraph", "sentence", "word")`, or use '
            "`FeatureAblation`."
        )
    return tree_of_levels(n_prompt, levels)


def adaptive_search(
    tree: Tree, n_features: int, **settings: Any
) -> Callable[[Callable[[Plan], Tensor], Scope], tuple[Plan, Tensor]]:
    """`search` with all arguments but the game bound, as `Estimator.adaptive`."""
    return partial(_search, tree, n_features, settings)


def _search(
    tree: Tree,
    n_features: int,
    settings: dict[str, Any],
    score: Callable[[Plan], Tensor],
    scope: Scope,
) -> tuple[Plan, Tensor]:
    del scope  # every target depends on all columns of the tree
    return search(score, tree, n_features, **settings)
