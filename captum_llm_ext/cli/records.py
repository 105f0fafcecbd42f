"""``captum-llm-ext attribute --input``: a file of prompts, a folder of results."""

import argparse
import json
from pathlib import Path

from captum_llm_ext.base import files
from captum_llm_ext.cli.command import UsageError, say
from captum_llm_ext.cli.input_files import check_there
from captum_llm_ext.cli.job import Job, baselines_of
from captum_llm_ext.cli.outputs import PICTURES, as_json, check_outputs
from captum_llm_ext.cli.torchrun import accelerator, is_main

# Number of errors shown; all of them are in files. Chosen, not measured.
_SHOWN = 10


def add_records(parser: argparse.ArgumentParser) -> None:
    """Adds ``--out``: the folder of results for many prompts."""
    group = parser.add_argument_group(
        "many prompts",
        "One .safetensors per line of --input. Run again, the command goes on where it was. Under "
        "torchrun (torchrun --standalone --nproc_per_node 2 -m captum_llm_ext attribute …) every "
        "process takes the next line as it becomes free; of a single prompt they share the model's "
        "evaluations.",
    )
    group.add_argument("--out", metavar="FOLDER", help="where results of --input go")


def check_records(arguments: argparse.Namespace) -> bool:
    """Whether many prompts are given.

    Raises:
        UsageError: If an option would have no effect, or one is missing.
    """
    if arguments.input is None:
        if arguments.out is not None:
            raise UsageError(
                "--out is the folder for results of --input: use --save for one result."
            )
        return False
    if arguments.out is None:
        raise UsageError("--input needs --out: the folder for the results.")
    if arguments.dry_run:
        raise UsageError("--dry-run is for one prompt: give one of them with --prompt.")
    of_one = ("html", *PICTURES, "save", "open", "level", "target", "counterfactuals", "checkpoint")
    for name in of_one:
        if getattr(arguments, name) not in (None, False):
            if name == "checkpoint":
                raise UsageError(
                    "--checkpoint is for one prompt: with --input, the same command resumes."
                )
            what = '"target" in each line' if name == "target" else "`show` on a file of --out"
            raise UsageError(f"--{name} is for one prompt: use {what}.")
    check_outputs(arguments)
    if len(arguments.baselines or []) > 1:
        raise UsageError(f"{len(arguments.baselines)} --baselines: give one.")
    return True


def _check_lines(name: str) -> None:
    """Checks that some line is a record: one that is none is told of among the others.

    Raises:
        UsageError: If there is none.
    """
    check_there("--input", name)
    first = "it is empty"
    try:
        with open(name, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                trouble = _trouble(line)
                if trouble is None:
                    return
                first = f"line {number} {trouble}" if first == "it is empty" else first
    except (OSError, UnicodeDecodeError) as error:
        first = str(error)
    raise UsageError(
        f'--input {name} has no record ({first}): give a line for each, {{"prompt": "…"}} or '
        '{"messages": […]}.'
    )


def _trouble(line: str) -> str | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return "is not JSON"
    if not isinstance(record, dict):
        return "is no object"
    return None if {"prompt", "messages"} & {*record} else "has neither prompt nor messages"


def run_records(arguments: argparse.Namespace) -> int:
    """Attributes every record; returns 1 if one failed.

    Raises:
        UsageError: If options contradict one another, or no line is a record.
    """
    job = Job(arguments)
    _check_lines(arguments.input)
    baselines = baselines_of(arguments)
    from captum_llm_ext.attribution.dataset import attribute_dataset

    attribution, chosen = job.for_many()
    options = {name: value for name, value in job.options.items() if name != "target"}
    report = attribute_dataset(
        arguments.input,
        attribution,
        arguments.out,
        baselines=baselines,
        accelerator=accelerator(),
        **chosen,
        **options,
    )
    if is_main():
        for number, error in report.failures[:_SHOWN]:
            say(f"record {number} failed: {error}")
        if report.n_failed > _SHOWN:
            say(f"… and {report.n_failed - _SHOWN} more: see the .error.json in {arguments.out}")
        if arguments.json is not None:
            _write_lines(arguments.json, Path(arguments.out))
        if arguments.json != "-":
            print(f"{report} in {arguments.out}", flush=True)
    return 1 if report.n_failed else 0


def _write_lines(name: str, folder: Path) -> None:
    """Writes a line of JSON per result, in the order of the prompts."""
    from captum_llm_ext.result import GenerationAttributionResult

    results = (
        GenerationAttributionResult.load(path) for path in sorted(folder.glob("*.safetensors"))
    )
    lines = (as_json(result.to_dict()) for result in results)
    if name == "-":
        for line in lines:
            print(line, flush=True)
    else:
        files.write(name, "".join(f"{line}\n" for line in lines))
