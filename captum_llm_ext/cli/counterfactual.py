"""``captum-llm-ext counterfactual``: what would have changed the answer."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from captum_llm_ext.base.terminal import one_line
from captum_llm_ext.cli.command import UsageError, above_zero, add_command, positive, say
from captum_llm_ext.cli.job import Job, add_question, baselines_of
from captum_llm_ext.cli.outputs import add_outputs, check_outputs, write_outputs

if TYPE_CHECKING:
    from captum_llm_ext.attribution.counterfactual import Counterfactual
    from captum_llm_ext.attribution.generation import GenerationAttribution

EXAMPLES = (
    'counterfactual --model demo --prompt "Dave lives in Palm Coast, FL and is a lawyer. His '
    'personal interests include" --baselines corpus:demo',
    "counterfactual --model ./my-model --chat chat.json --unit sentence --max-size 1",
    'counterfactual --model ./my-model --system "Be brief." --prompt "Why is the sky blue? Answer '
    'in a numbered list." --unit sentence --baselines delete',
    'counterfactual --model ./my-model --prompt "2 + 2 =" --drop 3 --json -',
)
_DESCRIPTION = """\
Looks for the fewest words of the prompt whose replacement makes the model write another token, and
shows the answer that it then writes. What is not found was not there, as far as the last line says.
"""


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "counterfactual",
        run,
        summary="find what would have changed an answer",
        description=_DESCRIPTION,
        examples=EXAMPLES,
        usage="--model NAME --prompt TEXT [options]",
    )
    add_question(parser)
    search = parser.add_argument_group("what is searched")
    search.add_argument(
        "--max-size", type=positive, default=2, metavar="N", help="features of the largest sets (2)"
    )
    search.add_argument(
        "--tries", type=positive, default=4, metavar="N", help="replacements of each set (4)"
    )
    search.add_argument(
        "--budget", type=positive, default=2000, metavar="N", help="at most N evaluations (2000)"
    )
    search.add_argument(
        "--drop",
        type=above_zero,
        metavar="X",
        help="count what lowers a token by X nats (default: what makes another token likelier)",
    )
    search.add_argument("--token", type=int, metavar="N", help="of the answer, counted from 0")
    add_outputs(parser, "json")


def run(arguments: argparse.Namespace) -> None:
    """Searches, prints counterfactuals, and writes the requested files."""
    check_outputs(arguments)
    if len(arguments.baselines or []) > 1:
        raise UsageError(f"{len(arguments.baselines)} --baselines: give one.")
    job = Job(arguments)
    baselines = baselines_of(arguments)
    prepared, inp = job.prepared(baselines)
    attribution = cast("GenerationAttribution", prepared)  # the method is the default one
    options = job.options
    search = attribution.counterfactuals(
        inp,
        options["target"],
        flips="argmax" if arguments.drop is None else arguments.drop,
        token=arguments.token,
        max_size=arguments.max_size,
        n_draws=arguments.tries,
        budget=arguments.budget,
        gen_args=options["gen_args"],
        seed=arguments.seed,
        perturbations_per_eval=arguments.batch_size,
    )
    found: list[Any] = []
    for one in search:
        if not found:
            say(f"answer: {one_line(one.old_answer.strip())}")
        found.append(one)
        if arguments.json != "-" and not arguments.quiet:  # as soon as it is found
            print(one, flush=True)
    text = search.summary if not arguments.quiet else "\n".join(map(str, [*found, search.summary]))
    write_outputs(arguments, _Found(found, search.summary), text, None)


def read_counterfactuals(path: str) -> "list[Counterfactual]":
    """Reads counterfactuals from a file written by ``--json`` of this command or ``attribute``.

    Raises:
        ValueError: If it is not such a file.
    """
    from captum_llm_ext.attribution.counterfactual import Counterfactual

    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = held["counterfactuals" if "counterfactuals" in held else "found"]
        return [Counterfactual.from_dict(one) for one in entries]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--counterfactuals {path}: that holds none; give a file that `captum-llm-ext "
            "counterfactual --json` wrote."
        ) from error


class _Found:
    """The counterfactuals found, for `write_outputs`."""

    def __init__(self, found: list[Any], summary: str) -> None:
        self._found, self._summary = found, summary

    def to_dict(self) -> dict[str, Any]:
        """The counterfactuals found, and the extent of the search."""
        return {"found": [one.to_dict() for one in self._found], "summary": self._summary}
