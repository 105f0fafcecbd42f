"""Attribution of models that an API serves.

`attribution` is captum's class, `rungs` chooses how much of the model its provider tells.
"""

from captum_llm_ext.attribution.remote.attribution import RemoteGenerationAttribution

__all__ = ["RemoteGenerationAttribution"]
