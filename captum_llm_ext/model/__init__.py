"""Token rows and a target in, values out: the only place where the model runs.

Each distinct row costs one teacher-forced pass at most, which serves all target tokens, and the
foils that each is held against (`asked`); rows that begin alike share the passes of their
beginnings, or are packed in one sequence where none of their tokens comes twice. `probe` finds out
what the model does, and so how it may be asked at all; `batching` decides which of these ways a
call's rows take, `plan` which rows run together in each, `packing` makes that sequence, `passes`
runs the model, `memory` tells how much fits, `logits` turns what comes out into values, `noise`
measures how far rounding alone moves them; `Scorer` is the whole.
`processes` makes several processes one and `shares` cuts the work for them, `journal` keeps what is
found on disk, `identity` tells whether it is still the same model, `generation` what it generates
with. `Likelihood` is that model as baselines ask it, text by text. `Values` is what others rely on
of a `Scorer`.
"""

from captum_llm_ext.model.forward.logits import AttrTarget
from captum_llm_ext.model.forward.rows import TokenRow
from captum_llm_ext.model.generation import Generation, planned_generation
from captum_llm_ext.model.identity import check_same, model_identity
from captum_llm_ext.model.likelihood import Likelihood
from captum_llm_ext.model.processes.group import Accelerator, Processes
from captum_llm_ext.model.scoring.batching import Reuse
from captum_llm_ext.model.scoring.checkpoint import Journal
from captum_llm_ext.model.scoring.interface import Values
from captum_llm_ext.model.scoring.scorer import Scorer

__all__ = [
    "Accelerator",
    "AttrTarget",
    "Generation",
    "Journal",
    "Likelihood",
    "Processes",
    "Reuse",
    "Scorer",
    "TokenRow",
    "Values",
    "check_same",
    "model_identity",
    "planned_generation",
]
