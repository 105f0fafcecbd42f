"""Servers that tell other numbers than they are asked for: each is found out, and named."""

import warnings

import pytest
import tiny
import torch
from captum.attr import FeatureAblation, KernelShap, RemoteLLMAttribution, ShapleyValues
from remote_server import PARTS, Server, changed

from captum_llm_ext import (
    ApiError,
    CompletionsProvider,
    Contrast,
    GenerationAttribution,
    RemoteGenerationAttribution,
    TextSegmentInput,
)

TARGET = " golf and chess."
NAMED = {
    "shifted left": "shifted left by one",
    "shifted right": "shifted right by one",
    # As llama-cpp-python echoes prompts: each token by the distribution of the place after.
    "distributions shifted left": "shifted left by one",
    "distributions shifted right": "shifted right by one",
    "base 10": "of base 10",
    "base 10 everywhere": "of base 10",
    "zero": "all are zero",
    "zero everywhere": "all are zero",
    "temperature": r"of temperature 0\.5",
    "temperature everywhere": "of another temperature",
    "positive": "as a log-probability: expected a number of nats, at most 0",
    "NaN": "gave nan as a log-probability",
    "another tokenisation": "it reads it as other tokens",
    "BOS": r"it may put a token \(BOS\) before each",
    "uncounted BOS": r"it may put a token \(BOS\) before each",
    "mixed up": "mixed up|answers to other prompts",
}
WAYS = {
    "prompt_logprobs": {"logprobs": "prompt_logprobs"},
    "echo": {"logprobs": "echo"},
    "text": {"logprobs": "echo", "prompts": "text"},
}


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.llama(len(tokenizer)).double()


@pytest.fixture(scope="module")
def shared(model, tokenizer):
    with Server(model, tokenizer) as server:
        yield server


@pytest.fixture
def server(shared):
    shared.part, shared.follows_temperature, shared.always = {}, False, None
    yield shared
    shared.part, shared.follows_temperature, shared.always = {}, False, None


def words(tokenizer):
    return TextSegmentInput("Dave lives. Ann is in TX.", tokenizer, baselines="delete")


def remote(provider, tokenizer, **arguments):
    method = FeatureAblation(RemoteLLMAttribution.placeholder_model)
    return RemoteGenerationAttribution(method, tokenizer, provider, **arguments)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", NAMED)
def test_misaligned_log_probabilities_are_refused(tokenizer, server, part, way):
    server.part = PARTS[part]
    if part == "mixed up" and way == "text":
        return  # one prompt at a time is never mixed up
    ours = remote(CompletionsProvider(server.url, **WAYS[way]), tokenizer)
    for _ in range(2):  # and it is not believed the second time either
        with pytest.raises(ApiError, match=NAMED[part]):
            ours.attribute(words(tokenizer), TARGET)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("follows", [False, True])
def test_correct_servers_are_accepted(model, tokenizer, server, way, follows):
    server.follows_temperature = follows
    found = remote(CompletionsProvider(server.url, **WAYS[way]), tokenizer).attribute(
        words(tokenizer), TARGET
    )
    truth = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(
        words(tokenizer), TARGET, output_unit=None
    )
    torch.testing.assert_close(found.token_attr.double(), truth.token_attr, atol=1e-5, rtol=0)
    checks = found.provenance["handshake"]["checks"]
    assert checks["written tokens"].endswith("nats when scored")
    assert checks["temperature"].startswith("changes" if follows else "does not change")
    assert checks["drawn tokens"].startswith("as improbable as told")
    assert checks["stop token"] == "listed"


@pytest.mark.parametrize("way", WAYS)
def test_unlisted_stop_token_is_reported(tokenizer, server, way):
    server.part = PARTS["stop token"]
    ours = remote(CompletionsProvider(server.url, **WAYS[way]), tokenizer)
    assert ours.handshake()["checks"]["stop token"].startswith("not listed")


def test_ignored_request_fields_are_named(tokenizer, server):
    def attributed(**how):
        provider = CompletionsProvider(server.url, **how)
        return remote(provider, tokenizer).attribute(words(tokenizer), TARGET)

    def no_echo(handler, body):
        body.pop("echo", None)
        return lambda answer: answer

    def no_numbers(handler, body):
        for name in ("logprobs", "prompt_logprobs", "echo"):
            body.pop(name, None)
        return lambda answer: answer

    server.always = no_echo
    with pytest.raises(ApiError, match="it ignores `echo`"):
        attributed(logprobs="echo")
    assert attributed().provenance["handshake"]["way"] == "prompt_logprobs"
    server.always = no_numbers
    for way in ("echo", "prompt_logprobs"):
        with pytest.raises(ApiError, match="it ignores the request for them"):
            attributed(logprobs=way)
    with pytest.raises(ApiError, match=r"(?s)By `prompt_logprobs`: .* By `echo`: .*ignores"):
        attributed()


def test_one_garbled_response_keeps_the_request_style(model, tokenizer, server):
    provider = CompletionsProvider(server.url, prompts_per_request=1, max_concurrency=1)
    ours = remote(provider, tokenizer)
    assert ours.handshake()["way"] == "prompt_logprobs"
    server.failures.append(changed(lambda a: a | {"choices": [{"index": 0, "text": ""}]}))
    with pytest.raises(ApiError, match="no `prompt_logprobs`"):
        ours.attribute(words(tokenizer), TARGET)
    found = ours.attribute(words(tokenizer), TARGET)
    assert found.provenance["handshake"]["way"] == "prompt_logprobs"
    assert not any("echo" in body for body in server.bodies[-found.n_evaluations :])


def test_correct_request_style_is_chosen(tokenizer, server):
    def shifted(handler, body):
        server.part = PARTS["shifted left"] if "prompt_logprobs" in body else {}
        return lambda answer: answer

    server.always = shifted
    met = remote(CompletionsProvider(server.url), tokenizer).handshake()
    assert met["way"] == "echo"
    assert "shifted left" in met["refused"]["prompt_logprobs"]


class OffByOne:
    """A text provider, as captum has them, that counts from the wrong end."""

    def __init__(self, model, by, n_extra=0):
        self.model, self.by, self.n_extra = model, by, n_extra

    def get_logprobs(self, input_prompt, target_str, tokenizer):
        target = tokenizer.encode(target_str, add_special_tokens=False)
        ids = [*tokenizer.encode(input_prompt), *target]
        with torch.no_grad():
            found = self.model(input_ids=torch.tensor([[*ids, 7]])).logits[0].log_softmax(-1)
        own = [float(found[i, token]) for i, token in enumerate([*ids[1:], 7])]
        first = len(ids) - len(target) - 1 + self.by
        return own[first : first + len(target)]


class OffByOneById(OffByOne):
    """The same of one that takes ids."""

    def get_token_logprobs(self, prompts):
        found = []
        for ids in prompts:
            with torch.no_grad():
                told = self.model(input_ids=torch.tensor([[*ids, 7]])).logits[0].log_softmax(-1)
            own = [0.0, *(float(told[i, t]) for i, t in enumerate([*ids[1:], 7])), 0.0]
            found.append([None, *({t: own[i + 1 + self.by]} for i, t in enumerate(ids[1:]))])
        return found


@pytest.mark.parametrize("kind", [OffByOne, OffByOneById])
@pytest.mark.parametrize(
    ("by", "name"), [(1, "shifted left by one"), (-1, "shifted right by one"), (0, None)]
)
@pytest.mark.parametrize("target", [TARGET, " golf"])
def test_custom_provider_shifted_by_one_is_refused(model, tokenizer, kind, by, name, target):
    ours = remote(kind(model, by), tokenizer)
    if name is None:
        local = GenerationAttribution(FeatureAblation(model), tokenizer)
        truth = local.attribute(words(tokenizer), target, output_unit=None).token_attr
        found = ours.attribute(words(tokenizer), target).token_attr
        torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=0)
        return
    with pytest.raises(ApiError, match=name):
        ours.attribute(words(tokenizer), target)


@pytest.mark.parametrize("value", [0.0, -0.25, -1.0])
def test_constant_log_probabilities_are_refused(tokenizer, value):
    class Own:
        def get_logprobs(self, input_prompt, target_str, tokenizer):
            return [value] * len(tokenizer.encode(target_str, add_special_tokens=False))

    with pytest.raises(ApiError, match=r"all are zero|whatever the token"):
        remote(Own(), tokenizer).attribute(words(tokenizer), TARGET)


def test_non_deterministic_values_are_reported(model, tokenizer):
    class Own(OffByOneById):
        def get_token_logprobs(self, prompts):
            self.n_extra += 1
            shift = 0.1 * self.n_extra
            return [
                [None, *({t: v - shift for t, v in entry.items()} for entry in own[1:])]
                for own in super().get_token_logprobs(prompts)
            ]

    with pytest.raises(ApiError, match="the same prompt has other ones each time"):
        remote(Own(model, 0), tokenizer).attribute(words(tokenizer), TARGET)


def test_server_with_top_1_values_only_is_refused(model, tokenizer):
    class LikeliestOnly(OffByOneById):
        """Tells a token's value where it is the likeliest, as top-1 servers do."""

        def get_token_logprobs(self, prompts):
            found = super().get_token_logprobs(prompts)
            return [
                [e if e and min(e) % self.n_extra else None for e in own] if len(own) > 12 else own
                for own in found
            ]

    inp = words(tokenizer)
    few = remote(LikeliestOnly(model, 0, 1000), tokenizer, missing=-20.0)
    assert few.attribute(inp, TARGET).provenance["n_missing"] == 0
    many = remote(LikeliestOnly(model, 0, 2), tokenizer, missing=-20.0)
    with pytest.raises(ValueError, match=r"\d+ of \d+ log-probabilities are missing"):
        many.attribute(inp, TARGET)


class Forgetful:
    """Of every `nth` long prompt's last token tells the `n_others` likeliest others alone."""

    def __init__(self, model, n_others, nth=3):
        self.model, self.n_others, self.nth = model, n_others, nth

    def get_token_logprobs(self, prompts):
        return [[None, *self.told(ids)] for ids in prompts]

    def told(self, ids):
        with torch.no_grad():
            rows = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for i, (row, token) in enumerate(zip(rows, ids[1:], strict=False), 2):
            others = {int(j): float(row[j]) for j in row.topk(self.n_others + 1).indices}
            is_forgotten = i == len(ids) > 12 and sum(ids) % self.nth == 0
            others = dict([pair for pair in others.items() if pair[0] != token][: self.n_others])
            yield (others or None) if is_forgotten else {token: float(row[token]), **others}


@pytest.mark.parametrize("method", [FeatureAblation, ShapleyValues, KernelShap])
@pytest.mark.parametrize("attr_target", ["log_prob", "prob"])
@pytest.mark.parametrize("n_others", [0, 4])
def test_missing_values_are_bounds(model, tokenizer, method, attr_target, n_others):
    inp = TextSegmentInput(
        "Dave lives in Rome. Ann is in TX.",
        tokenizer,
        unit=[(0, 4), (5, 18), (20, 23), (24, 33)],
        baselines="delete",
    )
    target = " golf and chess and music and art"
    ours = RemoteGenerationAttribution(
        method(RemoteLLMAttribution.placeholder_model),
        tokenizer,
        Forgetful(model, n_others),
        attr_target,
        missing=-9.0,
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = ours.attribute(inp, target)
    apart = found.provenance.get("first_cause")
    assert (apart is not None and not apart["is_told_apart"]) == any(
        "% of the values are bounds" in str(one.message) for one in warned
    )
    local = GenerationAttribution(method(model), tokenizer, attr_target)
    exact = local.attribute(inp, target, output_unit=None)
    lower, upper = found.value_interval
    is_known = lower == upper
    assert found.provenance["n_missing"] >= int((~is_known).sum()) > 0
    truth = exact.values.double()
    assert bool(((lower <= truth + 1e-6) & (truth <= upper + 1e-6)).all())
    torch.testing.assert_close(found.values[is_known].double(), truth[is_known], atol=1e-5, rtol=0)
    imputed = found.values[~is_known].double()
    guess = torch.tensor(-9.0).exp() if attr_target == "prob" else torch.tensor(-9.0)
    assert bool((imputed <= upper[~is_known] + 1e-7).all())
    assert bool((imputed <= guess + 1e-7).all())
    top = 1.0 if attr_target == "prob" else 0.0
    # Of tokens that are told instead, none is less likely.
    assert bool((upper[~is_known] < top - 0.1).all()) == (n_others > 0)
    ends = found.token_attr_interval
    if method is KernelShap:
        return
    low, high = ends
    own = exact.token_attr.double()
    assert bool(((low <= own + 1e-5) & (own <= high + 1e-5)).all())
    assert bool(torch.isinf(ends).any()) == (attr_target == "log_prob")
    assert found.provenance["first_cause"] is not None


@pytest.mark.parametrize("method", [FeatureAblation, ShapleyValues])
@pytest.mark.parametrize("n_others", [0, 8])
def test_contrasts_of_missing_values_are_bounds(model, tokenizer, method, n_others):
    spans = [(0, 4), (5, 18), (20, 23), (24, 33)]
    inp = TextSegmentInput(
        "Dave lives in Rome. Ann is in TX.", tokenizer, unit=spans, baselines="delete"
    )
    target = " golf and chess and music and art"
    n = len(tokenizer.encode(target, add_special_tokens=False))
    contrast = Contrast(foils=[[301 + t, 302 + t][t % 2 :] for t in range(n)])
    ours = RemoteGenerationAttribution(
        method(RemoteLLMAttribution.placeholder_model),
        tokenizer,
        Forgetful(model, n_others, 6),
        contrast,
        missing=-9.0,
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = ours.attribute(inp, target)
    exact = GenerationAttribution(method(model), tokenizer, Contrast(found.foils)).attribute(
        inp, target, output_unit=None
    )
    lower, upper = found.value_interval
    is_known = lower == upper
    truth = exact.values.double()
    assert bool(((lower <= truth + 1e-6) & (truth <= upper + 1e-6)).all())
    torch.testing.assert_close(found.values[is_known].double(), truth[is_known], atol=1e-5, rtol=0)
    own = found.values.double()
    assert bool(((lower - 1e-6 <= own) & (own <= upper + 1e-6)).all())
    # The target's value may be missing, or that of a foil: the bound is then on the other side.
    assert bool((lower.isneginf() & upper.isfinite()).any())
    assert bool((lower.isfinite() & upper.isposinf()).any())
    # Of two foils one may be known: both ends are then finite.
    both = (~is_known & lower.isfinite() & upper.isfinite()).any(0)
    assert bool(both[::2].any())
    assert not bool(both[1::2].any())
    low, high = found.token_attr_interval
    attr = exact.token_attr.double()
    assert bool(((low <= attr + 1e-5) & (attr <= high + 1e-5)).all())
    apart = found.provenance["first_cause"]["is_told_apart"]
    assert apart != any("% of the values are bounds" in str(one.message) for one in warned)
    assert found.provenance["n_missing"] > 0
    # Intervals of one kind of value, and of one estimator, are none of another's.
    assert found.refit(attr_target="log_prob").value_interval is None
    refitted = found.refit()
    assert torch.equal(refitted.value_interval, found.value_interval)
    assert torch.equal(refitted.token_attr_interval, found.token_attr_interval)
    if method is ShapleyValues:
        refitted = found.refit(FeatureAblation)
        assert torch.equal(refitted.value_interval, found.value_interval)
        assert refitted.token_attr_interval is None
        assert refitted.provenance["first_cause"] is None


def test_handshake_runs_once_per_provider(tokenizer, server):
    ours = remote(CompletionsProvider(server.url), tokenizer)
    first = ours.attribute(words(tokenizer), TARGET)
    server.prompts.clear()
    again = remote(ours.provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert len(server.prompts) == again.n_evaluations
    assert again.provenance["handshake"] == first.provenance["handshake"]
    assert first.provenance["handshake"]["n_prompts"] <= 12
