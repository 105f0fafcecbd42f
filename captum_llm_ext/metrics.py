"""Faithfulness metrics: how the model's values change as features are removed.

This is the documented import path; the code is in `captum_llm_ext.evaluation.faithfulness`.
"""

from captum_llm_ext.evaluation.faithfulness import *  # noqa: F403
from captum_llm_ext.evaluation.faithfulness import __all__ as __all__
