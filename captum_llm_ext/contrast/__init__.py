"""Why this word *rather than another*: a target token against its foils.

Grammar raises all words of a kind alike, the cause raises one: of two words that would both fit,
the log-probability of one less that of the other is about the choice between them (Jacovi et al.
2021, arXiv 2103.01378; Yin and Neubig 2022, arXiv 2202.10419). `Contrast` says which others are
meant, `foils_of` which tokens these are: `given` reads what the user gives, `found` looks for what
the model itself might have said. `AnswerKinds` tells what a prompt makes of all words of a kind.
"""

from captum_llm_ext.contrast.context import FoilContext
from captum_llm_ext.contrast.contrast import Contrast, as_value, scored
from captum_llm_ext.contrast.foils import Foils, foils_of
from captum_llm_ext.contrast.kinds import AnswerKinds

__all__ = ["AnswerKinds", "Contrast", "FoilContext", "Foils", "as_value", "foils_of", "scored"]
