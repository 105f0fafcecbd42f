"""Several processes, real ones with gloo: the same numbers, and no process left waiting."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import tiny
import torch
from captum.attr import FeatureAblation
from test_prefix_reuse import make_rows

from captum_llm_ext import GenerationAttribution, GenerationAttributionResult, attribute_dataset
from captum_llm_ext.attribution import sampling
from captum_llm_ext.base.digest import digest
from captum_llm_ext.coalitions import Solution, permutations
from captum_llm_ext.model import Scorer
from captum_llm_ext.model.forward.schedule import plan
from captum_llm_ext.model.processes import store
from captum_llm_ext.model.scoring import scorer
from captum_llm_ext.model.scoring.shards import shards

# Absent is deleted: what comes of it is known.
attribute_dataset = partial(attribute_dataset, baselines="delete")

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
EFFORT = 1e6
each_number = pytest.mark.parametrize("n", [2, 4])


def torchrun(n, what, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={n}", str(ROOT / "tests/ranks.py"), what, str(folder)]
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False
    )


def start(what, folder, **environment):
    command = [sys.executable, str(ROOT / "tests/ranks.py"), what, str(folder)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT | environment, **output)


@pytest.fixture(scope="module")
def alone():
    return ranks.all_cases()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("ranks")
    ranks.make()[0].save_pretrained(at / "model")
    for n in (2, 4):  # interrupted in the middle, in this one process
        model, tokenizer = ranks.make()
        passes = []

        def stop(n_rows, passes=passes):
            # What is looked at first is one row or two, and sixteen once: the rest is scored.
            passes += [n_rows] * (2 < n_rows < 16)
            if len(passes) == 4:
                raise KeyboardInterrupt

        ranks.replace_forward(model, stop)
        with pytest.raises(KeyboardInterrupt):
            ranks.attribute(model, tokenizer, "KernelShap", checkpoint=at / f"half {n}.safetensors")
    torch.save(ranks.many_rows(at), at / "many.pt")
    return at


@pytest.fixture(scope="module")
def found(folder):
    """By number of processes, what each of them has."""
    printed, _ = start("groups_of_two_and_four", folder).communicate(timeout=500)
    assert not printed
    everything = {}
    for n in (2, 4):
        for name, (status, _) in json.loads((folder / f"group of {n}.json").read_text()).items():
            assert status == 0, (folder / name).read_text()[-6000:]
        everything[n] = [
            torch.load(folder / f"{n}.{rank}.pt", weights_only=False) for rank in range(n)
        ]
    return everything


def same(found, expected, tolerance=1e-6):
    for name in ("masks", "target", "n"):
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name]))
    for name in ("values", "full_attr", "seq_attr"):
        torch.testing.assert_close(
            found[name], expected[name], atol=tolerance, rtol=0, equal_nan=True
        )


@each_number
@pytest.mark.parametrize("case", [*ranks.CASES, "by the model", "generated"])
def test_every_process_has_the_single_process_result(found, alone, n, case):
    for own in found[n]:
        same(own["cases"][case], alone[case])


@each_number
@pytest.mark.parametrize("what", ["trace", "total effect", "smile", "counterfactuals"])
def test_every_process_has_the_single_process_generations(found, alone, n, what):
    for own in (own["cases"]["answers"] for own in found[n]):
        torch.testing.assert_close(own[what], alone["answers"][what], atol=1e-5, rtol=0)
        assert own["written"] == alone["answers"]["written"]
        assert sum(count > 0 for count in own["rows"]) > 1


@each_number
def test_every_process_scores_a_share_of_the_rows(found, n):
    for own in found[n]:
        rows = own["cases"]["FeatureAblation"]["rows"]
        assert len(rows) == n
        assert sum(rows) == own["cases"]["FeatureAblation"]["n"]
        assert sum(count > 0 for count in rows) > 1


@each_number
def test_error_on_one_process_is_raised_on_all(found, n):
    for own in found[n]:
        message, *notes = own["failures"]["raised"]
        assert message == "KeyError('broken here')"
        assert any(f"rank {n - 1} of {n}" in note for note in notes)
        assert own["failures"]["seconds"] < 20
    foreign = "\n".join(found[n][0]["failures"]["raised"])
    assert "in fail" in foreign  # where it was


@each_number
def test_out_of_memory_on_one_process_shrinks_all_batches(found, alone, n):
    for own in found[n]:
        # Batches are others then, and so are last digits.
        same(own["failures"]["memory"], alone["KernelShap"], tolerance=1e-4)


@each_number
def test_unequal_arguments_are_refused(found, alone, n):
    for rank, own in enumerate(found[n]):
        assert "has other rows to score than the main one" in own["failures"]["seed"], rank
        assert "`n_samples` is -1" in own["failures"]["argument"]
        same(own["failures"]["afterwards"], alone["KernelShap"])


@each_number
def test_checkpoint_resumes_on_another_number_of_processes(found, alone, n):
    for own in found[n]:
        resumed = own["resumed"]
        same(resumed, alone["KernelShap"])
        assert 0 < sum(resumed["rows"]) < resumed["n"]


@each_number
def test_large_checkpoint_resumes(found, folder, n):
    expected = torch.load(folder / "many.pt", weights_only=False)
    assert expected["n"] > 350
    for own in found[n]:
        same(own["many rows"], expected)
        assert sum(own["many rows"]["rows"]) == 0  # nothing was left to be scored


@each_number
def test_objects_larger_than_the_store_limit_are_sent_in_pieces(found, n):
    """24 MB at once, and a solution of 5,000 features and 1,000 tokens: 80 MB."""
    column = torch.arange(3_000_000, dtype=torch.float64).view(1000, 3000)[:, 7]
    decided = (column, torch.arange(3_000_000, dtype=torch.float64), "x" * 9**7)
    solution = Solution.joined([ranks.large_part(number) for number in range(4)])
    expected = [digest([*decided]), digest([*vars(solution).values()])]
    assert all(own["large"] == expected for own in found[n])


VIEWS = {
    "a row": lambda t: t[3],
    "a column": lambda t: t[:, 3],
    "expanded": lambda t: t[:1, :2].expand(50, 2),
    "none of it": lambda t: t[:0],
    "one number": lambda t: t[3, 3],
    "as bits": lambda t: t[3].view(torch.int64),
    "in half": lambda t: t[3].to(torch.bfloat16)[:7],
    "booleans": lambda t: (t > 0)[3],
}


@pytest.mark.parametrize("name", VIEWS)
def test_tensor_view_is_sent_without_its_base(name):
    whole = torch.randn(1000, 1000, dtype=torch.float64)
    view = VIEWS[name](whole)
    pieces = store._pieces({"of": [view, (view,)]})
    assert sum(map(len, pieces)) < 2 * view.nbytes + 1000
    sent = pickle.loads(b"".join(pieces)[store._COUNT :])["of"]
    assert torch.equal(sent[0], view)
    assert sent[0].dtype == view.dtype
    assert sent[0] is sent[1][0]
    sent[0].add_(1) if sent[0].dtype != torch.bool else sent[0].logical_not_()  # it is its own


@each_number
def test_sharded_models(found, alone, n):
    for own in found[n]:
        for case in ("FeatureAblation", "KernelShap", "generated"):
            # Sums over parts of a layer are taken in another order.
            same(own["sharded"][case], alone[case], tolerance=2e-4)
            assert len(own["sharded"][case]["rows"]) == n // 2
        assert (
            "sharded across 2 processes, and gradients need it whole"
            in (own["sharded"]["gradients"])
        )


@each_number
def test_records_are_distributed_exactly_once(found, folder, n):
    for own in found[n]:
        first, *others = own["dataset"]
        if n == 2:
            assert first[:2] == [20, 0]
        for other in others:
            assert other[:2] == [0, 20]
            [(number, error)] = other[2]
            assert number == 7
            assert "the prompt is empty" in error
    check_folder(folder / "results", 21, failed=7)


def check_folder(folder, n, failed):
    names = sorted(path.name for path in folder.iterdir())
    kinds = ["error.json" if i == failed else "safetensors" for i in range(n)]
    assert names == [*(f"{i:06d}.{kind}" for i, kind in enumerate(kinds)), "run.json"]


def test_records_are_distributed_over_sharded_models(found, folder):
    """Two processes with one model, four with two, then this one with it whole: one folder."""
    for n, written, there in ((2, 8, 0), (4, 8, 8)):
        for own in found[n]:
            *counts, [(number, error)] = own["sharded"]["dataset"]
            assert counts == [written, there]
            assert (number, "the prompt is empty" in error) == (5, True)
    out = folder / "sharded results"
    check_folder(out, 17, failed=5)
    model, tokenizer = ranks.make()
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    some = [*ranks.records(16)[:5], {"prompt": ""}, *ranks.records(16)[5:]]
    again = attribute_dataset(some, attribution, out)
    assert (again.n_written, again.n_skipped, again.n_failed) == (0, 16, 1)
    alone = attribute_dataset(some, attribution, folder / "alone")
    assert alone.n_written == 16
    for path in sorted(out.glob("*.safetensors")):
        shared = GenerationAttributionResult.load(path)
        own = GenerationAttributionResult.load(folder / "alone" / path.name)
        torch.testing.assert_close(shared.full_attr, own.full_attr, atol=2e-4, rtol=0)


@each_number
def test_different_weights_are_refused(found, n):
    for own in found[n]:
        assert "other settings than the main one (`weights` was" in own["other weights"]


def test_error_names_the_process(tmp_path):
    run = torchrun(2, "raising", tmp_path)  # which fails if one waits for the other
    assert run.returncode != 0
    assert run.stderr.count("ZeroDivisionError: no luck") >= 2  # on both
    assert "Raised on rank 1 of 2" in run.stderr


def test_exited_process_is_not_waited_for(tmp_path):
    printed, _ = start("killed_in_turn", tmp_path).communicate(timeout=180)
    assert not printed
    ends = json.loads((tmp_path / "killed.json").read_text())
    for dies in (0, 1):
        assert ends[f"{dies}.{dies}"][0] == -signal.SIGKILL
        status, after = ends[f"{dies}.{1 - dies}"]
        assert status == 3
        assert after < 45  # less than it is waited for without a connection
        # The first one holds the store: without it nothing can be asked.
        expected = "rank 1 has not reported" if dies else "store of the process group cannot"
        assert expected in (tmp_path / f"{dies}.{1 - dies}").read_text()


def test_abandoned_pass_ends_on_all_processes(folder):
    """Two processes hold a model together, and one of them does not come to the next sum."""
    printed, _ = start("half_passes", folder).communicate(timeout=120)
    assert not printed
    ends = json.loads((folder / "half passes.json").read_text())
    found = {name: (folder / name).read_text() for name in ends}
    # Where the other one ends, its error is found in place of that of the connection …
    assert "raised KeyError: 'broken here'" in found["raised.0"]
    assert "Raised on rank 1 of 2" in found["raised.0"]
    assert "raised KeyError: 'broken here'" in found["raised.1"]
    assert "some of which are still in a pass" in found["raised.1"]
    # … where it is killed there is that one alone …
    assert "raised RuntimeError" in found["killed.0"]
    # … and where it neither goes on nor ends, there is no way to have an error raised.
    assert "rank 0 ends itself" in found["caught.0"]
    assert "rank 1 failed (KeyError: 'broken here')" in found["caught.0"]
    assert "rank 1 has not reported for 3 seconds" in found["stopped.0"]
    assert "failed in the middle of a pass" in found["caught.1"]  # what is asked of it afterwards
    assert {name: status for name, (status, _) in ends.items()} == {
        "raised.0": 3,
        "raised.1": 3,
        "killed.0": 3,
        "killed.1": -signal.SIGKILL,
        "caught.0": 1,
        "caught.1": 3,
        "stopped.0": 1,
        "stopped.1": -signal.SIGKILL,
    }


def kill_at_random(what, folder, grows, times, seed):
    """Starts it and kills it as often, each time somewhen after what it writes has grown."""
    draw = random.Random(seed)
    for _ in range(times):
        before = grows()
        process = start(what, folder)
        until = time.monotonic() + 60
        while grows() == before and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(draw.random())
        process.kill()
        process.communicate()


def test_killed_run_resumes_bit_for_bit(tmp_path):
    model, tokenizer = ranks.make()
    expected = ranks.attribute(model, tokenizer, "ShapleyValueSampling", n_samples=60)
    checkpoint = tmp_path / "long.safetensors"
    kill_at_random("long_run", tmp_path, lambda: size(checkpoint), 2, seed=1)
    assert not (tmp_path / "long.pt").exists()
    n_kept = n_rows_kept(checkpoint)
    assert 0 < n_kept < expected.n_evaluations
    passes = []
    ranks.replace_forward(model, passes.append)
    result = ranks.attribute(
        model, tokenizer, "ShapleyValueSampling", n_samples=60, checkpoint=checkpoint
    )
    for name in ("masks", "values", "full_attr", "full_attr_se", "empty_values", "seq_attr"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    assert result.n_evaluations == expected.n_evaluations
    # Beside the rows that were missing: what the probe looks at, which is packs at first and then
    # batches, for these are what is used; the prompt, a comparison, and a row of the checkpoint.
    assert sum(passes) <= expected.n_evaluations - n_kept + 52


def size(path):
    return path.stat().st_size // 20_000 if path.exists() else 0


def n_rows_kept(path):
    from safetensors.torch import load_file

    return sum(len(t) for name, t in load_file(path).items() if name.startswith("rows."))


@pytest.mark.parametrize(
    ("environment", "advice"),
    [
        ({"WORLD_SIZE": "2"}, r"Accelerator\(cpu=True\)"),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, "torchrun"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({}, None),
    ],
)
def test_unused_launcher_processes_are_warned_of(
    model, tokenizer, monkeypatch, environment, advice
):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    one = SimpleNamespace(num_processes=1, process_index=0)
    if advice is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GenerationAttribution(FeatureAblation(model), tokenizer, accelerator=one)
    else:
        with pytest.warns(UserWarning, match=advice):
            GenerationAttribution(FeatureAblation(model), tokenizer, accelerator=one)


def test_non_accelerator_is_refused(model, tokenizer):
    with pytest.raises(TypeError, match=r"give an `accelerate.Accelerator`"):
        GenerationAttribution(FeatureAblation(model), tokenizer, accelerator=2)
    several = SimpleNamespace(num_processes=2, process_index=0)
    with pytest.raises(ValueError, match="no torch process group"):
        GenerationAttribution(FeatureAblation(model), tokenizer, accelerator=several)


def test_work_shares_cover_batches_once_in_falling_size():
    rows = [tuple(range(i, i + 20)) for i in range(64)]
    root = plan(
        rows,
        [0] * 64,
        overhead=1,
        most_padding=0,
        most_rows=lambda longest, before: 2,
    )
    parts = shards(root, [20] * 64, 4, overhead=1)
    batches = [batch for part in parts for branch in part.walk() for batch in branch.batches]
    assert sorted(batches) == sorted(root.batches)
    sizes = [sum(len(b.batches) for b in part.walk()) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 4  # an eighth of all
    assert sizes[-1] == 1


def test_shared_prefix_tree_is_bit_identical(monkeypatch):
    model = tiny.llama()
    rows, target = make_rows(n_prompt=30)
    expected = Scorer(model, overhead=3, reuse="copy").values(rows, target)

    def as_for_four(root, lengths, n, *, overhead):
        parts = shards(root, lengths, 4, overhead=overhead)
        assert len(parts) > 4
        return parts

    monkeypatch.setattr(scorer, "shards", as_for_four)
    again = Scorer(model, overhead=3, reuse="copy").values(rows, target)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("name", ["KernelShap", "ShapleyValueSampling", "Lime", "FeatureAblation"])
def test_solving_targets_by_process_equals_solving_jointly(monkeypatch, name):
    """With an effort that does not reach for all, each has its share of it and no more."""
    monkeypatch.setattr(permutations, "EFFORT", EFFORT)
    found = []

    def solve(*arguments):
        found.append(arguments)
        return outcome_of(*arguments)

    outcome_of = sampling.solved
    monkeypatch.setattr(sampling, "solved", solve)
    ranks.attribute(*ranks.make(), name)
    [(played, method, plan, values), *_] = found  # the whole answer may be solved after it
    solver = partial(method.solve, effort=EFFORT) if name == "KernelShap" else method.solve
    whole = solver(plan, values, played.scope)
    cuts = [slice(0, 1), slice(1, 4), slice(4, None)]
    parts = [solver(plan, values[:, cut], played.scope.part(cut)) for cut in cuts]
    joined = type(whole).joined(parts)
    for field in ("attributions", "standard_errors", "full_values", "empty_values"):
        torch.testing.assert_close(
            getattr(joined, field), getattr(whole, field), atol=1e-9, rtol=0, equal_nan=True
        )
