"""What places attend to: against weights that transformers gives out, and parts made by hand."""

import architectures
import pytest
import tiny
import torch
import transformers
from captum.attr import ShapleyValueSampling

from captum_llm_ext import (
    AttentionRollout,
    AttentionWeights,
    ChatInput,
    GenerationAttentionAttribution,
    GenerationAttributionResult,
    TextSegmentInput,
    attribute_dataset,
)
from captum_llm_ext.attribution.attention.heads import AttentionByHead
from captum_llm_ext.attribution.attention.maps import each_map

PROMPT = "Dave lives in Palm."
TARGET = " golf and"
READ = ["gpt2", "llama", "mistral, sliding window", "gemma 2, sliding window", "gpt-neox"]
READ += ["gemma 3, sliding window", "qwen 3", "mixtral", "opt", "phi 3", "cohere 2, sliding window"]
READ += ["deepseek v3, latent attention", "llama 4, chunked attention"]
READ += ["bloom", *(name for name in architectures.OWN_ATTENTION if "alibi" not in name)]
REFUSED = {
    "mamba": r"backbone\.layers\.0 \(MambaBlock: MambaRMSNorm, MambaMixer\), backbone\.layers\.1",
    "mamba 2": r"layers\.0 \(Mamba2Block: .*Mamba2Mixer\)",
    "qwen 3 next, linear attention": r"Qwen3NextGatedDeltaNet|output projection of its own",
    "jamba, recurrent hybrid": r"layers\.0 \(JambaMambaDecoderLayer: JambaMambaMixer",
    "falcon-h1, recurrent hybrid": r"model\.layers\.0 does not add its attention",
    "lfm 2, convolution hybrid": r"layers\.0 \(Lfm2DecoderLayer: Lfm2ShortConv",
    "minimax, lightning attention": r"layers\.0 \(MiniMaxDecoderLayer: MiniMaxLightningAttention",
    "falcon, alibi": "gives other logits than the attention that FalconForCausalLM runs with",
    "recurrentgemma, recurrent hybrid": r"RecurrentGemmaRecurrentBlock",
    "nemotron-h, recurrent hybrid": r"NemotronHMamba2Mixer",
}


def ids_of(tokenizer):
    return torch.tensor([tokenizer.encode(PROMPT + TARGET)])


def weights_of(name, dtype, ids):
    """Of every layer ``(heads, length, length)``, as transformers gives them out."""
    model = architectures.build(name, dtype=dtype)
    # Told to the configuration, for not every model takes `set_attn_implementation`.
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        given = model(ids, output_attentions=True, use_cache=False).attentions
    return [layer[0].double() for layer in given]


@pytest.mark.parametrize("name", READ)
def test_weights_and_rollout_follow_from_returned_attentions(name, tokenizer):
    ids = ids_of(tokenizer)
    model = architectures.build(name, dtype=torch.float64)
    layers = weights_of(name, torch.float64, ids)
    expected = torch.eye(ids.shape[1]).double()
    for layer in layers:
        expected = (layer.mean(0) + torch.eye(ids.shape[1])) / 2 @ expected
    found = AttentionRollout(model).attribute(ids)[0]
    assert (found - expected).abs().max() < 1e-6
    assert (found.sum(-1) - 1).abs().max() < 1e-6
    assert (found.triu(1) == 0).all()
    mean = torch.stack(layers).mean((0, 1))
    assert (AttentionWeights(model).attribute(ids)[0] - mean).abs().max() < 1e-6
    one = AttentionWeights(model, layers=[-1], heads=2).map(ids[0])
    assert (one - layers[-1][2]).abs().max() < 1e-6
    most = layers[0].amax(0)
    most = most / most.sum(-1, keepdim=True)
    assert (AttentionWeights(model, layers=[0], heads="max").map(ids[0]) - most).abs().max() < 1e-6


@pytest.mark.parametrize("name", READ)
def test_value_norm_and_alti_rows_are_distributions(name, tokenizer):
    """That they sum to what the layer adds is checked on every call."""
    model = architectures.build(name)
    for kind in ("values", "alti"):
        rows = AttentionRollout(model, kind).map(ids_of(tokenizer)[0])
        assert (rows.sum(-1) - 1).abs().max() < 1e-5
        assert rows.min() >= 0
        assert (rows.triu(1) == 0).all()


def test_attention_sinks_count_as_fixed_text(tokenizer):
    model = architectures.build("gpt-oss", dtype=torch.float64)
    ids = ids_of(tokenizer)
    layers = weights_of("gpt-oss", torch.float64, ids)
    assert all((layer.sum(-1) < 0.9).any() for layer in layers)  # the rest is the sinks'
    expected = torch.eye(ids.shape[1]).double()
    for layer in layers:
        expected = (layer.mean(0) + torch.eye(ids.shape[1])) / 2 @ expected
    assert (AttentionRollout(model).map(ids[0]) - expected).abs().max() < 1e-6
    mean = torch.stack(layers).mean((0, 1))
    assert (AttentionWeights(model).map(ids[0]) - mean).abs().max() < 1e-6
    # One column more: the sinks' own weights, of which no head's is the largest everywhere.
    sinks = torch.stack([(1 - layer.sum(-1)).amax(0) for layer in layers])
    most = torch.stack([layer.amax(0) for layer in layers])
    most = (most / (most.sum(-1) + sinks)[..., None]).mean(0)
    assert (AttentionWeights(model, heads="max").map(ids[0]) - most).abs().max() < 1e-6
    for kind in ("values", "alti", "projection"):  # a sink holds nothing
        rows = AttentionRollout(model, kind).map(ids[0])
        assert (rows.sum(-1) - 1).abs().max() < 1e-6
    attribution = GenerationAttentionAttribution(AttentionWeights(model), tokenizer)
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    found = attribution.attribute(inp, TARGET)
    place = len(inp.ids) - 1
    expected = 1 - mean[place, 1 : place + 1].sum()  # BOS and sinks
    assert float(found.fixed_attr[0]) == pytest.approx(float(expected), abs=1e-6)
    assert torch.allclose(found.full_values, torch.ones_like(found.full_values))
    heads = attribution.by_head(inp, TARGET, 0)
    assert torch.allclose(heads.weights.sum(-1) + heads.fixed, torch.ones(2, 4), atol=1e-6)
    assert torch.allclose(heads.fixed.mean().double(), expected, atol=1e-6)


def test_model_loaded_with_eager_attention(tokenizer):
    """Falcon with alibi: eager attention scales it, the usual one does not."""
    given = architectures.build("falcon, alibi").config
    own = transformers.AutoModelForCausalLM.from_config(given, attn_implementation="eager").eval()
    ids = ids_of(tokenizer)
    with torch.no_grad():
        layers = own(ids, output_attentions=True, use_cache=False).attentions
    mean = torch.stack([layer[0] for layer in layers]).mean((0, 1))
    assert (AttentionWeights(own).map(ids[0]) - mean).abs().max() < 1e-6


def test_value_contributions_equal_a_plain_loop(tokenizer):
    """Grouped heads, value by value, through the projection; a plain loop."""
    model = tiny.llama(len(tokenizer)).double()
    ids = ids_of(tokenizer)
    length = ids.shape[1]
    given, values = {}, {}
    hooks = []
    for number, layer in enumerate(model.model.layers):

        def before(_, args, number=number):
            given[number] = args[0][0].detach()

        def value(_, args, output, number=number):
            values[number] = output[0].detach()

        hooks.append(layer.register_forward_pre_hook(before))
        hooks.append(layer.self_attn.v_proj.register_forward_hook(value))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    kinds = ("values", "alti", "projection")
    product = {kind: torch.eye(length).double() for kind in kinds}
    for number, layer in enumerate(model.model.layers):
        weight = layer.self_attn.o_proj.weight.detach()
        norms, alti, along = (torch.zeros(length, length).double() for _ in kinds)
        for i in range(length):
            parts = torch.zeros(length, 32).double()
            for j in range(i + 1):
                for head in range(4):
                    own = values[number][j, (head // 2) * 8 : (head // 2 + 1) * 8]
                    share = weight[:, head * 8 : (head + 1) * 8] @ own
                    parts[j] += attentions[number][0, head, i, j].detach() * share
            norms[i] = parts.norm(dim=-1)
            parts[i] += given[number][i]
            whole = parts.sum(0)
            for j in range(i + 1):
                alti[i, j] = max(0.0, float(whole.abs().sum() - (whole - parts[j]).abs().sum()))
                along[i, j] = max(0.0, float(parts[j] @ whole))
        norms /= norms.sum(-1, keepdim=True)
        product["values"] = (norms + torch.eye(length)) / 2 @ product["values"]
        product["alti"] = alti / alti.sum(-1, keepdim=True) @ product["alti"]
        product["projection"] = along / along.sum(-1, keepdim=True) @ product["projection"]
    other = tiny.llama(len(tokenizer)).double()
    for kind, expected in product.items():
        found = AttentionRollout(other, kind).map(ids[0])
        assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_attention_are_refused(name, tokenizer):
    model = architectures.build(name)
    for method in (AttentionWeights(model), AttentionRollout(model, "alti")):
        with pytest.raises(ValueError, match=REFUSED[name]):
            method.map(ids_of(tokenizer)[0])


@pytest.mark.parametrize("unit", ["token", "word"])
def test_token_uses_the_row_of_the_preceding_position(unit, tokenizer):
    model = tiny.llama(len(tokenizer))
    inp = TextSegmentInput(PROMPT, tokenizer, unit, baselines="delete")
    method = AttentionRollout(model, "alti")
    found = GenerationAttentionAttribution(method, tokenizer).attribute(inp, TARGET)
    ids = torch.tensor([*inp.ids, *found.target.tolist()])
    rows = method.map(ids)
    for t in range(len(found.target)):
        row = rows[len(inp.ids) + t - 1]
        for place in inp.places():
            expected = float(row[list(place.positions)].sum())
            assert float(found.token_attr[t, place.feature]) == pytest.approx(expected, abs=1e-6)
        assert float(found.fixed_attr[t]) == pytest.approx(float(row[0]), abs=1e-6)  # BOS
        for s in range(len(found.target)):
            expected = float(row[len(inp.ids) + s])
            assert float(found.output_attr[t, s]) == pytest.approx(expected, abs=1e-6)
        assert (found.output_attr[t, t:] == 0).all()
    whole = found.full_attr.sum(1) + found.fixed_attr
    assert torch.allclose(whole, torch.ones(len(whole)))
    assert found.efficiency_gap.abs().max() < 1e-6
    assert found.is_unsigned


@pytest.mark.parametrize("name", ["llama", "gemma 3, sliding window", "gpt2"])
@pytest.mark.parametrize("unit", ["token", "word"])
def test_heads_of_one_token_equal_transformers_attentions(name, unit, tokenizer):
    model = architectures.build(name)
    inp = TextSegmentInput(PROMPT, tokenizer, unit, baselines="delete")
    attribution = GenerationAttentionAttribution(AttentionWeights(model), tokenizer)
    target = tokenizer.encode(" golf is golf and", add_special_tokens=False)
    assert len(target) > 3
    found = attribution.by_head(inp, target, -2, output_unit=unit)
    layers = weights_of(name, torch.float32, torch.tensor([[*inp.ids, *target[:-2]]]))
    assert found.weights.shape[:2] == (len(layers), len(layers[0]))
    for number, weights in enumerate(layers):
        own = weights[:, -1]
        for place in inp.places():
            expected = own[:, list(place.positions)].sum(1).float()
            assert torch.allclose(found.weights[number, :, place.feature], expected, atol=1e-6)
    whole = found.weights.sum(-1) + found.fixed
    assert torch.allclose(whole, torch.ones_like(whole), atol=1e-5)
    assert found.weights.shape[2] == len(found.features)
    # The mean over layers and heads is what `AttentionWeights` tells of that token.
    mean = attribution.attribute(inp, target, output_unit=unit)
    n_seen = found.weights.shape[2]
    assert torch.allclose(found.weights.mean((0, 1)), mean.full_attr[-2, :n_seen], atol=1e-6)
    with pytest.raises(ValueError, match=f"the target has {len(target)} tokens"):
        attribution.by_head(inp, target, len(target))


def test_head_plot_has_a_row_per_head_and_a_fixed_text_column(tokenizer):
    model = tiny.llama(len(tokenizer))
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    attribution = GenerationAttentionAttribution(AttentionRollout(model), tokenizer)
    found = attribution.by_head(inp, TARGET, 1)
    _, ax = found.plot()
    fixed, prompt, output = (image.get_array().data for image in ax.get_images())
    n_rows = model.config.num_hidden_layers * model.config.num_attention_heads
    assert fixed.shape == (n_rows, 1)
    assert torch.tensor(fixed[:, 0]).allclose(found.fixed.double().flatten())
    drawn = torch.cat([torch.tensor(prompt), torch.tensor(output)], 1)
    assert drawn.allclose(found.weights.double().flatten(0, 1))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "1"]
    headings = [text.get_text().replace("\n", " ") for text in ax.texts]
    assert headings == ["fixed text", "prompt", "generated before"]
    assert ax.get_title(loc="left").startswith("Attention where")


def test_missing_heads_are_nan():
    weights = torch.full((2, 3, 4), 0.2)
    weights[1, 2] = torch.nan
    fixed = torch.full((2, 3), 0.2)
    fixed[1, 2] = torch.nan
    heads = AttentionByHead(weights, fixed, "golf", ["a", "b", "c", "d"], 4)
    _, ax = heads.plot()
    assert torch.tensor(ax.get_images()[1].get_array().data).isnan().sum() == 4
    assert len(ax.get_images()) == 2  # nothing was generated before


def test_results_are_saved_shown_and_generated(tokenizer, tmp_path):
    model = tiny.llama(len(tokenizer))
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    inp = ChatInput(
        [{"role": "user", "content": "Dave plays golf. Why?"}],
        tokenizer,
        unit="word",
        baselines="delete",
    )
    attribution = GenerationAttentionAttribution(AttentionWeights(model, heads="max"), tokenizer)
    found = attribution.attribute(inp, gen_args={"max_new_tokens": 3}, output_unit="word")
    assert len(found.target) == 3
    found.save(tmp_path / "found.safetensors")
    again = GenerationAttributionResult.load(tmp_path / "found.safetensors")
    assert torch.equal(again.full_attr, found.full_attr)
    assert torch.equal(again.fixed_attr, found.fixed_attr)
    assert "golf" in found.to_html()
    held = attribution.attribute(inp, found.target, output_unit=None)
    assert held.output_attr is None
    assert torch.allclose(held.token_attr, found.token_attr)
    assert (held.fixed_attr >= found.fixed_attr - 1e-6).all()


def test_bad_arguments_say_what_to_give(tokenizer):
    model = tiny.llama(len(tokenizer))
    inp = TextSegmentInput(PROMPT, tokenizer, baselines="delete")
    with pytest.raises(TypeError, match=r"give `AttentionWeights\(model\)`"):
        GenerationAttentionAttribution(ShapleyValueSampling(model), tokenizer)
    with pytest.raises(ValueError, match="'weights', 'values', 'alti'"):
        AttentionRollout(model, "flow")
    with pytest.raises(ValueError, match="'mean', 'max' or the number"):
        AttentionWeights(model, heads="sum")
    with pytest.raises(ValueError, match="`layers` holds 2: the model has 2 layers"):
        AttentionWeights(model, layers=[0, 2]).map(torch.tensor(inp.ids))
    with pytest.raises(ValueError, match="has 4 heads"):
        AttentionWeights(model, heads=4).map(torch.tensor(inp.ids))


def test_model_state_is_restored(tokenizer):
    model = tiny.llama(len(tokenizer)).train()
    ids = torch.tensor([tokenizer.encode(PROMPT)])

    def stop(number, found):
        raise KeyboardInterrupt

    for take in (lambda number, found: None, stop):
        try:
            each_map(model, ids, "alti", "mean", take)
        except KeyboardInterrupt:
            assert take is stop
        assert all(module.training for module in model.modules())
        hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
        assert not any(hooks)
        assert model.config._attn_implementation == "sdpa"


def test_offloaded_models_work_and_compiled_ones_are_refused(tokenizer):
    from accelerate import cpu_offload

    ids = ids_of(tokenizer)[0]
    method = AttentionRollout(tiny.llama(len(tokenizer)), "alti")
    model = cpu_offload(tiny.llama(len(tokenizer)), execution_device="cpu")
    assert torch.allclose(AttentionRollout(model, "alti").map(ids), method.map(ids), atol=1e-6)
    compiled = torch.compile(tiny.llama(len(tokenizer)), backend="eager")
    with pytest.raises(ValueError, match="or is compiled"):
        AttentionRollout(compiled).map(ids)


def test_attribute_dataset_takes_attention_methods(tokenizer, tmp_path):
    attribution = GenerationAttentionAttribution(
        AttentionRollout(tiny.llama(len(tokenizer)), "alti"), tokenizer
    )
    records = [{"prompt": PROMPT, "target": TARGET}, {"prompt": "golf is", "target": TARGET}]
    report = attribute_dataset(records, attribution, tmp_path)
    assert report.n_written == 2
    assert attribute_dataset(records, attribution, tmp_path).n_skipped == 2
