"""The index of a corpus, held against plain scans of it, and what it is read from and kept in."""

import copy
import errno
import functools
import gzip
import json
import os
import pickle
import random
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_llm_ext.text.baselines import words
from captum_llm_ext.text.baselines.corpus import index as index_module
from captum_llm_ext.text.baselines.corpus import reader as reading
from captum_llm_ext.text.baselines.corpus.documents import documents
from captum_llm_ext.text.baselines.corpus.index import CorpusIndex, Spans
from captum_llm_ext.text.baselines.corpus.postings import Postings
from captum_llm_ext.text.baselines.corpus.vocabulary import Numbering

PEOPLE = "Dave Anna Tom Beth Carl Cora Ivan Dina".split()
JOBS = "lawyer nurse pilot baker singer farmer".split()
CITIES = "Reno Boston Tulsa Salem Dover".split()


def biographies(n, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        told = [
            f"{rng.choice(PEOPLE)} lives in {rng.choice(CITIES)}, {rng.choice(('FL', 'NC'))}.",
            f"{rng.choice(('He', 'She'))} is a {rng.choice(JOBS)}!",
            f"At {rng.randint(20, 70)} all is (quite) well.",
        ]
        rng.shuffle(told)
        yield rng.choice((" ", "\n", " \n\n ")).join(told[: rng.randint(1, 3)])


@pytest.fixture(scope="module")
def corpus():
    return [*biographies(150), "", "Tom said: Zoe\u0308 👍🏽 & co. left \ud800?"]


@pytest.fixture(scope="module")
def index(corpus):
    return CorpusIndex(corpus)


class Scan:
    """The same corpus as a list of atoms, gone through from end to end for every question."""

    def __init__(self, corpus, index):
        self.atoms, self.documents = ["\n"], [0]
        for number, document in enumerate(corpus):
            for line in document.splitlines():
                found = [atom.text for atom in words.atoms(line)]
                added = [*found, "\n"] if found else []
                self.atoms += added
                self.documents += [number] * len(added)
        self.classes = index.context(self.atoms)

    def depth(self, nearest, context, step):
        n = 0
        for number in self.elements(nearest, step):
            if n == len(context) or number != context[n]:
                break
            n += 1
        return n

    def elements(self, nearest, step):
        """Classes from an atom on; behind the first word of the frame a run of fillers is one."""
        end = len(self.atoms) if step > 0 else -1
        framed, filler = False, False
        for at in range(nearest, end, step):
            number = self.classes[at]
            goes_on = framed and filler and number < len(words.KINDS)
            filler = number < len(words.KINDS)
            framed = framed or not filler
            if not goes_on:
                yield number

    def spans(self, lengths, hardest):
        for start in range(1, len(self.atoms) - 1):
            for length in lengths:
                inside = self.atoms[start : start + length]
                closed = any(words.border(atom) > hardest for atom in inside)
                if start + length < len(self.atoms) and not closed:
                    yield start, length

    def surrounded(self, left, right, lengths, hardest):
        found = Counter()
        for start, length in self.spans(lengths, hardest):
            before = self.depth(start - 1, left, -1)
            after = self.depth(start + length, right, 1)
            if (before or not left) and (after or not right):
                found[start, length, before, after] += 1
        return found

    def sentences(self, lengths, hardest):
        ends = [words.border(atom) >= words.SENTENCE_END for atom in self.atoms]
        spans = self.spans(lengths, hardest)
        return Counter((s, n, 0, 0) for s, n in spans if ends[s - 1] and ends[s + n])

    def shaped(self, shape):
        found = Counter()
        for start in range(len(self.atoms) - len(shape)):
            atoms = self.atoms[start : start + len(shape)]
            if all(map(self.is_like, atoms, shape)):
                found[start, len(shape), 0, 0] += 1
        return found

    def is_like(self, atom, wanted):
        kind = words.kind(atom)
        if wanted not in words.KINDS:
            return kind == wanted
        # Marks that join words, like "&", pass for symbols.
        kind = kind if kind in words.KINDS else "symbol"
        return kind == wanted and words.border(atom) == words.WORD


@pytest.fixture(scope="module")
def scan(corpus, index):
    return Scan(corpus, index)


def listed(spans: Spans):
    return Counter(
        zip(
            spans.starts.tolist(),
            spans.lengths.tolist(),
            spans.left.tolist(),
            spans.right.tolist(),
            strict=True,
        )
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def surroundings(scan, n, seed=0):
    """Surroundings of places of the corpus, also at its ends, with spans to ask for."""
    rng = random.Random(seed)
    for _ in range(n):
        start, length = rng.randint(1, len(scan.atoms) - 2), rng.randint(1, 5)
        left = [*islice(scan.elements(start - 1, -1), rng.randint(1, 8))]
        right = [*islice(scan.elements(start + length, 1), rng.randint(1, 8))]
        sides = {"both": (left, right), "left": (left, []), "right": ([], right)}
        lengths = range(rng.randint(1, length), length + 4)
        yield *sides[rng.choice([*sides])], lengths, rng.randrange(4)


# What is found


def test_context_lookup_equals_a_plain_scan(index, scan):
    n_found = 0
    for left, right, lengths, hardest in surroundings(scan, 60):
        if not left and not right:
            continue
        found = listed(index.surrounded(left, right, lengths, hardest, generator()))
        assert found == scan.surrounded(left, right, lengths, hardest)
        n_found += len(found)
    assert n_found > 5_000


@pytest.mark.parametrize("hardest", range(4))
@pytest.mark.parametrize("lengths", [range(1, 2), range(2, 9), range(4, 40)])
def test_sentence_lookup_equals_a_plain_scan(index, scan, lengths, hardest):
    found = listed(index.sentences(lengths, hardest, generator()))
    assert found == scan.sentences(lengths, hardest)


@pytest.mark.parametrize(
    "shape",
    [
        "lower",
        "capital",
        "number",
        "upper",
        "symbol",
        ".",
        ",",
        "capital lower",
        ": capital",
        "capital , upper .",
        "number lower lower",
        "\n capital",
    ],
)
def test_shape_lookup_equals_a_plain_scan(index, scan, shape):
    shape = shape.split(" ")
    found = listed(index.shaped(shape, generator()))
    assert found == scan.shaped(shape)
    assert found


def test_span_texts_and_documents_equal_their_atoms(index, scan, corpus):
    left, right, lengths, hardest = [scan.classes[0]], [scan.classes[0]], range(1, 30), 3
    spans = index.surrounded(left, right, lengths, hardest, generator())
    assert index.document_of(spans.starts).tolist() == [scan.documents[s] for s in spans.starts]
    squeezed = ["".join(text.split()) for text in index.text_of(spans)]
    assert squeezed == [
        "".join(scan.atoms[s:e]).replace("\n", "")
        for s, e in zip(spans.starts.tolist(), spans.stops.tolist(), strict=True)
    ]
    assert index.texts(spans) == Counter(index.text_of(spans))
    # A line of one document, whole, is spelled as it stands there.
    lines = {" ".join(line.split()) for text in corpus for line in text.splitlines()} - {""}
    assert lines <= set(index.text_of(spans))


def test_empty_documents_are_counted():
    index = CorpusIndex(["", "one", "  \n", "two\nthree", ""])
    places = torch.arange(1, len(index))
    spans = Spans(places, torch.ones_like(places), places, places)
    told = zip(index.text_of(spans), index.document_of(places).tolist(), strict=True)
    assert [(t, d) for t, d in told if t] == [("one", 1), ("two", 3), ("three", 3)]


# Samples of what is frequent


@pytest.fixture
def few_looked_at(monkeypatch):
    monkeypatch.setattr(index_module, "_LOOKED", 60)


@pytest.mark.usefixtures("few_looked_at")
def test_sample_is_a_distinct_subset_of_a_plain_scan(index, scan):
    shares = []
    for left, right, lengths, hardest in surroundings(scan, 60, seed=1):
        if not left and not right:
            continue
        found = listed(index.surrounded(left, right, lengths, hardest, generator()))
        whole = scan.surrounded(left, right, lengths, hardest)
        assert found <= whole
        shares.append(len(found) / max(len(whole), 1))
        again = listed(index.surrounded(left, right, lengths, hardest, generator()))
        assert found == again
    assert min(shares) < 0.5  # some are sampled indeed
    assert listed(index.shaped(["lower"], generator())) <= scan.shaped(["lower"])


@pytest.mark.usefixtures("few_looked_at")
def test_rare_outer_context_is_found_completely():
    # " a " is everywhere, "rarely" behind it in 20 places.
    corpus = ["He is a nurse and a baker and a singer."] * 500 + ["She rarely met a pilot."] * 20
    index = CorpusIndex(corpus)
    context = index.context(["a", "met", "rarely"])
    spans = index.surrounded(context, [], range(1, 2), 0, generator())
    assert int((spans.left == 3).sum()) == 20
    assert 40 <= int((spans.left == 1).sum()) <= 60


def test_sample_of_places_is_spread_evenly():
    keys = torch.tensor([0, 1, 0, 2] * 5_000)
    postings = Postings.of(lambda start, stop: keys[start:stop], len(keys), 3)
    places = postings.holding([0, 2], 1_000, generator())
    assert 900 <= len(places.unique()) == len(places) <= 1_000
    assert bool((keys[places] != 1).all())
    # Two of three are of key 0 (four standard errors), and every tenth of the corpus has its share.
    assert float((keys[places] == 0).double().mean()) == pytest.approx(2 / 3, abs=0.06)
    assert torch.bincount(places // 2_000).tolist() == pytest.approx([100] * 10, abs=40)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_postings_list_the_places_of_each_key(keys, block):
    from captum_llm_ext.text.baselines.corpus import postings as module

    sequence = torch.tensor(keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        postings = Postings.of(lambda start, stop: sequence[start:stop], len(keys), 8)
    for key in range(8):
        wanted = [place for place, other in enumerate(keys) if other == key]
        assert postings.holding([key], 100, generator()).tolist() == wanted
        assert postings.count(key) == len(wanted)
    assert postings.count(-1) == 0
    assert postings.holding([-1], 5, generator()).tolist() == []


# Vocabularies that no dictionary holds


@given(st.lists(st.text(min_size=1, max_size=3), max_size=60), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_vocabulary_numbers_are_stable(asked, remembered):
    numbering = Numbering([words.BREAK], remembered)
    given_numbers = torch.tensor([numbering[word] for word in [words.BREAK, *asked]])
    vocabulary, same = numbering.vocabulary()
    order = list(dict.fromkeys([words.BREAK, *asked]))
    numbers = given_numbers if same is None else same[given_numbers].long()
    assert numbers.tolist() == [order.index(word) for word in [words.BREAK, *asked]]
    assert vocabulary.words(torch.arange(len(vocabulary))) == order
    assert [vocabulary.number(word) for word in order] == list(range(len(order)))
    assert vocabulary.number("no such word") == -1


def test_chunked_reading_gives_the_same_index(index, corpus, monkeypatch):
    monkeypatch.setattr(reading, "Numbering", functools.partial(Numbering, remembered=7))
    for name, value in {"_PIECES": 3, "_SHORT": 4, "_LONG": 5, "_BLOCK": 11}.items():
        monkeypatch.setattr(reading, name, value)
    monkeypatch.setattr(words, "_LONG", 3)
    assert_same(CorpusIndex(iter(corpus)), index)


def assert_same(one, other):
    mine, its = tensors_of(one), tensors_of(other)
    assert mine.keys() == its.keys()
    for name, tensor in its.items():
        assert torch.equal(mine[name], tensor), name


def tensors_of(index):
    """All that is kept of an index, by way of its file."""
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module.store, "save", lambda path, tensors, extra: kept.update(tensors))
        index.save("nowhere")
    return kept


# Files


def test_index_round_trips_through_a_file(index, scan, tmp_path):
    index.save(tmp_path / "corpus.index", {"settings": "ü"})
    loaded, extra = CorpusIndex.load(str(tmp_path / "corpus.index"))
    assert extra == {"settings": "ü"}
    assert_same(loaded, index)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.index"]
    for left, right, lengths, hardest in surroundings(scan, 20):
        if left or right:
            spans = loaded.surrounded(left, right, lengths, hardest, generator())
            again = index.surrounded(left, right, lengths, hardest, generator())
            assert loaded.texts(spans) == index.texts(again)
    # What was loaded can be written over its own file.
    loaded.save(tmp_path / "corpus.index")
    again, extra = CorpusIndex.load(tmp_path / "corpus.index")
    assert extra == {}
    assert_same(again, index)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loaded_index_is_memory_mapped(index, tmp_path):
    index.save(tmp_path / "mapped.index")
    assert "mapped.index" not in Path("/proc/self/maps").read_text()
    loaded, _ = CorpusIndex.load(tmp_path / "mapped.index")
    assert "mapped.index" in Path("/proc/self/maps").read_text()
    assert_same(loaded, index)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda i: pickle.loads(pickle.dumps(i))])
def test_index_can_be_copied_and_pickled(index, scan, copied):
    other = copied(index)
    assert_same(other, index)
    assert other.context(scan.atoms) == scan.classes


def test_foreign_file_is_refused_as_index(index, tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        CorpusIndex.load(path)
    path.write_bytes(b"some text")
    with pytest.raises(ValueError, match="damaged or not a saved corpus index"):
        CorpusIndex.load(path)
    safetensors.torch.save_file({"numbers": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is a safetensors file but not a saved corpus index"):
        CorpusIndex.load(path)
    metadata = {"captum_llm_ext_index": '{"format": 99}'}
    safetensors.torch.save_file({"numbers": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match=r"later version \(format 99.*update captum-llm-ext"):
        CorpusIndex.load(path)
    metadata = {"format": "captum-llm-ext corpus index", "version": "1", "extra": "{}"}
    safetensors.torch.save_file({"numbers": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match=r"by an earlier version.*have the corpus indexed anew"):
        CorpusIndex.load(path)
    index.save(path)
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"file' is damaged.*give a file written by `save`"):
            CorpusIndex.load(path)


def test_failed_write_keeps_the_old_file(index, tmp_path, monkeypatch):
    path = tmp_path / "corpus.index"
    index.save(path)

    def full(*_):
        raise OSError(errno.ENOSPC, "disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"disk full.*{path}"):
            CorpusIndex(["something else"]).save(path)
    assert [found.name for found in tmp_path.iterdir()] == ["corpus.index"]
    assert_same(CorpusIndex.load(path)[0], index)


CHANGES = {
    "another file's content": lambda path, other: path.write_bytes(other),
    "one byte": lambda path, other: flip(path),
    "one byte, the times as before": lambda path, other: flip(path, keeps_times=True),
    "cut off": lambda path, other: os.truncate(path, 10_000),
    "empty": lambda path, other: os.truncate(path, 0),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"x"),
}


def flip(path, keeps_times=False):
    times = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    if keeps_times:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("age", [0, 3600], ids=["just written", "old"])
def test_loaded_index_detects_a_changed_file(index, scan, corpus, tmp_path, change, age):
    path = tmp_path / "mapped.index"
    index.save(path)
    CorpusIndex([*corpus, "more"]).save(tmp_path / "other")
    os.utime(path, (time.time() - age,) * 2)
    loaded, _ = CorpusIndex.load(path)
    left, right, lengths, hardest = next(surroundings(scan, 1))
    asked = {
        "surrounded": lambda: listed(loaded.surrounded(left, right, lengths, hardest, generator())),
        "texts": lambda: loaded.texts(loaded.anywhere(lengths, hardest, generator())),
        "context": lambda: loaded.context(["Dave"]),
        "pickle": lambda: pickle.dumps(loaded),
        "save": lambda: loaded.save(tmp_path / "again"),
        "deepcopy": lambda: copy.deepcopy(loaded),
    }
    if age:
        asked["surrounded"]()
    sent = pickle.loads(pickle.dumps(loaded))
    CHANGES[change](path, (tmp_path / "other").read_bytes())
    for ask in asked.values():
        with pytest.raises(ValueError, match=r"mapped\.index' was changed after it was opened"):
            ask()
    assert_same(sent, index)


def test_replacing_the_file_keeps_the_loaded_index(index, scan, tmp_path):
    path = tmp_path / "mapped.index"
    index.save(path)
    loaded, _ = CorpusIndex.load(path)
    CorpusIndex(["something else"]).save(path)
    assert_same(loaded, index)
    path.unlink()
    assert_same(loaded, index)
    assert loaded.context(scan.atoms) == scan.classes


# What a corpus may be


def test_corpus_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffone\r\ntwo\x85three\n\nfo\ufeffur\n".encode() + b"caf\xe9 noir\n")
    texts = documents(path, "strict")
    assert [next(texts) for _ in range(5)] == ["one", "two", "three", "", "fo\ufeffur"]
    offset = path.read_bytes().index(b"\xe9")
    with pytest.raises(ValueError, match=rf"byte 0xe9 at offset {offset}\. .*errors=\"replace\""):
        next(texts)
    assert list(documents(path, "replace"))[-1] == "caf\ufffd noir"


def test_zero_byte_error_names_its_offset(tmp_path):
    (tmp_path / "binary").write_bytes(b"one\ntwo\nab\x00c\xff")
    with pytest.raises(ValueError, match="is binary: a zero byte at offset 10"):
        list(documents(tmp_path / "binary", "strict"))


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.jsonl.gz"])
def test_json_lines_corpus_reads_a_field(tmp_path, name):
    texts = ["one\ntwo", "three\u2028\x85four", ""]
    lines = [json.dumps({"body": t, "text": 1}, ensure_ascii=False) for t in texts]
    content = "\r\n\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(documents(tmp_path / name, "strict", "body")) == texts
    with pytest.raises(ValueError, match=r'line 1, has no string under "text".*are body, text'):
        list(documents(tmp_path / name, "strict"))


def test_compressed_corpus_is_read_and_damage_reported(tmp_path):
    path = tmp_path / "lines.txt.gz"
    path.write_bytes(gzip.compress(b"one\ntwo"))
    assert list(documents(path, "strict")) == ["one", "two"]
    for damaged in (gzip.compress(b"one\n" * 999)[:-9], b"one\ntwo"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"lines\.txt\.gz is damaged, or not compressed"):
            list(documents(path, "strict"))


def test_folder_is_refused_as_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot be read"):
        documents(tmp_path, "strict")


def test_iterator_corpus_is_read_once(corpus, index):
    texts = iter(corpus)
    assert_same(CorpusIndex(documents(texts, "strict")), index)
    assert next(texts, None) is None


def test_corpus_of_duplicates():
    index = CorpusIndex(["the same line"] * 50)
    spans = index.shaped(["lower"], generator())
    assert index.texts(spans) == {"the": 50, "same": 50, "line": 50}


@pytest.mark.parametrize(
    "corpus", [3, 2.5, None, b"text", bytearray(b"text"), {"a": "b"}, object()]
)
def test_non_corpus_error_says_what_to_give(corpus):
    with pytest.raises(TypeError, match="give an iterable of strings, or the path"):
        documents(corpus, "strict")


def test_dataset_column_is_a_corpus_and_a_whole_dataset_is_refused(corpus, index):
    datasets = pytest.importorskip("datasets")
    texts = [text.replace("\ud800", "") for text in corpus]
    table = datasets.Dataset.from_dict({"text": texts, "label": [0] * len(texts)})
    column = documents(table["text"], "strict")
    assert_same(CorpusIndex(column), CorpusIndex(texts))
    with pytest.raises(TypeError, match=r'Dataset with the columns text, label.*`dataset\["text'):
        documents(table, "strict")
    splits = datasets.DatasetDict({"test": table})
    with pytest.raises(TypeError, match=r'columns text, label.*`dataset\["test"\]\["text"\]`'):
        documents(splits, "strict")
    with pytest.raises(TypeError, match="DataFrame with the columns text, label"):
        documents(table.to_pandas(), "strict")
    with pytest.raises(TypeError, match="IterableDataset with the columns text, label"):
        documents(table.to_iterable_dataset(), "strict")
