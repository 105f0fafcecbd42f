"""Servers whose responses are well-formed and wrong: copies, truncated prompts, changing models."""

import math
import time

import pytest
import torch
from captum.attr import FeatureAblation, RemoteLLMAttribution
from remote_server import CHAT_PARTS, Server

from captum_llm_ext import (
    ApiError,
    CallableProvider,
    ChatProvider,
    CompletionsProvider,
    GenerationAttribution,
    RemoteGenerationAttribution,
    TextSegmentInput,
    load_demo,
)
from captum_llm_ext.remote import scorer
from captum_llm_ext.remote.chat_endpoint import ChatRequest

PLACEHOLDER = RemoteLLMAttribution.placeholder_model
PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
SPANS = [(0, 4), (14, 28), (38, 45), (46, 76)]
pytestmark = pytest.mark.filterwarnings("ignore:not distinguishable")


@pytest.fixture(scope="module")
def demo():
    model, tokenizer, _ = load_demo()
    return model.double(), tokenizer


@pytest.fixture
def server(demo):
    with Server(*demo) as one:
        yield one


def remote(server, **arguments):
    provider = ChatProvider("tiny", api_url=server.url, max_concurrency=1)
    return RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), None, provider, **arguments)


def spans(tokenizer=None):
    return TextSegmentInput(PROMPT, tokenizer, unit=SPANS, baselines="delete")


def by_turns(change):
    """Every second answer changed."""
    seen = []

    def turn(answer):
        seen.append(1)
        return change(answer) if len(seen) % 2 else answer

    return turn


def other_values(answer):
    for choice in answer["choices"]:
        for one in (choice.get("logprobs") or {}).get("content", []):
            one["logprob"] -= 0.5
            for top in one["top_logprobs"]:
                top["logprob"] -= 0.5
    return answer


def test_rounded_values_have_valid_intervals(demo, server):
    server.part = CHAT_PARTS["rounded"]
    found = remote(server).attribute(spans(), " golf")
    assert found.provenance["handshake"]["rounding"] == "values are multiples of 0.1"
    truth = GenerationAttribution(FeatureAblation(demo[0]), demo[1]).attribute(
        spans(demo[1]), " golf", output_unit=None
    )
    lower, upper = found.value_interval
    exact = truth.values.double()
    assert bool(((lower - 1e-9 <= exact) & (exact <= upper + 1e-9)).all())
    known = lower.isfinite()
    assert bool(known.any())
    assert not torch.equal(found.values.double()[known], exact[known])
    below, above = found.token_attr_interval
    assert bool(((below - 1e-6 <= truth.token_attr) & (truth.token_attr <= above + 1e-6)).all())
    # None of it is a guess, so none is counted as one.
    assert found.provenance["share_censored"] == float((~known).double().mean())


def by_calls(nats):
    """Every second answer off by so much: a model that is quantised, and keeps what it has read."""

    def changed(content):
        for one in content:
            for held in (one, *one["top_logprobs"]):
                held["logprob"] -= nats
        return content

    return by_turns(changed)


def test_non_deterministic_server_widens_intervals(demo, server):
    server.part = {"content": by_calls(0.1)}
    found = remote(server).attribute(spans(), " golf")
    assert found.provenance["doubts"] == []
    lower, upper = found.value_interval
    known = lower.isfinite()
    truth = GenerationAttribution(FeatureAblation(demo[0]), demo[1]).attribute(
        spans(demo[1]), " golf", output_unit=None
    )
    exact = truth.values.double()
    assert float((found.values.double() - exact)[known].abs().max()) > 0.05
    assert bool(((lower - 1e-6 <= exact) & (exact <= upper + 1e-6)).all())
    assert float((upper - lower)[known].max()) == pytest.approx(0.2, abs=1e-6)


def test_repetition_penalty_is_accepted(demo, server):
    server.penalty = 100.0  # no token comes twice
    found = remote(server).attribute(spans(), gen_args={"max_new_tokens": 3})
    assert "holds repetitions down" in found.provenance["handshake"]["written tokens"]
    pieces = [piece.text for piece in found.output_pieces]
    ids = [demo[1].encode(text, add_special_tokens=False)[0] for text in pieces]
    truth = GenerationAttribution(FeatureAblation(demo[0]), demo[1]).attribute(
        spans(demo[1]), torch.tensor(ids), output_unit=None
    )
    known = found.value_interval[0].isfinite()
    torch.testing.assert_close(found.values[known], truth.values[known].float(), atol=1e-4, rtol=0)


def test_position_without_log_probabilities_is_unbounded():
    """Where a draw ends the answer, some tell nothing of it; another draw may tell."""
    rare = {"asked": 0}

    def fn(messages, max_tokens, temperature, prefill, top_logprobs, seed):
        text = " ".join(message["content"] for message in messages)
        if "Rex" not in text:
            return "", []
        if "Milo" not in text:
            rare["asked"] += 1
            if (seed or 0) < 2:
                return "", []
        top = {" yes": math.log(0.6), " no": math.log(0.3)}
        return " yes" * max_tokens, [top] * max_tokens

    inp = TextSegmentInput("Milo is here. Rex is here.", None, unit="sentence")
    ours = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), None, CallableProvider(fn))
    found = ours.attribute(inp, " yes")
    assert found.masks.tolist() == [[1, 1], [0, 0], [0, 1], [1, 0]]
    lower, upper = found.value_interval[:, :, 0]
    assert lower[[1, 3]].isneginf().all()
    assert upper[[1, 3]].tolist() == [0.0, 0.0]
    assert lower[[0, 2]].tolist() == pytest.approx([math.log(0.6)] * 2, abs=1e-6)
    assert rare["asked"] == 3
    assert found.token_attr_interval[1, 0, 1] == math.inf


def test_duplicate_top_tokens_are_refused(server):
    server.part = CHAT_PARTS["tokens doubled"]
    with pytest.raises(ApiError, match="lists 6 tokens of an answer of 3 at most"):
        remote(server).attribute(spans(), " golf")


@pytest.mark.parametrize("attr_target", ["log_prob", "label"])
def test_alternating_models_are_refused(server, attr_target):
    server.part = {"answer": by_turns(other_values)}
    with pytest.raises(ApiError, match="other log-probabilities each time"):
        remote(server, attr_target=attr_target).attribute(spans(), " golf")


@pytest.mark.parametrize("attr_target", ["log_prob", "label"])
def test_swapped_responses_are_refused(demo, server, attr_target):
    """A function that keeps what it is asked, and is called in several threads."""
    held = {}
    own = ChatProvider("tiny", api_url=server.url)

    def fn(messages, max_tokens, temperature, prefill, top_logprobs, seed):
        held["asked"] = messages
        time.sleep(0.05)
        how = {"n_tokens": max_tokens, "temperature": temperature, "top": top_logprobs}
        said = own.chat(ChatRequest(held["asked"], prefill=prefill, way="continue", **how))[0]
        return said.text, [dict(step.top) for step in said.steps]

    def ours(n_threads):
        provider = CallableProvider(fn, max_concurrency=n_threads)
        return RemoteGenerationAttribution(
            FeatureAblation(PLACEHOLDER), None, provider, attr_target
        )

    with pytest.raises(ApiError, match=r"at the same time.*`max_concurrency=1` avoids"):
        ours(3).attribute(spans(), " golf")
    found = ours(1).attribute(spans(), " golf")
    assert found.provenance["doubts"] == []
    own = ChatProvider("tiny", api_url=server.url, max_concurrency=3)
    method = FeatureAblation(PLACEHOLDER)
    true = RemoteGenerationAttribution(method, None, own, attr_target).attribute(spans(), " golf")
    assert true.provenance["handshake"]["asked beside others"] == "the same within 0 nats"
    torch.testing.assert_close(found.values, true.values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attr_target", ["log_prob", "label"])
def test_model_drift_is_reported(server, attr_target):
    server.failures.extend([None] * 6)
    server.always = lambda handler, body: other_values
    with pytest.warns(UserWarning, match=r"by 0\.5 nats: another model answers by now"):
        found = remote(server, attr_target=attr_target).attribute(spans(), " golf")
    assert len(found.provenance["doubts"]) == 1


def test_model_drift_is_reported_for_scored_prompts(demo, server, monkeypatch):
    def off(values):
        return [v if v is None else v - 0.5 for v in values]

    monkeypatch.setattr(scorer, "LONG", 0.0)
    provider = CompletionsProvider(server.url, "tiny", max_concurrency=1, prompts_per_request=1)
    ours = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), demo[1], provider)
    assert ours.attribute(spans(demo[1]), " golf").provenance["doubts"] == []
    n = len(server.bodies)

    def later(values):
        return off(values) if len(server.bodies) > n + 3 else values

    server.part = {"list": later}
    with pytest.warns(UserWarning, match="another model answers by now"):
        ours.attribute(spans(demo[1]), " golf")


def test_changed_model_name_is_reported(server):
    server.part = {"answer": by_turns(lambda answer: answer | {"model": "tiny-1"})}
    with pytest.warns(UserWarning, match="several models have answered: 'tiny-0', 'tiny-1'"):
        found = remote(server).attribute(spans(), " golf")
    assert found.provenance["answered_by"] == ["tiny-0", "tiny-1"]


def test_cached_answers_of_another_model_are_refused(server, tmp_path):
    path = tmp_path / "answers.sqlite"
    remote(server, cache=path).attribute(spans(), " golf")
    server.always = lambda handler, body: other_values
    with pytest.raises(ApiError, match=r"answers that are kept differ by 0\.5 nats"):
        remote(server, cache=path).attribute(spans(), " golf")


@pytest.mark.parametrize("attr_target", ["label", "frequency"])
def test_truncated_prompts_are_reported(server, attr_target):
    server.part = CHAT_PARTS["prompts are cut"]
    long = " ".join([PROMPT] * 4)
    step = len(PROMPT) + 1
    inp = TextSegmentInput(
        long, None, unit=[(i * step, (i + 1) * step - 1) for i in range(4)], baselines="delete"
    )
    how = {"gen_args": {"max_new_tokens": 1}}
    with pytest.warns(UserWarning, match="counted as 40 tokens alike: the server cuts them"):
        remote(server, attr_target=attr_target).attribute(inp, " golf", **how)
    server.part = {}
    found = remote(server, attr_target=attr_target).attribute(inp, " golf", **how)
    assert found.provenance["doubts"] == []


def test_duplicated_samples_are_requested_one_by_one(server):
    server.part = CHAT_PARTS["one answer, several times"]
    ours = remote(server, attr_target="frequency", n_answers=16)
    found = ours.attribute(spans(), " golf", gen_args={"max_new_tokens": 1})
    assert "copies of one" in found.provenance["handshake"]["draws"]
    assert all(body.get("n", 1) == 1 for body in server.bodies[2:])
    # Not all or nothing, as copies would have it.
    odds = (torch.tensor([0.5 / 16.5, 16.5 / 0.5]).log()).tolist()
    assert any(not any(math.isclose(v, o, abs_tol=1e-3) for o in odds) for v in found.values[:, 0])


@pytest.mark.parametrize("part", ["no draws", "kept by question"])
def test_constant_answers_are_refused_for_frequencies(server, part):
    kept = {"body": lambda body: body | {"seed": 5}} | CHAT_PARTS["one answer, several times"]
    server.part = CHAT_PARTS["no draws"] if part == "no draws" else kept
    with pytest.raises(
        ApiError, match=r"the same answer to an open question.*\"similarity\"` would"
    ):
        remote(server, attr_target="frequency").attribute(spans(), " golf")
    assert len(server.bodies) <= 12  # and what would do, at both endpoints
    server.bodies.clear()
    with pytest.warns(UserWarning, match="only changes of the likeliest answer are visible"):
        found = remote(server, attr_target="similarity").attribute(
            spans(), gen_args={"max_new_tokens": 6}
        )
    told = found.provenance
    assert told["n_answers_each"] == 1
    assert not told["answers_vary"]
    assert told["cannot_see"].startswith("only changes of the likeliest answer are seen")
    assert len(server.bodies) <= 2 + 1 + 6  # whether they vary, the target, one of each coalition
    lower, upper = found.token_attr_interval
    assert torch.equal(lower, upper)  # no error of sampling


def test_temperature_zero_accepts_constant_answers(server):
    how = {"gen_args": {"max_new_tokens": 4, "temperature": 0.0}}
    with pytest.raises(ValueError, match="`temperature` is 0, at which there is one answer alone"):
        remote(server, attr_target="frequency").attribute(spans(), **how)
    found = remote(server, attr_target="similarity").attribute(spans(), **how)
    assert {body["temperature"] for body in server.bodies} == {0.0}
    assert found.provenance["n_answers_each"] == 1


@pytest.mark.parametrize("most", [1, 8])
def test_samples_per_request_shrink_on_refusal(server, most):
    def refuse(handler, body):
        if body.get("n", 1) > most:
            said = {"error": {"message": f"n must be at most {most}"}}
            return handler.reply(400, said)
        return handler.reply(200, handler.answered(body))

    server.always = refuse
    ours = remote(server, attr_target="frequency", n_answers=16)
    found = ours.attribute(spans(), " golf", gen_args={"max_new_tokens": 1})
    assert found.provenance["n_answers"] <= 6 * 16
    assert found.rung == "frequency"
    refused = [body for body in server.bodies if body.get("n", 1) > most]
    assert len(refused) <= 2


def answers_two_in_time(handler, body):
    prompts = body.get("prompt", [0])
    n = body.get("n", 1) * (len(prompts) if isinstance(prompts[0], list) else 1)
    if n <= 2:
        return handler.reply(200, handler.answered(body))
    handler.owner.closing.wait(5)
    handler.close_connection = True
    return None


def test_prompts_per_request_shrink_on_timeout(demo, server):
    provider = CompletionsProvider(
        server.url, "tiny", max_concurrency=1, prompts_per_request=8, timeout=0.8
    )
    ours = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), demo[1], provider)
    truth = ours.attribute(spans(demo[1]), " golf")
    server.always = answers_two_in_time
    n_before = len(server.bodies)
    found = ours.attribute(spans(demo[1]), " golf")
    assert torch.equal(found.values, truth.values)
    prompts = [body["prompt"] for body in server.bodies[n_before:]]
    n_sent = [len(own) for own in prompts if isinstance(own[0], list)]
    assert n_sent[0] > 2
    assert max(n_sent[1:]) <= n_sent[0] // 2  # not tried again as it was


def test_samples_per_request_shrink_on_timeout(server):
    server.always = answers_two_in_time
    provider = ChatProvider("tiny", api_url=server.url, max_concurrency=1, timeout=0.8)
    ours = RemoteGenerationAttribution(
        FeatureAblation(PLACEHOLDER), None, provider, "frequency", n_answers=16
    )
    ours.attribute(spans(), " golf", gen_args={"max_new_tokens": 1})
    asked = [body.get("n", 1) for body in server.bodies]
    assert [n for n in asked if n > 2] == [8, 4]
