"""Gradients of every generated token, with respect to the prompt and to the tokens before it.

`GenerationGradientAttribution` joins them: `arguments` checks what users ask for, `path_groups`
says which target tokens share a path and what stands at its beginning, `paths` attributes along it.
At which points a captum method wants gradients is told by `captum_llm_ext.methods.path_methods`;
the forward and backward passes are in `captum_llm_ext.model.gradients`.
"""

from captum_llm_ext.attribution.gradient.attribution import GenerationGradientAttribution

__all__ = ["GenerationGradientAttribution"]
