"""``captum-llm-ext attribute``: what made a model generate its answer."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from captum_llm_ext.base import files
from captum_llm_ext.cli.api import add_api, check, is_remote
from captum_llm_ext.cli.command import UsageError, add_command, note, positive, say
from captum_llm_ext.cli.job import Job, add_job, baselines_of
from captum_llm_ext.cli.methods import (
    is_of_answers,
    is_of_parts,
    is_search,
    is_white_box,
    zero_baseline_note,
)
from captum_llm_ext.cli.outputs import PICTURES, add_outputs, check_outputs, write_outputs
from captum_llm_ext.cli.records import add_records, check_records, run_records
from captum_llm_ext.cli.report import add_level, check_level, report
from captum_llm_ext.cli.torchrun import accelerator, are_several, check_readable, is_main

EXAMPLES = (
    'attribute --model demo --prompt "Dave lives in Palm Coast, FL and is a lawyer. His personal '
    'interests include" --baselines corpus:demo --save dave.safetensors',
    "attribute --model Qwen/Qwen3-0.6B --prompt-file letter.txt --unit sentence --html letter.html",
    'attribute --model ./my-model --as-chat --context ann.txt bob.txt --prompt "Who is a nurse?"',
    "attribute --model ./my-model --prompt-file q.txt --dry-run",
    "attribute --model ./my-model --prompt-file q.txt --counterfactuals --html q.html",
    "attribute --model ./my-model --chat chat.json --unit sentence --method partition "
    "--max-new-tokens 60",
    'attribute --model ./my-model --prompt "2 + 2 =" --target " 5" --method ablation --json - | jq',
    'attribute --model ./my-model --prompt "2 + 2 =" --target " 5" --method inclusion',
    'attribute --model ./my-model --prompt "2 + 2 =" --method shapley --max-new-tokens 1',
    "attribute --model ./my-model --prompt-file q.txt --sample --temperature 0.7 --method kernel "
    "--tol 0.05",
    "attribute --model ./my-model --prompt-file q.txt --method lime --n-samples 200",
    "attribute --model ./my-model --prompt-file letter.txt --method hierarchical --share 0.1",
    "attribute --model ./my-model --prompt-file q.txt --method integrated-gradients --baselines "
    "corpus:letters.txt",
    "attribute --model ./my-model --input prompts.jsonl --out results/",
    "attribute --api http://localhost:8000/v1 --model NAME --prompt-file q.txt --unit sentence "
    "--method ablation --dry-run",
)
_ROWS = 500  # rows of the search for counterfactuals; chosen, not measured
_DESCRIPTION = """\
Attributes every token that the model generates, or of a given target, to the prompt and to the
tokens before it. Prints the strongest causes per token: what each adds to the log-probability of
the token, in nats (+0.69 makes it twice as probable), ± its standard error.

The answer is told first, then what the rest will take; --dry-run stops there.
"""


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "attribute",
        run,
        summary="explain what a model writes",
        description=_DESCRIPTION,
        examples=EXAMPLES,
        usage="--model NAME --prompt TEXT [options]",
    )
    add_job(parser, several=False)
    parser.add_argument("--top", type=positive, default=3, metavar="K", help="causes per token (3)")
    add_level(parser)
    parser.add_argument(
        "--dry-run",
        "--estimate",
        action="store_true",
        help="generate the answer, run a first batch, print what the rest would cost, and stop; "
        "of --api nothing is sent",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="keep what is computed in FILE (.safetensors, or a folder): after a kill, the same "
        "command resumes, on any number of processes",
    )
    parser.add_argument(
        "--counterfactuals",
        nargs="?",
        const=_ROWS,
        type=positive,
        metavar="N",
        help="also search the prompt for what would have changed the answer, with at most N "
        f"evaluations ({_ROWS}); `counterfactual` has more options",
    )
    add_outputs(parser, "html", *PICTURES, "json", "save")
    add_records(parser)
    add_api(parser)


def run(arguments: argparse.Namespace) -> int | None:
    """Attributes, prints a table, and writes the requested files."""
    if is_remote(arguments):
        check(arguments)
    elif check_records(arguments):
        return run_records(arguments)
    check_outputs(arguments)
    check_level(arguments)
    check_readable(arguments)
    if arguments.dry_run and are_several():
        raise UsageError("--dry-run measures one process: start it without torchrun.")
    if arguments.counterfactuals is not None:
        _check_counterfactuals(arguments)
    if arguments.checkpoint is not None:
        try:
            files.check_checkpoint(arguments.checkpoint)
        except ValueError as error:
            raise UsageError(str(error)) from error
    job = Job(arguments)
    given = arguments.baselines or []
    if len(given) > 1:
        raise UsageError(f"{len(given)} --baselines: `captum-llm-ext compare` runs several.")
    baselines = baselines_of(arguments)
    attribution, inp = job.prepared(baselines, accelerator())
    if arguments.dry_run and is_remote(arguments):
        from captum_llm_ext.cli.remote import show_estimate

        show_estimate(cast(Any, attribution), inp, job.options)
        return None
    if arguments.baselines is None and is_main():
        note_text = zero_baseline_note(arguments.method)
        if note_text is not None:
            note(note_text)
    from captum_llm_ext.cli.progress import DryRunEndError, RunProgress

    progress = RunProgress(
        None if is_remote(arguments) else attribution.model,
        is_dry=arguments.dry_run,
        is_quiet=arguments.quiet,
        is_open=is_search(arguments.method) or arguments.tol is not None,
        attributes_answer=is_of_parts(arguments.method),
        uses_proposals=_uses_proposals(given, arguments),
        cheaper=partial(job.cheaper, attribution.tokenizer),
        lists_end=not is_remote(arguments),
    )
    kept = {} if arguments.checkpoint is None else {"checkpoint": arguments.checkpoint}
    try:
        result = attribution.attribute(inp, **{**job.options, "show_progress": progress}, **kept)
    except DryRunEndError:
        return None
    if not is_main() or arguments.dry_run:
        return None
    result.provenance["command"] = arguments.command_line
    if not progress.has_answered:
        say(f"answer: {''.join(piece.text for piece in result.output_pieces)}")
    if is_remote(arguments):
        say(f"{result.provenance['n_requests']:,} requests were sent")
    text = report(result, arguments.top, arguments.level)
    changes: list[Any] = []
    if arguments.counterfactuals is not None:
        search = _counterfactuals(job, attribution, inp, result, arguments.counterfactuals)
        changes = list(search)
        text = "\n\n".join([text, *map(str, changes), f"what would change it: {search.summary}"])
    write_outputs(arguments, result, text, result.plot_token_attr, changes)
    return None


def _check_counterfactuals(arguments: argparse.Namespace) -> None:
    """Checks that ``--counterfactuals`` is possible.

    Raises:
        UsageError: If the method, an API or several processes do not support it.
    """
    if is_remote(arguments) or is_white_box(arguments.method) or is_of_answers(arguments.method):
        what = "--api" if is_remote(arguments) else f"--method {arguments.method}"
        raise UsageError(
            f"--counterfactuals would be ignored with {what}: `captum-llm-ext counterfactual` "
            "runs a local model."
        )
    if are_several():
        raise UsageError("--counterfactuals takes one process: start it without torchrun.")
    if arguments.dry_run:
        raise UsageError("--counterfactuals would be ignored: --dry-run stops before.")


def _counterfactuals(job: Job, attribution: Any, inp: Any, result: Any, n_rows: int) -> Any:
    """Counterfactuals, searched by the strongest causes first."""
    say(f"looking for what would change the answer, with at most {n_rows} evaluations …")
    options = job.options
    given = {"gen_args": options["gen_args"]} if options["target"] is None else {}
    return attribution.counterfactuals(
        inp,
        result.target,
        budget=n_rows,
        order=_order(result),
        seed=options["seed"],
        perturbations_per_eval=options["perturbations_per_eval"],
        **given,
    )


def _order(result: Any) -> list[float]:
    """Per prompt feature the magnitude of its attributions, summed over the answer."""
    strength: dict[int, float] = {}
    columns = result.column_features[: len(result.input_tokens)]
    for feature, value in zip(columns, result.token_attr.abs().sum(0).tolist(), strict=True):
        strength[feature] = value
    return [strength[feature] for feature in sorted(strength)]


def _uses_proposals(given: Sequence[str], arguments: argparse.Namespace) -> bool:
    is_default = not given and not is_white_box(arguments.method) and not is_remote(arguments)
    return is_default or given == ["model"]
