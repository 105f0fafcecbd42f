"""What a model does is seen on the model in hand, and it is asked accordingly."""

import argparse
import random
import threading
from functools import partial
from types import SimpleNamespace

import numpy
import pytest
import tiny
import torch
import transformers
from architectures import _COMMON, CONFIGS, build
from captum.attr import FeatureAblation, LayerIntegratedGradients
from torch import nn

from captum_llm_ext import GenerationAttribution, GenerationGradientAttribution, TextSegmentInput
from captum_llm_ext.model import Likelihood, Scorer, TokenRow
from captum_llm_ext.model.exclusive import exclusive_use
from captum_llm_ext.model.forward.rounding import rounded_otherwise
from captum_llm_ext.model.probe import cache as looking
from captum_llm_ext.model.probe import findings

TEXT = "Dave lives in Palm Coast, FL and is a lawyer."


def rows_of(n_prompt=14, n_target=6, seed=0):
    """A prompt without some tokens, with some replaced, and one without a token of the target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 400, (n_prompt + n_target,), generator=generator).tolist()
    prompt, target = ids[:n_prompt], ids[n_prompt:]
    prompts = [prompt, *([*prompt[:i], *prompt[i + 1 :]] for i in range(0, n_prompt, 2))]
    prompts += [[*prompt[:i], 3, *prompt[i + 1 :]] for i in range(0, n_prompt, 2)]
    rows = [TokenRow((*p, *target[:-1]), range(len(p) - 1, len(p) - 1 + n_target)) for p in prompts]
    short = [*prompt, *target[1:-1]]
    places = [n_prompt - 1, n_prompt - 1, *range(n_prompt, n_prompt + n_target - 2)]
    return [*rows, TokenRow(tuple(short), places)], torch.tensor(target)


@torch.no_grad()
def step_by_step(model, rows, target):
    """One uncached forward of batch 1 per target token, with nothing after the place it is said."""
    values = []
    for row in rows:
        said = []
        for place, token in zip(row.positions, target, strict=True):
            output = model(torch.tensor([row.ids[: place + 1]]))
            output = getattr(output, "logits", output)
            logits = output[0] if isinstance(output, tuple) else output
            said.append(logits[0, -1].double().log_softmax(-1)[token])
        values.append(torch.stack(said))
    return torch.stack(values)


def gemma_both_ways():
    torch.manual_seed(0)
    settings = {"query_pre_attn_scalar": 8, "use_bidirectional_attention": True}
    config = transformers.Gemma3TextConfig(**_COMMON | settings)
    config.initializer_range = 0.3
    return transformers.Gemma3ForCausalLM(config).eval()


def pali_gemma():
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 32}
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **_COMMON},
        vision_config={"model_type": "siglip_vision_model", **vision},
        image_token_index=399,
        projection_dim=32,
        hidden_size=32,
    )
    config.text_config.initializer_range = 0.3
    return transformers.PaliGemmaForConditionalGeneration(config).eval()


class Changed(nn.Module):
    """A model with its logits changed by a function of them and the ids."""

    def __init__(self, change, inner=None):
        super().__init__()
        self.inner, self.change = inner or tiny.llama(), change
        self.n_passes = 0

    def forward(self, input_ids, use_cache=False):
        self.n_passes += 1
        logits = self.inner(input_ids=input_ids, use_cache=False).logits
        return argparse.Namespace(logits=self.change(logits, input_ids))


def next_of(only=None, distance=1):
    """What stands at a distance is likelier, if it is one of some ids."""

    def change(logits, ids):
        later = ids[:, distance:]
        seen = torch.ones_like(later) if only is None else torch.isin(later, torch.tensor(only))
        bonus = nn.functional.one_hot(later, logits.shape[-1]) * seen[..., None]
        return torch.cat([logits[:, :-distance] + 2 * bonus, logits[:, -distance:]], 1)

    return change


def one_of_the_target():
    return Changed(next_of([int(rows_of()[1][3])]))


AHEAD = {
    "gemma 3 both ways": gemma_both_ways,
    "prefix attention": pali_gemma,
    "the next id": lambda: Changed(next_of()),
    "the fourth id after": lambda: Changed(next_of(distance=4)),
    "one id of the target alone": one_of_the_target,
}


@pytest.mark.parametrize("name", AHEAD)
def test_models_that_see_ahead_are_scored_without_later_tokens(name):
    model = AHEAD[name]()
    rows, target = rows_of()
    scorer = Scorer(model)
    values = scorer.values(rows, target)
    assert float((values - step_by_step(model, rows, target)).abs().max()) < 1e-5
    assert scorer.findings.sees_ahead
    assert scorer.findings.ahead > 0.1
    assert not scorer.findings.couples_rows


def quantised():
    model = tiny.llama(
        hidden_size=128, intermediate_size=256, num_key_value_heads=4, initializer_range=0.15
    )
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


COUPLED = {
    "int8 with one scale": quantised,
    "the mean of the batch": lambda: Changed(lambda x, _: x + 0.3 * x.mean(0, keepdim=True)),
    "the number of rows": lambda: Changed(lambda x, _: x * (1 + 0.1 * (len(x) > 1))),
    "the largest of all": lambda: Changed(lambda x, _: x * 9 / x.abs().max()),
    "more than two rows": lambda: Changed(lambda x, _: x * (1 + 0.1 * (len(x) > 2))),
    "more than twelve rows": lambda: Changed(lambda x, _: x + 0.3 * x[:1] * (len(x) > 12)),
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization|.*quantize_per_tensor:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
def test_coupled_rows_are_scored_one_by_one(name):
    model = COUPLED[name]()
    rows, target = rows_of()
    scorer = Scorer(model)
    values = scorer.values(rows, target)
    # Logits are the same bits; sums over the vocabulary are taken in float32.
    assert float((values - step_by_step(model, rows, target)).abs().max()) < 1e-5
    assert scorer.findings.couples_rows
    assert float(scorer.noise_floor(rows[0], target).max()) < 2e-5  # float32's last digits
    others = Scorer(model, max_rows=3).values(rows, target)
    assert torch.equal(values, others)


@pytest.mark.filterwarnings("ignore:.* steps are too few")
def test_gradients_of_models_that_see_ahead_do_not_leak(tokenizer):
    model = Changed(lambda logits, ids: logits + 0.5 * logits.roll(-1, 1))
    inp = TextSegmentInput(TEXT, tokenizer, "word", baselines="delete")
    method = LayerIntegratedGradients(model, model.inner.get_input_embeddings())
    result = GenerationGradientAttribution(method, tokenizer).attribute(inp, " golf", n_steps=4)
    rows = [
        TokenRow(
            (*inp.ids, *result.target[:-1].tolist()),
            range(len(inp.ids) - 1, len(inp.ids) + len(result.target) - 1),
        )
    ]
    truth = step_by_step(model, rows, result.target)[0]
    torch.testing.assert_close(result.full_values.double(), truth, atol=1e-5, rtol=0)
    assert result.provenance["probe"]["sees_ahead"]
    assert "step by step" in result.provenance["batching"]


@pytest.mark.filterwarnings("ignore:.* steps are too few")
def test_gradients_of_coupled_rows_equal_single_row_gradients(tokenizer):
    inp = TextSegmentInput(TEXT, tokenizer, "word", baselines="delete")
    found = []
    for change in (lambda x, _: x + 0.3 * x.mean(0, keepdim=True), lambda x, _: 1.3 * x):
        model = Changed(change)
        method = LayerIntegratedGradients(model, model.inner.get_input_embeddings())
        attribution = GenerationGradientAttribution(method, tokenizer)
        found.append(attribution.attribute(inp, " golf", n_steps=6).full_attr)
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["the next id", "the mean of the batch"])
def test_likelihoods_are_those_of_single_texts(name, tokenizer):
    model = (AHEAD | COUPLED)[name]()
    texts = [TEXT, "Ann lives", "The quick brown fox"]
    said = Likelihood(model, tokenizer).log_likelihoods(texts)
    for text, value in zip(texts, said.tolist(), strict=True):
        ids = tokenizer.encode(text)
        row = TokenRow(tuple(ids[:-1]), range(len(ids) - 1))
        truth = step_by_step(model, [row], torch.tensor(ids[1:])).sum()
        assert value == pytest.approx(float(truth), abs=1e-3)  # a sum of many in float32


class SoftPrompt(nn.Module):
    """Vectors of its own before, or after, those of the ids; it gives the logits of all."""

    def __init__(self, *, behind=False):
        super().__init__()
        self.inner, self.behind = tiny.llama(), behind
        torch.manual_seed(0)
        self.soft = nn.Parameter(0.4 * torch.randn(4, 32))

    def forward(self, input_ids, **arguments):
        given = self.inner.get_input_embeddings()(input_ids)
        soft = self.soft.expand(len(given), -1, -1)
        given = torch.cat([given, soft] if self.behind else [soft, given], 1)
        return self.inner(inputs_embeds=given, **arguments)


def test_soft_prompt_logits_are_skipped(tokenizer):
    model = SoftPrompt().eval()
    rows, target = rows_of()
    values = Scorer(model).values(rows, target)
    assert float((values - step_by_step(model, rows, target)).abs().max()) < 1e-5
    with exclusive_use(model):
        assert findings(model, rows).n_before == 4
    with pytest.raises(ValueError, match="returns 12 logits for 8 ids"):
        Scorer(SoftPrompt(behind=True).eval()).values(rows, target)
    inp = TextSegmentInput(TEXT, tokenizer, "word", baselines="delete")
    found = [
        GenerationAttribution(FeatureAblation(model), tokenizer).attribute(
            inp, " golf and", perturbations_per_eval=n
        )
        for n in (1, None)
    ]
    torch.testing.assert_close(found[0].full_attr, found[1].full_attr, atol=1e-5, rtol=0)


def test_soft_prompt_inserted_by_a_hook_is_detected():
    model = tiny.llama()
    embedding = model.get_input_embeddings()
    soft = 0.4 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))

    def in_front(module, args, kwargs):
        given = embedding(kwargs.pop("input_ids", None) if not args else args[0])
        kwargs["inputs_embeds"] = torch.cat([soft.expand(len(given), -1, -1), given], 1)
        return (), kwargs

    model.register_forward_pre_hook(in_front, with_kwargs=True)
    rows, target = rows_of()
    values = Scorer(model).values(rows, target)
    assert float((values - step_by_step(model, rows, target)).abs().max()) < 1e-5


class PlainOutput(nn.Module):
    """A forward in the manner of nanoGPT."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = tiny.llama(), kind

    def forward(self, idx, targets=None):
        logits = self.inner(input_ids=idx, use_cache=False).logits
        kinds = {"tensor": logits, "tuple": (logits, None), "last": (logits[:, [-1]], None)}
        return kinds.get(self.kind, {"logits": logits})


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "last"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_unambiguous_output_types_and_argument_names_are_accepted(kind, wrapped, tokenizer):
    model = PlainOutput(kind)
    model = nn.DataParallel(model) if wrapped else model
    inp = TextSegmentInput(TEXT, tokenizer, "word", baselines="delete")
    found = [
        GenerationAttribution(FeatureAblation(m), tokenizer).attribute(inp, " golf and")
        for m in (model, tiny.llama())
    ]
    torch.testing.assert_close(found[0].full_attr, found[1].full_attr, atol=1e-5, rtol=0)


class Summing(nn.Module):
    """A model that torch can trace, script and export."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(400, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 400)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.head(x + torch.cumsum(torch.tanh(self.inner(x)), 1))


def exported(model):
    sizes = {"ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    return torch.export.export(model, (torch.ones(2, 9).long(),), dynamic_shapes=sizes).module()


@pytest.mark.parametrize("made", [torch.fx.symbolic_trace, torch.jit.script, exported])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torch_transformed_models_are_accepted(made, tokenizer):
    plain = Summing().eval()
    model = made(plain)
    rows, target = rows_of()
    truth = step_by_step(plain, rows, target)
    assert float((Scorer(model).values(rows, target) - truth).abs().max()) < 1e-5
    inp = TextSegmentInput(TEXT, tokenizer, "word", baselines="delete")
    found = [
        GenerationAttribution(FeatureAblation(m), tokenizer).attribute(inp, " golf and")
        for m in (model, plain)
    ]
    torch.testing.assert_close(found[0].full_attr, found[1].full_attr, atol=1e-5, rtol=0)


def test_missing_generate_asks_for_a_target(tokenizer):
    class Own(transformers.LlamaPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.inner = transformers.LlamaForCausalLM(config)
            self.post_init()

        def forward(self, input_ids=None, **arguments):
            return self.inner(input_ids=input_ids, **arguments)

    inp = TextSegmentInput(TEXT, tokenizer, "word", baselines="delete")
    own = Own(tiny.llama().config).eval()
    truth = GenerationAttribution(FeatureAblation(own.inner), tokenizer).attribute(inp, " golf")
    attribution = GenerationAttribution(FeatureAblation(own), tokenizer)
    found = attribution.attribute(inp, " golf")
    torch.testing.assert_close(found.full_attr, truth.full_attr, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"no `generate`: give the `target` .*`model\.inner`"):
        attribution.attribute(inp)
    parallel = GenerationAttribution(FeatureAblation(nn.DataParallel(tiny.llama())), tokenizer)
    with pytest.raises(ValueError, match=r"DataParallel has no `generate`.*`model\.module`"):
        parallel.attribute(inp)
    assert parallel.attribute(inp, " golf").provenance["batching"] is None


def blip_2():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**small, "image_size": 28, "patch_size": 14},
        qformer_config={**small, "encoder_hidden_size": 16, "vocab_size": 50},
        text_config={**_COMMON, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
        num_query_tokens=2,
    )
    return transformers.Blip2ForConditionalGeneration(config)


def on_meta():
    with torch.device("meta"):
        return tiny.llama()


def _pipeline(tokenizer):
    return transformers.TextGenerationPipeline(model=tiny.llama(), tokenizer=tokenizer)


class OfClasses(nn.Module):
    """One row of logits for a whole text."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids):
        return argparse.Namespace(logits=torch.zeros(len(input_ids), 400))


REFUSED = {
    "a pipeline": (_pipeline, r"give its `\.model`, a LlamaForCausalLM"),
    "no weights": (lambda _: on_meta(), "on the `meta` device"),
    "no head": (lambda _: tiny.llama().model, "load it as `LlamaForCausalLM`"),
    "no head, wrapped": (
        lambda _: Changed(lambda x, _: x, Hidden(tiny.llama().model)),
        "these are no logits",
    ),
    "blip 2 without an image": (lambda _: blip_2(), r"give `model\.language_model`"),
    "classes": (lambda _: OfClasses(), r"shape \(1, 400\) without `logits`"),
}


class Hidden(nn.Module):
    """Gives vectors where logits should be."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, use_cache=False):
        return argparse.Namespace(logits=self.inner(input_ids=input_ids).last_hidden_state)


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_next_token_logits_are_refused(name, tokenizer):
    make, message = REFUSED[name]
    method, inp = (
        FeatureAblation(make(tokenizer)),
        TextSegmentInput(TEXT, tokenizer, "word", baselines="delete"),
    )
    with pytest.raises(TypeError, match=message):
        GenerationAttribution(method, tokenizer).attribute(inp, " golf and")


def test_probe_runs_once_per_unchanged_model():
    model = Changed(lambda x, _: x)
    model.ahead = 0.0
    model.change = lambda x, ids: x + model.ahead * next_of()(torch.zeros_like(x), ids)
    rows, target = rows_of()

    def passes():
        before = model.n_passes
        scorer = Scorer(model)
        scorer.values(rows, target)
        return model.n_passes - before, scorer.findings

    first, _ = passes()
    second, found = passes()
    assert second < first
    assert not found.sees_ahead
    third, _ = passes()
    assert third == second
    with torch.no_grad():
        model.inner.lm_head.weight.mul_(1.1)  # in place
    assert passes()[0] == first
    model.inner.double()
    assert passes()[0] == first
    model.inner.config.sliding_window = 8
    assert passes()[0] == first
    assert passes()[0] == second
    model.ahead = 1.0  # a switch of the module's own
    assert passes()[1].sees_ahead
    model.ahead, model.config = 0.0, SimpleNamespace(ahead=0.0)  # … or of its configuration
    model.change = lambda x, ids: x + model.config.ahead * next_of()(torch.zeros_like(x), ids)
    assert not passes()[1].sees_ahead
    model.config.ahead = 1.0
    assert passes()[1].sees_ahead
    model.config.ahead = 0.0
    longer = [TokenRow((*row.ids, 7, 8), row.positions) for row in rows]
    model.ahead = 0.0
    passes()
    before = model.n_passes
    with exclusive_use(model):
        assert findings(model, longer).longest > len(longer[0].ids)
        assert (after := model.n_passes) > before
        still = [TokenRow((*row.ids, 9), row.positions) for row in longer]
        findings(model, still)  # rows that grow are looked at ahead
    assert model.n_passes == after


@pytest.mark.parametrize("place", range(6))
def test_hook_that_sees_ahead_is_detected_in_packs(place):
    """Only at one place of the target, in a model that would read packs rightly."""
    rows, target = rows_of(n_target=8)
    model, seen = tiny.llama(), rows[0].ids[14 + place]

    def hook(module, args, kwargs, output):
        output.logits = next_of([seen])(output.logits, kwargs["input_ids"])
        return output

    assert packs_of(model, rows, target)
    model.register_forward_hook(hook, with_kwargs=True)
    scorer = Scorer(model, overhead=0)
    values = scorer.values(rows, target)
    assert scorer.findings.sees_ahead
    truth = step_by_step(lambda ids: model(input_ids=ids), rows, target)
    assert float((values - truth).abs().max()) < 1e-5


def changed(change):
    """A model whose last hidden states a hook changes, by the ids of the pass."""
    model, given = tiny.llama(), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs.get("input_ids", *args)), with_kwargs=True
    )
    model.model.norm.register_forward_hook(lambda _, args, hidden: change(hidden, given[-1]))
    return model


def sees_more(distance):
    """A mask with which one token sees another that comes so much later."""

    def see(module, args, kwargs):
        n = kwargs["hidden_states"].shape[1]
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        seen[17 : 18 if n > 17 + distance else 17, 17 + distance :][:, :1] = True
        return args, kwargs | {"attention_mask": seen[None, None]}

    model = tiny.llama()
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(see, with_kwargs=True)
    return model


def at_one_token(change):
    seen = rows_of(n_target=8)[0][0].ids[17]
    return lambda h, ids: torch.where((ids == seen)[..., None], change(h), h)


# What they do at one token of the target, in packs as elsewhere, or in batches of some sizes alone.
AT_FEW_PLACES = {
    "the last state": lambda: changed(at_one_token(lambda h: h + 0.5 * h[:, -1:])),
    "the mean": lambda: changed(at_one_token(lambda h: h + h.mean(1, keepdim=True))),
    "the third state after": lambda: changed(at_one_token(lambda h: h + 0.5 * h.roll(-3, 1))),
    "places from the end": lambda: changed(
        at_one_token(lambda h: h * (1 + 0.1 * torch.arange(h.shape[1]).flip(0)[:, None]))
    ),
    "a vector at the last place": lambda: changed(
        lambda h, _: torch.cat([h[:, :-1], h[:, -1:].flip(2)], 1)
    ),
    "a mask": lambda: sees_more(2),
    "lengths modulo 3": lambda: changed(lambda h, _: h * (1 + 0.1 * (h.shape[1] % 3 == 0))),
    "many rows, not at their beginning": lambda: changed(
        lambda h, _: torch.cat([h[:, :5], h[:, 5:] + 0.3 * h[:1, 5:] * (len(h) > 12)], 1)
    ),
    "many tokens": lambda: changed(
        lambda h, _: h + 0.3 * h.mean((0, 1)) if len(h) > 1 and h[..., 0].numel() > 100 else h
    ),
}


@pytest.mark.parametrize("reuse", ["auto", "pack"])
@pytest.mark.parametrize("name", AT_FEW_PLACES)
def test_look_ahead_at_few_positions_is_detected(name, reuse):
    model = AT_FEW_PLACES[name]()
    rows, target = rows_of(n_target=8)
    for some in (rows, [row for row in rows if len(row.ids) == len(rows[0].ids)]):
        scorer = Scorer(model, overhead=0, reuse=reuse)
        values = scorer.values(some, target)
        truth = step_by_step(lambda ids: model(input_ids=ids), some, target)
        assert float((values - truth).abs().max()) < 1e-5
        # What it does in batches alone is nothing to packs, which have one row.
        seen = scorer.findings.sees_ahead or scorer.findings.couples_rows
        assert seen or (scorer.uses_packing and name.startswith("many"))
        scorer = Scorer(model, overhead=0, reuse="off")
        assert float((scorer.values(some, target) - truth).abs().max()) < 1e-5
        assert scorer.findings.sees_ahead or scorer.findings.couples_rows


def if_later(one, other):
    """At one id hidden states are others if another comes later, wherever."""

    def change(h, ids):
        n_later = (ids == other).flip(1).cumsum(1).flip(1)
        return torch.where(((ids == one) & (n_later > 0))[..., None], h * 1.4 + h.roll(1, -1), h)

    return change


@pytest.mark.parametrize("distance", [1, 3])
def test_look_ahead_at_any_distance_is_detected(distance):
    rows, target = rows_of(n_target=8)
    ids = rows[0].ids
    for place in range(13, len(ids) - distance):
        model = changed(if_later(ids[place], ids[place + distance]))
        scorer = Scorer(model, overhead=0)
        values = scorer.values(rows, target)
        truth = step_by_step(lambda x, model=model: model(input_ids=x), rows, target)
        assert scorer.findings.sees_ahead
        assert float((values - truth).abs().max()) < 1e-5


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_look_ahead_at_any_distance_is_detected_without_packs(distance):
    rows, target = rows_of(n_target=8)
    ids = rows[0].ids
    for place in range(13, len(ids) - distance):
        model = Changed(later_makes_likelier(ids[place], ids[place + distance]))
        scorer = Scorer(model, overhead=0)
        values = scorer.values(rows, target)
        assert scorer.findings.sees_ahead
        assert float((values - step_by_step(model, rows, target)).abs().max()) < 1e-5


def later_makes_likelier(one, other):
    """At one id logits are larger if another comes later, wherever."""

    def change(logits, ids):
        comes = (ids == other).flip(1).cumsum(1).flip(1) > 0
        return torch.where(((ids == one) & comes)[..., None], logits * 1.4, logits)

    return change


def test_look_ahead_missed_by_the_probe_is_detected_in_the_run():
    """Of many target tokens not every one is looked at; rows that begin alike must agree."""
    draw = random.Random(0)
    ids = draw.sample(range(4, 390), 68)
    prompt, target = ids[:8], torch.tensor(ids[8:])
    whole, places = [*prompt, *ids[8:-1]], range(7, 67)
    rows = [TokenRow((*whole[:j], 3, *whole[j + 1 :]), places) for j in range(8, 67)]
    rows = [TokenRow(tuple(whole), places), *rows]
    for place in range(20, 60, 8):
        model = Changed(later_makes_likelier(ids[place], ids[place + 1]))
        scorer = Scorer(model)
        values = scorer.values(rows, target)
        assert scorer.findings.sees_ahead
        truth = step_by_step(model, rows[:1], target)
        assert float((values[:1] - truth).abs().max()) < 1e-5
        scorer = Scorer(model)  # and it is known of the model from now on
        scorer.values(rows[:1], target)
        assert scorer.findings.sees_ahead


def test_probe_compares_batches_where_packs_do_not_pay():
    model = AT_FEW_PLACES["many rows, not at their beginning"]()
    rows, target = rows_of(n_target=8)
    packs = Scorer(model, overhead=0, reuse="pack")
    packs.values(rows, target)
    assert not packs.findings.batches_known
    batches = Scorer(model, overhead=10**6)  # a row more in a pack costs too much
    values = batches.values(rows, target)
    assert not batches.uses_packing
    assert batches.findings.couples_rows
    truth = step_by_step(lambda ids: model(input_ids=ids), rows, target)
    assert float((values - truth).abs().max()) < 1e-5


def packs_of(model, rows, target):
    scorer = Scorer(model, overhead=0, reuse="pack")
    scorer.values(rows, target)
    return scorer.uses_packing


def test_packing_findings_are_kept_with_the_model():
    model = tiny.llama()
    rows, target = rows_of()
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = []
    for _ in range(2):
        before = len(passes)
        scorer = Scorer(model, overhead=0, reuse="pack")
        found.append(scorer.values(rows, target))
        assert scorer.uses_packing
    assert len(passes) - before == 1
    assert torch.equal(*found)


def test_findings_are_freed_with_the_model():
    model = tiny.llama()
    with exclusive_use(model):
        findings(model, rows_of()[0])
    n = len(looking._known)
    del model
    assert len(looking._known) == n - 1


LENGTHS = {
    "a threshold": lambda x, ids: x * (1 + 0.5 * (ids.shape[1] > 18)),
    "odd and even": lambda x, ids: x * (1 + 0.1 * (ids.shape[1] % 2)),
    "places counted from the end": lambda x, ids: (
        x * (1 + 0.02 * torch.arange(ids.shape[1]).flip(0)[None, :, None])
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.filterwarnings("ignore:Changed gives equal rows values up to")  # of bfloat16
def test_dependence_on_length_counts_as_seeing_ahead(name, dtype):
    model = Changed(LENGTHS[name], tiny.llama().to(dtype))
    rows, target = rows_of()
    scorer = Scorer(model)
    values = scorer.values(rows, target)
    apart = float((values - step_by_step(model, rows, target)).abs().max())
    if dtype == torch.float32:
        assert scorer.findings.sees_ahead
        assert apart < 1e-5
    else:  # where neighbouring lengths differ as much, it is told as rounding
        assert apart <= float(scorer.noise_floor(rows[0], target).max())


def test_length_dependent_models_get_unmixed_lengths():
    model = Changed(lambda x, ids: x * (1 + 0.5 * (ids.shape[1] > 12)))
    rows, target = rows_of()
    short = TokenRow(rows[0].ids[10:], range(3, 9))
    scorer = Scorer(model)
    values = scorer.values([*rows, short], target)
    assert scorer.findings.mixes_lengths
    truth = step_by_step(model, [*rows, short], target)
    assert float((values - truth).abs().max()) < 1e-5


BY_ROWS = ("the mean of the batch", "the number of rows", "more than two rows")
BY_ROWS += ("more than twelve rows",)


@pytest.mark.parametrize("name", BY_ROWS)
@pytest.mark.parametrize("n_prompt", [14, 40])
def test_coupled_rows_are_detected_in_sixteen_bits(name, n_prompt):
    """Passes of one number of rows say nothing of what that number does."""
    model = COUPLED[name]().bfloat16()
    with exclusive_use(model):
        found = findings(model, rows_of(n_prompt)[0])
    assert found.couples_rows
    assert not found.sees_ahead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_coupling_is_detected_with_last_logits_only(dtype):
    model = Changed(lambda x, _: x[:, -1:] * (1 + 0.1 * (len(x) > 1)), tiny.llama().to(dtype))
    with exclusive_use(model):
        found = findings(model, rows_of()[0])
    assert found.last_only
    assert found.couples_rows


@pytest.mark.parametrize(
    "name",
    ["lfm 2, convolution hybrid", "falcon-h1, recurrent hybrid", "granite 4, recurrent hybrid"],
)
def test_probe_cost_in_sixteen_bits_without_packs(name):
    """Passes of one shape tell rounding from an effect: rows are read some seven times in all."""
    model = build(name, dtype=torch.bfloat16)
    n_ids: list[int] = []
    model.register_forward_pre_hook(
        lambda _m, args, given: n_ids.append((args[0] if args else given["input_ids"]).numel()),
        with_kwargs=True,
    )
    rows, _ = rows_of(80, 30)
    with exclusive_use(model):
        found = Scorer(model)._probe(rows)
    assert found.batches_known
    assert found.is_rough
    assert found.batching is None
    assert sum(n_ids) < 8 * max(len(row.ids) for row in rows)


def test_rounding_is_not_taken_for_coupling_or_look_ahead():
    for name in ("llama", "qwen 3, mixture of experts", "mamba 2"):
        model = build(name, dtype=torch.bfloat16)
        with exclusive_use(model):
            found = findings(model, rows_of()[0])
        assert not found.sees_ahead
        assert not found.couples_rows
        assert not found.mixes_lengths
        assert found.is_rough


def rounds_activations(model, by_token=True):
    """What enters each layer is rounded to eight bits, by the largest number of a token."""

    def rounded(_, args):
        largest = args[0].abs().amax(-1, keepdim=True) if by_token else args[0].abs().amax()
        return ((args[0] / (largest / 127)).round() * (largest / 127),)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(rounded)
    return model


def rounds_all_alike(model):
    """The same by the largest number of a tensor."""
    return rounds_activations(model, by_token=False)


def rounds_what_comes_out(model):
    def rounded(_, args, x):
        scale = x.abs().amax(-1, keepdim=True) / 7
        return (x / scale).round() * scale

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(rounded)
    return model


def computes_in(dtype):
    def make(model):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, args: (args[0].to(dtype).float(),))
        return model

    return make


JUMPING = {
    "eight bits, by token": rounds_activations,
    "eight bits, by tensor": rounds_all_alike,
    "four bits, of what comes out": rounds_what_comes_out,
    "bfloat16 within": computes_in(torch.bfloat16),
    "float8 within": computes_in(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize("name", JUMPING)
@pytest.mark.filterwarnings("ignore:.* last digits, which every batch has its own of")
def test_discontinuous_models_have_a_noise_floor(name, seed):
    """Whether or not a digit has fallen to the other side in the passes of this run."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.15}
    model = JUMPING[name](tiny.llama(seed=seed, **sizes))
    rows, target = rows_of(seed=seed)
    scorers = [Scorer(model, max_rows=n) for n in (None, 1)]
    values = [scorer.values(rows, target) for scorer in scorers]
    truth = step_by_step(lambda ids: model(ids).logits, rows, target)
    assert scorers[0].findings.jumps > 0 or scorers[0].findings.couples_rows
    floor = scorers[0].noise_floor(rows[0], target)
    apart = torch.stack([*values, truth])
    assert bool(((apart.amax(0) - apart.amin(0)).amax(0) <= floor.clamp(min=1e-5)).all())


@pytest.mark.parametrize("seed", [2, 15])
@pytest.mark.parametrize("make", [lambda model: model, rounds_activations])
def test_sixteen_bits_have_a_noise_floor_with_equal_batches(make, seed):
    """With eight bits within, few values differ from batch to batch, but far.

    Rows that run one by one show nothing of batches at all.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.15}
    model = make(tiny.llama(seed=seed, **sizes)).bfloat16()
    rows, target = rows_of(seed=seed)
    truth = step_by_step(lambda ids: model(ids).logits, rows, target)
    floors = []
    for max_rows in (None, 1):
        scorer = Scorer(model, max_rows=max_rows)
        apart = (scorer.values(rows, target) - truth).abs().amax(0)
        floors.append(scorer.noise_floor(rows[0], target))
        assert float(apart.max()) > 0
        assert bool((apart <= floors[-1]).all())


def test_a_share_of_the_numbers_is_rounded_otherwise():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48).bfloat16(), torch.randn(3, 200, 64).bfloat16()
    with torch.no_grad():
        plain = layer(x)
        with rounded_otherwise(layer, share=1 / 32):
            moved = layer(x)
        assert torch.equal(layer(x), plain)
    assert moved.shape == plain.shape
    # About half of the draws round to the same number.
    assert 1 / 128 < float((moved != plain).double().mean()) < 1.1 / 32
    digit = torch.finfo(torch.bfloat16).eps
    assert bool(((moved - plain).abs() <= digit * plain.abs()).all())


class RoundsWithin(nn.Module):
    """Sums what it has read, in eight bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mixed = nn.Embedding(400, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 400)

    def forward(self, input_ids):
        x = self.mixed(self.embedding(input_ids).cumsum(1))
        step = x.abs().amax(-1, keepdim=True) / 127
        return self.head((x / step).round() * step)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.filterwarnings("ignore:.* last digits, which every batch has its own of")
def test_discontinuities_are_detected_in_compiled_models(how):
    """Its code goes past what is put on modules later, and must not keep it."""
    model = RoundsWithin().eval()
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    rows, target = rows_of()
    ids = torch.tensor([rows[0].ids])
    with torch.no_grad():
        plain = model(ids)
    scorer = Scorer(model)
    scorer.values(rows, target)
    assert scorer.findings.jumps
    assert scorer.noise_floor(rows[0], target) is not None
    with torch.no_grad():
        assert torch.equal(model(ids), plain)
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("name", ["llama", "qwen 3, mixture of experts", "mamba 2", "gemma 2"])
def test_continuous_models_have_no_noise_floor(name):
    model = build(next(one for one in CONFIGS if one.startswith(name)))
    rows, target = rows_of()
    scorer = Scorer(model)
    scorer.values(rows, target)
    assert scorer.findings.jumps == 0
    assert scorer.noise_floor(rows[0], target) is None


def test_probe_passes_in_sixteen_bits_equal_those_in_float32():
    """Packs show what follows, moved digits how far rounding goes; other rows are never met."""
    passes = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.llama().to(dtype)
        seen = []
        model.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        rows, _ = rows_of()
        scorer = Scorer(model, overhead=0, reuse="pack")
        with exclusive_use(model):
            found = scorer._probe(rows)
        assert not found.batches_known
        assert not found.couples_rows
        passes.append(len(seen))
    assert passes[1] <= passes[0] <= 6


@torch.no_grad()
def test_perturbed_last_digits_reveal_low_bit_rounding():
    """A jump where a number was near the middle; elsewhere float32 moves by its own digits."""
    ids = torch.tensor([row.ids for row in rows_of()[0] if len(row.ids) == 19])
    apart = []
    sizes = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.15}
    for changed in (rounds_activations, lambda model: model):
        model = changed(tiny.llama(num_key_value_heads=4, **sizes))
        plain = model(ids).logits.log_softmax(-1)
        with rounded_otherwise(model, singles=2.4e-7):
            moved = model(ids).logits.log_softmax(-1)
        apart.append(float((moved - plain).abs().max()))
        assert torch.equal(model(ids).logits.log_softmax(-1), plain)
    assert apart[0] > 1e-3
    assert apart[1] < 1e-4


def with_dropout(model):
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, x: nn.functional.dropout(x, 0.1, True))
    return model


def with_noise(model):
    model.model.norm.register_forward_hook(lambda _, args, x: x + 0.05 * torch.randn_like(x))
    return model


def leaves_out(draw):
    """Each layer left out in one pass of ten: most passes are equal, some are far away."""

    def make(model):
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _, args, x: args[0] if draw() < 0.1 else x)
        return model

    return make


def with_generator_of_its_own(model):
    own = torch.Generator().manual_seed(0)
    return leaves_out(lambda: torch.rand((), generator=own))(model)


DRAWING = {
    "dropout": with_dropout,
    "noise": with_noise,
    "layers by torch": leaves_out(lambda: torch.rand(())),
    "layers by python": leaves_out(lambda: random.random()),
    "layers by numpy": leaves_out(lambda: numpy.random.rand()),
    "layers by a generator of its own": with_generator_of_its_own,
}
SEEDED = ("dropout", "noise", "layers by torch")


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.* draws at random in every pass")
def test_stochastic_models_are_detected_seeded_and_reported(name, dtype):
    model = DRAWING[name](tiny.llama().to(dtype))
    rows, target = rows_of()
    random.seed(0)
    numpy.random.seed(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        scorers = [Scorer(model, max_rows=n) for n in (None, 1, 3)]
        values = [scorer.values(rows, target) for scorer in scorers]
        for scorer in scorers:
            assert scorer.findings.draws
            assert scorer.findings.seeds == (name in SEEDED)
            assert "draws at random" in scorer.findings.batching
        if name in SEEDED:  # whatever the batches, and whatever was drawn before
            assert torch.equal(values[0], values[1])
            assert torch.equal(values[0], values[2])
        # A plain forward draws anew for every token.
        again = [step_by_step(lambda x: model(x).logits, rows, target) for _ in range(2)]
        values = torch.stack([*values, *again])
        apart = (values.amax(0) - values.amin(0)).amax(0)
        for scorer in scorers[:1]:
            assert bool((apart <= scorer.noise_floor(rows[0], target)).all())


def test_stochastic_models_and_other_threads_keep_global_generators_apart():
    """Once it is known; and beside another thread that draws, nothing is taken for drawing."""
    model = with_dropout(tiny.llama())
    rows, target = rows_of()
    with torch.random.fork_rng([]):
        Scorer(model).values(rows[:3], target)
        torch.manual_seed(0)
        before = torch.get_rng_state()
        Scorer(model).values(rows[:3], target)
        assert torch.equal(before, torch.get_rng_state())
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(8)
            random.random()

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        scorer = Scorer(tiny.llama())
        scorer.values(rows[:3], target)
    finally:
        stop.set()
        thread.join()
    assert not scorer.findings.draws


RNG = numpy.random.default_rng(0)


def helper():
    return RNG.random()


def of_a_closure(model):
    own = {"all": [numpy.random.default_rng(0)]}

    def draw():
        return own["all"][0].random()

    return leaves_out(draw)(model)


def of_a_default(model):
    own = numpy.random.RandomState(0)
    return leaves_out(lambda rng=own: rng.rand())(model)


def of_a_partial(model):
    return leaves_out(partial(lambda rng: rng.random(), random.Random(0)))(model)


def of_bits(model):
    bits = numpy.random.PCG64(0)
    return leaves_out(lambda: bits.random_raw() / 2**64)(model)


class Drawing(nn.Module):
    own = numpy.random.default_rng(0)

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if self.own.random() > 0.1 else x


def of_a_class(model):
    for layer in model.model.layers:
        layer.mlp = Drawing(layer.mlp)
    return model


HIDDEN = {
    "a closure": of_a_closure,
    "a variable beside": leaves_out(lambda: RNG.random()),
    "a function's": leaves_out(lambda: helper()),
    "a default": of_a_default,
    "a partial function": of_a_partial,
    "bits": of_bits,
    "a class": of_a_class,
}


@pytest.mark.parametrize("name", HIDDEN)
def test_model_generators_are_found(name):
    """Most passes agree: it is not by what these say that the model is seen to draw."""
    model = HIDDEN[name](tiny.llama())
    with exclusive_use(model):
        found = findings(model, rows_of()[0][:2])
    assert found.draws == "free"
    assert found.apart


@pytest.mark.filterwarnings("error")
def test_unused_generator_does_not_count():
    model = tiny.llama()
    rng = numpy.random.default_rng(0)
    model.model.norm.register_forward_hook(lambda _, args, x: x if rng is not None else None)
    with exclusive_use(model):
        assert findings(model, rows_of()[0][:2]).draws is None


def test_late_randomness_warns_once_in_the_run():
    model = tiny.llama()
    draws = False

    def noisy(_, args, x):
        return x * (1 + 0.5 * random.SystemRandom().random()) if draws else x

    model.model.norm.register_forward_hook(noisy)
    rows, target = rows_of()
    scorer = Scorer(model, overhead=0, reuse="pack")
    scorer.values(rows, target)
    assert not scorer.findings.draws
    draws = True  # from here on, as what it does seldom may
    with pytest.warns(UserWarning, match="pass by pass") as told:
        floor = scorer.noise_floor(rows[0], target)
    assert len(told) == 1
    assert float(floor.max()) > 0.1
    assert scorer.provenance()["probe"]["draws"] == "unseen"
    again = Scorer(model)  # it is known from then on
    again.values(rows[:2], target)
    assert again.findings.draws == "unseen"


def seeds_itself(model):
    def noise(_, args, x):
        generator = torch.Generator().manual_seed(3)
        return x + 0.1 * torch.randn(x.shape[-1:], generator=generator)

    model.model.norm.register_forward_hook(noise)
    return model


def sometimes_off(model):
    model.model.norm.register_forward_hook(lambda _, args, x: nn.functional.dropout(x, 0.1, False))
    return model


@pytest.mark.parametrize("make", [seeds_itself, sometimes_off])
def test_repeatable_random_functions_are_not_stochastic(make):
    model = make(tiny.llama())
    rows, target = rows_of()
    scorer = Scorer(model)
    values = scorer.values(rows, target)
    assert not scorer.findings.draws
    truth = step_by_step(lambda x: model(x).logits, rows, target)
    assert float((values - truth).abs().max()) < 1e-5


@pytest.mark.filterwarnings("ignore:.* draws at random in every pass|.* steps are too few")
def test_attributions_of_stochastic_models_are_reproducible(tokenizer):
    inp = TextSegmentInput(TEXT, tokenizer, "word", baselines="delete")
    model = leaves_out(lambda: torch.rand(()))(tiny.llama())
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    found = [attribution.attribute(inp, " golf", perturbations_per_eval=n) for n in (1, None)]
    assert torch.equal(found[0].full_attr, found[1].full_attr)
    assert found[0].noise_floor is not None
    method = LayerIntegratedGradients(model, model.get_input_embeddings())
    by_gradient = [
        GenerationGradientAttribution(method, tokenizer).attribute(inp, " golf", n_steps=16)
        for _ in range(2)
    ]
    assert torch.equal(by_gradient[0].full_attr, by_gradient[1].full_attr)
    assert by_gradient[0].provenance["probe"]["draws"]
