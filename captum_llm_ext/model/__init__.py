"""Token rows and a target in, values out: the only place where the model runs.

`scoring` is the whole: each distinct row costs one teacher-forced pass at most, which serves all
target tokens. `forward` runs passes over many rows: those that begin alike share the passes of
their beginnings, or are packed in one sequence where none of their tokens comes twice. `probe`
finds out what the model does, and so how it may be asked, and how far rounding alone moves a value.
`gradients` goes back from values to a layer, `processes` makes several processes one. `generation`
is what the model generates with, `identity` whether it is still the same, `exclusive` keeps other
threads right meanwhile. `Likelihood` is the model as baselines ask it, text by text; `RowScorer` is
what others rely on of a `Scorer`.
"""

from captum_llm_ext.model.forward.logits import AttrTarget
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.generation import Generation, planned_generation
from captum_llm_ext.model.identity import check_same, model_identity
from captum_llm_ext.model.likelihood import Likelihood
from captum_llm_ext.model.processes.group import Accelerator, Processes
from captum_llm_ext.model.scoring.batching import Reuse
from captum_llm_ext.model.scoring.checkpoint import Journal
from captum_llm_ext.model.scoring.interface import RowScorer
from captum_llm_ext.model.scoring.scorer import Scorer

__all__ = [
    "Accelerator",
    "AttrTarget",
    "Generation",
    "Journal",
    "Likelihood",
    "Processes",
    "Reuse",
    "RowScorer",
    "Scorer",
    "TokenRow",
    "check_same",
    "model_identity",
    "planned_generation",
]
