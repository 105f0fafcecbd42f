"""Attribution of generated text, as an extension of captum.

Every token that a language model writes is attributed to the prompt and to the tokens written
before it::

    from captum.attr import ShapleyValueSampling
    from captum_llm_ext import CorpusBaselines, GenerationAttribution, TextSegmentInput

    inp = TextSegmentInput(prompt, tokenizer, unit="word", baselines=CorpusBaselines(texts))
    result = GenerationAttribution(ShapleyValueSampling(model), tokenizer).attribute(inp)
    print(result)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_llm_ext.attention import (
        AttentionRollout,
        AttentionWeights,
        GenerationAttentionAttribution,
    )
    from captum_llm_ext.attribution import GenerationAttribution
    from captum_llm_ext.baselines import (
        Baseline,
        Deletion,
        FixedTexts,
        Infilling,
        Slot,
        TokenBaseline,
    )
    from captum_llm_ext.baselines.conditional import ModelBaselines
    from captum_llm_ext.baselines.corpus import CorpusBaselines, Match
    from captum_llm_ext.coalition_game import CoalitionGame
    from captum_llm_ext.contrast import Contrast
    from captum_llm_ext.dataset import DatasetReport, attribute_dataset
    from captum_llm_ext.demo import load_demo
    from captum_llm_ext.gradient import GenerationGradientAttribution
    from captum_llm_ext.inputs import ChatInput, TextSegmentInput
    from captum_llm_ext.methods import (
        EquivalentLinearSystem,
        FeatureInclusion,
        HierarchicalAblation,
        LayerSaliency,
        PartitionShap,
    )
    from captum_llm_ext.metrics import FaithfulnessReport, measure_faithfulness
    from captum_llm_ext.remote import (
        AnthropicProvider,
        ApiError,
        CallableProvider,
        ChatProvider,
        CompletionsProvider,
        Estimate,
        RemoteGenerationAttribution,
        TokenProvider,
    )
    from captum_llm_ext.result import (
        Cause,
        GenerationAttributionResult,
        Redundancy,
        SpanAttribution,
        UnresolvedGroup,
    )
    from captum_llm_ext.sensitivity import BaselineComparison, compare_baselines

__version__ = "0.1.0"

__all__ = [
    "AnthropicProvider",
    "ApiError",
    "AttentionRollout",
    "AttentionWeights",
    "Baseline",
    "BaselineComparison",
    "CallableProvider",
    "Cause",
    "ChatInput",
    "ChatProvider",
    "CoalitionGame",
    "CompletionsProvider",
    "Contrast",
    "CorpusBaselines",
    "DatasetReport",
    "Deletion",
    "EquivalentLinearSystem",
    "Estimate",
    "FaithfulnessReport",
    "FeatureInclusion",
    "FixedTexts",
    "GenerationAttentionAttribution",
    "GenerationAttribution",
    "GenerationAttributionResult",
    "GenerationGradientAttribution",
    "HierarchicalAblation",
    "Infilling",
    "LayerSaliency",
    "Match",
    "ModelBaselines",
    "PartitionShap",
    "Redundancy",
    "RemoteGenerationAttribution",
    "Slot",
    "SpanAttribution",
    "TextSegmentInput",
    "TokenBaseline",
    "TokenProvider",
    "UnresolvedGroup",
    "attribute_dataset",
    "compare_baselines",
    "load_demo",
    "measure_faithfulness",
]

# Names are imported when they are first asked for: torch takes seconds, in which the command line
# would otherwise meet Ctrl-C with a traceback.
_NAMES = {
    "attention": "AttentionRollout AttentionWeights GenerationAttentionAttribution",
    "attribution": "GenerationAttribution",
    "baselines": "Baseline Deletion FixedTexts Infilling Slot TokenBaseline",
    "baselines.conditional": "ModelBaselines",
    "baselines.corpus": "CorpusBaselines Match",
    "coalition_game": "CoalitionGame",
    "contrast": "Contrast",
    "dataset": "DatasetReport attribute_dataset",
    "demo": "load_demo",
    "gradient": "GenerationGradientAttribution",
    "inputs": "ChatInput TextSegmentInput",
    "methods": "EquivalentLinearSystem FeatureInclusion HierarchicalAblation LayerSaliency "
    "PartitionShap",
    "metrics": "FaithfulnessReport measure_faithfulness",
    "remote": "AnthropicProvider ApiError CallableProvider ChatProvider CompletionsProvider "
    "Estimate RemoteGenerationAttribution TokenProvider",
    "result": "Cause GenerationAttributionResult Redundancy SpanAttribution UnresolvedGroup",
    "sensitivity": "BaselineComparison compare_baselines",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
