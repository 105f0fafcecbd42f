"""Servers as they are: busy, broken, slow, wrong; and users who lose patience."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from email.utils import formatdate
from pathlib import Path

import pytest
import tiny
import torch
from captum.attr import FeatureAblation, KernelShap, RemoteLLMAttribution
from remote_server import Server, changed, met, reset, silent, status

from captum_llm_ext import (
    ApiError,
    CompletionsProvider,
    GenerationAttribution,
    RemoteGenerationAttribution,
    TextSegmentInput,
)
from captum_llm_ext.remote import transport

PLACEHOLDER = RemoteLLMAttribution.placeholder_model
TARGET = " golf and chess."
KEY = "sk-never-to-be-seen"


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.llama(len(tokenizer)).double()


@pytest.fixture
def server(model, tokenizer):
    with Server(model, tokenizer) as server:
        yield server


@pytest.fixture
def quick(monkeypatch):
    """Waits are as they are, but a tenth as long."""
    monkeypatch.setattr(transport, "_FIRST_WAIT", 0.05)


def provider_of(server, **arguments):
    settings = {"model_name": "tiny", "prompts_per_request": 1, "timeout": 20.0}
    is_new = arguments.pop("is_new", False)
    provider = CompletionsProvider(server.url, **settings | arguments)
    return provider if is_new else met(provider, server)


def remote(provider, tokenizer, method=FeatureAblation, **arguments):
    return RemoteGenerationAttribution(method(PLACEHOLDER), tokenizer, provider, **arguments)


def words(tokenizer):
    return TextSegmentInput("Dave lives. Ann is in TX.", tokenizer, unit="word", baselines="delete")


def assert_true(found, model, tokenizer):
    local = GenerationAttribution(FeatureAblation(model), tokenizer)
    truth = local.attribute(words(tokenizer), TARGET, output_unit=None).token_attr
    torch.testing.assert_close(found.token_attr.double(), truth, atol=1e-5, rtol=0)


def no_threads_left():
    until = time.monotonic() + 5
    while time.monotonic() < until:
        if not any("captum-llm-ext request" in t.name for t in threading.enumerate()):
            return True
        time.sleep(0.01)
    return False


def half(handler, body):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
    handler.close_connection = True


FAILURES = {
    "429": [status(429), status(429)],
    "500": [status(500, "CUDA error"), status(503)],
    "reset": [reset, reset],
    "gone without an answer": [silent(0), silent(0)],
    "half an answer": [half],
    "all kinds": [status(429), reset, status(502), silent(0)],
}


@pytest.mark.parametrize("n_threads", [1, 4])
@pytest.mark.parametrize("kind", FAILURES)
def test_failed_requests_are_retried(model, tokenizer, server, quick, kind, n_threads):
    server.failures.extend(FAILURES[kind])
    found = remote(provider_of(server, max_concurrency=n_threads), tokenizer).attribute(
        words(tokenizer), TARGET
    )
    assert_true(found, model, tokenizer)
    # A connection that broke off while idle is no failure: it is replaced at once.
    assert len(server.bodies) == found.n_evaluations + len(FAILURES[kind])
    assert len(server.prompts) == found.n_evaluations == found.provenance["n_requests"]


def answers_with(content, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, body: handler.reply(200, content, names)


GARBAGE = {
    "cut": b'{"choices": [{"index": 0, "text": "a',
    "gateway": b"<html>Bad gateway</html>",
    "null": {"choices": None},
    "error": {"error": {"message": "upstream timed out", "code": 504}},
}


@pytest.mark.parametrize("failure", [status(503), reset, silent(0), status(502, Retry_After="60")])
def test_unreachable_server_is_given_up_early(tokenizer, server, monkeypatch, failure):
    monkeypatch.setattr(transport, "_FIRST_WAIT", 0.02)
    monkeypatch.setattr(transport, "_FIRST_PATIENCE", 0.1)
    server.always = failure
    with pytest.raises((ApiError, ConnectionError), match=r"\((\d) tries|asked to wait 60 seconds"):
        remote(provider_of(server, is_new=True), tokenizer).attribute(words(tokenizer), TARGET)
    assert len(server.bodies) <= 4
    # Once it has answered it is asked as often as was said; and one that is busy is there.
    for always, provider in (
        (status(503), provider_of(server, max_concurrency=1)),
        (status(429), provider_of(server, is_new=True, max_concurrency=1)),
    ):
        server.always = always
        server.bodies.clear()
        with pytest.raises(ApiError, match=r"\(7 tries\)"):
            remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
        assert len(server.bodies) == 7


def test_error_404_names_existing_url_and_models(tokenizer, server):
    server.base = "/v1"
    wrong = server.url.replace("/v1", "/api")
    with pytest.raises(ApiError, match=rf"404: .* There is one at {server.url}\."):
        remote(CompletionsProvider(wrong, "tiny"), tokenizer).attribute(words(tokenizer), TARGET)
    server.always = status(404, "no model `large`")
    server.names = [f"m{i}" for i in range(7)]
    with pytest.raises(ApiError, match="It has the models 'm0', 'm1', 'm2', 'm3', 'm4', …"):
        remote(provider_of(server, is_new=True), tokenizer).attribute(words(tokenizer), TARGET)


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbled_responses_are_retried_a_few_times(model, tokenizer, server, quick, kind):
    provider = provider_of(server, max_concurrency=1)
    server.failures.append(answers_with(GARBAGE[kind]))
    assert_true(remote(provider, tokenizer).attribute(words(tokenizer), TARGET), model, tokenizer)
    server.always, n_before = answers_with(GARBAGE[kind]), len(server.bodies)
    with pytest.raises(ApiError, match=r"with JSON|without `choices`|upstream timed out"):
        remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert len(server.bodies) == n_before + 3


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (429, "You exceeded your current quota, please check your plan"),
        (500, "1 validation error for Request: prompt must be a string"),
    ],
)
def test_permanent_errors_are_not_retried(tokenizer, server, code, message):
    provider = provider_of(server, max_concurrency=1)
    server.always = status(code, message)
    with pytest.raises(ApiError, match=f"{code}: {message[:20]}"):
        remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert len(server.bodies) <= 3  # what else would work is asked, by two questions


def test_rate_limit_headers_are_respected(tokenizer, server):
    def limited(handler, body):
        content = handler.owner.answer(body)
        handler.reply(
            200,
            content,
            {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "300ms"},
        )

    provider = provider_of(server, max_concurrency=1)
    server.failures.append(limited)
    remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert server.times[1] - server.times[0] >= 0.3


def test_environment_key_is_sent_to_its_own_host_only(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert transport.api_key(None, "https://api.openai.com/v1") == KEY
    assert transport.api_key(None, "http://localhost:8000/v1") == KEY
    for other in ("https://evil.example/v1", "https://api.openai.com.evil.example/v1"):
        assert transport.api_key(None, other) is None
        assert transport.api_key("given", other) == "given"
    monkeypatch.setenv("OPENAI_BASE_URL", "https://gateway.example/v1")
    assert transport.api_key(None, "https://gateway.example/v1") == KEY


def test_timeouts_are_retried(model, tokenizer, server, quick):
    server.failures.append(silent(4))
    provider = provider_of(server, timeout=0.3, max_concurrency=1)
    started = time.monotonic()
    found = remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert_true(found, model, tokenizer)
    assert 0.3 < time.monotonic() - started < 4
    server.always = silent(1.0)
    provider = provider_of(server, timeout=0.1, max_retries=1)
    with pytest.raises(ConnectionError, match=r"no whole answer within 0.1 seconds \(`timeout`\)"):
        remote(provider, tokenizer).attribute(words(tokenizer), TARGET)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_respected(tokenizer, server, form):
    # A date has whole seconds.
    after = "0.6" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    server.failures.append(status(429, Retry_After=after))
    provider = provider_of(server, max_concurrency=1)
    remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    waited = server.times[1] - server.times[0]
    assert waited >= (0.6 if form == "seconds" else 0.9)
    # No other request waits.
    assert max(b - a for a, b in zip(server.times[1:], server.times[2:], strict=False)) < waited
    server.always = status(429, "quota of today is used up", Retry_After="86400")
    with pytest.raises(ApiError, match=r"429: quota of today .*asked to wait 86400 seconds"):
        remote(provider, tokenizer).attribute(words(tokenizer), TARGET)


def test_retry_after_pauses_all_threads(tokenizer, server):
    server.delay = 0.02
    server.failures.extend([None, None, status(429, Retry_After="0.7")])
    provider = provider_of(server, max_concurrency=4)
    inp = TextSegmentInput(
        "Dave lives. Ann is in TX. The quick fox jumps", tokenizer, baselines="delete"
    )
    remote(provider, tokenizer).attribute(inp, TARGET)
    pauses = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    longest = max(range(len(pauses)), key=pauses.__getitem__)
    assert pauses[longest] > 0.5
    assert longest <= 2 + 4  # what was under way
    assert sorted(pauses)[-2] < pauses[longest] / 2


def test_backoff_grows(tokenizer, server, quick):
    server.always = status(500, "out of memory")
    provider = provider_of(server, max_retries=4, max_concurrency=1)
    with pytest.raises(ApiError, match=r"500: out of memory \(5 tries\)"):
        remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    waits = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(waits) == 4
    for n, wait in enumerate(waits):
        assert 0.025 * 2**n <= wait < 0.05 * 2**n + 0.3


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (400, "This model's maximum context length is 256 tokens."),
        (401, "Incorrect API key provided: " + KEY),
        (404, "The model `tiny` does not exist."),
        (413, "too large"),
    ],
)
def test_refused_requests_fail_at_once(tokenizer, server, code, message):
    server.always = status(code, message)
    provider = provider_of(server, api_key=KEY, logprobs="echo", max_concurrency=1)
    with pytest.raises(ApiError) as raised:
        remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert raised.value.status == code
    assert message.replace(KEY, "***") in str(raised.value)
    assert len(server.bodies) == 1
    assert server.headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in "".join(traceback.format_exception(raised.value))
    by_auto = provider_of(server, api_key=KEY)
    with pytest.raises(ApiError, match=str(code)):
        remote(by_auto, tokenizer).attribute(words(tokenizer), TARGET)


@pytest.mark.parametrize("code", [400, 404])
def test_server_refusing_everything_is_given_up_early(tokenizer, server, code):
    """What else would work is asked for once at each endpoint, where the refusal leaves it open."""
    server.always = status(code, "not today")
    provider = provider_of(server, logprobs="echo", max_concurrency=1)
    with pytest.raises(ApiError, match=f"{code}: not today") as raised:
        remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert "would work" not in str(raised.value)
    assert len(server.bodies) <= 1 + 2


def test_error_names_the_refused_row(tokenizer, server):
    def longest(handler, body):
        prompts = [body["prompt"]] if isinstance(body["prompt"][0], int) else body["prompt"]
        if max(map(len, prompts)) > 16:
            return status(400, "prompt too long")(handler, body)
        return lambda answer: answer

    server.always = longest
    provider = provider_of(server, prompts_per_request=8, logprobs="prompt_logprobs")
    with pytest.raises(ApiError, match=r"row 0 \(after '<s>Dave lives. Ann .*\): .*too long"):
        remote(provider, tokenizer).attribute(words(tokenizer), TARGET)


def test_reordered_choices(model, tokenizer, server):
    server.always = changed(lambda answer: answer | {"choices": answer["choices"][::-1]})
    provider = provider_of(server, prompts_per_request=4, max_concurrency=2)
    found = remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert_true(found, model, tokenizer)
    alone = [body for body in server.bodies if isinstance(body["prompt"][0], int)]
    assert len(alone) <= 2  # what the whole answer takes besides


def test_provider_errors_name_the_row(tokenizer):
    class Broken:
        def get_logprobs(self, input_prompt, target_str, tokenizer):
            raise KeyError("API response missing 'prompt_logprobs' data")

    with pytest.raises(KeyError) as raised:
        remote(Broken(), tokenizer).attribute(words(tokenizer), TARGET)
    assert raised.value.__notes__[0].startswith("This was asked at row 0 (after '<s>Dave lives.")


def test_servers_that_take_one_prompt_per_request(model, tokenizer, server):
    def one(handler, body):
        if not isinstance(body["prompt"][0], int):
            return status(400, "a list of lists is not supported")(handler, body)
        return lambda answer: answer

    server.always = one
    provider = provider_of(server, prompts_per_request=4, max_concurrency=1)
    found = remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert_true(found, model, tokenizer)
    assert len(server.prompts) == found.n_evaluations
    refused = [body for body in server.bodies if not isinstance(body["prompt"][0], int)]
    assert len(refused) <= 2  # by either way of asking, once


def test_api_key_is_never_shown(tokenizer, server, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    provider = provider_of(server, headers={"X-Other": "another-secret"})
    run = remote(provider, tokenizer)
    found = run.attribute(words(tokenizer), TARGET, checkpoint=tmp_path / "run.safetensors")
    assert server.headers["Authorization"] == f"Bearer {KEY}"
    assert server.headers["X-Other"] == "another-secret"
    found.save(tmp_path / "result.safetensors")
    found.to_html(tmp_path / "page.html")
    found.to_json(tmp_path / "result.json")
    shown = [repr(provider), str(vars(provider)), repr(vars(provider._http)), repr(run.identity())]
    shown += [repr(found.provenance), str(found)]
    shown += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert len(list(tmp_path.iterdir())) == 4
    for text in shown:
        assert KEY not in text
        assert "another-secret" not in text
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(provider)


def test_connection_refused_fails_at_once(tokenizer):
    provider = CompletionsProvider("http://127.0.0.1:9/v1", "tiny")
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9/v1 cannot be reached"):
        remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert time.monotonic() - started < 2
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, shakes no hands
        provider = CompletionsProvider(
            f"https://127.0.0.1:{deaf.getsockname()[1]}/v1", "tiny", timeout=0.3
        )
        with pytest.raises(ConnectionError, match=r"no connection within 0\.3 seconds"):
            remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert time.monotonic() - started < 4


def without(name):
    def strip(answer):
        for choice in answer["choices"]:
            choice.pop(name, None)
        return answer

    return strip


def fewer_choices(answer):
    return answer | {"choices": answer["choices"][:-1]}


def fewer_tokens(answer):
    for choice in answer["choices"]:
        choice["prompt_logprobs"].pop()
    return answer


def with_value(value):
    def put(answer):
        for choice in answer["choices"]:
            last = choice["prompt_logprobs"][-1]
            if value == "likeliest":  # tells another token than that of the prompt
                choice["prompt_logprobs"][-1] = {"7": next(iter(last.values()))}
            elif value is None:
                choice["prompt_logprobs"][-1] = None
            else:
                next(iter(last.values()))["logprob"] = value
        return answer

    return put


WRONG = {
    "no choices": (lambda answer: {"ok": True}, ApiError, "without `choices`"),
    "wrong count": (fewer_choices, ValueError, "expected one each. Say `prompts_per_request=1`"),
    "wrong tokens": (fewer_tokens, ValueError, "nothing says which is which"),
    "null": (
        with_value(None),
        ValueError,
        r"row \d+ .* gave no log-probability of '\.' .*missing=",
    ),
    "null within": (
        with_value("null"),
        ApiError,
        "gave 'null' as a log-probability: expected a number",
    ),
    "probable": (
        with_value(5.0),
        ApiError,
        r"gave 5\.0 as a log-probability: expected a number of nats",
    ),
    "true": (with_value(True), ApiError, "gave True as a log-probability"),
    "plus infinity": (with_value(float("inf")), ApiError, "gave inf as a log-probability"),
    "text": (with_value("-1.5"), ApiError, r"gave '-1\.5' as a log-probability"),
    "huge": (with_value(10**400), ApiError, "gave 1000000.* as a log-probability"),
    "list": (with_value([-1.5]), ApiError, r"gave \[-1\.5\] as a log-probability"),
    "top only": (with_value("likeliest"), ValueError, r"row \d+ .* gave no log-probability"),
    "ruled out": (with_value(-9999.0), ValueError, r"row \d+ .* gives -9999 to '\.'"),
    "infinite": (with_value(-float("inf")), ValueError, r"gives -inf"),
    "not a number": (with_value(float("nan")), ApiError, "gave nan as a log-probability"),
    "neither way": (
        lambda answer: without("logprobs")(without("prompt_logprobs")(answer)),
        ApiError,
        "no log-probabilities of prompts are available",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_invalid_responses_are_refused(tokenizer, server, kind):
    function, error, message = WRONG[kind]
    server.always = changed(function)
    provider = provider_of(
        server, prompts_per_request=2, max_concurrency=2, is_new=kind == "neither way"
    )
    with pytest.raises(error, match=message):
        remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert no_threads_left()


def test_non_json_response_is_refused(tokenizer, server):
    server.always = lambda handler, body: handler.reply(200, b"<html>It works!</html>")
    with pytest.raises(ApiError, match="with JSON: '<html>It works"):
        remote(provider_of(server), tokenizer).attribute(words(tokenizer), TARGET)


def test_missing_logprob_option(tokenizer, server, tmp_path):
    path = tmp_path / "run.safetensors"
    inp = words(tokenizer)
    server.failures.extend([None] * 3 + [changed(with_value(None))])
    provider = provider_of(server, max_concurrency=1)
    with pytest.raises(ValueError, match="row 3"):
        remote(provider, tokenizer).attribute(inp, TARGET, checkpoint=path)
    # What had come was kept, and is not asked for again (but one, to see that it is the same).
    asked = [tuple(prompt) for prompt in server.prompts]
    server.prompts.clear()
    server.failures.append(None)
    server.failures.append(changed(with_value(None)))
    with pytest.warns(UserWarning, match="% of the values are bounds, and within these"):
        found = remote(provider, tokenizer, missing=-20.0).attribute(inp, TARGET, checkpoint=path)
    assert len(server.prompts) == found.n_evaluations - 3 + 1
    assert len({tuple(p) for p in server.prompts} & set(asked[:3])) == 1
    assert found.provenance["n_missing"] == 1
    assert (found.values[:, -1] == -20.0).sum() == 1
    # It is kept as missing: what stands for it may change, or nothing be allowed to.
    server.prompts.clear()
    with pytest.warns(UserWarning, match="% of the values are bounds, and within these"):
        other = remote(provider, tokenizer, missing=-5.0).attribute(inp, TARGET, checkpoint=path)
    # Of a value from a checkpoint no more is known than that it is a log-probability.
    assert int((other.value_interval[1] == 0).sum()) == 1
    assert (other.values[:, -1] == -5.0).sum() == 1
    with pytest.raises(ValueError, match="no log-probability"):
        remote(provider, tokenizer).attribute(inp, TARGET, checkpoint=path)
    assert len(server.prompts) == 2


@pytest.mark.parametrize("output_unit", [None, "word"])
def test_interrupted_run_resumes(model, tokenizer, server, quick, tmp_path, output_unit):
    path = tmp_path / "run.safetensors"
    provider = provider_of(server, max_retries=1, max_concurrency=3)
    arguments = {"n_samples": 40, "output_unit": output_unit}
    # Of random weights, only what is given has words.
    arguments |= {"gen_args": {"max_new_tokens": 4}} if output_unit is None else {"target": TARGET}
    whole = remote(provider, tokenizer, KernelShap).attribute(words(tokenizer), **arguments)
    n_all = len(server.prompts)
    server.prompts.clear()
    server.failures.extend([None] * (n_all // 2))
    server.always = status(500, "broken")
    with pytest.raises(ApiError, match="broken"):
        remote(provider, tokenizer, KernelShap).attribute(
            words(tokenizer), **arguments, checkpoint=path
        )
    assert no_threads_left()
    n_before = len(server.prompts)
    assert n_before == n_all // 2
    server.always = None
    found = remote(provider, tokenizer, KernelShap).attribute(
        words(tokenizer), **arguments, checkpoint=path
    )
    assert len(server.prompts) == n_all + 1  # the target is kept, one row is looked at again
    assert torch.equal(found.token_attr, whole.token_attr)
    assert torch.equal(found.target, whole.target)
    with pytest.raises(ValueError, match="belongs to another run"):
        remote(provider_of(server, model_name="other"), tokenizer, KernelShap).attribute(
            words(tokenizer), **arguments, checkpoint=path
        )


def test_checkpoint_of_other_weights_is_detected(tokenizer, server, tmp_path):
    path = tmp_path / "run.safetensors"
    remote(provider_of(server), tokenizer).attribute(words(tokenizer), TARGET, checkpoint=path)
    with Server(tiny.llama(len(tokenizer), seed=9).double(), tokenizer) as other:
        again = remote(provider_of(other), tokenizer)
        with pytest.raises(ValueError, match=r"holds values \(row .* of another model"):
            again.attribute(words(tokenizer), TARGET, checkpoint=path)
    # Elsewhere the same model may be asked: an address is nothing that values depend on.
    with Server(server.model, tokenizer) as moved:
        remote(provider_of(moved), tokenizer).attribute(words(tokenizer), TARGET, checkpoint=path)
        assert len(moved.prompts) == 1


@pytest.mark.parametrize("n_threads", [1, 5])
def test_slow_servers_are_queried_concurrently(tokenizer, server, n_threads):
    server.delay = 0.05
    provider = provider_of(server, max_concurrency=n_threads)
    found = remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert server.most_parallel == n_threads
    assert found.n_evaluations == len(server.prompts)
    assert no_threads_left()


def test_captum_providers_are_queried_concurrently_on_request(tokenizer, server):
    server.delay = 0.05

    class One:
        """Of captum's kind: it says nothing of threads."""

        get_logprobs = staticmethod(provider_of(server).get_logprobs)

    remote(One(), tokenizer).attribute(words(tokenizer), TARGET)
    assert server.most_parallel == 1
    remote(One(), tokenizer, max_concurrency=3).attribute(words(tokenizer), TARGET)
    assert server.most_parallel == 3


@pytest.fixture
def hears_interrupts():
    """In a shell's background Ctrl-C is ignored, by tests as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_interrupts")
@pytest.mark.parametrize("state", ["silent", "busy"])
@pytest.mark.parametrize("n_threads", [1, 4])
def test_ctrl_c_ends_at_once_and_keeps_answers(tokenizer, server, tmp_path, n_threads, state):
    path = tmp_path / "run.safetensors"
    inp = TextSegmentInput(
        "Dave lives. Ann is in TX. The quick fox jumps", tokenizer, baselines="delete"
    )
    server.failures.extend([None] * 5)
    server.always = silent(20) if state == "silent" else status(429, Retry_After="20")
    provider = provider_of(server, max_concurrency=n_threads, timeout=60)

    # Of a busy server all threads keep away once one of them was told so.
    n_bodies = 5 + (n_threads if state == "silent" else 1)

    def interrupt():
        until = time.monotonic() + 10
        while len(server.bodies) < n_bodies and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        remote(provider, tokenizer).attribute(inp, TARGET, checkpoint=path)
    ended = time.monotonic()
    assert ended - server.times[-1] < 5
    assert no_threads_left()
    # The provider is as good as new, and what had come is not asked for again.
    server.always = None
    server.prompts.clear()
    found = remote(provider, tokenizer).attribute(inp, TARGET, checkpoint=path)
    assert len(server.prompts) == found.n_evaluations - 5 + 1


def test_interpreter_exits_with_waiting_threads(tokenizer, server, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    server.always = silent(30)
    program = f"""
import threading, os, signal, time
from transformers import AutoTokenizer
from captum.attr import FeatureAblation, RemoteLLMAttribution
from captum_llm_ext import CompletionsProvider, RemoteGenerationAttribution, TextSegmentInput
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
provider = CompletionsProvider({server.url!r}, "tiny", prompts_per_request=1)
provider.interrupt = None  # nothing wakes its threads
method = FeatureAblation(RemoteLLMAttribution.placeholder_model)
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
RemoteGenerationAttribution(method, tokenizer, provider).attribute(
    TextSegmentInput("Dave lives. Ann is in TX.", tokenizer), " golf")
"""
    root = str(Path(__file__).parent.parent)
    started = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert run.stderr.strip().endswith("KeyboardInterrupt")
    assert time.monotonic() - started < 25


def test_proxy(model, tokenizer, server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    provider = CompletionsProvider("http://models.example/v1", "tiny")
    found = remote(provider, tokenizer).attribute(words(tokenizer), TARGET)
    assert_true(found, model, tokenizer)
    assert server.headers["Host"] == "models.example"


def test_redirects(tokenizer, server):
    server.always = lambda handler, body: handler.reply(
        307, {}, {"Location": "https://elsewhere.example/v1"}
    )
    with pytest.raises(ApiError, match=r"has moved to https://elsewhere\.example/v1"):
        remote(provider_of(server), tokenizer).attribute(words(tokenizer), TARGET)


def test_progress_counts_requests(tokenizer, server, capsys):
    remote(provider_of(server), tokenizer).attribute(
        words(tokenizer), TARGET, show_progress=True, output_unit="word"
    )
    n, shown = len(server.prompts), capsys.readouterr().err
    assert shown.splitlines()[-1].startswith(f"requests: 100 % ({n} of {n}, ")


def test_tol_sends_no_prompt_twice(tokenizer, server):
    found = remote(provider_of(server), tokenizer, KernelShap).attribute(
        words(tokenizer), TARGET, n_samples=16, tol=0.02, max_evaluations=100
    )
    asked = [json.dumps(prompt) for prompt in server.prompts]
    assert len(asked) == len(set(asked)) == found.n_evaluations
