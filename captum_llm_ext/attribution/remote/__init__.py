"""Attribution of models that an API serves.

`attribution` has captum's class, `rung_choice` chooses how to score by what the provider reports.
"""

from captum_llm_ext.attribution.remote.attribution import RemoteGenerationAttribution

__all__ = ["RemoteGenerationAttribution"]
