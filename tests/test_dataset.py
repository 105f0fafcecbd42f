"""Many prompts: one file each, whatever happens to the process that writes them."""

import copy
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import weakref
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from captum.attr import FeatureAblation, KernelShap, LayerIntegratedGradients

import captum_llm_ext
from captum_llm_ext import (
    ChatInput,
    CorpusBaselines,
    DatasetReport,
    GenerationAttribution,
    GenerationAttributionResult,
    GenerationGradientAttribution,
    Infilling,
    TextSegmentInput,
    attribute_dataset,
)
from captum_llm_ext.cli import main
from captum_llm_ext.model import Journal

# Absent is deleted: what comes of it is known.
attribute_dataset = partial(attribute_dataset, baselines="delete")

CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Dave lives."}]
PROMPT = "Dave lives in Palm Coast, FL"
OPTIONS = ["--method", "ablation", "--max-new-tokens", "2", "--output-unit", "none", "--quiet"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def attribution(tokenizer):
    return GenerationAttribution(FeatureAblation(tiny.llama(len(tokenizer))), tokenizer)


def results(folder):
    found = sorted(folder.glob("*.safetensors"))
    return [GenerationAttributionResult.load(path) for path in found]


def test_default_baselines_are_those_of_the_inputs(attribution, tokenizer, tmp_path):
    records = [{"prompt": PROMPT, "target": " and chess"}, {"messages": MESSAGES, "target": [5, 6]}]
    captum_llm_ext.attribute_dataset(records, attribution, tmp_path)
    expected = [
        attribution.attribute(TextSegmentInput(PROMPT, tokenizer), " and chess"),
        attribution.attribute(ChatInput(MESSAGES, tokenizer), [5, 6]),
    ]
    for found, wanted in zip(results(tmp_path), expected, strict=True):
        assert torch.equal(found.token_attr, wanted.token_attr)
        assert found.provenance["absence"] == wanted.provenance["absence"]
        assert found.provenance["absence"]["prompt"] == "model"


def test_stale_temporary_files_are_removed(attribution, tmp_path):
    names = (".000007.safetensors.a1", ".run.json.b2", ".000008.safetensors.c3", ".notes")
    for name in names:
        (tmp_path / name).write_text("half")
    for name in (names[0], names[1], names[3]):  # the third may be another's at this moment
        os.utime(tmp_path / name, (time.time() - 3600,) * 2)
    attribute_dataset([PROMPT], attribution, tmp_path, gen_args={"max_new_tokens": 2})
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden == {names[2], names[3]}


def test_records_equal_single_attributions(attribution, tokenizer, tmp_path):
    records = [
        PROMPT,
        {"prompt": PROMPT, "target": " and chess", "id": "a/b", "source": "letters"},
        {"messages": MESSAGES, "target": [5, 6]},
    ]
    report = attribute_dataset(records, attribution, tmp_path, gen_args={"max_new_tokens": 3})
    assert report == DatasetReport(n_written=3)
    plain = TextSegmentInput(PROMPT, tokenizer, baselines="delete")
    expected = [
        attribution.attribute(plain, gen_args={"max_new_tokens": 3}),
        attribution.attribute(plain, " and chess"),
        attribution.attribute(ChatInput(MESSAGES, tokenizer, baselines="delete"), [5, 6]),
    ]
    for number, (found, wanted) in enumerate(zip(results(tmp_path), expected, strict=True)):
        assert torch.equal(found.token_attr, wanted.token_attr)
        assert torch.equal(found.output_attr, wanted.output_attr)
        assert found.input_tokens == wanted.input_tokens
        own_id = "a/b" if number == 1 else None
        assert found.provenance["record"] == {"number": number, "id": own_id}


def test_existing_results_are_skipped_and_failures_retried(attribution, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    lines = ['"Dave lives"', "{bad", "", '{"prompt": "", "id": "empty"}', '{"promt": "Dave"}', "7"]
    file.write_text("\n".join(lines), encoding="utf-8")
    report = attribute_dataset(file, attribution, out, gen_args={"max_new_tokens": 1})
    assert (report.n_written, report.n_skipped, report.n_failed) == (1, 0, 4)
    assert [number for number, _ in report.failures] == [1, 2, 3, 4]
    for (_, said), wanted in zip(
        report.failures,
        ("line 2 is not JSON", "empty", "did you mean 'prompt'", "int"),
        strict=True,
    ):
        assert wanted in said
    errors = [json.loads(path.read_text()) for path in sorted(out.glob("*.error.json"))]
    assert [error["number"] for error in errors] == [1, 2, 3, 4]
    assert [(e["number"], e["error"]) for e in errors] == list(report.failures)
    before = [path.stat().st_mtime_ns for path in out.glob("*.safetensors")]
    # Mended, the second line is another record; the fourth and fifth still fail.
    file.write_text("\n".join([lines[0], '"Ann lives"', *lines[3:]]), encoding="utf-8")
    again = attribute_dataset(file, attribution, out, gen_args={"max_new_tokens": 1})
    assert (again.n_written, again.n_skipped, again.n_failed) == (1, 1, 3)
    assert before[0] in [path.stat().st_mtime_ns for path in out.glob("*.safetensors")]
    assert not (out / "000001.error.json").exists()


def test_records_are_read_lazily(attribution, tmp_path):
    """The file of a record is there before the next but one is asked for."""
    seen = []

    def records():
        for _ in range(3):
            seen.append(len(list(tmp_path.glob("*.safetensors"))))
            yield {"prompt": "Dave lives", "target": [7]}

    attribute_dataset(records(), attribution, tmp_path)
    assert seen == [0, 1, 2]


def test_changed_settings_are_refused_in_the_same_folder(attribution, tokenizer, tmp_path):
    records = [{"prompt": "Dave lives", "target": [7]}]
    attribute_dataset(records, attribution, tmp_path, seed=1)

    def refused(message, attribution=attribution, records=records, **options):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ValueError, match=f"of another run.*{message}"):
            attribute_dataset(records, attribution, tmp_path, **{"seed": 1} | options)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    model = attribution.model
    refused("`seed` was 1 and is 2", seed=2)
    refused("`n_samples`", n_samples=9)
    refused("`unit` was None and is 'token'", unit="token")
    refused(
        "`method` was 'FeatureAblation' and is 'KernelShap'",
        GenerationAttribution(KernelShap(model), tokenizer),
    )
    refused(
        "`attr_target` was 'log_prob'",
        GenerationAttribution(FeatureAblation(model), tokenizer, "logit"),
    )
    # The same sizes and other numbers; and one number of one weight.
    refused(
        "`weights`",
        GenerationAttribution(FeatureAblation(tiny.llama(len(tokenizer), seed=1)), tokenizer),
    )
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 2] += 1e-5
    refused("`weights`", GenerationAttribution(FeatureAblation(changed), tokenizer))
    refused("`tokenizer`", GenerationAttribution(FeatureAblation(model), other_template(tokenizer)))
    # How fast it goes is no setting.
    report = attribute_dataset(records, attribution, tmp_path, seed=1, perturbations_per_eval=1)
    assert report.n_skipped == 1


def test_finished_records_and_results_are_freed(tokenizer, tmp_path):
    """However many records there are, one of them is in memory, with its result."""
    alive, results = [], []

    class Watched(GenerationAttribution):
        def attribute(self, *args, **options):
            result = super().attribute(*args, **options)
            results.append(weakref.ref(result))
            return result

    class Watchable(dict):
        pass

    seen = []

    def records():
        for i in range(12):
            gc.collect()
            alive.append([sum(ref() is not None for ref in refs) for refs in (seen, results)])
            record = Watchable(prompt=f"Dave {i} lives", target=[7])
            if i % 3 == 2:
                record = Watchable(prompt="")  # which fails
            seen.append(weakref.ref(record))
            yield record
            del record

    attribution = Watched(FeatureAblation(tiny.llama(len(tokenizer))), tokenizer)
    report = attribute_dataset(records(), attribution, tmp_path)
    assert (report.n_written, report.n_failed) == (8, 4)
    assert max(n for n, _ in alive) <= 2  # the one before, until there is another
    assert max(n for _, n in alive) <= 1


def test_memory_is_independent_of_existing_results(attribution, tmp_path):
    record = {"prompt": "Dave lives", "target": [7]}
    peaks = []
    for n in (50, 2000):
        attribute_dataset([record], attribution, tmp_path / str(n))
        first = tmp_path / str(n) / "000000.safetensors"
        for i in range(1, n):
            os.link(first, first.with_name(f"{i:06d}.safetensors"))
        lines = tmp_path / f"{n}.jsonl"
        lines.write_text(f"{json.dumps(record)}\n" * n)
        # The more objects there are, the longer garbage is left: earlier tests' do not count.
        gc.freeze()
        gc.collect()
        tracemalloc.start()
        report = attribute_dataset(lines, attribution, tmp_path / str(n))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        gc.unfreeze()
        assert report.n_skipped == n
    # Nothing else than a name of each would be 150 kB.
    assert peaks[1] < peaks[0] + 30_000


def test_gradient_attributions_of_many_prompts(tokenizer, tmp_path):
    model = tiny.llama(len(tokenizer))
    method = LayerIntegratedGradients(model, model.model.layers[0])
    attribution = GenerationGradientAttribution(method, tokenizer)
    records = [
        {"prompt": PROMPT, "id": "a"},
        {"messages": MESSAGES, "target": [5, 6]},
        {"prompt": ""},
    ]
    options = {"gen_args": {"max_new_tokens": 2}, "n_steps": 4, "baselines": "<unk>"}
    report = attribute_dataset(records, attribution, tmp_path, **options)
    assert (report.n_written, report.n_failed) == (2, 1)
    inputs = (
        TextSegmentInput(PROMPT, tokenizer, baselines="<unk>"),
        ChatInput(MESSAGES, tokenizer, baselines="<unk>"),
    )
    expected = [
        attribution.attribute(inputs[0], gen_args={"max_new_tokens": 2}, n_steps=4),
        attribution.attribute(inputs[1], [5, 6], n_steps=4),
    ]
    for found, wanted in zip(results(tmp_path), expected, strict=True):
        assert torch.equal(found.full_attr, wanted.full_attr)
    assert results(tmp_path)[0].provenance["record"] == {"number": 0, "id": "a"}
    # Speed is no setting; all else is.
    again = attribute_dataset(records, attribution, tmp_path, internal_batch_size=1, **options)
    assert (again.n_written, again.n_skipped, again.n_failed) == (0, 2, 1)

    def refused(message, method=method, attr_target="log_prob", **more):
        other = GenerationGradientAttribution(method, tokenizer, attr_target=attr_target)
        with pytest.raises(ValueError, match=f"of another run.*{message}"):
            attribute_dataset(records, other, tmp_path, **options | more)

    refused("`n_steps` was 4 and is 5", n_steps=5)
    refused("`attr_target` was 'log_prob' and is 'logit'", attr_target="logit")
    refused("'model.layers.1'", LayerIntegratedGradients(model, model.model.layers[1]))
    refused("'layer': None", LayerIntegratedGradients(model, None))
    alone = LayerIntegratedGradients(model, model.model.layers[0], multiply_by_inputs=False)
    refused("'multiply_by_inputs': False", alone)
    other = tiny.llama(len(tokenizer), seed=1)
    refused("`weights`", LayerIntegratedGradients(other, other.model.layers[0]))
    with pytest.raises(TypeError, match="did you mean 'n_steps'"):
        attribute_dataset(records, attribution, tmp_path, n_step=5)
    with pytest.raises(TypeError, match="`attribution` is a LayerIntegratedGradients"):
        attribute_dataset(records, method, tmp_path)


def other_template(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = CHAT.replace(": ", " - ")
    return other


def test_changed_corpus_is_refused_in_the_same_folder(attribution, tmp_path):
    texts = [
        f"Dave lives in {place}, {state}." for place, state in zip("ABCD", "WXYZ", strict=True)
    ] * 20
    records = [{"prompt": "Dave lives in E, V.", "target": [7]}]
    kinds = {
        "corpus": lambda texts: CorpusBaselines(texts, min_candidates=0),
        "labels": lambda texts: CorpusBaselines(["Dave"], labels={"x": texts}, min_candidates=0),
        "generator": lambda texts: Infilling(lambda left, right, n: texts),
        "callable": lambda texts: lambda slot, generator: texts[0],
        "object": lambda texts: Fixed(texts),
    }
    for name, make in kinds.items():
        out = tmp_path / name
        assert attribute_dataset(records, attribution, out, baselines=make(texts)).n_written == 1
        # Made again it is the same, also if it has been used.
        used = make(list(texts))
        attribute_dataset(records, attribution, tmp_path / f"{name} used", baselines=used)
        again = attribute_dataset(records, attribution, out, baselines=used)
        assert again.n_skipped == 1, name
        with pytest.raises(ValueError, match=r"of another run.*`baselines`"):
            attribute_dataset(records, attribution, out, baselines=make([*texts[1:], "Ann."]))
        with pytest.raises(ValueError, match=r"of another run.*`baselines`"):
            attribute_dataset(records, attribution, out)


class Fixed:
    """A baseline of the user's own, which remembers what it gave."""

    def __init__(self, texts):
        self.texts, self._given = texts, []

    def __call__(self, slot, generator):
        self._given.append(slot)
        return self.texts[0]


def test_saved_corpus_has_the_same_digest(attribution, tmp_path):
    texts = [f"Dave lives in {place}." for place in "ABCDEFGH"] * 10
    records = [{"prompt": "Dave lives in E.", "target": [7]}]
    baselines = CorpusBaselines(texts, min_candidates=0)
    attribute_dataset(records, attribution, tmp_path / "out", baselines=baselines)
    baselines.save(tmp_path / "index.safetensors")
    loaded = CorpusBaselines.load(tmp_path / "index.safetensors")
    report = attribute_dataset(records, attribution, tmp_path / "out", baselines=loaded)
    assert report.n_skipped == 1


def test_replaced_record_is_detected(attribution, tmp_path):
    records = [
        {"prompt": "Dave lives", "target": [7], "id": "a"},
        {"prompt": "Ann lives", "target": [8], "id": "b", "source": "letters"},
        {"messages": MESSAGES, "target": [5]},
    ]
    attribute_dataset(records, attribution, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in files] == [f"00000{i}.safetensors" for i in range(3)]
    before = [path.read_bytes() for path in files]
    changed = [
        {"prompt": "Dave left", "target": [7], "id": "a"},
        # What a record brings along beside is no part of what was attributed.
        {"prompt": "Ann lives", "target": [8], "id": "b", "source": "mails"},
        {"messages": [*MESSAGES, MESSAGES[1]], "target": torch.tensor([6]), "id": "c"},
    ]
    report = attribute_dataset(changed, attribution, tmp_path)
    assert (report.n_written, report.n_skipped, report.n_failed) == (0, 1, 2)
    [(first, said), (third, other)] = report.failures
    assert (first, third) == (0, 2)
    assert "another record (id 'a'): `prompt` differs" in said
    assert "`messages` and `target` and `id` differ" in other
    assert [path.read_bytes() for path in files] == before
    # Put right, nothing is left of the errors. A tensor is what a file has as a list.
    records[2]["target"] = torch.tensor([5])
    assert attribute_dataset(records, attribution, tmp_path).n_skipped == 3
    assert not list(tmp_path.glob("*.error.json"))


def test_foreign_folder_is_refused(attribution, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"holds results and no run\.json"):
        attribute_dataset(["Dave"], attribution, tmp_path)
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(ValueError, match="not written by this package"):
        attribute_dataset(["Dave"], attribution, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_bad_options_fail_before_any_run(attribution, tmp_path):
    def records():
        pytest.fail("a record was asked for")
        yield ""

    with pytest.raises(TypeError, match="did you mean 'gen_args'"):
        attribute_dataset(records(), attribution, tmp_path, gen_arg={})
    with pytest.raises(ValueError, match="`target` cannot be the same"):
        attribute_dataset(records(), attribution, tmp_path, target="x")
    with pytest.raises(TypeError, match=r"Accelerator"):
        attribute_dataset(records(), attribution, tmp_path, accelerator=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--input", "INPUT"], 2, "--input needs --out"),
        (["--prompt", "x", "--out", "y"], 2, "use --save for one result"),
        (["--input", "INPUT", "--out", "y", "--html", "z"], 2, "--html is for one prompt"),
        (["--input", "INPUT", "--out", "y", "--target", "z"], 2, '"target" in each line'),
        (["--input", "no.jsonl", "--out", "y"], 2, "there is no such file"),
        (["--input", "INPUT", "--out", "y", "--checkpoint", "z"], 2, "the same command resumes"),
        (["--prompt", "x", "--checkpoint", "no/z.safetensors"], 2, "which does not exist"),
    ],
)
def test_command_line_mistakes(tmp_path, monkeypatch, capsys, more, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "INPUT").write_text('"Dave"\n')
    assert main(["attribute", "--model", "demo", *more]) == status
    assert message in capsys.readouterr().err


def _prompts(folder, n):
    path = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{i} Dave lives in Palm", "id": str(i)}) for i in range(n)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _check_all_there(out, n):
    found = results(out)  # a torn file cannot be loaded
    assert [result.provenance["record"]["number"] for result in found] == list(range(n))
    # What a kill left half written is hidden, and taken away by a run that begins a minute later.
    shown = [path for path in out.iterdir() if not path.name.startswith(".")]
    assert {path.suffix for path in shown} == {".safetensors", ".json"}
    assert [path.name for path in out.glob("*.json")] == ["run.json"]


def test_killed_run_resumes(tmp_path):
    n, out = 48, tmp_path / "out"
    arguments = ["attribute", "--model", "demo", "--input", str(_prompts(tmp_path, n)), "--out"]
    command = [sys.executable, "-m", "captum_llm_ext", *arguments, str(out), *OPTIONS]
    chance = random.Random(0)
    for part in range(1, 3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("*.safetensors"))) < part * n // 4:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < len(list(out.glob("*.safetensors"))) < n
    assert main([*arguments, str(out), *OPTIONS]) == 0
    _check_all_there(out, n)


def test_two_processes_divide_the_records(tmp_path):
    """By deletion and by gradients, each on two processes that are forked from one."""
    gradients = ["--method", "integrated-gradients", "--n-steps", "5"]
    commands = {}
    for name, n, method in (("deletion", 40, []), ("gradients", 12, gradients)):
        (tmp_path / name).mkdir()
        records = str(_prompts(tmp_path / name, n))
        commands[name] = ["attribute", "--model", "demo", "--input", records, *OPTIONS, *method]
        arguments = [*commands[name], "--out", str(tmp_path / name / "out")]
        (tmp_path / f"{name}.arguments").write_text(json.dumps(arguments))
    tests = Path(__file__).parent
    ranks = [sys.executable, str(tests / "ranks.py"), "commands", str(tmp_path)]
    paths = {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    subprocess.run(ranks, env=os.environ | paths, timeout=180, check=True)
    for name, (status, _) in json.loads((tmp_path / "commands.json").read_text()).items():
        assert status == 0, (tmp_path / f"{name}.err").read_text()
    for name, n in (("deletion", 40), ("gradients", 12)):
        out = tmp_path / name / "out"
        # One line, from the main process, with the counts of both.
        printed = "".join((tmp_path / f"{name}.{rank}").read_text() for rank in (0, 1))
        assert printed == f"{n} records: {n} written, 0 there already, 0 failed in {out}\n"
        _check_all_there(out, n)
        assert main([*commands[name], "--out", str(tmp_path / name / "alone")]) == 0
        for a, b in zip(results(out), results(tmp_path / name / "alone"), strict=True):
            assert torch.equal(a.token_attr, b.token_attr)


ONE = ["--prompt", "Dave lives in Palm Coast, FL and", "--method", "kernel", "--n-samples", "90"]
ONE += ["--max-new-tokens", "3", "--quiet", "--baselines", "delete"]


def test_two_processes_divide_one_prompt(tmp_path, monkeypatch, capsys):
    """Interrupted on one process, gone on with on two, of which one prints and writes."""
    checkpoint, saved = tmp_path / "half.safetensors", tmp_path / "whole.safetensors"
    command = ["attribute", "--model", "demo", *ONE, "--checkpoint", str(checkpoint)]
    add = Journal.add

    def stop(self, keys, values):
        add(self, keys, values)
        if len(self.found(keys)) and checkpoint.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", stop)
        assert main(command) != 0
    capsys.readouterr()
    n_kept = checkpoint.stat().st_size
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    more = ["--save", str(saved), "--json", "-"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "captum_llm_ext", *command, *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint.stat().st_size > n_kept
    assert done.stderr.count("answer:") == done.stderr.count("written:") == 1
    found = GenerationAttributionResult.load(saved)
    assert (
        json.loads(done.stdout)["provenance"]["rows_by_process"]
        == (found.provenance["rows_by_process"])
    )
    rows = found.provenance["rows_by_process"]
    assert len(rows) == 2
    assert 0 < sum(rows) < found.n_evaluations  # the rest was in the checkpoint
    alone = tmp_path / "alone.safetensors"
    assert main(["attribute", "--model", "demo", *ONE, "--save", str(alone)]) == 0
    expected = GenerationAttributionResult.load(alone)
    torch.testing.assert_close(found.full_attr, expected.full_attr, atol=1e-5, rtol=0)


def test_ungrouped_processes_are_refused(attribution, tmp_path, monkeypatch):
    records = [{"prompt": "Dave lives", "target": [7]}]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(
        UserWarning, match=r"2 processes were started, and 1 of them each attribute all records"
    ):
        attribute_dataset(records, attribution, tmp_path)


def test_stdin_is_refused_with_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["attribute", "--model", "demo", "--prompt-file", "-"]) == 2
    assert "--prompt-file - is one stdin for several processes" in capsys.readouterr().err
