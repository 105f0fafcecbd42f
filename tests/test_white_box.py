"""Saliency, and the linear system that a model is at one text, against loops of plain autograd."""

import threading
import types
import warnings

import architectures
import pytest
import tiny
import torch
from captum.attr import GradientShap, InputXGradient, LayerGradientXActivation, Saliency
from torch import nn

from captum_llm_ext import (
    ChatInput,
    EquivalentLinearSystem,
    GenerationAttributionResult,
    GenerationGradientAttribution,
    LayerSaliency,
    TextSegmentInput,
)
from captum_llm_ext.model.gradients.backward import storage_of

PROMPT = "Dave lives in Palm."
TARGET = " golf and"
EXACT = [name for name in architectures.CONFIGS if not name.startswith("gemma 3n")]
EXACT += list(architectures.OWN_ATTENTION)
REFUSED = {"gemma 3n, shared states": r"model\.layers\.0 \(Gemma3nTextDecoderLayer\)"}


def built(name, dtype=torch.float32):
    """With biases that are not the zeros they begin with."""
    model = architectures.build(name, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3, generator=generator)
    if name.startswith("gemma 3n"):
        for layer in model.model.layers:
            nn.init.ones_(layer.altup.correct_output_scale)
    return model


def attributed(model, tokenizer, method, target=TARGET, **given):
    inp = given.pop("inp", None) or TextSegmentInput(PROMPT, tokenizer, "token", baselines="delete")
    settings = {name: given.pop(name) for name in ("attr_target",) if name in given}
    attribution = GenerationGradientAttribution(method, tokenizer, **settings)
    return attribution.attribute(inp, target, **given)


def slopes(model, ids, start, target, value):
    """Gradients ``(n_target, length, size)`` of values, and activations: batch 1, uncached."""
    found = torch.zeros(len(target), len(ids), model.get_input_embeddings().weight.shape[1])
    found = found.to(model.dtype)
    for t in range(len(target)):
        leaf = []

        def note(module, given, output, leaf=leaf):
            leaf.append(output.detach().requires_grad_())
            return leaf[0] * 1

        hook = model.get_input_embeddings().register_forward_hook(note)
        logits = model(torch.tensor([ids[: start + t]]), use_cache=False).logits[0, -1]
        hook.remove()
        (own,) = torch.autograd.grad(value(logits, target[t]), leaf)
        found[t, : start + t] = own[0]
    return found, leaf[0].detach()[0]


def log_prob(logits, token):
    return logits.double().log_softmax(-1)[token]


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma 3, sliding window", "mixtral", "mamba"])
def test_saliency_equals_a_plain_loop(name, norm, tokenizer):
    model = architectures.build(name)
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    found = attributed(model, tokenizer, LayerSaliency(model, norm=norm), inp=inp)
    prompt, target = list(inp.ids), found.target.tolist()
    gradient, _ = slopes(model, prompt + target, len(prompt), target, log_prob)
    each = gradient.abs().sum(-1) if norm == "l1" else gradient.norm(dim=-1)
    words = [each[:, list(place.positions)].mean(1) for place in inp.places()]
    assert torch.allclose(found.token_attr, torch.stack(words, 1), rtol=1e-5)
    assert torch.allclose(found.output_attr[:, :-1], each[:, len(prompt) : -1], rtol=1e-5)
    assert max(len(place.positions) for place in inp.places()) > 1
    assert found.full_attr.min() >= 0
    assert found.efficiency_gap.isnan().all()
    assert found.is_unsigned


def test_l2_norm_is_below_l1_and_basis_invariant(tokenizer):
    model = tiny.llama(len(tokenizer)).double()
    size = model.config.hidden_size
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(drawn.double())[0]

    class Turned(nn.Module):
        """The same function of token ids, with other coordinates for its embeddings."""

        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config
            self.embedding = nn.Embedding.from_pretrained(
                model.get_input_embeddings().weight.detach() @ turn
            )

        def get_input_embeddings(self):
            return self.embedding

        def can_generate(self):
            return True

        def forward(self, input_ids, use_cache=False):
            vectors = self.embedding(input_ids) @ turn.T
            return self.inner(inputs_embeds=vectors, use_cache=use_cache)

    other = Turned().eval()
    found = {
        (norm, which): attributed(which, tokenizer, LayerSaliency(which, norm=norm)).full_attr
        for norm in ("l1", "l2")
        for which in (model, other)
    }
    assert (found["l2", model] <= found["l1", model] + 1e-12).all()
    assert torch.allclose(found["l2", model], found["l2", other], rtol=1e-5)
    assert not torch.allclose(found["l1", model], found["l1", other], rtol=0.01)


def test_methods_have_a_captum_style_attribute(tokenizer):
    model = tiny.llama(len(tokenizer)).double()
    ids = torch.tensor([tokenizer.encode(PROMPT), tokenizer.encode(PROMPT)])
    ids[1] = ids[1].flip(0)
    at, token = ids.shape[1] - 1, 7
    saliency = LayerSaliency(model).attribute(ids, target=(at, token))
    shares = EquivalentLinearSystem(model).attribute(ids, target=(at, token))
    assert saliency.shape == shares.shape == ids.shape
    gradient = LayerGradientXActivation(
        lambda ids: model(ids).logits, model.get_input_embeddings()
    ).attribute(ids, target=(at, token))
    embedded = model.get_input_embeddings()(ids)
    assert torch.allclose(saliency, (gradient / embedded).norm(dim=-1))
    logits = model(ids).logits[:, at, token]
    assert torch.allclose(shares.sum(1), logits, rtol=1e-6)  # norms are in float32
    numbers = torch.randn(3, 4, 5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(20, 2))
    plain = LayerSaliency(net, norm="l1").attribute(numbers, target=1)
    weight = net[1].weight[1].view(4, 5)
    assert torch.allclose(plain, weight.abs().sum(-1).expand(3, -1))
    with pytest.raises(ValueError, match="'l2' or 'l1'"):
        LayerSaliency(model, norm="max")


@pytest.mark.parametrize("kind", [Saliency, InputXGradient, GradientShap])
def test_non_layer_methods_name_their_layer_counterpart(kind, tokenizer):
    with pytest.raises(TypeError, match=r"Layer\w+\(model.*is that of token ids"):
        GenerationGradientAttribution(kind(tiny.llama(len(tokenizer))), tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(set(EXACT)))
def test_shares_sum_to_the_logit(name, dtype, tokenizer):
    model = built(name, dtype)
    found = attributed(model, tokenizer, EquivalentLinearSystem(model))
    at = torch.arange(len(tokenizer.encode(PROMPT)) - 1, len(tokenizer.encode(PROMPT)) + 99)
    ids = torch.tensor([[*tokenizer.encode(PROMPT), *found.target.tolist()]])
    logits = model(ids, use_cache=False).logits[0, at[: len(found.target)]]
    size = logits.std(-1)
    logits = logits.gather(1, found.target[:, None])[:, 0]
    assert ((found.full_values - logits).abs() / size).max() < 2e-5  # norms in float32
    summed = found.full_attr.sum(1) + found.empty_values
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert ((summed - found.full_values).abs() / size).max() < bound
    assert found.provenance["reconstruction_error"] < bound
    assert found.provenance["attr_target"] == "logit"
    has_bias = any(n.endswith("bias") for n, _ in model.named_parameters())
    constants = torch.tensor(found.provenance["constant_attr"])
    # Without biases nothing but tokens makes a logit: no path is booked as a constant.
    assert has_bias or name in ("llama 4, chunked attention",) or constants.abs().max() < 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_non_linear_modules_are_refused_by_name(name, tokenizer):
    model = built(name)
    with pytest.raises(ValueError, match=REFUSED[name] + " is not linear"):
        attributed(model, tokenizer, EquivalentLinearSystem(model))


def test_unsupported_recurrent_layers_are_refused_by_name(tokenizer):
    model = tiny.llama(len(tokenizer))

    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(32, 32, batch_first=True)

        def forward(self, x):
            return self.gru(x)[0]

    model.model.layers[1].mlp = Remembering()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gru \(GRU\) is not linear"):
        attributed(model, tokenizer, EquivalentLinearSystem(model))


def test_linear_attention_functions_are_restored_and_thread_local(tokenizer):
    from transformers.models.mamba import modeling_mamba

    plain, seen = modeling_mamba.mamba_selective_scan, []
    model = built("mamba")

    def value(logits, target):
        thread = threading.Thread(target=lambda: seen.append(gradient(model)))
        thread.start()
        thread.join()
        return logits.gather(2, target.expand(len(logits), -1)[..., None])[..., 0]

    def gradient(model):
        vectors = torch.ones(1, 3, 32, requires_grad=True)
        model(inputs_embeds=vectors, use_cache=False).logits[0, -1, 5].backward()
        return vectors.grad

    expected = gradient(built("mamba"))
    attributed(model, tokenizer, EquivalentLinearSystem(model), attr_target=value)
    assert modeling_mamba.mamba_selective_scan is plain
    assert all(torch.allclose(one, expected, atol=1e-6) for one in seen)
    assert seen


def held(model):
    """Llama with norms, attention weights and gates stopped by hand, module by module."""

    def norm(self, x):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x * scale.to(x.dtype).detach()

    def gated(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x))

    for module in model.modules():
        kind = type(module).__name__
        if kind == "LlamaRMSNorm":
            module.forward = types.MethodType(norm, module)
        elif kind == "LlamaMLP":
            module.forward = types.MethodType(gated, module)
        elif kind == "LlamaAttention":
            for projection in (module.q_proj, module.k_proj):
                projection.register_forward_hook(lambda m, given, output: output.detach())
    return model


def test_shares_equal_a_hand_written_llama(tokenizer):
    model = tiny.llama(len(tokenizer)).double()
    found = attributed(model, tokenizer, EquivalentLinearSystem(model))
    other = held(tiny.llama(len(tokenizer)).double())
    prompt, target = tokenizer.encode(PROMPT), found.target.tolist()
    ids = prompt + target
    gradient, activation = slopes(
        other, ids, len(prompt), target, lambda logits, token: logits[token]
    )
    expected = gradient[:, :-1] * activation
    expected = expected.sum(-1).detach()
    first = len(prompt) - found.token_attr.shape[1]  # BOS is fixed text
    assert torch.allclose(found.token_attr, expected[:, first : len(prompt)], atol=1e-6)
    assert torch.allclose(found.output_attr[:, :-1], expected[:, len(prompt) :], atol=1e-6)
    assert torch.allclose(found.fixed_attr, expected[:, :first].sum(1), atol=1e-6)
    share = expected[:, :first].abs().sum(1) / expected.abs().sum(1)
    assert torch.allclose(found.fixed_share, share, atol=1e-6)
    assert torch.allclose(found.empty_values, found.fixed_attr, atol=1e-9)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_gradient_norms_equal_a_hand_written_llama(tokenizer, norm):
    model = tiny.llama(len(tokenizer)).double()
    method = EquivalentLinearSystem(model, norm=norm)
    found = attributed(model, tokenizer, method)
    other = held(tiny.llama(len(tokenizer)).double())
    prompt, target = tokenizer.encode(PROMPT), found.target.tolist()
    ids = prompt + target
    gradient, _ = slopes(other, ids, len(prompt), target, lambda logits, token: logits[token])
    expected = gradient.norm(p=int(norm[1]), dim=-1).detach()
    first = len(prompt) - found.token_attr.shape[1]
    torch.testing.assert_close(
        found.token_attr, expected[:, first : len(prompt)], rtol=1e-5, atol=0
    )
    later = expected[:, len(prompt) : -1]
    torch.testing.assert_close(found.output_attr[:, :-1], later, rtol=1e-5, atol=0)
    assert found.efficiency_gap.isnan().all()
    assert found.is_unsigned
    assert found.provenance["reconstruction_error"] < 1e-6
    assert found.provenance["norm"] == norm
    # A word has the mean of its tokens.
    inp = TextSegmentInput(PROMPT, tokenizer, [(0, 10)], baselines="delete")
    whole = attributed(model, tokenizer, method, inp=inp)
    own = [
        i
        for i, (_, stop) in enumerate(
            tokenizer(PROMPT, return_offsets_mapping=True)["offset_mapping"][first:]
        )
        if stop <= 10
    ]
    torch.testing.assert_close(
        whole.token_attr[:, 0], found.token_attr[:, own].mean(1), rtol=1e-5, atol=0
    )
    # On plain tensors.
    at = len(prompt) - 1
    plain = method.attribute(torch.tensor([prompt]), target=(at, target[0]))
    torch.testing.assert_close(plain[0, first:], found.token_attr[0], rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="'l2' or 'l1', or None"):
        EquivalentLinearSystem(model, norm="max")


def test_norms_are_refused_without_exact_sum(tokenizer):
    (name,) = REFUSED
    model = built(name)
    with pytest.raises(ValueError, match=REFUSED[name]):
        attributed(model, tokenizer, EquivalentLinearSystem(model, norm="l2"))


def test_wrapper_tensors_have_no_storage():
    two = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    plain = torch.ones(3)
    assert storage_of(plain) == (plain.untyped_storage().data_ptr(), 12)
    assert storage_of(two(plain, plain.clone()))[0] == 0


def test_begun_output_words_are_fixed_text(tokenizer):
    model = tiny.llama(len(tokenizer))
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    found = attributed(model, tokenizer, EquivalentLinearSystem(model), inp=inp, output_unit="word")
    each = attributed(model, tokenizer, EquivalentLinearSystem(model), inp=inp)
    words = [piece.feature for piece in found.output_pieces]
    assert len(set(words)) < len(words)
    for t, word in enumerate(words):
        for other in set(words):
            own = [s for s, w in enumerate(words) if w == other and s < t]
            expected = each.output_attr[t, own].sum() if other < word else torch.zeros(())
            assert float(found.output_attr[t, other]) == pytest.approx(float(expected), abs=1e-5)
    assert found.efficiency_gap.abs().max() < 1e-4


def test_logit_differences_are_exact_and_log_probabilities_are_not(tokenizer):
    model = tiny.llama(len(tokenizer))

    def against(logits, target):
        return logits.gather(2, target.expand(len(logits), -1)[..., None])[..., 0] - logits[..., 9]

    found = attributed(model, tokenizer, EquivalentLinearSystem(model), attr_target=against)
    assert (found.efficiency_gap / found.full_values).abs().max() < 1e-4
    with pytest.warns(UserWarning, match='`attr_target="logit"` for a sum that is exact'):
        other = attributed(model, tokenizer, EquivalentLinearSystem(model), attr_target="log_prob")
    assert other.efficiency_gap.abs().max() > 0.1
    assert (other.full_values < 0).all()


def test_decoder_layers_as_attribution_layer(tokenizer):
    model = tiny.llama(len(tokenizer))
    method = EquivalentLinearSystem(model, model.model.layers[0])
    found = attributed(model, tokenizer, method)
    assert found.efficiency_gap.abs().max() < 1e-5
    assert found.provenance["layer"] == ["model.layers.0"]


def test_half_precision_reports_its_reconstruction_error(tokenizer):
    model = tiny.llama(len(tokenizer)).bfloat16()
    with pytest.warns(UserWarning, match="in this precision"):
        found = attributed(model, tokenizer, EquivalentLinearSystem(model))
    assert 1e-3 < found.provenance["reconstruction_error"] < 0.06


def test_trainable_frozen_eager_and_sdpa_agree(tokenizer):
    expected = attributed(
        model := tiny.llama(len(tokenizer)), tokenizer, EquivalentLinearSystem(model)
    )
    for other in (
        tiny.llama(len(tokenizer)).requires_grad_(False),
        tiny.llama(len(tokenizer), attn_implementation="eager"),
        tiny.llama(len(tokenizer)).train(),
        torch.compile(tiny.llama(len(tokenizer)), backend="eager"),
    ):
        found = attributed(other, tokenizer, EquivalentLinearSystem(other))
        assert torch.allclose(found.full_attr, expected.full_attr, atol=1e-5)


def test_offloaded_and_adapted_models(tokenizer):
    from accelerate import cpu_offload

    expected = attributed(
        model := tiny.llama(len(tokenizer)), tokenizer, EquivalentLinearSystem(model)
    )
    model = cpu_offload(tiny.llama(len(tokenizer)), execution_device="cpu")
    for method in (EquivalentLinearSystem(model), LayerSaliency(model)):
        attributed(model, tokenizer, method)
    found = attributed(model, tokenizer, EquivalentLinearSystem(model))
    assert torch.allclose(found.full_attr, expected.full_attr, atol=1e-5)


def test_results_support_saving_display_and_levels(tokenizer, tmp_path):
    model = tiny.llama(len(tokenizer))
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    messages = [{"role": "user", "content": "Dave lives in Palm Coast. He plays golf."}]
    inp = ChatInput(messages, tokenizer, unit=("sentence", "word"), baselines="delete")
    for method in (LayerSaliency(model), EquivalentLinearSystem(model)):
        found = attributed(model, tokenizer, method, inp=inp)
        assert found.full_attr.shape[1] == len(found.input_tokens) + len(found.output_tokens)
        found.save(tmp_path / "found.safetensors")
        again = GenerationAttributionResult.load(tmp_path / "found.safetensors")
        assert torch.equal(again.full_attr, found.full_attr)
        assert again.is_unsigned == found.is_unsigned
        assert (again.fixed_share is None) == (found.fixed_share is None)
        assert f"{found}"
        assert "golf" in found.to_html()


def test_magnitudes_are_plotted_in_one_hue(tokenizer):
    model = tiny.llama(len(tokenizer))
    saliency = attributed(model, tokenizer, LayerSaliency(model), target=" golf is")
    shares = attributed(model, tokenizer, EquivalentLinearSystem(model), target=" golf is")
    for found, lowest, cmap in ((saliency, 0.0, "Purples"), (shares, None, "RdBu")):
        _, ax = found.plot_token_attr()
        image = ax.get_images()[0]
        assert image.get_cmap().name == cmap
        low, high = image.get_clim()
        assert low == (-high if lowest is None else lowest)
        signs = {text.get_text()[0] for text in ax.texts if text.get_text()[-1:].isdigit()}
        assert bool(signs & {"+", "−"}) == (lowest is None)
        _, ax = found.plot_seq_attr()
        hues = {bar.get_facecolor()[:3] for bar in ax.patches}
        assert len(hues) == 1 or lowest is None


def test_model_is_restored_and_other_threads_unaffected(tokenizer):
    model = tiny.llama(len(tokenizer))
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    names = {n: dict(vars(m)) for n, m in model.named_modules()}

    def gradient():
        vectors = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=vectors, use_cache=False).logits[0, -1, 5].backward()
        return vectors.grad

    expected, found, error = gradient(), [], []

    def value(logits, target):  # within a pass of the attribution
        thread = threading.Thread(target=lambda: found.append(gradient()))
        thread.start()
        thread.join()
        if len(found) == 3:
            raise KeyboardInterrupt
        return logits.gather(2, target.expand(len(logits), -1)[..., None])[..., 0]

    try:
        attributed(model, tokenizer, EquivalentLinearSystem(model), attr_target=value)
    except KeyboardInterrupt:
        error.append(1)
    assert found
    assert all(torch.allclose(one, expected, atol=1e-6) for one in found)
    for name, module in model.named_modules():
        after = dict(vars(module))
        assert after.keys() == names[name].keys()
        assert not after["_forward_hooks"]
        assert not after["_forward_pre_hooks"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(gradient(), expected, atol=1e-6)
