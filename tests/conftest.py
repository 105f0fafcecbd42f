import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tiny
import torch

# A tiny forward takes 2 ms with one thread and ten times that with two on a busy machine.
torch.set_num_threads(1)


# Of several workers each takes the next file: with these at first none has one of minutes left when
# the others are done. (By `--no-loadscope-reorder`: xdist itself goes by the number of tests.)
LONGEST = (
    "test_tutorials.py",
    "test_processes.py",
    "test_cli.py",
    "test_cli_environment.py",
    "test_gradient_models.py",
    "test_dataset.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def no_figures_are_left_open():
    """Twenty that tests leave open would make the next one warn, and whose turn that is varies."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.byte_level()


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny.llama(len(tokenizer))


@pytest.fixture(scope="session")
def smooth(tokenizer):
    """A model in float64 between whose inputs values change so evenly that few steps are enough."""
    return tiny.llama(len(tokenizer), initializer_range=0.15).double()
