"""Activation patching: through which layers and positions a feature has its effect.

`ActivationPatching` is the class that users call. `corruption` makes the texts that replace a
feature, `places` groups the positions that are patched together, `runs` reads residual streams and
runs patched forward passes, `ranking` estimates what to patch first.
"""

from captum_llm_ext.attribution.patching.trace import ActivationPatching

__all__ = ["ActivationPatching"]
