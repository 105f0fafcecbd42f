"""A real HTTP server with OpenAI's completions endpoint, and a real (tiny) model behind it."""

import json
import socket
import struct
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Server:
    """vLLM as far as it is used here: ids or texts, one or many, `prompt_logprobs` or `echo`.

    Attributes:
        failures: What to do in place of an answer, one for each POST to come: a function of the
            handler and the body, or None for none. A function that returns something has the true
            answer passed through it.
        prompts: All prompts that were answered, as they came.
        bodies: All bodies that came, failed ones too.
        headers: Those of the last request.
        known: Arguments that are understood; others are refused with 400. None: all.
        delay: Seconds before every answer.
    """

    def __init__(self, model, tokenizer, *, known=None, names=("tiny",), tells_ids=True):
        self.model, self.tokenizer, self.known, self.names = model, tokenizer, known, names
        self.tells_ids = tells_ids
        self.failures = deque()
        self.prompts, self.bodies, self.headers, self.times = [], [], {}, []
        self.always = None
        self.delay = 0.0
        self.n_parallel = self.most_parallel = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._model_lock = threading.Lock()
        server = self

        class Handler(_Handler):
            owner = server

        self._http = _Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        # A thread that computes must not outlive the program that ends.
        until = time.monotonic() + 5
        while self.n_parallel and time.monotonic() < until:
            time.sleep(0.01)

    def answer(self, body):
        prompts = body["prompt"]
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
        with self.lock:
            self.prompts += prompts
        with self._model_lock, torch.no_grad():
            choices = [self._choice(i, one, body) for i, one in enumerate(ids)]
        return {"id": "x", "object": "text_completion", "choices": choices, "model": "tiny"}

    def _choice(self, index, ids, body):
        written, told = list(ids), []
        for _ in range(body.get("max_tokens", 16)):
            logits = self.model(input_ids=torch.tensor([written])).logits[0, -1]
            values = logits.log_softmax(-1)
            if body.get("temperature", 1.0) == 0:
                token = int(logits.argmax())
            else:
                generator = torch.Generator().manual_seed(body.get("seed", 0))
                token = int(torch.multinomial(values.exp(), 1, generator=generator))
            written.append(token)
            told.append(float(values[token]))
            if token == self.tokenizer.eos_token_id:
                break
        new = written[len(ids) :]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        choice = {"index": index, "text": text, "finish_reason": "length", "logprobs": None}
        logits = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [None, *(float(logits[i, token]) for i, token in enumerate(ids[1:]))]
        if body.get("return_token_ids") and self.tells_ids:
            choice["token_ids"] = new
        if body.get("echo"):
            choice["text"] = self.tokenizer.decode(written)
            choice["logprobs"] = {
                "tokens": [self.tokenizer.decode([i]) for i in written],
                "token_logprobs": own + told,
            }
        if body.get("prompt_logprobs") is not None:
            found = [None]
            for i, token in enumerate(ids[1:]):
                top = logits[i].topk(body["prompt_logprobs"]).indices.tolist()
                found.append(
                    {
                        str(t): {"logprob": float(logits[i, t]), "rank": 1, "decoded_token": "?"}
                        for t in dict.fromkeys([token, *top])
                    }
                )
            choice["prompt_logprobs"] = found
        return choice


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_):
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        models = [{"id": name, "max_model_len": 256} for name in self.owner.names]
        self.reply(200, {"object": "list", "data": models})

    def do_POST(self):
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            owner.bodies.append(body)
            owner.times.append(time.monotonic())
            owner.headers = dict(self.headers)
            failure = owner.failures.popleft() if owner.failures else owner.always
            owner.n_parallel += 1
            owner.most_parallel = max(owner.most_parallel, owner.n_parallel)
        try:
            time.sleep(owner.delay)
            unknown = set(body) - (owner.known or set(body))
            if unknown:
                said = f"Unrecognized request argument supplied: {sorted(unknown)[0]}"
                self.reply(400, {"error": {"message": said, "type": "invalid_request_error"}})
                return
            changed = failure(self, body) if failure is not None else None
            if failure is None:
                self.reply(200, owner.answer(body))
            elif changed is not None:
                self.reply(200, changed(owner.answer(body)))
        finally:
            with owner.lock:
                owner.n_parallel -= 1

    def reply(self, status, content, headers=()):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


def status(code, message="busy", **headers):
    """An answer of that status."""
    said = {"error": {"message": message}}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, body: handler.reply(code, said, names)


def reset(handler, body):
    """The connection breaks off: a TCP reset."""
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.close_connection = True
    handler.rfile.close()
    handler.wfile.close()
    handler.connection.close()


def silent(seconds):
    """No answer for a while, and then none."""

    def hang(handler, body):
        handler.owner.closing.wait(seconds)
        handler.close_connection = True

    return hang


def changed(function):
    """The true answer, changed."""
    return lambda handler, body: function
