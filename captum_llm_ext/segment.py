"""Segmenters: where the features of a text begin and end.

This is the documented import path; the code is in `captum_llm_ext.text.segment`.
"""

from captum_llm_ext.text.segment import *  # noqa: F403
from captum_llm_ext.text.segment import __all__ as __all__
