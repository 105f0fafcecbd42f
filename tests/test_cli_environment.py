"""The command line and its environment: help, terminals, encodings, devices, `doctor`."""

import argparse
import contextlib
import io
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import termios
from dataclasses import replace
from itertools import pairwise

import architectures
import numpy
import pytest
import torch
from remote_server import Server
from safetensors.torch import load_file, save_file

from captum_llm_ext import GenerationAttributionResult, load_demo
from captum_llm_ext.cli import _COMMANDS, checkup, main
from captum_llm_ext.cli import self_check as probe
from captum_llm_ext.cli.loading import Place, load_model
from captum_llm_ext.demo import PROMPT, folder

EXAMPLES = [example for command in _COMMANDS for example in command.EXAMPLES]
SERVED = "http://localhost:8000/v1"
FILES = ("--html", "--png", "--json", "--save", "--out")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with everything that the examples in the help texts speak of."""
    at = tmp_path_factory.mktemp("desk")
    for name in ("my-model", "Qwen/Qwen3-0.6B"):  # a folder goes before a name
        (at / name).parent.mkdir(exist_ok=True)
        shutil.copytree(folder(), at / name)
    letter = "Ann lives in Austin, TX and is a nurse. Her personal interests include tennis and"
    (at / "letter.txt").write_text(letter, encoding="utf-8")
    (at / "q.txt").write_text(PROMPT, encoding="utf-8")
    texts = load_demo()[2]
    (at / "letters.txt").write_text("\n".join(texts[:200]), encoding="utf-8")
    (at / "ann.txt").write_text("Ann lives in Austin, TX and is a nurse.", encoding="utf-8")
    (at / "bob.txt").write_text("Bob lives in Dallas, TX and is a teacher.", encoding="utf-8")
    chat = [{"role": "user", "content": "Dave lives in Palm Coast, FL. He is a lawyer."}]
    (at / "chat.json").write_text(json.dumps(chat), encoding="utf-8")
    (at / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}), encoding="utf-8")
    for name in ("ann", "bob"):
        (at / f"{name}.txt").write_text(f"{name.title()} lives in Austin, TX.", encoding="utf-8")
    for name in ("dave", "deleted", "corpus"):
        baselines = "delete" if name == "deleted" else "corpus:demo"
        quick = ["--model", "demo", "--quiet", "--method", "ablation"]
        save = ["--baselines", baselines, "--save", str(at / f"{name}.safetensors")]
        assert main(["attribute", "--prompt", PROMPT, *quick, *save]) == 0
    search = ["counterfactual", "--model", "demo", "--prompt", PROMPT]
    changes = ["--max-size", "1", "--baselines", "corpus:demo", "--json", str(at / "changes.json")]
    assert main([*search, *changes, "--quiet"]) == 0
    return at


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example[:60])
def test_help_examples_run(example, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    before = {path: path.stat().st_mtime_ns for path in desk.rglob("*")}
    capsys.readouterr()
    line, _, query = example.partition(" | ")
    with contextlib.ExitStack() as stack:
        if SERVED in line and "--dry-run" not in line:
            served = stack.enter_context(Server(*load_demo()[:2]))
            line = line.replace(SERVED, served.url)
        arguments = shlex.split(line)
        assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.out  # of a dry run, what the rest would take
    assert "error:" not in shown.err
    if query:  # jq, which may not be there
        value = json.loads(shown.out)
        for name in filter(None, query.removeprefix("jq").strip().split(".")):
            value = value[name]
        assert value not in (None, {}, [])
    written = {path for path in desk.rglob("*") if before.get(path) != path.stat().st_mtime_ns}
    wanted = [value for part, value in pairwise(arguments) if part in FILES]
    assert {desk / name for name in wanted if name != "-"} <= written


def test_terminal_output_has_colours_and_fits_its_width(desk):
    """A real pseudo-terminal of 50 columns."""
    show = [sys.executable, "-m", "captum_llm_ext", "show", str(desk / "dave.safetensors")]
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 50))
    with subprocess.Popen(show, stdout=theirs, env=environment | {"TERM": "xterm"}) as process:
        os.close(theirs)
        read = b""
        with contextlib.suppress(OSError):  # how Linux tells that the other end is closed
            while part := os.read(ours, 4096):
                read += part
    os.close(ours)
    assert process.returncode == 0
    shown = read.decode().replace("\r\n", "\n")
    assert "\x1b[94m" in shown
    lines = re.sub(r"\x1b\[\d+m", "", shown).splitlines()
    assert max(map(len, lines)) <= 50
    assert any("surfing  ←  Palm" in line for line in lines)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_stdout_encodings(desk, monkeypatch, encoding):
    """Arrows that it has not are spelt out, and JSON stays JSON."""

    def shown(*arguments):
        written = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
            assert main(["show", str(desk / "emoji.safetensors"), *arguments]) == 0
            sys.stdout.flush()
            return written.getvalue().decode(encoding)

    result = GenerationAttributionResult.load(desk / "dave.safetensors")
    result.output_tokens[0] = "🙂"
    result.save(desk / "emoji.safetensors")
    assert "surfing  \\u2190  Palm" in shown()
    assert json.loads(shown("--json", "-"))["output_tokens"][:3] == ["🙂", ",", "surfing"]


def test_dtype_and_device_map_are_passed_to_transformers():
    for given in ("meta", '{"": "meta"}'):
        options = argparse.Namespace(dtype="bfloat16", device_map=given, quantize=None)
        loaded = load_model(Place("demo", str(folder())), options)
        assert not loaded.training
        for parameter in loaded.parameters():
            assert (parameter.device.type, parameter.dtype) == ("meta", torch.bfloat16)


def test_revision_is_loaded_and_recorded(tmp_path, capsys):
    """From a cache of the hub with two commits, as downloads leave it."""
    repository = tmp_path / "models--someone--tiny"
    old, new = "1" * 40, "2" * 40
    (repository / "refs").mkdir(parents=True)
    for name, commit in {"v1": old, "main": new}.items():
        shutil.copytree(folder(), repository / "snapshots" / commit)
        (repository / "refs" / name).write_text(commit)
    weights = repository / "snapshots" / old / "model.safetensors"
    state = load_file(weights)
    state["model.norm.weight"] *= 2
    save_file(state, weights, metadata={"format": "pt"})
    tiny = ["attribute", "--model", "someone/tiny", "--prompt", "Ann likes"]
    quick = ["--method", "ablation", "--target", " golf", "--quiet", "--json", "-"]

    # The cache's place is read while the hub's client is imported: one process for both.
    code = (
        "import sys; from captum_llm_ext.cli import main; arguments = sys.argv[1:]; "
        "sys.exit(main(arguments) or main([*arguments, '--revision', 'v1']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *tiny, *quick],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    read = json.JSONDecoder().raw_decode
    main_, end = read(run.stdout)
    tagged, _ = read(run.stdout[end:].lstrip())
    assert (main_["provenance"]["model"], main_["provenance"]["revision"]) == ("someone/tiny", new)
    assert tagged["provenance"]["revision"] == old
    assert main_["full_values"] != tagged["full_values"]
    assert main(["attribute", "--model", "demo", "--prompt", "Ann likes", *quick]) == 0
    assert main_["full_values"] == json.loads(capsys.readouterr().out)["full_values"]


@pytest.mark.parametrize("model", ["demo", str(folder())])
def test_revision_of_a_local_folder_is_refused(model, capsys):
    for command in (["attribute", "--model", model, "--prompt", "x"], ["doctor", model]):
        assert main([*command, "--revision", "v1"]) == 2
        assert "error: --revision would be ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["--html", "-"], "--html -: only --json goes to stdout"),
        (["--html", "x", "--json", "./x"], "--html and --json are the same file './x'"),
    ],
)
def test_output_path_errors_come_before_loading(files, message, capsys):
    assert main(["show", "no-such-result", *files]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_help_documents_exit_statuses(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Exit status: 0; 1 where" in capsys.readouterr().out


def test_doctor_reports_exact_reuse(tokenizer, model):
    lines = "\n".join(checkup._lines(probe.probe(model, tokenizer)))
    assert "exact  rows in padded batches: within" in lines
    assert "exact  beginnings reused: within" in lines
    assert "exact  beginnings shared, not copied: within" in lines
    assert "exact  rows packed in one sequence: within" in lines
    assert "exact  logits of the target's positions only" in lines
    assert "WRONG  captum's own default (use_cached_outputs=True): off by up to" in lines
    found = probe.probe(architectures.build("mamba"), tokenizer)
    lines = "\n".join(checkup._lines(found))
    assert "off    beginnings reused: MambaForCausalLM computes every row on its own" in lines
    assert "off    rows packed in one sequence: not with this model" in lines
    assert found.to_dict()["shared_is_exact"] is None


DRAWING = {
    "seeded": lambda rng: lambda _, args, x: x + 0.05 * torch.randn_like(x),
    "free": lambda rng: lambda _, args, x: x * (1 + 0.05 * rng.random()),
}


@pytest.mark.parametrize("kind", DRAWING)
@pytest.mark.filterwarnings("ignore:.* draws at random in every pass")
def test_doctor_handles_stochastic_models(kind, tokenizer, model):
    hook = DRAWING[kind](numpy.random.default_rng(0))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        handle = model.model.norm.register_forward_hook(hook)
        found = probe.probe(model, tokenizer)
        handle.remove()
    assert found.found.draws == kind
    assert found.is_right
    # By seeds it is the same to rounding; otherwise, to what two passes differ by.
    assert (found.whole_error < 1e-4) == (kind == "seeded")
    assert found.limit == (found.rounding if kind == "seeded" else found.noise_floor)
    lines = list(checkup._lines(found))
    assert lines[0].startswith("right  values")
    assert ("from the same seeds" if kind == "seeded" else "that draws anew") in lines[0]
    assert lines[-1].endswith("not compared: the model draws at random")
    assert not replace(found, whole_error=2 * found.limit).is_right


def test_doctor_marks_inexact_reuse_as_wrong(tokenizer, model):
    found = replace(probe.probe(model, tokenizer), shared_error=0.5)
    lines = list(checkup._lines(found))
    assert lines[0].startswith("WRONG  values: within 0.5 nats")
    assert lines[1].startswith("exact  rows in padded batches")
    assert lines[2].startswith("WRONG  beginnings reused: within 0.5 nats")
    assert not replace(found, shared_error=float("nan")).is_right
    assert not replace(found, shared_error=0.0, packed_error=0.5).is_right
    assert not replace(found, shared_error=0.0, whole_error=float("nan")).is_right
