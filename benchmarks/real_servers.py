"""The rungs of the ladder on real servers.

    python benchmarks/real_servers.py MODEL_FOLDER [--gguf FILE] [--python NAME=PYTHON ...]
        [--prompts N] [--only NAME ...] [--cache FILE]

Starts each of vLLM, ``transformers serve`` and llama-cpp-python's server that is installed, as its
own documentation says, and asks it for five prompts by every rung. The truth is a plain forward of
the same checkpoint in float32, of the prompt as the server's template has it. `--python` names the
interpreter that has a server, where it is not this one. What is measured is kept at once; `--only`
takes up single servers again, and with `--cache` a run that was broken off goes on where it was.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from captum.attr import FeatureAblation, RemoteLLMAttribution
from closed_models import attributions
from environment import environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_llm_ext import (
    ChatProvider,
    CompletionsProvider,
    RemoteGenerationAttribution,
    TextSegmentInput,
)
from captum_llm_ext.text.plain_tokenizer import messages_of
from captum_llm_ext.text.tokens import start_id

RESULTS = Path(__file__).parent / "results"
PLACEHOLDER = RemoteLLMAttribution.placeholder_model
N_TOKENS, N_ANSWERS, WITHIN = 2, 16, 900.0
KEY = "key-of-this-server"
SETTINGS: dict[str, Any] = {"timeout": 600.0, "max_concurrency": 2, "api_key": KEY}
PROMPTS = [
    "Anna lives in Oslo and Ben lives in Rome. In which city does Anna live? Answer in one word.",
    "The cat is named Milo. What is the name of the cat? Answer in one word.",
    "The meeting starts at nine. When does the meeting start? Answer in one word.",
    "The password is orange. What is the password? Answer in one word.",
    "We spent our holidays in Spain. Which country did we visit? Answer in one word.",
]
# Of the same, for the endpoint that goes on with texts.
BEGUN = [
    "Anna lives in Oslo and Ben lives in Rome. The name of the city where Anna lives is",
    "The cat is named Milo. The dog is named Rex. The name of the cat is",
    "The meeting starts at nine. Please bring your notes. The meeting starts at",
    "The password is orange. Do not write it down. The password is",
    "We spent our holidays in Spain. It was warm. The country where we spent our holidays is",
]
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
# Package, and the command that its documentation gives.
SERVERS: dict[str, tuple[str, Callable[[argparse.Namespace, int], list[str]]]] = {
    "vllm": (
        "vllm-cpu",
        lambda a, port: [
            *("-m", "vllm.entrypoints.openai.api_server", "--model", a.folder),
            *("--served-model-name", "model", "--enforce-eager", "--dtype", "float32"),
            *("--max-model-len", "1024", "--max-num-seqs", "8", "--port", str(port)),
            *("--api-key", KEY),
        ],
    ),
    "transformers": (
        "transformers",
        lambda a, port: [
            *("-c", "from transformers.cli.transformers import main; main()", "serve", a.folder),
            *("--dtype", "float32", "--device", "cpu", "--port", str(port)),
        ],
    ),
    "llama-cpp": (
        "llama-cpp-python",
        lambda a, port: [
            *("-m", "llama_cpp.server", "--model", a.gguf, "--logits_all", "true"),
            *("--n_ctx", "1024", "--n_threads", "1", "--port", str(port), "--api_key", KEY),
        ],
    ),
}


def main() -> None:
    """Queries every installed server, and writes the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--gguf")
    parser.add_argument("--python", action="append", default=[])
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--cache", type=Path)
    given = parser.parse_args()
    kept = Kept(given.cache)
    pythons = dict(one.split("=", 1) for one in given.python)
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32).eval()
    path = RESULTS / "real_servers.json"
    found: dict[str, Any] = {}
    for name, (package, arguments) in SERVERS.items():
        if name not in given.only:
            continue
        python = pythons.get(name, sys.executable)
        about = _version(package, python)
        if about is None or (name == "llama-cpp" and given.gguf is None):
            found.setdefault(name, {"not_run": f"{package} is not installed"})
            continue
        port = _free_port()
        command = [python, *arguments(given, port)]
        # A kilobyte of answers needs no gigabytes of cache.
        environ = os.environ | VLLM
        environ.pop("PYTHONPATH", None)
        with subprocess.Popen(
            command, stdout=sys.stderr, stderr=sys.stderr, env=environ
        ) as process:
            try:
                url = f"http://127.0.0.1:{port}/v1"
                _wait_for(url, process)
                shown = ["python" if part == python else part for part in command]
                own = environment(seed=0)  # of this server: others may be of an earlier run
                found[name] = {
                    "version": about,
                    "command": _shown(shown, given),
                    "measured": {key: own[key] for key in ("date", "commit")},
                }
                served = given.folder if name == "transformers" else _model_name(url)
                known = kept.of(name)
                for key, about in mistaken(url, served, known):
                    found[name].setdefault("mistakes", {})[key] = about
                for key, about in asked(url, served, model, tokenizer, given.prompts, known):
                    found[name][key] = about
                    keep(path, found, given)
            finally:
                process.terminate()
                process.wait(30)
    keep(path, found, given)
    print(json.dumps(found, indent=1))


def keep(path: Path, found: dict[str, Any], given: argparse.Namespace) -> None:
    """Writes the results so far beside those of other servers, without names of this machine."""
    held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    others = {k: v for k, v in held.get("servers", {}).items() if k not in given.only}
    content = {
        "environment": environment(seed=0)
        | {"command": "python benchmarks/real_servers.py MODEL_FOLDER --gguf MODEL.gguf"},
        "model": "SmolLM2-135M-Instruct",
        "settings": {
            "n_tokens": N_TOKENS,
            "n_answers": N_ANSWERS,
            "prompts": PROMPTS,
            "begun": BEGUN,
        },
        "servers": others | {k: v for k, v in found.items() if k in given.only},
    }
    text = json.dumps(content, indent=1)
    for own, shown in ((given.folder, "MODEL_FOLDER"), (given.gguf, "MODEL.gguf")):
        text = text if own is None else text.replace(own, shown)
    text = re.sub(r"http://127\.0\.0\.1:\d+/v1", "URL", text)
    path.write_text(text + "\n")


class Kept:
    """Results of single prompts in a file of JSON lines, so that runs resume."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._known = path, {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                *key, about = json.loads(line)
                self._known[tuple(key)] = about

    def of(self, server: str) -> Callable[..., dict[str, Any]]:
        """Looks up ``(rung, prompt)`` of a server, or has it found out."""

        def known(rung: str, prompt: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            key = (server, rung, prompt)
            if key not in self._known:
                began = time.monotonic()
                self._known[key] = find() | {"seconds": time.monotonic() - began}
                if self._path is not None:
                    with self._path.open("a") as file:
                        file.write(json.dumps([*key, self._known[key]]) + "\n")
            return self._known[key]

        return known


def asked(
    url: str,
    name: str,
    model: Any,
    tokenizer: Any,
    n_prompts: int,
    known: Callable[..., dict[str, Any]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every rung through both endpoints: ``("chat top-k", {…})`` and so on."""
    endpoints = {
        "completions": lambda: CompletionsProvider(url, name, **SETTINGS),
        "chat": lambda: ChatProvider(name, api_url=url, **SETTINGS),
    }

    def by_text() -> CompletionsProvider:
        return CompletionsProvider(url, name, prompts="text", **SETTINGS)

    rungs: list[tuple[str, dict[str, Any]]] = [
        ("forced", {"attr_target": "log_prob", "rung": "forced"}),
        ("forced by text", {"attr_target": "log_prob", "rung": "forced"}),
        ("stepwise", {"attr_target": "log_prob", "rung": "stepwise"}),
        ("top-k", {"attr_target": "log_prob", "rung": "top-k"}),
        ("label", {"attr_target": "label"}),
        ("label by ids", {"attr_target": "label"}),
        ("frequency", {"attr_target": "frequency", "n_answers": N_ANSWERS}),
        ("similarity", {"attr_target": "similarity", "n_answers": N_ANSWERS}),
    ]
    for endpoint, make in endpoints.items():
        for rung, how in rungs:
            if endpoint == "chat" and rung.startswith("forced"):
                continue  # nobody tells log-probabilities of a chat's prompt
            by = by_text if rung == "forced by text" else make
            own = PROMPTS if endpoint == "chat" else BEGUN
            key = f"{endpoint} {rung}"
            each = [
                known(
                    key,
                    prompt,
                    partial(_one, by, endpoint, rung, how, prompt, model, tokenizer),
                )
                for prompt in own[:n_prompts]
            ]
            errors = sorted({one["refused"] for one in each if "refused" in one})
            told = [one for one in each if "refused" not in one]
            about: dict[str, Any] = {"n_prompts": len(told)}
            about |= {"refused": errors} if errors else {}
            if told:
                keys = ("handshake", "n_requests", "estimated_requests", "answers", "top_is_top")
                keys += ("labels",)
                found = {key: [one[key] for one in told if key in one] for key in keys}
                about |= {key: values for key, values in found.items() if values}
                about["handshake"] = about["handshake"][:1]
                censored = [one["share_censored"] for one in told if "share_censored" in one]
                about |= {"share_censored": sum(censored) / len(censored)} if censored else {}
                largest = [one["largest_error"] for one in told if one.get("largest_error")]
                about |= {"largest_error": max(largest)} if largest else {}
                inside = [one["inside"] for one in told if "inside" in one]
                about |= {"inside": min(inside)} if inside else {}
            about["seconds"] = round(sum(one["seconds"] for one in each), 1)
            print(key, json.dumps(about), file=sys.stderr, flush=True)
            yield key, about


def mistaken(
    url: str, name: str, known: Callable[..., dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Typical user errors: the resulting error, and the seconds until it."""
    other = url.replace("/v1", "/v2")
    nobody = f"http://127.0.0.1:{_free_port()}/v1"
    cases: dict[str, Callable[[], Any]] = {
        "wrong port": lambda: ChatProvider(name, api_url=nobody, **SETTINGS),
        "wrong path, chat": lambda: ChatProvider(name, api_url=other, **SETTINGS),
        "wrong path, completions": lambda: CompletionsProvider(other, name, **SETTINGS),
        "no key": lambda: ChatProvider(name, api_url=url, **SETTINGS | {"api_key": "another"}),
        "no such model, chat": lambda: ChatProvider("no-such-model", api_url=url, **SETTINGS),
        "no such model, completions": lambda: CompletionsProvider(url, "no-such-model", **SETTINGS),
        "chat asked by completions": lambda: CompletionsProvider(url, name, **SETTINGS),
    }

    def tried(make: Callable[[], Any]) -> dict[str, Any]:
        inp = TextSegmentInput(PROMPTS[0], None, unit="sentence")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                method = FeatureAblation(PLACEHOLDER)
                remote = RemoteGenerationAttribution(method, None, make())
                remote.attribute(inp, gen_args={"max_new_tokens": N_TOKENS})
        except (ValueError, RuntimeError, ConnectionError) as error:
            return {"refused": str(error)[:600]}
        return {"refused": None}

    for case, make in cases.items():
        yield case, known("mistakes", case, partial(tried, make))


def _one(
    make: Callable[[], Any],
    endpoint: str,
    rung: str,
    how: dict[str, Any],
    prompt: str,
    model: Any,
    tokenizer: Any,
) -> dict[str, Any]:
    is_forced = rung.startswith("forced")
    own = tokenizer if is_forced or rung in ("stepwise", "label by ids") else None
    baselines: Any = "delete"
    inp = TextSegmentInput(
        prompt, tokenizer if is_forced else None, unit="sentence", baselines=baselines
    )
    try:
        remote = RemoteGenerationAttribution(FeatureAblation(PLACEHOLDER), own, make(), **how)
        gen_args = {"max_new_tokens": N_TOKENS}
        estimate = remote.estimate(inp, gen_args=gen_args)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = remote.attribute(inp, gen_args=gen_args)
    except (ValueError, RuntimeError, ConnectionError) as error:
        return {"refused": str(error)[:600]}
    told = result.provenance
    met = told.get("handshake") or {}
    about: dict[str, Any] = {
        "handshake": met.get("checks", met),
        "n_requests": told["n_requests"],
        "estimated_requests": estimate.n_requests,
        "answers": "".join(piece.text for piece in result.output_pieces),
    }
    if rung in ("frequency", "similarity"):
        return about
    if rung.startswith("label"):
        about["labels"] = told["labels"]
    exact = _exact(endpoint, inp, result, model, tokenizer, is_forced)
    values = result.values.double()
    lower, upper = result.value_interval if result.value_interval is not None else (values, values)
    known = (upper - lower).isfinite()
    about["largest_error"] = float((values - exact)[known].abs().max()) if known.any() else None
    about["share_censored"] = float((~known).double().mean())
    truth = attributions(FeatureAblation, result.masks, exact.sum(1))
    about["top_is_top"] = int(result.seq_attr.argmax()) == int(truth.argmax())
    room = 0.3  # of a quantised model; of others the largest error says it
    about["inside"] = float(((lower - room <= exact) & (exact <= upper + room)).double().mean())
    return about


def _exact(
    endpoint: str, inp: Any, result: Any, model: Any, tokenizer: Any, is_forced: bool
) -> torch.Tensor:
    """Log-probabilities of the target after each coalition, or log-odds of the labels, by plain
    forwards.
    """
    values: list[list[float]] = []
    labels = result.provenance.get("labels")
    pieces = labels or [piece.text for piece in result.output_pieces]
    target = (
        result.target.tolist()
        if is_forced
        else [tokenizer.encode(text, add_special_tokens=False)[0] for text in pieces]
    )
    for row in inp.render(result.masks.bool(), torch.Generator().manual_seed(0)):
        text = "" if is_forced else inp.tokenizer.decode(row.ids)
        said = [m for m in messages_of(text) if m["content"].strip()]
        said = said or [{"role": "user", "content": " "}]
        if endpoint == "chat":
            shown = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            ids = tokenizer.encode(shown, add_special_tokens=False)
        elif is_forced:
            ids = list(row.ids) or [start_id(tokenizer)]
        else:
            ids = tokenizer.encode(said[0]["content"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + target])).logits[0]
        told = logits[len(ids) - 1 : -1].double().log_softmax(-1)
        if labels:
            values.append([float(told[0, target[0]] - told[0, target[1]])])
        else:
            values.append([float(told[t, token]) for t, token in enumerate(target)])
    return torch.tensor(values, dtype=torch.float64)


def _wait_for(url: str, process: Any) -> None:
    until = time.monotonic() + WITHIN
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}.")
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=30):
                return
        except urllib.error.HTTPError:
            return  # it is up, and knows no such path
        except OSError:
            time.sleep(2)
    raise RuntimeError(f"no server within {WITHIN:g} seconds.")


def _model_name(url: str) -> str:
    asked = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return str(json.load(answer)["data"][0]["id"])


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _version(package: str, python: str) -> str | None:
    if python == sys.executable:
        try:
            return version(package)
        except PackageNotFoundError:
            return None
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _shown(command: list[str], given: argparse.Namespace) -> str:
    names = {given.folder: "MODEL_FOLDER", given.gguf: "MODEL.gguf"}
    return " ".join(names.get(part, part) for part in command)


if __name__ == "__main__":
    main()
