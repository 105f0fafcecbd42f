"""Attribution of generated text, as an extension of captum.

Attributes every token that a language model generates to the prompt and to the tokens before it::

    from captum.attr import ShapleyValueSampling
    from captum_llm_ext import CorpusBaselines, GenerationAttribution, TextSegmentInput

    inp = TextSegmentInput(prompt, tokenizer, unit="word", baselines=CorpusBaselines(texts))
    result = GenerationAttribution(ShapleyValueSampling(model), tokenizer).attribute(inp)
    print(result)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_llm_ext.attribution.attention import (
        AttentionRollout,
        AttentionWeights,
        GenerationAttentionAttribution,
    )
    from captum_llm_ext.attribution.coalition_game import CoalitionGame
    from captum_llm_ext.attribution.counterfactual import (
        Counterfactual,
        CounterfactualSearch,
        Flip,
    )
    from captum_llm_ext.attribution.dataset import DatasetReport, attribute_dataset
    from captum_llm_ext.attribution.generation import GenerationAttribution
    from captum_llm_ext.attribution.gradient import GenerationGradientAttribution
    from captum_llm_ext.attribution.patching import ActivationPatching
    from captum_llm_ext.attribution.remote import RemoteGenerationAttribution
    from captum_llm_ext.attribution.total_effect import TotalEffect
    from captum_llm_ext.coalitions.stopping import Precision, StoppingRule, TopCauses
    from captum_llm_ext.contrast import Contrast
    from captum_llm_ext.demo import load_demo
    from captum_llm_ext.evaluation.faithfulness import FaithfulnessReport, measure_faithfulness
    from captum_llm_ext.evaluation.sensitivity import BaselineComparison, compare_baselines
    from captum_llm_ext.methods import (
        EquivalentLinearSystem,
        FeatureInclusion,
        HierarchicalAblation,
        LayerSaliency,
        PartitionShap,
        Smile,
    )
    from captum_llm_ext.remote import (
        AnthropicProvider,
        ApiError,
        CallableProvider,
        ChatProvider,
        CompletionsProvider,
        EngineProvider,
        Estimate,
        TokenProvider,
    )
    from captum_llm_ext.result import (
        AnswerAttribution,
        Cause,
        GenerationAttributionResult,
        Redundancy,
        Route,
        SpanAttribution,
        TotalAttribution,
        UnresolvedGroup,
    )
    from captum_llm_ext.result.patching import PatchingResult
    from captum_llm_ext.text.baselines import (
        Baseline,
        Deletion,
        FixedTexts,
        Infilling,
        Slot,
        TokenBaseline,
    )
    from captum_llm_ext.text.baselines.corpus.baselines import CorpusBaselines, Match
    from captum_llm_ext.text.baselines.model.baselines import ModelBaselines
    from captum_llm_ext.text.inputs import ChatInput, TextSegmentInput

__version__ = "0.1.0"

__all__ = [
    "ActivationPatching",
    "AnswerAttribution",
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
    "Counterfactual",
    "CounterfactualSearch",
    "DatasetReport",
    "Deletion",
    "EngineProvider",
    "EquivalentLinearSystem",
    "Estimate",
    "FaithfulnessReport",
    "FeatureInclusion",
    "FixedTexts",
    "Flip",
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
    "PatchingResult",
    "Precision",
    "Redundancy",
    "RemoteGenerationAttribution",
    "Route",
    "Slot",
    "Smile",
    "SpanAttribution",
    "StoppingRule",
    "TextSegmentInput",
    "TokenBaseline",
    "TokenProvider",
    "TopCauses",
    "TotalAttribution",
    "TotalEffect",
    "UnresolvedGroup",
    "attribute_dataset",
    "compare_baselines",
    "load_demo",
    "measure_faithfulness",
]

# Names are imported on first access: torch takes seconds to import, during which Ctrl-C would end
# the command line with a traceback.
_NAMES = {
    "attribution.attention": "AttentionRollout AttentionWeights GenerationAttentionAttribution",
    "attribution.counterfactual": "Counterfactual CounterfactualSearch Flip",
    "attribution.generation": "GenerationAttribution",
    "attribution.total_effect": "TotalEffect",
    "text.baselines": "Baseline Deletion FixedTexts Infilling Slot TokenBaseline",
    "text.baselines.model.baselines": "ModelBaselines",
    "text.baselines.corpus.baselines": "CorpusBaselines Match",
    "attribution.coalition_game": "CoalitionGame",
    "coalitions.stopping": "Precision StoppingRule TopCauses",
    "contrast": "Contrast",
    "attribution.patching": "ActivationPatching",
    "result.patching": "PatchingResult",
    "attribution.remote": "RemoteGenerationAttribution",
    "attribution.dataset": "DatasetReport attribute_dataset",
    "demo": "load_demo",
    "attribution.gradient": "GenerationGradientAttribution",
    "text.inputs": "ChatInput TextSegmentInput",
    "methods": "EquivalentLinearSystem FeatureInclusion HierarchicalAblation LayerSaliency "
    "PartitionShap Smile",
    "evaluation.faithfulness": "FaithfulnessReport measure_faithfulness",
    "remote": "AnthropicProvider ApiError CallableProvider ChatProvider CompletionsProvider "
    "EngineProvider Estimate TokenProvider",
    "result": "AnswerAttribution Cause GenerationAttributionResult Redundancy Route "
    "SpanAttribution TotalAttribution UnresolvedGroup",
    "evaluation.sensitivity": "BaselineComparison compare_baselines",
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
