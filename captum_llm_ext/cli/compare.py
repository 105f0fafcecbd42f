"""``captum-llm-ext compare``: attributions under several baselines."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from captum_llm_ext.cli.command import UsageError, add_command
from captum_llm_ext.cli.input_files import check_saved
from captum_llm_ext.cli.job import Job, add_job, as_baselines
from captum_llm_ext.cli.outputs import PICTURES, add_outputs, check_outputs, write_outputs

if TYPE_CHECKING:
    from captum_llm_ext.evaluation.sensitivity import BaselineComparison

EXAMPLES = (
    "compare deleted.safetensors corpus.safetensors",
    "compare deleted.safetensors corpus.safetensors --token surfing --png surfing.png",
    'compare --model demo --prompt "Dave lives in Palm Coast, FL and is a lawyer. His personal '
    'interests include" --baselines delete --baselines corpus:demo',
)
_DESCRIPTION = """\
Compares attributions of one target under several baselines: which causes are the same under all,
which change sign or rank. Takes saved results, or a model, a prompt and several --baselines; then
the answer is generated once.
"""


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "compare",
        run,
        summary="see what hangs on the baseline",
        description=_DESCRIPTION,
        examples=EXAMPLES,
        usage="RESULT RESULT … | --model NAME --prompt TEXT --baselines A --baselines B [options]",
    )
    parser.add_argument("results", nargs="*", metavar="RESULT", help="two or more saved results")
    parser.add_argument("--token", metavar="TOKEN", help="the token to compare: position or text")
    add_job(parser, several=True)
    add_outputs(parser, *PICTURES, "json")


def run(arguments: argparse.Namespace) -> None:
    """Compares, prints a summary, and writes the requested files."""
    _check(arguments)
    check_outputs(arguments)
    comparison = _of_files(arguments.results) if arguments.results else _of_runs(arguments)
    token = arguments.token
    if token is not None and token.lstrip("-").isdigit():
        token = int(token)
    text = comparison.summary()
    if token is not None:
        changes = comparison.changes(token)
        lines = [f"  {change.kind} {change}" for change in changes] or ["  nothing changes"]
        text = "\n".join([text, f"{arguments.token}:", *lines])
    write_outputs(arguments, comparison, text, lambda: comparison.plot(token))


def _check(arguments: argparse.Namespace) -> None:
    ignored = _options_of_a_run(arguments)
    if arguments.results and ignored:
        raise UsageError(
            f"--{ignored[0]} would be ignored: saved results are compared as they are."
        )
    if arguments.results:
        given, what = arguments.results, "saved results"
    elif not ignored:
        raise UsageError("nothing to compare: give two saved results, or what to run.")
    elif not {"model", "baselines"} <= {*ignored} or not {"prompt", "prompt-file", "chat"} & {
        *ignored
    }:
        raise UsageError("give saved results, or --model, a prompt and several --baselines.")
    else:
        given, what = arguments.baselines, "--baselines"
    if len(set(given)) < 2:
        raise UsageError(f"{len(set(given))} different {what}: give at least two to compare.")
    for name in arguments.results:
        check_saved(name)


def _options_of_a_run(arguments: argparse.Namespace) -> list[str]:
    """The given options of `add_job`."""
    alone = argparse.ArgumentParser()
    add_job(alone, several=True)
    defaults = vars(alone.parse_args([]))
    given = [name for name, default in defaults.items() if getattr(arguments, name) != default]
    return [name.replace("_", "-") for name in given]


def _of_files(names: Sequence[str]) -> "BaselineComparison":
    from captum_llm_ext.evaluation.sensitivity import BaselineComparison
    from captum_llm_ext.result import GenerationAttributionResult

    return BaselineComparison(
        {
            short: GenerationAttributionResult.load(name)
            for short, name in zip(_short(names), names, strict=True)
        }
    )


def _short(names: Sequence[str]) -> list[str]:
    """Names of files without folder and ending, unless these are needed to distinguish them."""
    stems = [Path(name).stem for name in names]
    return stems if len(set(stems)) == len(names) else list(names)


def _of_runs(arguments: argparse.Namespace) -> "BaselineComparison":
    job = Job(arguments)
    baselines = {given: as_baselines(given, arguments.seed) for given in arguments.baselines}
    from captum_llm_ext.evaluation.sensitivity import compare_baselines

    attribution, inp = job.prepared(None)
    # Local methods have no `--baselines`: `Job` has refused them.
    return compare_baselines(cast(Any, attribution), inp, baselines, **job.options)
