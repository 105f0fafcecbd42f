"""``captum-llm-ext show``: a saved result."""

import argparse
import re
from typing import TYPE_CHECKING, Any

from captum_llm_ext.base.terminal import paint
from captum_llm_ext.cli.command import UsageError, add_command, positive
from captum_llm_ext.cli.counterfactual import read_counterfactuals
from captum_llm_ext.cli.input_files import check_saved, check_there
from captum_llm_ext.cli.outputs import PICTURES, add_outputs, check_outputs, write_outputs
from captum_llm_ext.cli.report import add_level, check_level, report

if TYPE_CHECKING:
    from captum_llm_ext.result import Cause, GenerationAttributionResult

EXAMPLES = (
    "show dave.safetensors",
    "show dave.safetensors --token surfing --top 10",
    "show dave.safetensors --token 6:9",
    "show dave.safetensors --html dave.html --png dave.png",
    "show dave.safetensors --level sentence",
    "show dave.safetensors --counterfactuals changes.json --html dave.html",
    "show dave.safetensors --json - | jq .seq_attr",
)
_TOP = 3


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "show",
        run,
        summary="look at a saved result",
        description="Prints, draws or converts a result that --save wrote. No model is loaded.",
        examples=EXAMPLES,
        usage="RESULT [options]",
    )
    parser.add_argument("result", metavar="RESULT", help="a file written by --save or result.save")
    parser.add_argument("--top", type=positive, default=_TOP, metavar="K", help="causes (3)")
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        help="what caused one token: its position, the first is 0, or its text; or several as one, "
        "START:STOP",
    )
    add_level(parser)
    parser.add_argument(
        "--counterfactuals",
        metavar="FILE",
        help="also show the counterfactuals that counterfactual --json FILE wrote",
    )
    add_outputs(parser, "html", *PICTURES, "json")


def run(arguments: argparse.Namespace) -> None:
    """Prints a table or the causes of a token, and writes the requested files."""
    check_outputs(arguments)
    check_level(arguments)
    if arguments.level is not None and arguments.token is not None:
        raise UsageError("--level would be ignored with --token, which lists causes as they are.")
    check_saved(arguments.result)
    if arguments.counterfactuals:
        check_there("--counterfactuals", arguments.counterfactuals)
    from captum_llm_ext.result import GenerationAttributionResult

    result = GenerationAttributionResult.load(arguments.result)
    if arguments.token is None:
        text = report(result, arguments.top, arguments.level)
    else:
        try:
            text = _causes(result, arguments.token, arguments.top)
        except ValueError as error:
            raise UsageError(f"--token {arguments.token}: {error}") from error
    found = read_counterfactuals(arguments.counterfactuals) if arguments.counterfactuals else []
    text = "\n\n".join([text, *map(str, found)])
    write_outputs(arguments, result, text, result.plot_token_attr, found)


def _causes(result: "GenerationAttributionResult", token: str, k: int) -> str:
    """The causes of one token or of several, one per line, whatever their errors."""
    from captum_llm_ext.result.foils import list_foils

    span = re.fullmatch(r"(-?\d+):(-?\d+)", token)
    if span is not None:
        found = result.attribute_span(int(span[1]), int(span[2]))
        return _listed(" ".join(found.tokens), found.top(k))
    position = int(token) if re.fullmatch(r"-?\d+", token) else token
    causes = result.why(position, k)
    place = result.position(position)
    foils = list_foils(result, place, k)
    name = result.output_tokens[place]
    return _listed(name, causes, foils)


def _listed(name: str, causes: "list[Cause]", foils: str = "") -> str:
    lines = [
        f"  {paint(str(cause), 'raises' if cause.attribution > 0 else 'lowers')}"
        for cause in causes
    ]
    contrast = f" rather than {foils}" if foils else ""
    return "\n".join([f"{paint(name, 'token')}{contrast}  ←", *(lines or ["  nothing at all"])])
