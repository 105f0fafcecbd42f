"""Gradients on every kind of model, however much fits; the model is left as it was found."""

import random
from contextlib import nullcontext, suppress

import architectures
import numpy as np
import pytest
import tiny
import torch
from captum.attr import (
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMGradientAttribution,
    TextTokenInput,
)
from torch import nn

from captum_llm_ext import GenerationGradientAttribution, TextSegmentInput
from captum_llm_ext.model.gradients import backward as slopes
from captum_llm_ext.model.gradients import forward_pass

PROMPT = "Dave lives in Palm."
TARGET = " golf and"
UNK = 3
METHODS = [LayerIntegratedGradients, LayerGradientXActivation, LayerGradientShap]

pytestmark = pytest.mark.filterwarnings("ignore:.*steps are too few:UserWarning")


def attributed(model, tokenizer, kind=LayerIntegratedGradients, target=TARGET, **given):
    inp = given.pop("inp", None) or TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    method = kind(model, given.pop("layer", None))
    return GenerationGradientAttribution(method, tokenizer).attribute(inp, target, **given)


def loop(model, ids, absent_ids, start, target, modules, n_steps):
    """Integrated gradients: a pass and a way back per token and step, batch 1, unpadded, uncached.

    The embeddings' outputs are replaced by hooks, for models scale them, or embed more than once.
    """
    ends = []
    for row in (ids, absent_ids):
        ends.append([module(torch.tensor([row])).detach() for module in modules])
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)
    found = torch.zeros(len(target), len(ids), dtype=torch.float64)
    for t, token in enumerate(target):
        length = start + t
        for node, weight in zip(nodes, weights, strict=True):
            points = [
                (begin + (node + 1) / 2 * (end - begin))[:, :length].requires_grad_()
                for end, begin in zip(*ends, strict=True)
            ]
            hooks = [
                module.register_forward_hook(lambda m, given, output, point=point: point * 1)
                for module, point in zip(modules, points, strict=True)
            ]
            row = torch.tensor([ids[:length]])
            logits = model(input_ids=row, use_cache=False).logits[0, -1].double()
            for hook in hooks:
                hook.remove()
            gradients = torch.autograd.grad(logits.log_softmax(-1)[token], points)
            for slope, end, begin in zip(gradients, *ends, strict=True):
                change = (end - begin)[:, :length]
                found[t, :length] += weight / 2 * (slope * change).sum(-1)[0].double()
    return found


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_gradients_equal_a_plain_loop(name, tokenizer):
    model = architectures.build(name)
    modules = [model.get_input_embeddings()]
    if name.startswith("gemma 3n"):
        modules.append(model.model.embed_tokens_per_layer)
        for layer in model.model.layers:  # which is 0 before training: nothing would be seen
            torch.nn.init.ones_(layer.altup.correct_output_scale)
    prompt = tokenizer.encode(PROMPT)
    target = tokenizer.encode(TARGET, add_special_tokens=False)
    ids = [*prompt, *target[:-1]]
    expected = loop(model, ids, [UNK] * len(ids), len(prompt), target, modules, 3)
    found = attributed(model, tokenizer, n_steps=3)
    both = torch.cat([found.token_attr, found.output_attr[:, :-1]], 1).double()
    assert expected[-1, len(prompt) :].abs().max() > 1e-3
    # float32 with another order of summation, on values that cancel
    assert (both - expected).abs().max() < 2e-5 * max(1, float(expected.abs().max()))
    assert len(found.provenance["layer"]) == len(modules)


def test_partial_embedding_layer_is_refused(tokenizer):
    model = architectures.build("gemma 3n, shared states")
    with pytest.raises(ValueError, match=r"in 2 modules.*Give None as the layer"):
        attributed(model, tokenizer, layer=model.model.embed_tokens)


class ReadsIdsTwice(nn.Module):
    """Something of the ids comes to the logits without any embedding."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, use_cache=False):
        output = self.inner(input_ids=input_ids, use_cache=use_cache)
        output.logits = output.logits + 0.0
        output.logits[..., ::2] += input_ids[..., None] / 100
        return output


def test_ids_read_outside_the_embedding_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="reads token ids also past its embeddings"):
        attributed(ReadsIdsTwice(model), tokenizer)


class SeesAhead(nn.Module):
    """Every place sees all others: what follows changes what is said before."""

    def __init__(self, vocabulary, size=8):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(vocabulary, size)
        self.inner = nn.TransformerEncoderLayer(size, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(size, vocabulary)
        nn.init.normal_(self.head.weight)

    def forward(self, input_ids):
        hidden = self.inner(self.embedding(input_ids) * 3)
        return type("Output", (), {"logits": self.head(hidden)})()


class Plain(nn.Module):
    """Takes no `use_cache`: the loop gives one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, use_cache=False):
        return self.inner(input_ids)


@pytest.mark.filterwarnings("ignore:.*nested_tensor:UserWarning")
def test_model_that_sees_ahead_runs_one_pass_per_token(tokenizer):
    model = SeesAhead(len(tokenizer)).eval()
    prompt = tokenizer.encode(PROMPT)
    target = tokenizer.encode(TARGET, add_special_tokens=False)
    ids = [*prompt, *target[:-1]]
    absent = [UNK] * len(ids)
    expected = loop(Plain(model), ids, absent, len(prompt), target, [model.embedding], 4)
    found = attributed(model, tokenizer, n_steps=4)
    assert torch.allclose(found.token_attr.double(), expected[:, : len(prompt)], atol=1e-5)
    assert torch.allclose(found.output_attr[:, :-1].double(), expected[:, len(prompt) :], atol=1e-5)


class MixingHead(nn.Module):
    """A head whose logits come from the places before, too: the way back cannot be cut there."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.lm_head

    def can_generate(self):
        return True

    def forward(self, input_ids, use_cache=False):
        output = self.inner(input_ids=input_ids, use_cache=use_cache)
        output.logits = output.logits.cumsum(1) / 4
        return output


def test_position_mixing_head_equals_a_plain_loop(model, tokenizer):
    prompt = tokenizer.encode(PROMPT)
    target = tokenizer.encode(TARGET, add_special_tokens=False)
    ids = [*prompt, *target[:-1]]
    other = MixingHead(model)
    modules = [model.get_input_embeddings()]
    expected = loop(other, ids, [UNK] * len(ids), len(prompt), target, modules, 3)
    found = attributed(other, tokenizer, n_steps=3)
    assert (found.token_attr.double() - expected[:, : len(prompt)]).abs().max() < 2e-5


def test_backward_pass_is_batched_over_tokens_where_memory_allows(model, tokenizer, monkeypatch):
    """One point alone leaves room for many tokens at once; a small device goes one by one."""
    found = attributed(model, tokenizer, kind=LayerGradientXActivation)
    calls = []
    plain = torch.autograd.grad

    def counted(*given, **named):
        calls.append(named.get("is_grads_batched", False))
        return plain(*given, **named)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    again = attributed(model, tokenizer, kind=LayerGradientXActivation)
    assert calls.count(True) <= 2  # the comparison, and all tokens
    assert torch.equal(again.full_attr, found.full_attr)

    def refuses(*given, **named):
        if named.get("is_grads_batched"):
            raise RuntimeError("no batching rule for this operation")
        return plain(*given, **named)

    monkeypatch.setattr(torch.autograd, "grad", refuses)
    each = attributed(model, tokenizer, kind=LayerGradientXActivation)
    assert (each.full_attr - found.full_attr).abs().max() < 1e-5


class OutOfMemory(nn.Module):
    """Runs out of memory with more than some rows."""

    def __init__(self, inner, most):
        super().__init__()
        self.inner, self.most, self.rows = inner, most, []

    def forward(self, input_ids, use_cache=False):
        self.rows.append(len(input_ids))
        if len(input_ids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return self.inner(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize("most", [1, 3])
def test_out_of_memory_halves_the_batches(model, tokenizer, most):
    expected = attributed(model, tokenizer, n_steps=12)
    short = OutOfMemory(model, most)
    found = attributed(short, tokenizer, n_steps=12)
    assert (found.full_attr - expected.full_attr).abs().max() < 1e-5
    assert max(short.rows) == 12
    assert short.rows[-1] <= most
    if most == 1:
        with pytest.raises(torch.OutOfMemoryError, match="pretended"):
            attributed(OutOfMemory(model, 0), tokenizer)


def test_batches_fit_the_budget(model, tokenizer, monkeypatch):
    expected = attributed(model, tokenizer, n_steps=12)
    rows = OutOfMemory(model, 100)
    monkeypatch.setattr(slopes, "batch_budget", lambda device: 300_000)
    found = attributed(rows, tokenizer, n_steps=12)
    assert 1 < max(rows.rows) < 12
    assert (found.full_attr - expected.full_attr).abs().max() < 1e-5


def test_measured_row_memory_equals_saved_tensors(model, tokenizer):
    """Held against torch's own count of what is saved for the way back."""
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    row = forward_pass.Row(ids, torch.arange(2, ids.shape[1]), ids[0, 2:])
    layers = slopes.Layers([model.get_input_embeddings()])
    plan = slopes.initial_plan(ids.device, None)
    own = slopes.TargetGradients(forward_pass.ForwardPass(model), layers, row, "log_prob", plan)
    point = model.get_input_embeddings()(ids).detach()
    owners = torch.zeros(ids.shape[1], dtype=torch.long)
    list(own.products(1, lambda rows: ([point], [point]), owners, 1))
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in weights else storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=point.requires_grad_(), use_cache=False).logits.log_softmax(-1)
    assert plan.row_bytes == pytest.approx(sum(kept.values()), rel=0.5)


class Interrupts(nn.Module):
    """Raises in the pass of that number."""

    def __init__(self, inner, error, at):
        super().__init__()
        self.inner, self.error, self.left = inner, error, at

    def forward(self, input_ids, use_cache=False):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.inner(input_ids=input_ids, use_cache=use_cache)


def state(model):
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    return (
        [module.training for module in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        hooks,
        torch.random.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ValueError("no")])
def test_model_state_is_restored(tokenizer, kind, error):
    inner = tiny.llama(len(tokenizer))
    inner.model.layers[0].train()
    first = next(inner.parameters())
    first.requires_grad_(False)
    inner.lm_head.weight.grad = torch.ones_like(inner.lm_head.weight)
    for at in (1, 2, 4, 5, 6, 8, 12) if error else [0]:  # the probe's passes come first
        model = Interrupts(inner, error, at)
        method = kind(model, inner.model.embed_tokens)
        before, settings = state(model), dict(vars(method))
        attribution = GenerationGradientAttribution(method, tokenizer)
        inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
        raises = pytest.raises(type(error)) if error and at < 6 else suppress(type(error))
        with raises if error else nullcontext():
            attribution.attribute(inp, TARGET)
        assert at > 5 or error is None or model.left == 0  # there are six passes or more
        after = state(model)
        assert [str(a) for a in after] == [str(b) for b in before]
        assert vars(method) == settings
        assert torch.is_grad_enabled()


def test_frozen_and_half_precision_models(tokenizer):
    model = tiny.llama(len(tokenizer)).requires_grad_(False)
    expected = attributed(tiny.llama(len(tokenizer)), tokenizer)
    assert torch.equal(attributed(model, tokenizer).full_attr, expected.full_attr)
    half = attributed(model.bfloat16(), tokenizer, n_steps=30)
    assert half.token_attr.dtype == torch.float32
    fine = attributed(tiny.llama(len(tokenizer)), tokenizer, n_steps=30)
    cosine = torch.nn.functional.cosine_similarity(half.full_attr, fine.full_attr)
    assert cosine.min() > 0.9  # three digits in every layer
    half.plot_token_attr()


class WithoutGradient(nn.Module):
    """As some quantised layers are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, use_cache=False):
        with torch.no_grad():
            return self.inner(input_ids=input_ids, use_cache=use_cache)


def test_model_without_gradients_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"no gradient reaches the layer.*GenerationAttribution"):
        attributed(WithoutGradient(model), tokenizer)


def test_offloaded_layers(tokenizer):
    from accelerate import cpu_offload

    expected = attributed(tiny.llama(len(tokenizer)), tokenizer)
    model = cpu_offload(tiny.llama(len(tokenizer)), execution_device="cpu")
    assert next(model.parameters()).device.type == "meta"
    found = attributed(model, tokenizer)
    assert (found.full_attr - expected.full_attr).abs().max() < 1e-5


def test_eager_attention_and_single_token(tokenizer):
    model = tiny.llama(len(tokenizer), attn_implementation="eager")
    expected = attributed(tiny.llama(len(tokenizer)), tokenizer)
    assert (attributed(model, tokenizer).full_attr - expected.full_attr).abs().max() < 1e-4
    single = attributed(model, tokenizer, target=" a")
    assert single.output_attr.shape == (1, 1)
    assert (single.output_attr == 0).all()


def test_generated_target_is_explained(model, tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="<unk>")
    found = attributed(model, tokenizer, inp=inp, target=None, gen_args={"max_new_tokens": 3})
    ids = model.generate(
        torch.tensor([inp.ids]),
        max_new_tokens=3,
        do_sample=False,
        attention_mask=torch.ones(1, len(inp.ids)),
    )
    assert found.target.tolist() == ids[0, len(inp.ids) :].tolist()
    assert found.provenance["generation"]["max_new_tokens"] == "3"


def test_compiled_models(tokenizer):
    """Compiled and run before: later hooks would not be seen."""
    model = tiny.llama(len(tokenizer))
    expected = attributed(model, tokenizer)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(torch.tensor([tokenizer.encode(PROMPT)]))
    embedding = model.model.embed_tokens
    for layer in (embedding, torch.compile(embedding, backend="eager")):
        found = attributed(compiled, tokenizer, layer=layer)
        assert torch.equal(found.full_attr, expected.full_attr)


def test_unused_layer_needs_allow_unused(model, tokenizer):
    """captum's `grad_kwargs`: an output that the model reads nothing of."""

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.idle = model, nn.Linear(3, 3)

        def forward(self, input_ids, use_cache=False):
            self.idle(torch.zeros(*input_ids.shape, 3))
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    idle = Idle()
    given = {"layer": idle.idle, "kind": LayerGradientXActivation}
    with pytest.raises(ValueError, match=r"does not use the layer.*`allow_unused`"):
        attributed(idle, tokenizer, **given)
    found = attributed(idle, tokenizer, grad_kwargs={"allow_unused": True}, **given)
    assert (found.full_attr == 0).all()


LAYERS = {
    "head": lambda model: model.get_output_embeddings(),
    "norm": lambda model: model.model.norm,
    "last layer": lambda model: model.model.layers[-1],
    "first MLP": lambda model: model.model.layers[0].mlp,
    "projection": lambda model: model.model.layers[1].self_attn.o_proj,
}


@pytest.mark.parametrize("kind", [LayerIntegratedGradients, LayerGradientXActivation])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("target", [" golf and", " a"])
def test_any_layer_equals_captum(smooth, tokenizer, name, kind, target):
    layer = LAYERS[name](smooth)
    inp = TextTokenInput(PROMPT, tokenizer, baselines=0)  # captum's own, whatever is given
    steps = {"n_steps": 7} if kind is LayerIntegratedGradients else {}
    ids = torch.tensor(tokenizer.encode(target, add_special_tokens=False))
    captums = LLMGradientAttribution(kind(smooth, layer), tokenizer).attribute(inp, ids, **steps)
    found = attributed(
        smooth, tokenizer, kind, ids, layer=layer, inp=inp, output_unit=None, **steps
    )
    size = float(captums.token_attr.abs().max())
    assert size > 0
    torch.testing.assert_close(found.token_attr, captums.token_attr, atol=1e-6 * size, rtol=1e-6)


def test_layer_that_returns_a_tuple(smooth, tokenizer):
    attention = smooth.model.layers[1].self_attn
    expected = attributed(smooth, tokenizer, layer=attention.o_proj, n_steps=5)
    found = attributed(smooth, tokenizer, layer=attention, n_steps=5)  # and no weights of attention
    assert torch.equal(found.full_attr, expected.full_attr)


def test_head_input_equals_last_norm_output(smooth, tokenizer):
    given = {"n_steps": 5, "target": " golf and chess"}
    head = smooth.get_output_embeddings()
    found = attributed(smooth, tokenizer, layer=head, attribute_to_layer_input=True, **given)
    expected = attributed(smooth, tokenizer, layer=smooth.model.norm, **given)
    torch.testing.assert_close(found.full_attr, expected.full_attr, atol=1e-10, rtol=1e-8)


class Around(nn.Module):
    """A model with a layer of some kind that its values go through."""

    def __init__(self, inner, layer, call):
        super().__init__()
        self.inner, self.layer, self._call = inner, layer, call

    def forward(self, input_ids, use_cache=False):
        vectors = self.inner.get_input_embeddings()(input_ids)
        return self.inner(inputs_embeds=self._call(self.layer, vectors), use_cache=use_cache)


class Two(nn.Module):
    def forward(self, x):
        return x, x.detach()


class Named(nn.Module):
    def forward(self, x):
        return {"x": x}


REFUSED = {
    "router": (
        lambda: nn.Linear(32, 4),
        lambda layer, x: x * layer(x.flatten(0, 1)).softmax(-1)[:, 0].view(*x.shape[:2], 1),
        r"the output of layer Linear is \(\d+, 4\): attribution needs one tensor",
    ),
    "tokens in a row": (
        lambda: nn.Linear(32, 32),
        lambda layer, x: layer(x.flatten(0, 1)).view(x.shape),
        r"the output of layer Linear is \(\d+, 32\)",
    ),
    "tokens first": (
        lambda: nn.Linear(32, 32),
        lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1),
        r"the output of layer Linear is \(\d+, 1, 32\) for one row of \d+ token ids",
    ),
    "pooled": (
        lambda: nn.Linear(32, 32),
        lambda layer, x: x + layer(x[:, :1]),
        r"the output of layer Linear is \(1, 1, 32\) for one row",
    ),
    "one row of all": (
        lambda: nn.Linear(32, 32),
        lambda layer, x: layer(x.reshape(1, -1, 32)).view(x.shape),
        r"activation is \(1, \d+, 32\) where \(\d+, \d+, 32\) was expected: its first axis is",
    ),
    "several times": (
        lambda: nn.Linear(32, 32),
        lambda layer, x: layer(layer(x)),
        "layer Linear runs 2 times in one pass",
    ),
    "never": (lambda: nn.Linear(32, 32), lambda layer, x: x, "layer Linear does not run in one"),
    "two tensors": (Two, lambda layer, x: layer(x)[0], r"layer Two is \(1, \d+, 32\), \(1, "),
    "a mapping": (Named, lambda layer, x: layer(x)["x"], "the output of layer Named is dict"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", METHODS)
def test_layers_without_one_activation_per_token_are_refused(model, tokenizer, name, kind):
    make, call, message = REFUSED[name]
    around = Around(model, make(), call).eval()
    if kind is LayerGradientXActivation and name == "one row of all":
        attributed(around, tokenizer, kind, layer=around.layer)  # a single row is the same
        return
    with pytest.raises(ValueError, match=message):
        attributed(around, tokenizer, kind, layer=around.layer)


def test_in_place_changes_after_the_layer_are_excluded(model, tokenizer):
    def call(layer, x):
        return x.mul_(1.5)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, use_cache=False):
            vectors = self.inner.get_input_embeddings()(input_ids) * 1.5
            return self.inner(inputs_embeds=vectors, use_cache=use_cache)

    around = Around(model, nn.Identity(), call).eval()
    found = attributed(around, tokenizer, n_steps=5)
    expected = attributed(Scaled().eval(), tokenizer, n_steps=5)
    assert torch.equal(found.full_attr, expected.full_attr)


class Adapted(nn.Module):
    """An embedding within what adapts it, as adapters of low rank have it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.change = base_layer, nn.Embedding(400, 32)

    def forward(self, ids):
        return self.base_layer(ids) + self.change(ids)


def test_adapted_embedding_equals_merged_weights(tokenizer):
    model, merged = tiny.llama(len(tokenizer)), tiny.llama(len(tokenizer))
    adapted = Adapted(model.get_input_embeddings())
    with torch.no_grad():
        merged.get_input_embeddings().weight += adapted.change.weight
    model.set_input_embeddings(adapted)
    expected = attributed(merged, tokenizer, n_steps=5)
    found = attributed(model, tokenizer, n_steps=5)
    torch.testing.assert_close(found.full_attr, expected.full_attr, atol=1e-5, rtol=1e-4)
    assert found.provenance["layer"] == ["model.embed_tokens"]


def test_input_ids_passed_by_keyword(model, tokenizer):
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, use_cache=False):
            vectors = self.inner.model.embed_tokens(input=input_ids)
            return self.inner(inputs_embeds=vectors, use_cache=use_cache)

    class ByWeight(ByName):
        def forward(self, input_ids, use_cache=False):
            weight = self.inner.model.embed_tokens.weight
            vectors = nn.functional.embedding(input_ids, weight)
            return self.inner(inputs_embeds=vectors, use_cache=use_cache)

    expected = attributed(model, tokenizer, n_steps=5)
    found = attributed(ByName(), tokenizer, n_steps=5)
    assert torch.equal(found.full_attr, expected.full_attr)
    with pytest.raises(ValueError, match="no module of ByWeight receives the token ids"):
        attributed(ByWeight(), tokenizer)
