"""The probe of a model: what this very model does, seen in a few passes over rows of the run.

Does a token's value depend on what follows it, on the other rows of its batch, on how long the rows
of the batch are; where are the logits of an id; how far does rounding alone move a value. Nothing
of it is inferred from what a model is called. `findings` runs the probe once for a model in one
state (see `state`), with longer rows once more; what it finds decides how the model may be asked.
"""

from captum_llm_ext.model.probe.differences import FINE
from captum_llm_ext.model.probe.findings import Findings, Packing
from captum_llm_ext.model.probe.known import findings, learnt
from captum_llm_ext.model.probe.probing import ReadPacked

__all__ = ["FINE", "Findings", "Packing", "ReadPacked", "findings", "learnt"]
