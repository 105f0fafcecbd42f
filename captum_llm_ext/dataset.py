"""Many prompts: one file per record, as soon as it is known, and none twice."""

import inspect
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from typing import Any

from captum_llm_ext import _compat
from captum_llm_ext.attribution import GenerationAttribution
from captum_llm_ext.estimators import is_known
from captum_llm_ext.inputs import ChatInput, TextSegmentInput
from captum_llm_ext.scoring.processes import Accelerator, Processes
from captum_llm_ext.segment import Unit

Record = str | Mapping[str, Any]
_KEYS = ("prompt", "messages", "tools", "target", "id")
_RUN = "run.json"
_FORMAT = 1
# They change how fast an answer comes, not what it is.
_NO_SETTINGS = ("show_progress", "perturbations_per_eval")
_MOST_FAILURES = 100
_TELL_EVERY = 0.5  # seconds


@dataclass(frozen=True)
class DatasetReport:
    """What became of the records, over all processes.

    Attributes:
        n_written: Results written now.
        n_skipped: Records whose result was there already.
        n_failed: Records that failed; each has an ``.error.json`` beside the results.
        failures: (number of the record from 0, error) of the first hundred.
    """

    n_written: int = 0
    n_skipped: int = 0
    n_failed: int = 0
    failures: tuple[tuple[int, str], ...] = ()

    def __add__(self, other: "DatasetReport") -> "DatasetReport":
        return DatasetReport(
            self.n_written + other.n_written,
            self.n_skipped + other.n_skipped,
            self.n_failed + other.n_failed,
            tuple(sorted(self.failures + other.failures))[:_MOST_FAILURES],
        )

    @property
    def n_records(self) -> int:
        """Number of records."""
        return self.n_written + self.n_skipped + self.n_failed

    def __str__(self) -> str:
        return (
            f"{self.n_records} records: {self.n_written} written, {self.n_skipped} there already, "
            f"{self.n_failed} failed"
        )


def attribute_dataset(
    records: Iterable[Record] | str | os.PathLike[str],
    attribution: GenerationAttribution,
    out: str | os.PathLike[str],
    *,
    unit: Unit | tuple[Unit, ...] | None = None,
    roles: Sequence[str] = ("user", "system"),
    baselines: Any = None,
    accelerator: Accelerator | None = None,
    show_progress: bool = False,
    **options: Any,
) -> DatasetReport:
    """Attributes many prompts, each to a file of its own.

    Called again with the same arguments, it goes on: a record whose file is there is skipped, one
    that failed is tried again. Files appear whole or not at all, whenever the process is killed.

    Args:
        records: Prompts, or mappings with ``"prompt"`` (a text) or ``"messages"`` (a chat, with
            ``"tools"`` where there are some), and as wanted ``"target"`` (text or token ids) and
            ``"id"``; other keys are left alone. Or a file with one such JSON object, or one JSON
            string, a line. Records are read one at a time.
        attribution: What attributes them, made without an accelerator: that one is given here.
        out: Folder for the results, made where it is missing. A file's name begins with the
            record's number, counted from 0; `GenerationAttributionResult.load` reads it, and
            ``provenance["record"]`` tells the number and the id.
        unit, baselines: As of `TextSegmentInput` and `ChatInput`. By default words of a prompt,
            turns of a chat.
        roles: As of `ChatInput`.
        accelerator: accelerate's `Accelerator` in a script that ``torchrun`` started: each process
            takes the next record as it becomes free. All of them need the same records.
        show_progress: Whether one bar over the records is shown, by the main process.
        **options: Arguments of `GenerationAttribution.attribute`, the same for each record.

    Returns:
        The same report on every process.

    Raises:
        ValueError: If `out` holds results of other settings, an option belongs to the records, or
            the attribution has an accelerator of its own.
        TypeError: If there is no such option.
        OSError: If the folder or the file of records cannot be used.
    """
    _check_options(options, attribution)
    if attribution.shares_out:
        raise ValueError(
            "the attribution was made with an `accelerator`, which would share out every record: "
            "make it without, and give the accelerator to `attribute_dataset`."
        )
    folder = Path(out)
    units = {"unit": unit, "roles": list(roles), "baselines": baselines}
    settings = _settings(attribution, units | options)
    processes = Processes.of(accelerator, attribution.model)
    makes = _Maker(attribution, unit, tuple(roles), baselines, options)
    with processes.session("attribute_dataset"):
        processes.decide(lambda: _prepare(folder, settings))
        folder.mkdir(parents=True, exist_ok=True)  # where machines share no disk
        return _run(records, makes, folder, processes, show_progress)


def _run(
    records: Iterable[Record] | str | os.PathLike[str],
    makes: "_Maker",
    folder: Path,
    processes: Processes,
    show_progress: bool,
) -> DatasetReport:
    from tqdm.auto import tqdm  # captum and transformers both bring it

    hides = not (show_progress and processes.is_main)
    total, own = DatasetReport(), DatasetReport()
    work = processes.work()
    source = enumerate(_entries(records))
    told = time.monotonic()
    with tqdm(total=_length(records), desc="records", unit="record", disable=hides) as bar:

        def hear(messages: Iterable[DatasetReport]) -> DatasetReport:
            heard = sum(messages, DatasetReport())
            bar.update(heard.n_records)
            if heard.n_failed:
                bar.set_postfix_str(f"{(total + heard).n_failed} failed")
            return total + heard

        for ticket in work.take():
            found = next((pair for pair in source if pair[0] == ticket), None)
            if found is None:
                break
            own += _one(*found, makes, folder, writes=processes.leads)
            if time.monotonic() - told > _TELL_EVERY:
                work.tell(own)
                total = hear(work.heard())
                own, told = DatasetReport(), time.monotonic()
        work.tell(own)
        work.end()
        for message in work.rest():
            total = hear([message])
    return total


class _Maker:
    """Results from records."""

    def __init__(
        self,
        attribution: GenerationAttribution,
        unit: Unit | tuple[Unit, ...] | None,
        roles: Sequence[str],
        baselines: Any,
        options: Mapping[str, Any],
    ) -> None:
        self._attribution, self._options = attribution, dict(options)
        self._unit, self._roles, self._baselines = unit, roles, baselines

    def __call__(self, record: Mapping[str, Any]) -> Any:
        target = record.get("target")
        options = dict(self._options)
        if target is not None:  # nothing is generated then
            options.pop("gen_args", None)
        return self._attribution.attribute(self._input(record), target, **options)

    def _input(self, record: Mapping[str, Any]) -> TextSegmentInput:
        tokenizer = self._attribution.tokenizer
        if "prompt" in record:
            unit = "word" if self._unit is None else self._unit
            return TextSegmentInput(record["prompt"], tokenizer, unit, baselines=self._baselines)
        return ChatInput(
            record["messages"],
            tokenizer,
            "turn" if self._unit is None else self._unit,
            self._roles,
            tools=record.get("tools"),
            baselines=self._baselines,
        )


def _one(
    number: int, entry: Record | Exception, makes: _Maker, folder: Path, *, writes: bool
) -> DatasetReport:
    """Writes the result of a record, or why there is none.

    Of the processes that hold a model together all come here, and one writes.
    """
    failed = folder / f"{number:06d}.error.json"
    record: Mapping[str, Any] = {}
    try:
        if isinstance(entry, Exception):
            raise entry
        name = _name(number, entry)
        if (folder / f"{name}.safetensors").exists():
            return DatasetReport(n_skipped=1)
        record = _checked(entry)
        result = makes(record)
        result.provenance["record"] = {"number": number, "id": record.get("id")}
    except Exception as error:  # whatever is wrong with one record: the others do not suffer
        said = f"{type(error).__name__}: {error}"
        content = {"number": number, "id": record.get("id"), "error": said}
        if writes:
            _write(failed, content)
        return DatasetReport(n_failed=1, failures=((number, said),))
    if not writes:
        return DatasetReport(n_written=1)
    # A full disk is no record's fault: its error ends the run.
    temporary = folder / f".{name}.tmp"
    result.save(temporary)
    os.replace(temporary, folder / f"{name}.safetensors")
    failed.unlink(missing_ok=True)
    return DatasetReport(n_written=1)


def _name(number: int, entry: Record) -> str:
    """What a record's files are called: another record at its place gets another name."""
    content = json.dumps(entry, sort_keys=True, default=_as_json)
    digest = blake2b(content.encode(), digest_size=5).hexdigest()
    own = str(entry.get("id") or "") if isinstance(entry, Mapping) else ""
    slug = re.sub(r"[^\w.-]+", "_", own)[:40]
    return "-".join(part for part in (f"{number:06d}", slug, digest) if part)


def _as_json(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _checked(entry: Record) -> Mapping[str, Any]:
    record = {"prompt": entry} if isinstance(entry, str) else entry
    if not isinstance(record, Mapping):
        raise TypeError(
            f"the record is a {type(record).__name__}: give a text, or an object with 'prompt' or "
            "'messages'."
        )
    for key in record:
        close = get_close_matches(key, _KEYS, n=1, cutoff=0.8)
        if key not in _KEYS and close and close[0] not in record:
            raise ValueError(f"the record has {key!r}: did you mean {close[0]!r}?")
    if ("prompt" in record) == ("messages" in record):
        raise ValueError(
            f"the record has the keys {sorted(record)}: give either 'prompt' or 'messages'."
        )
    if "tools" in record and "prompt" in record:
        raise ValueError("the record's 'tools' would be ignored: they belong to 'messages'.")
    return record


def _entries(records: Iterable[Record] | str | os.PathLike[str]) -> Iterator[Record | Exception]:
    """The records; in the place of a line that holds none, what is wrong with it."""
    if not isinstance(records, str | os.PathLike):
        yield from records
        return
    with open(records, "rb") as file:
        for line, content in enumerate(file, 1):
            if not content.strip():
                continue
            try:
                yield json.loads(content.decode("utf-8-sig" if line == 1 else "utf-8"))
            except ValueError as error:
                yield ValueError(f"line {line} is no JSON ({error}).")


def _length(records: Iterable[Record] | str | os.PathLike[str]) -> int | None:
    if isinstance(records, str | os.PathLike):
        with open(records, "rb") as file:
            return sum(1 for line in file if line.strip())
    return len(records) if isinstance(records, Sized) else None


def _prepare(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder, or checks that what it holds was made in the same way."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _RUN
    if not path.exists():
        _write(path, settings)
        return
    try:
        there: Any = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in settings if there.get(name) != settings[name]]
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is none of this package's: give another folder."
        ) from error
    if names:
        name = names[0]
        raise ValueError(
            f"{str(folder)!r} holds results with {name}={there.get(name)!r}, and now it is "
            f"{settings[name]!r}: give the same settings, or another folder."
        )


def _settings(attribution: GenerationAttribution, given: Mapping[str, Any]) -> dict[str, Any]:
    """What results depend on, as far as JSON can tell it."""
    target: Any = attribution.attr_target
    kept = {
        name: _told(value)
        for name, value in sorted(given.items())
        if name not in _NO_SETTINGS and value is not None
    }
    found = {
        "format": _FORMAT,
        "model": _compat.model_description(attribution.model),
        "method": type(attribution.attr_method).__name__,
        "attr_target": _told(target),
        "arguments": kept,
    }
    return json.loads(json.dumps(found))  # as it is read again: lists for tuples


def _told(value: Any) -> Any:
    """The value, if it is made of texts and numbers, or what kind of thing it is."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        shown = getattr(value, "__qualname__", None) or repr(value)
        return type(value).__name__ if " at 0x" in shown else shown
    return value


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _check_options(options: Mapping[str, Any], attribution: GenerationAttribution) -> None:
    known = inspect.signature(GenerationAttribution.attribute).parameters
    for name in options:
        if name in ("inp", "target", "checkpoint"):
            raise ValueError(f"`{name}` cannot be the same for all records: leave it out.")
        if name not in known and is_known(attribution.attr_method):
            close = get_close_matches(name, known, n=1, cutoff=0.8)
            advice = f"did you mean {close[0]!r}?" if close else "leave it out."
            raise TypeError(f"attribute_dataset() got {name!r}, which `attribute` lacks: {advice}")
