"""Through which layer and place a feature of the text came to its effect: activation patching.

`ActivationPatching` is the join: `corruption` says what stands in the feature's place, `places`
which cells are patched together, `runs` reads streams and passes rows through patched ones,
`ranking` guesses what to patch first.
"""

from captum_llm_ext.attribution.patching.trace import ActivationPatching

__all__ = ["ActivationPatching"]
