"""Gradients are those of plain loops, of captum with the output held fixed, and of closed forms."""

import math

import architectures
import numpy as np
import pytest
import torch
from captum.attr import (
    GradientShap,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMGradientAttribution,
    TextTokenInput,
)
from torch import nn

from captum_llm_ext import GenerationGradientAttribution, TextSegmentInput

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer."
TARGET = " golf and chess."
UNK = 3
TOO_FEW = pytest.mark.filterwarnings("ignore:.*steps are too few:UserWarning")


def attributed(model, tokenizer, inp, target=TARGET, **given):
    """One call of `attribute`; `kind`, `layer` and the like are for the constructors before it."""
    kind, layer = given.pop("kind", LayerIntegratedGradients), given.pop("layer", None)
    what = {name: given.pop(name) for name in ("attr_target",) if name in given}
    own = {name: given.pop(name) for name in ("multiply_by_inputs",) if name in given}
    attribution = GenerationGradientAttribution(kind(model, layer, **own), tokenizer, **what)
    return attribution.attribute(inp, target, **given)


def embedded(model, ids):
    return model.get_input_embeddings()(torch.tensor([ids])).detach()


def log_prob(logits, token):
    return logits.log_softmax(-1)[..., token]


def loop(model, present, absent, target, start, *, n_steps=6, value=log_prob):
    """Integrated gradients by their definition: a pass and a way back per token and step.

    Args:
        model: Its `inputs_embeds` are interpolated.
        present, absent: Embeddings ``(1, length, size)`` of prompt and target; or per target token.
        target: Ids.
        start: Ids of the prompt.
        n_steps: Of Gauss-Legendre.
        value: From logits and a token to its value.
    """
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)
    found = torch.zeros(len(target), start + len(target) - 1, dtype=torch.float64)
    for t, token in enumerate(target):
        length = start + t
        end = present[:, :length]
        begin = (absent[t] if isinstance(absent, list) else absent)[:, :length]
        for node, weight in zip(nodes, weights, strict=True):
            point = (begin + (node + 1) / 2 * (end - begin)).requires_grad_()
            logits = model(inputs_embeds=point, use_cache=False).logits[0, -1]
            (slope,) = torch.autograd.grad(value(logits, token), point)
            found[t, :length] += (weight / 2 * slope * (end - begin)).sum(-1)[0]
    return found


def ends(model, tokenizer, target=TARGET, absent=UNK):
    """Ids, embeddings of everything and of everything but BOS replaced by one id."""
    prompt = tokenizer.encode(PROMPT)
    target = tokenizer.encode(target, add_special_tokens=False)
    ids = [*prompt, *target[:-1]]
    return prompt, target, embedded(model, ids), embedded(model, [ids[0]] + [absent] * len(ids[1:]))


LAYERS = {
    "embedding": lambda model: model.model.embed_tokens,
    "decoder layer": lambda model: model.model.layers[0],
    "MLP": lambda model: model.model.layers[1].mlp,
}


@TOO_FEW
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("skip", [None, ["<s>"]])
@pytest.mark.parametrize(
    ("method", "given"),
    [
        (LayerIntegratedGradients, {"n_steps": 9}),
        (LayerIntegratedGradients, {"n_steps": 6, "method": "riemann_trapezoid"}),
        (LayerGradientXActivation, {}),
    ],
)
def test_fixed_output_equals_captum(model, tokenizer, method, given, skip, layer):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK, skip_tokens=skip)
    module = LAYERS[layer](model)
    captums = LLMGradientAttribution(method(model, module), tokenizer)
    expected = captums.attribute(inp, TARGET, **given)
    found = attributed(model, tokenizer, inp, kind=method, layer=module, output_unit=None, **given)
    # float32, in other batches; attributions are up to 5
    assert (found.token_attr - expected.token_attr).abs().max() < 1e-5
    assert (found.seq_attr - expected.seq_attr).abs().max() < 3e-5
    assert found.input_tokens == expected.input_tokens
    assert found.output_attr is None


@TOO_FEW
@pytest.mark.parametrize("method", [LayerIntegratedGradients, LayerGradientXActivation])
def test_gradient_x_activation_equals_captum(model, tokenizer, method):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    layer = model.model.embed_tokens
    arguments = {"layer": layer, "multiply_by_inputs": False, "output_unit": None}
    captums = method(model, layer, multiply_by_inputs=False)
    expected = LLMGradientAttribution(captums, tokenizer).attribute(inp, TARGET)
    found = attributed(model, tokenizer, inp, kind=method, **arguments)
    scale = expected.token_attr.abs().max()
    assert (found.token_attr - expected.token_attr).abs().max() < 1e-5 * scale


@TOO_FEW
def test_mask_baselines_equal_captum(model, tokenizer):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    mask = torch.ones(1, inp.n_itp_features, dtype=torch.long)
    mask[:, 3:7] = 0
    layer = model.model.embed_tokens
    captums = LLMGradientAttribution(LayerIntegratedGradients(model, layer), tokenizer)
    expected = captums.attribute(inp, TARGET, baselines=mask, n_steps=5)
    found = attributed(model, tokenizer, inp, output_unit=None, baselines=mask, n_steps=5)
    assert (found.token_attr - expected.token_attr).abs().max() < 1e-5
    assert (found.token_attr[:, mask[0] == 1] == 0).all()


@TOO_FEW
@pytest.mark.parametrize("rows", [None, 1, 4])
def test_prompt_and_output_attributions_equal_a_plain_loop(smooth, tokenizer, rows):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK, skip_tokens=["<s>"])
    prompt, target, present, absent = ends(smooth, tokenizer)
    expected = loop(smooth, present, absent, target, len(prompt))
    found = attributed(smooth, tokenizer, inp, n_steps=6, internal_batch_size=rows)
    assert torch.allclose(found.token_attr, expected[:, 1 : len(prompt)], atol=1e-9)
    assert torch.allclose(found.output_attr[:, :-1], expected[:, len(prompt) :], atol=1e-9)
    assert (found.output_attr[:, -1] == 0).all()
    assert found.output_attr.abs().max() > 0.1
    with torch.no_grad():
        for values, vectors in ((found.full_values, present), (found.empty_values, absent)):
            logits = smooth(inputs_embeds=vectors).logits[0, len(prompt) - 1 :]
            truth = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0]
            assert torch.allclose(values, truth, atol=1e-9)


@TOO_FEW
def test_begun_output_word_stays_present_for_its_tokens(smooth, tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="<unk>")
    prompt, target, present, absent = ends(smooth, tokenizer)
    found = attributed(smooth, tokenizer, inp, output_unit="word", n_steps=6)
    words = [piece.feature for piece in found.output_pieces]
    assert max(words.count(word) for word in words) > 1  # there is something to see
    own = []
    for t, word in enumerate(words):
        held = absent.clone()
        for place in range(t):
            if words[place] == word:
                held[:, len(prompt) + place] = present[:, len(prompt) + place]
        own.append(held)
    each = loop(smooth, present, own, target, len(prompt))
    for t, word in enumerate(words):
        for other in range(max(words) + 1):
            members = [len(prompt) + p for p in range(t) if words[p] == other]
            wanted = float(each[t, members].sum()) if other != word else 0.0
            assert float(found.output_attr[t, other]) == pytest.approx(wanted, abs=1e-9)
            if other >= word:
                assert found.output_attr[t, other] == 0
    for feature, slot in enumerate(inp.slots):
        assert len(slot.ids) == len(inp.places()[feature].positions)
        positions = list(inp.places()[feature].positions)
        assert torch.allclose(found.token_attr[:, feature], each[:, positions].sum(1), atol=1e-9)


@TOO_FEW
def test_attributions_are_complete(smooth, tokenizer):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK, skip_tokens=["<s>"])
    gaps = []
    for n_steps in (5, 10, 20, 50):
        found = attributed(smooth, tokenizer, inp, n_steps=n_steps)
        sums = found.token_attr.sum(1) + found.output_attr.sum(1)
        assert torch.allclose(
            found.efficiency_gap, found.full_values - found.empty_values - sums, atol=1e-12
        )
        gaps.append(float(found.efficiency_gap.abs().max()))
    assert gaps[-1] < 1e-3  # nats
    assert gaps[3] < gaps[2] < gaps[1] < gaps[0]


def test_gradient_x_activation_equals_a_finite_difference(tokenizer):
    # Llama's norms are in float32 whatever the weights are, which differences do not forgive.
    model = architectures.build("gpt2", dtype=torch.float64)
    inp = TextTokenInput(PROMPT, tokenizer, skip_tokens=["<s>"])
    prompt, target, present, _ = ends(model, tokenizer)
    found = attributed(model, tokenizer, inp, kind=LayerGradientXActivation)
    everything = torch.cat([found.token_attr, found.output_attr[:, :-1]], dim=1)
    step = 1e-4

    def values(vectors):
        logits = model(inputs_embeds=vectors).logits[0, len(prompt) - 1 :]
        return logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0]

    with torch.no_grad():
        for place in range(1, present.shape[1]):
            up, down = present.clone(), present.clone()
            up[:, place] *= 1 + step
            down[:, place] *= 1 - step
            slope = (values(up) - values(down)) / (2 * step)
            assert torch.allclose(everything[:, place - 1], slope, atol=1e-6)
        nothing = present.clone()
        nothing[:, 1:] = 0
        assert torch.allclose(found.empty_values, values(nothing), atol=1e-9)


class Additive(nn.Module):
    """Logits that are a weighted sum of all embeddings up to a place: gradients are known."""

    def __init__(self, vocabulary, size=6):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Embedding(vocabulary, size)
        weight = torch.randn(vocabulary, size, generator=generator)
        self.embedding.weight = nn.Parameter(weight.double())
        self.mixing = nn.Parameter(torch.randn(64, size, size, generator=generator).double())

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        vectors = self.embedding(input_ids)
        mixed = torch.einsum("blx,lxy->bly", vectors, self.mixing[: input_ids.shape[1]])
        return type("Output", (), {"logits": mixed.cumsum(1) @ self.embedding.weight.T})()


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (LayerIntegratedGradients, {"n_steps": 1}),
        (LayerIntegratedGradients, {"n_steps": 2, "method": "riemann_left"}),
        (LayerGradientShap, {"n_samples": 3}),
    ],
)
def test_linear_models_are_exact(tokenizer, method, given):
    model = Additive(len(tokenizer))
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    found = attributed(model, tokenizer, inp, kind=method, attr_target="logit", **given)
    prompt = tokenizer.encode(PROMPT)
    ids = [*prompt, *found.target.tolist()[:-1]]
    weight = model.embedding.weight.detach()
    change = weight[ids] - weight[UNK]
    for t, token in enumerate(found.target.tolist()):
        each = torch.einsum("lx,lxy,y->l", change, model.mixing[: len(ids)].detach(), weight[token])
        assert torch.allclose(found.token_attr[t], each[: len(prompt)], atol=1e-9)
        assert torch.allclose(found.output_attr[t, :t], each[len(prompt) : len(prompt) + t])
        assert (found.output_attr[t, t:] == 0).all()
    assert found.efficiency_gap.abs().max() < 1e-9
    assert (found.token_attr_se < 1e-9).all()  # the gradient is the same everywhere


def test_expected_gradients_equal_captums_gradient_shap(smooth, tokenizer):
    """captum's `GradientShap` on the embeddings themselves, token by token."""
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK, skip_tokens=["<s>"])
    prompt, target, present, absent = ends(smooth, tokenizer, " golf")
    found = attributed(
        smooth, tokenizer, inp, " golf", kind=LayerGradientShap, n_samples=400, stdevs=0.02
    )
    np.random.seed(0)
    torch.manual_seed(0)
    for t, token in enumerate(target):
        length = len(prompt) + t

        def value(vectors, token=token):
            logits = smooth(inputs_embeds=vectors, use_cache=False).logits
            return logits[:, -1].log_softmax(-1)[:, token]

        expected = GradientShap(value).attribute(
            present[:, :length], absent[:, :length], n_samples=400, stdevs=0.02
        )
        expected = expected.sum(-1)[0, 1:]
        both = torch.cat([found.token_attr[t], found.output_attr[t, :t]])
        errors = torch.cat([found.token_attr_se[t], found.output_attr_se[t, :t]])
        # two estimates, each with this error; the largest of some twenty
        assert ((both - expected).abs() < 4 * math.sqrt(2) * errors).all()
        assert (errors > 0).all()
    mean = attributed(smooth, tokenizer, inp, " golf", n_steps=20)
    noiseless = attributed(smooth, tokenizer, inp, " golf", kind=LayerGradientShap, n_samples=400)
    apart = (noiseless.token_attr - mean.token_attr).abs()
    assert (apart < 4 * noiseless.token_attr_se).all()


def test_captum_evaluates_layer_gradient_shap_at_the_baseline(model, tokenizer):
    """Why our numbers are others: whoever mends captum finds out here."""
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    layer = model.model.embed_tokens
    absent = torch.zeros(1, inp.n_itp_features, dtype=torch.long)
    captums = LLMGradientAttribution(LayerGradientShap(model, layer), tokenizer)
    found = captums.attribute(inp, " a", baselines=absent, n_samples=3)
    prompt, target = tokenizer.encode(PROMPT), tokenizer.encode(" a", add_special_tokens=False)
    point = embedded(model, [UNK] * len(prompt)).requires_grad_()
    logits = model(inputs_embeds=point, use_cache=False).logits[0, -1]
    (slope,) = torch.autograd.grad(log_prob(logits, target[0]), point)
    at_baseline = (slope * (embedded(model, prompt) - point)).sum(-1).detach()
    assert torch.allclose(found.token_attr[:1], at_baseline, atol=1e-4)


def test_standard_errors_equal_the_spread_of_repeats(smooth, tokenizer):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    given = {"kind": LayerGradientShap, "n_samples": 12}
    runs = [attributed(smooth, tokenizer, inp, " golf", seed=s, **given) for s in range(24)]
    spread = torch.stack([run.full_attr for run in runs]).std(0)
    told = torch.stack([run.full_attr_se for run in runs]).pow(2).mean(0).sqrt()
    seen = told > 0
    # A spread of 24 runs is known to about 15 %; over all cells the ratio is near 1.
    assert (spread[seen] / told[seen]).log().mean().abs() < 0.1
    again = attributed(smooth, tokenizer, inp, " golf", seed=5, **given)
    assert torch.equal(again.token_attr, runs[5].token_attr)
    one = attributed(smooth, tokenizer, inp, " golf", kind=LayerGradientShap, n_samples=1)
    assert one.token_attr_se.isnan().all()


def contrast(logits, target):
    """How much a token is preferred to the one that is most likely beside it."""
    own = logits.gather(2, target.expand(len(logits), -1)[..., None])
    others = logits.scatter(2, target.expand(len(logits), -1)[..., None], -math.inf)
    return own[..., 0] - others.logsumexp(-1)


@TOO_FEW
@pytest.mark.parametrize(
    ("attr_target", "value"),
    [
        ("logit", lambda logits, token: logits[token]),
        ("prob", lambda logits, token: logits.softmax(-1)[token]),
        (contrast, lambda logits, token: (p := logits.softmax(-1)[token]).log() - (1 - p).log()),
    ],
)
def test_other_attr_targets_equal_a_plain_loop(smooth, tokenizer, attr_target, value):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK, skip_tokens=["<s>"])
    prompt, target, present, absent = ends(smooth, tokenizer)
    expected = loop(smooth, present, absent, target, len(prompt), value=value)
    found = attributed(smooth, tokenizer, inp, n_steps=6, attr_target=attr_target)
    assert torch.allclose(found.token_attr, expected[:, 1 : len(prompt)], atol=1e-9)
    assert torch.allclose(found.output_attr[:, :-1], expected[:, len(prompt) :], atol=1e-9)


def test_seq_attr_explains_the_joint_probability(smooth, tokenizer):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK, skip_tokens=["<s>"])
    found = attributed(smooth, tokenizer, inp, " golf", attr_target="prob")
    prompt, target, present, absent = ends(smooth, tokenizer, " golf")
    fixed = absent.clone()
    fixed[:, len(prompt) :] = present[:, len(prompt) :]
    joint = []
    with torch.no_grad():
        for vectors in (present, fixed):
            logits = smooth(inputs_embeds=vectors).logits[0, len(prompt) - 1 :]
            joint.append(logits.softmax(-1).gather(1, torch.tensor(target)[:, None]).prod())
    assert float(found.seq_attr.sum()) == pytest.approx(float(joint[0] - joint[1]), rel=1e-6)


def test_deeper_layer_equals_a_plain_loop(smooth, tokenizer):
    """Activation, absent and present, read by hooks; the rest of the model run from there."""
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    layer = smooth.model.layers[0]
    found = attributed(smooth, tokenizer, inp, layer=layer, n_steps=8)
    prompt, target, present, _ = ends(smooth, tokenizer)
    ids = [*prompt, *target[:-1]]
    absent = embedded(smooth, [UNK] * len(ids))
    kept = []
    hook = layer.register_forward_hook(lambda module, given, output: kept.append(output.detach()))
    with torch.no_grad():
        smooth(inputs_embeds=present)
        smooth(inputs_embeds=absent)
    hook.remove()
    nodes, weights = np.polynomial.legendre.leggauss(8)
    for t, token in enumerate(target):
        total = torch.zeros(len(prompt) + t, dtype=torch.float64)
        end, begin = (activation[:, : len(prompt) + t] for activation in kept)
        for node, weight in zip(nodes, weights, strict=True):
            point = (begin + (node + 1) / 2 * (end - begin)).requires_grad_()
            hook = layer.register_forward_hook(lambda m, g, o, point=point: point * 1)
            logits = smooth(torch.tensor([ids[: len(prompt) + t]]), use_cache=False).logits[0, -1]
            hook.remove()
            (slope,) = torch.autograd.grad(log_prob(logits, token), point)
            total += (weight / 2 * slope * (end - begin)).sum(-1)[0]
        assert torch.allclose(found.token_attr[t], total[: len(prompt)], atol=1e-9)
        assert torch.allclose(found.output_attr[t, :t], total[len(prompt) :], atol=1e-9)
    # The input of the next layer is the output of this one.
    following = smooth.model.layers[1]
    same = attributed(
        smooth, tokenizer, inp, layer=following, n_steps=8, attribute_to_layer_input=True
    )
    assert torch.allclose(same.full_attr, found.full_attr, atol=1e-12)
    assert same.provenance["layer"] == ["model.layers.1.input"]


@TOO_FEW
def test_long_outputs_are_split_into_passes(smooth, tokenizer):
    """Early tokens need not be read, and gone back through, with all that comes after them."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(5, 390, (40,), generator=generator).tolist()
    inp = TextTokenInput("Dave", tokenizer, baselines=UNK, skip_tokens=["<s>"])
    found = attributed(smooth, tokenizer, inp, target, n_steps=2, output_unit="token")
    prompt = tokenizer.encode("Dave")
    present = embedded(smooth, [*prompt, *target[:-1]])
    absent = embedded(smooth, [prompt[0]] + [UNK] * (len(prompt) + len(target) - 2))
    expected = loop(smooth, present, absent, target, len(prompt), n_steps=2)
    assert torch.allclose(found.token_attr, expected[:, 1 : len(prompt)], atol=1e-9)
    assert torch.allclose(found.output_attr[:, :-1], expected[:, len(prompt) :], atol=1e-9)
    assert found.n_evaluations > 2 * (2 + 2)  # several parts: the ends and the points of each


@pytest.mark.parametrize("kind", [LayerIntegratedGradients, LayerGradientXActivation])
def test_callable_attr_target_receives_all_target_tokens(kind, smooth, tokenizer):
    """Words take several paths, of some of the target tokens each."""
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="<unk>")
    seen = set()

    def weighed(logits, target):
        seen.add((logits.shape[1], len(target)))
        places = torch.arange(1.0, len(target) + 1)
        return logits.gather(2, target.expand(len(logits), -1)[..., None])[..., 0] * places

    given = {"kind": kind, "output_unit": "word"} | (
        {"n_steps": 6} if kind is LayerIntegratedGradients else {}
    )
    found = attributed(smooth, tokenizer, inp, attr_target=weighed, **given)
    plain = attributed(smooth, tokenizer, inp, attr_target="logit", **given)
    n_target = len(plain.target)
    assert seen == {(n_target, n_target)}
    places = torch.arange(1.0, n_target + 1, dtype=torch.float64)[:, None]
    assert torch.allclose(found.full_attr, plain.full_attr * places, atol=1e-6)
    assert torch.allclose(found.full_values, plain.full_values * places[:, 0], atol=1e-6)
