"""Digests: equal for equal settings in any process, else different; checkpoints refuse others."""

import copy
import datetime
import functools
import json
import operator
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from captum._utils.models.linear_model import SkLearnLasso
from captum.attr import FeatureAblation, KernelShap, Lime
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

from captum_llm_ext import (
    CorpusBaselines,
    GenerationAttribution,
    HierarchicalAblation,
    PartitionShap,
    TextSegmentInput,
)
from captum_llm_ext.base.digest import checksum, describe, differences, digest
from captum_llm_ext.model import model_identity

PROMPT = "Dave lives in Palm Coast, FL"


class Own:
    """An object of the user's, with something it remembers."""

    def __init__(self, texts):
        self.texts, self._seen = texts, {}
        self.itself = self

    def method(self):
        return self.texts


def closing_over(texts):
    return lambda slot: texts[0]


def one_and_other():
    """Pairs of things that hold something else."""
    return {
        "numbers": (1, 1.0),
        "kinds": ("1", 1),
        "texts": (["ab", "c"], ["a", "bc"]),
        "order": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        "sets": ({"a", "b"}, {"a", "c"}),
        "tensors": (torch.arange(6), torch.arange(6).view(2, 3)),
        "objects": (Own(["a"]), Own(["b"])),
        "methods": (Own(["a"]).method, Own(["b"]).method),
        "closures": (closing_over(["a"]), closing_over(["b"])),
        "code": (lambda x: x + 1, lambda x: x + 2),
        "operations": (lambda x, y: x + y, lambda x, y: x - y),
        "partials": (functools.partial(max, key=1), functools.partial(max, key=2)),
        "modules": (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
        "corpora": (
            CorpusBaselines(["Dave lives here."], min_candidates=0),
            CorpusBaselines(["Dave lives there."], min_candidates=0),
        ),
        "settings": (
            CorpusBaselines(["Dave."], min_candidates=0),
            CorpusBaselines(["Dave."], min_candidates=0, match="any"),
        ),
    }


@pytest.mark.parametrize("name", one_and_other())
def test_digest_differs_between_different_objects(name):
    one, other = one_and_other()[name]
    assert digest(one) != digest(other)
    if name not in ("numbers", "order"):  # which are the same to Python
        assert describe(one) != describe(other)


def test_digest_is_equal_in_another_process():
    names = [name for name in one_and_other() if name != "modules"]  # whose weights are random
    here = [digest(one_and_other()[name][0]) for name in names]
    code = (
        "import test_digests as t; pairs = t.one_and_other(); "
        f"print(*[t.digest(pairs[name][0]) for name in {names!r}])"
    )
    path = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
        # Sets of texts come in another order there.
        env={"PYTHONPATH": str(path.parent), "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.split() == here


def test_digest_ignores_private_caches():
    one, other = Own(["a"]), Own(["a"])
    other._seen["slot"] = "a"
    assert digest(one) == digest(other)


def test_describe_shows_short_values():
    assert describe({"unit": ("word", 3)}) == {"unit": ["word", 3]}
    assert describe("word") == "word"
    assert describe(closing_over).startswith("closing_over ")
    assert describe([str(i) for i in range(500)]).startswith("list ")
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "`b` was 2 and is 3"
    assert differences({"a": "x" * 300}, {}) == "another `a`"
    assert differences({"a": [1]}, {"a": [1]}) == ""


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
)
def test_checksum_of_chunks_equals_checksum_of_the_whole(dtype):
    whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    parts = [checksum(part) for part in whole.split(3, dim=1)]
    assert checksum(whole) == sum(parts)
    raw = whole.contiguous().view(torch.uint8).numpy().tobytes()
    size = 4 if dtype.is_complex else whole.element_size()
    numbers = [
        int.from_bytes(raw[i : i + size], sys.byteorder, signed=size > 1)
        for i in range(0, len(raw), size)
    ]
    assert int(checksum(whole)) == (sum(numbers) + 2**63) % 2**64 - 2**63
    assert int(checksum(whole[:0])) == 0


def test_digest_changes_with_one_weight(model):
    other = copy.deepcopy(model)
    assert model_identity(other) == model_identity(model)
    with torch.no_grad():
        other.lm_head.weight[0, 0] = torch.nextafter(other.lm_head.weight[0, 0], torch.tensor(9.0))
    found = model_identity(other)
    assert found["model"] == model_identity(model)["model"]
    assert found["weights"] != model_identity(model)["weights"]
    assert model_identity(other.to(torch.bfloat16))["model"] != found["model"]


def test_checkpoint_of_another_run_is_refused(tokenizer, tmp_path):
    model = tiny.llama(len(tokenizer))
    other = tiny.llama(len(tokenizer), seed=1)
    path = tmp_path / "run.safetensors"

    def run(
        method=None, prompt=PROMPT, unit="word", baselines=None, attr_target="log_prob", **more
    ):
        method = Lime(model) if method is None else method
        inp = TextSegmentInput(prompt, tokenizer, unit, baselines=baselines)
        attribution = GenerationAttribution(method, tokenizer, attr_target)
        arguments = {"target": [5, 6], "n_samples": 20, "checkpoint": path, "output_unit": None}
        return attribution.attribute(inp, **arguments | more)

    expected = run()
    content = path.read_bytes()
    assert torch.equal(run().values, expected.values)
    for name, arguments in {
        "weights": {"method": Lime(other)},
        "method": {"method": KernelShap(model)},
        "method_settings": {"method": Lime(model, SkLearnLasso(alpha=0.5))},
        "prompt": {"prompt": "Dave lives in Palm Coast, TX"},
        "baselines": {"baselines": "<unk>"},
        "target": {"target": [5, 7]},
        "seed": {"seed": 3},
        "num_trials": {"num_trials": 2},
        "n_samples": {"n_samples": 21},
        "output_unit": {"output_unit": "token"},
        "attr_target": {"attr_target": "logit"},
    }.items():
        with pytest.raises(ValueError, match=f"belongs to another run.*`{name}`"):
            run(**arguments)
        assert path.read_bytes() == content, name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PartitionShap, lambda model: PartitionShap(model, scheme="splits")),
        (HierarchicalAblation, lambda model: HierarchicalAblation(model, share=0.2)),
        (FeatureAblation, HierarchicalAblation),
    ],
)
def test_method_settings_change_the_run_digest(model, tokenizer, one, other):
    first, second = (
        GenerationAttribution(make(model), tokenizer).identity() for make in (one, other)
    )
    assert "`method" in differences(first, second)
    assert differences(first, GenerationAttribution(one(model), tokenizer).identity()) == ""


# What goes into `generate`, as objects


class Stop(StoppingCriteria):
    """The user's own: what it was given is private."""

    def __init__(self, token, after=2):
        self._token, self.after = token, after
        self._calls = 0

    def __call__(self, input_ids, scores, **_):
        self._calls += 1
        return torch.full((len(input_ids),), input_ids.shape[1] > 40 + self.after)


class Slots:
    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held


class Locked:
    def __init__(self, words):
        self.words, self.lock = words, threading.Lock()


def defined(code):
    """A class or function as a notebook's cell defines it: `thing`."""
    space = {"__name__": "__main__"}
    exec(code, space)
    return space["thing"]


def criteria(**given):
    return StoppingCriteriaList([MaxLengthCriteria(**given)])


def generating():
    """Pairs of arguments of ``generate`` that do something else, made anew by each call."""
    tokenizer, other = tiny.byte_level(), tiny.byte_level()
    other.add_tokens(["<more>"])
    call = "class thing:\n    limit = {}\n    def __call__(self, ids): return ids{}"
    return {
        "configurations": (GenerationConfig(max_new_tokens=3), GenerationConfig(max_new_tokens=4)),
        "criteria": (criteria(max_length=30), criteria(max_length=31)),
        "criteria of its own": (Stop(3), Stop(4)),
        "public": (Stop(3, 1), Stop(3, 2)),
        "processors": (
            LogitsProcessorList([TemperatureLogitsWarper(0.5)]),
            LogitsProcessorList([TemperatureLogitsWarper(0.6)]),
        ),
        "biases": (
            [SequenceBiasLogitsProcessor([[[3], 1.0]])],
            [SequenceBiasLogitsProcessor([[[3], 2.0]])],
        ),
        "tokenizers": (tokenizer, other),
        "tokens": ([torch.tensor([3, 4])], [torch.tensor([3, 5])]),
        "lambdas": (lambda ids: ids[:3], lambda ids: ids[:4]),
        "constants": (
            defined("N = 3\ndef thing(ids): return ids[:N]"),
            defined("N = 4\ndef thing(ids): return ids[:N]"),
        ),
        "code of a class": (defined(call.format(1, "[0]"))(), defined(call.format(1, "[1]"))()),
        "values of a class": (defined(call.format(1, ""))(), defined(call.format(2, ""))()),
        "patterns": (re.compile("a+"), re.compile("a*")),
        "slots": (Slots([3]), Slots([4])),
        "bound": ({3}.__contains__, {4}.__contains__),
        "getters": (operator.itemgetter(1), operator.itemgetter(2)),
        "ranges": (range(10**12), range(10**12 + 1)),
        "dates": (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
        "arrays": (np.arange(3), np.arange(4)),
        "bytes": (bytearray(b"a"), bytearray(b"b")),
    }


@pytest.mark.parametrize("name", generating())
def test_generation_settings_have_digests_without_addresses(name):
    (one, other), (again, _) = generating()[name], generating()[name]
    assert describe(one) == describe(again)
    assert digest(one) == digest(again)
    assert describe(one) != describe(other)
    assert digest(one) != digest(other)
    assert "0x" not in json.dumps(describe(one))


def test_digest_ignores_time_and_padding_state():
    tokenizer = tiny.byte_level()
    before = digest(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or "</s>"
    padded = digest(tokenizer)
    tokenizer(["a", "b c d e"], padding=True, truncation=True, max_length=3)
    assert digest(tokenizer) == padded
    assert before is not None
    first = digest(MaxTimeCriteria(3.0))
    time.sleep(0.01)
    assert digest(MaxTimeCriteria(3.0)) == first != digest(MaxTimeCriteria(4.0))
    stop = Stop(3)
    before = digest(stop)
    stop(torch.zeros(1, 5), None)
    assert digest(stop) == before


def test_describe_names_undigestible_attributes():
    one = describe(Locked(["a"]))
    assert re.fullmatch(r"Locked [0-9a-f]{16} \(less what cannot be told of: lock\)", one)
    assert one == describe(Locked(["a"])) != describe(Locked(["b"]))
    recursive = []
    recursive.append(recursive)
    assert describe(recursive) == describe(recursive)


@pytest.mark.parametrize("mode", ["w", "wb"])
@pytest.mark.parametrize("length", [1, 200])
def test_describe_names_open_files_by_type(tmp_path, mode, length):
    with open(tmp_path / ("a" * length), mode) as file:
        kind = type(file).__name__
        assert f"(less what cannot be told of: {kind})" in describe({"file": file})


@pytest.mark.parametrize(
    "arguments",
    [
        lambda: {"generation_config": GenerationConfig(max_new_tokens=4, do_sample=False)},
        lambda: {"max_new_tokens": 6, "stopping_criteria": criteria(max_length=30)},
        lambda: {"max_new_tokens": 6, "stopping_criteria": StoppingCriteriaList([Stop(3)])},
        lambda: {
            "max_new_tokens": 4,
            "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.7)]),
        },
        lambda: {"max_new_tokens": 4, "prefix_allowed_tokens_fn": lambda b, ids: list(range(40))},
        lambda: {"max_new_tokens": 4, "stop_strings": ["x"], "tokenizer": tiny.byte_level()},
    ],
)
def test_checkpoint_resumes_with_any_generation_settings(tmp_path, arguments):
    """With objects made anew, as in another process; and with others it is another run."""
    tokenizer = tiny.byte_level()
    model = tiny.llama(len(tokenizer))
    path = tmp_path / "run.safetensors"

    def run(given):
        inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
        attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
        return attribution.attribute(inp, gen_args=given, checkpoint=path)

    expected, content = run(arguments()), path.read_bytes()
    assert b"0x" not in content[:2000]
    again = run(arguments())
    assert torch.equal(again.values, expected.values)
    assert torch.equal(again.target, expected.target)
    with pytest.raises(ValueError, match=r"belongs to another run.*`target`"):
        run({**arguments(), "max_new_tokens": 5, "repetition_penalty": 1.5})
