"""Attributions of one model in several threads, and threads that merely use it meanwhile."""

import os
import signal
import sys
import threading
import time
import warnings

import pytest
import threads
import tiny
import torch
from captum.attr import FeatureAblation, KernelShap, Lime, ShapleyValueSampling
from torch import nn

from captum_llm_ext import GenerationAttribution, TextSegmentInput
from captum_llm_ext.model import Scorer, TokenRow, exclusive
from captum_llm_ext.model.exclusive import exclusive_use, locked
from captum_llm_ext.result.convergence import earlier
from captum_llm_ext.text import encoding

PROMPT = "Dave lives in Palm Coast."
PATIENCE = 20  # seconds after which a test fails that waits for another thread


def in_thread(function, *arguments):
    """Runs a function in a thread; what it returned or raised is in the list."""
    found = []

    def run():
        try:
            found.append(function(*arguments))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def rows_of(tokenizer):
    target = tokenizer.encode(" golf and chess", add_special_tokens=False)
    ids = tokenizer.encode(PROMPT)
    rows = [
        TokenRow((*own, *target[:-1]), range(len(own) - 1, len(own) - 1 + len(target)))
        for own in (ids[:i] + ids[i + 1 :] for i in range(1, len(ids)))
    ]
    return rows, torch.tensor(target)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_concurrent_calls_equal_sequential_calls(tokenizer, name):
    model = threads.model_of(name, len(tokenizer))
    own = threads.attributions(model, tokenizer, PROMPT, " golf and")
    others = threads.uses(model, tokenizer)
    report = threads.in_threads(own, others, n_own=len(own), n_others=10, n_threads=2)
    assert report["failures"] == []
    assert sum(report["counts"].values()) >= len(own) + 10
    assert {name.partition(": ")[2] for name in report["counts"]} <= {"equal", "within tolerance"}


class Meeting:
    """An `attr_target` that waits where several threads have to be at the same time."""

    def __init__(self, n):
        self.barrier = threading.Barrier(n, timeout=PATIENCE)

    def __call__(self, logits, target):
        self.barrier.wait()
        return logits.gather(2, target.expand(len(logits), -1)[..., None])[..., 0]


def test_different_models_run_concurrently(tokenizer):
    """Also if they have a configuration in common, and attend in ways of this package's."""
    one = tiny.llama(len(tokenizer))
    other = type(one)(one.config).eval()
    rows, target = rows_of(tokenizer)
    meeting = Meeting(2)

    def scored(model, attr_target):
        return Scorer(model, attr_target=attr_target, reuse="pack", overhead=0).values(rows, target)

    running = [in_thread(scored, model, meeting) for model in (one, other)]
    for thread, _ in running:
        thread.join()
    for model, (_, (found,)) in zip((one, other), running, strict=True):
        torch.testing.assert_close(found, scored(model, "logit"), rtol=0, atol=1e-4)


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids):
        return self.inner(input_ids=input_ids)


def tied(model):
    """Another model with the same weights."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def with_encoder_of(model):
    other = type(model)(model.config).eval()
    other.model = model.model
    return other


@pytest.mark.parametrize(
    "related",
    [
        lambda model: model,
        Wrapped,
        with_encoder_of,
        tied,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: model.model,
    ],
)
def test_models_with_shared_modules_exclude_one_another(related):
    model = tiny.llama()
    other = related(model)
    inside, leave, order = threading.Event(), threading.Event(), []

    def first():
        with locked(model):
            inside.set()
            assert leave.wait(PATIENCE)
            order.append("first")

    def second():
        assert inside.wait(PATIENCE)
        with exclusive_use(other):
            order.append("second")

    running = [in_thread(first), in_thread(second)]
    running[1][0].join(0.1)
    assert order == []
    leave.set()
    for thread, _ in running:
        thread.join(PATIENCE)
    assert [found for _, found in running] == [[None], [None]]
    assert order == ["first", "second"]


def test_model_lock_is_reentrant_with_other_models(tokenizer):
    """A surrogate that is asked within a pass of the model, and the model within itself."""
    model, other = tiny.llama(len(tokenizer)), tiny.llama(len(tokenizer), seed=1)
    rows, target = rows_of(tokenizer)
    expected = Scorer(model).values(rows, target)
    with exclusive_use(model), locked(other), exclusive_use(model):
        torch.testing.assert_close(Scorer(model).values(rows, target), expected)


def test_deadlock_is_detected():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    both = threading.Barrier(2, timeout=PATIENCE)

    def take(first, second):
        with locked(first):
            both.wait()
            with locked(second):
                return "both"

    running = [in_thread(take, one, other), in_thread(take, other, one)]
    for thread, _ in running:
        thread.join(PATIENCE)
    found = [found[0] for _, found in running]
    assert found.count("both") == 1
    (error,) = [one for one in found if one != "both"]
    assert isinstance(error, RuntimeError)
    assert "two threads each hold a model" in str(error)
    with locked(one), locked(other):  # nothing is left behind
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_model_lock_is_released_after_errors(tokenizer, error):
    model = tiny.llama(len(tokenizer))
    rows, target = rows_of(tokenizer)

    def failing(logits, target):
        raise error

    with pytest.raises(error):
        Scorer(model, attr_target=failing).values(rows, target)
    thread, found = in_thread(Scorer(model).values, rows, target)
    thread.join(PATIENCE)
    assert found[0].shape == (len(rows), len(target))


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_waiting_thread_can_be_interrupted():
    model = nn.Linear(2, 2)
    inside, leave = threading.Event(), threading.Event()

    def first():
        with locked(model):
            inside.set()
            until = time.monotonic() + PATIENCE
            while not exclusive._awaited and time.monotonic() < until:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
            leave.wait(PATIENCE)

    # Tests that are spread over processes run with the signal ignored.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread, _ = in_thread(first)
        assert inside.wait(PATIENCE)
        with pytest.raises(KeyboardInterrupt), locked(model):
            pass
        leave.set()
        thread.join(PATIENCE)
    finally:
        signal.signal(signal.SIGINT, usual)
    with locked(model):
        pass


def test_attention_patch_is_invisible_to_other_threads(tokenizer):
    """What they read of the configuration, a sibling of which another thread reads otherwise."""
    model = tiny.llama(len(tokenizer))
    rows, target = rows_of(tokenizer)
    here, there = [], []

    def seen(logits, target):
        here.append(model.config._attn_implementation)
        thread, found = in_thread(lambda: model.config._attn_implementation)
        thread.join(PATIENCE)
        there.extend(found)
        return logits.mean(2)

    forward = model.model.layers[0].forward

    def watching(*arguments, **named):
        seen(torch.zeros(1, 1, 1), None)
        return forward(*arguments, **named)

    model.model.layers[0].forward = watching
    Scorer(model, reuse="pack", overhead=0).values(rows, target)
    assert set(there) == {"sdpa"}
    assert any(name.startswith("captum_llm_ext_packed") for name in here)
    assert model.config._attn_implementation == "sdpa"


def test_sampling_is_independent_of_other_threads_generators(tokenizer, model):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    row = TokenRow(tuple(tokenizer.encode(PROMPT)), ())
    drawn = []

    def between(module, arguments):
        thread, _ = in_thread(lambda: drawn.append(torch.rand(1)) if len(drawn) < 3 else None)
        thread.join(PATIENCE)

    hook = model.model.register_forward_pre_hook(between)
    try:
        sampled = {"max_new_tokens": 8, "do_sample": True}
        found = Scorer(model).generate(row, sampled, seed=5)
    finally:
        hook.remove()
    assert torch.equal(torch.cat(drawn), expected)
    torch.manual_seed(5)
    ids = torch.tensor([row.ids])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), **sampled)
    assert found.tolist() == said[0, ids.shape[1] :].tolist()


def test_foreign_method_draws_from_no_global_generator(tokenizer, model):
    class Own(ShapleyValueSampling):
        pass

    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    attribution = GenerationAttribution(Own(model), tokenizer)
    state = torch.random.get_rng_state()
    one, again = (attribution.attribute(inp, " golf", n_samples=3, seed=4) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.token_attr, again.token_attr)
    other = attribution.attribute(inp, " golf", n_samples=3, seed=5)
    assert not torch.equal(one.masks, other.masks)


def test_tokenizer_truncation_in_other_threads_is_harmless(model):
    """It keeps that in itself; what was encoded for us meanwhile is encoded again."""
    tokenizer = tiny.byte_level()
    expected, stop = tokenizer(PROMPT)["input_ids"], threading.Event()

    def cut():
        while not stop.is_set():
            tokenizer([PROMPT, "a"], padding=True, truncation=True, max_length=5)

    before = sys.getswitchinterval()
    sys.setswitchinterval(threads.SWITCH_INTERVAL)
    others = [in_thread(cut) for _ in range(2)]
    try:
        found = [
            TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete").ids for _ in range(40)
        ]
        said = [encoding.ids(tokenizer, PROMPT) for _ in range(40)]
    finally:
        stop.set()
        sys.setswitchinterval(before)
    for thread, raised in others:
        thread.join(PATIENCE)
        assert raised == [None]
    assert all(list(ids) == expected for ids in found + said)


def test_always_truncating_tokenizer_is_refused():
    tokenizer = tiny.byte_level()

    class Cut:
        backend_tokenizer = tokenizer.backend_tokenizer

        def __call__(self, text, **options):
            return tokenizer(text, truncation=True, max_length=3)

    with pytest.raises(RuntimeError, match="its own tokenizer"):
        encoding.ids(Cut(), PROMPT)


def test_convergence_keeps_warning_filters(tokenizer, model, monkeypatch):
    """They belong to all threads."""
    inp = TextSegmentInput(threads.PROMPT, tokenizer, "word", baselines="delete")
    attribution = GenerationAttribution(KernelShap(model), tokenizer)
    result = attribution.attribute(inp, [7], n_samples=64)
    result = result.refit(Lime)  # of which a few coalitions warn

    def changed(*arguments, **named):
        raise AssertionError("the filters were changed")

    with monkeypatch.context() as patched:
        patched.setattr(warnings, "simplefilter", changed)
        patched.setattr(warnings, "filterwarnings", changed)
        assert len(earlier(result._evidence(), [0])) > 2


def test_training_mode_is_restored(tokenizer):
    model = tiny.llama(len(tokenizer), attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    one, again = (attribution.attribute(inp, " golf") for _ in range(2))
    assert torch.equal(one.token_attr, again.token_attr)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_process_inherits_no_lock():
    model = nn.Linear(2, 2)
    inside, leave = threading.Event(), threading.Event()

    def first():
        with locked(model):
            inside.set()
            leave.wait(PATIENCE)

    thread, _ = in_thread(first)
    assert inside.wait(PATIENCE)
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        with locked(model):
            os._exit(0)
    _, status = os.waitpid(child, 0)
    leave.set()
    thread.join(PATIENCE)
    assert status == 0
