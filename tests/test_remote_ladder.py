"""Servers that tell less than log-probabilities of prompts, against the same model run here."""

import itertools
import json
import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from captum.attr import FeatureAblation, KernelShap, RemoteLLMAttribution, ShapleyValues
from remote_server import CHAT_PARTS, PARTS, Server, status

from captum_llm_ext import (
    AnthropicProvider,
    ApiError,
    CallableProvider,
    ChatInput,
    ChatProvider,
    CompletionsProvider,
    GenerationAttribution,
    GenerationAttributionResult,
    RemoteGenerationAttribution,
    TextSegmentInput,
    load_demo,
)
from captum_llm_ext.cli import main
from captum_llm_ext.remote.bounds import Bounds
from captum_llm_ext.remote.chat_endpoint import ChatRequest
from captum_llm_ext.remote.estimate import N_CHECKS
from captum_llm_ext.remote.label import Label
from captum_llm_ext.remote.sampled import wilson
from captum_llm_ext.remote.similarities import token_f1

PLACEHOLDER = RemoteLLMAttribution.placeholder_model
PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
# A handful of answers seldom tells causes apart, which is not what most of these are about.
pytestmark = pytest.mark.filterwarnings("ignore:not distinguishable")
SPANS = [(0, 4), (14, 28), (38, 45), (46, 76)]


@pytest.fixture(scope="module")
def demo():
    model, tokenizer, _ = load_demo()
    return model.double(), tokenizer


@pytest.fixture(scope="module")
def shared(demo):
    with Server(*demo) as server:
        yield server


@pytest.fixture
def server(shared):
    shared.part, shared.always, shared.goes_on, shared.refuses = {}, None, False, None
    shared.bias, shared.name_told, shared.lists = "told", "tiny-0", "instead"
    shared.reports_ids, shared.known = False, None
    for noted in (shared.prompts, shared.bodies):
        noted.clear()
    return shared


def remote(provider, method=FeatureAblation, **arguments):
    return RemoteGenerationAttribution(method(PLACEHOLDER), None, provider, **arguments)


def chat(server, **arguments):
    return ChatProvider("tiny", api_url=server.url, **arguments)


def spans(tokenizer=None):
    return TextSegmentInput(PROMPT, tokenizer, unit=SPANS, baselines="delete")


def local(demo, target, method=FeatureAblation, **arguments):
    model, tokenizer = demo
    return GenerationAttribution(method(model), tokenizer).attribute(
        spans(tokenizer), target, output_unit=None, **arguments
    )


def probabilities(demo, found, n_tokens, is_answer):
    """Of each coalition how probable an answer is, from all its first tokens."""
    model, tokenizer = demo
    inp = spans(tokenizer)
    values = []
    for row in inp.render(found.masks.bool(), torch.Generator().manual_seed(0)):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([row.ids])).logits[0, -1].softmax(-1)
        assert n_tokens == 1
        texts = [tokenizer.decode([i]) for i in range(len(p))]
        values.append(sum(float(q) for q, text in zip(p, texts, strict=False) if is_answer(text)))
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("prefill", ["continue", "assistant", "completions"])
@pytest.mark.parametrize("method", [FeatureAblation, ShapleyValues])
def test_every_value_lies_in_its_interval(demo, server, prefill, method):
    server.goes_on = prefill == "assistant"
    if prefill == "completions":
        provider = CompletionsProvider(server.url, "tiny")
    else:
        provider = chat(server, prefill=prefill)
    found = remote(provider, method).attribute(spans(), gen_args={"max_new_tokens": 4})
    ids = [demo[1].convert_tokens_to_ids("Ġ" + t if len(t) > 1 else t) for t in found.output_tokens]
    truth = local(demo, torch.tensor(ids), method)
    assert found.rung == "stepwise top-k"
    assert torch.equal(found.masks, truth.masks)
    lower, upper = found.value_interval
    exact = truth.values.double()
    assert bool(((lower - 1e-6 <= exact) & (exact <= upper + 1e-6)).all())
    is_known = torch.isfinite(lower)
    share = 1 - is_known.double().mean()
    torch.testing.assert_close(found.values[is_known].double(), exact[is_known], atol=1e-5, rtol=0)
    assert found.provenance["share_censored"] == pytest.approx(float(share), abs=0.2)
    assert 0 < float(share) < 0.5
    below, above = found.token_attr_interval
    own = truth.token_attr.double()
    assert bool(((below - 1e-5 <= own) & (own <= above + 1e-5)).all())
    assert not bool((below.isneginf() & above.isposinf()).all())
    assert found.token_attr.sum(0).argmax() == truth.token_attr.sum(0).argmax()


def test_full_vocabulary_top_logprobs_are_exact(demo, server):
    provider = CompletionsProvider(server.url, "tiny")
    found = remote(provider, top_logprobs=len(demo[1])).attribute(spans(), " golf")
    truth = local(demo, " golf")
    torch.testing.assert_close(found.token_attr.double(), truth.token_attr, atol=1e-5, rtol=0)
    assert found.provenance["share_censored"] == 0
    assert torch.equal(*found.token_attr_interval)


@pytest.mark.parametrize("kind", ["chat", "callable", "anthropic"])
def test_frequency_intervals_cover_the_truth(demo, server, kind):
    if kind == "chat":
        provider = chat(server)
    elif kind == "anthropic":
        provider = AnthropicProvider("tiny", api_url=server.url, max_concurrency=1)
    else:
        own = chat(server)

        def fn(messages, max_tokens, temperature, prefill, top_logprobs, seed):
            how = {"n_tokens": max_tokens, "temperature": temperature, "seed": seed}
            return own.chat(ChatRequest(messages, **how))[0].text

        provider = CallableProvider(fn)
    ours = remote(provider, attr_target="frequency", n_answers=40)
    found = ours.attribute(spans(), " golf", gen_args={"max_new_tokens": 1})
    assert found.output_tokens == ["golf"]
    assert found.rung == "frequency"
    p = probabilities(demo, found, 1, lambda text: text.strip() == "golf")
    lower, upper = (end[:, 0].sigmoid() for end in found.value_interval)
    inside = (lower <= p + 1e-9) & (p - 1e-9 <= upper)
    assert int((~inside).sum()) <= 1  # two standard errors, six coalitions
    significant = found.token_attr.abs() > 2 * found.token_attr_se
    odds = p.log() - (-p).log1p()
    true = (odds[0] - odds[2:])[None]
    wrong = significant & (found.token_attr.sign() != true.sign())
    assert bool(significant.any())
    assert not bool(wrong.any())
    assert bool((found.token_attr_se > 0).all())
    told = found.provenance
    assert told["n_answers"] <= 40 * 6
    assert "rare answers" in told["cannot_see"]


def test_predicate_defines_the_answer(demo, server):
    def is_answer(text):
        return text.strip() in ("golf", "poker")

    ours = remote(chat(server), attr_target="frequency", predicate=is_answer, n_answers=24)
    found = ours.attribute(spans(), " golf", gen_args={"max_new_tokens": 1})
    p = probabilities(demo, found, 1, is_answer)
    lower, upper = (end[:, 0].sigmoid() for end in found.value_interval)
    assert int(((lower > p) | (p > upper)).sum()) <= 1


@pytest.mark.parametrize("similarity", ["lexical", "f1", token_f1])
def test_similarities_are_means_over_answers(server, similarity):
    ours = remote(chat(server), attr_target="similarity", similarity=similarity, n_answers=16)
    found = ours.attribute(spans(), gen_args={"max_new_tokens": 6})
    told = found.provenance
    assert told["ceiling"] > told["floor"] + 0.1
    assert told["answers_vary"]
    assert found.values.shape == (6, 1)
    assert bool(((found.values >= 0) & (found.values <= 1)).all())
    assert float(found.token_attr[0].max()) == float(found.token_attr[0, 3])  # the last phrase
    assert bool((found.token_attr_se > 0).all())


def test_indistinguishable_answers_fail_before_the_run(server):
    ours = remote(chat(server), attr_target="frequency", predicate=lambda text: True)
    with pytest.raises(ValueError, match=r"given 8 of 8 times .* 8 of 8 times with none") as raised:
        ours.attribute(spans(), " golf")
    assert "cannot be distinguished" in str(raised.value)
    assert len(server.bodies) == 3  # whether answers vary at all, then eight answers each
    ours = remote(
        chat(server), attr_target="similarity", similarity=lambda text, answer: len(text) % 2
    )
    with pytest.raises(ValueError, match=r"samples of each would tell|Next to no difference"):
        ours.attribute(spans(), " golf", gen_args={"max_new_tokens": 8})


def test_refusals_are_counted_and_not_scored(demo, server):
    server.refuses = lambda said: "Dave" not in said and "include" in said
    ours = remote(chat(server), attr_target="frequency", n_answers=16)
    found = ours.attribute(spans(), " golf", gen_args={"max_new_tokens": 1})
    assert found.provenance["n_refusals"] == 16
    row = int((found.masks[:, 0] == 0).nonzero()[1])
    assert found.value_interval[:, row, 0].tolist() == [-math.inf, math.inf]
    ours = remote(chat(server), attr_target="similarity", n_answers=16)
    with pytest.raises(ApiError, match="were refusals, which have no similarity"):
        ours.attribute(spans(), " golf and tennis", gen_args={"max_new_tokens": 4})


FAULTS = {
    "shifted left": "shifted left by one",
    "shifted right": "shifted right by one",
    "base 10": "of base 10",
    "zero": "all are zero",
    "temperature": "of another temperature",
    "positive": "as a log-probability: expected a number of nats, at most 0",
    "NaN": "gave nan as a log-probability",
    "logprobs ignored": "no log-probabilities of the tokens that it generates",
    "values of other tokens": "of another temperature",
    "cut to five": "cuts the distribution",
    "logprobs of another form": "where a list was expected",
}


@pytest.mark.parametrize("attr_target", ["log_prob", "label"])
@pytest.mark.parametrize("part", FAULTS)
def test_inconsistent_top_logprobs_are_refused(server, part, attr_target):
    server.part = CHAT_PARTS[part]
    with pytest.raises(ApiError, match=FAULTS[part]) as raised:
        remote(chat(server), attr_target=attr_target).attribute(spans(), " golf")
    assert 'attr_target="frequency"' in str(raised.value)  # which would work
    assert len(server.bodies) < 12


def test_token_names_without_their_spaces_are_refused(server):
    server.part = CHAT_PARTS["names without spaces"]
    with pytest.raises(ApiError, match=r"spaces are lost or replaced.*label"):
        remote(chat(server)).attribute(spans(), gen_args={"max_new_tokens": 2})
    found = remote(chat(server), attr_target="label").attribute(spans())
    assert found.provenance["labels"][0].isalpha()


@pytest.mark.parametrize(
    ("changes", "is_read"),
    [
        ({"usage": [1]}, True),
        ({"usage": {"prompt_tokens": "12", "completion_tokens": -1}}, True),
        ({"model": ["tiny"]}, True),
        ({"choices": [{"message": "golf"}]}, False),
        ({"choices": [{"message": None}]}, False),
        ({"choices": [{"message": {"content": 7}}]}, False),
        ({"choices": ["golf"]}, False),
        ({"choices": [{"message": {"content": [{"type": "text", "text": " golf"}, "!"]}}]}, True),
        ({"choices": [{"message": {"content": "golf"}, "logprobs": "none"}]}, True),
    ],
)
def test_answers_of_another_form_are_read_or_named(server, changes, is_read):
    server.part = {"answer": lambda answer: answer | changes}
    provider = chat(server)
    question = ChatRequest([{"role": "user", "content": "Go"}], n_tokens=1, temperature=0.0)
    if is_read:
        [answer] = provider.chat(question)
        own = changes.get("choices")
        assert answer.text == " golf!" if own and len(own[0]) == 1 else answer.text
        assert answer.n_in >= 0
    else:
        with pytest.raises(ApiError, match=r"was expected|as the text of its answer"):
            provider.chat(question)


def test_similar_prompts_answered_from_a_cache_are_reported(server):
    seen = {}
    server.part = {"prompt": lambda ids: seen.setdefault(tuple(ids[:8]), ids)}
    with pytest.warns(UserWarning, match="from a cache"):
        found = remote(chat(server), attr_target="label").attribute(spans())
    assert "coalitions have the values of another" in found.provenance["doubts"][0]
    server.part = {}
    assert not remote(chat(server), attr_target="label").attribute(spans()).provenance["doubts"]


def test_unlisted_stop_token_is_recorded(server):
    class Ends:
        """Ends every answer after its second token."""

        prefills, max_concurrency, model_name = ("continue",), 1, "ends"

        def __init__(self, listed):
            self.inner, self.listed = chat(server), listed

        def chat(self, question):
            found = self.inner.chat(question)
            if question.n_tokens < 3:
                return found
            cut = [one.steps[: 2 + self.listed] for one in found]
            return [
                replace(
                    one,
                    steps=steps,
                    text="".join(s.text for s in steps[:2]),
                    n_out=3,
                    has_stopped=True,
                )
                for one, steps in zip(found, cut, strict=True)
            ]

    for listed in (True, False):
        found = remote(Ends(listed)).attribute(spans(), gen_args={"max_new_tokens": 6})
        said = found.provenance["handshake"]["stop token"]
        assert said.startswith("listed" if listed else "not listed: what the model writes")
        assert len(found.output_tokens) == 2


@pytest.mark.parametrize("bias", ["told", "raw"])
@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_logit_bias_gives_exact_values(demo, server, bias, kind):
    server.bias = bias
    provider = chat(server) if kind == "chat" else CompletionsProvider(server.url, "tiny")
    ours = RemoteGenerationAttribution(
        FeatureAblation(PLACEHOLDER), demo[1], provider, rung="stepwise", top_logprobs=3
    )
    target = " golf and"
    told = ours.estimate(spans(demo[1]), target)
    assert not server.bodies
    found = ours.attribute(spans(demo[1]), target)
    truth = local(demo, target)
    assert found.rung == "stepwise forced"
    torch.testing.assert_close(found.values.double(), truth.values.double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.token_attr.double(), truth.token_attr, atol=2e-4, rtol=0)
    assert found.provenance["share_censored"] == 0
    assert found.provenance["handshake"]["logit_bias"].startswith("told with")
    assert len(server.bodies) - 8 <= told.n_requests
    # What would be bounds without.
    bounds = remote(chat(server), top_logprobs=3).attribute(spans(), target)
    assert bounds.provenance["share_censored"] > 0.2


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_given_ids_are_told_by_one_request_each(demo, server, kind):
    server.reports_ids, server.bias = True, "ignored"
    provider = chat(server) if kind == "chat" else CompletionsProvider(server.url, "tiny")
    ours = RemoteGenerationAttribution(
        ShapleyValues(PLACEHOLDER), demo[1], provider, rung="stepwise", top_logprobs=3
    )
    target = " golf and"
    found = ours.attribute(spans(demo[1]), target)
    handshake = found.provenance["handshake"]
    n_given = sum("logprob_token_ids" in body for body in server.bodies)
    # Two of the target's tokens for every coalition, and the handshake's: none is asked for twice.
    assert n_given == 2 * found.n_evaluations + 1
    assert len(server.bodies) - n_given <= 10
    truth = local(demo, target, ShapleyValues)
    torch.testing.assert_close(found.values.double(), truth.values.double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.token_attr.double(), truth.token_attr, atol=2e-4, rtol=0)
    assert found.provenance["share_censored"] == 0
    assert handshake["logprob_token_ids"] == "told"
    assert "logit_bias" not in handshake


def test_a_function_may_be_given_ids(demo, server):
    asked = []

    def answer(messages, logprob_token_ids=(), **settings):
        asked.append(list(logprob_token_ids))
        server.reports_ids = True
        body = {"model": "tiny", "messages": messages, "logprobs": True, **settings}
        body = {name: value for name, value in body.items() if value is not None}
        said = server.chat(_as_chat(body, logprob_token_ids))["choices"][0]
        steps = said["logprobs"]["content"]
        tops = [{top["token"]: top["logprob"] for top in step["top_logprobs"]} for step in steps]
        return said["message"]["content"], tops

    provider = CallableProvider(answer)
    ours = RemoteGenerationAttribution(
        FeatureAblation(PLACEHOLDER), demo[1], provider, rung="stepwise", top_logprobs=3
    )
    found = ours.attribute(spans(demo[1]), " golf")
    truth = local(demo, " golf")
    torch.testing.assert_close(found.values.double(), truth.values.double(), atol=1e-4, rtol=0)
    assert any(asked)
    assert found.provenance["share_censored"] == 0


def _as_chat(body, ids):
    prefill = body.pop("prefill")
    if prefill:
        more = {"continue_final_message": True, "add_generation_prompt": False}
        body["messages"] = [*body["messages"], {"role": "assistant", "content": prefill}]
        body |= more
    return body | ({"logprob_token_ids": list(ids)} if ids else {})


def test_given_ids_that_are_ignored_or_refused_leave_the_bias(demo, server):
    ours = {"model", "messages", "max_tokens", "temperature", "n", "seed", "logprobs"}
    ours |= {"top_logprobs", "logit_bias", "continue_final_message", "add_generation_prompt"}
    for known in (None, ours):
        server.known = known
        ours = RemoteGenerationAttribution(
            FeatureAblation(PLACEHOLDER), demo[1], chat(server), rung="stepwise", top_logprobs=3
        )
        found = ours.attribute(spans(demo[1]), " golf")
        assert "logit_bias" in found.provenance["handshake"]
        assert found.provenance["share_censored"] == 0


def test_the_first_cause_is_told_apart_from_every_other_one():
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(200):
        weight = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        lower = torch.randn(4, 1, generator=generator, dtype=torch.float64)
        upper = lower + torch.rand(4, 1, generator=generator, dtype=torch.float64) ** 3
        attributions = ((lower + upper) / 2 * weight).sum(0)
        bounds = Bounds([bytes([i]) for i in range(4)], lower, upper)
        told = bounds.first_cause(weight, attributions, is_product=False)
        # A linear function is largest in a corner.
        corners = [
            torch.stack([(lower, upper)[end][i, 0] for i, end in enumerate(ends)]) @ weight
            for ends in itertools.product((0, 1), repeat=4)
        ]
        is_first = [int(corner.argmax()) == told["first"] for corner in corners]
        assert told["is_told_apart"] == all(is_first)
        if not all(is_first):
            lead = [float(corner[told["second"]] - corner[told["first"]]) for corner in corners]
            assert max(lead) > 0
        by_rank = attributions.argsort(descending=True).tolist()
        seen.append((told["is_told_apart"], by_rank.index(told["second"])))
    # Of both there are some; and some where the third may be the first, and the second may not.
    assert {(True, 1), (False, 1), (False, 2)} <= set(seen)


@pytest.mark.parametrize(
    ("label", "named", "first"),
    [
        # Of what the tokenizer makes of it, not what merely begins like it.
        ("Norway", [" N", " The"], " Nor"),
        ("Norway", ["N", "The"], "Nor"),
        (" Norway", ["N", "The"], " Nor"),
        ("Norway", ["The", "Nor", " Nor"], "Nor"),
        ("Norway", ["The", " Nor"], " Nor"),
    ],
)
def test_first_token_of_a_label_is_the_tokenizers(label, named, first):
    class By:
        """Cuts words after three letters."""

        @property
        def details(self):
            return {}

        def likeliest(self, messages):
            return [(name, -1.0) for name in [*named, " else"]]

        def first_token(self, text, prefix=""):
            return text[: 3 + text.startswith(" ")]

    ours = Label(By(), (None, "else"))
    ours.target([], label)
    assert ours.details["labels"][0] == first


def test_the_warning_of_bounds_says_what_would_tell_more(server):
    def advice(**arguments):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            remote(chat(server), **arguments).attribute(spans(), gen_args={"max_new_tokens": 2})
        return next(str(w.message) for w in warned if "not distinguish" in str(w.message))

    said = advice(top_logprobs=1)
    assert '`attr_target="prob"` hardly depends' in said
    assert "A larger `top_logprobs`" in said
    assert '`rung="stepwise"` may tell them' in said
    said = advice(top_logprobs=2, attr_target="label", labels=("poker", "table"))
    assert "With the model's `tokenizer` the server may tell them" in said
    # A server that has told fewer than were asked for has no more.
    server.part = {"content": lambda content: [fewer(one) for one in content]}

    def fewer(one):
        return one | {"top_logprobs": one["top_logprobs"][:1]}

    assert "top_logprobs" not in advice(top_logprobs=5)


def test_ignored_logit_bias_is_reported(demo, server):
    server.bias = "ignored"
    how = {"rung": "stepwise", "top_logprobs": 5}
    ours = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), demo[1], chat(server), **how)
    with pytest.raises(ApiError, match=r"ignores `logit_bias`.*top-k"):
        ours.attribute(spans(demo[1]), " golf")
    # Without being told which rung, the next one is taken.
    ours = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), demo[1], chat(server))
    found = ours.attribute(spans(demo[1]), " golf")
    assert found.rung == "stepwise top-k"
    assert "logit_bias" in found.provenance["rungs_refused"]["stepwise"]
    with pytest.raises(ValueError, match="give the model's `tokenizer`"):
        remote(chat(server), rung="stepwise").attribute(spans(), " golf")


@pytest.fixture(scope="module")
def flat(demo):
    """A model that draws improbable tokens, and one that is sure of nothing."""
    model, tokenizer = demo
    torch.manual_seed(0)
    with Server(Flat(model), tokenizer) as server:
        yield server


class Flat(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        found = self.model(input_ids=input_ids)
        return replace(found, logits=found.logits * 0.3)


@pytest.mark.parametrize(
    ("kind", "lists"),
    [("chat", "beside"), ("chat", "instead"), ("chat", "not"), ("completions", "beside")],
)
def test_sampled_token_in_top_logprobs_gives_no_bound(demo, flat, kind, lists):
    flat.lists = lists
    target = " golf and"
    provider = chat(flat) if kind == "chat" else CompletionsProvider(flat.url, "tiny")
    for top in (1, 5):
        ours = remote(provider, ShapleyValues, rung="top-k", top_logprobs=top)
        found = ours.attribute(spans(), gen_args={"max_new_tokens": 2})
        said = "".join(piece.text for piece in found.output_pieces)
        truth = local((flat.model, demo[1]), said, ShapleyValues).values.double()
        lower, upper = found.value_interval
        assert bool(((lower - 1e-4 <= truth) & (truth <= upper + 1e-4)).all()), top
        assert found.provenance["share_censored"] < 1 or top == 1
    ours = RemoteGenerationAttribution(
        FeatureAblation(PLACEHOLDER), demo[1], provider, rung="stepwise", top_logprobs=4
    )
    found = ours.attribute(spans(demo[1]), target)
    truth = local((flat.model, demo[1]), target).values.double()
    torch.testing.assert_close(found.values.double(), truth, atol=1e-4, rtol=0)


@pytest.mark.parametrize("labels", [("golf", "poker"), (None, " poker"), (None, None)])
def test_two_label_contrast(demo, server, labels):
    model, tokenizer = demo
    ours = remote(chat(server, prefill="none"), attr_target="label", labels=labels)
    told = ours.estimate(spans(), labels[0] or "golf")
    found = ours.attribute(spans(), labels[0])
    assert found.rung == "label contrast"
    assert told.n_requests == found.n_evaluations == 6
    pair = found.provenance["labels"]
    ids = [tokenizer.convert_tokens_to_ids("Ġ" + name.strip()) for name in pair]
    exact = []
    for row in spans(tokenizer).render(found.masks.bool(), torch.Generator().manual_seed(0)):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([row.ids])).logits[0, -1].log_softmax(-1)
        exact.append(float(p[ids[0]] - p[ids[1]]))
    exact = torch.tensor(exact, dtype=torch.float64)
    lower, upper = (end[:, 0] for end in found.value_interval)
    assert bool(((lower - 1e-6 <= exact) & (exact <= upper + 1e-6)).all())
    known = lower == upper
    assert bool(known[0])
    torch.testing.assert_close(found.values[known, 0].double(), exact[known], atol=1e-5, rtol=0)
    assert "first tokens" in found.provenance["cannot_see"]
    with pytest.raises(ValueError, match="both begin with"):
        remote(chat(server), attr_target="label", labels=("golf", "golf course")).attribute(spans())


@pytest.mark.parametrize("given", ["by id", "biased", "neither"])
def test_labels_are_exact_where_the_server_tells_given_tokens(demo, server, given):
    model, tokenizer = demo
    server.reports_ids = given == "by id"
    server.bias = "told" if given == "biased" else "ignored"
    ours = RemoteGenerationAttribution(
        ShapleyValues(PLACEHOLDER),
        tokenizer,
        chat(server, prefill="none"),
        attr_target="label",
        labels=("golf", "zebra"),
        top_logprobs=3,
    )
    # The second label is never among the three likeliest: the tokenizer knows how it begins.
    told = ours.estimate(spans())
    found = ours.attribute(spans())
    pair = found.provenance["labels"]
    ids = [tokenizer.encode(name, add_special_tokens=False)[0] for name in pair]
    assert pair == [" golf", tokenizer.decode(ids[1:])]
    exact = []
    for row in spans(tokenizer).render(found.masks.bool(), torch.Generator().manual_seed(0)):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([row.ids])).logits[0, -1].log_softmax(-1)
        exact.append(float(p[ids[0]] - p[ids[1]]))
    exact = torch.tensor(exact, dtype=torch.float64)
    lower, upper = (end[:, 0] for end in found.value_interval)
    assert bool(((lower - 1e-4 <= exact) & (exact <= upper + 1e-4)).all())
    is_exact = given != "neither"
    assert (found.provenance["share_censored"] == 0) == is_exact
    n_handshake = 12
    assert len(server.bodies) <= told.n_requests + n_handshake
    if is_exact:
        torch.testing.assert_close(found.values[:, 0].double(), exact, atol=1e-4, rtol=0)
    else:
        assert "ignores `logit_bias`" in found.provenance["handshake"]["given tokens"]
        assert "likeliest has a bound" in found.provenance["cannot_see"]
    if given == "by id":  # both labels by one request
        n = sum("logprob_token_ids" in body for body in server.bodies)
        assert n == found.n_evaluations + 1


def test_checkpoint_keeps_sampled_answers(server, tmp_path):
    def is_answer(text):
        return text.strip() in ("golf", "poker", "table")

    for attr_target in ("log_prob", "label", "frequency", "similarity"):
        path = tmp_path / f"{attr_target}.sqlite"
        ours = {"attr_target": attr_target, "n_answers": 40}
        ours |= {"predicate": is_answer} if attr_target == "frequency" else {}
        how = {"gen_args": {"max_new_tokens": 1}, "checkpoint": path}
        server.bodies.clear()
        least = remote(chat(server, max_concurrency=1), max_requests=4, **ours)
        with pytest.raises(RuntimeError, match="`max_requests` allows no more"):
            least.attribute(spans(), **how)
        broken = remote(chat(server, max_concurrency=1), **ours).attribute(spans(), **how)
        n_all = len(server.bodies)
        server.bodies.clear()
        again = remote(chat(server, max_concurrency=1), **ours)
        whole = again.attribute(spans(), gen_args=how["gen_args"])
        # Who answers is asked each time; where it is told, whether it is as before.
        n_more = 2 if attr_target in ("log_prob", "label") else 1
        assert n_all == len(server.bodies) + n_more
        assert torch.equal(broken.values, whole.values)
    with pytest.raises(ValueError, match="both files of answers"):
        remote(chat(server), cache=tmp_path / "o").attribute(spans(), " golf", checkpoint=path)


def test_sampling_continues_until_the_top_cause_is_significant(server):
    def is_answer(text):
        return text.strip() in ("golf", "poker", "table")

    ours = {"attr_target": "frequency", "predicate": is_answer}
    how = {"gen_args": {"max_new_tokens": 1}}
    with pytest.warns(UserWarning, match="not distinguishable: of 8 answers each"):
        few = remote(chat(server), n_answers=8, **ours).attribute(spans(), " golf", **how)
    assert not few.provenance["first_cause"]["is_told_apart"]
    found = remote(chat(server), **ours).attribute(spans(), " golf", **how)
    first = found.provenance["first_cause"]
    n = found.provenance["n_answers_each"]
    assert n in (50, 100, 200)
    assert first["is_told_apart"] or n == 200
    assert sum(body.get("n", 1) for body in server.bodies) <= 8 * 6 + 200 * 6


def test_error_names_the_rung_that_works(demo, server):
    """Each provider is asked for more than it tells, and what it does tell is named."""

    def no_completions(handler, body):
        if handler.path.endswith("/chat/completions"):
            return lambda answer: answer
        return handler.reply(404, {"error": {"message": "This is a chat model."}})

    server.always = no_completions
    forced = RemoteGenerationAttribution(
        FeatureAblation(PLACEHOLDER), demo[1], CompletionsProvider(server.url, "tiny")
    )
    with pytest.raises(ApiError, match=r"chat model.*top-k.*`ChatProvider` would work"):
        forced.attribute(spans(demo[1]), " golf")
    server.always = None
    with pytest.raises(ApiError, match=r'`attr_target="label"` would work'):
        remote(chat(server, prefill="none")).attribute(spans(), " golf")


def test_missing_prefill_support_is_reported(server):
    ours = remote(chat(server, prefill="assistant"))
    with pytest.raises(ApiError, match=r"does not continue a prefilled answer .* would work"):
        ours.attribute(spans(), gen_args={"max_new_tokens": 3})
    with pytest.raises(ApiError, match="it has no way to"):
        remote(chat(server, prefill="none")).attribute(spans())
    with pytest.raises(ApiError, match="no log-probabilities of the tokens that it generates"):
        remote(AnthropicProvider("tiny", api_url=server.url)).attribute(spans())


def test_auto_takes_the_first_verified_rung(demo, server):
    arguments = {"attr_target": "auto", "n_answers": 12}
    arguments["predicate"] = lambda text: text.strip() in ("golf", "poker", "table")
    settings = {"target": " golf", "gen_args": {"max_new_tokens": 1}}
    assert remote(chat(server), **arguments).attribute(spans(), **settings).rung == "stepwise top-k"
    found = remote(
        AnthropicProvider("tiny", api_url=server.url, max_concurrency=1), **arguments
    ).attribute(spans(), **settings)
    assert found.rung == "frequency"
    assert "no log-probabilities" in found.provenance["rungs_refused"]["top-k"]
    forced = RemoteGenerationAttribution(
        FeatureAblation(PLACEHOLDER), demo[1], CompletionsProvider(server.url, "tiny"), "auto"
    )
    found = forced.attribute(spans(demo[1]), " golf")
    assert found.rung is None
    torch.testing.assert_close(
        found.token_attr.double(), local(demo, " golf").token_attr, atol=1e-5, rtol=0
    )
    # One whose prompts are told wrongly still tells what it writes.
    server.part = PARTS["shifted left"]
    forced = RemoteGenerationAttribution(
        FeatureAblation(PLACEHOLDER), demo[1], CompletionsProvider(server.url, "tiny"), "auto"
    )
    found = forced.attribute(spans(demo[1]), " golf")
    assert found.rung == "stepwise forced"
    assert "shifted left" in found.provenance["rungs_refused"]["forced"]
    torch.testing.assert_close(
        found.token_attr.sum(0).double(),
        local(demo, " golf").token_attr.sum(0),
        atol=1e-3,
        rtol=0,
    )


def test_cost_estimate_per_rung(server):
    def n_sent():
        return sum(body.get("n", 1) for body in server.bodies)

    top = remote(chat(server), prices=(1.0, 4.0))
    told = top.estimate(spans(), " golf")
    assert not server.bodies
    found = top.attribute(spans(), " golf")
    n_handshake = len(server.bodies) - told.n_requests
    assert 0 <= n_handshake <= 6
    assert told.n_coalitions == found.n_evaluations == 6
    assert told.tokens_in == pytest.approx(found.provenance["tokens_in"], rel=0.7)
    assert told.usd == pytest.approx((told.tokens_in + 4 * told.tokens_out) / 1e6, rel=0.01)
    server.bodies.clear()
    often = remote(chat(server), attr_target="frequency", n_answers=10)
    told = often.estimate(spans(), " golf", gen_args={"max_new_tokens": 1})
    often.attribute(spans(), " golf", gen_args={"max_new_tokens": 1})
    assert told.n_requests == 60 == n_sent() - 2  # of the question whether answers vary
    assert told.usd is None


@pytest.mark.parametrize("limit", [{"max_requests": 5}, {"max_usd": 1e-5, "prices": (1.0, 1.0)}])
def test_spending_limits_stop_the_run_and_keep_answers(server, tmp_path, limit):
    path = tmp_path / "answers.sqlite"
    whole = remote(chat(server, max_concurrency=1)).attribute(spans(), " golf")
    n_all = len(server.bodies)
    server.bodies.clear()
    with pytest.raises(RuntimeError, match=r"`max_(requests|usd)` allows"):
        remote(chat(server, max_concurrency=1), cache=path, **limit).attribute(spans(), " golf")
    n_before = len(server.bodies)
    assert 0 < n_before <= 5
    again = remote(chat(server, max_concurrency=1), cache=path).attribute(spans(), " golf")
    assert len(server.bodies) - n_all in (1, 2)  # who answers, and whether alike
    assert torch.equal(again.values, whole.values)
    server.bodies.clear()
    free = remote(chat(server, max_concurrency=1), cache=path).attribute(spans(), " golf")
    assert len(server.bodies) == 2
    assert torch.equal(free.values, whole.values)
    assert free.provenance["n_requests"] == 2
    # Another model under the same name is asked for everything itself.
    server.name_told = "tiny-1"
    server.bodies.clear()
    remote(chat(server, max_concurrency=1), cache=path).attribute(spans(), " golf")
    assert len(server.bodies) == n_all


def test_interrupted_run_keeps_received_answers(server, tmp_path):
    path = tmp_path / "answers.sqlite"
    server.failures.extend([None] * 6)
    server.always = status(401, "revoked")
    with pytest.raises(ApiError, match="revoked"):
        remote(chat(server, max_concurrency=1), cache=path).attribute(spans(), " golf")
    server.always = None
    server.bodies.clear()
    remote(chat(server, max_concurrency=1), cache=path).attribute(spans(), " golf")
    n_left = len(server.bodies)
    server.bodies.clear()
    remote(chat(server, max_concurrency=1)).attribute(spans(), " golf")
    assert n_left == len(server.bodies) - 4
    path.write_bytes(b"no database at all, but long enough to look like one" * 20)
    with pytest.raises(ValueError, match="not a cache of answers"):
        remote(chat(server), cache=path)


def test_chat_turns_are_sent_as_messages(server):
    messages = [
        {"role": "system", "content": "Dave lives in Palm Coast, FL and is a lawyer."},
        {"role": "user", "content": "His personal interests include"},
    ]
    found = remote(chat(server)).attribute(ChatInput(messages, None, baselines="delete"), " golf")
    sent = [tuple(m["role"] for m in body["messages"]) for body in server.bodies]
    assert ("system", "user") in sent
    assert ("user",) in sent
    assert ("system",) in sent
    assert found.input_tokens[0].startswith("system: Dave lives")
    inner = remote(chat(server)).attribute(
        ChatInput(messages, None, unit="word", baselines="delete"), " golf"
    )
    assert inner.token_attr.shape[1] > 10
    assert inner.levels[0].parts == found.input_tokens


def test_custom_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url, api_key="sk-none")
    try:
        found = remote(ChatProvider("tiny", client)).attribute(spans(), " golf")
        truth = remote(chat(server)).attribute(spans(), " golf")
    finally:
        client.close()
    assert torch.equal(found.values, truth.values)


def test_results_are_saved_and_shown(server, tmp_path):
    found = remote(chat(server)).attribute(spans(), " golf")
    found.save(tmp_path / "one.safetensors")
    loaded = GenerationAttributionResult.load(tmp_path / "one.safetensors")
    assert loaded.rung == found.rung
    assert torch.equal(loaded.value_interval, found.value_interval)
    assert "golf" in found.to_html()
    share = found.provenance["share_censored"]
    assert 0 < share < 1
    assert f"{share:.0%} of the values that these numbers are made of are not told" in (
        " ".join(str(found.narrative()).split())
    )
    for shown in (found.table(), found.to_html()):
        assert "is not among the 20 likeliest has a bound" in shown


def test_non_linear_estimators_give_no_interval(server):
    found = remote(chat(server), KernelShap).attribute(spans(), " golf", n_samples=12)
    assert found.token_attr_interval is None
    assert found.value_interval is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attr_target": "often"}, "'frequency', 'similarity' or 'auto'"),
        ({"similarity": "cosine"}, "give 'lexical', 'f1', 'difflib' or a function"),
        ({"labels": ("a", "b")}, "`labels` is"),
        ({"rung": "highest"}, "`rung` is 'highest': give one of 'forced'"),
        ({"rung": "label"}, "reports 'label', and `attr_target` is 'log_prob'"),
        ({"max_requests": 0}, "at least 1"),
        ({"max_usd": 1.0}, "and `prices`"),
        ({"prices": (1.0,)}, "per million tokens read, and written"),
        ({"n_answers": 0}, "n_answers"),
        ({"predicate": str.isupper}, "`predicate` would be ignored"),
    ],
)
def test_bad_arguments_are_refused(server, arguments, message):
    with pytest.raises(ValueError, match=message):
        remote(chat(server), **arguments)


def test_unused_arguments_are_refused(server):
    with pytest.raises(ValueError, match="`output_unit` needs log-probabilities of prompts"):
        remote(chat(server)).attribute(spans(), " golf", output_unit="token")
    with pytest.raises(TypeError, match="is sent text, so give one"):
        remote(chat(server)).attribute(spans(), [5, 6])
    with pytest.raises(ValueError, match="none of the 20 likeliest tokens"):
        remote(chat(server)).attribute(spans(), "Zebra!")
    with pytest.raises(ValueError, match="either `client`"):
        ChatProvider("tiny")


@pytest.mark.parametrize("n", [8, 50])
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_frequency_errors_have_coverage(n, p):
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    covered = sum(c for k, c in enumerate(chances) if wilson(k, n)[0] <= p <= wilson(k, n)[1])
    assert covered >= 0.9


LINE = ["attribute", "--model", "tiny", "--prompt", PROMPT, "--target", " golf", "--quiet"]
LINE += ["--method", "ablation"]


def test_command_line_tells_what_each_rung_would_take_and_what_was_sent(server, capsys):
    asked = [*LINE[:5], *LINE[7:], "--api", server.url, "--max-new-tokens", "2"]
    assert main([*asked, "--estimate"]) == 0
    assert not server.bodies
    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines()]
    assert [row[0] for row in rows] == ["rung", "top-k", "frequency", "similarity"]
    # Two tokens; at most 200, and 64, answers.
    assert [int(row[2].replace(",", "")) for row in rows[1:]] == [2 * 16, 200 * 16, 64 * 16]
    assert "the first of these that works is used" in said.err
    assert main(asked) == 0
    said = capsys.readouterr().err
    assert f"{len(server.bodies)} requests were sent" in said
    assert len(server.bodies) <= 2 * 16 + N_CHECKS
    labels = ["--rung", "label", "--labels", "golf", "poker"]
    server.bodies.clear()
    assert main([a for a in [*asked, *labels] if a != "--quiet"]) == 0
    said = capsys.readouterr()
    assert "Found by label contrast of ' golf' with ' poker'" in said.out
    # One token is an answer, and no further coalitions follow.
    assert "ended at once" not in said.err
    assert "for the whole answer" not in said.err


def test_advice_to_users_of_the_command_line_names_its_options(server, capsys):
    server.bias = "ignored"
    cases = {
        ("--rung", "stepwise"): "--rung top-k",
        ("--rung", "frequency", "--target", " zebra"): "or --rung similarity",
    }
    for more, advice in cases.items():
        asked = [*LINE[:5], *LINE[7:], "--api", server.url, *more]
        assert main(asked) == 1, more
        said = capsys.readouterr().err
        assert advice in said, said
        assert "--attr-target" not in said
        assert "`" not in said


def test_command_line_queries_apis(demo, server, capsys, tmp_path):
    asked = [*LINE, "--api", server.url]
    assert main([*asked, "--estimate", "--rung", "log_prob"]) == 0
    assert not server.bodies
    assert re.search(r"^top-k +16 +16 ", capsys.readouterr().out, re.M)
    assert main([*asked, "--json", str(tmp_path / "one.json")]) == 0
    assert "golf" in capsys.readouterr().out
    told = json.loads((tmp_path / "one.json").read_text())["provenance"]
    assert told["rung"] == "stepwise top-k"
    frequency = ["--rung", "frequency", "--answers", "20", "--max-new-tokens", "1"]
    assert main([*asked, *frequency, "--cache", str(tmp_path / "a.sqlite")]) == 0
    server.bodies.clear()
    assert main([*asked, *frequency, "--cache", str(tmp_path / "a.sqlite")]) == 0
    assert len(server.bodies) == 1
    assert main([*asked, "--max-requests", "3"]) == 1
    assert "--max-requests allows no more" in capsys.readouterr().err
    labels = ["--rung", "label", "--labels", "golf", "poker"]
    assert main([*asked[:5], *asked[7:], *labels, "--json", str(tmp_path / "l.json")]) == 0
    told = json.loads((tmp_path / "l.json").read_text())["provenance"]
    assert told["labels"] == [" golf", " poker"]
    prob = ["--attr-target", "prob", "--top-logprobs", "3", "--json", str(tmp_path / "p.json")]
    assert main([*asked, *prob]) == 0
    told = json.loads((tmp_path / "p.json").read_text())["provenance"]
    assert (told["attr_target"], told["rung"]) == ("prob", "stepwise top-k")
    assert server.bodies[-1]["top_logprobs"] == 3
    foils = ["--attr-target", "contrast", "--foils", " tennis", "--json", str(tmp_path / "c.json")]
    whole = ["--provider", "completions", "--tokenizer", "demo"]
    assert main([*asked, *foils, *whole]) == 0
    told = json.loads((tmp_path / "c.json").read_text())["provenance"]
    assert told["attr_target"] == "contrast"
    stepwise = ["--rung", "stepwise", "--tokenizer", "demo", "--json", str(tmp_path / "s.json")]
    assert main([*asked, *stepwise]) == 0
    told = json.loads((tmp_path / "s.json").read_text())["provenance"]
    assert told["rung"] == "stepwise forced"
    forced = [*asked, "--provider", "completions", "--tokenizer", "demo"]
    assert main([*forced, "--json", str(tmp_path / "two.json")]) == 0
    told = json.loads((tmp_path / "two.json").read_text())["provenance"]
    assert told["handshake"]["way"] == "prompt_logprobs"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-requests", "3"], "--max-requests would be ignored without --api"),
        (
            ["--provider", "anthropic", "--tokenizer", "demo"],
            "Anthropic's messages return only text",
        ),
        (["--api", "http://h/v1", "--labels", "a", "b"], "ignored without --rung label"),
        (["--api", "http://h/v1", "--attr-target", "logit"], "no API returns logits"),
        (["--api", "http://h/v1", "--attr-target", "contrast"], "--rung label compares two"),
        (
            ["--api", "http://h/v1", "--attr-target", "prob", "--rung", "label"],
            "--rung label sets what is explained",
        ),
        (["--top-logprobs", "5"], "--top-logprobs would be ignored without --api"),
        (["--api", "http://h/v1", "--dtype", "float32"], "--dtype would be ignored with --api"),
        (["--api", "http://h/v1", "--method", "gradient-shap"], "needs the model itself"),
    ],
)
def test_command_line_refuses_options_it_would_ignore(capsys, more, message):
    assert main([*LINE, *more]) == 2
    assert message in capsys.readouterr().err


def test_doctor_takes_the_model_as_other_commands_do(server, capsys):
    server.part = CHAT_PARTS["logprobs ignored"]
    assert main(["doctor", "--api", server.url, "--model", "tiny"]) == 0
    said = capsys.readouterr().out
    assert server.bodies[0]["model"] == "tiny"
    assert "only --rung frequency" in said
    assert "`" not in said
    assert main(["doctor", "tiny", "--api", server.url, "--model", "other"]) == 2
    assert "MODEL is tiny and --model other: give one" in capsys.readouterr().err


def test_doctor_checks_servers(server, capsys):
    look = ["doctor", "tiny", "--api", server.url]
    forced = [*look, "--provider", "completions", "--tokenizer", "demo"]
    assert main(forced) == 0
    assert "works  log-probabilities of prompts" in capsys.readouterr().out
    server.part = PARTS["shifted left"]
    assert main(forced) == 0
    said = capsys.readouterr().out
    assert "off    log-probabilities of prompts" in said
    assert "shifted left by one" in said
    assert "works  likeliest tokens at each step" in said
    server.part = {}
    assert main([*look, "--provider", "anthropic", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [about["works"] for about in told.values()] == [False, False, True]


@pytest.mark.parametrize("question", ["counterfactuals", "total_effect"])
def test_methods_that_need_a_local_model_are_refused(question):
    method = FeatureAblation(RemoteLLMAttribution.placeholder_model)
    provider = CallableProvider(lambda messages, **_: pytest.fail("it was asked"))
    attribution = RemoteGenerationAttribution(method, None, provider, "frequency")
    inp = TextSegmentInput("Is Rome in Italy?", None, "word", baselines="delete")
    with pytest.raises(TypeError, match="give a model of this process"):
        getattr(attribution, question)(inp, "yes")
