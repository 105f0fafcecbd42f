"""Default device, dtype and modes of torch around a call: neither failure nor other numbers."""

import ast
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import main_paths
import numpy as np
import pytest
import tiny
import torch
from captum.attr import FeatureAblation, KernelShap, LayerIntegratedGradients
from torch import Tensor
from torch.overrides import TorchFunctionMode

import captum_llm_ext
from captum_llm_ext import (
    CorpusBaselines,
    GenerationAttribution,
    GenerationGradientAttribution,
    TextSegmentInput,
)

PACKAGE = Path(captum_llm_ext.__file__).parent
PROMPT, TARGET = main_paths.PROMPT, main_paths.TARGET
# Of torch's functions that make a tensor of nothing: those that ask for a device, and of these
# those whose numbers have a type by default that the user may have changed.
MAKE = set(
    "tensor as_tensor asarray scalar_tensor full rand randn randint randperm zeros ones empty "
    "arange linspace logspace eye tril_indices triu_indices".split()
)
TYPED = set("tensor scalar_tensor full rand randn zeros ones empty linspace logspace eye".split())


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.llama(len(tokenizer), initializer_range=0.15)


@pytest.fixture(scope="module")
def paths(model, tokenizer, tmp_path_factory):
    return main_paths.paths(model, tokenizer, tmp_path_factory.mktemp("paths"))


@pytest.fixture(scope="module")
def expected(paths):
    return {name: call() for name, call in paths.items()}


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


class Noting(TorchFunctionMode):
    """Where the package has tensors of a type or on a device that only defaults would give."""

    def __init__(self, dtype, device):
        super().__init__()
        self.dtype, self.device, self.places = dtype, torch.device(device), set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = made if isinstance(made, tuple | list) else (made,)
        if any(isinstance(t, Tensor) and self._is_default(t) for t in tensors):
            frame = sys._getframe(1)
            while frame is not None and "/torch/" in Path(frame.f_code.co_filename).as_posix():
                if frame.f_code.co_name == "get_default_device":  # it asks one that it makes
                    return made
                frame = frame.f_back
            path = Path(frame.f_code.co_filename)
            # What others draw passes through there.
            if PACKAGE in path.parents and path.stem != "seeded":
                self.places.add(f"{path.relative_to(PACKAGE)}:{frame.f_lineno}")
        return made

    def _is_default(self, tensor):
        return tensor.dtype == self.dtype or tensor.device == self.device


def test_every_path_is_equal_under_other_defaults_and_inference_mode(paths, expected):
    noting = Noting(torch.float16, "meta")
    failed = {}
    for name, call in paths.items():
        try:
            with (
                default_dtype(torch.float16),
                default_device("meta"),
                torch.inference_mode(),
                noting,
            ):
                found = call()
            main_paths.same(found, expected[name])
        except Exception as error:
            failed[name] = "".join(traceback.format_exception(error, limit=-3))
    assert not failed, "\n\n".join(f"{name}: {told}" for name, told in failed.items())
    assert noting.places == set()


@pytest.mark.parametrize(
    "around",
    [
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.bfloat16),
        lambda: torch.device("meta"),
        torch.no_grad,
        torch.enable_grad,
        lambda: torch.set_grad_enabled(False),
    ],
    ids=["float64", "bfloat16", "meta", "no_grad", "enable_grad", "set_grad_enabled"],
)
@pytest.mark.parametrize(
    "name", ["pairs", "a corpus", "expected gradients", "driven orders", "generated"]
)
def test_each_default_alone(paths, expected, around, name):
    with around():
        found = paths[name]()
    main_paths.same(found, expected[name])


def test_deterministic_algorithms(paths, expected):
    names = ("pairs", "lime", "a corpus", "expected gradients", "ways of reading", "redundancy")
    torch.use_deterministic_algorithms(True)
    try:
        found = {name: paths[name]() for name in names}
    finally:
        torch.use_deterministic_algorithms(False)
    for name in names:
        main_paths.same(found[name], expected[name])


def test_model_created_in_inference_mode(tokenizer, model, paths, expected, tmp_path):
    with torch.inference_mode():
        frozen = tiny.llama(len(tokenizer), initializer_range=0.15)
    own = main_paths.paths(frozen, tokenizer, tmp_path)
    for name in ("pairs", "a corpus and the model", "generated", "game", "ways of reading"):
        main_paths.same(own[name](), expected[name])
        with torch.inference_mode():
            main_paths.same(own[name](), expected[name])
    for name in ("integrated gradients", "expected gradients"):
        with pytest.raises(ValueError, match=r"weights were made inside `torch\.inference_mode"):
            own[name]()


def test_objects_created_in_inference_mode_work_outside(tokenizer, model):
    with torch.inference_mode():
        baselines = CorpusBaselines(main_paths.TEXTS, min_candidates=0)
        inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines=baselines)
        attribution = GenerationAttribution(KernelShap(model), tokenizer)
        result = attribution.attribute(inp, TARGET, n_samples=64)
        game = attribution.to_game(inp, TARGET, n_draws=2)
    again = attribution.attribute(inp, TARGET, n_samples=64)
    assert torch.equal(again.token_attr, result.token_attr)
    assert torch.isfinite(result.refit().token_attr).all()
    assert np.isfinite(game(np.ones((2, game.n_players), bool))).all()
    gradients = GenerationGradientAttribution(LayerIntegratedGradients(model, None), tokenizer)
    assert torch.isfinite(gradients.attribute(inp, TARGET, n_steps=120).token_attr).all()
    # Ordinary tensors, which can be written to and have gradients.
    result.token_attr.add_(1).requires_grad_()


class MakesTensors(torch.nn.Module):
    """A model whose forward leaves the device of what it makes to torch's default."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, input_ids):
        position_ids = torch.arange(input_ids.shape[1])[None].expand(len(input_ids), -1)
        return self.inner(input_ids=input_ids, position_ids=position_ids, use_cache=False)


def test_model_with_default_device(tokenizer, model):
    attribution = GenerationAttribution(FeatureAblation(MakesTensors(model)), tokenizer)
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    expected = attribution.attribute(inp, TARGET)
    with torch.device("meta"):
        found = attribution.attribute(inp, TARGET)
    assert torch.equal(found.token_attr, expected.token_attr)


def test_meta_target_is_refused(tokenizer, model):
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    with pytest.raises(TypeError, match="on the device meta"):
        attribution.attribute(inp, torch.tensor([5, 6], device="meta"))


def test_tensor_constructors_name_device_and_dtype():
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            made = node.func if isinstance(node, ast.Call) else None
            if not isinstance(made, ast.Attribute) or not isinstance(made.value, ast.Name):
                continue
            if made.value.id == "torch" and made.attr in MAKE:
                wanted = {"device"} | ({"dtype"} if made.attr in TYPED else set())
                lacking = wanted - {keyword.arg for keyword in node.keywords}
                place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                missing += [f"{place}: torch.{made.attr} without {name}" for name in lacking]
    assert not missing
