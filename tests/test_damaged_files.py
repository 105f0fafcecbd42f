"""Damaged files of every kind: the same numbers as ever, or one error that says so."""

import json
import random
import re
import shutil
import warnings
from pathlib import Path

import damaged_bytes
import pytest
import safetensors.torch
import tiny
import torch
from captum.attr import KernelShap

from captum_llm_ext import (
    CorpusBaselines,
    GenerationAttribution,
    GenerationAttributionResult,
    TextSegmentInput,
)
from captum_llm_ext.model import Journal

DATA = Path(__file__).parent / "data"
N_EACH = 170
ABOUT = {"model": "tiny", "target": "é", "seed": 3, "settings": {"n": [1, 2]}}
RESULT, CHECKPOINT, INDEX = (
    "captum_llm_ext",
    "captum_llm_ext_checkpoint",
    "captum_llm_ext_index",
)
KEYS = {
    **{f"result {version}": RESULT for version in (1, 2, 3, 4)},
    "checkpoint": CHECKPOINT,
    "index": INDEX,
}
WITHOUT_DIGEST = ("result 1", "result 2")
KEYS_OF_ROWS = [bytes([i]) * 16 for i in range(20)]


def journal(path):
    return Journal(path, ABOUT)


def fill(path):
    kept = journal(path)
    kept.keep_target(torch.tensor([5, 6, 7]))
    kept.budget(1000)
    draw = torch.Generator().manual_seed(0)
    kept.add(KEYS_OF_ROWS[:12], torch.randn(12, 3, generator=draw, dtype=torch.float64))
    kept.add(KEYS_OF_ROWS[12:], torch.randn(8, 2, generator=draw, dtype=torch.float64))
    kept.close()


def held_by_result(path, unverified=True):
    result = GenerationAttributionResult.load(path, unverified=unverified)
    tensors = {name: getattr(result, name) for name in ("values", "masks", "draws", "full_attr_se")}
    assert str(result.table())  # what is loaded can be used
    return [json.dumps(result.to_dict()), str(result.design)], tensors


def held_by_checkpoint(path):
    kept = journal(path)
    found = kept.found(KEYS_OF_ROWS)
    assert [*found] == [*range(20)]
    return [kept.budget(0)], {**{str(i): values for i, values in found.items()}, "t": kept.target}


def held_by_index(path):
    loaded = CorpusBaselines.load(path)
    index = loaded._index
    tensors = {**vars(index._vocabulary), **vars(index._postings), "numbers": index._numbers}
    told = [loaded.match, loaded.seed, loaded.min_occurrences, loaded._labels.texts]
    return told, {**tensors, "classes": index._classes, "documents": index._atoms.documents}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good file of every kind."""
    at = tmp_path_factory.mktemp("good")
    for version in (1, 2, 3):
        shutil.copy(DATA / f"result_format_{version}.safetensors", at / f"result {version}")
    tokenizer = tiny.byte_level()
    attribution = GenerationAttribution(KernelShap(tiny.llama(len(tokenizer))), tokenizer)
    inp = TextSegmentInput(
        "Ann sings. Bob sleeps.", tokenizer, ("sentence", "word"), baselines="delete"
    )
    attribution.attribute(inp, " golf", n_samples=30).save(at / "result 4")
    fill(at / "checkpoint.safetensors")
    (at / "checkpoint.safetensors").rename(at / "checkpoint")
    corpus = [f"{name} lives in {city}." for name in ("Ann", "Bob") for city in ("Rome", "Bari")]
    CorpusBaselines(corpus, labels={"city": ["Rome", "Bari"]}).save(at / "index")
    return {name: (at / name).read_bytes() for name in KEYS}


def held(kind, path):
    """What a file holds, and whether it was warned of that not all damage to it can be told."""
    reader = {"r": held_by_result, "c": held_by_checkpoint, "i": held_by_index}[kind[0]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = reader(path)
    said = [str(warning.message) for warning in caught]
    assert all("has no digest" in one and repr(str(path)) in one for one in said), said
    assert len(said) <= 1
    return found, bool(said)


def is_same(one, other):
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(damaged_bytes.same(tensor, other[1][name]) for name, tensor in one[1].items())
    )


@pytest.mark.parametrize("number", range(len(KEYS)), ids=KEYS)
def test_damaged_file_is_refused_or_reads_the_same(good, tmp_path, number):
    kind = [*KEYS][number]
    path = tmp_path / "file.safetensors"
    path.write_bytes(good[kind])
    expected, is_warned = held(kind, path)
    has_digest = kind not in WITHOUT_DIGEST
    assert is_warned != has_digest
    others = [whole for name, whole in good.items() if name != kind]
    told = same = 0
    for how, content in damaged_bytes.mutants(good[kind], KEYS[kind], N_EACH, number, others):
        path.write_bytes(content)
        try:
            found, is_warned = held(kind, path)
        except ValueError as error:
            message = str(error)
            assert repr(str(path)) in message, (how, message)
            assert "give " in message or "update captum-llm-ext" in message, (how, message)
            told += 1
        else:
            # Another whole file in its place is what it is.
            is_as_ever = is_same(found, expected) or content in others
            assert is_as_ever or is_warned, how
            assert not has_digest or is_as_ever, how
            same += is_as_ever
    assert told > (0.8 if has_digest else 0.5) * N_EACH
    assert told + same <= N_EACH


@pytest.mark.parametrize("kind", WITHOUT_DIGEST)
def test_file_without_digest_needs_unverified(good, tmp_path, kind):
    path = tmp_path / "file.safetensors"
    for _, content in [("", good[kind]), *damaged_bytes.mutants(good[kind], KEYS[kind], N_EACH, 9)]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(repr(str(path)))) as caught:
            held_by_result(path, unverified=False)
        assert "give " in str(caught.value) or "update captum-llm-ext" in str(caught.value)


@pytest.mark.parametrize("kind", KEYS)
def test_every_changed_byte_is_detected(good, tmp_path, kind):
    """One byte after another, where there is a digest; blanks of the header alone do not."""
    if kind in WITHOUT_DIGEST:
        pytest.skip("these formats have no digest")
    path = tmp_path / "file.safetensors"
    path.write_bytes(good[kind])
    (expected, _), whole = held(kind, path), good[kind]
    header = 8 + int.from_bytes(whole[:8], "little")
    draw, n_same = random.Random(0), 0
    for at in draw.sample(range(len(whole)), 150):
        torn = bytearray(whole)
        torn[at] ^= 1 << draw.randrange(8)
        path.write_bytes(torn)
        try:
            found, _ = held(kind, path)
        except ValueError:
            continue
        n_same += 1
        assert at < header
        assert is_same(found, expected)
    assert n_same < 15


@pytest.mark.parametrize("kind", KEYS)
def test_invalid_content_with_valid_digest_is_refused(good, tmp_path, kind):
    """What another program might have written: JSON of another kind in a file that is whole."""
    path, draw = tmp_path / "file.safetensors", random.Random(1)
    told: list[str] = []
    for _ in range(120):
        content = damaged_bytes.retold(
            good[kind], KEYS[kind], lambda c: damaged_bytes.mutated_json(draw, c)
        )
        path.write_bytes(content)
        try:
            held(kind, path)
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 30
    assert all(repr(str(path)) in message for message in told)


@pytest.mark.parametrize("kind", KEYS)
def test_safetensors_reader_reads_the_same(good, kind):
    """Held against the safetensors package: names, types, shapes, numbers, places."""
    found = safetensors.torch.load(good[kind])
    header, _ = damaged_bytes.split(good[kind])
    assert found.keys() | {"__metadata__"} == header.keys()
    if kind != "result 1":
        text = header["__metadata__"][KEYS[kind]]
        if "sha256" in header["__metadata__"]:
            assert damaged_bytes.digest(found, text) == header["__metadata__"]["sha256"]
    for name, tensor in found.items():
        assert header[name]["shape"] == list(tensor.shape)


def test_loaded_tensors_survive_file_changes(good, tmp_path):
    """A file that changes, grows shorter or goes away changes nothing that was read from it."""
    for kind in ("result 3", "result 4", "checkpoint"):
        path = tmp_path / "file.safetensors"
        path.write_bytes(good[kind])
        if kind == "checkpoint":
            kept = journal(path)
            before = {i: v.clone() for i, v in kept.found(KEYS_OF_ROWS).items()}
        else:
            result = GenerationAttributionResult.load(path)
            before = json.dumps(result.to_dict())
        for content in (bytes(len(good[kind])), good["result 1"], b""):
            path.write_bytes(content)
            if kind == "checkpoint":
                found = kept.found(KEYS_OF_ROWS)
                assert all(torch.equal(found[i], before[i]) for i in before)
            else:
                assert json.dumps(result.to_dict()) == before
    # Each tensor holds itself alone: to send one is not to send the file.
    assert result.seq_attr.untyped_storage().nbytes() == result.seq_attr.nbytes


def test_checkpoint_without_digest_is_refused(good, tmp_path):
    path = tmp_path / "old.safetensors"
    header, _ = damaged_bytes.split(good["checkpoint"])
    rest = json.loads(header["__metadata__"][CHECKPOINT]) | {"format": 1}
    tensors = safetensors.torch.load(good["checkpoint"])
    safetensors.torch.save_file(tensors, path, {CHECKPOINT: json.dumps(rest)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"by an earlier version.*delete it to begin again"):
        journal(path)
    assert path.read_bytes() == before
