"""Attribution methods that captum lacks, in captum's form: for models and for plain tensors."""

from captum_llm_ext.methods.feature_inclusion import FeatureInclusion
from captum_llm_ext.methods.hierarchical_ablation import (
    HierarchicalAblation,
    adaptive_search,
    tree_of_prompt,
)
from captum_llm_ext.methods.layer_saliency import LayerSaliency
from captum_llm_ext.methods.linear_system import EquivalentLinearSystem
from captum_llm_ext.methods.partition_shap import (
    Adaptive,
    PartitionShap,
    evaluations_of_orders,
    nesting,
    partition,
)
from captum_llm_ext.methods.smile import Smile

__all__ = [
    "Adaptive",
    "EquivalentLinearSystem",
    "FeatureInclusion",
    "HierarchicalAblation",
    "LayerSaliency",
    "PartitionShap",
    "Smile",
    "adaptive_search",
    "evaluations_of_orders",
    "nesting",
    "partition",
    "tree_of_prompt",
]
