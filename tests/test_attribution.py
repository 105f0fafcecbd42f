"""The invariants of attribution, against brute force over all coalitions and steps."""

import random
import sys

import numpy as np
import pytest
import tiny
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    Lime,
    ShapleyValues,
    ShapleyValueSampling,
    TextTokenInput,
)
from captum.attr._utils.attribution import PerturbationAttribution
from reference import loop_log_probs, shapley_values, tokens_read

from captum_llm_ext import GenerationAttribution, PartitionShap, TextSegmentInput
from captum_llm_ext.model.probe import noise

PROMPT = "Dave lives in Austin"
TARGET = " golf and chess"
SHAPLEY = [ShapleyValues, ShapleyValueSampling, KernelShap]
METHODS = [*SHAPLEY, FeatureAblation, Lime]
UNK = 3


def _attribute(model, tokenizer, method, *, inp=None, target=TARGET, attr_target="log_prob", **kw):
    inp = inp or TextSegmentInput(PROMPT, tokenizer, baselines=kw.pop("baselines", None))
    attribution = GenerationAttribution(method(model), tokenizer, attr_target=attr_target)
    return attribution.attribute(inp, target, **kw)


def _ids(tokenizer, text=TARGET):
    return tokenizer.encode(text, add_special_tokens=False)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", [None, UNK], ids=["deletion", "token"])
def test_exact_values_equal_brute_force_at_every_step(model, tokenizer, replacement):
    model = model.double()
    try:
        inp = TextSegmentInput("Dave lives in", tokenizer, baselines=replacement)
        target = _ids(tokenizer, " golf and")
        result = _attribute(model, tokenizer, ShapleyValues, inp=inp, target=target)
        n_prompt = len(inp.names)
        for t in range(len(target)):

            def value(present, t=t):
                mask = torch.tensor([[float(i in present) for i in range(n_prompt)]])
                prompt = inp.to_model_input(mask)[0].tolist() or [tokenizer.bos_token_id]
                stands = [n_prompt + i in present for i in range(len(target))]
                read = tokens_read(target, stands, replacement)
                return float(loop_log_probs(model, prompt, [read[t]], [target[t]]))

            truth = shapley_values(value, n_prompt + t)
            found = result.full_attr[t].tolist()
            assert found[: n_prompt + t] == pytest.approx(truth, abs=1e-9)
            assert found[n_prompt + t :] == [0.0] * (len(target) - t)
            everything = frozenset(range(n_prompt + t))
            assert float(result.full_values[t]) == pytest.approx(value(everything), abs=1e-9)
            assert float(result.empty_values[t]) == pytest.approx(value(frozenset()), abs=1e-9)
    finally:
        model.float()


def test_output_word_is_present_for_its_own_tokens(model, tokenizer):
    """A word that is absent for later tokens is present for its own."""
    model = model.double()
    try:
        inp = TextSegmentInput("Dave lives", tokenizer, baselines="delete")
        target = _ids(tokenizer, " chess golf.")
        result = _attribute(
            model, tokenizer, ShapleyValues, inp=inp, target=target, output_unit="word"
        )
        assert result.output_features == [" chess", " golf."]
        texts = [tokenizer.decode([t]) for t in target]
        first = next(i for i, text in enumerate(texts) if text.startswith(" g"))
        assert first > 1  # the first word has several tokens
        n_prompt = 2
        for t in range(len(target)):
            n_earlier = 0 if t < first else 1

            def value(present, t=t):
                mask = torch.tensor([[float(i in present) for i in range(n_prompt)]])
                prompt = inp.to_model_input(mask)[0].tolist()
                stands = [i >= first or t < first or 2 in present for i in range(len(target))]
                read = tokens_read(target, stands, None)
                return float(loop_log_probs(model, prompt, [read[t]], [target[t]]))

            truth = shapley_values(value, n_prompt + n_earlier)
            found = result.full_attr[t].tolist()
            assert found[: n_prompt + n_earlier] == pytest.approx(truth, abs=1e-9)
            assert found[n_prompt + n_earlier :] == [0.0] * (2 - n_earlier)
    finally:
        model.float()


@pytest.mark.parametrize("method", [ShapleyValueSampling, KernelShap])
def test_sampling_converges_to_exact_values(model, tokenizer, method):
    inp = TextSegmentInput(
        "Dave lives in Palm Coast, FL and is a lawyer. His", tokenizer, baselines="delete"
    )
    exact = _attribute(
        model, tokenizer, ShapleyValues, inp=inp, target=_ids(tokenizer)[:2], max_exact_features=12
    )
    n_samples = 120 if method is ShapleyValueSampling else 1000
    sampled = _attribute(
        model, tokenizer, method, inp=inp, target=_ids(tokenizer)[:2], n_samples=n_samples
    )
    assert sampled.provenance["estimate"]
    error = (sampled.full_attr - exact.full_attr).abs()
    se = torch.cat([sampled.token_attr_se, sampled.output_attr_se], 1)
    assert (error <= 4 * se + 1e-6).all()
    assert se.max() < 0.25 * exact.full_attr.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_only_earlier_output_is_attributed(model, tokenizer, method):
    result = _attribute(model, tokenizer, method)
    n_target = len(result.output_tokens)
    assert result.output_attr.shape == (n_target, n_target)
    assert result.output_attr.triu().eq(0).all()
    assert result.output_attr.tril(-1).ne(0).any()
    assert result.full_attr.shape == (n_target, 4 + n_target)


@pytest.mark.parametrize("method", SHAPLEY)
@pytest.mark.parametrize("output_unit", ["token", "word", None])
@pytest.mark.parametrize("attr_target", ["log_prob", "prob", "logit"])
def test_shapley_values_are_efficient(model, tokenizer, method, output_unit, attr_target):
    result = _attribute(model, tokenizer, method, output_unit=output_unit, attr_target=attr_target)
    total = result.full_attr.sum(1)
    torch.testing.assert_close(total, result.full_values - result.empty_values)
    assert result.efficiency_gap.abs().max() < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_every_method_attributes_per_token(model, tokenizer, method, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # importing it now fails
    result = _attribute(model, tokenizer, method, output_unit=None)
    assert result.token_attr.shape == (len(result.target), 4)
    assert result.token_attr.ne(0).any()
    assert result.output_attr is None
    if method is not Lime:  # a lasso is not additive: test_captum.py has its whole answer
        torch.testing.assert_close(result.seq_attr, result.token_attr.sum(0))


def test_callable_attr_target_receives_float_logits_of_all_tokens(model, tokenizer):
    seen = []

    def log_prob(logits, target):
        seen.append((logits.shape[1:], logits.dtype))
        return logits.log_softmax(2).gather(2, target.view(1, -1, 1)).squeeze(2)

    own = _attribute(model, tokenizer, ShapleyValues, attr_target=log_prob)
    built_in = _attribute(model, tokenizer, ShapleyValues)
    torch.testing.assert_close(own.full_attr, built_in.full_attr, atol=1e-5, rtol=1e-4)
    assert set(seen) == {((len(own.target), model.config.vocab_size), torch.float32)}


def test_logit_values_equal_model_logits(model, tokenizer):
    result = _attribute(model, tokenizer, FeatureAblation, attr_target="logit")
    row = torch.tensor([[*tokenizer.encode(PROMPT), *result.target.tolist()]])
    with torch.no_grad():
        logits = model(row).logits[0]
    start = len(tokenizer.encode(PROMPT)) - 1
    truth = logits[start : start + len(result.target)].gather(1, result.target[:, None])[:, 0]
    torch.testing.assert_close(result.full_values, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*(too few|less than an order)")
@pytest.mark.parametrize("prompt", ["Dave", "Dave lives", PROMPT])
@pytest.mark.parametrize("method", [KernelShap, ShapleyValueSampling, PartitionShap, Lime])
def test_single_sample_has_no_standard_errors(model, tokenizer, method, prompt):
    inp = TextSegmentInput(prompt, tokenizer, baselines="delete")
    result = _attribute(model, tokenizer, method, inp=inp, n_samples=1)
    assert result.full_attr.isfinite().all()
    assert result.full_attr_se.isnan().any()  # one draw tells nothing of the next
    if method is not Lime:
        assert result.efficiency_gap.abs().max() < 1e-5


# --- one pass, ids in and out ---------------------------------------------------------------------


def test_coalition_costs_one_row_for_any_target_length(model, tokenizer):
    rows = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        _attribute(model, tokenizer, FeatureAblation)  # the model is looked at once
        rows.clear()
        result = _attribute(model, tokenizer, FeatureAblation)
    finally:
        handle.remove()
    n_features = 4 + len(result.target) - 1
    # And the full and the empty one; for the whole answer the prompt alone absent.
    assert result.n_evaluations - result.answer.n_evaluations == n_features + 2
    assert result.answer.n_evaluations == 1
    assert 1 <= sum(rows) - result.n_evaluations <= noise._CHECKED  # and what confirms them


def test_target_is_never_re_encoded(model, tokenizer):
    # The tokenizer itself would write " golf" otherwise, and never cuts an emoji.
    emoji = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(emoji) > 2
    ids = [*tokenizer.convert_tokens_to_ids(["g", "o", "l", "f"]), *emoji[:2]]
    result = _attribute(model, tokenizer, FeatureAblation, target=torch.tensor(ids))
    assert result.target.tolist() == ids
    assert result.output_tokens[:4] == ["g", "o", "l", "f"]
    assert len(result.output_tokens) == len(ids)
    assert str(result)


def test_generated_target_ids_are_kept(model, tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, baselines="delete")
    prompt = torch.tensor([tokenizer.encode(PROMPT)])
    truth = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
    )[0, prompt.shape[1] :]
    result = _attribute(
        model, tokenizer, FeatureAblation, inp=inp, target=None, gen_args={"max_new_tokens": 6}
    )
    assert torch.equal(result.target, truth)
    default = _attribute(model, tokenizer, FeatureAblation, inp=inp, target=None)
    assert len(default.target) <= 25
    assert torch.equal(default.target[:6], truth)


# --- reproducible, polite -------------------------------------------------------------------------


@pytest.mark.parametrize("method", [KernelShap, ShapleyValueSampling, Lime])
def test_result_depends_on_the_seed_alone(model, tokenizer, method):
    few = {
        "inp": TextSegmentInput("one two three four five six seven", tokenizer, baselines="delete"),
        "n_samples": 40,
    }
    one = _attribute(model, tokenizer, method, **few, seed=1)
    torch.manual_seed(99)
    again = _attribute(model, tokenizer, method, **few, seed=1)
    other = _attribute(model, tokenizer, method, **few, seed=2)
    assert torch.equal(one.full_attr, again.full_attr)
    assert torch.equal(one.masks, again.masks)
    assert not torch.equal(one.full_attr, other.full_attr)
    assert one.provenance["seed"] == 1


def test_global_random_state_is_untouched(model, tokenizer):
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    _attribute(
        model,
        tokenizer,
        KernelShap,
        target=None,
        gen_args={"max_new_tokens": 3, "do_sample": True},
        baselines=[["Ann", "Bob"], "has", "at", ["Dallas", "Waco"]],
    )
    assert states() == before


def test_sampled_generation_follows_the_seed(model, tokenizer):
    args = {"target": None, "gen_args": {"max_new_tokens": 8, "do_sample": True}}
    found = [
        _attribute(model, tokenizer, FeatureAblation, seed=seed, **args).target.tolist()
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]


class Interrupt(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("failure", [None, RuntimeError, Interrupt])
def test_user_objects_are_unchanged(tokenizer, failure):
    model = tiny.llama(len(tokenizer), attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    method = FeatureAblation(model)
    modes = [module.training for module in model.modules()]
    pad, forward = tokenizer.pad_token, model.forward

    def fail(module, args):
        assert not any(m.training for m in model.modules())  # evaluated in eval mode
        if failure:
            raise failure

    handle = model.register_forward_pre_hook(fail)
    hooks = len(model._forward_pre_hooks)
    try:
        if failure:
            with pytest.raises(failure):
                GenerationAttribution(method, tokenizer).attribute(
                    TextSegmentInput(PROMPT, tokenizer, baselines="delete"), TARGET
                )
        else:
            GenerationAttribution(method, tokenizer).attribute(
                TextSegmentInput(PROMPT, tokenizer, baselines="delete"), TARGET
            )
    finally:
        assert len(model._forward_pre_hooks) == hooks
        handle.remove()
    assert [module.training for module in model.modules()] == modes
    assert method.forward_func is model
    assert model.forward == forward
    assert tokenizer.pad_token == pad
    assert all(parameter.grad is None for parameter in model.parameters())


# --- baselines of prompt and output ---------------------------------------------------------------


def test_absent_output_uses_the_prompt_baseline(model, tokenizer):
    target = _ids(tokenizer)
    cases = [
        (TextTokenInput(PROMPT, tokenizer, baselines=UNK), None, UNK),
        (TextSegmentInput(PROMPT, tokenizer, baselines="<unk>"), None, UNK),
        (TextSegmentInput(PROMPT, tokenizer, baselines="delete"), None, None),
        (TextSegmentInput(PROMPT, tokenizer, baselines=["a", "b", "c", "d"]), None, None),
        (TextSegmentInput(PROMPT, tokenizer, baselines="delete"), 7, 7),
        (TextSegmentInput(PROMPT, tokenizer, baselines=lambda slot, g: [9, 9]), None, "nines"),
    ]
    for inp, output_baselines, expected in cases:
        result = _attribute(
            model, tokenizer, FeatureAblation, inp=inp, output_baselines=output_baselines
        )
        n_prompt = result.masks.shape[1] - len(target)
        row = next(  # all of the prompt, but not the first output token
            i for i, mask in enumerate(result.masks) if mask[:n_prompt].all() and not mask[n_prompt]
        )
        prompt = tokenizer.encode(PROMPT)
        stands = [False] + [True] * (len(target) - 1)
        if expected == "nines":
            read = [[], *([9, 9, *target[1:t]] for t in range(1, len(target)))]
        else:
            read = tokens_read(target, stands, expected)
        truth = loop_log_probs(model, prompt, read, target)
        torch.testing.assert_close(result.values[row].double(), truth, atol=1e-4, rtol=1e-4)


def test_random_baselines_are_averaged_with_standard_errors(model, tokenizer):
    names = ["Ann", "Bob", "Eve"]
    inp = TextSegmentInput("Dave lives in", tokenizer, baselines=[names, "lives", "in"])
    target = _ids(tokenizer)[:1]
    result = _attribute(model, tokenizer, FeatureAblation, inp=inp, target=target, n_draws=60)
    full = loop_log_probs(model, tokenizer.encode("Dave lives in"), [[]], target)
    effects = [
        float(full - loop_log_probs(model, tokenizer.encode(f"{name} lives in"), [[]], target))
        for name in names
    ]
    se = float(result.token_attr_se[0, 0])
    assert abs(float(result.token_attr[0, 0]) - np.mean(effects)) < 4 * se
    assert se == pytest.approx(np.std(effects) / 60**0.5, rel=0.4)
    assert result.token_attr[0, 1:].abs().max() < 1e-5  # the same word stands there
    assert result.n_evaluations <= 1 + 3 + 8  # distinct rows are scored once


@pytest.mark.filterwarnings("ignore:leave-one-out gives no standard errors")
def test_num_trials_are_averaged(model, tokenizer):
    inp = TextSegmentInput("Dave lives in", tokenizer, baselines=[["Ann", "Bob"], "has", "at"])
    one = _attribute(model, tokenizer, FeatureAblation, inp=inp, n_draws=1)
    many = _attribute(model, tokenizer, FeatureAblation, inp=inp, n_draws=1, num_trials=30)
    assert one.token_attr_se[:, 0].isnan().all()
    assert many.token_attr_se[:, 0].isfinite().all()
    assert len(many.masks) > 20 * len(one.masks) / 10


def test_sampling_continues_until_tol(model, tokenizer):
    inp = TextSegmentInput(
        "one two three four five six seven eight nine", tokenizer, baselines="delete"
    )
    loose = _attribute(model, tokenizer, KernelShap, inp=inp, n_samples=40, tol=0.25)
    tight = _attribute(model, tokenizer, KernelShap, inp=inp, n_samples=40, tol=0.1)
    assert loose.provenance["converged"]
    assert tight.provenance["converged"]
    assert loose.n_evaluations < tight.n_evaluations
    spread = tight.full_attr.max() - tight.full_attr.min()
    se = torch.cat([tight.token_attr_se, tight.output_attr_se], 1)
    assert se.max() / spread <= 0.1
    stopped = _attribute(
        model, tokenizer, KernelShap, inp=inp, n_samples=40, tol=1e-9, max_evaluations=100
    )
    assert stopped.provenance["converged"] is False
    assert stopped.n_evaluations <= 100


def test_out_of_memory_halves_batches_and_keeps_values(model, tokenizer):
    whole = _attribute(model, tokenizer, KernelShap)
    sizes = []

    def limited(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = model.register_forward_pre_hook(limited, with_kwargs=True)
    try:
        _attribute(model, tokenizer, KernelShap)  # the model is looked at once
        sizes.clear()
        found = _attribute(model, tokenizer, KernelShap)
    finally:
        handle.remove()
    assert max(sizes) > 5
    fitting = [size for size in sizes if size <= 5]
    assert found.n_evaluations == whole.n_evaluations
    assert 1 <= sum(fitting) - found.n_evaluations <= noise._CHECKED
    # Decided once: after the first batch that fits, none is too large.
    assert sizes[-len(fitting) :] == fitting
    # Values, not attributions: the regression on few coalitions enlarges rounding a hundredfold.
    torch.testing.assert_close(found.values, whole.values, atol=1e-4, rtol=1e-4)


# --- methods of the user's own --------------------------------------------------------------------


class OwnAblation(FeatureAblation):
    """A subclass is not planned for: it runs its own code."""


class OwnLime(Lime):
    """Needs one number per evaluation."""


class Doubling(PerturbationAttribution):
    def attribute(self, inputs, factor=2.0):
        rows = torch.cat([inputs, 1 - torch.eye(inputs.shape[1])])
        values = self.forward_func(rows)
        return factor * (values[:1] - values[1:]).T


def test_foreign_method_runs_its_own_attribute(model, tokenizer):
    known = _attribute(model, tokenizer, FeatureAblation)
    own = _attribute(model, tokenizer, OwnAblation)
    torch.testing.assert_close(own.full_attr, known.full_attr, atol=1e-5, rtol=1e-4)
    assert own.n_evaluations == known.n_evaluations - known.answer.n_evaluations
    doubled = _attribute(model, tokenizer, Doubling, factor=3.0)
    torch.testing.assert_close(doubled.full_attr, 3 * known.full_attr, atol=1e-5, rtol=1e-4)


def test_foreign_surrogate_method_runs_once_per_token(model, tokenizer):
    pytest.importorskip("sklearn")
    own = _attribute(model, tokenizer, OwnLime, n_samples=600)
    known = _attribute(model, tokenizer, Lime, n_samples=600)
    assert own.token_attr.shape == known.token_attr.shape
    # Two samples of the same size, and Captum's kernel over all columns, not each token's own.
    spread = known.full_attr.abs().max()
    assert (own.token_attr[0] - known.token_attr[0]).abs().max() < 0.3 * spread


@pytest.mark.parametrize(
    "arguments",
    [{}, {"attr_target": "prob"}, {"method": KernelShap, "n_samples": 40, "tol": 0.2}],
)
def test_progress_is_one_bar_over_evaluations(model, tokenizer, capsys, arguments):
    method = arguments.pop("method", FeatureAblation)
    result = _attribute(model, tokenizer, method, show_progress=True, **arguments)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert all(line.startswith("model evaluations: ") for line in lines)
    assert f" 100 % ({result.n_evaluations} of {result.n_evaluations}, " in lines[-1]
    assert shown.out == ""
