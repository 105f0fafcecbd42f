"""Activation patching: against plain hooks in a loop, and what holds of any model."""

import threading
import warnings
from functools import partial

import architectures
import matplotlib.pyplot as plt
import pytest
import tiny
import torch
from accelerate import cpu_offload
from captum.attr import TextTemplateInput, TextTokenInput
from torch import nn

from captum_llm_ext import (
    ActivationPatching,
    ChatInput,
    Contrast,
    CorpusBaselines,
    PatchingResult,
    TextSegmentInput,
    load_demo,
)

PROMPT = "Dave lives in Palm and is a lawyer."
TARGET = " golf and"
UNWATCHED = {"gemma 3n, shared states"}
LAYERS = {
    "llama": lambda model: model.model.layers,
    "gpt2": lambda model: model.transformer.h,
    "gpt-neox": lambda model: model.gpt_neox.layers,
    "opt": lambda model: model.model.decoder.layers,
    "mamba 2": lambda model: model.backbone.layers,
    "gemma 2, sliding window": lambda model: model.model.layers,
    "mixtral": lambda model: model.model.layers,
}


def other_ids(slot, generator):
    return [9] * len(slot.ids)


def segments(tokenizer, prompt=PROMPT, baselines=other_ids, **arguments):
    return TextSegmentInput(prompt, tokenizer, "word", baselines=baselines, **arguments)


def log_probs(model, ids, target):
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    said = logits[len(ids) - len(target) :].log_softmax(-1)
    return said[torch.arange(len(target)), torch.tensor(target)]


@torch.no_grad()
def by_hand(model, layers, read, given, target):
    """Values ``(n_layers + 1, length, n_target)`` of `read` with each cell as in `given`."""
    streams = []

    def note(stream):
        streams.append(stream[0].clone())

    def put(number, place, stream):
        changed = stream.clone()
        changed[0, place] = streams[number][place]
        return changed

    def hooked(number, function):
        if number == 0:

            def before(module, arguments, keywords):
                if arguments:
                    new = function(arguments[0])
                    return None if new is None else ((new, *arguments[1:]), keywords)
                new = function(keywords["hidden_states"])
                return None if new is None else ((), keywords | {"hidden_states": new})

            return layers[0].register_forward_pre_hook(before, with_kwargs=True)

        def after(module, arguments, output):
            is_tuple = isinstance(output, tuple)
            new = function(output[0] if is_tuple else output)
            return None if new is None else (new, *output[1:]) if is_tuple else new

        return layers[number - 1].register_forward_hook(after)

    hooks = [hooked(number, note) for number in range(len(layers) + 1)]
    model(input_ids=torch.tensor([given]), use_cache=False)
    for hook in hooks:
        hook.remove()
    values = []
    for number in range(len(layers) + 1):
        for place in range(len(read)):
            hook = hooked(number, partial(put, number, place))
            values.append(log_probs(model, read, target))
            hook.remove()
    return torch.stack(values).view(len(layers) + 1, len(read), len(target))


def rows(tokenizer, feature, replacement, target=TARGET, prompt=PROMPT):
    """The ids of the text and of the corrupted one, without the last; the target."""
    own = tokenizer.encode(target, add_special_tokens=False)
    clean = tokenizer.encode(prompt)
    inp = segments(tokenizer, prompt)
    slot = inp.slots[[name.strip() for name in inp.names].index(feature)]
    start = next(i for i in range(len(clean)) if tuple(clean[i:][: len(slot.ids)]) == slot.ids)
    corrupted = [*clean[:start], *replacement(len(slot.ids)), *clean[start + len(slot.ids) :]]
    places = range(start, start + len(slot.ids))
    return [*clean, *own[:-1]], [*corrupted, *own[:-1]], own, places


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", LAYERS)
def test_effects_equal_plain_hooks(name, direction, tokenizer):
    model = architectures.build(name, dtype=torch.float64)
    clean, corrupted, target, _ = rows(tokenizer, "Palm", lambda n: [9] * n)
    result = ActivationPatching(model).trace(
        segments(tokenizer), TARGET, feature="Palm", direction=direction
    )
    with torch.no_grad():
        best, worst = log_probs(model, clean, target), log_probs(model, corrupted, target)
    if direction == "denoise":
        expected = by_hand(model, LAYERS[name](model), corrupted, clean, target) - worst
    else:
        expected = best - by_hand(model, LAYERS[name](model), clean, corrupted, target)
    # Double precision; batches and single rows round otherwise.
    error = {"atol": 1e-6 if name == "mamba 2" else 1e-10, "rtol": 0}  # which scans in float32
    torch.testing.assert_close(result.effects, expected.permute(2, 0, 1), **error)
    torch.testing.assert_close(result.gain, best - worst, **error)
    torch.testing.assert_close(result.clean_values, best, **error)
    assert result.target.tolist() == target
    assert len(result.places) == len(clean)
    n_told = result.n_evaluations - 2 - (result.n_layers + 1)
    assert 0 < n_told <= (result.n_layers + 1) * len(clean)


@pytest.mark.parametrize("name", sorted(set(architectures.CONFIGS) - UNWATCHED))
def test_decoder_invariants(name, tokenizer):
    model = architectures.build(name, dtype=torch.float64)
    inp = TextSegmentInput("Dave is a nurse", tokenizer, "token", baselines=9)
    place = 3
    result = ActivationPatching(model).trace(inp, " golf", feature=place - 1)
    assert result.replaced == [place]
    gain, effects = result.gain, result.effects
    assert gain.abs().max() > 1e-3  # else there is nothing to be told apart
    for t, own in enumerate(result.said_at.tolist()):
        # Some layers compute in float32 whatever their weights are in.
        assert float(effects[t, -1, own]) == pytest.approx(float(gain[t]), abs=1e-6)
        assert float(effects[t, 0, place]) == pytest.approx(float(gain[t]), abs=1e-6)
        assert (effects[t, :, :place] == 0).all()
        assert (effects[t, :, own + 1 :] == 0).all()
        assert (effects[t, 0, place + 1 :] == 0).all()
        assert effects[t, -1, :own].abs().max() < 1e-6


@pytest.mark.parametrize("name", LAYERS)
def test_patching_whole_streams_and_features(name, tokenizer):
    model = architectures.build(name, dtype=torch.float64)
    inp, patching = segments(tokenizer), ActivationPatching(model)
    clean, _, _, places = rows(tokenizer, "Palm", lambda n: [9] * n)
    n = len(clean)
    groups = [list(range(places[0])), [*places], list(range(places[-1] + 1, n))]
    for direction in ("denoise", "noise"):
        arguments = {"feature": "Palm", "direction": direction}
        parts = patching.trace(inp, TARGET, places=groups, **arguments)
        gain = parts.gain[:, None]
        assert (parts.effects[:, :, 0] == 0).all()
        torch.testing.assert_close(parts.effects[:, :1, 1], gain, atol=1e-10, rtol=0)
        whole = patching.trace(inp, TARGET, places=[list(range(n))], **arguments).effects
        expected = gain.expand(-1, whole.shape[1])
        torch.testing.assert_close(whole[..., 0], expected, atol=1e-10, rtol=0)


def test_parallel_streams_are_refused(tokenizer):
    model = architectures.build("gemma 3n, shared states")
    with pytest.raises(ValueError, match=r"is \(2, 1, \d+, 32\): activation patching needs"):
        ActivationPatching(model).trace(segments(tokenizer), TARGET, feature="Palm")


class ReadsIdsAgain(nn.Module):
    """Its second layer is told the ids beside the stream."""

    def __init__(self, past=True):
        super().__init__()
        self.past, self.embedding = past, nn.Embedding(400, 16, dtype=torch.float64)
        self.layers = nn.ModuleList([Mean(), Mean()])
        self.head = nn.Linear(16, 400, dtype=torch.float64)

    def forward(self, input_ids):
        stream = self.embedding(input_ids)
        stream = self.layers[0](stream)
        if self.past:
            stream = stream + self.embedding(input_ids)
        return self.head(self.layers[1](stream))


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, stream):
        counts = torch.arange(1, stream.shape[1] + 1).double()[:, None]
        return stream + self.linear(stream.cumsum(1) / counts).tanh()


def test_side_paths_around_the_stream_are_detected(tokenizer):
    model = ReadsIdsAgain().eval()
    with pytest.raises(ValueError, match=r"does not expose its decoder layers"):
        ActivationPatching(model)
    patching = ActivationPatching(model, layers=model.layers)
    with pytest.raises(ValueError, match=r"stream 0 of 2 is not all that"):
        patching.trace(segments(tokenizer), TARGET, feature="Palm")
    plain = ReadsIdsAgain(past=False).eval()
    result = ActivationPatching(plain, layers=plain.layers).trace(
        segments(tokenizer), TARGET, feature="Palm"
    )
    clean, corrupted, target, _ = rows(tokenizer, "Palm", lambda n: [9] * n)
    with torch.no_grad():
        worst = plain(torch.tensor([corrupted]))[0].log_softmax(-1)
    own = float(worst[len(corrupted) - 1, target[-1]])
    assert float(result.corrupted_values[-1]) == pytest.approx(own)
    last = float(result.effects[-1, -1, len(clean) - 1])
    assert last == pytest.approx(float(result.gain[-1]))
    with pytest.raises(ValueError, match="none of ReadsIdsAgain's"):
        ActivationPatching(plain, layers=model.layers)


class SeesAhead(ReadsIdsAgain):
    """Its layers give every place a mean over all."""

    def __init__(self):
        super().__init__(past=False)
        for layer in self.layers:
            layer.forward = lambda stream: stream + stream.mean(1, keepdim=True).tanh()


def test_models_that_see_ahead_are_refused(tokenizer):
    model = SeesAhead().eval()
    with pytest.raises(ValueError, match="with causal attention"):
        ActivationPatching(model, layers=model.layers).trace(
            segments(tokenizer), TARGET, feature="Palm"
        )


def test_demo_effect_passes_through_the_generated_word(tokenizer):
    """D depends on A alone, which was written before it."""
    model, own, corpus = load_demo()
    document = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
    inp = TextSegmentInput(document, own, "word", baselines=CorpusBaselines(corpus))
    result = ActivationPatching(model).trace(
        inp, " poker, surfing and history. A good day ends with loud music.", feature="poker"
    )
    at = result.output_tokens.index("loud")
    assert result.gain[at] > 5
    others = result.gain.abs()
    others[at] = 0
    assert others.max() < 0.1  # nothing else depends on A
    (place,) = result.replaced
    assert result.place_names[place] == "poker"
    shares = result.shares[at]
    said = int(result.said_at[at])
    assert shares[0, place] == pytest.approx(1, abs=1e-4)
    assert shares[1, place] > 0.9
    assert shares[1, said] > 0.5
    assert shares[2, place] < 0.1
    assert shares[2, said] == pytest.approx(1, abs=0.02)
    assert shares[3, said] == pytest.approx(1, abs=1e-4)
    between = [p for p in range(len(result.places)) if p not in (place, said)]
    assert shares[:, between].abs().max() < 0.02
    assert result.shares[at - 1].isnan().all()  # a gain of nothing is no measure
    assert "'loud': gain" in str(result)


def test_replacements_come_from_the_input_baselines(model, tokenizer):
    patching = ActivationPatching(model)
    prompt = "Dave lives in Palm and is a lawyer."
    n = len(segments(tokenizer).slots[3].ids)
    wanted = ["Austin", "Oslo", "Rome", "Paris", "golf", "tennis", "Lima", "Bern"]
    fits = [w for w in wanted if len(tokenizer.encode(f" {w}", add_special_tokens=False)) == n]
    assert 0 < len(fits) < len(wanted)
    given = [[w] for w in prompt.split()]
    given[3] = wanted
    listed = segments(tokenizer, baselines=given)
    found = patching.trace(listed, TARGET, feature="Palm", n_draws=4)
    assert {text.strip() for text in found.replacements} <= {*fits}
    assert found.effects_se is not None
    assert len(found.replacements) == 4
    each = [
        patching.trace(
            segments(tokenizer, baselines=[*given[:3], [w], *given[4:]]), TARGET, feature=3
        )
        for w in (text.strip() for text in found.replacements)
    ]
    mean = torch.stack([one.effects for one in each])
    torch.testing.assert_close(found.effects, mean.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.effects_se, mean.std(0) / 4**0.5, atol=1e-5, rtol=0)
    assert patching.trace(listed, TARGET, feature="Palm", baselines=7).replacements[0]
    corpus = [f"Dave lives in {w} and is a lawyer." for w in wanted]
    baselines = CorpusBaselines(corpus, min_candidates=0)
    drawn = patching.trace(segments(tokenizer, baselines=baselines), TARGET, feature="Palm")
    assert drawn.replacements[0].strip() in fits


def test_default_replacements_come_from_the_model(tokenizer):
    model, own, _ = load_demo()
    inp = TextSegmentInput("Dave lives in Tampa, FL and is a lawyer.", own, "word")
    result = ActivationPatching(model).trace(inp, " His personal interests", feature="Dave")
    assert "ModelBaselines" in result.provenance["baselines"]
    assert result.replacements != ["Dave"]
    assert result.replaced == [1]
    assert result.output_tokens[0] == "His"


def test_replacement_of_other_length_is_refused(model, tokenizer):
    patching = ActivationPatching(model)
    for baselines in ("delete", [w if w != "Palm" else "a very long name" for w in PROMPT.split()]):
        with pytest.raises(ValueError, match=r"nothing of as many tokens stands in for ' Palm'"):
            patching.trace(segments(tokenizer, baselines=baselines), TARGET, feature="Palm")
    with pytest.raises(ValueError, match="they give it itself"):
        patching.trace(segments(tokenizer, baselines=PROMPT.split()), TARGET, feature="Palm")
    # Two places of which one gains what the other loses: what stands between them would move.
    count = len(segments(tokenizer).slots[3].ids)
    swapped = lambda slot, _: [9] * (len(slot.ids) + (1 if slot.index == 3 else -1))  # noqa: E731
    assert count > 1
    with pytest.raises(ValueError, match="move what stands between"):
        patching.trace(segments(tokenizer, baselines=swapped), TARGET, feature=["Palm", "lawyer."])
    with pytest.raises(ValueError, match="every draw of these baselines is the same"):
        patching.trace(segments(tokenizer, baselines=7), TARGET, feature="Palm", n_draws=3)


def test_features_are_selected_by_name_column_or_output(model, tokenizer):
    patching = ActivationPatching(model)
    inp = segments(tokenizer)
    by_name = patching.trace(inp, TARGET, feature="lawyer.")
    for feature in (7, "lawyer", ["lawyer."], [7]):
        again = patching.trace(inp, TARGET, feature=feature)
        assert torch.equal(again.effects, by_name.effects)
    both = patching.trace(inp, TARGET, feature=["Palm", "lawyer."])
    clean, _, target, _ = rows(tokenizer, "Palm", lambda n: [9] * n)
    assert both.replaced == sorted(
        {*patching.trace(inp, TARGET, feature="Palm").replaced, *by_name.replaced}
    )
    own = patching.trace(inp, TARGET, feature=len(inp.names), output_baselines=other_ids)
    assert own.replaced == [len(clean) - len(target) + 1]
    assert (own.gain[:1] == 0).all()
    assert own.gain[1:].abs().max() > 0
    with pytest.raises(ValueError, match="no target token comes after"):
        patching.trace(inp, TARGET, feature=len(inp.names) + len(target) - 1)
    with pytest.raises(ValueError, match="names none of the"):
        patching.trace(inp, TARGET, feature="Paris")
    with pytest.raises(ValueError, match=r"is the name of 2 features: give one of .*\[1, 4\]"):
        patching.trace(segments(tokenizer, "a b c a b d."), TARGET, feature="b")
    with pytest.raises(TypeError, match="give a feature's name"):
        patching.trace(inp, TARGET, feature=1.5)


def test_token_inside_a_replaced_word_is_nan(model, tokenizer):
    inp, target = segments(tokenizer), " Dave lives"
    result = ActivationPatching(model).trace(
        inp, target, feature=len(inp.names), output_unit="word", output_baselines=other_ids
    )
    own = tokenizer.encode(target, add_special_tokens=False)
    n_first = len(tokenizer.encode(" Dave", add_special_tokens=False))
    assert n_first > 1
    assert result.gain[0] == 0
    assert result.gain[1:n_first].isnan().all()
    assert result.effects[1:n_first].isnan().all()
    assert result.gain[n_first : len(own)].isfinite().all()


def test_noise_corruption_has_the_documented_scale(tokenizer):
    model = tiny.llama(len(tokenizer)).double()
    patching = ActivationPatching(model)
    inp = segments(tokenizer, baselines="delete")  # which plays no part
    clean, _, target, places = rows(tokenizer, "Palm", lambda n: [9] * n)
    result = patching.trace(
        inp, TARGET, feature="Palm", kind="noise", n_draws=100, places=[[*places]]
    )
    assert result.replaced == [*places]
    assert result.effects_se is not None
    # The mean over draws of a plain loop with draws of its own, and its error.
    table = model.get_input_embeddings()
    sigma = table(torch.tensor([clean])).std()
    generator = torch.Generator().manual_seed(5)
    worst = []
    for _ in range(100):
        noise = torch.zeros(1, len(clean), 32).double()
        noise[0, [*places]] = 3 * sigma * torch.randn(len(places), 32, generator=generator).double()
        with torch.no_grad():
            embedded = table(torch.tensor([clean])) + noise
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        said = logits[len(clean) - len(target) :].log_softmax(-1)
        worst.append(said[torch.arange(len(target)), torch.tensor(target)])
    worst = torch.stack(worst)
    error = worst.std(0) / 100**0.5
    assert ((result.corrupted_values - worst.mean(0)).abs() < 4 * 2**0.5 * error).all()
    few = patching.trace(inp, TARGET, feature="Palm", kind="noise", n_draws=2)
    again = patching.trace(inp, TARGET, feature="Palm", kind="noise", n_draws=2)
    assert torch.equal(few.effects, again.effects)
    other = patching.trace(inp, TARGET, feature="Palm", kind="noise", n_draws=2, seed=1)
    assert not torch.equal(few.effects, other.effects)
    for t, place in enumerate(few.said_at.tolist()):
        assert few.effects[t, -1, place] == pytest.approx(float(few.gain[t]), abs=1e-10)
    grouped = patching.trace(
        inp, TARGET, feature="Palm", kind="noise", n_draws=2, places=[[*places]]
    )
    torch.testing.assert_close(grouped.effects[:, 0, 0], few.gain, atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="baselines would be ignored"):
        patching.trace(inp, TARGET, feature="Palm", kind="noise", baselines=7)
    with pytest.raises(ValueError, match="`noise_scale` would be ignored"):
        patching.trace(segments(tokenizer), TARGET, feature="Palm", noise_scale=1.0)


def test_feature_positions_are_patched_together(tokenizer):
    model = tiny.llama(len(tokenizer)).double()
    patching = ActivationPatching(model)
    result = patching.trace(segments(tokenizer), TARGET, feature="Palm", places="feature")
    names = [name.strip() for name in result.place_names]
    assert names[:9] == ["<s>", *PROMPT.split()]
    flat = [place for group in result.places for place in group]
    assert flat == list(range(len(flat)))
    by_list = patching.trace(segments(tokenizer), TARGET, feature="Palm", places=result.places)
    torch.testing.assert_close(by_list.effects, result.effects, atol=1e-12, rtol=0)
    at = names.index("Palm")
    torch.testing.assert_close(result.effects[:, 0, at], result.gain, atol=1e-10, rtol=0)
    for places, said in (([[]], "empty list"), ([[0], [0]], "twice"), ([[99]], "place 99")):
        with pytest.raises(ValueError, match=said):
            patching.trace(segments(tokenizer), TARGET, feature="Palm", places=places)


def test_result_is_independent_of_batches_and_resumes(tokenizer, tmp_path, capsys):
    model = tiny.llama(len(tokenizer))
    patching, inp = ActivationPatching(model), segments(tokenizer)
    whole = patching.trace(inp, TARGET, feature="Palm", show_progress=True)
    bar = capsys.readouterr().err
    assert f"({whole.n_evaluations} of {whole.n_evaluations}," in bar
    single = patching.trace(inp, TARGET, feature="Palm", perturbations_per_eval=1)
    torch.testing.assert_close(single.effects, whole.effects, atol=1e-5, rtol=0)
    file = tmp_path / "patching.safetensors"
    n_passes, most = 0, 5

    def count(*_):
        nonlocal n_passes
        n_passes += 1
        if n_passes > most:
            raise KeyboardInterrupt

    hook = model.lm_head.register_forward_hook(count)
    arguments = {"feature": "Palm", "perturbations_per_eval": 4, "checkpoint": file}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        most = 12
        with pytest.raises(KeyboardInterrupt):
            patching.trace(inp, TARGET, **arguments)
        done, n_passes, most = n_passes, 0, 1000
        rest = patching.trace(inp, TARGET, **arguments)
        assert n_passes < done + 10
        n_passes = 0
        noised = patching.trace(inp, TARGET, direction="noise", **arguments)
    hook.remove()
    torch.testing.assert_close(rest.effects, whole.effects, atol=1e-5, rtol=0)
    other = patching.trace(inp, TARGET, feature="Palm", direction="noise")
    torch.testing.assert_close(noised.effects, other.effects, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="belongs to another run"):
        ActivationPatching(tiny.llama(len(tokenizer), seed=1)).trace(inp, TARGET, **arguments)
    with pytest.raises(ValueError, match="belongs to another run"):
        patching.trace(inp, " golf or", **arguments)


def test_model_state_is_restored(tokenizer):
    model = tiny.llama(len(tokenizer), attention_dropout=0.5, tie_word_embeddings=True)
    inp = segments(tokenizer)
    expected = ActivationPatching(model).trace(inp, TARGET, feature="Palm", first=10)
    model.train()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with torch.inference_mode():
        found = ActivationPatching(model).trace(inp, TARGET, feature="Palm", first=10)
    assert model.training
    assert model.model.layers[0].training
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(found.effects, expected.effects, equal_nan=True)
    broken = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ActivationPatching(model).trace(inp, TARGET, feature="Palm")
    broken.remove()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert model.training


def test_offloaded_and_compiled_models(tokenizer):
    inp = segments(tokenizer)
    expected = ActivationPatching(tiny.llama(len(tokenizer))).trace(inp, TARGET, feature="Palm")
    away = cpu_offload(tiny.llama(len(tokenizer)), torch.device("cpu"))
    assert next(away.parameters()).device.type == "meta"
    found = ActivationPatching(away).trace(inp, TARGET, feature="Palm")
    torch.testing.assert_close(found.effects, expected.effects, atol=1e-5, rtol=0)
    wrapped = torch.compile(tiny.llama(len(tokenizer)), backend="eager")
    found = ActivationPatching(wrapped).trace(inp, TARGET, feature="Palm")
    torch.testing.assert_close(found.effects, expected.effects, atol=1e-5, rtol=0)
    inside = tiny.llama(len(tokenizer))
    inside.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match="parts of LlamaForCausalLM are compiled"):
        ActivationPatching(inside)
    noisy = ActivationPatching(away).trace(inp, TARGET, feature="Palm", kind="noise", n_draws=2)
    usual = ActivationPatching(tiny.llama(len(tokenizer))).trace(
        inp, TARGET, feature="Palm", kind="noise", n_draws=2
    )
    torch.testing.assert_close(noisy.effects, usual.effects, atol=1e-5, rtol=0)


def test_patching_is_invisible_to_other_threads(tokenizer):
    model = tiny.llama(len(tokenizer))
    inp = segments(tokenizer)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    with torch.no_grad():
        before = model(ids).logits
    stop, wrong = threading.Event(), []

    def use():
        with torch.no_grad():
            while not stop.is_set():
                wrong.append(not torch.equal(model(ids).logits, before))

    thread = threading.Thread(target=use)
    thread.start()
    try:
        found = ActivationPatching(model).trace(inp, TARGET, feature="Palm", kind="noise")
    finally:
        stop.set()
        thread.join()
    assert wrong
    assert not any(wrong)
    again = ActivationPatching(model).trace(inp, TARGET, feature="Palm", kind="noise")
    torch.testing.assert_close(found.effects, again.effects, atol=1e-6, rtol=0)


def test_first_argument_selects_the_strongest_cells(tokenizer):
    model = tiny.llama(len(tokenizer), initializer_range=0.15).double()
    inp, n_first = segments(tokenizer), 6
    clean, corrupted, target, _ = rows(tokenizer, "Palm", lambda n: [9] * n)
    for direction in ("denoise", "noise"):
        patching = ActivationPatching(model)
        every = patching.trace(inp, TARGET, feature="Palm", direction=direction)
        some = patching.trace(inp, TARGET, feature="Palm", direction=direction, first=n_first)
        assert some.ranks is not None
        chosen = (some.ranks >= 0) & (some.ranks < n_first)
        assert chosen.sum() == n_first
        assert some.n_evaluations == 2 + every.n_layers + 1 + n_first
        torch.testing.assert_close(
            some.effects[:, chosen], every.effects[:, chosen], atol=1e-12, rtol=0
        )
        open_cells = (some.ranks >= n_first)[None] & (every.effects != 0)
        assert some.effects[open_cells].isnan().all()
        # First order by a difference: a step of a thousandth from one stream to the other.
        base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
        slopes = step_by_hand(model, model.model.layers, base, source, target, 1e-3)
        size = slopes.abs().amax(-1)
        order = size.flatten().argsort(descending=True)[:n_first]
        assert {*order.tolist()} == {*chosen.flatten().nonzero()[:, 0].tolist()}
    least = patching.trace(inp, TARGET, feature="Palm", first=10_000)
    assert not least.effects.isnan().any()


@torch.no_grad()
def step_by_hand(model, layers, base, source, target, step):
    """Slopes of values toward the other text's cell, ``(n_layers + 1, length, n_target)``."""
    streams = {}
    for ids in (tuple(source), tuple(base)):
        given = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        streams[ids] = list(given.hidden_states[:-1])
        last = []
        hook = layers[-1].register_forward_hook(lambda m, a, o, last=last: last.append(o))
        model(input_ids=torch.tensor([ids]), use_cache=False)
        hook.remove()
        streams[ids].append(last[0] if torch.is_tensor(last[0]) else last[0][0])
    at_base = log_probs(model, base, target)
    found = []
    for number, (there, here) in enumerate(zip(*streams.values(), strict=True)):
        for place in range(len(base)):
            changed = here.clone()
            changed[0, place] += step * (there - here)[0, place]
            if number == 0:
                hook = layers[0].register_forward_pre_hook(lambda m, a, new=changed: (new, *a[1:]))
            else:
                hook = layers[number - 1].register_forward_hook(
                    lambda m, a, o, new=changed: new if torch.is_tensor(o) else (new, *o[1:])
                )
            found.append((log_probs(model, base, target) - at_base) / step)
            hook.remove()
    return torch.stack(found).view(len(layers) + 1, len(base), len(target))


@pytest.mark.parametrize("attr_target", ["logit", "prob", "contrast", "callable", "foils"])
def test_other_attr_targets(attr_target, tokenizer):
    model = tiny.llama(len(tokenizer)).double()
    clean, corrupted, target, _ = rows(tokenizer, "Palm", lambda n: [9] * n)
    foil = 50

    def own(logits, target):
        return logits.gather(2, target.expand(len(logits), -1)[..., None])[..., 0] - logits[..., 7]

    value = {"callable": own, "foils": Contrast([foil])}.get(attr_target, attr_target)
    result = ActivationPatching(model, attr_target=value).trace(
        segments(tokenizer), TARGET, feature="Palm", first=12
    )
    if attr_target != "contrast":
        gains = []
        for ids in (clean, corrupted):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0][len(clean) - len(target) :]
            here = logits[torch.arange(len(target)), torch.tensor(target)]
            gains.append(
                {
                    "logit": here,
                    "prob": (here - logits.logsumexp(-1)).exp(),
                    "callable": here - logits[:, 7],
                    "foils": here - logits[:, foil],
                }[attr_target]
            )
        torch.testing.assert_close(result.gain, gains[0] - gains[1], atol=1e-9, rtol=0)
    known = result.effects[:, -1].gather(1, result.said_at[:, None])[:, 0]
    told = ~known.isnan()
    torch.testing.assert_close(known[told], result.gain[told], atol=1e-9, rtol=0)
    assert told.any()


def test_half_precision(tokenizer):
    model = tiny.llama(len(tokenizer), initializer_range=0.2)
    inp = segments(tokenizer)
    exact = ActivationPatching(model).trace(inp, TARGET, feature="Palm")
    rough = ActivationPatching(model.bfloat16()).trace(inp, TARGET, feature="Palm")
    # bfloat16 keeps eight bits: values of up to 10 nats are told to some hundredths.
    torch.testing.assert_close(rough.effects, exact.effects, atol=0.25, rtol=0.05)


def test_captum_inputs_and_chats(model, tokenizer):
    patching = ActivationPatching(model)
    inp = TextTokenInput(PROMPT, tokenizer, baselines=7)
    result = patching.trace(inp, TARGET, feature=4)
    assert result.replaced == [4]
    with pytest.raises(TypeError, match="would be ignored: a TextTokenInput has its own"):
        patching.trace(inp, TARGET, feature=4, baselines=8)
    template = TextTemplateInput("{} lives in {}", ["Dave", "Palm"], baselines=["Ann", "Rome"])
    with pytest.raises(ValueError, match="does not expose its tokenizer"):
        patching.trace(template, TARGET, feature=0)
    with pytest.raises(TypeError, match="features that own tokens"):
        ActivationPatching(model, tokenizer).trace(template, TARGET, feature=0)
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    chat = ChatInput([{"role": "user", "content": PROMPT}], tokenizer, "word", baselines=other_ids)
    said = patching.trace(chat, gen_args={"max_new_tokens": 3}, feature="Palm")
    assert len(said.target) == 3
    assert said.provenance["generation"]
    assert said.gain.abs().max() > 0


def test_result_round_trips_through_a_file(model, tokenizer, tmp_path):
    patching = ActivationPatching(model)
    result = patching.trace(segments(tokenizer), TARGET, feature="Palm", first=5)
    file = tmp_path / "traced.safetensors"
    result.save(file)
    again = PatchingResult.load(file)
    for name in vars(result):
        one, other = getattr(result, name), getattr(again, name)
        if torch.is_tensor(one):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other
    assert str(again) == str(result)
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="is damaged"):
        PatchingResult.load(file)


def test_plots(model, tokenizer):
    result = ActivationPatching(model).trace(segments(tokenizer), TARGET, feature="Palm")
    fig, ax = result.plot(-1)
    assert result.place_names[result.replaced[0]] in [t.get_text() for t in ax.get_xticklabels()]
    assert "gain" in ax.get_title(loc="left")
    image = ax.images[0]
    said = int(result.said_at[-1])
    drawn = result.effects[-1][:, result.replaced[0] : said + 1].flip(0)
    assert torch.equal(torch.tensor(image.get_array().data), drawn)
    assert image.norm.vmin == -image.norm.vmax
    assert image.cmap.name == "RdBu"
    plt.close(fig)
    fig, own = plt.subplots()
    _, ax = result.plot(0, every_place=True, ax=own, cmap="PuOr")
    assert ax is own
    assert ax.images[0].cmap.name == "PuOr"
    assert ax.images[0].get_array().shape[1] == len(result.places)
    plt.close(fig)
    with pytest.raises(ValueError, match="0 target tokens"):
        result.plot("Rome")
    with pytest.raises(ValueError, match="there are"):
        result.plot(99)


def test_bad_arguments_are_refused(model, tokenizer):
    patching, inp = ActivationPatching(model), segments(tokenizer)
    for wrong, said in (
        ({"kind": "zero"}, "`kind` is 'zero'"),
        ({"direction": "up"}, "`direction` is 'up'"),
        ({"places": "word"}, "`places` is 'word'"),
        ({"first": 0}, "`first` is 0"),
        ({"n_draws": -1}, "`n_draws` is -1"),
        ({"feature": []}, "`feature` is empty"),
        ({"feature": 99}, "there are"),
        ({"gen_args": {"max_new_tokens": 3}}, "`gen_args` would be ignored"),
        ({"kind": "noise", "noise_scale": -1.0}, "number above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            patching.trace(inp, TARGET, **({"feature": "Palm"} | wrong))
    with pytest.raises(ValueError, match="give one of"):
        ActivationPatching(model, attr_target="loss")
