"""What classes have in common whose attributions are the work of one process."""

import copy
from typing import Self

from captum_llm_ext.model import Processes


class OneProcess:
    """An attribution that one process makes; `attribute_dataset` shares out its records."""

    _processes: Processes

    @property
    def processes(self) -> Processes:
        """Those that work together on one attribution: this one alone."""
        return self._processes

    def on(self, processes: Processes) -> Self:
        """The same, where these processes make up one of those that share records."""
        other = copy.copy(self)
        other._processes = processes
        return other
