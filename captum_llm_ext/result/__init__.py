"""Results: attributions, their standard errors, and everything derived from them."""

from captum_llm_ext.result.answer import AnswerAttribution
from captum_llm_ext.result.causes import Cause, Redundancy, SpanAttribution, UnresolvedGroup
from captum_llm_ext.result.design import Design
from captum_llm_ext.result.result import GenerationAttributionResult
from captum_llm_ext.result.total import Route, TotalAttribution

__all__ = [
    "AnswerAttribution",
    "Cause",
    "Design",
    "GenerationAttributionResult",
    "Redundancy",
    "Route",
    "SpanAttribution",
    "TotalAttribution",
    "UnresolvedGroup",
]
