"""Contrastive attribution: why this token *rather than its foils*.

Grammar raises all words of a kind equally, a cause raises one: the difference in log-probability of
two words that would both fit is about the choice between them (Jacovi et al. 2021, arXiv
2103.01378; Yin and Neubig 2022, arXiv 2202.10419). `Contrast` is the user's specification,
`foils_of` determines the tokens: given by the user, or found (`found`) among what the model itself
might have said. `AnswerKinds` computes the probability of words of a kind after a prompt.
"""

from captum_llm_ext.contrast.context import FoilContext
from captum_llm_ext.contrast.contrast import Contrast, as_value, scored
from captum_llm_ext.contrast.foils import Foils, foils_of
from captum_llm_ext.contrast.kinds import AnswerKinds

__all__ = ["AnswerKinds", "Contrast", "FoilContext", "Foils", "as_value", "foils_of", "scored"]
