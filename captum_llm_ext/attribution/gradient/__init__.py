"""Gradients of every generated token, with respect to the prompt and to the tokens before it.

`GenerationGradientAttribution` is the join: `methods` tells the points at which a method of captum
wants gradients, `arguments` what users may ask for, `scenes` which tokens fade in together and what
is there before, `paths` puts these together, `layers` reads and replaces activations, `slopes` runs
the model forth and back.
"""

from captum_llm_ext.attribution.gradient.attribution import GenerationGradientAttribution

__all__ = ["GenerationGradientAttribution"]
