"""`attribute_dataset`: many prompts, one result file per record, resumable."""

import inspect
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_args

from captum_llm_ext.attribution.attention import GenerationAttentionAttribution
from captum_llm_ext.attribution.generation import GenerationAttribution
from captum_llm_ext.attribution.gradient import GenerationGradientAttribution
from captum_llm_ext.attribution.target import plain_target
from captum_llm_ext.base import files
from captum_llm_ext.base.arguments import check_passed_on
from captum_llm_ext.base.digest import describe, differences, digest
from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.methods.estimators import is_known
from captum_llm_ext.model.processes.group import Accelerator, Processes
from captum_llm_ext.model.scoring.progress import ProgressBar, Shown
from captum_llm_ext.result import GenerationAttributionResult
from captum_llm_ext.result.files import read_provenance
from captum_llm_ext.text import encoding
from captum_llm_ext.text.baselines import Default
from captum_llm_ext.text.inputs import ChatInput, TextSegmentInput
from captum_llm_ext.text.segment import Unit

Record = str | Mapping[str, Any]
Attribution = GenerationAttribution | GenerationGradientAttribution | GenerationAttentionAttribution
_KEYS = ("prompt", "messages", "tools", "target", "id")
_DEFAULT = Default()
_SETTINGS_FILE = "run.json"
_GENERATION = "generation"
_FORMAT = 3  # of `run.json`
_TOKENIZER_SAMPLE = "The 27 quick-brown foxes' naïve Straße: 中文, русский!\n\t{'x': [0.5]}"
# These change the speed of an answer, not its values.
_SPEED_OPTIONS = ("show_progress", "perturbations_per_eval", "internal_batch_size")
_MAX_FAILURES = 100
# Seconds between two reports of a process, and the maximum number of reports per run, since they
# are kept until the run ends. Chosen, not measured.
_REPORT_SECONDS, _MAX_REPORTS = 0.5, 1000
OnAllProcesses = Callable[[Callable[[], Any]], Any]


@dataclass(frozen=True)
class DatasetReport:
    """Numbers of records written, skipped and failed, over all processes.

    Attributes:
        n_written: Results written by this call.
        n_skipped: Records whose result existed already.
        n_failed: Records that failed; each has an ``.error.json`` beside the results.
        failures: (record number from 0, error) of the first hundred failures.
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
            tuple(sorted(self.failures + other.failures))[:_MAX_FAILURES],
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
    attribution: Attribution,
    out: str | os.PathLike[str],
    *,
    unit: Unit | tuple[Unit, ...] | None = None,
    roles: Sequence[str] = ("user", "system"),
    baselines: Any = _DEFAULT,
    accelerator: Accelerator | None = None,
    show_progress: Shown = False,
    **options: Any,
) -> DatasetReport:
    """Attributes many prompts and writes one result file per record.

    A second call with the same arguments resumes: records with a result file are skipped, failed
    ones are tried again. Files are written atomically. Existing results are never overwritten:
    another model, other arguments or another corpus in the same folder raise an error, and so does,
    for its record, another record under a number that has a result. A model counts as another one
    if its weights, buffers, active adapters or (for generated targets) generation settings differ,
    or if rescoring the whole text of the first stored result gives other values (hooks, a custom
    forward).

    Args:
        records: Prompts, or mappings with ``"prompt"`` (a text) or ``"messages"`` (a chat, with
            ``"tools"`` where there are some), and optionally ``"target"`` (text or token ids) and
            ``"id"``; other keys are ignored. Or a file with one such JSON object, or one JSON
            string, per line. Records are read lazily.
        attribution: A `GenerationAttribution` (also one over an API) or a
            `GenerationGradientAttribution`. With an ``accelerator`` (in a script started by
            ``torchrun``, the same on every process), each process takes the next record when it is
            free. Processes that hold a tensor-parallel model together share each record; replicas
            of such a model take separate records.
        out: Folder for the results, created if missing. Files are named by the record's number from
            0 (``000000.safetensors``); `GenerationAttributionResult.load` reads them, and
            ``provenance["record"]`` holds the number and the id.
        unit, baselines: As for `TextSegmentInput` and `ChatInput`, with their defaults: words of a
            prompt or of a chat with one message, turns of longer chats; and `ModelBaselines`
            (deletion for gradients, attention and APIs).
        roles: As for `ChatInput`.
        accelerator: For an attribution constructed without one, such as by gradients.
        show_progress: Whether the main process shows one bar over the records; or a `Listener` of
            that progress.
        **options: Arguments of the attribution's ``attribute``, the same for each record.

    Returns:
        The report, equal on every process.

    Raises:
        ValueError: If `out` holds results of other settings, an option belongs into the records,
            the accelerator is not the attribution's, or processes were given different arguments.
        TypeError: If an option is unknown.
        OSError: If the folder or the file of records cannot be used.

    Warns:
        UserWarning: If more processes were started than share the records.
    """
    _check_options(options, attribution)
    folder = Path(out)
    units = {"unit": unit, "roles": list(roles), "baselines": baselines}
    processes = _processes(attribution, accelerator)
    own = processes.replica()
    # Batches are formed as for one process, so values do not depend on the number of processes.
    attribution = attribution.on(own)
    attributor = _RecordAttributor(attribution, unit, tuple(roles), baselines, options)
    with processes.session("attribute_dataset"):
        settings = _settings(attribution, units | options)
        there = processes.decide(
            lambda: _prepare_folder(folder, settings) if processes.is_main else settings
        )
        differ = differences(there, settings)
        if differ:
            raise ValueError(
                f"this process has other settings than the main one ({differ}): give every process "
                "the same model, baselines and arguments."
            )
        folder.mkdir(parents=True, exist_ok=True)  # where machines share no file system
        return _attribute_records(records, attributor, folder, processes, show_progress)


def _processes(attribution: Attribution, accelerator: Accelerator | None) -> Processes:
    """The processes that share the records."""
    known = attribution.processes
    if accelerator is None:
        asked = os.environ.get("WORLD_SIZE", "1")
        if asked.isdigit() and int(asked) > len(known.ranks):
            warn_user(
                f"{asked} processes were started, and {len(known.ranks)} of them each attribute "
                "all records: make the attribution with `accelerator=Accelerator()` to share them "
                "out.",
            )
        return known
    given = Processes.of(accelerator, attribution.model)
    if known.n_replicas > 1 and known.ranks != given.ranks:
        raise ValueError(
            f"the attribution was made with an accelerator of {len(known.ranks)} processes, and "
            f"`accelerator` has {len(given.ranks)}: leave `accelerator` out."
        )
    return given


def _attribute_records(
    records: Iterable[Record] | str | os.PathLike[str],
    attributor: "_RecordAttributor",
    folder: Path,
    processes: Processes,
    show_progress: Shown,
) -> DatasetReport:
    total, unreported = DatasetReport(), DatasetReport()
    work = processes.work()
    source = enumerate(_read_records(records))
    began_at = reported_at = time.monotonic()
    bar = ProgressBar("records", "record", is_shown=processes.is_main and show_progress)
    with bar.shown():
        bar.announce(_n_records(records) or 0)

        def count_reports(messages: Iterable[DatasetReport]) -> DatasetReport:
            progress = sum(messages, DatasetReport())
            if progress.n_failed:
                bar.note(f"{(total + progress).n_failed} failed")
            bar.advance(progress.n_records)
            return total + progress

        for ticket in work.take():
            next_record = next((pair for pair in source if pair[0] == ticket), None)
            if next_record is None:
                break
            unreported += _attribute_record(
                *next_record, attributor, folder, leads=processes.leads, agree=work.agree
            )
            now = time.monotonic()
            if now - reported_at > max(_REPORT_SECONDS, (now - began_at) / _MAX_REPORTS):
                work.send(unreported)
                total = count_reports(work.received())
                unreported, reported_at = DatasetReport(), now
        work.send(unreported)
        work.end()
        for message in work.rest():
            total = count_reports([message])
    return total


class _RecordAttributor:
    """Attributes one record after another."""

    def __init__(
        self,
        attribution: Attribution,
        unit: Unit | tuple[Unit, ...] | None,
        roles: Sequence[str],
        baselines: Any,
        options: Mapping[str, Any],
    ) -> None:
        self._attribution, self._options = attribution, dict(options)
        self._unit, self._roles, self._baselines = unit, roles, baselines
        self._has_checked = False

    def __call__(self, record: Mapping[str, Any]) -> Any:
        target = record.get("target")
        options = dict(self._options)
        if target is not None:  # no generation then
            options.pop("gen_args", None)
        return self._attribution.attribute(self._input(record), target, **options)

    def check(self, record: Mapping[str, Any], path: Path, agree: OnAllProcesses) -> None:
        """Compares the first stored result with what the model computes now.

        This finds changes that no digest of the model shows, such as hooks or a custom forward.

        Args:
            record: The record of the result.
            path: The result's file.
            agree: Makes one of the processes that hold a model together read the file for all.

        Raises:
            ValueError: If the result is of another model.
        """
        if self._has_checked:
            return

        def stored() -> tuple[Any, ...]:
            result = GenerationAttributionResult.load(path)
            return result.target, result.full_values, result.foils

        self._attribution.check_stored(self._input(record), *agree(stored))
        self._has_checked = True

    @property
    def has_lost_processes(self) -> bool:
        """Whether processes that hold the model have died, so that no further record can be
        attributed.
        """
        return self._attribution.processes.have_diverged

    def _input(self, record: Mapping[str, Any]) -> TextSegmentInput:
        tokenizer = self._attribution.tokenizer
        if "prompt" in record:
            unit = "word" if self._unit is None else self._unit
            return TextSegmentInput(record["prompt"], tokenizer, unit, baselines=self._baselines)
        default = "word" if len(record["messages"]) == 1 else "turn"
        return ChatInput(
            record["messages"],
            tokenizer,
            default if self._unit is None else self._unit,
            self._roles,
            tools=record.get("tools"),
            baselines=self._baselines,
        )


def _attribute_record(
    number: int,
    entry: Record | Exception,
    attributor: _RecordAttributor,
    folder: Path,
    *,
    leads: bool,
    agree: OnAllProcesses,
) -> DatasetReport:
    """Writes the result of a record, or its error.

    All processes that hold a model together call this; one of them reads and writes files.
    """
    path, failed = folder / f"{number:06d}.safetensors", folder / f"{number:06d}.error.json"

    def fails(error: Exception) -> DatasetReport:
        message = f"{type(error).__name__}: {error}"
        name = entry.get("id") if isinstance(entry, Mapping) else None
        if leads:
            _write(failed, {"number": number, "id": name, "error": message})
        return DatasetReport(n_failed=1, failures=((number, message),))

    def known() -> DatasetReport | None:
        """The outcome for a record that needs no model; None if it has to be attributed."""
        try:
            if isinstance(entry, Exception):
                raise entry
            record = _check_record(entry)
            if not path.exists():
                return None
            _check_same_record(path, record)
        except Exception as error:  # an error in one record does not stop the others
            return fails(error)
        failed.unlink(missing_ok=True)
        return DatasetReport(n_skipped=1)

    report = agree(known)
    if report is not None and not report.n_skipped:
        return report
    record = _check_record(cast(Record, entry))
    if report is not None:
        attributor.check(record, path, agree)
        return report
    try:
        result = attributor(record)
    except Exception as error:
        if (
            attributor.has_lost_processes
        ):  # some processes that hold the model are still within a forward pass
            raise
        return fails(error)
    if leads:
        result.provenance["record"] = {"number": number, "id": record.get("id")}
        result.provenance["record_digests"] = _digests(record)
        result.save(path)  # a full disk is not the record's fault: its error ends the run
        failed.unlink(missing_ok=True)
    return DatasetReport(n_written=1)


def _digests(record: Mapping[str, Any]) -> dict[str, str]:
    """Digests of a record's values by key, which identify it."""
    given = {key: record[key] for key in _KEYS if record.get(key) is not None}
    if "target" in given:
        given["target"] = plain_target(given["target"])
    return {key: digest(_json_round_trip(value)) for key, value in given.items()}


def _check_same_record(path: Path, record: Mapping[str, Any]) -> None:
    """Raises if the file holds the result of a different record."""
    there = read_provenance(path)
    then, now = there.get("record_digests") or {}, _digests(record)
    differ = [key for key in _KEYS if then.get(key) != now.get(key)]
    if differ:
        name = (there.get("record") or {}).get("id")
        whose = "" if name is None else f" (id {name!r})"
        raise ValueError(
            f"{path.name} is the result of another record{whose}: {_quoted_list(differ)} differ"
            f"{'s' if len(differ) == 1 else ''}. It was left as it is: put the records back in "
            "their order, delete the file to have this one attributed, or give another folder."
        )


def _quoted_list(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def _json_round_trip(value: Any) -> Any:
    """The value after a round trip through JSON: equal whether it came from a file or not."""
    return json.loads(json.dumps(value, default=_as_json))


def _as_json(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _check_record(entry: Record) -> Mapping[str, Any]:
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


def _read_records(
    records: Iterable[Record] | str | os.PathLike[str],
) -> Iterator[Record | Exception]:
    """Reads the records; an invalid line yields an exception in its place."""
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
                yield ValueError(f"line {line} is not JSON ({error}).")


def _n_records(records: Iterable[Record] | str | os.PathLike[str]) -> int | None:
    if isinstance(records, str | os.PathLike):
        with open(records, "rb") as file:
            return sum(1 for line in file if line.strip())
    return len(records) if isinstance(records, Sized) else None


def _prepare_folder(folder: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Creates the folder, or checks that its results were made with the same settings."""
    folder.mkdir(parents=True, exist_ok=True)
    files.sweep(folder, r"\d{6,}\.safetensors|\d{6,}\.error\.json|run\.json")
    path = folder / _SETTINGS_FILE
    if not path.exists():
        if next(folder.glob("*.safetensors"), None) is not None:
            raise ValueError(
                f"{str(folder)!r} holds results and no {_SETTINGS_FILE}, which records "
                "their settings: give another folder."
            )
        _write(path, settings)
        return settings
    try:
        then = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} was not written by this package: give another folder."
        ) from error
    differ = differences(then, settings)
    generates = {_GENERATION: settings[_GENERATION]}
    if differ and not differences(then | generates, settings) and not _any_is_generated(folder):
        # Generation settings do not matter to given targets.
        _write(path, settings)
    elif differ:
        raise ValueError(
            f"{str(folder)!r} holds results of another run ({differ}): give the same settings, or "
            "another folder. Nothing was overwritten."
        )
    return settings


def _any_is_generated(folder: Path) -> bool:
    """Whether the target of any stored result was generated."""
    found = (read_provenance(path) for path in sorted(folder.glob("*.safetensors")))
    return any(provenance.get("generation") is not None for provenance in found)


def _settings(attribution: Attribution, given: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that results depend on, as JSON."""
    kept = {
        name: describe(value)
        for name, value in sorted(given.items())
        if name not in _SPEED_OPTIONS and value is not None
    }
    kept.pop("gen_args", None)
    found = {
        "format": _FORMAT,
        **attribution.identity(),
        "tokenizer": _tokenizer_identity(attribution.tokenizer),
        _GENERATION: _generation(attribution, given.get("gen_args")),
        **kept,
    }
    return json.loads(json.dumps(found))  # as read back from JSON: lists instead of tuples


def _generation(attribution: Attribution, gen_args: Any) -> dict[str, str] | None:
    """Generation settings; None for a model that cannot generate: its records have targets."""
    try:
        return dict(attribution.generation(gen_args).settings)
    except ValueError:
        if gen_args is not None:
            raise
        return None


def _tokenizer_identity(tokenizer: Any) -> str:
    """Identity of a tokenizer: digest of a sample text's ids and of the chat template."""
    ids = encoding.ids(tokenizer, _TOKENIZER_SAMPLE)
    return f"{type(tokenizer).__name__} {digest([ids, getattr(tokenizer, 'chat_template', None)])}"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    files.write(path, json.dumps(content, ensure_ascii=False) + "\n")


def _check_options(options: Mapping[str, Any], attribution: Attribution) -> None:
    if not isinstance(attribution, Attribution):
        raise TypeError(
            f"`attribution` is a {type(attribution).__name__}: give a `GenerationAttribution`, a "
            "`GenerationGradientAttribution` or a `GenerationAttentionAttribution`."
        )
    is_open = isinstance(attribution, GenerationAttribution) and not is_known(
        attribution.attr_method
    )
    kind = next(kind for kind in get_args(Attribution) if isinstance(attribution, kind))
    known = inspect.signature(kind.attribute).parameters
    for name in options:
        if name in ("inp", "target", "checkpoint"):
            raise ValueError(f"`{name}` cannot be the same for all records: leave it out.")
    if not is_open:
        check_passed_on(
            {name: value for name, value in options.items() if name not in known},
            attribution.attr_method,
            kind.attribute,
            called="attribute_dataset",
            which="`attribute` lacks",
        )
