"""Features, what stands where they are absent, what results are good for, what is refused."""

import inspect
import json
from statistics import mean

import numpy as np
import pytest
import tiny
import torch
import transformers
from captum.attr import (
    FeatureAblation,
    IntegratedGradients,
    LayerConductance,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMGradientAttribution,
    TextTemplateInput,
    TextTokenInput,
)
from fact_grammar import Grammar, corpus, load
from gradients import absences, attribute
from ground_truth import documents, precision
from test_gradient import PROMPT, TARGET, UNK, attributed

from captum_llm_ext import (
    ChatInput,
    CorpusBaselines,
    GenerationAttribution,
    GenerationAttributionResult,
    GenerationGradientAttribution,
    TextSegmentInput,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*steps are too few:UserWarning")


def from_there(model, inp, absent, target, *, held=()):
    """Integrated gradients from given embeddings, by 10 points; ``(n_target, n_prompt_ids)``."""
    ids = torch.tensor([[*inp.ids, *target[:-1]]])
    present = model.get_input_embeddings()(ids).detach()
    begin = present.clone()
    for place, vector in absent.items():
        begin[0, place] = vector
    nodes, weights = np.polynomial.legendre.leggauss(10)
    found = torch.zeros(len(target), ids.shape[1], dtype=torch.float64)
    for node, weight in zip(nodes, weights, strict=True):
        point = (begin + (node + 1) / 2 * (present - begin)).requires_grad_()
        logits = model(inputs_embeds=point, use_cache=False).logits[0, len(inp.ids) - 1 :]
        for t, token in enumerate(target):
            value = logits[t].log_softmax(-1)[token]
            (slope,) = torch.autograd.grad(value, point, retain_graph=True)
            found[t] += (weight / 2 * slope * (present - begin)).sum(-1)[0]
    return found


def test_feature_attribution_is_the_sum_over_its_tokens(smooth, tokenizer):
    tokens = TextTokenInput(PROMPT, tokenizer, baselines=UNK, skip_tokens=["<s>"])
    each = attributed(smooth, tokenizer, tokens)
    for unit in ("word", ("sentence", "word"), [(0, 4), (14, 24)]):
        inp = TextSegmentInput(PROMPT, tokenizer, unit, baselines=UNK)
        if isinstance(unit, list):  # the rest is fixed text, and stands all along
            assert inp.n_features == 2
            continue
        found = attributed(smooth, tokenizer, inp)
        for place in inp.places():
            columns = [position - 1 for position in place.positions]
            summed = each.token_attr[:, columns].sum(1)
            assert torch.allclose(found.token_attr[:, place.feature], summed, atol=1e-9)
        assert torch.allclose(found.output_attr, each.output_attr, atol=1e-9)


def test_fixed_text_is_present_along_the_path(smooth, tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, [(0, 4), (14, 24)], baselines=UNK)
    found = attributed(smooth, tokenizer, inp, output_unit=None, n_steps=10)
    vector = smooth.get_input_embeddings().weight[UNK].detach()
    places = [p for place in inp.places() for p in place.positions]
    expected = from_there(smooth, inp, dict.fromkeys(places, vector), found.target.tolist())
    for place in inp.places():
        summed = expected[:, list(place.positions)].sum(1)
        # Forward mode rounds otherwise, and Llama's norms are in float32 whatever the weights are.
        assert torch.allclose(found.token_attr[:, place.feature], summed, atol=1e-6)


def test_groups_and_feature_masks_form_one_feature(smooth, tokenizer):
    apart = TextSegmentInput(PROMPT, tokenizer, "word", baselines=UNK)
    each = attributed(smooth, tokenizer, apart)
    tied = TextSegmentInput(PROMPT, tokenizer, "word", baselines=UNK, groups=[["Dave", "lawyer."]])
    found = attributed(smooth, tokenizer, tied)
    first, last = (tied_name(apart, name) for name in ("Dave", "lawyer."))
    both = each.token_attr[:, first] + each.token_attr[:, last]
    assert torch.allclose(found.token_attr[:, 0], both, atol=1e-9)
    mask = torch.arange(apart.n_features)[None]
    mask[0, last] = first
    masked = attributed(smooth, tokenizer, apart, feature_mask=mask)
    assert torch.allclose(masked.token_attr, found.token_attr, atol=1e-9)
    captums = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    groups = torch.arange(captums.n_itp_features)[None] // 4
    shown = attributed(smooth, tokenizer, captums, feature_mask=groups)
    single = attributed(smooth, tokenizer, captums)
    assert shown.token_attr.shape == single.token_attr.shape  # captum's columns
    assert torch.allclose(shown.token_attr[:, 5], single.token_attr[:, 4:8].sum(1), atol=1e-9)
    assert shown.attribute_span(0, 2).values[5] == shown.token_attr[:2, 5].sum()
    shown.to_html()


def tied_name(inp, name):
    return [own.strip() for own in inp.names].index(name)


def test_chat_turns(smooth, tokenizer):
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = (
        "{{ '<s>' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Dave lives in Palm Coast."},
    ]
    inp = ChatInput(messages, tokenizer, baselines="<unk>")
    found = attributed(smooth, tokenizer, inp, n_steps=20)
    assert found.token_attr.shape[1] == 2
    assert found.efficiency_gap.abs().max() < 0.05
    assert found.levels == inp.levels


def test_replacements_of_other_lengths_use_their_mean_embedding(smooth, tokenizer):
    """Several texts: the mean over draws, each token by token or as its mean in every place."""
    words = PROMPT.split()
    texts = [[word] for word in words]
    city = words.index("Palm")
    texts[city] = ["Ann lives in"]
    texts[0] = ["Ann"]
    texts[1] = [""]
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines=texts)
    found = attributed(smooth, tokenizer, inp, n_steps=10, output_unit=None)
    weight = smooth.get_input_embeddings().weight.detach()
    absent = {}
    for feature, text in ((0, "Ann"), (1, ""), (city, " Ann lives in")):
        positions = inp.places()[feature].positions
        ids = tokenizer.encode(text, add_special_tokens=False)
        for number, position in enumerate(positions):
            if len(ids) == len(positions):
                absent[position] = weight[ids[number]]
            else:
                absent[position] = weight[ids].mean(0) if ids else torch.zeros_like(weight[0])
    assert {len(inp.places()[f].positions) for f in (0, 1, city)} != {1}
    expected = from_there(smooth, inp, absent, found.target.tolist())
    for place in inp.places():
        summed = expected[:, list(place.positions)].sum(1)
        assert torch.allclose(found.token_attr[:, place.feature], summed, atol=1e-9)
    same = [f for f in range(len(words)) if f not in (0, 1, city)]
    assert found.token_attr[:, same].abs().max() < 1e-9  # their own text stands for them
    # What stands in the prompt, not what would stand in an output that has features.
    assert found.provenance["baselines"] == repr(inp.own_baseline) != repr(inp.output_baseline)


def test_absent_feature_is_the_mean_of_draws(smooth, tokenizer):
    drawn = []

    def one_of_three(slot, generator):
        ids = [[300], [301], [302]][int(torch.randint(3, (), generator=generator))]
        drawn.append((slot.generated, slot.index, ids[0]))
        return ids * len(slot.ids)

    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines=one_of_three)
    for n_draws in (None, 3):
        drawn.clear()
        found = attributed(smooth, tokenizer, inp, n_steps=10, n_draws=n_draws, seed=4)
        assert found.provenance["n_draws"] == (n_draws or 8)
        weight = smooth.get_input_embeddings().weight.detach()
        absent = {}
        for place in inp.places():
            ids = [i for out, index, i in drawn if not out and index == place.feature]
            assert len(ids) == (n_draws or 8)
            absent |= dict.fromkeys(place.positions, weight[ids].mean(0))
        for t in range(len(found.target) - 1):
            ids = [i for out, index, i in drawn if out and index == t]
            absent[len(inp.ids) + t] = weight[ids].mean(0)
        expected = from_there(smooth, inp, absent, found.target.tolist())
        output = expected[:, len(inp.ids) :]
        assert torch.allclose(found.output_attr[:, :-1], output, atol=1e-9)
        assert found.token_attr_se.isnan().all()  # other draws, another mean: nothing tells
        assert found.provenance["estimate"] is True


def test_zero_and_deletion_use_the_zero_vector(smooth, tokenizer):
    words = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    deleted = attributed(smooth, tokenizer, words)
    chosen = TextSegmentInput(PROMPT, tokenizer, "word", baselines="<unk>")
    zero = attributed(smooth, tokenizer, chosen, absent="zero")
    assert torch.equal(deleted.full_attr, zero.full_attr)
    absent = dict.fromkeys(range(1, len(words.ids) + 9), 0.0)
    target = zero.target.tolist()
    absent = {place: 0.0 for place in absent if place < len(words.ids) + len(target) - 1}
    expected = from_there(smooth, words, absent, target)
    ours = attributed(smooth, tokenizer, words, n_steps=10)
    assert torch.allclose(ours.output_attr[:, :-1], expected[:, len(words.ids) :], atol=1e-9)


def test_output_baselines_apply_to_output_features(smooth, tokenizer):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK, skip_tokens=["<s>"])
    found = attributed(smooth, tokenizer, inp, n_steps=10, output_baselines=7)
    weight = smooth.get_input_embeddings().weight.detach()
    ids = tokenizer.encode(PROMPT)
    target = found.target.tolist()
    absent = dict.fromkeys(range(1, len(ids)), weight[UNK])
    absent |= {len(ids) + place: weight[7] for place in range(len(target) - 1)}
    inp.ids = ids
    expected = from_there(smooth, inp, absent, target)
    assert torch.allclose(found.token_attr, expected[:, 1 : len(ids)], atol=1e-9)
    assert torch.allclose(found.output_attr[:, :-1], expected[:, len(ids) :], atol=1e-9)


def test_expected_gradients_sample_texts_and_path_points(smooth, tokenizer):
    """Every sample has its own draw; their mean is near that of integrated gradients of each."""

    def one_of_two(slot, generator):
        return [int(torch.randint(300, 302, (), generator=generator))] * len(slot.ids)

    inp = TextSegmentInput(PROMPT, tokenizer, [(0, 13)], baselines=one_of_two)
    found = attributed(
        smooth, tokenizer, inp, " a", kind=LayerGradientShap, n_samples=300, output_baselines=UNK
    )
    each = [
        attributed(
            smooth, tokenizer, TextSegmentInput(PROMPT, tokenizer, [(0, 13)], baselines=i), " a"
        )
        for i in (300, 301)
    ]
    middle = (each[0].token_attr + each[1].token_attr) / 2
    assert ((found.token_attr - middle).abs() < 4 * found.token_attr_se).all()
    assert found.token_attr_se.max() > 0
    empties = torch.stack([run.empty_values for run in each])
    assert (found.empty_values >= empties.amin(0)).all()
    assert (found.empty_values <= empties.amax(0)).all()
    captums = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    masks = torch.zeros(2, captums.n_itp_features, dtype=torch.long)
    masks[:, 5:] = 1
    for baselines in (masks, lambda: masks, lambda inputs: masks):
        partly = attributed(
            smooth, tokenizer, captums, " a", kind=LayerGradientShap, baselines=baselines
        )
        assert (partly.token_attr[:, 5:] == 0).all()
        assert (partly.token_attr[:, :5] != 0).any()


def test_gradient_results_support_saving_plots_and_levels(smooth, tokenizer, tmp_path):
    inp = TextSegmentInput(PROMPT, tokenizer, ("sentence", "word"), baselines="<unk>")
    for kind, given in ((LayerIntegratedGradients, {}), (LayerGradientShap, {"n_samples": 9})):
        found = attributed(smooth, tokenizer, inp, kind=kind, **given)
        found.save(tmp_path / "found.safetensors")
        again = GenerationAttributionResult.load(tmp_path / "found.safetensors")
        assert torch.equal(again.full_attr, found.full_attr)
        assert again.provenance == json.loads(json.dumps(found.provenance))
        span = again.attribute_span(1, 3)
        assert torch.allclose(span.values, found.full_attr[1:3].sum(0))
        assert torch.equal(span.standard_errors, found.full_attr_se[1:3].sum(0))
        assert "LayerGradientShap" in str(again) or "LayerIntegratedGradients" in str(again)
        assert (" ± " in str(again)) is (kind is LayerGradientShap)
        page = again.to_html()
        assert kind.__name__ in page
        told = {one["side"]: one for one in again._shown()["sums"]}
        assert told["prompt"]["spans"][0] == [0, len(found.target)]
        errors = found.token_attr_se.sum(0)
        assert told["prompt"]["se"][0] == pytest.approx(errors.tolist(), rel=1e-2)
        for draw in (again.plot_token_attr, again.plot_seq_attr, again.plot_text):
            draw()
        again.plot_text(1)
        assert sum(not cause.is_output for cause in again.why(2)) == 5
        names, sums = again.at_level("sentence")
        assert torch.allclose(sums.sum(1), found.token_attr.sum(1))
        assert len(names) == sums.shape[1]
        assert again.to_dataframe().shape[0] > 0
        assert again.additivity.isnan().all()
        with pytest.raises(ValueError, match="gradients use no coalitions"):
            again.refit(FeatureAblation)
        with pytest.raises(ValueError, match="gradients use no coalitions"):
            again.redundant_pairs()
    assert found.provenance["estimator"] == "expected gradients"
    assert found.provenance["n_samples"] == 9


@pytest.fixture(scope="module")
def known():
    return load()


def test_same_slot_baselines_find_causes_and_zero_does_not(known):
    given = documents(6, seed=7)
    kinds = absences(Grammar(), corpus())
    found = {}
    for name in ("zero vector", "mean of 8 same-slot texts"):
        results = [attribute(*known, document, kinds[name]) for document in given]
        pairs = zip(given, results, strict=True)
        found[name] = mean(v for d, r in pairs for v in precision(d, r).values())
        if name != "zero vector":
            assert max(float(r.efficiency_gap.abs().max()) for r in results) < 0.05
    assert found["mean of 8 same-slot texts"] > 0.95
    assert found["zero vector"] < 0.6


def test_few_steps_warn(model, tokenizer):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    with pytest.warns(UserWarning, match="3 steps are too few for this path: the attributions mi"):
        attributed(model, tokenizer, inp, n_steps=3)


def test_unsupported_methods_are_refused(model, tokenizer):
    for method in (
        FeatureAblation(model),
        IntegratedGradients(model),
        LayerConductance(model, model.model.embed_tokens),
        type("Mine", (LayerIntegratedGradients,), {})(model, None),
        None,
    ):
        with pytest.raises(TypeError, match="give captum's LayerIntegratedGradients, LayerGrad"):
            GenerationGradientAttribution(method, tokenizer)
    config = transformers.T5Config(
        vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    other = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(TypeError, match="encoder-decoder model, which is not supported"):
        GenerationGradientAttribution(LayerIntegratedGradients(other, other.shared), tokenizer)
    with pytest.raises(ValueError, match="`attr_target` is 'probability'"):
        GenerationGradientAttribution(
            LayerIntegratedGradients(model, None), tokenizer, attr_target="probability"
        )


WRONG = {
    "unknown": ({"n_step": 5}, TypeError, "did you mean 'n_steps'"),
    "unknown too": ({"perturbations": 5}, TypeError, "'perturbations', which LayerIntegratedG"),
    "of another method": ({"n_samples": 5}, ValueError, "`n_samples` has no meaning for LayerInt"),
    "no step": ({"n_steps": 0}, ValueError, "`n_steps` is 0: give an integer of at least 1"),
    "one step": ({"n_steps": 1, "method": "riemann_left"}, ValueError, "riemann_left takes at"),
    "no rule": ({"method": "simpson"}, ValueError, "give one of 'riemann_left'"),
    "batch": ({"internal_batch_size": 0}, ValueError, "`internal_batch_size` is 0"),
    "draws": ({"n_draws": 0}, ValueError, "`n_draws` is 0"),
    "draws of zero": ({"n_draws": 2, "absent": "zero"}, ValueError, "nothing is drawn"),
    "absent": ({"absent": "mean"}, ValueError, "give 'baseline' or 'zero'"),
    "zero output": (
        {"absent": "zero", "output_baselines": 3},
        ValueError,
        "`output_baselines` would be ignored",
    ),
    "same draws": ({"n_draws": 3}, ValueError, "every draw of these baselines is the same"),
    "held output": (
        {"output_unit": None, "output_baselines": 3},
        ValueError,
        "`output_unit=None` holds it fixed",
    ),
    "delta": ({"return_convergence_delta": True}, ValueError, "`efficiency_gap` of the result"),
    "mask": ({"baselines": torch.zeros(2, 4)}, ValueError, r"is \(2, 4\) for 18 features"),
    "text mask": ({"baselines": "<pad>"}, ValueError, "is str for 18 features"),
    "call": ({"baselines": lambda: None}, ValueError, "is for LayerGradientShap"),
    "empty": ({"target": ""}, ValueError, "the target is empty"),
    "vocabulary": ({"target": [5, 4000]}, ValueError, "token id 4000 is outside the model's"),
    "kind": ({"target": 5}, TypeError, "`target` is a int"),
    "ignored": ({"gen_args": {}}, ValueError, "`gen_args` would be ignored"),
    "long": ({"target": [5] * 300}, ValueError, "prompt and target take 317 positions"),
    "unit": ({"output_unit": "phrase"}, ValueError, "unknown unit 'phrase'"),
    "output": ({"output_baselines": 4000}, ValueError, "a baseline gives token id 4000, outside"),
    "grouping": ({"feature_mask": torch.zeros(1, 3)}, ValueError, "`feature_mask` has shape"),
    "grad": ({"grad_kwargs": {"retain_graph": True}}, ValueError, "which is set internally"),
    "ids": ({"attribute_to_layer_input": True}, ValueError, "no gradient: attribute to its output"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments_are_refused(model, tokenizer, name):
    given, error, message = WRONG[name]
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    layer = model.model.embed_tokens if name == "ids" else None
    with pytest.raises(error, match=message):
        attributed(
            model,
            tokenizer,
            inp,
            given.get("target", TARGET),
            layer=layer,
            **{k: v for k, v in given.items() if k != "target"},
        )


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (LayerGradientXActivation, {"n_steps": 5}, "`n_steps` has no meaning for LayerGradientX"),
        (LayerGradientXActivation, {"output_baselines": 3}, "what is absent is the zero vector"),
        (LayerGradientXActivation, {"n_draws": 3}, "nothing is drawn"),
        (LayerGradientXActivation, {"internal_batch_size": 3}, "has no meaning for LayerGradientX"),
        (LayerGradientShap, {"n_draws": 3}, "every one of `n_samples` is a draw"),
        (LayerGradientShap, {"n_samples": 0}, "`n_samples` is 0"),
        (LayerGradientShap, {"stdevs": -1.0}, "`stdevs` is -1.0"),
        (LayerGradientShap, {"stdevs": (0.1, 0.2)}, "for there is one input"),
        (LayerGradientShap, {"grad_kwargs": {}}, "`grad_kwargs` has no meaning for LayerGradient"),
    ],
)
def test_arguments_of_other_methods_are_refused(model, tokenizer, kind, given, message):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    with pytest.raises(ValueError, match=message):
        attributed(model, tokenizer, inp, kind=kind, **given)


@pytest.mark.filterwarnings("ignore:Multiple layers provided:UserWarning")  # captum's
def test_unsuitable_layers_and_inputs_are_refused(model, tokenizer):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    for layer, message in (
        (torch.nn.Linear(3, 3), "which is not a module of the model"),
        (model.model.rotary_emb, r"is \(1, 23, 8\), \(1, 23, 8\): attribution needs one tensor"),
        ([model.model.embed_tokens, model.model.layers[0]], "`layer` is a list of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            attributed(model, tokenizer, inp, layer=layer)
    one = attributed(model, tokenizer, inp, layer=[model.model.embed_tokens], n_steps=3)
    assert one.provenance["layer"] == ["model.embed_tokens"]
    template = TextTemplateInput("{} lives in {}.", ["Dave", "Palm"])
    with pytest.raises(TypeError, match="this needs features that own tokens"):
        attributed(model, tokenizer, template)
    with pytest.raises(TypeError, match="`inp` is a str"):
        attributed(model, tokenizer, PROMPT)
    with pytest.raises(NotImplementedError):
        GenerationGradientAttribution(
            LayerIntegratedGradients(model, None), tokenizer
        ).attribute_future()


def test_values_without_gradient_are_refused(model, tokenizer):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    with pytest.raises(ValueError, match="`attr_target` returned have no gradient"):
        attributed(
            model, tokenizer, inp, attr_target=lambda logits, target: logits.argmax(-1).float()
        )
    with pytest.raises(TypeError, match=r"`attr_target` returned torch.Size\(\[\]\) for logits"):
        attributed(model, tokenizer, inp, attr_target=lambda logits, target: logits.sum())


@pytest.mark.parametrize("unit", ["token", "word", "sentence", None])
def test_path_endpoints_equal_coalition_values(model, tokenizer, unit):
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="<unk>")
    found = attributed(model, tokenizer, inp, output_unit=unit, n_steps=2)
    coalitions = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(
        inp, TARGET, output_unit=unit
    )
    # float32, in other batches
    assert torch.allclose(found.full_values, coalitions.full_values, atol=1e-4)
    assert torch.allclose(found.empty_values, coalitions.empty_values, atol=1e-4)
    assert found.output_features == coalitions.output_features
    assert found.target.tolist() == coalitions.target.tolist()
    if unit is not None:
        assert torch.equal(found.output_attr == 0, coalitions.output_attr == 0)


def test_model_based_baselines(known):
    model, tokenizer = known
    text = "Dave lives in Palm Coast, FL and is a lawyer. His personal"
    weighed = CorpusBaselines(corpus()[:200], match="model")
    inp = TextSegmentInput(text, tokenizer, [(0, 4), (36, 44)], baselines=weighed)
    found = attributed(model, tokenizer, inp, " interests", n_draws=2, n_steps=5)
    assert found.provenance["baselines"].startswith("CorpusBaselines(")
    assert found.token_attr.isfinite().all()
    assert (found.token_attr != 0).any()


def test_captum_arguments_come_first(model, tokenizer):
    for name in ("__init__", "attribute"):
        captums = inspect.signature(getattr(LLMGradientAttribution, name)).parameters
        ours = inspect.signature(getattr(GenerationGradientAttribution, name)).parameters
        assert list(ours)[: len(captums) - 1] == list(captums)[:-1]
        assert {p.kind for p in list(ours.values())[len(captums) :]} <= {
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.VAR_KEYWORD,
        }
    attribution = GenerationGradientAttribution(LayerIntegratedGradients(model, None), tokenizer)
    assert isinstance(attribution, LLMGradientAttribution)


def test_progress_is_shown_on_request(model, tokenizer, capsys):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    attributed(model, tokenizer, inp)
    assert capsys.readouterr().err == ""
    found = attributed(model, tokenizer, inp, show_progress=True)
    shown = capsys.readouterr().err
    assert f"100 % ({found.n_evaluations} of {found.n_evaluations}" in shown


def test_internal_batch_size_keeps_expected_gradients(model, tokenizer):
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    whole, parts = (
        attributed(model, tokenizer, inp, kind=LayerGradientShap, n_samples=7, **given)
        for given in ({}, {"internal_batch_size": 2})
    )
    torch.testing.assert_close(parts.full_attr, whole.full_attr, atol=1e-5, rtol=0)  # float32


@pytest.mark.parametrize("cls", [GenerationAttribution, GenerationGradientAttribution])
def test_callable_named_like_an_attr_target_is_called(model, tokenizer, cls):
    """`log_prob` is nats, which tell probabilities; what a function of that name gives is not."""

    def log_prob(logits, target):
        return logits.gather(2, target.expand(len(logits), -1)[..., None])[..., 0] / 7

    log_prob.__qualname__ = "log_prob"
    is_gradient = cls is GenerationGradientAttribution
    method = LayerIntegratedGradients(model, None) if is_gradient else FeatureAblation(model)
    inp = TextTokenInput(PROMPT, tokenizer, baselines=UNK)
    found = cls(method, tokenizer, attr_target=log_prob).attribute(inp, TARGET)
    assert found.provenance["attr_target"] == "log_prob()"
    assert found.output_probs is None


def test_provenance_of_gradient_results(known):
    model, tokenizer = known
    document = documents(1, seed=7)[0]
    kinds = absences(Grammar(), corpus())
    found = attribute(model, tokenizer, document, kinds["mean of 8 same-slot texts"], seed=3)
    told = found.provenance
    assert told["method"] == "LayerIntegratedGradients"
    assert (told["n_steps"], told["rule"]) == (50, "gausslegendre")
    assert (told["seed"], told["n_draws"], told["layer"]) == (3, 8, ["model.embed_tokens"])
    assert told["baselines"].startswith("CorpusBaselines(")
    assert len(told["matches"]["prompt"]) == len(document.segments("prompt"))
    again = attribute(model, tokenizer, document, kinds["mean of 8 same-slot texts"], seed=3)
    assert torch.equal(again.full_attr, found.full_attr)


@pytest.mark.parametrize(
    "kind", [LayerIntegratedGradients, LayerGradientXActivation, LayerGradientShap]
)
def test_arguments_equal_to_defaults_change_nothing(model, tokenizer, kind):
    inp = TextTokenInput("Dave lives in", tokenizer, baselines=UNK)
    parameters = inspect.signature(kind.attribute).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    del given["target"]  # it has another meaning here
    given.pop("n_samples", None)  # captum's 5 are too few: the default is another one
    assert "additional_forward_args" in given
    truth = attributed(model, tokenizer, inp, kind=kind)
    found = attributed(model, tokenizer, inp, kind=kind, use_futures=None, **given)
    assert torch.equal(found.full_attr, truth.full_attr)
    with pytest.raises(TypeError, match="is set by the input"):
        attributed(model, tokenizer, inp, kind=kind, additional_forward_args=(1,))


def test_skip_tokens_warns_of_deprecation(model, tokenizer):
    inp = TextTokenInput("Dave lives", tokenizer)
    truth = attributed(model, tokenizer, inp, [50, 60], n_steps=5)
    for skipped in (["<s>", "</s>"], [1, 2]):
        with pytest.warns(DeprecationWarning, match="skip_tokens"):
            found = attributed(
                model, tokenizer, inp, [1, 50, 60, 2], n_steps=5, skip_tokens=skipped
            )
        assert found.target.tolist() == [50, 60]
        assert torch.equal(found.full_attr, truth.full_attr)
