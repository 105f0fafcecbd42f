"""Examples in docstrings print what they say."""

import doctest
import importlib

import pytest

MODULES = [
    "captum_llm_ext.evaluation.faithfulness.game_metrics",
    "captum_llm_ext.text.segment.selected",
    "captum_llm_ext.text.segment.markdown",
    "captum_llm_ext.text.segment.prose",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_print_what_they_show(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
