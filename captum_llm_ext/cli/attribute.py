"""``captum-llm-ext attribute``: what made a model write its answer."""

import argparse
from typing import Any, cast

from captum_llm_ext.base.terminal import paint, width
from captum_llm_ext.cli.api import add_api, check, is_remote, show_estimate
from captum_llm_ext.cli.command import UsageError, add_command, note, positive, say
from captum_llm_ext.cli.job import Job, add_job, as_baselines
from captum_llm_ext.cli.methods import said_of_zero
from captum_llm_ext.cli.outputs import add_outputs, check_outputs, write_outputs
from captum_llm_ext.cli.records import add_records, check_records, run_records
from captum_llm_ext.cli.torchrun import accelerator, check_readable, is_main
from captum_llm_ext.model.scoring.checkpoint import check_place
from captum_llm_ext.text.baselines import Default

EXAMPLES = (
    'attribute --model demo --prompt "Dave lives in Palm Coast, FL and is a lawyer. His personal '
    'interests include" --baselines corpus:demo --save dave.safetensors',
    "attribute --model Qwen/Qwen3-0.6B --prompt-file letter.txt --unit sentence --html letter.html",
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
    "--method ablation --estimate",
)
_DESCRIPTION = """\
Attributes every token that the model generates, or of a given target, to the prompt and to the
tokens before it. Prints the strongest causes per token.
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
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="keep what is found in FILE (.safetensors, or a folder): killed, the same command "
        "goes on from there, on any number of processes",
    )
    add_outputs(parser, "html", "png", "json", "save")
    add_records(parser)
    add_api(parser)


def run(arguments: argparse.Namespace) -> int | None:
    """Attributes, prints a table, writes what is wanted."""
    if is_remote(arguments):
        check(arguments)
    elif check_records(arguments):
        return run_records(arguments)
    check_outputs(arguments)
    check_readable(arguments)
    if arguments.checkpoint is not None:
        check_place(arguments.checkpoint)
    job = Job(arguments)
    given = arguments.baselines or []
    if len(given) > 1:
        raise UsageError(f"{len(given)} --baselines: `captum-llm-ext compare` runs several.")
    baselines = as_baselines(given[0], arguments.seed) if given else Default()
    attribution, inp = job.prepared(baselines, accelerator())
    if arguments.estimate:
        show_estimate(cast(Any, attribution), inp, job.options)
        return None
    if arguments.baselines is None and is_main():
        said = said_of_zero(arguments.method)
        if said is not None:
            note(said)
    kept = {} if arguments.checkpoint is None else {"checkpoint": arguments.checkpoint}
    result = attribution.attribute(inp, **job.options, **kept)
    if not is_main():
        return None
    result.provenance["command"] = arguments.command_line
    say(f"answer: {''.join(piece.text for piece in result.output_pieces)}")
    text = result.table(arguments.top, paint=paint, width=width())
    write_outputs(arguments, result, text, result.plot_token_attr)
    return None
