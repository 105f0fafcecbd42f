"""``captum-llm-ext doctor``: installed versions, and a check of values on this machine."""

import argparse
from typing import Any

from captum_llm_ext.cli.api import add_provider, is_remote
from captum_llm_ext.cli.command import UsageError, add_command
from captum_llm_ext.cli.loading import DEMO, add_loading, place_of

EXAMPLES = (
    "doctor",
    "doctor Qwen/Qwen3-0.6B",
    "doctor ./my-model --dtype bfloat16 --device-map auto",
    "doctor --json | jq .probe.captum_is_right",
    "doctor NAME --api http://localhost:8000/v1",
)
_DESCRIPTION = """\
Tells what is installed and runs a short model check: are the values those of plain uncached
forwards, which ways to reuse computation are exact with this model, and does captum's own default
(use_cached_outputs=True) give right numbers with it? Exit status 1 if the values are not right. Of
a model behind an API: what its server tells, and whether that can be believed.
"""


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "doctor",
        run,
        summary="check the installation and a model",
        description=_DESCRIPTION,
        examples=EXAMPLES,
        usage="[MODEL] [options]",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"a Hugging Face name or a folder (default: {DEMO}, which comes with the package)",
    )
    # As with other commands.
    parser.add_argument("--model", dest="same_model", metavar="NAME", help=argparse.SUPPRESS)
    add_loading(parser)
    add_provider(parser)
    parser.add_argument("--json", action="store_true", help="everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints versions and checks; returns 1 if the package's own values are wrong."""
    if arguments.same_model is not None and arguments.model is not None:
        raise UsageError(
            f"MODEL is {arguments.model} and --model {arguments.same_model}: give one."
        )
    arguments.model = arguments.model or arguments.same_model
    if is_remote(arguments):
        from captum_llm_ext.cli.remote import check_api

        return check_api(arguments)
    if arguments.model is None and arguments.gguf is None:
        arguments.model = DEMO
    place = place_of(arguments)
    from captum_llm_ext.cli.checkup import check_up

    return check_up(place, arguments)
