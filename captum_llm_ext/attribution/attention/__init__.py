"""Attribution by attention maps, and attention weights by head.

`GenerationAttentionAttribution` is the class that users call. `methods` are the methods it accepts,
`maps` computes the attention map of each layer, `heads` holds the weights of every head for one
token, for plotting.
"""

from captum_llm_ext.attribution.attention.attribution import GenerationAttentionAttribution
from captum_llm_ext.attribution.attention.methods import AttentionRollout, AttentionWeights

__all__ = ["AttentionRollout", "AttentionWeights", "GenerationAttentionAttribution"]
