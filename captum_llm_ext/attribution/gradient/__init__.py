"""Gradients of every generated token with respect to the prompt and to the tokens before it.

`GenerationGradientAttribution` is the class that users call. `arguments` checks what they ask for,
`path_groups` finds which target tokens share a path and what its start is, `paths` attributes along
it. `captum_llm_ext.methods.path_methods` defines the points at which a captum method evaluates
gradients; forward and backward passes are in `captum_llm_ext.model.gradients`.
"""

from captum_llm_ext.attribution.gradient.attribution import GenerationGradientAttribution

__all__ = ["GenerationGradientAttribution"]
