"""The axioms through a model, for every method: which of them hold, and which do not."""

import warnings
from pathlib import Path

import pytest
import tiny
import torch
from axioms import HOLDS, WITHOUT_A_VALUE, table
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    ShapleyValues,
    ShapleyValueSampling,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import captum_llm_ext
from captum_llm_ext import (
    AttentionRollout,
    AttentionWeights,
    EquivalentLinearSystem,
    FeatureInclusion,
    GenerationAttentionAttribution,
    GenerationAttribution,
    GenerationGradientAttribution,
    HierarchicalAblation,
    LayerSaliency,
    PartitionShap,
    TextSegmentInput,
)

GRADIENTS = {
    "LayerIntegratedGradients": (LayerIntegratedGradients, {"n_steps": 40}),
    "LayerGradientXActivation": (LayerGradientXActivation, {}),
    "LayerGradientShap": (LayerGradientShap, {}),
    "LayerSaliency": (lambda model, _: LayerSaliency(model), {}),
    "EquivalentLinearSystem": (lambda model, _: EquivalentLinearSystem(model), {}),
    "EquivalentLinearSystem, L2": (lambda model, _: EquivalentLinearSystem(model, norm="l2"), {}),
}
PERTURBATIONS = {
    "FeatureAblation": (FeatureAblation, {}),
    "FeatureInclusion": (FeatureInclusion, {}),
    "ShapleyValues": (ShapleyValues, {}),
    "ShapleyValueSampling": (ShapleyValueSampling, {"n_samples": 4}),
    "KernelShap": (KernelShap, {"n_samples": 128}),
    "Lime": (Lime, {"n_samples": 128}),
    "PartitionShap": (PartitionShap, {"n_samples": 500}),
    "HierarchicalAblation": (lambda model: HierarchicalAblation(model, share=0.9), {}),
}
ATTENTION = {
    "AttentionWeights": AttentionWeights,
    "AttentionRollout": AttentionRollout,
    "AttentionRollout, values": lambda model: AttentionRollout(model, "values"),
    "AttentionRollout, ALTI": lambda model: AttentionRollout(model, "alti"),
    "AttentionRollout, projection": lambda model: AttentionRollout(model, "projection"),
}
# Of values of about 1: what is exact is so to float32, a quadrature is not.
EXACT, NEARLY = 5e-6, 2e-3
# Two logits that other sentences matter to.
PAIR = (44, 103)
PROMPT = "Is in. Golf golf golf is"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
every_method = pytest.mark.parametrize("name", HOLDS)
every_method_of_a_value = pytest.mark.parametrize(
    "name", [name for name in HOLDS if name not in WITHOUT_A_VALUE]
)


@pytest.fixture(scope="module")
def even(tokenizer):
    """A model whose values change evenly; as others, made and probed once, not for each method."""
    return tiny.llama(len(tokenizer), initializer_range=0.15)


def attributed(name, model, tokenizer, value=None, prompt=PROMPT, **given):
    """One token's attributions to the words of a prompt; the end of the text stands for absent."""
    unit = ("sentence", "word") if name in ("PartitionShap", "HierarchicalAblation") else "word"
    inp = TextSegmentInput(prompt, tokenizer, unit, baselines="<unk>")
    target = torch.tensor([44])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in ATTENTION:
            attribution = GenerationAttentionAttribution(ATTENTION[name](model), tokenizer)
            return attribution.attribute(inp, target, output_unit=None)
        if name in GRADIENTS:
            kind, settings = GRADIENTS[name]
            attribution = GenerationGradientAttribution(
                kind(model, None), tokenizer, attr_target=value or "logit"
            )
        else:
            kind, settings = PERTURBATIONS[name]
            attribution = GenerationAttribution(kind(model), tokenizer, value or "logit")
        return attribution.attribute(inp, target, output_unit=None, **settings, **given)


def holds(name, axiom, is_so):
    assert bool(is_so) == (axiom in HOLDS[name])


def logit(token):
    return lambda logits, target: logits[:, :1, token].expand(-1, len(target))


@every_method_of_a_value
def test_completeness(name, even, tokenizer):
    found = attributed(name, even, tokenizer)
    gap = found.full_values - found.empty_values - found.token_attr.sum(1)
    holds(name, "completeness", (gap.abs() < NEARLY).all())


@every_method_of_a_value
def test_sensitivity(name, even, tokenizer):
    """A value that is at its bound at the text, and below where a word is absent."""
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    plain = attributed("FeatureAblation", even, tokenizer)
    word = int(plain.token_attr[0].argmax())
    bound = float(plain.full_values[0] - plain.token_attr[0, word] / 2)
    assert plain.token_attr[0, word] > 0.01
    assert len(inp.names) == 6

    def bounded(logits, target):
        return logits[:, :1, 44].clamp(max=bound)

    found = attributed(name, even, tokenizer, bounded)
    holds(name, "sensitivity", found.token_attr[0, word].abs() > 1e-6)


@pytest.fixture(scope="module")
def short_sighted(tokenizer):
    """One layer that sees three tokens."""
    torch.manual_seed(0)
    config = tiny.llama(len(tokenizer)).config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    settings = {n: config[n] for n in (*names, "num_key_value_heads", "initializer_range")}
    config = MistralConfig(**settings, num_hidden_layers=1, sliding_window=3)
    return MistralForCausalLM(config).eval()


@every_method
def test_dummy(name, short_sighted, tokenizer):
    """It sees nothing of the first words."""
    found = attributed(name, short_sighted, tokenizer).token_attr[0]
    assert found[-1].abs() > 1e-3
    holds(name, "dummy", (found[:2].abs() < 1e-6).all())


@pytest.fixture(scope="module")
def without_positions(tokenizer):
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).eval()
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    return model


@every_method
def test_symmetry(name, without_positions, tokenizer):
    """Without positions, one layer has the same use for the same word in two places."""
    found = attributed(name, without_positions, tokenizer).token_attr[0]
    assert found[3].abs() > 10 * EXACT or name == "Lime"
    holds(name, "symmetry", abs(float(found[3] - found[4])) < EXACT)


@every_method_of_a_value
def test_linearity(name, even, tokenizer):
    one, other = (attributed(name, even, tokenizer, logit(token)) for token in PAIR)

    def both(logits, target):
        return 2 * logit(PAIR[0])(logits, target) - 3 * logit(PAIR[1])(logits, target)

    found = attributed(name, even, tokenizer, both)
    expected = 2 * one.token_attr - 3 * other.token_attr
    holds(name, "linearity", (found.token_attr - expected).abs().max() < NEARLY)


def variants(tokenizer):
    """Models that are the same function of their input."""
    yield tiny.llama(len(tokenizer), attn_implementation="eager")
    scaled = tiny.llama(len(tokenizer))
    with torch.no_grad():
        for layer in scaled.model.layers:
            layer.self_attn.q_proj.weight *= 3
            layer.self_attn.k_proj.weight /= 3
    yield scaled
    plain = tiny.llama(len(tokenizer))
    config = plain.config
    fused = Phi3ForCausalLM(
        Phi3Config(
            **{
                n: getattr(config, n)
                for n in (
                    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
                    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
                    *("pad_token_id", "bos_token_id", "eos_token_id", "rms_norm_eps"),
                )
            }
        )
    ).eval()
    weights = dict(plain.state_dict())
    for i in range(config.num_hidden_layers):
        for new, old in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            parts = [weights.pop(f"model.layers.{i}.{name}.weight") for name in old]
            weights[f"model.layers.{i}.{new}.weight"] = torch.cat(parts)
    fused.load_state_dict(weights)
    yield fused
    deeper = LlamaForCausalLM(type(config)(**{**config.to_dict(), "num_hidden_layers": 3})).eval()
    deeper.load_state_dict(plain.state_dict(), strict=False)
    for part in (deeper.model.layers[2].self_attn.o_proj, deeper.model.layers[2].mlp.down_proj):
        torch.nn.init.zeros_(part.weight)
    yield deeper  # by a layer that adds nothing
    turned = tiny.llama(len(tokenizer))  # the same in other coordinates, for norms have no weights
    drawn = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)).double()
    turn = torch.linalg.qr(drawn)[0].float()
    with torch.no_grad():
        for name, weight in turned.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.copy_(turn.T @ weight)
            elif weight.dim() == 2:
                weight.copy_(weight @ turn)
    yield turned


@pytest.fixture(scope="module")
def implementations(tokenizer):
    return tiny.llama(len(tokenizer)), list(variants(tokenizer))


@every_method
def test_implementation_invariance(name, implementations, tokenizer):
    first, others = implementations
    plain = attributed(name, first, tokenizer).token_attr
    found = [attributed(name, other, tokenizer).token_attr for other in others]
    apart = [float((one - plain).abs().max()) for one in found]
    holds(name, "implementation", max(apart) < NEARLY * max(1.0, float(plain.abs().max())))


def test_axiom_table_in_the_map_is_current():
    text = (Path(captum_llm_ext.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert table() in text
