"""Attribution over an API: the numbers of the same model run here, whoever is asked and however."""

import inspect
import re
import sys

import pytest
import tiny
import torch
from accelerate import Accelerator
from captum.attr import (
    FeatureAblation,
    ImageMaskInput,
    KernelShap,
    Lime,
    RemoteLLMAttribution,
    ShapleyValues,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
    VLLMProvider,
)
from PIL import Image
from remote_server import Server, met

from captum_llm_ext import (
    CompletionsProvider,
    CorpusBaselines,
    FeatureInclusion,
    GenerationAttribution,
    GenerationAttributionResult,
    HierarchicalAblation,
    PartitionShap,
    RemoteGenerationAttribution,
    TextSegmentInput,
    TokenProvider,
    attribute_dataset,
    compare_baselines,
    measure_faithfulness,
)

PLACEHOLDER = RemoteLLMAttribution.placeholder_model
PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His interests include"
TARGET = " golf and chess."
METHODS = [
    FeatureAblation,
    ShapleyValues,
    ShapleyValueSampling,
    KernelShap,
    Lime,
    PartitionShap,
    FeatureInclusion,
    HierarchicalAblation,
]


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.llama(len(tokenizer)).double()  # what differs is not rounding


@pytest.fixture(scope="module")
def shared(model, tokenizer):
    with Server(model, tokenizer) as server:
        yield server


@pytest.fixture
def server(shared):
    for noted in (shared.prompts, shared.bodies, shared.times):
        noted.clear()
    return shared


@pytest.fixture
def provider(server):
    return met(CompletionsProvider(server.url, "tiny"), server)


@pytest.fixture
def vllm(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")
    provider = VLLMProvider(server.url)
    by_text = RemoteGenerationAttribution(
        FeatureAblation(PLACEHOLDER), server.tokenizer, provider, on_mismatch="error"
    )
    assert by_text.handshake()["checks"]["asked twice"].startswith("the same")
    server.prompts.clear()
    yield provider
    provider.client.close()


def words(tokenizer, **arguments):
    unit = arguments.pop("unit", "word")
    arguments = {"baselines": "delete"} | arguments
    return TextSegmentInput("Dave lives. Ann is in TX.", tokenizer, unit=unit, **arguments)


def template(**changes):
    settings = {
        "template": "{} lives in {} and is a {}. His interests include",
        "values": ["Dave", "Palm Coast", "lawyer"],
        "baselines": ["Ann", "Austin", "nurse"],
    }
    return TextTemplateInput(**settings | changes)


def assert_same(remote, local, atol=1e-4):
    assert remote.input_tokens == local.input_tokens
    assert remote.output_tokens == local.output_tokens
    assert torch.equal(remote.target, local.target)
    assert remote.n_evaluations == local.n_evaluations
    for name in ("values", "token_attr", "seq_attr", "output_attr", "full_values", "empty_values"):
        ours, truth = getattr(remote, name), getattr(local, name)
        assert (ours is None) == (truth is None)
        if ours is not None:
            torch.testing.assert_close(
                ours.double(), truth.double(), atol=atol, rtol=1e-6, equal_nan=True
            )


@pytest.mark.parametrize("output_unit", [None, "word", "token"])
@pytest.mark.parametrize("method", METHODS)
def test_remote_numbers_equal_the_local_model(
    model, tokenizer, server, provider, method, output_unit
):
    baselines = (
        CorpusBaselines(tiny.TEXTS, min_candidates=0) if method is ShapleyValueSampling else None
    )
    units = {HierarchicalAblation: ("sentence", "word"), ShapleyValues: "sentence"}
    inp = words(tokenizer, baselines=baselines, unit=units.get(method, "word"))
    sampled = method in (ShapleyValueSampling, KernelShap, Lime)
    arguments = {"output_unit": output_unit} | ({"n_samples": 30} if sampled else {})
    local = GenerationAttribution(method(model), tokenizer).attribute(inp, TARGET, **arguments)
    remote = RemoteGenerationAttribution(
        method(PLACEHOLDER), tokenizer, provider, most_requests=10_000
    )
    found = remote.attribute(inp, TARGET, **arguments)
    assert_same(found, local)
    assert found.token_attr.dtype == torch.float32
    assert isinstance(remote, RemoteLLMAttribution)
    # Each prompt was sent once, and no target was ever made text.
    assert len(server.prompts) == len(set(map(tuple, server.prompts)))
    assert len(server.prompts) == found.provenance["n_requests"]
    n_output = 0 if output_unit is None else len(found.output_features) - 1
    if output_unit is None or method in (FeatureAblation, ShapleyValues):
        # What one coalition leaves out is what another one has; not so where everything is absent.
        n_apart = n_output if method is FeatureAblation else 0
        assert found.provenance["n_requests"] == found.n_evaluations + n_apart
    if output_unit is None:
        n_target = len(found.target)
        assert {tuple(prompt[-n_target:]) for prompt in server.prompts} == {
            tuple(found.target.tolist())
        }


def test_argument_order_equals_captum():
    for name in ("__init__", "attribute"):
        captums = inspect.signature(getattr(RemoteLLMAttribution, name)).parameters
        ours = inspect.signature(getattr(RemoteGenerationAttribution, name)).parameters
        plain = [p for p in captums if captums[p].kind is captums[p].POSITIONAL_OR_KEYWORD]
        assert list(ours)[: len(plain)] == plain
        rest = [p for p in list(ours)[len(plain) :] if p != "arguments"]
        assert all(ours[p].kind is ours[p].KEYWORD_ONLY for p in rest)


def test_output_is_fixed_by_default(tokenizer, provider):
    remote = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), tokenizer, provider)
    assert remote.attribute(words(tokenizer), TARGET).output_attr is None


@pytest.mark.parametrize("kind", ["completions", "vllm"])
def test_remote_numbers_equal_captum(tokenizer, provider, vllm, kind):
    asked = provider if kind == "completions" else vllm
    for method in (FeatureAblation, ShapleyValues):
        for target in ("log_prob", "prob"):
            captums = RemoteLLMAttribution(method(PLACEHOLDER), tokenizer, asked, target)
            truth = captums.attribute(template(), TARGET)
            ours = RemoteGenerationAttribution(method(PLACEHOLDER), tokenizer, asked, target)
            found = ours.attribute(template(), TARGET)
            assert found.input_tokens == truth.input_tokens
            torch.testing.assert_close(found.token_attr, truth.token_attr, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.seq_attr, truth.seq_attr, atol=1e-4, rtol=1e-3)


def test_captum_provider_is_used_unchanged(model, tokenizer, server, vllm):
    inp = words(tokenizer)
    local = GenerationAttribution(KernelShap(model), tokenizer)
    remote = RemoteGenerationAttribution(KernelShap(PLACEHOLDER), tokenizer, vllm)
    arguments = {"n_samples": 30, "seed": 3}
    found = remote.attribute(inp, TARGET, **arguments)
    assert_same(found, local.attribute(inp, TARGET, output_unit=None, **arguments))
    assert len(server.prompts) == len(set(server.prompts)) == found.n_evaluations
    told = found.provenance
    assert (told["provider"], told["model"], told["api"]) == ("VLLMProvider", "tiny", server.url)
    assert told["sent_as"] == "text"
    assert "of-the-test" not in repr(told)
    # Ends of texts are tokens too, and a tokenizer's text of them is read as that.
    ended = [*tokenizer.encode(TARGET, add_special_tokens=False), tokenizer.eos_token_id]
    found = remote.attribute(inp, ended, **arguments)
    assert_same(found, local.attribute(inp, ended, output_unit=None, **arguments))
    with pytest.raises(ValueError, match="VLLMProvider takes texts"):
        remote.attribute(inp, TARGET, output_unit="word")


def test_inspect_forward_receives_captums_arguments(tokenizer, provider):
    def seen_by(attribution):
        seen = {}
        attribution.attribute(
            template(), TARGET, _inspect_forward=lambda *told: seen.update({told[:2]: told[2]})
        )
        return seen

    captums = seen_by(RemoteLLMAttribution(FeatureAblation(PLACEHOLDER), tokenizer, provider))
    found = seen_by(RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), tokenizer, provider))
    # Texts of ids begin with what the tokenizer puts before them.
    ours = {(prompt.removeprefix("<s>"), text): told for (prompt, text), told in found.items()}
    assert captums.keys() <= ours.keys()
    for key, probabilities in captums.items():
        assert ours[key] == pytest.approx(probabilities, rel=1e-4)


def test_joint_probabilities(model, tokenizer, provider):
    local = GenerationAttribution(ShapleyValues(model), tokenizer, "prob")
    remote = RemoteGenerationAttribution(ShapleyValues(PLACEHOLDER), tokenizer, provider, "prob")
    truth = local.attribute(template(), TARGET, output_unit="word")
    found = remote.attribute(template(), TARGET, output_unit="word")
    assert_same(found, truth, atol=1e-6)
    torch.testing.assert_close(found.seq_attr.double(), truth.seq_attr, atol=0.0, rtol=1e-3)


@pytest.mark.parametrize("unit", ["token", "word"])
@pytest.mark.parametrize("baselines", [None, "texts"])
def test_request_count(tokenizer, server, unit, baselines):
    texts = CorpusBaselines(tiny.TEXTS, min_candidates=0) if baselines else None
    # Of one sentence: the whole answer takes no coalitions of its own.
    one = "Dave lives in TX with Ann."
    inp = TextSegmentInput(one, tokenizer, "word", baselines=texts or "delete")
    arguments = {"n_samples": 24, "output_unit": unit}
    found = {}
    for top in (0, 20, *([] if baselines else [len(tokenizer)])):
        server.prompts.clear()
        provider = met(CompletionsProvider(server.url, "tiny", top_logprobs=top), server)
        remote = RemoteGenerationAttribution(KernelShap(PLACEHOLDER), tokenizer, provider)
        found[top] = remote.attribute(inp, TARGET, **arguments)
        sent = {tuple(prompt) for prompt in server.prompts}
        assert len(sent) == len(server.prompts) == found[top].provenance["n_requests"]
        # What is the beginning of another prompt is told by it.
        assert not {prompt[:n] for prompt in sent for n in range(len(prompt))} & sent
    plain, *others = found.values()
    n_rows, n_plain = plain.n_evaluations, plain.provenance["n_requests"]
    # At most one for a coalition, and one for each absent feature of the output.
    absent = int((~plain.masks[:, len(plain.input_tokens) :]).sum())
    assert n_rows < n_plain <= n_rows + absent
    for other in others:
        torch.testing.assert_close(other.values, plain.values, equal_nan=True)
        assert n_rows <= other.provenance["n_requests"] <= n_plain
    if baselines is None:
        assert n_plain < n_rows + absent  # deletion leaves what other coalitions begin with
        assert others[-1].provenance["n_requests"] == n_rows  # every token is told everywhere


def test_cost_estimate_sends_no_request(tokenizer, server, provider):
    remote = RemoteGenerationAttribution(
        KernelShap(PLACEHOLDER), tokenizer, provider, most_requests=50
    )
    inp = words(tokenizer)
    with pytest.warns(UserWarning, match="has to be requested separately") as told:
        remote.attribute(inp, TARGET, output_unit="token", n_samples=40)
    (told,) = [one for one in told if "deleted" not in str(one.message)]
    assert told.filename == __file__
    said = re.match(r"(\d+) coalitions take (\d+) requests", str(told.message))
    n_rows, n = map(int, said.groups())
    # The whole answer takes a few more.
    assert len(server.prompts) - 8 <= n <= len(server.prompts)
    assert n > n_rows
    # Held fixed, it is one for a coalition: what a user expects, however many.
    remote.attribute(inp, TARGET, n_samples=60)


@pytest.mark.parametrize("way", ["echo", "auto"])
def test_echo_servers(model, tokenizer, way):
    known = {"model", "prompt", "max_tokens", "temperature", "echo", "logprobs", "seed"}
    inp = words(tokenizer)
    with Server(model, tokenizer, known=known) as strict:
        provider = CompletionsProvider(strict.url, logprobs=way)
        assert provider.model_name == "tiny"
        assert provider.max_model_len == 256
        remote = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), tokenizer, provider)
        found = remote.attribute(inp, TARGET, output_unit="word")
        handshake = found.provenance["handshake"]
        assert handshake["way"] == "echo"
        assert list(handshake["refused"]) == ([] if way == "echo" else ["prompt_logprobs"])
        assert any("prompt_logprobs" in body for body in strict.bodies) == (way == "auto")
        # And no ids of what it writes: the text is encoded anew, visibly.
        with pytest.warns(UserWarning, match="returns no ids"):
            generated = remote.attribute(inp, gen_args={"max_tokens": 3})
        assert generated.provenance["target_from"] == "text"
    local = GenerationAttribution(FeatureAblation(model), tokenizer)
    assert_same(found, local.attribute(inp, TARGET, output_unit="word"))


def test_single_prompt_requests(model, tokenizer, server):
    inp = words(tokenizer)
    few = CompletionsProvider(server.url, "tiny", prompts_per_request=3, max_concurrency=2)
    remote = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), tokenizer, few)
    found = remote.attribute(inp, TARGET)
    assert max(len(b["prompt"]) for b in server.bodies if isinstance(b["prompt"][0], list)) == 3
    server.bodies.clear()
    again = remote.attribute(inp, TARGET, perturbations_per_eval=1)
    assert all(isinstance(body["prompt"][0], int) for body in server.bodies)
    assert torch.equal(found.token_attr, again.token_attr)


@pytest.mark.parametrize(
    "gen_args", [{"max_new_tokens": 5}, {"max_tokens": 5}, {"max_new_tokens": 5, "do_sample": True}]
)
def test_generated_target_is_token_ids(model, tokenizer, server, provider, gen_args):
    inp = words(tokenizer)
    remote = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), tokenizer, provider)
    found = remote.attribute(inp, gen_args=gen_args, seed=4)
    sent = server.bodies[0]
    assert sent["max_tokens"] == 5
    told = found.provenance["generation"]
    assert told.items() >= {k: repr(v) for k, v in gen_args.items()}.items()
    assert ("do_sample" in gen_args) or told["temperature"] == "0.0"
    if "do_sample" in gen_args:
        assert sent["seed"] == 4
        again = remote.attribute(inp, gen_args=gen_args, seed=4)
        assert torch.equal(found.target, again.target)
        return
    local = GenerationAttribution(FeatureAblation(model), tokenizer)
    truth = local.attribute(inp, gen_args={"max_new_tokens": 5}, output_unit=None)
    assert_same(found, truth)  # random ids that no text is encoded to
    assert tokenizer.encode(tokenizer.decode(found.target), add_special_tokens=False) != list(
        found.target
    )


def test_captum_provider_generates_greedily(tokenizer, server, vllm):
    inp = template()
    RemoteLLMAttribution(FeatureAblation(PLACEHOLDER), tokenizer, vllm)._get_target_tokens(inp)
    # Captum's `temperature=None` leaves it to the server, and servers sample by default.
    assert server.bodies[-1].get("temperature") is None
    remote = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), tokenizer, vllm)
    n_before = len(server.bodies)
    found = remote.attribute(inp, gen_args={"max_new_tokens": 3})
    assert found.provenance["target_from"] == "text"
    sent = server.bodies[n_before]
    assert (sent["max_tokens"], sent["temperature"]) == (3, 0)


class Plain:
    """A provider of the user's own, as small as can be: no text, no threads."""

    def __init__(self, model):
        self.model, self.n = model, 0

    @torch.no_grad()
    def get_token_logprobs(self, prompts):
        found = []
        for ids in prompts:
            self.n += 1
            logits = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            own = [{token: float(logits[i, token])} for i, token in enumerate(ids[1:])]
            found.append([None, *own])
        return found


class Tiny:
    """One of captum's kind that has nothing but its two methods, and joins tokens."""

    def __init__(self, model):
        self.plain = Plain(model)

    def generate(self, prompt, **gen_args):
        return TARGET

    def get_logprobs(self, input_prompt, target_str, tokenizer):
        target = tokenizer.encode(target_str, add_special_tokens=False)
        [found] = self.plain.get_token_logprobs([tokenizer.encode(input_prompt) + target])
        return [entry[token] for entry, token in zip(found[-len(target) :], target, strict=True)]


@pytest.mark.parametrize("kind", [Plain, Tiny])
def test_minimal_providers(model, tokenizer, kind):
    inp, own = words(tokenizer), kind(model)
    assert isinstance(own, TokenProvider) == (kind is Plain)
    remote = RemoteGenerationAttribution(ShapleyValueSampling(PLACEHOLDER), tokenizer, own)
    local = GenerationAttribution(ShapleyValueSampling(model), tokenizer)
    arguments = {"target": TARGET, "output_unit": "word" if kind is Plain else None}
    assert_same(remote.attribute(inp, **arguments), local.attribute(inp, **arguments))
    if kind is Plain:
        with pytest.raises(ValueError, match="Plain has no `generate_tokens`: give the `target`"):
            remote.attribute(inp)
        own.generate = lambda prompt, **gen_args: TARGET
        written = remote.attribute(inp)
        assert written.provenance["target_from"] == "text"
        assert written.output_tokens == local.attribute(inp, TARGET).output_tokens
    else:
        assert remote.attribute(inp).output_tokens == local.attribute(inp, TARGET).output_tokens


def test_token_inputs_have_one_bos(model, tokenizer, server, vllm):
    inp = TextTokenInput("Dave lives in", tokenizer, baselines=3, skip_tokens=[1])
    ours = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), tokenizer, vllm)
    local = GenerationAttribution(FeatureAblation(model), tokenizer)
    found, truth = ours.attribute(inp, TARGET), local.attribute(inp, TARGET, output_unit=None)
    assert_same(found, truth)
    assert {tokenizer.encode(text)[:2].count(1) for text in server.prompts} == {1}
    # Captum decodes BOS as text, before which the server puts another one: other numbers.
    server.prompts.clear()
    captums = RemoteLLMAttribution(FeatureAblation(PLACEHOLDER), tokenizer, vllm)
    other = captums.attribute(inp, TARGET)
    assert all(tokenizer.encode(text)[:2] == [1, 1] for text in server.prompts)
    assert not torch.allclose(other.token_attr.double(), truth.token_attr, atol=0.01)


def test_target_merging_with_the_prompt_is_aligned(tokenizer, vllm, provider, model):
    # After "Dave l", "ives" is no token: the server reads " lives" or the like.
    inp = TextTemplateInput("{} l", ["Dave"], ["Ann"])
    target = tokenizer.encode("ives in", add_special_tokens=False)
    joint = tokenizer.encode("Dave lives in")
    assert joint[-len(target) :] != target
    captums = RemoteLLMAttribution(FeatureAblation(PLACEHOLDER), tokenizer, vllm)
    wrong = captums.attribute(inp, torch.tensor(target)).token_attr  # not a word of it
    ours = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), tokenizer, vllm)
    with pytest.raises(ValueError, match=r"row 0 \(after '<s>Dave l'\): .* read as the tokens"):
        ours.attribute(inp, target)
    by_ids = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), tokenizer, provider)
    truth = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(
        inp, target, output_unit=None
    )
    assert_same(by_ids.attribute(inp, target), truth)
    assert not torch.allclose(wrong.double(), truth.token_attr, atol=0.01)
    # A provider that joins tokens is right, and the user may say so.
    joins = RemoteGenerationAttribution(
        FeatureAblation(PLACEHOLDER), tokenizer, Tiny(model), on_mismatch="warn"
    )
    with pytest.warns(UserWarning, match="if the provider joins texts"):
        found = joins.attribute(inp, target)
    assert_same(found, truth)
    assert found.provenance["n_mismatches"] == 2


def test_leading_space_of_the_target_is_kept():
    tokenizer = tiny.metaspace()
    model = tiny.llama(len(tokenizer)).double()
    assert tokenizer.decode(tokenizer.encode(" golf", add_special_tokens=False)) == "golf"
    with Server(model, tokenizer) as server:
        provider = CompletionsProvider(server.url, prompts="text")
        ours = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), tokenizer, provider)
        found = ours.attribute(template(), " golf and chess.")
        local = GenerationAttribution(FeatureAblation(model), tokenizer)
        truth = local.attribute(template(), " golf and chess.", output_unit=None)
        assert_same(found, truth)
        # Captum sends "includegolf".
        captums = RemoteLLMAttribution(FeatureAblation(PLACEHOLDER), tokenizer, provider)
        server.prompts.clear()
        with pytest.raises(ValueError, match="does not match expected target token length"):
            captums.attribute(template(), " golf and chess.")


class CountsRightly(CompletionsProvider):
    """Tells values of what stands after the prompt in the joint text, however many these are."""

    def get_logprobs(self, input_prompt, target_str, tokenizer=None):
        before, ids = tokenizer.encode(input_prompt), tokenizer.encode(input_prompt + target_str)
        (entries,) = self._logprobs([input_prompt + target_str], [ids])
        return [(e or {}).get(i) for i, e in zip(ids, entries, strict=True)][len(before) :]


@pytest.mark.parametrize(
    ("text", "target", "n_alone"),
    [
        ("{} lives in {} and is a {}. His interests include", "golf and chess.", 4),
        ("{} lives in {} and is a {}. His interests include", " golf and chess.", 5),
        ("{} lives in {} and is a {}. His interests include (", ["go", "lf"], 1),
        ("{} lives in {} and is a {}. (", ["go", "lf", "▁and"], 2),
    ],
)
@pytest.mark.parametrize("kind", ["vllm", "rightly", "ours"])
def test_providers_that_tokenise_the_target_separately(monkeypatch, kind, text, target, n_alone):
    """Of a tokenizer that marks the beginning of every text, as that of Llama-2 does."""
    tokenizer = tiny.prepending()
    model = tiny.llama(len(tokenizer)).double()
    ids = (
        tokenizer.encode(target, add_special_tokens=False)
        if isinstance(target, str)
        else tokenizer.convert_tokens_to_ids(target)
    )
    inp = template(template=text)
    truth = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(
        inp, ids, output_unit=None
    )
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")
    with Server(model, tokenizer) as server:
        if kind == "vllm":
            provider = VLLMProvider(server.url)
        else:
            cls = CountsRightly if kind == "rightly" else CompletionsProvider
            provider = cls(server.url, prompts="text")
        try:
            ours = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), tokenizer, provider)
            ours.attribute(inp, torch.tensor(ids))
            server.prompts.clear()
            assert_same(ours.attribute(inp, torch.tensor(ids)), truth)
            if kind == "vllm":
                # No request was for anything but the texts of the coalitions.
                assert len(set(server.prompts)) == truth.n_evaluations
                # One that joins tokens tells values of others: their number stays an error.
                warned = RemoteGenerationAttribution(
                    FeatureAblation(PLACEHOLDER), tokenizer, provider, on_mismatch="warn"
                )
                with pytest.raises(ValueError, match=f"{n_alone} log-probabilities for {len(ids)}"):
                    warned.attribute(inp, torch.tensor(ids))
        finally:
            if kind == "vllm":
                provider.client.close()


def test_retokenised_prompts_are_counted(tokenizer, vllm):
    # Tokens that are left of a word merge to others.
    inp = TextSegmentInput("includxe", tokenizer, unit="token", baselines="delete")
    ours = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), tokenizer, vllm)
    with pytest.warns(UserWarning, match=r"row \d+ .* read as other tokens than it was rendered"):
        found = ours.attribute(inp, TARGET)
    assert 0 < found.provenance["n_retokenized"] < found.n_evaluations


def test_datasets_comparisons_games_and_files(model, tokenizer, provider, tmp_path):
    remote = RemoteGenerationAttribution(KernelShap(PLACEHOLDER), tokenizer, provider)
    local = GenerationAttribution(KernelShap(model), tokenizer)
    report = attribute_dataset(
        ["Dave lives", "Ann is"],
        remote,
        tmp_path,
        accelerator=Accelerator(cpu=True),
        gen_args={"max_new_tokens": 3},
    )
    assert (report.n_written, report.n_failed) == (2, 0)
    loaded = GenerationAttributionResult.load(tmp_path / "000001.safetensors")
    assert loaded.provenance["provider"] == "CompletionsProvider"
    assert "CompletionsProvider" in loaded.to_html()
    baselines = {"deletion": None, "unknown": "<unk>"}
    inp, settings = words(tokenizer, unit="sentence"), {"output_unit": None}
    compared = compare_baselines(remote, inp, baselines, target=TARGET)
    truth = compare_baselines(local, inp, baselines, target=TARGET, **settings)
    for name in baselines:
        assert_same(compared.results[name], truth.results[name])
    inp = words(tokenizer)
    masks = torch.rand(12, inp.n_features, generator=torch.Generator().manual_seed(0)) < 0.5
    games = [one.to_game(inp, TARGET, output_unit=None)(masks.numpy()) for one in (remote, local)]
    assert games[0] == pytest.approx(games[1], abs=1e-4)
    inp = words(tokenizer, unit="sentence")
    with pytest.warns(UserWarning, match="Absent features are deleted"):
        there, here = (
            measure_faithfulness(
                one, inp, compared.results, n_coalitions=8, n_orders=2, max_steps=3
            )
            for one in (remote, local)
        )
    for name in baselines:
        for kind, curve in here.curves[name].items():
            found = there.curves[name][kind].values.value
            torch.testing.assert_close(found, curve.values.value, atol=1e-4, rtol=0)


def test_model_based_baselines(model, tokenizer, server, provider, vllm):
    texts = CorpusBaselines(tiny.TEXTS, match="model", min_candidates=0)
    inp = words(tokenizer, baselines=texts)
    method, arguments = ShapleyValueSampling, {"target": TARGET, "n_samples": 4}
    remote = RemoteGenerationAttribution(method(PLACEHOLDER), tokenizer, provider)
    found = remote.attribute(inp, **arguments)
    local = GenerationAttribution(method(model), tokenizer)
    assert_same(found, local.attribute(inp, output_unit=None, **arguments))
    assert len(server.prompts) == found.provenance["n_requests"] > found.n_evaluations
    with pytest.raises(ValueError, match="which an API does not"):
        remote.attribute(inp, output_unit="word", **arguments)
    by_text = RemoteGenerationAttribution(method(PLACEHOLDER), tokenizer, vllm)
    with pytest.raises(ValueError, match="a provider that takes texts does not return"):
        by_text.attribute(inp, **arguments)


def test_foreign_method(model, tokenizer, provider):
    class Own(FeatureAblation):
        """Driven through its own `attribute`."""

    inp = words(tokenizer)
    remote = RemoteGenerationAttribution(Own(PLACEHOLDER), tokenizer, provider)
    local = GenerationAttribution(Own(model), tokenizer)
    arguments = {"target": TARGET, "output_unit": "token"}
    assert_same(remote.attribute(inp, **arguments), local.attribute(inp, **arguments))


def test_user_objects_are_unchanged(tokenizer, provider):
    method = KernelShap(PLACEHOLDER)
    before, state = method.forward_func, torch.get_rng_state()
    remote = RemoteGenerationAttribution(method, tokenizer, provider)
    remote.attribute(words(tokenizer), TARGET, n_samples=20)
    assert method.forward_func is before
    assert torch.equal(torch.get_rng_state(), state)


def test_arguments_without_meaning_for_apis_are_refused(tokenizer, provider, server):
    method = FeatureAblation(PLACEHOLDER)

    def made(*args, **kwargs):
        return RemoteGenerationAttribution(method, tokenizer, *args, **kwargs)

    with pytest.raises(ValueError, match="'logit': an API returns log-probabilities"):
        made(provider, "logit")
    with pytest.raises(ValueError, match="an API returns log-probabilities"):
        made(provider, lambda logits, target: logits)
    with pytest.raises(TypeError, match="one process sends the requests"):
        made(provider, accelerator=object())
    with pytest.raises(TypeError, match="`provider` is a str: give one of captum's"):
        made(server.url)
    with pytest.raises(TypeError, match="`attr_method` is a int"):
        RemoteGenerationAttribution(3, tokenizer, provider)
    wrong_ones = ({"missing": 1.0}, {"max_concurrency": 0}, {"on_mismatch": "no"})
    for wrong in (*wrong_ones, {"on_mismatch": "warn"}):  # ids are read as they are
        with pytest.raises(ValueError, match=next(iter(wrong))):
            made(provider, **wrong)
    remote = made(provider)
    with pytest.raises(TypeError, match="did you mean 'n_samples'"):
        remote.attribute(words(tokenizer), TARGET, n_sample=3)
    with pytest.raises(ValueError, match="`gen_args` would be ignored"):
        remote.attribute(words(tokenizer), TARGET, gen_args={"max_tokens": 2})
    with pytest.raises(ValueError, match="`max_length` cannot be sent to a server"):
        remote.attribute(words(tokenizer), gen_args={"max_length": 9})
    image = ImageMaskInput(
        Image.new("RGB", (2, 2)),
        mask=torch.tensor([[0, 1], [2, 2]]),
        processor_fn=lambda image: {"input_ids": torch.tensor([[1, 5]]), "pixel_values": 0},
    )
    with pytest.raises(ValueError, match="more than text"):
        remote.attribute(image, TARGET)
    told = CompletionsProvider(server.url)
    with pytest.raises(ValueError, match=r"positions, the server has 256"):
        made(told).attribute(words(tokenizer), [5] * 256)
    assert not any("prompt_logprobs" in body for body in server.bodies)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"api_url": "localhost:8000"}, "give a URL such as http://localhost:8000/v1"),
        ({"api_url": "http://me:secret@h/v1"}, "would be shown"),
        ({"prompts": "tokens"}, "give one of 'ids', 'text'"),
        ({"logprobs": "yes"}, "give one of 'auto'"),
        ({"max_concurrency": 0}, "at least 1"),
        ({"top_logprobs": -1}, "at least 0"),
        ({"timeout": 0}, "above 0"),
        ({"logprobs": "echo", "top_logprobs": 3}, "would be ignored"),
        ({"prompts": "text", "top_logprobs": 3}, "would be ignored"),
        ({"api_key": "two\nlines"}, "check the key"),
    ],
)
def test_bad_provider_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        CompletionsProvider(**{"api_url": "http://h/v1", "model_name": "m"} | arguments)
    assert "secret" not in str(raised.value)
    assert "two" not in str(raised.value)


def test_missing_openai_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install captum\[remote\]"):
        VLLMProvider("http://localhost:1/v1")
