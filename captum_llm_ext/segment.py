"""Where the features of a text begin and end.

The path that is documented; it lives in `captum_llm_ext.text.segment`.
"""

from captum_llm_ext.text.segment import *  # noqa: F403
from captum_llm_ext.text.segment import __all__ as __all__
