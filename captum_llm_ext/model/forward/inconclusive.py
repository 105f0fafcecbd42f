"""Errors of passes that probe a model: whether they are a finding."""

from captum_llm_ext.model.forward.memory import is_out_of_memory
from captum_llm_ext.model.processes.agreement import failed_on_all


def is_inconclusive(failure: Exception) -> bool:
    """Whether an error says nothing about the model: out of memory, or of one process alone."""
    return is_out_of_memory(failure) or not failed_on_all()
