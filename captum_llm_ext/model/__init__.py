"""Scoring token rows for a target: the only place where the model runs.

`scoring` is the interface: each distinct row costs at most one teacher-forced pass, which serves
all target tokens. `forward` runs passes over many rows, with shared prefix caches, or packed in one
sequence without repeated tokens. `probe` finds what the model does, hence how it can be run, and
how far rounding changes values. `gradients` has backward passes from values to a layer, `processes`
makes several processes work as one. `generation` has generation settings, `identity` recognises a
changed model, `exclusive` protects other threads meanwhile. `Likelihood` is the model as baselines
use it, text by text; `RowScorer` is the interface of a `Scorer`.
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
