"""Attribution by attention maps, and attention weights by head.

`GenerationAttentionAttribution` is the join: `methods` are what users hand to it, `maps` reads what
each layer attends to, `heads` is one token's row of each, to be drawn.
"""

from captum_llm_ext.attribution.attention.attribution import GenerationAttentionAttribution
from captum_llm_ext.attribution.attention.methods import AttentionRollout, AttentionWeights

__all__ = ["AttentionRollout", "AttentionWeights", "GenerationAttentionAttribution"]
