"""A clock for what is measured once and then decides: by it, equal runs are equal."""

from itertools import count
from types import SimpleNamespace


def steady():
    """In place of the module `time`: each look at it is a second later."""
    return SimpleNamespace(perf_counter=count().__next__)
