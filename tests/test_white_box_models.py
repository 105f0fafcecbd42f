"""Methods that look into a model, on models that are not as plain: exact, or refused."""

import copy
import threading
import warnings

import architectures
import pytest
import tiny
import torch
from accelerate import disk_offload, dispatch_model
from captum.attr import LayerIntegratedGradients
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from captum_llm_ext import (
    AttentionRollout,
    AttentionWeights,
    EquivalentLinearSystem,
    GenerationAttentionAttribution,
    GenerationGradientAttribution,
    LayerSaliency,
    TextSegmentInput,
)

PROMPT = "Dave lives in Palm."
TARGET = " golf and"
METHODS = {
    "linear system": EquivalentLinearSystem,
    "saliency": LayerSaliency,
    "attention weights": AttentionWeights,
    "ALTI": lambda model: AttentionRollout(model, "alti"),
}
every_method = pytest.mark.parametrize("name", METHODS)


def attributed(name, model, tokenizer, method=None):
    method = method or METHODS[name](model)
    inp = TextSegmentInput(PROMPT, tokenizer, "token", baselines="delete")
    is_attention = isinstance(method, AttentionRollout | AttentionWeights)
    kind = GenerationAttentionAttribution if is_attention else GenerationGradientAttribution
    return kind(method, tokenizer).attribute(inp, TARGET)


@pytest.fixture(scope="module")
def expected(tokenizer):
    return {name: attributed(name, tiny.llama(len(tokenizer)), tokenizer) for name in METHODS}


def assert_same(found, expected):
    torch.testing.assert_close(found.full_attr, expected.full_attr, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        found.full_values, expected.full_values, atol=1e-5, rtol=0, equal_nan=True
    )


@every_method
@pytest.mark.parametrize("where", ["disk", "mixed"])
def test_offloaded_weights(where, name, tokenizer, tmp_path, expected):
    model = tiny.llama(len(tokenizer))
    if where == "disk":
        model = disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        assert next(model.parameters()).device.type == "meta"
    else:
        places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= dict.fromkeys(("model.norm", "model.rotary_emb", "lm_head"), "cpu")
        model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert_same(attributed(name, model, tokenizer), expected[name])


@every_method
def test_training_mode_model_is_explained_in_eval_mode(name, tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        attn_pdrop=0.5,
        resid_pdrop=0.5,
        embd_pdrop=0.5,
    )
    model = GPT2LMHeadModel(config).eval()
    expected = attributed(name, model, tokenizer)
    assert_same(attributed(name, model.train(), tokenizer), expected)
    assert all(module.training for module in model.modules())


@every_method
def test_tied_embedding_and_head(name, tokenizer):
    tied = tiny.llama(len(tokenizer), tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    apart = tiny.llama(len(tokenizer))
    apart.load_state_dict(tied.state_dict())
    assert_same(attributed(name, tied, tokenizer), attributed(name, apart, tokenizer))


def test_scaled_embedding_gives_equal_shares(tokenizer):
    """Gemma's `√d` is within its embedding; as a layer of its own it changes no share."""

    class Scaled(nn.Module):
        def __init__(self, weight, factor):
            super().__init__()
            self.inner = nn.Embedding.from_pretrained(weight / factor)
            self.factor = factor

        def forward(self, ids):
            return self.inner(ids) * self.factor

    model = tiny.llama(len(tokenizer))
    expected = attributed("linear system", model, tokenizer)
    model.model.embed_tokens = Scaled(model.model.embed_tokens.weight.detach(), 5.0)
    method = EquivalentLinearSystem(model, model.model.embed_tokens.inner)
    assert_same(attributed("", model, tokenizer, method), expected)
    # Saliency is of the vectors that are asked for: those before the scale move it five times more.
    vectors = attributed("", model, tokenizer, LayerSaliency(model, model.model.embed_tokens.inner))
    plain = attributed("saliency", tiny.llama(len(tokenizer)), tokenizer)
    torch.testing.assert_close(vectors.full_attr, 5 * plain.full_attr, atol=1e-5, rtol=1e-4)


class Adapted(nn.Module):
    """A low-rank adapter beside a layer, as LoRA has it."""

    def __init__(self, layer):
        super().__init__()
        generator = torch.Generator().manual_seed(layer.in_features)
        self.layer, self.dropout = layer, nn.Dropout(0.3)
        self.down = nn.Parameter(torch.randn(2, layer.in_features, generator=generator) / 8)
        self.up = nn.Parameter(torch.randn(layer.out_features, 2, generator=generator) / 8)

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x):
        return self.layer(x) + self.dropout(x) @ self.down.T @ self.up.T


@every_method
def test_adapters_equal_merged_weights(name, tokenizer):
    adapted, merged = tiny.llama(len(tokenizer)), tiny.llama(len(tokenizer))
    for layer, other in zip(adapted.model.layers, merged.model.layers, strict=True):
        for part, other_part in ((layer.self_attn, other.self_attn), (layer.mlp, other.mlp)):
            for own in [own for own, module in part.named_children() if own.endswith("_proj")]:
                adapter = Adapted(getattr(part, own))
                setattr(part, own, adapter)
                with torch.no_grad():
                    getattr(other_part, own).weight += adapter.up @ adapter.down
    assert_same(attributed(name, adapted.eval(), tokenizer), attributed(name, merged, tokenizer))


@every_method
def test_peft_adapters(name, tokenizer):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny.llama(len(tokenizer))
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    merged = copy.deepcopy(adapted).merge_and_unload().eval()
    assert_same(attributed(name, adapted, tokenizer), attributed(name, merged, tokenizer))


@pytest.fixture(scope="module")
def quantised(tokenizer):
    return quantised_but("", tokenizer)


def quantised_but(kept, tokenizer):
    model = tiny.llama(len(tokenizer))
    layers = {name for name, m in model.named_modules() if type(m) is nn.Linear and name != kept}
    spec = dict.fromkeys(layers, torch.ao.quantization.default_dynamic_qconfig)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have it in another package
        return torch.ao.quantization.quantize_dynamic(model, spec)


# Past layers that have none, gradients would still go along residual connections.
@pytest.mark.parametrize("kept", ["", "lm_head"])
@pytest.mark.parametrize(
    "kind",
    [EquivalentLinearSystem, LayerSaliency, lambda model: LayerIntegratedGradients(model, None)],
)
@pytest.mark.filterwarnings("ignore:quantized..linear_dynamic")  # of torch, once
def test_weights_without_gradient_are_refused(kind, kept, tokenizer):
    model = quantised_but(kept, tokenizer)
    with pytest.raises(ValueError, match=r"quantised|is not linear in its input"):
        attributed("", model, tokenizer, kind(model))


def test_quantised_attention_has_weights_but_no_contributions(quantised, tokenizer):
    ids = torch.tensor(tokenizer.encode(PROMPT))
    found = AttentionWeights(quantised).map(ids)
    plain = AttentionWeights(tiny.llama(len(tokenizer))).map(ids)
    assert 0 < (found - plain).abs().max() < 0.1  # int8
    for kind in ("values", "alti"):
        with pytest.raises(ValueError, match="quantised"):
            AttentionRollout(quantised, kind).map(ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["weights", "values", "alti"])
def test_half_precision_attention(kind, dtype, tokenizer):
    ids = torch.tensor(tokenizer.encode(PROMPT + TARGET))
    found = AttentionRollout(tiny.llama(len(tokenizer)).to(dtype), kind).map(ids)
    plain = AttentionRollout(tiny.llama(len(tokenizer)), kind).map(ids)
    assert (found - plain).abs().max() < 0.02  # three digits, two layers
    assert (found.sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("layer", "error"),
    [
        ("model.layers", "does not run"),
        ("model", "BaseModelOutputWithPast: attribution needs one tensor"),
        ("model.rotary_emb", "attribution needs one tensor"),
    ],
)
def test_layers_without_positions_are_refused(layer, error, tokenizer):
    for kind in (EquivalentLinearSystem, LayerSaliency):
        model = tiny.llama(len(tokenizer))
        with pytest.raises(ValueError, match=error):
            attributed("", model, tokenizer, kind(model, model.get_submodule(layer)))
        with pytest.raises(ValueError, match="not a module of the model"):
            attributed("", model, tokenizer, kind(model, nn.Linear(2, 2)))


def test_layer_of_attention_weights_has_no_share(tokenizer):
    model = tiny.llama(len(tokenizer))
    method = EquivalentLinearSystem(model, model.model.layers[1].self_attn.q_proj)
    with pytest.raises(ValueError, match="what a linear system holds alone"):
        attributed("", model, tokenizer, method)


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_threads_equal_a_single_thread(architecture, tokenizer):
    """On one model, and on models that share functions of transformers."""
    one, other = architectures.build(architecture), architectures.build(architecture)
    expected = attributed("linear system", one, tokenizer)
    found, failed = [], []

    def run(model):
        try:
            found.append(attributed("linear system", model, tokenizer))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(m,)) for m in (one, other, one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(found) == 4
    for result in found:
        assert_same(result, expected)


class _Multiplied(torch.autograd.Function):
    """A product with a way back of its own, as that of 4-bit weights is."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0], None


class Kernel(nn.Module):
    """A layer by a kernel that torch knows nothing of."""

    def __init__(self, layer, has_way_back):
        super().__init__()
        self.weight, self.has_way_back = layer.weight, has_way_back

    def forward(self, x):
        if self.has_way_back:
            return _Multiplied.apply(x, self.weight.detach())
        with torch.no_grad():
            return x @ self.weight.T


def with_kernels(model, names, *, has_way_back):
    for name in names:
        parent, own = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(parent, own, Kernel(getattr(parent, own), has_way_back))
    return model


@pytest.mark.parametrize("part", ["self_attn.o_proj", "self_attn.q_proj", "mlp.down_proj"])
def test_custom_backward_matmul_is_not_an_activation(part, tokenizer, expected):
    """Whether or not it is square: an activation mixes nothing of a place."""
    names = [f"model.layers.{layer}.{part}" for layer in (0, 1)]
    model = with_kernels(tiny.llama(len(tokenizer)), names, has_way_back=True)
    assert_same(attributed("linear system", model, tokenizer), expected["linear system"])


@pytest.mark.parametrize("name", ["linear system", "saliency"])
@pytest.mark.parametrize("part", ["self_attn.o_proj", "self_attn.v_proj", "mlp.down_proj", "mlp"])
def test_modules_without_backward_are_refused(part, name, tokenizer):
    """The sum of shares would be exact all the same, with most of it booked as a constant."""
    model = tiny.llama(len(tokenizer))
    if part == "mlp":
        own = model.model.layers[1].mlp
        own.forward = torch.no_grad()(own.forward)
    else:
        with_kernels(model, [f"model.layers.1.{part}"], has_way_back=False)
    with pytest.raises(ValueError, match=rf"no gradient goes through model\.layers\.1\.{part}"):
        attributed(name, model, tokenizer)
