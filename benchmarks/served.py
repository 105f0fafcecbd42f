"""A local model behind OpenAI's APIs, for measurements against its exact values.

Of chats, what was said is read as plain text, which small models continue better than they answer,
or by the chat template. Completions take token ids or text, and tell `prompt_logprobs` as vLLM
does.
"""

import json
import threading
from copy import deepcopy
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import torch

_KEPT = 100  # distributions over the vocabulary
_MOST = 20  # likeliest tokens that are told


class _Told(NamedTuple):
    """What is told of one position: token ids with their log-probabilities.

    Attributes:
        own: The token that stands there.
        top: The likeliest ones.
    """

    own: tuple[int, float]
    top: list[tuple[int, float]]


def _told(log_probs: torch.Tensor, token: int) -> _Told:
    best = log_probs.topk(_MOST)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return _Told((token, float(log_probs[token])), list(pairs))


class Served:
    """A model served over HTTP on this machine.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        is_chat: Whether what was said is put into its chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, *, is_chat: bool = False) -> None:
        self._model, self._tokenizer, self._is_chat = model, tokenizer, is_chat
        self._lock = threading.Lock()
        self._last: tuple[list[int], Any, torch.Tensor] | None = None
        self._known: dict[tuple[int, ...], torch.Tensor] = {}
        self._told: dict[tuple[int, ...], torch.Tensor] = {}
        self._shares: dict[tuple[Any, ...], torch.Tensor] = {}
        # By prompt, and by what was asked for: what was told once costs nothing again.
        self._scored: dict[tuple[int, ...], list[_Told]] = {}
        self._completions: dict[tuple[Any, ...], list[_Told]] = {}
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with served._lock, torch.no_grad():
                    is_chat = self.path.endswith("/chat/completions")
                    found = served.answer(body) if is_chat else served.complete(body)
                    raw = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def ids(self, messages: list[dict[str, str]], begun: str = "") -> list[int]:
        """The token ids of a chat as read by the model."""
        if self._is_chat:
            ids = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        else:
            ids = self._tokenizer.encode("\n".join(m["content"] for m in messages))
        # No token reaches across the border, as none does across that of a chat template.
        return ids + self._tokenizer.encode(begun, add_special_tokens=False)

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """Log-probabilities of the next token, shape ``(n_vocabulary,)``, float64.

        What the last ids that were read whole begin with is not read again, nor what was asked
        for lately.
        """
        key = tuple(ids)
        if key not in self._told:
            if len(self._told) >= _KEPT:
                self._told.clear()
                self._shares.clear()
            self._told[key] = self._read(ids)
        return self._told[key]

    def _read(self, ids: list[int]) -> torch.Tensor:
        n = 0 if self._last is None else len(self._last[0])
        if self._last is None or ids[:n] != self._last[0]:
            out = self._model(input_ids=torch.tensor([ids]), use_cache=True)
            self._last, self._known, n = (ids, out.past_key_values, out.logits[0, -1]), {}, len(ids)
        _, past, logits = self._last
        more = tuple(ids[n:])
        if more and more not in self._known:
            out = self._model(
                input_ids=torch.tensor([more]), past_key_values=deepcopy(past), use_cache=True
            )
            self._known[more] = out.logits[0, -1]
        return (self._known[more] if more else logits).double().log_softmax(-1)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The endpoint's response."""
        messages = list(body["messages"])
        begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        ids = self.ids(messages, begun)
        digest = blake2b(repr(ids).encode(), digest_size=7).digest()
        top, temperature = int(body.get("top_logprobs") or 0), float(body["temperature"])
        choices: list[dict[str, Any]] = []
        n_out = 0
        for i in range(body.get("n", 1)):
            seed = int.from_bytes(digest, "big") + body.get("seed", 0) + i
            written, told = self._written(ids, body["max_tokens"], temperature, seed)
            steps = [self._step(*pair, top) for pair in zip(told, written, strict=True)]
            n_out += len(written)
            text = self._tokenizer.decode(written, skip_special_tokens=True)
            message = {"role": "assistant", "content": text}
            choice = {"index": i, "message": message, "finish_reason": "length"}
            choices.append(choice | ({"logprobs": {"content": steps}} if top else {}))
        usage = {"prompt_tokens": len(ids), "completion_tokens": n_out}
        return {"choices": choices, "model": "local", "usage": usage}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The completions endpoint's response, to one prompt or several."""
        given = body["prompt"]
        several = isinstance(given, list) and given and isinstance(given[0], list)
        prompts = [
            self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            for prompt in (given if several else [given])
        ]
        wanted = body.get("prompt_logprobs")
        of_prompts = [[]] * len(prompts) if wanted is None else self._of_prompts(prompts)
        n = int(body.get("n", 1))
        choices: list[dict[str, Any]] = []
        for ids, told in zip(prompts, of_prompts, strict=True):
            own = [self._completed(ids, body, i) for i in range(n)]
            if wanted is not None:
                entries = [
                    {str(t): {"logprob": v} for t, v in [at.own, *at.top[: int(wanted)]]}
                    for at in told
                ]
                own = [choice | {"prompt_logprobs": [None, *entries]} for choice in own]
            choices += own
        choices = [choice | {"index": i} for i, choice in enumerate(choices)]
        n_out = sum(len(choice["token_ids"]) for choice in choices)
        usage = {"prompt_tokens": sum(map(len, prompts)) * n, "completion_tokens": n_out}
        return {"choices": choices, "model": "local", "usage": usage}

    def _completed(self, ids: list[int], body: dict[str, Any], nth: int) -> dict[str, Any]:
        digest = blake2b(repr(ids).encode(), digest_size=7).digest()
        seed = int.from_bytes(digest, "big") + body.get("seed", 0) + nth
        asked = tuple(ids), int(body["max_tokens"]), float(body["temperature"])
        # Of prompts that are scored, what is written after them is not read.
        if body.get("prompt_logprobs") is not None and body.get("logprobs") is None:
            steps = [_Told((0, 0.0), [])]
        elif (*asked, seed) in self._completions:
            steps = self._completions[*asked, seed]
        else:
            written, told = self._written(ids, asked[1], asked[2], seed)
            steps = [_told(row, token) for row, token in zip(told, written, strict=True)]
            self._completions[*asked, seed] = steps
        tokens = [at.own[0] for at in steps]
        has_stopped = tokens[-1:] == [self._tokenizer.eos_token_id]
        choice: dict[str, Any] = {
            "text": self._tokenizer.decode(tokens, skip_special_tokens=True),
            "token_ids": tokens,
            "finish_reason": "stop" if has_stopped else "length",
        }
        if body.get("logprobs") is None:
            return choice
        by_id, top = bool(body.get("return_tokens_as_token_ids")), max(int(body["logprobs"]), 1)
        tops = [{self._name(t, by_id): v for t, v in at.top[:top]} for at in steps]
        return choice | {
            "logprobs": {
                "tokens": [self._name(token, by_id) for token in tokens],
                "token_logprobs": [at.own[1] for at in steps],
                "top_logprobs": tops,
            }
        }

    def _of_prompts(self, prompts: list[list[int]]) -> list[list["_Told"]]:
        """What is told of every token after the first, of prompts read together."""
        todo = [ids for ids in prompts if tuple(ids) not in self._scored]
        if todo:
            longest = max(map(len, todo))
            rows = [[*ids, *[0] * (longest - len(ids))] for ids in todo]
            logits = self._model(input_ids=torch.tensor(rows)).logits
            for ids, row in zip(todo, logits, strict=True):
                told = row[: len(ids) - 1].double().log_softmax(-1)
                pairs = zip(told, ids[1:], strict=True)
                self._scored[tuple(ids)] = [_told(at, token) for at, token in pairs]
        return [self._scored[tuple(ids)] for ids in prompts]

    def _written(
        self, ids: list[int], n: int, temperature: float, seed: int
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Generated tokens, and the distribution that each is from."""
        generator = torch.Generator().manual_seed(seed)
        written: list[int] = []
        steps: list[torch.Tensor] = []
        for _ in range(n):
            told = self.log_probs(ids + written)
            if temperature == 0:
                token = int(told.argmax())
            else:
                shares = self._cumulated((*ids, *written), told, temperature)
                drawn = torch.rand(1, generator=generator, dtype=torch.float64)
                token = min(int(torch.searchsorted(shares, drawn)), len(shares) - 1)
            written.append(token)
            steps.append(told)
            if token == self._tokenizer.eos_token_id:
                break
        return written, steps

    def _name(self, token: int, by_id: bool) -> str:
        return f"token_id:{token}" if by_id else self._tokenizer.decode([token])

    def _cumulated(
        self, key: tuple[int, ...], told: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """Cumulative probabilities of all tokens, for sampling."""
        if (key, temperature) not in self._shares:
            self._shares[key, temperature] = (told / temperature).softmax(-1).cumsum(-1)
        return self._shares[key, temperature]

    def _step(self, told: torch.Tensor, token: int, top: int) -> dict[str, Any]:
        values, likeliest = told.topk(max(top, 1))
        pairs = zip(values.tolist(), likeliest.tolist(), strict=True)
        tops = [{"token": self._tokenizer.decode([i]), "logprob": v} for v, i in pairs]
        text = self._tokenizer.decode([token])
        return {"token": text, "logprob": float(told[token]), "top_logprobs": tops}
