"""The probe: what a model does, found in a few forward passes over rows of the run.

Does a token's value depend on what follows it, on the other rows of its batch, on the lengths of
these rows; where are the logits of an id; how far does rounding alone change a value. Nothing is
inferred from a model's name. `findings` runs the probe once for a model in one state (see `state`),
and again for longer rows; its findings decide how the model is run.
"""

from captum_llm_ext.model.probe.cache import findings, record_findings
from captum_llm_ext.model.probe.differences import FINE
from captum_llm_ext.model.probe.findings import Findings, Packing
from captum_llm_ext.model.probe.probing import ComparePacked

__all__ = ["FINE", "ComparePacked", "Findings", "Packing", "findings", "record_findings"]
