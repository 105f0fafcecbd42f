"""Why a token rather than its foils: values, foils and attributions, against plain forwards."""

import re
from functools import partial

import pytest
import tiny
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    RemoteLLMAttribution,
    ShapleyValues,
    ShapleyValueSampling,
    TextTokenInput,
)
from reference import loop_log_probs, shapley_values, tokens_read
from remote_server import Server

from captum_llm_ext import (
    ChatInput,
    CompletionsProvider,
    Contrast,
    FeatureInclusion,
    GenerationAttribution,
    GenerationAttributionResult,
    GenerationGradientAttribution,
    HierarchicalAblation,
    PartitionShap,
    RemoteGenerationAttribution,
    TextSegmentInput,
    attribute_dataset,
    compare_baselines,
    load_demo,
    measure_faithfulness,
)
from captum_llm_ext.model import Scorer, TokenRow

# Absent is deleted: what comes of it is known.
attribute_dataset = partial(attribute_dataset, baselines="delete")

PROMPT = "Dave lives in Austin and is a"
TARGET = " golf and chess"
UNK = 3
METHODS = [
    *(FeatureAblation, FeatureInclusion, ShapleyValues, ShapleyValueSampling, KernelShap, Lime),
    *(PartitionShap, HierarchicalAblation),
]
NESTED = ("sentence", "word")

N_FOILS = Contrast().n_foils


def attribute(model, tokenizer, method=FeatureAblation, contrast="contrast", **arguments):
    unit = NESTED if method in (PartitionShap, HierarchicalAblation) else "word"
    prompt = arguments.pop("prompt", PROMPT)
    inp = TextSegmentInput(prompt, tokenizer, unit, baselines=arguments.pop("baselines", None))
    attribution = GenerationAttribution(method(model), tokenizer, contrast)
    return attribution.attribute(inp, arguments.pop("target", TARGET), **arguments)


def contrast_of(model, prompt, read, target, foils):
    """Log p of the token less log of the sum over foils, by one forward pass per number."""
    own = loop_log_probs(model, prompt, [read], [target])[0]
    others = [loop_log_probs(model, prompt, [read], [i])[0] for i in foils if i >= 0]
    return float(own - torch.stack(others).logsumexp(0)) if others else float(own)


def kept(foils):
    return [[i for i in own if i >= 0] for own in foils.tolist()]


@pytest.fixture(scope="module")
def demo():
    model, tokenizer, _ = load_demo()
    return model, tokenizer


# Numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", [None, UNK], ids=["deletion", "token"])
def test_exact_values_equal_brute_force_at_every_step(model, tokenizer, replacement):
    model = model.double()
    try:
        prompt = "Dave lives in"
        inp = TextSegmentInput(prompt, tokenizer, baselines=replacement)
        target = tokenizer.encode(" golf and", add_special_tokens=False)
        attribution = GenerationAttribution(ShapleyValues(model), tokenizer, "contrast")
        result = attribution.attribute(inp, target)
        n_prompt = len(inp.names)
        for t, foils in enumerate(result.foils.tolist()):

            def value(present, t=t, foils=foils):
                mask = torch.tensor([[float(i in present) for i in range(n_prompt)]])
                ids = inp.to_model_input(mask)[0].tolist() or [tokenizer.bos_token_id]
                stands = [n_prompt + i in present for i in range(len(target))]
                read = tokens_read(target, stands, replacement)[t]
                return contrast_of(model, ids, read, target[t], foils)

            truth = shapley_values(value, n_prompt + t)
            assert result.full_attr[t, : n_prompt + t].tolist() == pytest.approx(truth, abs=1e-9)
            assert bool((result.full_attr[t, n_prompt + t :] == 0).all())
        assert float(result.efficiency_gap.abs().max()) < 1e-9
        torch.testing.assert_close(result.seq_attr, result.token_attr.sum(0))
    finally:
        model.float()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_log_probabilities_beside_contrasts(model, tokenizer, method):
    found = attribute(model, tokenizer, method)
    plain = attribute(model, tokenizer, method, "log_prob")
    assert found.n_evaluations == plain.n_evaluations  # foils were looked for apart
    assert torch.equal(found.masks, plain.masks)
    own = found.refit(attr_target="log_prob")
    torch.testing.assert_close(own.values, plain.values, atol=1e-5, rtol=0, equal_nan=True)
    # A regression's penalty is chosen by its own values: rounding may choose another.
    torch.testing.assert_close(own.full_attr, plain.full_attr, atol=5e-3, rtol=1e-3)
    torch.testing.assert_close(own.refit(attr_target="contrast").values, found.values)
    torch.testing.assert_close(found.output_probs, plain.output_probs, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(
        found.refit(attr_target="prob").values, plain.values.exp(), equal_nan=True
    )
    assert own.provenance["attr_target"] == "log_prob"
    with pytest.raises(ValueError, match="holds no values of foils"):
        plain.refit(attr_target="contrast")


def test_custom_forward_gives_captum_the_same_contrast(model, tokenizer):
    foils = [7, 8, 300]
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    target = tokenizer.encode(TARGET, add_special_tokens=False)

    def forward(masks):
        rows = [inp.to_model_input(mask[None])[0].tolist() for mask in masks]
        reads = [target[:t] for t in range(len(target))]
        return torch.tensor(
            [
                [contrast_of(model, row, *pair, foils) for pair in zip(reads, target, strict=True)]
                for row in rows
            ]
        )

    truth = FeatureAblation(forward).attribute(torch.ones(1, inp.n_features))
    result = attribute(model, tokenizer, contrast=Contrast(foils=foils), output_unit=None)
    torch.testing.assert_close(result.token_attr, truth.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("reuse", ["auto", "off", "copy", "share", "pack"])
def test_values_equal_plain_forwards_for_any_batching(model, tokenizer, reuse):
    ids = tokenizer.encode(PROMPT)
    target = tokenizer.encode(TARGET, add_special_tokens=False)
    foils = torch.randint(5, 400, (len(target), 4), generator=torch.Generator().manual_seed(0))
    foils[1, 2:], foils[2] = -1, -1
    rows = []
    for i in range(1, len(ids)):
        left = [*ids[:i], *ids[i + 1 :]]
        places = range(len(left) - 1, len(left) - 1 + len(target))
        rows.append(TokenRow((*left, *target[:-1]), places))
    n = len(ids)
    rows.append(TokenRow((*ids, *target[1:-1]), (n - 1, -1, *range(n, n + len(target) - 2))))
    scorer = Scorer(model, attr_target="contrast", reuse=reuse, overhead=0)
    found = scorer.values(rows, torch.tensor(target), foils)
    own, others = found.split(len(target), dim=1)
    for row, a, b in zip(rows, own, others, strict=True):
        for t, place in enumerate(row.positions):
            if place < 0:
                assert a[t].isnan()
                assert b[t].isnan()
                continue
            truth = contrast_of(model, row.ids[: place + 1], [], target[t], foils[t].tolist())
            assert float(a[t] - b[t]) == pytest.approx(truth, abs=1e-4)
    assert bool((others[:-1, 2] == 0).all())  # held against nothing


def test_models_that_see_ahead_are_scored_token_by_token(tokenizer):
    """As for log-probabilities: nothing that follows a token is there when it is said."""
    model = tiny.llama(len(tokenizer))
    plain = model.forward

    def forward(input_ids, **arguments):
        output = plain(input_ids=input_ids, **arguments)
        ahead = input_ids.roll(-1, 1).float().masked_fill(input_ids.roll(-1, 1) == input_ids, 0)
        ahead[:, -1] = 0
        output.logits[..., ::7] += ahead[..., None].sin()
        return output

    model.forward = forward
    result = attribute(model, tokenizer, target=" golf")
    assert result.provenance["probe"]["sees_ahead"]
    ids, target = tokenizer.encode(PROMPT), result.target.tolist()
    for t, foils in enumerate(kept(result.foils)):
        truth = contrast_of(model, ids, target[:t], target[t], foils)
        assert float(result.full_values[t]) == pytest.approx(truth, abs=1e-4)


def test_half_precision_contrast_has_a_noise_floor(tokenizer):
    model = tiny.llama(len(tokenizer)).bfloat16()
    result = attribute(model, tokenizer)
    again = attribute(model, tokenizer, perturbations_per_eval=1, contrast=result_foils(result))
    apart = (result.values - again.values).abs().nan_to_num().amax(0)
    assert result.noise_floor is not None
    assert bool((apart <= result.noise_floor).all())


def result_foils(result):
    return Contrast(foils=result.foils)


# Gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", ["contrast", Contrast(foils=[7, 8, 300])])
def test_gradients_equal_plain_autograd(smooth, tokenizer, contrast):
    method = LayerGradientXActivation(smooth, None)
    inp = TextTokenInput(PROMPT, tokenizer)
    attribution = GenerationGradientAttribution(method, tokenizer, attr_target=contrast)
    result = attribution.attribute(inp, TARGET, output_unit=None)
    ids, target = tokenizer.encode(PROMPT), result.target.tolist()
    embedded = smooth.get_input_embeddings()(torch.tensor([[*ids, *target[:-1]]]))
    embedded = embedded.detach().requires_grad_()
    logits = smooth(inputs_embeds=embedded).logits[0, len(ids) - 1 :]
    for t, foils in enumerate(kept(result.foils)):
        said = logits[t].log_softmax(0)
        value = said[target[t]] - (said[foils].logsumexp(0) if foils else 0)
        [slope] = torch.autograd.grad(value, embedded, retain_graph=True)
        truth = (slope * embedded).sum(-1)[0, : len(ids)]
        torch.testing.assert_close(result.token_attr[t], truth, atol=1e-10, rtol=1e-8)
        assert float(result.full_values[t]) == pytest.approx(value.item(), abs=1e-10)


def test_integrated_gradients_are_complete_for_contrasts(smooth, tokenizer):
    method = LayerIntegratedGradients(smooth, None)
    attribution = GenerationGradientAttribution(method, tokenizer, attr_target="contrast")
    inp = TextSegmentInput(PROMPT, tokenizer, baselines="<unk>")
    result = attribution.attribute(inp, TARGET)
    absent = GenerationAttribution(FeatureAblation(smooth), tokenizer, result_foils(result))
    truth = absent.attribute(inp, TARGET)
    torch.testing.assert_close(result.full_values, truth.full_values)
    assert float(result.efficiency_gap.abs().max()) < 1e-4


# Foils ------------------------------------------------------------------------------------------


def test_found_foils_fit_left_and_right_context(demo):
    """By brute force over the vocabulary: p(foil) times that of the next two tokens after it."""
    model, tokenizer = demo
    result = attribute(
        model,
        tokenizer,
        prompt="Dave lives in Palm Coast, FL and is a lawyer. His personal interests include",
        target=" poker, surfing and history.",
    )
    ids = tokenizer.encode(
        "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
    )
    target = result.target.tolist()
    t = result.output_tokens.index("surfing")
    before = [*ids, *target[:t]]
    with torch.no_grad():
        said = model(torch.tensor([before])).logits[0, -1].double().log_softmax(0)
    words = [
        i
        for i in said.argsort(descending=True).tolist()
        if i != target[t]
        and i not in tokenizer.all_special_ids
        and re.fullmatch("[a-z-]+", tokenizer.decode([i]).strip())
    ][: 2 * N_FOILS]
    after = target[t + 1 : t + 3]
    scores = {
        i: float(said[i] + loop_log_probs(model, before, [[i], [i, after[0]]], after).sum())
        for i in words
    }
    best = sorted(words, key=lambda i: -scores[i])[:N_FOILS]
    assert kept(result.foils)[t] == best
    assert {"kayaking", "rowing", "sailing", "skiing"} <= set(result.foil_tokens[t])
    assert result.provenance["contrast"]["by"] == "before and after"


def test_context_after_the_target_is_the_models_continuation(demo):
    model, tokenizer = demo
    prompt = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
    longer = attribute(model, tokenizer, prompt=prompt, target=" poker, surfing and")
    alone = attribute(model, tokenizer, prompt=prompt, target=" poker")
    assert alone.foil_tokens[0] == longer.foil_tokens[0]  # ", surfing" is what it writes


def test_word_continuation_tokens_have_no_foils(model, tokenizer):
    result = attribute(model, tokenizer, target=" golf. 12\n🙂 x</s>")
    pieces = [piece.text for piece in result.output_pieces]
    plain = attribute(model, tokenizer, target=result.target, contrast="log_prob")
    assert any(not own for own in result.foil_tokens)
    for t, own in enumerate(kept(result.foils)):
        begins = t == 0 or not pieces[t][:1].isalpha() or not pieces[t - 1][-1:].isalpha()
        is_part = t > 0 and pieces[t - 1] == ""
        assert bool(own) == (begins and not is_part), pieces[t]
        if not own:
            torch.testing.assert_close(result.full_attr[t], plain.full_attr[t], atol=1e-5, rtol=0)
    # A special token has others of any kind.
    assert result.target[-1] == tokenizer.eos_token_id
    assert len(kept(result.foils)[-1]) == N_FOILS


def test_foils_share_the_tokens_kind(demo):
    model, tokenizer = demo
    result = attribute(model, tokenizer, prompt="Dave lives in", target=" Palm Coast, FL and")
    for name, foils in zip(result.output_tokens, result.foil_tokens, strict=True):
        assert name not in foils
        several = [foil for foil in foils if len(foil) > 1]  # one letter may begin any word
        assert all(foil.isupper() == name.isupper() for foil in several if name.isalpha())
        assert all(foil.islower() == name.islower() for foil in foils if name.isalpha())
        assert all(foil.isprintable() for foil in foils)


def test_foils_are_given_as_texts_ids_or_per_token(model, tokenizer):
    n = len(tokenizer.encode(TARGET, add_special_tokens=False))
    tennis = tokenizer.encode(" tennis", add_special_tokens=False)[0]
    music = tokenizer.encode(" music", add_special_tokens=False)
    assert len(music) == 1
    each = attribute(model, tokenizer, contrast=Contrast(foils=[music[0], 9]))
    assert kept(each.foils) == [[music[0], 9]] * n
    text = attribute(model, tokenizer, contrast=Contrast(foils="music"))
    goes_on = [not piece.text.startswith(" ") for piece in text.output_pieces]
    # With the white space of " g"; of words alone.
    assert kept(text.foils) == [[] if on else music for on in goes_on]
    listed = [["music"], None, [9], torch.tensor([10, 11]).tolist(), None]
    mixed = attribute(model, tokenizer, contrast=Contrast(foils=listed))
    assert kept(mixed.foils)[0] == music
    assert kept(mixed.foils)[2:4] == [[9], [10, 11]]
    same = attribute(model, tokenizer, contrast=Contrast(foils=mixed.foils))
    assert torch.equal(same.values, mixed.values)
    with pytest.warns(
        UserWarning, match="of several tokens are represented by their first one: 'tennis'"
    ):
        long = attribute(model, tokenizer, contrast=Contrast(foils=[["tennis"], *[None] * (n - 1)]))
    assert kept(long.foils)[0] == [tennis]


def test_foils_of_the_prompt_without_a_feature(demo):
    model, tokenizer = demo
    prompt = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
    for feature in ("Palm", 3):
        result = attribute(
            model,
            tokenizer,
            prompt=prompt,
            target=" poker, surfing",
            contrast=Contrast(without=feature, n_foils=4),
        )
        without = tokenizer.encode(prompt.replace(" Palm", ""))
        with torch.no_grad():
            ids = torch.tensor([[*without, *result.target[:2].tolist()]])
            order = model(ids).logits[0, -1].argsort(descending=True).tolist()
        others = [i for i in order if i != int(result.target[2])]
        words = [word for i in others if (word := tokenizer.decode([i]).strip()).isalpha()]
        likeliest = [word for word in words if word.islower()][:8]
        assert set(result.foil_tokens[2]) <= {*likeliest}
        assert result.provenance["contrast"]["without"] == feature
    random = attribute(
        model,
        tokenizer,
        prompt=prompt,
        target=" poker",
        baselines=[["Dave", "Ann"]] + [[w, "x"] for w in prompt.split()[1:]],
        contrast=Contrast(without="lawyer."),
    )
    assert 0 < len(random.foil_tokens[0]) <= N_FOILS


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"foils": []}, ValueError, "is empty"),
        ({"foils": [[], *[None] * 4]}, ValueError, r"`foils\[0\]` is empty"),
        ({"foils": ""}, ValueError, "empty text"),
        ({"foils": [7, 7]}, ValueError, "holds 7 twice"),
        ({"foils": [None] * 5}, ValueError, "None for every target token"),
        ({"foils": 1.5}, TypeError, "give texts or token ids"),
        ({"foils": [True]}, TypeError, "not a foil"),
        ({"foils": [7, [8]]}, TypeError, "both foils and lists"),
        ({"foils": 7, "n_foils": 3}, ValueError, "`n_foils` would be ignored"),
        ({"foils": 7, "without": 0}, ValueError, "`without` would be ignored"),
        ({"n_foils": 0}, ValueError, "at least 1"),
        ({"without": True}, TypeError, "name or the number"),
        ({"foils": [[7], None]}, ValueError, "2 lists for 5 target tokens"),
        ({"foils": 400}, ValueError, "outside the model's vocabulary of 400"),
        ({"foils": -2}, ValueError, "outside the model's vocabulary"),
        ({"foils": ["golf"]}, ValueError, "begins with that very token"),
        ({"foils": [["cat", "cats"], *[None] * 4]}, ValueError, "begin with the same token"),
        ({"without": "Rome"}, ValueError, "0 features are called 'Rome'"),
        ({"without": 40}, ValueError, "there are 12 features"),
    ],
)
def test_uninformative_foils_are_refused_before_any_pass(
    model, tokenizer, arguments, error, message
):
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(error, match=message):
            attribute(model, tokenizer, contrast=Contrast(**arguments))
        assert not passes
    finally:
        handle.remove()


def test_target_token_is_no_foil(model, tokenizer):
    target = tokenizer.encode(TARGET, add_special_tokens=False)
    with pytest.raises(ValueError, match="is that very token"):
        attribute(model, tokenizer, contrast=Contrast(foils=[target[2]]))


@pytest.mark.parametrize("kind", [tiny.metaspace, tiny.prepending, tiny.word_piece])
def test_every_tokenizer_has_foils(kind):
    tokenizer = kind()
    model = tiny.llama(len(tokenizer))
    result = attribute(model, tokenizer, target="golf and 東京 chess.")
    assert any(result.foil_tokens)
    for t, own in enumerate(kept(result.foils)):
        assert int(result.target[t]) not in own
        assert len(set(own)) == len(own)


# Company ----------------------------------------------------------------------------------------


def test_foils_are_saved_with_the_result(model, tokenizer, tmp_path):
    result = attribute(model, tokenizer, KernelShap)
    result.save(tmp_path / "r")
    loaded = GenerationAttributionResult.load(tmp_path / "r")
    assert loaded.foil_tokens == result.foil_tokens
    assert torch.equal(loaded.foils, result.foils)
    assert torch.equal(loaded.foil_values.nan_to_num(), result.foil_values.nan_to_num())
    own, other = (r.refit(attr_target="log_prob") for r in (loaded, result))
    assert torch.equal(own.full_attr, other.full_attr)
    assert loaded.to_dict() == result.to_dict()


def test_interrupted_run_resumes(model, tokenizer, tmp_path):
    path = tmp_path / "run.safetensors"
    first = attribute(model, tokenizer, ShapleyValueSampling, checkpoint=path, n_samples=8)
    rows = []
    handle = model.register_forward_pre_hook(
        lambda _, __, named: rows.append(named["input_ids"].numel()), with_kwargs=True
    )
    try:
        again = attribute(model, tokenizer, ShapleyValueSampling, checkpoint=path, n_samples=8)
        n_resumed, _ = sum(rows), rows.clear()
        attribute(model, tokenizer, ShapleyValueSampling, n_samples=8)
    finally:
        handle.remove()
    assert torch.equal(first.values.nan_to_num(), again.values.nan_to_num())
    assert n_resumed < sum(rows)
    with pytest.raises(ValueError, match="belongs to another run"):
        attribute(model, tokenizer, ShapleyValueSampling, "log_prob", checkpoint=path, n_samples=8)
    with pytest.raises(ValueError, match="belongs to another run"):
        attribute(
            model,
            tokenizer,
            ShapleyValueSampling,
            Contrast(n_foils=3),
            checkpoint=path,
            n_samples=8,
        )


def test_dataset_records_keep_their_foils(model, tokenizer, tmp_path):
    records = [{"prompt": PROMPT, "target": TARGET}]
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer, "contrast")
    for expected in ("1 written", "1 there already"):
        assert expected in str(attribute_dataset(records, attribution, tmp_path))
    weight = model.model.layers[0].mlp.down_proj
    handle = weight.register_forward_hook(lambda _, __, output: output * 1.5)
    try:
        with pytest.raises(ValueError, match=r"another model|other values"):
            attribute_dataset(records, attribution, tmp_path)
    finally:
        handle.remove()


def test_faithfulness_and_comparisons_use_the_same_foils(model, tokenizer):
    attribution = GenerationAttribution(
        FeatureAblation(model), tokenizer, Contrast(without="Austin", n_foils=3)
    )
    inp = TextSegmentInput(PROMPT, tokenizer, baselines="<unk>")
    result = attribution.attribute(inp, TARGET)
    plain = GenerationAttribution(FeatureAblation(model), tokenizer, "contrast")
    with pytest.warns(UserWarning, match="one and the same token"):
        report = measure_faithfulness(plain, inp, result, token=0)
    assert f"all features: {float(result.full_values[0]):.2f}" in str(report)
    compared = compare_baselines(attribution, inp, {"a": None, "b": "<unk>"}, target=TARGET)
    foils = [one.foils.tolist() for one in compared.results.values()]
    assert foils[0] == foils[1]


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot:"]
)
def test_chats_and_games_take_contrasts(model, tokenizer, template):
    tokenizer.chat_template = template
    try:
        chat = [{"role": "user", "content": PROMPT}, {"role": "user", "content": "Why?"}]
        attribution = GenerationAttribution(ShapleyValues(model), tokenizer, "contrast")
        inp = ChatInput(chat, tokenizer, baselines="delete")
        result = attribution.attribute(inp, gen_args={"max_new_tokens": 3})
        assert float(result.efficiency_gap.abs().max()) < 1e-4
        game = attribution.to_game(inp, result.target, token=1, normalize=False)
        assert float(game.grand_coalition_value) == pytest.approx(
            float(result.full_values[1]), abs=1e-4
        )
    finally:
        tokenizer.chat_template = None


def test_inspect_forward_receives_contrasts(model, tokenizer):
    told = []
    result = attribute(
        model,
        tokenizer,
        output_unit=None,
        _inspect_forward=lambda prompt, answer, values: told.append(values),
    )
    assert told[0][1:] == pytest.approx(result.full_values.tolist(), abs=1e-5)
    assert told[0][0] == pytest.approx(float(result.full_values.sum()), abs=1e-4)


# Over an API ------------------------------------------------------------------------------------

PLACEHOLDER = RemoteLLMAttribution.placeholder_model


def remote(tokenizer, provider, contrast="contrast", **arguments):
    return RemoteGenerationAttribution(
        FeatureAblation(PLACEHOLDER), tokenizer, provider, contrast, **arguments
    )


@pytest.mark.parametrize("output_unit", [None, "token"])
def test_provider_with_foil_log_probabilities_equals_local_model(model, tokenizer, output_unit):
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    with Server(model, tokenizer) as server:
        provider = CompletionsProvider(server.url, top_logprobs=60)
        found = remote(tokenizer, provider).attribute(inp, TARGET, output_unit=output_unit)
        n_told = found.provenance["n_requests"]
        contrast = Contrast(foils=found.foils)
        few = CompletionsProvider(server.url)
        asked = remote(tokenizer, few, contrast).attribute(inp, TARGET, output_unit=output_unit)
    here = GenerationAttribution(FeatureAblation(model), tokenizer, contrast)
    truth = here.attribute(inp, TARGET, output_unit=output_unit)
    for result in (found, asked):
        torch.testing.assert_close(result.full_attr, truth.full_attr, atol=1e-4, rtol=1e-4)
    assert found.provenance["contrast"]["by"] == "before"
    assert n_told < asked.provenance["n_requests"]  # each foil by itself
    own = found.refit(attr_target="log_prob").full_attr
    torch.testing.assert_close(
        own, truth.refit(attr_target="log_prob").full_attr, atol=1e-4, rtol=0
    )


def test_provider_without_foil_log_probabilities_is_refused_before_requests(model, tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    with Server(model, tokenizer) as server:
        texts = CompletionsProvider(server.url, "tiny", prompts="text")
        with pytest.raises(ValueError, match="a provider that takes texts does not return"):
            remote(tokenizer, texts, Contrast(foils=7))
        with pytest.raises(ValueError, match="give `top_logprobs=20`"):
            remote(tokenizer, CompletionsProvider(server.url, "tiny"))
        assert not server.bodies
        # One that falls back on echoes tells no others: seen at the first answer.
        server.known = {"model", "prompt", "max_tokens", "temperature", "echo", "logprobs"}
        echoes = CompletionsProvider(server.url, "tiny", top_logprobs=20)
        attribution = remote(tokenizer, echoes)
        attribution.handshake()
        n_before = len(server.prompts)
        with pytest.raises(ValueError, match="no foils can be found"):
            attribution.attribute(inp, TARGET)
        assert len(server.prompts) == n_before + 1


# Shown ------------------------------------------------------------------------------------------


def test_table_plots_and_json_name_the_foils(demo):
    model, tokenizer = demo
    result = attribute(
        model, tokenizer, ShapleyValues, prompt="Dave lives in Palm", target=" Coast, FL"
    )
    first = ", ".join(result.foil_tokens[0][:3])
    assert f"(rather than {first}, …)" in result.table()
    assert "A contrast: log-probabilities less those of all foils" in result.table()
    assert "rather than" not in result.refit(attr_target="log_prob").table()
    assert max(map(len, result.table(width=50).splitlines())) <= 50
    data = result.to_dict()
    assert data["foils"] == result.foil_tokens
    _, ax = result.plot_text(0)
    assert ax.get_title(loc="left").startswith("Coast rather than ")
    _, ax = result.plot_token_attr()
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[0].startswith("Coast ≠ ")
