"""Every file that the package writes: whole or not at all, wherever it lies."""

import contextlib
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from captum.attr import FeatureAblation

from captum_llm_ext import (
    CorpusBaselines,
    GenerationAttribution,
    TextSegmentInput,
    attribute_dataset,
)
from captum_llm_ext.base import files
from captum_llm_ext.cli import main
from captum_llm_ext.model import Journal

# Absent is deleted: what comes of it is known.
attribute_dataset = partial(attribute_dataset, baselines="delete")

ROOT = Path(__file__).parents[1]
OLD = b"what was there before"
is_root = os.name == "posix" and os.geteuid() == 0


@pytest.fixture(scope="module")
def attribution():
    tokenizer = tiny.byte_level()
    model = tiny.llama(len(tokenizer))
    return GenerationAttribution(FeatureAblation(model), tokenizer)


@pytest.fixture(scope="module")
def result(attribution):
    inp = TextSegmentInput(
        "Ann sings and Bob sleeps in Rome.", attribution.tokenizer, "word", baselines="delete"
    )
    return attribution.attribute(inp, " golf and chess", output_unit="word")


@pytest.fixture(scope="module")
def saved(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "r.safetensors"
    result.save(path)
    return path


@pytest.fixture
def writers(result, saved):
    """All ways in which the package writes a file: `ending` and what is called with the path."""

    def journal(path):
        kept = Journal(path, {})
        kept.add([bytes(16)] * 40, torch.zeros(40, 400, dtype=torch.float64))
        kept.add([bytes([i]) * 16 for i in range(40)], torch.ones(40, 400, dtype=torch.float64))
        kept.close()

    def show(kind):
        def run(path):
            if status := main(["show", str(saved), f"--{kind}", str(path)]):
                raise OSError(f"status {status}: {path}")

        return run

    corpus = [f"Ann {i} sings." for i in range(2000)]
    return {
        "save": ("", result.save),
        "to_html": (".html", result.to_html),
        "to_json": (".json", lambda path: result.to_json(path, indent=40)),
        "index": ("", CorpusBaselines(corpus).save),
        "checkpoint": (".safetensors", journal),
        "--png": (".png", show("png")),
        "--json": (".json", show("json")),
        "--html": (".html", show("html")),
    }


NAMES = ["save", "to_html", "to_json", "index", "checkpoint", "--png", "--json", "--html"]
of_every_kind = pytest.mark.parametrize("name", NAMES)
of_every_quick_kind = pytest.mark.parametrize("name", [name for name in NAMES if name != "--png"])


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@of_every_kind
def test_permissions_follow_the_old_file_or_the_umask(writers, tmp_path, umask, name):
    ending, write = writers[name]
    write(tmp_path / f"new{ending}")
    assert mode(tmp_path / f"new{ending}") == 0o666 & ~umask
    os.chmod(tmp_path / f"new{ending}", 0o604)
    write(tmp_path / f"new{ending}")
    assert mode(tmp_path / f"new{ending}") == 0o604
    assert [path.name for path in tmp_path.iterdir()] == [f"new{ending}"]


@of_every_quick_kind
def test_symlink_is_kept_and_its_target_written(writers, tmp_path, name):
    ending, write = writers[name]
    (tmp_path / "there").mkdir()
    link, target = tmp_path / f"link{ending}", tmp_path / "there" / f"target{ending}"
    link.symlink_to(f"second{ending}")
    (tmp_path / f"second{ending}").symlink_to(target)
    for _ in range(2):  # to nothing at first, then to a file
        write(link)
        assert link.is_symlink()
        assert (tmp_path / f"second{ending}").is_symlink()
        assert target.stat().st_size > 1000
        assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.fixture(scope="module")
def mounted(tmp_path_factory):
    """A disk of 64 kB."""
    at = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(at)]
    if not (is_root and sys.platform == "linux"):
        pytest.skip("only root can mount a small disk")
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")
    yield at
    subprocess.run(["umount", str(at)], check=True)


@pytest.fixture
def small_disk(mounted):
    yield mounted
    for path in mounted.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@of_every_kind
def test_full_disk_keeps_the_old_file(writers, small_disk, name):
    ending, write = writers[name]
    path = small_disk / f"file{ending}"
    if name == "checkpoint":  # which is read first
        Journal(path, {})
    else:
        path.write_bytes(OLD)
    expected = path.read_bytes()
    with contextlib.suppress(OSError), open(small_disk / "rest", "wb", buffering=0) as rest:
        while True:
            rest.write(bytes(4096))
    with pytest.raises(OSError) as caught:
        write(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == expected
    assert sorted(os.listdir(small_disk)) == sorted([path.name, "rest"])


@of_every_quick_kind
def test_disk_filling_up_keeps_the_old_file(writers, tmp_path, name):
    """As with the limit that a shell sets: the first bytes can be written, not all."""
    ending, write = writers[name]
    path = tmp_path / f"file{ending}"
    if name == "checkpoint":
        Journal(path, {})
    else:
        path.write_bytes(OLD)
    expected = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == expected
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@of_every_kind
def test_ctrl_c_keeps_the_old_file_and_no_temporary(writers, tmp_path, monkeypatch, name):
    ending, write = writers[name]
    path = tmp_path / f"file{ending}"
    if name == "checkpoint":
        Journal(path, {})
    else:
        path.write_bytes(OLD)
    expected = path.read_bytes()
    for function in ("fsync", "replace"):

        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, function, interrupted)
            if name.startswith("--"):
                with pytest.raises(OSError, match="status 130"):
                    write(path)
            else:
                with pytest.raises(KeyboardInterrupt):
                    write(path)
        assert path.read_bytes() == expected
        assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_ctrl_c_at_any_moment(tmp_path):
    """A real signal, at some moment of many writings: the old content or the new one."""
    path = tmp_path / "file"
    files.write(path, b"0" * 100_000)
    code = (
        "import signal, sys; from captum_llm_ext.base import files\n"
        # A shell has what it starts in the background ignore the signal, and so all of its own.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('go', flush=True)\n"
        "for i in range(10_000): files.write(sys.argv[1], bytes([48 + i % 10]) * 100_000)\n"
    )
    for wait in (0.01, 0.03, 0.06):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert process.stdout.readline() == b"go\n"
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        content = path.read_bytes()
        assert content == content[:1] * 100_000
        assert os.listdir(tmp_path) == ["file"]


def test_umask_is_thread_safe(tmp_path, umask):
    """Nobody else's file gets other permissions meanwhile."""
    stop = threading.Event()
    modes = set()

    def other():
        number = 0
        while not stop.is_set():
            number += 1
            with open(tmp_path / f"other{number % 50}", "wb"):
                pass
            modes.add(mode(tmp_path / f"other{number % 50}"))
            os.unlink(tmp_path / f"other{number % 50}")

    thread = threading.Thread(target=other)
    thread.start()
    for _ in range(100):
        files.write(tmp_path / "file", "x")
    stop.set()
    thread.join()
    assert modes == {0o666 & ~umask}


def test_bare_and_long_file_names(tmp_path, monkeypatch, result):
    monkeypatch.chdir(tmp_path)
    result.to_html("page.html")
    files.write("n" * 255, "x")
    files.write("ü" * 127, ["a", b"b", memoryview(b"c"), ""])
    assert Path("ü" * 127).read_bytes() == b"abc"
    assert sorted(os.listdir()) == sorted(["page.html", "n" * 255, "ü" * 127])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("missing/file", FileNotFoundError),
        (".", IsADirectoryError),
        ("plain/file", NotADirectoryError),
        ("loop", OSError),
    ],
)
def test_write_error_names_the_path(tmp_path, name, kind):
    (tmp_path / "plain").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(kind) as caught:
        files.write(tmp_path / name, "x")
    assert caught.value.filename == str(tmp_path / name)
    if name != "loop":
        with pytest.raises(OSError) as caught:
            files.check_place(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before


def run(code, *arguments, **more):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        **more,
    )


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("redirected", [False, True])
def test_dev_stdout_is_written_at_its_position(tmp_path, name, redirected):
    code = (
        "import sys; from captum_llm_ext.base import files\n"
        "print('before'); files.check_place(sys.argv[1]); files.write(sys.argv[1], 'within\\n')\n"
        "print('after')"
    )
    (tmp_path / "link").symlink_to("/dev/stdout")
    name = tmp_path / "link" if name == "link" else name
    if not redirected:
        done = run(code, name)
        found = done.stdout
    else:
        out = tmp_path / "out"
        out.write_text("a header\n")
        with open(out, "ab") as file:
            done = subprocess.run(
                [sys.executable, "-c", code, str(name)],
                stdout=file,
                stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                check=False,
            )
        found = out.read_bytes().removeprefix(b"a header\n")
    assert done.stderr == b""
    assert found.split() == [b"before", b"within", b"after"]


@of_every_quick_kind
def test_named_pipe_is_written_directly(writers, tmp_path, name):
    if name == "checkpoint":
        pytest.skip("a checkpoint is read again")
    ending, write = writers[name]
    pipe, got = tmp_path / f"pipe{ending}", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write(pipe)
    reader.join(timeout=20)
    write(tmp_path / f"file{ending}")
    assert len(got[0]) == (tmp_path / f"file{ending}").stat().st_size
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    write("/dev/null")


@pytest.mark.skipif(not is_root, reason="only root can become somebody else")
def test_writable_file_in_read_only_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path, *tmp_path.parents[:3]):
        os.chmod(path, 0o755)
    (folder / "mine").write_bytes(OLD * 100)
    (folder / "other").write_bytes(OLD)
    os.chmod(folder / "mine", 0o666)
    os.chmod(folder / "other", 0o644)
    code = (
        "import os, resource, sys, pathlib\n"
        "sys.path[:0] = [sys.argv[2]]\n"
        "from captum_llm_ext.base import files\n"
        "folder = pathlib.Path(sys.argv[1]); os.setuid(65534)\n"
        "files.check_place(folder / 'mine'); files.write(folder / 'mine', b'new')\n"
        "assert (folder / 'mine').read_bytes() == b'new'\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))\n"
        "try: files.write(folder / 'mine', bytes(2000))\n"
        "except OSError as error: print(error, flush=True)\n"
        "assert (folder / 'mine').read_bytes() == b'new'\n"
        "for check in (files.check_place, lambda path: files.write(path, b'x')):\n"
        "    for name in ('other', 'third'):\n"
        "        try: check(folder / name)\n"
        "        except PermissionError as error: print(error)\n"
    )
    done = run(code, folder, ROOT)
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert "File too large" in lines[0]
    assert [line.rpartition("/")[2] for line in lines] == ["mine'", *["other'", "third'"] * 2]
    assert mode(folder / "mine") == 0o666
    assert sorted(os.listdir(folder)) == ["mine", "other"]


@pytest.mark.skipif(not is_root, reason="only root can give a file away")
def test_file_owner_is_kept(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    os.chown(path, 1234, 2345)
    os.chmod(path, 0o640)
    files.write(path, b"new")
    found = path.stat()
    assert (found.st_uid, found.st_gid, mode(path)) == (1234, 2345, 0o640)


def test_mounted_file_is_written_in_place(tmp_path, monkeypatch):
    """As a container mounts a single file: its name cannot be given to another."""
    path = tmp_path / "file"
    path.write_bytes(OLD)
    before = path.stat().st_ino

    def busy(*_):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "replace", busy)
    files.write(path, b"new")
    assert (path.read_bytes(), path.stat().st_ino) == (b"new", before)
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(OSError, match="busy"):
        files.write(tmp_path / "another", b"new")


def test_dataset_resumes_after_a_full_disk(attribution, small_disk, tmp_path):
    """What could not be written is not there; what was there is."""
    records = [{"prompt": f"Ann {i} sings.", "target": " golf"} for i in range(12)]
    (small_disk / "filler").write_bytes(bytes(40 * 1024))
    out = small_disk / "results"
    with pytest.raises(OSError, match="results"):
        attribute_dataset(records, attribution, out)
    there = sorted(path.name for path in out.iterdir())
    assert "run.json" in there
    assert not any(name.startswith(".") for name in there)
    (small_disk / "filler").unlink()
    report = attribute_dataset(records[:5], attribution, out)
    assert (report.n_skipped, report.n_failed) == (len(there) - 1, 0)
    assert report.n_written == 5 - report.n_skipped


def test_stale_temporary_file_is_removed(tmp_path):
    path = tmp_path / "run.safetensors"
    old = tmp_path / ".run.safetensors.0123456789abcdef.tmp"
    young = tmp_path / ".run.safetensors.fedcba9876543210.tmp"
    others = tmp_path / ".other.safetensors.0123456789abcdef.tmp"
    for file in (old, young, others):
        file.write_bytes(OLD)
    for file in (old, others):
        os.utime(file, (time.time() - 3600,) * 2)
    Journal(path, {})
    assert {p.name for p in tmp_path.iterdir()} == {path.name, young.name, others.name}
