"""Malformed, oversized, late, hostile responses, URLs and keys are refused with a clear error."""

import copy
import json
import math
import random
import socket
import threading
import time
import traceback

import pytest
import tiny
import torch
from captum.attr import FeatureAblation, RemoteLLMAttribution
from remote_server import Server, changed

from captum_llm_ext import (
    ApiError,
    CompletionsProvider,
    RemoteGenerationAttribution,
    TextSegmentInput,
)

KEY = "sk-never-to-be-seen"
OK = b"HTTP/1.1 200 OK\r\n"
# What a terminal obeys: colours, titles, other directions of writing, lines of their own.
OBEYED = "\x1b[31mred\x1b]0;title\x07 \u202eevil\u2066 \r\nnext\x00\x9b2J\u2028line"
IDS = [1, 60, 50, 70, 33, 90, 12]


@pytest.fixture(scope="module")
def server(tokenizer):
    with Server(tiny.llama(len(tokenizer)).double(), tokenizer) as server:
        yield server


class Raw:
    """A server that says whatever a function writes to the connection."""

    def __init__(self, speak):
        self._speak, self.requests = speak, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.settimeout(10)
            with connection:
                try:
                    self.requests.append(_request(connection))
                    self._speak(connection, self._closing)
                except OSError:
                    pass  # the client has gone

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(20)


def _request(connection):
    """All of a request: what is not read when a connection is closed resets it."""
    raw = connection.recv(65536)
    head, _, body = raw.partition(b"\r\n\r\n")
    _, _, length = head.partition(b"Content-Length: ")
    while len(body) < int(length.split(b"\r\n")[0] or 0):
        body += connection.recv(65536)
    return head + body


def said(*parts):
    def speak(connection, closing):
        for part in parts:
            connection.sendall(part)

    return speak


def for_ever(first, part, pause=0.0):
    def speak(connection, closing):
        connection.sendall(first)
        while not closing.wait(pause):
            connection.sendall(part)

    return speak


def unlike(ids):
    """Log-probabilities that differ from token to token, as a model's do."""
    return [-1.0 - (i % 97) / 16 for i in ids]


def asked(url, **arguments):
    settings = {"api_key": KEY, "timeout": 0.4, "max_retries": 0, "logprobs": "prompt_logprobs"}
    provider = CompletionsProvider(url, "tiny", **settings | arguments)
    return provider.get_token_logprobs([IDS])


ENDLESS = {
    "body that trickles": for_ever(OK + b"Content-Length: 9999\r\n\r\n", b" ", 0.05),
    "body without a length": for_ever(OK + b"\r\n", b" ", 0.05),
    "chunks that trickle": for_ever(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.05
    ),
    "a chunk's size": for_ever(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0", 0.05),
    "status that trickles": for_ever(b"HTTP/1.1 200 O", b"K", 0.05),
    "headers that trickle": for_ever(OK, b"A: b\r\n", 0.05),
    "continues": for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
    "nothing": for_ever(b"", b"", 0.05),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_response_deadline(kind):
    with Raw(ENDLESS[kind]) as server:
        with pytest.raises(ConnectionError, match=r"no whole answer within 0\.4 seconds"):
            asked(server.url)
        assert len(server.requests) == 1


def test_tls_handshake_deadline():
    # The beginning of a record of TLS, a byte at a time.
    with (
        Raw(for_ever(b"\x16\x03\x03\x40\x00\x02\x00\x3f", b"\x00", 0.05)) as server,
        pytest.raises(ConnectionError, match=r"no connection within 0\.4 seconds"),
    ):
        asked(server.url.replace("http:", "https:"))


SWOLLEN = {
    "a body without a length": for_ever(OK + b"\r\n", b" " * 2**20),
    "chunks": for_ever(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + b" " * 2**20 + b"\r\n"
    ),
    "one chunk": said(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"ffffffffffffff\r\n{"),
    "a length": said(OK + b"Content-Length: 1000000000000000\r\n\r\n{"),
    "continues": for_ever(b"", (b"HTTP/1.1 100 Continue\r\n" + b"A: b\r\n" * 20 + b"\r\n") * 5000),
    "trailers": for_ever(
        OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", (b"A: " + b"b" * 60000 + b"\r\n") * 20
    ),
}


@pytest.mark.parametrize("kind", SWOLLEN)
def test_response_size_limit(kind):
    with Raw(SWOLLEN[kind]) as server:
        with pytest.raises((ApiError, ConnectionError)) as raised:
            asked(server.url, timeout=20.0)
        if kind != "one chunk":
            assert "answered with more than 16 MiB, which is no valid answer" in str(raised.value)
        assert len(server.requests) == 1


def test_compressed_responses_are_refused(server):
    import gzip

    packed = gzip.compress(b" " * 2**20)
    head = OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    with Raw(said(head, packed)) as raw:
        with pytest.raises(ApiError, match="answered in 'gzip', which was not requested"):
            asked(raw.url)
        assert b"Accept-Encoding: identity" in raw.requests[0]


def test_long_responses_are_accepted():
    """A tenth of a million tokens with the twenty likeliest each, as vLLM writes them."""
    from captum_llm_ext.remote import completions, transport

    n, top = 100_000, 20
    entry = len(json.dumps({"99999": {"logprob": -12.3456789, "rank": 99999, "decoded_token": 9}}))
    room = transport._MOST_BYTES + n * (2 + top) * completions._ENTRY_BYTES
    assert room > 2 * n * (top + 1) * entry


DEEP = b"[" * 100_000
NO_JSON = {
    "deep": DEEP,
    "deep within": b'{"choices": ' + DEEP + b"]" * 100_000 + b"}",
    "cut": b'{"choices": [',
    "no text": b"\xff\xfe\x00",
    "many digits": b'{"choices": ' + b"9" * 5000 + b"}",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", NO_JSON)
@pytest.mark.parametrize("code", [200, 400, 500])
def test_non_json_response_is_an_api_error(kind, code):
    body = NO_JSON[kind]
    head = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (code, len(body))
    with Raw(said(head, body)) as server, pytest.raises(ApiError) as raised:
        asked(server.url)
    assert raised.value.status == (None if code == 200 else code)
    assert len(str(raised.value)) < 1000


def _mutated(value, random_):
    """A JSON value, changed at one place."""
    odd = [
        None,
        True,
        False,
        0,
        -1,
        5.0,
        1e308,
        math.nan,
        math.inf,
        10**30,
        "",
        "x",
        "-1.0",
        [],
        {},
    ]
    odd += [-(10**400), [None], {"logprob": 3.0}, {"x": []}, "\ud800", OBEYED]
    places = []

    def walk(parent, key):
        places.append((parent, key))
        here = parent[key]
        if isinstance(here, dict | list):
            for inner in list(here) if isinstance(here, dict) else range(len(here)):
                walk(here, inner)

    root = [copy.deepcopy(value)]
    walk(root, 0)
    parent, key = random_.choice(places)
    how = random_.randrange(5)
    if how < 2 and parent is not root:
        del parent[key]
    elif how == 2 and isinstance(parent, list) and parent is not root:
        parent.insert(key, copy.deepcopy(random_.choice([parent[key], *odd])))
    elif how == 3 and isinstance(parent, dict):
        parent[random_.choice(["٣", "-3", "1e3", "9" * 40, "x", "1_0", " 7"])] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(random_.choice(odd))
    return root[0]


def _bytes_changed(raw, random_):
    raw = bytearray(raw)
    for _ in range(random_.randint(1, 3)):
        at = random_.randrange(len(raw))
        how = random_.randrange(3)
        if how == 0:
            raw[at] = random_.choice(b'{}[]",:\\\x00\xff\x1bnt')
        elif how == 1:
            del raw[at : at + random_.randint(1, 40)]
        else:
            raw[at:at] = raw[at : at + random_.randint(1, 40)]
    return bytes(raw)


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_damaged_responses(server, tokenizer, monkeypatch, way):
    """Each gives the right numbers, or numbers that are untold, or an error of the API."""
    provider = CompletionsProvider(server.url, "tiny", logprobs=way)
    prompts = [IDS, IDS[:4]]
    truth = provider.get_token_logprobs(prompts)
    body = {"prompt": prompts, "max_tokens": 1, "temperature": 0.0}
    body |= {"echo": True} if way == "echo" else {"prompt_logprobs": 0}
    good = server.answer(body)
    parsed = provider._http._parsed
    n_right = n_wrong = 0
    told = []
    random_ = random.Random(0)
    for _ in range(1000):
        mutant = _mutated(good, random_)
        raw = json.dumps(mutant).encode()
        monkeypatch.setattr(provider._http, "post", lambda *_, raw=raw, **__: parsed({}, raw))
        try:
            found = provider.get_token_logprobs(prompts)
        except ApiError as error:
            n_wrong += 1
            told.append(str(error))
            continue
        n_right += 1
        for own, true, ids in zip(found, truth, prompts, strict=True):
            assert len(own) == len(ids)
            for entry, known, token in zip(own, true, ids, strict=True):
                value = (entry or {}).get(token)
                assert value is None or value in ((known or {}).get(token), 0.0, -1.0, -math.inf)
    assert all(text.isprintable() and len(text) < 1500 for text in told)
    assert n_wrong > 300
    assert n_right > 100


def test_random_byte_responses(server, monkeypatch):
    provider = CompletionsProvider(server.url, "tiny", logprobs="prompt_logprobs")
    body = {"prompt": IDS, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    good = json.dumps(server.answer(body)).encode()
    parsed = provider._http._parsed
    random_ = random.Random(1)
    for _ in range(1000):
        raw = _bytes_changed(good, random_)
        monkeypatch.setattr(provider._http, "post", lambda *_, raw=raw, **__: parsed({}, raw))
        try:
            (found,) = provider.get_token_logprobs([IDS])
        except ApiError:
            continue
        assert len(found) == len(IDS)
        assert all(v <= 1e-4 for entry in found if entry for v in entry.values())


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"text": 3},
        {"text": None},
        {"text": ["a"]},
        {"token_ids": ["a"], "text": ""},
        {"token_ids": [True], "text": ""},
        {"token_ids": [2**70], "text": ""},
        {"token_ids": [-1], "text": ""},
        {"logprobs": {"tokens": ["token_id:x"]}, "text": ""},
        {"logprobs": {"tokens": ["token_id:" + "9" * 6000]}, "text": ""},
        {"logprobs": [], "text": 3},
    ],
)
def test_generated_text_or_ids(server, tokenizer, choice):
    server.failures.append(changed(lambda answer: answer | {"choices": [choice]}))
    provider = CompletionsProvider(server.url, "tiny")
    with pytest.raises(ApiError, match="expected"):
        provider.generate_tokens([1, 2])


@pytest.mark.parametrize(
    "models",
    [
        {"data": {"a": 1}},
        {"data": [3]},
        {"data": [{"id": None}]},
        {"data": [{"id": ["a"]}]},
        {"data": [{"id": OBEYED}]},
        {"data": []},
        [],
        3,
    ],
)
def test_model_names_are_validated(models):
    body = json.dumps(models).encode()
    with (
        Raw(said(_with_length(OK, body))) as server,
        pytest.raises(ApiError, match="names no models: give `model_name`"),
    ):
        CompletionsProvider(server.url)


def _with_length(head, body):
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


SPOKEN = {
    "error": lambda text: _with_length(b"HTTP/1.1 400 X\r\n", text),
    "error as JSON": lambda text: _with_length(
        b"HTTP/1.1 503 X\r\n", json.dumps({"error": {"message": text.decode()}}).encode()
    ),
    "no JSON": lambda text: _with_length(OK, text),
    "status": lambda text: b"HTTP/1.1 %s\r\n\r\n" % text,
    "protocol": lambda text: b"%s\r\n\r\n" % text,
    "place": lambda text: b"HTTP/1.1 302 X\r\nLocation: http://else.org/%s\r\n\r\n" % text,
    "packing": lambda text: OK + b"Content-Encoding: %s\r\n\r\n" % text,
}


@pytest.mark.parametrize("kind", SPOKEN)
def test_server_text_is_escaped_for_terminals(kind):
    text = f"{OBEYED} Incorrect key: {KEY}".encode()
    if kind in ("status", "protocol", "place", "packing"):
        text = text.replace(b"\r\n", b"")
    with (
        Raw(said(SPOKEN[kind](text))) as server,
        pytest.raises((ApiError, ConnectionError)) as raised,
    ):
        asked(server.url, timeout=5.0)
    shown = "".join(traceback.format_exception_only(raised.value)).removesuffix("\n")
    assert shown.isprintable(), ascii(shown)
    assert KEY not in shown


def test_api_key_is_not_sent_to_other_hosts(server):
    """Redirects are told, not followed."""
    with Raw(said(OK + b"Content-Length: 2\r\n\r\n{}")) as other:
        head = f"HTTP/1.1 307 X\r\nLocation: http://u:pw@127.0.0.1:{other.port}/v1?key=abc\r\n"
        with Raw(said(head.encode() + b"Content-Length: 0\r\n\r\n")) as first:
            with pytest.raises(ApiError) as raised:
                asked(first.url)
            assert KEY.encode() in first.requests[0]
        assert f"has moved to http://127.0.0.1:{other.port}/v1: give that URL" in str(raised.value)
        assert not other.requests
        assert "pw" not in str(raised.value)
        assert "abc" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "me:hunter2@host/v1",
        "me:hunter2@host:8000",
        "//me:hunter2@host/v1",
        "http://me:hunter2@host/v1",
        "http://me:hun/hunter2@host/v1",
        "http://me:hun#hunter2@host/v1",
        "http://me:hun?hunter2@host/v1",
        "http://hunter2@host/v1",
        "http://me:hunter2@[::1/v1",
        "http://host/v1?key=hunter2",
        "http://host/v1#key=hunter2",
        "host/v1?key=hunter2",
        "HTTP:/me:hunter2@host",
        "ftp://me:hunter2@host/v1",
        "http://good.org\\@hunter2.org/v1",
        "http://me:hunter2@host:port/v1",
        " http://me:hunter2@host\n/v1",
    ],
)
def test_url_passwords_are_hidden(url, tokenizer):
    with pytest.raises(ValueError, match="`api_url`") as raised:
        CompletionsProvider(url, "tiny", api_key=KEY)
    shown = "".join(traceback.format_exception(raised.value))
    assert "hunter2" not in shown.replace(f"CompletionsProvider({url!r}", "")

    class Own:
        """A provider of the user's own keeps its URL as it is."""

        api_url = url

        def get_logprobs(self, input_prompt, target_str, tokenizer):
            return unlike(tokenizer.encode(target_str, add_special_tokens=False))

    ours = RemoteGenerationAttribution(
        FeatureAblation(RemoteLLMAttribution.placeholder_model), tokenizer, Own()
    )
    found = ours.attribute(TextSegmentInput("Dave lives", tokenizer, baselines="delete"), " golf")
    assert "hunter2" not in repr(found.provenance).replace("http://hunter2.org", "")


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "",
        None,
        3,
        "http://",
        "http:///v1",
        "http://host:port/v1",
        "http://host:99999/v1",
        "http://[::1/v1",
        "http://host/v1\r\nX-Other: 1",
        "http://host /v1",
        "http://host/\x1b[31m",
        "http://höst/v1",
        "file:///etc/passwd",
    ],
)
def test_invalid_urls_are_refused(url):
    with pytest.raises(ValueError, match="give a URL such as http://localhost:8000/v1") as raised:
        CompletionsProvider(url, "tiny")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("value", [5.0, True, float("nan"), float("inf"), "-1.0", [-1.0], 10**400])
@pytest.mark.parametrize("by", ["ids", "text"])
def test_custom_provider_values_are_validated(tokenizer, value, by):
    class ById:
        def get_token_logprobs(self, prompts):
            return [[None, *({i: value} for i in ids[1:])] for ids in prompts]

    class ByText:
        def get_logprobs(self, input_prompt, target_str, tokenizer):
            return [value] * len(tokenizer.encode(target_str, add_special_tokens=False))

    ours = RemoteGenerationAttribution(
        FeatureAblation(RemoteLLMAttribution.placeholder_model),
        tokenizer,
        ById() if by == "ids" else ByText(),
    )
    with pytest.raises(
        ValueError, match=r"row 0 .* as a log-probability: expected a number of nats"
    ):
        ours.attribute(TextSegmentInput("Dave lives", tokenizer, baselines="delete"), " golf")


def test_numpy_and_torch_numbers_are_accepted(tokenizer):
    class Own:
        def get_logprobs(self, input_prompt, target_str, tokenizer):
            return torch.tensor(unlike(tokenizer.encode(target_str, add_special_tokens=False)))

    ours = RemoteGenerationAttribution(
        FeatureAblation(RemoteLLMAttribution.placeholder_model), tokenizer, Own()
    )
    found = ours.attribute(TextSegmentInput("Dave lives", tokenizer, baselines="delete"), " golf")
    told = torch.tensor(unlike(found.target.tolist()))
    assert torch.equal(found.values, told.expand_as(found.values))


def test_unsolicited_response_is_discarded(server):
    """A connection on which more was said than an answer is not asked on."""
    body = json.dumps(
        server.answer({"prompt": IDS, "max_tokens": 1, "prompt_logprobs": 0})
    ).encode()
    wrong = body.replace(b'"logprob": -', b'"logprob": -9')
    answer = OK + b"Content-Length: %d\r\n\r\n%s"

    def speak(connection, closing):
        connection.sendall(answer % (len(body), body))
        closing.wait(0.05)
        connection.sendall(answer % (len(wrong), wrong))
        closing.wait(0.1)

    with Raw(speak) as raw:
        provider = CompletionsProvider(raw.url, "tiny", timeout=5.0, logprobs="prompt_logprobs")
        one = provider.get_token_logprobs([IDS])
        time.sleep(0.1)
        assert provider.get_token_logprobs([IDS]) == one
        assert len(raw.requests) == 2


@pytest.mark.parametrize("proxy", ["http://me:p/hunter2@host:3", "http://me:hunter2@host:port"])
def test_proxy_password_is_hidden(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(ConnectionError, match="names for http has no valid address") as raised:
        asked("http://some.where/v1")
    assert "hunter2" not in "".join(traceback.format_exception(raised.value))
