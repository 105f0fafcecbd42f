"""Which model a folder of results or a checkpoint is of: all that the model's answers depend on."""

import copy
import warnings
from functools import partial

import pytest
import tiny
import torch
from captum.attr import FeatureAblation, LayerIntegratedGradients
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from captum_llm_ext import (
    GenerationAttribution,
    GenerationGradientAttribution,
    TextSegmentInput,
    attribute_dataset,
)
from captum_llm_ext.base.digest import differences
from captum_llm_ext.model import model_identity

# Absent is deleted: what comes of it is known.
attribute_dataset = partial(attribute_dataset, baselines="delete")

PROMPT = "Dave lives in Palm Coast"
GIVEN = [{"prompt": PROMPT, "target": [5, 6]}]


@pytest.fixture
def own(tokenizer):
    return tiny.llama(len(tokenizer))


class Adapted(nn.Module):
    """A layer with adapters beside it, switched and scaled as peft's are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self._active, self._off = base, "one", False
        self.low = nn.ModuleDict(
            {name: nn.Linear(base.in_features, base.out_features) for name in ("one", "two")}
        )
        self.scaling = {"one": 1.0, "two": 1.0}

    @property
    def active_adapters(self):
        return [self._active]

    @property
    def disable_adapters(self):
        return self._off

    def forward(self, x):
        said = self.base(x)
        return said if self._off else said + self.scaling[self._active] * self.low[self._active](x)


class Packed(nn.Linear):
    """Weights kept in a buffer, as GPTQ's and AWQ's are, or in what the module alone can save."""

    def __init__(self, base: nn.Linear, *, in_buffer: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        if in_buffer:
            self.register_buffer("packed", base.weight.detach().clone())
        else:
            self._hidden = [base.weight.detach().clone()]

    def get_extra_state(self):
        return {"version": 1, "packed": list(getattr(self, "_hidden", ()))}

    def forward(self, x):
        weight = self.packed if hasattr(self, "packed") else self._hidden[0]
        return nn.functional.linear(x, weight)


class Halves(torch.Tensor):
    """A tensor made of integers and a scale, as torchao's are."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    def __tensor_flatten__(self):
        return ["integers", "scale"], {"shape": tuple(self.shape)}

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            (whole,) = args
            made = cls(whole.integers, whole.scale)
            return return_and_correct_aliasing(func, args, kwargs or {}, made)
        args = [a.integers * a.scale if isinstance(a, cls) else a for a in args]
        return func(*args, **(kwargs or {}))


def halves(weight):
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return Halves((weight.detach() / scale).round().to(torch.int8), scale)


def first(model):
    return model.model.layers[0].mlp


def with_halves(model):
    first(model).up_proj.weight = nn.Parameter(halves(first(model).up_proj.weight), False)


def with_packed(model, *, in_buffer):
    first(model).up_proj = Packed(first(model).up_proj, in_buffer=in_buffer)


def with_adapters(model):
    torch.manual_seed(1)
    first(model).up_proj = Adapted(first(model).up_proj)


def quantised(model):
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():  # torch wants torchao to be used, and still has it
        warnings.simplefilter("ignore")
        first(model).up_proj = quantize_dynamic(nn.Sequential(first(model).up_proj))[0]


def double(layer):
    weight, _ = layer._weight_bias()
    larger = torch.quantize_per_tensor(
        weight.dequantize() * 2, weight.q_scale() * 2, 0, torch.qint8
    )
    layer.set_weight_bias(larger, None)  # the same integers, of another scale


CHANGES = {
    "a buffer": (
        lambda m: with_packed(m, in_buffer=True),
        lambda m: first(m).up_proj.packed.mul_(1.5),
        "buffers",
    ),
    "extra state": (
        lambda m: with_packed(m, in_buffer=False),
        lambda m: first(m).up_proj._hidden[0].mul_(1.5),
        "weights",
    ),
    "an inner tensor": (
        with_halves,
        lambda m: first(m).up_proj.weight.scale.mul_(1.5),
        "weights",
    ),
    "another adapter": (
        with_adapters,
        lambda m: setattr(first(m).up_proj, "_active", "two"),
        "adapters",
    ),
    "no adapter": (with_adapters, lambda m: setattr(first(m).up_proj, "_off", True), "adapters"),
    "a weaker adapter": (
        with_adapters,
        lambda m: first(m).up_proj.scaling.update(one=0.5),
        "adapters",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_digest_covers_everything_a_model_holds(own, tokenizer, tmp_path, name):
    make, change, where = CHANGES[name]
    make(own)
    before = model_identity(own)
    assert model_identity(own) == before
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        said = own(ids).logits
        attribution = GenerationAttribution(FeatureAblation(own), tokenizer)
        attribute_dataset(GIVEN, attribution, tmp_path)
        # What is used is the same as before.
        assert model_identity(own) == before
        assert attribute_dataset(GIVEN, attribution, tmp_path).n_skipped == 1
        change(own)
        assert not torch.allclose(own(ids).logits, said)  # or it would be none
    assert f"`{where}`" in differences(before, model_identity(own))
    with pytest.raises(ValueError, match=f"of another run.*`{where}`"):
        attribute_dataset(GIVEN, attribution, tmp_path)


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
def test_digest_covers_quantisation_scales(own):
    quantised(own)
    before = model_identity(own)
    assert model_identity(own) == before
    double(first(own).up_proj)
    assert "`weights`" in differences(before, model_identity(own))


def test_digest_covers_dtype_and_shape(own):
    before = model_identity(own)
    norm = own.model.norm
    norm.weight.data = norm.weight.data.double()  # one alone, and all of them are 1
    assert "`weights`" in differences(before, model_identity(own))
    norm.weight.data = norm.weight.data.float().view(2, -1)
    assert "`weights`" in differences(before, model_identity(own))
    norm.weight.data = norm.weight.data.view(-1)
    assert model_identity(own) == before


def test_unreadable_state_is_reported(own):
    norm = own.model.norm
    norm.weight = nn.Parameter(norm.weight.to("meta"), False)
    with pytest.warns(UserWarning, match=r"1 tensors .* cannot be read \(model\.norm\.weight\)"):
        assert model_identity(own)["unread"] == ["model.norm.weight"]


def test_digest_ignores_growing_rotary_caches(tokenizer):
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = tiny.llama(len(tokenizer), rope_parameters=scaling, max_position_embeddings=8)
    before = model_identity(model)
    rotary = copy.deepcopy(model.model.rotary_emb.inv_freq)
    with torch.no_grad():
        model(torch.arange(20)[None])
    assert not torch.equal(model.model.rotary_emb.inv_freq, rotary)
    assert model_identity(model) == before


def steered(model):
    def add(_module, _inputs, output):
        return (output[0] + 0.5, *output[1:]) if isinstance(output, tuple) else output + 0.5

    return model.model.layers[0].register_forward_hook(add).remove


def swapped(model):
    mlp = first(model)
    forward = mlp.forward
    mlp.forward = lambda x: 1.5 * forward(x)
    return lambda: delattr(mlp, "forward")


@pytest.mark.filterwarnings("ignore:3 steps are too few")
@pytest.mark.parametrize("change", [steered, swapped])
@pytest.mark.parametrize("attr_target", ["log_prob", "prob", "logit"])
def test_rescored_row_detects_changes_the_digest_misses(
    own, tokenizer, tmp_path, change, attr_target
):
    attribution = GenerationAttribution(FeatureAblation(own), tokenizer, attr_target)
    gradients = GenerationGradientAttribution(
        LayerIntegratedGradients(own, None), tokenizer, attr_target=attr_target
    )
    runs = [(attribution, {}, tmp_path / "a"), (gradients, {"n_steps": 3}, tmp_path / "b")]
    for one, options, out in runs:
        attribute_dataset(GIVEN, one, out, **options)
    inp, path = (
        TextSegmentInput(PROMPT, tokenizer, baselines="delete"),
        tmp_path / "run.safetensors",
    )
    attribution.attribute(inp, [5, 6], checkpoint=path)
    undo = change(own)
    more = [*GIVEN, {"prompt": "Ann", "target": [7]}]
    for one, options, out in runs:
        with pytest.raises(ValueError, match="of another model: a row scored again gives"):
            attribute_dataset(more, one, out, **options)
        assert len(list(out.glob("*.safetensors"))) == 1
    with pytest.raises(ValueError, match="of another model: a row scored again gives"):
        attribution.attribute(inp, [5, 6], checkpoint=path)
    undo()
    for one, options, out in runs:
        report = attribute_dataset(more, one, out, **options)
        assert (report.n_skipped, report.n_written) == (1, 1)


def test_checkpoint_detects_a_changed_attention_switch(own, tokenizer, tmp_path):
    """A row of one id before the target attends to that alone, whatever its queries are."""
    attention, inp = (
        own.model.layers[0].self_attn,
        TextSegmentInput(PROMPT, tokenizer, baselines="delete"),
    )
    attention.scale = 1.0
    attention.q_proj.register_forward_hook(lambda module, given, said: said * attention.scale)
    attribution = GenerationAttribution(FeatureAblation(own), tokenizer)
    path = tmp_path / "run.safetensors"
    attribution.attribute(inp, [5], checkpoint=path)
    attention.scale = 2.0
    with pytest.raises(ValueError, match="of another model: a row scored again gives"):
        attribution.attribute(inp, [5], checkpoint=path)


def test_generation_config_counts_if_text_is_generated(own, tokenizer, tmp_path):
    attribution = GenerationAttribution(FeatureAblation(own), tokenizer)
    options = {"gen_args": {"max_new_tokens": 2}}
    written = [{"prompt": PROMPT}]
    attribute_dataset(written, attribution, tmp_path / "written", **options)
    attribute_dataset(GIVEN, attribution, tmp_path / "given")
    inp, path = (
        TextSegmentInput(PROMPT, tokenizer, baselines="delete"),
        tmp_path / "run.safetensors",
    )
    attribution.attribute(inp, checkpoint=path, **options)
    own.generation_config.repetition_penalty = 3.0
    with pytest.raises(ValueError, match=r"`generation` was .*'repetition_penalty': '3.0'"):
        attribute_dataset(written, attribution, tmp_path / "written", **options)
    with pytest.raises(ValueError, match="belongs to another run"):
        attribution.attribute(inp, checkpoint=path, **options)
    both = [*GIVEN, *written]
    assert attribute_dataset(both, attribution, tmp_path / "given").n_skipped == 1
    own.generation_config.repetition_penalty = None
    with pytest.raises(ValueError, match="`generation`"):  # now there is one that was generated
        attribute_dataset(both, attribution, tmp_path / "given")


def test_peft_adapters(own, tokenizer):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(own, settings, adapter_name="one")
    model.add_adapter("two", settings)
    before = model_identity(model)
    model.set_adapter("two")
    assert "`adapters`" in differences(before, model_identity(model))
    model.set_adapter("one")
    assert model_identity(model) == before
    with model.disable_adapter():
        assert "`adapters`" in differences(before, model_identity(model))
    assert model_identity(model) == before
