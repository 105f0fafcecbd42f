"""How faithful attributions are to the model: metrics that take features away and look.

The path that is documented; it lives in `captum_llm_ext.evaluation.faithfulness`.
"""

from captum_llm_ext.evaluation.faithfulness import *  # noqa: F403
from captum_llm_ext.evaluation.faithfulness import __all__ as __all__
