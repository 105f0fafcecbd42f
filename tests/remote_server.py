"""A real HTTP server with OpenAI's completions endpoint, and a real (tiny) model behind it."""

import json
import math
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
        part: What other servers do wrong, played by this one: see `PARTS`.
        goes_on: Whether a chat that ends with the assistant's message is gone on with, unasked.
        refuses: Of a chat's text, whether the model refuses to answer.
        bias: What ``logit_bias`` does: "told" changes what is told as well, "raw" what is written
            alone, "ignored" nothing.
        reports_ids: Whether ``logprob_token_ids`` are told instead of the likeliest, as with vLLM.
        name_told: As which model it answers.
        follows_temperature: Whether what is told of written tokens is of the temperature asked for.
        penalty: Taken off the logits of tokens that were read or written, when it writes; values
            are told without it, as llama.cpp does.
        lists: Where the token that was written stands among the likeliest if it is none of them:
            "beside" them, as with vLLM, "instead" of the last, or "not" at all, as with OpenAI.
        base: What there is; other paths are answered by 404.
    """

    def __init__(self, model, tokenizer, *, known=None, names=("tiny",), tells_ids=True, part=None):
        self.model, self.tokenizer, self.known, self.names = model, tokenizer, known, names
        self.tells_ids = tells_ids
        self.failures = deque()
        self.prompts, self.bodies, self.headers, self.times = [], [], {}, []
        self.always = self._last = None
        self.part = dict(part or {})
        self.follows_temperature = False
        self.goes_on, self.refuses = False, None
        self.bias, self.name_told = "told", "tiny-0"
        self.reports_ids = False
        self.delay = self.penalty = 0.0
        self.lists = "instead"
        self.base = ""
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
        ids = [self.plays("prompt", own) for own in ids]
        with self.lock:
            self.prompts += prompts
        n = body.get("n", 1)
        with self._model_lock, torch.no_grad():
            choices = [
                self._choice(i * n + j, one, body, j) for i, one in enumerate(ids) for j in range(n)
            ]
        n_read = sum(map(len, ids)) - self.plays("uncounted", 0) * len(ids)
        usage = {"prompt_tokens": n_read, "completion_tokens": sum(c.pop("n") for c in choices)}
        answer = {"id": "x", "object": "text_completion", "choices": choices, "model": "tiny"}
        return self.plays("answer", answer | {"usage": usage})

    def chat(self, body):
        """OpenAI's chat completions, without a template: what was said, line by line."""
        said = [
            message["content"] for message in body["messages"] if message["role"] != "assistant"
        ]
        last, begun = body["messages"][-1], ""
        if last["role"] == "assistant" and (self.goes_on or body.get("continue_final_message")):
            begun = last["content"]
        ids = self.plays("prompt", self.tokenizer.encode("\n".join(said) + begun))
        body = self.plays("body", body)
        with self.lock:
            self.prompts.append(body["messages"])
        asked = body | {"logprobs": body.get("top_logprobs")}
        with self._model_lock, torch.no_grad():
            found = [self._choice(j, ids, asked, j) for j in range(body.get("n", 1))]
        usage = {"prompt_tokens": len(ids), "completion_tokens": sum(c.pop("n") for c in found)}
        choices = []
        for choice in found:
            told = choice.pop("logprobs")
            text = choice.pop("text")
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            if self.refuses is not None and self.refuses("\n".join(said)):
                choice["message"] = {"role": "assistant", "content": None, "refusal": "I cannot."}
            if body.get("logprobs") and told:
                rows = zip(
                    told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
                )
                content = [
                    {
                        "token": token,
                        "logprob": value,
                        "top_logprobs": [{"token": k, "logprob": v} for k, v in top.items()],
                    }
                    for token, value, top in rows
                ]
                choice["logprobs"] = {"content": self.plays("content", content)}
            choices.append(choice)
        return self.plays("answer", {"choices": choices, "model": self.name_told, "usage": usage})

    def speak(self, body):
        """Anthropic's messages, text alone."""
        said = [body.get("system", ""), *(message["content"] for message in body["messages"])]
        chat = {
            "messages": [{"role": "user", "content": text} for text in said if text],
            "max_tokens": body["max_tokens"],
            "temperature": body["temperature"],
            "seed": len(self.prompts),
        }
        answer = self.chat(chat)
        text = answer["choices"][0]["message"]["content"]
        usage = answer["usage"]
        return {
            "content": [{"type": "text", "text": text}],
            "model": "tiny-0",
            "stop_reason": "end_turn" if text is not None else "refusal",
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "output_tokens": usage["completion_tokens"],
            },
        }

    def plays(self, what, value):
        """A value as the part of another server that this one plays would have it."""
        changes = self.part.get(what)
        return value if changes is None else changes(value)

    def _logits(self, ids):
        """Shape ``(n_ids, n_vocabulary)``; the last ones are kept, for many answers to a prompt."""
        if self._last is None or self._last[0] != ids:
            self._last = list(ids), self.model(input_ids=torch.tensor([ids])).logits[0]
        return self._last[1]

    def _log_probs(self, logits, body, place):
        """All log-probabilities after logits, as they are told."""
        return self.plays(place, logits.log_softmax(-1))

    def _choice(self, index, ids, body, nth=0):
        written, told, tops = list(ids), [], []
        temperature, top = body.get("temperature"), int(body.get("logprobs") or 0)
        temperature = 1.0 if temperature is None else temperature
        generator = torch.Generator().manual_seed(body.get("seed", 0) + nth)
        for _ in range(body.get("max_tokens", 16)):
            logits = self._logits(written)[-1]
            plain = logits
            for biased, bias in (body.get("logit_bias") or {}).items():
                if self.bias != "ignored":
                    logits = logits.index_add(0, torch.tensor([int(biased)]), logits.new([bias]))
            chosen = logits.clone()
            chosen[list(set(written))] -= self.penalty
            if temperature == 0:
                token = int(chosen.argmax())
            else:
                drawn = (chosen / temperature).softmax(-1)
                token = int(torch.multinomial(drawn, 1, generator=generator))
            logits = plain if self.bias == "raw" else logits
            if self.follows_temperature:
                logits = logits / max(temperature, 1e-4)
            values = self._log_probs(logits, body, "written")
            written.append(token)
            told.append(float(values[token]))
            likeliest = values.topk(max(top, 1)).indices.tolist()
            if token not in likeliest and self.lists != "not":
                likeliest = [token, *likeliest[: -1 if self.lists == "instead" else None]]
            given = body.get("logprob_token_ids")
            if given and self.reports_ids:
                likeliest = [token, *given]
            tops.append({self.name(i, body): float(values[i]) for i in likeliest})
            if token == self.tokenizer.eos_token_id:
                break
        new = written[len(ids) :]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        has_stopped = new[-1:] == [self.tokenizer.eos_token_id]
        choice = {"index": index, "text": text, "logprobs": None, "n": len(new)}
        choice["finish_reason"] = "stop" if has_stopped else "length"
        own = [None]
        if len(ids) > 1:
            logits = self._logits(ids)
            logits = self.plays("places", self._log_probs(logits, body, "scored"))
            own += [float(logits[i, token]) for i, token in enumerate(ids[1:])]
        if body.get("return_token_ids") and self.tells_ids:
            choice["token_ids"] = new
        names = [self.name(i, body) for i in written]
        read = [None]
        for i, token in enumerate(ids[1:]):
            likeliest = dict.fromkeys([*logits[i].topk(top).indices.tolist(), token])
            read.append({self.name(j, body): float(logits[i, j]) for j in likeliest})
        if body.get("echo") or body.get("logprobs") is not None:
            first = 0 if body.get("echo") else len(ids)
            values = (self.plays("list", own) if first == 0 else []) + told
            choice["text"] = self.tokenizer.decode(written[first:])
            choice["logprobs"] = {
                "tokens": names[first:],
                "token_logprobs": values,
                "top_logprobs": ((read if first == 0 else []) + tops) if top else None,
            }
        if body.get("prompt_logprobs") is not None:
            found = [None]
            for i, token in enumerate(ids[1:]):
                top = logits[i].topk(body["prompt_logprobs"]).indices.tolist()
                found.append(
                    {
                        str(t): {
                            "logprob": float(logits[i, t]) if t != token else own[i + 1],
                            "rank": 1,
                            "decoded_token": self.tokenizer.decode([t]),
                        }
                        for t in dict.fromkeys([token, *top])
                    }
                )
            told = self.plays(
                "list",
                [
                    None,
                    *(
                        entry and entry[str(t)]["logprob"]
                        for entry, t in zip(found[1:], ids[1:], strict=True)
                    ),
                ],
            )
            for entry, token, value in zip(found[1:], ids[1:], told[1:], strict=True):
                entry[str(token)]["logprob"] = value
            choice["prompt_logprobs"] = found
        return self.plays("choice", choice)

    def name(self, token, body):
        """What a token is called: by its id where that is asked for, or by its text."""
        if body.get("return_tokens_as_token_ids") and self.tells_ids:
            return f"token_id:{token}"
        return self.tokenizer.decode([token])


def met(provider, server):
    """The provider after its handshake, of which the server keeps no record."""
    stashed = server.failures, server.always, server.delay
    server.failures, server.always, server.delay = deque(), None, 0.0
    provider.get_logprobs("Dave lives in", " Palm Coast", server.tokenizer)
    server.failures, server.always, server.delay = stashed
    for noted in (server.prompts, server.bodies, server.times):
        noted.clear()
    server.most_parallel = 0
    return provider


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
        if not self.path.startswith(self.owner.base):
            self.reply(404, {"detail": "Not Found"})
            return
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
            if not self.path.startswith(owner.base):
                self.reply(404, {"detail": "Not Found"})
                return
            unknown = set(body) - (owner.known or set(body))
            if unknown:
                said = f"Unrecognized request argument supplied: {sorted(unknown)[0]}"
                self.reply(400, {"error": {"message": said, "type": "invalid_request_error"}})
                return
            changed = failure(self, body) if failure is not None else None
            if failure is None:
                self.reply(200, self.answered(body))
            elif changed is not None:
                self.reply(200, changed(self.answered(body)))
        finally:
            with owner.lock:
                owner.n_parallel -= 1

    def answered(self, body):
        if self.path.endswith("/chat/completions"):
            return self.owner.chat(body)
        if self.path.endswith("/messages"):
            return self.owner.speak(body)
        return self.owner.answer(body)

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


def _left(values):
    """Each place tells the log-probability of the token after it."""
    return [*values[1:], -1.0]


def _right(values):
    """Each place tells that of the token before it; the first has none."""
    return [None, -1.0, *values[1:-1]] if len(values) > 1 else values


def _but_first(change):
    return lambda values: [v if v is None else change(v) for v in values]


def _mixed(answer):
    """Answers of a batch, each given to the prompt after it."""
    choices = answer["choices"]
    pairs = zip(choices, choices[1:] + choices[:1], strict=True)
    moved = [own | {"index": other["index"]} for own, other in pairs]
    return answer | {"choices": moved}


def _unlisted_stop(choice):
    told = choice["logprobs"]
    if choice["finish_reason"] == "stop" and told:
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            told[name] = told[name] and told[name][:-1]
        if "token_ids" in choice:
            choice["token_ids"] = choice["token_ids"][:-1]
    return choice


def _moved(by):
    """Each written token has what was told of the token `by` places on."""

    def move(content):
        told = content[by:] + content[:by]
        return [
            own | {k: other[k] for k in ("logprob", "top_logprobs")}
            for own, other in zip(content, told, strict=True)
        ]

    return move


def _copies(answer):
    """Of several answers, one again and again."""
    return answer | {"choices": answer["choices"][:1] * len(answer["choices"])}


def _each_value(change):
    """Every number that is told of written tokens, changed."""

    def changed(content):
        return [
            one
            | {
                "logprob": change(one["logprob"]),
                "top_logprobs": [
                    t | {"logprob": change(t["logprob"])} for t in one["top_logprobs"]
                ],
            }
            for one in content
        ]

    return changed


def _cut(one):
    """The five likeliest tokens with all the mass, as if there were no others."""
    tops = sorted(one["top_logprobs"], key=lambda top: -top["logprob"])[:5]
    mass = sum(math.exp(top["logprob"]) for top in tops)
    tops = [top | {"logprob": top["logprob"] - math.log(mass)} for top in tops]
    own = {top["token"]: top["logprob"] for top in tops}
    return one | {"logprob": own.get(one["token"], one["logprob"]), "top_logprobs": tops}


def _stripped(one):
    """A token without the space before it, and the likeliest likewise."""
    tops = [top | {"token": top["token"].strip()} for top in one["top_logprobs"]]
    return one | {"token": one["token"].strip(), "top_logprobs": tops}


def _without(name):
    return lambda choice: {k: None if k == name else v for k, v in choice.items()}


def _of_base(base):
    return lambda values: values / torch.tensor(base).log()


def _of_temperature(temperature):
    return lambda values: (values / temperature).log_softmax(-1)


# What servers do that do not tell log-probabilities of the tokens asked: by the place where it is
# done.
PARTS = {
    "shifted left": {"list": _left},
    "shifted right": {"list": _right},
    "distributions shifted left": {"places": lambda rows: rows.roll(-1, 0)},
    "distributions shifted right": {"places": lambda rows: rows.roll(1, 0)},
    "base 10": {"scored": _of_base(10.0)},
    "base 10 everywhere": {"scored": _of_base(10.0), "written": _of_base(10.0)},
    "zero": {"list": _but_first(lambda value: 0.0)},
    "zero everywhere": {"scored": lambda v: v * 0, "written": lambda v: v * 0},
    "temperature": {"scored": _of_temperature(0.5)},
    "temperature everywhere": {"scored": _of_temperature(0.5), "written": _of_temperature(0.5)},
    "positive": {"list": _but_first(lambda value: -value)},
    "NaN": {"list": _but_first(lambda value: float("nan"))},
    "another tokenisation": {"prompt": lambda ids: [*ids[:1], *(i for i in ids[1:] for _ in "ab")]},
    "BOS": {"prompt": lambda ids: [1, *ids]},
    "uncounted BOS": {"prompt": lambda ids: [1, *ids], "uncounted": lambda n: 1},
    "stop token": {"choice": _unlisted_stop},
    "mixed up": {"answer": _mixed},
}
# The same of what is told of chats, which is of written tokens alone.
CHAT_PARTS = {
    "shifted left": {"content": _moved(1)},
    "shifted right": {"content": _moved(-1)},
    "base 10": PARTS["base 10 everywhere"],
    "zero": PARTS["zero everywhere"],
    "temperature": {"written": _of_temperature(0.5)},
    "positive": {"content": _each_value(lambda value: -value)},
    "NaN": {"content": _each_value(lambda value: float("nan"))},
    "logprobs ignored": {"content": lambda content: []},
    "tokens doubled": {"content": lambda content: [one for one in content for _ in "ab"]},
    "rounded": {"content": _each_value(lambda value: round(value, 1))},
    "one answer, several times": {"answer": _copies},
    "no draws": {"body": lambda body: body | {"temperature": 0.0}},
    "prompts are cut": {"prompt": lambda ids: ids[-40:]},
    "cut to five": {"content": lambda content: [_cut(one) for one in content]},
    "names without spaces": {"content": lambda content: [_stripped(one) for one in content]},
    "logprobs of another form": {"content": lambda content: {"tokens": content}},
    "values of other tokens": {"content": _each_value(lambda value: value - 1)},
}
