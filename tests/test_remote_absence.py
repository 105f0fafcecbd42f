"""Absent words drawn from what an API reports, against the same model run here."""

import itertools
import math

import pytest
import tiny
import torch
from captum.attr import FeatureAblation, KernelShap, RemoteLLMAttribution
from remote_server import PARTS, Server

from captum_llm_ext import (
    AnthropicProvider,
    CallableProvider,
    ChatInput,
    ChatProvider,
    CompletionsProvider,
    GenerationAttribution,
    ModelBaselines,
    RemoteGenerationAttribution,
    TextSegmentInput,
    load_demo,
)

PLACEHOLDER = RemoteLLMAttribution.placeholder_model
PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
TARGET = " poker"
WHOLE = 10_000  # more than any vocabulary here: the server tells all of it
pytestmark = [
    # What tells causes apart is not what these are about.
    pytest.mark.filterwarnings("ignore:not distinguishable"),
    pytest.mark.filterwarnings("ignore:the model proposes no alternative"),
]


@pytest.fixture(scope="module")
def demo():
    model, tokenizer, _ = load_demo()
    return model.double(), tokenizer


@pytest.fixture(scope="module")
def untrained():
    """Of byte-level fragments: words of several tokens, characters of several."""
    tokenizer = tiny.byte_level()
    return tiny.llama(len(tokenizer)).double(), tokenizer


class _Capped(Server):
    """Tells at most as many tokens as there are."""

    def answer(self, body):
        n = len(self.tokenizer)
        body = {
            name: min(value, n) if name in ("prompt_logprobs", "logprobs") and value else value
            for name, value in body.items()
        }
        return super().answer(body)

    def chat(self, body):
        return super().chat(body | {"top_logprobs": min(body.get("top_logprobs", 0), 20)})


@pytest.fixture(scope="module")
def shared(demo):
    with _Capped(*demo) as server:
        yield server


@pytest.fixture
def server(shared):
    shared.part, shared.known, shared.always = {}, None, None
    for noted in (shared.prompts, shared.bodies, shared.times):
        noted.clear()
    return shared


def words(tokenizer, text=PROMPT, unit="word", **arguments):
    arguments = {"baselines": ModelBaselines()} | arguments
    return TextSegmentInput(text, tokenizer, unit, **arguments)


def by_ids(server, method=FeatureAblation, *, provider=None, **arguments):
    provider = provider or CompletionsProvider(server.url, "tiny")
    arguments = {"top_logprobs": WHOLE} | arguments
    return RemoteGenerationAttribution(method(PLACEHOLDER), server.tokenizer, provider, **arguments)


def by_text(server, method=FeatureAblation, *, provider=None, **arguments):
    provider = provider or CompletionsProvider(server.url, "tiny")
    arguments = {"top_logprobs": WHOLE} | arguments
    return RemoteGenerationAttribution(method(PLACEHOLDER), None, provider, **arguments)


def local(demo, text=PROMPT, target=TARGET, method=FeatureAblation, unit="word", **arguments):
    model, tokenizer = demo
    arguments = {"output_unit": None} | arguments
    return GenerationAttribution(method(model), tokenizer).attribute(
        words(tokenizer, text, unit), target, **arguments
    )


def candidates(result, part="prompt"):
    return [dict(match["candidates"]) for match in result.provenance["matches"][part]]


def assert_same_candidates(found, wanted, atol=1e-6):  # float64, through JSON
    assert [set(own) for own in found] == [set(own) for own in wanted]
    for own, other in zip(found, wanted, strict=True):
        assert own == pytest.approx(other, abs=atol)


@pytest.mark.parametrize("method", [FeatureAblation, KernelShap])
def test_attribution_by_a_whole_vocabulary_equals_the_local_one(demo, server, method):
    found = by_ids(server, method).attribute(words(demo[1]), TARGET)
    wanted = local(demo, method=method)
    assert_same_candidates(candidates(found), candidates(wanted))
    assert torch.equal(found.masks, wanted.masks)
    for name in ("values", "token_attr", "full_values", "empty_values"):
        ours, truth = getattr(found, name).double(), getattr(wanted, name).double()
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=0)
    assert found.n_evaluations == wanted.n_evaluations


@pytest.mark.parametrize("text", [tiny.TEXTS[0], "Wörter mit Umlauten; 東京は", "1 + 2 = 3, 4"])
def test_fragments_of_words_equal_the_local_ones(untrained, text):
    with _Capped(*untrained) as server:
        found = by_ids(server).attribute(words(untrained[1], text), " golf")
    wanted = local(untrained, text, " golf")
    assert_same_candidates(candidates(found), candidates(wanted))
    torch.testing.assert_close(
        found.token_attr.double(), wanted.token_attr.double(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("unit", ["word", "sentence"])
def test_generated_features_equal_the_local_ones(demo, server, unit):
    target = " poker and chess."
    found = by_ids(server).attribute(words(demo[1], unit=unit), target, output_unit="word")
    wanted = local(demo, target=target, unit=unit, output_unit="word")
    for part in ("prompt", "output"):
        assert_same_candidates(candidates(found, part), candidates(wanted, part))
    torch.testing.assert_close(
        found.output_attr.double(), wanted.output_attr.double(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("most", [20, 5])
def test_candidates_among_few_reported_tokens_have_their_probabilities(demo, server, most):
    """The likeliest next words by a plain forward pass, among as many as are told."""
    model, tokenizer = demo
    found = by_ids(server, top_logprobs=most).attribute(words(tokenizer), TARGET)
    [own] = [own for own in candidates(found) if "FL" in own]
    before = tokenizer(PROMPT[: PROMPT.index(" FL")])["input_ids"]
    with torch.no_grad():
        p = model(torch.tensor([before])).logits[0, -1].softmax(0)
    told = {tokenizer.decode([i]).strip(): float(p[i]) for i in p.topk(most).indices}
    assert set(own) <= {*told, "FL"}
    # Of words that are followed alike, and that the answer does not depend on.
    shares = sorted(own.values(), reverse=True)
    assert max(own, key=own.get) == max((w for w in told if w in own), key=told.get)
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    search = found.provenance["search"]
    assert search["least_told"] <= most + 1
    assert 0 < search["least_mass_told"] <= search["mean_mass_told"] <= 1
    assert found.seq_attr.argmax() == local(demo).seq_attr.argmax()


def test_one_request_tells_all_places_of_a_prompt(demo, server):
    by_ids(server, top_logprobs=7).attribute(words(demo[1]), TARGET)
    ids = demo[1](PROMPT)["input_ids"]
    whole = [b for b in server.bodies if b.get("prompt_logprobs") == 7 and b["prompt"] == ids]
    assert len(whole) == 1


def test_requests_of_the_search_are_counted_and_estimated(demo, server):
    attribution = by_ids(server, top_logprobs=20)
    inp = words(demo[1])
    estimate = attribution.estimate(inp, TARGET)
    assert not server.bodies
    result = attribution.attribute(inp, TARGET)
    told = result.provenance
    assert 0 < told["search"]["n_requests"] <= estimate.n_search
    assert told["n_requests"] == told["search"]["n_requests"] + result.n_evaluations
    assert told["n_requests"] <= estimate.n_requests
    deleted = words(demo[1], baselines="delete")
    assert attribution.estimate(deleted, TARGET).n_search == 0
    with pytest.warns(UserWarning, match=r"or `ModelBaselines\(\)`"):
        assert attribution.attribute(deleted, TARGET).provenance["search"] is None


def test_absence_without_baselines_is_deletion(demo, server):
    inp = TextSegmentInput(PROMPT, demo[1], "word")
    with pytest.warns(UserWarning, match="texts that the model never saw"):
        found = by_ids(server).attribute(inp, TARGET)
    assert found.provenance["absence"]["prompt"] == "deleted"
    assert found.provenance["search"] is None


@pytest.mark.parametrize("n_threads", [1, 8])
def test_same_seed_draws_the_same(demo, server, n_threads):
    provider = CompletionsProvider(server.url, "tiny", max_concurrency=n_threads)
    found = by_ids(server, KernelShap, provider=provider).attribute(words(demo[1]), TARGET, seed=3)
    wanted = local(demo, method=KernelShap, seed=3)
    torch.testing.assert_close(
        found.token_attr.double(), wanted.token_attr.double(), atol=1e-5, rtol=0
    )


def test_checkpoint_keeps_the_search(demo, server, tmp_path):
    path = tmp_path / "run.safetensors"
    attribution = by_ids(server)
    first = attribution.attribute(words(demo[1]), TARGET, checkpoint=path)
    server.bodies.clear()
    again = attribution.attribute(words(demo[1]), TARGET, checkpoint=path)
    # One stored value is compared with the server's.
    assert len(server.bodies) == again.provenance["n_requests"] == 1
    assert torch.equal(first.token_attr, again.token_attr)
    other = words(demo[1], baselines=ModelBaselines(n_candidates=2))
    with pytest.raises(ValueError, match="belongs to another run"):
        attribution.attribute(other, TARGET, checkpoint=path)


@pytest.mark.parametrize("names", ["ids", "texts"])
def test_echoed_prompts_tell_the_same(demo, server, names):
    server.tells_ids = names == "ids"
    try:
        provider = CompletionsProvider(server.url, "tiny", logprobs="echo")
        found = by_ids(server, provider=provider).attribute(words(demo[1]), TARGET)
    finally:
        server.tells_ids = True
    assert_same_candidates(candidates(found), candidates(local(demo)))


def only_own(choice):
    """A server that tells log-probabilities of the tokens sent alone."""
    ids = [0] * len(choice["prompt_logprobs"] or [])
    for i, entry in enumerate(choice["prompt_logprobs"] or []):
        ids[i] = entry and dict([next(iter(entry.items()))])
    return choice | ({"prompt_logprobs": ids} if choice.get("prompt_logprobs") else {})


def wrong_tops(change):
    def changed(choice):
        tops = choice.get("prompt_logprobs")
        if tops and any(entry and len(entry) > 1 for entry in tops):
            choice["prompt_logprobs"] = [entry and change(entry) for entry in tops]
        return choice

    return changed


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (
            lambda c: only_own(c) if c.get("prompt_logprobs") else c,
            "no tokens but those sent.*`top_logprobs=20`.*CorpusBaselines.*delete",
        ),
        (
            wrong_tops(lambda e: {k: v | {"logprob": float("nan")} for k, v in e.items()}),
            "nan as a log-probability",
        ),
        (
            wrong_tops(lambda e: {k: v | {"logprob": 0.0} for k, v in e.items()}),
            "in sum, which natural log-probabilities cannot have",
        ),
        (wrong_tops(lambda e: dict([*e.items()][1:])), "that one is not among them"),
    ],
)
def test_unusable_likeliest_tokens_are_refused_before_coalitions(demo, server, choice, told):
    attribution = by_ids(server, top_logprobs=20)
    attribution.handshake()
    server.bodies.clear()
    server.part = {"choice": choice}
    with pytest.raises(ValueError, match=told):
        attribution.attribute(words(demo[1]), TARGET)
    assert len(server.bodies) <= 2


@pytest.mark.parametrize("part", ["shifted left", "distributions shifted right", "base 10"])
def test_handshake_comes_before_the_search(demo, server, part):
    server.part = PARTS[part]
    with pytest.raises(ValueError, match=r"shifted|base 10|temperature|nats"):
        by_ids(server).attribute(words(demo[1]), TARGET)
    asked = [body for body in server.bodies if body.get("prompt_logprobs") == len(demo[1])]
    assert not [body for body in asked if body["prompt"] == demo[1](PROMPT)["input_ids"]]


@pytest.mark.parametrize("method", [FeatureAblation, KernelShap])
def test_texts_alone_name_the_local_candidates(demo, server, method):
    """One place at a time, without a tokenizer; the first word has nothing before it."""
    found = by_text(server, method).attribute(words(None), TARGET)
    wanted = local(demo, method=method)
    assert_same_candidates(candidates(found)[1:], candidates(wanted)[1:], atol=0.02)
    assert candidates(found)[0] == {"Dave": 1.0}
    assert found.seq_attr.argmax() == wanted.seq_attr.argmax()
    assert found.provenance["rung"] == "stepwise top-k"


def test_prompts_sent_as_text_draw_one_place_at_a_time(demo, server):
    provider = CompletionsProvider(server.url, "tiny", prompts="text")
    found = by_ids(server, provider=provider, top_logprobs=20).attribute(words(demo[1]), TARGET)
    wanted = local(demo)
    assert_same_candidates(candidates(found)[1:], candidates(wanted)[1:], atol=0.02)
    assert found.seq_attr.argmax() == wanted.seq_attr.argmax()
    assert found.provenance["search"]["n_requests"] > 14


def test_text_searches_are_limited_and_resume_from_the_cache(demo, server, tmp_path):
    cache = tmp_path / "answers.sqlite"
    free = by_text(server, cache=tmp_path / "other.sqlite")
    estimate = free.estimate(words(None), TARGET)
    whole = free.attribute(words(None), TARGET)
    told = whole.provenance
    assert 0 < told["search"]["n_requests"] <= estimate.n_search
    assert told["n_requests"] <= estimate.n_requests + 10  # the handshake
    few = told["search"]["n_requests"] // 2 + 8
    with pytest.raises(RuntimeError, match="`max_requests` allows no more"):
        by_text(server, cache=cache, max_requests=few).attribute(words(None), TARGET)
    again = by_text(server, cache=cache).attribute(words(None), TARGET)
    assert torch.equal(again.token_attr, whole.token_attr)
    assert again.provenance["n_requests"] <= told["n_requests"] - few + 10
    assert again.provenance["search"]["n_requests"] < told["search"]["n_requests"]


def test_words_of_a_chat_are_drawn_after_the_messages_before_them(demo, server):
    """In an assistant's turn: what the tiny model continues is what was said, line by line."""
    model, tokenizer = demo
    messages = [
        {"role": "system", "content": "Ann lives in Austin."},
        {"role": "user", "content": "Dave lives in Reno, NV and is a"},
    ]
    provider = ChatProvider("tiny", api_url=server.url, prefill="continue")
    inp = ChatInput(messages, None, "word", baselines=ModelBaselines())
    found = by_text(server, provider=provider).attribute(inp, " nurse")
    asked = [body["messages"] for body in server.bodies if body.get("continue_final_message")]
    place = [*messages[:1], {"role": "user", "content": "Write a text."}]
    assert [*place, {"role": "assistant", "content": "Dave lives in"}] in asked
    [own] = [own for own in candidates(found) if "Reno" in own]
    read = tokenizer.encode("Ann lives in Austin.\nWrite a text.Dave lives in")
    with torch.no_grad():
        p = model(torch.tensor([read])).logits[0, -1].softmax(0)
    best = tokenizer.decode([int(p.argmax())]).strip()
    assert any(text.startswith(best) for text in own)
    assert all(text[0].isupper() for text in own)


def test_labels_and_frequencies_draw_by_likeliest_tokens(demo, server):
    provider = CompletionsProvider(server.url, "tiny")
    settings = {"provider": provider, "top_logprobs": 20}
    label = by_text(server, attr_target="label", **settings).attribute(words(None), TARGET)
    assert label.seq_attr.abs().argmax() == PROMPT.split().index("lawyer.")
    often = by_text(server, attr_target="frequency", n_answers=30, **settings)
    result = often.attribute(words(None), TARGET, gen_args={"max_new_tokens": 1})
    assert_same_candidates(candidates(result), candidates(label))


def texts_alone(server, **arguments):
    own = CompletionsProvider(server.url, "tiny")

    def answer(messages, max_tokens, temperature, prefill, top_logprobs, seed):
        said = "\n".join(message["content"] for message in messages)
        how = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed or 0}
        return own.generate(said + prefill, **how)

    return CallableProvider(answer, **arguments)


@pytest.mark.parametrize("kind", ["callable", "anthropic"])
def test_providers_of_texts_alone_are_refused_with_what_works(server, kind):
    if kind == "anthropic":
        provider = AnthropicProvider("tiny", api_url=server.url, max_concurrency=1)
    else:
        provider = texts_alone(server)
    attribution = by_text(server, provider=provider, attr_target="frequency", n_answers=4)
    with pytest.raises(
        ValueError, match=r"does not report them as needed.*CorpusBaselines.*delete"
    ):
        attribution.attribute(words(None), TARGET, gen_args={"max_new_tokens": 1})
    assert len(server.prompts) < 15


def test_providers_of_target_values_alone_are_refused_with_what_works(demo, server):
    class Captums:
        """Captum's interface, whose answers hold no tokens but the target's."""

        model_name = "tiny"
        own = CompletionsProvider(server.url, "tiny")

        def get_logprobs(self, input_prompt, target_str, tokenizer):
            return self.own.get_logprobs(input_prompt, target_str, tokenizer)

    attribution = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), demo[1], Captums())
    with pytest.raises(ValueError, match=r"no tokens other than those sent.*CompletionsProvider"):
        attribution.attribute(words(demo[1]), TARGET)


class Tokens:
    """A provider of the user's own: log-probabilities of the tokens sent, and of some others."""

    model_name = "tiny"

    def __init__(self, server):
        self._server = CompletionsProvider(server.url, "tiny", top_logprobs=20)

    def get_token_logprobs(self, prompts):
        return self._server.get_token_logprobs(prompts)


class Generating(Tokens):
    def generate_tokens(self, prompt, **gen_args):
        return self._server.generate_tokens(prompt, **gen_args)


def test_other_tokens_of_any_provider_are_candidates(demo, server):
    found = by_ids(server, provider=Generating(server)).attribute(words(demo[1]), TARGET)
    served = by_ids(server, top_logprobs=20).attribute(words(demo[1]), TARGET)
    assert_same_candidates(candidates(found), candidates(served))


def test_a_provider_that_generates_nothing_is_refused(demo, server):
    attribution = by_ids(server, provider=Tokens(server), top_logprobs=20)
    with pytest.raises(RuntimeError, match=r"has no `generate_tokens`.*CorpusBaselines"):
        attribution.attribute(words(demo[1]), TARGET)


def test_a_local_proposer_needs_no_reported_tokens(demo, server):
    inp = words(demo[1], baselines=ModelBaselines(demo))
    found = by_ids(server, top_logprobs=20).attribute(inp, TARGET)
    assert found.provenance["search"] is None
    assert found.provenance["n_requests"] == found.n_evaluations


def test_every_estimate_is_an_upper_limit(demo, server):
    texts = [PROMPT, "Ann is a nurse.", "Tom lives in Salt Lake City and is a chef. Tom likes"]
    for text, make in itertools.product(texts, (by_ids, by_text)):
        inp = words(demo[1] if make is by_ids else None, text)
        attribution = make(server, top_logprobs=20)
        how = {"gen_args": {"max_new_tokens": 1}}
        estimate = attribution.estimate(inp, **how)
        found = attribution.attribute(inp, **how)
        assert found.provenance["search"]["n_requests"] <= estimate.n_search
        assert math.isfinite(estimate.tokens_in)
