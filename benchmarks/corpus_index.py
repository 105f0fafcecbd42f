"""Costs of `CorpusBaselines` on a corpus of 100 MB: building, memory, disk, loading, look-up.

    python benchmarks/corpus_index.py

The corpus is made up: half of its bytes are biographies of the grammar (rigid and varied), half are
sentences of random words, as frequent as Zipf's law has it, so that the vocabulary is as large as
that of natural text; the documents of both lie mixed. Then, in a fresh process bound to one core,
the index is built from the file; in another it is loaded, and slots of new documents are looked up
for the first time and drawn from again.
Memory is the process's peak, and the same less what it took after the imports. Processor time is
given beside wall time, which other work on the machine disturbs more. The files are in the system's
cache, as they have just been written.

The second corpus is the worst case for a vocabulary: every word is a random number of eight
hexadecimal digits, and hardly any is seen twice.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
WORDS = 300_000  # that random sentences draw from
SLOTS, DRAWS = 200, 10_000


class Sentences:
    """Documents of random words; the word of rank r is drawn with probability about 1 / r."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        syllables = [c + v + e for c in "bcdfghklmnprstvz" for v in "aeiou" for e in ("", "n", "s")]
        # Frequent words are short.
        self._words = [
            "".join(rng.choices(syllables, k=1 + (rank > 60) + (rank > 5_000) + (rank % 3 == 0)))
            for rank in range(WORDS)
        ]
        self._weights = list(accumulate(1 / (rank + 3) for rank in range(WORDS)))

    def document(self) -> str:
        """A few sentences, some with commas, names and numbers."""
        return " ".join(self._sentence() for _ in range(self._rng.randint(2, 6)))

    def _sentence(self) -> str:
        rng = self._rng
        drawn = rng.choices(self._words, cum_weights=self._weights, k=rng.randint(5, 25))
        for at in range(1, len(drawn)):
            luck = rng.random()
            if luck < 0.05:
                drawn[at - 1] += ","
            elif luck < 0.1:
                drawn[at] = drawn[at].capitalize()
            elif luck < 0.12:
                drawn[at] = str(rng.randint(1, 9999))
        return " ".join(drawn).capitalize() + "."


def mixed(seed: int) -> Iterator[str]:
    """Infinite documents, half of the characters of each kind."""
    from fact_grammar import Grammar

    rng = random.Random(seed)
    sentences, grammars = Sentences(random.Random(0)), (Grammar(), Grammar(varied=True))
    ahead = 0
    while True:
        if ahead <= 0:
            text = rng.choice(grammars).sample(rng).text
            ahead += len(text)
        else:
            text = sentences.document()
            ahead -= len(text)
        yield text


def hexadecimal(seed: int) -> Iterator[str]:
    """Infinite documents of twenty random numbers each."""
    rng = random.Random(seed)
    while True:
        yield " ".join(f"{rng.getrandbits(32):08x}" for _ in range(20))


KINDS = {"mixed": mixed, "hex": hexadecimal}


def write_corpus(path: Path, kind: str, size: int) -> None:
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in KINDS[kind](0):
            written += file.write(text + "\n")
            if written >= size:
                return


class Clock:
    """Wall-clock and processor seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Both."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return {"wall_s": wall, "cpu_s": cpu}


def peak_mb() -> float:
    """Peak memory of this process in MB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1e6 if sys.platform == "darwin" else 1e3)


def build(corpus: Path, saved: Path) -> dict[str, Any]:
    """Reads the corpus and saves the index."""
    from captum_llm_ext import CorpusBaselines

    imported = peak_mb()
    clock = Clock()
    baselines = CorpusBaselines(corpus)
    built, peak = clock.read(), peak_mb()
    clock = Clock()
    baselines.save(saved)
    return {
        "build": built,
        "peak_mb": peak,
        "peak_less_imports_mb": peak - imported,
        "save": clock.read(),
        "saved_mb": saved.stat().st_size / 1e6,
        "corpus_mb": corpus.stat().st_size / 1e6,
        "index": repr(baselines),
    }


def look_up(kind: str, saved: Path) -> dict[str, Any]:
    """Loads the index and looks up words of documents outside the corpus."""
    import torch

    from captum_llm_ext import CorpusBaselines

    imported = peak_mb()
    clock = Clock()
    baselines = CorpusBaselines.load(saved, min_candidates=0)
    loaded, peak = clock.read(), peak_mb()
    slots = list(islice(new_slots(kind), SLOTS))
    generator = torch.Generator().manual_seed(0)
    first: list[dict[str, float]] = []
    for slot in slots:
        clock = Clock()
        baselines(slot, generator)
        first.append(clock.read())
    clock = Clock()
    for slot in islice(cycle(slots), DRAWS):
        baselines(slot, generator)
    later = clock.read()
    levels = Counter(baselines.explain(slot).level for slot in slots)
    return {
        "load": loaded,
        "load_peak_less_imports_mb": peak - imported,
        "slots": len(slots),
        "first_look_median": {unit: median(look[unit] for look in first) for unit in first[0]},
        "first_look_max": {unit: max(look[unit] for look in first) for unit in first[0]},
        "draws": DRAWS,
        "later_draw_mean": {unit: seconds / DRAWS for unit, seconds in later.items()},
        "matched_by": dict(levels),
        "peak_less_imports_mb": peak_mb() - imported,
    }


def new_slots(kind: str) -> Iterator[Any]:
    """One word of each of some documents outside the corpus."""
    from captum_llm_ext.text.baselines import Slot

    rng = random.Random(1)
    for text in KINDS[kind](1):
        word = rng.choice(list(re.finditer(r"\s*\S+", text)))
        yield Slot(text, word.start(), word.end(), unit="word")


def apart(*arguments: str) -> dict[str, Any]:
    """Runs a part of this script in a fresh process on one core."""
    if hasattr(os, "sched_setaffinity"):
        pin = {"preexec_fn": lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})}
    else:
        pin = {}
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        **pin,
    )
    return json.loads(done.stdout)


def main(argv: list[str] | None = None) -> None:
    """Prints and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        what, source, saved = arguments.measure
        found = (
            build(Path(source), Path(saved)) if what == "build" else look_up(source, Path(saved))
        )
        print(json.dumps(found))
        return
    from environment import environment

    report: dict[str, Any] = {**environment(seed=0), "threads": 1, "rows": []}
    for kind in KINDS if arguments.words == "all" else [arguments.words]:
        with tempfile.TemporaryDirectory() as folder:
            corpus, saved = Path(folder, "corpus.txt"), Path(folder, "corpus.index")
            write_corpus(corpus, kind, arguments.megabytes * 1_000_000)
            row = {
                "words": kind,
                "distinct": distinct(corpus),
                "building": apart("--measure", "build", str(corpus), str(saved)),
                "looking_up": apart("--measure", "look", kind, str(saved)),
            }
        report["rows"].append(row)
        print(json.dumps(row, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "corpus_index.json").write_text(
        json.dumps(report, indent=1) + "\n", encoding="utf-8"
    )


def distinct(corpus: Path) -> int:
    """Number of distinct words between white space."""
    # By their hashes: eleven million strings would take a gigabyte.
    seen: set[int] = set()
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            seen.update(map(hash, line.split()))
    return len(seen)


if __name__ == "__main__":
    main()
